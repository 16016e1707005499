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
                  the magnitudes of all that W - V is made of where it is composed of several layers
    planes        `hexagon.height_allowance`
    sums          in the same gammas, whose number of terms counts both dimensions and the depth twice over

gamma is twice that of `core.roundoff`: the factor two covers the rounding of the allowance itself and second-order
terms. Leading layers that both networks share have d = 0 exactly, so that identical networks get exactly 0.

Axis letters: B boxes, R rows (one objective each), N features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import InvalidNetworkError, InvalidSetError, ShapeError
from torchreach.core.masks import leading
from torchreach.core.roundoff import gamma
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.domains import spectral
from torchreach.domains.hexagon import ClosedPlanes, Graph, Hexagon, height, height_allowance, start_slopes
from torchreach.domains.pair import Pair
from torchreach.domains.smooth import CurvePlanes, activated
from torchreach.domains.stairs import StairPair
from torchreach.domains.zonotope import BUFFERS, Bounds, bent, interval_bounds, zonotope_bounds
from torchreach.graph.steps import Step
from torchreach.graph.twins import Maps

CHUNK = 2**23  # numbers in one intermediate tensor; more boxes or rows are worked through in turn
SPREAD = 12  # copies of [B, R, N] that one pass holds at once: vertices of a neuron and the like

