"""Quantise with breakpoints: the one description of what a deployed network does to its activations.

    q(x) = clamp(round_half_even(x / scale) + zero_point, lowest, highest)        the code
    y(x) = scale (q(x) - zero_point)                                              the value it stands for

A step function with thresholds (code + 1/2 - zero_point) scale. Whoever executes a network quantises x only up to
rounding, so near a threshold either code may come out: `code_range` of an interval around x has both. A mean of k codes
of the same grid is known better: it is a multiple of 1 / k, and kernels round exact ties to the even code. (Where the
zero point is odd some round before they add it and some after; there both codes stay possible.)
A ReLU next to a quantiser is the same quantiser with lowest >= zero_point: `with_relu`.
Of networks whose runtime is known to the bit, `rule` says which code each integer sum gets (`graph.requantise`); then
x is taken for the sum that it is nearest to, and codes are exact.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchreach.core.errors import InvalidNetworkError, UnsupportedLayerError
from torchreach.graph.kernels import IntegerLayer
from torchreach.graph.requantise import Requantise, away

# How the sums before a quantiser are taken: in integers, scaled in a few float32 operations; in float32 throughout; or,
# of LiteRT, in integers scaled by a rule, where numbers are divided by the scale in float32, and ties go either way.
ARITHMETICS = ("integer", "float32", "fixed point")

# Schemes of torch's quantised tensors with one scale and zero point.
PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)

OVERFLOW = 2.0**31 - 1024
OVER = 256  # middles of codes of means lie in -OVER..OVER, zero point taken off


class Quantizer(nn.Module):
    """x -> scale * (clamp(round_half_even(x / scale) + zero_point, lowest, highest) - zero_point).

    scale, zero_point: one number each, float64 and int64; they stay that whatever dtype the network is moved to.
    arithmetic: of the kernel whose result is quantised, one of `ARITHMETICS`.
    layer: the int8 layer whose sums are quantised, where it is one.
    mean_of: k where x is a mean of k values of this very grid; 0 where it is not.
    rule: which code each integer sum gets, where that is known.

    Raises: InvalidNetworkError: a scale that is zero, negative or not finite; a zero point outside of
        [lowest, highest]. UnsupportedLayerError: several scales (per channel), which only weights may have; lowest >
        highest.
    """

    scale: Tensor
    zero_point: Tensor
    # Where values are on the grid already, so that nothing is rounded, and where they also lie within its ends, [N]:
    # see `graph.roundings`.
    passing: Any
    carried: Any

    def __init__(
        self,
        scale: Tensor | float,
        zero_point: Tensor | int,
        lowest: int,
        highest: int,
        *,
        arithmetic: str = "integer",
        name: str = "",
        layer: IntegerLayer | None = None,
        mean_of: int = 0,
        rule: Requantise | None = None,
    ) -> None:
        super().__init__()
        scale = torch.as_tensor(scale, dtype=torch.float64).detach()
        zero_point = torch.as_tensor(zero_point).detach().to(scale.device, torch.int64)
        place = f" of {name!r}" if name else ""
        if arithmetic not in ARITHMETICS:
            raise UnsupportedLayerError(
                f"arithmetic{place} must be one of {', '.join(ARITHMETICS)}, got {arithmetic!r}"
            )
        if scale.numel() != 1 or zero_point.numel() != 1:
            raise UnsupportedLayerError(
                f"activations{place} must have one scale and one zero point (per tensor), got {scale.numel()} and "
                f"{zero_point.numel()} (per channel)"
            )
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise InvalidNetworkError(f"the scale{place} must be positive and finite, got {_show(scale)}")
        if lowest > highest:
            raise UnsupportedLayerError(f"codes{place} must have lowest <= highest, got {lowest} and {highest}")
        if not bool(((zero_point >= lowest) & (zero_point <= highest)).all()):
            raise InvalidNetworkError(
                f"the zero point{place} must lie in [{lowest}, {highest}], got {_show(zero_point)}"
            )
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.lowest: Any = int(lowest)
        self.highest: Any = int(highest)
        self.arithmetic, self.name = arithmetic, name
        self.layer, self.mean_of = layer, mean_of
        self.rule = rule
        self.passing = self.carried = False

    def forward(self, x: Tensor) -> Tensor:
        return self.value(self.codes(x)).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """Codes of x [B, *shape], as float64 integers, in real arithmetic (up to float64's)."""
        if self.rule is not None:
            return self.of_sums(x.double() / self.rule.unit)
        steps = (x.to(self.scale.dtype) / self.scale).round()
        return (steps + self.zero_point).clamp(self.lowest, self.highest)

    def of_sums(self, sums: Tensor) -> Tensor:
        """Codes [B, *shape] of integer sums by `rule`, as numbers of the sums' dtype, which are rounded first."""
        assert self.rule is not None
        whole = sums.round().to(torch.int64) if sums.is_floating_point() else sums
        return (self.rule(whole) + self.zero_point).clamp(self.lowest, self.highest).to(sums.dtype)

    def kernel_codes(self, x: Tensor) -> Tensor:
        """Codes [4, ...] of float32 numbers x as kernels compute them: ties depend on when the zero point is added.

        fbgemm adds it before rounding, in one operation with the product (vectors) or after it (scalars); graphs round
        first; ONNX divides instead of multiplying by the reciprocal. LiteRT divides too and rounds ties away from zero;
        where a file begins with codes, whoever makes them may round ties to even.
        """
        x, scale, zero = x.float(), self.scale.float(), self.zero_point.float()
        if self.arithmetic == "fixed point":
            ways = ((x / scale).round() + zero, away(x / scale) + zero)
            return torch.stack(ways).to(self.scale.dtype).clamp(self.lowest, self.highest)
        inverse = 1 / scale
        fused = (x.double() * inverse.double() + zero.double()).float()
        ways = (fused.round(), (x * inverse + zero).round(), (x * inverse).round() + zero, (x / scale).round() + zero)
        return torch.stack(ways).to(self.scale.dtype).clamp(self.lowest, self.highest)

    def value(self, codes: Tensor) -> Tensor:
        """What the codes stand for, float64."""
        return (codes - self.zero_point) * self.scale

    def code_range(self, lower: Tensor, upper: Tensor, *, clamped: bool = True) -> tuple[Tensor, Tensor]:
        """Smallest and largest code of any x in [lower, upper], thresholds included on both sides.

        clamped: whether codes saturate at the ends of their range.

        Raises: InvalidNetworkError: numbers of more than 2^31 steps, on which kernels overflow instead of saturating.
        """
        largest = float(torch.stack((-lower, upper)).amax() / self.scale) if lower.numel() else 0.0
        if not largest < OVERFLOW:
            raise InvalidNetworkError(
                f"the scale {float(self.scale):.6g} of {self.name or 'a quantiser'!r} must be large enough that "
                f"numbers are less than 2^31 steps, beyond which int8 kernels overflow; got up to {largest:.3g} steps"
            )
        if self.rule is not None:
            low, high = (code.to(lower) + self.zero_point for code in self.rule.code_range(lower, upper))
        elif self.mean_of:
            low, high = self._mean_codes(torch.ceil, lower), self._mean_codes(torch.floor, upper)
        else:
            low = torch.ceil(lower / self.scale - 0.5) + self.zero_point
            high = torch.floor(upper / self.scale + 0.5) + self.zero_point
        if clamped:
            low, high = (end.clamp(self.lowest, self.highest) for end in (low, high))
        return low, high

    def executed_range(self, codes: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """`codes` [B, N] as `code_range` gives them, for states in [low, high] [B, N_in] before the layer: see
        `graph.roundings`."""
        return codes

    def restricted(self, x: Tensor, free: Tensor) -> Quantizer:  # noqa: ARG002
        """The same where all but the features `free` of the state [N_in] before the layer are fixed to x."""
        return self

    def _mean_codes(self, toward: Any, ends: Tensor) -> Tensor:
        """Code of the first mean from an end of an interval on, toward its inside."""
        outward = -1 if toward is torch.ceil else 1
        # 1e-3 is far more than rounding and far less than the next mean
        steps = toward(ends / self.scale * self.mean_of + outward * 1e-3) / self.mean_of
        return (steps.round() if self.even_ties else toward(steps + outward * 0.5)) + self.zero_point

    @cached_property
    def even_ties(self) -> bool:
        """Whether all kernels round the exact ties of means of `mean_of` codes to the even code.

        So they do where multiplying by float32's 1 / k makes them exact ties, and where the zero point is even.
        """
        middle = torch.arange(-OVER, OVER, dtype=torch.float64) + 0.5
        sums = (middle * self.mean_of).float()
        return int(self.zero_point) % 2 == 0 and bool((sums * (1 / torch.tensor(float(self.mean_of))) == middle).all())

    @property
    def exact(self) -> bool:
        """Whether codes are those of the exact sums, whoever computes them."""
        return self.rule is not None

    @property
    def rectifies(self) -> Tensor:
        """Where codes end at zero, as those of a ReLU do, and values are not merely carried."""
        return (self.zero_point == self.lowest) & ~torch.as_tensor(self.carried, device=self.zero_point.device)

    def half_step(self, size: Tensor) -> Tensor:
        """Bound on |value of the code - x| where codes do not saturate, for |x| <= size [..., N]."""
        half = (self.scale / 2).expand_as(size)
        return half if self.rule is None else half + self.rule.off(size, self.scale)

    @property
    def largest_sum(self) -> Tensor:
        """Largest |x / scale + zero_point| that does not saturate, in units of x."""
        return (max(abs(self.lowest), abs(self.highest)) + 1) * self.scale

    def cell(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of the closed cell of x with these codes; infinite beyond the last codes."""
        middle = codes - self.zero_point
        low = torch.where(codes <= self.lowest, -torch.inf, (middle - 0.5) * self.scale)
        high = torch.where(codes >= self.highest, torch.inf, (middle + 0.5) * self.scale)
        return low, high

    def with_relu(self) -> Quantizer:
        """The quantiser after, or before, a ReLU: codes of negative numbers become the zero point."""
        return self.limited(int(self.zero_point), self.highest)

    def limited(self, lowest: int, highest: int) -> Quantizer:
        """The same grid with codes in [lowest, highest] only."""
        return self.changed(lowest=max(self.lowest, lowest), highest=min(self.highest, highest))

    def of_means(self, count: int) -> Quantizer:
        """The quantiser of means of `count` values of this grid (0: of a number that varies), on the same grid."""
        return self.changed(layer=None, mean_of=count, rule=None)

    def flat(self, shape: tuple[int, ...]) -> Quantizer:
        """The quantiser of flattened values [B, N] of `shape`."""
        return self if self.rule is None else self.changed(rule=self.rule.flat(shape))

    def changed(self, **changes: Any) -> Quantizer:
        """The same with other settings, as the constructor names them."""
        names = ("scale", "zero_point", "lowest", "highest", "arithmetic", "name", "layer", "mean_of", "rule")
        return Quantizer(**{name: getattr(self, name) for name in names} | changes)

    def same_grid(self, other: Quantizer) -> bool:
        """Whether both have one scale and one zero point, so that quantising twice is quantising once."""
        return torch.equal(self.scale, other.scale) and torch.equal(self.zero_point, other.zero_point)

    def _apply(self, fn: Any, recurse: bool = True) -> Quantizer:
        """Moves between devices; the scale stays in float64 whatever the network's dtype becomes."""
        scale = self.scale
        cast(Any, super())._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"scale={_show(self.scale)}, zero_point={_show(self.zero_point)}, codes {self.lowest} to {self.highest}"


def _show(value: Tensor) -> str:
    return f"{value.item():.6g}"
