"""Reads a traced graph (torch.fx or torch.export) into a builder.

The graph is walked once in evaluation order. Each operation takes values computed before and constants: parameters,
buffers, numbers, and what is computed from them alone. Everything else is refused by name, never skipped: a layer
that is overlooked would make a certificate wrong.
"""

# Handlers share the signatures of the torch functions they are named after.
# ruff: noqa: ARG002

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from torchreach.core.errors import UnsupportedLayerError
from torchreach.graph.layers import Reshape
from torchreach.graph.smooth import BY_NAME, Entry
from torchreach.graph.weights import as_parameter, linear_layer
from torchreach.read.builder import ChainBuilder, is_leaf
from torchreach.read.dialects.pt2e import CONSTANT_QUANTIZED, check_weight, quantized_operation
from torchreach.read.dialects.qat import is_quantization_part, prepared_weight
from torchreach.read.fx_operations import GraphOperations
from torchreach.read.operations import CHECKS, CONSTANT, DTYPES, IDENTITIES, changes_in_place, is_entry, operation
from torchreach.read.values import Value, Values


@dataclass(frozen=True)
class _Shape:
    """x.shape of some value; `features` without the batch axis, None where unknown."""

    features: tuple[int, ...] | None


_BATCH = object()  # x.shape[0]


