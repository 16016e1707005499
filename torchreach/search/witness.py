"""Witness search: gradient ascent on a smoothed difference from many starts.

The difference of two nearly equal networks is a sum of steps of height d at z = 0, whose gradient is zero almost
everywhere. So ReLU is replaced by w softplus(z / w): the step becomes a slope of width w. w falls geometrically from
`WIDTHS[0]` to `WIDTHS[1]` times the layer's mean |z|; each start keeps the best of its points by the true
difference, and these are replayed at the end (`Best`). Nothing is certified but the replayed values.

Axis letters: B points.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.graph.steps import Step
from torchreach.search.result import Best, Compared, Constraints

WIDTHS = (0.25, 0.002)
STRIDES = (0.5, 0.02)  # first and last step, in half widths of the box
NUMBERS = 2**23  # in the layers of all points together; many outputs get fewer starts


def ascend(
    compared: Compared,
    lower: Tensor,
    upper: Tensor,
    constraints: Constraints | None = None,
    *,
    starts: int = 24,
    steps: int = 60,
    seed: int = 0,
    clock: Clock = NO_LIMIT,
) -> Best:
    """Best inputs found in one box [1, N_in] for every output and sign, at most `starts` random starts each.

    lower, upper: as `checked_boxes` returns them. constraints: cut the box; every step ends in the set.
    clock: ends it early, with the best points so far. The same seed gives the same starts on every device.
    """
    g = torch.Generator().manual_seed(seed)
    n = compared.outputs
    per_start = 2 * n * (compared.inputs + 2 * compared.features)
    starts = max(min(starts, NUMBERS // per_start), 1)
    share = torch.rand(2 * n * starts, compared.inputs, generator=g, dtype=lower.dtype).to(lower.device)
    x = lower + (upper - lower) * share
    x[0] = lower[0] + (upper[0] - lower[0]) / 2
    x = x if constraints is None else constraints.pull(x)
    eye = torch.eye(n, dtype=x.dtype, device=x.device)
    sign = torch.cat((eye, -eye)).repeat_interleave(starts, 0)
    half = (upper - lower) / 2
    best, at = (_smooth(compared, x, 0.0) * sign).sum(1), x
    for step in range(steps):
        if clock.over:
            break
        done = step / max(steps - 1, 1)
        width = WIDTHS[0] * (WIDTHS[1] / WIDTHS[0]) ** done
        stride = STRIDES[0] * (1 - done) + STRIDES[1]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((_smooth(compared, leaf, width) * sign).sum(), leaf)
        x = torch.minimum(torch.maximum(x + stride * half * gradient.sign(), lower), upper)
        x = x if constraints is None else constraints.pull(x)
        value = (_smooth(compared, x, 0.0) * sign).sum(1)
        at = torch.where((value > best)[:, None], x, at)
        best = torch.maximum(best, value)
    # The best start of every objective first, in case there is no time to replay all.
    order = best.reshape(2 * n, starts).argsort(dim=1, descending=True, stable=True)
    order = order + starts * torch.arange(2 * n, device=x.device)[:, None]
    return Best(compared, lower, upper, at[order.T.flatten()], constraints, clock)


def _smooth(compared: Compared, x: Tensor, width: float) -> Tensor:
    """y1 - y2 [B, N_out] with softplus of relative width `width` in place of ReLU; 0 for ReLU itself."""

    def activate(step: Step, z: Tensor) -> Tensor:
        result = step.activate(z)
        if not width or step.relu is None:
            return result
        w = width * z.detach().abs().mean().clamp(min=1e-12)
        return torch.where(step.relu, w * F.softplus(z / w), result)

    return compared.values(x, activate)
