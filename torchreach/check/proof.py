"""The proof of a certificate: a tree of parts of the input set, and for each leaf bounds that are computed here anew.

A part of the set {c + V a : l <= a <= u, A a <= b} is a box of the predicate a with signs asked of pre-activations. The
root is the whole box. A split halves one a_i at its middle, or asks z <= 0 of one side and z >= 0 of the other. Both sides
share the border, so that every complete tree covers the set: a walk makes each part itself, and reads from the file only
what is split. Two ways to bound leaves:

- Up to eight predicate variables: a part with signs is a polytope, whose vertices are followed from cut to cut
  (`polytopes`). Signs are split in the order of the layers.
- More: boxes, and multipliers of the file. Where s z >= 0 is asked, and for neurons that are relaxed relu(z) >= 0 and
  relu(z) >= z, any y >= 0 gives

    +-(y1 - y2)  <=  max over all |xi| <= 1 of  +-(form of y1 - y2) + sum y (forms that are >= 0 on the part)

  which also shows where a part is empty. b - A a >= 0 counts among these forms.

Axis letters: B parts, H hidden neurons of all networks, N outputs, M predicate variables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from torchreach.check.forms import UNIT, Boxes, Form, Layer, Refused, State, affine, gamma
from torchreach.check.polytopes import MOST, Polytopes

PARTS, NUMBERS = 512, 1 << 23  # parts bounded at once, and numbers in their forms


@dataclass(frozen=True, eq=False)
class Set:
    """{c + V a : low <= a <= high, A a <= b}: basis [1 + M, N_in], c first."""

    basis: np.ndarray
    A: np.ndarray
    b: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def entry(self, low: np.ndarray, high: np.ndarray) -> tuple[Form, Form]:
        """x, and a itself, on boxes [B, M] of the predicate."""
        middle = low + (high - low) / 2
        radius = np.maximum(high - middle, middle - low) * (1 + 4 * UNIT)
        count, variables = low.shape
        rows = np.zeros((count, 1 + variables, variables))
        rows[:, 0], rows[:, 1 + np.arange(variables), np.arange(variables)] = middle, radius
        predicate = Form(rows, 4 * UNIT * np.abs(middle))
        return affine([self.basis[1:].T], [predicate], self.basis[0]), predicate


@dataclass(frozen=True, eq=False)
class Networks:
    """Two networks of one shape, or one; of others `beside` makes one."""

    first: list[Layer]
    second: list[Layer] | None

    @property
    def widths(self) -> list[int]:
        return [len(layer.bias) for layer in self.first[:-1]]

    @property
    def hidden(self) -> int:
        return sum(self.widths) * (1 if self.second is None else 2)

    @property
    def place(self) -> tuple[np.ndarray, np.ndarray]:
        """[H] layer of each hidden neuron, and its column there: those of the second network come after the first's."""
        widths, nets = self.widths, 1 if self.second is None else 2
        layer = np.concatenate([np.full(n, k) for k, n in enumerate(widths)] * nets or [np.zeros(0, int)])
        columns = [np.arange(n) + net * n for net in range(nets) for n in widths]
        return layer, np.concatenate(columns or [np.zeros(0, int)])

    def layer(self, k: int) -> tuple[Layer, Layer | None]:
        return self.first[k], self.second and self.second[k]


def beside(first: list[Layer], second: list[Layer] | None) -> Networks:
    """Both networks, their difference its output; where shapes differ, as one network of both side by side.

    The one with fewer layers begins later, and gets the input through features without a ReLU.
    """
    if second is None:
        return Networks(first, None)
    shapes = [[(layer.weight.shape, *layer.relu) for layer in net] for net in (first, second)]
    if shapes[0] == shapes[1]:
        return Networks(first, second)
    depth, inputs = max(len(first), len(second)), first[0].weight.shape[1]
    carry = Layer(np.eye(inputs), np.zeros(inputs), np.zeros(inputs, bool))
    nets = [[carry] * (depth - len(net)) + net for net in (first, second)]
    layers = []
    for k, (one, two) in enumerate(zip(*nets, strict=True)):
        blocks = [[one.weight, np.zeros((len(one.bias), two.weight.shape[1]))], [np.zeros((len(two.bias), one.weight.shape[1])), two.weight]]
        weight = np.concatenate((one.weight, two.weight)) if k == 0 else np.block(blocks)
        layers.append(Layer(weight, np.concatenate((one.bias, two.bias)), np.concatenate((one.relu, two.relu))))
    last, outputs = layers.pop(), len(first[-1].bias)
    # The last affine layer of either, then their difference: weights of +-1 lose nothing.
    layers.append(last)
    eye = np.eye(outputs)
    layers.append(Layer(np.concatenate((eye, -eye), 1), np.zeros(outputs), np.zeros(outputs, bool)))
    return Networks(layers, None)


