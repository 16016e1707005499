"""What rounding of activations does to a deployed network: exact codes of points, and a relaxation over a box.

A deployed network alternates affine steps and quantisers (`networks.quantizer`). The kernels that execute it do not
evaluate z = W x + b exactly, so a code is known only where z keeps away from thresholds by

    integer arithmetic    9 u |z| + 20 u |b|                 the sum is exact in int32, then a few roundings
    float32 arithmetic    2 (n + 16) u (|W| |x| + |b|)       n terms per sum      (Higham, ch. 3)

with u = 2^-24; nearer than that both codes are possible, and both are followed. This covers fbgemm and onednn as they
execute on x86 with VNNI instructions; kernels without them may saturate sums of two products (AVX2, codes above 127),
which no bound here covers.

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

from torchreach.bounds.zonotope import relu_band
from torchreach.errors import UnsupportedLayerError
from torchreach.networks.builder import linear_layer
from torchreach.networks.layers import RESHAPING
from torchreach.networks.quantizer import Quantizer
from torchreach.networks.steps import Step
from torchreach.tolerances import UNIT_ROUNDOFF

SINGLE = 2.0**-24  # unit roundoff of float32
INPUT_ERROR = 8 * SINGLE  # relative: rounding the input to float32, times the reciprocal of a float32 scale
# Neurons of a layer, per point, whose two codes are followed apart; beyond, intervals.
APART = 6
# Rows that following codes apart may add to a batch, as a multiple of it.
GROWTH = 4


def kernel_error(step: Step, z: Tensor, x: Tensor) -> Tensor:
    """Bound [B, N_out] on |computed - real| of the step's affine block: |real| <= z [B, N_out], |inputs| <= x."""
    if _is_identity(step):
        return 4 * SINGLE * z
    if step.quantizer is not None and step.quantizer.arithmetic == "integer":
        return SINGLE * (9 * z + 20 * step.bias_magnitude)
    return 2 * (step.terms + 16) * SINGLE * (step.magnitude(x) + step.bias_magnitude)


