"""Certified bounds of the difference of two networks of one architecture, over a batch of boxes, in one pass.

Coordinates of a layer (see `hexagon`): z, d = z - z2, a = relu(z), e = relu(z) - relu(z2). For affine layers
W a + b of the first network and V a2 + c of the second

    z' = W a + b,    d' = V e + (W - V) a + (b - c)

so that what the networks have in common never has to cancel. Bounds go backward from a layer to the input
(CROWN): a linear objective p . z + q . d of one layer is alpha . a + beta . e + constant of the layer before,
alpha = W^T p + (W - V)^T q, beta = V^T q; planes above alpha a + beta e make that an objective on its z and d.

Certified means: for the networks as real-valued functions of their weights. Computed coefficients are taken as
exact numbers, and each step's error is added to the bound where it arises:

    products      |fl(W^T p + ...) - (W^T p + ...)| . (|a|, |e|)  <=  gamma (|p| . P + |q| . Q)
                  P = |W| A + |b|,  Q = |V| E + |W - V| A + |b - c|,  |a| <= A, |e| <= E over the box;
                  |W| + |V| in place of |W - V| where the matrices themselves are rounded (composed layers)
    planes        `hexagon.height_allowance`
    sums          in the same gammas, whose number of terms counts both dimensions and the depth twice over

gamma = 2 (terms) u, twice what Higham (Accuracy and stability of numerical algorithms, ch. 3) asks for; the
factor two covers the rounding of the allowance itself and second-order terms. Leading layers that both networks
share have d = 0 exactly, so that identical networks get exactly 0.

Axis letters: B boxes, R rows (one objective each), N features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from torchreach.bounds.hexagon import Graph, Hexagon, height, height_allowance, planes, relu_difference, start_slopes
from torchreach.bounds.zonotope import box_rows, zonotope_bounds
from torchreach.clock import NO_LIMIT, Clock
from torchreach.errors import InvalidNetworkError, InvalidSetError, ShapeError, UnsupportedLayerError
from torchreach.networks.layers import PASS_THROUGH, RESHAPING
from torchreach.networks.steps import Step
from torchreach.tolerances import COMPUTE_DTYPE, UNIT_ROUNDOFF

MAX_ENTRIES = 2**26  # of one affine layer as a matrix
CHUNK = 2**23  # numbers in one intermediate tensor; more boxes or rows are worked through in turn
SPREAD = 12  # copies of [B, R, N] that one pass holds at once: vertices of a neuron and the like

Rule = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


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
    ) -> Pair:
        """Pair of two networks' steps (in float64, on one device). Raises as `check`.

        box: (lower, upper) [N_in] that contains every box the pair will be asked about; needed where ReLU leaves some
        features of a step untouched. These are shifted to be positive over the box, in both networks alike, so that
        ReLU may act on all: z + s for z, s taken off again in the next layer. The difference d does not see it.
        live: matrices carry gradients to the steps' weights, and no layer counts as shared, because gradients must
        reach equal layers too.
        """
        Pair.check(first, second)
        with torch.set_grad_enabled(live and torch.is_grad_enabled()):
            W, V = [_dense(step) for step in first], [_dense(step) for step in second]
        D = [w - v for w, v in zip(W, V, strict=True)]
        db = [s.bias - t.bias for s, t in zip(first, second, strict=True)]
        same = [_same(s, t) for s, t in zip(first, second, strict=True)]
        if any(step.relu is not None and not bool(step.relu.all()) for step in first):
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

    def backward(self, k: int, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients alpha, beta [..., N_in] and the constant [...] of p . z + q . d of layer k."""
        db = self.db[k].reshape(-1, self.db[k].shape[-1], 1)  # one for all boxes, or [B, N_out]
        return p @ self.W[k] + q @ self.D[k], q @ self.V[k], p @ self.b[k] + (q @ db)[..., 0]

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
                s.relu, 0.0, (-lowest).clamp(min=0) + 1e-3 * (highest - lowest) + 1e-6 * lowest.abs() + 1e-9
            )
        for step, matrix, result in ((s, W[k], steps1), (t, V[k], steps2)):
            bias, size = step.bias + shift, step.bias_magnitude + shift
            if before is not None:
                bias, size = bias - matrix @ before, size + matrix.abs() @ before
            relu = None if step.relu is None else torch.ones_like(step.relu)
            result.append(replace(step, bias=bias, bias_magnitude=size, relu=relu))
        differences.append(db[k] if before is None else db[k] - D[k] @ before)
        before = shift
    return tuple(steps1), tuple(steps2), differences


