"""Proofs of results that others can check, see `torchreach.check`: found after the analysis, for the bounds it certified.

The proof is a tree of parts of each set. What a leaf must show is decided by the checker's own bounds, so that a proof
that is written is one that it accepts; how the tree is found needs no trust.

    enumerated sets    every neuron whose sign a region's vertices leave open is split, in the order of the layers: the
                       leaves are the joint linear regions, their paths the activation patterns
    few inputs         the box is halved until the bound holds or few neurons are open, which are then enumerated
    many inputs        best first on signs; the multipliers of a leaf are the dual of its linear program

Axis letters: B parts, H hidden neurons, N outputs, Q programs, P their rows.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn

import torchreach
from torchreach.check.check import FORMAT, VERSION, attained, leaf_bounds
from torchreach.check.forms import TINY, Form, Layer
from torchreach.check.polytopes import MOST, Polytopes
from torchreach.check.proof import PARTS, Bounded, Multipliers, Networks, Parts, Set, Tree, batches, beside
from torchreach.check.weights import digest
from torchreach.core.clock import Clock
from torchreach.core.errors import UnsupportedLayerError
from torchreach.core.files import whole
from torchreach.lp.halfspaces import Halfspaces
from torchreach.lp.interior_point import maximize
from torchreach.lp.problem import LPBatch
from torchreach.read.module import chain
from torchreach.sets.star import StarBatch

# What is claimed beyond what was proven here, relative: other processors add up in another order.
MARGIN = 1e-9
# Open neurons of a box up to which it is enumerated instead of halved.
FEW = 16
# A program may leave its rows at this price, in units of the objective, so that it has a solution where the part is empty.
PRICE = 1e3
SMALL = 1e-11  # multipliers below this part of the largest are left out


@dataclass(frozen=True)
class Written:
    """A certificate that was written. upper: [S, N] certified |y1 - y2| that it proves. leaves: [S]; size: in bytes."""

    path: Path
    upper: np.ndarray
    leaves: tuple[int, ...]
    size: int

    @property
    def bytes_per_leaf(self) -> float:
        return self.size / sum(self.leaves)


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
                f"a certificate requires networks of Linear layers and ReLUs so far, got {type(leaf).__name__} at {name}"
            )
    if not found or found[-1].relu.any():
        raise UnsupportedLayerError("a certificate requires networks that end in a Linear layer")
    return found


class _Growing(Tree):
    """A tree as it is found: `choose` decides, for bounds that leaves are to have, target [2 N].

    whole: enumerate without halving first.
    """

    def __init__(self, nets: Networks, given: Set, target: np.ndarray, clock: Clock, *, whole: bool) -> None:
        self.nets, self.given, self.target, self.clock, self.whole = nets, given, target, clock, whole
        self.variables, self.count = len(given.low), 1
        self.split, self.child = np.full(1, -1), np.full(1, -1)
        self.closed = np.zeros(1, bool)

    def divide(self, parts: np.ndarray, split: np.ndarray) -> None:
        """Splits of parts [B], -1 for none."""
        inner = split >= 0
        more = 2 * int(inner.sum())
        while self.count + more > len(self.split):
            none = np.full(len(self.split), -1)
            self.split, self.child = np.concatenate((self.split, none)), np.concatenate((self.child, none))
            self.closed = np.concatenate((self.closed, none > 0))
        self.split[parts] = split
        self.child[parts[inner]] = self.count + np.arange(0, more, 2)
        self.count += more

    def choose(self, parts: np.ndarray, *state: Any) -> np.ndarray:
        split = np.full(len(parts), -1)
        if not self.clock.over:
            split = self._box(*state) if len(state) == 1 else self._sign(parts, *state)
            self.divide(parts, split)
        return split

    def _sign(self, parts: np.ndarray, k: int, z: Form, parent: np.ndarray, shape: Polytopes, asked: np.ndarray) -> Any:
        """The first neuron of layer k that the vertices leave open, of parts that are not closed."""
        low, high = shape.ends(z.take(parent))
        relu = np.tile(self.nets.first[k].relu, low.shape[1] // self.nets.widths[k])
        open = (asked == 0) & (low < -TINY) & (high > TINY) & relu & ~self.closed[parts][:, None]
        column, start, n = open.argmax(1), sum(self.nets.widths[:k]), self.nets.widths[k]
        neuron = np.where(column < n, column, sum(self.nets.widths) + column - n) + start
        return np.where(open.any(1), self.variables + neuron, -1)

    def _box(self, parts: Parts) -> np.ndarray:
        """The variable to halve of boxes that are neither closed nor to be enumerated."""
        split = np.full(len(parts.index), -1)
        if self.whole:
            return split
        signs = np.zeros((len(split), self.nets.hidden), np.int8)
        parts = Parts(parts.index, parts.low, parts.high, signs)
        row = 0
        for some in batches(self.nets, self.given, parts):
            found = Bounded.of(self.nets, self.given, some)
            excess = found.bounds(*NONE) - self.target
            few = found.open.sum(1) <= FEW
            self.closed[some.index] = (excess <= 0).all(1)
            score = scores(found, excess)
            z = found.known.rows[:, 1 : 1 + self.variables, len(self.given.b) :][:, :, : self.nets.hidden]
            width = np.abs(found.known.rows[:, 1:, len(self.given.b) :][:, :, : self.nets.hidden]).sum(1)
            influence = (np.abs(z) * (score / np.maximum(width, 1e-300))[:, None]).sum(2)
            chosen = np.where(self.closed[some.index] | few, -1, influence.argmax(1))
            split[row : row + len(chosen)] = chosen
            row += len(chosen)
        return split

    def finished(self) -> np.ndarray:
        """The splits level by level, as `Tree` takes them."""
        parts, level = [], np.zeros(1, np.int64)
        while len(level):
            parts.append(self.split[level])
            level = self.halved(level[self.split[level] >= 0])
        return np.concatenate(parts).astype(np.int32)


NONE = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


def scores(found: Bounded, excess: np.ndarray) -> np.ndarray:
    """[B, H] how much each neuron's relaxation adds to the objectives that exceed their targets, relative to those."""
    outputs = excess.shape[1] // 2
    weight = np.maximum(excess, 0) / np.maximum(excess.max(1, keepdims=True), 1e-300)
    weight = weight[:, :outputs] + weight[:, outputs:]
    made = (np.abs(found.out.rows) * weight[:, None]).sum(2)  # [B, R]
    score = np.zeros(found.open.shape)
    owned = found.owner >= 0
    np.add.at(score, (np.nonzero(owned)[0], found.owner[owned]), made[owned])
    return np.where(found.open, score, 0.0)


