"""Fine-tuning's data and numbers by NumPy alone: documents, windows, the order, the schedule, the settings."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
from finetune_samples import LINES, lines_file, text_file
from tokenizer_samples import small

from gptj.errors import CheckpointWarning, FormatError, InputError, MissingFileError
from gptj.finetune.data import Batches, Document, make_windows, read_documents
from gptj.finetune.schedule import LossScale, clip_factor, learning_rate
from gptj.finetune.settings import Settings

TOKENIZER = small()
END = TOKENIZER.eos_token_id


def windows(documents, *, length=8, pack=True, tmp="data"):
    return make_windows(tmp, documents, TOKENIZER, length=length, pack=pack)


# ---- documents


def test_a_text_file_is_one_document(tmp_path):
    assert read_documents(text_file(tmp_path, "a\r\n\nb\n")) == [Document("a\n\nb\n")]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.ndjson", "data", "data.dat"])
def test_json_lines_are_texts_or_prompts_and_completions(tmp_path, name):
    path = lines_file(
        tmp_path, [{"text": "a"}, {"prompt": "b", "completion": "c"}, {"prompt": "", "completion": "d"}], name
    )
    path.write_text(path.read_text().replace("\n", "\n\n", 1))
    assert read_documents(path) == [Document("a", line=1), Document("c", "b", 3), Document("d", "", 4)]


def test_a_text_file_may_look_like_json(tmp_path):
    assert read_documents(lines_file(tmp_path, [{"text": "a"}], "data.txt")) == [Document('{"text": "a"}\n')]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('"text"', "line 2: not a JSON object"),
        ("{}", "line 2: no prompt and no completion"),
        ('{"prompt": "a"}', "line 2: no completion"),
        ('{"completion": "a"}', "line 2: no prompt"),
        ('{"text": "a", "prompt": "b"}', "line 2: text beside a prompt"),
        ('{"text": "a", "completion": "b"}', "line 2: text beside a prompt or a completion"),
        ('{"text": 1}', "line 2: text: not text"),
        ('{"text": null}', "line 2: text: not text"),
        ('{"text": ["a"]}', "line 2: text: not text"),
        ('{"prompt": 1, "completion": "a"}', "line 2: prompt: not text"),
        ('{"prompt": "a", "completion": {}}', "line 2: completion: not text"),
        ('{"text": ""}', "line 2: text: nothing to learn"),
        ('{"prompt": "a", "completion": ""}', "line 2: completion: nothing to learn"),
        ('{"Text": "a"}', "line 2: no prompt and no completion.*Text"),
        ('{"messages": []}', "line 2.*Render each conversation"),
        ('{"text": "a", "text": "b"}', "line 2: the key 'text' stands twice"),
        ('{"text": NaN}', "line 2: NaN is not JSON"),
        ('{"text": "\\ud800"}', "line 2: text: half a character"),
        ('{"text": "a"', "line 2: not JSON"),
        ('{"text": "a"} {"text": "b"}', "line 2: not JSON"),
        ("[" * 100_000, "line 2: nested too deeply"),
    ],
)
def test_a_malformed_line_is_refused_by_file_and_line(tmp_path, line, words):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n')
    with pytest.raises(InputError, match=f"data.jsonl: {words}"):
        read_documents(path)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", InputError, "nothing to learn"),
        (b" \n\n", InputError, "nothing to learn"),
        (b"a\nb\xff\n", FormatError, "line 2: not UTF-8"),
        (b"a\n\nb\0\n", FormatError, "line 3: not UTF-8 .*NUL at offset 4"),
        (b'[{"text": "a"}]', InputError, "line 1: a JSON array"),
        (b'{\n "text": "a"\n}\n', InputError, "line 1: a JSON object over several lines.*jq -c"),
        (gzip.compress(b'{"text": "a"}', mtime=0), FormatError, "no text .found gzip.. Unpack it first"),
        (b"PAR1\x15\x04\x15", FormatError, "no text .found Parquet"),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_malformed_file_is_refused(tmp_path, data, error, words, suffix):
    if suffix == "txt" and data[:1] in (b"[", b"{"):
        return
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(data)
    with pytest.raises(error, match=words):
        read_documents(path)


@pytest.mark.parametrize("name", ["data.csv", "data.TSV"])
def test_a_table_is_no_text_to_learn(tmp_path, name):
    path = tmp_path / name
    path.write_text("prompt,completion\na,b\n")
    with pytest.raises(InputError, match=r"a table .*a JSON object a line"):
        read_documents(path)


def test_no_file_and_no_regular_file_are_refused(tmp_path):
    with pytest.raises(MissingFileError):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(FormatError, match="not a regular file"):
        read_documents(tmp_path)


def test_fields_that_are_not_learnt_are_said_once(tmp_path):
    path = lines_file(tmp_path, [{"text": "a", "id": 1}, {"text": "b", "id": 2}])
    with pytest.warns(CheckpointWarning, match="line 1: fields that are not learnt: 'id'") as caught:
        assert len(read_documents(path)) == 2
    assert len(caught) == 1


# ---- windows


def test_packed_windows_predict_every_token_once():
    texts = ["the quick brown fox", "jumps over", "the lazy dog" * 5]
    ids = [token for text in texts for token in [*TOKENIZER.encode(text), END]]
    packed = windows([Document(text) for text in texts])
    predicted = np.concatenate([row[1:][row[1:] != -100] for row in packed.labels])
    assert predicted.tolist() == ids[1:]
    assert packed.learnt == len(ids) - 1
    assert packed.ids.shape == (len(packed), 8) and packed.ids[0].tolist() == ids[:8]
    assert packed.ids[1, 0] == packed.ids[0, -1]


def test_a_prompt_is_not_learnt_and_is_encoded_apart():
    document = Document(" plus", "one")
    padded = windows([document], length=32, pack=False)
    prompt, completion = TOKENIZER.encode("one"), [*TOKENIZER.encode(" plus"), END]
    assert padded.ids[0].tolist() == [*prompt, *completion]
    assert padded.labels[0].tolist() == [-100] * len(prompt) + completion
    assert padded.learnt == len(completion)


def test_padded_windows_begin_with_a_document_each():
    texts = ["a", "the quick brown fox jumps over the lazy dog", "bc"]
    padded = windows([Document(text) for text in texts], length=16, pack=False)
    encoded = [[*TOKENIZER.encode(text), END] for text in texts]
    starts = [row[0] for row in padded.ids]
    assert {ids[0] for ids in encoded} <= set(starts)
    assert padded.learnt == sum(len(ids) - 1 for ids in encoded)


def test_a_prompt_and_completion_longer_than_a_window_are_refused_and_packed():
    document = Document("b" * 20, "a" * 20, line=7)
    with pytest.raises(InputError, match=r"line 7: longer than a window .expected at most 8 tokens"):
        windows([document], pack=False)
    with pytest.warns(CheckpointWarning, match=r"line 7: longer than a window.*at most 8 tokens") as caught:
        packed = windows([Document("a"), document, document, Document("b" * 40)])
    assert len(caught) == 1  # not of a text: all of it is learnt, and it has no prompt to be parted from
    assert packed.learnt == sum(1 + len(TOKENIZER.encode(x)) for x in ("a", "b" * 20, "b" * 20, "b" * 40)) - 1


def test_windows_that_teach_nothing_are_left_out():
    with pytest.warns(CheckpointWarning, match="longer than a window"):
        packed = windows([Document("b", "a" * 40)], length=4)
    assert (packed.labels[:, 1:] != -100).any(1).all()
    assert packed.learnt == 2


def test_nothing_to_predict_is_refused():
    class Endless:
        eos_token_id = None

        def encode(self, text):
            return [5]

    with pytest.raises(InputError, match="two tokens or more"):
        make_windows("data", [Document("a")], Endless(), length=8, pack=True)


# ---- order


def some_windows(count, length=8):
    return windows([Document("abcdefgh" * count)], length=length)


def test_the_order_is_a_known_permutation_of_philox():
    batches = Batches(some_windows(2), 4, seed=0)
    count = len(batches.windows)
    key = np.array([0, 3], np.uint64)
    assert batches.order(3).tolist() == np.argsort(np.random.Philox(key=key).random_raw(count)).tolist()
    # The first numbers of Philox under this key, for whoever computes them elsewhere.
    assert [hex(n) for n in np.random.Philox(key=np.array([7, 1], np.uint64)).random_raw(2)] == PHILOX_7_1


PHILOX_7_1 = ["0xe1e9589fbf7f6f1d", "0x5e794bda66c92f56"]


def test_every_epoch_has_each_window_once_in_another_order():
    batches = Batches(some_windows(20), 3, 2, seed=1)
    count = len(batches.windows)
    epochs = []
    for epoch in range(2):
        rows = []
        for step in range(batches.per_epoch):
            for batch in batches.of_update(epoch * batches.per_epoch + step):
                assert batch.ids.shape[0] == 3
                rows += [
                    tuple(row) for row, labels in zip(batch.ids, batch.labels, strict=True) if (labels != -100).any()
                ]
        assert len(rows) == count
        epochs.append(rows)
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert Batches(batches.windows, 3, 2, seed=2).order(0).tolist() != batches.order(0).tolist()


def test_the_last_batches_of_an_epoch_are_filled_with_rows_that_teach_nothing():
    batches = Batches(some_windows(20), 4, 2, seed=0)
    last = batches.of_update(batches.per_epoch - 1)
    assert sum(batch.learnt for batch in last) == sum(int((batch.labels[:, 1:] != -100).sum()) for batch in last)
    total = sum(batch.learnt for step in range(batches.per_epoch) for batch in batches.of_update(step))
    assert total == batches.windows.learnt


def test_an_evaluation_goes_through_everything_once():
    batches = Batches(some_windows(11), 4)
    assert sum(batch.learnt for batch in batches) == batches.windows.learnt


def test_the_hash_changes_with_any_token_and_label():
    one = windows([Document("abc", "d")], pack=False)
    for changed in ([Document("abd", "d")], [Document("dabc")], [Document("abc", "e")]):
        assert windows(changed, pack=False).sha256 != one.sha256
    assert windows([Document("abc", "d")], pack=False).sha256 == one.sha256


# ---- numbers


@pytest.mark.parametrize(
    ("schedule", "warmup", "shares"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [0.5, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("linear", 0.5, [0.5, 1, 1, 0.5]),
        ("cosine", 0, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("cosine", 9, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, warmup, shares):
    settings = Settings(lr=0.5, schedule=schedule, warmup=warmup)
    found = [learning_rate(settings, step, 4) for step in range(4)]
    assert found == [float(np.float32(0.5 * share)) for share in shares]


def test_the_gradient_is_clipped_by_its_norm():
    assert [clip_factor(norm, 2.0) for norm in (1.0, 2.0, 8.0, 0.0)] == [1.0, 1.0, 0.25, 1.0]
    assert clip_factor(8.0, 0) == 1.0


def test_the_loss_scale_is_halved_and_doubled():
    assert LossScale().after(finite=False) == LossScale(32768.0, 0)
    assert LossScale(8.0, 5).after(finite=True) == LossScale(8.0, 6)
    assert LossScale(8.0, 1999).after(finite=True) == LossScale(16.0, 0)


def test_the_peak_is_higher_for_an_adapter():
    assert (Settings().peak, Settings(lora=8).peak, Settings(lora=8, lr=1).peak) == (2e-5, 2e-4, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "--steps: breaks its rule .expected a whole number from 1 to 2147483647, found 0"),
        ({"steps": 1.5}, "--steps"),
        ({"steps": 10**400}, "--steps: breaks its rule .expected a whole number from 1 to"),
        ({"epochs": 2**31}, "--epochs"),
        ({"batch": 10**21}, "--batch"),
        ({"length": 2**31}, "--length"),
        ({"steps": True}, "--steps"),
        ({"epochs": -1}, "--epochs"),
        ({"steps": 1, "epochs": 1}, "--epochs: given beside --steps"),
        ({"batch": 0}, "--batch"),
        ({"batch": None}, "--batch"),
        ({"accumulate": 0}, "--accumulate"),
        ({"length": 1}, "--length"),
        ({"lr": 0}, "--lr: breaks its rule .expected a number above 0"),
        ({"lr": math.nan}, "--lr"),
        ({"lr": math.inf}, "--lr"),
        ({"lr": "1"}, "--lr"),
        ({"schedule": "cosinus"}, "--schedule.*Did you mean cosine"),
        ({"schedule": 3}, "--schedule"),
        ({"warmup": -1}, "--warmup"),
        ({"warmup": 1.5}, "--warmup.*a whole number of updates, or a share below 1"),
        ({"weight_decay": -0.1}, "--weight-decay"),
        ({"clip": -1}, "--clip"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**64}, "--seed"),
        ({"dtype": "float64"}, "--dtype"),
        ({"dtype": "fp16"}, "--dtype"),
        ({"pack": 1}, "--pack"),
        ({"checkpoint_gradients": "yes"}, "--checkpoint-gradients"),
        ({"lora": 0}, "--lora"),
        ({"lora_alpha": 2.0}, "--lora-alpha: is of an adapter"),
        ({"lora": 4, "lora_alpha": 1e300}, "--lora-alpha: breaks its rule"),
        ({"lora": 4, "lora_targets": ()}, "--lora-targets"),
        ({"lora_targets": ("q_proj",)}, "--lora-targets: is of an adapter"),
        ({"eval_every": 0}, "--eval-every"),
        ({"save_every": 0}, "--save-every"),
        ({"lr": 1e39}, "--lr: breaks its rule .expected a number, 1e-15 to 1e.15, found"),
        ({"lr": 1e-60}, "--lr"),
        ({"weight_decay": 1e300}, "--weight-decay.*, or 0"),
        ({"clip": 1e-300}, "--clip.*, or 0"),
        ({"lora": 999_999_999}, "--lora: breaks its rule .expected a whole number from 1 to"),
    ],
    ids=str,
)
def test_a_setting_that_breaks_its_rule_is_refused_by_its_option(changes, words):
    with pytest.raises(InputError, match=words):
        Settings(**changes)


def test_settings_survive_json_and_name_what_changed():
    settings = Settings(steps=3, lr=1e-4)
    stored = json.loads(json.dumps(settings.to_dict()))
    assert settings.changes(stored) == []
    adapted = Settings(lora=2, lora_targets=("q_proj",))
    assert adapted.changes(json.loads(json.dumps(adapted.to_dict()))) == []
    assert Settings(steps=4, lr=1e-4, save_every=9).changes(stored) == [("--steps", 3, 4)]


def test_the_samples_are_what_they_say():
    assert len({json.dumps(line) for line in LINES}) == len(LINES)
