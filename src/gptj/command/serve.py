"""`gptj serve`: the model in a folder behind OpenAI's HTTP interface."""

from __future__ import annotations

import logging
import os
import re
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from gptj.command.model_options import MODEL_OPTIONS, no_mmap_option
from gptj.command.options import (
    FiniteRange,
    ModelArgument,
    Sections,
    apply_options,
    option,
)

__all__ = ["named_folders", "serve"]

_OPTIONS = (
    option("Server", "--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 is everywhere."),
    option("Server", "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Which port; 0 is "
            "any that is free."),
    option("Server", "--name", metavar="NAME", help="What the model is called. [default: the folder's name]"),
    option("Server", "--api-key", envvar="GPTJ_API_KEY", show_envvar=True, metavar="KEY", help="Who asks must know it; "
            "better given by the variable, since others see a command line."),
    option("Server", "--cors", multiple=True, metavar="ORIGIN", help="Let pages of this origin ask, * for all. May be "
            "given several times."),
    option("Server", "--timeout", type=FiniteRange(min=0, min_open=True), default=600.0, show_default=True,
            metavar="S", help="Seconds that an answer may take."),
    option("Server", "--drain", type=FiniteRange(min=0, min_open=True), metavar="S", help="Seconds that answers "
            "have to finish after Ctrl-C. [default: as long as they need]"),
    option("Batch", "--max-batch", type=click.IntRange(1, 1024), default=8, show_default=True, metavar="N",
            help="How many texts to continue at once."),
    option("Batch", "--queue", type=click.IntRange(1, 1_000_000), default=256, show_default=True, metavar="N",
            help="How many may wait; the next is told to come again (429)."),
    option("Batch", "--no-warm-up", is_flag=True, help="Be ready before TensorFlow or Flax has compiled; the first "
            "requests wait for it."),
    option("Batch", "--prefix-tokens", type=click.IntRange(min=0), default=8192, show_default=True, metavar="N",
            help="Tokens of prompts to keep for others that begin alike; 0 keeps none."),
    *MODEL_OPTIONS,
    no_mmap_option,
    option("Model", "--adapter", "adapters", multiple=True, metavar="NAME=DIR", help="A LoRA adapter's folder, served "
            "as a model of this name beside the base. May be given several times."),
    option("Model", "--allow-special", is_flag=True, help="Read <|endoftext|> in a prompt as that token."),
    option("Model", "--any-token", is_flag=True, help="Let it choose ids that the tokenizer does not know, too."),
)  # fmt: skip


