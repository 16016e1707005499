"""Do two networks, of which one is deployed or both, give the same label on every input of a star?

Method, for each star: inputs (`verbs.label_witness`); intervals of both networks; then a tree of parts of the box
around it, the one that misses the rule of `verbs.labels` the most first:

    relaxation        both networks and their difference over the part, in leads (`domains.relaxed_difference`); with
                      many inputs also by branch and bound on signs of neurons
    few cells         every cell of the input grid (`search.cells`): the deployed network's codes are followed, the
                      other network's leads bounded over the cell
    else              the part is divided at a threshold of the input grid

Inputs in parts that are left open are run through both networks: one at which the labels certainly differ, as the
modules compute them here, ends the work.

Property: sound; complete where cells are few and the other network is linear on each, but for ties.

Axis letters: S stars, K labels, P pairs of labels, M inputs that vary, C cells, R rows (a cell and one of its outputs).
"""

from __future__ import annotations

import logging
import math
from heapq import heappop, heappush
from itertools import count

import torch
from torch import Tensor, nn

from torchreach.core.clock import Clock, OutOfTime
from torchreach.core.errors import ShapeError, UnsupportedLayerError
from torchreach.core.evidence import reason
from torchreach.core.memory import default_budget
from torchreach.core.options import Budget
from torchreach.core.results import Answer, Equivalence, Progress, ProgressCallback, Reason, Semantics
from torchreach.core.roundoff import round_down, round_up
from torchreach.domains.input_grid import InputGrid
from torchreach.domains.relaxed_difference import RelaxedDifference, relaxation_bytes, with_rows
from torchreach.domains.rounding import outputs, varying
from torchreach.graph.layers import Reshape
from torchreach.graph.steps import Step
from torchreach.graph.weights import linear_layer
from torchreach.search.cells import Cells, cells_of
from torchreach.search.grid_boxes import Part, divided
from torchreach.search.result import Question
from torchreach.search.signs import search_signs
from torchreach.sets.star import StarBatch
from torchreach.verbs.executed import Formats
from torchreach.verbs.int8_compared import Compared, by_point, one_network, quantised
from torchreach.verbs.int8_kernels import coverage
from torchreach.verbs.label_witness import Witness, witnesses
from torchreach.verbs.labels import Leads, Reading, agree, asked, lead_matrix, lead_rows, leads, may_give, odds, ties
from torchreach.verbs.reach import VERTEX_DIM, reach_within

log = logging.getLogger(__name__)

PAIRS = 1024  # of labels whose leads are bounded by themselves
LEAF, CHUNK = 2**12, 2**9  # cells of a part that are enumerated, and between two looks at the clock
PARTS = 64  # without a budget
STATES = 8  # of a search of signs, without a budget of seconds
REPORT_SECONDS = 0.25
NUMBERS = 2**22  # in one intermediate tensor


def read(
    networks: tuple[nn.Module, nn.Module],
    stars: StarBatch,
    kinds: Formats,
    kernels: str,
    *,
    given: tuple[bool, bool] = (True, True),
    smooth: bool = False,
) -> tuple[Reading, Reading]:
    """Both networks; given, smooth: as `Reading.of` has them. Raises as `steps`; ShapeError."""
    first, second = (
        Reading.of(network, stars, kind, kernels, given=own, smooth=smooth)
        for network, kind, own in zip(networks, kinds, given, strict=True)
    )
    if first.outputs != second.outputs:
        raise ShapeError(
            f"networks must have equally many outputs: the original has {first.outputs}, the compressed "
            f"{second.outputs}"
        )
    if first.outputs < 2:
        raise ShapeError("labels need networks of at least two outputs, got one")
    return first, second


