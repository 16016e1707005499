"""The one interface between layers and sets: `propagate(value, layer)`.

Merged layers take tensors and star batches. Networks know no sets, so a set type registers here how it goes
through a layer (`torchreach.verbs.merge` does it for `StarBatch`).
"""

from __future__ import annotations

from functools import singledispatch

from torch import nn

from torchreach.core.errors import ShapeError


@singledispatch
def propagate(value: object, layer: nn.Module) -> object:
    """Image of `value` under `layer`; the type of `value` chooses the rule."""
    raise ShapeError(
        f"{type(layer).__name__} takes a torch.Tensor or a torchreach.StarBatch, got {type(value).__name__}"
    )
