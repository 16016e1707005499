"""Witness search where activations are rounded: sign-gradient ascent, straight through the quantisers.

The forward pass rounds; the backward pass takes Q for the clamp it contains (Bengio, Leonard, Courville: Estimating
or propagating gradients through stochastic neurons, 2013). Every start keeps its best point. Nothing is certified
here: the caller replays the points.

Axis letters: B points, N features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchreach.networks.steps import Step

STRIDES = (0.5, 0.02)  # first and last step, in half widths of the box


def climb(
    first: tuple[Step, ...],
    second: tuple[Step, ...],
    lower: Tensor,
    upper: Tensor,
    *,
    starts: int = 8,
    steps: int = 40,
    seed: int = 0,
) -> Tensor:
    """Inputs [B, N_in] of the box [N_in] at which y1 - y2 or y2 - y1 of some output is large; seeded."""
    n, inputs = first[-1].features, len(lower)
    eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
    sign = torch.cat((eye, -eye)).repeat_interleave(starts, 0)
    share = torch.rand(len(sign), inputs, generator=torch.Generator().manual_seed(seed), dtype=lower.dtype)
    x = lower + (upper - lower) * share.to(lower.device)
    best, at = torch.full_like(x[:, 0], -torch.inf), x
    for step in range(steps):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = ((straight_through(first, leaf) - straight_through(second, leaf)) * sign).sum(1)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        value = value.detach()
        at = torch.where((value > best)[:, None], x, at)
        best = torch.maximum(best, value)
        stride = STRIDES[0] * (1 - step / steps) + STRIDES[1]
        x = torch.minimum(torch.maximum(x + stride * (upper - lower) / 2 * gradient.sign(), lower), upper)
    return at


def straight_through(steps: tuple[Step, ...], x: Tensor) -> Tensor:
    """Outputs [B, N_out] in float64, differentiable as if rounding were the identity within the quantiser's range."""
    for step in steps:
        x = step.linear(x) + step.bias
        if step.quantizer is not None:
            ends = [
                step.quantizer.value(torch.as_tensor(code)) for code in (step.quantizer.lowest, step.quantizer.highest)
            ]
            inner = torch.minimum(torch.maximum(x, ends[0]), ends[1])
            x = inner + (step.quantizer(x) - inner).detach()
        elif step.relu is not None:
            x = torch.where(step.relu, x.relu(), x)
    return x
