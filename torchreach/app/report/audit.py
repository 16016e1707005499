"""What `torchreach audit` says: one line, and a report in JSON. Reports read results and compute nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torchreach.app.report.content import NetworkInfo, run_heading
from torchreach.app.report.report import json_bytes
from torchreach.core.audited import Audit
from torchreach.core.outward import at_least, at_most, counted
from torchreach.core.results import Answer
from torchreach.core.terms import Kernels

SCHEMA = 1


def audit_sentence(found: Audit) -> str:
    """The answer in one line, the numbers rounded outward."""
    same, apart, left = (found.count(one) for one in (Answer.EQUIVALENT, Answer.NOT_EQUIVALENT, Answer.UNKNOWN))
    kernels = "" if found.kernels is Kernels.NONE else f", {found.kernels}"
    how = f"({found.semantics}{kernels}, {found.seconds:.1f} s)"
    sure = "" if found.confidence is None else f" wherever the original is sure to {found.confidence:g}"
    near = "" if not found.eps else f" and all within {found.eps:g}"
    start = f"the same label certified{sure} on {same:,} of {counted(len(found), 'input')}{near}"
    if found.uncovered:
        start = f"not covered: kernels of {', '.join(found.uncovered)}; {start}"
    return f"{start}, {apart:,} differ, {left:,} open {how}"


def audit_rows(found: Audit) -> dict[str, str]:
    """What was counted and bounded, by name."""
    counts = {one: found.count(one) for one in Answer}
    open_ = Counter(why for why, one in zip(found.reasons, found.answer, strict=True) if one is Answer.UNKNOWN)
    rows = {"same label, certified": f"{counts[Answer.EQUIVALENT]:,}"}
    if found.vacuous:
        rows["of these, the original is not that sure"] = f"{found.vacuous:,}"
    rows["different labels, with a witness"] = f"{counts[Answer.NOT_EQUIVALENT]:,}"
    why = ", ".join(f"{reason} {number:,}" for reason, number in open_.items())
    rows["open"] = f"{counts[Answer.UNKNOWN]:,}" + (f" ({why})" if why else "")
    rows["label depends on the kernels"] = f"{int(found.depends.sum()):,}"
    if found.accuracy is not None:
        for name, (low, high) in zip(("original", "compressed"), found.accuracy, strict=True):
            ends = (
                f"{at_least(100 * low, 4)} %"
                if low == high
                else f"{at_least(100 * low, 4)} to {at_most(100 * high, 4)} %"
            )
            rows[f"accuracy, {name}"] = ends
    rows["max |y1 - y2|"] = (
        f"{at_most(float(found.upper.max()))} certified, {at_least(float(found.lower.max()))} attained"
    )
    return rows


def audit_json(
    found: Audit,
    networks: Mapping[str, NetworkInfo],
    command_line: str,
    settings: Mapping[str, Any],
    data: Mapping[str, Mapping[str, str]],
    seconds: float,
) -> bytes:
    """The contents of report.json. data: SHA-256 of the files of the test set, by option."""
    return json_bytes({
        "schema": SCHEMA,
        **run_heading("audit", command_line, settings, networks, found.label.device),
        "test_set": dict(data),
        "semantics": found.semantics,
        "kernels": {"name": found.kernels, "uncovered": list(found.uncovered)},
        "text": audit_sentence(found),
        "counts": {one.value: found.count(one) for one in Answer}
        | {"nowhere sure": found.vacuous, "depends on kernels": int(found.depends.sum())},
        "accuracy": found.accuracy and dict(zip(("original", "compressed"), map(list, found.accuracy), strict=True)),
        "max_difference": {"upper": float(found.upper.max()), "lower": float(found.lower.max())},
        "inputs": [
            {
                "answer": one.value,
                "reason": found.reasons[b],
                "labels": found.label[:, b].tolist(),
                "depends_on_kernels": bool(found.depends[b]),
                "lower": float(found.lower[b]),
                "upper": float(found.upper[b]),
                "witness": found.witness[b].tolist() if one is Answer.NOT_EQUIVALENT else None,
            }
            for b, one in enumerate(found.answer)
        ],
        "timings": {"total": seconds, "audit": found.seconds},
    })  # fmt: skip
