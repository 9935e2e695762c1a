"""Parity: the proof that every backend computes the same GPT-J.

oracle.py      GPT-J in plain NumPy float64, from the equations             Oracle
revealing.py   a random checkpoint in which no mistake can hide             revealing_config, revealing_fill
record.py      one backend, one process, one checkpoint -> one record       python -m gptj.parity.record
compare.py     records against the oracle and each other, by NumPy alone    compare, ParityReport
run.py         all of it: a process a backend, then the judgement           run_parity
"""

from __future__ import annotations

from gptj.parity.oracle import Oracle, OracleOutput
from gptj.parity.revealing import revealing_config, revealing_fill, revealing_tensor, revealing_weights

__all__ = [
    "Oracle",
    "OracleOutput",
    "revealing_config",
    "revealing_fill",
    "revealing_tensor",
    "revealing_weights",
]