@click.command(cls=Sections, short_help="Answer OpenAI's clients over HTTP, many at once.")
@click.argument("directory", type=ModelArgument, metavar="DIR")
@apply_options(_OPTIONS)
def serve(directory: Path, **options: Any) -> None:
    """Answer /v1/completions and /v1/chat/completions with the model in DIR, and a page at / to try it.

    Requests are continued together and join and leave at any token; the same seed gives the same text whatever else
    is being made. Ctrl-C finishes what was begun, a second one ends at once.
    """
    key = os.environ.get("GPTJ_API_KEY") if options["api_key"] is None else options["api_key"]
    if key is not None and not (key.strip() and key.isascii() and key.isprintable()):
        raise click.UsageError("--api-key or GPTJ_API_KEY is empty, or has what no client can send: more than ASCII.")
    if not options["host"].strip():
        raise click.UsageError("--host is empty; 0.0.0.0 is everywhere.")
    if options["name"] is not None and not (options["name"].strip() and options["name"].isprintable()):
        raise click.UsageError("--name is empty, or cannot be written in a request.")
    for origin in options["cors"]:
        if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#@A-Z]+", origin):
            rule = "expected *, or an origin as browsers spell it, such as http://localhost:3000"
            raise click.UsageError(f"--cors: {rule}; found {origin!r}.")
    from gptj.backends import install_line, missing_from
    from gptj.errors import BackendError

    if missing := missing_from("serve"):
        raise BackendError(f"gptj serve needs {', '.join(missing)}", where="serve", hint=install_line("serve"))
    _serve(directory, options)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether the event loop says more than that a client left while pieces of its answer were written."""
    return record.getMessage() != "socket.send() raised exception."


def _serve(directory: Path, options: dict[str, Any]) -> None:
    import gptj
    from gptj.adapters import read_adapter
    from gptj.backends.surroundings import memory
    from gptj.command.opened_model import OpenedModel, Request
    from gptj.command.printing import write_text
    from gptj.command.waiting import waiting
    from gptj.reading.weight_files import split_weights
    from gptj.serving.app import Access, Limits, is_loopback, make_app
    from gptj.serving.chat import ChatTemplate
    from gptj.serving.engine import Engine
    from gptj.serving.metrics import Metrics
    from gptj.serving.server import Server, listen
    from gptj.serving.service import Service, servable
    from gptj.serving.warming import warm_up, warm_up_behind

    place, weights = split_weights(directory, options["weights"])
    request = Request(
        directory=place,
        weights=weights,
        **{name: options[name] for name in ("backend", "dtype", "quantize", "device", "allow_special", "any_token")},
        mmap=not options["no_mmap"],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no chat template is applied")  # here one is
        opened = OpenedModel(request, needs_tokenizer=False)
    base = servable(opened.config)
    adapters = named_folders(options["adapters"])
    for folder in adapters.values():
        read_adapter(folder).rows(opened.model_config)
    template = ChatTemplate.of_folder(opened.directory, opened.tokenizer)
    name = options["name"] or place.name or opened.directory.resolve().name
    if name in adapters:
        raise click.UsageError(f"--adapter: {name} is what the base is called; see --name.")
    loopback = is_loopback(options["host"])
    if not loopback and options["api_key"] is None:
        click.echo("warning: whoever reaches this machine may ask; --api-key keeps others out", err=True)
    listener = listen(options["host"], options["port"])
    if logging.lastResort is not None:  # writes what no library has a handler for to stderr, nameless
        logging.lastResort.setFormatter(logging.Formatter("gptj serve: %(asctime)s %(name)s: %(message)s"))
    if opened.backend == "tf":  # it warns of every size that is compiled
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
    logging.getLogger("asyncio").addFilter(_is_news)
    with opened.at_work():
        model = opened.load(float("inf"))
        for adapter, folder in adapters.items():
            opened.load_adapter(model, folder, adapter)
        engine = Engine(
            model,
            most_rows=options["max_batch"],
            most_waiting=options["queue"],
            prefix_tokens=options["prefix_tokens"],
            metrics=Metrics(),
            within=lambda: gptj.backend(opened.backend).on_device(opened.device),
            use_adapter=model.set_adapter if adapters else None,
        )
        service = Service(
            engine=engine,
            model_config=opened.model_config,
            tokenizer=opened.tokenizer,
            names={name: None, **{adapter: adapter for adapter in adapters}},
            base=base,
            processors=opened.processors,
            template=template,
            allow_special=options["allow_special"],
            created=int(time.time()),
        )
        access = Access(api_key=options["api_key"], origins=options["cors"], loopback=loopback)
        app = make_app(service, limits=Limits(answer_s=options["timeout"]), access=access)
        server = Server(app, close=engine.close, drain_s=options["drain"])
        engine.start()
        if opened.backend != "pt" and not options["no_warm_up"]:
            with waiting(f"compiling for {options['max_batch']} rows") as say:
                for one in (None, *adapters):
                    warm_up(engine, say, adapter=one)
            warm_up_behind(engine, [*adapters], free_bytes=lambda: memory()[1])
        host = f"[{options['host']}]" if ":" in options["host"] else options["host"]
        line = f"{name} in {opened.backend} at http://{host}:{listener.getsockname()[1]}\n"
        server.serve_on(listener, ready=lambda: write_text(line))
        if server.was_forced:
            raise KeyboardInterrupt


def named_folders(said: Iterable[str]) -> dict[str, Path]:
    """The folders of --adapter NAME=DIR by name."""
    from gptj.adapters.config import NAME, NAME_RULE

    folders: dict[str, Path] = {}
    for one in said:
        name, equals, folder = one.partition("=")
        if not (name and equals and folder) or name in folders:
            raise click.UsageError(f"--adapter: expected NAME=DIR, each name once; found {one}.")
        if not NAME.fullmatch(name):
            raise click.UsageError(f"--adapter: a name is of {NAME_RULE}; found {name}.")
        folders[name] = Path(folder)
    return folders
