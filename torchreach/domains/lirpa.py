"""Pre-activation bounds of a whole input set from auto_LiRPA's CROWN, taken once, before any split.

CROWN replaces each ReLU by two lines that enclose it and pulls a linear function of the output back to the
input box (Zhang, Weng, Chen, Hsieh, Daniel: Efficient Neural Network Robustness Certification with General
Activation Functions, NeurIPS 2018). Everything here is in float64. auto_LiRPA does not account for rounding:
the bounds are sound up to that, and the caller widens them (`Tolerances.root_margin`).

Axis letters: S input boxes.
"""

from __future__ import annotations

import copy
import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchreach.core.clock import NO_LIMIT, Clock, OutOfTime
from torchreach.core.errors import ShapeError
from torchreach.domains._lirpa_compat import converting, load_auto_lirpa
from torchreach.graph.affine_graph import AffineGraph
from torchreach.graph.layers import ElementwiseAffine, MaskedReLU, Rearrange, Reshape
from torchreach.graph.weights import as_parameter, linear_layer, refresh_pruned

_log = logging.getLogger(__name__)

Bounds = list[tuple[Tensor, Tensor]]
# Matrices [N, N] of the widest layers that CROWN holds at once.
MATRICES = 6
# Loading the library takes seconds that nothing can interrupt: with less time left it is not begun.
LOAD_SECONDS = 4.0


class LirpaUnavailableError(RuntimeError):
    """auto_LiRPA is not installed, or cannot bound this network; use other bounds."""


def preactivation_bounds(chain: nn.Sequential, lower: Tensor, upper: Tensor, clock: Clock = NO_LIMIT) -> Bounds:
    """CROWN bounds of every ReLU's input, in order, and of the network's output last.

    Args:
        chain: flat Sequential of plain affine layers and `nn.ReLU` (see `torchreach.read.module.chain`).
        lower, upper: [S, *shape] input boxes.

    Returns:
        [(lower, upper), ...], each [S, *features], float64, on the device of `lower`, without gradients,
        never looser than interval bounds. Sound up to rounding.

    Raises:
        LirpaUnavailableError: auto_LiRPA is missing or cannot bound this network. Fall back on other bounds.
        ShapeError: the boxes do not fit. OutOfTime: between two operations of the library.
    """
    return _bounds(_Recorded([chain], lower, upper), lower, upper, clock)


def merged_bounds(
    first: nn.Sequential, second: nn.Sequential, lower: Tensor, upper: Tensor, clock: Clock = NO_LIMIT
) -> tuple[Bounds, Bounds]:
    """CROWN bounds of two networks on one shared input, and of first(x) - second(x).

    The difference is bounded as one function of x, so that linear parts which both networks share cancel;
    the relaxations of their ReLUs do not.

    Returns:
        Bounds of the ReLU inputs of `first`, then of `second`: each a list as in `preactivation_bounds`, but
        both end with the bounds [S, N] of first(x) - second(x) in place of the networks' own outputs.

    Raises: as `preactivation_bounds`.
    """
    both = _Recorded([first, second], lower, upper)
    bounds = _bounds(both, lower, upper, clock)
    split = both.activations[0]
    return [*bounds[:split], bounds[-1]], bounds[split:]


class _Recorded(nn.Module):
    """One chain, or the difference of two, in float64; tells what the ReLUs received."""

    def __init__(self, chains: list[nn.Sequential], lower: Tensor, upper: Tensor) -> None:
        super().__init__()
        if lower.shape != upper.shape or lower.ndim < 2:
            raise ShapeError(
                f"lower and upper must both be [S, *shape], got {tuple(lower.shape)} and {tuple(upper.shape)}"
            )
        # Copies, made one by one: a network compared with itself must not share nodes of the traced graph.
        self.chains = nn.ModuleList(_plain_chain(chain, lower) for chain in chains)
        self.activations = [sum(isinstance(layer, nn.ReLU) for layer in chain) for chain in chains]

    def forward(self, x: Tensor) -> Tensor:
        return self.record(x, [])

    def record(self, x: Tensor, received: list[Tensor]) -> Tensor:
        outputs = []
        for chain in self.chains:
            value = x
            for layer in chain:  # type: ignore[union-attr]
                if isinstance(layer, nn.ReLU):
                    received.append(value)
                value = layer(value)
            outputs.append(value)
        return outputs[0] if len(outputs) == 1 else outputs[0] - outputs[1]


