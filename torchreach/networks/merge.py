"""Merged network: two networks side by side on one input, then the comparison layer [I, -I].

    merged(x) = original(x) - compressed(x)

Hidden layers act on the concatenation [z1; z2] of both networks' features; their block-diagonal weights are
never stored. The shorter network is extended by identity layers, whose features pass the remaining ReLU
layers untouched. (Mo, Yang, Lu, Xiang: Compression Repair for Feedforward Neural Networks Based on Model
Equivalence Evaluation, 2024: Lemma 1, Lemma 2, Theorem 1.)
"""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from torchreach.errors import ShapeError, UnsupportedLayerError
from torchreach.networks.affine_graph import AffineGraph
from torchreach.networks.chain import chain
from torchreach.networks.layers import MaskedReLU, MergedAffine, Reshape, linear, magnitude, with_bias_magnitude
from torchreach.networks.load import as_network
from torchreach.networks.propagate import propagate
from torchreach.networks.quantizer import Quantizer
from torchreach.networks.smooth import SMOOTH, Activations

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
        z1, z2 = x.split((prod(shape1), prod(shape2)), dim=1)
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


def merge(original: nn.Module, compressed: nn.Module, input_shape: Shape | None = None) -> MergedNetwork:
    """Merged network of `original` and `compressed`: merged(x) == original(x) - compressed(x).

    Depths and widths may differ; parameters are shared with the given modules. `input_shape` (without batch
    axis) is needed only where it does not follow from a first `nn.Linear`, that is for convolutions.

    Raises:
        UnsupportedLayerError: a layer without a sound rule, named with its position.
        ShapeError: input or output sizes differ, or `input_shape` is needed.
        InvalidNetworkError: a weight is NaN or infinite.
    """
    original, compressed = as_network(original), as_network(compressed)
    branches = tuple(
        _read(network, name, input_shape) for network, name in ((original, "original"), (compressed, "compressed"))
    )
    for layer in (*branches[0], *branches[1]):
        if isinstance(layer, Quantizer):
            raise UnsupportedLayerError(
                f"{layer.name or 'a layer'!r} rounds activations, so the networks have no merged ReLU network: use "
                "torchreach.discrepancy, or compare torchreach.weight_only(network)"
            )
    shape = _shared_input_shape(branches) if input_shape is None else tuple(input_shape)
    blocks, shapes, masks = zip(*(_blocks(branch, shape, i) for i, branch in enumerate(branches)), strict=True)
    out1, out2 = (prod(s[-1]) for s in shapes)
    if out1 != out2:
        raise ShapeError(f"networks must have equally many outputs: the original has {out1}, the compressed {out2}")
    depth = max(len(b) for b in blocks)
    layers: list[nn.Module] = []
    for i in range(depth):
        parts = [b[i] if i < len(b) else nn.Sequential() for b in blocks]
        into = [s[min(i, len(s) - 1)] for s in shapes]
        layers.append(MergedLinear(parts[0], parts[1], (into[0], into[1]), shared_input=i == 0))
        if i < depth - 1:
            sizes = [prod(s[min(i + 1, len(s) - 1)]) for s in shapes]
            on = [m[i] if i < len(m) else False for m in masks]
            layers.append(_activation((sizes[0], sizes[1]), on[0], on[1]))
    layers.append(Comparison(out1))
    return MergedNetwork(layers, (branches[0], branches[1]))


def _read(network: nn.Module, name: str, input_shape: Shape | None) -> nn.Sequential:
    try:
        return chain(network, input_shape)
    except ShapeError as error:
        raise ShapeError(f"the {name} network: {error}") from None


def _blocks(
    branch: nn.Sequential, shape: Shape, index: int
) -> tuple[list[nn.Sequential], list[Shape], list[bool | Tensor | nn.Module]]:
    """Affine blocks between activations, the feature shape before each and after the last, and where ReLUs act.

    In place of the last, the layer itself where it is smooth.
    """
    blocks, masks = [nn.Sequential()], []
    for layer in branch:
        if isinstance(layer, (nn.ReLU, MaskedReLU, Activations, *SMOOTH)):
            blocks.append(nn.Sequential())
            if isinstance(layer, (Activations, *SMOOTH)):
                masks.append(layer)
            else:
                masks.append(layer.mask if isinstance(layer, MaskedReLU) else True)
        else:
            blocks[-1].append(layer)
    parameter = next(branch.parameters(), torch.zeros(()))
    z = torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device)
    shapes = [shape]
    with torch.no_grad():
        for block in blocks:
            try:
                z = copy.deepcopy(block).eval()(z)  # a copy: the caller's mode is left alone
            except RuntimeError as error:
                which = ("original", "compressed")[index]
                raise ShapeError(f"the {which} network does not accept inputs of shape {shape}: {error}") from None
            shapes.append(tuple(z.shape[1:]))
    return blocks, shapes, masks


def _activation(
    sizes: tuple[int, int], first: bool | Tensor | nn.Module, second: bool | Tensor | nn.Module
) -> MergedReLU | Activations:
    """The activations of both halves of [z1; z2], each as `_blocks` gives it."""
    if not isinstance(first, nn.Module) and not isinstance(second, nn.Module):
        return MergedReLU(sizes, (first, second))
    relus, parts = [], []
    for i, (half, n) in enumerate(zip((first, second), sizes, strict=True)):
        zeros = [torch.zeros(size, dtype=torch.bool) for size in sizes]
        if not isinstance(half, nn.Module):
            relus.append(half if isinstance(half, Tensor) else torch.full((n,), half))
            continue
        layer = Activations.of(half, n)
        relus.append(layer.relu)
        parts += [(function, torch.cat((*zeros[:i], mask, *zeros[i + 1 :]))) for function, mask in layer.parts]
    return Activations(torch.cat(relus), parts)


def _shared_input_shape(branches: tuple[nn.Sequential, ...]) -> Shape:
    sizes = []
    for branch in branches:
        first = next((m for m in branch if isinstance(m, Reshape) or any(True for _ in m.parameters())), None)
        if isinstance(first, AffineGraph) and len(first.parts) == 1:
            return first.parts[0]
        if isinstance(first, Reshape):  # of a file that says what shape its input has
            sizes.append(prod(first.shape))
        elif isinstance(first, nn.Linear):
            sizes.append(first.weight.shape[1])
        else:
            raise ShapeError("input_shape=(...) is required: it does not follow from a first nn.Linear layer")
    if sizes[0] != sizes[1]:
        raise ShapeError(
            f"networks must have equally many inputs: the original has {sizes[0]}, the compressed {sizes[1]}"
        )
    return (sizes[0],)
