"""The proof of a certificate: a tree of parts of the input set, and for each leaf bounds that are computed here anew.

A part of the set {c + V a : l <= a <= u, A a <= b} is a box of the predicate a with signs asked of pre-activations. The
root is the whole box. A split halves one a_i at its middle, or asks z <= 0 of one side and z >= 0 of the other. Both
sides share the border, so that every complete tree covers the set: a walk makes each part itself, and reads from the
file only what is split. Two ways to bound leaves:

- By vertices, up to eight predicate variables: a part with signs is a polytope, whose vertices are followed from cut
  to cut (`polytopes`). Signs are split in the order of the layers.
- By boxes, and multipliers of the file. With s z >= 0 where the sign s is asked, relu(z) >= 0 and relu(z) >= z, any
  y >= 0 gives

    +-(y1 - y2)  <=  max over all |xi| <= 1 of  +-(form of y1 - y2) + sum y (forms that are >= 0 on the part)

  which also shows where a part is empty. b - A a >= 0 counts among these forms.

Axis letters: B parts, H hidden neurons of all networks, N outputs, M predicate variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchreach.check.forms import UNIT, Form, Networks, Refused, State, affine, gamma
from torchreach.check.polytopes import Polytopes

PARTS, NUMBERS = 512, 1 << 26  # parts bounded at once, and numbers in their forms
Bounds = Iterator[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Set:
    """{c + V a : low <= a <= high, A a <= b}: basis [1 + M, N_in], c first."""

    basis: np.ndarray
    A: np.ndarray
    b: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def entry(self, low: np.ndarray, high: np.ndarray) -> tuple[Form, Form]:
        """x, and b - A a, on boxes [B, M] of the predicate."""
        middle = low + (high - low) / 2
        radius = np.maximum(high - middle, middle - low) * (1 + 4 * UNIT)
        rows = np.concatenate((middle[:, None], radius[:, None] * np.eye(low.shape[1])), 1)
        predicate = Form(rows, 4 * UNIT * np.abs(middle))
        return affine([self.basis[1:].T], [predicate], self.basis[0]), affine([-self.A], [predicate], self.b)


class Tree:
    """split [T], level by level: a variable below M, M + h of neuron h, -1 of a leaf; of the r-th split (from 0) the
    parts are 2 r + 1 and 2 r + 2, the lower side first."""

    def __init__(self, split: np.ndarray, variables: int, hidden: int) -> None:
        inner = split >= 0
        self.split, self.variables, self.child = split.astype(np.int64), variables, 2 * np.cumsum(inner) - 1
        self.leaf = np.cumsum(~inner) - 1  # number of each leaf
        if len(split) != 1 + 2 * int(inner.sum()) or (self.child[inner] <= np.flatnonzero(inner)).any():
            raise Refused("a tree that is not complete")
        if split.min() < -1 or split.max() >= variables + hidden:
            raise Refused("a split of what does not exist")

    def choose(self, parts: np.ndarray, *_: object) -> np.ndarray:
        """The split of parts [B]; one that makes a proof decides here."""
        return self.split[parts]

    def sides(self, parts: np.ndarray) -> np.ndarray:
        """Both sides [2 B] of parts that are split."""
        return (self.child[parts][:, None] + np.arange(2)).reshape(-1)


@dataclass(eq=False)
class Parts:
    """Parts [B] of the tree: predicate boxes [B, M], signs asked [B, H]."""

    index: np.ndarray
    low: np.ndarray
    high: np.ndarray
    signs: np.ndarray

    def take(self, at: Any) -> Parts:
        return Parts(self.index[at], self.low[at], self.high[at], self.signs[at])

    def halves(self, sides: np.ndarray, split: np.ndarray) -> Parts:
        """Both sides of all, which have a split each."""
        low, high, signs = (np.repeat(part, 2, 0) for part in (self.low, self.high, self.signs))
        variables = low.shape[1]
        box, sign = np.flatnonzero(split < variables), np.flatnonzero(split >= variables)
        i, h = split[box], split[sign] - variables
        middle = self.low[box, i] + (self.high[box, i] - self.low[box, i]) / 2
        high[2 * box, i] = low[2 * box + 1, i] = np.clip(middle, self.low[box, i], self.high[box, i])
        signs[2 * sign, h], signs[2 * sign + 1, h] = -1, 1
        return Parts(sides, low, high, signs)


def leaves(tree: Tree, given: Set, hidden: int, *, signs: bool) -> Iterator[Parts]:
    """Leaves of the tree in batches; unless `signs`, the parts that are not halved further."""
    stack = [Parts(np.zeros(1, np.int64), given.low[None], given.high[None], np.zeros((1, hidden), np.int8))]
    while stack:
        parts = stack.pop()
        if len(parts.index) > PARTS:
            stack += [parts.take(slice(0, PARTS)), parts.take(slice(PARTS, None))]
            continue
        split = tree.choose(parts.index, parts)
        inner = (split >= 0) & ((split < tree.variables) | signs)
        if not inner.all():
            yield parts.take(~inner)
        if inner.any():
            parts = parts.take(inner)
            stack.append(parts.halves(tree.sides(parts.index), split[inner]))


def by_vertices(nets: Networks, given: Set, tree: Tree) -> Bounds:
    """Leaves [B] and upper bounds [B, 2 N] of the output, then of its negative, over each."""
    for parts in leaves(tree, given, 0, signs=False):
        entry, room = given.entry(parts.low, parts.high)
        shape = Polytopes.boxes(len(parts.index), len(given.low))
        for p in range(len(given.b)):
            shape = shape.cut(room.features(slice(p, p + 1)), np.arange(len(shape.sizes)))
            shape = shape.take(np.arange(1, len(shape.sizes), 2))
        stack = [(0, parts.index, State.start(entry, nets), shape)]
        while stack:
            k, index, state, shape = stack.pop()
            if len(index) > PARTS:
                for at in np.arange(PARTS), np.arange(PARTS, len(index)):
                    stack.append((k, index[at], state.take(at), shape.take(at)))
                continue
            z, d = state.layer(nets, k)
            if k == len(nets.first) - 1:
                if (tree.split[index] >= 0).any():
                    raise Refused("splits that are not in the order of the layers")
                low, high = shape.ends(d)
                yield index, np.concatenate((high, -low), 1)
                continue
            found = list(cut(tree, nets, k, index, z, shape))
            if found:
                parent, index, asked, shapes = map(list, zip(*found, strict=True))
                parent, index, asked, shape = *map(np.concatenate, (parent, index, asked)), Polytopes.join(shapes)
                after = state.take(parent).bent(z.take(parent), d.take(parent), nets.relus[k], shape, asked)
                stack.append((k + 1, index, after, shape))


def cut(tree: Tree, nets: Networks, k: int, index: np.ndarray, z: Form, shape: Polytopes) -> Iterator[list[Any]]:
    """Parts behind all splits of layer k: where they come from, which they are, signs asked [B, n], and polytopes."""
    parent, asked = np.arange(len(index)), np.zeros(z.error.shape, np.int8)
    first = int((nets.layer_of < k).sum())
    while len(index):
        split = tree.choose(index, k, z, parent, shape, asked) - tree.variables
        here = (split >= 0) & (split < first + z.error.shape[1])
        if (split[here] < first).any() or ((split < 0) & (split >= -tree.variables)).any():
            raise Refused("splits that are not in the order of the layers")
        if not here.all():
            done = np.flatnonzero(~here)
            yield [parent[done], index[done], asked[done], shape.take(done)]
        at = np.flatnonzero(here)
        column, index = split[at][:, None] - first, tree.sides(index[at])
        shape = shape.cut(z.take(parent[at]).features(column), at)
        parent, asked, side = np.repeat(parent[at], 2), np.repeat(asked[at], 2, 0), np.arange(len(index))
        asked[side, np.repeat(column, 2)] = np.where(side % 2, 1, -1)
        full = np.flatnonzero(shape.sizes)  # nothing has to be shown of what is empty
        parent, index, asked, shape = parent[full], index[full], asked[full], shape.take(full)


class Boxes:
    """Parts that are their whole boxes."""

    @staticmethod
    def ends(form: Form) -> tuple[np.ndarray, np.ndarray]:
        """Certified range [B, n] of a form."""
        radius = (np.abs(form.rows[:, 1:]).sum(1) + form.error) * (1 + gamma(form.rows.shape[1] + 2))
        radius = radius + 4 * UNIT * np.abs(form.rows[:, 0])
        return form.rows[:, 0] - radius, form.rows[:, 0] + radius


@dataclass(eq=False)
class Bounded:
    """Parts bounded as boxes: form of the output, forms >= 0 on the part, and parts known as empty.

    Forms >= 0: b - A a; then of each hidden layer s z (0 where no sign is asked), and of each network relu(z) and
    relu(z) - z.
    """

    out: Form
    known: Form
    none: np.ndarray

    @staticmethod
    def of(nets: Networks, given: Set, parts: Parts, watch: Callable[..., Any] = lambda *_: None) -> Bounded:
        """watch: called with what each hidden layer got and made."""
        entry, room = given.entry(parts.low, parts.high)
        state, known, start = State.start(entry, nets), [room], 0
        for k, relu in enumerate(nets.relus):
            z, d = state.layer(nets, k)
            asked = parts.signs[:, start : start + len(relu)]
            after = state.bent(z, d, relu, Boxes, asked)
            values, z = [after.a], z.padded(after.a.rows.shape[1])
            values += [] if after.e is None else [after.a.minus(after.e)]
            known.append(z.scaled(asked.astype(float)))
            for net, value in enumerate(values):
                n = value.error.shape[1]
                more = value.minus(z.features(slice(net * n, net * n + n)))
                known += [form.scaled(np.broadcast_to(relu[:n] * 1.0, value.error.shape)) for form in (value, more)]
            watch(k, state, z, after)
            state, start = after, start + len(relu)
        out = state.layer(nets, len(nets.relus))[1]
        return Bounded(out, Form.beside([*known, out.features(slice(0, 0))]), state.none)

    def bounds(self, row: np.ndarray, objective: np.ndarray, form: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Certified [B, 2 N], with multipliers [Q] of a form for an objective of a part (row)."""
        rows = np.concatenate((self.out.rows, -self.out.rows), 2).transpose(0, 2, 1).copy()
        extra, size = np.tile(self.out.error, 2), np.tile(self.out.size, 2)
        own = value[:, None] * self.known.rows[row, :, form]
        np.add.at(rows, (row, objective), own)
        np.add.at(extra, (row, objective), value * self.known.error[row, form])
        np.add.at(size, (row, objective), np.abs(own).sum(1))
        share = gamma(len(row) + rows.shape[2] + 8)
        found = rows[:, :, 0] + np.abs(rows[:, :, 1:]).sum(2) + (extra + share * size) * (1 + share)
        return np.where(self.none[:, None], -np.inf, np.where(np.isnan(found), np.inf, found))


def batches(nets: Networks, given: Set, parts: Parts) -> Iterator[Parts]:
    """Parts in batches whose forms fit in memory."""
    hidden = len(nets.layer_of)
    most = max(1, NUMBERS // ((1 + len(given.low) + hidden) * (4 * hidden + 1)))
    return (parts.take(slice(start, start + most)) for start in range(0, len(parts.index), most))


def by_boxes(nets: Networks, given: Set, tree: Tree, many: np.ndarray, *multipliers: np.ndarray) -> Bounds:
    """Leaves [B] and upper bounds [B, 2 N] of the output, then of its negative, over each.

    many: [leaves] how many multipliers each has; multipliers: objective, form and value of all [Q], leaf by leaf.
    """
    start = np.cumsum(many) - many
    for found in leaves(tree, given, len(nets.layer_of), signs=True):
        for parts in batches(nets, given, found):
            leaf = tree.leaf[parts.index]
            row = np.repeat(np.arange(len(leaf)), many[leaf])
            at = np.arange(len(row)) - np.repeat(np.cumsum(many[leaf]) - many[leaf] - start[leaf], many[leaf])
            yield parts.index, Bounded.of(nets, given, parts).bounds(row, *(part[at] for part in multipliers))