@torch.no_grad()
def outputs(steps: tuple[Step, ...], values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All outputs of the steps at exact inputs `values` [B, N_in]: rows (index of the point [R], low, high [R, N_out]).

    Guarantee: whatever kernel within `kernel_error` executes the steps, its output at point b lies in [low, high] of
    some row with index b. low == high up to rounding wherever at most `APART` codes of each layer are in doubt.
    """
    index = torch.arange(len(values), device=values.device)
    middle, radius = values, torch.zeros_like(values)
    for step in steps:
        size = middle.abs() + radius
        gamma = (step.terms + 8) * UNIT_ROUNDOFF
        spread = step.magnitude(radius + gamma * size) + gamma * step.bias_magnitude
        if step.noise is not None:
            spread = spread + step.noise
        z = step.linear(middle) + step.bias
        spread = spread + kernel_error(step, z.abs() + spread, size)
        low, high = z - spread, z + spread
        if step.quantizer is not None:
            parent, low, high = _apart(*step.quantizer.code_range(low, high), GROWTH * len(values))
            index = index[parent]
            low, high = step.quantizer.value(low), step.quantizer.value(high)
        elif step.relu is not None:
            low = torch.where(step.relu, low.clamp(min=0), low)
            high = torch.where(step.relu, high.clamp(min=0), high)
        middle = (low + high) / 2
        radius = torch.where(low == high, 0.0, (high - low) / 2 * (1 + 4 * UNIT_ROUNDOFF))
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
class InputGrid:
    """The quantiser of the inputs: x -> scale x + shift, both [N], then `quantizer`."""

    scale: Tensor
    shift: Tensor
    quantizer: Quantizer

    @staticmethod
    def of(step: Step) -> InputGrid | None:
        """The grid of a first step that is elementwise and ends in a quantiser, else None."""
        if step.quantizer is None:
            return None
        n_in = int(torch.tensor(step.in_shape).prod())
        if n_in != step.features:
            return None
        zero = step.bias.new_zeros(1, n_in)
        scale = step.linear(zero + 1)[0]
        # Elementwise: what one unit at a time gives is what all give together. Probed by two independent vectors,
        # and by magnitudes, which cannot cancel.
        probe = torch.linspace(1, 2, n_in, dtype=zero.dtype, device=zero.device)[None]
        elementwise = torch.equal(step.linear(probe)[0], scale * probe[0])
        elementwise = elementwise and torch.equal(step.magnitude(zero + 1)[0], scale.abs()) and bool((scale != 0).all())
        if not elementwise or not torch.equal(step.magnitude(probe)[0], scale.abs() * probe[0]):
            return None
        return InputGrid(scale, step.bias, step.quantizer)

    def error(self, x: Tensor) -> Tensor:
        """Bound on what rounding does to scale x + shift before it is quantised."""
        return INPUT_ERROR * ((self.scale * x).abs() + 2 * self.shift.abs())

    def codes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest code [..., N] of inputs in [low, high]."""
        ends = torch.stack((low, high))
        z, error = self.scale * ends + self.shift, self.error(ends)
        return self.quantizer.code_range((z - error).amin(0), (z + error).amax(0))

    def cell(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Ends [..., N] of the closed set of inputs that may get these codes, infinite at the last codes."""
        low, high = self.quantizer.cell(codes)
        size = torch.where(low.isfinite(), low.abs(), 0.0) + torch.where(high.isfinite(), high.abs(), 0.0)
        error = 2 * INPUT_ERROR * (size + 4 * self.shift.abs())
        ends = torch.stack(((low - error - self.shift) / self.scale, (high + error - self.shift) / self.scale))
        return ends.amin(0), ends.amax(0)


def _excess(quantizer: Quantizer, low: Tensor, high: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Range (middle, radius) of Q(computed z) - z over z in [low, high]."""
    low, high = low - kernel, high + kernel
    first, last = quantizer.code_range(low, high)
    half = torch.where(last > first, quantizer.scale / 2, 0.0)
    most = torch.maximum(quantizer.value(first) - low, half) + kernel
    least = torch.minimum(quantizer.value(last) - high, -half) - kernel
    radius = (most - least) / 2
    return (most + least) / 2, radius + 4 * UNIT_ROUNDOFF * (most.abs() + least.abs() + high.abs() + low.abs())


@torch.no_grad()
def relax(steps: tuple[Step, ...], lower: Tensor, upper: Tensor) -> tuple[Step, ...]:
    """ReLU network with noise that contains the deployed `steps` for every input of one box [N_in].

    Its inputs are those of the steps and then one variable in [-1, 1] for each that the input quantiser rounds in
    more than one way over the box; `with_errors` says how many. Between [lower, upper] and the network's output
    nothing is lost but what noise is taken to be independent.

    Raises: UnsupportedLayerError: an affine step too large to be a matrix.
    """
    grid = InputGrid.of(steps[0])
    first = steps[1] if grid is not None else steps[0]
    matrix, bias = _matrix(first), first.bias
    size = torch.maximum(lower.abs(), upper.abs())
    if grid is None:
        keep, columns, noise = matrix, matrix[:, :0], _composed(first, size)
    else:
        low, high = grid.codes(lower, upper)
        ends = torch.stack((grid.scale * lower + grid.shift, grid.scale * upper + grid.shift))
        kernel = grid.error(size)
        middle, radius = _excess(grid.quantizer, ends.amin(0), ends.amax(0), kernel)
        fixed = low == high
        middle = torch.where(fixed, grid.quantizer.value(low), middle + grid.shift)
        keep = matrix * torch.where(fixed, 0.0, grid.scale)
        columns = (matrix * radius)[:, ~fixed]
        bias = bias + matrix @ middle
        size = torch.maximum(grid.quantizer.value(low).abs(), grid.quantizer.value(high).abs())
        noise = _composed(first, ends.abs().amax(0) + size + middle.abs() + radius)
    box = torch.stack((lower, upper)).mean(0), (upper - lower) / 2 * (1 + 4 * UNIT_ROUNDOFF)
    extra = columns.shape[1]
    rows = torch.diag(torch.cat((box[1], box[1].new_ones(extra))))
    rows = torch.cat((torch.cat((box[0], box[0].new_zeros(extra)))[None], rows))
    slack = 4 * UNIT_ROUNDOFF * rows.abs().sum(0)
    step = _linear_step(first, torch.cat((keep, columns), 1), bias, noise)
    rest = list(steps[2:] if grid is not None else steps[1:])
    result: list[Step] = []
    rows, slack = rows[None], slack[None]
    while True:
        gamma = (step.terms + rows.shape[1] + 8) * UNIT_ROUNDOFF
        slack = step.magnitude(slack + gamma * rows.abs().sum(1)) + gamma * step.bias_magnitude
        rows = step.map_rows(rows)
        added = torch.zeros_like(step.bias) if step.noise is None else step.noise
        spread = rows[:, 1:].abs().sum(1) + slack + gamma * rows.abs().sum(1) + added
        low, high = (rows[:, 0] - spread)[0], (rows[:, 0] + spread)[0]
        kernel = kernel_error(step, torch.maximum(low.abs(), high.abs()), size[None])[0]
        relu = step.relu
        if step.quantizer is None:
            shift, added = torch.zeros_like(kernel), added + kernel
            size = torch.maximum(low.abs(), high.abs()) + kernel
        else:
            fused = step.quantizer.lowest == int(step.quantizer.zero_point)
            ends = (low.clamp(min=0), high.clamp(min=0)) if fused else (low, high)
            shift, radius = _excess(step.quantizer, *ends, kernel)
            added = added + radius
            relu = torch.full_like(low, fused, dtype=torch.bool)
            codes = step.quantizer.code_range(low - kernel, high + kernel)
            size = torch.maximum(*(step.quantizer.value(code).abs() for code in codes))
        step = replace(step, bias=step.bias + shift, bias_magnitude=step.bias_magnitude + shift.abs())
        step = replace(step, noise=added, relu=relu, quantizer=None)
        rows[:, 0] += shift
        slack = slack + added
        spread = rows[:, 1:].abs().sum(1) + slack + gamma * rows.abs().sum(1)
        low, high = rows[:, 0] - spread, rows[:, 0] + spread
        result.append(step)
        if not rest:
            return tuple(result)
        if len(rest) == 1 and _is_identity(rest[0]) and relu is not None and not bool(relu.any()):
            # Rounded outputs: the step after the quantiser is the identity, up to one product in float32.
            last = 4 * SINGLE * torch.maximum(low.abs(), high.abs())[0]
            result[-1] = replace(step, name="output", relu=None, noise=added + last)
            return tuple(result)
        assert relu is not None
        if bool(relu.any()):
            rows, slack = relu_band(rows, slack, low, high, relu)
        step = rest.pop(0)


def extra_inputs(steps: tuple[Step, ...], relaxed: tuple[Step, ...]) -> int:
    """How many variables `relax` has added to the inputs."""
    return relaxed[0].in_shape[0] - int(torch.tensor(steps[0].in_shape).prod())


def with_inputs(steps: tuple[Step, ...], at: int, extra: int, size: Tensor) -> tuple[Step, ...]:
    """The steps with `extra` more inputs from position `at` on, which they ignore; |x| <= size [N_in]."""
    matrix = _matrix(steps[0])
    matrix = torch.cat((matrix[:, :at], matrix.new_zeros(len(matrix), extra), matrix[:, at:]), 1)
    return (_linear_step(steps[0], matrix, steps[0].bias, _composed(steps[0], size)), *steps[1:])


def restricted(steps: tuple[Step, ...], x: Tensor, free: Tensor, size: Tensor) -> tuple[Step, ...]:
    """The steps as a function of inputs `free` [M] (indices) alone, the others fixed to x; |x| <= size, both [N_in]."""
    first = steps[0]
    fixed = x.clone()
    fixed[free] = 0
    units = x.new_zeros(len(free), len(x))
    units[torch.arange(len(free), device=x.device), free] = 1
    bias = first.linear(fixed[None])[0] + first.bias
    return (_linear_step(first, first.linear(units).T.contiguous(), bias, _composed(first, size)), *steps[1:])


def blank(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """A network of the same architecture whose outputs are zero: a difference from it is a network's own range."""
    return tuple(
        replace(_linear_step(step, torch.zeros_like(_matrix(step)), torch.zeros_like(step.bias), None), terms=1)
        for step in steps
    )


def _composed(step: Step, size: Tensor) -> Tensor:
    """Noise [N_out]: what rounding does to a step as one matrix and one bias, for inputs |x| <= size [N_in]."""
    gamma = 2 * (step.terms + 16) * UNIT_ROUNDOFF
    noise = gamma * (step.magnitude(size[None])[0] + step.bias_magnitude)
    return noise if step.noise is None else noise + step.noise


def _is_identity(step: Step) -> bool:
    return all(isinstance(layer, RESHAPING) for layer in step.block)


def _matrix(step: Step) -> Tensor:
    n_in = int(torch.tensor(step.in_shape).prod())
    if n_in * step.features > 2**26:
        raise UnsupportedLayerError(
            f"rounding is bounded for affine steps of at most {2**26} entries as matrices; "
            f"{step.name} has {step.features} x {n_in}"
        )
    return step.linear(torch.eye(n_in, dtype=step.bias.dtype, device=step.bias.device)).T.contiguous()


def _linear_step(step: Step, matrix: Tensor, bias: Tensor, noise: Tensor | None) -> Step:
    layer = linear_layer(matrix, bias)
    return replace(
        step,
        block=nn.Sequential(layer),
        in_shape=(matrix.shape[1],),
        bias=bias,
        bias_magnitude=bias.abs(),
        terms=max(step.terms, matrix.shape[1] + 1),
        noise=noise,
    )
