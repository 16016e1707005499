"""Branch and bound by halving boxes, for networks of any two shapes.

Method: best first, in batches. A box is bounded backward through both networks at once (`joint_bounds`), with the signs
    that its parent found; where that was worth its price on boxes like it, and the networks are of one architecture, in
    difference coordinates too (`quick_bounds`), and the better of both holds. It is halved along the input whose width
    makes most of the gap between bounds and networks (`JointBounds.influence`); where many inputs vary, by the sign of
    the hidden neuron that makes most of it (`JointBounds.gaps`), if that is a good deal more. A box with few undecided
    neurons is given to `finish`, if there is one, when its turn comes (exact enumeration: its regions are found in the
    time that bounding some dozens of its parts takes).
Property: anytime; every state is certified, and its interval lies in the one before.
Requirement: effort grows exponentially in the number of inputs whose width matters (up to about 8), or of neurons.
Reference: ReluDiff and NeuroDiff (Paulsen et al. 2020) split inputs in the same question.

Axis letters: B boxes, H hidden neurons of both networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock, OutOfTime
from torchreach.core.errors import ShapeError
from torchreach.core.masks import lengths
from torchreach.core.memory import batch_size
from torchreach.core.roundoff import floor_log2
from torchreach.domains.box_difference import FirstBounds, first_bounds, quick_bounds
from torchreach.domains.crown import NUMBERS
from torchreach.domains.difference import Takes, checked_boxes
from torchreach.domains.joint import Both, JointBounds, joint_bounds
from torchreach.domains.pair import Pair
from torchreach.search.best_first import Tree, best_first, largest, largest_excess
from torchreach.search.result import Best, Constraints, Finish, Question, SearchResult
from torchreach.search.witness import ascend

# Inputs that vary, up to which only boxes are halved. With more, a neuron's sign is split where the gap that it makes
# is so many times the one that the best input's width makes: measured with 64 and 784 inputs.
FEW_INPUTS, NEURON = 5, 4
# Undecided neurons of a box that `finish` takes. Measured on pairs of 300 neurons each with 5 inputs: up to a thousand
# regions, which is more than halving it costs where bounds need not be exact, so that later on only `SMALL` ones go.
FEW, SMALL = 40, 8
# So many regions in any boxes, and in small ones as many more for each bounded box. A box of n undecided neurons was
# seen to have about n^GROWTH.
CREDIT, REGIONS, GROWTH = 12000, 8, 2.45
FINISHED = 1024  # boxes that `finish` gets in one round at most
# Boxes halved in one round at most, and undecided neurons in all of them, 8 more counted for each box.
BATCH, ROUND = {"cpu": 2048, "cuda": 4096}, {"cpu": 2**15, "cuda": 2**20}
# Only boxes with this part of the largest excess are halved, but as many on an accelerator, where they cost no time.
PART, FEWEST = 0.5, {"cpu": 1, "cuda": 1024}
# Copies of the open boxes that one round holds at most.
COPIES = 3
WORKING = 96  # copies of one layer's coefficients that bounding boxes holds at most, and that the allocator keeps
# With difference coordinates a box costs this many times as much as without: they are worth it where they reduce its
# excess by the factor that joint bounds do to this power, and at all. So many boxes of a size class tell; older ones
# count by this factor less every round.
PRICE, IDLE, TRIALS, MEMORY = 2.5, 0.95, 4, 0.9


@torch.no_grad()
def search_boxes(
    compared: Both | Pair,
    lower: Tensor,
    upper: Tensor,
    question: Question | None = None,
    *,
    constraints: Constraints | None = None,
    finish: Finish | None = None,
    memory: float = torch.inf,
    batch: int | None = None,
    starts: int = 8,
    seed: int = 0,
    root: FirstBounds | None = None,
    tree: Tree | None = None,
    clock: Clock = NO_LIMIT,
) -> Iterator[SearchResult]:
    """States of a search over one box lower <= x <= upper [N_in], one per batch; it ends with a closed one.

    Args:
        constraints: the part of the box that counts; witnesses lie in it.
        finish: bounds boxes of few undecided neurons (`FEW`), instead of halving them.
        memory: bytes of open boxes beyond which it ends, open, instead of halving more.
        batch: boxes halved at a time, at most; by default what suits the device. starts, seed: of the witness search
            that comes first (`ascend`).
        root: `first_bounds` of the box, where they are at hand.
        tree: kept up to date for another search to go on from; this one goes on from it where it is of one.
        clock: looked at in every chunk of boxes; when it is over, the state so far is the last one. OutOfTime only at
            the first state, and only without `root`.

    Raises: as `difference_bounds`, at the first state.
    """
    question = question or Question()
    both = Both.of(compared.first, compared.second, compared) if isinstance(compared, Pair) else compared
    low, high = one_box(both, lower, upper)
    most, shared = batch or batch_size(BATCH, low.device), (question, constraints, finish, clock, memory)
    varying = int((low < high).sum())
    if tree is not None and tree.left is not None:
        best = Best(both, low, high, low, constraints, clock)
        tree.attained(best.met)
        work, left = _Work(both, best, *shared, most, varying), tree.left
        work.learned = tree.learned
    else:
        root = first_bounds(both, low, high, clock=clock, memory=memory / 2) if root is None else root
        caps = root.upper
        best = ascend(both, low, high, constraints, starts=starts, seed=seed, clock=clock)
        work = _Work(both, best, *shared, most, varying)
        try:
            left = work.bounded(low, high, caps, low.new_zeros(1, both.hidden, dtype=torch.int8), root.joint)
        except OutOfTime:
            yield SearchResult(best.met.lower, torch.maximum(caps[0], best.met.lower), best.met.witness, 1, 1, False)
            return

    def full(left: Boxes) -> bool:
        return left.bytes * COPIES > memory or clock.over

    know = {"tree": tree, "learned": lambda: work.learned}
    yield from best_first(left, work.divide, question, best.met, batch=work.batch, full=full, **know)


@dataclass(frozen=True)
class Boxes:
    """Open boxes [B, N_in]: bounds [B, 2, N_out], what to split [B], what is known of the signs of hidden neurons, or
    asked of their inputs, [B, H], how many are undecided [B], and whether [B] `finish` has had them.

    split: an input, or N_in and more for hidden neurons.
    """

    low: Tensor
    high: Tensor
    value: Tensor
    split: Tensor
    signs: Tensor
    undecided: Tensor
    finished: Tensor

    def __len__(self) -> int:
        return len(self.value)

    @property
    def more(self) -> Tensor:
        return torch.ones_like(self.finished)

    def excess(self, level: Tensor) -> Tensor:
        return largest_excess(self.value, level)

    def top(self, like: Tensor) -> Tensor:
        return largest(self.value, like)

    def parts(self) -> tuple[Tensor, ...]:
        return self.low, self.high, self.value, self.split, self.signs, self.undecided, self.finished

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.parts())

    def select(self, index: Tensor) -> Boxes:
        return Boxes(*(part[index] for part in self.parts()))

    def join(self, other: Boxes) -> Boxes:
        return Boxes(*map(torch.cat, zip(self.parts(), other.parts(), strict=True)))

    def halves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Both halves [2 B, N_in] of each box and their signs [2 B, H], the lower ones first.

        They share the middle, or the inputs at which a neuron is zero, so nothing is lost.
        """
        inputs, low, high, signs = self.low.shape[1], self.low, self.high, self.signs
        neuron = (self.split >= inputs)[:, None]
        at = self.split[:, None].where(~neuron, 0)
        first, last = low.gather(1, at), high.gather(1, at)
        middle = first + (last - first) / 2
        lows = low, low.scatter(1, at, torch.where(neuron, first, middle))
        highs = high.scatter(1, at, torch.where(neuron, last, middle)), high
        if bool(neuron.any()):
            at = (self.split[:, None] - inputs).where(neuron, 0)
            own = signs.gather(1, at)
            below, above = (signs.scatter(1, at, own.masked_fill(neuron, sign)) for sign in (-1, 1))
            return torch.cat(lows), torch.cat(highs), torch.cat((below, above))
        return torch.cat(lows), torch.cat(highs), signs.repeat(2, 1)


