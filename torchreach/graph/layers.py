"""The layers torchreach has sound rules for, and the parts of an affine layer that reachability needs.

An affine layer x -> W x + b acts on a star {c + V a} row by row: W on every row of [c; V], b on row 0 only.
`linear` and `magnitude` give W x and |W| x without ever building W as a matrix, so that
convolution, average pooling and batch norm come free and merged layers never store block-diagonal zeros.
|W| carries error bounds: |W e| <= |W| |e|.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as gradients

from torchreach.core.errors import UnsupportedLayerError


class ElementwiseAffine(nn.Module):
    """x -> scale * x + shift, elementwise; `scale` and `shift` broadcast against one input (no batch axis).

    They may be numbers of a wider dtype than the network's, where that could not hold them.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype) + self.shift.to(x.dtype)


class Reshape(nn.Module):
    """Reshape each input to `shape` (no batch axis)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.shape)


class MergedAffine(nn.Module):
    """Base of affine layers that are built from two branches; they define the three parts themselves."""

    def linear_part(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def magnitude_part(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def size_part(self, x: Tensor) -> Tensor:
        """|W| x and the magnitudes of all terms of the bias; x >= 0."""
        return self.magnitude_part(x) + self(torch.zeros_like(x)).abs()

    @property
    def fan_in(self) -> int:
        """Upper bound on the number of terms summed into one output: here, those of the longer branch."""
        return max((fan_in(child) for child in self.children()), default=0) + 8


class MaskedReLU(nn.Module):
    """ReLU on the features [N] where `mask` is true; the others pass untouched. Takes [B, N]."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x.relu(), x)

    def extra_repr(self) -> str:
        return f"{int(self.mask.sum())} of {self.mask.numel()} features"


class Rearrange(nn.Module):
    """A linear map with coefficients >= 0 that torch has a function for: selections, sums, means, padding by zeros.

    operation: one of `OPERATIONS`, applied to [B, *shape] with `arguments`, which count the batch axis. terms: how many
    products are summed into one output, at most.
    """

    def __init__(self, operation: str, *arguments: Any, terms: int = 1) -> None:
        super().__init__()
        self.operation, self.terms = operation, terms
        self.arguments = arguments
        for i, argument in enumerate(arguments):
            if isinstance(argument, Tensor):  # a buffer, so that it moves with the network
                self.register_buffer(f"argument{i}", argument)

    def forward(self, x: Tensor) -> Tensor:
        arguments = [self._buffers.get(f"argument{i}", argument) for i, argument in enumerate(self.arguments)]
        return OPERATIONS[self.operation](x, *arguments)

    def extra_repr(self) -> str:
        shown = ("tensor" if isinstance(argument, Tensor) else str(argument) for argument in self.arguments)
        return f"{self.operation}, {', '.join(shown)}"


def _permute(x: Tensor, *axes: int) -> Tensor:
    return x.permute(axes)


def _slice(x: Tensor, axis: int, start: int | None, stop: int | None, step: int | None) -> Tensor:
    return x[(slice(None),) * axis + (slice(start, stop, step),)]


def _flip(x: Tensor, *axes: int) -> Tensor:
    return x.flip(axes)


def _pad(x: Tensor, *sizes: int) -> Tensor:
    return F.pad(x, sizes)


def _expand(x: Tensor, *shape: int) -> Tensor:
    return x.expand(-1, *shape)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "permute": _permute,
    "slice": _slice,
    "select": torch.select,
    "index_select": torch.index_select,
    "flip": _flip,
    "sum": torch.sum,
    "mean": torch.mean,
    "pad": _pad,
    "adaptive_avg_pool1d": F.adaptive_avg_pool1d,
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "expand": _expand,
}
# What `alike` compares by value, and what of a module says nothing about its function in evaluation mode.
_PLAIN = (bool, int, float, str, type(None), set, torch.dtype, torch.device)
_STATE = frozenset(key for key in vars(nn.Module()) if "hook" in key or key == "training")
PASS_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
# Known to the comparisons of two networks alone, and as the last layer.
SOFTMAX = (nn.Softmax, nn.LogSoftmax)
RESHAPING = (nn.Flatten, nn.Unflatten, Reshape)
# Every output is one input.
SHUFFLING = (nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
AFFINE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    ElementwiseAffine,
    MergedAffine,
    Rearrange,
    *PASS_THROUGH,
    *RESHAPING,
    *SHUFFLING,
)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """W x for a batch of rows x: [R, *in_shape] -> [R, *out_shape]."""
    return _part(layer, x, magnitude=False)


def magnitude(layer: nn.Module, x: Tensor) -> Tensor:
    """|W| x for a batch of rows x >= 0: [R, *in_shape] -> [R, *out_shape]."""
    return _part(layer, x, magnitude=True)


