"""One star of a comparison in which one network or both round their activations, by ever better bounds.

In the order of what they cost: intervals of both networks (`Compared.intervals`); a short ascent; cells of the input
grid, where there are few (`search.cells`); a relaxation of the deployed network in one pass, and by branch and bound
(`domains.rounding.relax`, `search.signs`); division of the box at thresholds of the input grid. What is certified is
intersected, so that a star can be left at any time with a valid interval.

`lower` is attained by the networks as given: where the deployed module can be run, by what its kernels compute on this
machine, which is where codes in doubt are decided; else by the least that any kernel computes.

Axis letters: B points, M inputs that vary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock, OutOfTime
from torchreach.core.evidence import Evidence, reason
from torchreach.core.options import Budget
from torchreach.core.roundoff import round_down
from torchreach.core.terms import Reason
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.domains.input_grid import InputGrid
from torchreach.domains.joint import Both, joint_bounds
from torchreach.domains.pair import Pair
from torchreach.domains.relaxed_difference import relaxation_bytes
from torchreach.domains.rounding import blank, varying
from torchreach.graph.steps import Step
from torchreach.search.best_first import best_first
from torchreach.search.cells import LIMIT, NUMBERS, Cells, cells_of, representable, search_cells
from torchreach.search.grid_boxes import Parts, divided
from torchreach.search.result import Question
from torchreach.search.rounded_witness import climb, wander
from torchreach.sets.star import StarBatch
from torchreach.verbs.first_look import STARTS, Places, ascend
from torchreach.verbs.int8_compared import Compared, quantised
from torchreach.verbs.int8_relaxed import relaxed_states, sign_states
from torchreach.verbs.reach import VERTEX_DIM, reach_within

log = logging.getLogger(__name__)

# Numbers in all cells' boxes of one star.
MEMORY = 2**23
FEW = 2**20  # numbers in one intermediate tensor of points
ZONOTOPES = 8  # share of the memory that zonotopes of a cell may take
COPIES = 16  # of what is kept of a cell, or of an intermediate tensor, at once
LONGER = 4  # objectives of which inputs are looked for by chance for longer
# Boxes looked at without a budget of seconds, and cells of one that is enumerated.
BOXES, LEAF = 64, 2**12
FIRST_STEPS, STEPS = 3, 30  # of ascents: before anything else, and where a box is not enumerated
FIRST, SECOND, LEAST = 0.1, 0.15, 0.3  # what they take at most of the time that is left; seconds, of half of it
# Gap up to which an interval is called exact, relative to the largest end of any output's range: a deployed network
# knows its input only in float32.
EXACT_GAP, TINY = 1e-4, 1e-9


class DeployedStar:
    """One star, and what is known of it so far.

    evidence: [2, N_out], at inputs [N_in]. complete: whether all cells were enumerated. relaxed: whether a relaxation
    was bounded. spent: whether a limit kept something from being done. branches, cells: how many were bounded.
    fallback: what was not possible.
    """

    def __init__(
        self,
        networks: Compared,
        low: Tensor,
        high: Tensor,
        question: Question,
        *,
        upper: Tensor,
        places: Places | None,
        points: Tensor | None,
        budget: Budget,
        memory: float,
        clock: Clock = NO_LIMIT,
        seed: int = 0,
        report: Callable[[], None] = lambda: None,
    ) -> None:
        """low, high: [N_in] box around the star. upper: [2, N_out] what is certified of it. places, and points
        [B, N_in]: the star and inputs of it, where it is not all of the box."""
        self.networks, self.places, self.points = networks, places, points
        # What is certified is rounded up at the end.
        threshold = round_down(upper.new_tensor(question.threshold), networks.result)
        self.question = replace(question, threshold=float(threshold))
        self.budget, self.memory, self.clock, self.seed, self.report = budget, memory, clock, seed, report
        self.numbers = int(max(min(NUMBERS, memory / 8 / COPIES), 1))
        self.few = min(self.numbers, FEW)  # of what is looked at between two looks at the clock
        self.box = low, high
        self.evidence = Evidence(upper, ((low + high) / 2).expand(*upper.shape, -1))
        self.complete = self.spent = self.relaxed = self.looked_at = False
        self.cells = self.branches = 0
        self.fallback = ""
        self.own: tuple[tuple[Step, ...], tuple[Step, ...], Tensor] | None = None

    # -- state ------------------------------------------------------------------------------------------

    @property
    def answered(self) -> bool:
        """Whether the question is answered."""
        return self._exceeded or bool((self.evidence.top <= self.question.enough(self.evidence.lower)).all())

    @property
    def limit(self) -> float:
        return torch.inf if self.budget.stars is None else self.budget.stars

    @property
    def _exceeded(self) -> bool:
        return self.question.exceeded(round_down(self.evidence.lower, self.networks.result))

    @property
    def closed(self) -> bool:
        """Whether the intervals around the largest |y1 - y2| of each output are as good as a number."""
        upper, lower = self.evidence.top, self.evidence.lower
        gap = upper.amax(0) - lower.amax(0).clamp(min=0)
        return bool((gap <= EXACT_GAP * upper.abs().amax() + TINY).all())

    @property
    def reason(self) -> Reason:
        """Why the work ended."""
        settled = self.question.settled(round_down(self.evidence.lower, self.networks.result), self.evidence.top)
        rest = Reason.KERNEL_CODES if self.complete else Reason.ROUNDING
        return reason(settled, self.closed, self.answered, self.clock, self.spent, rest)

    # -- work -------------------------------------------------------------------------------------------

    def start(self, clock: Clock) -> None:
        """Points of the star, or an ascent of few steps: at least a part of it, whatever the time."""
        self._restrict()
        if self.points is not None:
            self.offer(self.points[:, self.varied[2]], whole=self.points)
        elif bool((self.box[0] == self.box[1]).all()):
            return  # what a point attains is known
        self._climb(FIRST_STEPS, clock.share(FIRST))

    def look_at_kernels(self) -> None:
        """Notes in which layers a pair of products may saturate: closely, if there is time and memory."""
        if self.looked_at:
            return
        self.looked_at = True
        for network, steps in zip(self.networks.executed, self.varied[:2], strict=True):
            network.look_at(steps, *self._ends(), closely=self.room, clock=self.clock)

    def run(self, *, cells: bool, relaxation: bool, split: str) -> None:
        """Better bounds, for as long as the question is open and there is time.

        cells, relaxation: what may be used. split: "signs", "inputs", or "auto": inputs up to `VERTEX_DIM` that vary.
        """
        self._restrict()
        if self.answered or self.clock.over or self.own is None:
            return
        first, second, index = self.own
        grid = None if quantised(first) else InputGrid.of(second[0])
        few = len(index) <= VERTEX_DIM
        features = sum(step.features for step in (*first, *second))
        quick = cells and grid is not None and cells_of(grid, *self._ends()) * features <= self.few
        with suppress(OutOfTime):
            if not quick:
                self.ascend()
            if cells and grid is not None:
                if relaxation and not few and not quick:  # a single pass is soon done
                    self._relax_and_branch(grid, "")
                self._enumerate(grid, few)
            if self.answered or not relaxation or (few and self.complete):
                return
            if quick:
                self.ascend()
            self._relax_and_branch(grid, split if split != "auto" else "inputs" if few and len(index) else "signs")

    def _restrict(self) -> None:
        """Both networks on the inputs that vary, if that fits into memory."""
        if self.own is not None:
            return
        networks, (low, high) = self.networks, self.box
        size = int((high > low).sum())
        steps = (*networks.first[:2], *networks.second[:2])
        matrices = size < len(low)  # first layers on fewer inputs are matrices
        needed = matrices * 8 * size * (len(low) + 3 * sum(step.features for step in steps))
        if needed > self.memory:
            self.spent = True
            self.fallback = f"the networks' first layers need {needed / 1e9:.2g} GB of memory as matrices"
            return
        self.own = varying(networks.first, networks.second, low, high)

    @property
    def varied(self) -> tuple[tuple[Step, ...], tuple[Step, ...], Tensor]:
        """Both networks on the inputs that vary, and these: or on all inputs."""
        if self.own is not None:
            return self.own
        return self.networks.first, self.networks.second, torch.arange(len(self.box[0]), device=self.box[0].device)

    def _whole(self, x: Tensor) -> Tensor:
        """Inputs [..., N_in] with the varying ones x [..., M] filled in."""
        return self.box[0].expand(*x.shape[:-1], -1).index_copy(-1, self.varied[2], x)

    def _ends(self) -> tuple[Tensor, Tensor]:
        index = self.varied[2]
        return self.box[0][index], self.box[1][index]

    def _enumerate(self, grid: InputGrid, few: bool) -> None:
        """The cells of the input grid, if they are few."""
        assert self.own is not None
        first, second, index = self.own
        low, high = self._ends()
        total = cells_of(grid, low, high)
        room = self.memory / 8 / (1 + len(index) + COPIES * self.networks.outputs)
        if total * (1 + len(index)) > MEMORY or total > min(LIMIT, room):
            self.spent |= room < total <= LIMIT
            return
        cells = Cells(first, second, grid, low, high, memory=self.memory / ZONOTOPES, clock=self.clock)
        if not few:
            cells.root = self._range_of_first(cells)
        result = None
        self.spent |= total > self.limit
        for result in search_cells(
            cells,
            self._ranges if few else None,
            self.question,
            clock=self.clock,
            limit=self.limit,
            numbers=self.numbers,
            dtype=self.networks.dtype,
        ):
            self.evidence.certify(result.upper)
            self._offer_states(result.lower, result.witness)
            self.cells = result.cells
            self.report()
            if self.answered:
                break
        assert result is not None
        self.complete = result.complete

    def _relax_and_branch(self, grid: InputGrid | None, split: str) -> None:
        low, high = self._ends()
        for upper in relaxed_states(self, low, high, grid, search=split == "signs"):
            self.relaxed = True
            self.evidence.certify(upper)
            self.report()
            if self.answered:
                return
        if split == "inputs" and (grid is not None or not self.fallback):
            self._branch(grid)

    def _branch(self, grid: InputGrid | None) -> None:
        """Best first: the box is divided at thresholds of its inputs; parts with few cells are enumerated."""
        low, high = self._ends()
        each = 8 * (2 * len(low) + self.evidence.upper.numel()) * 2
        start = self.branches

        def full(left: Parts) -> bool:
            spent = len(left) * each > self.memory or self.branches + self.cells >= self.limit
            self.spent |= spent
            many = not self.clock.limited and self.branches - start >= BOXES
            return spent or many or self.clock.over or self._exceeded

        left = Parts([(low, high, grid)], self.evidence.upper[None], torch.ones(1, dtype=torch.bool, device=low.device))
        for state in best_first(left, self._looked_at, self.question, self.evidence, full=full):
            self.evidence.certify(state.upper)
            self.complete |= state.open == 0 and not self.spent
            self.report()

    def _looked_at(self, parts: Parts) -> Parts:
        """One part bounded by its cells, if they are few, or its two halves."""
        assert self.own is not None
        ((low, high, grid),) = parts.boxes
        self.branches += 1
        if grid is None or cells_of(grid, low, high) > LEAF:
            step = self.own[1][0] if grid is None else self.own[1][1]
            halves = divided(step, low, high, grid)
            bounds = [next(relaxed_states(self, *half, search=False), parts.upper[0]) for half in halves]
            return Parts(halves, torch.minimum(torch.stack(bounds), parts.upper), parts.more.repeat(2))
        cells = Cells(self.own[0], self.own[1], grid, low, high)
        *_, result = search_cells(
            cells,
            self._ranges,
            self.question,
            clock=self.clock,
            limit=self.limit - self.branches - self.cells,
            numbers=self.numbers,
            dtype=self.networks.dtype,
        )
        self.spent |= result.cells < cells.total
        self.cells += result.cells
        self._offer_states(result.lower, result.witness)
        return Parts(parts.boxes, torch.minimum(result.upper, parts.upper), ~parts.more)

    def _ranges(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        boxes = StarBatch.from_box(*(self._whole(end).reshape(-1, *self.networks.shape) for end in (low, high)))
        budget = Budget(memory=self.memory)
        found = reach_within(self.clock, self.networks.original, boxes, keep_stars=False, budget=budget)
        argmin, argmax = (part.flatten(2)[:, :, self.varied[2]] for part in (found.argmin, found.argmax))
        return found.lower, found.upper, argmin, argmax

    def _range_of_first(self, cells: Cells) -> tuple[Tensor, Tensor]:
        """y1's own range [N_out] over the box: its difference from a network that is zero."""
        upper = torch.stack((cells.root[1], -cells.root[0]))
        if self.room:
            pair = Pair.of(cells.first, blank(cells.first))
            for state in sign_states(self, pair, cells.lower, cells.upper, self.clock.share(0.5)):
                upper = torch.minimum(upper, state.upper)
                self.report()
        elif bool((cells.upper > cells.lower).any()):
            both = Both.of(cells.first, None, clock=self.clock)
            ends, clock = (cells.lower[None], cells.upper[None]), self.clock.share(0.8)
            upper = torch.minimum(upper, joint_bounds(both, *ends, anytime=True, clock=clock).upper[0])
        return -upper[1], upper[0]

    @property
    def room(self) -> bool:
        """Whether there is memory for a relaxation of both networks."""
        return self.own is not None and relaxation_bytes(self.own[0], self.own[1], self.numbers) <= self.memory

    # -- what is attained -------------------------------------------------------------------------------

    def _climb(self, steps: int, clock: Clock) -> None:
        first, second, index = self.varied
        n = self.networks.outputs
        if self.places is not None:
            numbers = self.places.inside.shape[1] + sum(step.features for step in (*first, *second))
            starts = max(min(STARTS, self.few // (2 * n * numbers)), 1)
            value = lambda x: self.networks.slope(first, second, x.flatten(2)[..., index])  # noqa: E731
            self.at = ascend(self.places, value, n, starts, clock, steps=steps, seed=self.seed)[0]
            self._offer_at(self.at)
            return
        order = self.evidence.upper.flatten().argsort(descending=True, stable=True)
        for x in climb(first, second, *self._ends(), order, steps=steps, seed=self.seed, clock=clock, numbers=self.few):
            self.offer(x)
            self.report()
            if self._exceeded:
                return

    def ascend(self, *, longer: bool = False) -> None:
        """Inputs by chance, near the best ones, and by ascents; longer: by chance as long as there is time for it."""
        if self.answered:
            return
        index, count = self.varied[2], self.few // (4 * self._widest)
        clock = self.clock.part(max(SECOND * self.clock.left, min(LEAST, self.clock.left / 2)))
        ends, start = self._ends(), self.evidence.witness[..., index].flatten(0, 1)
        given: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda x: (x, self._whole(x))  # noqa: E731
        if self.places is not None:
            start, given = self.at[1:], self._inputs
            ends = -torch.ones_like(start[0]), torch.ones_like(start[0])
        # What is largest over all outputs gains most.
        chosen = self.evidence.lower.flatten().topk(min(LONGER, len(start))).indices if longer else slice(None)
        start, value = start[chosen], lambda x: self.networks.estimate(*self.varied[:2], *given(x))[:, chosen]
        for x in wander(value, *ends, start, count, seed=self.seed, clock=clock, longer=longer):
            self.offer(x) if self.places is None else self._offer_at(x)
            if self._exceeded:
                return
        if not longer:
            self._climb(STEPS, self.clock.share(SECOND))

    @property
    def _widest(self) -> int:
        return max(step.features for steps in self.varied[:2] for step in steps)

    def _offer_states(self, value: Tensor, x: Tensor) -> None:
        """Values [2, N_out] that hold whatever the kernel, at inputs x [2, N_out, M]; and what else is attained there.

        Where only a part of the box is the star, they say nothing.
        """
        better = value > self.evidence.lower
        if self.points is not None or not bool(better.any()):
            return
        self.evidence.attain(value, self._whole(x))
        self.offer(x[better])

    def _inputs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [B, M] and [B, N_in] at coordinates of the star, pulled into it, in its dtype."""
        assert self.places is not None
        x = self.places.points(self.places.pull(t[None]))[0].flatten(1).to(self.networks.result).to(COMPUTE_DTYPE)
        return x[:, self.varied[2]], x

    def _offer_at(self, t: Tensor) -> None:
        """Takes coordinates of the star, of which only those count that do lie in it."""
        assert self.places is not None
        t = t[self.places.holds(self.places.pull(t[None]))[0]]
        if len(t):
            self.offer(*self._inputs(t))

    def offer(self, x: Tensor, whole: Tensor | None = None) -> None:
        """Takes inputs x [B, M] as numbers of the dtype in which inputs are attained. whole: [B, N_in] as they are."""
        first, second, _ = self.varied
        if whole is None:
            x = representable(x, *self._ends(), self.networks.dtype)
        for part in torch.arange(len(x), device=x.device).split(max(self.few // (4 * self._widest), 1)):
            inputs = self._whole(x[part]) if whole is None else whole[part]
            value, at = self.networks.attained(first, second, x[part], inputs).max(0)
            self.evidence.attain(value, inputs[at])
            if self.clock.over:
                return
