"""Forms: what is known of the values of two networks on parts of the input set, one layer after the other.

On a part every value is centre + generators . xi +- r over one list of symbols: the first M are the predicate a of the
set, scaled to the part's box, the others |xi| <= 1 stand for relaxed neurons. In difference coordinates, with z, z2 the
pre-activations, d = z - z2, a = relu(z) and e = relu(z) - relu(z2),

    z' = W a + b,    d' = V e + (W - V) a + (b - c)

so that what two networks share never has to cancel. relu(z) is z or 0 where the sign of z is known on the part, or
asked of its points; otherwise slope z + half +- half (the parallelogram of Singh et al., DeepZ, 2018). e is the
difference of these; or, as it lies between 0 and d, d / 2 +- max |d| / 2, whichever is less wide.

Rounding: r takes in what every operation loses in float64. A sum of n products in any order is off by at most
gamma_n = n u / (1 - n u) times the sum of their magnitudes (Higham, Accuracy and Stability, chapter 3); twice that is
taken, for what the allowances themselves lose. What underflows, below 1e-300, is not bounded.

Axis letters: B parts, R rows of forms (centre, predicate, symbols), n features, M predicate variables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

UNIT = 2.0**-53
TINY = 1e-9  # relaxations of this half width are part of r, and get no symbol


class Refused(Exception):  # noqa: N818
    """What cannot be verified, and where."""


@dataclass(frozen=True, eq=False)
class Layer:
    """W x + b [n], and which of its features a ReLU follows [n]."""

    weight: np.ndarray
    bias: np.ndarray
    relu: np.ndarray


def gamma(terms: int) -> float:
    """Twice the relative error of a sum of so many products."""
    return 2 * terms * UNIT / (1 - 4 * terms * UNIT)


@dataclass(eq=False)
class Form:
    """rows [B, R, n]: centre, then generators; error [B, n]."""

    rows: np.ndarray
    error: np.ndarray

    @property
    def size(self) -> np.ndarray:
        """[B, n] at least the magnitudes of all rows together."""
        return np.abs(self.rows).sum(1) * (1 + gamma(self.rows.shape[1]))

    def take(self, index: np.ndarray) -> Form:
        return Form(self.rows[index], self.error[index])

    def features(self, at: Any) -> Form:
        """Some features of all parts, or those at [B, C] of each."""
        if not isinstance(at, np.ndarray):
            return Form(self.rows[:, :, at], self.error[:, at])
        return Form(np.take_along_axis(self.rows, at[:, None], 2), np.take_along_axis(self.error, at, 1))

    def scaled(self, factor: np.ndarray) -> Form:
        """factor [B, n] times this."""
        rows = self.rows * factor[:, None]
        return Form(rows, (self.error * np.abs(factor) + 2 * UNIT * np.abs(rows).sum(1)) * (1 + 8 * UNIT))

    def minus(self, other: Form) -> Form:
        rows = self.rows - other.rows
        return Form(rows, (self.error + other.error + 2 * UNIT * np.abs(rows).sum(1)) * (1 + 8 * UNIT))

    def moved(self, by: np.ndarray) -> Form:
        """by [B, n] added."""
        rows = self.rows.copy()
        rows[:, 0] += by
        return Form(rows, self.error + 2 * UNIT * np.abs(rows[:, 0]))

    def with_symbols(self, radius: np.ndarray) -> Form:
        """radius [B, n] times a new symbol for each feature; where it is tiny, part of the error."""
        wide = radius > TINY
        error = self.error + np.where(wide, 0.0, radius)
        most = int(wide.sum(1).max()) if wide.size else 0
        at = np.argsort(~wide, axis=1, kind="stable")[:, :most]
        new = np.eye(radius.shape[1])[at] * np.take_along_axis(np.where(wide, radius, 0.0), at, 1)[:, :, None]
        return Form(np.concatenate((self.rows, new), 1), error * (1 + 4 * UNIT))

    @staticmethod
    def beside(forms: list[Form]) -> Form:
        """The features of all, one after the other."""
        most = max(form.rows.shape[1] for form in forms)
        rows = np.concatenate([form.padded(most).rows for form in forms], 2)
        return Form(rows, np.concatenate([form.error for form in forms], 1))

    def padded(self, rows: int) -> Form:
        """With symbols that this form does not depend on, to so many rows."""
        count, own, features = self.rows.shape
        return Form(np.concatenate((self.rows, np.zeros((count, rows - own, features))), 1), self.error)


def affine(weights: list[np.ndarray], forms: list[Form], bias: np.ndarray) -> Form:
    """The sum of W x over all, plus bias."""
    share = gamma(sum(weight.shape[1] for weight in weights) + 4)
    pairs = list(zip(weights, forms, strict=True))
    rows = np.sum([form.rows @ weight.T for weight, form in pairs], 0)
    error = sum((form.error + share * form.size) @ np.abs(weight).T for weight, form in pairs) + share * np.abs(bias)
    rows[:, 0] += bias
    return Form(rows, error * (1 + share))


@dataclass(frozen=True, eq=False)
class Networks:
    """Two networks of one shape, or one. A layer's hidden neurons are those of the first, then of the second."""

    first: list[Layer]
    second: list[Layer] | None

    @staticmethod
    def of(first: list[Layer], second: list[Layer] | None) -> Networks:
        """Two networks; of other shapes, as one whose output is their difference, side by side.

        The one with fewer layers begins later, and gets the input through features without a ReLU.
        """
        shapes = [[(layer.weight.shape, *layer.relu) for layer in net] for net in (first, second or [])]
        if second is None or shapes[0] == shapes[1]:
            return Networks(first, second)
        depth, inputs, eye = max(len(first), len(second)), first[0].weight.shape[1], np.eye(len(first[-1].bias))
        carry = Layer(np.eye(inputs), np.zeros(inputs), np.zeros(inputs, bool))
        layers = []
        for k in range(depth):
            one, two = (net[k - depth + len(net)] if k >= depth - len(net) else carry for net in (first, second))
            zeros = (np.zeros((len(x.bias), y.weight.shape[1])) for x, y in ((one, two), (two, one)))
            rows = [[one.weight, next(zeros)], [next(zeros), two.weight]] if k else [[one.weight], [two.weight]]
            weight = np.block(rows)  # the first layers have one input
            layers.append(Layer(weight, np.concatenate((one.bias, two.bias)), np.concatenate((one.relu, two.relu))))
        difference = Layer(np.concatenate((eye, -eye), 1), np.zeros(len(eye)), np.zeros(len(eye), bool))
        return Networks([*layers, difference], None)

    @property
    def relus(self) -> list[np.ndarray]:
        """Per hidden layer, which neurons of all networks have a ReLU."""
        return [np.tile(layer.relu, 1 if self.second is None else 2) for layer in self.first[:-1]]

    @property
    def layer_of(self) -> np.ndarray:
        """[H] the layer of each hidden neuron."""
        return np.repeat(np.arange(len(self.first) - 1), [len(relu) for relu in self.relus])


