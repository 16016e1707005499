"""Two networks of one architecture as matrices per affine layer, and what rounding does to their products."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import ShapeError, UnsupportedLayerError
from torchreach.core.tolerances import COMPUTE_DTYPE, UNIT_ROUNDOFF
from torchreach.domains.hexagon import Hexagon, relu_difference
from torchreach.domains.zonotope import box_rows, zonotope_bounds
from torchreach.graph.layers import PASS_THROUGH, RESHAPING
from torchreach.graph.steps import Step

MAX_ENTRIES = 2**26  # of one affine layer as a matrix
UNITS = 512  # unit vectors that are pushed through a layer at a time


@dataclass(frozen=True, eq=False)
class Pair:
    """Two networks of one architecture as matrices per affine layer; made by `Pair.of`.

    W, V, D = W - V: [N_out, N_in] per layer; b, c, db = b - c: [N_out]. `shared` leading layers are the same
    function in both networks. `exact` tells per layer whether the matrices are the weights themselves.
    """

    first: tuple[Step, ...]
    second: tuple[Step, ...]
    W: list[Tensor]
    V: list[Tensor]
    D: list[Tensor]
    b: list[Tensor]
    db: list[Tensor]
    exact: list[bool]
    shared: int

    @staticmethod
    def check(first: tuple[Step, ...], second: tuple[Step, ...]) -> None:
        """Says why two networks' steps make no pair, without building it.

        Raises:
            ShapeError: the networks differ in depth or in the size of a layer.
            UnsupportedLayerError: an affine layer would have more than `MAX_ENTRIES` entries as a matrix, or a
                step leaves other features without ReLU in one network than in the other.
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
        for step in (*first, *second):
            if _inputs(step) * step.features > MAX_ENTRIES:
                raise UnsupportedLayerError(
                    f"difference bounds require affine layers of at most {MAX_ENTRIES} entries as matrices; "
                    f"{step.name} has {step.features} x {_inputs(step)}"
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
        live: matrices carry gradients to the steps' weights, and no layer counts as shared, because gradients must
        reach equal layers too.
        """
        Pair.check(first, second)
        with torch.set_grad_enabled(live and torch.is_grad_enabled()):
            W, V = ([_dense(step, clock) for step in steps] for steps in (first, second))
        D = [w - v for w, v in zip(W, V, strict=True)]
        db = [s.bias - t.bias for s, t in zip(first, second, strict=True)]
        same = [_same(s, t) for s, t in zip(first, second, strict=True)]
        if any(step.relu is not None and bool(step.passes.any()) for step in first):
            first, second, db = _shifted(first, second, W, V, D, db, box)
        return Pair(
            first,
            second,
            W,
            V,
            D,
            [step.bias for step in first],
            db,
            [_is_matrix(s) and _is_matrix(t) for s, t in zip(first, second, strict=True)],
            0 if live else next((k for k, equal in enumerate(same) if not equal), len(same)),
        )

    @property
    def depth(self) -> int:
        return len(self.W)

    @property
    def inputs(self) -> int:
        return self.W[0].shape[1]

    @property
    def outputs(self) -> int:
        return self.W[-1].shape[0]

    @property
    def device(self) -> torch.device:
        return self.W[0].device

    @property
    def curved(self) -> bool:
        """Whether some activations are smooth."""
        return any(step.curves for step in self.first)

    def open(self, k: int, hexagon: Hexagon) -> Tensor:
        """[B, N] neurons of hidden layer k that are no linear functions over the hexagon."""
        result = ~hexagon.settled()
        for _, index in self.first[k].curves:
            result[:, index] = True
        return result

    def terms(self, k: int) -> int:
        """Number of terms that gammas of layer k count."""
        n_out, n_in = self.W[k].shape
        return 2 * (n_out + n_in) + self.first[k].terms + self.second[k].terms + 8 * self.depth + 64

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
        elif self.exact[k]:
            Q = Q + A @ self.D[k].abs().T + self.db[k].abs()
        else:
            Q = Q + P + t.magnitude(A) + t.bias_magnitude
        gamma = 2 * self.terms(k) * UNIT_ROUNDOFF
        noise = self.noise(k)
        return gamma * P + noise[0], gamma * Q + noise[1]

    def noise(self, k: int) -> tuple[Tensor, Tensor]:
        """Noise [N_out] of z and of d = z - z2 in layer k, d carrying that of both networks."""
        zero = torch.zeros_like(self.b[k])
        first, second = (step.with_noise(zero) for step in (self.first[k], self.second[k]))
        return first, first + second

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
            z = a @ self.W[k].T + self.b[k]
            d = e @ self.V[k].T + a @ self.D[k].T + self.db[k]
            z_error = self.first[k].magnitude(a_error) + P
            d_error = self.second[k].magnitude(e_error) + a_error @ self.D[k].abs().T + Q
            if k == self.depth - 1:
                return d, d_error * (1 + 1e-9)
            a, e = z.clamp(min=0), relu_difference(z, d)
            z2, z2_error = z - d, z_error + d_error + 2 * UNIT_ROUNDOFF * (z.abs() + d.abs())
            a_error = torch.where(z + z_error <= 0, 0.0, z_error)
            e_error = torch.minimum(z_error + d_error, 2 * (d.abs() + d_error)) + 4 * UNIT_ROUNDOFF * d.abs()
            on, off = (z - z_error >= 0) & (z2 - z2_error >= 0), (z + z_error <= 0) & (z2 + z2_error <= 0)
            e_error = torch.where(off, 0.0, torch.where(on, d_error + 4 * UNIT_ROUNDOFF * d.abs(), e_error))
            for f, i in self.first[k].curves:
                own, other = f.error(z[:, i].abs() + z_error[:, i]), f.error(z2[:, i].abs() + z2_error[:, i])
                first, second = own + f.steepest * z_error[:, i], other + f.steepest * z2_error[:, i]
                value = f.value(z[:, i]), f.value(z2[:, i])
                a, a_error = a.index_copy(1, i, value[0]), a_error.index_copy(1, i, first)
                rounded = first + second + 4 * UNIT_ROUNDOFF * (value[0].abs() + value[1].abs())
                e, e_error = e.index_copy(1, i, value[0] - value[1]), e_error.index_copy(1, i, rounded)
        raise AssertionError("a network has at least one affine layer")


def _shifted(
    first: tuple[Step, ...],
    second: tuple[Step, ...],
    W: list[Tensor],
    V: list[Tensor],
    D: list[Tensor],
    db: list[Tensor],
    box: tuple[Tensor, Tensor] | None,
) -> tuple[tuple[Step, ...], tuple[Step, ...], list[Tensor]]:
    """Both networks with the features that ReLU leaves alone positive over the box, and their biases' differences.

    The new biases are rounded once more than the old ones, by less than the spare factor of two in what
    `Pair.error` allows, as their magnitudes include the shifts'; the differences never contain a shift of their own.
    """
    if box is None:
        raise UnsupportedLayerError("difference bounds of steps that leave features without ReLU require a box")
    with torch.no_grad():  # any shift that is large enough will do
        rows = box_rows(*(end[None].to(COMPUTE_DTYPE) for end in box))
        bounds = [zonotope_bounds(steps, *rows) for steps in (first, second)]
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
        for step, matrix, result in ((s, W[k], steps1), (t, V[k], steps2)):
            bias, size = step.bias + shift, step.bias_magnitude + shift
            if before is not None:
                bias, size = bias - matrix @ before, size + matrix.abs() @ before
            relu = None if step.relu is None else step.relu | step.passes
            result.append(replace(step, bias=bias, bias_magnitude=size, relu=relu))
        differences.append(db[k] if before is None else db[k] - D[k] @ before)
        before = shift
    return tuple(steps1), tuple(steps2), differences


def _sizes(steps: tuple[Step, ...]) -> str:
    return " -> ".join([str(tuple(steps[0].in_shape)), *(str(step.features) for step in steps)])


def _inputs(step: Step) -> int:
    return math.prod(step.in_shape)


def _dense(step: Step, clock: Clock) -> Tensor:
    """W [N_out, N_in] of an affine step: its weights, or unit vectors pushed through it."""
    for layer in step.block if _is_matrix(step) else ():
        if isinstance(layer, nn.Linear):
            return layer.weight if torch.is_grad_enabled() else layer.weight.detach()
    unit = torch.eye(_inputs(step), dtype=step.bias.dtype, device=step.bias.device)
    columns = []
    for part in unit.split(UNITS):
        clock.check()
        columns.append(step.linear(part))
    return torch.cat(columns).T.contiguous()


def _is_matrix(step: Step) -> bool:
    """Whether pushing unit vectors through returns the weights themselves, unrounded."""
    layers = [layer for layer in step.block if not isinstance(layer, PASS_THROUGH + RESHAPING)]
    whole = (step.features, _inputs(step))  # of several rows of a value each is multiplied by the weights
    return len(layers) <= 1 and all(isinstance(layer, nn.Linear) and layer.weight.shape == whole for layer in layers)


def identical(first: tuple[Step, ...], second: tuple[Step, ...]) -> bool:
    """Whether two networks are one function: the same layers with the same parameters."""
    return len(first) == len(second) and all(_same(s, t) for s, t in zip(first, second, strict=True))


def _same(s: Step, t: Step) -> bool:
    """Whether two steps are one function: the same layers with the same parameters."""
    if repr(s.block) != repr(t.block) or s.noise is not None or t.noise is not None:
        return False
    if (s.relu is None) != (t.relu is None):
        return False
    if s.relu is not None and t.relu is not None and not torch.equal(s.relu, t.relu):
        return False
    if not _same_curves(s, t):
        return False
    one, other = s.block.state_dict(), t.block.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _same_curves(s: Step, t: Step) -> bool:
    """Whether two steps apply the same smooth functions to the same features."""
    return len(s.curves) == len(t.curves) and all(
        f.name == g.name and torch.equal(i, j) for (f, i), (g, j) in zip(s.curves, t.curves, strict=True)
    )
