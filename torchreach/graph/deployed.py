"""A deployed network as its runtime executes it: operations on integer codes, exact on every device.

    entry      x -> codes on the input's grid
    operation  codes -> codes: integer sums, and a rule (`graph.requantise`) that makes codes of them
    forward    what the last codes stand for, float32

Integers are added up in float64, which is exact below 2^53, so that convolutions run on CPU and CUDA alike. An
operation also says which real-valued layers it rounds the result of (`layers`), which is how verbs bound it; one that
has none yet says so (`unbounded`), and can only be executed.

Axis letters: B points, N features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchreach.core.errors import OptionError, ShapeError
from torchreach.core.roundoff import SINGLE, floor_log2, gamma
from torchreach.core.terms import Kernels
from torchreach.graph.kernels import IntegerSums, Pairing, Unfolded
from torchreach.graph.layers import ElementwiseAffine, Rearrange, Reshape, fan_in
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.requantise import (
    Apart,
    Mean,
    divided,
    exponential,
    high_product,
    multiplied,
    reciprocal,
    softmax_table,
)

Shape = tuple[int, ...]
Sides = tuple[int, int, int, int]  # left, right, top, bottom


class Operation(nn.Module):
    """Base: codes [B, *shape] int64 -> codes. grid: of the result, with the rule and the ends of its codes.

    activation: "", "relu" or another function that the ends of the codes stand for.
    rounds: whether codes of the result are other ones than those of the operands.
    last: whether it reads and gives pictures with channels last, as LiteRT has them.
    sources: grids of the operands, where codes are no function of one real number, and follow from the operands' alone.
    rising: of each operand, whether the codes grow with it, or fall.
    """

    unbounded = ""
    rounds = True
    last = False
    activation = ""
    sources: tuple[Quantizer, ...] = ()
    rising: tuple[bool, ...] = ()

    def __init__(self, name: str, kind: str, grid: Quantizer) -> None:
        super().__init__()
        self.name, self.kind, self.grid = name, kind, grid

    def layers(self) -> list[nn.Module]:
        """The real-valued layers behind its operands, or behind their sum; channels are first."""
        return []


class Sums(Operation):
    """A linear layer or convolution: rule(W (q - z) + b), all of them integers.

    layer: with W and b in float64. scale, zero_point: of the codes q. weight_scale: [N_out] or []. sides: zeros around
    the input. last: whether channels are the last axis, as LiteRT has them. The grid's `layer` says where pairs of
    products may saturate, and its `pairing` in which way they do.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        grid: Quantizer,
        layer: nn.Linear | nn.Conv2d,
        source: Quantizer,
        weight_scale: Tensor,
        *,
        sides: Sides = (0, 0, 0, 0),
        last: bool = False,
    ) -> None:
        super().__init__(name, kind, grid)
        self.layer = layer.requires_grad_(requires_grad=False)
        self.source = source
        self.register_buffer("weight_scale", weight_scale.double())
        self.sides, self.last = sides, last and isinstance(layer, nn.Conv2d)
        self.around = window(sides, last=self.last)

    def forward(self, codes: Tensor) -> Tensor:
        x = (codes - self.source.zero_point).double()
        for part in (*self.around[0], self.layer, *self.around[1]):
            x = part(x)
        sums, lost = x.round(), self._lost(codes)
        return self.grid.of_sums((sums if lost is None else sums + lost.reshape(sums.shape)).to(torch.int64))

    def _lost(self, codes: Tensor) -> Tensor | None:
        """What saturating pairs take off the sums."""
        integers = self.grid.layer
        if integers is None or integers.pairing in (None, Pairing.EXACT):
            return None
        at = Unfolded.of(integers, tuple(codes.shape[1:]), self.around[0], codes.device)
        sums, x = IntegerSums(at, ((integers.pairing,),)), self.source.value(codes).flatten(1)
        lost = sums.loss(0, x, x)
        return None if lost is None else (lost[0] / sums.unit).round()

    def layers(self) -> list[nn.Module]:
        real = copy.deepcopy(self.layer)
        along = (-1, *[1] * (real.weight.ndim - 1))
        scale: Any = self.weight_scale
        with torch.no_grad():
            real.weight.mul_(scale.reshape(along) if scale.ndim else scale)
            if real.bias is not None:
                real.bias.mul_(scale * self.source.scale)
        return [*window(self.sides, last=False)[0], real]


