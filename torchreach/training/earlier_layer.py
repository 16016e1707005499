"""A layer before the last, where the last alone cannot reach a target: linear programs with activation patterns held.

While no neuron behind it changes sign at a point x_i, y2(x_i) is affine in the layer's numbers:

    y2_n(x_i; w + d) = y2_n(x_i; w) + g_in (a_i, 1)^T : d,      g_in = dy_n / dz_i,  z_i = W a_i + b

Method: sequential linear programming. The points that come closest to their limits, or exceed them most, make one
    program in d: the least slack of all their limits, each number moving by at most `radius` times the layer's largest.
    Whoever calls it solves the last layer again, certifies, and shortens the radius where that came no closer.
Property: none by itself; the certificate decides.

Axis letters: R rows, N outputs, F_out and F_in of the layer.
"""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn

from torchreach.compress.constraints import Constraints, Grid
from torchreach.core.clock import Clock
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.lp.least_slack import LeastSlack
from torchreach.read.module import chain
from torchreach.training.program import Points

log = logging.getLogger(__name__)

# Rows of one program, and numbers in all of them.
ROWS, NUMBERS = 400, 1 << 22


def step_earlier(
    network: nn.Module, constraints: Constraints, points: Points, depth: int, radius: float, clock: Clock
) -> bool:
    """Changes the linear layer `depth` from the end (1: the last) of `network`, in place; False where it cannot.

    Masks are kept; layers on a grid, frozen ones and those of too many numbers are left alone.

    Raises: OutOfTime.
    """
    layers = list(chain(network, tuple(points.x.shape[1:])))
    places = [k for k, layer in enumerate(layers) if type(layer) is nn.Linear]
    if depth > len(places):
        return False
    place = places[-depth]
    linear = layers[place]
    assert isinstance(linear, nn.Linear)
    names = {id(value): name for name, value in network.named_parameters()}
    name = names.get(id(linear.weight))
    if name is None or isinstance(constraints.grids.get(name), Grid) or not linear.weight.requires_grad:
        return False
    free = constraints.masks.get(name, torch.ones_like(linear.weight, dtype=torch.bool)).to(points.x.device) != 0
    moves = linear.bias is not None and linear.bias.requires_grad
    free = torch.cat((free, torch.full_like(free[:, :1], moves)), 1)
    numbers = int(free.sum())
    if numbers * len(points.low[0]) > NUMBERS:
        log.info("repair: layer %s has %d free numbers, too many for a program", name, numbers)
        return False
    before, rest = (
        nn.Sequential(*copy.deepcopy(part)).to(points.x.device, COMPUTE_DTYPE).eval()
        for part in (nn.Sequential(*layers[:place]), nn.Sequential(*layers[place:]))
    )
    rows, bounds = _rows(before, rest, points, free, min(ROWS, NUMBERS // numbers))
    program = LeastSlack(numbers)
    program.add(rows.cpu().numpy(), bounds.cpu().numpy(), torch.ones_like(bounds).cpu().numpy())
    most = radius * float(linear.weight.detach().abs().max())
    for k in range(numbers):
        program.limit(k, -most, most)
    change = torch.zeros(free.shape, dtype=COMPUTE_DTYPE, device=free.device)
    change[free] = torch.from_numpy(program.solve(clock).point).to(change)
    with torch.no_grad():
        linear.weight.add_(change[:, :-1].to(linear.weight))
        if moves:
            linear.bias.add_(change[:, -1].to(linear.bias))
    return True


def _rows(before: nn.Module, rest: nn.Module, points: Points, free: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """side * J d <= bound + t [R] at the points that exceed their limits most, or come closest, for each output."""
    with torch.no_grad():
        a = before(points.x).flatten(1)
        y = rest(a).flatten(1)
        over = torch.cat((y - points.high, points.low - y))  # [2 P, N]
        each = min(max(1, most // over.shape[1]), len(over))
        worst, at = over.topk(each, 0)
    output = torch.arange(over.shape[1], device=a.device).expand_as(at).flatten()
    side = torch.where(at.flatten() < len(a), 1.0, -1.0).to(a)
    inputs = a[at.flatten() % len(a)]
    linear, onward = rest[0], rest[1:]  # pyright: ignore[reportIndexIssue]
    with torch.enable_grad():
        z = linear(inputs).detach().requires_grad_()
        (slope,) = torch.autograd.grad(onward(z).flatten(1).gather(1, output[:, None]).sum(), z)
    full = torch.cat((inputs, torch.ones_like(inputs[:, :1])), 1)
    jacobian = (side[:, None] * slope)[:, :, None] * full[:, None, :]
    return jacobian[:, free], -worst.flatten()