class GraphReader(GraphOperations):
    """Adds the layers of `graph`, traced from `root`, to `builder`; `add_module` adds a module it calls."""

    def __init__(
        self,
        builder: ChainBuilder,
        graph: fx.Graph,
        root: nn.Module,
        prefix: str,
        add_module: Callable[[ChainBuilder, nn.Module, str], None],
    ) -> None:
        self.builder = builder
        self.graph = graph
        self.root = root
        self.prefix = prefix
        self.add_module = add_module
        self.started = False
        self.example: int | None = None  # the size of the batch that an exported program is fixed to
        self.env = Values()

    def read(self) -> None:
        for node in self.graph.nodes:
            self.env[node] = self._visit(node)

    def _visit(self, node: fx.Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.env[n])
        if node.op == "placeholder":
            if self.started:
                if node.args:
                    return node.args[0]  # an optional argument keeps its default
                self._refuse_graph(node, "the network must have one input")
            self.started = True
            size = getattr(node.meta.get("val"), "shape", (None,))[0]
            self.example = size if type(size) is int else None
            return Value(self.builder.at)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        if node.op == "output":
            several = isinstance(args[0], tuple | list | dict)
            output = args[0][0] if isinstance(args[0], tuple | list) and len(args[0]) == 1 else args[0]
            if not isinstance(output, Value):
                self._refuse_graph(
                    node, "the network must have one output" if several else "it does not return a value of its input"
                )
            self.builder.move(output.at, self._place(node))
            return None
        if node.op == "call_module":
            return self._call_module(node, args, kwargs)
        return self._call(node, args, kwargs)

    def _call_module(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        if str(node.target) in CHECKS:
            return None
        if len(args) != 1 or kwargs:
            self._refuse_graph(node, "a layer must take one value")
        path = str(node.target)
        layer = self.root.get_submodule(path)
        if isinstance(args[0], Tensor) and is_quantization_part(layer):
            return prepared_weight(self.builder, layer, args[0], self._name(path))
        value = self._take(node, args[0])
        self.add_module(self.builder, layer, self._name(path))
        root = self.builder.root(value.at)
        now = self.builder.changed.get(root)
        if now is not None and not is_leaf(layer) and self.env.is_read(self.builder, root, by=node):
            self._refuse_graph(node, "it changes in place what is used again")
        return self._done(node, value, now)

    def _call(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        name = operation(node)
        if name in CHECKS:
            return None
        found: list[Any] = []
        map_aggregate((args, kwargs), found.append)
        values = [a for a in found if isinstance(a, Value)]
        in_place = changes_in_place(name, args, kwargs)
        if kwargs.get("out") is not None or (in_place and values and values[0] is not args[0]):
            self._refuse(node, name, "torchreach does not follow what it writes into a tensor given to it")
        if not values and not any(isinstance(a, _Shape) or a is _BATCH for a in found):
            return self._constant_call(node, name, args, kwargs, in_place=in_place)
        if not values or name in ("getattr", "size", "sym_size", "dim"):
            return self._shape_query(node, name, args, kwargs)
        if name == "getitem" and isinstance(args[0], tuple | list):
            return args[0][args[1]]
        joins = getattr(self, f"_join_{name.rstrip('_')}", None)
        if len(values) > 1 and joins is None:
            self._refuse_graph(node, f"{name} combines two values that both depend on the input")
        self._take(node, values[0])
        handler = getattr(self, f"_op_{name.replace('.', '_').rstrip('_')}", None)
        if joins is not None and (len(values) > 1 or handler is None):
            handler = joins
        if name.rstrip("_") in BY_NAME:
            handler = partial(_smooth, BY_NAME[name.rstrip("_")], self)
        if name.rstrip("_") in IDENTITIES:
            handler = self._op_identity
        quantized = quantized_operation(name)
        if quantized is not None:
            handler = partial(_quantized, quantized, self)
        if handler is None:
            self._refuse(node, name)
        try:
            parts = handler(node, *args, **kwargs)
        except TypeError as error:  # a call signature none of the handlers below knows
            self._refuse(node, name, f"called in a way torchreach does not know ({error})")
        if parts is not None:
            return tuple(Value(at) for at in parts)
        return self._done(node, values[0], self.builder.at if in_place else None)

    def _constant_call(self, node: fx.Node, name: str, args: tuple, kwargs: dict, *, in_place: bool) -> Any:
        if name.rstrip("_") not in CONSTANT | CONSTANT_QUANTIZED:
            self._refuse(node, name)
        old = args[0] if in_place and args and name.rstrip("_") not in IDENTITIES else None
        if old is not None:
            if isinstance(old, Tensor) and self.env.is_state(old):
                self._refuse(node, name, "it changes a tensor of the network in place, so outputs depend on state")
            args = (old.clone() if isinstance(old, Tensor) else copy.copy(old), *args[1:])
        with torch.no_grad():
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        check_weight(self.builder, self._place(node), name, args, value)
        if isinstance(old, Tensor):
            self.env.replace(old, value)
        return value

    def _take(self, node: fx.Node, value: Any) -> Value:
        if not isinstance(value, Value):
            self._refuse_graph(node, "it reads something else than one value")
        self.builder.move(value.at, self._place(node))
        return value

    def _done(self, node: fx.Node, old: Value, now: int | None) -> Value:
        """What an operation gives; `now`: the node that the memory of its input holds then, None where it is as before.

        An observer, for instance, rounds what its layer gives, but not what that layer left in its input.
        """
        new = Value(self.builder.at)
        if now is not None:
            root = self.builder.root(old.at)
            if self.env.is_read(self.builder, root, besides=old):
                self._refuse_graph(node, "it changes a value in place that may share its memory with another one")
            if now != old.at:
                self.builder.changed[root] = now
            self.env.replace(old, new if now == new.at else Value(now))
        return new

    # Shapes.

    def _shape_query(self, node: fx.Node, name: str, args: tuple, kwargs: dict) -> Any:
        first = args[0]
        if isinstance(first, Value):
            dim: Any = args[1] if len(args) > 1 else kwargs.get("dim")
            if name in ("size", "sym_size") and dim == 0:
                return _BATCH  # of any value: no layer changes it
            if (name == "getattr" and dim == "shape") or (name in ("size", "sym_size") and dim is None):
                return _Shape(self.builder.nodes[first.at].shape)
            self._take(node, first)
            if name in ("size", "sym_size"):
                return self._axis(dim, self._features(node))
            if (name == "getattr" and dim == "ndim") or name == "dim":
                return 1 + len(self._features(node))
        elif isinstance(first, _Shape) and name == "getitem":
            if args[1] == 0:
                return _BATCH
            if first.features is None:
                self._refuse(node, "shape", "input_shape=(...) is required to know it")
            if isinstance(args[1], int):
                return self._axis(args[1], first.features)
            if isinstance(args[1], slice):
                return [_BATCH, *first.features][args[1]]
        self._refuse(node, name, "torchreach cannot follow what it does with the input's shape")

    @staticmethod
    def _axis(axis: int, features: tuple[int, ...]) -> Any:
        return (_BATCH, *features)[axis]

    def _features(self, node: fx.Node) -> tuple[int, ...]:
        shape = self.builder.shape
        if shape is None:
            self._refuse(node, "shape", "input_shape=(...) is required to know it")
        return shape

    # Operations. Each takes the node and the arguments of the torch function it is named after.

    def _op_identity(self, node: fx.Node, x: Any, *args: Any, dtype: Any = None, **_: Any) -> None:
        name = operation(node)
        kinds = [a.dtype if isinstance(a, Tensor) else a for a in (dtype, *args)]
        kinds += [named] if (named := DTYPES.get(name)) else []
        wide = any(value.dtype == torch.float64 for value in self.root.parameters())
        for wanted in kinds:
            reason = f"conversion to {wanted} rounds"
            if self.builder.at == 0 and wanted in (torch.float16, torch.bfloat16) and is_entry(node):
                self.builder.entry = wanted, self._place(node), name, reason
                continue
            rounds = wanted not in (torch.float32, torch.float64) or (wide and wanted == torch.float32)
            if isinstance(wanted, torch.dtype) and rounds:
                self._refuse(node, name, reason)

    def _op_add(self, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> None:
        const = a if isinstance(b, Value) else b
        if alpha != 1:
            if isinstance(b, Value):
                self._refuse(node, "add", "alpha is supported for a constant second operand only")
            const = self._constant(node, const) * alpha
        self._arithmetic(node, "add", const)

    def _op_sub(self, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> None:
        if isinstance(b, Value):
            if alpha != 1:
                self._refuse(node, "sub", "alpha is supported for a constant second operand only")
            self._arithmetic(node, "rsub", a)
        else:
            self._arithmetic(node, "sub", b if alpha == 1 else self._constant(node, b) * alpha)

    def _op_rsub(self, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> None:
        self._op_sub(node, b, a, alpha)

    def _op_mul(self, node: fx.Node, a: Any, b: Any) -> None:
        self._arithmetic(node, "mul", a if isinstance(b, Value) else b)

    def _op_div(self, node: fx.Node, a: Any, b: Any, rounding_mode: str | None = None) -> None:
        if isinstance(b, Value) or rounding_mode is not None:
            self._refuse(node, "div", "division needs a constant divisor and no rounding")
        self._arithmetic(node, "div", b)

    def _op_neg(self, node: fx.Node, x: Any) -> None:
        self._arithmetic(node, "mul", -1)

    def _op_linear(self, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> None:
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            self._refuse(node, "linear", "its weight must be a constant matrix")
        self.builder.append(linear_layer(weight, bias), self._place(node))

    def _op_matmul(self, node: fx.Node, a: Any, b: Any) -> None:
        if not isinstance(b, Tensor) or b.ndim != 2:
            self._refuse(node, "matmul", "the right factor must be a constant matrix")
        self.builder.append(linear_layer(b.detach().t(), None), self._place(node))

    _op_mm = _op_matmul

    def _op_addmm(self, node: fx.Node, bias: Any, x: Any, weight: Any, *, beta: Any = 1, alpha: Any = 1) -> None:
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or (beta, alpha) != (1, 1) or bias.ndim != 1:
            self._refuse(node, "addmm", "it must add a constant vector to a product with a constant matrix")
        self.builder.append(linear_layer(weight.detach().t(), bias), self._place(node))

    def _op_conv1d(self, node: fx.Node, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> None:
        self._convolution(node, nn.Conv1d, weight, bias, *args, **kwargs)

    def _op_conv2d(self, node: fx.Node, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> None:
        self._convolution(node, nn.Conv2d, weight, bias, *args, **kwargs)

    def _convolution(
        self,
        node: fx.Node,
        kind: Any,
        weight: Any,
        bias: Any,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
    ) -> None:
        if not isinstance(weight, Tensor):
            self._refuse(node, "convolution", "its weight must be constant")
        fit = [v if isinstance(v, int | str) else tuple(v) for v in (stride, padding, dilation)]
        layer = kind(weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), *fit, groups, device="meta")
        layer.weight = as_parameter(weight)
        layer.bias = None if bias is None else as_parameter(bias)
        self.builder.append(layer, self._place(node))

    def _op_batch_norm(
        self,
        node: fx.Node,
        x: Any,
        weight,
        bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        cudnn=False,
    ) -> None:
        if training or running_var is None:
            self._refuse(node, "batch_norm", "it must use running statistics")
        rank = len(self._features(node))
        kind = nn.BatchNorm2d if rank == 3 else nn.BatchNorm1d
        layer = kind(len(running_var), eps=eps, affine=False).eval()
        layer.running_mean, layer.running_var = running_mean, running_var
        layer.weight = None if weight is None else as_parameter(weight)  # type: ignore[assignment]
        layer.bias = None if bias is None else as_parameter(bias)  # type: ignore[assignment]
        if (weight is None) != (bias is None):
            self._refuse(node, "batch_norm", "weight and bias must both be given, or neither")
        self.builder.append(layer, self._place(node))

    def _op_F_batch_norm(  # noqa: N802
        self, node: fx.Node, x: Any, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ) -> None:
        self._op_batch_norm(node, x, weight, bias, mean, var, training, momentum, eps)

    def _op_avg_pool1d(self, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> None:
        self.builder.append(nn.AvgPool1d(*args, **kwargs), self._place(node))

    def _op_avg_pool2d(self, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> None:
        self.builder.append(nn.AvgPool2d(*args, **kwargs), self._place(node))

    def _op_dropout(self, node: fx.Node, x: Any, p: float = 0.5, train: bool = True) -> None:
        if train and p > 0:
            self._refuse(node, "dropout", "it drops values in evaluation mode too: pass training=self.training")

    def _op_F_dropout(  # noqa: N802
        self, node: fx.Node, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> None:
        self._op_dropout(node, x, p, training)

    def _op_flatten(self, node: fx.Node, x: Any, start_dim: int = 0, end_dim: int = -1) -> None:
        self.builder.append(nn.Flatten(start_dim, end_dim), self._place(node))

    def _op_unflatten(self, node: fx.Node, x: Any, dim: int, sizes: Any) -> None:
        self.builder.append(nn.Unflatten(dim, tuple(sizes)), self._place(node))

    def _op_reshape(self, node: fx.Node, x: Any, *shape: Any, **kwargs: Any) -> None:
        size = kwargs.get("shape", kwargs.get("size", shape[0] if len(shape) == 1 else shape))
        size = [size] if isinstance(size, int) else list(size)
        # A leading 1 or -1 is read as the batch: torchreach's networks take one input per row. So is the size of the
        # example's batch: for that size nothing else keeps all numbers.
        batch, features = size[0], tuple(size[1:])
        if (batch is not _BATCH and batch not in (1, -1, self.example)) or not all(type(n) is int for n in features):
            self._refuse(node, "reshape", "it must keep the batch axis first and give the other sizes as integers")
        if features.count(-1) > 1 or (batch == -1 and -1 in features) or not features:
            self._refuse(node, "reshape", f"it must keep the batch axis, got {size}")
        if features == (-1,):
            self.builder.append(nn.Flatten(), self._place(node))
            return
        if -1 in features:
            known = -math.prod(features)
            features = tuple(math.prod(self._features(node)) // known if n == -1 else n for n in features)
        self.builder.append(Reshape(features), self._place(node))

    _op_view = _op_reshape

    def _op_unsqueeze(self, node: fx.Node, x: Any, dim: int) -> None:
        shape = list(self._features(node))
        axis = dim if dim >= 0 else dim + len(shape) + 2
        if axis < 1:
            self._refuse(node, "unsqueeze", "axis 0 is the batch")
        shape.insert(axis - 1, 1)
        self.builder.append(Reshape(tuple(shape)), self._place(node))

    def _op_squeeze(self, node: fx.Node, x: Any, dim: int | None = None) -> None:
        shape = list(self._features(node))
        axis = None if dim is None else (dim if dim >= 0 else dim + len(shape) + 1)
        if axis is None or axis < 1:
            self._refuse(node, "squeeze", "it needs an axis other than 0, the batch")
        if shape[axis - 1] == 1:
            del shape[axis - 1]
        self.builder.append(Reshape(tuple(shape)), self._place(node))

    # Helpers.

    def _arithmetic(self, node: fx.Node, operation: str, operand: Any) -> None:
        self.builder.arithmetic(operation, self._constant(node, operand), self._place(node))

    def _constant(self, node: fx.Node, value: Any) -> Tensor:
        known = (p for layer in self.builder.layers for p in layer.parameters())
        like = next(iter((*self.root.parameters(), *known)), torch.zeros(()))
        if isinstance(value, Tensor):
            # torch converts whole numbers to the dtype of the other operand
            whole = not value.is_floating_point() and not value.is_complex() and not value.is_quantized
            return value.to(like.dtype) if whole else value
        if not isinstance(value, int | float) or not math.isfinite(value):
            self._refuse(node, operation(node), f"its operand must be a finite constant, got {value!r}")
        # Without an axis it does not widen what it is combined with; torch keeps Python's numbers in float64, too.
        return torch.tensor(float(value), dtype=torch.float64, device=like.device)

    def _place(self, node: fx.Node) -> str:
        """Dotted path of the submodule `node` was traced from, where the tracer kept it, and the node."""
        stack = node.meta.get("nn_module_stack") or {}
        paths = [str(entry[0]) for entry in stack.values() if isinstance(entry, tuple)]
        path = paths[-1] if paths else ""
        return self._name(".".join(part for part in (path, node.name) if part))

    def _name(self, path: str) -> str:
        return f"{self.prefix}.{path}" if self.prefix else path

    def _refuse(self, node: fx.Node, kind: str, reason: str = "") -> NoReturn:
        self.builder.refuse(self._place(node), kind, reason)

    def _refuse_graph(self, node: fx.Node, reason: str) -> NoReturn:
        raise UnsupportedLayerError(
            f"node {self._place(node)!r}: {reason}; torchreach reads graphs of one input and one output whose values "
            "are joined by sums, concatenation and maxima"
        )


def _smooth(entry: Entry, reader: GraphReader, node: fx.Node, _x: Any, *args: Any, **kwargs: Any) -> None:
    reader.builder.append(entry.called(*args, **kwargs), reader._place(node))


def _quantized(add: Callable[..., None], reader: GraphReader, node: fx.Node, *args: Any, **kwargs: Any) -> None:
    add(reader.builder, reader._place(node), *args, **kwargs)
