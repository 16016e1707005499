"""A question about many inputs as units of bounded size, each answered once: the pieces of a checkpoint.

Which inputs make a unit follows from their number alone, and a unit's answer from the unit alone, so that units can be
answered in any order, again after a failure, and by any machine. Their answers are joined in the order of the inputs.
What a unit's budget of seconds or memory, or Ctrl-C, cut short is not filed: the next call goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from torchreach.core.audited import Audit
from torchreach.core.checkpoint import Checkpoint
from torchreach.core.clock import Clock
from torchreach.core.options import Budget
from torchreach.core.results import Discrepancy, Equivalence, ReachStats, Reason
from torchreach.core.terms import Kernels
from torchreach.engines.tally import added
from torchreach.sets.star import StarBatch
from torchreach.verbs.storage import from_plain, to_plain
from torchreach.work.cluster import Cluster

Result = TypeVar("Result", Discrepancy, Equivalence, Audit)
ANSWER = "answer"
LEAST_SECONDS = 1e-3  # of a unit, whatever is left
# Inputs in a unit: where an engine takes several together, and where it takes one at a time.
TOGETHER, ALONE = 8, 1
PAIRED = ("label", "right", "maybe_right")  # of an `Audit`: [2, B]


@dataclass(frozen=True)
class Asked:
    """A question about many inputs that can be asked of some of them: verb(*networks, inputs, **options).

    each: what of the options belongs to single inputs [B], and is divided with them.
    """

    verb: Callable[..., Any]
    networks: tuple[nn.Module, nn.Module]
    inputs: StarBatch | Tensor
    options: dict[str, Any]
    each: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def of(self, some: slice) -> Asked:
        """The question about the inputs of a slice."""
        inputs = self.inputs[some] if isinstance(self.inputs, Tensor) else self.inputs.select(some)
        each = {name: values[some] for name, values in self.each.items()}
        return replace(self, inputs=inputs, each=each)

    def answer(self, **options: Any) -> Any:
        """On this machine."""
        return self.verb(*self.networks, self.inputs, **self.options, **self.each, **options)


def in_units(
    asked: Asked,
    size: int,
    clock: Clock,
    budget: Budget,
    files: Checkpoint | None,
    cluster: Cluster | None,
    progress: Callable[[slice], Any] = lambda _: None,
) -> Any:
    """The joined answers about all inputs, `size` at a time: one after the other here, or on a cluster.

    clock: shared out over the units by their inputs; each gets some of it, so that all are answered. progress: the
    callback of a unit that is worked on here.
    """
    count = len(asked.inputs)
    units = [slice(first, min(first + size, count)) for first in range(0, count, size)]
    known: dict[int, Any] = {} if cluster is None else dict(_on_cluster(asked, units, clock, budget, files, cluster))
    parts = []
    for k, some in enumerate(units):
        if k in known:
            parts.append(known[k])
            continue
        share = _share(clock, budget, (some.stop - some.start) / (count - some.start))

        def answer(own: Checkpoint | None, some: slice = some, share: Budget = share) -> Any:
            return asked.of(some).answer(budget=share, progress=progress(some), checkpoint=own)

        parts.append(filed(files, _name(some), clock, budget, answer))
    return joined(parts)


def _on_cluster(
    asked: Asked, units: list[slice], clock: Clock, budget: Budget, files: Checkpoint | None, cluster: Cluster
) -> Iterator[tuple[int, Any]]:
    """Answers by the number of their unit, of all units that a cluster answered; those filed are not asked again."""
    networks = cluster.shared(asked.networks)
    plain = replace(asked, networks=cast("Any", ()))
    waiting = []
    for k, some in enumerate(units):
        found = None if files is None else files.part(_name(some), unit=True).load(ANSWER)
        if found is None:
            waiting.append(k)
        else:
            yield k, from_plain(found)
    waiting.reverse()

    def take() -> tuple[int, tuple[Any, ...]] | None:
        if not waiting:
            return None
        rounds = max(1.0, len(waiting) / cluster.workers)
        k = waiting.pop()
        return k, (plain.of(units[k]), networks, _share(clock, budget, 1 / rounds))

    for k, result in cluster.done(_answered, take, clock):
        if result is not None:
            result = _on(result, asked.inputs.device)
            yield k, filed(files, _name(units[k]), clock, budget, lambda _, result=result: result)


def _answered(asked: Asked, networks: tuple[nn.Module, nn.Module], budget: Budget) -> Any:
    """What a worker does; on its GPU, if it has one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        networks = cast("Any", tuple(network.to(device) for network in networks))
    moved = replace(asked, networks=networks, inputs=asked.inputs.to(device), each=_on(asked.each, device))
    return _on(moved.answer(budget=budget), torch.device("cpu"))


def _on(value: Any, device: torch.device) -> Any:
    """A result or a dictionary with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _on(part, device) for name, part in value.items()}
    return replace(value, **{part.name: _on(getattr(value, part.name), device) for part in fields(value)
                             if isinstance(getattr(value, part.name), Tensor)})  # fmt: skip


def _name(some: slice) -> str:
    return f"{some.start:06d}-{some.stop - 1:06d}"


def _share(clock: Clock, budget: Budget, part: float) -> Budget:
    """`budget` with this part of the seconds that are left."""
    if not clock.limited and not clock.interrupted:
        return budget
    return replace(budget, seconds=max(0.0 if clock.interrupted else clock.left * part, LEAST_SECONDS))


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
    for name in [part.name for part in fields(first)]:
        own = [getattr(part, name) for part in parts]
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
