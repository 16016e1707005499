"""Verdicts for machines: JUnit XML, which CI systems show among their tests, and SARIF, which code scanning shows.

One case for each input set, or input of a test set. What was not shown (the budget ended, kernels are not covered)
fails a gate as what was refuted does, and says that it is something else. Texts come from typed fields of the result.

References: SARIF 2.1.0 (OASIS, 2020). JUnit: the elements and attributes that Ant's report writer gives them.
"""

from __future__ import annotations

import enum
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torchreach
from torchreach.app.verdict import star_status
from torchreach.core.audited import Audit
from torchreach.core.outward import at_least, at_most
from torchreach.core.results import Answer, Discrepancy, Equivalence
from torchreach.core.terms import Kernels

MOST_NUMBERS = 32  # of a witness in a JUnit text; SARIF has all of them


class Outcome(enum.Enum):
    """What a gate makes of one case."""

    PASSED = "passed"
    EXCEEDED = "exceeded"  # an input shows it
    UNDECIDED = "undecided"  # the budget ended, or numerical limits
    UNCOVERED = "uncovered"  # certified, but not for the kernels of some layers

    @property
    def rule(self) -> str:
        """What failed, in words."""
        return {
            Outcome.PASSED: "What was asked is certified for every input.",
            Outcome.EXCEEDED: "An input shows that what was asked does not hold.",
            Outcome.UNDECIDED: "What was asked was neither certified nor refuted.",
            Outcome.UNCOVERED: "Certified, but the kernels of some layers may compute something else.",
        }[self]


@dataclass(frozen=True)
class Case:
    """One input set, or input. lower, upper: what is attained and certified. witness: an input, row by row."""

    name: str
    outcome: Outcome
    text: str
    lower: float
    upper: float
    witness: list[float]


def comparison_cases(found: Discrepancy, labels: Sequence[str], tolerance: float | None) -> list[Case]:
    """Of `compare`, and of a repaired network: each input set against the tolerance, or the target; without one each
    passes that is covered."""
    cases = []
    for s, label in enumerate(labels):
        lower, upper = float(found.lower[s].max()), float(found.upper[s].max())
        if tolerance is not None and lower > tolerance:
            outcome = Outcome.EXCEEDED
        elif found.uncovered:
            outcome = Outcome.UNCOVERED
        else:
            outcome = Outcome.PASSED if tolerance is None or upper <= tolerance else Outcome.UNDECIDED
        asked = "" if tolerance is None else f"; tolerance {tolerance:g}"
        text = (
            f"max |y1 - y2|: {at_least(lower)} attained, {at_most(upper)} {found.claim} ({found.covers}, "
            f"{star_status(found, s)}){asked}"
        )
        witness = found.witness[s, int(found.lower[s].argmax())].flatten().tolist()
        cases.append(Case(label, outcome, text, lower, upper, witness))
    return cases


def equivalence_cases(found: Equivalence, labels: Sequence[str]) -> list[Case]:
    """Of `equivalent`: each input set."""
    cases = []
    for s, label in enumerate(labels):
        why = f" ({found.reasons[s]})" if found.reasons else ""
        text = f"{found.asked}: {found.answer[s].value}{why}; {found.semantics}{_kernels(found.kernels)}"
        lower, upper = float(found.lower[s]), float(found.upper[s])
        outcome = _outcome(found.answer[s], found.uncovered)
        cases.append(Case(label, outcome, text, lower, upper, found.witness[s].flatten().tolist()))
    return cases


def audit_cases(found: Audit) -> list[Case]:
    """Of `audit`: each input of the test set."""
    cases = []
    for b, answer in enumerate(found.answer):
        first, second = found.label[:, b].tolist()
        text = (
            f"labels {first} and {second}: {answer.value} ({found.reasons[b]}); {found.semantics}"
            f"{_kernels(found.kernels)}"
        )
        lower, upper = float(found.lower[b]), float(found.upper[b])
        outcome = _outcome(answer, found.uncovered)
        cases.append(Case(f"input {b}", outcome, text, lower, upper, found.witness[b].flatten().tolist()))
    return cases


def _outcome(answer: Answer, uncovered: tuple[str, ...]) -> Outcome:
    if answer is Answer.EQUIVALENT:
        return Outcome.UNCOVERED if uncovered else Outcome.PASSED
    return Outcome.EXCEEDED if answer is Answer.NOT_EQUIVALENT else Outcome.UNDECIDED


def _kernels(kernels: Kernels) -> str:
    return "" if kernels is Kernels.NONE else f", {kernels}"


def junit(command: str, cases: Sequence[Case], seconds: float) -> bytes:
    """A JUnit file of one suite. A failure's type is the outcome."""
    failed = [case for case in cases if case.outcome is not Outcome.PASSED]
    counts = {"tests": str(len(cases)), "failures": str(len(failed)), "errors": "0", "time": f"{seconds:.3f}"}
    whole = ET.Element("testsuites", counts)
    suite = ET.SubElement(whole, "testsuite", {"name": f"torchreach {command}", "skipped": "0", **counts})
    for case in cases:
        each = {"classname": f"torchreach.{command}", "name": case.name, "time": f"{seconds / len(cases):.3f}"}
        one = ET.SubElement(suite, "testcase", each)
        if case.outcome is Outcome.PASSED:
            ET.SubElement(one, "system-out").text = case.text
            continue
        failure = ET.SubElement(one, "failure", {"type": case.outcome.value, "message": case.text})
        more = ", ..." if len(case.witness) > MOST_NUMBERS else ""
        numbers = ", ".join(f"{x:.9g}" for x in case.witness[:MOST_NUMBERS])
        failure.text = f"{case.outcome.rule}\n{case.text}\ninput: [{numbers}{more}]"
    ET.indent(whole)
    return ET.tostring(whole, encoding="utf-8", xml_declaration=True) + b"\n"


def sarif(command: str, cases: Sequence[Case], hashes: Mapping[str, str], arguments: str, status: int) -> bytes:
    """A SARIF file of one run: a result for every case that did not pass, at the network that is compared.

    hashes: SHA-256 of the networks' files by path, the compressed one last.
    """
    artifacts = [{"location": {"uri": path}, "hashes": {"sha-256": digest}} for path, digest in hashes.items()]
    failing = [outcome for outcome in Outcome if outcome is not Outcome.PASSED]
    place = {"artifactLocation": {"uri": list(hashes)[-1], "index": len(hashes) - 1}} if hashes else {}
    results = [
        {
            "ruleId": case.outcome.value,
            "ruleIndex": failing.index(case.outcome),
            "level": "error" if case.outcome is Outcome.EXCEEDED else "warning",
            "kind": "fail",
            "message": {"text": f"{case.name}: {case.text}"},
            **({"locations": [{"physicalLocation": place}]} if place else {}),
            "properties": {"attained": _number(case.lower), "certified": _number(case.upper), "input": case.witness},
        }
        for case in cases
        if case.outcome is not Outcome.PASSED
    ]
    driver = {
        "name": "torchreach",
        "semanticVersion": torchreach.__version__,
        "rules": [{"id": one.value, "shortDescription": {"text": one.rule}} for one in failing],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [{"commandLine": arguments, "executionSuccessful": True, "exitCode": status}],
        "artifacts": artifacts,
        "results": results,
        "properties": {"command": command, "cases": len(cases)},
    }
    return (json.dumps({"version": "2.1.0", "runs": [run]}, indent=1, allow_nan=False) + "\n").encode()


def _number(value: float) -> float | None:
    """None where the work ended before anything was known."""
    return value if math.isfinite(value) else None