class Tree:
    """split [T], level by level: a variable below M, M + h of neuron h, -1 of a leaf; of the r-th split (from 0) the
    parts are 2 r + 1 and 2 r + 2, the lower side first."""

    def __init__(self, split: np.ndarray, variables: int, hidden: int) -> None:
        inner = split >= 0
        if split.ndim != 1 or len(split) != 1 + 2 * int(inner.sum()):
            raise Refused("a tree that is not complete")
        if split.min() < -1 or split.max() >= variables + hidden:
            raise Refused("a split of what does not exist")
        self.split, self.variables = split.astype(np.int64), variables
        self.child = np.where(inner, 2 * np.cumsum(inner) - 1, -1)
        if (self.child[inner] <= np.flatnonzero(inner)).any():
            raise Refused("a tree that is not complete")
        self.leaf = np.cumsum(~inner) - 1  # number of each leaf

    def choose(self, parts: np.ndarray, *_: object) -> np.ndarray:
        """The split of parts [B]; one that makes a proof decides here."""
        return self.split[parts]

    def halved(self, parts: np.ndarray) -> np.ndarray:
        """Both sides [2 B] of parts that are split."""
        return (self.child[parts][:, None] + np.arange(2)).reshape(-1)


@dataclass(eq=False)
class Parts:
    """Parts [B] of the tree: predicate boxes [B, M], signs asked [B, H]."""

    index: np.ndarray
    low: np.ndarray
    high: np.ndarray
    signs: np.ndarray

    def take(self, at: np.ndarray) -> Parts:
        return Parts(self.index[at], self.low[at], self.high[at], self.signs[at])

    def halves(self, children: np.ndarray, split: np.ndarray) -> Parts:
        """Both sides of all, which have a split each."""
        low, high, signs = (np.repeat(part, 2, 0) for part in (self.low, self.high, self.signs))
        rows, variables = np.arange(len(split)), self.low.shape[1]
        box, sign = rows[split < variables], rows[split >= variables]
        i, h = split[box], split[sign] - variables
        middle = self.low[box, i] + (self.high[box, i] - self.low[box, i]) / 2
        high[2 * box, i] = low[2 * box + 1, i] = np.clip(middle, self.low[box, i], self.high[box, i])
        signs[2 * sign, h], signs[2 * sign + 1, h] = -1, 1
        return Parts(children, low, high, signs)


def boxes(tree: Tree, given: Set, hidden: int, *, signs: bool) -> Iterator[Parts]:
    """Parts of the tree that are leaves, or where only halving ends unless `signs`, in batches."""
    root = Parts(np.zeros(1, np.int64), given.low[None], given.high[None], np.zeros((1, hidden), np.int8))
    stack, most = [root], PARTS
    while stack:
        parts = stack.pop()
        if len(parts.index) > most:
            stack += [parts.take(at) for at in np.array_split(np.arange(len(parts.index)), 2)]
            continue
        split = tree.choose(parts.index, parts)
        inner = (split >= 0) & ((split < tree.variables) | signs)
        if not inner.all():
            yield parts.take(np.flatnonzero(~inner))
        if inner.any():
            parts, split = parts.take(np.flatnonzero(inner)), split[inner]
            stack.append(parts.halves(tree.halved(parts.index), split))


