"""Layers on plain weights: dense floating-point parameters, whatever packs or computes them in the module.

    tensor subclasses of torchao (weight-only int8 and int4)       -> weight.dequantize()
    sparse layouts                                                 -> weight.to_dense()
    weight norm, spectral norm, parametrisations, tensors that are
    set as plain attributes                                        -> the value as it is now, in evaluation mode

Group-wise scales of torchao are included: they are just weights. (Its kernels may multiply before they scale, which
differs by float rounding only.) Schemes that round activations too choose their scale from the input, and are refused.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torchreach.core.errors import InvalidNetworkError

DYNAMIC = "dynamic quantisation chooses its scale from the input; static quantisation is supported"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_PLAIN: tuple[type, ...] = (Tensor, nn.Parameter)
_PACKED = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor", "Int4TilePackedTo4dTensor", "Float8Tensor")
_KIND = "_torchao_kind"
_ON_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "act_quant_scale", "act_pre_scale")

Refuse = Callable[[str], NoReturn]


def plain_layer(layer: nn.Module, name: str, refuse: Refuse) -> nn.Module:
    """`layer` itself where it multiplies parameters of its own; else the same layer around the numbers it uses.

    refuse: raises UnsupportedLayerError with a reason.

    Raises: InvalidNetworkError: weights that are not finite, or have no values.
    """
    kind = next((kind for kind in _LAYERS if isinstance(layer, kind)), None)
    if kind is None:
        return layer
    refresh_pruned(layer)
    used = _used(layer, refuse)
    # A pruned weight is exact in any precision, so it stays what the layer's hook makes of it.
    pruned = {name for name, _ in _pruning(layer)}
    parameters, buffers = (_held(layer, kind) for kind in ("_parameters", "_buffers"))
    held = {**parameters, **buffers, **{key: used[key] for key in pruned & used.keys()}}
    plain = {
        key: None if value is None else plain_tensor(value, f"{name}.{key}", refuse) for key, value in used.items()
    }
    if all(value is held.get(key) for key, value in plain.items()):
        return layer
    result = kind.__new__(kind)
    # Everything else is shared: sizes, strides, the mode.
    result.__dict__.update({key: value for key, value in vars(layer).items() if key not in _TENSORS})
    own: dict[str, Any] = {}
    kept = {key: value for key, value in buffers.items() if key == "num_batches_tracked"}
    result.__dict__.update(_forward_pre_hooks=OrderedDict[int, Any](), _modules={}, _parameters=own, _buffers=kept)
    for key, value in plain.items():
        if value is not None and is_packed(used[key]):
            value = value.to(used[key].dtype if plain["bias"] is None else plain["bias"].dtype)
        if key in ("weight", "bias"):
            own[key] = None if value is None else as_parameter(value)
        else:
            kept[key] = value
    if is_packed(used.get("weight")):
        result.__dict__[_KIND] = type(used["weight"]).__name__
    return result


def torchao_kind(layer: nn.Module) -> str | None:
    """The class of torchao's weight that `plain_layer` replaced in this layer, None where it replaced none."""
    return vars(layer).get(_KIND)


def plain_tensor(value: Any, name: str, refuse: Refuse) -> Tensor:
    """`value` as a dense floating-point tensor of finite numbers; itself where it is one."""
    if is_packed(value):
        kind = type(value).__name__
        if any(getattr(value, part, None) is not None for part in _ON_ACTIVATIONS):
            refuse(f"{kind} quantises its input: {DYNAMIC} (eager mode, PT2E, weight-only)")
        if kind not in _PACKED:
            refuse(f"its weight is of type {kind}; of torchao's weights torchreach knows {', '.join(_PACKED)}")
        value = value.detach().dequantize()
    if isinstance(value, Tensor):
        check_values(value, name)
    if type(value) not in _PLAIN:
        refuse(
            f"{name!r} must be a tensor, got {type(value).__name__}, of which torchreach does not know what it holds"
        )
    if value.layout != torch.strided:
        value = value.detach().to_dense()
    if value.dtype not in FLOATS:
        refuse(f"{name!r} must hold real floating-point numbers (float16, bfloat16, 32 or 64), got {value.dtype}")
    if not bool(torch.isfinite(value).all()):
        kind = "NaN" if bool(torch.isnan(value).any()) else "infinite"
        raise InvalidNetworkError(f"weights must be finite: parameter {name!r} contains {kind} values")
    return value


