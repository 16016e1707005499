"""Are two networks equivalent on a set of inputs? To within epsilon, or in the label they give.

    epsilon:  |y1_n - y2_n| <= epsilon for every output n and input x          `discrepancy`, with a tolerance
    top1:     argmax y1(x) = argmax y2(x) for every input x

Method for labels: with c the label at one point, both networks give c everywhere if no output has a lead over c,

    max over x and j of  y_j - y_c  <  0     in either network,

which is a search of its own for each network, of y_j - y_c by itself. Where labels
change inside the star, they change on nearly the same surface in both networks. Between two inputs of different
labels, bisection finds where each network changes; in between, their labels differ.

Property: sound; complete for labels only where the label does not change inside the star.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from torchreach.compress.constraints import is_weight_only
from torchreach.core.checkpoint import Checkpoint
from torchreach.core.clock import Clock, OutOfTime, running
from torchreach.core.errors import OptionError, ShapeError
from torchreach.core.evidence import reason
from torchreach.core.options import Budget
from torchreach.core.results import Answer, Discrepancy, Equivalence, Progress, ProgressCallback, Reason, Semantics
from torchreach.core.roundoff import round_down, round_up
from torchreach.core.tolerances import COMPUTE_DTYPE, Tolerances
from torchreach.domains.pair import identical
from torchreach.domains.zonotope import box_rows, zonotope_bounds
from torchreach.graph.layers import Reshape
from torchreach.graph.steps import Step
from torchreach.graph.weights import linear_layer
from torchreach.read.load import as_network
from torchreach.read.module import reading_once
from torchreach.read.steps import steps
from torchreach.search.result import Question, SearchResult
from torchreach.sets.star import StarBatch
from torchreach.verbs.deployed_labels import deployed_labels, read
from torchreach.verbs.discrepancy import discrepancy, one_dtype
from torchreach.verbs.executed import Formats, Side, formats, semantics_of
from torchreach.verbs.float_pair import compare
from torchreach.verbs.int8_kernels import CHOICES
from torchreach.verbs.int8_pair import rounds
from torchreach.verbs.labels import (
    Leads,
    apart_by,
    both_scored,
    check_confidence,
    lead_matrix,
    lead_over,
    lead_rows,
    odds,
)
from torchreach.verbs.lead_search import LeadSearch
from torchreach.verbs.merge import merge
from torchreach.verbs.questions import opened
from torchreach.verbs.reach import replay
from torchreach.verbs.units import ALONE, Asked, in_units
from torchreach.work.cluster import Cluster

log = logging.getLogger(__name__)

SAMPLES = 256
BISECTIONS = 60
REPORT_SECONDS = 0.2
PAIRS = 1024  # of labels whose leads are bounded by themselves


@reading_once()
def equivalent(
    original: nn.Module,
    compressed: nn.Module,
    stars: StarBatch,
    epsilon: float | None = None,
    *,
    top1: bool = False,
    confidence: float | None = None,
    budget: Budget | None = None,
    tolerances: Tolerances | None = None,
    progress: ProgressCallback | None = None,
    kernels: str = "here",
    arithmetic: str | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    ray: str | None = None,
) -> Equivalence:
    """Whether two networks agree on every input of each star: to within `epsilon`, or (`top1`) in their label.

    Labels of deployed networks are those of any kernel that is covered; of a `.tflite` file that ends in a softmax, of
    the codes before it (`network.scores()`), whose order it keeps but for ties. A tie is no label: it is certified as
    little as refuted. `verbs.labels` has the rule and its proof, with and without a confidence.

    Args:
        original, compressed: networks of supported layers with equal input and output sizes.
        stars: input stars [S] of the networks' input shape.
        epsilon: bound on |y1 - y2| for every output; give this or `top1`.
        top1: whether the largest output is the same one.
        confidence: with `top1`, ask so only where the original's softmax gives its label at least this probability, in
            (0, 1); other inputs do not count. Where a network ends in a softmax, it is that one, else one is thought
            behind its outputs; it is taken as a real function of them.
        budget, tolerances, progress, kernels, arithmetic: as in `discrepancy`. Ctrl-C ends it as a spent budget does.
        checkpoint: as in `discrepancy`; with `top1` the run goes on from the last star that was answered.
        ray: as in `discrepancy`.

    Guarantee: EQUIVALENT is certified for the networks as real-valued functions of their weights (deployed networks and
    networks in half precision: as `discrepancy` says); NOT_EQUIVALENT comes with a witness, replayed with a bound on
    its rounding, or as this machine executes it.

    Raises: as `discrepancy`; OptionError: not exactly one of `epsilon` and `top1`, a negative epsilon, or a confidence
        that is no probability in (0, 1), or comes without `top1`.

    Examples:
        >>> original, compressed = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(original.weight, 1.0), nn.init.constant_(compressed.weight, 0.75)
        >>> stars = tr.StarBatch.from_box(torch.zeros(2), torch.ones(2))
        >>> [tr.equivalent(original, compressed, stars, epsilon).answer[0].value for epsilon in (0.4, 0.6)]
        ['not equivalent', 'equivalent']
    """
    if (epsilon is None) != top1:
        given = "both" if top1 else "neither"
        raise OptionError(f"equivalent needs either epsilon or top1=True, got {given}")
    check_confidence(confidence)
    if confidence is not None and not top1:
        raise OptionError(f"confidence={confidence!r} is about labels: it needs top1=True")
    if kernels not in CHOICES:
        raise OptionError(f"kernels must be one of {', '.join(CHOICES)}, got {kernels!r}")
    if not isinstance(stars, StarBatch):
        raise ShapeError(f"two networks are compared on a torchreach.StarBatch, got {type(stars).__name__}")
    original, compressed = as_network(original), as_network(compressed)
    if epsilon is not None:
        if not 0 <= epsilon < math.inf:
            raise OptionError(f"epsilon must be a number >= 0, got {epsilon!r}")
        found = discrepancy(
            original,
            compressed,
            stars,
            tolerance=epsilon,
            budget=budget,
            tolerances=tolerances,
            progress=progress,
            kernels=kernels,
            arithmetic=arithmetic,
            checkpoint=checkpoint,
            ray=ray,
        )
        return _within(found, epsilon)
    budget = budget or Budget()
    with torch.no_grad(), running(budget.seconds) as clock:
        asked = {"top1": True, "confidence": confidence, "kernels": kernels, "arithmetic": arithmetic}
        networks = {"original": original, "compressed": compressed}
        files = opened(checkpoint, "equivalent", networks, stars, budget, **asked)
        cluster = Cluster.of(ray)
        if cluster is not None or (files is not None and not files.unit):
            some = Asked(equivalent, (original, compressed), stars, asked)
            return in_units(some, ALONE, clock, budget, files, cluster, lambda _: progress)
        scored, given = both_scored((original, compressed), tuple(stars.shape))
        kinds = formats(original, compressed, arithmetic)
        deployed = [rounds(network, stars.shape) for network in scored]
        if any(deployed):
            if arithmetic == "real":
                raise OptionError(
                    "arithmetic='real' requires networks that do not round activations: compare "
                    "torchreach.weight_only(network)"
                )
            kinds = (None if deployed[0] else kinds[0], None if deployed[1] else kinds[1])
            readings = read(scored, stars, kinds, kernels, given=given)
            return deployed_labels(scored, readings, stars, confidence, budget=budget, progress=progress, clock=clock)
        # Softmax keeps the order, unless it is rounded
        original, compressed = scored if kinds == (None, None) else (original, compressed)
        return _Labels(original, compressed, stars, budget, progress, clock, kinds, confidence).run()


def _within(found: Discrepancy, epsilon: float) -> Equivalence:
    """Answers from certified intervals."""
    lower, upper = found.max_lower, found.max_upper
    covered = torch.tensor(not found.uncovered, device=upper.device)  # else kernels may leave the interval
    rows = torch.arange(len(lower), device=lower.device)
    return Equivalence(
        answer=_answers((covered & (upper.double() <= epsilon)).tolist(), (lower.double() > epsilon).tolist()),
        lower=lower,
        upper=upper,
        witness=found.witness[rows, found.lower.argmax(1)],
        label=None,
        epsilon=epsilon,
        branches=found.stats.branches,
        seconds=found.stats.seconds,
        semantics=found.semantics,
        kernels=found.kernels,
        uncovered=found.uncovered,
        reasons=found.reasons,
        prover=None if found.prover is None else lambda _, path, budget: found.save_certificate(path, budget),
    )


def _answers(yes: list[bool], no: list[bool]) -> tuple[Answer, ...]:
    return tuple(
        Answer.EQUIVALENT if y else Answer.NOT_EQUIVALENT if n else Answer.UNKNOWN for y, n in zip(yes, no, strict=True)
    )


@dataclass
class _Labels:
    """The same-label question, star by star."""

    original: nn.Module
    compressed: nn.Module
    stars: StarBatch
    budget: Budget
    progress: ProgressCallback | None
    clock: Clock
    kinds: Formats = (None, None)
    confidence: float | None = None

    def __post_init__(self) -> None:
        stars, given = self.stars, (self.original, self.compressed)
        self.same = self.original is self.compressed
        self.original, self.compressed = one_dtype(*given, stars.shape)
        merge(self.original, self.compressed, stars.shape)  # refuses wrong input
        self.sides = tuple(Side.of(network, stars, kind) for network, kind in zip(given, self.kinds, strict=True))
        self.networks = tuple(side.steps for side in self.sides)
        self.outputs = self.networks[0][-1].features
        if self.outputs < 2:
            raise ShapeError("top1 needs networks of at least two outputs, got one")
        self.least, self.most = odds(self.confidence)
        self.branches, self.reported = 0, -math.inf

    def run(self) -> Equivalence:
        size, stars = len(self.stars), self.stars
        points = stars.sample(SAMPLES)  # in the stars' dtype, as witnesses are
        value, error = zip(*(side.values(points.flatten(0, 1)) for side in self.sides), strict=True)
        first = value[0].reshape(size, SAMPLES, -1)[:, 0]
        self.label = first.argmax(1)
        self.lower = torch.full((size,), -torch.inf, dtype=COMPUTE_DTYPE, device=stars.device)
        self.upper = -self.lower
        self.witness = points[:, 0].clone()
        self.lower = torch.stack([
            lead_over(y - e, y + e, self.label.repeat_interleave(SAMPLES)).reshape(size, SAMPLES).amax(1)
            for y, e in zip(value, error, strict=True)
        ]).amax(0)  # fmt: skip
        self.margin = self._margin()
        same = self.same or (identical(*self.networks) and self.kinds == (None, None))
        yes, no, never = [same] * size, [False] * size, [False] * size
        for s in range(size) if not same else ():
            self._report()
            if self.clock.over:
                break
            clock = self.clock.part(self.clock.left / (size - s))
            found = self._differ(s, points[s])
            if found is None and self.confidence is not None:
                yes[s], never[s] = self._sure(s, clock.share(0.5))
            if found is None and not yes[s]:
                yes[s], reached = self._constant(s, clock)
                found = None if reached is None else self._differ(s, torch.cat((points[s], reached)))
            if found is not None:
                no[s] = True
                self.witness[s] = found
        answers = _answers(yes, no)
        return Equivalence(
            answer=answers,
            lower=round_down(self.lower, stars.dtype),
            upper=round_up(self.upper, stars.dtype),
            witness=self.witness,
            label=self.label,
            epsilon=None,
            branches=self.branches,
            seconds=self.clock.elapsed,
            semantics=self._semantics(),
            reasons=tuple(map(self._reason, answers, never)),
            confidence=self.confidence,
        )

    def _margin(self) -> Tensor:
        """[2, S] how much of a lead rounding in either network may take away, of outputs `loss` [2, S, K]."""
        low, high, _ = self.stars.bounding_box()
        rows, result = torch.arange(len(low), device=low.device), []
        for side in self.sides:
            try:
                below, above = side.rounding(low, high, self.clock)
            except OutOfTime:
                result.append(low.new_full((len(low), self.outputs), torch.inf))
                continue
            result.append(torch.maximum(-below, above))
        self.loss = torch.stack(result)
        return self.loss[:, rows, self.label] + self.loss.amax(2)

    def _sure(self, s: int, clock: Clock) -> tuple[bool, bool]:
        """Whether the labels agree wherever the original is sure of its own, and whether it nowhere is.

        By leads of all outputs over all others: of both networks in one pass, then of their difference for as long as
        it takes to know that it stays below what a sure original leads by.
        """
        star, count = self.stars.select([s]), self.outputs
        pairs = torch.ones(count, count, device=star.device).triu(1).nonzero()
        if len(pairs) > PAIRS:
            return False, False
        first, second = (self._with(network, lead_rows(pairs, count)) for network in (self.original, self.compressed))
        low, high, _ = star.bounding_box()
        own = []
        for network in (first, second):
            read = steps(network, star.shape, dtype=COMPUTE_DTYPE, device=star.device, smooth=True)
            down, up = zonotope_bounds(read, *box_rows(low, high), clock=clock)[-1]
            own.append(lead_matrix(up, -down, pairs, count))
        bounds = Leads(own[0], own[1]).widened(*self.loss[:, s])
        missed = float(bounds.missed(self.least))
        most = max(self.least, 0.0) - 2 * float(self.loss[:, s].sum(0).max())
        if missed >= 0 and most > 0 and not clock.over:
            question = Question("largest", max(1e-9, 1e-3 * most), most * (1 - 1e-6))
            limits = replace(self.budget, seconds=None)
            options = {"budget": limits, "tolerances": Tolerances(), "progress": None, "clock": clock}
            found = compare(first, second, star, None, question, **options)
            ends = found.range_upper.double(), -found.range_lower.double()
            bounds = Leads(own[0], own[1], lead_matrix(*ends, pairs, count)).widened(*self.loss[:, s])
            missed = float(bounds.missed(self.least))
            self.branches += found.stats.branches
        if missed < 0:
            self.upper[s] = torch.maximum(bounds.over(self.label[s])[0], self.lower[s])
        return missed < 0, missed == -math.inf

    def _constant(self, s: int, clock: Clock) -> tuple[bool, Tensor | None]:
        """Whether both networks give the star's label everywhere; and inputs [B, *shape] that show another.

        Each network has half of the time first, then those that are open have what is left.
        """
        star, label = self.stars.select([s]), int(self.label[s])
        both = [
            LeadSearch(self._lead(network, label), star, float(self.margin[i, s]), self.budget, clock)
            for i, network in enumerate((self.original, self.compressed))
        ]
        for turn in range(2):
            for i, search in enumerate(both):
                shown = any(other.lower >= 0 for other in both if other is not search)
                if turn == 0 or (search.open and not shown):
                    search.run(clock.part(0.0 if shown else clock.left / (2 - i)), self._report)
        self.branches += sum(search.branches for search in both)
        for search in both:
            if search.lower - search.margin > float(self.lower[s]):
                self.lower[s], self.witness[s] = search.lower - search.margin, search.x
        others = [search.x for search in both if search.lower >= 0]
        self.upper[s] = max(*(search.upper + search.margin for search in both), float(self.lower[s]))
        return bool(self.upper[s] < 0), torch.stack(others) if others else None

    def _semantics(self) -> Semantics:
        if self.kinds != (None, None):
            return semantics_of(self.kinds)
        return Semantics.WEIGHT_ONLY if is_weight_only(self.compressed) else Semantics.FLOAT

    def _report(self, state: SearchResult | None = None) -> None:
        if self.progress is None or self.clock.elapsed - self.reported < REPORT_SECONDS:
            return
        self.reported = self.clock.elapsed
        done, open_ = (state.branches, state.open) if state else (0, 0)
        low, high = self.lower[:, None], self.upper[:, None]
        self.progress(Progress(self.branches + done, open_, low, high, low, low, self.clock.elapsed))

    def _reason(self, answer: Answer, never: bool) -> Reason:
        yes = Reason.NEVER_SURE if never else Reason.WITHIN
        settled = {Answer.EQUIVALENT: yes, Answer.NOT_EQUIVALENT: Reason.EXCEEDED}.get(answer)
        return reason(settled, False, False, self.clock, self.budget.stars is not None, Reason.NUMERICAL)

    def _lead(self, network: nn.Module, label: int) -> nn.Module:
        """The leads of all other outputs over `label`."""
        others = [(i, label) for i in range(self.outputs) if i != label]
        return self._with(network, lead_rows(torch.tensor(others, device=self.stars.device), self.outputs))

    def _with(self, network: nn.Module, rows: Tensor) -> nn.Module:
        """`rows` [P, K] of the outputs."""
        return nn.Sequential(network, Reshape((self.outputs,)), linear_layer(rows, None))

    def _differ(self, s: int, points: Tensor) -> Tensor | None:
        """An input at which the labels certainly differ, looked for at points [B, *shape] and between them."""
        points = points.to(COMPUTE_DTYPE)
        labels = [replay(network, points)[0].argmax(1) for network in self.networks]
        here = (labels[0] == self.label[s]) & (labels[1] == self.label[s])
        other = (labels[0] != self.label[s]) & (labels[1] != self.label[s])
        if bool(here.any()) and bool(other.any()):
            inside, outside = points[here], points[other]
            count = max(len(inside), len(outside))
            a, b = (part[torch.arange(count, device=part.device) % len(part)] for part in (inside, outside))
            shape = (-1, *[1] * (points.ndim - 1))
            crossing = [self._crossing(network, a, b, int(self.label[s])) for network in self.networks]
            points = torch.cat((points, a + ((crossing[0] + crossing[1]) / 2).reshape(shape) * (b - a)))
        points = points.to(self.stars.dtype)
        ends = [(y - error, y + error) for y, error in (side.values(points) for side in self.sides)]
        found, best = apart_by(ends[0], ends[1], self.most).max(0)
        return points[best] if float(found) > 0 else None

    @staticmethod
    def _crossing(network: tuple[Step, ...], a: Tensor, b: Tensor, label: int) -> Tensor:
        """Shares t [B] of the way from a to b at which the label stops being `label`."""
        low, high = (torch.full((len(a),), end, dtype=a.dtype, device=a.device) for end in (0.0, 1.0))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            x = a + middle.reshape(-1, *[1] * (a.ndim - 1)) * (b - a)
            still = replay(network, x)[0].argmax(1) == label
            low, high = torch.where(still, middle, low), torch.where(still, high, middle)
        return (low + high) / 2
