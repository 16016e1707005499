"""Eager-mode int8 modules (`torch.ao.quantization.convert`) as layers of a chain.

    Quantize                 -> Quantizer
    Linear, Conv (+ fused)   -> nn.Linear / nn.Conv on W = scale_w (q - zero_point_w), [nn.ReLU], Quantizer
    DeQuantize               -> nothing: a quantised tensor already stands for real numbers

W is exact in float64. The kernels sum the integer products and scale the sum in a few float32 operations before they
round it: `Quantizer(arithmetic="integer")`. Padding of a convolution is the input's zero point, so it stands for zero.
What kernels do to the integers themselves (pairs that saturate in int16, biases in whole units) is read from
`Quantizer.layer`, see `torchreach.graph.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchreach.core.errors import InvalidNetworkError
from torchreach.graph.kernels import IntegerLayer
from torchreach.graph.quantizer import PER_TENSOR, Quantizer
from torchreach.graph.weights import DYNAMIC, linear_layer
from torchreach.read.builder import ChainBuilder, check_finite

# Codes of the dtypes that activations of static schemes have. (`reduce_range` narrows the calibrated scale only.)
CODES: dict[torch.dtype, tuple[int, int]] = {torch.quint8: (0, 255), torch.qint8: (-128, 127)}
PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)


def add_int8_module(builder: ChainBuilder, module: nn.Module, name: str) -> bool:
    """Adds the layers of an int8 module of torch.ao; False if `module` is none."""
    kind = type(module)
    path = f"{kind.__module__}.{kind.__name__}"
    if not path.startswith(("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")):
        return False
    if ".dynamic." in path:
        builder.refuse(name, kind.__name__, DYNAMIC)
    if module._forward_pre_hooks or module._forward_hooks:
        builder.refuse(name, kind.__name__, "a forward hook may change what the module computes; remove it")
    handler = _HANDLERS.get(path)
    if handler is None:
        builder.refuse(
            name,
            path,
            "of the eager int8 modules torchreach supports Quantize, DeQuantize, Linear, LinearReLU, Conv1d, Conv2d, "
            "ConvReLU1d, ConvReLU2d and Dropout",
        )
    handler(builder, module, name)
    return True


def quantize(
    builder: ChainBuilder,
    name: str,
    scale: Any,
    zero_point: Any,
    lowest: int,
    highest: int,
    *,
    arithmetic: str,
    layer: IntegerLayer | None = None,
) -> None:
    """Adds a Quantizer of an activation, and notes a scale that was never calibrated."""
    scale, zero_point = torch.as_tensor(scale, dtype=torch.float64), torch.as_tensor(zero_point)
    kind = "Quantizer"
    if zero_point.is_floating_point():
        builder.refuse(name, kind, "activations with floating-point zero points are not supported")
    if scale.numel() != 1 or zero_point.numel() != 1:
        builder.refuse(name, kind, f"activations must have one scale and zero point, got {scale.numel()} scales")
    quantizer = Quantizer(
        scale.reshape(()),
        zero_point.reshape(()),
        int(lowest),
        int(highest),
        arithmetic=arithmetic,
        name=name,
        layer=layer,
    )
    if float(quantizer.scale) == 1 and int(quantizer.zero_point) == 0:
        builder.uncalibrated.append(name)
    builder.deployed = True
    builder.append(quantizer, name)


def quantize_dtype(builder: ChainBuilder, name: str, scale: Any, zero_point: Any, dtype: Any) -> None:
    """Adds the Quantizer of `torch.quantize_per_tensor`, after which values are quantised tensors.

    Whatever comes before it was computed in float32.
    """
    if dtype not in CODES:
        builder.refuse(name, "Quantize", f"the dtype must be torch.quint8 or torch.qint8, got {dtype}")
    quantize(builder, name, scale, zero_point, *CODES[dtype], arithmetic="float32")
    builder.codes = builder.layers[-1]  # type: ignore[assignment]


def dequantize(builder: ChainBuilder, name: str) -> None:
    """A quantised tensor becomes a float tensor of the same values."""
    builder.codes = None
    builder.append(nn.Identity(), name)


def int8_linear(
    builder: ChainBuilder,
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    scale: Any,
    zero_point: Any,
    relu: bool,
    packed: Any,
) -> None:
    """Adds a quantised linear layer; `packed`: torch's packed parameters, which hold its weight and bias."""
    before = _input(builder, name, "quantised Linear")
    builder.codes = None
    layer = linear_layer(real_weight(builder, name, weight), None if bias is None else bias.detach().double())
    _append(builder, name, layer, relu)
    _requantize(builder, name, scale, zero_point, before, _integers(name, weight, bias, before, None, packed))


def int8_convolution(
    builder: ChainBuilder,
    name: str,
    module: Any,
    weight: Tensor,
    bias: Tensor | None,
    scale: Any,
    zero_point: Any,
    relu: bool,
    packed: Any,
) -> None:
    """Adds a quantised convolution; `module` has its geometry."""
    before = _input(builder, name, "quantised convolution")
    builder.codes = None
    if getattr(module, "padding_mode", "zeros") != "zeros":
        builder.refuse(name, "quantised convolution", f"padding_mode must be 'zeros', got {module.padding_mode!r}")
    real = real_weight(builder, name, weight)
    kind = nn.Conv1d if weight.ndim == 3 else nn.Conv2d
    layer = convolution(kind, real, bias, module.stride, module.padding, module.dilation, module.groups)
    _append(builder, name, layer, relu)
    integers = _integers(name, weight, bias, before, layer, packed)
    _requantize(builder, name, scale, zero_point, before, integers)


