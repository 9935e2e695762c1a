"""Writes what transformers generates with the mesh fixture's weights, and what its processors make of random logits.

    python make_expected.py            with transformers 4.57.6 and torch 2.13.0, on a CPU: greedy, beams, processors
    python make_expected.py            with transformers 4.46.3 (tokenizers 0.20.3): diverse groups, contrastive search,
                                       which later versions moved out

Everything is float64. The tests replay the same calls over the NumPy oracle.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GPTJConfig, GPTJForCausalLM
from transformers.generation import logits_process as lp

HERE = Path(__file__).parent
EOS = 7
PAD = 158
FLATTER = 0.3  # the trained model is so sure of itself that most options would change nothing
PROMPTS = np.random.default_rng(11).integers(0, 160, (4, 5)).tolist()
PROMPTS += [[80, 91, 124, 63, 80], [133, 90, 121, 133, 90]]  # the model would go on with what is there already
PADDED = [[0, 0, 0, *PROMPTS[0][:2]], [0, *PROMPTS[1][:4]], PROMPTS[2]]
PADDED_MASK = [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]

OLD = {
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "groups of one": {"num_beams": 3, "num_beam_groups": 3, "diversity_penalty": 1.5, "num_return_sequences": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "contrastive, mild": {"penalty_alpha": 0.2, "top_k": 8, "repetition_penalty": 1.3},
}
NEW = {
    "greedy": {},
    "two eos": {"eos_token_id": [EOS, 51]},
    "repetition": {"repetition_penalty": 1.7},
    "encoder repetition": {"encoder_repetition_penalty": 2.5},
    "no repeated ngram": {"no_repeat_ngram_size": 2},
    "no ngram of the prompt": {"encoder_no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[133], [80, 91], [EOS]]},
    "bias": {"sequence_bias": [[[133], -2.0], [[90, 121], -4.0], [[12], 0.4]]},
    "min length": {"min_length": 14},
    "min new tokens": {"min_new_tokens": 11},
    "forced eos": {"forced_eos_token_id": 90},
    "decay": {"exponential_decay_length_penalty": [2, 1.6]},
    "suppress": {"suppress_tokens": list(range(40, 80)), "begin_suppress_tokens": list(range(0, 40))},
    "many together": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 3,
        "suppress_tokens": [5],
    },
    "beams": {"num_beams": 3},
    "beams, five returned": {"num_beams": 5, "num_return_sequences": 5},
    "beams, long": {"num_beams": 4, "length_penalty": 2.0},
    "beams, short": {"num_beams": 4, "length_penalty": -1.0},
    "beams, early": {"num_beams": 4, "early_stopping": True, "num_return_sequences": 2},
    "beams, never": {"num_beams": 4, "early_stopping": "never", "num_return_sequences": 2},
    "beams, never, short": {"num_beams": 4, "early_stopping": "never", "length_penalty": -0.5},
    "beams, two eos": {"num_beams": 3, "eos_token_id": [EOS, 51]},
    "beams, processors": {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "min_new_tokens": 4},
    "beams, normalised": {"num_beams": 3, "renormalize_logits": True, "suppress_tokens": [12, 13]},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


def model() -> GPTJForCausalLM:
    """The fixture's model in float64, less sure of itself and fonder of its eos, so that options tell."""
    config = GPTJConfig(
        vocab_size=160,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        rotary_dim=8,
        bos_token_id=None,
        eos_token_id=None,
    )
    built = GPTJForCausalLM(config).to(torch.float64).eval()
    with np.load(HERE.parent / "mesh_mp2" / "hf_state_dict_fp32.npz") as file:
        state = {name: torch.from_numpy(file[name]) for name in file.files}
    state["lm_head.weight"] *= FLATTER
    state["lm_head.bias"][EOS] += 1.0
    built.load_state_dict({name: value.to(torch.float64) for name, value in state.items()}, strict=False)
    return built


def generated(built: GPTJForCausalLM, options: dict, prompts: list, mask: list) -> list:
    """What each prompt gives on its own, and the padded ones in a batch."""
    options = {"max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False} | options
    result = built.generate(torch.tensor(prompts), attention_mask=torch.tensor(mask), **options)
    return result.tolist()


def processed() -> dict[str, np.ndarray]:
    """Random ids and logits, and what each processor makes of them."""
    random = np.random.default_rng(5)
    ids, logits = random.integers(0, 9, (4, 7)), random.normal(size=(4, 40)) * 3
    t = torch.from_numpy(logits)
    arrays = {"ids": ids, "logits": logits}
    for name, processor in {
        "penalize_repetition": lp.RepetitionPenaltyLogitsProcessor(1.4),
        "forbid_ngrams": lp.NoRepeatNGramLogitsProcessor(2),
        "bias_sequences": lp.SequenceBiasLogitsProcessor([[[3], 1.5], [[int(ids[0, -1]), 8], -2.0]]),
        "decay_length": lp.ExponentialDecayLengthPenalty((1, 1.3), [2, 5], 3),
        "keep_top_k": lp.TopKLogitsWarper(5),
        "keep_top_p": lp.TopPLogitsWarper(0.8),
        "keep_top_p_3": lp.TopPLogitsWarper(0.1, min_tokens_to_keep=3),
        "keep_min_p": lp.MinPLogitsWarper(0.1),
        "keep_min_p_3": lp.MinPLogitsWarper(0.99, min_tokens_to_keep=3),
        "keep_typical": lp.TypicalLogitsWarper(0.6),
        "keep_typical_3": lp.TypicalLogitsWarper(0.01, min_tokens_to_keep=3),
        "keep_above_epsilon": lp.EpsilonLogitsWarper(0.05),
        "keep_above_epsilon_3": lp.EpsilonLogitsWarper(0.9, min_tokens_to_keep=3),
        "keep_above_eta": lp.EtaLogitsWarper(0.05),
        "log_softmax": lp.LogitNormalization(),
    }.items():
        arrays[name] = processor(torch.from_numpy(ids), t.clone()).numpy()
    return arrays


def main() -> None:
    torch.set_num_threads(1)
    old = transformers.__version__.startswith("4.46")
    built, cases = model(), {}
    for name, options in (OLD if old else NEW).items():
        options = dict(options)
        if name == "lookup":  # transformers has it for one row at a time
            single = [generated(built, options, [p], [[1] * 5])[0] for p in PROMPTS]
            cases[name] = {"options": options, "singles": [[row] for row in single]}
            continue
        singles = [generated(built, options, [p], [[1] * 5]) for p in PROMPTS]
        cases[name] = {"options": options, "singles": singles}
        if name in ("greedy", "two eos") or (name.startswith("beams") and name not in ("beams, processors",)):
            cases[name]["padded"] = generated(built, options, PADDED, PADDED_MASK)
    facts = {
        "made with": {"transformers": transformers.__version__, "torch": torch.__version__},
        "eos": EOS,
        "pad": PAD,
        "flatter": FLATTER,
        "prompts": PROMPTS,
        "padded": PADDED,
        "padded_mask": PADDED_MASK,
        "cases": cases,
    }
    text = json.dumps(facts, separators=(",", ":")).replace('{"options"', '\n{"options"')
    (HERE / f"transformers_{transformers.__version__}.json").write_text(text + "\n")
    if not old:
        np.savez_compressed(HERE / f"processors_{transformers.__version__}.npz", **processed())


if __name__ == "__main__":
    main()
