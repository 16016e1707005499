"""Two networks over a test set: of each input, whether they certainly give it one label, on any processor.

With eps = 0 each input is decided by itself: the original's outputs are known up to certified rounding, the deployed
network's are followed through every code that any kernel may give (`domains.rounding.outputs`), batch by batch. So an
audit says on which inputs a label may depend on the machine. With eps > 0 each input is the centre of a box, which
`equivalent` answers about and `discrepancy` bounds.

Axis letters: B inputs, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torchreach.compress.constraints import is_weight_only
from torchreach.core.audited import Audit
from torchreach.core.checkpoint import Checkpoint
from torchreach.core.clock import Clock, running
from torchreach.core.errors import InvalidSetError, OptionError, ShapeError
from torchreach.core.memory import default_budget
from torchreach.core.options import Budget
from torchreach.core.results import Answer, Kernels, Reason, Semantics
from torchreach.core.roundoff import above, below, round_down, round_up
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.domains.pair import identical
from torchreach.read.load import as_network
from torchreach.read.module import reading_once
from torchreach.sets.star import StarBatch
from torchreach.verbs.deployed_labels import read
from torchreach.verbs.discrepancy import discrepancy
from torchreach.verbs.equivalence import equivalent
from torchreach.verbs.executed import Formats, formats, semantics_of
from torchreach.verbs.int8_compared import PROBES, Compared, by_point, one_network, quantised
from torchreach.verbs.int8_kernels import CHOICES, coverage
from torchreach.verbs.int8_pair import rounds
from torchreach.verbs.labels import (
    Reading,
    agree,
    apart_by,
    both_scored,
    check_confidence,
    label_of,
    may_give,
    odds,
    ties,
)
from torchreach.verbs.questions import opened
from torchreach.verbs.units import TOGETHER, Asked, in_units
from torchreach.work.cluster import Cluster

COPIES = 32  # of the widest layer of an input that are in memory at once, codes in doubt included
MOST = 4096  # inputs between two looks at the clock
CENTRES = 0.5  # share of the time that the inputs themselves take at most where eps > 0
NUMBERS = 2**22


@reading_once()
def audit(
    original: nn.Module,
    compressed: nn.Module,
    points: Tensor | np.ndarray,
    eps: float = 0.0,
    labels: Tensor | np.ndarray | None = None,
    *,
    confidence: float | None = None,
    clip: tuple[float, float] | None = None,
    budget: Budget | None = None,
    progress: Callable[[int, int], None] | None = None,
    kernels: str = "any",
    arithmetic: str | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    ray: str | None = None,
) -> Audit:
    """Of each input of a test set, whether two networks certainly give it, and all within `eps`, the same label.

    Args:
        original, compressed: networks of supported layers with equal input and output sizes, of two outputs at least.
        points: [B, *shape] inputs, floating-point and finite. Where a network is deployed it reads them as float32,
            and they are rounded to it for both.
        eps: how far each value may move, in units of the input, finite and >= 0.
        labels: [B] the right labels, whole numbers, for accuracies.
        confidence, arithmetic: as in `equivalent`; inputs at which the original is less sure do not count.
        clip: with `eps`, lowest and highest valid value of an input; the points must keep to it.
        budget: one clock for all inputs; what is not reached is UNKNOWN. progress: called with the number of inputs
            that are done, and of all.
        kernels: as in `discrepancy`, of torch's int8 networks; the default is any kernel. Files of LiteRT and
            onnxruntime have their own.
        checkpoint: as in `discrepancy`; the run goes on from the last inputs that were answered.
        ray: as in `discrepancy`.

    Guarantee: EQUIVALENT is certified for every kernel that is covered, NOT_EQUIVALENT has a witness, replayed on the
    modules as given. Networks that end in a softmax are compared in the scores before it, labels and |y1 - y2| alike.
    One network beside itself agrees with itself on whichever processor executes both; `depends` says where its label
    may differ from one processor to another. The rule is that of `verbs.labels`.

    Raises: as `equivalent`; ShapeError: points that are no batch of inputs, or labels of another number or range.
        InvalidSetError: inputs that are not finite.

    Examples:
        >>> network = nn.Linear(2, 2)
        >>> _ = nn.init.eye_(network.weight), nn.init.zeros_(network.bias)
        >>> found = tr.audit(network, tr.quantize_weights(network), torch.tensor([[0.5, 0.1], [0.2, 0.9]]))
        >>> found.count(tr.Answer.EQUIVALENT), found.label[0].tolist()
        (2, [0, 1])
    """
    check_confidence(confidence)
    if not (isinstance(eps, int | float) and 0 <= eps < math.inf):
        raise OptionError(f"eps must be a finite number >= 0, got {eps!r}")
    if kernels not in CHOICES:
        raise OptionError(f"kernels must be one of {', '.join(CHOICES)}, got {kernels!r}")
    x = _checked_points(points)
    wanted = None if labels is None else _checked_labels(labels, len(x)).to(x.device)
    original, compressed = as_network(original), as_network(compressed)
    budget = budget or Budget()
    with torch.no_grad(), running(budget.seconds) as clock:
        shape = tuple(x.shape[1:])
        asked = {"confidence": confidence, "clip": clip, "kernels": kernels, "arithmetic": arithmetic}
        both = {"original": original, "compressed": compressed}
        files = opened(checkpoint, "audit", both, x, budget, eps=float(eps), labels=wanted, **asked)
        cluster = Cluster.of(ray)
        if cluster is not None or (files is not None and not files.unit):
            each = {} if wanted is None else {"labels": wanted}
            some = Asked(audit, (original, compressed), x, {**asked, "eps": eps}, each)

            def told(some: slice) -> Callable[[int, int], None] | None:
                def tell(done: int, _: int) -> None:
                    assert progress is not None
                    progress(some.start + done, len(x))

                return progress and tell

            return in_units(some, TOGETHER if eps else MOST, clock, budget, files, cluster, told)
        networks, given = both_scored((original, compressed), shape)
        kinds = formats(original, compressed, arithmetic)
        deployed = [rounds(network, shape) for network in networks]
        if any(deployed):
            if arithmetic == "real":
                raise OptionError(
                    "arithmetic='real' requires networks that do not round activations: audit "
                    "torchreach.weight_only(network)"
                )
            kinds = (None if deployed[0] else kinds[0], None if deployed[1] else kinds[1])
            x = x.float() if x.dtype.itemsize > 4 else x
        elif kinds != (None, None):
            networks = original, compressed  # how a softmax is executed is not known
        first = StarBatch.from_box(x[:1], x[:1])
        readings = read(networks, first, kinds, kernels, given=given, smooth=not any(deployed))
        if wanted is not None and not bool(((wanted >= 0) & (wanted < readings[0].outputs)).all()):
            raise ShapeError(
                f"labels must lie in 0 to {readings[0].outputs - 1}, as the networks have {readings[0].outputs} "
                f"outputs, got {int(wanted.min())} to {int(wanted.max())}"
            )
        work = _Audit((original, compressed), networks, readings, x, wanted, confidence, budget, progress, clock, kinds)
        work.points(clock if not eps else clock.share(CENTRES), last=not eps)
        if eps:
            work.boxes(eps, clip, kernels, arithmetic)
        return work.result(eps)


def _checked_points(points: Tensor | np.ndarray) -> Tensor:
    x = torch.as_tensor(points)
    if x.ndim < 2 or not x.numel():
        raise ShapeError(f"points must be inputs [B, *shape], one at least, got shape {list(x.shape)}")
    if not x.is_floating_point():
        raise ShapeError(f"points must be floating-point numbers, got {str(x.dtype).removeprefix('torch.')}")
    if not bool(x.isfinite().all()):
        raise InvalidSetError(f"points must be finite, got {int((~x.isfinite()).sum())} numbers that are not")
    return x.detach()


def _checked_labels(labels: Tensor | np.ndarray, count: int) -> Tensor:
    found = torch.as_tensor(labels)
    if tuple(found.shape) != (count,):
        raise ShapeError(f"labels must be one number for each of {count} inputs, got shape {list(found.shape)}")
    if not bool((found == found.long()).all()):
        raise ShapeError("labels must be whole numbers")
    return found.long()


@dataclass
class _Audit:
    """What is known of each input so far. modules: both networks as given; networks: without a softmax at the end."""

    modules: tuple[nn.Module, nn.Module]
    networks: tuple[nn.Module, nn.Module]
    readings: tuple[Reading, Reading]
    x: Tensor
    wanted: Tensor | None
    confidence: float | None
    budget: Budget
    progress: Callable[[int, int], None] | None
    clock: Clock
    kinds: Formats

    def __post_init__(self) -> None:
        count, device = len(self.x), self.x.device
        self.answers, self.reasons = [Answer.UNKNOWN] * count, [Reason.BUDGET] * count
        self.label = torch.full((2, count), -1, device=device)
        self.depends = torch.zeros(count, dtype=torch.bool, device=device)
        self.lower = torch.zeros(count, dtype=COMPUTE_DTYPE, device=device)
        self.upper = torch.full_like(self.lower, torch.inf)
        self.witness = self.x.clone()
        self.right = torch.zeros(2, count, dtype=torch.bool, device=device)
        self.maybe = torch.ones_like(self.right)
        self.memory = self.budget.memory or default_budget(device)
        self.least, self.most = odds(self.confidence)
        self.uncovered, self.kernels = (), Kernels.NONE
        ways = self.readings[0].executed, self.readings[1].executed
        runs = self.readings[0].run, self.readings[1].run
        some = StarBatch.from_box(self.x[:PROBES], self.x[:PROBES])
        pair = Compared(self.networks[0], ways, runs, tuple(self.x.shape[1:]), self.x.dtype)
        float_twins = not any(quantised(way.steps) for way in ways) and identical(ways[0].steps, ways[1].steps)
        self.same = one_network(*self.networks, pair, some) or (float_twins and self.kinds == (None, None))

    def points(self, clock: Clock, *, last: bool) -> None:
        """Decides the inputs themselves, batch by batch; the first of them whatever the time. last: nothing follows."""
        widest = max(step.features for reading in self.readings for step in reading.steps)
        size = int(min(max(self.memory / 8 / COPIES / widest, 1), max(NUMBERS // widest, 1), MOST))
        for index in torch.arange(len(self.x), device=self.x.device).split(size):
            if int(index[0]) and clock.over:
                break
            self._batch(index, last)
            if self.progress is not None and last:
                self.progress(int(index[-1]) + 1, len(self.x))
        if last:
            self._look_at_kernels()

    def _batch(self, index: Tensor, last: bool) -> None:
        x = self.x[index].flatten(1).to(COMPUTE_DTYPE)
        rows = [reading.rows(x) for reading in self.readings]
        here = [reading.here(x, own) for reading, own in zip(self.readings, rows, strict=True)]
        may, every = zip(*(may_give(own, len(x)) for own in rows), strict=True)
        count = may_give(rows[0], len(x), self.least)[0] if self.confidence is not None else may[0]
        tied = ties(rows[0], len(x)) | ties(rows[1], len(x))
        self.label[:, index] = torch.stack([label_of(*own)[0] for own in here])
        # Several labels of one kernel are a tie; or it was not followed which kernel gives which.
        apart = (may[0] & ~every[0]).any(1) | (may[1] & ~every[1]).any(1)
        several = (may[0].sum(1) > 1) | (may[1].sum(1) > 1)
        self.depends[index] = apart | (several & ~tied)
        (low1, high1), (low2, high2) = (by_point(own, len(x)) for own in rows)
        upper = above(torch.maximum(high1 - low2, high2 - low1).amax(1))
        lower = below(torch.maximum(here[0][0] - here[1][1], here[1][0] - here[0][1]).amax(1)).clamp(min=0)
        self.lower[index], self.upper[index] = (lower * 0, upper * 0) if self.same else (lower, upper)
        if self.wanted is not None:
            own = nn.functional.one_hot(self.wanted[index], may[0].shape[1]).bool()
            self.maybe[:, index] = torch.stack([(part & own).any(1) for part in may])
            self.right[:, index] = torch.stack([(part == own).all(1) for part in may])
        agrees = torch.ones_like(tied) if self.same else agree(count, may[1])
        differs = torch.zeros_like(tied) if self.same else apart_by(here[0], here[1], self.most) > 0
        never = ~count.any(1)
        marks = (part.tolist() for part in (index, agrees, differs, never, tied))
        for at, yes, no, vacuous, tie in zip(*marks, strict=True):
            if no:
                self.answers[at], self.reasons[at] = Answer.NOT_EQUIVALENT, Reason.EXCEEDED
            elif not last:
                continue
            elif yes:
                self.answers[at], self.reasons[at] = Answer.EQUIVALENT, Reason.NEVER_SURE if vacuous else Reason.WITHIN
            else:
                self.reasons[at] = Reason.TIE if tie else Reason.KERNEL_CODES

    def boxes(self, eps: float, clip: tuple[float, float] | None, kernels: str, arithmetic: str | None) -> None:
        """Decides what `points` has left open, with all inputs within `eps`."""
        self.upper = torch.full_like(self.upper, torch.inf)
        numbers = self.x[0].numel()
        size = int(min(max(self.memory / 8 / COPIES / numbers**2, 1), MOST))
        done, limits = 0, Budget(stars=self.budget.stars, memory=self.budget.memory)
        for index in torch.arange(len(self.x), device=self.x.device).split(size):
            if self.clock.over:
                break
            stars = StarBatch.from_image(self.x[index], eps, clip=clip)
            share = self.clock.part(self.clock.left * len(index) / (len(self.x) - done))
            open_ = [at for at in index.tolist() if self.answers[at] is Answer.UNKNOWN]
            if open_:
                own = stars.select([at - int(index[0]) for at in open_])
                found = equivalent(
                    *self.modules,
                    own,
                    top1=True,
                    confidence=self.confidence,
                    budget=_seconds(limits, share.left / 2),
                    kernels=kernels,
                    arithmetic=arithmetic,
                )
                for k, at in enumerate(open_):
                    self.answers[at], self.reasons[at] = found.answer[k], found.reasons[k]
                    self.witness[at] = found.witness[k] if found.answer[k] is Answer.NOT_EQUIVALENT else self.x[at]
                self._covered(found.kernels, found.uncovered)
            # Without a limit one pass of bounds has to do.
            once = limits if self.clock.limited or limits.stars else Budget(stars=1, memory=limits.memory)
            apart = discrepancy(
                *self.networks, stars, budget=_seconds(once, share.left), kernels=kernels, arithmetic=arithmetic
            )
            self.upper[index] = apart.max_upper.to(COMPUTE_DTYPE)
            self.lower[index] = torch.maximum(self.lower[index], apart.max_lower.to(COMPUTE_DTYPE))
            self._covered(apart.kernels, apart.uncovered)
            done += len(index)
            if self.progress is not None:
                self.progress(done, len(self.x))

    def _look_at_kernels(self) -> None:
        """Notes where a pair of products may saturate, over the box around all inputs."""
        low, high = (end.flatten().to(COMPUTE_DTYPE) for end in (self.x.amin(0), self.x.amax(0)))
        for reading in self.readings:
            reading.executed.look_at(reading.steps, low, high, closely=False)
        self._covered(*coverage(self.readings[0].executed, self.readings[1].executed))

    def _covered(self, kernels: Kernels, uncovered: tuple[str, ...]) -> None:
        # One batch may need no more than all kernels have, another one those of a kind.
        if self.kernels in (Kernels.NONE, Kernels.ANY):
            self.kernels = kernels
        self.uncovered = tuple(dict.fromkeys((*self.uncovered, *uncovered)))

    def result(self, eps: float) -> Audit:
        if self.clock.interrupted:
            self.reasons = [Reason.INTERRUPTED if one is Reason.BUDGET else one for one in self.reasons]
        if self.uncovered:
            self.answers = [Answer.UNKNOWN if one is Answer.EQUIVALENT else one for one in self.answers]
        if any(quantised(reading.steps) for reading in self.readings):
            semantics = Semantics.DEPLOYED_INT8
        elif self.kinds != (None, None):
            semantics = semantics_of(self.kinds)
        else:
            semantics = Semantics.WEIGHT_ONLY if is_weight_only(self.networks[1]) else Semantics.FLOAT
        known = self.wanted is not None
        return Audit(
            answer=tuple(self.answers),
            reasons=tuple(self.reasons),
            label=self.label,
            depends=self.depends,
            lower=round_down(self.lower, self.x.dtype),
            upper=round_up(self.upper, self.x.dtype),
            witness=self.witness,
            right=self.right if known else None,
            maybe_right=self.maybe if known else None,
            eps=float(eps),
            confidence=self.confidence,
            seconds=self.clock.elapsed,
            semantics=semantics,
            kernels=self.kernels,
            uncovered=self.uncovered,
        )


def _seconds(limits: Budget, seconds: float) -> Budget:
    """`limits` with as many seconds as are left."""
    return Budget(None if seconds == math.inf else max(seconds, 1e-3), limits.stars, limits.memory)
