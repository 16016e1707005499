"""Difference of a network and a deployed one, exactly, by the cells of the deployed network's input quantiser.

On one cell of the input grid the deployed network is constant, so

    max over the box of y1 - y2  =  max over cells of (max of y1 over the cell, less the output of the cell's codes)

Cells are closed and reach over their thresholds by what rounding may do to the quantiser's input, so that every
input lies in a cell of each code that a kernel can give it. y1 is bounded on all cells at once by zonotopes of the
network without its settled neurons (exact where it is linear on the cell); only cells whose bound exceeds what is
already attained are enumerated, by a rule that the caller brings. Inputs attained lie inside their cell by more than
that rounding, and their codes are followed through the network (`domains.rounding.outputs`).

Axis letters: C cells, R rows (a cell and one of its possible outputs), J inputs with several codes, M inputs that
vary, N features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf, prod

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.evidence import Evidence
from torchreach.core.roundoff import above, ball, below, round_down, round_up
from torchreach.domains.input_grid import InputGrid
from torchreach.domains.rounding import outputs, restricted
from torchreach.domains.zonotope import box_rows, zonotope_bounds
from torchreach.graph.reduced import reduce
from torchreach.graph.steps import Step
from torchreach.search.result import Question

LIMIT = 2**17  # cells of one box
NUMBERS = 2**23  # in one intermediate tensor
TOP = 256  # cells looked at more closely at a time
INSIDE = 4.0  # an attained input keeps this multiple of the rounding allowance away from thresholds

# Boxes [C, N_in] -> certified (lower, upper) and their inputs (argmin, argmax): [C, N_out], [C, N_out, N_in].
Ranges = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class CellResult:
    """Certified intervals around the largest y1 - y2 (row 0) and y2 - y1 (row 1) over one box.

    lower: [2, N_out] attained at `witness` [2, N_out, N_in], -inf where no input of the box has codes beyond doubt.
    upper: [2, N_out]. cells: how many are bounded. complete: whether they are all, and nothing is left to look at.
    """

    lower: Tensor
    upper: Tensor
    witness: Tensor
    cells: int
    complete: bool


class Cells:
    """The cells of one box of M inputs, as `domains.rounding.varying` leaves them."""

    def __init__(
        self,
        first: tuple[Step, ...],
        second: tuple[Step, ...],
        grid: InputGrid,
        lower: Tensor,
        upper: Tensor,
        *,
        memory: float = inf,
        clock: Clock = NO_LIMIT,
    ) -> None:
        """first: steps of the original; second: of the deployed network; lower, upper: [M], float64.

        memory, clock: of the zonotopes that bound the original on the whole box, which intervals replace."""
        self.first, self.lower, self.upper = first, lower, upper
        self.code_low, code_high = grid.codes(lower, upper)
        counts = code_high - self.code_low + 1
        self.several = (counts > 1).nonzero().flatten()
        self.counts = counts[self.several].long()
        self.total = prod(self.counts.double().tolist())
        self.grid = replace(grid, first=None, last=None)
        self.quantizer = grid.quantizer
        values = grid.quantizer.value(self.code_low)
        largest = torch.maximum(values.abs(), grid.quantizer.value(code_high).abs())
        self.second = restricted(second[1:], values, self.several, largest)
        self.memory = memory
        bounds = zonotope_bounds(first, *box_rows(lower[None], upper[None]), memory=memory, clock=clock)
        signs = [(down >= 0).long() - (up <= 0).long() for down, up in bounds]
        smaller = reduce(first, signs, bounds)
        self.walked = first if smaller is None else smaller[0]
        self.root = bounds[-1][0][0], bounds[-1][1][0]

    @property
    def outputs(self) -> int:
        return self.first[-1].features

    def codes(self, numbers: Tensor) -> Tensor:
        """Codes [C, J] of cells by number."""
        digits = []
        for count in self.counts.flip(0).tolist():
            digits.append(numbers % count)
            numbers = torch.div(numbers, count, rounding_mode="floor")
        digit = torch.stack(digits[::-1], 1) if digits else numbers.new_zeros(len(numbers), 0)
        return self.code_low[self.several] + digit

    def boxes(self, codes: Tensor, inside: float = 0.0) -> tuple[Tensor, Tensor]:
        """(low, high) [C, M] of cells with codes [C, J]; `inside`: away from thresholds (see `INSIDE`)."""
        every = self.code_low.expand(len(codes), -1).index_copy(1, self.several, codes)
        down, up = self.grid.cell(every)
        if inside:
            size = torch.maximum(*(torch.where(end.isfinite(), end.abs(), 0.0) for end in (down, up)))
            margin = inside * self.grid.error(size) / self.grid.scale.abs()
            down, up = down + margin, up - margin
        low, high = torch.maximum(self.lower, down), torch.minimum(self.upper, up)
        # A cell that only rounding reaches, or that is thinner than its margins, is a point of the box.
        crossed = low > high
        point = torch.minimum(torch.maximum((low + high) / 2, self.lower), self.upper)
        return torch.where(crossed, point, low), torch.where(crossed, point, high)

    def bound_first(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Certified y1 (lower, upper) [C, N_out] on sub-boxes [C, M], and whether it is linear there [C]."""
        bounds = zonotope_bounds(self.walked, *box_rows(low, high), memory=self.memory)
        linear = torch.ones(len(low), dtype=torch.bool, device=low.device)
        for (down, up), step in zip(bounds, self.walked, strict=True):
            if step.relu is not None:
                linear &= ~((down < 0) & (up > 0) & step.relu).any(1)
        return *bounds[-1], linear

    def corners(self, low: Tensor, high: Tensor) -> Tensor:
        """Where y1's linear piece at the middle of sub-boxes [C, M] is largest, then smallest: [C, 2, N_out, M]."""
        rows, _ = box_rows(low, high)
        for step in self.walked:
            rows = step.map_rows(rows)
            if step.relu is not None:
                rows = rows * ((rows[:, 0] > 0) | ~step.relu)[:, None]
        way = rows[:, 1:].mT.sign()  # [C, N_out, M]
        way = torch.stack((way, -way), 1)
        low, high = low[:, None, None], high[:, None, None]
        return torch.where(way > 0, high, torch.where(way < 0, low, (low + high) / 2))

    def attained(self, x: Tensor) -> Tensor:
        """Values [B, 2, N_out] of y1 - y2 and y2 - y1 that inputs x [B, N_in] attain at least, whatever the kernel.

        -inf where the codes of the input itself are in doubt, or are none of these cells.
        """
        first, last = self.grid.codes(x, x)
        codes = self.quantizer.value(first[:, self.several])
        value = attained(self.first, self.second, x, codes)
        single = torch.ones_like(self.code_low, dtype=torch.bool)
        single[self.several] = False
        known = (first == last) & ((first == self.code_low) | ~single)
        return torch.where(known.all(1)[:, None, None], value, -torch.inf)