class _Scale(nn.Module):
    """x * scale + shift; as parameters, which auto_LiRPA converts like weights."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.detach().clone(), requires_grad=False)
        self.shift = nn.Parameter(shift.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class _FixedReshape(nn.Module):
    """Reshape whose trace holds constants only."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape)


@torch.no_grad()
def _plain_chain(chain: nn.Sequential, lower: Tensor) -> nn.Sequential:
    value = lower[:1].detach().double()
    layers: list[nn.Module] = []
    for layer in chain:
        layers.append(_plain(layer, axes=value.ndim - 2).to(value.device))
        try:
            value = layers[-1](value)
        except RuntimeError as error:
            shape, reason = tuple(lower.shape[1:]), str(error).splitlines()[0]
            raise ShapeError(f"the network does not accept inputs of shape {shape}: {reason}") from None
    return nn.Sequential(*layers)


def _plain(layer: nn.Module, axes: int) -> nn.Module:
    """A float64 copy of `layer` in operations that auto_LiRPA knows; `axes` follow its channel axis."""
    if isinstance(layer, nn.ReLU):
        return nn.ReLU()  # never in place: the value it receives is compared below
    if isinstance(layer, MaskedReLU | AffineGraph | Rearrange | nn.ConvTranspose1d | nn.ConvTranspose2d):
        raise LirpaUnavailableError(f"{type(layer).__name__} is not handed to auto_LiRPA")
    if isinstance(layer, Reshape):
        return _FixedReshape(layer.shape)
    if isinstance(layer, nn.Unflatten) and layer.dim == 1:
        return _FixedReshape(tuple(layer.unflattened_size))
    refresh_pruned(layer)
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        # The weights' values only: how pruning or a parametrization computes them is not to be traced.
        return _with_weights(layer)
    copied = copy.deepcopy(layer).double().eval()
    if isinstance(copied, ElementwiseAffine):
        # After the conversion: 1 / c of a division is then exact to float64.
        return _Scale(copied.scale, copied.shift)
    if isinstance(copied, nn.BatchNorm1d | nn.BatchNorm2d):
        return _normalisation(copied, axes)
    return copied


def _with_weights(layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> nn.Module:
    bias = None if layer.bias is None else layer.bias.detach().double()
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Linear):
        return linear_layer(weight, bias)
    kind: Any = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
    plain = kind(
        *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding),
        *(layer.dilation, layer.groups),
        device="meta",
    )
    plain.weight = as_parameter(weight)
    plain.bias = None if bias is None else as_parameter(bias)
    return plain


def _normalisation(layer: nn.BatchNorm1d | nn.BatchNorm2d, axes: int) -> _Scale:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    scale = torch.rsqrt(layer.running_var + layer.eps)
    if layer.weight is not None:
        scale = scale * layer.weight
    shift = -layer.running_mean * scale
    if layer.bias is not None:
        shift = shift + layer.bias
    return _Scale(*(v.reshape(-1, *[1] * axes) for v in (scale, shift)))


