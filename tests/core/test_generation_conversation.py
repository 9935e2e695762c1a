"""A conversation gives what its whole text would give, and reads nothing twice."""

from __future__ import annotations

from typing import Any

import pytest
from toy_decoder import ToyDecoder, toy_config

from gptj.errors import InputError
from gptj.generation import Conversation, Generates

CONFIG = toy_config()
TURNS = [[4, 5, 6, 7], [1], [2, 2, 9]]
EOS = 3
HOW: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": EOS, "pad_token_id": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 2.0, "repetition_penalty": 1.2},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "chunks": {"prefill_chunk_size": 2},
    "uncached": {"use_cache": False},
}


class Toy(Generates):
    def __init__(self) -> None:
        self.config = CONFIG
        self.made: list[ToyDecoder] = []

    def _decoder(self, batch: int, capacity: int) -> ToyDecoder:
        self.made.append(ToyDecoder(CONFIG, batch, capacity))
        return self.made[-1]

    def _native(self, array: Any) -> Any:
        return array


def answer(conversation: Conversation, ids: list[int], **options: Any) -> list[int]:
    return [int(step.tokens[0]) for step in conversation.stream(ids, **HOW, **options)]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_turn_is_what_the_whole_text_gives(name: str) -> None:
    options, conversation = SETTINGS[name], Toy().conversation()
    for number, turn in enumerate(TURNS):
        whole = [*conversation.ids, *turn]
        seed = number if "do_sample" in options else None
        expected = Toy().generate([whole], seed=seed, **HOW, **options)[0, len(whole) :].tolist()
        assert answer(conversation, turn, seed=seed, **options) == expected
        assert conversation.ids == [*whole, *(token for token in expected if token != EOS)]


def test_what_was_read_is_not_read_again() -> None:
    toy = Toy()
    conversation = toy.conversation()
    for turn in TURNS:
        answer(conversation, turn, sequence_bias=[[[EOS], -50.0]])
    (decoder,) = toy.made
    one = (1, 1)
    # A turn reads its own tokens, and the last of the answer before, whose successor nobody had asked for.
    assert decoder.calls == [(1, 4), *[one] * 5, (1, 1 + 1), *[one] * 5, (1, 1 + 3), *[one] * 5]


def test_an_answer_may_be_cut_short_and_the_oldest_be_forgotten() -> None:
    toy = Toy()
    conversation = toy.conversation(capacity=24)
    steps = conversation.stream([4, 5, 6, 7], **HOW)
    said = [int(next(steps).tokens[0]) for _ in range(2)]
    assert conversation.ids == [4, 5, 6, 7, *said]
    conversation.ids = conversation.ids[3:]
    whole = [7, *said, 8]
    assert answer(conversation, [8]) == Toy().generate([whole], **HOW)[0, 4:].tolist()
    assert len(toy.made) == 1


def test_an_eos_ends_the_answer_and_not_the_conversation() -> None:
    conversation = Toy().conversation()
    assert answer(conversation, [4, 5], sequence_bias=[[[EOS], 50.0]]) == [EOS]
    assert conversation.ids == [4, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "conversation: has one row .*found beam"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "conversation: has one row .*found contrastive"),
        ({"do_sample": True, "num_return_sequences": 2}, "conversation: has one row"),
        ({"max_new_tokens": 63}, "n_positions = 64"),
        ({"max_new_tokens": 30}, "conversation: full .*at most 24 tokens, found 32"),
    ],
)
def test_a_turn_that_cannot_be_is_refused_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    conversation = Toy().conversation(capacity=24)
    with pytest.raises(InputError, match=message):
        list(conversation.stream([4, 5], **HOW | options))
    assert conversation.ids == []


def test_hidden_states_of_a_prompt_are_all_of_them() -> None:
    conversation = Toy().conversation()
    answer(conversation, [4, 5])
    before = len(conversation.ids)
    asked = {"return_dict_in_generate": True, "output_hidden_states": True}
    step = next(conversation.stream([6], **HOW, **asked))
    assert step.hidden_states is not None
    assert step.hidden_states[-1].shape[1] == before + 1
