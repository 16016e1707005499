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
    """nodes: of each value of the network, its node of the builder; None of a constant. chain: whether each operation
    reads the one before it, and rounds a layer of real numbers."""

    def __init__(self, builder: ChainBuilder, network: ops.DeployedNetwork, rounded: bool) -> None:
        self.builder, self.network, self.rounded = builder, network, rounded
        self.nodes: list[int | None] = []
        self.chain = all(places == (i,) for i, places in enumerate(network.inputs)) and not any(
            isinstance(part, ops.MaxPool) or getattr(part, "sources", ()) for part in network.operations
        )

    def add(self, name: str) -> None:
        builder, network = self.builder, self.network
        builder.deployed, builder.shape = self.rounded, network.shape
        if self.rounded and self.chain:
            builder.append(network.entry, name)
        elif self.rounded:
            builder._put("round", (builder.at,), name, Rounding(network.entry))
        self.nodes.append(builder.at)
        for i, (operation, places) in enumerate(zip(network.operations, network.inputs, strict=True)):
            assert isinstance(operation, ops.Operation)
            builder.position = i
            if isinstance(operation, ops.Constant):
                self.nodes.append(None)
                continue
            self._add(operation, places)
            self.nodes.append(builder.at)

    def _add(self, operation: ops.Operation, places: tuple[int, ...]) -> None:
        """The real-valued layers, and what rounds their result."""
        builder, name = self.builder, operation.name
        operands = [self.network.operations[place - 1] if self.nodes[place] is None else None for place in places]
        constants = [part.value if isinstance(part, ops.Constant) else None for part in operands]
        given = [node for node in (self.nodes[place] for place in places) if node is not None]
        reason = operation.unbounded if len(given) == len(places) else ""
        if not given or (isinstance(operation, ops.Joined) and len(given) < len(places)):
            reason = "constants beside rounded values are not bounded yet"
        if reason:
            builder.refuse(name, operation.kind, f"{reason}; the network can be read and executed")
        builder.at, builder.shape = given[0], builder.nodes[given[0]].shape
        if len(given) < len(places):
            builder.append(self._with_constant(operation, constants), name)
        elif isinstance(operation, ops.MaxPool):
            self._max_pool(operation)
        elif isinstance(operation, ops.Joined):
            self._join("cat", given, name, operation.axis)
        elif len(given) > 1:
            self._join("add" if all(operation.rising) else "sub", given, name)
        for layer in operation.layers():
            builder.append(layer, name)
        if operation.rounds:
            self._round(operation, given, tuple(constants))

    def _round(self, operation: ops.Operation, given: list[int], constants: tuple[Tensor | None, ...]) -> None:
        function = _FUNCTIONS.get(operation.activation)
        if not self.rounded:
            if function is not None:
                self.builder.append(function(), operation.name)
            return
        if self.chain:
            if function in (nn.ReLU, nn.ReLU6):  # becomes part of the quantiser, whose codes end where it does
                self.builder.append(nn.ReLU(), operation.name)
            self.builder.append(operation.grid, operation.name)
            return
        exact = operation if operation.sources else None
        on_grid = isinstance(operation, ops.MaxPool)
        inputs = (self.builder.at, *given) if exact else (self.builder.at,)
        self.builder._put("round", inputs, operation.name, Rounding(operation.grid, on_grid, exact, constants))

    def _with_constant(self, operation: ops.Operation, constants: list[Tensor | None]) -> ElementwiseAffine:
        """The operation with one constant operand, on real numbers."""
        assert isinstance(operation, ops.Added | ops.Multiplied)
        at = 0 if constants[0] is not None else 1
        codes, one = constants[at], torch.ones((), dtype=torch.float64)
        assert codes is not None
        if isinstance(operation, ops.Multiplied):
            return ElementwiseAffine(operation.factors[at].value(codes)[0], 0 * one)
        value = operation.sources[at].value(codes)[0]
        return ElementwiseAffine(one if at or operation.rising[1] else -one, value if operation.rising[at] else -value)

    def _join(self, op: str, nodes: list[int], name: str, axis: int = 0) -> None:
        """Such values are refused elsewhere in networks that round."""
        self.builder.deployed = False
        self.builder.join(op, tuple(nodes), name, axis)
        self.builder.deployed = self.rounded

    def _max_pool(self, operation: ops.MaxPool) -> None:
        builder, name = self.builder, operation.name
        left, right, top, bottom = operation.sides
        if operation.last:
            builder.append(Rearrange("permute", 0, 3, 1, 2), name)
        self.builder.deployed = False
        max_pool(builder, name, operation.kernel, operation.stride, ((top, bottom), (left, right)), 1, False)
        self.builder.deployed = self.rounded
        if operation.last:
            builder.append(Rearrange("permute", 0, 2, 3, 1), name)
