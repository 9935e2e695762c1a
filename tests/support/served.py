"""A server on a loopback port, in this process, and a client of a few lines."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from logit_samples import OnNumPy
from toy_decoder import ToyDecoder

from gptj.config import GPTJConfig
from gptj.generation import GenerationConfig, Step, generate, known_tokens_only
from gptj.serving.app import Access, Limits, make_app
from gptj.serving.engine import Engine
from gptj.serving.server import Server, listen
from gptj.serving.service import Service
from gptj.text.tokenizer import GPTJTokenizer

TEXTS = ["Once upon a time there was a little fox. " * 5, "naïve 🤗 hello world, the quick brown fox jumps over it"]


def small_tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(TEXTS, 290)


class ToyModel:
    """A model of no framework.

    Args:
        slow_s: what a call of it takes at least.
        held: whether its logits stay on a device, which NumPy pretends to be.

    Attributes:
        joins: whether its decoders are computed together, each as it is alone.
    """

    joins = False

    def __init__(self, vocab_size: int = 300, n_positions: int = 128, slow_s: float = 0.0, held: bool = False) -> None:
        self.config = GPTJConfig(
            vocab_size=vocab_size, n_positions=n_positions, n_embd=4, n_layer=1, n_head=1, rotary_dim=4,
            eos_token_id=289, bos_token_id=289,
        )  # fmt: skip
        self.slow_s, self.held, self._joins_calls = slow_s, held, self.joins
        self.decoders: list[ToyDecoder] = []

    def _decoder(self, batch: int, capacity: int) -> ToyDecoder:
        time.sleep(self.slow_s)
        made = ToyDecoder(self.config, batch, capacity)
        made.joins = self._joins_calls

        def slowed(inner: Callable[..., Step]) -> Callable[..., Step]:
            def run(*arguments: Any, **options: Any) -> Step:
                time.sleep(self.slow_s)
                step = inner(*arguments, **options)
                return Step(OnNumPy(step.logits)) if self.held else step

            return run

        made._run = slowed(made._run)  # type: ignore[method-assign]
        made._run_rows = slowed(made._run_rows)  # type: ignore[method-assign]
        self.decoders = [*self.decoders[-20:], made]
        return made

    def generate(self, ids: Any, config: GenerationConfig, *, seed: Any, logits_processor: Any) -> Any:
        return generate(
            self._decoder, ids, model_config=self.config, generation_config=config, seed=seed,
            logits_processor=logits_processor,
        )  # fmt: skip

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)


class Served:
    """A running server.

    Attributes:
        engine, service: those under it.
        port: where it listens.
    """

    def __init__(
        self, model: Any, *, limits: Limits | None = None, access: Access | None = None, **options: Any
    ) -> None:
        self.model = model
        template = options.pop("template", None)
        tokenizer = options.pop("tokenizer", "small")
        self.tokenizer = small_tokenizer() if tokenizer == "small" else tokenizer
        base = options.pop("base", None) or GenerationConfig.from_model_config(model.config)
        adapters = options.pop("adapters", ())
        self.engine = Engine(model, **options)
        self.service = Service(
            engine=self.engine,
            model_config=model.config,
            tokenizer=self.tokenizer,
            names={"tiny": None, **{one: one for one in adapters}},
            base=base.replace(pad_token_id=0, max_new_tokens=40),
            processors=self.processors,
            template=template,
        )
        app = make_app(self.service, limits=limits, access=access)
        self.server = Server(app, close=self.engine.close)
        self._listener = listen("127.0.0.1", 0)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self.server.serve_on, args=(self._listener,), daemon=True)

    def processors(self, config: GenerationConfig) -> list[Any]:
        if self.tokenizer is None:
            return []
        return [known_tokens_only(len(self.tokenizer), but=config.eos_token_ids)]

    def __enter__(self) -> Served:
        self.engine.start()
        self._thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server did not end"
        assert not self.engine.is_alive

    # ---- the client

    def post(self, path: str = "/v1/completions", body: Any = None, *, headers: Any = None, **members: Any) -> Any:
        """The status and the JSON of an answer; its headers are in `last_headers`."""
        if body is None:
            body = {"model": "tiny", **members}
        given = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, given, {"Content-Type": "application/json", **(headers or {})})

    def ask(self, method: str, path: str, body: bytes | None = None, headers: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=240)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            self.last_headers = response.headers
            text = response.read()
            kind = response.headers.get_content_type()
            return response.status, json.loads(text) if kind == "application/json" else text.decode()
        finally:
            connection.close()

    def text(self, **members: Any) -> str:
        """The text of a completion of one choice."""
        status, answer = self.post(**members)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    def tokens(self, **members: Any) -> list[int]:
        status, answer = self.post(return_token_ids=True, **members)
        assert status == 200, answer
        return list(answer["choices"][0]["token_ids"])

    @contextlib.contextmanager
    def streamed(self, path: str = "/v1/completions", **members: Any) -> Iterator[Iterator[Any]]:
        """The events of a stream as they come; leaving the block closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=240)
        try:
            body = json.dumps({"model": "tiny", "stream": True, **members})
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200, response.read()
            assert response.headers.get_content_type() == "text/event-stream"
            yield events(response)
        finally:
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()

    def raw(self, *parts: bytes, pause_s: float = 0.0, half_close: bool = False) -> bytes:
        """What comes back for bytes on a socket of their own."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            try:
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause_s)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
                found = b""
                while part := connection.recv(65536):
                    found += part
                return found
            except ConnectionError:
                return b""

    def lone(self, prompt: Any, *, seed: int | None = None, copy: int = 0, **fields: Any) -> list[int]:
        """The new tokens of a run of `generate` with nobody else."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        config = self.service.base.replace(return_dict_in_generate=True, num_return_sequences=copy + 1, **fields)
        output = self.model.generate(
            np.array([ids]), config, seed=None if seed is None else [seed], logits_processor=self.processors(config)
        )
        row = np.asarray(self.to_numpy(output.sequences))[copy]
        return [int(i) for i in row[len(ids) : output.lengths[copy]]]

    def to_numpy(self, array: Any) -> Any:
        return self.model.to_numpy(array) if hasattr(self.model, "to_numpy") else array

    def is_empty(self, seconds: float = 10.0) -> bool:
        """Whether soon nobody has a row or waits for one."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not self.engine.running and not self.engine.waiting:
                return True
            time.sleep(0.01)
        return False


def events(response: http.client.HTTPResponse) -> Iterator[Any]:
    for line in response:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            yield "[DONE]" if data == b"[DONE]" else json.loads(data)