def check_values(value: Tensor, name: str) -> None:
    """Raises InvalidNetworkError for a parameter without values."""
    if isinstance(value, UninitializedParameter | UninitializedBuffer):
        raise InvalidNetworkError(f"parameter {name!r} is not initialised: run the lazy module once first")
    if value.is_meta:
        raise InvalidNetworkError(f"parameter {name!r} has no values, it is on the meta device: load its weights first")


def is_packed(value: object) -> bool:
    """Whether `value` is a tensor subclass of torchao, which stands for `value.dequantize()`."""
    return type(value).__module__.startswith("torchao.")


def is_weight_hook(hook: Any) -> bool:
    """Whether a forward pre-hook is one of torch's that compute a weight, and nothing else."""
    base: Any = prune.BasePruningMethod
    pruning = isinstance(hook, base) and type(hook).__call__ is base.__call__
    return pruning or type(hook) in (WeightNorm, SpectralNorm)


def refresh_pruned(layer: nn.Module) -> None:
    """Pruning computes `weight` in a hook before each pass; without this it is that of the last pass."""
    with torch.no_grad():
        for part in layer.modules():
            for _, hook in _pruning(part):
                hook(part, None)


def _held(layer: nn.Module, kind: str) -> dict[Any, Any]:
    """What torch keeps in one of a module's own dictionaries, such as "_buffers"."""
    return vars(layer)[kind]


def _pruning(layer: nn.Module) -> list[tuple[str, Any]]:
    """Names of pruned parameters, and the hooks that compute them."""
    hooks = _held(layer, "_forward_pre_hooks").values()
    return [(vars(hook)["_tensor_name"], hook) for hook in hooks if isinstance(hook, prune.BasePruningMethod)]


def as_parameter(value: Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach(), requires_grad=False)


def linear_layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """`nn.Linear` around the given tensors: parameters are shared, other tensors do not train."""
    layer = nn.Linear(1, 1, bias=bias is not None, device="meta")  # torch warns when it makes a layer without inputs
    layer.out_features, layer.in_features = weight.shape
    layer.weight = as_parameter(weight)
    layer.bias = None if bias is None else as_parameter(bias)  # type: ignore[assignment]
    return layer


@contextmanager
def evaluation_mode(module: nn.Module) -> Generator[None, None, None]:
    """`module` in evaluation mode within the block; every submodule's own mode after it.

    Sets the modes alone: a `train` method of the user's may do more than that, and exported programs refuse it.
    """
    modes = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in modes:
            child.training = False
        yield
    finally:
        for child, mode in modes:
            child.training = mode


class WeightOnly(nn.Sequential):
    """The float twin of a deployed network; made by `weight_only`."""


def standalone_copy(network: nn.Module, *, keep_masks: bool = False) -> nn.Module:
    """Deep copy of `network` with the masks of `torch.nn.utils.prune` multiplied into the weights for good.

    keep_masks: leave the mask as buffer `<parameter>_mask`.
    """
    # Pruning keeps `weight` as the result of a computation, which deepcopy refuses.
    memo = {
        id(value): value.detach().clone()
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    result = copy.deepcopy(network, memo)
    for module in result.modules():
        for key, _ in _pruning(module):
            mask = getattr(module, f"{key}_mask")
            cast(Any, prune).remove(module, key)
            if keep_masks:
                module.register_buffer(f"{key}_mask", mask != 0)
    return result


def _used(layer: nn.Module, refuse: Refuse) -> dict[str, Any]:
    """The tensors that a forward pass in evaluation mode uses, by name."""
    computed: dict[str, Any] = {}
    with torch.no_grad():
        for hook in _held(layer, "_forward_pre_hooks").values():
            match hook:
                case WeightNorm():
                    computed[hook.name] = hook.compute_weight(layer)
                case SpectralNorm():
                    computed[hook.name] = hook.compute_weight(layer, do_power_iteration=False)
                case _:
                    pass
        if not hasattr(type(layer), "weight") and not parametrize.is_parametrized(layer):
            return {key: computed.get(key, getattr(layer, key, None)) for key in _TENSORS if hasattr(layer, key)}
        # The user's code computes them, in the layer's own precision: rounding in it must come out the same.
        state = torch.get_rng_state()
        with evaluation_mode(layer):
            values = {key: getattr(layer, key) for key in _TENSORS if hasattr(layer, key)}
        if not torch.equal(torch.get_rng_state(), state):
            torch.set_rng_state(state)
            refuse("its weight draws random numbers")
        return {**values, **computed}
