"""How runtimes turn the exact integer sum of an int8 layer into a code: maps of integers to integers, exactly.

    fixed point (LiteRT)      r(a) = (a 2^l M + 2^30) >> 31, then r / 2^s rounded, ties away from zero
    float64 (LiteRT)          r(a) = round(a m), ties away from zero, m in float64: fully connected layers
    float32 (onnxruntime)     r(a) = round_half_even(float32(a) m), m in float32
    quotient (onnxruntime)    r(a) = round_half_even(float32(a unit) / scale), in float32
    mean (LiteRT's pooling)   r(a) = (a + k z) / k rounded, ties away from zero, less z

with m and M 2^(l - s - 31) the multiplier scale_in scale_weight / scale_out, where l or s is 0 and 2^30 <= M < 2^31.
The code is r + zero point, clamped. Each r grows with the sum, so the codes of an interval of sums are those of its
ends: what a runtime computes is known exactly wherever its integer sums are.

`unit` is what one step of the sum stands for, `scale` what one code does: |r(a) scale - a unit| <= scale / 2 + `off`.
Tensors broadcast against one value (no batch axis). Sources: LiteRT, tflite/kernels/internal/common.cc and
reference/integer_ops, as its Python package 2.3 computes them (older ones have fixed point in fully connected layers
too, where codes near ties differ); onnxruntime, MLAS MlasRequantizeOutput.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchreach.core.roundoff import SINGLE
from torchreach.core.terms import Kernels

LARGEST = 2**31 - 1  # of the integers that kernels add up in


class Requantise(nn.Module):
    """Base of the maps. unit: float64, what one step of the sum stands for; kernels: what a result is told to cover."""

    kernels = Kernels.EXACT
    unit: Tensor

    def __init__(self, unit: Tensor) -> None:
        super().__init__()
        self.register_buffer("unit", torch.as_tensor(unit, dtype=torch.float64).detach())

    def forward(self, sums: Tensor) -> Tensor:
        """Codes, zero point not added and not clamped, of integer sums [B, *shape]: int64 in and out."""
        raise NotImplementedError

    def off(self, size: Tensor, scale: Tensor) -> Tensor:
        """Bound on |code value - value of the sum| - scale / 2, where |value of the sum| <= size."""
        raise NotImplementedError

    def code_range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, zero point not added and not clamped, of the first and the last sum with values in [lower, upper]."""
        # Sums are whole numbers: those in the interval, but for what float64 rounds off.
        sums = torch.ceil(lower / self.unit - 1e-3), torch.floor(upper / self.unit + 1e-3)
        return self(sums[0].to(torch.int64)), self(sums[1].to(torch.int64))

    def flat(self, shape: tuple[int, ...]) -> Requantise:
        """The same for flattened values [B, N] of `shape`."""
        return self._arranged(shape, torch.flatten)

    def channels_first(self, shape: tuple[int, ...]) -> Requantise:
        """The same for values [C, H, W], of one for values of `shape` [H, W, C]."""
        return self._arranged(shape, lambda value: value.movedim(-1, 0).contiguous())

    def _arranged(self, shape: tuple[int, ...], order: Callable[[Tensor], Tensor]) -> Requantise:
        result = copy.deepcopy(self)
        for name, value in self.named_buffers():
            if value.ndim:
                setattr(result, name, order(value.expand(shape)))
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Requantise:
        """Moves between devices; numbers stay in float64 whatever the network's dtype becomes."""
        kept = dict(self.named_buffers())
        cast(Any, super())._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self


