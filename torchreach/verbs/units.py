"""A question about many inputs as units of bounded size, each answered once: the pieces of a checkpoint.

Which inputs make a unit follows from their number alone, and a unit's answer from the unit alone, so that units can be
answered in any order, again after a failure, and by any machine. Their answers are joined in the order of the inputs.
What a unit's budget of seconds or memory, or Ctrl-C, cut short is not filed: the next call goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchreach.core.audited import Audit
from torchreach.core.checkpoint import Checkpoint
from torchreach.core.clock import Clock
from torchreach.core.options import Budget
from torchreach.core.results import Discrepancy, Equivalence, ReachStats, Reason
from torchreach.core.terms import Kernels
from torchreach.engines.tally import added
from torchreach.verbs.storage import from_plain, to_plain

Result = TypeVar("Result", Discrepancy, Equivalence, Audit)
ANSWER = "answer"
LEAST_SECONDS = 1e-3  # of a unit, whatever is left
# Inputs in a unit: where an engine takes several together, and where it takes one at a time.
TOGETHER, ALONE = 8, 1
PAIRED = ("label", "right", "maybe_right")  # of an `Audit`: [2, B]


def in_units(
    files: Checkpoint,
    count: int,
    size: int,
    clock: Clock,
    budget: Budget,
    answer: Callable[[slice, Budget, Checkpoint], Result],
) -> Result:
    """The joined answers about `count` inputs, `size` at a time.

    answer: about the inputs of a slice, within a budget, with a checkpoint of its own. clock: shared out over the units
        by their inputs; each gets some of it, so that all are answered.
    """
    parts = []
    for first in range(0, count, size):
        some = slice(first, min(first + size, count))
        share = budget
        if clock.limited or clock.interrupted:
            seconds = 0.0 if clock.interrupted else clock.left * (some.stop - first) / (count - first)
            share = replace(budget, seconds=max(seconds, LEAST_SECONDS))
        name = f"{first:06d}-{some.stop - 1:06d}"
        parts.append(filed(files, name, clock, budget, lambda own, some=some, share=share: answer(some, share, own)))
    return joined(parts)


def filed(files: Checkpoint | None, name: str, clock: Clock, budget: Budget, answer: Callable[[Any], Result]) -> Result:
    """The answer in a unit of the checkpoint, or that of `answer`, which is filed there unless something cut it short.

    answer: is given the checkpoint of the unit, for the state of its work; None where there is none.
    """
    if files is None:
        return answer(None)
    own = files.part(name, unit=True)
    found = own.load(ANSWER)
    if found is not None:
        return from_plain(found)
    result = answer(own)
    limited = clock.limited or budget.stars is None
    if Reason.INTERRUPTED not in result.reasons and not (limited and Reason.BUDGET in result.reasons):
        own.save(ANSWER, to_plain(result))
        own.tidy(ANSWER)
    return result


def joined(parts: Sequence[Any]) -> Any:
    """One answer from those of units, in the order of their inputs."""
    first = parts[0]
    if len(parts) == 1:
        return first
    values: dict[str, Any] = {}
    for field in fields(first):
        name, own = field.name, [getattr(part, field.name) for part in parts]
        if isinstance(own[0], Tensor):
            values[name] = torch.cat(own, 1 if isinstance(first, Audit) and name in PAIRED else 0)
        elif isinstance(own[0], ReachStats):
            values[name] = _stats(own)
        elif name in ("branches", "seconds"):
            values[name] = sum(own)
        elif name == "kernels":
            values[name] = _kernels(own)
        elif name == "uncovered":
            values[name] = tuple(dict.fromkeys(layer for part in own for layer in part))
        elif name in ("answer", "status", "reasons"):
            values[name] = tuple(one for part in own for one in part)
        else:
            values[name] = own[0]
    return replace(first, **values)


def _stats(parts: Sequence[ReachStats]) -> ReachStats:
    whole = parts[0]
    for part in parts[1:]:
        if len(whole.layers) == len(part.layers):
            whole = added(whole, part)
    methods = dict.fromkeys(name for part in parts for name in part.method.split(" + "))
    return replace(
        whole,
        method=" + ".join(methods),
        root_bounds=parts[0].root_bounds,
        seconds=sum(part.seconds for part in parts),
        branches=sum(part.branches for part in parts),
        fallback=next((part.fallback for part in parts if part.fallback), ""),
    )


def _kernels(parts: Sequence[Kernels]) -> Kernels:
    """What all units cover: where no pair of products saturates, that is any kernel."""
    kinds = dict.fromkeys(parts)
    narrower = [kind for kind in kinds if kind is not Kernels.ANY]
    return Kernels.SATURATING if Kernels.SATURATING in narrower else narrower[0] if narrower else Kernels.ANY
