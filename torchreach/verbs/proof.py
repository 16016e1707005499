"""Proofs of results that others can check (`torchreach.check`): found after the analysis, for the bounds it certified.

The proof is a tree of parts of each set. What a leaf must show is decided by the checker's own bounds, so that a proof
that is written is one that it accepts; how the tree is found needs no trust.

    enumerated sets    every neuron whose sign a region's vertices leave open is split, in the order of the layers: the
                       leaves are the joint linear regions, their paths the activation patterns
    few inputs         the box is halved until the bound holds or few neurons are open, which are then enumerated
    many inputs        best first on signs; the multipliers of a leaf are the dual of its linear program

Axis letters: B parts, H hidden neurons, N outputs, Q programs, P their rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchreach.check.forms import TINY, Form, Networks, State
from torchreach.check.polytopes import MOST, Polytopes
from torchreach.check.proof import Bounded, Boxes, Parts, Set, Tree, batches, by_boxes, by_vertices
from torchreach.core.clock import Clock, OutOfTime
from torchreach.lp.halfspaces import Halfspaces
from torchreach.lp.interior_point import maximize
from torchreach.lp.problem import LPBatch

# What is claimed beyond what was proven here, relative: other processors add up in another order.
MARGIN = 1e-9
# Open neurons of a box up to which it is enumerated instead of halved.
FEW = 16
# A program may leave its rows at this price, in units of the objective: it has a solution where the part is empty.
PRICE = 1e3
BATCH = 64  # parts split by signs at a time
SMALL = 1e-8  # multipliers below this part of the largest are left out


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
            self.layer = z
            self.open = crossing(*shape.ends(z)) & self.nets.relus[k] & ~self.closed[parts][:, None]
        open = self.open[parent] & (asked == 0)
        at = np.argsort(~open, axis=1, kind="stable")[:, : max(int(open.sum(1).max()), 1)]
        still = crossing(*shape.ends(z.take(parent).features(at))) & np.take_along_axis(open, at, 1)
        column = np.take_along_axis(at, still.argmax(1)[:, None], 1)[:, 0]
        first = self.variables + int((self.nets.layer_of < k).sum())
        return np.where(still.any(1), first + column, -1)

    def _box(self, parts: Parts) -> np.ndarray:
        """The variable to halve of boxes that are neither closed nor to be enumerated."""
        split = np.full(len(parts.index), -1)
        if self.whole:
            return split
        signs = np.zeros((len(split), len(self.nets.layer_of)), np.int8)
        row = 0
        for some in batches(self.nets, self.given, Parts(parts.index, parts.low, parts.high, signs)):
            found = Relaxed.of(self.nets, self.given, some)
            excess = found.bounded.bounds(*NONE) - self.target
            self.closed[some.index] = (excess <= 0).all(1)
            influence = np.einsum("bmh,bh->bm", found.width, found.scores(excess))
            stay = self.closed[some.index] | (found.open.sum(1) <= FEW)
            split[row : row + len(stay)] = np.where(stay, -1, influence.argmax(1))
            row += len(stay)
        return split

    def levels(self) -> Iterator[np.ndarray]:
        """The parts level by level, as `Tree` numbers them."""
        level = np.zeros(1, np.int64)
        while len(level):
            yield level
            level = self.sides(level[self.split[level] >= 0])

    def finished(self) -> np.ndarray:
        """The splits, as `Tree` takes them."""
        return self.split[np.concatenate(list(self.levels()))].astype(np.int32)


def crossing(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Which ranges leave a sign open by more than what becomes part of the error."""
    return (low < -TINY) & (high > TINY)


NONE = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


