"""Results as plain dictionaries, and their files. Reports read results and compute nothing.

`report.json` has one key, "timings", for everything that differs between two runs of one seed; the rest is
equal. Written files appear all at once or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchreach.errors import OptionError
from torchreach.input_sets import InputSet
from torchreach.results import Discrepancy, RepairResult, RepairStep
from torchreach.verdict import Verdict, compare_verdict, regions

SCHEMA = 1
SEMANTICS = {
    "float": "weights as they are stored, exact real arithmetic",
    "weight-only": "weights on their grid, activations not rounded: exact real arithmetic",
    "deployed int8": "activations rounded and clamped as int8 kernels execute them",
}


@dataclass(frozen=True)
class NetworkInfo:
    """A network as reports name it. `accuracy` in [0, 1] where a test set is known."""

    name: str
    layers: tuple[str, ...]
    parameters: int
    nonzero: int
    accuracy: float | None = None

    @staticmethod
    def of(name: str, network: nn.Module, accuracy: float | None = None) -> NetworkInfo:
        """Description of `network`, a flat chain of layers."""
        kinds = tuple(_layer_name(layer) for layer in network.children())
        values = [p.detach() for p in network.parameters()]
        nonzero = sum(int(v.count_nonzero()) for v in values)
        return NetworkInfo(name, kinds, sum(v.numel() for v in values), nonzero, accuracy)


@dataclass(frozen=True)
class Report:
    """Everything one run of a command shows and writes.

    Attributes:
        command: "compare", "repair" or "demo"; command_line: how to run it again.
        networks: by role: "original", "compressed", and "repaired" after a repair.
        found: discrepancy of original and compressed (before any repair).
        scores: [S, N] outputs of the original at the centre of each star, for the pictures.
        settings: what else was asked for (seed, target, budget, ...), JSON values only.
    """

    command: str
    command_line: str
    networks: Mapping[str, NetworkInfo]
    inputs: InputSet
    verdict: Verdict
    found: Discrepancy
    scores: Tensor
    repaired: RepairResult | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def report_dict(report: Report) -> dict[str, Any]:
    """The whole report as JSON values; see the module's first lines for "timings"."""
    import torchreach

    stars = report.inputs.stars
    timings: dict[str, Any] = {"total": report.seconds, "discrepancy": report.found.stats.seconds}
    out: dict[str, Any] = {
        "schema": SCHEMA,
        "command": report.command,
        "command_line": report.command_line,
        "versions": {"torchreach": torchreach.__version__, "torch": torch.__version__},
        "device": str(stars.device),
        "dtype": str(stars.dtype).removeprefix("torch."),
        "semantics": {"name": report.found.semantics, "meaning": SEMANTICS.get(report.found.semantics, "")},
        "verdict": {
            "state": report.verdict.state.value,
            "ok": report.verdict.ok,
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
        },
        "discrepancy": discrepancy_dict(report.found, report.inputs.labels),
    }
    if report.repaired is not None:
        history = report.repaired.history
        out["repair"] = {
            "satisfied": report.repaired.satisfied,
            "iterations": history[-1].iteration,
            "kept": report.repaired.index % len(history),
            "history": [_step_dict(step) for step in history],
            "after": discrepancy_dict(report.repaired.after, report.inputs.labels),
        }
        timings["repair"] = [step.seconds for step in history]
    out["timings"] = timings
    return out


def discrepancy_dict(found: Discrepancy, labels: tuple[str, ...]) -> dict[str, Any]:
    """A discrepancy as JSON values: per star the status and per output interval, range and witness."""
    parts = [t.tolist() for t in (found.lower, found.upper, found.range_lower, found.range_upper)]
    witness = found.witness.tolist()
    keys = ("lower", "upper", "range_lower", "range_upper")
    return {
        "max_lower": float(found.lower.max()),
        "max_upper": float(found.upper.max()),
        "regions": regions(found),
        "stars": [
            {
                "label": labels[s],
                "status": status.value,
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
            "linear_programs": found.stats.linear_programs,
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
        "accuracy": step.accuracy,
        "loss": step.loss,
        "satisfied": step.satisfied,
    }


def render(report: Report) -> dict[str, bytes]:
    """The report's files, by name: report.json, report.html, and the pictures it shows."""
    from torchreach.page import html_page
    from torchreach.pictures import history_picture, ranges_picture

    pictures = {"ranges.png": ranges_picture(report)}
    if report.repaired is not None:
        pictures["repair.png"] = history_picture(report)
    text = json.dumps(_finite(report_dict(report)), indent=1, allow_nan=False) + "\n"
    return {"report.json": text.encode(), "report.html": html_page(report, pictures).encode(), **pictures}


def _finite(value: Any) -> Any:
    """JSON has no infinity: a bound that a spent budget left open becomes null."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def check_folder(folder: Path) -> None:
    """Raises OptionError where `write_files` could not write, before any work is done."""
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OptionError(f"--output must name a folder, but {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OptionError(f"--output {folder}: the folder {parent} is not writable")


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` into `folder`, made if missing: first all of them beside it, then moved into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in files.items():
            (draft / name).write_bytes(content)
        folder.mkdir(exist_ok=True)
        for name in files:
            os.replace(draft / name, folder / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _layer_name(layer: nn.Module) -> str:
    match layer:
        case nn.Linear():
            return f"Linear {layer.in_features}-{layer.out_features}"
        case nn.Conv2d():
            return f"Conv2d {layer.in_channels}-{layer.out_channels}"
        case _:
            return type(layer).__name__
