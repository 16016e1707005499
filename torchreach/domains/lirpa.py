"""Pre-activation bounds of whole input stars from auto_LiRPA's CROWN, taken once, before any split.

CROWN replaces each ReLU by two lines that enclose it and pulls a linear function of the output back to the
input box (Zhang, Weng, Chen, Hsieh, Daniel: Efficient Neural Network Robustness Certification with General
Activation Functions, NeurIPS 2018). The library has the ReLUs and the order of the work; an affine step is one
operator of its graph, which goes back by the step's own transpose. So whatever has steps has bounds: sums, stacks,
pools, maxima and skips among them, and two networks side by side.

Everything here is in float64. auto_LiRPA does not account for rounding: the bounds are sound up to that, and the
caller widens them (`Tolerances.root_margin`).

Axis letters: S input stars, M their dimension, N features, R rows (one objective each).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchreach.core.clock import NO_LIMIT, Clock, OutOfTime
from torchreach.domains._lirpa_compat import converting, load_auto_lirpa
from torchreach.domains.zonotope import Bounds
from torchreach.graph.steps import Step
from torchreach.graph.twins import twins

_log = logging.getLogger(__name__)

# Matrices [N, N] of the widest layers that CROWN holds at once.
MATRICES = 6
# Loading the library takes seconds that nothing can interrupt: with less time left it is not begun.
LOAD_SECONDS = 4.0
_OPERATOR = "torchreach::Map"


class LirpaUnavailableError(RuntimeError):
    """auto_LiRPA is not installed, or cannot bound this network; use other bounds."""


def preactivation_bounds(
    steps: tuple[Step, ...], rows: Tensor, slack: Tensor, known: Bounds, clock: Clock = NO_LIMIT
) -> Bounds:
    """CROWN bounds of what the ReLUs of every step receive, and of the network's output last.

    Args:
        rows: [S, 1 + M, N_in] input stars over [-1, 1]^M; slack: [S, N_in]. CROWN takes the boxes around them.
        known: bounds [S, N] of every step that hold; ReLUs whose sign they show are not bounded again.

    Returns:
        [(lower, upper), ...], each [S, N], float64, without gradients; infinite for features without a ReLU. Those
        with one are never looser than `known`. Sound up to rounding.

    Raises:
        LirpaUnavailableError: auto_LiRPA is missing or cannot bound this network. Fall back on other bounds.
        OutOfTime: between two operations of the library.
    """
    for step in steps:
        if step.curves or step.quantizer is not None or step.noise is not None:
            raise LirpaUnavailableError(f"{step.name}: only affine maps and ReLUs are handed to auto_LiRPA")
    clock.check()
    if clock.left < LOAD_SECONDS and "auto_LiRPA" not in sys.modules:
        raise OutOfTime
    try:
        library = load_auto_lirpa()
    except ImportError as error:
        raise LirpaUnavailableError(str(error)) from error
    try:
        with torch.no_grad(), converting():
            return _crown(library, _Traced(steps, clock), rows, slack, known, clock)
    except (LirpaUnavailableError, OutOfTime):
        raise
    except Exception as error:  # the library raises whatever its operators happen to raise
        _log.debug("auto_LiRPA failed", exc_info=True)
        reason = (str(error).splitlines() or [""])[0]
        raise LirpaUnavailableError(
            f"auto_LiRPA cannot bound this network: {type(error).__name__}: {reason}"
        ) from error


@dataclass(frozen=True, eq=False)
class _Map:
    """x -> forth(x) + bias, [S, N_in] -> [S, N_out]; back: coefficients [R, S, N_out] on it -> [R, S, N_in]."""

    forth: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    bias: Tensor  # [N_out]


class _MapNode(torch.autograd.Function):
    """A map as one node of the traced graph, known by its number."""

    @staticmethod
    def symbolic(graph: Any, x: Any, bias: Any, number: int) -> Any:
        node = graph.op(_OPERATOR, x, bias, number_i=number)
        node.setType(x.type().with_sizes([1, *bias.type().sizes()]))
        return node

    @staticmethod
    def forward(_context: Any, x: Tensor, bias: Tensor, *_: Any) -> Tensor:
        return bias.expand(len(x), -1).clone()  # of the shape alone: what happens in here would be traced too


class _Traced(nn.Module):
    """The steps as maps and plain ReLUs: where a ReLU takes some features only, they are taken out and put back.

    maps: in the order of the graph. received: of each step, the number of the map whose result its ReLU receives,
    of the output's the last; and of which features that is.
    """

    def __init__(self, steps: tuple[Step, ...], clock: Clock) -> None:
        super().__init__()
        self.maps: list[_Map] = []
        self.received: list[tuple[int, Tensor]] = []
        self.steps = steps
        for step in steps:
            self.maps.append(_Map(step.linear, twins(step, step, clock=clock).transpose, step.bias))
            every = torch.arange(step.features, device=step.bias.device)
            on = every if step.relu is None else every[step.relu]
            if len(on) < step.features:
                self.maps += _cut(step, on)
            self.received.append((len(self.maps) - (1 if len(on) == step.features else 3), on))
        # As parameters, which the library takes its dtype from.
        self.biases = nn.ParameterList(nn.Parameter(part.bias, requires_grad=False) for part in self.maps)

    def forward(self, x: Tensor) -> Tensor:
        number = 0

        def mapped(x: Tensor) -> Tensor:
            nonlocal number
            number += 1
            return _MapNode.apply(x, self.biases[number - 1], number - 1)  # type: ignore[return-value]

        for step in self.steps:
            x = mapped(x)
            if step.relu is not None:
                x = x.relu() if bool(step.relu.all()) else mapped(mapped(x).relu()) + mapped(x)
        return x


def _cut(step: Step, on: Tensor) -> list[_Map]:
    """Takes the features `on` out, puts them back into zeros, and keeps the others in their places."""
    free = step.bias.new_ones(step.features).index_fill(0, on, 0.0)

    def out(x: Tensor) -> Tensor:
        return x[..., on]

    def into(x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], step.features).index_copy(-1, on, x)

    def others(x: Tensor) -> Tensor:
        return x * free

    zero = torch.zeros_like(step.bias)
    return [_Map(out, into, zero[on]), _Map(into, out, zero), _Map(others, others, zero)]


def _operator(base: Any, maps: list[_Map]) -> Any:
    """How auto_LiRPA makes its node of a map; base: its class of nodes."""

    class BoundMap(base):
        def __init__(self, attributes: Any, *rest: Any) -> None:
            super().__init__(attributes, *rest)
            self.number = attributes["number"]
            self.map = maps[self.number]

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return self.map.forth(x) + bias

        def bound_backward(self, lower: Tensor | None, upper: Tensor | None, *_: Any) -> Any:
            # The library's own unit vectors have the default dtype, and hold exactly what they mean.
            sides = [None if part is None else part.to(self.map.bias.dtype) for part in (lower, upper)]
            passed = [None if part is None else self.map.back(part) for part in sides]
            constants = [0.0 if part is None else part @ self.map.bias for part in sides]
            return [tuple(passed), (None, None)], *constants

    return BoundMap


class _Watched(TorchFunctionMode):
    """Looks at the clock before every operation, also those of a library that knows none."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.clock.check()
        return func(*args, **(kwargs or {}))