class FixedPoint(Requantise):
    """LiteRT's reference kernels: `factor` = scale_in scale_weight / scale_out as 31 bits and a power of two.

    count: where the sum is of so many numbers whose mean is meant; the multiplier is then divided, in integers.
    """

    kernels = Kernels.FIXED_POINT
    multiplier: Tensor
    shift: Tensor

    def __init__(self, unit: Tensor, factor: Tensor, count: int = 1) -> None:
        super().__init__(unit)
        multiplier, shift = fixed_point(factor)
        if count > 1:
            by = max(min(count.bit_length() - 1, 32, 31 + int(shift.min())), 0)
            multiplier = torch.div(multiplier << by, count, rounding_mode="floor")
            shift = shift - by
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("shift", shift)

    def forward(self, sums: Tensor) -> Tensor:
        return multiplied(sums, self.multiplier, self.shift)

    def off(self, size: Tensor, scale: Tensor) -> Tensor:
        # The first rounding is by half a unit of what the second one divides; then the multiplier's own error.
        first = torch.where(self.shift < 0, torch.exp2(self.shift.double() - 1), 0.0)
        real = self.multiplier.double() * torch.exp2(self.shift.double() - 31)
        return first * scale + ((real * scale / self.unit - 1).abs() + 1e-12) * size


class DoubleFloat(Requantise):
    """LiteRT's reference kernel of fully connected layers: the sum times `factor`, in float64."""

    kernels = Kernels.FIXED_POINT
    factor: Tensor

    def __init__(self, unit: Tensor, factor: Tensor) -> None:
        super().__init__(unit)
        self.register_buffer("factor", factor.double())

    def forward(self, sums: Tensor) -> Tensor:
        return away(sums.double() * self.factor).to(torch.int64)

    def off(self, size: Tensor, scale: Tensor) -> Tensor:
        return ((self.factor * scale / self.unit - 1).abs() + 1e-12) * size


class SingleFloat(Requantise):
    """onnxruntime's CPU kernels: the sum as float32, times scale_in scale_weight / scale_out in float32."""

    kernels = Kernels.SINGLE_FLOAT
    factor: Tensor

    def __init__(self, unit: Tensor, factor: Tensor) -> None:
        super().__init__(unit)
        self.register_buffer("factor", factor.float())

    def forward(self, sums: Tensor) -> Tensor:
        return (sums.float() * self.factor).round().to(torch.int64)

    def off(self, size: Tensor, scale: Tensor) -> Tensor:
        share = (self.factor.double() * scale / self.unit - 1).abs() + 3 * SINGLE
        return share * size


class SingleQuotient(Requantise):
    """onnxruntime's codes of one grid on another: the value in float32, divided by the new scale in float32."""

    kernels = Kernels.SINGLE_FLOAT
    scale: Tensor

    def __init__(self, unit: Tensor, scale: Tensor) -> None:
        super().__init__(unit)
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64).detach())

    def forward(self, sums: Tensor) -> Tensor:
        return (sums.float() * self.unit.float() / self.scale.float()).round().to(torch.int64)

    def off(self, size: Tensor, scale: Tensor) -> Tensor:
        return ((self.scale / scale - 1).abs() + 3 * SINGLE) * size