Rule = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
Ends = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Backward:
    """Backward pass over B boxes whose hidden layers become known one after the other.

    lower, upper: [B, N_in]. `hexagons` grows by `add`; only then can a later layer be bounded. Neurons that are off in
    both networks in every box are left out of everything a pass touches: `on` are the others, `hexagons`, `errors` and
    coefficients speak of these alone, and `free` are those of them that are undecided in some box.
    off: [B, N_in] how far the second network's input may be from the first's.
    """

    pair: Pair
    lower: Tensor
    upper: Tensor
    hexagons: list[Hexagon] = field(default_factory=list)
    errors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    graphs: dict[int, Graph] = field(default_factory=dict)
    on: list[Tensor] = field(default_factory=list)
    free: list[Tensor] = field(default_factory=list)
    curves: list[list[CurvePlanes]] = field(default_factory=list)
    parts: list[tuple[Maps, Tensor, Tensor]] = field(default_factory=list)  # of the layers' maps, b, b - c
    # Of `closed`: the neurons of each box, which of them count, and their planes.
    lists: dict[int, tuple[Tensor, Tensor, ClosedPlanes]] = field(default_factory=dict)
    scores: dict[int, Tensor] | None = None  # takes, of `closed`, the largest heights of planes [B, N]
    off: Tensor | None = None
    # Of layers that are not relu but rounded; only `search.reduced_pair` goes back through them.
    stairs: dict[int, StairPair] = field(default_factory=dict)
    clock: Clock = NO_LIMIT  # looked at in every layer; OutOfTime

    def __post_init__(self) -> None:
        self.middle = self.lower + (self.upper - self.lower) / 2
        self.radius = torch.maximum(self.upper - self.middle, self.middle - self.lower)
        size = torch.maximum(self.lower.abs(), self.upper.abs())
        # Twice: the middle and radius are rounded too, and two sums are taken where a layer takes one.
        off = torch.zeros_like(size) if self.off is None else self.off
        errors, noise = self.pair.error(0, size, off), self.pair.noise(0)
        self.errors.append(tuple(2 * error - part for error, part in zip(errors, noise, strict=True)))  # type: ignore

    def add(self, hexagon: Hexagon, stairs: StairPair | None = None) -> None:
        """Bounds [B, N] of all neurons of the next hidden layer, and their stairs if they are rounded."""
        k, pair = len(self.hexagons), self.pair
        if k < pair.shared:
            zero = torch.zeros_like(hexagon.dl)
            hexagon = hexagon.with_difference(zero, zero).tightened()
        step = pair.first[k]
        with torch.no_grad():  # rounding allowances need no gradient
            errors = pair.error(k + 1, *(sizes(step, hexagon) if stairs is None else stairs.sizes(hexagon)))
        used = ((hexagon.u1 > 0) | (hexagon.u2 > 0) if stairs is None else stairs.used(hexagon)).any(0)
        for _, index in step.curves:
            used[index] = True
        on = used.nonzero().flatten()
        kept = hexagon.map(lambda part: part[:, on])
        before = self.on[k - 1] if k else None
        self.parts.append((pair.maps[k].part(on, before), pair.b[k][on], pair.db[k][..., on]))
        self.errors[k] = tuple(part[:, on] for part in self.errors[k])  # type: ignore
        self.errors.append(errors)
        self.on.append(on)
        self.hexagons.append(kept)
        place = used.cumsum(0) - 1  # among those that are on
        curves = [(f, place[index]) for f, index in step.curves]
        self.curves.append([CurvePlanes.of(f, kept.map(lambda part, i=i: part[:, i]), i) for f, i in curves])
        if stairs is not None:
            self.stairs[k] = stairs = stairs.part(on)
        undecided = (~kept.settled() if stairs is None else stairs.undecided(kept)).any(0)
        for _, index in curves:
            undecided[index] = False
        self.free.append(undecided.nonzero().flatten())

    def columns(self, k: int, rows: Tensor) -> tuple[Tensor, ...]:
        """W, V, D of rows [...] of layer k, on the neurons that are on of the layer before."""
        before = self.on[k - 1] if k else None
        parts = self.pair.maps[k].rows(rows)
        return tuple(part if before is None else part[..., before] for part in parts)

    def back(self, k: int, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients alpha, beta [..., N_in] and the constant [...] of p . z + q . d of hidden layer k.

        beta is of no use at layer 0 where both networks have one input, and is left out there.
        """
        maps, b, db = self.parts[k]
        # b - c is one for all boxes, or [B, N_out]
        constant = p @ b + (q @ db if db.ndim == 1 else (q @ db[..., None])[..., 0])
        alpha, beta = maps.back(p, q, beta=k > 0 or self.off is not None)
        return alpha, q if beta is None else beta, constant

    def bound(self, alpha: Tensor, beta: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        """Upper bounds [B, R] of alpha a + beta e (rows [1 or B, R, N]) on the last layer added; on x before any is.

        They lack what the products that made the rows lose (`errors`). rule(k, alpha, beta): slopes of planes above
        alpha a + beta e of hidden layer k and their summed certified height [B, R]. Returns also the objective's
        coefficients [B, R, N_in] on the input.
        """
        total = torch.zeros((), dtype=alpha.dtype, device=alpha.device)
        for k in range(len(self.hexagons) - 1, -1, -1):
            self.clock.check()
            p, q, raised = rule(k, alpha, beta)
            total = total + raised + self._error(k, p, q)
            alpha, beta, constant = self.back(k, p, q)
            total = total + constant
        x = alpha
        total = total if self.off is None else total + (beta.abs() @ self.off[:, :, None])[..., 0]
        total = total + (x @ self.middle[:, :, None])[..., 0] + (x.abs() @ self.radius[:, :, None])[..., 0]
        # An overflow says nothing.
        return torch.nan_to_num(total, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf), x

    def difference(self, rule: Rule, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Certified bounds [B, 2 C] above z - z2 and z2 - z of the layer to be added next; coefficients of `bound`.

        rows: [B, C] of each box, of networks whose biases are one for all boxes; None: all N.
        """
        k, pair = len(self.hexagons), self.pair
        constant, error = pair.db[k], self.errors[k][1]
        if rows is None:
            rows = torch.arange(len(pair.b[k]), device=pair.device)[None]
        else:
            constant, error = constant[rows], error.gather(1, rows)
        _, V, D = self.columns(k, rows)
        value, x = self.bound(torch.cat((D, -D), 1), torch.cat((V, -V), 1), rule)
        return value + torch.cat((constant, -constant), -1) + error.repeat(1, 2), x

    def _error(self, k: int, p: Tensor, q: Tensor) -> Tensor:
        P, Q = self.errors[k]
        return (p.abs() @ P[:, :, None] + q.abs() @ Q[:, :, None])[..., 0]

    def closed(self, k: int, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rule: closed-form planes, for the neurons that are undecided in each box."""
        hexagon = self.hexagons[k]
        if k not in self.lists:
            undecided = torch.zeros_like(hexagon.l1, dtype=torch.bool)
            undecided[:, self.free[k]] = ~hexagon.map(lambda part: part[:, self.free[k]]).settled()
            index = leading(undecided, int(undecided.sum(1).max()) if undecided.numel() else 0)
            chosen = ClosedPlanes.of(hexagon.map(lambda part: part.gather(1, index)))
            self.lists[k] = index, undecided.gather(1, index), chosen
        index, undecided, chosen = self.lists[k]
        terms = alpha.shape[-1] + 8 * self.pair.depth
        p, q = hexagon.linear(alpha, beta)
        # Where both signs are settled only alpha + beta is rounded.
        loss = 2 * gamma(terms) * (p.abs() @ hexagon.sizes()[0][:, :, None])[..., 0]
        rows = index[:, None].expand(-1, alpha.shape[1], -1)
        shape = (len(hexagon.l1), *alpha.shape[1:])
        alpha_, beta_ = (part.expand(shape).gather(2, rows) for part in (alpha, beta))
        *slopes, raised = chosen.above(alpha_, beta_, terms)
        if self.scores is not None:
            score = torch.where(undecided, raised.amax(1), 0.0)
            self.scores[k] = torch.zeros_like(hexagon.l1).scatter(1, index, score)
        raised = torch.where(undecided[:, None], raised, 0.0).sum(2)
        p, q = (
            part.scatter(2, rows, torch.where(undecided[:, None], slope, part.gather(2, rows)))
            for part, slope in zip((p, q), slopes, strict=True)
        )
        return self._curved(k, alpha, beta, p, q, raised + loss)

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
        p, q = hexagon.linear(alpha, beta)
        part = alpha[..., free], beta[..., free]
        slopes = start_slopes(graph, *part, apart=apart)
        raised = height(graph, *part, *slopes)[0].sum(-1)
        p, q = p.index_copy(-1, free, slopes[0]), q.index_copy(-1, free, slopes[1])
        sizes = tuple(size[:, None] for size in hexagon.sizes())
        terms = alpha.shape[-1] + 8 * self.pair.depth
        raised = raised + height_allowance(alpha, beta, p, q, (sizes[0], sizes[1]), terms)
        return self._curved(k, alpha, beta, p, q, raised, apart=apart)

    def _curved(
        self, k: int, alpha: Tensor, beta: Tensor, p: Tensor, q: Tensor, raised: Tensor, *, apart: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rule's result with planes of smooth activations in their places."""
        terms = alpha.shape[-1] + 8 * self.pair.depth
        for curve in self.curves[k]:
            part = alpha[..., curve.index], beta[..., curve.index]
            slope_p, slope_q, height = curve.above(*part, terms, apart=apart)
            p, q = p.index_copy(-1, curve.index, slope_p), q.index_copy(-1, curve.index, slope_q)
            raised = raised + height
        return p, q, raised


def sizes(step: Step, hexagon: Hexagon) -> Ends:
    """Bounds [B, N] on |a| and on |e| behind a hidden layer."""
    if not step.curves:
        return hexagon.u1.clamp(min=0), hexagon.sizes()[1]
    (low, high), (dl, du) = activated(step, hexagon)
    return torch.maximum(low.abs(), high.abs()), torch.maximum(hexagon.sizes()[1], torch.maximum(dl.abs(), du.abs()))


@torch.no_grad()
def difference_bounds(
    pair: Pair,
    lower: Tensor,
    upper: Tensor,
    *,
    together: Clock | None = None,
    clock: Clock = NO_LIMIT,
    memory: float = inf,
) -> tuple[Hexagon, ...]:
    """Certified bounds of z, z2 and z - z2 of every layer over B boxes; the last are y1, y2 and y1 - y2.

    Args: lower, upper: [B, N_in], any floating dtype and device; they are exact in float64. together: also by planes
        that see the inputs of the first hidden layer together (`domains.spectral`), while this lasts. clock: looked at
        in every chunk of rows; OutOfTime when it is over. memory: of zonotopes, in bytes; intervals in their place.

    Method: zonotopes of either network, and intervals of z - z2 from the layer before; then, for neurons whose signs
        these leave open and for the outputs, backward bounds of all three, each the better of `Backward.best` and
        `Backward.apart`; each tightened by the others. No optimisation.
    Guarantee: for every real x with lower <= x <= upper, every bound holds for the real-valued networks; never
        looser than either network's zonotope or the difference of both.
    Raises: ShapeError, InvalidSetError: boxes that do not fit, are empty or not finite; InvalidNetworkError: values
        overflow.
    """
    lower, upper = checked_boxes(pair, lower, upper)
    per_box = max((pair.inputs + 1 + sum(step.features for step in pair.first)) * pair.widest, 1)
    parts = [
        _bounds(Backward(pair, low, high, clock=clock), clock, memory, together)
        for low, high in zip(lower.split(max(CHUNK // per_box, 1)), upper.split(max(CHUNK // per_box, 1)), strict=True)
    ]
    layers = zip(*parts, strict=True)
    return finite(Hexagon(*map(torch.cat, zip(*(h.parts() for h in layer), strict=True))) for layer in layers)


def finite(layers: Iterable[Hexagon]) -> tuple[Hexagon, ...]:
    """Bounds of the layers. Raises: InvalidNetworkError: some are not finite."""
    result = tuple(layers)
    if not all(bool(torch.isfinite(part).all()) for hexagon in result for part in hexagon.parts()):
        raise InvalidNetworkError("difference bounds require values that fit float64; a layer overflows on these boxes")
    return result


class Takes(Protocol):
    """Who takes boxes of so many inputs, on which device."""

    @property
    def inputs(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


def checked_boxes(pair: Takes, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
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


def _bounds(work: Backward, clock: Clock, memory: float, together: Clock | None) -> tuple[Hexagon, ...]:
    pair, layers = work.pair, []
    zonotopes: list[Bounds] = []
    for k in range(pair.depth):
        last, rows = k == pair.depth - 1, torch.arange(len(pair.b[k]), device=pair.device)
        if k == 0:
            hexagon = _by_rows(work, rows, clock).tightened()
        else:
            clock.check()
            zonotopes = zonotopes or _zonotopes(work, clock, memory)
            hexagon = _cheap(work, layers[-1], *(bounds[k - 1] for bounds in zonotopes))
            # Bounds of a neuron whose signs are settled only scale rounding allowances.
            rows = rows if last else pair.open(k, hexagon).any(0).nonzero().flatten()
            if len(rows):
                old = hexagon.map(lambda part, rows=rows: part[:, rows])
                hexagon = hexagon.replaced(rows, _by_rows(work, rows, clock, together).within(old).tightened())
        if k < pair.shared:
            zero = torch.zeros_like(hexagon.dl)
            hexagon = hexagon.with_difference(zero, zero).tightened()
        layers.append(hexagon)
        if last:
            return tuple(layers)
        work.add(hexagon)
    raise AssertionError("a network has at least one affine layer")


def _zonotopes(work: Backward, clock: Clock, memory: float) -> list[Bounds]:
    """Bounds [B, N] of the layers after the first of either network, from inputs that vary."""
    pair, wide = work.pair, (work.radius > 0).any(0).nonzero().flatten()
    size, result = torch.maximum(work.lower.abs(), work.upper.abs()), []
    inputs = work.radius.new_zeros(len(size), 1 + len(wide), pair.inputs)
    inputs[:, 0] = work.middle
    inputs[:, 1 + torch.arange(len(wide), device=wide.device), wide] = work.radius[:, wide]
    for network in (pair.first, pair.second):
        step = network[0]
        if BUFFERS * inputs.element_size() * inputs[:, :, 0].numel() * step.features > memory:
            result.append(interval_bounds(network, inputs, torch.zeros_like(size))[1:])
            continue
        slack = step.with_noise(2 * gamma(step.terms + pair.inputs) * (step.magnitude(size) + step.bias_magnitude))
        rows = step.map_rows(inputs, clock)
        # Its own product: then its last bits do not depend on how many inputs vary.
        rows[:, 0] = middle = step.linear(work.middle) + step.bias
        spread = rows[:, 1:].abs().sum(1) + slack
        rows, slack = bent(step, rows, slack, middle - spread, middle + spread)
        result.append(zonotope_bounds(network, rows, slack, 1, clock, memory))
    return result


def _cheap(work: Backward, before: Hexagon, first: Ends, second: Ends) -> Hexagon:
    """Bounds of the first layer not yet added: both networks' (lower, upper), and z - z2 from the layer `before`."""
    k = len(work.hexagons)
    return Hexagon(*first, *second, *forward_difference(work.pair, k, before, work.errors[k][1])).tightened()


def forward_difference(pair: Pair, k: int, before: Hexagon | Ends, Q: Tensor) -> Ends:
    """Bounds of z - z2 of layer k by interval arithmetic; Q as `Pair.error`.

    before: bounds of the layer before; for the first layer the input's middle and radius.
    """
    if not isinstance(before, Hexagon):
        middle, radius = before
        d, spread = pair.maps[k].forth(middle)[1] + pair.db[k], pair.maps[k].spread(radius) + Q
    else:
        (a, da), (e, de) = map(_middle, activated(pair.first[k - 1], before))
        d = pair.maps[k].forth(a, e)[1] + pair.db[k]
        spread = pair.maps[k].spread(da) + pair.second[k].magnitude(de) + Q
    return d - spread, d + spread


def _middle(ends: Ends) -> Ends:
    """Middle and radius of values between two ends [B, N]."""
    low, high = ends
    return (high + low) / 2, (high - low) / 2


@torch.no_grad()
def interval_difference(pair: Pair, lower: Tensor, upper: Tensor) -> Hexagon:
    """Bounds of the outputs as of `difference_bounds`, by interval arithmetic alone: a few products with vectors."""
    lower, upper = checked_boxes(pair, lower, upper)
    size = torch.maximum(lower.abs(), upper.abs())
    a1 = a2 = lower, upper
    before, E = None, torch.zeros_like(size)
    for k in range(pair.depth):
        P, Q = (2 * part for part in pair.error(k, size, E))
        (a, da), (a_, da_) = _middle(a1), _middle(a2)
        z, dz = pair.first[k].linear(a) + pair.b[k], pair.first[k].magnitude(da) + P
        y, dy = pair.second[k].linear(a_) + pair.b[k] - pair.db[k], pair.second[k].magnitude(da_) + P + Q
        ends = forward_difference(pair, k, (a, da) if before is None else before, Q)
        before = Hexagon(z - dz, z + dz, y - dy, y + dy, *ends).tightened()
        if k < pair.shared:
            zero = torch.zeros_like(dz)
            before = before.with_difference(zero, zero).tightened()
        a1 = activated(pair.first[k], before)[0]
        a2 = activated(pair.first[k], before.swapped())[0]
        size, E = sizes(pair.first[k], before)
    assert before is not None
    return before


def _by_rows(work: Backward, rows: Tensor, clock: Clock, together: Clock | None = None) -> Hexagon:
    """Backward bounds [B, R] of the neurons `rows` [R] of the first layer not yet added."""
    pair, k, size = work.pair, len(work.hexagons), len(work.lower)
    limit = max(CHUNK // (6 * SPREAD * size * max(maps.widest for maps in pair.maps[: k + 1])), 1)
    parts = []
    for some in rows.split(limit):
        clock.check()
        (W, V, D), b, db = work.columns(k, some), pair.b[k][some], pair.db[k][some]
        alpha, beta = torch.cat((W, W - D, D)), torch.cat((torch.zeros_like(V), -V, V))
        P, Q = (part[:, some] for part in work.errors[k])
        constant, error = torch.cat((b, b - db, db)), torch.cat((P, P + Q, Q), 1)
        value = _either(work, torch.cat((alpha, -alpha))[None], torch.cat((beta, -beta))[None])
        if together is not None:
            value = torch.minimum(value, spectral.above(work, W, V, D, together).flatten(1))
        value = value + torch.cat((constant, -constant)) + error.repeat(1, 2)
        parts.append(value.expand(size, -1).reshape(size, 6, -1))
    u1, u2, du, l1, l2, dl = torch.cat(parts, 2).unbind(1)
    return Hexagon(-l1, u1, -l2, u2, -dl, du)


def _either(work: Backward, alpha: Tensor, beta: Tensor) -> Tensor:
    value = work.bound(alpha, beta, work.best)[0]
    return torch.minimum(value, work.bound(alpha, beta, work.apart)[0]) if work.hexagons else value
