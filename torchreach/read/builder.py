"""Collects the layers of a chain one by one, refusing each layer that has no sound rule, by name and place.

Modules, traced graphs and ONNX files all build their chain here, so that they share one set of checks.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from torchreach.core.errors import InvalidNetworkError, ShapeError, UncalibratedWarning, UnsupportedLayerError
from torchreach.graph.arithmetic import Arithmetic
from torchreach.graph.layers import (
    AFFINE,
    PASS_THROUGH,
    RESHAPING,
    SHUFFLING,
    SOFTMAX,
    ElementwiseAffine,
    MaskedReLU,
    MergedAffine,
    Rearrange,
    Reshape,
    fan_in,
)
from torchreach.graph.lowering import Graph, Node, PiecewiseLinear, Rounding, lower
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.smooth import SMOOTH, Activations, Smooth, smooth
from torchreach.graph.weights import FLOATS, check_values, is_packed, plain_layer, plain_tensor
from torchreach.read.calls import altered, keeps
from torchreach.read.joins import ADAPTIVE, POINTWISE, POOLING, max_pool, piecewise

Shape = tuple[int, ...]

LEAVES = (
    *(kind for kind in AFFINE if kind is not MergedAffine),
    *(Arithmetic, Quantizer),
    *(*POINTWISE, *SMOOTH, *POOLING, *ADAPTIVE, *SOFTMAX),
)
_OWN = (MergedAffine, ElementwiseAffine, Reshape, Rearrange)
# What torch computes on quantised tensors as it is; pooling rounds to the same grid again.
_ON_QUANTIZED = (nn.ReLU, nn.AvgPool1d, nn.AvgPool2d, *PASS_THROUGH, *RESHAPING)
SUPPORTED = ", ".join(
    kind.__name__ for kind in (*AFFINE, *POINTWISE, *SMOOTH, *POOLING, *ADAPTIVE) if not issubclass(kind, _OWN)
)
# What keeps the order of the scores: without it the question of equal labels is the same.
_KEEP_ORDER = ("softmax", "logsoftmax")


def is_leaf(module: nn.Module) -> bool:
    """Whether `module` is one layer of a chain, with a rule of its own.

    A subclass that overrides what its layer does (quantisation-aware layers, for instance) computes something else
    than the layer whose rule it would get, so it is no leaf.
    """
    if isinstance(module, MergedAffine | MaskedReLU | Activations):
        return type(module).__module__.startswith("torchreach.")
    return any(isinstance(module, kind) and keeps(module, kind) for kind in LEAVES)


def check_finite(module: nn.Module, prefix: str = "", skip: tuple[str, ...] = ()) -> None:
    """Raises InvalidNetworkError naming the first parameter or buffer that is not finite or not there yet.

    skip: paths of submodules whose values take no part in what the network computes (observers).
    """
    for name, value in (*module.named_parameters(prefix), *module.named_buffers(prefix)):
        if skip and name.startswith(skip):
            continue
        if is_packed(value):
            value = value.dequantize()
        check_values(value, name)
        # Other layouts and dtypes are looked at where a layer uses them.
        if value.layout == torch.strided and value.dtype in FLOATS and not bool(torch.isfinite(value).all()):
            kind = "NaN" if bool(torch.isnan(value).any()) else "infinite"
            raise InvalidNetworkError(f"weights must be finite: parameter {name!r} contains {kind} values")


_ROUNDED = (
    "networks that round activations must be chains of layers with ReLU; compare a copy with rounded weights alone "
    "(torchreach.quantize_weights, or torchao's weight-only int8)"
)


class ChainBuilder:
    """The chain so far. `shape` is the feature shape after its last layer, None while unknown."""

    def __init__(self, shape: Shape | None) -> None:
        self.layers: list[nn.Module] = []
        self.input_shape = shape
        self.shape: Shape | None = shape
        # Every value of the network, and which of them the next layer takes.
        self.nodes: list[Node] = [Node("input", (), shape, "input")]
        self.at = 0
        self.position = 0  # of the layer being added, counted over all layers met, dropped ones too
        # Of deployed networks. `codes`: the grid of the value, while it is a quantised tensor; `raw`: while it is a
        # plain tensor of integer codes, which arithmetic would misread.
        self.deployed = False
        self.joins = False  # whether its values may be joined and used again, as those of a network of codes
        self.codes: Quantizer | None = None
        self.raw = False
        self.uncalibrated: list[str] = []
        self.changed: dict[int, int] = {}  # nodes whose memory a later layer wrote over, and what it wrote
        # What the network rounds its input to before anything else, where, by what and how that reads in a refusal:
        # a network in half precision is executed so, inputs rounded.
        self.entry: tuple[torch.dtype, str, str, str] | None = None
        self.traced = False  # whether some layers were read off a traced graph

    def refuse(self, name: str, kind: str, reason: str = "") -> NoReturn:
        reason = reason or (
            f"torchreach supports networks built of {SUPPORTED} and arithmetic with constants; "
            f"{kind} is not among them" + _hint(kind)
        )
        raise UnsupportedLayerError(f"layer {self.position} ({name!r}, {kind}): {reason}")

    def append(self, layer: nn.Module, name: str) -> None:
        """Adds one leaf layer, in evaluation mode and checked; identities and dropout are left out."""
        self._check(layer, name)
        layer = plain_layer(layer, name, partial(self.refuse, name, type(layer).__name__))
        self._check_numbers(layer, name)
        if not isinstance(layer, PASS_THROUGH):
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                # A shallow copy shares parameters and buffers, but has its own mode: later training of the
                # module must not switch the chain to batch statistics.
                layer = copy.copy(layer).eval()
            if isinstance(layer, POOLING):
                if layer.return_indices:
                    self.refuse(name, type(layer).__name__, "return_indices must be false")
                sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
                max_pool(self, name, *sizes, layer.ceil_mode)
                return
            if isinstance(layer, ADAPTIVE):
                operation = "adaptive_avg_pool1d" if isinstance(layer, nn.AdaptiveAvgPool1d) else "adaptive_avg_pool2d"
                layer = Rearrange(operation, layer.output_size, terms=prod(self.shape or (2**20,)))
            self._advance(layer, name)
            self.layers.append(layer)
            bends = isinstance(layer, (*POINTWISE, *SMOOTH))
            before = self.at
            if isinstance(layer, (*SMOOTH, *SOFTMAX)):
                self._refuse_rounding(name, type(layer).__name__)
            if isinstance(layer, nn.PReLU) and layer.weight.numel() > 1 and self.shape is None:
                self.refuse(name, "PReLU", "input_shape=(...) is required for a slope of each channel")
            value = layer
            if bends:
                value = (
                    self._smooth(layer, name)
                    if isinstance(layer, SMOOTH)
                    else piecewise(layer, len(self.shape or (1,)))
                )
            self._put("pointwise" if bends else "layer", (self.at,), name, value)
            if bends and getattr(layer, "inplace", False):
                self.changed[self.root(before)] = self.at
            if self.codes is not None and isinstance(layer, nn.AvgPool1d | nn.AvgPool2d):
                self.layers.append(self.codes.of_means(pooled(layer)))
        self.position += 1

    def _smooth(self, layer: nn.Module, name: str) -> Smooth:
        try:
            return smooth(layer)
        except ValueError as error:
            self.refuse(name, type(layer).__name__, str(error))

    def pointwise(self, value: PiecewiseLinear, name: str) -> None:
        """Adds a function of each feature that is no layer of its own."""
        self._refuse_rounding(name, "a piecewise linear function")
        self._put("pointwise", (self.at,), name, value)
        self.position += 1

    def join(self, op: str, inputs: tuple[int, ...], name: str, axis: int = 0) -> None:
        """Adds a value made of several: "add", "sub", "maximum" (which broadcast as torch does) or "cat"."""
        self._refuse_rounding(name, op)
        known = [shape for i in inputs if (shape := self.nodes[i].shape) is not None]
        if len(known) < len(inputs):
            self.shape = None
        else:
            self.shape = self._joined(op, known, axis, name)
            axis %= 1 + len(self.shape)
        if op == "cat" and axis == 0:
            self.refuse(name, op, "axis 0 is the batch")
        self._put(op, inputs, name, axis)
        self.position += 1

    def _joined(self, op: str, shapes: list[Shape], axis: int, name: str) -> Shape:
        shown = ", ".join(map(str, shapes))
        if len({len(shape) for shape in shapes}) > 1:
            self.refuse(name, op, f"values must have equally many axes, got {shown}")
        if op == "maximum" and len(set(shapes)) > 1:
            self.refuse(name, op, f"values must have equal shapes, got {shown}")
        place = f"layer {self.position} ({name!r}, {op})"
        # By hand: torch's own functions of shapes import a second's worth of modules.
        sizes, rank = list(zip(*shapes, strict=True)), 1 + len(shapes[0])
        if op != "cat":
            if any(len(set(n) - {1}) > 1 for n in sizes):
                raise ShapeError(f"{place}: shapes {shown} do not broadcast")
            return tuple(max(n, key=lambda k: k != 1) for n in sizes)
        at = axis % rank - 1
        if not -rank <= axis < rank or any(len(set(n)) > 1 for i, n in enumerate(sizes) if i != at):
            raise ShapeError(f"{place}: shapes {shown} differ in another axis than {axis}, the batch counted")
        return tuple(sum(n) if i == at else n[0] for i, n in enumerate(sizes))

    def round(self, rounding: Rounding, name: str, operands: Sequence[int] = ()) -> None:
        """Adds a rounding of a network of codes, see `graph.lowering`. operands: of its operation."""
        self._put("round", (self.at, *operands), name, rounding)

    def move(self, at: int, name: str) -> None:
        """The next layer takes node `at`."""
        if at != self.at:
            self._refuse_rounding(name, "a value that is used again")
            self.at, self.shape = at, self.nodes[at].shape

    def root(self, at: int) -> int:
        """The node that node `at` may be a view of, by reshaping or selecting."""
        while isinstance(self.nodes[at].value, (*RESHAPING, *SHUFFLING, Rearrange)):
            at = self.nodes[at].inputs[0]
        return at

    def _put(self, op: str, inputs: tuple[int, ...], name: str, value: Any) -> None:
        self.nodes.append(Node(op, inputs, self.shape, name, value))
        self.at = len(self.nodes) - 1

    def _refuse_rounding(self, name: str, kind: str) -> None:
        if self.deployed and not self.joins:
            self.refuse(name, kind, _ROUNDED)

    def arithmetic(self, operation: str, operand: Tensor, name: str) -> None:
        """x (operation) operand, for an operand that must not reach into the batch axis."""
        operand = plain_tensor(operand, name, partial(self.refuse, name, operation))
        while operand.ndim and operand.shape[0] == 1:
            operand = operand.detach()[0]  # a view: still the caller's storage
        if operand.ndim > 1 and self.shape is None:
            self.refuse(
                name,
                operation,
                f"a constant of shape {tuple(operand.shape)} could reach into the batch axis; "
                "input_shape=(...) is required to tell",
            )
        if self.shape is not None and operand.ndim > len(self.shape):
            self.refuse(
                name,
                operation,
                f"a constant of shape {tuple(operand.shape)} does not broadcast to features {self.shape}",
            )
        if operation == "div" and not bool((1 / operand.detach().double()).isfinite().all()):
            raise InvalidNetworkError(f"layer {self.position} ({name!r}, div): division by zero")
        self.append(Arithmetic(operation, operand), name)

    def sequential(self) -> nn.Sequential:
        """Chains as they are; any other graph lowered to one. A Softmax stays the last layer."""
        kinds = {value.dtype for layer in self.layers for value in layer.parameters()}
        if self.entry is not None and kinds != {self.entry[0]}:
            _, name, kind, reason = self.entry
            self.refuse(name, kind, f"{reason}, and not all weights are of that kind")
        used = Graph.to(self.nodes, self.at).nodes
        if middle := next((node for node in used[:-1] if isinstance(node.value, SOFTMAX)), None):
            kind = type(middle.value).__name__
            self.refuse(middle.name, kind, f"torchreach supports {kind} as the last layer, of a classifier")
        head = self.nodes[self.at]
        if not isinstance(head.value, SOFTMAX):
            return self._body()
        self.at = head.inputs[0]
        self.nodes.remove(head)
        self.layers.remove(head.value)
        return nn.Sequential(*self._body(), head.value)

    def _body(self) -> nn.Sequential:
        straight = all(node.inputs == (i,) for i, node in enumerate(self.nodes[1:])) and self.at == len(self.nodes) - 1
        if straight and all(node.op == "layer" or node.stays for node in self.nodes[1:]):
            return nn.Sequential(*self.layers)
        if self.deployed:
            if not any(node.op == "round" for node in self.nodes) or any(node.op == "pointwise" for node in self.nodes):
                self.refuse("output", "graph", _ROUNDED)
            self.nodes = [
                replace(node, value=_doubled(node.value)) if isinstance(node.value, nn.Module) else node
                for node in self.nodes
            ]
        if any(isinstance(layer, MaskedReLU | Activations) for layer in self.layers):
            self.refuse("output", "graph", "merged or lowered networks must be chains")
        graph = Graph.to(self.nodes, self.at)
        return lower(self._shaped(graph) if any(node.shape is None for node in graph.nodes) else graph)

    def _shaped(self, graph: Graph) -> Graph:
        """The graph with shapes, where its inputs' follows from its first layer."""
        first = next((layer for layer in self.layers if any(True for _ in layer.parameters())), None)
        if not isinstance(first, nn.Linear):
            self.refuse("output", "graph", "input_shape=(...) is required for networks that are no chains")
        try:
            return graph.shaped(first.weight.new_zeros(2, first.in_features))
        except RuntimeError as error:
            raise ShapeError(f"input_shape=(...) is required: {str(error).splitlines()[0]}") from None

    def finish(self, *, warn: bool = True) -> nn.Sequential:
        """The whole chain. A deployed network's is in float64, so that its float layers fit its exact weights.

        warn: of activations whose scale was never calibrated, naming all of them.
        """
        if self.raw:
            self.refuse("output", "codes", "the network must return numbers, not integer codes: dequantise them")
        if self.uncalibrated and warn:
            warnings.warn(
                f"scale 1 and zero point 0 at {', '.join(map(repr, self.uncalibrated))}: these look as if they were "
                "never calibrated (run the prepared network on data before torch's `convert`)",
                UncalibratedWarning,
                stacklevel=3,
            )
        if self.deployed:
            self.layers = [_doubled(layer) for layer in self.layers]
        return self.sequential()

    def _check(self, layer: nn.Module, name: str) -> None:
        kind = type(layer).__name__
        if not is_leaf(layer):
            self.refuse(name, kind)
        if self.codes is not None and not isinstance(layer, _ON_QUANTIZED):
            self.refuse(name, kind, "it is given a quantised tensor, on which torch does not compute it")
        if self.raw and not isinstance(layer, (*PASS_THROUGH, *RESHAPING)):
            self.refuse(name, kind, "it is given integer codes, which must be dequantised first")
        for part in layer.modules():  # the layer itself and, in merged layers, those it is made of
            if reason := altered(part):
                self.refuse(name, kind, reason)
        if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.padding_mode != "zeros":
            self.refuse(name, kind, f"padding_mode must be 'zeros', got {layer.padding_mode!r}")
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and None in (layer.running_mean, layer.running_var):
            self.refuse(name, kind, "it has no running statistics, so its output depends on the whole batch")
        if isinstance(layer, nn.Flatten) and (layer.start_dim < 1 or 0 <= layer.end_dim < layer.start_dim):
            self.refuse(name, kind, f"start_dim must be at least 1 (axis 0 is the batch), got {layer.start_dim}")
        if isinstance(layer, SOFTMAX) and (layer.dim not in (1, -1) or len(self.shape or (1,)) != 1):
            self.refuse(name, kind, f"it must go over the features of flat values, dim=1, got dim={layer.dim}")
        if isinstance(layer, nn.Unflatten) and not (isinstance(layer.dim, int) and layer.dim >= 1):
            self.refuse(name, kind, f"dim must be at least 1 (axis 0 is the batch), got {layer.dim!r}")

    def _check_numbers(self, layer: nn.Module, name: str) -> None:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.running_var is not None
            if not bool((layer.running_var + layer.eps > 0).all()):
                raise InvalidNetworkError(
                    f"layer {self.position} ({name!r}, {type(layer).__name__}): running_var + eps must be positive"
                )

    def _advance(self, layer: nn.Module, name: str) -> None:
        if self.shape is None:
            return
        place = f"layer {self.position} ({name!r}, {type(layer).__name__})"
        if isinstance(layer, nn.Conv1d | nn.Conv2d) and not _is_picture(layer, self.shape):
            # torch reads one axis less as a single picture without a batch axis: rows would be its channels.
            raise ShapeError(f"{place} takes inputs of shape {_wanted(layer)}, got {self.shape}{self._cure(layer)}")
        value = next(iter((*layer.parameters(), *layer.buffers())), torch.zeros(()))
        dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        zero = torch.zeros(1, *self.shape, dtype=dtype, device=value.device)
        try:
            with torch.no_grad():
                self.shape = tuple(layer(zero).shape[1:])
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0]
            if isinstance(layer, nn.Linear):
                reason = f"it takes {layer.weight.shape[1]} numbers"
            raise ShapeError(
                f"{place} does not accept inputs of shape {self.shape}: {reason}{self._cure(layer)}"
            ) from None

    def _cure(self, layer: nn.Module) -> str:
        """What to do about inputs that the first layer with a shape of its own does not accept."""
        shape = self.shape
        if shape is None or shape != self.input_shape:
            return ""
        if isinstance(layer, nn.Linear) and shape != (layer.weight.shape[1],) and prod(shape) == layer.weight.shape[1]:
            return f"; give the inputs its shape, stars.reshape(({layer.weight.shape[1]},)), or start with nn.Flatten()"
        if not isinstance(layer, nn.Conv1d | nn.Conv2d):
            return ""
        if len(shape) == 1:
            return f"; give the inputs such a shape, stars.reshape({_wanted(layer)}) with the picture's own sizes"
        if len(shape) < layer.weight.ndim - 1:
            sizes = _wanted(layer)[1:-1]
            return f"; the first axis counts stars: one picture [{sizes}] needs another, picture[None] ([1, {sizes}])"
        return ""