def _sizes(steps: tuple[Step, ...]) -> str:
    return " -> ".join([str(tuple(steps[0].in_shape)), *(str(step.features) for step in steps)])


def _inputs(step: Step) -> int:
    return math.prod(step.in_shape)


def _dense(step: Step) -> Tensor:
    """W [N_out, N_in] of an affine step, by pushing unit vectors through it."""
    unit = torch.eye(_inputs(step), dtype=step.bias.dtype, device=step.bias.device)
    return step.linear(unit).T.contiguous()


def _is_matrix(step: Step) -> bool:
    """Whether pushing unit vectors through returns the weights themselves, unrounded."""
    layers = [layer for layer in step.block if not isinstance(layer, PASS_THROUGH + RESHAPING)]
    return len(layers) <= 1 and all(isinstance(layer, nn.Linear) for layer in layers)


def identical(first: tuple[Step, ...], second: tuple[Step, ...]) -> bool:
    """Whether two networks are one function: the same layers with the same parameters."""
    return len(first) == len(second) and all(_same(s, t) for s, t in zip(first, second, strict=True))


def _same(s: Step, t: Step) -> bool:
    """Whether two steps are one function: the same layers with the same parameters."""
    if repr(s.block) != repr(t.block) or s.noise is not None or t.noise is not None:
        return False
    one, other = s.block.state_dict(), t.block.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@dataclass(eq=False)
