"""Forms: what is known of the values of two networks on parts of the input set, one layer after the other.

On a part every value is centre + generators . xi +- r over one list of symbols: the first M are the predicate a of the
set, scaled to the part's box, the others |xi| <= 1 stand for relaxed neurons. In difference coordinates, with z, z2 the
pre-activations, d = z - z2, a = relu(z) and e = relu(z) - relu(z2),

    z' = W a + b,    d' = V e + (W - V) a + (b - c)

so that what two networks share never has to cancel. relu(z) is z or 0 where the sign of z is known on the part, or asked of
its points; otherwise slope z + half +- half (the parallelogram of Singh et al., DeepZ, 2018). e is the difference of these; or,
as it lies between 0 and d, d / 2 +- max |d| / 2, whichever is less wide.

Rounding: r takes in what every operation loses in float64. A sum of n products in any order is off by at most
gamma_n = n u / (1 - n u) times the sum of their magnitudes (Higham, Accuracy and Stability, chapter 3); twice that is
taken, for what the allowances themselves lose.

Axis letters: B parts, R rows of forms (centre, predicate, symbols), n features, M predicate variables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

UNIT = 2.0**-53
TINY = 1e-9  # relaxations of this half width are part of r, and get no symbol


class Refused(Exception):
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

    def column(self, at: np.ndarray) -> Form:
        """[B, R, 1] feature at [B] of each part."""
        index = np.arange(len(at))
        return Form(self.rows[index, :, at][:, :, None], self.error[index, at][:, None])

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
        new = np.zeros((len(at), most, radius.shape[1]))
        value = np.take_along_axis(np.where(wide, radius, 0.0), at, 1)
        new[np.arange(len(at))[:, None], np.arange(most), at] = value
        return Form(np.concatenate((self.rows, new), 1), error * (1 + 4 * UNIT))

    def padded(self, rows: int) -> Form:
        """With symbols that this form does not depend on, to so many rows."""
        count, own, features = self.rows.shape
        return Form(np.concatenate((self.rows, np.zeros((count, rows - own, features))), 1), self.error)


def affine(weights: list[np.ndarray], forms: list[Form], bias: np.ndarray) -> Form:
    """The sum of W x over all, plus bias."""
    share = gamma(sum(weight.shape[1] for weight in weights) + 4)
    rows, error = 0.0, share * np.abs(bias)
    for weight, form in zip(weights, forms, strict=True):
        rows = rows + form.rows @ weight.T
        error = error + (form.error + share * form.size) @ np.abs(weight).T
    rows[:, 0] += bias
    return Form(rows, error * (1 + share))


class Shape(Protocol):
    """The points of parts, in the predicate scaled to each part's box."""

    def ends(self, form: Form) -> tuple[np.ndarray, np.ndarray]:
        """Certified range [B, n] of a form over each part; of an empty part, low above high."""
        ...


class Boxes:
    """Parts that are their whole boxes."""

    def ends(self, form: Form) -> tuple[np.ndarray, np.ndarray]:
        middle = form.rows[:, 0]
        radius = (np.abs(form.rows[:, 1:]).sum(1) + form.error) * (1 + gamma(form.rows.shape[1] + 2))
        radius = radius + 4 * UNIT * np.abs(middle)
        return middle - radius, middle + radius


@dataclass(eq=False)
class Bent:
    """relu of forms in a range, given signs asked [B, n]: slope z + half +- half; on: where it is z."""

    on: np.ndarray
    open: np.ndarray
    slope: np.ndarray
    half: np.ndarray
    none: np.ndarray  # [B] no point has the signs asked

    @staticmethod
    def of(low: np.ndarray, high: np.ndarray, asked: np.ndarray, relu: np.ndarray) -> Bent:
        none = (((asked > 0) & (high < 0)) | ((asked < 0) & (low > 0)) | (low > high)).any(1)
        on = (asked > 0) | ((asked == 0) & (low >= 0)) | ~relu
        off = ~on & ((asked < 0) | (high <= 0))
        open = ~on & ~off
        width = np.where(open, high - low, 1.0)
        slope = np.where(open, np.clip(high / width, 0, 1), on)
        # relu(z) - slope z is convex, zero at zero, and largest at an end.
        half = np.where(open, np.maximum(high - slope * high, -slope * low) * (0.5 + 4 * UNIT), 0.0)
        return Bent(on, open, slope, half, none)


@dataclass(eq=False)
class State:
    """What enters the next layer of B parts: a, and e of a pair of networks; none: [B] parts found empty."""

    a: Form
    e: Form | None
    none: np.ndarray

    @staticmethod
    def start(entry: Form, pair: bool) -> State:
        zero = Form(np.zeros_like(entry.rows), np.zeros_like(entry.error)) if pair else None
        return State(entry, zero, np.zeros(len(entry.rows), bool))

    def take(self, index: np.ndarray) -> State:
        return State(self.a.take(index), self.e and self.e.take(index), self.none[index])

    def layer(self, one: Layer, two: Layer | None) -> list[Form]:
        """z, and z2 and d of a pair."""
        z = affine([one.weight], [self.a], one.bias)
        if two is None or self.e is None:
            return [z]
        d = affine([two.weight, one.weight - two.weight], [self.e, self.a], one.bias - two.bias)
        return [z, z.minus(d), d]

    def bent(self, one: Layer, forms: list[Form], shape: Shape, asked: list[np.ndarray]) -> tuple[State, list[Bent]]:
        """Behind a hidden layer's ReLUs; asked: signs [B, n] of z, and of z2."""
        z = forms[0]
        b1 = Bent.of(*shape.ends(z), asked[0], one.relu)
        a = z.scaled(b1.slope).moved(b1.half)
        if len(forms) == 1:
            return State(a.with_symbols(b1.half), None, self.none | b1.none), [b1]
        _, z2, d = forms
        b2 = Bent.of(*shape.ends(z2), asked[1], one.relu)
        between, most = np.zeros_like(b1.open), np.zeros_like(b1.half)
        if (b1.open | b2.open).any():
            low, high = shape.ends(d)
            most = np.maximum(np.abs(low), np.abs(high)) * (0.5 + UNIT)
            between = (b1.open | b2.open) & (most < b1.half + b2.half)
        same = b1.on & b2.on
        # e = (slope z + half +- half) - (slope2 (z - d) + half2 +- half2), or d, or d / 2 +- most
        on_z = np.where(between | same, 0.0, b1.slope - b2.slope)
        on_d = np.where(between, 0.5, np.where(same, 1.0, b2.slope))
        e = z.scaled(on_z).minus(d.scaled(-on_d)).moved(np.where(between, 0.0, b1.half - b2.half))
        e.error = e.error + 2 * UNIT * (np.abs(on_z) * z.size + np.where(between, 0.0, b1.half + b2.half))
        shared = np.where(between, 0.0, b1.half)  # times the symbol of a
        own = np.where(between, most, b2.half)
        before = a.rows.shape[1]
        a = a.with_symbols(b1.half)
        # e has the symbol of a, where a has one of its own
        e = e.padded(a.rows.shape[1])
        at = a.rows[:, before:]
        e.rows[:, before:] = np.where(at != 0, shared[:, None], 0.0)
        e.error = e.error + np.where(b1.half > TINY, 0.0, shared)
        e = e.with_symbols(own)
        return State(a.padded(e.rows.shape[1]), e, self.none | b1.none | b2.none), [b1, b2]
