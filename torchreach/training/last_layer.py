"""The last linear layer of a network: its numbers as a matrix, what goes into it, and proofs about it.

y2(x) = W h(x) + b, and h does not depend on (W, b). As a matrix [N, F] it is (W, b), where F counts the constant
feature 1 of the bias.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from torchreach.compress.constraints import Constraints, Grid
from torchreach.core.errors import InvalidNetworkError, UnsupportedLayerError
from torchreach.core.repaired import Conflict
from torchreach.core.roundoff import above, gamma
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.graph.layers import RESHAPING
from torchreach.graph.steps import Step
from torchreach.read.module import chain
from torchreach.read.steps import steps
from torchreach.sets.star import StarBatch
from torchreach.training.program import Points
from torchreach.verbs.reach import replay

# |w|_1 of an output up to which a conflict is certified.
WEIGHTS = 1e4
# Points whose features are computed at once, in numbers of their inputs.
NUMBERS = 1 << 24
POLISH = 2
TINY = 1e-7  # multipliers that are rounding, as a share of the largest


class LastLayer:
    """The last layer of `network`, whose parameters it reads and writes.

    Raises: UnsupportedLayerError: the last layer is no nn.Linear with parameters of its own; InvalidNetworkError:
        nothing of it is free.
    """

    def __init__(
        self, network: nn.Module, shape: tuple[int, ...], constraints: Constraints, device: torch.device
    ) -> None:
        self.network, self.constraints = network, constraints
        layers = list(chain(network, shape))
        while layers and isinstance(layers[-1], RESHAPING):
            layers.pop()
        linear = layers[-1] if layers else None
        names = {id(value): name for name, value in network.named_parameters()}
        if type(linear) is not nn.Linear or id(linear.weight) not in names:
            kind = "nothing" if linear is None else type(linear).__name__
            raise UnsupportedLayerError(
                f"solving needs a network whose last layer is an nn.Linear with parameters of its own, got {kind}; use "
                "method='retrain'"
            )
        self.weight, self.bias = linear.weight, cast(nn.Parameter | None, linear.bias)
        mask = constraints.masks.get(names[id(linear.weight)])
        grid = constraints.grids.get(names[id(linear.weight)])
        self.grid = grid if isinstance(grid, Grid) else None
        free = torch.ones_like(self.weight, dtype=torch.bool) if mask is None else mask.to(self.weight.device) != 0
        bias = self.bias is not None and self.bias.requires_grad
        columns = free if self.weight.requires_grad else torch.zeros_like(free)
        self.free = torch.cat((columns, torch.full_like(free[:, :1], bias)), 1).to(device)
        if not bool(self.free.any(1).all()):
            raise InvalidNetworkError(
                "solving needs free numbers for every output of the last layer (a bias, or weights that are neither "
                f"masked nor frozen), got none for outputs {(~self.free.any(1)).nonzero()[:, 0].tolist()}"
            )
        # What goes into the layer, in float64: the real-valued function of the weights that are stored.
        hidden = nn.Sequential(*(copy.deepcopy(layer) for layer in layers[:-1]))
        self.hidden = hidden.to(device, COMPUTE_DTYPE).eval()
        passing = nn.Linear(linear.in_features, linear.in_features, bias=False, dtype=COMPUTE_DTYPE, device=device)
        with torch.no_grad():
            passing.weight.copy_(torch.eye(linear.in_features, dtype=COMPUTE_DTYPE, device=device))
        self.steps = steps(nn.Sequential(*self.hidden, passing), shape, dtype=COMPUTE_DTYPE, device=device, smooth=True)

    @property
    def matrix(self) -> Tensor:
        """[N, F] as it is now, float64."""
        weight = self.weight.detach().to(self.free.device, COMPUTE_DTYPE)
        bias = torch.zeros_like(weight[:, :1]) if self.bias is None else self.bias.detach().to(weight)[:, None]
        return torch.cat((weight, bias), 1)

    @property
    def off_grid(self) -> Tensor:
        """[N, F] entries that are free and lie on no grid."""
        if self.grid is None:
            return self.free
        bias = torch.zeros_like(self.free)
        bias[:, -1] = True
        return self.free & bias

    def codes(self, within: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Of a layer on a grid: its steps [N, F], 0 for the bias; lowest and highest code `within` steps of now."""
        assert self.grid is not None
        parts = self.grid.around(self.matrix[:, :-1], within)
        step, low, high = (torch.nn.functional.pad(part, (0, 1)) for part in parts)
        return step, (low, high)

    def features(self, x: Tensor) -> Tensor:
        """[P, F] at x [P, *shape], float64."""
        h = evaluated(self.hidden, x)
        return torch.cat((h, torch.ones_like(h[:, :1])), 1)

    def write(self, matrix: Tensor) -> None:
        """Puts [N, F] into the network, rounded to its dtype; masks and grids are kept."""
        with torch.no_grad():
            self.weight.copy_(matrix[:, :-1])
            if self.bias is not None:
                self.bias.copy_(matrix[:, -1])
        self.constraints.project(self.network)

    def conflict(
        self,
        original: tuple[Step, ...],
        points: Points,
        limits: tuple[Tensor, Tensor],
        n: int,
        proof: tuple[Tensor, Tensor],
    ) -> Conflict:
        """What multipliers of output n prove; `original` as steps, `limits` of y1 - y2 [P] at the points."""
        at, u = (part[proof[1].abs() > TINY * proof[1].abs().amax()] for part in proof)
        x, gives = points.x[at], points.soft[at] > 0
        low, high = (limit[at] for limit in limits)
        y, y_error = (part[:, n] for part in replay(original, x))
        h, h_error = (
            torch.nn.functional.pad(part, (0, 1), value=end)
            for part, end in zip(replay(self.steps, x), (1, 0), strict=True)
        )
        free = self.free[n]
        u = _polished(h[:, free], u, gives)
        fixed = torch.where(free, 0.0, self.matrix[n])
        aim = torch.where(u > 0, high, low)
        rest = y - h @ fixed - aim
        size = y.abs() + h.abs() @ fixed.abs() + aim.abs()
        lost = y_error + h_error @ fixed.abs() + gamma(len(fixed) + len(u) + 8) * size
        value = (u * rest).sum() - (u.abs() * lost).sum()
        off = (h[:, free].T @ u).abs() + (h_error[:, free] + gamma(len(u) + 8) * h[:, free].abs()).T @ u.abs()
        residual = above(off.amax()) if bool(free.any()) else off.new_zeros(())
        share = u[gives].abs().sum()
        share = share if bool(share > 0) else torch.ones_like(share)
        certified = value - residual * WEIGHTS
        certified = certified / torch.where(certified > 0, above(above(share)), share)
        return Conflict(n, x, u / share, low, high, gives, float(above(residual / share)), WEIGHTS, float(certified))