def transpose(layer: nn.Module, y: Tensor, shape: tuple[int, ...], *, magnitude: bool = False) -> Tensor:
    """W^T y, or |W|^T y, for a batch of rows y: [R, *out_shape] -> [R, *shape], `shape` that of the layer's input."""
    if isinstance(layer, nn.Linear):
        return y @ _sized(layer.weight, magnitude)
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, ElementwiseAffine)) and y.shape[1:] == shape:
        return _part(layer, y, magnitude=magnitude)  # diagonal
    if isinstance(layer, PASS_THROUGH + RESHAPING):
        return y.reshape(len(y), *shape)
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and not isinstance(layer.padding, str):
        rules: Any = gradients
        back = rules.conv1d_input if isinstance(layer, nn.Conv1d) else rules.conv2d_input
        sizes = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return back((len(y), *shape), _sized(layer.weight, magnitude), y.contiguous(), *sizes)
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        convolve = F.conv1d if isinstance(layer, nn.ConvTranspose1d) else F.conv2d
        sizes = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return convolve(y, _sized(layer.weight, magnitude), None, *sizes)  # type: ignore[arg-type]
    # The gradient of a map that is linear, and so is its |W| where x > 0.
    with torch.enable_grad():
        x = torch.ones(len(y), *shape, dtype=y.dtype, device=y.device, requires_grad=True)
        return torch.autograd.grad(_part(layer, x, magnitude=magnitude), x, y)[0]


def alike(first: Any, second: Any) -> bool:
    """Whether two layers are one function: of one type, with equal settings, parameters, buffers and children.

    What cannot be compared counts as different. `repr` would not do: that of nn.AvgPool2d leaves its divisor out.
    """
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        same = first.dtype == second.dtype and first.device == second.device
        return same and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, nn.Module) or is_dataclass(first):
        one, other = ({k: v for k, v in vars(part).items() if k not in _STATE} for part in (first, second))
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if hasattr(first, "items"):
        return alike([*first.items()], [*second.items()])
    if hasattr(first, "index") and not isinstance(first, str):
        return len(first) == len(second) and all(map(alike, first, second))
    return isinstance(first, _PLAIN) and first == second


def fan_out(layer: nn.Module, size: int) -> int:
    """Upper bound on the number of outputs that one input goes into, of `size` outputs in all."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.weight[:, 0].numel() // layer.groups
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        return layer.weight[0].numel()
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, *PASS_THROUGH, *RESHAPING, *SHUFFLING)):
        return 1
    return size


def fan_in(layer: nn.Module) -> int:
    """Upper bound on the number of terms summed into one output, for rounding-error bounds."""
    if isinstance(layer, nn.Linear):
        return layer.weight.shape[1] + 1  # in_features may be out of date
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.weight[0].numel() + 1
    if isinstance(layer, nn.AvgPool1d | nn.AvgPool2d):
        size = layer.kernel_size
        return size * size if isinstance(size, int) else int(torch.tensor(size).prod())
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        return layer.weight[:, 0].numel() // layer.groups + 1
    if isinstance(layer, PASS_THROUGH + RESHAPING + SHUFFLING):
        return 0
    if isinstance(layer, MergedAffine):
        return layer.fan_in
    if isinstance(layer, Rearrange):
        return layer.terms
    if isinstance(layer, nn.Sequential):
        return sum(fan_in(child) for child in layer)
    return 8  # batch norm, elementwise layers: a few operations


def with_bias_magnitude(layer: nn.Module, x: Tensor) -> Tensor:
    """|W| x and the magnitudes of all terms of the bias, for a batch of rows x >= 0: [R, *in] -> [R, *out]."""
    if isinstance(layer, MergedAffine):
        return layer.size_part(x)
    if isinstance(layer, nn.Sequential):
        for child in layer:
            x = with_bias_magnitude(child, x)
        return x
    # layer(0) is the layer's own bias: every product vanishes. Batch norm's is itself a difference.
    bias = layer(torch.zeros_like(x[:1])).abs()
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        assert layer.running_mean is not None
        mean = layer.running_mean.abs().reshape(-1, *[1] * (x.ndim - 2)).expand_as(x[:1])
        bias = bias + 2 * magnitude(layer, mean)
    return magnitude(layer, x) + bias


def _part(layer: nn.Module, x: Tensor, *, magnitude: bool) -> Tensor:
    if isinstance(layer, MergedAffine):
        return layer.magnitude_part(x) if magnitude else layer.linear_part(x)
    if isinstance(layer, nn.Sequential):
        for child in layer:
            x = _part(child, x, magnitude=magnitude)
        return x
    if isinstance(layer, nn.Linear):
        return F.linear(x, _sized(layer.weight, magnitude))
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        if layer.padding_mode != "zeros":
            raise UnsupportedLayerError(f"convolution needs padding_mode='zeros', got {layer.padding_mode!r}")
        convolve = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
        return convolve(
            x,
            _sized(layer.weight, magnitude),
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        convolve = F.conv_transpose1d if isinstance(layer, nn.ConvTranspose1d) else F.conv_transpose2d
        sizes = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        return convolve(x, _sized(layer.weight, magnitude), None, *sizes)  # type: ignore[arg-type]
    if isinstance(layer, nn.AvgPool1d | nn.AvgPool2d):
        return _sized(layer(x), magnitude)  # a divisor_override may be negative
    if isinstance(layer, (*RESHAPING, *SHUFFLING, Rearrange)):
        return layer(x)
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        assert layer.running_var is not None
        scale = torch.rsqrt(layer.running_var + layer.eps)
        weight = getattr(layer, "weight", None)
        if weight is not None:
            scale = scale * weight
        return x * _sized(scale, magnitude).reshape(-1, *[1] * (x.ndim - 2))
    if isinstance(layer, ElementwiseAffine):
        return x * _sized(layer.scale, magnitude).to(x.dtype)
    if isinstance(layer, PASS_THROUGH):
        return x
    raise UnsupportedLayerError(f"no affine rule for layer {type(layer).__name__}")


def _sized(weight: Tensor, magnitude: bool) -> Tensor:
    return weight.abs() if magnitude else weight
