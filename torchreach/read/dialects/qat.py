"""Quantisation-aware-training modules of torch.ao and torchao, before they are converted, as layers of a chain.

    fake-quantise on an activation   -> Quantizer, arithmetic "float32"
    nn.qat layers (+ fused)          -> nn.Linear / nn.Conv on the fake-quantised weight, [nn.ReLU]
    observers, stubs, switched off   -> nothing

Scales are taken as they stand. While observers are switched on, each forward pass moves them, in evaluation mode
too: switch them off (`module.apply(torch.ao.quantization.disable_observer)`) before the network is certified.
A layer with batch norm folds it as torch does in evaluation: W = fake_quantise(s W_0) with s = gamma / sqrt(var + eps),
and b = s (b_0 - mean) + beta.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchreach.graph.weights import DYNAMIC, linear_layer
from torchreach.read.builder import ChainBuilder, check_finite
from torchreach.read.dialects.eager_int8 import check_scale, convolution, quantize

_HOOKS = ("torch.ao.quantization.quantize", "_observer_forward_hook")
_STUBS = ("QuantStub", "DeQuantStub")
_QAT = ("torch.ao.nn.qat.", "torch.ao.nn.intrinsic.qat.")


def is_quantization_part(module: nn.Module) -> bool:
    """Layer, stub, observer or fake-quantise module of quantisation tools: one node of a traced graph."""
    if type(module).__module__.startswith((*_QAT, "torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")):
        return True
    return _is_stub(module) or _is(module, "FakeQuantizeBase") or _is(module, "ObserverBase")


def is_observed(module: nn.Module) -> bool:
    """Whether quantisation tools hooked an observer of its output to `module`, and nothing else is hooked to it."""
    return bool(module._forward_hooks) and all(_is_observer_hook(hook) for hook in module._forward_hooks.values())


def observers(module: nn.Module) -> tuple[str, ...]:
    """Paths of all observers, each with a final dot; their statistics start at infinity and compute nothing."""
    return tuple(f"{path}." for path, part in module.named_modules() if _is(part, "ObserverBase"))


def add_fake_quantized(
    builder: ChainBuilder, module: Any, name: str, add: Callable[[ChainBuilder, nn.Module, str], None]
) -> bool:
    """Adds the layers of a module that quantisation tools made; False if `module` is none.

    add: adds any module.
    """
    if is_observed(module):
        inner = copy.copy(module)  # the module without its hook; parameters are shared
        inner._forward_hooks = OrderedDict()
        add(builder, inner, name)
        add(builder, module.activation_post_process, f"{name}.activation_post_process")
        return True
    kind = type(module)
    if _is_stub(module) or _is(module, "ObserverBase"):
        builder.append(nn.Identity(), name)
    elif _is(module, "FakeQuantizeBase"):
        _fake_quantize(builder, module, name)
    elif kind.__name__ == "QuantWrapper" and kind.__module__ == "torch.ao.quantization.stubs":
        for child in ("quant", "module", "dequant"):
            add(builder, getattr(module, child), f"{name}.{child}" if name else child)
    elif kind.__module__.startswith(_QAT):
        _qat_layer(builder, module, name)
    else:
        return False
    return True


def prepared_weight(builder: ChainBuilder, module: nn.Module, weight: Tensor, name: str) -> Tensor:
    """A constant that a fake-quantise module rounds or an observer looks at, as it comes out."""
    return _fake_quantized(builder, module, weight, name) if _is(module, "FakeQuantizeBase") else weight


def _is(module: nn.Module, base: str) -> bool:
    return any(k.__name__ == base and k.__module__.startswith(("torch.ao.", "torchao.")) for k in type(module).__mro__)


def _is_stub(module: nn.Module) -> bool:
    return type(module).__name__ in _STUBS and type(module).__module__ == "torch.ao.quantization.stubs"


def _is_observer_hook(hook: Any) -> bool:
    return (getattr(hook, "__module__", ""), getattr(hook, "__name__", "")) == _HOOKS


def _fake_quantize(builder: ChainBuilder, module: Any, name: str) -> None:
    _refuse_dynamic(builder, module, name)
    if not _enabled(module):
        builder.append(nn.Identity(), name)
        return
    lowest, highest = _codes(module)
    quantize(builder, name, module.scale, module.zero_point, lowest, highest, arithmetic="float32")


def _qat_layer(builder: ChainBuilder, module: Any, name: str) -> None:
    kind = type(module).__name__
    fits = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and hasattr(module, "weight_fake_quant")
    if not fits:
        builder.refuse(name, f"quantisation-aware {kind}")
    if module._forward_pre_hooks or module._forward_hooks:
        builder.refuse(name, kind, "a forward hook may change what the module computes; remove it")
    weight, bias = module.weight.detach(), module.bias
    along = [-1] + [1] * (weight.ndim - 1)
    norm = getattr(module, "bn", None)
    factor = weight.new_ones(())
    if norm is not None:
        factor = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)  # in float32, as torch does
        weight = weight * factor.reshape(along)
    weight = _fake_quantized(builder, module.weight_fake_quant, weight, f"{name}.weight_fake_quant").double()
    bias = None if bias is None else bias.detach().double()
    if norm is not None:
        start = norm.running_mean.double() if bias is None else norm.running_mean.double() - bias
        bias = norm.bias.detach().double() - factor.double() * start
    if isinstance(module, nn.Linear):
        layer: nn.Module = linear_layer(weight, bias)
    else:
        if module.padding_mode != "zeros":
            builder.refuse(name, kind, f"padding_mode must be 'zeros', got {module.padding_mode!r}")
        form = nn.Conv1d if weight.ndim == 3 else nn.Conv2d
        layer = convolution(form, weight, bias, module.stride, module.padding, module.dilation, module.groups)
    check_finite(layer, name)
    builder.deployed = True
    builder.append(layer, name)
    if "ReLU" in kind:
        builder.append(nn.ReLU(), name)


def _fake_quantized(builder: ChainBuilder, module: Any, weight: Tensor, name: str) -> Tensor:
    """The weight as torch rounds it, without the observer that calling the module would feed."""
    _refuse_dynamic(builder, module, name)
    if not _enabled(module):
        return weight
    scale, zero_point = module.scale.detach(), module.zero_point
    check_scale(builder, name, scale)
    if bool((scale == 1).all()) and bool((zero_point == 0).all()):
        builder.uncalibrated.append(name)
    codes = _codes(module)
    if not module.is_per_channel:
        return torch.fake_quantize_per_tensor_affine(weight, scale, zero_point, *codes)
    channels = weight.shape[module.ch_axis]
    return torch.fake_quantize_per_channel_affine(
        weight, scale.expand(channels), zero_point.expand(channels), module.ch_axis, *codes
    )


def _codes(module: Any) -> tuple[int, int]:
    """Lowest and highest code: those of the observer, where there is one, since torch uses them."""
    source = getattr(module, "activation_post_process", module)
    return int(source.quant_min), int(source.quant_max)


def _enabled(module: Any) -> bool:
    return bool(module.fake_quant_enabled[0])


def _refuse_dynamic(builder: ChainBuilder, module: Any, name: str) -> None:
    if getattr(module, "is_dynamic", False):
        builder.refuse(name, type(module).__name__, DYNAMIC)