@dataclass
class _Work:
    """What bounding a batch of boxes needs, and what it has learned."""

    both: Both
    best: Best
    question: Question
    constraints: Constraints | None
    finish: Finish | None
    clock: Clock
    memory: float
    most: int
    varying: int

    def __post_init__(self) -> None:
        # Of boxes by the logarithm of their undecided neurons: how many were bounded in difference coordinates too, and
        # for how many it was worth it.
        self.tried, self.worth = [0.0] * 32, [0.0] * 32
        self.rounds = self.regions = self.bounds = 0
        self.expected = 0.0  # of `regions`

    @property
    def learned(self) -> list[Any]:
        """As plain data."""
        return [self.tried, self.worth, self.rounds, self.regions, self.bounds, self.expected]

    @learned.setter
    def learned(self, values: list[Any]) -> None:
        self.tried, self.worth, self.rounds, self.regions, self.bounds, self.expected = values

    def batch(self, left: Boxes, excess: Tensor) -> int:
        """How many of the open boxes to divide: twice as many every round, until one round is as long as it may be.

        Only those with a good part of the largest excess, so that it stays best first.
        """
        self.rounds += 1
        large = (excess >= PART * excess.max()).sum().double()
        large, mean = torch.stack((large, left.undecided.double().mean())).tolist()
        few, room = (batch_size(sizes, excess.device) for sizes in (FEWEST, ROUND))
        return max(min(2 ** min(self.rounds, 30), self.most, max(int(large), few), int(room / (mean + 8))), 1)

    def divide(self, old: Boxes) -> Boxes:
        """Halves of boxes, or their exact ranges."""
        self.tried, self.worth = ([MEMORY * count for count in counts] for counts in (self.tried, self.worth))
        few = self._ready(old)
        parts = []
        if len(few):
            parts.append(self._finished(old.select(few)))
            rest = torch.ones_like(old.finished)
            rest[few] = False
            old = old.select(rest)
        if len(old):
            low, high, signs = old.halves()
            parts.append(self.bounded(low, high, old.value.repeat(2, 1, 1), signs))
        return Boxes(*map(torch.cat, zip(*(part.parts() for part in parts), strict=True)))

    def _ready(self, old: Boxes) -> Tensor:
        """Boxes [C] that `finish` gets now, those of fewest undecided neurons first.

        They may have about as many regions as `CREDIT`; small ones as many more as are enumerated in a share of the
        time that bounding boxes so far took. Others are better halved.
        """
        if self.finish is None:
            return torch.arange(0, device=old.low.device)
        left = CREDIT + REGIONS * self.bounds * (old.undecided <= SMALL) - self.regions
        undecided = torch.where(old.finished | (left <= 0), torch.inf, old.undecided)
        few = undecided.argsort()[:FINISHED]
        # As many as were seen in the boxes so far, where that is not what was expected.
        regions = (undecided[few] ** GROWTH + 1) * (self.regions + 1) / (self.expected + 1)
        return few[(undecided[few] <= FEW) & (regions.cumsum(0) <= left[few])]

    def _finished(self, old: Boxes) -> Boxes:
        assert self.finish is not None
        found, points, regions = self.finish(old.low, old.high)
        self.expected += float((old.undecided**GROWTH + 1).sum())
        self.regions += regions
        self.best.offer(points.flatten(0, 2))
        # A box that still exceeds what is attained, where it gave up, is halved next time.
        return replace(old, value=torch.minimum(old.value, found), finished=torch.ones_like(old.finished))

    def bounded(
        self, low: Tensor, high: Tensor, caps: Tensor, signs: Tensor, known: JointBounds | None = None
    ) -> Boxes:
        """Boxes with bounds, at most `caps`; offers corners and centres to `best`. known: of one box, if at hand.

        Those whose turn comes when the clock is over keep `caps`; OutOfTime where that is all of them.
        """
        # Boxes of like numbers of undecided neurons together, so that lists of them are about equally long.
        most = torch.zeros_like(low[:, 0], dtype=torch.long)
        sizes = [size for network in self.both.networks for size in network.sizes]
        for part in signs.split(sizes, 1):
            most = torch.maximum(most, (part == 0).sum(1))
        most, order = most.sort()
        numbers = int(min(batch_size(NUMBERS, low.device), self.memory / (8 * WORKING)) // (2 * self.both.widest))
        parts = []
        for index in order.split(lengths(most.tolist(), numbers)):
            chunk = low[index], high[index], caps[index], signs[index]
            try:
                parts.append(self._chunk(*chunk, known))
            except OutOfTime:
                if not parts:
                    raise
                none = torch.zeros_like(index)
                parts.append(Boxes(*chunk[:3], none, chunk[3], (chunk[3] == 0).sum(1).double(), none.bool()))
        return Boxes(*map(torch.cat, zip(*(part.parts() for part in parts), strict=True)))

    def _chunk(self, low: Tensor, high: Tensor, caps: Tensor, signs: Tensor, known: JointBounds | None) -> Boxes:
        self.clock.check()
        best, self.bounds = self.best, self.bounds + len(low)
        found = known or joint_bounds(self.both, low, high, signs, clock=self.clock)
        value, undecided = torch.minimum(found.upper, caps), found.open
        x, influence = found.x, found.influence
        if self.constraints is not None:
            value[self.constraints.miss(low, high)] = -torch.inf
        enough = self.question.enough(best.met.lower)
        chosen = self._worth_it(undecided, largest_excess(value, enough))
        if len(chosen):
            closer = quick_bounds(self.both, low[chosen], high[chosen], found.select(chosen), clock=self.clock)
            better = torch.minimum(value[chosen], closer.upper)
            before, once, twice = (largest_excess(bound, enough) for bound in (caps[chosen], value[chosen], better))
            once, twice = ((part / before).clamp(1e-3, 1) for part in (once, twice))
            self._learn(undecided[chosen], (twice <= once**PRICE) & (twice < IDLE))
            tighter = (better < value[chosen]).flatten(1).any(1)
            x = x.index_copy(0, chosen, torch.where(tighter[:, None, None, None], closer.x, x[chosen]))
            influence = influence.index_copy(
                0, chosen, torch.where(tighter[:, None], closer.influence, influence[chosen])
            )
            value[chosen] = better
        excess = (value - enough).flatten(1)
        rows = excess.argmax(1)
        alive = (excess > 0).any(1)
        corner = torch.where(x.flatten(1, 2)[torch.arange(len(x), device=x.device), rows] > 0, high, low)[alive]
        best.offer(torch.cat((corner, (low + (high - low) / 2)[alive])))
        moved, split = (influence * (high - low)).max(1)
        if self.varying > FEW_INPUTS and found.gaps.shape[1]:
            gap, neuron = found.gaps.max(1)
            split = torch.where(gap > NEURON * moved, low.shape[1] + neuron, split)
        return Boxes(low, high, value, split, found.signs, undecided, torch.zeros_like(alive))

    def _worth_it(self, undecided: Tensor, excess: Tensor) -> Tensor:
        """Boxes [C] to be bounded in difference coordinates too, of those with an excess [B]."""
        if self.both.pair is None:
            return torch.arange(0, device=undecided.device)
        classes, parts = self._classes(undecided), []
        for number in set(classes[excess > 0].tolist()):
            index = ((classes == number) & (excess > 0)).nonzero().flatten()
            if self.tried[number] < TRIALS:
                parts.append(index[:TRIALS])
            elif self.worth[number] >= self.tried[number] / 3:
                parts.append(index)
        return torch.cat(parts) if parts else torch.arange(0, device=undecided.device)

    def _learn(self, undecided: Tensor, worth: Tensor) -> None:
        for number, good in zip(self._classes(undecided).tolist(), worth.tolist(), strict=True):
            self.tried[number] += 1
            self.worth[number] += good

    @staticmethod
    def _classes(undecided: Tensor) -> Tensor:
        return floor_log2(undecided + 1)


def one_box(both: Takes, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """One box [N_in] as a checked batch [1, N_in]."""
    if lower.ndim != 1 or upper.ndim != 1:
        raise ShapeError(
            f"a search takes one box, lower and upper of shape [{both.inputs}]; "
            f"got {tuple(lower.shape)} and {tuple(upper.shape)}"
        )
    return checked_boxes(both, lower[None], upper[None])
