"""Batches of linear programs on tensors, and what is known of their optima.

    max g . a + k   subject to   A a <= b,   |a_m| <= 1

For every y >= 0 weak duality gives a certified bound, whether or not y is optimal or even converged:

    max g . a + k  <=  y . b + sum_m |g - A^T y|_m + k

Axis letters: B programs, M variables, P constraints.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchreach.core.roundoff import gamma
from torchreach.lp.halfspaces import Sets


def for_each(value: Tensor | float, like: Tensor) -> Tensor:
    """[B] what may be given as one number for all programs, made where `like` [B, ...] is; nothing is uploaded."""
    return value.expand(len(like)) if isinstance(value, Tensor) else like.new_full((len(like),), value)


@dataclass(frozen=True)
class LPBatch:
    """B linear programs: objective [B, M], constant [B], over B sets."""

    objective: Tensor
    constant: Tensor
    sets: Sets

    def __len__(self) -> int:
        return self.objective.shape[0]

    def value(self, a: Tensor) -> Tensor:
        """[B] objective at points a [B, M]."""
        return self.constant + (self.objective * a).sum(1)

    def bound(self, y: Tensor) -> Tensor:
        """Certified upper bounds [B] from multipliers y [B, P] >= 0; the allowance covers the rounding of every sum."""
        return self.bound_and_corner(y)[0]

    def bound_and_corner(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The bound of multipliers y, and the corner [B, M] of the box where its Lagrangian is largest."""
        sets = self.sets
        left = self.objective - sets.mix(y[:, None])[:, 0]
        share = gamma(sets.constraints + sets.variables)
        size = self.constant.abs() + self.norm + (y * sets.reach).sum(1)
        spread = torch.linalg.vector_norm(left, 1, dim=1)
        return self.constant + (y * sets.b).sum(1) + spread + share * size, left.sign()

    @cached_property
    def norm(self) -> Tensor:
        """[B] sum of magnitudes of each objective."""
        return torch.linalg.vector_norm(self.objective, 1, dim=1)

    def select(self, index: Tensor | slice) -> LPBatch:
        return LPBatch(self.objective[index], self.constant[index], self.sets.select(index))


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