def attained(first: tuple[Step, ...], second: tuple[Step, ...], x: Tensor, x2: Tensor | None = None) -> Tensor:
    """Values [B, 2, N_out] of y1 - y2 and y2 - y1 attained at least by inputs x [B, N_in], whatever the kernel.

    x2: what `second` reads, where that is already rounded: it is then deployed, whatever its steps are.
    """
    ends = []
    for steps, inputs, rounded in ((first, x, False), (second, x if x2 is None else x2, x2 is not None)):
        if not rounded and all(step.quantizer is None for step in steps):
            ends.append(zonotope_bounds(steps, inputs[:, None], torch.zeros_like(inputs))[-1])
            continue
        index, low, high = outputs(steps, inputs)
        index = index[:, None].expand_as(low)
        far = low.new_full((len(inputs), low.shape[1]), torch.inf)
        ends.append((far.scatter_reduce(0, index, low, "amin"), (-far).scatter_reduce(0, index, high, "amax")))
    (low1, high1), (low2, high2) = ends
    value = torch.stack((low1 - high2, low2 - high1), 1)
    return below(value)


def representable(x: Tensor, lower: Tensor, upper: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs [B, N_in] as numbers of `dtype`, where the box has one nearby; as they are where it has none.

    A deployed network reads its inputs in float32, and the witness of a star is a number of the star's dtype.
    """
    x = torch.minimum(torch.maximum(x, round_up(lower, dtype).to(x.dtype)), round_down(upper, dtype).to(x.dtype))
    near = x.to(dtype).to(x.dtype)
    return torch.where((near >= lower) & (near <= upper), near, torch.minimum(torch.maximum(x, lower), upper))


@torch.no_grad()
def search_cells(
    cells: Cells,
    ranges: Ranges | None,
    question: Question,
    *,
    clock: Clock = NO_LIMIT,
    limit: float = inf,
    numbers: int = NUMBERS,
    dtype: torch.dtype = torch.float32,
) -> Iterator[CellResult]:
    """Certified intervals over the box, by enumeration of its cells: states that get better, the last one the answer.

    Before all cells are bounded a state says nothing. The caller ends the search by asking for no more.

    ranges: how to bound y1 on boxes where it is not linear; None leaves such cells to zonotopes.
    question: what to close. clock, limit: cells not reached when it is over, or after this many, are bounded
    together. numbers: in one intermediate tensor. dtype: of the inputs that are attained.
    """
    work = _Work(cells, dtype, clock, numbers)
    met = work.met
    state = CellResult(met.lower, met.upper, met.witness, 0, complete=False)
    for _ in work.enumerate(limit):
        yield state
    while True:
        open_ = work.open(question.enough(met.lower))
        upper = torch.maximum(work.upper(), met.lower)
        yield CellResult(met.lower, upper, met.witness, work.reached, work.reached == cells.total and not open_)
        if not open_ or clock.over:
            return
        work.refine(ranges, question)


class _Work:
    """Bounds of all rows so far, and the best inputs."""

    def __init__(self, cells: Cells, dtype: torch.dtype, clock: Clock, numbers: int) -> None:
        self.cells, self.dtype, self.clock, self.numbers = cells, dtype, clock, numbers
        self.widest = max(step.features for step in (*cells.walked, *cells.second))
        n, like = cells.outputs, cells.lower
        self.met = Evidence(like.new_full((2, n), inf), like.expand(2, n, -1))
        self.left_over = like.new_full((2, n), -torch.inf)
        self.reached = 0

    def enumerate(self, limit: float) -> Iterator[None]:
        """Bounds all cells, or as many as there is time for; one chunk at a time."""
        cells = self.cells
        variables = len(cells.lower)
        size = max(self.numbers // ((1 + variables) * max(variables, 1) + (1 + variables) * self.widest), 1)
        total = int(cells.total)
        end = int(min(total, max(limit, 1)))
        y1, rows, linear = [], [], []
        while self.reached < end:
            if self.reached and self.clock.over:
                break
            chosen = torch.arange(self.reached, min(self.reached + size, end), device=cells.lower.device)
            codes = cells.codes(chosen)
            low, high, flat = cells.bound_first(*cells.boxes(codes))
            y1.append((torch.maximum(low, cells.root[0]), torch.minimum(high, cells.root[1])))
            index, below, above = outputs(cells.second, cells.quantizer.value(codes))
            rows.append((index + self.reached, below, above))
            linear.append(flat)
            self.reached += len(chosen)
            yield
        if self.reached < total:
            # y2 of the other cells is bounded by one interval evaluation over all codes.
            self.left_over = self._all_cells()
        self.y1 = [torch.cat(part) for part in zip(*y1, strict=True)]
        self.index, self.below, self.above = (torch.cat(part) for part in zip(*rows, strict=True))
        self.linear = torch.cat(linear)
        self.looked_at = torch.zeros_like(self.linear)

    def _all_cells(self) -> Tensor:
        cells = self.cells
        low = cells.code_low[cells.several]
        ends = [cells.quantizer.value(code) for code in (low, low + cells.counts - 1)]
        middle, radius = ball(*ends)
        _, below, above = outputs(cells.second, middle[None], radius[None])
        down, up = cells.root
        return torch.stack((up - below.amin(0), above.amax(0) - down))

    def bounds(self) -> Tensor:
        """[2, R, N_out] upper bounds of y1 - y2 and y2 - y1 on rows."""
        low, high = (part[self.index] for part in self.y1)
        value = torch.stack((high - self.below, self.above - low))
        return above(value)

    def upper(self) -> Tensor:
        return torch.maximum(self.bounds().amax(1), self.left_over)

    def open(self, enough: Tensor) -> bool:
        """Whether some row is above `enough` [2, N_out] and its cell has not been looked at."""
        excess = (self.bounds() - enough[:, None]).amax((0, 2))
        self.excess = torch.where(self.looked_at[self.index], -torch.inf, excess)
        return bool((self.excess > 0).any())

    def refine(self, ranges: Ranges | None, question: Question) -> None:
        """Looks at the cells that exceed what is attained the most."""
        cells = self.cells
        points = 1 + 2 * cells.outputs  # of each cell, followed through the networks
        top = max(min(TOP, len(self.excess), self.numbers // (points * self.widest)), 1)
        order = self.excess.topk(top)
        which = self.index[order.indices[order.values > 0]].unique()
        self.looked_at[which] = True
        codes = cells.codes(which)
        inner = cells.boxes(codes, INSIDE)
        points = cells.corners(*inner).flatten(1, 2)
        self.offer(torch.cat((points, ((inner[0] + inner[1]) / 2)[:, None]), 1).flatten(0, 1))
        bent = ~self.linear[which]
        if ranges is None or not bool(bent.any()):
            return
        which, codes = which[bent], codes[bent]
        excess = (self.bounds() - question.enough(self.met.lower)[:, None]).amax((0, 2))
        needed = torch.zeros_like(self.linear)
        needed[self.index[excess > 0]] = True
        which, codes = which[needed[which]], codes[needed[which]]
        if not len(which):
            return
        low, high, argmin, argmax = ranges(*cells.boxes(codes))
        self.y1[0][which] = torch.maximum(self.y1[0][which], low)
        self.y1[1][which] = torch.minimum(self.y1[1][which], high)
        inner = [part[:, None] for part in cells.boxes(codes, INSIDE)]
        points = torch.minimum(torch.maximum(torch.cat((argmin, argmax), 1), inner[0]), inner[1])
        self.offer(points.flatten(0, 1))

    def offer(self, x: Tensor) -> None:
        """Takes inputs [B, N_in] of the box; at least some, for as long as there is time."""
        cells = self.cells
        for part in x.split(max(self.numbers // (8 * self.widest), 64)):
            part = representable(part, cells.lower, cells.upper, self.dtype)
            value, at = cells.attained(part).max(0)
            self.met.attain(value, part[at])
            if self.clock.over:
                return


def cells_of(grid: InputGrid, low: Tensor, high: Tensor) -> float:
    """How many cells of the grid a box [M] has."""
    first, last = grid.codes(low, high)
    return prod((last - first + 1).tolist())