def by_vertices(nets: Networks, given: Set, tree: Tree) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Leaves [B] and upper bounds [B, 2 N] of the output, then of its negative, over each."""
    layer_of, column_of = nets.place
    pair, last = nets.second is not None, len(nets.first) - 1
    for parts in boxes(tree, given, 0, signs=False):
        stack = [(0, parts.index, *_polytopes(nets, given, parts))]
        while stack:
            k, index, state, shape = stack.pop()
            if len(index) > PARTS:
                halves = np.array_split(np.arange(len(index)), 2)
                stack += [(k, index[at], state.take(at), shape.take(at)) for at in halves]
                continue
            forms = state.layer(*nets.layer(k))
            if k == last:
                if (tree.split[index] >= 0).any():
                    raise Refused("splits that are not in the order of the layers")
                yield index, _both(*shape.ends(forms[-1]))
                continue
            z = forms[0] if not pair else Form(*(np.concatenate(p, -1) for p in ((forms[0].rows, forms[1].rows), (forms[0].error, forms[1].error))))
            found = list(_cut(tree, k, index, z, shape, layer_of, column_of))
            if found:
                parent, index, asked = (np.concatenate([part[i] for part in found]) for i in range(3))
                shape, own = Polytopes.join([part[3] for part in found]), [form.take(parent) for form in forms]
                after, _ = state.take(parent).bent(nets.first[k], own, shape, np.split(asked, len(own[:2]), 1))
                stack.append((k + 1, index, after, shape))


def _polytopes(nets: Networks, given: Set, parts: Parts) -> tuple[State, Polytopes]:
    entry, predicate = given.entry(parts.low, parts.high)
    shape = Polytopes.boxes(len(parts.index), given.basis.shape[0] - 1)
    if len(given.b):
        room = affine([-given.A], [predicate], given.b)
        for p in range(len(given.b)):
            shape = shape.cut(Form(room.rows[:, :, p : p + 1], room.error[:, p : p + 1]), np.arange(len(shape)))
            shape = shape.take(np.arange(1, len(shape), 2))
    return State.start(entry, nets.second is not None), shape


def _cut(
    tree: Tree, k: int, index: np.ndarray, z: Form, shape: Polytopes, layer_of: np.ndarray, column_of: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, Polytopes]]:
    """Parts behind all splits of layer k: where they come from, which they are, signs asked [B, n], and polytopes."""
    parent, asked = np.arange(len(index)), np.zeros((len(index), z.error.shape[1]), np.int8)
    while len(index):
        split = tree.choose(index, k, z, parent, shape, asked) - tree.variables
        if (split[split != -1 - tree.variables] < 0).any():
            raise Refused("an input that is halved behind a sign")
        here = (split >= 0) & (layer_of[np.maximum(split, 0)] <= k) if len(layer_of) else np.zeros(len(split), bool)
        if (here & (layer_of[np.maximum(split, 0)] < k)).any():
            raise Refused("splits that are not in the order of the layers")
        done = np.flatnonzero(~here)
        if len(done):
            yield parent[done], index[done], asked[done], shape.take(done)
        at = np.flatnonzero(here)
        column, index = column_of[split[at]], tree.halved(index[at])
        shape = shape.cut(z.take(parent[at]).column(column), at)
        parent, asked = np.repeat(parent[at], 2), np.repeat(asked[at], 2, 0)
        asked[np.arange(len(index)), np.repeat(column, 2)] = np.where(np.arange(len(index)) % 2, 1, -1)
        full = np.flatnonzero(shape.sizes)  # nothing has to be shown of what is empty
        parent, index, asked, shape = parent[full], index[full], asked[full], shape.take(full)


@dataclass(frozen=True, eq=False)
class Multipliers:
    """Of leaves' objectives: at [Q, 3] leaf, objective, and which form >= 0; value [Q]. Sorted by leaf.

    Forms: the set's b - A a, then of every hidden neuron s z, relu(z), relu(z) - z.
    """

    at: np.ndarray
    value: np.ndarray

    def of(self, leaves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of leaves [B]: row of the batch, objective, form and value, each [Q]."""
        first, last = (np.searchsorted(self.at[:, 0], leaves, side) for side in ("left", "right"))
        rows = np.repeat(np.arange(len(leaves)), last - first)
        at = np.arange(len(rows)) - np.repeat(np.cumsum(last - first) - last, last - first)
        return rows, self.at[at, 1], self.at[at, 2], self.value[at]


