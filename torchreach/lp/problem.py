"""Batches of linear programs on tensors, and what is known of their optima.

    max g . a + k   subject to   A a <= b,   |a_m| <= 1

For every y >= 0 weak duality gives a certified bound, whether or not y is optimal or even converged:

    max g . a + k  <=  y . b + sum_m |g - A^T y|_m + k

Axis letters: B programs, M variables, P constraints.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def bound(self, y: Tensor) -> Tensor:
        """Certified upper bounds [B] from multipliers y [B, P] >= 0."""
        return dual_bound(self.objective[:, None], self.constant[:, None], self.A, self.b, y[:, None])[:, 0]

    def select(self, index: Tensor) -> LPBatch:
        return LPBatch(self.objective[index], self.constant[index], self.A[index], self.b[index])


@dataclass(frozen=True)
class LPSolution:
    """Certified interval around each optimum.

    Attributes:
        lower: [B] objective at `point`.
        upper: [B] certified upper bound, from a dual point; allowance for rounding included.
        point: [B, M] strictly feasible point.
        dual: [B, P] multipliers that give `upper`.
        iterations: number of interior-point iterations of the whole batch.
    """

    lower: Tensor
    upper: Tensor
    point: Tensor
    dual: Tensor
    iterations: int


def dual_bound(objective: Tensor, constant: Tensor, A: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Certified upper bounds [B, L] of max objective . a + constant, L objectives on each of B sets.

    objective [B, L, M], constant [B, L], A [B, P, M], b [B, P], multipliers y [B, L, P] >= 0. The allowance
    covers the rounding of every sum in the bound.
    """
    box = (objective - y @ A).abs().sum(2)
    terms = A.shape[1] + A.shape[2] + 8
    reach = (b.abs() + A.abs().sum(2))[:, :, None]
    size = constant.abs() + objective.abs().sum(2) + (y @ reach)[:, :, 0]
    return constant + (y @ b[:, :, None])[:, :, 0] + box + terms * UNIT_ROUNDOFF * size