class AveragePool(Operation):
    """Means of windows of codes, on the grid of these codes. count: numbers in each window, [H, W, 1] or [H, W]."""

    def __init__(self, name: str, kind: str, grid: Quantizer, pool: nn.AvgPool2d, sides: Sides, *, last: bool) -> None:
        super().__init__(name, kind, grid)
        self.pool, self.sides, self.last = pool, sides, last
        self.around = window(sides, last=last)

    def forward(self, codes: Tensor) -> Tensor:
        x = (codes - self.grid.zero_point).double()
        for part in (*self.around[0], self.pool, *self.around[1]):
            x = part(x)
        return self.grid.of_sums(x.round().to(torch.int64))

    def layers(self) -> list[nn.Module]:
        assert isinstance(self.grid.rule, Mean)
        share = 1 / self.grid.rule.count.double()
        share = share.movedim(-1, 0) if self.last and share.ndim else share
        return [*window(self.sides, last=False)[0], self.pool, ElementwiseAffine(share, torch.zeros(()))]


class MaxPool(Operation):
    """Maxima of windows of codes."""

    def __init__(
        self, name: str, kind: str, grid: Quantizer, kernel: Shape, stride: Shape, sides: Sides, *, last: bool
    ) -> None:
        super().__init__(name, kind, grid)
        self.kernel, self.stride, self.sides, self.last = kernel, stride, sides, last

    def forward(self, codes: Tensor) -> Tensor:
        x = codes.movedim(-1, 1) if self.last else codes
        x = F.pad(x.double(), self.sides, value=float("-inf"))
        x = F.max_pool2d(x, self.kernel, self.stride).to(torch.int64)
        return (x.movedim(1, -1) if self.last else x).clamp(self.grid.lowest, self.grid.highest)


class MeanOver(Operation):
    """The mean over axes (the batch counted), by a rule of the sum."""

    def __init__(
        self, name: str, kind: str, grid: Quantizer, source: Quantizer, axes: Shape, keep: bool, count: int
    ) -> None:
        super().__init__(name, kind, grid)
        self.source, self.axes, self.keep, self.count = source, axes, keep, count

    def forward(self, codes: Tensor) -> Tensor:
        return self.grid.of_sums((codes - self.source.zero_point).sum(self.axes, keepdim=self.keep))

    def layers(self) -> list[nn.Module]:
        return [Rearrange("mean", self.axes, self.keep, terms=self.count)]


class Rescaled(Operation):
    """The same values on another grid, or clamped."""

    def __init__(self, name: str, kind: str, grid: Quantizer, source: Quantizer) -> None:
        super().__init__(name, kind, grid)
        self.source = source

    def forward(self, codes: Tensor) -> Tensor:
        return self.grid.of_sums(codes - self.source.zero_point)


class Rearranged(Operation):
    """The same codes in another shape or order."""

    rounds = False

    def __init__(self, name: str, kind: str, grid: Quantizer, layer: Reshape | Rearrange) -> None:
        super().__init__(name, kind, grid)
        self.layer = layer

    def forward(self, codes: Tensor) -> Tensor:
        return self.layer(codes)

    def layers(self) -> list[nn.Module]:
        return [self.layer]


class Padded(Operation):
    """Zeros around each value; sizes as `torch.nn.functional.pad` counts them."""

    rounds = False

    def __init__(self, name: str, kind: str, grid: Quantizer, sizes: Shape) -> None:
        super().__init__(name, kind, grid)
        self.layer = Rearrange("pad", *sizes)

    def forward(self, codes: Tensor) -> Tensor:
        return self.layer(codes - self.grid.zero_point) + self.grid.zero_point

    def layers(self) -> list[nn.Module]:
        return [self.layer]


class Joined(Operation):
    """Values of one grid side by side."""

    rounds = False

    def __init__(self, name: str, kind: str, grid: Quantizer, axis: int) -> None:
        super().__init__(name, kind, grid)
        self.axis = axis

    def forward(self, *codes: Tensor) -> Tensor:
        return torch.cat(codes, self.axis)


