"""Executable int8 networks from eager-mode state dicts, on torch's own quantised kernels where it has them.

A state dict has numbers but no structure: for each quantised layer `scale`, `zero_point` and the packed weight and
bias, and `scale`, `zero_point` of what quantises the input. The float network it was converted from, with the same
names, says the rest. A ReLU that conversion had fused into its layer comes back as a ReLU on quantised tensors, which
gives the same codes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchreach.core.errors import FileFormatError, InvalidNetworkError, ShapeError, UnsupportedLayerError
from torchreach.graph.layers import RESHAPING
from torchreach.graph.quantizer import Quantizer
from torchreach.read.builder import ChainBuilder, Shape
from torchreach.read.dialects.eager_int8 import dequantize, int8_convolution, int8_linear, quantize_dtype
from torchreach.read.load import first_line, read_program
from torchreach.read.module import chain

_KEY = re.compile(r"(.+?)\.(scale|zero_point|weight|bias|_packed_params\.(?:dtype|_packed_params))")
_KEPT = (nn.ReLU, nn.AvgPool1d, nn.AvgPool2d, *RESHAPING)


class Int8Network(nn.Module):
    """Runs its submodules one after another; a state dict has the keys of the one it was made from."""

    def __init__(self, layers: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.order = tuple(name for name, _ in layers)
        for name, layer in layers:
            *parents, last = name.split(".")
            place: nn.Module = self
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(last, layer)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x


@dataclass(frozen=True)
class _Packed:
    """What a state dict says of one quantised layer, or with weight None of the input's quantiser."""

    scale: float
    zero_point: int
    weight: Tensor | None = None
    bias: Tensor | None = None


def load_int8(
    source: str | Path | Mapping[str, Any], network: nn.Module | str | Path, input_shape: Shape | None = None
) -> nn.Module:
    """The eager-mode int8 network of a state dict, in evaluation mode, on torch's quantised kernels (CPU).

    The result is what `discrepancy`, `load` and `weight_only` take as a deployed network; witnesses replay on it.

    Args:
        source: path of a `.pth` or `.pt` file written by `torch.save(module.state_dict(), path)`, or the state dict.
            The file is read with `weights_only=True`: nothing in it is executed.
        network: the float network it was converted from (its numbers do not matter), or the path of a `.pt2` file
            of it: linear and convolution layers of the same shapes, and the same names or the same order (which warns),
            ReLU, average pooling and reshaping.
            The input is quantised first, as quint8, and the output of the last layer is dequantised.
        input_shape: shape of one input, no batch axis; needed only where a layer's meaning depends on it.

    Raises:
        FileFormatError: a file that is missing, corrupt, or holds a pickled module.
        InvalidNetworkError: names that do not match; a scale that is not positive and finite; a zero point
            outside of 0..255.
        ShapeError: a weight of another shape.
        UnsupportedLayerError: layers that are not quantised, or that the int8 kernels cannot run.

    Examples:
        >>> from torch.ao import quantization
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> wrapped = quantization.QuantWrapper(network).eval()
        >>> wrapped.qconfig = quantization.default_qconfig
        >>> prepared = quantization.prepare(wrapped)
        >>> _ = prepared(torch.rand(20, 2))  # calibrates
        >>> int8 = quantization.convert(prepared)
        >>> x = torch.rand(5, 2)
        >>> torch.equal(tr.load_int8(int8.state_dict(), network)(x), int8(x))
        True
    """
    state = source if isinstance(source, Mapping) else _read(Path(source))
    if not isinstance(network, nn.Module):
        network, input_shape = read_program(Path(network))
    packed = _parse(state)
    inputs = [name for name, part in packed.items() if part.weight is None]
    if len(inputs) != 1:
        raise UnsupportedLayerError(
            "the state dict must have one quantiser, that of the input (a scale and a zero point without weights), "
            f"got {len(inputs)}: {', '.join(inputs) or 'none'}"
        )
    start = packed.pop(inputs[0])
    named = {id(value): name for name, value in network.named_parameters()}
    flat = chain(network, input_shape)
    weighted: list[Any] = [layer for layer in flat if _is_weighted(layer)]
    names = [named.get(id(layer.weight), type(layer).__name__).removesuffix(".weight") for layer in weighted]
    order = iter(_matched(names, weighted, packed))
    parts: list[tuple[str, Any, _Packed | None]] = []
    for index, layer in enumerate(flat):
        if _is_weighted(layer):
            name = next(order)
            _check_part(name, packed[name], layer)
            parts.append((name, layer, packed[name]))
        elif isinstance(layer, _KEPT):
            parts.append((f"{type(layer).__name__.lower()}_{index}", layer, None))
        else:
            raise UnsupportedLayerError(
                f"layer {index} ({type(layer).__name__}) of the network has no int8 kernel here; "
                "fold batch norm into the layer before it (torch.ao.quantization.fuse_modules)"
            )
    try:
        with _quiet():
            return _on_kernels(inputs[0], start, parts)
    except (AttributeError, ImportError, RuntimeError) as error:
        warnings.warn(
            f"this torch cannot run the int8 layers ({first_line(error)}): they are described by their integers and "
            'scales, and witnesses are not run; kernels="exact" (--kernels exact) covers exact sums',
            UserWarning,
            stacklevel=2,
        )
        return _described(inputs[0], start, parts, input_shape)


