"""Values of a traced graph, and what a change in place does to those that share memory with the changed one.

A graph is read as functions of values. `x.relu_()`, `x += 1` and layers with `inplace=True` change what others hold: a
later use of x sees the new value, and so does every view of it. The first is modelled, the second refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_aggregate

from torchreach.read.builder import ChainBuilder


class Value:
    """A value computed from the network's input; `at` is its node in the builder."""

    def __init__(self, at: int) -> None:
        self.at = at


class Values(dict[fx.Node, Any]):
    """What the nodes visited so far gave: values, tuples of them, and constants."""

    def replace(self, old: Any, new: Any) -> None:
        """Whoever holds `old` sees `new`."""
        self.update({node: map_aggregate(held, lambda a: new if a is old else a) for node, held in self.items()})

    def is_read(
        self, builder: ChainBuilder, root: int, besides: Value | None = None, by: fx.Node | None = None
    ) -> bool:
        """Whether a node still to come, other than `by`, reads a view of the builder's node `root` or makes one.

        besides: a value that does not count.
        """
        for node, held in list(self.items()):
            found: list[Any] = []
            map_aggregate(held, found.append)
            views = (a for a in found if isinstance(a, Value) and a is not besides and builder.root(a.at) == root)
            if any(user not in self and user is not by for user in node.users) and any(True for _ in views):
                return True
        return False

    def is_state(self, constant: Tensor) -> bool:
        """Whether a constant may share memory with another one, a tensor of the network for instance."""
        where = constant.untyped_storage().data_ptr()
        return any(
            isinstance(held, Tensor)
            and held.untyped_storage().data_ptr() == where
            and (held is not constant or node.op == "get_attr")
            for node, held in self.items()
        )
