"""JUnit XML of findings: a suite a section, a case a measure, pair, text, row or planted mistake."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator

from gptj.parity.findings import Findings, MeasureFound, PairFound
from gptj.parity.reports.spelling import legible, spell_number, spell_percent

__all__ = ["render_junit"]

Case = tuple[str, str, str | None, str]
"""Its class' name, its name, how it failed (None: it did not), and what it says at length."""

_MOST_TAPS = 40


def render_junit(*findings: Findings) -> str:
    """The XML document. It has failures where a verdict is "differs", and nowhere else."""
    root = ET.Element("testsuites", name="gptj parity")
    for found in findings:
        suites: list[tuple[str, list[Case], list[Case]]] = [
            ("verdict", [("verdict", found.headline, None if found.passed else found.headline, "")], []),
            ("measures", list(_measures(found)), []),
            ("pairs", [_pair(pair) for pair in found.pairs], []),
            ("texts", list(_texts(found)), []),
            ("matrix", list(_matrix(found)), []),
        ]
        suites.append(("sensitivity", *_sensitivity(found)))
        for name, cases, skipped in suites:
            if cases or skipped:
                _suite(root, f"{found.folder or 'parity'}: {name}", cases, skipped)
        _ladder(root, found)
    for key in ("tests", "failures", "skipped"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in root)))
    root.set("errors", "0")
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(root: ET.Element, name: str, cases: list[Case], skipped: list[Case]) -> None:
    failures = sum(case[2] is not None for case in cases)
    facts = {"tests": len(cases) + len(skipped), "failures": failures, "errors": 0, "skipped": len(skipped), "time": 0}
    suite = ET.SubElement(root, "testsuite", {"name": _text(name), **{key: str(n) for key, n in facts.items()}})
    for kind, group in (("failure", cases), ("skipped", skipped)):
        for room, title, problem, told in group:
            case = ET.SubElement(suite, "testcase", classname=_text(f"gptj.parity.{room}"), name=_text(title), time="0")
            if problem is not None:
                outcome = ET.SubElement(case, kind, message=_text(problem))
                outcome.text = _text(told or problem)
            elif told:
                ET.SubElement(case, "system-out").text = _text(told)


def _text(text: str) -> str:
    return legible(text, longest=20_000)


def _measures(found: Findings) -> Iterator[Case]:
    for m in found.measures:
        size = _size(m)
        problem = None if m.holds else f"{m.backend} and {m.against} disagree on {m.what}: {size}"
        yield "measures", f"{m.backend} against {m.against}: {m.what}", problem, size


def _size(m: MeasureFound) -> str:
    return f"{spell_number(m.difference)} of {spell_number(m.limit)} allowed" + (m.where and f", at {m.where}")


def _pair(pair: PairFound) -> Case:
    wrong = [tap for tap in pair.taps if not tap.right]
    lines = [pair.headline] if pair.headline else []
    told = pair.looks_like is None or pair.looks_like in pair.headline
    lines += [] if told else [f"looks like: {pair.looks_like}"]
    for tap in wrong[:_MOST_TAPS]:
        line = f"{tap.tap}: {spell_number(tap.difference)} of {spell_number(tap.bound)}"
        line += f", born there ({spell_number(tap.local)} of {spell_number(tap.local_bound)})" if tap.born else ""
        lines.append(line + (f"; {tap.where}" if tap.where else ""))
    if len(wrong) > _MOST_TAPS:
        lines.append(f"and {len(wrong) - _MOST_TAPS} values more")
    problem = (
        None if pair.right else pair.headline or f"{len(wrong)} of {len(pair.taps)} values are beyond their bounds"
    )
    dtype = f" in {pair.dtype}" if pair.dtype and pair.dtype not in pair.b else ""
    return "pairs", f"{pair.b}{dtype} against {pair.a}", problem, "\n".join(lines)


def _texts(found: Findings) -> Iterator[Case]:
    for text in found.texts:
        parted = f"parted at token {text.first_difference} of {text.tokens}"
        parted += f", margins {spell_number(text.margin_a)} and {spell_number(text.margin_b)}"
        parted += f", rounding may turn {spell_number(text.bound)}"
        told = "" if text.first_difference is None else parted
        yield "texts", f"{text.a} and {text.b} after prompt {text.prompt}", None if text.right else parted, told


def _matrix(found: Findings) -> Iterator[Case]:
    for row in found.matrix:
        size = _size(row)
        yield "matrix", f"{row.backend}: {row.against}: {row.what}", None if row.holds else size, size


def _sensitivity(found: Findings) -> tuple[list[Case], list[Case]]:
    """Those that were caught pass; those that were not are skipped: parity is not wrong, but would not have seen it."""
    caught = [("sensitivity", f"{p.backend}: {p.mutant}", None, p.headline) for p in found.sensitivity if p.caught]
    missed: list[Case] = [
        ("sensitivity", f"{p.backend}: {p.mutant}", "this mistake would not have been caught", p.headline)
        for p in found.sensitivity
        if not p.caught
    ]
    return [*caught], missed


def _ladder(root: ET.Element, found: Findings) -> None:
    """The ladder and the smallest changes judge nothing: properties of a suite without cases."""
    if not found.ladder and not found.smallest:
        return
    name = _text(f"{found.folder or 'parity'}: ladder")
    suite = ET.SubElement(root, "testsuite", name=name, tests="0", failures="0", errors="0", skipped="0", time="0")
    properties = ET.SubElement(suite, "properties")
    for rung in found.ladder:
        value = f"error {spell_number(rung.error)}, KL {spell_number(rung.kl)}, top-1 {spell_percent(rung.top1)}, "
        value += f"greedy {spell_percent(rung.greedy)}"
        ET.SubElement(properties, "property", name=_text(f"{rung.backend} {rung.rung}"), value=value)
    for small in found.smallest:
        name = _text(f"{small.backend} {small.dtype}: smallest change of {small.what}")
        ET.SubElement(properties, "property", name=name, value=spell_number(small.change))
