"""Several quantisers side by side, as one: what a layer of a network of codes does that is no chain.

The values of such a layer are neighbouring parts of one flat state (`graph.lowering`). A part is rounded by a quantiser
of its own; or it is on its grid already, and passes: a value that is carried past the layer, or a maximum of codes.

Where a code is no function of one real number (runtimes round the two terms of a sum apart), the part also knows the
operation that computes it from the codes of its operands: it grows or falls with each of them, so that the codes of an
interval are those of its ends, and codes of points are exact.

Axis letters: B points, N features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from torchreach.graph.deployed import Operation
from torchreach.graph.kernels import IntegerSums, Pairing, Unfolded
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.requantise import Requantise

Shape = tuple[int, ...]
Ends = tuple[Tensor, Tensor]


class Operands(nn.Module):
    """An operation on codes, and where the values of its operands are in the state before the layer.

    layer: state [B, N_in] -> operands [B, *shape], flattened and joined. constants: codes of operands that are none of
    them. rest, free: [N_in] values of a state of which only the features `free` vary, where it is given as these
    [B, M].
    """

    def __init__(
        self, layer: nn.Module, shapes: Sequence[Shape], operation: Operation, constants: Sequence[Tensor | None]
    ) -> None:
        super().__init__()
        self.layer, self.shapes, self.operation = layer, tuple(shapes), operation
        for k, codes in enumerate(constants):
            if codes is not None:
                self.register_buffer(f"constant{k}", codes)
        self.rest: Tensor | None = None
        self.free: Tensor | None = None

    def restrict(self, x: Tensor, free: Tensor) -> None:
        """Fixes all but the features `free` of the state, as it is given by now, to x."""
        if self.rest is None or self.free is None:
            self.rest, self.free = x, free
        else:
            self.rest, self.free = self.rest.index_copy(0, self.free, x), self.free[free]

    def code_range(self, low: Tensor, high: Tensor) -> Ends:
        """Smallest and largest codes [B, N] of the result, over states in [low, high] [B, N_in]."""
        ends: list[list[Tensor]] = []
        for state in (low, high):
            if self.rest is not None and self.free is not None:
                state = self.rest.expand(len(state), -1).index_copy(1, self.free, state)
            values = torch.split(self.layer(state).flatten(1), [prod(shape) for shape in self.shapes], 1)
            shaped, codes = zip(values, self.shapes, strict=True), list[Tensor]()
            for k, source in enumerate(self.operation.sources):
                fixed = self._buffers.get(f"constant{k}")
                if fixed is None:
                    value, shape = next(shaped)
                    steps = (value / source.scale).round().to(torch.int64)
                    fixed = (steps + source.zero_point).reshape(-1, *shape)
                codes.append(fixed)
            ends.append(codes)
        rising = self.operation.rising
        least = [(one if up else other) for one, other, up in zip(*ends, rising, strict=True)]
        most = [(other if up else one) for one, other, up in zip(*ends, rising, strict=True)]
        return tuple(self.operation(*codes).flatten(1).to(low) for codes in (least, most))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class PlacedSums:
    """Sums of several int8 layers, each with the place of its first output among `size` features.

    Each reads the whole state before the layer. As `graph.kernels.IntegerSums` otherwise, of which these are made.
    """

    parts: tuple[tuple[int, IntegerSums], ...]
    size: int

    @property
    def pairings(self) -> tuple[tuple[Pairing, ...], ...]:
        return max((part.pairings for _, part in self.parts), key=len)

    @property
    def name(self) -> str:
        return ", ".join(part.name for _, part in self.parts)

    def restricted(self, values: Tensor, free: Tensor) -> PlacedSums:
        return replace(self, parts=tuple((place, part.restricted(values, free)) for place, part in self.parts))

    def with_pairings(self, pairings: Iterator[tuple[tuple[Pairing, ...], ...]]) -> PlacedSums:
        """The same with the next pairings of each layer."""
        return replace(self, parts=tuple((k, replace(part, pairings=next(pairings))) for k, part in self.parts))

    def loss(self, way: int, low: Tensor, high: Tensor) -> Ends | None:
        ends = low.new_zeros(2, len(low), self.size)
        found = [(place, part.loss(way, low, high)) for place, part in self.parts]
        for place, lost in found:
            if lost is not None:
                ends[:, :, place : place + lost[0].shape[1]] = torch.stack(lost)
        return None if all(lost is None for _, lost in found) else (ends[0], ends[1])

    def saturates(self, low: Tensor, high: Tensor) -> bool:
        return any(part.saturates(low, high) for _, part in self.parts)


def leaves(sums: IntegerSums | PlacedSums) -> list[IntegerSums]:
    """The sums of each layer."""
    return [part for _, part in sums.parts] if isinstance(sums, PlacedSums) else [sums]


@dataclass(frozen=True)
class Part:
    """Neighbouring features. passing: whether they are on the grid already; carried: and within its ends.

    before: state [B, N_in] -> what the int8 layer of the grid reads, where it is one.
    """

    grid: Quantizer
    size: int
    passing: bool = False
    carried: bool = False
    before: nn.Module | None = None


class Roundings(Quantizer):
    """Quantisers on neighbouring parts of values [B, N]; scale, zero_point and the ends of codes are [N]."""

    def __init__(self, parts: Sequence[Part], operands: dict[int, Operands]) -> None:
        """operands: of some parts, by number."""
        nn.Module.__init__(self)
        self.quantizers = nn.ModuleList(part.grid for part in parts)
        self.sizes = [part.size for part in parts]
        self.before = {k: part.before for k, part in enumerate(parts) if part.before is not None}
        self.operands = nn.ModuleDict({str(k): part for k, part in operands.items()})
        for name in ("scale", "zero_point", "lowest", "highest"):
            each = [torch.as_tensor(getattr(part.grid, name)).expand(part.size) for part in parts]
            self.register_buffer(name, torch.cat(each))
        for name in ("passing", "carried"):
            each = [torch.full((part.size,), getattr(part, name)) for part in parts]
            self.register_buffer(name, torch.cat(each))
        self.name = next((part.grid.name for part in parts if not part.passing), "")
        self.arithmetic, self.layer, self.mean_of = "fixed point", None, 0

    @property
    def rule(self) -> Requantise | None:  # type: ignore[override]
        return next((part.rule for part in self._parts if part.rule is not None), None)

    @property
    def exact(self) -> bool:
        return True

    @property
    def _parts(self) -> list[Quantizer]:
        return [part for part in self.quantizers if isinstance(part, Quantizer)]

    def _split(self, method: str, *values: Tensor, **options: Any) -> list[Any]:
        """Results of a method of each part, of its features of values [..., N]."""
        pieces = zip(*(torch.split(value, self.sizes, -1) for value in values), strict=True)
        return [getattr(part, method)(*piece, **options) for part, piece in zip(self._parts, pieces, strict=True)]

    def sums(self, inputs: int, device: torch.device) -> PlacedSums | None:
        """Of its int8 layers, for states of so many features."""
        parts: list[tuple[int, IntegerSums]] = []
        for k, before in self.before.items():
            layer = self._parts[k].layer
            assert layer is not None
            at = Unfolded.of(layer, (inputs,), [before], device)
            parts.append((sum(self.sizes[:k]), IntegerSums(at)))
        return PlacedSums(tuple(parts), sum(self.sizes)) if parts else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1) if x.ndim > 2 else x
        return self.value(self.codes(flat)).to(x.dtype).reshape(x.shape)

    def codes(self, x: Tensor) -> Tensor:
        return torch.cat([part.double() for part in self._split("codes", x)], -1)

    def code_range(self, lower: Tensor, upper: Tensor, *, clamped: bool = True) -> Ends:
        first, last = zip(*self._split("code_range", lower, upper, clamped=clamped), strict=True)
        return torch.cat(first, -1), torch.cat(last, -1)

    def executed_range(self, codes: Ends, low: Tensor, high: Tensor) -> Ends:
        first, last = (list(torch.split(end, self.sizes, -1)) for end in codes)
        for k, part in self.operands.items():
            assert isinstance(part, Operands)
            first[int(k)], last[int(k)] = part.code_range(low, high)
        return torch.cat(first, -1), torch.cat(last, -1)

    def half_step(self, size: Tensor) -> Tensor:
        return torch.where(self.passing, 0.0, torch.cat(self._split("half_step", size), -1))

    def restricted(self, x: Tensor, free: Tensor) -> Roundings:
        result = copy.deepcopy(self)
        for part in result.operands.values():
            assert isinstance(part, Operands)
            part.restrict(x, free)
        return result

    def flat(self, shape: Shape) -> Roundings:  # noqa: ARG002
        return self

    def extra_repr(self) -> str:
        return f"{len(self.sizes)} parts of {', '.join(map(str, self.sizes))} features"
