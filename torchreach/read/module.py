"""Any supported module as a flat `nn.Sequential` of leaf layers, parameters shared.

`nn.Sequential` is flattened as it stands. Other modules are traced: by `torch.fx`, which keeps the user's
layers and parameters and needs no example input; where Python code looks at values or shapes (`assert
x.ndim == 2`, `len(x)`), which fx cannot follow, by `torch.export` on an example of the given shape.
"""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from torchreach.core.errors import OptionError, ShapeError
from torchreach.graph.deployed import DeployedNetwork
from torchreach.graph.lowering import Graph
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.weights import WeightOnly, evaluation_mode, standalone_copy
from torchreach.read.builder import ChainBuilder, Shape, check_finite, is_leaf
from torchreach.read.calls import altered, is_wrapper, keeps, unwrapped
from torchreach.read.dialects.codes import add_deployed_network
from torchreach.read.dialects.eager_int8 import add_int8_module
from torchreach.read.dialects.qat import add_fake_quantized, is_observed, is_quantization_part, observers
from torchreach.read.fx import GraphReader

_log = logging.getLogger(__name__)

# Layers that compute something else in training mode.
_MODAL = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)

# Sizes of the batches on which a traced module must agree with its layers, and how well, relative to the largest value.
BATCHES = (1, 2, 7)
AGREE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}

# One analysis reads its networks several times; what is wrong with one of them is said once.
_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()

# What is read within `reading_once`: by module and shape, with the module, whose id must stay its own.
_Read = dict[tuple[int, Shape | None], tuple[nn.Module, nn.Sequential, Graph]]
_READ: ContextVar[_Read | None] = ContextVar("torchreach_read", default=None)


@contextmanager
def reading_once() -> Iterator[None]:
    """Within the block each network is read once: for verbs, during which networks stay what they are."""
    token = _READ.set({} if _READ.get() is None else _READ.get())
    try:
        yield
    finally:
        _READ.reset(token)


def chain(module: nn.Module, input_shape: Shape | None = None) -> nn.Sequential:
    """`module` as a flat `nn.Sequential` of leaf layers, in evaluation order: chain(m)(x) == m(x).

    A deployed (statically quantised) network is described in float64, see `torchreach.graph.quantizer`: then
    the outputs agree up to what torch's kernels round differently, and the layers are snapshots.

    The leaves are layers of `torchreach.graph.layers.AFFINE`, `nn.ReLU`, merged ReLU layers, and `Quantizer` in
    deployed networks. They are the module's own layers, and layers made for functional calls hold its own
    parameters: training the module changes the chain. (Weights that are computed from parameters, by the forward pass,
    a hook of `torch.nn.utils` or a parametrisation, are taken as they are now.) The module is left as it was.

    What a call of a module computes is read, not what its class says: hooks, an instance's own `forward` and classes
    that override part of a layer are refused by name, or traced.

    Evaluation semantics throughout, whatever mode the module is in: dropout is left out, batch norm uses its
    running statistics.

    Args:
        input_shape: shape of one input, no batch axis; needed only where a layer's meaning depends on it.

    Warns: UncalibratedWarning, once for each network, names activations with scale 1 and zero point 0.

    Raises:
        UnsupportedLayerError: a layer without a sound rule, named with its position, or a graph that is not
            a chain (residual connections, several inputs or outputs).
        InvalidNetworkError: a parameter is NaN or infinite, a scale not positive, a zero point out of range.
        ShapeError: a layer does not accept what `input_shape` leads to.
    """
    return _read(module, input_shape)[0]


def graph(module: nn.Module, input_shape: Shape) -> Graph:
    """`module` as the graph that it is read from, before it is lowered: what torch executes, node by node.

    Arguments and errors as `chain`.
    """
    return _read(module, input_shape)[1]


def _read(module: nn.Module, input_shape: Shape | None) -> tuple[nn.Sequential, Graph]:
    check_module(module)
    shape, known = _checked_shape(input_shape), _READ.get()
    if known is not None and (id(module), shape) in known:
        return known[id(module), shape][1:]
    check_finite(module, skip=observers(module))
    builder = ChainBuilder(shape)
    _refuse_stuck(builder, module)
    _add(builder, module, "")
    executed = Graph.to(builder.nodes, builder.at)
    result = builder.finish(warn=module not in _WARNED)
    _gather(result, module)
    if builder.uncalibrated:
        _WARNED.add(module)
    if builder.traced and not builder.deployed and builder.input_shape is not None:
        _check_traced(builder, module, result)
    if known is not None:
        known[id(module), shape] = module, result, executed
    return result, executed