def _is_picture(layer: nn.Conv1d | nn.Conv2d, shape: Shape) -> bool:
    return len(shape) == layer.weight.ndim - 1 and shape[0] == layer.weight.shape[1] * layer.groups


def _wanted(layer: nn.Conv1d | nn.Conv2d) -> str:
    return f"({layer.weight.shape[1] * layer.groups}, {'L' if layer.weight.ndim == 3 else 'H, W'})"


def _hint(kind: str) -> str:
    word = kind.replace("_", "").replace(".", " ").split()[-1].lower()
    if word not in _KEEP_ORDER:
        return ""
    return (
        ". As the last layer of a classifier, leave it out of both networks (network[:-1], for instance) and compare "
        "the scores before it; it keeps their order, so equivalent(..., top1=True) answers the same without it"
    )


def pooled(layer: nn.AvgPool1d | nn.AvgPool2d) -> int:
    """How many numbers each mean of an average pooling is of; 0 where that depends on the place."""
    override = getattr(layer, "divisor_override", None)
    if override:
        return int(override)
    padded = any(part != 0 for part in (layer.padding if isinstance(layer.padding, tuple) else (layer.padding,)))
    if layer.ceil_mode or (padded and not layer.count_include_pad):
        return 0
    return fan_in(layer)


def _doubled(layer: nn.Module) -> nn.Module:
    values = (*layer.parameters(), *layer.buffers())
    double = all(value.dtype == torch.float64 for value in values if value.is_floating_point())
    return layer if double else copy.deepcopy(layer).double()
