"""The command line's kinds of options: names that are guessed at and completed, headings, and --debug anywhere.

At the end, the options and the types of arguments that several commands take.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import click
from click.shell_completion import CompletionItem

from gptj.backends import BACKENDS, likely_backend
from gptj.config.dtypes import DTYPES_CALLED, PARAMETER_DTYPES
from gptj.errors import InputError, did_you_mean, shown
from gptj.paths.hub import HubPlace, is_repository_id, locate, locate_source

__all__ = [
    "DEBUG_HELP",
    "BackendChoice",
    "BackendsChoice",
    "Command",
    "DtypeChoice",
    "FileName",
    "FiniteRange",
    "Inside",
    "Judging",
    "LazyGroup",
    "ModelArgument",
    "Names",
    "PathArgument",
    "Repository",
    "Sections",
    "SourceArgument",
    "WithSubcommands",
    "apply_options",
    "backend_names",
    "backends_option",
    "json_option",
    "option",
    "overwrite_option",
    "require_different",
    "revision_option",
    "weights_option",
]  # fmt: skip

DEBUG_HELP = "Show the traceback of an error."
_REVISION = "gptj.revision"  # where a context keeps what --revision says


class Names(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.5
    """One of some names, or with `several` a list of them with commas between, which gives a tuple.

    Args:
        values: the names; a function where they take an import to know.
        likely: the one that is meant by what is none of them; the default goes by the spelling.
        called: what else people call them.
        several: whether it is a list.
    """

    name = "name"

    def __init__(
        self,
        values: Iterable[str] | Callable[[], Iterable[str]],
        *,
        likely: Callable[[str], str | None] | None = None,
        called: Mapping[str, str] | None = None,
        several: bool = False,
    ) -> None:
        self._values = values
        self._likely = likely or self._nearest
        self._called = called or {}
        self._several = several

    @property
    def values(self) -> tuple[str, ...]:
        """The names."""
        return tuple(self._values() if callable(self._values) else self._values)

    def _nearest(self, value: str) -> str | None:
        called = {name: name for name in self.values} | {k: v for k, v in self._called.items() if v in self.values}
        return next((called[near] for near in difflib.get_close_matches(value.lower(), called, n=1, cutoff=0.5)), None)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """The names, as the help shows them."""
        return f"[{'|'.join(self.values)}]" + (",..." if self._several else "")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The name, or the tuple of names."""
        if not isinstance(value, str):
            return value
        return (
            tuple(self._one(part, param, ctx) for part in value.split(","))
            if self._several
            else self._one(value, param, ctx)
        )

    def _one(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = value.strip() if self._several else value
        if name in self.values:
            return name
        meant = self._likely(name)
        self.fail(
            f"{name!r} is not one of {', '.join(self.values)}." + (f" Did you mean {meant}?" if meant else ""),
            param,
            ctx,
        )

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin as what is typed does; in a list, those that are not in it yet."""
        before, comma, begun = incomplete.rpartition(",") if self._several else ("", "", incomplete)
        said = {name.strip() for name in before.split(",")}
        return [
            CompletionItem(f"{before}{comma}{name}")
            for name in self.values
            if name.startswith(begun.strip()) and name not in said
        ]


class FileName(click.Path):
    """A path that can be one: neither empty, as of a shell's variable that is not set, nor longer than any name may be.

    Args:
        inside: it is a name in another folder, so that nothing of the current one tells of it.
        options: of `click.Path`.
    """

    def __init__(self, *, inside: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._inside = inside

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, as click gives it."""
        text = os.fspath(value)
        problem = None
        if not text:
            problem = "an empty path; the current folder is ."
        elif "\0" in text:
            problem = f"{shown(text, longest=80)}: a NUL, which no path has"
        elif _is_too_long(text):
            problem = f"{shown(text, longest=80)}: too long for a path"
        elif text.startswith("~") and not self._inside and not os.path.lexists(text):
            problem = f"{shown(text, longest=80)}: a ~ that the shell has left as it is; write $HOME, or ./~"
        if problem is not None:
            self.fail(problem, param, ctx)
        return super().convert(value, param, ctx)


def _is_too_long(path: str) -> bool:
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


class FiniteRange(click.FloatRange):
    """A range of numbers that NaN is not in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not in the range {self._describe_range()}.", param, ctx)
        return number


def backend_names(names: Iterable[str], *, several: bool = False) -> Names:
    """The backends, where `torch` gets "did you mean pt"."""
    return Names(names, likely=likely_backend, several=several)


class Locate(Protocol):
    """Finds the folder of a path or repository id: `gptj.paths.hub.locate` and `locate_source`."""

    def __call__(self, name_or_path: Path, *, place: HubPlace) -> Path:
        """The folder."""


class Repository(FileName):
    """A path, or a repository of the Hugging Face hub: owner/name, or owner/name@revision.

    Args:
        find: gives its folder: of a repository, the one in the client's cache.
    """

    def __init__(self, find: Locate) -> None:
        super().__init__(path_type=Path)
        self._find = find

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The folder; of a command's argument, in the revision that --revision says."""
        path = super().convert(value, param, ctx)
        if not isinstance(path, Path):
            return path
        revision = None
        if ctx is not None and isinstance(param, click.Argument):  # an option's is said behind its @
            revision = ctx.meta.get(_REVISION)
        if revision is not None and not is_repository_id(path):
            raise InputError(
                "is for a repository of the hub",
                where="--revision",
                expected="OWNER/NAME",
                found=shown(str(path)),
                hint="Leave it out for a folder",
            )
        return self._find(path, place=HubPlace(revision=revision))


def revision_option(*, section: str = "") -> Callable[[Any], Any]:
    """--revision, which the command's `Repository` argument takes: a command itself does not see it."""
    return option(
        section,
        "--revision",
        metavar="REV",
        is_eager=True,  # so that it is known when the argument is looked up, wherever it stands
        expose_value=False,
        callback=lambda context, parameter, value: context.meta.__setitem__(_REVISION, value),
        help="A branch, tag or commit, where a repository of the hub is given. [default: main]",
    )


class Command(click.Command):
    """A command that takes --debug too, wherever it stands on the line; `main` looks for it there."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Its options, and --debug before --help."""
        *own, last = super().get_params(ctx)
        debug = click.Option(["--debug"], is_flag=True, expose_value=False, help=DEBUG_HELP)
        return [*own, debug, last]


class Judging(Command):
    """A command whose status 1 is a verdict: what keeps it from judging, of any kind, ends with `UNJUDGED`."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context, with the arguments parsed."""
        with _unjudged():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """The command's own value; all that it printed has reached its reader."""
        with _unjudged():
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()


UNJUDGED = 2
"""The status where nothing could be judged: a file that cannot be read, a wrong folder, a wrong argument."""


@contextlib.contextmanager
def _unjudged() -> Iterator[None]:
    """Mark an error, for `main`, with the status that it ends with."""
    try:
        yield
    except Exception as error:
        error.exit_status = UNJUDGED  # type: ignore[attr-defined]
        raise


class WithSubcommands(Command):
    """A command that is another one where its first argument is that one's name.

    Args:
        modules: each other command's module, by its name, which is also the name of the command in the module.
        options: of `click.Command`.
    """

    def __init__(self, *arguments: Any, modules: Mapping[str, str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._modules = modules

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of the command that is meant, with its arguments parsed."""
        if not args or args[0] not in self._modules:
            context = super().make_context(info_name, args, parent, **extra)
            # Said where it is no folder either: a folder may have any name.
            meant = did_you_mean(args[0], self._modules) if args and not context.resilient_parsing else None
            if meant and not os.path.lexists(args[0]):
                context.fail(f"No such command or folder {args[0]!r}. {meant}")
            return context
        name, *rest = args
        command: click.Command = getattr(importlib.import_module(self._modules[name]), name)
        return command.make_context(f"{info_name} {name}", rest, parent, **extra)


class Sections(Command):
    """A command whose help has its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list of options a heading."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "section", "Other options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class LazyGroup(click.Group):
    """Commands, each in a module that is imported when the command, or a list of all, is asked for.

    Args:
        modules: each command's module, by its name, which is also the name of the command in the module.
        called: what to say of what is no command, by the name that other people give one.
        options: of `click.Group`.
    """

    def __init__(
        self, *arguments: Any, modules: Mapping[str, str], called: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._modules = modules
        self._called = called or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, sorted."""
        return sorted(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, None where there is none."""
        if cmd_name not in self._modules:
            return None
        command: click.Command = getattr(importlib.import_module(self._modules[cmd_name]), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command and its arguments; click's own search for a near miss sees no command that is not loaded."""
        name = args[0]
        if name not in self._modules and not name.startswith("-") and not ctx.resilient_parsing:
            near = next(iter(difflib.get_close_matches(name.lower(), self._called, n=1, cutoff=0.8)), "")
            meant = self._called.get(name.lower()) or did_you_mean(name, self._modules) or self._called.get(near)
            if meant:
                ctx.fail(f"No such command {name!r}. {meant}")
        return super().resolve_command(ctx, args)


class _Option(click.Option):
    """An option that stands under the heading `section` of its command's help."""

    def __init__(self, *arguments: Any, section: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.section = section


def option(section: str, *names: str, **options: Any) -> Callable[[Any], Any]:
    """An option under a heading."""
    return click.option(*names, cls=_Option, section=section, **options)


def apply_options(options: Iterable[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """One decorator of several."""

    def decorate(function: Any) -> Any:
        for option in reversed([*options]):
            function = option(function)
        return function

    return decorate


# ---- what several commands take

PathArgument = FileName(path_type=Path)
Inside = FileName(inside=True)
ModelArgument = Repository(locate)
SourceArgument = Repository(locate_source)
BackendChoice = backend_names(BACKENDS)
BackendsChoice = backend_names(BACKENDS, several=True)
DtypeChoice = Names(PARAMETER_DTYPES, called=DTYPES_CALLED)


def require_different(
    context: click.Context, option: click.Parameter, names: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    """The values of an option that takes several, which must differ."""
    if names is not None and len(set(names)) != len(names):
        raise click.BadParameter(f"{shown(','.join(names))} names one twice")
    return names


backends_option = click.option(
    "--backends", type=BackendsChoice, callback=require_different,
    help="Which, with commas between. [default: all that are installed]",
)  # fmt: skip
adapter_option = click.option(
    "--adapter", type=PathArgument, metavar="DIR", help="A LoRA adapter's folder, to put to work."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is at the destination.")
weights_option = click.option(
    "--weights", type=Inside, metavar="FILE", help="Which weights file of DIR, where it holds several sets."
)