@dataclass(eq=False)
class Relaxed:
    """Parts bounded as boxes, and what was relaxed.

    open: [B, H] neurons that were. owner: [B, R] the neuron whose relaxation a row stands for, -1 for none. width:
    [B, M, H] which part of each pre-activation's range each variable makes. forms: [H, 3] places among
    `Bounded.known` of each neuron's s z, relu(z) and relu(z) - z.
    """

    bounded: Bounded
    open: np.ndarray
    owner: np.ndarray
    width: np.ndarray
    forms: np.ndarray

    @staticmethod
    def of(nets: Networks, given: Set, parts: Parts) -> Relaxed:
        variables, opens, widths, forms = len(given.low), [], [], []
        owners = [np.full((len(parts.index), 1 + variables), -1)]
        start = np.cumsum([0, *map(len, nets.relus)])

        def watch(k: int, before: State, z: Form, after: State) -> None:
            low, high = Boxes.ends(z)
            asked = parts.signs[:, start[k] : start[k + 1]]
            opens.append((low < 0) & (high > 0) & (asked == 0) & nets.relus[k])
            rows = np.abs(z.rows[:, 1:])
            widths.append(rows[:, :variables] / np.maximum(rows.sum(1), 1e-300)[:, None])
            n, own = after.a.rows.shape[2], before.a.rows.shape[1]
            new = after.a.rows[:, own:], (after.a if after.e is None else after.e).rows[:, own:]
            first, second = (np.where((part != 0).any(2), np.abs(part).argmax(2), -1) for part in new)
            at = np.where(first >= 0, first, np.where(second >= 0, second + n, -1))
            owners.append(np.where(at >= 0, at + start[k], -1))
            for net in range(len(asked[0]) // n):
                base = len(given.b) + 3 * start[k]
                sign, value = base + net * n, base + len(asked[0]) + 2 * net * n
                forms.append(np.stack((sign + np.arange(n), value + np.arange(n), value + n + np.arange(n)), 1))

        bounded = Bounded.of(nets, given, parts, watch)
        none = np.zeros((len(parts.index), 0))
        joined = [np.concatenate([none.astype(bool), *opens], 1), np.concatenate(owners, 1)]
        width = np.concatenate([np.zeros((len(parts.index), variables, 0)), *widths], 2)
        return Relaxed(bounded, joined[0], joined[1], width, np.concatenate([np.zeros((0, 3), np.int64), *forms]))

    def scores(self, excess: np.ndarray) -> np.ndarray:
        """[B, H] how much each neuron's relaxation adds to the objectives by which targets are exceeded [B, 2 N]."""
        outputs = excess.shape[1] // 2
        weight = np.maximum(excess, 0) / np.maximum(excess.max(1, keepdims=True), 1e-300)
        weight = weight[:, :outputs] + weight[:, outputs:]
        made, owned = (np.abs(self.bounded.out.rows) * weight[:, None]).sum(2), self.owner >= 0
        score = np.zeros(self.open.shape)
        np.add.at(score, (np.nonzero(owned)[0], self.owner[owned]), made[owned])
        return np.where(self.open, score, 0.0)

    def missed(self, point: np.ndarray) -> np.ndarray:
        """[B, H] by which part of what it may each relaxation leaves its ReLU at symbols [B, R - 1]."""
        known = self.bounded.known.rows
        values = known[:, 0] + np.einsum("br,brh->bh", point, known[:, 1:])
        half = np.zeros(self.open.shape)
        b, r = np.nonzero(self.owner >= 0)
        h = self.owner[b, r]
        half[b, h] = np.abs(known[b, r, self.forms[h, 1]])
        off = np.minimum(values[:, self.forms[:, 1]], values[:, self.forms[:, 2]])
        return np.where(half > 0, np.clip(off / np.maximum(half, 1e-300), 0, 2), 0.0)


def prove(
    nets: Networks, given: Set, target: np.ndarray, clock: Clock, *, whole: bool
) -> tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray]:
    """A tree, multipliers where there are more than `MOST` variables, and what they prove [2 N]; `target` if it can."""
    growing, multipliers = _Growing(nets, given, target, clock, whole=whole), ()
    if 1 <= len(given.low) <= MOST:
        bounds = by_vertices(nets, given, growing)
    else:
        multipliers = _by_signs(growing)
        bounds = by_boxes(nets, given, Tree(growing.finished(), growing.variables, len(nets.layer_of)), *multipliers)
    proven = np.full(len(target), -np.inf)
    for _, found in bounds:
        proven = np.maximum(proven, found.max(0))
    return growing.finished(), multipliers, proven


def _by_signs(growing: _Growing) -> tuple[np.ndarray, ...]:
    """Best first over signs, in batches; each part has its programs solved when it is made. Arguments of `by_boxes`."""
    nets, given = growing.nets, growing.given
    signs = np.zeros((1, len(nets.layer_of)), np.int8)
    proofs: dict[int, np.ndarray] = {}
    open = _solved(growing, Parts(np.zeros(1, np.int64), given.low[None], given.high[None], signs), proofs)
    while open and not growing.clock.over:
        open.sort(key=lambda entry: -entry[0])
        taken, open = open[:BATCH], open[BATCH:]
        split = np.array([entry[2] for entry in taken])
        parts = [[getattr(entry[1], name) for entry in taken] for name in ("index", "low", "high", "signs")]
        joined = Parts(*map(np.concatenate, parts))
        growing.divide(joined.index, split)
        for index in joined.index:
            proofs.pop(int(index), None)
        open += _solved(growing, joined.halves(growing.sides(joined.index), split), proofs)
    order = np.concatenate(list(growing.levels()))
    found = [proofs.get(int(index), np.zeros((0, 3))) for index in order[growing.split[order] < 0]]
    objective, form, value = np.concatenate([np.zeros((0, 3)), *found]).T
    return np.array([len(part) for part in found]), objective.astype(np.int64), form.astype(np.int64), value


