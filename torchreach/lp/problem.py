"""Batches of linear programs on tensors, and what is known of their optima.

    max g . a + k   subject to   A a <= b,   |a_m| <= 1

For every y >= 0 weak duality gives a certified bound, whether or not y is optimal or even converged:

    max g . a + k  <=  y . b + sum_m |g - A^T y|_m + k

Axis letters: B programs, M variables, P constraints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchreach.tolerances import UNIT_ROUNDOFF


@dataclass(frozen=True)
class LPBatch:
    """B linear programs over the unit box: objective [B, M], constant [B], A [B, P, M], b [B, P]."""

    objective: Tensor
    constant: Tensor
    A: Tensor
    b: Tensor

    def __len__(self) -> int:
        return self.objective.shape[0]

    def select(self, index: Tensor) -> LPBatch:
        return LPBatch(self.objective[index], self.constant[index], self.A[index], self.b[index])


@dataclass(frozen=True)
class LPSolution:
    """Certified interval around each optimum.

    Attributes:
        lower: [B] objective at `point`.
        upper: [B] certified upper bound, from a dual point; allowance for rounding included.
        point: [B, M] strictly feasible point.
        iterations: number of interior-point iterations of the whole batch.
    """

    lower: Tensor
    upper: Tensor
    point: Tensor
    iterations: int


def dual_bound(objective: Tensor, constant: Tensor, A: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Certified upper bound [...] of max objective . a + constant, for multipliers y >= 0 [..., P].

    objective [..., M], constant [...], A [..., P, M], b [..., P]. The allowance covers rounding of every sum in the bound.
    """
    against = (y[..., None, :] @ A)[..., 0, :]
    box = (objective - against).abs().sum(-1)
    terms = A.shape[-1] + A.shape[-2] + 8
    size = constant.abs() + objective.abs().sum(-1) + (y * (b.abs() + A.abs().sum(-1))).sum(-1)
    return constant + (y * b).sum(-1) + box + terms * UNIT_ROUNDOFF * size
