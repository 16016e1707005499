"""Networks of integer codes (`graph.deployed`) as layers of a chain: the real-valued layers, and the quantisers.

Chains alone: where codes are added, joined or compared, the network can be executed and not be bounded yet.
"""

from __future__ import annotations

from torch import nn

from torchreach.core.errors import ShapeError
from torchreach.graph.deployed import DeployedNetwork, Operation
from torchreach.read.builder import ChainBuilder


def add_deployed_network(builder: ChainBuilder, network: DeployedNetwork, name: str) -> None:
    """Adds the layers of a network that is a chain.

    Raises: UnsupportedLayerError, naming the operation that has no bounds yet; ShapeError: inputs of another shape.
    """
    if builder.shape not in (None, network.shape):
        raise ShapeError(
            f"the network takes inputs of shape {network.shape}, as its file has them, got {builder.shape}; the first "
            "axis of a box counts stars"
        )
    builder.deployed = True
    builder.append(network.entry, f"{name}.input" if name else "input")
    for i, (operation, places) in enumerate(zip(network.operations, network.inputs, strict=True)):
        assert isinstance(operation, Operation)
        builder.position = i
        reason = operation.unbounded or ("" if places == (i,) else "a value that is used twice is not bounded yet")
        if reason:
            builder.refuse(operation.name, operation.kind, f"{reason}; the network can be read and executed")
        for layer in operation.layers():
            if layer is operation.grid and operation.activation in ("relu", "relu6"):  # said for twins without rounding
                builder.append(nn.ReLU(), operation.name)
            builder.append(layer, operation.name)