def _on_kernels(entry: str, start: _Packed, parts: list[tuple[str, Any, _Packed | None]]) -> Int8Network:
    """The network on torch's kernels; where there are none, as torch raises."""
    layers: list[tuple[str, nn.Module]] = [
        (entry, torch.ao.nn.quantized.Quantize(start.scale, start.zero_point, torch.quint8))
    ]
    layers += [(name, layer if part is None else _int8_layer(part, layer)) for name, layer, part in parts]
    return Int8Network([*layers, ("dequantize_output", torch.ao.nn.quantized.DeQuantize())]).eval()


def _described(
    entry: str, start: _Packed, parts: list[tuple[str, Any, _Packed | None]], shape: Shape | None
) -> nn.Sequential:
    """The same network as a chain, from its integers and scales alone."""
    builder = ChainBuilder(shape)
    quantize_dtype(builder, entry, start.scale, start.zero_point, torch.quint8)
    for name, layer, part in parts:
        if part is None:
            builder.append(layer, name)
            continue
        numbers = {"scale": part.scale, "zero_point": part.zero_point, "relu": False, "packed": None}
        if isinstance(layer, nn.Linear):
            int8_linear(builder, name, part.weight, part.bias, **numbers)  # type: ignore[arg-type]
        else:
            int8_convolution(builder, name, layer, part.weight, part.bias, **numbers)  # type: ignore[arg-type]
    dequantize(builder, "dequantize_output")
    return builder.finish()


def _matched(names: list[str], layers: list[Any], packed: Mapping[str, _Packed]) -> list[str]:
    """For each layer of the float network, in evaluation order, the name of its numbers in the state dict.

    Names that differ (a QuantStub in front moves those of a Sequential by one) are matched in order, where shapes fit.
    """
    if sorted(names) == sorted(packed):
        return names
    found = [part.weight.shape for part in packed.values() if part.weight is not None]
    if [layer.weight.shape for layer in layers] != found:
        raise InvalidNetworkError(
            "the network must have the layers that the state dict has, each once, by name or in order and of the same "
            f"shapes: required {', '.join(packed)}, got {', '.join(names) or 'none'}"
        )
    pairs = ", ".join(f"{name!r} is {key!r}" for name, key in zip(names, packed, strict=True))
    warnings.warn(
        "layers of the network and of the state dict have different names; matched in order, by shape: " + pairs,
        UserWarning,
        stacklevel=3,
    )
    return list(packed)


def _is_weighted(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileFormatError(f"no such file: {path}")
    try:
        with _quiet():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and schema errors
        raise FileFormatError(
            f"{path} must hold a state dict that torch.load(weights_only=True) reads; a pickled module can run any "
            f"code when it is read, so it is refused: save module.state_dict() instead ({first_line(error)})"
        ) from None
    if not isinstance(state, Mapping):
        raise FileFormatError(f"{path} must hold a state dict, got {type(state).__name__}")
    return state


def _parse(state: Mapping[str, Any]) -> dict[str, _Packed]:
    parts: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UnsupportedLayerError(f"{key!r} is no part of an eager-mode int8 layer torchreach knows")
        parts.setdefault(match[1], {})[match[2]] = value
    return {name: _packed(name, found) for name, found in parts.items()}


def _packed(name: str, found: dict[str, Any]) -> _Packed:
    weight, bias = found.get("_packed_params._packed_params") or (found.get("weight"), found.get("bias"))
    if "scale" not in found or "zero_point" not in found or (weight is not None and not weight.is_quantized):
        raise UnsupportedLayerError(
            f"{name!r} must be statically quantised, with scale and zero_point, got only {', '.join(found)} "
            "(a float layer, or one quantised dynamically)"
        )
    scale, zero_point = (torch.as_tensor(found[part]) for part in ("scale", "zero_point"))
    if scale.numel() != 1 or zero_point.numel() != 1:
        raise UnsupportedLayerError(f"{name!r} must have one scale and zero point, got {scale.numel()} scales")
    Quantizer(scale.reshape(()), zero_point.reshape(()), 0, 255, name=name)  # checks both
    return _Packed(float(scale), int(zero_point), weight, None if bias is None else bias.detach())


def _check_part(name: str, packed: _Packed, like: Any) -> None:
    assert packed.weight is not None
    if packed.weight.shape != like.weight.shape:
        raise ShapeError(
            f"the weight of {name!r} must have shape {tuple(like.weight.shape)}, got {tuple(packed.weight.shape)}"
        )
    if packed.weight.dtype != torch.qint8:
        raise UnsupportedLayerError(f"the weight of {name!r} must be torch.qint8, got {packed.weight.dtype}")


def _int8_layer(packed: _Packed, like: Any) -> nn.Module:
    quantized: Any = torch.ao.nn.quantized
    if isinstance(like, nn.Linear):
        layer = quantized.Linear(like.in_features, like.out_features)
    else:
        kind = quantized.Conv1d if isinstance(like, nn.Conv1d) else quantized.Conv2d
        sizes = (like.kernel_size, like.stride, like.padding, like.dilation)
        layer = kind(like.in_channels, like.out_channels, *sizes, like.groups)
    layer.set_weight_bias(packed.weight, packed.bias)
    layer.scale, layer.zero_point = packed.scale, packed.zero_point
    return layer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's notes that quantised tensors and typed storage are deprecated: the file is what it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated|torch.quantize_per_tensor, ")
        yield
