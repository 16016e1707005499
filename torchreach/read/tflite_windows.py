"""Weights and windows of TFLite's layers as torch has them: channels first, padding in numbers.

SAME padding gives ceil(size / stride) places, what is missing half before and half after, the odd one after.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from torchreach.graph.deployed import Sides
from torchreach.graph.weights import linear_layer
from torchreach.read.tflite_file import TfliteFile, TfliteNode, TfliteTensor

ACTIVATIONS = {0: "", 1: "relu", 2: "relu_n1_to_1", 3: "relu6"}


@dataclass(frozen=True)
class Window:
    """What slides over pictures [H, W]: kernel, stride and dilation along rows and columns, sides, places."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    sides: Sides
    places: tuple[int, int]

    @staticmethod
    def of(node: TfliteNode, size: tuple[int, int], kernel: tuple[int, int]) -> Window:
        """Of an operator on pictures of `size`."""
        stride = int(node.option("strideH", 0)), int(node.option("strideW", 0))
        dilation = int(node.option("dilationHFactor", 1)), int(node.option("dilationWFactor", 1))
        if min(*stride, *dilation, *kernel) < 1 or node.option("padding", -1) not in (0, 1):
            node.refuse("strides, dilations and sizes must be at least 1, and the padding SAME or VALID")
        sides: list[int] = []
        places = []
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
            reach = (k - 1) * d + 1
            same = node.option("padding", 0) == 0
            count = -(-n // s) if same else -(-(n - reach + 1) // s)
            if count < 1:
                node.refuse(f"a window of {reach} does not fit into {n}")
            missing = max((count - 1) * s + reach - n, 0) if same else 0
            places.append(count)
            sides = [missing // 2, missing - missing // 2, *sides]
        left, right, top, bottom = sides
        return Window(kernel, stride, dilation, (left, right, top, bottom), (places[0], places[1]))

    def counts(self, size: tuple[int, int]) -> Tensor:
        """Numbers in each window [H, W, 1] that lie in the picture; its last axis stands for channels."""
        ones = nn.functional.pad(torch.ones(1, 1, *size, dtype=torch.float64), self.sides)
        pooled = nn.functional.avg_pool2d(ones, self.kernel, self.stride, divisor_override=1)
        return pooled[0, 0, :, :, None]


def activation(node: TfliteNode) -> str:
    """The function fused to an operator: "", or one of relu, relu6 and relu_n1_to_1."""
    number = int(node.option("fusedActivationFunction", 0))
    if number not in ACTIVATIONS:
        node.refuse(f"the fused activation must be ReLU or ReLU6, got number {number} of the schema")
    return ACTIVATIONS[number]


def constant(file: TfliteFile, node: TfliteNode, at: int, what: str) -> TfliteTensor:
    """Input number `at` of an operator, which must be in the file."""
    index = node.inputs[at] if len(node.inputs) > at else -1
    if index < 0 or file.tensors[index].data is None:
        node.refuse(f"its {what} must be a constant of the file")
    return file.tensors[index]


def bias_of(file: TfliteFile, node: TfliteNode) -> TfliteTensor | None:
    """The bias of a layer, where it has one."""
    return None if len(node.inputs) < 3 or node.inputs[2] < 0 else constant(file, node, 2, "bias")


def picture(file: TfliteFile, node: TfliteNode) -> tuple[int, int, int]:
    """Height, width and channels of what an operator reads."""
    shape = file.tensors[node.inputs[0]].shape
    if len(shape) != 4:
        node.refuse(f"it takes values [B, H, W, C], got {shape}")
    return shape[1], shape[2], shape[3]


def linear(file: TfliteFile, node: TfliteNode, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A FULLY_CONNECTED layer around the given numbers [N_out, N_in]."""
    source = file.tensors[node.inputs[0]].shape
    if node.option("weightsFormat", 0) != 0:
        node.refuse("shuffled weights are not supported")
    if weight.ndim != 2 or not len(source) or (bias is not None and bias.shape != weight.shape[:1]):
        node.refuse(f"weights must be [N_out, N_in] with a bias [N_out], got {tuple(weight.shape)}")
    if source[-1] != weight.shape[1] if node.option("keepNumDims", False) else prod(source[1:]) != weight.shape[1]:
        node.refuse(f"weights {tuple(weight.shape)} do not fit inputs {source}")
    return linear_layer(weight, bias)


def convolution(file: TfliteFile, node: TfliteNode, weight: Tensor, bias: Tensor | None) -> tuple[nn.Conv2d, Window]:
    """A CONV_2D or DEPTHWISE_CONV_2D layer around the given numbers in the file's order, and its window."""
    height, width, channels = picture(file, node)
    depthwise = node.kind == "DEPTHWISE_CONV_2D"
    if weight.ndim != 4:
        node.refuse(f"weights must have 4 axes, got {tuple(weight.shape)}")
    weight = weight.permute(3, 0, 1, 2) if depthwise else weight.permute(0, 3, 1, 2)
    groups = channels if depthwise else channels // max(weight.shape[1], 1)
    fits = weight.shape[1] * groups == channels and weight.shape[0] % max(groups, 1) == 0
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        node.refuse(
            f"weights {tuple(weight.shape)} (channels first) do not fit {channels} channels, or the bias does not"
        )
    window = Window.of(node, (height, width), (weight.shape[2], weight.shape[3]))
    sizes: Any = (window.kernel, window.stride, 0, window.dilation, groups)
    layer = nn.Conv2d(channels, weight.shape[0], *sizes, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer, window


def pool(file: TfliteFile, node: TfliteNode) -> Window:
    """The window of a pooling operator."""
    height, width, _ = picture(file, node)
    return Window.of(node, (height, width), (int(node.option("filterHeight", 0)), int(node.option("filterWidth", 0))))


def axes_of(file: TfliteFile, node: TfliteNode) -> tuple[int, ...]:
    """Axes of a MEAN, the batch counted and left out."""
    rank = len(file.tensors[node.inputs[0]].shape)
    values = constant(file, node, 1, "axes").data
    assert values is not None
    axes = sorted({int(a) % rank for a in values.flatten() if -rank <= a < rank})
    if not axes or 0 in axes or values.size > rank or not all(-rank <= a < rank for a in values.flatten()):
        node.refuse(f"it takes axes of [B, ...] other than the batch, got {values.flatten().tolist()}")
    return tuple(axes)


def sizes_of(file: TfliteFile, node: TfliteNode) -> tuple[int, ...]:
    """Sizes of a PAD as `torch.nn.functional.pad` counts them: the last axis first."""
    values = constant(file, node, 1, "paddings").data
    assert values is not None
    shape = file.tensors[node.inputs[0]].shape
    if values.shape != (len(shape), 2) or values.min() < 0 or values.max() > max(shape) + 2**12 or values[0].any():
        node.refuse("paddings must be [rank, 2] numbers >= 0, none for the batch")
    return tuple(int(n) for n in values[:0:-1].flatten())


def axis_of(file: TfliteFile, node: TfliteNode) -> int:
    """Axis of a CONCATENATION, the batch counted."""
    rank, axis = len(file.tensors[node.outputs[0]].shape), int(node.option("axis", 0))
    if not -rank <= axis < rank or axis % rank == 0:
        node.refuse(f"values are joined along another axis than the batch, got axis {axis} of {rank}")
    return axis % rank
