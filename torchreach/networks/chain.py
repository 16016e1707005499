"""Any supported module as a flat `nn.Sequential` of leaf layers, parameters shared.

`nn.Sequential` is flattened as it stands. Other modules are traced: by `torch.fx`, which keeps the user's
layers and parameters and needs no example input; where Python code looks at values or shapes (`assert
x.ndim == 2`, `len(x)`), which fx cannot follow, by `torch.export` on an example of the given shape.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn

from torchreach.networks.builder import ChainBuilder, Shape, check_finite, is_leaf
from torchreach.networks.fake_quantized import add_fake_quantized, is_quantization_part, observers
from torchreach.networks.graph import GraphReader
from torchreach.networks.int8_modules import add_int8_module
from torchreach.networks.packed_weights import plain_layer
from torchreach.networks.quantized import WeightOnly
from torchreach.networks.quantizer import Quantizer

_log = logging.getLogger(__name__)

# One analysis reads its networks several times; what is wrong with one of them is said once.
_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def chain(module: nn.Module, input_shape: Shape | None = None) -> nn.Sequential:
    """`module` as a flat `nn.Sequential` of leaf layers, in evaluation order: chain(m)(x) == m(x).

    A deployed (statically quantised) network is described in float64, see `torchreach.networks.quantizer`: then
    the outputs agree up to what torch's kernels round differently, and the layers are snapshots.

    The leaves are layers of `torchreach.networks.layers.AFFINE`, `nn.ReLU`, layers marked `splits_at_zero`, and
    `Quantizer` in deployed networks. They are the module's own layers, and layers made for functional calls hold
    its own parameters: training the module changes the chain. (Weights that the forward pass itself computes
    from parameters, such as `weight * mask`, are taken as they are now.) The module is left as it was.

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
    check_finite(module, skip=observers(module))
    builder = ChainBuilder(None if input_shape is None else tuple(input_shape))
    _add(builder, module, "")
    result = builder.finish(warn=module not in _WARNED)
    if builder.uncalibrated:
        _WARNED.add(module)
    return result


def weight_only(module: nn.Module, input_shape: Shape | None = None) -> WeightOnly:
    """Float twin of a deployed network: its dequantised weights, and no rounding or clamping of activations.

    Arguments and errors as `chain`; a network without quantisers gives the same as `chain`.
    """
    return WeightOnly(*(layer for layer in chain(module, input_shape) if not isinstance(layer, Quantizer)))


def _add(builder: ChainBuilder, module: nn.Module, name: str) -> None:
    kind = type(module)
    if kind.__module__.startswith("torch.ao.nn.") and add_int8_module(builder, module, name):
        return
    if add_fake_quantized(builder, module, name, _add):
        return
    if is_leaf(module):
        builder.append(plain_layer(builder, module, name), name)
        return
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if not all(getattr(hook, "__module__", "") == "torch.export._unlift" for hook in hooks):  # these check inputs
        builder.refuse(name, kind.__name__, "a forward hook may change what the module computes; remove it")
    if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
        for child_name, child in module._modules.items():
            assert child is not None
            _add(builder, child, f"{name}.{child_name}" if name else child_name)
        return
    if kind.__module__.startswith("torch.") and not isinstance(module, fx.GraphModule):
        builder.refuse(name, kind.__name__)  # a library layer, not the user's code: tracing has nothing to find
    _trace(builder, module, name)


def _trace(builder: ChainBuilder, module: nn.Module, name: str) -> None:
    if isinstance(module, fx.GraphModule):  # exported ones refuse eval(), and there is nothing left to trace
        add_graph_module(builder, module, name)
        return
    state = torch.get_rng_state()
    with evaluation_mode(module):
        try:
            graph = _Tracer().trace(module)
        except Exception as error:  # whatever the user's forward does with a proxy
            graph, failure = None, error
        if not torch.equal(torch.get_rng_state(), state):
            torch.set_rng_state(state)
            builder.refuse(name, type(module).__name__, "its forward pass draws random numbers")
        if graph is not None:
            GraphReader(builder, graph, module, name, _add).read()
            return
        _log.debug("torch.fx could not trace %s (%s); trying torch.export", type(module).__name__, failure)
        exported = _export(builder, module, name, failure)
    add_graph_module(builder, exported, name)


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


class _Tracer(fx.Tracer):
    """Keeps leaf layers whole, and buffers as references, so that the chain shares them."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or is_quantization_part(m) or super().is_leaf_module(m, module_qualified_name)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """`module` in evaluation mode within the block; every submodule's own mode after it."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for child, mode in modes:
            child.training = mode
