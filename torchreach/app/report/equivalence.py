"""What `torchreach equivalent` says: one line, and a report in JSON. Reports read results and compute nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torchreach.app.inputs import InputSet
from torchreach.app.report.content import NetworkInfo, heading
from torchreach.app.report.report import json_bytes
from torchreach.core.outward import at_least, at_most, counted
from torchreach.core.results import Answer, Equivalence
from torchreach.core.terms import Reason

SCHEMA = 1


def answer(found: Equivalence) -> Answer:
    """The answer for all input stars together; UNKNOWN where kernels are not covered."""
    if Answer.NOT_EQUIVALENT in found.answer:
        return Answer.NOT_EQUIVALENT
    whole = Answer.UNKNOWN not in found.answer and not found.uncovered
    return Answer.EQUIVALENT if whole else Answer.UNKNOWN


def sentence(found: Equivalence) -> str:
    """The answer in one line, the numbers rounded outward."""
    asked = found.asked
    how = f"({found.semantics}, {counted(len(found.answer), 'star')}, {found.seconds:.1f} s)"
    match answer(found):
        case Answer.EQUIVALENT:
            bound = "" if found.epsilon is None else f", at most {at_most(float(found.upper.max()))}"
            never = found.reasons.count(Reason.NEVER_SURE)
            none = f"; {Reason.NEVER_SURE.meaning}, on {counted(never, 'star')}" if never else ""
            return f"equivalent: certified {asked} for every input{bound}{none} {how}"
        case Answer.NOT_EQUIVALENT:
            star = worst(found)
            number = counted(found.count(Answer.NOT_EQUIVALENT), "star")
            shown = (
                "the labels differ"
                if found.epsilon is None
                else f"|y1 - y2| >= {at_least(float(found.lower[star]))} > {found.epsilon:g}"
            )
            return f"not equivalent: {shown} at an input of star {star}, {number} in all {how}"
        case _:
            if found.uncovered and Answer.UNKNOWN not in found.answer:
                names = ", ".join(found.uncovered)
                return f"not covered: {asked} holds for {found.kernels} alone, and kernels of {names} may differ {how}"
            ends = zip(found.answer, found.reasons, strict=False)
            why = Counter(reason for end, reason in ends if end is Answer.UNKNOWN)
            cures = "".join(f"; {cure}" for cure in dict.fromkeys(reason.cure for reason in why) if cure)
            return f"unknown: {asked} is not decided on {counted(found.count(Answer.UNKNOWN), 'star')}{cures} {how}"


def worst(found: Equivalence) -> int:
    """The star of a witness, where there is one: of those that are not equivalent, the one whose value is largest."""
    shown = [s for s, one in enumerate(found.answer) if one is Answer.NOT_EQUIVALENT]
    return max(shown or range(len(found.answer)), key=lambda s: float(found.lower[s]))


def equivalence_json(
    found: Equivalence,
    inputs: InputSet,
    networks: Mapping[str, NetworkInfo],
    command_line: str,
    settings: Mapping[str, Any],
    seconds: float,
) -> bytes:
    """The contents of report.json."""
    return json_bytes({
        "schema": SCHEMA,
        **heading("equivalent", command_line, settings, networks, inputs),
        "semantics": found.semantics,
        "kernels": {"name": found.kernels, "uncovered": list(found.uncovered)},
        "answer": answer(found).value,
        "confidence": found.confidence,
        "text": sentence(found),
        "stars": [
            {
                "label": inputs.labels[s],
                "answer": one.value,
                "reason": found.reasons[s] if found.reasons else None,
                "lower": float(found.lower[s]),
                "upper": float(found.upper[s]),
                "class": None if found.label is None else int(found.label[s]),
                "witness": found.witness[s].tolist(),
            }
            for s, one in enumerate(found.answer)
        ],
        "timings": {"total": seconds, "equivalence": found.seconds},
    })  # fmt: skip