def weight_only(module: nn.Module, input_shape: Shape | None = None) -> WeightOnly:
    """Float twin of a deployed network: its dequantised weights, and no rounding or clamping of activations.

    Arguments and errors as `chain`. A network without quantisers gives the same as `chain`.

    Examples:
        >>> from torch.ao import quantization
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> wrapped = quantization.QuantWrapper(network).eval()
        >>> wrapped.qconfig = quantization.default_qconfig
        >>> prepared = quantization.prepare(wrapped)
        >>> _ = prepared(torch.rand(20, 2))  # calibrates
        >>> int8 = quantization.convert(prepared)
        >>> [type(layer).__name__ for layer in tr.weight_only(int8)]
        ['Linear', 'ReLU', 'Linear']
    """
    if isinstance(module, DeployedNetwork):
        builder = ChainBuilder(_checked_shape(input_shape))
        add_deployed_network(builder, module, "", rounded=False)
        return WeightOnly(*builder.finish())
    return WeightOnly(*(layer for layer in chain(module, input_shape) if not isinstance(layer, Quantizer)))


def check_module(network: object) -> None:
    """Raises OptionError for what is not a module."""
    if isinstance(network, nn.Module):
        return
    cure = ""
    if isinstance(network, torch.jit.ScriptFunction) or callable(network):
        cure = "; put the function into the forward method of a module, whose parameters can then be seen"
    raise OptionError(
        "a network must be a torch.nn.Module, a file (.onnx, .tflite, or .pt2 of torch.export.save) or an exported "
        f"program, got {type(network).__name__}{cure}"
    )


def _checked_shape(shape: Shape | None) -> Shape | None:
    if shape is None:
        return None
    if isinstance(shape, int) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ShapeError(f"input_shape must be the sizes of one input without batch axis, (1, 28, 28), got {shape!r}")
    return tuple(shape)


def _refuse_stuck(builder: ChainBuilder, module: nn.Module) -> None:
    """Refuses a module whose own `train` keeps dropout or batch norm in training mode when it is told to evaluate."""
    own = (m for m in module.modules() if not isinstance(m, fx.GraphModule))
    if all(type(m).train is nn.Module.train and "train" not in vars(m) for m in own):
        return
    for name, part in standalone_copy(module).eval().named_modules():
        if part.training and isinstance(part, _MODAL):
            builder.refuse(name, type(part).__name__, "a train() method keeps it in training mode after eval()")


def _gather(layers: nn.Sequential, module: nn.Module) -> None:
    """Moves masks and indices that reading made to where the module's weights are."""
    values = (*module.parameters(), *module.buffers())
    device = next((value.device for value in values if value.is_floating_point()), torch.device("cpu"))
    if device.type == "cpu":
        return
    for part in layers.modules():
        if type(part).__module__.startswith("torchreach."):
            for name, value in list(part.named_buffers(recurse=False)):
                if value.device.type == "cpu":
                    setattr(part, name, value.to(device))


