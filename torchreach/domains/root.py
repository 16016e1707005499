"""Bounds of every pre-activation over whole input stars, taken once, before any split."""

from __future__ import annotations

import logging
import math
from functools import lru_cache

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock, OutOfTime
from torchreach.core.roundoff import gamma
from torchreach.domains.zonotope import Bounds, interval_bounds, zonotope_bounds
from torchreach.graph.steps import Step

log = logging.getLogger(__name__)

# Of the time left, for each kind of bound.
SHARE = 0.25


def root_bounds(
    steps: tuple[Step, ...],
    rows: Tensor,
    slack: Tensor,
    kind: str,
    margin: float,
    worth: float,
    clock: Clock = NO_LIMIT,
    memory: float = math.inf,
) -> tuple[Bounds, str]:
    """Certified (lower, upper) [S, N] per step, the output last, and the name of what gave them.

    Args:
        rows: [S, 1 + M, N_in] input stars over [-1, 1]^M; slack: [S, N_in].
        kind: one of `options.ROOT_BOUNDS`. "lirpa" intersects auto_LiRPA's bounds with zonotopes where
            auto_LiRPA is installed, "auto" does so where it is worth it.
        margin: share of their magnitude by which auto_LiRPA's bounds are widened for rounding.
        worth: number of neurons, beyond the first layer (where zonotopes are exact), that zonotopes must leave
            open for auto_LiRPA to be worth its time.
        clock: of what it has left, zonotopes and auto_LiRPA get a share each. Where zonotopes do not end in it,
            intervals take over.
        memory: bytes for zonotopes, and for auto_LiRPA, which is left out where they may not do.
    """
    if kind == "interval":
        return interval_bounds(steps, rows, slack), "interval"
    if kind == "none":  # of the neurons: what is left open in the end needs bounds of the output
        infinite = [
            (b.new_full((len(rows), b.numel()), -torch.inf), b.new_full((len(rows), b.numel()), torch.inf))
            for b in (step.bias for step in steps[:-1])
        ]
        return [*infinite, interval_bounds(steps, rows, slack)[-1]], "none"
    own = _zonotopes(steps, rows, slack, _share(clock), memory)
    if kind == "zonotope" or (kind == "auto" and _open(own, steps) < worth):
        return own, "zonotope"
    theirs = _lirpa(steps, rows, slack, own, margin, _share(clock), memory)
    if theirs is None:
        return own, "zonotope"
    tightest = [(torch.maximum(a, c), torch.minimum(b, d)) for (a, b), (c, d) in zip(own, theirs, strict=True)]
    return tightest, "auto_LiRPA CROWN and zonotope"


def _share(clock: Clock) -> Clock:
    return clock.share(SHARE)


def _zonotopes(steps: tuple[Step, ...], rows: Tensor, slack: Tensor, clock: Clock, memory: float) -> Bounds:
    """Zonotope bounds of as many stars at once as there is memory for."""
    wide = [step.features for step in steps]
    numbers = (rows.shape[1] + sum(wide[:-1])) * max(wide)
    size = int(max(1, min(len(rows), memory // (rows.element_size() * numbers))))
    parts = [
        zonotope_bounds(steps, *part, clock=clock, memory=memory)
        for part in zip(rows.split(size), slack.split(size), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    ends = [list(zip(*bounds, strict=True)) for bounds in zip(*parts, strict=True)]
    return [(torch.cat(low), torch.cat(high)) for low, high in ends]


def _open(bounds: Bounds, steps: tuple[Step, ...]) -> int:
    """Neurons beyond the first layer whose sign is open on some star."""
    pairs = [(low, high, step.relu) for (low, high), step in zip(bounds, steps, strict=True) if step.relu is not None]
    return int(sum((((low < 0) & (high > 0)).any(0) & relu).sum() for low, high, relu in pairs[1:]))


def _lirpa(
    steps: tuple[Step, ...],
    rows: Tensor,
    slack: Tensor,
    own: Bounds,
    margin: float,
    clock: Clock,
    memory: float,
) -> Bounds | None:
    from torchreach.domains import lirpa

    hidden = max((step.features for step in steps[:-1]), default=0)
    if lirpa.MATRICES * rows.element_size() * len(rows) * hidden * max(hidden, rows.shape[2]) > memory:
        log.info("no memory for auto_LiRPA")
        return None
    try:
        bounds = lirpa.preactivation_bounds(steps, rows, slack, own, clock)
    except OutOfTime:
        log.info("no time for auto_LiRPA")
        return None
    except lirpa.LirpaUnavailableError as error:
        _say_once(f"neurons are bounded by zonotopes only, so exact reach splits less early: {error}")
        return None
    # auto_LiRPA's rounding is in proportion to the terms that cancel in a bound, not to the bound.
    terms, size = 0, rows.abs().sum(1) + slack
    result: Bounds = []
    for (low, high), step in zip(bounds, steps, strict=True):
        terms += step.terms + 8
        size = step.magnitude(size) + step.bias_magnitude
        extra = margin + 16 * gamma(terms) * size
        result.append((low - margin * low.abs() - extra, high + margin * high.abs() + extra))
    return result


@lru_cache
def _say_once(message: str) -> None:
    log.warning(message)
