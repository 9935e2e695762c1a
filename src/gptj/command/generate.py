"""`gptj generate`: its options, and the one of the three ways that they ask for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptj.command.model_options import MODEL_OPTIONS, adapter_option, no_mmap_option
from gptj.command.options import (
    FileName,
    ModelArgument,
    Sections,
    apply_options,
    option,
)
from gptj.command.printing import write_text
from gptj.command.together import check_strategy_options, strategy_options
from gptj.errors import shown
from gptj.reading.weight_files import split_weights
from gptj.sharding import Strategy

if TYPE_CHECKING:
    from gptj.command.opened_model import Request
    from gptj.command.prompts import Prompt

__all__ = ["HOW_OPTIONS", "GenerateOptions", "generate", "read_settings"]

_OPTIONS = (
    option("Prompts", "--prompts", type=FileName(), metavar="FILE", help="A prompt a line, or JSON lines as above; - "
            "is stdin."),
    option("Prompts", "--token-ids", metavar="IDS", help='The prompt as token ids: "1 2 3".'),
    option("Output", "--stream", is_flag=True, help="Print the text as it is made."),
    option("Output", "-i", "--interactive", is_flag=True, help="Continue what you type, turn by turn."),
    option("Output", "--json", "as_json", is_flag=True, help="Print token ids and text as JSON; for several prompts, "
            "an object a line."),
    *strategy_options("Model", ("tp", "dp")),
)  # fmt: skip
"""Options of `gptj generate` alone."""

HOW_OPTIONS = (
    option("Prompts", "--allow-special", is_flag=True, help="Read <|endoftext|> in a prompt as that token."),
    option("Prompts", "--truncate", type=click.Choice(("left",)), help="Cut the beginning of a prompt that is too "
            "long for the model. [default: refuse it]"),
    *MODEL_OPTIONS,
    no_mmap_option,
    option("Model", "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
            help="How many prompts to read at once."),
    option("Model", "--assistant", type=ModelArgument, metavar="DIR", help="A smaller model that guesses ahead; the "
            "text is the same."),
    adapter_option,
    option("Decoding", "--max-new-tokens", type=int, metavar="N", help="Tokens to add at most. [default: 40]"),
    option("Decoding", "--temperature", type=float, metavar="T", help="Sample; below 1 is bolder, above 1 more even, "
            "0 is greedy."),
    option("Decoding", "--top-k", type=int, metavar="K", help="Sample among the K likeliest tokens."),
    option("Decoding", "--top-p", type=float, metavar="P", help="Sample among the likeliest tokens that make up this "
            "probability."),
    option("Decoding", "--min-p", type=float, metavar="P", help="Sample among the tokens of at least P times the "
            "best one's probability."),
    option("Decoding", "--seed", type=int, metavar="N", help="Sample with this seed: in float32, the same text "
            "in every framework."),
    option("Decoding", "--num-beams", type=int, metavar="N", help="Search with N beams."),
    option("Decoding", "--repetition-penalty", type=float, metavar="X", help="Above 1, make said tokens unlikelier."),
    option("Decoding", "--stop", multiple=True, metavar="TEXT", help="End after this text. May be given several "
            "times."),
    option("Decoding", "--any-token", is_flag=True, help="Let it choose ids that the tokenizer does not know, too; "
            "they are shown as <|50300|>."),
    option("Decoding", "--set", "fields", multiple=True, metavar="NAME=VALUE", help="Any other field of "
            "GenerationConfig, as in --set no_repeat_ngram_size=3."),
)  # fmt: skip
"""The model to open, and how it continues a prompt: what every command that does so takes."""


@click.command(cls=Sections, short_help="Continue a prompt, or many, or turn by turn.")
@click.argument("directory", type=ModelArgument, metavar="DIR")
@click.argument("prompt", required=False)
@apply_options((*_OPTIONS, *HOW_OPTIONS))
def generate(directory: Path, prompt: str | None, **options: Any) -> None:
    """Continue PROMPT with the model in DIR; a PROMPT of - is all of stdin.

    Greedy, unless the folder's generation_config.json or one of --temperature, --top-k, --top-p, --min-p and --seed
    asks for sampling. Several prompts draw with the seed, the seed + 1, and so on.

    JSON lines have "prompt" or "token_ids", and may have "seed" and any field of GenerationConfig for this prompt
    alone: {"prompt": "Once", "max_new_tokens": 9}.
    """
    from gptj.command.continuation import continue_prompts, stream_prompts
    from gptj.command.converse import converse
    from gptj.command.together import together

    said = GenerateOptions.of(options)
    said.check_together(prompt)
    with together(said.request(directory)) as request:
        prompts = said.read_prompts(prompt)
        if said.interactive:
            converse(request, prompts, write=write_text, note=lambda line: click.echo(line, err=True))
        elif said.stream:
            stream_prompts(request, prompts, write=write_text)
        else:
            continue_prompts(request, prompts, batch_size=said.batch_size, as_json=said.as_json, write=write_text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options of `gptj generate`, as they are called there.

    Attributes:
        fields: the NAME=VALUE of each --set.
        decoding: the options that are fields of `GenerationConfig`, None where they are not given.
    """

    prompts: str | None
    token_ids: str | None
    allow_special: bool
    truncate: str | None
    stream: bool
    interactive: bool
    as_json: bool
    backend: str | None
    weights: str | None
    dtype: str | None
    no_mmap: bool
    batch_size: int
    assistant: Path | None
    adapter: Path | None
    quantize: str | None
    device: str
    strategy: Strategy | None
    dp: int | None
    tp: int | None
    seed: int | None
    stop: tuple[str, ...]
    any_token: bool
    fields: tuple[str, ...]
    decoding: Mapping[str, Any]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> GenerateOptions:
        """The options that click gives, those that are no field here in `decoding`."""
        own = {field.name for field in dataclasses.fields(cls)} & options.keys()
        decoding = {name: value for name, value in options.items() if name not in own}
        return cls(**{name: options[name] for name in own}, decoding=decoding)

    def check_together(self, prompt: str | None) -> None:
        """Refuse options that exclude each other.

        Raises:
            click.UsageError: two prompts or none, or two ways to print.
        """
        from gptj.command.prompts import STDIN

        ways = (prompt, self.prompts, self.token_ids)
        if sum(way is not None for way in ways) != 1 and not (self.interactive and ways == (None, None, None)):
            raise click.UsageError(
                'Give the prompt as text, or as --token-ids "1 2 3", or several with --prompts FILE.'
            )
        from_stdin = STDIN in (prompt, self.prompts)
        if self.interactive and (self.token_ids is not None or from_stdin or self.assistant is not None):
            raise click.UsageError("--interactive reads text from stdin: leave out --token-ids, -, and --assistant.")
        if sum((self.stream, self.interactive, self.as_json)) > 1:
            raise click.UsageError("Choose one of --stream, --interactive and --json.")
        check_strategy_options(self)
        if self.strategy is not None and (self.interactive or self.assistant):
            raise click.UsageError("--strategy is for one model and whole texts: leave out -i and --assistant.")
        if self.batch_size > 1 and (self.stream or self.interactive):
            raise click.UsageError("--batch-size is for whole texts: leave out --stream and --interactive.")

    def request(self, directory: Path) -> Request:
        """The request for the model in `directory`."""
        from gptj.command.opened_model import Request

        settings = read_settings(self.fields) | {k: v for k, v in self.decoding.items() if v is not None}
        directory, weights = split_weights(directory, self.weights)
        return Request(
            directory=directory,
            weights=weights,
            mmap=not self.no_mmap,
            backend=self.backend,
            dtype=self.dtype,
            assistant=self.assistant,
            adapter=self.adapter,
            quantize=self.quantize,
            device=self.device,
            strategy=self.strategy,
            dp=self.dp,
            tp=self.tp,
            settings=settings | ({"stop_strings": self.stop} if self.stop else {}),
            seed=self.seed,
            truncate=self.truncate is not None,
            allow_special=self.allow_special,
            any_token=self.any_token,
        )

    def read_prompts(self, prompt: str | None) -> list[Prompt]:
        """The prompts, from wherever they are; none where the first turn is to be typed."""
        from gptj.command.prompts import STDIN, Prompt, read_lines, read_prompt

        if self.prompts is not None:
            return read_lines(self.prompts)
        if self.token_ids is not None:
            return [Prompt(token_ids=_read_token_ids(self.token_ids))]
        if prompt is not None:
            return [read_prompt(STDIN) if prompt == STDIN else Prompt(prompt)]
        return []


def read_settings(assignments: Iterable[str]) -> dict[str, Any]:
    """The fields that NAME=VALUE assignments set, each value as JSON where it is some, else as text.

    Raises:
        click.BadParameter: no `=`, a name that stands there twice, or JSON that is nested too deeply.
    """
    fields: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise click.BadParameter(f"NAME=VALUE, not {shown(assignment)}", param_hint="--set")
        if name in fields:
            raise click.BadParameter(f"{shown(name)} stands there twice", param_hint="--set")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
        except RecursionError:
            raise click.BadParameter(f"{shown(name)}: nested too deeply for JSON", param_hint="--set") from None
    return fields


def _read_token_ids(text: str) -> tuple[int, ...]:
    words = text.replace(",", " ").split()
    try:
        return tuple(int(word) for word in words)
    except ValueError:
        raise click.BadParameter("whole numbers with spaces between them", param_hint="--token-ids") from None
