"""Certified discrepancy of networks whose activations are rounded: deployed int8 semantics.

Few cells of the input grid: enumeration, exact (`search.cells`). Many: the deployed network is relaxed to a ReLU
network with bounded noise (`bounds.rounding.relax`), and the two are compared in difference coordinates, in one pass
and then by branch and bound for as long as the budget allows (`bounds.difference`, `search.signs`). Both where both
apply; the interval is their intersection.

What is certified: y1 as the real-valued function of its weights; y2 as any kernel executes it that computes its sums
within `bounds.rounding.kernel_error`, for inputs in float32. One star at a time: each has a grid of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain as chain_of

import torch
from torch import Tensor, nn

from torchreach.bounds.difference import Pair, difference_bounds
from torchreach.bounds.rounding import SINGLE, InputGrid, blank, relax, varying, with_inputs
from torchreach.bounds.zonotope import box_rows, zonotope_bounds
from torchreach.clock import Clock
from torchreach.errors import ShapeError, UnsupportedLayerError
from torchreach.kernels import check_replay, coverage, executed
from torchreach.networks.chain import chain
from torchreach.networks.quantizer import Quantizer
from torchreach.networks.steps import Step, steps
from torchreach.options import Budget
from torchreach.reach.api import VERTEX_DIM, reach
from torchreach.results import Discrepancy, ReachStats, Semantics, Status
from torchreach.search.cells import LIMIT, Cells, attained, representable, search_cells
from torchreach.search.result import Question, SearchResult
from torchreach.search.rounded_witness import climb
from torchreach.search.signs import search_signs
from torchreach.sets.star import StarBatch
from torchreach.tolerances import COMPUTE_DTYPE, round_down, round_up

# Numbers in all cells' boxes of one star.
MEMORY = 2**23
# States of a search without a budget of seconds.
STATES = 8
# Boxes looked at without a budget of seconds, and cells of one that is enumerated.
BOXES, LEAF = 64, 2**12
SAMPLES = 1024  # random inputs besides those that are searched for
# Gap up to which an interval is called exact, relative to the largest end of any output's range: a deployed network
# knows its input only in float32.
EXACT_GAP, TINY = 1e-4, 1e-9


def rounds(network: nn.Module, input_shape: tuple[int, ...] | None) -> bool:
    """Whether `network` quantises activations."""
    return any(isinstance(layer, Quantizer) for layer in chain(network, input_shape))


@torch.no_grad()
def deployed_discrepancy(
    original: nn.Module,
    compressed: nn.Module,
    stars: StarBatch,
    budget: Budget,
    tolerance: float,
    kernels: str = "here",
) -> Discrepancy:
    """Certified interval around max |y1 - y2| per output and star, where one network or both round activations.

    budget: its seconds are shared by the stars; the rest of it does not apply. tolerance: an end of a range is
    finished when it is known this well (absolute). kernels: one of `torchreach.kernels.CHOICES`.

    Raises: ShapeError: sizes that do not fit. UnsupportedLayerError, InvalidNetworkError as `chain`.
    KernelMismatchError: a witness at which the module as given computes something else.
    """
    clock = Clock(budget.seconds)
    both = [
        executed(steps(network, stars.shape, dtype=COMPUTE_DTYPE, device=stars.device, quantized=True), kernels)
        for network in (original, compressed)
    ]
    modules = (original, compressed)
    first, second = (network.steps for network in both)
    if first[-1].features != second[-1].features:
        raise ShapeError(
            f"networks must have equally many outputs: the original has {first[-1].features}, "
            f"the compressed {second[-1].features}"
        )
    same = original is compressed  # one module gives one answer, whatever rounds it
    swapped = _quantised(first) and not _quantised(second)
    if swapped:  # the rounded one second; rows of y1 - y2 and y2 - y1 change places at the end
        original, first, second = compressed, second, first
    low, high, is_box = stars.bounding_box()
    found = []
    for s in range(len(stars)):
        share = clock.part(budget.seconds and clock.left / (len(stars) - s))
        own1, own2, index = varying(first, second, low[s], high[s])
        for network, own in zip(reversed(both) if swapped else both, (own1, own2), strict=True):
            network.look_at(own, low[s][index], high[s][index])
        task = _Task(original, own1, own2, low[s], index, low[s][index], high[s][index], tolerance, share, stars.shape)
        if not bool(is_box[s]):
            task.points = stars.select([s]).sample(512)[0].flatten(1)[:, index].to(COMPUTE_DTYPE)
        if same:
            task.upper, task.lower, task.complete = torch.zeros_like(task.upper), torch.zeros_like(task.lower), True
        else:
            task.run()
        found.append(task)
    lower, upper = (torch.stack([getattr(task, name) for task in found]) for name in ("lower", "upper"))
    witness = torch.stack([task.whole(task.witness) for task in found])
    if swapped:
        lower, upper, witness = (part.flip(1) for part in (lower, upper, witness))
    result = _result(stars, found, lower, upper, witness, clock.elapsed)
    for module, network in zip(modules, both, strict=True):
        check_replay(module, network, result.witness.flatten(0, 1))
    covered, uncovered = coverage(*both)
    return replace(result, kernels=covered, uncovered=uncovered)


def _quantised(network: tuple[Step, ...]) -> bool:
    return any(step.quantizer is not None for step in network)


@dataclass
class _Task:
    """One box of M inputs that vary: what is certified and attained of y1 - y2 (row 0) and y2 - y1 (row 1) so far."""

    original: nn.Module
    first: tuple[Step, ...]  # on M inputs, as are `second`, `low` and `high`
    second: tuple[Step, ...]
    fixed: Tensor  # [N_in] the other inputs
    index: Tensor  # [M] which inputs vary
    low: Tensor
    high: Tensor
    tolerance: float
    clock: Clock
    shape: tuple[int, ...]
    points: Tensor | None = None  # [B, N_in] inputs to attain at, where not all of the box belongs to the set
    complete: bool = False
    cells: int = 0

    def __post_init__(self) -> None:
        n = self.first[-1].features
        self.upper = self.low.new_full((2, n), torch.inf)
        self.lower = -self.upper
        self.witness = ((self.low + self.high) / 2).expand(2, n, -1).clone()

    def run(self) -> None:
        grid = None if _quantised(self.first) else InputGrid.of(self.second[0])
        cells = None if grid is None else Cells(self.first, self.second, grid, self.low, self.high)
        few = len(self.low) <= VERTEX_DIM
        countable = cells is not None and cells.total * (1 + len(self.low)) <= MEMORY and cells.total <= LIMIT
        if cells is not None and countable:
            if not few:
                cells.root = self._range_of_first(cells)
            ranges = self._ranges if few else None
            *_, result = search_cells(cells, ranges, Question("signed", self.tolerance), clock=self.clock)
            self.cells, self.complete, self.upper = result.cells, result.complete, result.upper
            if self.points is None:
                self.lower, self.witness = result.lower, result.witness
        if few and self.complete:
            if self.points is not None:
                self._offer(cells, self.points)
            return
        self._offer(cells, self.points if self.points is not None else self._candidates())
        searching = not (few and len(self.low))
        for upper in self._relaxed(self.low, self.high, grid, search=searching):
            self.upper = torch.minimum(self.upper, upper)
        if not searching:
            self._branch(grid)

    def _candidates(self) -> Tensor:
        """Inputs [B, M] of the box: searched for, and random."""
        share = torch.rand(SAMPLES, len(self.low), generator=torch.Generator().manual_seed(0), dtype=COMPUTE_DTYPE)
        sampled = self.low + (self.high - self.low) * share.to(self.low.device)
        return torch.cat((climb(self.first, self.second, self.low, self.high), sampled))

    def _branch(self, grid: InputGrid | None) -> None:
        """Best first: the box is divided at thresholds of its inputs; parts with few cells are enumerated."""
        open_ = [(self.low, self.high, grid, self.upper)]
        finished = torch.full_like(self.upper, -torch.inf)
        boxes = 0
        while open_:
            excess = [float((upper - self.lower).max()) for *_, upper in open_]
            worst = max(range(len(open_)), key=excess.__getitem__)
            over = self.clock.over or (not self.clock.limited and boxes >= BOXES)
            if over or excess[worst] <= self.tolerance:
                break
            low, high, part, above = open_.pop(worst)
            boxes += 1
            cells = None if part is None else Cells(self.first, self.second, part, low, high)
            if cells is not None and cells.total <= LEAF:
                *_, result = search_cells(cells, self._ranges, Question("signed", self.tolerance), clock=self.clock)
                finished = torch.maximum(finished, torch.minimum(result.upper, above))
                self.cells += result.cells
                if self.points is None:
                    self._take(result.lower, result.witness)
            else:
                for half in self._divided(low, high, part):
                    (upper,) = self._relaxed(*half, search=False)
                    open_.append((*half, torch.minimum(upper, above)))
            top = torch.stack((finished, *(upper for *_, upper in open_))).amax(0)
            self.upper = torch.minimum(self.upper, torch.maximum(top, self.lower))
        self.complete = not open_

    def _divided(
        self, low: Tensor, high: Tensor, grid: InputGrid | None
    ) -> list[tuple[Tensor, Tensor, InputGrid | None]]:
        """Two boxes that cover the box: apart at the middle threshold of an input with several codes, else halves."""
        step = self.second[0 if grid is None else 1]
        weight = step.magnitude(torch.eye(len(low), dtype=low.dtype, device=low.device)).sum(1)
        if grid is None:
            at = int((weight * (high - low)).argmax())
            middle = (low[at] + high[at]) / 2
            return [(low, _set(high, at, middle), None), (_set(low, at, middle), high, None)]
        first, last = grid.codes(low, high)
        at = int((weight * (last - first)).argmax())
        code = ((first + last) / 2).floor()
        result: list[tuple[Tensor, Tensor, InputGrid | None]] = []
        for start, end in ((first, _set(last, at, code[at])), (_set(first, at, code[at] + 1), last)):
            cells = (grid.cell(start), grid.cell(end))
            bottom = torch.minimum(cells[0][0], cells[1][0])[at].clamp(low[at], high[at])
            top = torch.maximum(cells[0][1], cells[1][1])[at].clamp(low[at], high[at])
            result.append((_set(low, at, bottom), _set(high, at, top), replace(grid, first=start, last=end)))
        return result

    def _ranges(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        boxes = StarBatch.from_box(*(self.whole(end).reshape(-1, *self.shape) for end in (low, high)))
        found = reach(self.original, boxes, keep_stars=False)
        argmin, argmax = (part.flatten(2)[:, :, self.index] for part in (found.argmin, found.argmax))
        return found.lower, found.upper, argmin, argmax

    def whole(self, x: Tensor) -> Tensor:
        """Inputs [..., N_in] with the varying ones x [..., M] filled in."""
        return self.fixed.expand(*x.shape[:-1], -1).index_copy(-1, self.index, x)

    def _range_of_first(self, cells: Cells) -> tuple[Tensor, Tensor]:
        """y1's own range [N_out] over the box: its difference from a network that is zero."""
        pair = Pair.of(cells.first, blank(cells.first))
        up = self._search(pair, cells.lower, cells.upper, share=0.5)
        upper = torch.stack((cells.root[1], -cells.root[0]))
        for state in up:
            upper = torch.minimum(upper, state.upper)
        return -upper[1], upper[0]

    def _relaxed(self, low: Tensor, high: Tensor, grid: InputGrid | None, *, search: bool) -> Iterator[Tensor]:
        """Bounds [2, N_out] over a box [M] from the relaxation: of a single pass, then tighter ones of a search."""
        second = relax(self.second, low, high, InputGrid.of(self.second[0]) if grid is None else grid)
        first = relax(self.first, low, high, InputGrid.of(self.first[0])) if _quantised(self.first) else None
        own = 0 if first is None else first.extra
        size = torch.maximum(low.abs(), high.abs())
        ones = size.new_ones(own + second.extra)
        steps1 = self.first if first is None else first.steps
        steps1 = with_inputs(steps1, len(size) + own, second.extra, torch.cat((size, ones[:own])))
        steps2 = with_inputs(second.steps, len(size), own, torch.cat((size, ones[own:])))
        low, high = torch.cat((low, -ones)), torch.cat((high, ones))
        try:
            pair = Pair.of(steps1, steps2)
        except (ShapeError, UnsupportedLayerError):
            # Different architectures: each network by itself.
            rows = box_rows(low[None], high[None])
            ranges = [zonotope_bounds(network, *rows)[-1] for network in (steps1, steps2)]
            bottom, top = (torch.cat(part) for part in zip(*ranges, strict=True))
            bounds: Iterator[Tensor] = iter((top - bottom.flip(0),))
        else:
            output = difference_bounds(pair, low[None], high[None])[-1]
            bottom, top = torch.cat((output.l1, output.l2)), torch.cat((output.u1, output.u2))
            single = torch.cat((output.du, -output.dl))
            bounds = iter((single,))
            if search:
                bounds = chain_of(bounds, (state.upper for state in self._search(pair, low, high)))
        infinite = low.new_tensor(torch.inf)
        ends = [(-infinite, infinite) if r is None else (r.lowest, r.highest) for r in (first, second)]
        lowest, highest = (torch.stack(part)[:, None] for part in zip(*ends, strict=True))
        # The ends of a clamp are products in float32 too.
        rounded = torch.cat((lowest, highest), 1).abs()
        loss = (4 * SINGLE * torch.where(rounded.isfinite(), rounded, 0.0)).sum()
        for upper in bounds:
            yield _clamped(upper, bottom, top, lowest, highest) + loss

    def _search(self, pair: Pair, low: Tensor, high: Tensor, share: float = 1.0) -> Iterator[SearchResult]:
        """States of a search until the deadline, or a few of them; `share` of the time that is left."""
        if pair.depth == 1:
            return  # linear: a single pass is exact
        clock = self.clock.part(share * self.clock.left)
        for count, state in enumerate(search_signs(pair, low, high, Question("signed", max(self.tolerance, 1e-6)))):
            yield state
            over = clock.over or (not clock.limited and count + 1 >= STATES)
            if over or state.closed:
                return

    def _offer(self, cells: Cells | None, x: Tensor) -> None:
        x = representable(x, self.low, self.high)
        if cells is not None:
            value = cells.attained(x)
        else:
            value = attained(self.first, self.second, x)
        value, at = value.max(0)
        self._take(value, x[at])

    def _take(self, value: Tensor, x: Tensor) -> None:
        """Values [2, N_out] attained at inputs x [2, N_out, M]."""
        self.witness = torch.where((value > self.lower)[..., None], x, self.witness)
        self.lower = torch.maximum(self.lower, value)


