"""What one run shows and writes: the networks, the sets, the results. Files, page and pictures read it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import torch
from torch import Tensor, nn

import torchreach
from torchreach.app.inputs import InputSet
from torchreach.app.report.provenance import Machine, bounds, stars_hash
from torchreach.app.verdict import Verdict
from torchreach.core.repaired import RepairResult
from torchreach.core.results import Discrepancy


@dataclass(frozen=True)
class NetworkInfo:
    """A network as reports name it. `accuracy` in [0, 1] where a test set is known.

    sha256: of its files by their names, see `provenance.file_hashes`; empty where it was never in a file.
    """

    name: str
    layers: tuple[str, ...]
    parameters: int
    nonzero: int
    accuracy: float | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(
        name: str, network: nn.Module, accuracy: float | None = None, sha256: Mapping[str, str] | None = None
    ) -> NetworkInfo:
        """Description of `network`, a flat chain of layers."""
        kinds = tuple(_layer_name(layer) for layer in network.children())
        values = [p.detach() for p in network.parameters()]
        nonzero = sum(int(v.count_nonzero()) for v in values)
        return NetworkInfo(name, kinds, sum(v.numel() for v in values), nonzero, accuracy, sha256 or {})


Values = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Report:
    """Everything one run of a command shows and writes.

    Attributes:
        command: "compare", "repair" or "demo"; command_line: how to run it again.
        networks: by role: "original", "compressed", and "repaired" after a repair.
        found: discrepancy of original and compressed (before any repair).
        scores: [S, N] outputs of the original at the centre of each star, for the pictures.
        values: y1 and y2, [S, N] each, output n at the witness of output n; by "compressed" and "repaired".
        settings: what else was asked for (seed, target, budget, ...), JSON values only.
    """

    command: str
    command_line: str
    networks: Mapping[str, NetworkInfo]
    inputs: InputSet
    verdict: Verdict
    found: Discrepancy
    scores: Tensor
    values: Mapping[str, Values] = field(default_factory=dict)
    repaired: RepairResult | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    date: datetime = field(default_factory=lambda: datetime.now().astimezone())

    @property
    def results(self) -> dict[str, Discrepancy]:
        """Each comparison with the original, by the role of the other network."""
        after = {} if self.repaired is None else {"repaired": self.repaired.after}
        return {"compressed": self.found, **after}

    @property
    def answer(self) -> Discrepancy:
        """The comparison that the verdict speaks of."""
        return self.found if self.repaired is None else self.repaired.after

    @property
    def machine(self) -> Machine:
        """Where it was made."""
        return Machine.here(self.inputs.stars.device)


def versions() -> dict[str, str]:
    """Of everything that computes."""
    return {"torchreach": torchreach.__version__, "torch": torch.__version__, "python": platform.python_version()}


def heading(
    command: str, command_line: str, settings: Mapping[str, Any], networks: Mapping[str, NetworkInfo], inputs: InputSet
) -> dict[str, Any]:
    """What a report without pages begins with: what was run, where, on which networks and which set."""
    stars = inputs.stars
    return {
        **run_heading(command, command_line, settings, networks, stars.device),
        "input_set": {"text": inputs.text, "sha256": stars_hash(stars), "bounds": bounds(stars)},
    }


def run_heading(
    command: str,
    command_line: str,
    settings: Mapping[str, Any],
    networks: Mapping[str, NetworkInfo],
    device: torch.device,
) -> dict[str, Any]:
    """`heading` without the set."""
    return {
        "command": command,
        "command_line": command_line,
        "versions": versions(),
        "machine": asdict(Machine.here(device)),
        "settings": dict(settings),
        "networks": {role: asdict(network) for role, network in networks.items()},
    }


def _layer_name(layer: nn.Module) -> str:
    match layer:
        case nn.Linear():
            return f"Linear {layer.in_features}-{layer.out_features}"
        case nn.Conv2d():
            return f"Conv2d {layer.in_channels}-{layer.out_channels}"
        case _:
            return type(layer).__name__
