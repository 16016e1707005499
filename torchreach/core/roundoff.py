"""What floating-point arithmetic loses: unit roundoffs and every allowance made of them.

A computed number is within u |x| of what the operation gives in real numbers, u the unit roundoff: 2^-53 in float64,
in which bounds are computed. Every allowance is larger than what is lost, so that it covers its own rounding and that
of the sum it is added to. Underflow, which loses less than 1e-300, is not counted.

Reference: Higham: Accuracy and stability of numerical algorithms, SIAM 2002, ch. 2 and 3.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from torchreach.core.tolerances import COMPUTE_DTYPE

Size = TypeVar("Size", Tensor, float)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding a number to `dtype`."""
    return torch.finfo(dtype).eps / 2


UNIT_ROUNDOFF = unit_roundoff(COMPUTE_DTYPE)
SINGLE = unit_roundoff(torch.float32)


def gamma(terms: int, unit: float = UNIT_ROUNDOFF) -> float:
    """Share of sum |a| |b| that a sum of `terms` products a b loses in any order: Higham's n u / (1 - n u), and more.

    8 terms more than there are pay for a bias and for the rounding of the allowance itself. Twice it also covers the
    last operations of the factors.
    """
    return (terms + 8) * unit


def allowance(size: Size, operations: int = 4) -> Size:
    """What fewer than `operations` operations on numbers of at most this size lose."""
    return operations * UNIT_ROUNDOFF * size


def above(value: Tensor) -> Tensor:
    """`value`, raised by more than the last operations that gave it have lost."""
    return value + 4 * UNIT_ROUNDOFF * value.abs()


def below(value: Tensor) -> Tensor:
    """`value`, lowered by more than the last operations that gave it have lost."""
    return value - 4 * UNIT_ROUNDOFF * value.abs()


def ball(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and radius with low >= middle - radius and high <= middle + radius in real numbers, for low <= high.

    8 u |middle| more leave room for adding the middle to a number of its size. A point has the radius 8 u |middle|;
    where points must stay points, the caller says so.
    """
    middle = (low + high) / 2
    reach = torch.maximum(high - middle, middle - low)
    return middle, torch.add(reach * (1 + 8 * UNIT_ROUNDOFF), middle.abs(), alpha=8 * UNIT_ROUNDOFF)


def round_down(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`, never larger than it was."""
    rounded = value.to(dtype)
    return torch.where(rounded.to(value.dtype) > value, _next(rounded, -torch.inf), rounded)


def round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`, never smaller than it was."""
    return -round_down(-value, dtype)


def floor_log2(value: Tensor) -> Tensor:
    """floor(log2(value)) of positive numbers that float64 holds exactly, int64. On CUDA log2(8) is 2.999..."""
    return torch.frexp(value.double()).exponent.long() - 1


def _next(value: Tensor, toward: float) -> Tensor:
    return torch.nextafter(value, torch.full_like(value, toward))
