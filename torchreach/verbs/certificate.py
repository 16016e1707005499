"""Certificates in files, which `torchreach.check` verifies: of a discrepancy, of an output's range.

Axis letters: S stars, N outputs, M predicate variables.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from torchreach.check.check import FORMAT, VERSION, attained
from torchreach.check.forms import Layer, Networks
from torchreach.check.proof import Set
from torchreach.check.weights import digest
from torchreach.core.clock import Clock, running
from torchreach.core.errors import UnsupportedLayerError
from torchreach.core.files import whole
from torchreach.core.options import Budget
from torchreach.core.results import Certificate, Discrepancy, ReachResult
from torchreach.core.terms import Semantics, Status
from torchreach.graph.merged import MergedNetwork
from torchreach.lp.halfspaces import Halfspaces
from torchreach.lp.interior_point import interior
from torchreach.read.module import chain
from torchreach.sets.star import StarBatch
from torchreach.verbs.proof import MARGIN, prove

Prover = Callable[[Any, Path, Budget], Certificate]

INWARD = 1e-8  # part of the way to a deep point of a set, that witnesses are moved


def layers_of(network: nn.Module, shape: tuple[int, ...]) -> list[Layer]:
    """The layers of a chain of Linear and ReLU. Raises UnsupportedLayerError."""
    found: list[Layer] = []
    for name, leaf in chain(network, shape).named_children():
        if isinstance(leaf, nn.Flatten | nn.Identity | nn.Dropout):
            continue
        if isinstance(leaf, nn.Linear):
            weight, bias = leaf.weight.detach().cpu().double().numpy(), leaf.bias
            own = np.zeros(len(weight)) if bias is None else bias.detach().cpu().double().numpy()
            found.append(Layer(np.ascontiguousarray(weight), own, np.zeros(len(weight), bool)))
        elif isinstance(leaf, nn.ReLU) and found:
            found[-1] = Layer(found[-1].weight, found[-1].bias, np.ones(len(found[-1].bias), bool))
        else:
            raise UnsupportedLayerError(
                f"a certificate requires networks of Linear layers and ReLUs, got {type(leaf).__name__} at {name}"
            )
    if not found or found[-1].relu.any():
        raise UnsupportedLayerError("a certificate requires networks that end in a Linear layer")
    return found


def provable(found: Discrepancy, original: nn.Module, compressed: nn.Module, stars: StarBatch) -> Discrepancy:
    """`found` with what writes its certificate, where it is about real-valued functions; else as it is."""
    if found.semantics not in (Semantics.FLOAT, Semantics.WEIGHT_ONLY):
        return found
    return replace(found, prover=of_difference(original, compressed, stars))


def of_difference(original: nn.Module, compressed: nn.Module, stars: StarBatch) -> Prover:
    """What writes a certificate of a `Discrepancy` of these networks."""

    def prover(found: Discrepancy, path: Path, budget: Budget) -> Certificate:
        about = {"method": found.stats.method, "regions": found.regions.tolist(), "semantics": found.semantics.value}
        about |= {"upper": found.upper.tolist(), "seconds": found.stats.seconds}
        exact = _enumerated(found)
        ends = found.range_lower, found.range_upper
        return _write(path, (original, compressed), stars, ends, found.witness, about, budget, exact)

    return prover


def of_output(network: nn.Module, stars: StarBatch) -> Prover:
    """What writes a certificate of a `ReachResult`."""

    def prover(found: ReachResult, path: Path, budget: Budget) -> Certificate:
        networks = (network.first, network.second) if isinstance(network, MergedNetwork) else (network,)
        about = {"method": found.stats.method, "regions": found.count.tolist(), "semantics": Semantics.FLOAT.value}
        larger = (found.attained_upper.abs() >= found.attained_lower.abs()).reshape(
            *found.lower.shape, *[1] * len(stars.shape)
        )
        witness = torch.where(larger, found.argmax, found.argmin)
        ends = found.lower, found.upper
        return _write(path, networks, stars, ends, witness, about, budget, _enumerated(found))

    return prover


def _enumerated(found: Discrepancy | ReachResult) -> list[bool]:
    """[S] whether the regions of a star were enumerated to the end, so that a proof can do the same."""
    methods = set(found.stats.method.replace(",", " ").split())
    return [status is Status.EXACT and bool(methods & {"vertices", "programs"}) for status in found.status]


def _write(
    path: Path,
    networks: tuple[nn.Module, ...],
    stars: StarBatch,
    ends: tuple[Tensor, Tensor],
    witness: Tensor,
    about: dict[str, Any],
    budget: Budget,
    exact: list[bool],
) -> Certificate:
    """Writes a certificate of the ranges `ends` [S, N] of y1 - y2 (of y1, of one network) at `path`.

    witness: [S, N, *shape] inputs that attain much. about: what the analysis says of itself, kept as it is. exact: [S]
        sets to be enumerated. The ranges proven contain `ends`; they are wider where the time was too short, or where a
        search's bounds were tighter.

    Raises: UnsupportedLayerError: networks that are no chains of Linear and ReLU. OSError.
    """
    layers = [layers_of(network, stars.shape) for network in networks]
    nets = Networks.of(layers[0], layers[1] if len(layers) > 1 else None)
    tensors: dict[str, np.ndarray] = {}
    uppers, leaves = [], []
    with running(budget.seconds) as clock:
        for s in range(len(stars)):
            target = torch.cat((ends[1][s], -ends[0][s])).double().cpu().numpy()
            share = clock.share(1 / (len(stars) - s))
            found = _one(nets, stars, s, target, witness[s], share, exact=exact[s])
            tensors |= {f"{kind}.{s}{name}": value for (kind, name), value in found.items()}
            high, low = found["claim", ".high"], found["claim", ".low"]
            uppers.append(np.maximum(high, -low))
            leaves.append(int((found["tree", ""] < 0).sum()))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "sets": len(stars),
        "networks": [{"digest": digest(net)} for net in layers],
        "analysis": about,
    }
    with whole(path) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("certificate.json", json.dumps(content, indent=1))
        archive.writestr("evidence.safetensors", save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))
    return Certificate(path, torch.from_numpy(np.stack(uppers)), tuple(leaves), path.stat().st_size)


def _one(
    nets: Networks, stars: StarBatch, s: int, target: np.ndarray, witness: Tensor, clock: Clock, *, exact: bool
) -> dict[tuple[str, str], np.ndarray]:
    """What the certificate keeps of star s, by kind and name."""
    given = _set(stars, s)
    scale, outputs = MARGIN * np.abs(target).max(), len(target) // 2
    split, multipliers, proven = prove(nets, given, target + scale / 2, clock, whole=exact)
    claim = np.maximum(target, proven + MARGIN * np.abs(proven).max())
    at = _predicates(given, witness.flatten(1).double().cpu().numpy())
    met = np.maximum(attained(nets, given, at) * (1 - MARGIN) - scale, 0)
    found = {("set", f".{name}"): getattr(given, name) for name in ("basis", "A", "b", "low", "high")}
    found |= {("claim", ".high"): claim[:outputs], ("claim", ".low"): -claim[outputs:]}
    found |= {("claim", ".attained"): met, ("claim", ".at"): at, ("tree", ""): split}
    for name, value in zip(("many", "objective", "form", "value"), multipliers, strict=False):
        found["multipliers", f".{name}"] = value.astype(np.float32 if name == "value" else np.int32)
    return found


def _set(stars: StarBatch, s: int) -> Set:
    basis, A, b, low, high = (
        getattr(stars, name)[s].detach().double().cpu().numpy() for name in ("basis", "A", "b", "lower", "upper")
    )
    real = A.any(1) | (b < 0)
    return Set(basis.reshape(len(basis), -1), A[real], b[real], low, high)


def _predicates(given: Set, x: np.ndarray) -> np.ndarray:
    """The predicate [B, M] of inputs [B, N_in] of the set, or of points of it close to them."""
    at = np.clip(np.linalg.lstsq(given.basis[1:].T, (x - given.basis[0]).T, rcond=None)[0].T, given.low, given.high)
    if not len(given.b):
        return at
    # On a half-space's border rounding decides whether they are in it: they are moved inward a little.
    middle, radius = (given.low + given.high) / 2, (given.high - given.low) / 2
    sets = Halfspaces(*(torch.from_numpy(part)[None] for part in (given.A * radius, given.b - given.A @ middle)))
    deep = middle + radius * interior(sets, 1e-9)[0][0].numpy()
    return at + INWARD * (deep - at)
