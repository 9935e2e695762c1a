"""`gptj serve` under load, beside `generate` with as many rows: python -m benchmarks.serve DIR --backend pt

    generate    tokens/s of `generate` with 8 rows, which is what the server is measured by
    clients     tokens/s of the server with 8 and 32 clients, each of which asks again as soon as it is answered; turns
                alternate with those of `generate`
    stall       the longest wait for the next token while a long prompt is read, in steps' times
    churn       requests of random lengths, a fifth of them dropped in the middle: errors, rows that are left, memory
    seeds       answers of the churn asked for again alone: how many are the same

Everything is on one machine, over loopback, the clients in this process and the server in another.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROWS = 8

BASELINE = """
import json, sys, time
import numpy as np, gptj
backend, directory, dtype, prompt, new, rows = *sys.argv[1:4], *map(int, sys.argv[4:])
wing = gptj.backend(backend)
model = wing.GPTJForCausalLM.from_pretrained(directory, param_dtype=dtype)
model.prepare_for_inference()
ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, prompt))
config = gptj.GenerationConfig(max_new_tokens=new, pad_token_id=0)
model.generate(ids, config)
print(json.dumps({"vocab_size": model.config.vocab_size, "n_positions": model.config.n_positions,
                  "eos": model.config.eos_token_id}), flush=True)
for line in sys.stdin:
    begin = time.perf_counter()
    model.generate(ids, config)
    print(rows * new / (time.perf_counter() - begin), flush=True)
"""


class Baseline:
    """`generate` with ROWS rows, in a process of its own that does nothing between two turns.

    Attributes:
        told: the model's vocab_size, n_positions and eos.
    """

    def __init__(self, *options: object) -> None:
        command = [sys.executable, "-c", BASELINE, *map(str, options), str(ROWS)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.told = json.loads(self._line())

    def rate(self) -> float:
        """Tokens a second of one call."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        self.process.communicate()