def _crown(library: Any, module: _Traced, rows: Tensor, slack: Tensor, known: Bounds, clock: Clock) -> Bounds:
    spread = rows[:, 1:].abs().sum(1) + slack
    box = library.PerturbationLpNorm(norm=float("inf"), x_L=rows[:, 0] - spread, x_U=rows[:, 0] + spread)
    share = torch.linspace(-0.9, 0.9, rows.shape[1] - 1, dtype=rows.dtype, device=rows.device)
    points = rows[:, 0] + (share[:, None] * rows[:, 1:]).sum(1)
    bounded = library.BoundedModule(
        module,
        points[:1],
        bound_opts={"sparse_intermediate_bounds": True},
        device=rows.device,
        custom_ops={_OPERATOR: _operator(sys.modules["auto_LiRPA.bound_ops"].Bound, module.maps)},
    )
    found = {node.number: node for node in bounded._modules.values() if hasattr(node, "number")}
    nodes = [found[number] for number, _ in module.received]
    parts = zip(nodes[:-1], module.received, known, strict=False)
    reference = {node.name: (low[:, on], high[:, on]) for node, (_, on), (low, high) in parts}
    with _Watched(clock):
        output = bounded.compute_bounds(
            x=(library.BoundedTensor(points, box),),
            method="CROWN",
            reference_bounds=reference,
            aux_reference_bounds=reference,
        )
    ends = [*((node.lower, node.upper) for node in nodes[:-1]), output]
    result, value = [], points
    for (low, high), own, (_, on), step in zip(ends, known, module.received, module.steps, strict=True):
        value = step.linear(value) + step.bias
        free = torch.full_like(value, torch.inf)
        low, high = torch.maximum(low, own[0][:, on]), torch.minimum(high, own[1][:, on])
        low, high = _checked(low, high, value[:, on])
        result.append(((-free).index_copy(1, on, low), free.index_copy(1, on, high)))
        value = step.activate(value)
    return result


def _checked(low: Tensor, high: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds, refused if they are not finite or miss a value they must contain."""
    low, high = torch.minimum(low, high), torch.maximum(low, high)  # rounding can cross two equal bounds
    slack = 1e-9 * (1 + value.abs())
    if not bool(((low - slack <= value) & (value <= high + slack)).all()):  # also false for NaN
        raise LirpaUnavailableError("auto_LiRPA's bounds miss a value the network takes")
    return low, high
