"""A module as steps, which every analysis works on: read once as a chain, lowered once."""

from __future__ import annotations

import torch
from torch import nn

from torchreach.graph.steps import Step, steps_of
from torchreach.read.module import chain


def steps(
    module: nn.Module,
    input_shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantized: bool = False,
    smooth: bool = False,
) -> tuple[Step, ...]:
    """`module` as steps on inputs of `input_shape`, in `dtype` on `device`; the module is left alone.

    quantized: whether the caller knows what to do with quantisers. A ReLU next to one becomes part of it.
    smooth: whether it knows what to do with smooth activations.

    Raises: UnsupportedLayerError, InvalidNetworkError as `chain`; ShapeError if the input does not fit.
    """
    layers = chain(module, input_shape)
    return steps_of(layers, input_shape, dtype=dtype, device=device, quantized=quantized, smooth=smooth)