def prove(
    nets: Networks, given: Set, target: np.ndarray, clock: Clock, *, whole: bool
) -> tuple[np.ndarray, Multipliers | None, np.ndarray]:
    """A tree, multipliers where there are more than `MOST` variables, and what they prove [2 N]; `target` if it can."""
    growing = _Growing(nets, given, target, clock, whole=whole)
    if 1 <= len(given.low) <= MOST:
        for _ in leaf_bounds(nets, given, growing, None):
            pass
        split, multipliers = growing.finished(), None
    else:
        split, multipliers = _by_signs(growing)
    tree, proven = Tree(split, growing.variables, nets.hidden), np.full(len(target), -np.inf)
    for _, found in leaf_bounds(nets, given, tree, multipliers):
        proven = np.maximum(proven, found.max(0))
    return split, multipliers, proven


def _by_signs(growing: _Growing) -> tuple[np.ndarray, Multipliers]:
    """Best first over signs, in batches; each open part has its programs solved when it is made."""
    nets, given, target = growing.nets, growing.given, growing.target
    root = Parts(np.zeros(1, np.int64), given.low[None], given.high[None], np.zeros((1, nets.hidden), np.int8))
    proofs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    open = _solved(growing, root, proofs)
    while open and not growing.clock.over:
        open.sort(key=lambda entry: -entry[0])
        taken, open = open[: PARTS // 64], open[PARTS // 64 :]
        index = np.array([entry[1].index[0] for entry in taken])
        split = np.array([entry[2] for entry in taken])
        growing.divide(index, split)
        parts = Parts(*(np.concatenate([getattr(e[1], n) for e in taken]) for n in ("index", "low", "high", "signs")))
        for i in index:
            proofs.pop(int(i), None)
        open += _solved(growing, parts.halves(growing.halved(index), split), proofs)
    split = growing.finished()
    # The number of each part in `split`, level by level.
    level, order = np.zeros(1, np.int64), []
    while len(level):
        order.append(level)
        level = growing.halved(level[growing.split[level] >= 0])
    order = np.concatenate(order)
    leaves = order[split < 0]
    found = [(leaf, *proofs[int(index)]) for leaf, index in enumerate(leaves) if int(index) in proofs]
    at = [np.concatenate((np.full((len(a), 1), leaf), a), 1) for leaf, a, _ in found]
    value = [v for _, _, v in found]
    return split, Multipliers(np.concatenate([np.zeros((0, 3), np.int64), *at]), np.concatenate([np.zeros(0), *value]))


def _solved(growing: _Growing, parts: Parts, proofs: dict[int, tuple[np.ndarray, np.ndarray]]) -> list[Any]:
    """Multipliers of parts into `proofs`; those that stay open: excess, the part, and the sign to split."""
    left = []
    for some in batches(growing.nets, growing.given, parts):
        found = Bounded.of(growing.nets, growing.given, some)
        excess = found.bounds(*NONE) - growing.target
        row, objective = np.nonzero(excess > 0)
        solved = [_dual(growing, found, some, int(b), objective[row == b]) for b in np.unique(row)]
        at = [np.concatenate([part[i] for part in solved]) for i in range(4)] if solved else list(NONE)
        excess = found.bounds(*at) - growing.target
        score = scores(found, excess)
        for b in np.unique(row):
            mine = at[0] == b
            proofs[int(some.index[b])] = np.stack((at[1][mine], at[2][mine]), 1), at[3][mine]
            if excess[b].max() > 0 and score[b].max() > 0:
                variables = growing.variables
                left.append((excess[b].max(), some.take(np.array([b])), variables + int(score[b].argmax())))
    return left


def _dual(growing: _Growing, found: Bounded, parts: Parts, b: int, objectives: np.ndarray) -> tuple[np.ndarray, ...]:
    """Multipliers of one part's objectives, as `Multipliers.of` gives them.

    The program over the symbols: the largest of each objective where the forms are >= 0, or are missed at a price.
    """
    own, hidden = len(growing.given.b), growing.nets.hidden
    open = np.flatnonzero(found.open[b]) + own
    asked = np.flatnonzero(parts.signs[b]) + own
    forms = np.concatenate((np.arange(own), asked, open + hidden, open + 2 * hidden))
    if not len(forms):
        return tuple(part[:0] for part in NONE)
    outputs = found.out.rows.shape[2]
    rows = found.out.rows[b][:, objectives % outputs].T * np.where(objectives < outputs, 1.0, -1.0)[:, None]
    known = found.known.rows[b][:, forms].T
    known[:, 0] += found.known.error[b, forms]
    size = np.maximum(np.abs(known).sum(1), 1e-12)
    known = known / size[:, None]
    price = PRICE * np.maximum(np.abs(rows).sum(1), 1e-12)
    # - g . xi - t <= c, t = 1 + tau with |tau| <= 1: at xi = 0 and t near 2 all rows hold with room, as |c| <= 1
    count = len(objectives)
    A = torch.from_numpy(np.concatenate((-known[:, 1:], -np.ones((len(forms), 1))), 1)).expand(count, -1, -1)
    right = torch.from_numpy(known[:, 0] + 1).expand(count, -1)
    goal = torch.from_numpy(np.concatenate((rows[:, 1:], -price[:, None]), 1))
    start = torch.zeros(count, goal.shape[1], dtype=torch.float64)
    start[:, -1] = 0.9
    target = torch.from_numpy(growing.target[objectives] - price)
    constant = torch.from_numpy(rows[:, 0] - price)
    scale = float(np.abs(growing.target).max())
    solution = maximize(
        LPBatch(goal, constant, Halfspaces(A, right)), start, gap=1e-9 * scale, below=target + 0 * constant, clock=growing.clock
    )
    y = solution.dual.numpy() / size
    keep = y > SMALL * y.max(1, keepdims=True).clip(1e-300)
    q, p = np.nonzero(keep)
    return np.full(len(q), b), objectives[q], forms[p], y[q, p]


def save_certificate(
    path: str | Path,
    networks: list[nn.Module],
    stars: StarBatch,
    low: Tensor,
    high: Tensor,
    witness: Tensor,
    about: dict[str, Any],
    clock: Clock,
    *,
    whole_sets: list[bool],
) -> Written:
    """Writes a certificate of the range low .. high [S, N] of y1 - y2 (of y1, of one network) at `path`.

    Args:
        witness: [S, N, *shape] inputs that attain much. about: what the analysis says of itself, kept as it is.
        whole_sets: [S] sets whose regions are enumerated.

    The range proven contains low .. high; it is wider where the time of `clock` ended, or a search's bounds are tighter.

    Raises: UnsupportedLayerError: networks that are no chains of Linear and ReLU. OSError.
    """
    layers = [layers_of(network, stars.shape) for network in networks]
    nets = beside(layers[0], layers[1] if len(layers) > 1 else None)
    tensors: dict[str, np.ndarray] = {}
    uppers, leaves = [], []
    for s in range(len(stars)):
        given, variables = _set(stars, s)
        target = torch.cat((high[s], -low[s])).double().cpu().numpy()
        scale = MARGIN * np.abs(target).max()
        left = clock.share(1 / (len(stars) - s))
        split, multipliers, proven = prove(nets, given, target + scale / 2, left, whole=whole_sets[s])
        claim = np.maximum(target, proven + MARGIN * np.abs(proven).max())
        outputs = len(claim) // 2
        at = variables(witness[s].flatten(1).double().cpu().numpy())
        ends = attained(nets, given, at)
        own = np.arange(outputs)
        met = np.maximum(np.maximum(ends[0][own, own], -ends[1][own, own]) * (1 - MARGIN) - scale, 0)
        tensors |= {f"set.{s}.{n}": getattr(given, n) for n in ("basis", "A", "b", "low", "high")}
        tensors |= {f"claim.{s}.high": claim[:outputs], f"claim.{s}.low": -claim[outputs:]}
        tensors |= {f"claim.{s}.attained": met, f"claim.{s}.at": at, f"tree.{s}": split}
        if multipliers is not None:
            tensors |= {f"multipliers.{s}.at": multipliers.at.astype(np.int32)}
            tensors |= {f"multipliers.{s}.value": multipliers.value}
        uppers.append(np.maximum(claim[:outputs], claim[outputs:]))
        leaves.append(int((split < 0).sum()))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "torchreach": torchreach.__version__,
        "sets": len(stars),
        "networks": [{"digest": digest(net)} for net in layers],
        "analysis": about,
    }
    path = Path(path)
    with whole(path) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("certificate.json", json.dumps(content, indent=1, allow_nan=False))
        archive.writestr("evidence.safetensors", save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))
    return Written(path, np.stack(uppers), tuple(leaves), path.stat().st_size)


def _set(stars: StarBatch, s: int) -> tuple[Set, Callable[[np.ndarray], np.ndarray]]:
    """One star, and what finds the predicate [B, M] of inputs [B, N_in] in it."""
    basis, A, b, low, high = (
        getattr(stars, name)[s].detach().double().cpu().numpy() for name in ("basis", "A", "b", "lower", "upper")
    )
    basis = basis.reshape(len(basis), -1)
    real = A.any(1) | (b < 0)
    given = Set(basis, A[real], b[real], low, high)

    def variables(x: np.ndarray) -> np.ndarray:
        at = np.clip(np.linalg.lstsq(basis[1:].T, (x - basis[0]).T, rcond=None)[0].T, low, high)
        if len(given.b):  # rounding may have left a half-space: back to a point well inside
            inside = at.mean(0)
            gap = (at @ given.A.T - given.b).max(1) > 0
            at = np.where(gap[:, None], at + 1e-9 * (inside - at), at)
        return at

    return given, variables
