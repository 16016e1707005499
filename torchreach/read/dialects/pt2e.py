"""Quantised operations in traced graphs as layers of a chain: torch.fx (convert_fx), PT2E and exported programs.

    quantize_per_tensor + dequantize_per_tensor  (PT2E, quantized_decomposed)  -> Quantizer, arithmetic "float32"
    fake_quantize_per_tensor_affine                                            -> Quantizer, arithmetic "float32"
    torch.quantize_per_tensor, quantized.linear, quantized.conv2d, dequantize  -> as the eager int8 modules

A PT2E graph as torch executes it adds float32 numbers: weights are dequantised in float32 (constants, computed as torch
does), activations are rounded and scaled back. Between quantising and dequantising the value is a plain tensor of
integers, which only reshaping may touch.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from torchreach.core.errors import InvalidNetworkError
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.weights import DYNAMIC
from torchreach.read.builder import ChainBuilder
from torchreach.read.dialects.eager_int8 import (
    check_scale,
    dequantize,
    int8_convolution,
    int8_linear,
    quantize,
    quantize_dtype,
)

_DECOMPOSED = "quantized_decomposed"
# Computed at once where all arguments are constants: weights.
CONSTANT_QUANTIZED = {
    *(f"{_DECOMPOSED}.{verb}_per_{what}" for verb in ("quantize", "dequantize") for what in ("tensor", "channel")),
    *("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"),
    *("torchao.quantize_affine", "torchao.dequantize_affine"),
}
_DYNAMIC = ("choose_qparams", "quantized.linear_dynamic", "quantized.linear_relu_dynamic", "quantized.conv2d_dynamic")


def quantized_operation(name: str) -> Callable[..., None] | None:
    """What adds the layers of operation `name`, called as (builder, place, *args, **kwargs); None if unknown."""
    if name.startswith(_DYNAMIC) or ".choose_qparams" in name:
        return _dynamic
    return _OPERATIONS.get(name)


def check_weight(builder: ChainBuilder, place: str, name: str, args: tuple, value: Any) -> None:
    """Raises InvalidNetworkError for a constant that was dequantised with a bad scale, or is not finite."""
    if name not in CONSTANT_QUANTIZED:
        return
    if len(args) > 1 and not name.startswith("torchao."):
        check_scale(builder, place, torch.as_tensor(args[1], dtype=torch.float64))
    if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise InvalidNetworkError(f"weights must be finite: those of {place!r} are not after dequantisation")


def _quantize_decomposed(
    builder: ChainBuilder,
    place: str,
    x: Any,  # noqa: ARG001
    scale: Any,
    zero_point: Any,
    quant_min: Any,
    quant_max: Any,
    dtype: torch.dtype,  # noqa: ARG001
) -> None:
    quantize(builder, place, scale, zero_point, quant_min, quant_max, arithmetic="float32")
    builder.raw = True


def _dequantize_decomposed(
    builder: ChainBuilder,
    place: str,
    x: Any,  # noqa: ARG001
    scale: Any,
    zero_point: Any,
    quant_min: Any,  # noqa: ARG001
    quant_max: Any,  # noqa: ARG001
    dtype: torch.dtype,  # noqa: ARG001
    out_dtype: torch.dtype | None = None,
) -> None:
    last = next((layer for layer in reversed(builder.layers) if isinstance(layer, Quantizer)), None)
    again = last is not None and builder.nodes[builder.at].value is last  # as one that two branches read is
    if last is None or not (builder.raw or again):
        builder.refuse(place, "dequantize_per_tensor", "its input must be codes that quantize_per_tensor made")
    if float(last.scale) != float(scale) or int(last.zero_point) != int(zero_point):
        builder.refuse(
            place,
            "dequantize_per_tensor",
            f"scale and zero point must be those of {last.name!r} ({float(last.scale):.6g}, {int(last.zero_point)}), "
            f"got {float(scale):.6g} and {int(zero_point)}",
        )
    if out_dtype not in (None, torch.float32, torch.float64):
        builder.refuse(place, "dequantize_per_tensor", f"it rounds to {out_dtype}")
    builder.raw = False
    builder.append(nn.Identity(), place)


def _per_channel(builder: ChainBuilder, place: str, *args: Any, **kwargs: Any) -> None:  # noqa: ARG001
    builder.refuse(place, "quantize_per_channel", "activations must have one scale and zero point for the whole tensor")


def _dynamic(builder: ChainBuilder, place: str, *args: Any, **kwargs: Any) -> None:  # noqa: ARG001
    builder.refuse(place, "choose_qparams", DYNAMIC)


def _fake_quantize(
    builder: ChainBuilder,
    place: str,
    x: Any,  # noqa: ARG001
    scale: Any,
    zero_point: Any,
    quant_min: Any,
    quant_max: Any,
) -> None:
    quantize(builder, place, scale, zero_point, quant_min, quant_max, arithmetic="float32")


def _quantize(builder: ChainBuilder, place: str, x: Any, scale: Any, zero_point: Any, dtype: Any) -> None:  # noqa: ARG001
    quantize_dtype(builder, place, scale, zero_point, dtype)


def _dequantize(builder: ChainBuilder, place: str, x: Any) -> None:  # noqa: ARG001
    dequantize(builder, place)


def _linear(relu: bool) -> Callable[..., None]:
    def add(builder: ChainBuilder, place: str, x: Any, packed: Any, scale: Any, zero_point: Any) -> None:  # noqa: ARG001
        weight, bias = packed.unpack()
        int8_linear(builder, place, weight, bias, scale, zero_point, relu, packed)

    return add


def _convolution(relu: bool) -> Callable[..., None]:
    def add(builder: ChainBuilder, place: str, x: Any, packed: Any, scale: Any, zero_point: Any) -> None:  # noqa: ARG001
        weight, bias = packed.unpack()
        parts = {part: getattr(packed, part)() for part in ("stride", "padding", "dilation", "groups")}
        int8_convolution(builder, place, SimpleNamespace(**parts), weight, bias, scale, zero_point, relu, packed)

    return add


_OPERATIONS: dict[str, Callable[..., None]] = {
    f"{_DECOMPOSED}.quantize_per_tensor": _quantize_decomposed,
    f"{_DECOMPOSED}.dequantize_per_tensor": _dequantize_decomposed,
    f"{_DECOMPOSED}.quantize_per_channel": _per_channel,
    f"{_DECOMPOSED}.dequantize_per_channel": _per_channel,
    "fake_quantize_per_tensor_affine": _fake_quantize,
    "fake_quantize_per_channel_affine": _per_channel,
    "quantize_per_tensor": _quantize,
    "quantize_per_channel": _per_channel,
    "dequantize": _dequantize,
    "quantized.linear": _linear(relu=False),
    "quantized.linear_relu": _linear(relu=True),
    "quantized.conv2d": _convolution(relu=False),
    "quantized.conv2d_relu": _convolution(relu=True),
}