class Added(Operation):
    """LiteRT's sum of two values: both scaled to 20 more bits, added, and scaled to codes.

    sign: -1 for a difference.
    """

    BITS = 20

    def __init__(
        self,
        name: str,
        kind: str,
        grid: Quantizer,
        sources: tuple[Quantizer, Quantizer],
        factors: tuple[Tensor, Tensor, Tensor],
        sign: int,
    ) -> None:
        """factors: (multiplier, shift) int64 [2] of both values, and of their sum."""
        # A unit of the sum is `share` codes. Each term is off by at most 1.2 units: two roundings, and 2^-31 of a
        # number below 2^28 for its multiplier's; their sum, below 2^30, by 2^-31 of it, and by what its first rounding
        # takes, half of at most two units.
        share = torch.ldexp(factors[2][0].double(), factors[2][1] - 31)
        super().__init__(name, kind, grid.changed(rule=Apart(grid.scale, 4 * share, Kernels.FIXED_POINT)))
        self.sources, self.rising, self.sign = sources, (True, sign > 0), sign
        for key, value in zip(("one", "two", "total"), factors, strict=True):
            self.register_buffer(key, value)

    def forward(self, *codes: Tensor) -> Tensor:
        first, second = (
            multiplied((q - source.zero_point) << self.BITS, *getattr(self, key))
            for q, source, key in zip(codes, self.sources, ("one", "two"), strict=True)
        )
        total = multiplied(first + self.sign * second, *self.get_buffer("total"))
        return (total + self.grid.zero_point).clamp(self.grid.lowest, self.grid.highest)


class AddedSingle(Operation):
    """onnxruntime's sum of two values: q f + (p g + c) rounded to even, in fused float32; f, g quotients of scales."""

    rising = (True, True)
    factors: Tensor

    def __init__(self, name: str, kind: str, grid: Quantizer, sources: tuple[Quantizer, Quantizer]) -> None:
        scale = grid.scale.float()
        first, second = (source.scale.float() / scale for source in sources)
        # Ten roundings of numbers that are no larger than all terms together.
        largest = _largest(*sources, grid)
        error = 16 * SINGLE * largest * (2 * (first + second).double() + 1)
        super().__init__(name, kind, grid.changed(rule=Apart(grid.scale, error, Kernels.SINGLE_FLOAT)))
        self.sources = sources
        zeros = [source.zero_point.float() for source in (*sources, grid)]
        # As compiled: the first product of the constant is not rounded before the second is added.
        shift = first.double() * zeros[0].double() + (second * zeros[1]).double()
        self.register_buffer("factors", torch.stack((first, second, zeros[2] - shift.float())))

    def forward(self, *codes: Tensor) -> Tensor:
        first, second, rest = self.factors.double().unbind()
        # The second value first, and fused: the product is exact, its sum rounded once.
        total = (codes[1] * second + rest).float()
        total = (codes[0] * first + total.double()).float()
        return total.round().clamp(self.grid.lowest, self.grid.highest).to(torch.int64)


class MeanSingle(Operation):
    """onnxruntime's average pooling: float32 mean of the values, over the scale, zero point added, rounded to even.

    shift: what onnxruntime adds to signed codes, to make them unsigned.
    """

    rising = (True,)

    def __init__(
        self, name: str, kind: str, grid: Quantizer, source: Quantizer, pool: nn.AvgPool2d, shift: int
    ) -> None:
        # As many roundings as numbers, and a few.
        error = 4 * gamma(fan_in(pool) + 8, SINGLE) * (_largest(source, grid) + abs(shift))
        rule = Apart(grid.scale, error * (1 + source.scale / grid.scale), Kernels.SINGLE_FLOAT)
        super().__init__(name, kind, grid.changed(rule=rule))
        self.sources, self.pool, self.shift = (source,), pool, shift

    def forward(self, codes: Tensor) -> Tensor:
        source = self.sources[0]
        x = (codes - source.zero_point).float() * source.scale.float()
        code = (self.pool(x) / self.grid.scale.float() + (self.grid.zero_point + self.shift)).round() - self.shift
        return code.clamp(self.grid.lowest, self.grid.highest).to(torch.int64)

    def layers(self) -> list[nn.Module]:
        return [self.pool]


class Multiplied(Operation):
    """A product of two values: rule((q - z) (p - y))."""

    unbounded = "products of two rounded values are not bounded yet"

    def __init__(self, name: str, kind: str, grid: Quantizer, sources: tuple[Quantizer, Quantizer]) -> None:
        super().__init__(name, kind, grid)
        self.factors = sources

    def forward(self, *codes: Tensor) -> Tensor:
        first, second = (q - s.zero_point for q, s in zip(codes, self.factors, strict=True))
        return self.grid.of_sums(first * second)


