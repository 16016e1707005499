"""What rounding of activations does to a deployed network: exact codes of points, and a relaxation over a box.

A deployed network alternates affine steps and quantisers (`graph.quantizer`). The kernels that execute it do not
evaluate z = W x + b exactly, so a code is known only where z keeps away from thresholds by

    integer arithmetic    9 u |z| + 20 u |b|                 the sum is exact in int32, then a few roundings
    float32 arithmetic    2 (n + 16) u (|W| |x| + |b|)       n terms per sum      (Higham, ch. 3)
    both                  256 u scale                        some kernels (onednn's, and fbgemm's for the input) add the
                                                             zero point in float32 before they round
    a rule of the sums    0                                  LiteRT's and onnxruntime's, see `graph.requantise`

with u = 2^-24; nearer than that both codes are possible, and both are followed. Where pairs of products saturate in
int16, `Step.sums` says what that takes off the sums (`graph.kernels`): exactly where the codes are known, else a
range of it. A network that may be executed in several ways is followed through each.

    outputs(steps, values)     all outputs that codes at the input can lead to: exact but for the rows above
    relax(steps, low, high)    a ReLU network with bounded noise that contains the deployed network over a box:
                               Q(z) = relu(z + e), with e in the range of Q - identity over what z can be

The range of Q(z) - z is [-scale / 2, scale / 2] where thresholds are crossed, what is left of it where none is, and
includes what saturation takes off. Errors of the input quantiser become inputs of their own, so that all
first-layer neurons share them; constant inputs are folded into the bias.

Axis letters: B points, N features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.roundoff import SINGLE, ball, gamma
from torchreach.domains.input_grid import InputGrid
from torchreach.domains.stairs import Stairs, clamped_line, excess
from torchreach.domains.zonotope import box_rows, relu_band
from torchreach.graph.layers import RESHAPING, ElementwiseAffine
from torchreach.graph.roundings import leaves
from torchreach.graph.steps import Step
from torchreach.graph.twins import check_entries, dense
from torchreach.graph.weights import linear_layer

# Neurons of a layer, per point, whose two codes are followed apart; beyond, intervals.
APART = 6
# Rows that following codes apart may add to a batch, as a multiple of it.
GROWTH = 4


def kernel_error(step: Step, z: Tensor, x: Tensor) -> Tensor:
    """Bound [B, N_out] on |computed - real| of the step's affine block: |real| <= z [B, N_out], |inputs| <= x."""
    if step.quantizer is not None and step.quantizer.exact:
        return torch.zeros_like(z)
    offset = 0.0 if step.quantizer is None else SINGLE * step.quantizer.largest_sum
    if is_identity(step):
        return 4 * SINGLE * z + offset
    if step.quantizer is not None and step.quantizer.arithmetic == "integer":
        return SINGLE * (9 * z + 20 * step.bias_magnitude) + offset
    return 2 * gamma(step.terms + 8, SINGLE) * (step.magnitude(x) + step.bias_magnitude) + offset