@dataclass(eq=False)
class State:
    """What enters the next layer of B parts: a, and e of a pair of networks; none: [B] parts found empty."""

    a: Form
    e: Form | None
    none: np.ndarray

    @staticmethod
    def start(entry: Form, nets: Networks) -> State:
        zero = None if nets.second is None else Form(0 * entry.rows, 0 * entry.error)
        return State(entry, zero, np.zeros(len(entry.rows), bool))

    def take(self, index: np.ndarray) -> State:
        return State(self.a.take(index), self.e and self.e.take(index), self.none[index])

    def layer(self, nets: Networks, k: int) -> tuple[Form, Form]:
        """z of all networks, and their difference; of one network, z twice."""
        one, two = nets.first[k], None if nets.second is None else nets.second[k]
        z = affine([one.weight], [self.a], one.bias)
        if two is None or self.e is None:
            return z, z
        d = affine([two.weight, one.weight - two.weight], [self.e, self.a], one.bias - two.bias)
        return Form.beside([z, z.minus(d)]), d

    def bent(self, z: Form, d: Form, relu: np.ndarray, shape: Any, asked: np.ndarray) -> State:
        """Behind the ReLUs of a hidden layer, whose signs are asked of its neurons [B, n].

        shape: the points of the parts; its `ends` gives the range [B, n] of a form over each, low above high of none.
        """
        low, high = shape.ends(z)
        none = self.none | (((asked > 0) & (high < 0)) | ((asked < 0) & (low > 0)) | (low > high)).any(1)
        on = (asked > 0) | ((asked == 0) & (low >= 0)) | ~relu
        open = ~on & (asked == 0) & (high > 0)
        slope = np.where(open, np.clip(high / np.where(open, high - low, 1.0), 0, 1), on)
        # relu(z) - slope z is convex, zero at zero, and largest at an end.
        half = np.where(open, np.maximum(high - slope * high, -slope * low) * (0.5 + 4 * UNIT), 0.0)
        n = d.error.shape[1]
        one, two = slice(0, n), slice(n, None)
        z1, half1 = z.features(one), half[:, one]
        a = z1.scaled(slope[:, one]).moved(half1)
        before = a.rows.shape[1]
        a = a.with_symbols(half1)
        if self.e is None:
            return State(a, None, none)
        half2, any_open = half[:, two], open[:, one] | open[:, two]
        between, most = any_open & False, 0 * half1
        if any_open.any():
            most = np.maximum(*map(np.abs, shape.ends(d))) * (0.5 + UNIT)
            between = any_open & (most < half1 + half2)
        same = on[:, one] & on[:, two]
        # e = (slope z + half +- half) - (slope2 (z - d) + half2 +- half2), or d, or d / 2 +- most
        on_z = np.where(between | same, 0.0, slope[:, one] - slope[:, two])
        on_d = np.where(between, 0.5, np.where(same, 1.0, slope[:, two]))
        e = z1.scaled(on_z).minus(d.scaled(-on_d)).moved(np.where(between, 0.0, half1 - half2))
        shared = np.where(between, 0.0, half1)  # times the symbol of a, or in the error as there
        lost = 2 * UNIT * (np.abs(on_z) * z1.size + np.where(between, 0.0, half1 + half2))
        e = Form(e.rows, e.error + lost + np.where(half1 > TINY, 0.0, shared)).padded(a.rows.shape[1])
        e.rows[:, before:] = np.where(a.rows[:, before:] != 0, shared[:, None], 0.0)
        e = e.with_symbols(np.where(between, most, half2))
        return State(a.padded(e.rows.shape[1]), e, none)
