"""What a repair is to leave as it is: inputs on which the repaired network stays near the original."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import cast

import torch
from torch import Tensor, nn

from torchreach.core.errors import OptionError, ShapeError
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.sets.star import StarBatch
from torchreach.training.fit import Batch, Data
from torchreach.training.last_layer import evaluated

# Inputs of an iterable of batches that are looked at.
MOST = 1 << 16


@dataclass(frozen=True, eq=False)
class Keep:
    """Inputs that matter beside the stars of a repair.

    Attributes:
        inputs: points [K, *shape], or stars, of which all inputs count.
        tolerance: |y1 - y2| allowed there, a constraint of the program (certified on stars); None: the mean square of
            y1 - y2 there is made as small as the other constraints allow.
    """

    inputs: Tensor | StarBatch
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Tensor | StarBatch):
            kind = type(self.inputs).__name__
            raise OptionError(f"Keep.inputs must be a tensor of points or a StarBatch, got {kind}")
        if self.tolerance is not None and not (self.tolerance > 0 and isfinite(self.tolerance)):
            raise OptionError(f"Keep.tolerance must be a positive number or None, got {self.tolerance!r}")

    @staticmethod
    def each(keep: Keep | Tensor | StarBatch | Sequence[Keep] | None) -> tuple[Keep, ...]:
        """What a user passed as `keep`, as a tuple. Raises OptionError."""
        if keep is None:
            return ()
        if isinstance(keep, Tensor | StarBatch):
            return (Keep(keep),)
        parts = (keep,) if isinstance(keep, Keep) else tuple(keep)
        for part in parts:
            if not isinstance(part, Keep):
                raise OptionError(
                    f"keep must be a Keep, points, stars or a sequence of Keep, got {type(part).__name__}"
                )
        return parts

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ShapeError if the inputs are not of `shape`."""
        own = self.inputs.shape if isinstance(self.inputs, StarBatch) else tuple(self.inputs.shape[1:])
        if tuple(own) != tuple(shape):
            raise ShapeError(f"keep must hold inputs of shape {tuple(shape)}, got {tuple(own)}")


def kept_data(data: Data | None, original: nn.Module, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Inputs and wanted outputs of a repair's `data`: floating-point labels, else the original's outputs."""
    if data is None:
        return []
    one = isinstance(data, tuple) and isinstance(data[0], Tensor)
    pairs = cast(Iterable[Batch], [data] if one else data)
    kept, count = [], 0
    for inputs, labels in pairs:
        x = inputs.to(device, COMPUTE_DTYPE)
        wanted = labels.to(x).flatten(1) if labels.is_floating_point() else evaluated(original, x)
        kept.append((x, wanted))
        count += len(x)
        if count >= MOST:
            break
    return kept
