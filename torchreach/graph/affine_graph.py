"""An acyclic graph of affine layers, sums and stacks as one affine layer, on a flat state or on one shaped value.

    y = (f_1(parts), ..., f_n(parts)),    each f a composition of affine layers, +, - and concatenation

W x, |W| x and the sizes of all terms come from walking the graph with the rule of each layer: nothing is stored as a
matrix, and a value that is used twice is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from torchreach.graph.layers import MergedAffine, fan_in, linear, magnitude, with_bias_magnitude

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Term:
    """One value of the graph.

    kind: "part" (number `index` of the state), "layer" (layer number `index` of the one input), "add", "sub" (of
    two inputs, which broadcast), "cat" (along axis `index`, the batch axis counted).
    """

    kind: str
    inputs: tuple[int, ...] = ()
    index: int = 0


class AffineGraph(MergedAffine):
    """Takes [B, sum of the parts' sizes], or [B, *shape] where there is one part; returns the outputs likewise.

    parts: shapes of the parts of the state, in order. terms: in evaluation order; `inputs` are positions in it.
    outputs: positions of the values to return: one keeps its shape, several are flattened and joined.
    """

    def __init__(
        self,
        parts: tuple[Shape, ...],
        terms: tuple[Term, ...],
        layers: tuple[nn.Module, ...],
        outputs: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.parts, self.terms, self.outputs = parts, terms, outputs
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self._walk(x, lambda layer, value: layer(value), torch.sub)

    def linear_part(self, x: Tensor) -> Tensor:
        return self._walk(x, linear, torch.sub)

    def magnitude_part(self, x: Tensor) -> Tensor:
        return self._walk(x, magnitude, torch.add)

    def size_part(self, x: Tensor) -> Tensor:
        return self._walk(x, with_bias_magnitude, torch.add)

    @property
    def fan_in(self) -> int:
        """Upper bound on the number of terms summed into one output, along the longest path."""
        counts: list[int] = []
        for term in self.terms:
            own = fan_in(self.layers[term.index]) if term.kind == "layer" else int(term.kind in ("add", "sub"))
            counts.append(own + max((counts[i] for i in term.inputs), default=0))
        return max((counts[i] for i in self.outputs), default=0) + 1

    def _walk(
        self, x: Tensor, rule: Callable[[nn.Module, Tensor], Tensor], subtract: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        if len(self.parts) == 1:
            parts = [x.reshape(x.shape[0], *self.parts[0])]  # not len(x), which would fix the batch in an export
        else:
            pieces = torch.split(x, [prod(shape) for shape in self.parts], 1)
            parts = [piece.reshape(x.shape[0], *shape) for piece, shape in zip(pieces, self.parts, strict=True)]
        values: list[Tensor] = []
        for term in self.terms:
            inputs = [values[i] for i in term.inputs]
            if term.kind == "part":
                values.append(parts[term.index])
            elif term.kind == "layer":
                values.append(rule(self.layers[term.index], inputs[0]))
            elif term.kind == "cat":
                values.append(torch.cat(inputs, term.index))
            else:
                values.append(inputs[0] + inputs[1] if term.kind == "add" else subtract(inputs[0], inputs[1]))
        if len(self.outputs) == 1:
            return values[self.outputs[0]]
        return torch.cat([values[i].flatten(1) for i in self.outputs], 1)

    def extra_repr(self) -> str:
        return f"parts={self.parts}, terms={[(t.kind, t.inputs, t.index) for t in self.terms]}, outputs={self.outputs}"
