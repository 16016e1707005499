"""Networks of integer codes (`graph.deployed`) as layers of a chain: the real-valued layers, and the quantisers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchreach.core.errors import ShapeError
from torchreach.graph import deployed as ops
from torchreach.graph.layers import ElementwiseAffine, Rearrange
from torchreach.graph.lowering import Rounding
from torchreach.read.builder import ChainBuilder
from torchreach.read.joins import max_pool

FIRST = (0, 2, 3, 1)  # where axes are, channels first
_FUNCTIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "relu_n1_to_1": nn.Hardtanh}


def add_deployed_network(
    builder: ChainBuilder, network: ops.DeployedNetwork, name: str, *, rounded: bool = True
) -> None:
    """Adds the layers of a network.

    rounded: whether its values are rounded; else activations are functions of real numbers.

    Raises: UnsupportedLayerError, naming the operation that has no bounds yet; ShapeError: inputs of another shape.
    """
    if builder.shape not in (None, network.shape):
        raise ShapeError(
            f"the network takes inputs of shape {network.shape}, as its file has them, got {builder.shape}; the first "
            "axis of a box counts stars"
        )
    _Codes(builder, network, rounded).add(f"{name}.input" if name else "input")


class _Codes:
    """values: of each value of the network, its nodes by whether channels are first; none of a constant.

    Inside, pictures have channels first, as the networks of the float files do; axes are put back where an operation
    looks at their order. chain: whether each operation reads the one before it, and rounds a layer of real numbers.
    """

    def __init__(self, builder: ChainBuilder, network: ops.DeployedNetwork, rounded: bool) -> None:
        self.builder, self.network, self.rounded = builder, network, rounded
        self.values: list[dict[bool, int]] = []
        self.chain = all(places == (i,) for i, places in enumerate(network.inputs)) and not any(
            isinstance(part, ops.MaxPool) or getattr(part, "sources", ()) for part in network.operations
        )

    def add(self, name: str) -> None:
        builder, network = self.builder, self.network
        builder.deployed, builder.joins, builder.shape = self.rounded, True, network.shape
        if self.rounded and self.chain:
            builder.append(network.entry, name)
        elif self.rounded:
            builder.round(Rounding(network.entry), name)
        self.values.append({False: builder.at})
        for i, (operation, places) in enumerate(zip(network.operations, network.inputs, strict=True)):
            assert isinstance(operation, ops.Operation)
            builder.position = i
            if isinstance(operation, ops.Constant):
                self.values.append({})
                continue
            first = self._add(operation, places)
            self.values.append({first: builder.at})
        if True in self.values[-1]:
            self._take(len(self.values) - 1, False, network.operations[-1].name)  # type: ignore[arg-type]
        builder.joins = False

    def _take(self, place: int, first: bool, name: str) -> int:
        """The node of a value, channels first or as in the file; the next layer takes it."""
        held, builder = self.values[place], self.builder
        if first not in held:
            builder.move(next(iter(held.values())), name)
            builder.append(Rearrange("permute", *((0, 3, 1, 2) if first else (0, 2, 3, 1))), name)
            held[first] = builder.at
        builder.move(held[first], name)
        return builder.at

    def _add(self, operation: ops.Operation, places: tuple[int, ...]) -> bool:
        """The real-valued layers, and what rounds their result; says whether channels are first in it."""
        builder, name = self.builder, operation.name
        operands = [self.network.operations[place - 1] if not self.values[place] else None for place in places]
        constants = [part.value if isinstance(part, ops.Constant) else None for part in operands]
        computed = [place for place in places if self.values[place]]
        reason = operation.unbounded if len(computed) == len(places) else ""
        if not computed or (isinstance(operation, ops.Joined) and len(computed) < len(places)):
            reason = "constants beside rounded values are not bounded yet"
        if reason:
            builder.refuse(name, operation.kind, f"{reason}; the network can be read and executed")
        first = operation.last or (
            isinstance(operation, ops.Added | ops.Rescaled | ops.Joined)
            and len(computed) == len(places)
            and all(True in self.values[place] for place in places)
        )
        given = [self._take(place, first, name) for place in computed]
        self._take(computed[0], first, name)
        if len(computed) < len(places):
            builder.append(self._with_constant(operation, constants), name)
        elif isinstance(operation, ops.MaxPool):
            self._max_pool(operation)
        elif isinstance(operation, ops.Joined):
            builder.join("cat", tuple(given), name, FIRST[operation.axis % 4] if first else operation.axis)
        elif len(given) > 1:
            builder.join("add" if all(operation.rising) else "sub", tuple(given), name)
        for layer in operation.layers():
            builder.append(layer, name)
        if operation.rounds:
            self._round(operation, given, tuple(constants), first)
        return first

    def _round(
        self, operation: ops.Operation, given: list[int], constants: tuple[Tensor | None, ...], first: bool
    ) -> None:
        function, grid = _FUNCTIONS.get(operation.activation), operation.grid
        if not self.rounded:
            if function is not None:
                self.builder.append(function(), operation.name)
            return
        if not isinstance(operation, ops.Sums):
            grid = grid.changed(layer=None)  # that of a layer before it
        if first and grid.rule is not None:
            shape = self.builder.shape
            assert shape is not None
            grid = grid.changed(rule=grid.rule.channels_first((*shape[1:], shape[0])))
        if self.chain:
            if function in (nn.ReLU, nn.ReLU6):  # becomes part of the quantiser, whose codes end where it does
                self.builder.append(nn.ReLU(), operation.name)
            self.builder.append(grid, operation.name)
            return
        exact = operation if operation.sources else None
        rounding = Rounding(grid, isinstance(operation, ops.MaxPool), exact, constants)
        self.builder.round(rounding, operation.name, given if exact else [])

    def _with_constant(self, operation: ops.Operation, constants: list[Tensor | None]) -> ElementwiseAffine:
        """The operation with one constant operand, on real numbers."""
        assert isinstance(operation, ops.Added | ops.AddedSingle | ops.Multiplied)
        at = 0 if constants[0] is not None else 1
        codes, one = constants[at], torch.ones((), dtype=torch.float64)
        assert codes is not None
        if isinstance(operation, ops.Multiplied):
            return ElementwiseAffine(operation.factors[at].value(codes)[0], 0 * one)
        value = operation.sources[at].value(codes)[0]
        return ElementwiseAffine(one if at or operation.rising[1] else -one, value if operation.rising[at] else -value)

    def _max_pool(self, operation: ops.MaxPool) -> None:
        left, right, top, bottom = operation.sides
        sides = ((top, bottom), (left, right))
        max_pool(self.builder, operation.name, operation.kernel, operation.stride, sides, 1, False)