def _set(values: Tensor, at: int, value: Tensor) -> Tensor:
    changed = values.clone()
    changed[at] = value
    return changed


def _clamped(upper: Tensor, low: Tensor, high: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Bounds [2, N_out] on y1 - y2 and y2 - y1 after the clamps, from those before them.

    low, high: [2, N_out] ranges of both outputs before the clamps to [lowest, highest], [2, 1] each. With c the clamp,
    c1(a) - c2(b) <= max(a - b, lowest1 - b, c1(a) - highest2), the last two only where the clamps can act; and it is
    at most what the ranges of c1(a) and c2(b) say.
    """
    last, first = torch.minimum(high, highest), torch.maximum(low, lowest)
    last, first = torch.maximum(last, lowest), torch.minimum(first, highest)
    raised = torch.where(low < lowest, lowest - low.flip(0), -torch.inf)
    cut = torch.where(high.flip(0) > highest.flip(0), last - highest.flip(0), -torch.inf)
    return torch.minimum(torch.maximum(upper, torch.maximum(raised, cut)), last - first.flip(0))


def _result(
    stars: StarBatch, found: list[_Task], lower: Tensor, upper: Tensor, witness: Tensor, seconds: float
) -> Discrepancy:
    """lower, upper: [S, 2, N] of y1 - y2 and y2 - y1; witness: [S, 2, N, N_in]."""
    dtype = stars.dtype
    upper = torch.maximum(upper, lower)
    scale = upper.abs().amax((1, 2), keepdim=True)
    exact = ((upper - lower) <= EXACT_GAP * scale + TINY).flatten(1).all(1)
    side = lower[:, 0] >= lower[:, 1]
    chosen = torch.where(side[..., None], witness[:, 0], witness[:, 1])
    return Discrepancy(
        lower=round_down(lower.amax(1).clamp(min=0), dtype),
        upper=round_up(upper.amax(1), dtype),
        range_lower=round_down(-upper[:, 1], dtype),
        range_upper=round_up(upper[:, 0], dtype),
        witness=chosen.reshape(*chosen.shape[:2], *stars.shape).to(dtype),
        regions=torch.tensor([task.cells for task in found], device=stars.device),
        status=tuple(Status.EXACT if ok else Status.BOUNDED for ok in exact.tolist()),
        stats=ReachStats(
            layers=(),
            method="cells" if all(task.complete for task in found) else "relaxation",
            root_bounds="zonotope",
            seconds=seconds,
        ),
        semantics=Semantics.DEPLOYED_INT8,
    )
