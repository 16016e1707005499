"""Target sets of repair: when is a certified discrepancy small enough?

A target is a set O of discrepancies, given as a factor of the first, as bounds of the signed range of y1 - y2, or
as any test. Only certified members are looked at, so a target that holds is a proof.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreach.core.checks import check_choice
from torchreach.core.errors import OptionError
from torchreach.core.results import Discrepancy

OVER = ("all", "stars", "outputs")


class Target:
    """A set of discrepancies. Made by `Target.factor`, `Target.bounds` and `Target.test`."""

    @staticmethod
    def factor(factor: float, over: str = "all") -> Target:
        """The certified upper bound of the largest |y1 - y2| falls to `factor` times its first value, or below.

        over: what it is the largest of: "all", every input star and output together; "stars", each star's
            outputs (equation 15), so that every star must improve by the factor; "outputs", each output of
            each star by itself (equation 16).
        """
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1:
            raise OptionError(f"a target factor must lie in (0, 1), got {factor!r}")
        check_choice("over", over, OVER)
        return _Factor(float(factor), over, None)

    @staticmethod
    def bounds(lower: float | Tensor, upper: float | Tensor) -> Target:
        """The certified signed range of y1 - y2 lies in [lower, upper].

        lower, upper: numbers, or tensors that broadcast to [S, N] (stars, outputs).
        """
        try:
            low = torch.as_tensor(lower, dtype=torch.float64)
            high = torch.as_tensor(upper, dtype=torch.float64)
            ordered = bool((low <= high).all())
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(f"target bounds must be numbers or tensors of one shape: {error}") from None
        if not ordered:
            raise OptionError(f"target bounds must satisfy lower <= upper, got {lower} and {upper}")
        return _Bounds(low, high)

    @staticmethod
    def test(test: Callable[[Discrepancy], bool]) -> Target:
        """`test(discrepancy)` is true. Use its certified members: upper, range_lower, range_upper."""
        if not callable(test):
            raise OptionError(
                f"target must be a factor in (0, 1), a Target or a callable from Discrepancy to bool, got {test!r}"
            )
        return _Test(test)

    @staticmethod
    def of(value: Target | float | Callable[[Discrepancy], bool]) -> Target:
        """A Target as it is, a number as `Target.factor`, a callable as `Target.test`."""
        if isinstance(value, Target):
            return value
        return Target.factor(value) if isinstance(value, int | float) else Target.test(value)

    def check(self, shape: tuple[int, int]) -> None:
        """Raises OptionError if the target does not fit discrepancies [S, N]."""

    def anchored(self, first: Discrepancy) -> Target:  # noqa: ARG002
        """The target as it stands once the first discrepancy is known."""
        return self

    def holds(self, found: Discrepancy) -> bool:
        """Whether `found` is certified to lie in the set."""
        return self.excess(found) <= 0

    def excess(self, found: Discrepancy) -> float:
        """How far `found` is from the set; the smaller, the closer."""
        raise NotImplementedError

    def limits(self, found: Discrepancy) -> tuple[Tensor, Tensor] | None:
        """Lower and upper [S, N] that y1 - y2 keeps exactly where the set holds; None where it is no such set."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Factor(Target):
    ratio: float
    over: str
    allowed: Tensor | None

    def anchored(self, first: Discrepancy) -> Target:
        return _Factor(self.ratio, self.over, self.ratio * self._largest(first))

    def excess(self, found: Discrepancy) -> float:
        assert self.allowed is not None
        return float((self._largest(found) - self.allowed).max())

    def limits(self, found: Discrepancy) -> tuple[Tensor, Tensor] | None:
        assert self.allowed is not None
        allowed = self.allowed[:, None] if self.over == "stars" else self.allowed
        upper = allowed.expand(found.upper.shape)
        return -upper, upper

    def _largest(self, found: Discrepancy) -> Tensor:
        upper = found.upper.double()
        if self.over == "outputs":
            return upper
        return upper.amax(1) if self.over == "stars" else upper.amax()


@dataclass(frozen=True)
class _Bounds(Target):
    lower: Tensor
    upper: Tensor

    def check(self, shape: tuple[int, int]) -> None:
        for bound in (self.lower, self.upper):
            try:
                bound.expand(shape)
            except RuntimeError:
                raise OptionError(
                    f"target bounds must broadcast to {shape} (stars, outputs), got {tuple(bound.shape)}"
                ) from None

    def excess(self, found: Discrepancy) -> float:
        below = self.lower.to(found.range_lower.device) - found.range_lower
        above = found.range_upper - self.upper.to(found.range_upper.device)
        return float(torch.maximum(below, above).max())

    def limits(self, found: Discrepancy) -> tuple[Tensor, Tensor] | None:
        lower, upper = (bound.to(found.upper.device).expand(found.upper.shape) for bound in (self.lower, self.upper))
        return lower, upper


@dataclass(frozen=True)
class _Test(Target):
    function: Callable[[Discrepancy], bool]

    def holds(self, found: Discrepancy) -> bool:
        return bool(self.function(found))

    def excess(self, found: Discrepancy) -> float:
        return float(found.upper.max())

    def limits(self, found: Discrepancy) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002
        return None
