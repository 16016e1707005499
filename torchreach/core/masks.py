"""Boolean masks as padded index lists, so that a batch can look at few places of each of its elements."""

from __future__ import annotations

from torch import Tensor


def leading(mask: Tensor, count: int) -> Tensor:
    """Index [..., count] of the true entries along the last axis of mask [..., N] in their order, then false ones.

    Rows with fewer than `count` true entries are filled up with distinct false ones; check `mask.gather`.
    """
    return mask.byte().argsort(dim=-1, descending=True, stable=True)[..., :count]


def lengths(counts: list[int], numbers: int) -> list[int]:
    """Lengths of parts of a sorted list, each of at most `numbers` when the largest count stands for all."""
    result: list[int] = []
    start = 0
    while start < len(counts):
        stop = start + 1
        while stop < len(counts) and (stop + 1 - start) * max(counts[stop], 8) <= numbers:
            stop += 1
        result.append(stop - start)
        start = stop
    return result
