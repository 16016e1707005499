"""Inputs at which two networks, of which one is deployed or both, give different labels: looked for, and replayed.

By chance; where a label changes on the way between two inputs, just before and behind: there a deployed network gives
one label and the other network two; near the inputs that come closest to it (`search.rounded_witness.wander`). What
counts is what both networks certainly give, the deployed one as the module as given computes it here, where it runs.

Axis letters: B inputs, K labels, M inputs that vary, C cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchreach.core.clock import Clock
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.graph.steps import Step
from torchreach.search.cells import INSIDE, Cells, representable
from torchreach.search.rounded_witness import straight_through, wander
from torchreach.sets.star import StarBatch
from torchreach.verbs.labels import Reading, apart_by, label_of, lead_over, near_apart

SAMPLES, NEAR = 256, 64  # inputs of a star by chance; of a part that is open, and in a round near the best
BISECTIONS = 40
STEPS = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # from where a label changes, as shares of the way
SHARE = 1 / 8  # of the time that is left, for inputs near the best
NUMBERS = 2**19  # in the layers of the inputs that are run between two looks at the clock


def witnesses(readings: tuple[Reading, Reading], stars: StarBatch, most: float) -> list[Witness]:
    """One for each star, at a point of it (the centre of a box) with the label of the original there.

    most: upper end of `verbs.labels.odds`.
    """
    low, high, is_box = stars.bounding_box()
    dtype = torch.float32 if stars.dtype.itemsize > 4 else stars.dtype  # int8 modules read float32
    x = representable((low + high) / 2, low, high, dtype)
    x = torch.where(is_box[:, None], x, stars.sample(1)[:, 0].flatten(1).to(x))
    widest = max(step.features for reading in readings for step in reading.steps)
    few = max(NUMBERS // widest, 1)
    labels = torch.cat([label_of(*readings[0].here(part))[0] for part in x.split(few)])
    return [
        Witness(readings, stars.select([s]), low[s], high[s], plain, x[s], labels[s], most, dtype, few)
        for s, plain in enumerate(is_box.tolist())
    ]


class Witness:
    """What inputs of one star show.

    lower: [] the largest lead over `label` that either network has for certain, at `at` [N_in]. apart: whether the
    labels differ at `at`. few: inputs that are run at a time.
    """

    def __init__(
        self,
        readings: tuple[Reading, Reading],
        star: StarBatch,
        low: Tensor,
        high: Tensor,
        is_box: bool,
        at: Tensor,
        label: Tensor,
        most: float,
        dtype: torch.dtype,
        few: int,
    ) -> None:
        self.readings, self.star, self.low, self.high, self.is_box = readings, star, low, high, is_box
        self.at, self.label, self.most, self.dtype, self.few = at, label, most, dtype, few
        self.lower, self.apart = low.new_tensor(-torch.inf), False
        self.own: tuple[tuple[Step, ...], tuple[Step, ...]] | None = None
        self.index = torch.arange(len(low), device=low.device)

    @property
    def point(self) -> bool:
        """Whether the star is one input."""
        return self.is_box and bool((self.low == self.high).all())

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Of the inputs that vary, [M]."""
        return self.low[self.index], self.high[self.index]

    def vary(self, first: tuple[Step, ...], second: tuple[Step, ...], index: Tensor) -> None:
        """From here on inputs are numbers [M] of those that vary, which `first` and `second` read."""
        self.own, self.index = (first, second), index

    def start(self, clock: Clock) -> Tensor:
        """Inputs [B, N_in] of the star, `at` first; they are run."""
        x = torch.cat((self.at[None], self.star.sample(SAMPLES)[0].flatten(1).to(COMPUTE_DTYPE)))
        if self.is_box:
            x = representable(x, self.low, self.high, self.dtype)
        self.run(x, clock)
        return x

    def run(self, x: Tensor, clock: Clock) -> None:
        """Runs both networks at inputs x [B, N_in] of the star: where their labels differ, it is answered."""
        for part in x.split(self.few):
            ends = [reading.here(part) for reading in self.readings]
            found, at = apart_by(ends[0], ends[1], self.most).max(0)
            lead, where = torch.stack([lead_over(*own, self.label.expand(len(part))) for own in ends]).amax(0).max(0)
            if lead > self.lower:
                self.lower, self.at = lead, part[where]
            if found > 0:
                self.apart, self.at = True, part[at]
                return
            if clock.over:
                return

    def offer(self, x: Tensor, clock: Clock) -> None:
        """Runs varying inputs x [B, M] of the box, where it is the star."""
        if self.is_box:
            self.run(self.whole(representable(x, *self.ends, self.dtype)), clock)

    def whole(self, x: Tensor) -> Tensor:
        """Inputs [B, N_in] with the varying ones x [B, M] filled in."""
        return self.low.expand(len(x), -1).index_copy(1, self.index, x)

    def by_chance(self, low: Tensor, high: Tensor, clock: Clock, seed: int) -> None:
        """Runs some inputs of a part [M] of the box, its middle first."""
        generator = torch.Generator().manual_seed(seed)
        t = torch.rand(NEAR, len(low), generator=generator, dtype=low.dtype).to(low.device)
        t[0] = 0.5
        self.offer(low + t * (high - low), clock)

    def in_cells(self, cells: Cells, codes: Tensor, clock: Clock) -> None:
        """Runs inputs well inside of cells [C, J]: their middles, and where a lead of `cells.first` is largest."""
        for part in codes.split(max(self.few // (1 + 2 * cells.outputs), 1)):
            low, high = cells.boxes(part, INSIDE)
            x = torch.cat((((low + high) / 2)[:, None], cells.corners(low, high).flatten(1, 2)), 1)
            self.offer(x.flatten(0, 1), clock)
            if self.apart or clock.over:
                return

    def search(self, x: Tensor, clock: Clock) -> None:
        """Looks for a witness, from inputs x [B, N_in] of the star."""
        if not self.is_box or self.own is None:
            return
        own, x = self.own, x[:, self.index]
        self._between(x, clock)
        if self.apart or clock.over:
            return

        def near(x: Tensor) -> Tensor:
            return near_apart(straight_through(own[0], x), straight_through(own[1], x), self.most)[:, None]

        start = x[near(x)[:, 0].argmax()][None]
        for best in wander(near, *self.ends, start, min(NEAR, self.few), clock=clock.share(SHARE)):
            start = best
            self.offer(best, clock)
            if self.apart or clock.over:
                return
        self._between(torch.cat((x[:1], start)), clock)

    def _between(self, x: Tensor, clock: Clock) -> None:
        """Runs inputs just before and behind where a label changes on the way from x[0] to other inputs x [B, M]."""
        assert self.own is not None
        for network in self.own:
            label = straight_through(network, x).argmax(1)
            ends = x[label != label[0]][:NEAR]
            if not len(ends) or clock.over:
                continue
            low, high = (x.new_full((len(ends), 1), end) for end in (0.0, 1.0))
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                same = straight_through(network, x[0] + middle * (ends - x[0])).argmax(1, keepdim=True) == label[0]
                low, high = torch.where(same, middle, low), torch.where(same, high, middle)
            steps = torch.tensor([*STEPS, *(-step for step in STEPS)], dtype=x.dtype, device=x.device)
            t = (low + steps).clamp(0, 1)[..., None]
            self.offer((x[0] + t * (ends - x[0])[:, None]).flatten(0, 1), clock)
            if self.apart:
                return