class Backward:
    """Backward pass over B boxes whose hidden layers become known one after the other.

    lower, upper: [B, N_in]. `hexagons` grows by `add`; only then can a later layer be bounded. `free`: the neurons of
    each that are undecided in some box. off: [B, N_in] how far the second network's input may be from the first's.
    """

    pair: Pair
    lower: Tensor
    upper: Tensor
    hexagons: list[Hexagon] = field(default_factory=list)
    errors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    graphs: dict[int, Graph] = field(default_factory=dict)
    free: list[Tensor] = field(default_factory=list)
    off: Tensor | None = None

    def __post_init__(self) -> None:
        self.middle = self.lower + (self.upper - self.lower) / 2
        self.radius = torch.maximum(self.upper - self.middle, self.middle - self.lower)
        size = torch.maximum(self.lower.abs(), self.upper.abs())
        # Twice: the middle and radius are rounded too, and two sums are taken where a layer takes one.
        off = torch.zeros_like(size) if self.off is None else self.off
        errors, noise = self.pair.error(0, size, off), self.pair.noise(0)
        self.errors.append(tuple(2 * error - part for error, part in zip(errors, noise, strict=True)))  # type: ignore

    def add(self, hexagon: Hexagon) -> None:
        """Bounds [B, N] of the next hidden layer."""
        k = len(self.hexagons)
        if k < self.pair.shared:
            zero = torch.zeros_like(hexagon.dl)
            hexagon = hexagon.with_difference(zero, zero).tightened()
        self.hexagons.append(hexagon)
        self.free.append((~hexagon.settled()).any(0).nonzero().flatten())
        _, d = hexagon.sizes()
        self.errors.append(self.pair.error(k + 1, hexagon.u1.clamp(min=0), d))

    def bound(self, p: Tensor, q: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        """Certified upper bounds [B, R] of p . z + q . d (rows [1 or B, R, N]) of the first layer not yet added.

        rule(k, alpha, beta): slopes of planes above alpha a + beta e of hidden layer k and their summed
        certified height [B, R]. Returns also the objective's coefficients [B, R, N_in] on the input.
        """
        total, error = torch.zeros((), dtype=p.dtype, device=p.device), torch.zeros_like(p[..., 0])
        for k in range(len(self.hexagons), 0, -1):
            error = error + self._error(k, p, q)
            alpha, beta, constant = self.pair.backward(k, p, q)
            p, q, raised = rule(k - 1, alpha, beta)
            total = total + constant + raised
        error = error + self._error(0, p, q)
        x, apart, constant = self.pair.backward(0, p, q)
        total = total + constant + (x @ self.middle[:, :, None])[..., 0] + (x.abs() @ self.radius[:, :, None])[..., 0]
        total = total if self.off is None else total + (apart.abs() @ self.off[:, :, None])[..., 0]
        # An overflow says nothing.
        return torch.nan_to_num(total + error, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf), x

    def _error(self, k: int, p: Tensor, q: Tensor) -> Tensor:
        P, Q = self.errors[k]
        return (p.abs() @ P[:, :, None] + q.abs() @ Q[:, :, None])[..., 0]

    def closed(self, k: int, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rule: closed-form planes."""
        hexagon, free = self.hexagons[k], self.free[k]
        terms = alpha.shape[-1] + 8 * self.pair.depth
        p, q = _settled(hexagon, alpha, beta)
        part = hexagon.map(lambda values: values[:, free])
        slopes_p, slopes_q, raised = planes(part, alpha[..., free], beta[..., free], terms)
        # Where both signs are settled only alpha + beta is rounded.
        loss = 2 * terms * UNIT_ROUNDOFF * (p.abs() @ hexagon.sizes()[0][:, :, None])[..., 0]
        return p.index_copy(-1, free, slopes_p), q.index_copy(-1, free, slopes_q), raised + loss

    def best(self, k: int, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rule: the lowest of several planes, by vertices."""
        return self._by_vertices(k, alpha, beta, apart=False)

    def apart(self, k: int, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rule: planes of the two networks each on its own, by vertices."""
        return self._by_vertices(k, alpha, beta, apart=True)

    def _by_vertices(self, k: int, alpha: Tensor, beta: Tensor, *, apart: bool) -> tuple[Tensor, Tensor, Tensor]:
        hexagon, free = self.hexagons[k], self.free[k]
        if k not in self.graphs:
            self.graphs[k] = Graph.of(hexagon.map(lambda part: part[:, free])).for_rows()
        graph = self.graphs[k]
        p, q = _settled(hexagon, alpha, beta)
        part = alpha[..., free], beta[..., free]
        slopes = start_slopes(graph, *part, apart=apart)
        raised = height(graph, *part, *slopes)[0].sum(-1)
        p, q = p.index_copy(-1, free, slopes[0]), q.index_copy(-1, free, slopes[1])
        sizes = tuple(size[:, None] for size in hexagon.sizes())
        terms = alpha.shape[-1] + 8 * self.pair.depth
        return p, q, raised + height_allowance(alpha, beta, p, q, (sizes[0], sizes[1]), terms)


def _settled(hexagon: Hexagon, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (p, q) [B, R, N] of alpha a + beta e on (z, d), right where both signs are settled."""
    s1, s2 = (slope[:, None] for slope in hexagon.active())
    return s1 * alpha + (s1 - s2) * beta, s2 * beta


@torch.no_grad()
def difference_bounds(pair: Pair, lower: Tensor, upper: Tensor, *, clock: Clock = NO_LIMIT) -> tuple[Hexagon, ...]:
    """Certified bounds of z, z2 and z - z2 of every layer over B boxes; the last are y1, y2 and y1 - y2.

    Args: lower, upper: [B, N_in], any floating dtype and device; they are exact in float64. clock: looked at in every
        chunk of rows; OutOfTime when it is over, as there is no half-way answer.

    Method: backward bounds of all three, each the better of `Backward.best` and `Backward.apart`, intersected
        with zonotopes of either network, and each tightened by the others. Two passes, no optimisation.
    Guarantee: for every real x with lower <= x <= upper, every bound holds for the real-valued networks; never
        looser than either network's zonotope or the difference of both.
    Raises: ShapeError, InvalidSetError: boxes that do not fit, are empty or not finite; InvalidNetworkError: values
        overflow.
    """
    lower, upper = checked_boxes(pair, lower, upper)
    width = max(max(w.shape) for w in pair.W)
    per_box = max((pair.inputs + 1 + sum(step.features for step in pair.first)) * width, 1)
    parts = [
        _bounds(pair, low, high, clock)
        for low, high in zip(lower.split(max(CHUNK // per_box, 1)), upper.split(max(CHUNK // per_box, 1)), strict=True)
    ]
    layers = zip(*parts, strict=True)
    result = tuple(Hexagon(*map(torch.cat, zip(*(h.parts() for h in layer), strict=True))) for layer in layers)
    if not all(bool(torch.isfinite(part).all()) for hexagon in result for part in hexagon.parts()):
        raise InvalidNetworkError("difference bounds require values that fit float64; a layer overflows on these boxes")
    return result


@torch.no_grad()
def quick_bounds(pair: Pair, lower: Tensor, upper: Tensor) -> tuple[list[Hexagon], Tensor, Tensor]:
    """The same for many small boxes at once, looser and several times faster: closed-form planes, z and d only.

    Args: lower, upper: [B, N_in] as `checked_boxes` returns them.
    Returns: hexagons of the hidden layers; bounds [B, 2, N_out] above y1 - y2 (row 0) and y2 - y1 (row 1);
        coefficients [B, 2, N_out, N_in] of these objectives on the input.
    """
    work = Backward(pair, lower, upper)
    for k in range(pair.depth):
        last = k == pair.depth - 1
        eye = _eye(pair, k)
        zero = torch.zeros_like(eye)
        p, q = (zero, eye) if last else (torch.cat((eye, zero)), torch.cat((zero, eye)))
        value, x = work.bound(torch.cat((p, -p))[None], torch.cat((q, -q))[None], work.closed)
        if last:
            if pair.shared == pair.depth:
                value = torch.zeros_like(value)
            shape = (len(lower), 2, pair.outputs)
            return (
                work.hexagons,
                value.expand(len(lower), -1).reshape(shape),
                x.expand(len(lower), -1, -1).reshape(*shape, -1),
            )
        # z2 = z - d is bounded through z and d: rows of its own gain little where the networks are close
        u1, du, l1, dl = value.reshape(len(lower), 4, -1).unbind(1)
        inf = torch.full_like(u1, torch.inf)
        work.add(Hexagon(-l1, u1, -inf, inf, -dl, du).tightened())
    raise AssertionError("a network has at least one affine layer")


def checked_boxes(pair: Pair, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [B, N_in] in float64 on the pair's device.

    Raises: ShapeError, InvalidSetError: what `difference_bounds` says.
    """
    if lower.shape != upper.shape or lower.ndim != 2 or lower.shape[1] != pair.inputs:
        raise ShapeError(
            f"boxes must have lower and upper of shape [B, {pair.inputs}], "
            f"got {tuple(lower.shape)} and {tuple(upper.shape)}"
        )
    lower, upper = (part.to(device=pair.device, dtype=COMPUTE_DTYPE) for part in (lower, upper))
    if not (bool(torch.isfinite(lower).all()) and bool(torch.isfinite(upper).all())):
        raise InvalidSetError("boxes must be finite, got NaN or infinity")
    if not bool((lower <= upper).all()):
        raise InvalidSetError("boxes must have lower <= upper, got lower > upper in some coordinate")
    return lower, upper


def _eye(pair: Pair, k: int) -> Tensor:
    return torch.eye(pair.W[k].shape[0], dtype=pair.W[k].dtype, device=pair.device)


def _bounds(pair: Pair, lower: Tensor, upper: Tensor, clock: Clock) -> tuple[Hexagon, ...]:
    clock.check()
    work = Backward(pair, lower, upper)
    rows = torch.cat((work.middle[:, None], torch.diag_embed(work.radius)), 1)
    slack = 2 * UNIT_ROUNDOFF * (work.middle.abs() + work.radius)
    zonotopes = [zonotope_bounds(steps, rows, slack) for steps in (pair.first, pair.second)]
    for k in range(pair.depth):
        eye = _eye(pair, k)
        zero = torch.zeros_like(eye)
        p, q = torch.cat((eye, eye, zero)), torch.cat((zero, -eye, eye))
        p, q = torch.cat((p, -p)), torch.cat((q, -q))
        limit = max(CHUNK // (SPREAD * len(lower) * max(w.shape[1] for w in pair.W[: k + 1])), 1)
        value = torch.cat(
            [_either(work, a[None], b[None], clock) for a, b in zip(p.split(limit), q.split(limit), strict=True)], 1
        )
        u1, u2, du, l1, l2, dl = value.expand(len(lower), -1).reshape(len(lower), 6, -1).unbind(1)
        (low1, high1), (low2, high2) = zonotopes[0][k], zonotopes[1][k]
        hexagon = Hexagon(
            torch.maximum(-l1, low1),
            torch.minimum(u1, high1),
            torch.maximum(-l2, low2),
            torch.minimum(u2, high2),
            -dl,
            du,
        ).tightened()
        if k == pair.depth - 1:
            if pair.shared == pair.depth:
                hexagon = hexagon.with_difference(torch.zeros_like(dl), torch.zeros_like(du)).tightened()
            return (*work.hexagons, hexagon)
        work.add(hexagon)
    raise AssertionError("a network has at least one affine layer")


def _either(work: Backward, p: Tensor, q: Tensor, clock: Clock) -> Tensor:
    clock.check()
    value = work.bound(p, q, work.best)[0]
    if not work.hexagons:
        return value
    return torch.minimum(value, work.bound(p, q, work.apart)[0])
