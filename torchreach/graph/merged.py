"""Merged network: two networks side by side on one input, then the comparison layer [I, -I].

    merged(x) = original(x) - compressed(x)

Hidden layers act on the concatenation [z1; z2] of both networks' features; their block-diagonal weights are
never stored. The shorter network is extended by identity layers, whose features pass the remaining ReLU
layers untouched. (Mo, Yang, Lu, Xiang: Compression Repair for Feedforward Neural Networks Based on Model
Equivalence Evaluation, 2024: Lemma 1, Lemma 2, Theorem 1.)
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from torchreach.graph.layers import MaskedReLU, MergedAffine, linear, magnitude, with_bias_magnitude
from torchreach.graph.propagate import propagate

Shape = tuple[int, ...]


class MergedLinear(MergedAffine):
    """[z1; z2] -> [f1(z1); f2(z2)] for affine blocks f1, f2 (for plain networks: one `nn.Linear` each).

    Takes a tensor [B, n1 + n2] (the first merged layer: one shared input [B, *shape]) or a `StarBatch`.
    `first` and `second` are the given modules themselves: training them changes the merged network.
    """

    def __init__(
        self, first: nn.Sequential, second: nn.Sequential, in_shapes: tuple[Shape, Shape], shared_input: bool
    ) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.in_shapes = in_shapes
        self.shared_input = shared_input

    def forward(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return propagate(x, self)
        z1, z2 = self._branches(x)
        return torch.cat((self.first(z1).flatten(1), self.second(z2).flatten(1)), dim=1)

    def linear_part(self, x: Tensor) -> Tensor:
        z1, z2 = self._branches(x)
        return torch.cat((linear(self.first, z1).flatten(1), linear(self.second, z2).flatten(1)), dim=1)

    def magnitude_part(self, x: Tensor) -> Tensor:
        z1, z2 = self._branches(x)
        return torch.cat((magnitude(self.first, z1).flatten(1), magnitude(self.second, z2).flatten(1)), dim=1)

    def size_part(self, x: Tensor) -> Tensor:
        z1, z2 = self._branches(x)
        sizes = with_bias_magnitude(self.first, z1), with_bias_magnitude(self.second, z2)
        return torch.cat([size.flatten(1) for size in sizes], dim=1)

    def _branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.shared_input:
            return x, x
        shape1, shape2 = self.in_shapes
        z1, z2 = torch.split(x, [prod(shape1), prod(shape2)], dim=1)
        return z1.reshape(len(x), *shape1), z2.reshape(len(x), *shape2)


class MergedReLU(MaskedReLU):
    """ReLU on both halves of [z1; z2]; a half that already left its network passes untouched.

    Takes a tensor [B, n1 + n2] or a `StarBatch`, which it splits along z = 0 where that crosses a star.
    sizes: (n1, n2). active: of each half, whether ReLU acts on it, or on which of its features [n].
    """

    def __init__(self, sizes: tuple[int, int], active: tuple[bool | Tensor, bool | Tensor] = (True, True)) -> None:
        halves = [on if isinstance(on, Tensor) else torch.full((n,), on) for n, on in zip(sizes, active, strict=True)]
        super().__init__(torch.cat(halves))
        self.split, self.active = sizes, active

    def forward(self, x: Any) -> Any:
        return super().forward(x) if isinstance(x, Tensor) else propagate(x, self)


class Comparison(MergedAffine):
    """Comparison layer [I, -I]: [y1; y2] -> y1 - y2. Takes a tensor [B, 2 n] or a `StarBatch`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return propagate(x, self)
        return self.linear_part(x)

    def linear_part(self, x: Tensor) -> Tensor:
        return x[:, : self.size] - x[:, self.size :]

    def magnitude_part(self, x: Tensor) -> Tensor:
        return x[:, : self.size] + x[:, self.size :]


class MergedNetwork(nn.Sequential):
    """`original(x) - compressed(x)` as one network of merged layers. Made by `merge`.

    Takes [B, *shape], returns [B, N]. In training mode dropout and batch norm act as they do there;
    reachability always speaks of evaluation mode.
    """

    def __init__(self, layers: list[nn.Module], branches: tuple[nn.Sequential, nn.Sequential]) -> None:
        super().__init__(*layers)
        # Kept out of the module tree: the merged layers already hold these parameters.
        self._branches = (branches,)

    @property
    def first(self) -> nn.Sequential:
        """The original network, as a chain of layers."""
        return self._branches[0][0]

    @property
    def second(self) -> nn.Sequential:
        """The compressed network, as a chain of layers."""
        return self._branches[0][1]
