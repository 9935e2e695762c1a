"""The table of strategies in docs/generation.md: what each does, and in which frameworks a test runs it.

A row's test is `test_strategies.py`'s that is marked `strategies`: it continues 8 prompts in its wing by the row's
settings, in the row's way, and wants the oracle's tokens. A test in a file named test_pt_*, test_tf_* or test_flax_*
runs in that wing alone, any other in all three, and none skips.

    python tests/documents/strategy_table.py          print the table
    python tests/documents/strategy_table.py --write  put it into docs/generation.md
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any, Literal

from feature_table import WINGS, wings_of
from page_parts import ROOT, Part, markdown_table

TABLES = Part("docs/generation.md", "strategies", "tests/documents/strategy_table.py")

Way = Literal["generate", "stream", "assisted", "conversation", "padded"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row: the meaning in a line, the settings that ask for it, and the way in which they are run."""

    meaning: str
    options: dict[str, Any]
    way: Way = "generate"


SAMPLE: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 1.5}
FLAT: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 5.0}

STRATEGIES: dict[str, Row] = {
    "greedy": Row("the best token, the lower id among equals", {}),
    "sampling": Row("a token drawn by softmax of the scores", SAMPLE),
    "beam search": Row("the most probable of `num_beams` continuations", {"num_beams": 3}),
    "beam sampling": Row("the same over drawn candidates", {"num_beams": 3, **SAMPLE}),
    "diverse beam search": Row(
        "groups of beams that avoid each other's tokens",
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    ),
    "contrastive search": Row(
        "the best of `top_k` tokens that is least like the text so far", {"penalty_alpha": 0.6, "top_k": 4}
    ),
    "prompt lookup": Row("guesses from earlier in the text; the output is the same", {"prompt_lookup_num_tokens": 3}),
    "assisted": Row("guesses by a smaller model; the output is the same", {"num_assistant_tokens": 3}, "assisted"),
    "assisted sampling": Row(
        "the same with draws, by the same random numbers", {"num_assistant_tokens": 3, **SAMPLE}, "assisted"
    ),
    "num_return_sequences": Row("several draws for each prompt", {"num_return_sequences": 2, **SAMPLE}),
    "stream": Row("the tokens of `generate`, each as it is made", SAMPLE, "stream"),
    "conversation": Row("turn by turn over one cache", SAMPLE, "conversation"),
    "padded prompts": Row("prompts of different lengths in one batch", SAMPLE, "padded"),
    "prefill_chunk_size": Row("the prompt enters the cache in chunks", {"prefill_chunk_size": 2}),
    "use_cache": Row("False: every step from the start", {"use_cache": False}),
}

PROCESSORS: dict[str, Row] = {
    "sequence_bias": Row("a bias where a sequence would be completed", {"sequence_bias": [[[5], 4.0], [[7, 8], -9.0]]}),
    "encoder_repetition_penalty": Row("the prompt's tokens likelier", {"encoder_repetition_penalty": 1.8}),
    "repetition_penalty": Row("said tokens unlikelier", {"repetition_penalty": 1.8}),
    "no_repeat_ngram_size": Row("no ngram twice", {"no_repeat_ngram_size": 1}),
    "encoder_no_repeat_ngram_size": Row("no ngram of the prompt again", {"encoder_no_repeat_ngram_size": 1}),
    "bad_words_ids": Row("sequences that are never completed", {"bad_words_ids": [[5], [7, 8]]}),
    "min_length": Row("no eos before this many columns", {"min_length": 12}),
    "min_new_tokens": Row("no eos before this many new tokens", {"min_new_tokens": 8}),
    "forced_bos_token_id": Row("the second token of a row of one", {"forced_bos_token_id": 6}),
    "forced_eos_token_id": Row("the last token at `max_length`", {"forced_eos_token_id": 9}),
    "remove_invalid_values": Row("NaN and infinities repaired", {"remove_invalid_values": True}),
    "exponential_decay_length_penalty": Row(
        "eos likelier with every token", {"exponential_decay_length_penalty": [2, 1.6]}
    ),
    "suppress_tokens": Row("tokens that are never chosen", {"suppress_tokens": [*range(40, 90)]}),
    "begin_suppress_tokens": Row("tokens that are not the first", {"begin_suppress_tokens": [*range(40, 90)]}),
    "temperature": Row("divides the logits; 0 is greedy", {**SAMPLE, "temperature": 3.0}),
    "top_k": Row("the k best and their equals", {**FLAT, "top_k": 5}),
    "top_p": Row("the fewest best with this much probability", {**FLAT, "top_p": 0.7}),
    "min_p": Row("those with this share of the best one's probability", {**FLAT, "min_p": 0.7}),
    "typical_p": Row("those whose surprise is nearest to the expected", {**FLAT, "typical_p": 0.5}),
    "epsilon_cutoff": Row("those of at least this probability", {**FLAT, "epsilon_cutoff": 0.01}),
    "eta_cutoff": Row("the same, lower where the distribution is flat", {**SAMPLE, "eta_cutoff": 0.5}),
    "renormalize_logits": Row(
        "log_softmax at the end", {"renormalize_logits": True, "num_beams": 3, "suppress_tokens": [*range(40, 110)]}
    ),
}
"""In the order in which they are applied."""

STOPS: dict[str, Row] = {
    "eos_token_id": Row("a row ends after any of these", {"eos_token_id": [*range(0, 160, 9)]}),
    "max_length": Row("at this many columns", {"max_length": 9, "max_new_tokens": None}),
    "max_new_tokens": Row("after this many new tokens", {"max_new_tokens": 3}),
    "max_time": Row("after this many seconds", {"max_time": 1e-9}),
    "stop_strings": Row("after the token that completes one of these", {"stop_strings": ["7", "12"]}),
}

ROWS = STRATEGIES | PROCESSORS | STOPS


def backed(folder: Path) -> tuple[str, ...]:
    """The wings in which a test that is marked `strategies` runs."""
    found: set[str] = set()
    for path in folder.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(d) == "pytest.mark.strategies" for d in node.decorator_list
            ):
                found |= wings_of(path)
    return tuple(wing for wing in WINGS if wing in found)


def table(folder: Path) -> str:
    """The three tables in Markdown: strategies and ways, processors, ends."""
    wings = backed(folder)
    cells = ["yes" if wing in wings else "-" for wing in WINGS]
    return "\n\n".join(
        markdown_table(
            [title, "what it means", *WINGS.values()],
            [[_code(name), row.meaning, *cells] for name, row in rows.items()],
        )
        for title, rows in (("strategy", STRATEGIES), ("processor, in its order", PROCESSORS), ("end of a row", STOPS))
    )


def _code(name: str) -> str:
    return f"`{name}`" if "_" in name else name


if __name__ == "__main__":
    TABLES.print_or_write(lambda: table(ROOT / "tests" / "backends"))