def convolution(kind: Any, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
    """`nn.Conv1d` or `nn.Conv2d` around the given tensors, in float64."""
    fit = [v if isinstance(v, int | str) else tuple(v) for v in (stride, padding, dilation)]
    layer = kind(weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), *fit, groups, device="meta")
    layer.weight = nn.Parameter(weight.detach().double(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().double(), requires_grad=False)
    return layer


def real_weight(builder: ChainBuilder, name: str, weight: Tensor) -> Tensor:
    """scale (q - zero_point) of a quantised tensor, exact in float64."""
    if not weight.is_quantized or weight.dtype not in CODES:
        builder.refuse(name, "quantised layer", f"weights must be torch.qint8 or torch.quint8, got {weight.dtype}")
    if weight.qscheme() in PER_TENSOR:
        scale: Any = torch.tensor(weight.q_scale(), dtype=torch.float64)
        zero_point: Any = weight.q_zero_point()
    elif weight.qscheme() in PER_CHANNEL:
        along = [-1 if axis == weight.q_per_channel_axis() else 1 for axis in range(weight.ndim)]
        scale = weight.q_per_channel_scales().double().reshape(along)
        zero_point = weight.q_per_channel_zero_points().reshape(along)
    else:
        builder.refuse(name, "quantised layer", f"weights quantised as {weight.qscheme()} are not supported")
    check_scale(builder, name, scale)
    return (weight.int_repr().double() - zero_point) * scale


def check_scale(builder: ChainBuilder, name: str, scale: Tensor) -> None:
    """Raises InvalidNetworkError for weight scales that are zero, negative or not finite."""
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        bad = scale.flatten()[~(torch.isfinite(scale) & (scale > 0)).flatten()][0].item()
        raise InvalidNetworkError(
            f"layer {builder.position} ({name!r}): the weight's scale must be positive and finite, got {bad:.6g}"
        )


def _append(builder: ChainBuilder, name: str, layer: nn.Module, relu: bool) -> None:
    check_finite(layer, name)
    builder.append(layer, name)
    if relu:
        builder.append(nn.ReLU(), name)


def _integers(
    name: str, weight: Tensor, bias: Tensor | None, before: Quantizer, geometry: Any, packed: Any
) -> IntegerLayer | None:
    """The integers of a layer that reads codes of `before`; None for signed codes, whose kernels have exact sums."""
    if before.lowest < 0:
        return None
    channels = weight.shape[0]
    if weight.qscheme() in PER_TENSOR:
        scale, zero = (
            torch.tensor(v, dtype=torch.float64).expand(channels) for v in (weight.q_scale(), weight.q_zero_point())
        )
    else:
        scale, zero = weight.q_per_channel_scales().double(), weight.q_per_channel_zero_points().double()
    return IntegerLayer(
        name,
        weight.int_repr().to(torch.int64),
        scale,
        zero,
        None if bias is None else bias.detach().double(),
        float(before.scale),
        int(before.zero_point),
        before.highest,
        geometry,
        packed,
    )


def _requantize(
    builder: ChainBuilder, name: str, scale: Any, zero_point: Any, before: Quantizer, layer: IntegerLayer | None
) -> None:
    quantize(builder, name, scale, zero_point, before.lowest, before.highest, arithmetic="integer", layer=layer)
    builder.codes = builder.layers[-1]  # type: ignore[assignment]


def _input(builder: ChainBuilder, name: str, kind: str) -> Quantizer:
    if builder.codes is None:
        builder.refuse(name, kind, "its input must be quantised: there is no Quantize (QuantStub) before it")
    return builder.codes


def _quantize_module(builder: ChainBuilder, module: Any, name: str) -> None:
    quantize_dtype(builder, name, module.scale, module.zero_point, module.dtype)


def _dequantize_module(builder: ChainBuilder, module: Any, name: str) -> None:  # noqa: ARG001
    dequantize(builder, name)


def _linear_module(builder: ChainBuilder, module: Any, name: str, relu: bool = False) -> None:
    packed = module._packed_params._packed_params
    int8_linear(builder, name, module.weight(), module.bias(), module.scale, module.zero_point, relu, packed)


def _convolution_module(builder: ChainBuilder, module: Any, name: str, relu: bool = False) -> None:
    weight, bias, packed = module.weight(), module.bias(), module._packed_params
    int8_convolution(builder, name, module, weight, bias, module.scale, module.zero_point, relu, packed)


def _linear_relu_module(builder: ChainBuilder, module: Any, name: str) -> None:
    _linear_module(builder, module, name, relu=True)


def _convolution_relu_module(builder: ChainBuilder, module: Any, name: str) -> None:
    _convolution_module(builder, module, name, relu=True)


def _nothing(builder: ChainBuilder, module: Any, name: str) -> None:  # noqa: ARG001
    builder.append(nn.Identity(), name)


# Exact types only: subclasses (fused tanh, addition, the user's own) compute something else.
_HANDLERS: dict[str, Callable[[ChainBuilder, Any, str], None]] = {
    "torch.ao.nn.quantized.modules.Quantize": _quantize_module,
    "torch.ao.nn.quantized.modules.DeQuantize": _dequantize_module,
    "torch.ao.nn.quantized.modules.linear.Linear": _linear_module,
    "torch.ao.nn.quantized.modules.conv.Conv1d": _convolution_module,
    "torch.ao.nn.quantized.modules.conv.Conv2d": _convolution_module,
    "torch.ao.nn.quantized.modules.dropout.Dropout": _nothing,
    "torch.ao.nn.intrinsic.quantized.modules.linear_relu.LinearReLU": _linear_relu_module,
    "torch.ao.nn.intrinsic.quantized.modules.conv_relu.ConvReLU1d": _convolution_relu_module,
    "torch.ao.nn.intrinsic.quantized.modules.conv_relu.ConvReLU2d": _convolution_relu_module,
}
