"""The table of faults and the tests that hold them, made from the tests' own names.

A test that holds a row of the list of faults is named after it: test_W12_a_flipped_bit_is_noticed. The malformed
folders of benchmarks/faults.py are one parametrized test, each case named after its row.

    python tests/documents/fault_table.py          print the table
    python tests/documents/fault_table.py --write  put it into docs/faults.md
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from page_parts import ROOT, Part, markdown_table

TABLE = Part("docs/faults.md", "rows", "tests/documents/fault_table.py")

ROWS = {
    "W1": "a file that is cut",
    "W2": "an absurd header length",
    "W3": "overlaps, holes, offsets that lie",
    "W4": "a name twice in one object",
    "W5": "names that are empty, paths, or control characters",
    "W6": "absurd numbers of tensors, axes, levels",
    "W7": "dtypes that no weight has",
    "W8": "wrong shapes, transposed matrices",
    "W9": "a transposed square matrix, layers that changed places",
    "W10": "tensors missing, misspelt, too many; old buffers",
    "W11": "NaN, infinity, all zero, overflow in a cast",
    "W12": "one flipped bit",
    "W13": "several weight sets side by side",
    "W14": "a pointer, a web page, an empty file, a FIFO in a file's place",
    "W15": "a file that shrinks or changes under the reader",
    "W16": "a pickle that would run code",
    "W17": "views and storages that lie in a .bin",
    "W18": "malformed archives and shards of TPU checkpoints",
    "W19": "hostile HDF5",
    "W20": "malformed msgpack",
    "W21": "zip directories of a million members, zip64 lies",
    "X1": "an index that leads out of the folder",
    "X2": "links that lead out of the folder",
    "X3": "links in circles, to nowhere, hard links to the output",
    "X4": "shards and index that contradict each other",
    "X5": "a malformed index",
    "X6": "no weights, no config, no permission",
    "C1": "sizes that break their rule",
    "C2": "rotary widths",
    "C3": "fields that no shape shows; tied embeddings",
    "C4": "misspelt and unknown keys",
    "C5": "what is no JSON object, or too large",
    "C6": "a config that is not the weights'",
    "C7": "another model, remote code",
    "C8": "a tokenizer larger than the embedding",
    "T1": "a tokenizer.json that is cut or contradicts itself",
    "T2": "vocab.json and merges.txt, whole and spoilt",
    "T3": "lone surrogates, bytes that are no UTF-8, hard texts",
    "T4": "special tokens in a user's text",
    "T5": "ids that no tokenizer has",
    "T6": "a stream that ends inside a character",
    "G1": "token ids that are none",
    "G2": "more tokens than positions",
    "G3": "masks that are none, rows that see nothing",
    "G4": "settings of generation that break their rule",
    "G5": "logits that are not finite",
    "G6": "Ctrl-C, termination, a closed pipe, closed stdin",
    "S1": "a full disk, files that may not grow",
    "S2": "SIGKILL at any moment",
    "S3": "the n-th system call fails",
    "S4": "two writers, a reader beside a writer",
    "S5": "places that cannot or must not be written",
    "S6": "file modes",
    "S7": "going on after a kill",
    "S8": "the order of fsync and rename",
    "S9": "strided, transposed, broadcast, big-endian arrays",
    "S10": "strange file names",
    "R1": "too little memory",
    "R2": "few file descriptors",
    "R3": "frameworks that are not installed",
    "R4": "no home, no terminal, another locale",
    "R5": "settings of Keras' own",
    "R6": "forks",
}
"""What each row is about. A test must hold every one."""

_NAME = re.compile(r"test_((?:[A-Z]\d+_)+)")


def named_tests(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Each row that a test's name carries: row, file, the test's name without its rows."""
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (found := _NAME.match(node.name)):
                for row in found[1].strip("_").split("_"):
                    yield row, str(path.relative_to(folder)), node.name.removeprefix(found[0]).replace("_", " ")


def folder_cases(source: str) -> Counter[str]:
    """How many malformed folders of benchmarks/faults.py there are of each row."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    rows = [call.args[0] for call in calls if ast.unparse(call.func) == "Fault" and call.args]
    return Counter(row.value for row in rows if isinstance(row, ast.Constant) and isinstance(row.value, str))


def table() -> str:
    """The table in Markdown: a row a fault, its tests by file."""
    cases = folder_cases((ROOT / "benchmarks" / "faults.py").read_text())
    tests: dict[str, dict[str, list[str]]] = {row: {} for row in ROWS}
    for row, file, claim in named_tests(ROOT / "tests"):
        tests.setdefault(row, {}).setdefault(file, []).append(claim)
    rows = []
    for row, by_file in tests.items():
        held = [f"`{file}`: {'; '.join(claims)}" for file, claims in by_file.items()]
        if cases[row]:
            held.append("`conversion/test_benchmarks.py`: the folders below")
        rows.append([row, ROWS.get(row, ""), "<br>".join(held)])
    return markdown_table(["row", "fault", "tests named after it"], rows)


def unheld() -> list[str]:
    """The rows that no test is named after."""
    cases = folder_cases((ROOT / "benchmarks" / "faults.py").read_text())
    named = {row for row, _, _ in named_tests(ROOT / "tests")}
    return [row for row in ROWS if row not in named and not cases[row]]


if __name__ == "__main__":
    TABLE.print_or_write(table)