@torch.no_grad()
def deployed_labels(
    networks: tuple[nn.Module, nn.Module],
    readings: tuple[Reading, Reading],
    stars: StarBatch,
    confidence: float | None,
    *,
    budget: Budget,
    progress: ProgressCallback | None,
    clock: Clock,
) -> Equivalence:
    """Whether both networks, the original first, give one label on each star; `readings`: what `read` has made of them.

    Guarantee and arguments as `equivalent`. A star that is no box is bounded over the box around it; witnesses are its
    own. Raises: KernelMismatchError.
    """
    size, shape = len(stars), tuple(stars.shape)
    memory = budget.memory or default_budget(stars.device)
    ways = tuple(reading.executed for reading in readings)
    pair = Compared(networks[0], (ways[0], ways[1]), (readings[0].run, readings[1].run), shape, stars.dtype)
    same = one_network(*networks, pair, stars)
    most = odds(confidence)
    inputs = witnesses(readings, stars, most[1])
    every = [_Star(readings, met, most[0], budget, memory) for met in inputs]
    reported = -math.inf
    for s, star in enumerate(every):
        star.clock = clock.part(clock.left / (size - s))
        if same:
            star.agree = True
        elif s == 0 or not clock.over:
            star.run()
        if progress is not None and clock.elapsed - reported >= REPORT_SECONDS:
            reported = clock.elapsed
            low, high = (
                torch.stack(ends)[:, None] for ends in zip(*((o.met.lower, o.upper) for o in every), strict=True)
            )
            progress(Progress(s + 1, size - s - 1, low, high, low, low, clock.elapsed))
        star.look_at_kernels()
    covered, uncovered = coverage(*ways)
    answers = tuple(star.answer(not uncovered) for star in every)
    return Equivalence(
        answer=answers,
        lower=round_down(torch.stack([star.met.lower for star in every]), stars.dtype),
        upper=round_up(torch.stack([star.upper for star in every]), stars.dtype),
        witness=torch.stack([star.met.at for star in every]).reshape(size, *shape).to(stars.dtype),
        label=torch.stack([star.met.label for star in every]),
        epsilon=None,
        branches=sum(star.branches for star in every),
        seconds=clock.elapsed,
        semantics=Semantics.DEPLOYED_INT8,
        kernels=covered,
        uncovered=uncovered,
        reasons=tuple(star.reason(answer, clock) for star, answer in zip(every, answers, strict=True)),
        confidence=confidence,
    )