def _solved(growing: _Growing, parts: Parts, proofs: dict[int, np.ndarray]) -> list[tuple[float, Parts, int]]:
    """Multipliers [Q, 3] of parts into `proofs`; those that stay open: excess, the part, and the sign to split."""
    left = []
    for some in batches(growing.nets, growing.given, parts):
        found = Relaxed.of(growing.nets, growing.given, some)
        excess = found.bounded.bounds(*NONE) - growing.target
        # The worst objective of each part first: where its program leaves one open that is split, the others need none.
        worst = excess == excess.max(1, keepdims=True)
        at, point = _duals(growing, found, some, (excess > 0) & worst)
        bound = found.bounded.bounds(*at) - growing.target
        closed = ~((bound > 0) & worst).any(1) | ~found.open.any(1)
        more, _ = _duals(growing, found, some, (excess > 0) & ~worst & closed[:, None])
        at = tuple(map(np.concatenate, zip(at, more, strict=True)))
        bound = found.bounded.bounds(*at) - growing.target
        kept = bound[at[0], at[1]] < excess[at[0], at[1]]  # rounding may have made it worse
        at, bound = tuple(part[kept] for part in at), np.minimum(bound, excess)
        score = found.scores(bound)
        if point is not None:
            score = score * (found.missed(point) + 1e-9)
        for b in np.flatnonzero((excess > 0).any(1)):
            mine = at[0] == b
            proofs[int(some.index[b])] = np.stack((at[1][mine], at[2][mine], at[3][mine]), 1)
            if bound[b].max() > 0 and score[b].max() > 0:
                split = growing.variables + int(score[b].argmax())
                left.append((float(bound[b].max()), some.take(np.array([b])), split))
    return left


def _duals(
    growing: _Growing, found: Relaxed, parts: Parts, which: np.ndarray
) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    """Multipliers of the objectives `which` [B, 2 N], as `Bounded.bounds` takes them, and symbols [B, R - 1].

    The programs over the symbols: the largest of each objective where the forms are >= 0, or are missed at a price.
    None of both where there is nothing to solve, or no time.
    """
    row, objective = np.nonzero(which)
    count, own = len(parts.index), len(growing.given.b)
    out, known = found.bounded.out, found.bounded.known
    use = np.zeros((count, known.rows.shape[2]), bool)
    use[:, :own] = True
    use[:, found.forms[:, 0]] = parts.signs != 0
    use[:, found.forms[:, 1]] = use[:, found.forms[:, 2]] = found.open
    most = int(use.sum(1).max())
    if not most or not len(row):
        return NONE, None
    forms = np.argsort(~use, axis=1, kind="stable")[:, :most]
    used = np.take_along_axis(use, forms, 1)
    some = known.features(forms)
    rows = some.rows.transpose(0, 2, 1).copy()
    rows[:, :, 0] += some.error
    size = np.maximum(np.abs(rows).sum(2), 1e-12)
    rows = np.where(used[:, :, None], rows / size[:, :, None], 0.0)
    outputs = out.rows.shape[2]
    goal = out.rows[row, :, objective % outputs] * np.where(objective < outputs, 1.0, -1.0)[:, None]
    price = PRICE * np.maximum(np.abs(goal).sum(1), 1e-12)
    # - g . xi - t <= c for t = 1 + tau, |tau| <= 1: as |c| <= 1 there is room at xi = 0 and t near 2.
    A = torch.from_numpy(np.concatenate((-rows[:, :, 1:], -np.ones((count, most, 1))), 2)[row])
    sets = Halfspaces(A, torch.from_numpy(rows[row][:, :, 0] + 1))
    start = torch.zeros(len(row), A.shape[2], dtype=A.dtype)
    start[:, -1] = 0.9
    goals = torch.from_numpy(np.concatenate((goal[:, 1:], -price[:, None]), 1))
    problem = LPBatch(goals, torch.from_numpy(goal[:, 0] - price), sets)
    target = torch.from_numpy(growing.target[objective])
    gap = 1e-3 * float(np.abs(growing.target).max()) * MARGIN
    try:
        solution = maximize(problem, start, gap=gap, above=target, below=target, clock=growing.clock)
    except OutOfTime:
        return NONE, None
    point = np.zeros((count, A.shape[2] - 1))
    point[row] = solution.point[:, :-1].numpy()
    y = solution.dual.numpy()
    q, p = np.nonzero(used[row] & (y > SMALL * y.max(1, keepdims=True).clip(1e-300)))
    y = (y / size[row]).astype(np.float32).astype(np.float64)  # as they are kept
    return (row[q], objective[q], forms[row[q], p], y[q, p]), point
