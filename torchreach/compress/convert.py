"""New numbers in a copy of an eager-mode int8 module: weights, biases, scales and zero points.

The copy keeps the structure and the schemes of the given module (classes, names, per tensor or per channel, weight
scales and zero points), so that its state dict loads into any module converted the same way. State dicts hold
activation scales in float32; they are rounded to it here, so that saving and loading changes nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchreach.compress.constraints import Grid
from torchreach.core.errors import UnsupportedLayerError
from torchreach.graph.quantizer import PER_TENSOR, Quantizer

INT8 = (-128, 127)


@dataclass(frozen=True)
class Int8Layer:
    """A layer of an eager-mode int8 module that rounds its output; `weight` and `bias` only where it has them."""

    name: str
    weight: Tensor | None  # quantised
    bias: Tensor | None

    def grid(self) -> Grid:
        """The grid of the weights, on the CPU, in float64; no more codes than their bits allow.

        Weights of fewer bits kept in int8 stay within those.
        """
        assert self.weight is not None
        scale, zero = _scheme(self.weight)
        codes = self.weight.int_repr().to(torch.int64) - zero
        if bool((zero != 0).any()):
            return Grid(scale, int((INT8[0] - zero).max()), int((INT8[1] - zero).min()))
        low, high = int(codes.min()), int(codes.max())
        bits = next(b for b in range(2, 9) if low >= -(2 ** (b - 1)) and high < 2 ** (b - 1))
        highest = 2 ** (bits - 1) - 1
        return Grid(scale, min(low, -highest), highest)


def int8_layers(module: nn.Module, names: list[str]) -> list[Int8Layer]:
    """The layers of `module` that round their outputs, by the names that `chain` gave to its quantisers.

    Raises: UnsupportedLayerError if one of them is no layer of an eager-mode int8 module, or is used twice.
    """
    modules = dict(module.named_modules())
    found = []
    for index, name in enumerate(names):
        layer = modules.get(name)
        if layer is None or not rounds(layer):
            kind = "no module" if layer is None else type(layer).__name__
            raise UnsupportedLayerError(
                "repair of a deployed network needs an eager-mode int8 module (torch.ao.quantization.convert), but "
                f"{name or 'a rounding step'!r} is {kind}; pass such a module, or repair the weights alone: "
                "torchreach.weight_only(network)"
            )
        if name in names[:index]:
            raise UnsupportedLayerError(f"repair needs each int8 layer used once, but {name!r} is used again")
        weighted = hasattr(layer, "set_weight_bias")
        found.append(Int8Layer(name, *((layer.weight(), layer.bias()) if weighted else (None, None))))  # type: ignore
    return found


def rounds(layer: nn.Module) -> bool:
    """Whether `layer` is an eager-mode int8 layer whose output is rounded to its own scale and zero point."""
    kind = type(layer)
    int8 = kind.__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))
    return int8 and hasattr(layer, "scale") and hasattr(layer, "zero_point")


def converted(
    module: nn.Module, weights: dict[str, tuple[Tensor, Tensor | None]], quantizers: dict[str, Quantizer]
) -> nn.Module:
    """Copy of `module` with new numbers.

    weights: layer name -> weights, on the layer's own grid up to rounding, and bias.
    quantizers: layer name -> what its output is rounded with (scale and zero point; the codes stay the layer's).
    """
    result = copy.deepcopy(module)
    with torch.no_grad(), _quiet():
        for name, (weight, bias) in weights.items():
            layer: Any = result.get_submodule(name)
            bias = None if bias is None else bias.detach().to("cpu", torch.float32)
            layer.set_weight_bias(_packed(layer.weight(), weight.detach().cpu()), bias)
        for name, quantizer in quantizers.items():
            layer: Any = result.get_submodule(name)
            scale, zero_point = quantizer.scale.float(), quantizer.zero_point
            if isinstance(layer.scale, Tensor):
                layer.scale = scale.reshape(layer.scale.shape).to(layer.scale)
                layer.zero_point = zero_point.reshape(layer.scale.shape).to(layer.zero_point)
            else:
                layer.scale, layer.zero_point = float(scale), int(zero_point)
    return result


def _packed(like: Tensor, weight: Tensor) -> Tensor:
    """`weight` as int8 codes with the scheme of `like`."""
    weight = weight.to(torch.float32)  # far more precise than 8 bits
    if like.qscheme() in PER_TENSOR:
        return torch.quantize_per_tensor(weight, like.q_scale(), like.q_zero_point(), torch.qint8)
    scales, zeros = like.q_per_channel_scales(), like.q_per_channel_zero_points()
    return torch.quantize_per_channel(weight, scales, zeros, like.q_per_channel_axis(), torch.qint8)


def _scheme(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a quantised tensor, float64 and int64, to broadcast against it."""
    if weight.qscheme() in PER_TENSOR:
        return torch.tensor(weight.q_scale(), dtype=torch.float64), torch.tensor(weight.q_zero_point())
    shape = [1] * weight.ndim
    shape[weight.q_per_channel_axis()] = -1
    zero = weight.q_per_channel_zero_points().to(torch.int64)
    return weight.q_per_channel_scales().double().reshape(shape), zero.reshape(shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch announces the end of its quantised tensors each time one is made; whoever owns one has been told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
        yield