class _Star:
    """One star and what is known of it.

    met: what inputs show. upper: [] certified end of the largest lead over its label. agree: whether the labels do,
    certainly. vacuous: whether the original is nowhere as sure as was asked. tie: whether a star of one input has two
    labels in one network.
    """

    def __init__(
        self, readings: tuple[Reading, Reading], met: Witness, least: float, budget: Budget, memory: float
    ) -> None:
        self.readings, self.met, self.least, self.memory = readings, met, least, memory
        self.limit = budget.stars or math.inf
        self.swapped = quantised(readings[0].steps) and not quantised(readings[1].steps)
        self.upper = met.low.new_tensor(torch.inf)
        self.own: tuple[tuple[Step, ...], tuple[Step, ...], Tensor] | None = None
        self.agree = self.vacuous = self.tie = self.spent = self.looked_at = False
        self.branches, self.clock = 0, Clock()

    def answer(self, covered: bool) -> Answer:
        if self.met.apart:
            return Answer.NOT_EQUIVALENT
        return Answer.EQUIVALENT if self.agree and covered else Answer.UNKNOWN

    def reason(self, answer: Answer, clock: Clock) -> Reason:
        settled = {Answer.EQUIVALENT: Reason.WITHIN, Answer.NOT_EQUIVALENT: Reason.EXCEEDED}.get(answer)
        if self.vacuous and answer is Answer.EQUIVALENT:
            settled = Reason.NEVER_SURE
        rest = Reason.TIE if self.tie else Reason.KERNEL_CODES if self.met.point else Reason.ROUNDING
        return reason(settled, False, False, clock, self.spent, rest)

    # -- work -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Intervals, inputs, then parts: for as long as it is open and there is time."""
        if self.met.point:
            self._at_point()
            return
        points = self.met.start(self.clock)
        if self.met.apart or self._take(self._intervals()):
            return
        try:
            if self._restrict():
                self.met.search(points, self.clock)
                self._divide()
        except OutOfTime:
            return

    def _at_point(self) -> None:
        """Decides a star of one input: by all its outputs, and as the modules compute them here."""
        x = self.met.at[None]
        rows = [reading.rows(x) for reading in self.readings]
        self.met.run(x, self.clock)
        first, second = may_give(rows[0], 1, self.least)[0], may_give(rows[1], 1)[0]
        self.agree = not self.met.apart and bool(agree(first, second))
        self.vacuous = self.agree and not bool(first.any())
        self.tie = any(bool(ties(own, 1)) for own in rows)
        ends = Leads(*(leads(*by_point(own, 1)) for own in rows))
        self.upper = torch.maximum(ends.over(self.met.label)[0], self.met.lower)

    def look_at_kernels(self) -> None:
        """Notes in which layers a pair of products may saturate."""
        if self.looked_at:
            return
        for reading in self.readings:
            steps, ends = reading.steps, (self.met.low, self.met.high)
            reading.executed.look_at(steps, *ends, closely=self._room(), clock=self.clock)

    def _room(self) -> bool:
        """Whether there is memory for a relaxation of both networks."""
        if self.own is None:
            return False
        return relaxation_bytes(*self.own[:2], NUMBERS) <= self.memory

    def _intervals(self) -> Leads:
        first, second = (
            leads(*reading.ranges(self.met.low[None], self.met.high[None], self.clock)) for reading in self.readings
        )
        return Leads(first, second)

    def _take(self, bounds: Leads) -> bool:
        """Takes bounds over the whole star; whether they settle it."""
        self.bounds = bounds
        self.upper = torch.minimum(self.upper, torch.maximum(bounds.over(self.met.label)[0], self.met.lower))
        missed = float(bounds.missed(self.least))
        self.agree, self.vacuous = missed < 0, missed == -math.inf
        return self.agree

    def _restrict(self) -> bool:
        """Both networks on the inputs that vary, the deployed one second; whether there is memory for that."""
        steps = [reading.steps for reading in self.readings]
        size = int((self.met.high > self.met.low).sum())
        needed = 8 * size * (len(self.met.low) + 3 * sum(step.features for step in (*steps[0][:2], *steps[1][:2])))
        if needed > self.memory:
            self.spent = True
            log.info("the networks' first layers need %.2g GB of memory as matrices", needed / 1e9)
            return False
        one, two = reversed(steps) if self.swapped else steps
        self.own = own = varying(one, two, self.met.low, self.met.high)
        one, two = (own[1], own[0]) if self.swapped else (own[0], own[1])
        self.met.vary(one, two, own[2])
        # What rounding in a network's own format may take off a lead.
        box = self.met.low[None], self.met.high[None]
        self.loss = tuple(reading.rounding(*box, self.clock)[0] for reading in self.readings)
        self._choose_pairs()
        return True

    def _choose_pairs(self) -> None:
        """The pairs of labels [P, 2] whose leads matter: one in question of the original, one that may beat it."""
        first, second = self.bounds.first[0], self.bounds.second[0]
        matter = asked(first[None], self.least)[0][:, None] & (second.mT >= 0)
        matter = (matter | matter.mT).triu(1)
        if int(matter.sum()) > PAIRS:
            log.info("leads of %d pairs of labels of %d are bounded", PAIRS, int(matter.sum()))
        self.pairs = matter.nonzero()[:PAIRS]
        self.rows = lead_rows(self.pairs, len(first))

    def _matrix(self, up: Tensor, down: Tensor) -> Tensor:
        """[B, K, K] from bounds [B, P] on y_c - y_j and y_j - y_c for the pairs (c, j)."""
        return lead_matrix(up, down, self.pairs, self.readings[0].outputs)

    def _bounds(self, first: Tensor, second: Tensor, apart: Tensor | None = None) -> Leads:
        """From bounds [B, K, K] of the networks in the order of `own`; apart: of the first of these less the second."""
        if self.swapped:
            first, second, apart = second, first, None if apart is None else apart.mT
        return Leads(first, second, apart).widened(*self.loss)

    def _divide(self) -> None:
        """Parts of the box, those that miss the rule the most first."""
        assert self.own is not None
        first, second, index = self.own
        grid = None if quantised(first) else InputGrid.of(second[0])
        few, order = len(index) <= VERTEX_DIM, count()
        top = torch.full_like(self.upper, -torch.inf)  # of the parts that are done
        never, whole, parts = True, True, 0
        left: list[tuple[float, int, Part, Leads]] = []
        heappush(left, (-math.inf, next(order), (*self.met.ends, grid), self.bounds))
        while left and not self.met.apart:
            if self.clock.over or self._full(parts):
                return
            _, _, part, bounds = heappop(left)
            self.branches, parts = self.branches + 1, parts + 1
            bounds = self._relaxed(part, bounds, signs=not few)
            missed = float(bounds.missed(self.least))
            if missed >= 0 and part[2] is not None and cells_of(part[2], part[0], part[1]) <= LEAF:
                done, over = self._cells(part, bounds)
                top, never, whole = torch.maximum(top, over), False, whole and done
            elif missed < 0:
                top, never = torch.maximum(top, bounds.over(self.met.label)[0]), never and missed == -math.inf
            elif not few or bool((part[0] == part[1]).all()):
                # Halving hardly helps where many inputs vary.
                whole, top = False, torch.maximum(top, bounds.over(self.met.label)[0])
            else:
                self.met.by_chance(*part[:2], self.clock, seed=self.branches)
                step = second[0] if part[2] is None else second[1]
                for half in divided(step, *part):
                    heappush(left, (-missed, next(order), half, bounds))
            ends = torch.stack([top, *(b.over(self.met.label)[0] for *_, b in left)]).amax()
            self.upper = torch.minimum(self.upper, torch.maximum(ends, self.met.lower))
        self.agree = whole and not left and not self.met.apart
        self.vacuous = self.agree and never

    def _full(self, parts: int) -> bool:
        """Whether as many parts, or cells, as there may be are bounded."""
        full = self.branches >= self.limit or (not self.clock.limited and self.limit == math.inf and parts >= PARTS)
        self.spent |= full
        return full

    def _relaxed(self, part: Part, bounds: Leads, *, signs: bool) -> Leads:
        """Better bounds of a part, if there is memory for a relaxation. Raises OutOfTime."""
        assert self.own is not None
        first, second, _ = self.own
        low, high, grid = part
        if not len(self.pairs) or not self._room():
            self.spent |= bool(len(self.pairs))
            return bounds
        try:
            relaxed = RelaxedDifference.of(first, second, low, high, grid, rows=self.rows, clock=self.clock)
        except UnsupportedLayerError as error:
            log.info("no relaxation: %s", error)
            return bounds
        if not self.looked_at:  # the first part is the whole box
            self.looked_at = True
            names = relaxed.saturable[::-1] if self.swapped else relaxed.saturable
            for reading, own in zip(self.readings, names, strict=True):
                reading.executed.saturable.update(own)
        one, two = (self._matrix(relaxed.top[k : k + 1], -relaxed.bottom[k : k + 1]) for k in (0, 1))
        upper = relaxed.upper
        found = bounds.both(self._bounds(one, two, self._matrix(upper[:1], upper[1:])))
        if not signs or relaxed.pair is None or relaxed.pair.depth == 1:
            return found
        question = Question("signed", 1e-6)
        options = {"memory": self.memory / 2, "clock": self.clock, "root": relaxed.root, "seed": 0}
        for number, state in enumerate(search_signs(relaxed.pair, relaxed.low, relaxed.high, question, **options)):
            self.branches += 1
            upper = torch.minimum(upper, relaxed.clamped(state.upper))
            found = bounds.both(self._bounds(one, two, self._matrix(upper[:1], upper[1:])))
            index = len(low)
            self.met.offer(state.witness[..., :index].flatten(0, 1), self.clock)
            settled = self.met.apart or float(found.missed(self.least)) < 0
            many = not self.clock.limited and number + 1 >= STATES
            if settled or state.closed or many or self.clock.over or self.branches >= self.limit:
                break
        return found

    def _cells(self, part: Part, bounds: Leads) -> tuple[bool, Tensor]:
        """Whether the labels agree on all cells of a part, and the largest lead over `label` on them, certified."""
        assert self.own is not None
        grid = part[2]
        assert grid is not None
        cells = Cells(with_rows(self.own[0], self.rows), self.own[1], grid, *part[:2])
        top, done, total = torch.full_like(self.upper, -torch.inf), True, int(cells.total)
        size = min(CHUNK, self.met.few, max(NUMBERS // self.readings[0].outputs ** 2, 1))
        for start in range(0, total, size):
            self.clock.check()
            if self._full(0):
                return False, top
            codes = cells.codes(torch.arange(start, min(start + size, total), device=top.device))
            boxes = cells.boxes(codes)
            low, high, linear = cells.bound_first(*boxes)
            low, high = torch.maximum(low, cells.root[0]), torch.minimum(high, cells.root[1])
            index, *ends = outputs(cells.second, cells.quantizer.value(codes))
            second = leads(*ends)
            missed = self._of_cells(low, high, index, second, bounds).missed(self.least)
            bent = index[(missed >= 0) & ~linear[index]].unique()
            if len(bent) and len(self.own[2]) <= VERTEX_DIM:
                least, most = self._ranges(*(end[bent] for end in boxes))
                low[bent], high[bent] = torch.maximum(low[bent], least), torch.minimum(high[bent], most)
            own = self._of_cells(low, high, index, second, bounds)
            top = torch.maximum(top, own.over(self.met.label).amax())
            open_ = index[own.missed(self.least) >= 0].unique()
            self.branches += len(codes)
            if len(open_):
                done = False
                self.met.in_cells(cells, codes[open_], self.clock)
                if self.met.apart:
                    break
        return done, top

    def _of_cells(self, low: Tensor, high: Tensor, index: Tensor, second: Tensor, bounds: Leads) -> Leads:
        """Of rows [R] of cells `index`: from leads low, high [C, P] of one network, `second` [R, K, K] of the other.

        bounds: of the part in which they lie.
        """
        return self._bounds(self._matrix(high, -low)[index], second).both(bounds)

    def _ranges(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Exact ranges [C, P] of the leads of the network that does not round over boxes [C, M]."""
        side = self.readings[1 if self.swapped else 0].side
        assert side is not None
        shape = self.readings[0].shape
        whole = [self.met.whole(end).reshape(-1, *shape) for end in (low, high)]
        module = nn.Sequential(side.module, Reshape((self.readings[0].outputs,)), linear_layer(self.rows, None))
        limits = Budget(memory=self.memory)
        found = reach_within(self.clock, module, StarBatch.from_box(*whole), keep_stars=False, budget=limits)
        return found.lower, found.upper
