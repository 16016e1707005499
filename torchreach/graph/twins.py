"""The affine steps of two networks side by side, in difference coordinates; as matrices only where that is cheaper.

For values a of the first network and a2 = a - e of the second

    z = W a,    d = W a - V a2 = V e + D a,    D = W - V,

and backward  p . z + q . d = (W^T p + D^T q) . a + (V^T q) . e.  Biases are left to the caller.

Axis letters: R rows, N features.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import UnsupportedLayerError
from torchreach.graph.layers import PASS_THROUGH, RESHAPING, alike
from torchreach.graph.steps import Step
from torchreach.graph.twin_blocks import Blocks, Side, blocks

# Entries up to which a matrix is cheaper than the layers it is made of.
SMALL = 1 << 16
# Entries up to which a matrix is taken where layers do not match, as it has a difference of its own.
LARGE = 1 << 26
# Unit vectors that are pushed through a layer at a time.
UNITS = 512


class Maps(Protocol):
    """The affine maps of one step of two networks, in difference coordinates."""

    def forth(self, a: Tensor, e: Side = None) -> tuple[Tensor, Tensor]:
        """z, d [R, N_out] of a, e [R, N_in]."""
        ...

    def back(self, p: Side, q: Tensor, *, beta: bool = True) -> tuple[Tensor, Side]:
        """alpha, beta [..., N_in] of p, q [..., N_out]; without beta where it is of no use."""
        ...


class Twins(Maps, Protocol):
    """All that bounds need of them."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N_out, N_in)."""
        ...

    @property
    def widest(self) -> int:
        """Most features of a value on the way."""
        ...

    @property
    def terms(self) -> int:
        """Bound on the products summed into one number on the way back, beyond N_out + N_in, and on the way forth."""
        ...

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows `index` [...] of W, V, D: [..., N_in] each."""
        ...

    def own_rows(self, index: Tensor) -> Tensor:
        """Rows `index` [...] of W alone."""
        ...

    def transpose(self, y: Tensor) -> Tensor:
        """W^T y: [..., N_out] -> [..., N_in]."""
        ...

    def spread(self, a: Tensor) -> Tensor:
        """|D| a, or more: [R, N_in] -> [R, N_out], a >= 0."""
        ...

    def size(self, a: Tensor) -> Tensor:
        """The same for the magnitudes of everything that is summed into D a, whose gamma-fold bounds its rounding."""
        ...

    def influence(self, y: Tensor) -> Tensor:
        """|W|^T y: [R, N_out] -> [R, N_in], y >= 0."""
        ...

    def part(self, rows: Tensor, columns: Tensor | None) -> Maps:
        """These rows [R] and columns [C] alone; None: all columns."""
        ...


@dataclass(frozen=True, eq=False)
class Matrices:
    """W, V, D: [N_out, N_in]. `rounded`: they were composed, so that D is off by what W and V were rounded by."""

    W: Tensor
    V: Tensor
    D: Tensor
    rounded: tuple[Step, Step] | None = None
    terms = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.W.shape[0], self.W.shape[1]

    @property
    def widest(self) -> int:
        return max(self.shape)

    def forth(self, a: Tensor, e: Side = None) -> tuple[Tensor, Tensor]:
        d = a @ self.D.T
        return a @ self.W.T, d if e is None else d + e @ self.V.T

    def back(self, p: Side, q: Tensor, *, beta: bool = True) -> tuple[Tensor, Side]:
        alpha = q @ self.D if p is None else p @ self.W + q @ self.D
        return alpha, q @ self.V if beta else None

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.W[index], self.V[index], self.D[index]

    def own_rows(self, index: Tensor) -> Tensor:
        return self.W[index]

    def transpose(self, y: Tensor) -> Tensor:
        return y @ self.W

    def spread(self, a: Tensor) -> Tensor:
        return a @ self.D.abs().T

    def size(self, a: Tensor) -> Tensor:
        if self.rounded is None:
            return self.spread(a)
        first, second = self.rounded
        return first.magnitude(a) + second.magnitude(a)

    def influence(self, y: Tensor) -> Tensor:
        return y @ self.W.abs()

    def part(self, rows: Tensor, columns: Tensor | None) -> Matrices:
        parts = self.rows(rows)
        W, V, D = parts if columns is None else (part[:, columns] for part in parts)
        return Matrices(W, V, D)


def twins(first: Step, second: Step, *, live: bool = False, clock: Clock = NO_LIMIT) -> Twins:
    """The affine maps of two steps with equal numbers of inputs and of outputs.

    live: as matrices, which carry gradients to the steps' weights.

    Raises: UnsupportedLayerError: a live step of more than `LARGE` entries. OutOfTime: between two parts of a matrix.
    """
    if live:
        check_entries(first, "difference bounds with gradients require affine layers")
    own = None if live else _without_matrices(first, second)
    if own is not None:
        return own
    with torch.set_grad_enabled(live and torch.is_grad_enabled()):
        W = dense(first, clock)
        V = W if first is second else dense(second, clock)
    # Equal layers are composed alike: then W - V is zero, and right.
    rounded = None if _plain(first, second) or alike(first.block, second.block) else (first, second)
    return Matrices(W, V, W - V, rounded)


def twin_numbers(first: Step, second: Step) -> int:
    """How many numbers `twins` of the two steps take, while they are made too."""
    own = _without_matrices(first, second)
    if own is not None:  # differences of the layers' weights
        return sum(weight.numel() for weight in first.block.parameters())
    n_in = prod(first.in_shape)
    return 3 * first.features * n_in + (0 if _plain(first, second) else n_in**2 + 2 * first.features * n_in)


def _without_matrices(first: Step, second: Step) -> Blocks | None:
    """The two steps as their layers, None where matrices are cheaper."""
    entries = first.features * prod(first.in_shape)
    if _plain(first, second) or entries <= SMALL:
        return None
    own = blocks(first, second)
    return own if own.matched or entries > LARGE else None


def _plain(first: Step, second: Step) -> bool:
    return is_matrix(first) and is_matrix(second)


def check_entries(step: Step, what: str) -> None:
    """Raises UnsupportedLayerError, which begins with `what`: the step has more than `LARGE` entries as a matrix."""
    n_in = prod(step.in_shape)
    if n_in * step.features > LARGE:
        raise UnsupportedLayerError(
            f"{what} of at most {LARGE} entries as matrices; {step.name} has {step.features} x {n_in}"
        )


def dense(step: Step, clock: Clock = NO_LIMIT) -> Tensor:
    """W [N_out, N_in] of an affine step: its weights, or unit vectors pushed through it. OutOfTime in between."""
    for layer in step.block if is_matrix(step) else ():
        if isinstance(layer, nn.Linear):
            return layer.weight if torch.is_grad_enabled() else layer.weight.detach()
    unit = torch.eye(prod(step.in_shape), dtype=step.bias.dtype, device=step.bias.device)
    columns: list[Tensor] = []
    for part in torch.split(unit, UNITS):
        clock.check()
        columns.append(step.linear(part))
    return torch.cat(columns).T.contiguous()


def is_matrix(step: Step) -> bool:
    """Whether pushing unit vectors through returns the weights themselves, unrounded."""
    layers = [layer for layer in step.block if not isinstance(layer, PASS_THROUGH + RESHAPING)]
    whole = (step.features, prod(step.in_shape))  # of several rows of a value each is multiplied by the weights
    return len(layers) <= 1 and all(isinstance(layer, nn.Linear) and layer.weight.shape == whole for layer in layers)