def _check_traced(builder: ChainBuilder, module: nn.Module, layers: nn.Sequential) -> None:
    """Refuses a module that computes something else than `layers` at random inputs, alone or in a batch.

    Tracing runs the user's code once; state, random numbers and what depends on the batch size escape it.
    """
    assert builder.input_shape is not None
    values = (*module.parameters(), *module.buffers())
    like = next((value for value in values if value.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(BATCHES), *builder.input_shape, generator=generator, dtype=torch.float64)
    x = x.to(like.device, like.dtype)
    for part in (part for size in BATCHES for part in x.split(size)):
        with torch.no_grad(), evaluation_mode(module):
            try:
                found = module(part.clone())
            except Exception as error:  # it may take batches of one size only
                _log.debug("%s does not run on a batch of %d (%s)", type(module).__name__, len(part), error)
                continue
            wanted = layers(part.clone())
        off = found.shape != wanted.shape or float((found - wanted).abs().max()) if wanted.numel() else 0.0
        if not off <= AGREE[like.dtype] * (1 + float(wanted.abs().max() if wanted.numel() else 0.0)):
            builder.refuse(
                "",
                type(module).__name__,
                "its layers, as they are read, compute something else than it does (on random inputs): a forward pass "
                "must not depend on state, random numbers or the size of the batch",
            )


def _add(builder: ChainBuilder, module: nn.Module, name: str) -> None:
    module, path = unwrapped(module)
    name = ".".join(part for part in (name, path) if part)
    kind = type(module)
    if not is_observed(module) and (reason := altered(module)):
        builder.refuse(name, kind.__name__, reason)
    if isinstance(module, DeployedNetwork):
        add_deployed_network(builder, module, name)
        return
    if kind.__module__.startswith("torch.ao.nn.") and add_int8_module(builder, module, name):
        return
    if add_fake_quantized(builder, module, name, _add):
        return
    if is_leaf(module):
        builder.append(module, name)
        return
    if isinstance(module, nn.Sequential) and keeps(module, nn.Sequential):
        for child_name, child in module._modules.items():
            path = f"{name}.{child_name}" if name else child_name
            if child is None:
                builder.refuse(path, "None", "every place of a Sequential must hold a layer")
            _add(builder, child, path)
        return
    if kind.__module__.startswith("torch.") and not isinstance(module, fx.GraphModule):
        builder.refuse(name, kind.__name__)  # a library layer, not the user's code: tracing has nothing to find
    _trace(builder, module, name)


def _trace(builder: ChainBuilder, module: nn.Module, name: str) -> None:
    builder.traced = True
    if isinstance(module, fx.GraphModule):  # exported ones refuse eval(), and there is nothing left to trace
        add_graph_module(builder, module, name)
        return
    state, kept = torch.get_rng_state(), _tensors(module)
    with evaluation_mode(module):
        try:
            graph, failure = _Tracer().trace(module), None
        except Exception as error:  # whatever the user's forward does with a proxy
            graph, failure = None, error
        if not torch.equal(torch.get_rng_state(), state):
            torch.set_rng_state(state)
            builder.refuse(name, type(module).__name__, "its forward pass draws random numbers")
        if any(tensor._version != version for tensor, version in kept):
            reason = "its forward pass changes a tensor of the network in place, so outputs depend on state"
            builder.refuse(name, type(module).__name__, reason)
        if failure is None:
            assert graph is not None
            GraphReader(builder, graph, module, name, _add).read()
            return
        _log.debug("torch.fx could not trace %s (%s); trying torch.export", type(module).__name__, failure)
        exported = _export(builder, module, name, failure)
    add_graph_module(builder, exported, name)


def _tensors(module: nn.Module) -> list[tuple[Tensor, int]]:
    """The tensors that a module keeps, and how often each was changed: tracing changes those that are no buffers."""
    found: list[Any] = []
    map_aggregate([list(vars(part).values()) for part in module.modules()], found.append)
    return [(a, a._version) for a in found if isinstance(a, Tensor) and not a.is_inference()]


def add_graph_module(builder: ChainBuilder, module: fx.GraphModule, name: str) -> None:
    """Adds the layers of a module that is traced already."""
    GraphReader(builder, module.graph, module, name, _add).read()


def _export(builder: ChainBuilder, module: nn.Module, name: str, failure: Exception) -> fx.GraphModule:
    kind = type(module).__name__
    reason = (str(failure).splitlines() or [type(failure).__name__])[0]
    if builder.shape is None:
        builder.refuse(name, kind, f"torch.fx cannot trace it ({reason}); pass input_shape=(...) to use torch.export")
    value = next(iter((*module.parameters(), *module.buffers())), torch.zeros(()))
    example = torch.zeros(2, *builder.shape, dtype=value.dtype, device=value.device)
    try:
        try:
            batch = {0: torch.export.Dim.DYNAMIC}
            program = torch.export.export(module, (example,), dynamic_shapes=(batch,))
        except Exception:  # the forward pass may fix the batch size
            program = torch.export.export(module, (example[:1],))
    except Exception as error:
        builder.refuse(name, kind, f"torch.fx and torch.export cannot trace it: {str(error).splitlines()[0]}")
    return exported_module(program)


def exported_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a graph module on its own parameters, without run-time checks of the example's shape."""
    try:
        return program.module(check_guards=False)  # type: ignore[return-value]
    except TypeError:  # older torch has no such checks to leave out
        return program.module()  # type: ignore[return-value]


class _Proxy(fx.Proxy):
    """Records `x += y` as the change of x that it is for tensors; without these methods Python makes it x = x + y."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._change(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._change(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._change(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._change(operator.itruediv, other)

    def _change(self, how: Callable[[Any, Any], Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", how, (self, other), {})


class _Tracer(fx.Tracer):
    """Keeps leaf layers whole, and buffers as references, so that the chain shares them."""

    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            is_leaf(m) or is_quantization_part(m) or is_wrapper(m) or super().is_leaf_module(m, module_qualified_name)
        )
