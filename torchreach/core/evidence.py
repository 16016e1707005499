"""What is known of the largest differences of two networks: certified from above, attained from below, and where.

Each output has two objectives: y1 - y2 in row 0, y2 - y1 in row 1.

Axis letters: N outputs; before them, where there are many stars, S stars.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchreach.core.clock import Clock
from torchreach.core.results import Discrepancy
from torchreach.core.roundoff import round_down, round_up
from torchreach.core.terms import Reason


class Evidence:
    """Evidence that only gets better; all of it holds, so that work on it can be left at any time.

    Attributes:
        upper: [2, N] or [S, 2, N] certified: no input has more.
        lower: as `upper`; attained at `witness` [*upper, *input shape]; -inf where nothing is yet.
    """

    def __init__(self, upper: Tensor, witness: Tensor) -> None:
        """witness: what stands where nothing is attained yet."""
        self.upper, self.lower, self.witness = upper, torch.full_like(upper, -torch.inf), witness

    @property
    def top(self) -> Tensor:
        """`upper`, but no less than what is attained: kernels that no certificate covers may attain more."""
        return torch.maximum(self.upper, self.lower)

    def certify(self, upper: Tensor, index: Tensor | None = None) -> None:
        """Takes another certified upper bound, as `upper`; index: [B] the stars it is of, if not of all."""
        if index is None:
            self.upper = torch.minimum(self.upper, upper)
        else:
            self.upper[index] = torch.minimum(self.upper[index], upper)

    def attain(self, value: Tensor, witness: Tensor, index: Tensor | None = None) -> None:
        """Takes values, as `lower`, and the inputs that attain them, as `witness`; index: as in `certify`."""
        lower, at = (self.lower, self.witness) if index is None else (self.lower[index], self.witness[index])
        better = value > lower
        lower, at = torch.where(better, value, lower), torch.where(_shaped(better, at), witness, at)
        if index is None:
            self.lower, self.witness = lower, at
        else:
            self.lower[index], self.witness[index] = lower, at

    def discrepancy(self, dtype: torch.dtype, **other: Any) -> Discrepancy:
        """The result for all stars, rounded outward to `dtype`; other: its fields that are no ends."""
        upper, lower = round_up(self.upper, dtype), round_down(self.lower, dtype)
        above, below = lower.unbind(1)
        first, second = self.witness.unbind(1)
        return Discrepancy(
            lower=torch.maximum(above, below).clamp(min=0),
            upper=upper.amax(1).clamp(min=0),
            range_lower=-upper[:, 1],
            range_upper=upper[:, 0],
            witness=torch.where(_shaped(above >= below, first), first, second).to(dtype),
            **other,
        )


def reason(settled: Reason | None, closed: bool, answered: bool, clock: Clock, spent: bool, rest: Reason) -> Reason:
    """Why work ended: the first of these that holds.

    settled: what the ends say of a threshold. closed: both ends meet. answered: they are as close as was asked. spent:
    a limit other than the clock ended it. rest: what it is where there was nothing left to do.
    """
    if settled is not None:
        return settled
    if closed or answered:
        return Reason.CLOSED if closed else Reason.GAP
    if clock.interrupted:
        return Reason.INTERRUPTED
    return Reason.BUDGET if spent or clock.over else rest


def _shaped(mask: Tensor, like: Tensor) -> Tensor:
    """`mask` with axes of one for those that only `like` has."""
    return mask.reshape(*mask.shape, *[1] * (like.ndim - mask.ndim))
