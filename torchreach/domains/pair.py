"""Two networks of one architecture, layer by layer, and what rounding does to their products."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import ShapeError, UnsupportedLayerError
from torchreach.core.roundoff import allowance, gamma
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.domains.hexagon import Hexagon, relu_difference
from torchreach.domains.zonotope import box_rows, zonotope_bounds
from torchreach.graph.layers import alike
from torchreach.graph.steps import Step
from torchreach.graph.twins import Twins, is_matrix, twins

# Bytes of zonotopes that say how far features without ReLU are to be shifted; from there on intervals say it.
SHIFT_BYTES = 2**27

log = logging.getLogger(__name__)

Activate = Callable[[Step, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two networks of one architecture; made by `Pair.of`.

    maps: W, V, D = W - V of each affine layer [N_out, N_in]; b, c, db = b - c: [N_out]. `shared` leading layers are the
    same function in both networks. `exact` tells per layer whether W, V and the biases are the parameters themselves.
    """

    first: tuple[Step, ...]
    second: tuple[Step, ...]
    maps: list[Twins]
    b: list[Tensor]
    db: list[Tensor]
    exact: list[bool]
    shared: int

    @staticmethod
    def check(first: tuple[Step, ...], second: tuple[Step, ...]) -> None:
        """Says why two networks' steps make no pair, without building it.

        Raises:
            ShapeError: the networks differ in depth or in the size of a layer.
            UnsupportedLayerError: a step leaves other features without ReLU in one network than in the other.
        """
        sizes = [[s.in_shape, *(step.features for step in steps)] for steps in (first, second) for s in steps[:1]]
        if sizes[0] != sizes[1]:
            raise ShapeError(
                "difference bounds require two networks of one architecture, that is equal input shapes and equal "
                f"layer sizes; got {_sizes(first)} and {_sizes(second)}"
            )
        for one, other in zip(first, second, strict=True):
            if not _same_curves(one, other):
                names = [", ".join(f.name for f, _ in step.curves) or "none" for step in (one, other)]
                raise UnsupportedLayerError(
                    "difference bounds require the same smooth activations on the same features of both networks; in "
                    f"{one.name} they differ ({names[0]}; {names[1]})"
                )
            if (one.relu is None) != (other.relu is None) or (
                one.relu is not None and other.relu is not None and not torch.equal(one.relu, other.relu)
            ):
                raise UnsupportedLayerError(
                    f"difference bounds require ReLU on the same features of both networks; in {one.name} they differ"
                )

    @staticmethod
    def of(
        first: tuple[Step, ...],
        second: tuple[Step, ...],
        box: tuple[Tensor, Tensor] | None = None,
        *,
        live: bool = False,
        clock: Clock = NO_LIMIT,
    ) -> Pair:
        """Pair of two networks' steps (in float64, on one device). Raises as `check`; OutOfTime between two layers.

        box: (lower, upper) [N_in] that contains every box the pair will be asked about; needed where ReLU leaves some
        features of a step untouched. These are shifted to be positive over the box, in both networks alike, so that
        ReLU may act on all: z + s for z, s taken off again in the next layer. The difference d does not see it.
        live: all maps are matrices, which carry gradients to the steps' weights, and no layer counts as shared, because
        gradients must reach equal layers too.
        """
        Pair.check(first, second)
        maps = [twins(s, t, live=live, clock=clock) for s, t in zip(first, second, strict=True)]
        db = [s.bias - t.bias for s, t in zip(first, second, strict=True)]
        same = [_same(s, t) for s, t in zip(first, second, strict=True)]
        if any(step.relu is not None and bool(step.passes.any()) for step in first):
            first, second, db = _shifted(first, second, maps, db, box, clock)
        return Pair(
            first,
            second,
            maps,
            [step.bias for step in first],
            db,
            [is_matrix(s) and is_matrix(t) for s, t in zip(first, second, strict=True)],
            0 if live else next((k for k, equal in enumerate(same) if not equal), len(same)),
        )

    @staticmethod
    def matches(first: tuple[Step, ...], second: tuple[Step, ...]) -> bool:
        """Whether two networks' steps make a pair."""
        try:
            Pair.check(first, second)
        except (ShapeError, UnsupportedLayerError) as error:
            log.info("no difference bounds: %s", error)
            return False
        return True

    @property
    def depth(self) -> int:
        return len(self.maps)

    @property
    def inputs(self) -> int:
        return self.maps[0].shape[1]

    @property
    def outputs(self) -> int:
        return self.maps[-1].shape[0]

    @property
    def device(self) -> torch.device:
        return self.b[0].device

    @property
    def widest(self) -> int:
        """Most features of any value."""
        return max(layer.widest for layer in self.maps)

    def open(self, k: int, hexagon: Hexagon) -> Tensor:
        """[B, N] neurons of hidden layer k that are no linear functions over the hexagon."""
        result = ~hexagon.settled()
        for _, index in self.first[k].curves:
            result[:, index] = True
        return result

    def terms(self, k: int) -> int:
        """Number of terms that gammas of layer k count."""
        n_out, n_in = self.maps[k].shape
        own = self.maps[k].terms + self.first[k].terms + self.second[k].terms
        return 2 * (n_out + n_in) + own + 8 * self.depth + 56

    def error(self, k: int, A: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
        """gamma P, gamma Q [B, N_out] of the products of layer k, for |a| <= A, |e| <= E [B, N_in].

        They bound what p . z + q . d loses to rounding, and to noise, in layer k, forward or backward, per unit of
        p and q.
        """
        s, t = self.first[k], self.second[k]
        P = s.magnitude(A) + s.bias_magnitude
        Q = t.magnitude(E)
        if k < self.shared:
            pass  # D = 0 exactly
        else:
            # Biases of several layers were composed, and rounded.
            bias = self.db[k].abs() if self.exact[k] else s.bias_magnitude + t.bias_magnitude
            Q = Q + self.maps[k].size(A) + bias
        share = 2 * gamma(self.terms(k))
        noise = self.noise(k)
        return share * P + noise[0], share * Q + noise[1]

    def noise(self, k: int) -> tuple[Tensor, Tensor]:
        """Noise [N_out] of z and of d = z - z2 in layer k, d carrying that of both networks."""
        zero = torch.zeros_like(self.b[k])
        first, second = (step.with_noise(zero) for step in (self.first[k], self.second[k]))
        return first, first + second

    @property
    def features(self) -> int:
        """Of all values of one network together."""
        return sum(step.features for step in self.first)

    def values(self, x: Tensor, activate: Activate) -> Tensor:
        """y1 - y2 [B, N_out], differentiable, with another function in place of each step's activation."""
        return difference_of((self.first, self.second), x, activate)

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y1 - y2 [B, N_out] at inputs x [B, N_in], and a bound on what rounding did to it.

        Errors go forward by |V| and |W - V|, and end at neurons that are certainly off. relu(z) - relu(z - d) is off
        by the error of d where both are certainly on; else by at most the errors of z and d together, and it is
        never larger than |d|.
        """
        a, e = x, torch.zeros_like(x)
        a_error, e_error = torch.zeros_like(x), torch.zeros_like(x)
        for k in range(self.depth):
            P, Q = self.error(k, a.abs() + a_error, e.abs() + e_error)
            z, d = self.maps[k].forth(a, e if k else None)
            z, d = z + self.b[k], d + self.db[k]
            z_error = self.first[k].magnitude(a_error) + P
            d_error = self.second[k].magnitude(e_error) + self.maps[k].spread(a_error) + Q
            if k == self.depth - 1:
                return d, d_error * (1 + 1e-9)
            a, e = z.clamp(min=0), relu_difference(z, d)
            z2, z2_error = z - d, z_error + d_error + allowance(z.abs() + d.abs())
            a_error = torch.where(z + z_error <= 0, 0.0, z_error)
            e_error = torch.minimum(z_error + d_error, 2 * (d.abs() + d_error)) + allowance(d.abs())
            on, off = (z - z_error >= 0) & (z2 - z2_error >= 0), (z + z_error <= 0) & (z2 + z2_error <= 0)
            e_error = torch.where(off, 0.0, torch.where(on, d_error + allowance(d.abs()), e_error))
            for f, i in self.first[k].curves:
                own, other = f.error(z[:, i].abs() + z_error[:, i]), f.error(z2[:, i].abs() + z2_error[:, i])
                first, second = own + f.steepest * z_error[:, i], other + f.steepest * z2_error[:, i]
                value = f.value(z[:, i]), f.value(z2[:, i])
                a, a_error = a.index_copy(1, i, value[0]), a_error.index_copy(1, i, first)
                rounded = first + second + allowance(value[0].abs() + value[1].abs())
                e, e_error = e.index_copy(1, i, value[0] - value[1]), e_error.index_copy(1, i, rounded)
        raise AssertionError("a network has at least one affine layer")


def difference_of(networks: Sequence[tuple[Step, ...]], x: Tensor, activate: Activate) -> Tensor:
    """The first network's outputs [B, N_out], less the second's if there is one; activate: see `Pair.values`."""
    result = x.new_zeros(())
    for sign, steps in zip((1, -1), networks, strict=False):
        y = x
        for step in steps:
            z = step.linear(y) + step.bias
            y = z if step.relu is None else activate(step, z)
        result = result + sign * y
    return result


def _shifted(
    first: tuple[Step, ...],
    second: tuple[Step, ...],
    maps: list[Twins],
    db: list[Tensor],
    box: tuple[Tensor, Tensor] | None,
    clock: Clock,
) -> tuple[tuple[Step, ...], tuple[Step, ...], list[Tensor]]:
    """Both networks with the features that ReLU leaves alone positive over the box, and their biases' differences.

    The new biases are rounded once more than the old ones, by less than the spare factor of two in what
    `Pair.error` allows, as their magnitudes include the shifts'; the differences never contain a shift of their own.
    """
    if box is None:
        raise UnsupportedLayerError("difference bounds of steps that leave features without ReLU require a box")
    with torch.no_grad():  # any shift that is large enough will do
        rows = box_rows(*(end[None].to(COMPUTE_DTYPE) for end in box))
        bounds = [zonotope_bounds(steps, *rows, clock=clock, memory=SHIFT_BYTES) for steps in (first, second)]
    steps1, steps2, differences = [], [], []
    before: Tensor | None = None
    for k, (s, t) in enumerate(zip(first, second, strict=True)):
        shift = torch.zeros_like(s.bias)
        if s.relu is not None:
            lowest = torch.minimum(*(bound[k][0].amin(0) for bound in bounds))
            highest = torch.maximum(*(bound[k][1].amax(0) for bound in bounds))
            shift = torch.where(
                ~s.passes, 0.0, (-lowest).clamp(min=0) + 1e-3 * (highest - lowest) + 1e-6 * lowest.abs() + 1e-9
            )
        for step, result in ((s, steps1), (t, steps2)):
            bias, size = step.bias + shift, step.bias_magnitude + shift
            if before is not None:
                bias, size = bias - step.linear(before), size + step.magnitude(before)
            relu = None if step.relu is None else step.relu | step.passes
            result.append(replace(step, bias=bias, bias_magnitude=size, relu=relu))
        differences.append(db[k] if before is None else db[k] - maps[k].forth(before[None])[1][0])
        before = shift
    return tuple(steps1), tuple(steps2), differences


def _sizes(steps: tuple[Step, ...]) -> str:
    return " -> ".join([str(tuple(steps[0].in_shape)), *(str(step.features) for step in steps)])


def identical(first: tuple[Step, ...], second: tuple[Step, ...]) -> bool:
    """Whether two networks are one function: the same layers with the same parameters."""
    return len(first) == len(second) and all(_same(s, t) for s, t in zip(first, second, strict=True))


def _same(s: Step, t: Step) -> bool:
    """Whether two steps are one function: the same layers with the same parameters."""
    if s.noise is not None or t.noise is not None or not alike(s.block, t.block):
        return False
    if (s.relu is None) != (t.relu is None):
        return False
    if s.relu is not None and t.relu is not None and not torch.equal(s.relu, t.relu):
        return False
    return s.in_shape == t.in_shape and _same_curves(s, t)


def _same_curves(s: Step, t: Step) -> bool:
    """Whether two steps apply the same smooth functions to the same features."""
    return len(s.curves) == len(t.curves) and all(
        f.name == g.name and torch.equal(i, j) for (f, i), (g, j) in zip(s.curves, t.curves, strict=True)
    )
