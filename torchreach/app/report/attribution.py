"""What `torchreach attribute` writes: report.json and a picture. Reports read results and compute nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchreach.app.inputs import InputSet
from torchreach.app.report.content import NetworkInfo, heading
from torchreach.app.report.pictures import attribution_picture
from torchreach.app.report.report import json_bytes
from torchreach.core.outward import at_most, counted
from torchreach.core.results import Attribution, Discrepancy, KeptFloat

SCHEMA = 1


def kept_sentence(kept: KeptFloat) -> str:
    """Which layers are to be left as they are, in one line."""
    upper, most = at_most(float(kept.discrepancy.upper.max())), at_most(kept.tolerance)
    names = ", ".join(kept.kept) or "none"
    if not kept.satisfied:
        return f"undecided: {upper} {kept.discrepancy.claim} with all of these layers kept, {most} allowed: {names}"
    layers = counted(len(kept.kept), "layer")
    return f"within {most}: |y1 - y2| <= {upper} {kept.discrepancy.claim} with {layers} of the original kept: {names}"


def attribution_files(
    found: Attribution,
    kept: KeptFloat | None,
    inputs: InputSet,
    networks: Mapping[str, NetworkInfo],
    command_line: str,
    settings: Mapping[str, Any],
    seconds: float,
) -> dict[str, bytes]:
    """report.json and attribution.png."""
    content = {
        "schema": SCHEMA,
        **heading("attribute", command_line, settings, networks, inputs),
        "semantics": found.cumulative[-1].semantics,
        "layers": [
            {
                "name": name,
                "alone": _ends(found.alone[k]),
                "step": _ends(found.steps[k]),
                "cumulative": _ends(found.cumulative[k]),
                "sampled_mean": float(found.sampled_mean[k]),
                "sampled_max": float(found.sampled_max[k]),
                "sqnr_db": float(found.sqnr[k]),
            }
            for k, name in enumerate(found.layers)
        ],
        "bound": found.bound.tolist(),
        "kept": None
        if kept is None
        else {"layers": list(kept.kept), "text": kept_sentence(kept), **_ends(kept.discrepancy)},
        "timings": {"total": seconds},
    }
    return {"report.json": json_bytes(content), "attribution.png": attribution_picture(found)}


def _ends(found: Discrepancy) -> dict[str, list[Any]]:
    """Per input star: certified and attained max over outputs of |y1 - y2|."""
    return {"upper": found.max_upper.tolist(), "lower": found.max_lower.tolist()}
