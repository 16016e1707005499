"""Every slack in one place.

Geometry is computed in float64 whatever the dtype of the caller's tensors: two nearly equal networks cut
space into slivers thinner than float32 can resolve. Results are returned in the caller's dtype, rounded
outward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchreach.core.errors import OptionError

COMPUTE_DTYPE = torch.float64


@dataclass(frozen=True)
class Tolerances:
    """Slacks of the exact engine; each is also added to the certified bounds, so none can hide an error.

    Attributes:
        sign: a pre-activation within `sign` of a breakpoint counts as on it. A star is cut only when the
            pre-activation exceeds `sign` on both sides. Absolute, in units of the pre-activation.
        gap: linear programs stop when certified upper and lower bound are this close (absolute).
        root_margin: bounds from auto_LiRPA are widened by this share of their magnitude before use,
            because that library does not account for rounding.
    """

    sign: float = 1e-10
    gap: float = 1e-9
    root_margin: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("sign", "gap", "root_margin"):
            value = getattr(self, name)
            if not (0 < value < 1):
                raise OptionError(f"Tolerances.{name} must lie in (0, 1), got {value!r}")
