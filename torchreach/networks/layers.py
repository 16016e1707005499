"""The layers torchreach has sound rules for, and the parts of an affine layer that reachability needs.

An affine layer x -> W x + b acts on a star {c + V a} row by row: W on every row of [c; V], b on row 0 only.
`linear` and `magnitude` give W x and |W| x without ever building W as a matrix, so that
convolution, average pooling and batch norm come free and merged layers never store block-diagonal zeros.
|W| carries error bounds: |W e| <= |W| |e|.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchreach.errors import UnsupportedLayerError


class ElementwiseAffine(nn.Module):
    """x -> scale * x + shift, elementwise; `scale` and `shift` broadcast against one input (no batch axis)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


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


class MaskedReLU(nn.Module):
    """ReLU on the features where `mask` is true; the others pass untouched."""

    mask: Tensor  # bool, of one input's flattened features


PASS_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
RESHAPING = (nn.Flatten, nn.Unflatten, Reshape)
AFFINE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    ElementwiseAffine,
    MergedAffine,
    *PASS_THROUGH,
    *RESHAPING,
)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """W x for a batch of rows x: [R, *in_shape] -> [R, *out_shape]."""
    return _part(layer, x, magnitude=False)


def magnitude(layer: nn.Module, x: Tensor) -> Tensor:
    """|W| x for a batch of rows x >= 0: [R, *in_shape] -> [R, *out_shape]."""
    return _part(layer, x, magnitude=True)


def fan_in(layer: nn.Module) -> int:
    """Upper bound on the number of terms summed into one output, for rounding-error bounds."""
    if isinstance(layer, nn.Linear):
        return layer.weight.shape[1] + 1  # in_features may be out of date
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.weight[0].numel() + 1
    if isinstance(layer, nn.AvgPool1d | nn.AvgPool2d):
        size = layer.kernel_size
        return size * size if isinstance(size, int) else int(torch.tensor(size).prod())
    if isinstance(layer, PASS_THROUGH + RESHAPING):
        return 0
    if isinstance(layer, nn.Sequential):
        return sum(fan_in(child) for child in layer)
    # batch norm, elementwise layers and comparison: a few operations; merged layers: the longer branch
    return max((fan_in(child) for child in layer.children()), default=0) + 8


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
    if isinstance(layer, nn.AvgPool1d | nn.AvgPool2d):
        return _sized(layer(x), magnitude)  # a divisor_override may be negative
    if isinstance(layer, nn.Flatten | nn.Unflatten | Reshape):
        return layer(x)
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        assert layer.running_var is not None
        scale = torch.rsqrt(layer.running_var + layer.eps)
        if layer.weight is not None:
            scale = scale * layer.weight
        return x * _sized(scale, magnitude).reshape(-1, *[1] * (x.ndim - 2))
    if isinstance(layer, ElementwiseAffine):
        return x * _sized(layer.scale, magnitude)
    if isinstance(layer, PASS_THROUGH):
        return x
    raise UnsupportedLayerError(f"no affine rule for layer {type(layer).__name__}")


def _sized(weight: Tensor, magnitude: bool) -> Tensor:
    return weight.abs() if magnitude else weight