class _Watched(TorchFunctionMode):
    """Looks at the clock before every operation, also those of a library that knows none."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.clock.check()
        return func(*args, **(kwargs or {}))


def _bounds(module: _Recorded, lower: Tensor, upper: Tensor, clock: Clock) -> Bounds:
    lower, upper = lower.detach().double(), upper.detach().double()
    module.eval().requires_grad_(False)
    expected: list[Tensor] = []
    # Points that differ in every coordinate tell the nodes of the graph apart.
    share = torch.linspace(0.05, 0.95, lower[0].numel(), dtype=torch.float64, device=lower.device)
    points = lower + (upper - lower) * share.reshape(lower.shape[1:])
    with torch.no_grad():
        expected.append(module.record(points, expected))
    clock.check()
    if clock.left < LOAD_SECONDS and "auto_LiRPA" not in sys.modules:
        raise OutOfTime
    try:
        library = load_auto_lirpa()
    except ImportError as error:
        raise LirpaUnavailableError(str(error)) from error
    try:
        with torch.no_grad(), converting():
            found = _crown(library, module, lower, upper, points, expected, clock)
    except (LirpaUnavailableError, OutOfTime):
        raise
    except Exception as error:  # the library raises whatever its operators happen to raise
        _log.debug("auto_LiRPA failed", exc_info=True)
        reason = (str(error).splitlines() or [""])[0]
        raise LirpaUnavailableError(
            f"auto_LiRPA cannot bound this network: {type(error).__name__}: {reason}"
        ) from error
    return found


def _crown(
    library: Any,
    module: _Recorded,
    lower: Tensor,
    upper: Tensor,
    points: Tensor,
    expected: list[Tensor],
    clock: Clock,
) -> Bounds:
    box = library.PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper)
    options = {"conv_mode": "matrix", "sparse_intermediate_bounds": False}
    bounded = library.BoundedModule(module, points[:1], bound_opts=options, device=lower.device)
    nodes = _nodes(bounded, points, expected[:-1])
    x = library.BoundedTensor(points, box)
    outputs = expected[-1][0].numel()
    # The library's own identity has the default dtype.
    identity = torch.eye(outputs, dtype=torch.float64, device=lower.device).expand(len(points), outputs, outputs)
    with _Watched(clock):
        output = bounded.compute_bounds(x=(x,), C=identity, method="CROWN")
        crown = [(node.lower, node.upper) for node in nodes] + [tuple(output)]
        output = bounded.compute_bounds(x=(x,), method="IBP")
    interval = [node.interval for node in nodes] + [tuple(output)]
    return [_checked(*bounds) for bounds in zip(crown, interval, expected, strict=True)]


def _nodes(bounded: Any, points: Tensor, expected: list[Tensor]) -> list[Any]:
    """The graph's node before each ReLU, in the order in which the network reaches them.

    The graph lists its nodes in the order of the trace, but may have merged equal ones. So each is recognised
    by the values it takes on `points`.
    """
    from auto_LiRPA.bound_ops import BoundRelu

    bounded(points)
    inputs = [node.inputs[0] for node in bounded._modules.values() if isinstance(node, BoundRelu)]
    result: list[Any] = []
    for value in expected:
        same = [
            node
            for node in inputs
            if node.forward_value.shape == value.shape
            and torch.allclose(node.forward_value, value, rtol=1e-9, atol=1e-12)
        ]
        unused = [node for node in same if all(node is not other for other in result)]
        if not same:
            raise LirpaUnavailableError("auto_LiRPA's graph lacks the input of a ReLU")
        result.append((unused or same)[0])
    return result


def _checked(first: tuple[Tensor, ...], second: tuple[Tensor, ...], value: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection of two sound enclosures, refused if it is not finite or misses a value it must contain."""
    low = torch.maximum(*(bounds[0].reshape(value.shape) for bounds in (first, second)))
    high = torch.minimum(*(bounds[1].reshape(value.shape) for bounds in (first, second)))
    low, high = torch.minimum(low, high), torch.maximum(low, high)  # rounding can cross two equal bounds
    slack = 1e-9 * (1 + value.abs())
    if not bool(((low - slack <= value) & (value <= high + slack)).all()):  # also false for NaN
        raise LirpaUnavailableError("auto_LiRPA's bounds miss a value the network takes")
    return low, high
