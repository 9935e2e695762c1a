"""Parity: the proof that every backend computes the same GPT-J.

    oracle.py      GPT-J in plain NumPy float64, from the equations             Oracle
    revealing.py   a random checkpoint in which no mistake can hide             revealing_config, revealing_fill
    probe.py       the questions to every backend                               Probe, make_probe
    record.py      one backend, one process, one checkpoint -> one record       Record, record_backend
    tolerance.py   how far two right answers may lie apart, and why             tolerance_of
    compare.py     records against the oracle and each other, by NumPy alone    compare_records
    report.py      measures, limits and the verdict, and how they are shown     ParityReport
    versions.py    versions of what a backend computes with
    processes.py   backends' processes, side by side where memory allows        run_side_by_side
    run.py         all of it: a process a backend, then the judgement           run_parity

    trace.py         every intermediate value of a call in a file, and who computed it   Trace, open_trace, write_trace
    layout.py        how a stored array becomes a tap, told by letters
    tap_names.py     other programs' names, mapped by a TOML file                        TapNames
    trace_record.py  a backend's trace                                                   record_trace
    bounds.py        how far rounding takes each value, and why
    operations.py    each value again in float64, from the inputs that were recorded
    mistaken.py      an operation with one step put otherwise
    mutants.py       known mistakes, each such an operation                              MISTAKES
    sensitivity.py   which mistakes a trace would have shown                             measure_sensitivity
    signatures.py    the known mistake that explains a wrong value
    extras.py        gradients and greedy texts beside the taps
    oracle_gradients.py  the oracle's backward pass
    differences.py   where traces part, and whether the error was born there             compare_traces
    comparison.py    what is found and said of it                                        Comparison

    findings.py      what was found, as one JSON document with a schema                  Findings
    json_schema.py   JSON checked against a schema
    gather.py        findings of a run, and of traces            findings_of_report, findings_of_comparison
    reports/         a page, JUnit XML, Markdown

>>> from gptj.parity import run_parity
>>> run_parity("model", ["pt", "flax"]).raise_if_failed()  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptj.parity.compare import compare_records
    from gptj.parity.differences import Comparison, compare_traces
    from gptj.parity.findings import Findings
    from gptj.parity.gather import findings_of_comparison, findings_of_report
    from gptj.parity.oracle import Oracle, OracleOutput
    from gptj.parity.probe import Probe, make_probe
    from gptj.parity.processes import BackendProcessError
    from gptj.parity.record import Record, record_backend
    from gptj.parity.report import Divergence, Measure, ParityReport
    from gptj.parity.revealing import revealing_config, revealing_fill, revealing_tensor, revealing_weights
    from gptj.parity.run import open_oracle, run_parity
    from gptj.parity.sensitivity import Sensitivity, measure_sensitivity
    from gptj.parity.tap_names import TapNames
    from gptj.parity.tolerance import Tolerance, tolerance_of
    from gptj.parity.trace import Trace, TraceFacts, open_trace, write_trace
    from gptj.parity.trace_record import record_trace

_ROOMS = {
    "compare": ("compare_records",),
    "differences": ("Comparison", "compare_traces"),
    "findings": ("Findings",),
    "gather": ("findings_of_comparison", "findings_of_report"),
    "report": ("Divergence", "Measure", "ParityReport"),
    "oracle": ("Oracle", "OracleOutput"),
    "probe": ("Probe", "make_probe"),
    "record": ("Record", "record_backend"),
    "revealing": ("revealing_config", "revealing_fill", "revealing_tensor", "revealing_weights"),
    "sensitivity": ("Sensitivity", "measure_sensitivity"),
    "processes": ("BackendProcessError",),
    "run": ("open_oracle", "run_parity"),
    "tap_names": ("TapNames",),
    "tolerance": ("Tolerance", "tolerance_of"),
    "trace": ("Trace", "TraceFacts", "open_trace", "write_trace"),
    "trace_record": ("record_trace",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "BackendProcessError",
    "Comparison",
    "Divergence",
    "Findings",
    "Measure",
    "Oracle",
    "OracleOutput",
    "ParityReport",
    "Probe",
    "Record",
    "Sensitivity",
    "TapNames",
    "Tolerance",
    "Trace",
    "TraceFacts",
    "compare_records",
    "compare_traces",
    "findings_of_comparison",
    "findings_of_report",
    "make_probe",
    "measure_sensitivity",
    "open_oracle",
    "open_trace",
    "record_backend",
    "record_trace",
    "revealing_config",
    "revealing_fill",
    "revealing_tensor",
    "revealing_weights",
    "run_parity",
    "tolerance_of",
    "write_trace",
]


def __getattr__(name: str) -> Any:
    """A name from its module, imported when it is asked for.

    `python -m gptj.parity.record` imports this package first, and must not find the module already there.
    """
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module 'gptj.parity' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gptj.parity.{room}"), name)