class Mean(Requantise):
    """LiteRT's average pooling: sums of `count` codes of one grid, zero points taken off."""

    kernels = Kernels.FIXED_POINT
    count: Tensor

    def __init__(self, count: Tensor, scale: Tensor, zero_point: int) -> None:
        super().__init__(scale / count)
        self.register_buffer("count", count.to(torch.int64))
        self.zero_point = zero_point

    def forward(self, sums: Tensor) -> Tensor:
        total = sums + self.count * self.zero_point
        half = torch.where(total > 0, self.count // 2, -(self.count // 2))
        return torch.div(total + half, self.count, rounding_mode="trunc") - self.zero_point

    def off(self, size: Tensor, scale: Tensor) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(size)


class Apart(Requantise):
    """Of a runtime that rounds the terms of a sum one by one: the code nearest to the real value, or to one near it.

    unit: the scale of the codes. error: how far the value that is rounded last is from the real one, in codes.
    kernels: whose they are. The codes themselves are those of the operation, see `graph.roundings.Operands`.
    """

    def __init__(self, unit: Tensor, error: Tensor | float, kernels: Kernels) -> None:
        super().__init__(unit)
        self.register_buffer("error", torch.as_tensor(error, dtype=torch.float64))
        self.kernels = kernels

    def forward(self, sums: Tensor) -> Tensor:
        return sums

    def off(self, size: Tensor, scale: Tensor) -> Tensor:
        return (self.get_buffer("error") * scale).expand_as(size)

    def code_range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        ends = lower / self.unit - self.get_buffer("error"), upper / self.unit + self.get_buffer("error")
        return torch.ceil(ends[0] - 0.5), torch.floor(ends[1] + 0.5)


def fixed_point(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Positive numbers (float64) as (multiplier, shift): multiplier 2^(shift - 31), 2^30 <= multiplier < 2^31."""
    part, shift = torch.frexp(factor.double())
    multiplier = torch.floor(part * 2.0**31 + 0.5).to(torch.int64)
    over = multiplier == 2**31
    multiplier, shift = torch.where(over, multiplier // 2, multiplier), shift.to(torch.int64) + over.long()
    gone = shift < -31  # all bits would be shifted out
    return torch.where(gone, 0, multiplier), torch.where(gone, 0, shift)


def multiplied(x: Tensor, multiplier: Tensor | int, shift: Tensor | int) -> Tensor:
    """Integers times multiplier 2^(shift - 31), rounded twice."""
    shift = torch.as_tensor(shift, device=x.device)
    return divided(high_product(x << shift.clamp(min=0), multiplier), (-shift).clamp(min=0))


def high_product(x: Tensor, y: Tensor | int) -> Tensor:
    """x y / 2^31 rounded, ties up: the saturating rounding doubling high product of int32."""
    return ((x * y + 2**30) >> 31).clamp(max=LARGEST)


def divided(x: Tensor, exponent: Tensor | int) -> Tensor:
    """x / 2^exponent rounded, ties away from zero."""
    exponent = torch.as_tensor(exponent, device=x.device)
    mask = (torch.ones_like(exponent) << exponent) - 1
    return (x >> exponent) + ((x & mask) > (mask >> 1) + (x < 0).long()).long()


def away(x: Tensor) -> Tensor:
    """x rounded to whole numbers, ties away from zero."""
    down = x.abs().floor()
    return torch.copysign(down + (x.abs() - down >= 0.5).to(x.dtype), x)


def softmax_table(scale: float, beta: float) -> tuple[int, int, int]:
    """Multiplier, left shift and least difference from the largest code that counts, of LiteRT's reference softmax."""
    factor = min(beta * scale * 2.0**26, 2.0**31 - 1)
    multiplier, shift = (int(part) for part in fixed_point(torch.tensor(factor, dtype=torch.float64)))
    return multiplier, shift, -math.floor(31 * 2.0**26 / 2.0**shift)


def exponential(a: Tensor) -> Tensor:
    """exp of a <= 0 with 26 fractional bits, as 31 fractional bits (gemmlowp, fixedpoint.h)."""
    quarter = 1 << 24
    rest = (a & (quarter - 1)) - quarter
    x = (rest << 5) + (1 << 28)
    x2 = high_product(x, x)
    x3, x4 = high_product(x2, x), high_product(x2, x2)
    series = divided(high_product(divided(x4, 2) + x3, 715827883) + x2, 1)
    result = 1895147668 + high_product(x + series, 1895147668)
    whole = rest - a
    for bit, factor in enumerate((1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)):
        result = torch.where((whole >> (24 + bit)) & 1 == 1, high_product(result, factor), result)
    return torch.where(a == 0, LARGEST, result)


def reciprocal(a: Tensor) -> Tensor:
    """1 / (1 + a) for a in [0, 1), both with 31 fractional bits: three steps of Newton's method (gemmlowp)."""
    half = (a + LARGEST + 1) >> 1
    x = 1515870810 + high_product(half, -1010580540)
    for _ in range(3):
        left = (1 << 29) - high_product(half, x)
        x = x + (high_product(x, left) << 2).clamp(-LARGEST - 1, LARGEST)
    return (x << 1).clamp(-LARGEST - 1, LARGEST)
