"""Branch and bound by input splitting, for boxes of few dimensions.

Method: best first, in batches; a box is bounded by `quick_bounds`, which renews the bounds of every layer on it,
    and halved along the input that matters most: its width times the sum of its shares in the first layer's
    undecided neurons and in the objectives' coefficients on the input.
Property: anytime; every state is certified, and its interval lies in the one before.
Requirement: effort grows exponentially in the number of inputs whose width matters (up to about 8).
Reference: ReluDiff and NeuroDiff (Paulsen et al. 2020) split inputs in the same question.

Axis letters: B boxes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchreach.bounds.difference import Pair, checked_boxes, difference_bounds, quick_bounds
from torchreach.errors import ShapeError
from torchreach.search.result import Best, Question, SearchResult
from torchreach.search.witness import ascend


@torch.no_grad()
def search_boxes(
    pair: Pair,
    lower: Tensor,
    upper: Tensor,
    question: Question | None = None,
    *,
    batch: int = 64,
    starts: int = 8,
    seed: int = 0,
) -> Iterator[SearchResult]:
    """States of a search over one box lower <= x <= upper [N_in], one per batch; it ends with a closed one.

    batch: boxes halved at a time. starts, seed: of the witness search that comes first (`ascend`).

    Raises: as `difference_bounds`, at the first state.
    """
    question = question or Question()
    low, high = one_box(pair, lower, upper)
    best = ascend(pair, low, high, starts=starts, seed=seed)
    output = difference_bounds(pair, low, high)[-1]
    caps = torch.stack((output.du, -output.dl), 1)
    value, split = _bound(pair, low, high, best, question)
    value = torch.minimum(value, caps)
    finished = torch.full_like(best.lower, -torch.inf)
    branches = 1
    while True:
        enough = question.enough(best.lower)
        excess = (value - enough).amax((1, 2))
        alive = (excess > 0).nonzero().flatten()
        if len(alive) < len(value):
            # What is dropped keeps its bound, so that every objective's interval stays true.
            ended = value[excess <= 0]
            finished = torch.maximum(finished, ended.amax(0))
            low, high, value, split, excess = (part[alive] for part in (low, high, value, split, excess))
        top = torch.cat((value, finished[None])).amax(0)
        closed = len(value) == 0
        yield SearchResult(best.lower, torch.maximum(top, best.lower), best.witness, branches, len(value), closed)
        if closed:
            return
        chosen = excess.topk(min(batch, len(excess))).indices
        rest = torch.ones(len(excess), dtype=torch.bool, device=excess.device)
        rest[chosen] = False
        a, b = _halves(low[chosen], high[chosen], split[chosen])
        v, s = _bound(pair, a, b, best, question)
        v = torch.minimum(v, value[chosen].repeat(2, 1, 1))
        branches += len(v)
        low, high = torch.cat((low[rest], a)), torch.cat((high[rest], b))
        value, split = torch.cat((value[rest], v)), torch.cat((split[rest], s))


def one_box(pair: Pair, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """One box [N_in] as a checked batch [1, N_in]."""
    if lower.ndim != 1 or upper.ndim != 1:
        raise ShapeError(
            f"a search takes one box, lower and upper of shape [{pair.inputs}]; "
            f"got {tuple(lower.shape)} and {tuple(upper.shape)}"
        )
    return checked_boxes(pair, lower[None], upper[None])


def _bound(pair: Pair, low: Tensor, high: Tensor, best: Best, question: Question) -> tuple[Tensor, Tensor]:
    """Bounds [B, 2, N_out] of boxes and the input [B] to halve; offers corners and centres to `best`."""
    hexagons, value, x = quick_bounds(pair, low, high)
    rows = (value - question.enough(best.lower)).flatten(1).argmax(1)
    x = x.flatten(1, 2)
    corner = torch.where(x[torch.arange(len(x), device=x.device), rows] > 0, high, low)
    best.offer(torch.cat((corner, low + (high - low) / 2)))
    open_ = torch.zeros_like(low)
    if hexagons:
        first = hexagons[0]
        open_ = torch.where(first.settled(), 0.0, first.u1 - first.l1) @ pair.W[0].abs()
    shares = [part / part.sum(1, keepdim=True).clamp(min=1e-300) for part in (open_, x.abs().amax(1))]
    return value, ((shares[0] + shares[1]) * (high - low)).argmax(1)


def _halves(low: Tensor, high: Tensor, split: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of boxes [B, N_in]: [2 B, N_in], the lower ones first. They share the middle, so nothing is lost."""
    at = split[:, None]
    middle = low.gather(1, at) + (high.gather(1, at) - low.gather(1, at)) / 2
    return torch.cat((low, low.scatter(1, at, middle))), torch.cat((high.scatter(1, at, middle), high))
