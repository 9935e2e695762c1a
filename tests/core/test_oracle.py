"""The oracle is GPT-J: by the original's own numbers, by a second derivation, and by its own invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mutants import Batch, logits_of, revealing_batch
from reference import MESH_CONFIG, mesh_outputs, mesh_weights, reference_logits, reference_loss

from gptj import GPTJConfig
from gptj.config import ACTIVATIONS
from gptj.errors import InputError
from gptj.parity.oracle import (
    Oracle,
    activation,
    causal_lm_loss,
    classification_loss,
    positions_of_mask,
    question_answering_loss,
    token_losses,
)
from gptj.parity.revealing import revealing_config, revealing_weights

FLOAT32_ABSOLUTE = 2e-5
"""The original computes in float32; two routes through it differ by 3.8e-6 on these logits."""

SAME_EQUATIONS = 1e-12
"""Two float64 derivations of logits near 5 may differ by some thousand units in the last place (9e-16 each)."""

SHIFTED = 1e-9
"""Rotary angles near 1,900 carry 2e-13 of rounding; what they turn is of size 1."""


@pytest.fixture(scope="module")
def config() -> GPTJConfig:
    return revealing_config()


@pytest.fixture(scope="module")
def oracle(config: GPTJConfig) -> Oracle:
    return Oracle(config, revealing_weights(config))


@pytest.fixture(scope="module")
def batch(config: GPTJConfig) -> Batch:
    return revealing_batch(config)


@pytest.fixture(scope="module")
def mesh() -> Oracle:
    return Oracle(GPTJConfig(**MESH_CONFIG), mesh_weights())


class TestAgainstTheOriginal:
    """mesh-transformer-jax itself, on a checkpoint that it trained."""

    def test_logits_are_the_originals(self, mesh):
        outputs = mesh_outputs()
        logits = mesh.forward(outputs["input_ids"]).logits
        assert np.abs(logits - outputs["logits_fp32"]).max() < FLOAT32_ABSOLUTE

    def test_losses_of_every_token_are_the_originals(self, mesh):
        outputs = mesh_outputs()
        losses = token_losses(mesh.forward(outputs["input_ids"]).logits, outputs["targets"])
        assert np.abs(losses - outputs["all_loss_fp32"]).max() < FLOAT32_ABSOLUTE

    def test_greedy_tokens_and_their_logits_are_the_originals(self, mesh):
        outputs = mesh_outputs()
        n_positions = mesh.config.n_positions
        for row, length in enumerate(outputs["gen_ctx_length"]):
            steps = min(16, n_positions - int(length))
            context = outputs["gen_context_right_aligned"][row : row + 1, n_positions - length :]
            tokens, logits = mesh.generate(context, max_new_tokens=steps)
            assert tokens[0, length:].tolist() == outputs["gen_tokens_fp32"][row, :steps].tolist()
            assert np.abs(logits[0] - outputs["gen_logits_fp32"][row, :steps]).max() < FLOAT32_ABSOLUTE

    @pytest.mark.parametrize("wrong", [None, 0, 3, 6], ids=str)
    def test_a_guess_of_the_text_saves_passes_and_changes_nothing(self, mesh, monkeypatch, wrong):
        ids, mask = np.array([[5, 6, 7], [0, 8, 9]]), np.array([[1, 1, 1], [0, 1, 1]])
        tokens, logits = mesh.generate(ids, mask, max_new_tokens=8)
        guess = tokens[:, 3:].copy()
        if wrong is not None:
            guess[1, wrong] = (guess[1, wrong] + 1) % mesh.config.vocab_size
        passes, forward = [], mesh.forward
        monkeypatch.setattr(mesh, "forward", lambda *given: passes.append(1) or forward(*given))
        found, again = mesh.generate(ids, mask, max_new_tokens=8, guess=guess)
        assert (found == tokens).all() and np.abs(again - logits).max() < SAME_EQUATIONS
        assert len(passes) == (1 if wrong is None else 8 - wrong)

    def test_the_fixture_would_show_a_lost_rotary_sign(self, mesh):
        outputs = mesh_outputs()

        class Wrong(Oracle):
            def rotary(self, positions):
                sin, cos = super().rotary(positions)
                return -sin, cos

        logits = Wrong(mesh.config, mesh_weights()).forward(outputs["input_ids"]).logits
        assert np.abs(logits - outputs["logits_fp32"]).max() > 1000 * FLOAT32_ABSOLUTE


class TestAgainstTheSecondDerivation:
    def test_logits_of_a_padded_batch_agree(self, config, oracle, batch):
        logits = logits_of(oracle, batch)
        for row in range(len(logits)):
            expected = reference_logits(
                config,
                revealing_weights(config),
                batch.input_ids[row].tolist(),
                visible=batch.attention_mask[row].astype(bool).tolist(),
                positions=batch.position_ids[row].tolist(),
            )
            assert np.abs(logits[row] - expected).max() < SAME_EQUATIONS

    def test_default_positions_count_from_the_left(self, config, oracle):
        expected = reference_logits(config, revealing_weights(config), [5, 6, 7, 8])
        assert np.abs(oracle.forward([[5, 6, 7, 8]]).logits[0] - expected).max() < SAME_EQUATIONS

    @pytest.mark.parametrize("rotary_dim", [2, 12, None, 64])
    def test_every_rotary_width_agrees(self, rotary_dim):
        config = revealing_config(rotary_dim=rotary_dim, n_layer=1)
        weights = revealing_weights(config)
        expected = reference_logits(config, weights, [1, 2, 3, 4, 5])
        found = Oracle(config, weights).forward([[1, 2, 3, 4, 5]]).logits[0]
        assert np.abs(found - expected).max() < SAME_EQUATIONS

    def test_the_causal_loss_agrees(self, oracle, config):
        tokens, labels = [5, 6, 7, 8, 9], [5, -100, 7, 8, 9]
        logits = oracle.forward([tokens]).logits
        expected = reference_loss(reference_logits(config, revealing_weights(config), tokens), labels)
        assert causal_lm_loss(logits, [labels]) == pytest.approx(expected, rel=1e-13)


class TestWhatMustChangeNothing:
    def test_a_shift_of_all_positions_by_1900(self, config, oracle, batch):
        near = logits_of(oracle, revealing_batch(config, first_position=0))
        assert np.abs(logits_of(oracle, batch) - near).max() < SHIFTED

    def test_what_stands_in_the_padding(self, config, oracle, batch):
        other = np.where(batch.attention_mask == 1, batch.input_ids, 3)
        seen = batch.attention_mask == 1
        changed = oracle.forward(other, batch.attention_mask, batch.position_ids).logits
        assert np.array_equal(changed[seen], logits_of(oracle, batch)[seen])

    def test_the_tokens_that_follow(self, oracle, batch):
        whole = logits_of(oracle, batch)
        part = oracle.forward(batch.input_ids[:, :10], batch.attention_mask[:, :10], batch.position_ids[:, :10]).logits
        assert np.abs(part - whole[:, :10]).max() < SAME_EQUATIONS

    def test_left_padding_of_a_sequence(self, config, oracle):
        alone = oracle.forward([[7, 8, 9]]).logits
        mask = [[0, 0, 1, 1, 1]]
        for positions in (None, positions_of_mask(mask)):
            padded = oracle.forward([[1, 1, 7, 8, 9]], mask, positions).logits
            assert np.abs(padded[:, 2:] - alone).max() < SAME_EQUATIONS

    def test_the_room_to_the_right_of_a_row_that_sees_nothing(self, oracle):
        short = oracle.forward([[1, 2]], [[0, 0]]).logits
        long = oracle.forward([[1, 2, 3]], [[0, 0, 0]]).logits
        assert np.abs(long[:, :2] - short).max() < SAME_EQUATIONS


class TestWhatComesBack:
    def test_hidden_states_are_what_each_block_reads_and_the_final_norm(self, config, oracle):
        output = oracle.forward([[1, 2, 3]])
        assert len(output.hidden_states) == config.n_layer + 1
        assert np.array_equal(output.hidden_states[0], oracle.read("transformer.wte.weight")[[[1, 2, 3]]])
        assert np.array_equal(output.logits, oracle.lm_head(output.hidden_states[-1]))

    def test_attention_weights_sum_to_one_or_to_zero_where_nothing_is_seen(self, config, oracle):
        attentions = oracle.forward([[1, 2, 3]], [[0, 1, 1]], attentions=True).attentions
        assert len(attentions) == config.n_layer and attentions[0].shape == (1, config.n_head, 3, 3)
        assert np.allclose(attentions[0].sum(-1), [0, 1, 1], atol=1e-15)

    def test_float32_computes_in_float32_throughout(self, config):
        output = Oracle(config, revealing_weights(config), dtype="float32").forward([[1, 2, 3]], attentions=True)
        assert {a.dtype for a in (output.logits, *output.hidden_states, *output.attentions)} == {np.dtype("float32")}

    def test_a_head_mask_of_zeros_leaves_the_mlp_alone(self, config, oracle):
        silent = oracle.forward([[1, 2, 3]], head_mask=np.zeros(config.n_head)).logits
        weights = {
            name: np.zeros_like(value) if "out_proj" in name else value
            for name, value in revealing_weights(config).items()
        }
        assert np.allclose(silent, Oracle(config, weights).forward([[1, 2, 3]]).logits, atol=SAME_EQUATIONS)

    def test_embeddings_given_are_those_looked_up(self, oracle):
        embeds = oracle.embed(np.array([[1, 2, 3]]))
        assert np.array_equal(oracle.forward(inputs_embeds=embeds).logits, oracle.forward([[1, 2, 3]]).logits)

    def test_token_types_add_rows_of_the_same_table(self, oracle):
        embeds = oracle.embed(np.array([[1, 2]])) + oracle.embed(np.array([[4, 5]]))
        typed = oracle.forward([[1, 2]], token_type_ids=[[4, 5]]).logits
        assert np.array_equal(typed, oracle.forward(inputs_embeds=embeds).logits)

    def test_a_tied_head_reads_the_embedding_and_its_own_bias(self):
        config = revealing_config(tie_word_embeddings=True)
        weights = revealing_weights(config)
        assert "lm_head.weight" not in weights
        output = Oracle(config, weights).forward([[1, 2]])
        expected = (
            output.hidden_states[-1] @ weights["transformer.wte.weight"].T.astype(float) + weights["lm_head.bias"]
        )
        assert np.allclose(output.logits, expected, atol=1e-15)

    def test_a_bare_model_has_the_same_hidden_states(self, config, oracle):
        bare = Oracle(config, revealing_weights(config, head="base"), bare=True).forward([[1, 2]], logits=False)
        assert np.array_equal(bare.hidden_states[-1], oracle.forward([[1, 2]]).hidden_states[-1])

    def test_weights_are_read_one_at_a_time_and_each_once(self, config):
        weights, read = revealing_weights(config), []

        def reads(name: str):
            read.append(name)
            return weights[name]

        Oracle(config, reads).forward([[1, 2]])
        assert sorted(read) == sorted(weights)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"input_ids": [[1, 216]]}, r"input_ids\[0\]\[1\]: no such token \(expected 0 to 215, found 216\)"),
            ({"input_ids": [[1]], "position_ids": [[2056]]}, "no such position .*2055, found 2056"),
            ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "attention_mask: of another shape"),
        ],
    )
    def test_a_wrong_argument_is_refused_by_name(self, oracle, arguments, words):
        with pytest.raises(InputError, match=words):
            oracle.forward(**arguments)


class TestHeads:
    def test_a_class_is_read_at_the_last_token_that_is_not_padding(self, config):
        oracle = Oracle(config, revealing_weights(config, head="sequence_classification"))
        pad = config.pad_token_id
        right, left = oracle.classify([[1, 2, 3, pad, pad]]), oracle.classify([[pad, pad, 1, 2, 3]], [[0, 0, 1, 1, 1]])
        alone = oracle.classify([[1, 2, 3]])
        assert alone.shape == (1, 5)
        assert np.abs(right - alone).max() < SAME_EQUATIONS and np.abs(left - alone).max() < SAME_EQUATIONS

    def test_a_span_is_the_two_columns(self, config):
        weights = revealing_weights(config, head="question_answering")
        start, end = Oracle(config, weights).answer([[1, 2, 3]])
        hidden = Oracle(config, weights).forward([[1, 2, 3]], logits=False).hidden_states[-1]
        both = hidden @ weights["qa_outputs.weight"].T.astype(float) + weights["qa_outputs.bias"]
        assert np.allclose(np.stack([start, end], -1), both, atol=1e-15)


class TestLosses:
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]]))

    def test_each_token_loses_its_own_logarithm(self):
        assert token_losses(self.logits, [[0, 2, -100]]) == pytest.approx(-np.log([[0.5, 0.7, 1.0]]))

    def test_the_label_before_the_shift_is_that_of_the_next_position(self):
        assert causal_lm_loss(self.logits, [[-100, 1, 2]]) == pytest.approx(-(math.log(0.25) + math.log(0.7)) / 2)

    def test_where_nothing_is_counted_nothing_is_lost(self):
        assert causal_lm_loss(self.logits, [[0, -100, -100]]) == 0

    def test_huge_logits_overflow_nothing(self):
        assert token_losses(np.array([[1e4, -1e4]]), [0]).tolist() == [0.0]

    def test_a_place_past_the_text_is_not_counted(self):
        start = self.logits[..., 0]
        one = question_answering_loss(start, start, [1], [1])
        assert question_answering_loss(np.repeat(start, 2, 0), np.repeat(start, 2, 0), [1, 9], [1, 3]) == one

    @pytest.mark.parametrize(
        ("problem_type", "labels", "expected"),
        [
            ("regression", [[1.0, 3.0]], 0.5),
            ("single_label_classification", [1], math.log(1 + math.exp(-1))),
            (
                "multi_label_classification",
                [[0.0, 1.0]],
                (math.log(1 + math.e) + math.log(1 + math.exp(-2))) / 2,
            ),
        ],
    )
    def test_each_problem_type_has_its_loss(self, problem_type, labels, expected):
        assert classification_loss([[1.0, 2.0]], labels, problem_type=problem_type) == pytest.approx(expected)


class TestActivations:
    at = np.array([-30.0, -2.0, -0.5, 0.0, 0.5, 2.0, 30.0])

    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_every_one_of_the_config_is_here_and_keeps_its_dtype(self, name):
        assert activation(name, self.at.astype(np.float32)).dtype == np.float32
        assert np.isfinite(activation(name, self.at * 100)).all()

    @pytest.mark.parametrize(
        ("name", "at_two"),
        [
            ("gelu", 2 * 0.9772498680518208),  # the normal integral up to 2
            ("gelu_new", 1 + math.tanh(math.sqrt(2 / math.pi) * (2 + 0.044715 * 8))),
            ("relu", 2.0),
            ("silu", 2 / (1 + math.exp(-2))),
            ("tanh", math.tanh(2)),
        ],
    )
    def test_its_value_at_two(self, name, at_two):
        assert activation(name, self.at)[-2] == pytest.approx(at_two, rel=1e-15)

    def test_synonyms_are_the_same_and_gelu_fast_nearly(self):
        new = activation("gelu_new", self.at)
        assert np.array_equal(activation("gelu_pytorch_tanh", self.at), new)
        assert np.array_equal(activation("swish", self.at), activation("silu", self.at))
        assert 0 < np.abs(activation("gelu_fast", self.at) - new).max() < 1e-9

    def test_an_unknown_one_is_refused_with_the_choices(self):
        with pytest.raises(InputError, match=r"gelu_newer: no such activation .*gelu_new"):
            activation("gelu_newer", self.at)


def test_positions_count_what_the_mask_lets_in():
    assert positions_of_mask([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).tolist() == [
        [0, 0, 0, 1, 1, 2],
        [0, 1, 2, 3, 4, 5],
    ]