@torch.no_grad()
def outputs(steps: tuple[Step, ...], values: Tensor, radius: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """All outputs of the steps at exact inputs `values` [B, N_in]: rows (index of the point [R], low, high [R, N_out]).

    radius: [B, N_in] for all inputs within it of `values` instead, by interval arithmetic.

    Guarantee: whatever kernel within `kernel_error` executes the steps, in any of the ways of their sums, its output
    at point b lies in [low, high] of some row with index b. low == high up to rounding wherever at most `APART` codes
    of each layer are in doubt.
    """
    found = [_outputs(steps, values, radius, way) for way in range(ways(steps))]
    return found[0] if len(found) == 1 else tuple(torch.cat(part) for part in zip(*found, strict=True))  # type: ignore


def ways(steps: tuple[Step, ...]) -> int:
    """In how many ways the network may add up."""
    return max((len(step.sums.pairings) for step in steps if step.sums is not None), default=1)


def _outputs(steps: tuple[Step, ...], values: Tensor, radius: Tensor | None, way: int) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.arange(len(values), device=values.device)
    middle, radius = values, torch.zeros_like(values) if radius is None else radius
    low = high = middle
    for step in steps:
        size = middle.abs() + radius
        # |W| |x| <= |W| 1 max |x| is enough for what float64 rounds off.
        share = gamma(step.terms)
        spread = step.magnitude(torch.ones_like(size[:1])) * size.amax(1, keepdim=True) if size.shape[1] else 0.0
        spread = step.with_noise(share * (spread + step.bias_magnitude))
        z = step.linear(middle) + step.bias
        spread = spread.expand_as(z).clone()
        wide = (radius > 0).any(1).nonzero().flatten()
        if len(wide):
            spread[wide] += step.magnitude(radius[wide] * (1 + share))
        lost = None if step.sums is None else step.sums.loss(way, middle - radius, middle + radius)
        if lost is not None:
            z = z + (lost[0] + lost[1]) / 2
            spread = spread + (lost[1] - lost[0]) / 2 + share * (lost[0].abs() + lost[1].abs())
        spread = spread + kernel_error(step, z.abs() + spread, size)
        low, high = z - spread, z + spread
        if step.quantizer is not None:
            codes = step.quantizer.executed_range(
                step.quantizer.code_range(low, high), middle - radius, middle + radius
            )
            parent, low, high = _apart(*codes, 64 + GROWTH * len(values))
            index = index[parent]
            low, high = step.quantizer.value(low), step.quantizer.value(high)
        elif step.relu is not None:
            low = torch.where(step.relu, low.clamp(min=0), low)
            high = torch.where(step.relu, high.clamp(min=0), high)
        middle, radius = ball(low, high)
        radius = torch.where(low == high, 0.0, radius)
    return index, low, high


def _apart(low: Tensor, high: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of code ranges [B, N] with two-code entries, if few, split into rows of one code: (parent, low, high)."""
    parent = torch.arange(len(low), device=low.device)
    doubtful = (high - low == 1) & ((high > low).sum(1, keepdim=True) <= APART)
    for _ in range(APART):
        rows = doubtful.any(1).nonzero().flatten()
        if not len(rows) or len(parent) + len(rows) > limit:
            break
        at = doubtful[rows].byte().argmax(1)
        upper_low, lower_high = low[rows], high[rows].clone()
        upper_low[torch.arange(len(rows), device=at.device), at] += 1
        lower_high[torch.arange(len(rows), device=at.device), at] -= 1
        high, old_high = high.index_copy(0, rows, lower_high), high[rows]
        low, high = torch.cat((low, upper_low)), torch.cat((high, old_high))
        parent = torch.cat((parent, parent[rows]))
        doubtful[rows, at] = False
        doubtful = torch.cat((doubtful, doubtful[rows]))
    return parent, low, high


@dataclass(frozen=True)
class Relaxed:
    """A ReLU network with noise, and then a clamp to [lowest, highest], that contains a deployed network over one box.

    Its inputs are those of the network and then `extra` variables in [-1, 1], one for each input that the input
    quantiser rounds in more than one way.
    saturable: names of layers in which a pair of products can leave int16 over the box, whichever engine pairs them.
    stairs: of each step what its neurons' noise is made of. after: [N_out] noise of the outputs once they are rounded.
    """

    steps: tuple[Step, ...]
    extra: int
    lowest: Tensor  # [N_out]
    highest: Tensor
    saturable: tuple[str, ...]
    stairs: tuple[Stairs | None, ...]
    after: Tensor


@torch.no_grad()
def relax(
    steps: tuple[Step, ...], lower: Tensor, upper: Tensor, grid: InputGrid | None, *, clock: Clock = NO_LIMIT
) -> Relaxed:
    """Relaxation of the deployed `steps` over one box [N_in]; grid: `InputGrid.of(steps[0])`, or part of its codes.

    Guarantee: for every input in the box, whatever kernel within `kernel_error` executes the steps, its output is the
    clamp of the relaxed network's for some values of its extra inputs and its noise.

    Raises: UnsupportedLayerError: an affine step too large to be a matrix. OutOfTime: the clock is over at some step.
    """
    step, rest, size = _entry(steps, lower, upper, grid)
    values = (lower, upper) if grid is None else tuple(grid.quantizer.value(code) for code in grid.codes(lower, upper))
    saturable = []
    extra = step.in_shape[0] - len(lower)
    ones = lower.new_ones(extra)
    rows, slack = box_rows(torch.cat((lower, -ones))[None], torch.cat((upper, ones))[None])
    result, stairs = list[Step](), list[Stairs | None]()
    while True:
        clock.check()
        if step.sums is not None:
            saturable += [part.name for part in leaves(step.sums) if part.saturates(*values)]
        step = _with_loss(step, *values)
        low, high = _range(*_mapped(step, rows, slack, clock))
        last = not rest or (len(rest) == 1 and step.quantizer is not None and is_identity(rest[0]))
        step, values, rounded = _relaxed_step(step, low[0], high[0], size, last=last)
        size = torch.maximum(*(end.abs() for end in values))
        result.append(step)
        stairs.append(rounded)
        if last:
            quantizer = steps[-2].quantizer if rest else None
            lowest, highest = (torch.full_like(low[0], end) for end in (-torch.inf, torch.inf))
            if quantizer is not None:
                ends = (quantizer.lowest, quantizer.highest)
                lowest, highest = (quantizer.value(torch.as_tensor(end).to(low[0])).expand_as(low[0]) for end in ends)
            after = torch.zeros_like(size) if rounded is None else 4 * SINGLE * rounded.largest
            return Relaxed(tuple(result), extra, lowest, highest, tuple(saturable), tuple(stairs), after)
        rows, slack = _mapped(step, rows, slack, clock)
        if step.relu is not None and bool(step.relu.any()):
            rows, slack = relu_band(rows, slack, *_range(rows, slack), step.relu)
        step = rest.pop(0)


def _mapped(step: Step, rows: Tensor, slack: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
    """Zonotopes [B, 1 + G, N] and their error [B, N] after the step's affine block, rounding and noise included."""
    share = gamma(step.terms + rows.shape[1])
    slack = step.magnitude(slack + share * rows.abs().sum(1)) + share * step.bias_magnitude
    rows = step.map_rows(rows, clock)
    slack = slack + share * rows.abs().sum(1)
    return rows, step.with_noise(slack)


def _range(rows: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    spread = rows[:, 1:].abs().sum(1) + slack
    return rows[:, 0] - spread, rows[:, 0] + spread


def _entry(
    steps: tuple[Step, ...], lower: Tensor, upper: Tensor, grid: InputGrid | None
) -> tuple[Step, list[Step], Tensor]:
    """First affine step on inputs and errors of the input quantiser, the steps after it, how large its inputs are."""
    size = torch.maximum(lower.abs(), upper.abs())
    if grid is None:
        return (
            _linear_step(
                steps[0], _matrix(steps[0]), steps[0].bias, _composed(steps[0], size), steps[0].bias_magnitude
            ),
            list(steps[1:]),
            size,
        )
    first, matrix = steps[1], _matrix(steps[1])
    low, high = grid.codes(lower, upper)
    ends = torch.stack((grid.scale * lower + grid.shift, grid.scale * upper + grid.shift))
    slope, middle, radius = clamped_line(grid.quantizer, ends.amin(0), ends.amax(0), grid.error(size), (low, high))
    fixed = low == high
    slope = torch.where(fixed, 0.0, slope)
    middle = torch.where(fixed, grid.quantizer.value(low), middle + slope * grid.shift)
    columns = torch.cat((matrix * (slope * grid.scale), (matrix * radius)[:, ~fixed]), 1)
    size = torch.maximum(grid.quantizer.value(low).abs(), grid.quantizer.value(high).abs())
    noise = _composed(first, ends.abs().amax(0) + size + middle.abs() + radius)
    # What kernels round off in the sum is all in its terms: the columns are no longer what they multiply.
    step = _linear_step(first, columns, first.bias + matrix @ middle, noise, _terms(first, size))
    return step, list(steps[2:]), size.new_zeros(columns.shape[1])


def saturation(step: Step, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
    """Range [B, N_out] of what saturation adds to the step's sums, in any of its ways, for inputs in [low, high]."""
    every = [] if step.sums is None else [step.sums.loss(way, low, high) for way in range(len(step.sums.pairings))]
    if all(lost is None for lost in every):
        return None
    none = torch.zeros_like(step.bias)[None]
    least = torch.stack([none.expand(len(low), -1) if lost is None else lost[0] for lost in every]).amin(0)
    most = torch.stack([none.expand(len(low), -1) if lost is None else lost[1] for lost in every]).amax(0)
    return least, most


def _with_loss(step: Step, low: Tensor, high: Tensor) -> Step:
    """The step, for inputs in [low, high] [N_in], with what saturation may add to its sums as bias and noise."""
    lost = saturation(step, low[None], high[None])
    step = replace(step, sums=None)
    if lost is None:
        return step
    middle, noise = ball(lost[0][0], lost[1][0])
    size = step.bias_magnitude + middle.abs()
    return replace(step, bias=step.bias + middle, bias_magnitude=size, noise=step.with_noise(noise))


def _relaxed_step(
    step: Step, low: Tensor, high: Tensor, size: Tensor, *, last: bool
) -> tuple[Step, tuple[Tensor, Tensor], Stairs | None]:
    """The step, with z in [low, high] [N_out] and inputs |x| <= size, as affine, noise and ReLU.

    last: a quantiser here rounds the outputs; its clamp is left to `Relaxed`.
    Returns also the range of the activations, and what the noise is made of if a quantiser makes it.
    """
    kernel = kernel_error(step, torch.maximum(low.abs(), high.abs())[None], size[None])[0]
    noise = step.with_noise(kernel)
    largest, unclamped = torch.maximum(low.abs(), high.abs()) + kernel, None
    if step.quantizer is None:
        return replace(step, noise=noise), (low - kernel, high + kernel), None
    if last:
        # After the quantiser there is one product in float32.
        codes = unclamped = step.quantizer.code_range(low - kernel, high + kernel, clamped=False)
        shift, radius = excess(step.quantizer, low, high, kernel, codes)
        noise, relu = noise - kernel + radius + 4 * SINGLE * (largest + shift.abs() + radius), None
    else:
        relu = step.quantizer.rectifies.expand_as(low).clone()
        ends = torch.where(relu, low.clamp(min=0), low), torch.where(relu, high.clamp(min=0), high)
        shift, radius = excess(step.quantizer, *ends, kernel)
        noise = noise - kernel + radius
    own = step.with_noise(kernel)  # of the affine block, without what is rounded
    codes = step.quantizer.code_range(low - kernel, high + kernel)
    known = codes if unclamped is None else unclamped
    ends = (step.quantizer.value(codes[0]), step.quantizer.value(codes[1]))
    stairs = Stairs.of(step.quantizer, known, largest, shift, radius, noise, own)
    layer = step.block[0] if len(step.block) == 1 else None
    if not last and isinstance(layer, nn.Linear):
        # Where no threshold is crossed the neuron is a constant.
        constant = codes[0] == codes[1]
        matrix = torch.where(constant[:, None], 0.0, layer.weight)
        bias = torch.where(constant, step.quantizer.value(codes[0]), step.bias + shift)
        noise = torch.where(constant, 0.0, noise)
        stairs = stairs.fixed(constant)
        return replace(_linear_step(step, matrix, bias, noise), relu=relu, quantizer=None), ends, stairs
    changed = {"bias": step.bias + shift, "bias_magnitude": step.bias_magnitude + shift.abs()}
    return replace(step, noise=noise, relu=relu, quantizer=None, **changed), ends, stairs


def with_inputs(steps: tuple[Step, ...], at: int, extra: int, size: Tensor) -> tuple[Step, ...]:
    """The steps with `extra` more inputs from position `at` on, which they ignore; |x| <= size [N_in]."""
    matrix = _matrix(steps[0])
    matrix = torch.cat((matrix[:, :at], matrix.new_zeros(len(matrix), extra), matrix[:, at:]), 1)
    return (_linear_step(steps[0], matrix, steps[0].bias, _composed(steps[0], size)), *steps[1:])


def restricted(steps: tuple[Step, ...], x: Tensor, free: Tensor, size: Tensor) -> tuple[Step, ...]:
    """The steps as a function of inputs `free` [M] (indices) alone, the others fixed to x; |x| <= size, both [N_in]."""
    if len(free) == len(x):
        return steps
    first = steps[0]
    fixed = x.clone()
    fixed[free] = 0
    units = x.new_zeros(len(free), len(x))
    units[torch.arange(len(free), device=x.device), free] = 1
    bias = first.linear(fixed[None])[0] + first.bias
    matrix = first.linear(units).T.contiguous()
    head = _linear_step(first, matrix, bias, _composed(first, size), _terms(first, size))
    sums, quantizer = (part and part.restricted(x, free) for part in (first.sums, first.quantizer))
    return (replace(head, sums=sums, quantizer=quantizer), *steps[1:])


def varying(
    first: tuple[Step, ...], second: tuple[Step, ...], lower: Tensor, upper: Tensor
) -> tuple[tuple[Step, ...], tuple[Step, ...], Tensor]:
    """Both networks on the inputs that vary over a box [N_in], or whose codes do, and which [M] these are."""
    grids = [InputGrid.of(steps[0]) for steps in (first, second)]
    free = upper > lower
    for grid in grids:
        if grid is not None:
            low, high = grid.codes(lower, upper)
            free = free | (low != high)
    free[0] |= ~free.any()  # a network of no inputs is no network
    index = free.nonzero().flatten()
    size = torch.maximum(lower.abs(), upper.abs())
    networks = []
    for steps, grid in zip((first, second), grids, strict=True):
        if grid is None:
            networks.append(restricted(steps, lower, index, size))
            continue
        ends = [grid.quantizer.value(code) for code in grid.codes(lower, upper)]
        rest = restricted(steps[1:], ends[0], index, torch.maximum(ends[0].abs(), ends[1].abs()))
        layer = ElementwiseAffine(grid.scale[index], grid.shift[index])
        bias, magnitude = grid.shift[index], steps[0].bias_magnitude[index]
        head = replace(
            steps[0], block=nn.Sequential(layer), in_shape=(len(index),), bias=bias, bias_magnitude=magnitude
        )
        networks.append((head, *rest))
    return networks[0], networks[1], index


def blank(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """A network of the same architecture whose outputs are zero: a difference from it is a network's own range."""
    return tuple(
        replace(_linear_step(step, torch.zeros_like(_matrix(step)), torch.zeros_like(step.bias), None), terms=1)
        for step in steps
    )


def _composed(step: Step, size: Tensor) -> Tensor:
    """Noise [N_out]: what rounding does to a step as one matrix and one bias, for inputs |x| <= size [N_in]."""
    return step.with_noise(2 * gamma(step.terms + 8) * (step.magnitude(size[None])[0] + step.bias_magnitude))


def is_identity(step: Step) -> bool:
    return all(isinstance(layer, RESHAPING) for layer in step.block)


def _matrix(step: Step) -> Tensor:
    check_entries(step, "rounding is bounded for affine steps")
    return dense(step)


def _terms(step: Step, size: Tensor) -> Tensor:
    """What `kernel_error` reads as the bias of a step that is about to be composed, for inputs |x| <= size [N_in].

    In the new bias the terms of the old one may cancel against products; in what a kernel computes they do not.
    """
    if step.quantizer is not None and step.quantizer.arithmetic == "integer":
        return step.bias_magnitude
    return step.magnitude(size[None])[0] + step.bias_magnitude


def _linear_step(step: Step, matrix: Tensor, bias: Tensor, noise: Tensor | None, terms: Tensor | None = None) -> Step:
    layer = linear_layer(matrix, bias)
    return replace(
        step,
        block=nn.Sequential(layer),
        in_shape=(matrix.shape[1],),
        bias=bias,
        bias_magnitude=bias.abs() if terms is None else torch.maximum(bias.abs(), terms),
        terms=max(step.terms, matrix.shape[1] + 1),
        noise=noise,
    )