class Softmax(Operation):
    """LiteRT's reference softmax over the last axis, in fixed-point arithmetic; scale: of the codes that it reads."""

    unbounded = "the softmax of codes is not bounded: compare the scores before it, network.scores()"

    def __init__(self, name: str, kind: str, grid: Quantizer, scale: float, beta: float) -> None:
        super().__init__(name, kind, grid)
        self.multiplier, self.shift, self.least = softmax_table(scale, beta)

    def forward(self, codes: Tensor) -> Tensor:
        off = codes - codes.amax(-1, keepdim=True)
        counts = off >= self.least
        terms = exponential(high_product(torch.where(counts, off, 0) << self.shift, self.multiplier))
        total = torch.where(counts, divided(terms, 12), 0).sum(-1, keepdim=True)
        head = 31 - floor_log2(total)  # leading zeros of 32 bits
        over = reciprocal((total << head) - 2**31)
        result = divided(high_product(over, terms), (12 - head + 23).expand_as(terms)) + self.grid.lowest
        return torch.where(counts, result, self.grid.lowest).clamp(self.grid.lowest, self.grid.highest)


class Constant(Operation):
    """Codes that the file holds, as an operand of sums and products."""

    value: Tensor

    def __init__(self, name: str, grid: Quantizer, value: Tensor) -> None:
        super().__init__(name, "constant", grid)
        self.register_buffer("value", value.to(torch.int64))

    def forward(self) -> Tensor:
        return self.value


class DeployedNetwork(nn.Module):
    """A network of integer codes, exactly as its runtime executes it. Made by `torchreach.load`.

    forward: inputs [B, *shape] in float32 (others are rounded to it) -> outputs [B, *] in float32; axes as in the file.
    codes: integer codes of the input -> those of the output. entry: the grid of the input; grid: of the output.
    runtime: whose kernels these are.
    """

    def __init__(
        self,
        shape: Shape,
        entry: Quantizer,
        operations: Sequence[Operation],
        inputs: Sequence[tuple[int, ...]],
        runtime: str,
    ) -> None:
        """inputs: of each operation, which values it reads: 0 is the network's input, k the result of operation k."""
        super().__init__()
        self.shape, self.entry, self.runtime = tuple(shape), entry, runtime
        self.operations = nn.ModuleList(operations)
        self.inputs = tuple(tuple(places) for places in inputs)

    @property
    def grid(self) -> Quantizer:
        last = self.operations[-1] if len(self.operations) else None
        return last.grid if isinstance(last, Operation) else self.entry

    def forward(self, x: Tensor) -> Tensor:
        return self.grid.value(self.codes(self.quantise(x))).float()

    def quantise(self, x: Tensor) -> Tensor:
        """Codes of inputs [B, *shape], int64, as the runtime makes them."""
        if tuple(x.shape[1:]) != self.shape:
            raise ShapeError(f"the network takes inputs [B, {', '.join(map(str, self.shape))}], got {tuple(x.shape)}")
        return self.entry.kernel_codes(x)[-1].to(torch.int64)

    @torch.no_grad()
    def codes(self, codes: Tensor) -> Tensor:
        """Output codes [B, *] of input codes [B, *shape], both integers; int64."""
        values = [codes.to(torch.int64)]
        for operation, places in zip(self.operations, self.inputs, strict=True):
            values.append(operation(*(values[i] for i in places)))
        return values[-1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeployedNetwork:
        """Moves between devices; integers stay what they are whatever dtype is asked for."""

        def moved(value: Tensor) -> Tensor:
            return value.to(fn(value).device)

        return cast(Any, super())._apply(moved, recurse)

    def scores(self) -> DeployedNetwork:
        """The network without the softmax that it ends in."""
        if not len(self.operations) or not isinstance(self.operations[-1], Softmax):
            raise OptionError("scores() requires a network whose last operation is a softmax")
        parts = [part for part in self.operations[:-1] if isinstance(part, Operation)]
        return DeployedNetwork(self.shape, self.entry, parts, self.inputs[:-1], self.runtime)


def _largest(*grids: Quantizer) -> int:
    """Above the magnitude of all codes and zero points."""
    return 1 + max(abs(end) for grid in grids for end in (grid.lowest, grid.highest))


def window(sides: Sides, *, last: bool) -> tuple[list[nn.Module], list[nn.Module]]:
    """What comes before and after a layer of pictures with channels first: zeros around it, and the order of axes."""
    before: list[nn.Module] = [Rearrange("permute", 0, 3, 1, 2)] if last else []
    if any(sides):
        before.append(Rearrange("pad", *sides))
    return before, [Rearrange("permute", 0, 2, 3, 1)] if last else []
