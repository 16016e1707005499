"""Operators of a quantised ONNX file that change the order or the shape of codes, and those that pad or keep them.

What stands before the first QuantizeLinear rearranges the input's numbers; it does the same to their codes.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from torchreach.graph import deployed as ops
from torchreach.graph.layers import Rearrange, Reshape
from torchreach.graph.quantizer import Quantizer
from torchreach.read.onnx_codes_walk import CodesWalk, Stored, Value


class CodesShapes(CodesWalk):
    """The handlers."""

    def _rearranged(self, layer: Reshape | Rearrange) -> Value:
        value = self._computed()
        if value.makes is not None:
            self.refuse("it must read codes, or the network's input")
        # Before the input is quantised its grid is not known: QuantizeLinear puts it in.
        grid = value.grid or self.entry or Quantizer(1.0, 0, 0, 255)
        if isinstance(layer, Rearrange) and layer.operation == "pad":
            operation: ops.Operation = ops.Padded(self._name(), self.node.op_type, grid, layer.arguments)  # type: ignore[arg-type]
        else:
            operation = ops.Rearranged(self._name(), self.node.op_type, grid, layer)
        return replace(self._put(operation, (value.place,)), grid=value.grid, real=value.real, direct=False)

    def _numbers(self, key: str, at: int) -> list[int]:
        """Whole numbers in an attribute or, of newer opsets, in input number `at`; none where they are left out."""
        stored = self._option(key)
        return [int(n) for n in np.asarray(self._constant(at, ()) if stored is None else stored).reshape(-1)]

    def _axes(self, at: int, rank: int) -> list[int]:
        """Axes, counted from the first one; none where they are left out."""
        axes = self._numbers("axes", at)
        if any(not -rank <= n < rank for n in axes) or len({n % rank for n in axes}) < len(axes):
            self.refuse(f"axes must be different ones of {rank}, got {axes}")
        return [n % rank for n in axes]

    def _flatten(self) -> Value:
        if int(self._option("axis", 1)) != 1:
            self.refuse("axis must be 1")
        return self._rearranged(Reshape((prod(self._computed().shape),)))

    def _reshape(self) -> Value:
        wanted = [int(n) for n in np.asarray(self._constant(1)).reshape(-1)]
        shape = self._computed().shape
        if not wanted or wanted[0] not in (-1, 0, 1) or sum(n == -1 for n in wanted) > 1:
            self.refuse(f"it must keep the batch axis, got {wanted}")
        if self._option("allowzero", 0) and 0 in wanted:
            self.refuse("allowzero asks for an empty value")
        rest = [shape[i - 1] if n == 0 and 0 < i <= len(shape) else n for i, n in enumerate(wanted)][1:]
        if -1 in rest:
            rest[rest.index(-1)] = prod(shape) // max(-prod(rest), 1)
        if prod(rest) != prod(shape) or min(rest, default=1) < 1:
            self.refuse(f"{wanted} does not hold the numbers of {shape}")
        return self._rearranged(Reshape(tuple(rest)))

    def _squeeze(self) -> Value:
        shape = self._computed().shape
        axes = self._axes(1, 1 + len(shape))
        if not axes or 0 in axes or any(shape[n - 1] != 1 for n in axes):
            self.refuse(f"it must name axes of size 1 and keep the batch axis, got {axes} of {shape}")
        return self._rearranged(Reshape(tuple(n for i, n in enumerate(shape, 1) if i not in axes)))

    def _unsqueeze(self) -> Value:
        shape = self._computed().shape
        axes = self._axes(1, 1 + len(shape) + len(self._numbers("axes", 1)))
        if not axes or 0 in axes:
            self.refuse(f"it must keep the batch axis, got {axes}")
        sizes, count = iter(shape), len(shape) + len(axes)
        return self._rearranged(Reshape(tuple(1 if i in axes else next(sizes) for i in range(1, 1 + count))))

    def _transpose(self) -> Value:
        order = [int(n) for n in self._option("perm", ())]
        if sorted(order) != list(range(1 + len(self._computed().shape))) or order[0] != 0:
            self.refuse(f"it must keep the batch axis, got {order}")
        return self._rearranged(Rearrange("permute", *order))

    def _pad(self) -> Value:
        value = self._computed()
        rank = 1 + len(value.shape)
        given, axes = self._numbers("pads", 1), self._axes(3, rank) or list(range(rank))
        constant = self._option("mode", b"constant") == b"constant"
        if not constant or len(given) != 2 * len(axes) or min(given) < 0 or self._filling():
            self.refuse("it must pad with zeros")
        before, after = dict(zip(axes, given, strict=False)), dict(zip(axes, given[len(axes) :], strict=True))
        if before.get(0) or after.get(0):
            self.refuse("it must keep the batch axis")
        self._bounded(*(n + before.get(i, 0) + after.get(i, 0) for i, n in enumerate(value.shape, 1)))
        pairs = [n for axis in range(rank - 1, 0, -1) for n in (before.get(axis, 0), after.get(axis, 0))]
        return self._rearranged(Rearrange("pad", *pairs))

    def _filling(self) -> float:
        """What a Pad fills in, as a number."""
        name = self.node.input[2] if len(self.node.input) > 2 else ""
        filled: Any = self.values.get(name)
        if isinstance(filled, Stored):
            return float(((filled.codes.astype(np.float64) - filled.zero) * filled.scale).reshape(-1)[0])
        value = self._computed()
        codes = not value.real and value.grid is not None
        if not name:  # a zero: of codes it is the number 0, whatever they stand for
            number = float(self._option("value", 0.0))
        else:
            number = float(np.asarray(self._constant(2)).reshape(-1)[0])
        return number - int(value.grid.zero_point) if codes else number  # type: ignore[union-attr]

    def _same(self) -> Value:
        if self.node.op_type == "Dropout" and bool(np.asarray(self._constant(2, default=False)).any()):
            self.refuse("it must not be in training mode")
        return self._computed()