@dataclass(eq=False)
class Bounded:
    """Parts bounded as boxes: form of the output, forms >= 0 on the part (`Multipliers`), and parts known as empty.

    open: [B, H] relaxed neurons; owner: [B, R] the neuron whose relaxation a row stands for, -1 for none.
    """

    out: Form
    known: Form
    none: np.ndarray
    open: np.ndarray
    owner: np.ndarray

    @staticmethod
    def of(nets: Networks, given: Set, parts: Parts) -> Bounded:
        entry, predicate = given.entry(parts.low, parts.high)
        state, last = State.start(entry, nets.second is not None), len(nets.first) - 1
        widths = np.cumsum(nets.widths)[:-1] if last else []
        signs = [np.split(part, widths, 1) for part in np.split(parts.signs, 1 if nets.second is None else 2, 1)]
        zs, values, opens = [[] for _ in signs], [[] for _ in signs], [[] for _ in signs]
        owners, start, second = [np.full(entry.rows.shape[:2], -1)], 0, sum(nets.widths)
        for k in range(last):
            forms = state.layer(*nets.layer(k))
            before = state.a.rows.shape[1]
            state, bents = state.bent(nets.first[k], forms, Boxes(), [part[k] for part in signs])
            rows = state.a.rows.shape[1]
            new = state.a.rows[:, before:], (state.a if state.e is None else state.e).rows[:, before:]
            own = [np.where((part != 0).any(2), np.abs(part).argmax(2) + start, -1) for part in new]
            owners.append(np.where(own[0] >= 0, own[0], np.where(own[1] >= 0, own[1] + second, -1)))
            start += nets.widths[k]
            for part, bent in zip(opens, bents, strict=True):
                part.append(bent.open)
            z = [form.padded(rows) for form in forms]
            a = [state.a] if state.e is None else [state.a, state.a.minus(state.e)]
            for net in range(len(signs)):
                zs[net].append(z[net].scaled(np.where(signs[net][k] < 0, -1.0, 1.0)))
                values[net].append((a[net], a[net].minus(z[net])))
        out = state.layer(*nets.layer(last))[-1]
        known = [affine([-given.A], [predicate], given.b)] if len(given.b) else []
        known += [form for net in zs for form in net]
        known += [pair[i] for i in range(2) for net in values for pair in net]
        rows = out.rows.shape[1]
        if known:
            joined = Form(*(np.concatenate(p, -1) for p in zip(*((f.padded(rows).rows, f.error) for f in known), strict=True)))
        else:
            joined = Form(out.rows[:, :, :0], out.error[:, :0])
        none = np.zeros((len(parts.index), 0), bool)
        return Bounded(out, joined, state.none, np.concatenate([none, *sum(opens, [])], 1), np.concatenate(owners, 1))

    def bounds(self, row: np.ndarray, objective: np.ndarray, form: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Certified [B, 2 N] with multipliers [Q] as of `Multipliers.of`."""
        rows = np.concatenate((self.out.rows, -self.out.rows), 2).transpose(0, 2, 1).copy()
        extra, size = np.tile(self.out.error, 2), np.tile(self.out.size, 2)
        own = self.known.rows[row, :, form]
        np.add.at(rows, (row, objective), value[:, None] * own)
        np.add.at(extra, (row, objective), value * self.known.error[row, form])
        np.add.at(size, (row, objective), value * np.abs(own).sum(1))
        share = gamma(len(row) + rows.shape[2] + 8)
        found = rows[:, :, 0] + np.abs(rows[:, :, 1:]).sum(2) + (extra + share * size) * (1 + share)
        found = np.where(np.isnan(found), np.inf, found)
        found[self.none] = -np.inf
        return found


def batches(nets: Networks, given: Set, parts: Parts) -> Iterator[Parts]:
    """Parts in batches whose forms fit in memory."""
    rows = 1 + len(given.low) + nets.hidden
    most = max(1, NUMBERS // (rows * (4 * nets.hidden + 1)))
    for start in range(0, len(parts.index), most):
        yield parts.take(np.arange(start, min(start + most, len(parts.index))))


def by_boxes(nets: Networks, given: Set, tree: Tree, multipliers: Multipliers) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Leaves [B] and upper bounds [B, 2 N] of the output, then of its negative, over each."""
    fixed = np.concatenate([layer.relu for layer in nets.first[:-1]] or [np.zeros(0, bool)])
    hidden, own = nets.hidden, len(given.b)
    relu = np.tile(fixed, 1 if nets.second is None else 2)
    if (multipliers.at[:, 2] >= own + 3 * hidden).any() or (multipliers.at < 0).any() or not (multipliers.value >= 0).all():
        raise Refused("a multiplier that is negative or of nothing")
    for leaves in boxes(tree, given, hidden, signs=True):
        for parts in batches(nets, given, leaves):
            row, objective, form, value = multipliers.of(tree.leaf[parts.index])
            neuron = (form - own) % max(hidden, 1)
            asked = (form >= own) & (form < own + hidden)
            if (asked & (parts.signs[row, neuron] == 0)).any() or ((form >= own) & ~relu[neuron]).any():
                raise Refused("a multiplier of a sign that was not asked")
            yield parts.index, Bounded.of(nets, given, parts).bounds(row, objective, form, value)


def _both(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    found = np.concatenate((high, -low), 1)
    return np.where(np.isnan(found), np.inf, found)
