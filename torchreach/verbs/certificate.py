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
from collections.abc import Callable, Iterator
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
from torchreach.check.proof import Bounded, Multipliers, Networks, Parts, Set, Tree, batches, beside
from torchreach.check.weights import digest
from torchreach.core.clock import Clock, OutOfTime, running
from torchreach.core.errors import UnsupportedLayerError
from torchreach.core.files import whole
from torchreach.core.options import Budget
from torchreach.core.results import Certificate, Discrepancy, ReachResult
from torchreach.core.terms import Semantics, Status
from torchreach.graph.merged import MergedNetwork
from torchreach.lp.halfspaces import Halfspaces
from torchreach.lp.interior_point import maximize
from torchreach.lp.problem import LPBatch
from torchreach.read.module import chain
from torchreach.sets.star import StarBatch

Prover = Callable[[Any, Path, Budget], Certificate]

# What is claimed beyond what was proven here, relative: other processors add up in another order.
MARGIN = 1e-9
# Open neurons of a box up to which it is enumerated instead of halved.
FEW = 16
# A program may leave its rows at this price, in units of the objective, so that it has a solution where the part is empty.
PRICE = 1e3
BATCH = 32  # parts split by signs at a time
SMALL = 1e-8  # multipliers below this part of the largest are left out


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
        self.layer, self.open = None, np.zeros((0, 0), bool)

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
        if z is not self.layer:  # the first look at this layer: later ones are at parts of these
            relu = np.tile(self.nets.first[k].relu, z.error.shape[1] // self.nets.widths[k])
            self.layer, self.open = z, crossing(*shape.ends(z)) & relu & ~self.closed[parts][:, None]
        open = self.open[parent] & (asked == 0)
        at = np.argsort(~open, axis=1, kind="stable")[:, : max(int(open.sum(1).max()), 1)]
        rows = z.rows[parent[:, None], :, at].transpose(0, 2, 1)
        still = crossing(*shape.ends(Form(rows, z.error[parent[:, None], at]))) & np.take_along_axis(open, at, 1)
        open = np.zeros_like(open)
        np.put_along_axis(open, at, still, 1)
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

    def levels(self) -> Iterator[np.ndarray]:
        """The parts level by level, as `Tree` numbers them."""
        level = np.zeros(1, np.int64)
        while len(level):
            yield level
            level = self.halved(level[self.split[level] >= 0])

    def finished(self) -> np.ndarray:
        """The splits, as `Tree` takes them."""
        return self.split[np.concatenate(list(self.levels()))].astype(np.int32)


def crossing(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Which ranges leave a sign open by more than what becomes part of the error."""
    return (low < -TINY) & (high > TINY)


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
        tree, multipliers = growing, None
    else:
        split, multipliers = _by_signs(growing)
        tree = Tree(split, growing.variables, nets.hidden)
    proven = np.full(len(target), -np.inf)
    for _, found in leaf_bounds(nets, given, tree, multipliers):
        proven = np.maximum(proven, found.max(0))
    return growing.finished(), multipliers, proven


def _by_signs(growing: _Growing) -> tuple[np.ndarray, Multipliers]:
    """Best first over signs, in batches; each part has its programs solved when it is made."""
    nets, given = growing.nets, growing.given
    root = Parts(np.zeros(1, np.int64), given.low[None], given.high[None], np.zeros((1, nets.hidden), np.int8))
    proofs: dict[int, np.ndarray] = {}
    open = _solved(growing, root, proofs)
    while open and not growing.clock.over:
        open.sort(key=lambda entry: -entry[0])
        taken, open = open[:BATCH], open[BATCH:]
        split = np.array([entry[2] for entry in taken])
        parts = [[getattr(entry[1], name) for entry in taken] for name in ("index", "low", "high", "signs")]
        joined = Parts(*map(np.concatenate, parts))
        growing.divide(joined.index, split)
        for index in joined.index:
            proofs.pop(int(index), None)
        open += _solved(growing, joined.halves(growing.halved(joined.index), split), proofs)
    levels = list(growing.levels())
    order, split = np.concatenate(levels), growing.finished()
    found = [(leaf, proofs[int(index)]) for leaf, index in enumerate(order[split < 0]) if int(index) in proofs]
    at = [np.concatenate((np.full((len(part), 1), leaf), part[:, :2].astype(np.int64)), 1) for leaf, part in found]
    value = [part[:, 2] for _, part in found]
    return split, Multipliers(np.concatenate([np.zeros((0, 3), np.int64), *at]), np.concatenate([np.zeros(0), *value]))


def _solved(growing: _Growing, parts: Parts, proofs: dict[int, np.ndarray]) -> list[tuple[float, Parts, int]]:
    """Multipliers [Q, 3] of parts into `proofs`; those that stay open: excess, the part, and the sign to split."""
    left = []
    for some in batches(growing.nets, growing.given, parts):
        found = Bounded.of(growing.nets, growing.given, some)
        excess = found.bounds(*NONE) - growing.target
        try:
            at, point = _duals(growing, found, some, *np.nonzero(excess > 0))
        except OutOfTime:
            at, point = NONE, None
        bound = found.bounds(*at) - growing.target
        score = scores(found, bound)
        if point is not None:
            score = score * _missed(growing, found, point) + 1e-9 * score
        for b in np.flatnonzero((excess > 0).any(1)):
            mine = at[0] == b
            proofs[int(some.index[b])] = np.stack((at[1][mine], at[2][mine], at[3][mine]), 1)
            if bound[b].max() > 0 and score[b].max() > 0:
                split = growing.variables + int(score[b].argmax())
                left.append((float(bound[b].max()), some.take(np.array([b])), split))
    return left


def _missed(growing: _Growing, found: Bounded, point: np.ndarray) -> np.ndarray:
    """[B, H] by which part of what it may each open neuron's relaxation leaves its ReLU at symbols [B, R - 1]."""
    own, hidden = len(growing.given.b), growing.nets.hidden
    values = found.known.rows[:, 0] + np.einsum("br,brh->bh", point, found.known.rows[:, 1:])
    relu, over = (values[:, own + n * hidden : own + (n + 1) * hidden] for n in (1, 2))
    half = np.zeros(relu.shape)
    b, r = np.nonzero(found.owner >= 0)
    h = found.owner[b, r]
    half[b, h] = np.abs(found.known.rows[b, r, own + hidden + h])
    return np.where(half > 0, np.clip(np.minimum(relu, over) / np.maximum(half, 1e-300), 0, 2), 0.0)


def _duals(
    growing: _Growing, found: Bounded, parts: Parts, row: np.ndarray, objective: np.ndarray
) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    """Multipliers of objectives [Q] of parts `row` [Q], as `Multipliers.of` gives them, and symbols [B, R - 1].

    The programs over the symbols: the largest of each objective where the forms are >= 0, or are missed at a price.
    """
    own, hidden = len(growing.given.b), growing.nets.hidden
    count = len(parts.index)
    use = np.concatenate((np.ones((count, own), bool), parts.signs != 0, found.open, found.open), 1)
    most = int(use.sum(1).max())
    if not most or not len(row):
        return NONE, None
    forms = np.argsort(~use, axis=1, kind="stable")[:, :most]
    used = np.take_along_axis(use, forms, 1)
    known = np.take_along_axis(found.known.rows, forms[:, None], 2).transpose(0, 2, 1)
    known[:, :, 0] += np.take_along_axis(found.known.error, forms, 1)
    size = np.maximum(np.abs(known).sum(2), 1e-12)
    known = np.where(used[:, :, None], known / size[:, :, None], 0.0)
    outputs = found.out.rows.shape[2]
    goal = found.out.rows[row, :, objective % outputs] * np.where(objective < outputs, 1.0, -1.0)[:, None]
    price = PRICE * np.maximum(np.abs(goal).sum(1), 1e-12)
    # - g . xi - t <= c for t = 1 + tau, |tau| <= 1: as |c| <= 1 there is room at xi = 0 and t near 2.
    A = torch.from_numpy(np.concatenate((-known[:, :, 1:], -np.ones((count, most, 1))), 2)[row])
    sets = Halfspaces(A, torch.from_numpy(known[row][:, :, 0] + 1))
    start = torch.zeros(len(row), A.shape[2], dtype=A.dtype)
    start[:, -1] = 0.9
    problem = LPBatch(torch.from_numpy(np.concatenate((goal[:, 1:], -price[:, None]), 1)), torch.from_numpy(goal[:, 0] - price), sets)
    target = torch.from_numpy(growing.target[objective])
    gap = 1e-3 * float(np.abs(growing.target).max()) * MARGIN
    solution = maximize(problem, start, gap=gap, above=target, below=target, clock=growing.clock)
    point = np.zeros((count, A.shape[2] - 1))
    point[row] = solution.point[:, :-1].numpy()
    y = solution.dual.numpy() / size[row]
    q, p = np.nonzero(used[row] & (y > SMALL * y.max(1, keepdims=True).clip(1e-300)))
    y = y.astype(np.float32).astype(np.float64)  # as they are kept
    return (row[q], objective[q], forms[row[q], p], y[q, p]), point


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
        larger = (found.attained_upper.abs() >= found.attained_lower.abs()).reshape(*found.lower.shape, *[1] * len(stars.shape))
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
    nets = beside(layers[0], layers[1] if len(layers) > 1 else None)
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
        "torchreach": torchreach.__version__,
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
    low, high = attained(nets, given, at)
    own = np.arange(outputs)
    met = np.maximum(np.maximum(low[own, own], -high[own, own]) * (1 - MARGIN) - scale, 0)
    found = {("set", f".{name}"): getattr(given, name) for name in ("basis", "A", "b", "low", "high")}
    found |= {("claim", ".high"): claim[:outputs], ("claim", ".low"): -claim[outputs:]}
    found |= {("claim", ".attained"): met, ("claim", ".at"): at, ("tree", ""): split}
    if multipliers is not None:
        leaf, objective, form = multipliers.at.T.astype(np.int32)
        many = np.bincount(leaf, minlength=int((split < 0).sum())).astype(np.int32)
        kept = {"many": many, "objective": objective, "form": form, "value": multipliers.value.astype(np.float32)}
        found |= {("multipliers", f".{name}"): value for name, value in kept.items()}
    return found


def _set(stars: StarBatch, s: int) -> Set:
    basis, A, b, low, high = (
        getattr(stars, name)[s].detach().double().cpu().numpy() for name in ("basis", "A", "b", "lower", "upper")
    )
    real = A.any(1) | (b < 0)
    return Set(basis.reshape(len(basis), -1), A[real], b[real], low, high)


def _predicates(given: Set, x: np.ndarray) -> np.ndarray:
    """The predicate [B, M] of inputs [B, N_in] of the set, or of points close to them."""
    at = np.clip(np.linalg.lstsq(given.basis[1:].T, (x - given.basis[0]).T, rcond=None)[0].T, given.low, given.high)
    if len(given.b):  # rounding may have left a half-space: back to a point well inside
        out = (at @ given.A.T > given.b).any(1)
        at = np.where(out[:, None], at + 1e-9 * (at.mean(0) - at), at)
    return at