def in_float64(network: nn.Module, stars: StarBatch) -> nn.Module:
    """A copy of the layers of `network`, on the device of the stars, in evaluation mode."""
    return copy.deepcopy(chain(network, stars.shape)).to(stars.device, COMPUTE_DTYPE).eval()


def evaluated(network: nn.Module, x: Tensor) -> Tensor:
    """Outputs [P, N] at x [P, *shape], a part at a time."""
    size = max(1, NUMBERS // max(1, x[:1].numel()))
    with torch.no_grad():
        parts = [network(part.clone()).flatten(1) for part in x.split(size)]
    return torch.cat(parts)


def _polished(h: Tensor, u: Tensor, gives: Tensor) -> Tensor:
    """Multipliers corrected by least squares, so that they cancel the features to rounding; signs stay.

    Few numbers, on the host: no accelerator solves systems of deficient rank.
    """
    device, (h, u, gives) = h.device, (part.cpu() for part in (h, u, gives))
    sign = torch.sign(u)
    system = torch.cat((h.T, (sign * gives)[None]))
    wanted = torch.zeros_like(system[:, 0])
    wanted[-1] = 1.0
    for _ in range(POLISH):
        better = u + torch.linalg.lstsq(system, (wanted - system @ u)[:, None], driver="gelsd").solution[:, 0]
        if not bool((torch.sign(better) == sign).all()):
            break
        u = better
    return u.to(device)
