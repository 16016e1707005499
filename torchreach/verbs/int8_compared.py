"""Two networks of which one is deployed, or both: intervals of their difference, and what inputs attain of it.

A deployed module is run as it is given, on this machine: that decides codes in doubt at the inputs at which it is run.

Axis letters: B points or boxes, M inputs that vary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchreach.core.roundoff import above, ball, below
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.domains.pair import identical
from torchreach.domains.rounding import outputs
from torchreach.domains.zonotope import interval_bounds, zonotope_bounds
from torchreach.graph.layers import alike
from torchreach.graph.roundings import Roundings
from torchreach.graph.steps import Step
from torchreach.search.rounded_witness import straight_through
from torchreach.sets.star import StarBatch
from torchreach.verbs.int8_kernels import Executed, Run, fits

PROBES = 256  # inputs at which two modules of one description must agree to count as one network


def quantised(network: tuple[Step, ...]) -> bool:
    return any(step.quantizer is not None for step in network)


@dataclass(frozen=True)
class Compared:
    """Two networks, the second of which is deployed, on inputs of `shape`.

    original: the first one as a module. executed: what is covered of each. run: what each module computes here; None
    where that is not what is covered.
    """

    original: nn.Module
    executed: tuple[Executed, Executed]
    run: tuple[Run | None, Run | None]
    shape: tuple[int, ...]
    result: torch.dtype  # of the stars

    @property
    def first(self) -> tuple[Step, ...]:
        return self.executed[0].steps

    @property
    def second(self) -> tuple[Step, ...]:
        return self.executed[1].steps

    @property
    def outputs(self) -> int:
        return self.first[-1].features

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs that are attained: int8 modules read float32."""
        return self.result if self.result.itemsize < 4 else torch.float32

    def intervals(self, low: Tensor, high: Tensor) -> Tensor:
        """Certified upper bounds [B, 2, N_out] of y1 - y2 and y2 - y1 over boxes [B, N_in], by interval arithmetic."""
        (low1, high1), (low2, high2) = (intervals(network, low, high) for network in (self.first, self.second))
        upper = torch.stack((high1 - low2, high2 - low1), 1)
        return above(upper)

    def attained(self, first: tuple[Step, ...], second: tuple[Step, ...], x: Tensor, whole: Tensor) -> Tensor:
        """Values [B, 2, N_out] of y1 - y2 and y2 - y1 that inputs attain at least.

        x: [B, M] what the steps `first` and `second` read at the inputs `whole` [B, N_in].
        """
        ends = []
        for steps, run in zip((first, second), self.run, strict=True):
            if quantised(steps):
                low, high = by_point(outputs(steps, x), len(x))
                y = None if run is None else run(whole.reshape(-1, *self.shape))
                low, high = narrowed(low, high, y)
            else:
                low, high = zonotope_bounds(steps, x[:, None], torch.zeros_like(x))[-1]
            ends.append((low, high))
        (low1, high1), (low2, high2) = ends
        value = torch.stack((low1 - high2, low2 - high1), 1)
        return below(value)

    def slope(self, first: tuple[Step, ...], second: tuple[Step, ...], x: Tensor) -> Tensor:
        """[..., N_out] y1 - y2 in float64 at x [..., M], differentiable as if rounding were the identity."""
        x = x.to(COMPUTE_DTYPE)
        return straight_through(first, x) - straight_through(second, x)

    def estimate(self, first: tuple[Step, ...], second: tuple[Step, ...], x: Tensor, whole: Tensor) -> Tensor:
        """[B, 2 N_out] y1 - y2 and y2 - y1, as modules compute them where they run. x, whole: as in `attained`."""
        ends = []
        for steps, run in zip((first, second), self.run, strict=True):
            y = None if run is None or not quantised(steps) else run(whole.reshape(-1, *self.shape))
            ends.append(straight_through(steps, x) if y is None else y.to(x))
        return torch.cat((ends[0] - ends[1], ends[1] - ends[0]), 1)


def narrowed(low: Tensor, high: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [B, N_out] predicted between low and high, or what the module computes where that is among them."""
    if y is None:
        return low, high
    inside = fits(y := y.to(low), low, high).all(1, keepdim=True)
    y = y.clamp(low, high)
    return torch.where(inside, y, low), torch.where(inside, y, high)


def intervals(network: tuple[Step, ...], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Range [B, N_out] of a network over boxes [B, N_in], by interval arithmetic."""
    middle, radius = ball(low, high)
    radius = torch.where(low == high, 0.0, radius)
    if not quantised(network):
        return interval_bounds(network, middle[:, None], radius)[-1]
    return by_point(outputs(network, middle, radius), len(low))


def by_point(rows: tuple[Tensor, Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Range [B, N_out] over the rows of each point."""
    index, low, high = rows
    index = index[:, None].expand_as(low)
    far = low.new_full((count, low.shape[1]), torch.inf)
    return far.scatter_reduce(0, index, low, "amin"), (-far).scatter_reduce(0, index, high, "amax")


def one_network(original: nn.Module, compressed: nn.Module, networks: Compared, stars: StarBatch) -> bool:
    """Whether both modules are one deployed network: see `verbs.int8_pair.deployed_discrepancy`."""
    if original is compressed:
        return True
    first, second = networks.first, networks.second
    kinds = [[type(part) for part in module.modules()] for module in (original, compressed)]
    if kinds[0] != kinds[1] or not quantised(first) or not identical(first, second):
        return False
    if not all(_same_rounding(s, t) for s, t in zip(first, second, strict=True)):
        return False
    own = [list(network.own.values()) for network in networks.executed]
    run, other = networks.run
    if own[0] != own[1] or run is None or other is None:
        return False
    x = stars.sample(-(-PROBES // len(stars))).flatten(0, 1)
    y, z = run(x), other(x)
    return y is not None and z is not None and torch.equal(y, z)


def _same_rounding(s: Step, t: Step) -> bool:
    if isinstance(s.quantizer, Roundings) or isinstance(t.quantizer, Roundings):
        return alike(s.quantizer, t.quantizer)
    if s.quantizer is not None and t.quantizer is not None:
        ends = [(q.lowest, q.highest, q.arithmetic) for q in (s.quantizer, t.quantizer)]
        same = s.quantizer.same_grid(t.quantizer) and ends[0] == ends[1]
        return same and alike(s.quantizer.rule, t.quantizer.rule)
    if s.relu is not None and t.relu is not None:
        return torch.equal(s.relu, t.relu) and s.quantizer is t.quantizer
    return s.relu is t.relu and s.quantizer is t.quantizer
