"""Two networks, read and merged: merged(x) = original(x) - compressed(x), see `torchreach.graph.merged`.

Merged layers are made here alone, so how a star batch goes through one is registered here too.
"""

from __future__ import annotations

import copy
from math import prod

import torch
from torch import Tensor, nn

from torchreach.core.errors import ShapeError, UnsupportedLayerError
from torchreach.core.options import Exact
from torchreach.graph.affine_graph import AffineGraph
from torchreach.graph.layers import MaskedReLU, Reshape
from torchreach.graph.merged import Comparison, MergedLinear, MergedNetwork, MergedReLU
from torchreach.graph.propagate import propagate
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.smooth import SMOOTH, Activations
from torchreach.read.load import as_network
from torchreach.read.module import chain
from torchreach.sets.star import StarBatch
from torchreach.verbs.reach import reach

Shape = tuple[int, ...]


def merge(original: nn.Module, compressed: nn.Module, input_shape: Shape | None = None) -> MergedNetwork:
    """Merged network of `original` and `compressed`: merged(x) == original(x) - compressed(x).

    Depths and widths may differ; parameters are shared with the given modules. `input_shape` (without batch
    axis) is needed only where it does not follow from a first `nn.Linear`, that is for convolutions.

    Raises:
        UnsupportedLayerError: a layer without a sound rule, named with its position.
        ShapeError: input or output sizes differ, or `input_shape` is needed.
        InvalidNetworkError: a weight is NaN or infinite.

    Examples:
        >>> original, compressed = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> x = torch.rand(5, 2)
        >>> torch.allclose(tr.merge(original, compressed)(x), original(x) - compressed(x), atol=1e-6)
        True
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


@propagate.register
def _(stars: StarBatch, layer: nn.Module) -> StarBatch:
    """A star batch through one layer of a merged network: affine layers map it, ReLU layers split it."""
    if not isinstance(layer, MaskedReLU | Activations):
        return stars.affine_map(layer)
    result = reach(nn.Sequential(layer), stars, Exact(root_bounds="interval"))
    split = result.stars
    assert split is not None
    return StarBatch.trusted(split.basis, split.A, split.b, split.lower, split.upper, stars.origin[split.origin])