class Client:
    """Asks the server at a port."""

    def __init__(self, port: int, eos: int | None) -> None:
        self.port, self.eos = port, eos

    def body(self, **members: Any) -> bytes:
        bias = {} if self.eos is None else {"logit_bias": {str(self.eos): -100}}
        return json.dumps({"model": "m", **bias, **members}).encode()

    def ask(self, **members: Any) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request("POST", "/v1/completions", self.body(**members), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {answer}")
            return dict(answer)
        finally:
            connection.close()

    @contextlib.contextmanager
    def stream(self, **members: Any) -> Iterator[Iterator[bytes]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            body = self.body(stream=True, **members)
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {response.read()!r}")
            yield (line for line in response if line.startswith(b"data: "))
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        return 0.0 if found is None else float(found[1])


@contextlib.contextmanager
def server(directory: Path, backend: str, dtype: str) -> Iterator[tuple[int, int]]:
    """The port and the process of a server."""
    command = [sys.executable, "-m", "gptj", "serve", str(directory), "--backend", backend, "--name", "m"]
    command += ["--dtype", dtype]
    command += ["--port", "0", "--max-batch", str(ROWS), "--queue", "10000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline().rpartition(":")[2]), process.pid
        finally:
            process.terminate()


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def in_parallel(count: int, work: Any) -> None:
    """`work(number)` in so many threads; the first error is raised."""
    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if failed:
        raise failed[0]


def measure_clients(
    client: Client, clients: int, *, turn: int, requests: int, prompt: int, new: int, vocab_size: int
) -> float:
    """Tokens a second of so many clients."""
    source = random.Random(f"{turn} {clients}")  # nobody's prompt is found among the kept prefixes
    prompts = [[source.randrange(vocab_size) for _ in range(prompt)] for _ in range(requests)]
    left = iter(prompts)
    lock = threading.Lock()

    def work(number: int) -> None:
        while True:
            with lock:
                ids = next(left, None)
            if ids is None:
                return
            client.ask(prompt=ids, max_tokens=new, temperature=0)

    begin = time.perf_counter()
    in_parallel(clients, work)
    return requests * new / (time.perf_counter() - begin)


def measure_stall(client: Client, *, seed: int, long: int, new: int, vocab_size: int) -> dict[str, float]:
    """The longest wait of a stream for its next token, alone and while a long prompt that nobody sent yet is read."""
    source = random.Random(seed)
    came: list[float] = []
    asked: list[float] = []

    def work(number: int) -> None:
        if number:
            while len(came) < new // 4:
                time.sleep(0.001)
            asked.append(time.perf_counter())
            client.ask(prompt=[source.randrange(vocab_size) for _ in range(long)], max_tokens=1, temperature=0)
            asked.append(time.perf_counter())
        else:
            with client.stream(prompt=[1, 2, 3], max_tokens=new, temperature=0, return_token_ids=True) as lines:
                for _ in lines:
                    came.append(time.perf_counter())

    in_parallel(2, work)
    gaps = [(end, end - begin) for begin, end in itertools.pairwise(came)]
    alone = [gap for end, gap in gaps if end < asked[0]]
    beside = [gap for end, gap in gaps if asked[0] <= end <= asked[1]]
    if len(beside) < 8:
        raise RuntimeError(f"the stream got {len(beside)} tokens while the prompt of {long} was read: nothing was seen")
    step = statistics.median(alone)
    return {"step_ms": 1e3 * step, "longest_ms": 1e3 * max(beside), "steps": max(beside) / step, "tokens": len(beside)}


def measure_churn(
    client: Client, pid: int, *, requests: int, n_positions: int, vocab_size: int
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], list[int]]]]:
    """Requests of random lengths, a fifth of them dropped: the counts, and some requests with their answers."""
    answers: list[tuple[dict[str, Any], list[int]]] = []
    memory: list[float] = []
    errors: list[str] = []
    numbers = iter(range(requests))
    lock = threading.Lock()
    begin_rows = client.metric("gptj_cancelled_total")

    def ask(number: int) -> None:
        source = random.Random(number)
        length = min(int(source.expovariate(1 / 40)) + 1, n_positions // 2)
        members = {
            "prompt": [source.randrange(vocab_size) for _ in range(length)],
            "max_tokens": min(int(source.expovariate(1 / 30)) + 1, n_positions // 2),
            "temperature": 0.9,
            "seed": number,
            "return_token_ids": True,
        }
        if number % 5 == 0:
            with client.stream(**members) as lines:
                for _ in range(source.randint(0, 5)):
                    next(lines, None)
        else:
            tokens = client.ask(**members)["choices"][0]["token_ids"]
            if number % 41 == 1:
                answers.append((members, tokens))

    def work(_: int) -> None:
        while True:
            with lock:
                number = next(numbers, None)
                if number is not None and number % max(requests // 20, 1) == 0:
                    memory.append(resident_mb(pid))
            if number is None:
                return
            try:
                ask(number)
            except Exception as error:
                errors.append(repr(error))

    begin = time.perf_counter()
    in_parallel(32, work)
    seconds = time.perf_counter() - begin
    time.sleep(1)
    counts = {
        "requests": requests,
        "seconds": seconds,
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "dropped": client.metric("gptj_cancelled_total") - begin_rows,
        "rows_left": client.metric("gptj_rows_running"),
        "waiting_left": client.metric("gptj_waiting"),
        "memory_mb": [round(one) for one in memory],
    }
    return counts, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--backend", default="pt")
    parser.add_argument("--dtype", default="float32", help="in 16 bits a text may depend on the rows beside it")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=64, help="for each number of clients")
    parser.add_argument("--turns", type=int, default=3, help="of generate and of the clients, one after another")
    parser.add_argument("--long", type=int, default=1500, help="tokens of the long prompt")
    parser.add_argument("--churn", type=int, default=2000, help="requests of random lengths")
    asked = parser.parse_args()

    baseline = Baseline(asked.backend, asked.directory, asked.dtype, asked.prompt, asked.new)
    vocab_size, n_positions = baseline.told["vocab_size"], baseline.told["n_positions"]
    result: dict[str, Any] = {"backend": asked.backend}
    with contextlib.closing(baseline), server(asked.directory, asked.backend, asked.dtype) as (port, pid):
        client = Client(port, baseline.told["eos"])
        shape = {"prompt": asked.prompt, "new": asked.new, "vocab_size": vocab_size}
        measure_clients(client, 32, turn=-1, requests=32, **shape)  # compiles, and warms the memory
        rates: dict[str, list[float]] = {}
        for turn in range(asked.turns):
            for clients in (8, 32):
                rates.setdefault("generate", []).append(baseline.rate())
                rate = measure_clients(client, clients, turn=turn, requests=max(asked.requests, clients), **shape)
                rates.setdefault(f"clients_{clients}", []).append(rate)
        medians = {name: statistics.median(found) for name, found in rates.items()}
        result["tokens_per_s"] = rates
        result["of_generate"] = {name: median / medians["generate"] for name, median in medians.items()}
        long, new = min(asked.long, n_positions - 1), min(400, n_positions - 3)
        for seed in (1, 2):  # the first compiles
            result["stall"] = measure_stall(client, seed=seed, long=long, new=new, vocab_size=vocab_size)
        churn = {"n_positions": n_positions, "vocab_size": vocab_size}
        result["churn"], answers = measure_churn(client, pid, requests=asked.churn, **churn)
        alone = [client.ask(**members)["choices"][0]["token_ids"] for members, _ in answers]
        same = sum(tokens == again for (_, tokens), again in zip(answers, alone, strict=True))
        result["seeds"] = {"asked_again": len(answers), "same": same}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
