"""Weight-only int8 and int4 layers of torchao: `nn.Linear` whose weight is a tensor subclass that stands for numbers.

Reading takes weight.dequantize(), group-wise scales included: they are just weights. (torchao's kernels may multiply
before they scale, which differs by float rounding only.) Schemes that round activations too choose their scale from
the input, and are refused.
"""

from __future__ import annotations

import copy

from torch import nn

from torchreach.networks.builder import ChainBuilder, as_parameter, is_packed
from torchreach.networks.int8_modules import DYNAMIC

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)
_KNOWN = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor", "Int4TilePackedTo4dTensor", "Float8Tensor")
_ON_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "act_quant_scale", "act_pre_scale")


def plain_layer(builder: ChainBuilder, layer: nn.Module, name: str) -> nn.Module:
    """`layer` itself, or where its weight is one of torchao's the same layer on the dequantised weight."""
    if not isinstance(layer, _WEIGHTED) or not is_packed(layer.weight):
        return layer
    weight = layer.weight
    kind = f"{type(layer).__name__} with {type(weight).__name__}"
    if any(getattr(weight, part, None) is not None for part in _ON_ACTIVATIONS):
        builder.refuse(name, kind, f"it quantises its input: {DYNAMIC} (eager mode, PT2E, weight-only)")
    if type(weight).__name__ not in _KNOWN:
        builder.refuse(name, kind, f"of torchao's weights torchreach knows {', '.join(_KNOWN)}")
    plain = copy.copy(layer)  # the layer without its packed weight; the bias is shared
    plain._parameters = dict(layer._parameters)
    dtype = weight.dtype if layer.bias is None else layer.bias.dtype
    plain.weight = as_parameter(weight.detach().dequantize().to(dtype))  # type: ignore[assignment]
    return plain
