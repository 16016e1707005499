"""Results as plain dictionaries, and their files. Reports read results and compute nothing.

`report.json` has one key, "timings", for everything that differs between two runs of one seed; the rest is
equal.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from typing import Any

import torch

from torchreach.app.report.content import Report, Values, versions
from torchreach.app.report.provenance import bounds, stars_hash
from torchreach.app.verdict import compare_verdict, regions
from torchreach.core.repaired import RepairStep
from torchreach.core.results import Discrepancy

SCHEMA = 2


def report_dict(report: Report) -> dict[str, Any]:
    """The whole report as JSON values; see the module's first lines for "timings"."""
    stars, found = report.inputs.stars, report.answer
    timings: dict[str, Any] = {
        "date": report.date.isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "total": report.seconds,
        "discrepancy": report.found.stats.seconds,
    }
    out: dict[str, Any] = {
        "schema": SCHEMA,
        "command": report.command,
        "command_line": report.command_line,
        "versions": versions(),
        "machine": asdict(report.machine),
        "device": str(stars.device),
        "dtype": str(stars.dtype).removeprefix("torch."),
        "semantics": {"name": found.semantics, "meaning": found.semantics.meaning},
        "kernels": {
            "name": found.kernels,
            "meaning": found.kernels.meaning,
            "uncovered": list(found.uncovered),
        },
        "verdict": {
            "state": report.verdict.state.value,
            "ok": report.verdict.ok,
            "text": report.verdict.claim,
            "lower": report.verdict.lower,
            "upper": report.verdict.upper,
            "tolerance": report.verdict.tolerance,
            "star": report.verdict.witness[0],
            "output": report.verdict.witness[1],
        },
        "settings": dict(report.settings),
        "networks": {
            role: {
                "name": n.name,
                "sha256": dict(n.sha256),
                "layers": list(n.layers),
                "parameters": n.parameters,
                "nonzero": n.nonzero,
                "accuracy": n.accuracy,
            }
            for role, n in report.networks.items()
        },
        "input_set": {
            "kind": report.inputs.kind,
            "text": report.inputs.text,
            "labels": list(report.inputs.labels),
            "stars": len(stars),
            "shape": list(stars.shape),
            "variables": stars.dim,
            "sha256": stars_hash(stars),
            "bounds": bounds(stars),
        },
        "discrepancy": discrepancy_dict(report.found, report.inputs.labels, report.values.get("compressed")),
    }
    if report.repaired is not None:
        history = report.repaired.history
        out["repair"] = {
            "satisfied": report.repaired.satisfied,
            "iterations": history[-1].iteration,
            "kept": report.repaired.index % len(history),
            "history": [_step_dict(step) for step in history],
            "after": discrepancy_dict(report.repaired.after, report.inputs.labels, report.values.get("repaired")),
        }
        timings["repair"] = [step.seconds for step in history]
    out["timings"] = timings
    return out


def discrepancy_dict(found: Discrepancy, labels: tuple[str, ...], values: Values | None = None) -> dict[str, Any]:
    """A discrepancy as JSON values: per star the status and per output interval, range and witness."""
    keys = ("lower", "upper", "range_lower", "range_upper", "y1", "y2")
    ends = [t.tolist() for t in (found.lower, found.upper, found.range_lower, found.range_upper)]
    blank = [[None] * found.lower.shape[1]] * len(labels)
    parts = ends + ([blank, blank] if values is None else [t.tolist() for t in values])
    witness = found.witness.tolist()
    return {
        "semantics": found.semantics,
        "kernels": found.kernels,
        "uncovered": list(found.uncovered),
        "max_lower": float(found.lower.max()),
        "max_upper": float(found.upper.max()),
        "regions": regions(found),
        "stars": [
            {
                "label": labels[s],
                "status": status.value,
                "reason": found.reasons[s] if found.reasons else None,
                "max_lower": max(parts[0][s]),
                "max_upper": max(parts[1][s]),
                "outputs": [
                    {"output": n, **{k: part[s][n] for k, part in zip(keys, parts, strict=True)},
                     "witness": witness[s][n]}
                    for n in range(found.lower.shape[1])
                ],
            }
            for s, status in enumerate(found.status)
        ],
        "stats": {
            "method": found.stats.method,
            "root_bounds": found.stats.root_bounds,
            "splits": found.stats.splits,
            "branches": found.stats.branches,
            "linear_programs": found.stats.linear_programs,
            "output_programs": found.stats.output_programs,
            "fallback": found.stats.fallback,
            "layers": [
                {
                    "name": layer.name,
                    "neurons": layer.neurons,
                    "stars": layer.stars,
                    "splits": layer.splits,
                    "linear_programs": layer.linear_programs,
                    "settled": dict(sorted(layer.settled.items())),
                }
                for layer in found.stats.layers
            ],
        },
    }  # fmt: skip


def _step_dict(step: RepairStep) -> dict[str, Any]:
    whole = compare_verdict(step.discrepancy)
    return {
        "iteration": step.iteration,
        "max_lower": whole.lower,
        "max_upper": whole.upper,
        "max_upper_per_star": step.discrepancy.max_upper.tolist(),
        "status": [status.value for status in step.discrepancy.status],
        "reasons": list(step.discrepancy.reasons),
        "accuracy": step.accuracy,
        "loss": step.loss,
        "satisfied": step.satisfied,
        "method": step.method,
    }


def table(values: Mapping[str, Any]) -> str:
    """CSV of `report_dict`: a row per network, star and output; an end that is not known is empty."""
    numbers = ("lower", "upper", "range_lower", "range_upper", "y1", "y2")
    head = ("network", "star", "label", "status", "reason", "output", *numbers)
    results = {"compressed": values["discrepancy"]}
    if "repair" in values:
        results["repaired"] = values["repair"]["after"]
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(head)
    for network, found in results.items():
        for s, star in enumerate(found["stars"]):
            first = (network, s, star["label"], star["status"], star["reason"])
            out.writerows((*first, row["output"], *(row[key] for key in numbers)) for row in star["outputs"])
    return text.getvalue()


def render(report: Report) -> dict[str, bytes]:
    """The report's files, by name: report.json, report.csv, report.html, and the pictures it shows."""
    from torchreach.app.report.page import html_page
    from torchreach.app.report.pictures import history_picture, ranges_picture

    pictures = {"ranges.png": ranges_picture(report)}
    if report.repaired is not None:
        pictures["repair.png"] = history_picture(report)
    values = _finite(report_dict(report))
    texts = {
        "report.json": json.dumps(values, indent=1, allow_nan=False) + "\n",
        "report.csv": table(values),
        "report.html": html_page(report, pictures),
    }
    return {**{name: text.encode() for name, text in texts.items()}, **pictures}


def json_bytes(values: dict[str, Any]) -> bytes:
    """The contents of a .json file."""
    return (json.dumps(_finite(values), indent=1, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """JSON has no infinity: a bound that a spent budget left open becomes null."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
