"""Affine maps of stars through layers, with a running certified error bound.

A star's features are rows z(a) = r_0 + sum_m r_m a_m, |a_m| <= 1. What is computed differs from the real
network for three reasons, and `slack` [S, N] bounds their sum at every feature and every point of the star:

  rounding       a sum of n products is off by at most gamma |W| |z|, gamma = (n + c) u   (Higham, ch. 3)
  sign           a star within tolerance of a breakpoint was not cut: ReLU takes the wrong piece by the
                 pre-activation's excursion over the breakpoint, which is measured, not assumed
  drift          cut vertices are rounded, so a star may miss points within `drift` of its hull

ReLU is 1-Lipschitz, so an error before it is no larger after it; on the flat piece only what sticks out over
zero passes. An affine layer maps an error e to at most |W| e.

Axis letters: S stars, N features, M predicate variables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.roundoff import gamma
from torchreach.graph.steps import Step


def affine(step: Step, rows: Tensor, slack: Tensor, clock: Clock = NO_LIMIT) -> tuple[Tensor, Tensor]:
    """Rows [S, 1 + M, N_in] and slack [S, N_in] after an affine step. Raises OutOfTime."""
    size = rows.abs().sum(1)
    out = step.map_rows(rows, clock)
    return out, affine_slack(step, out, slack, size)


def affine_slack(step: Step, out: Tensor, slack: Tensor, size: Tensor) -> Tensor:
    """Slack [S, N_out] of rows `out` [S, 1 + M, N_out], from slack and size (sum of magnitudes) [S, N_in] before."""
    variables = out.shape[1]
    share = gamma(step.terms + variables)
    error = step.magnitude(slack + share * size) + share * step.bias_magnitude
    error = step.with_noise(error)
    # The last term covers evaluating the new rows at a point.
    error = error + gamma(variables) * out.abs().sum(1)
    return error * (1 + 1e-12)


def relu(
    rows: Tensor, slack: Tensor, lower: Tensor, upper: Tensor, mask: Tensor, drift: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Rows and slack after ReLU on the features in `mask`, on stars that (nearly) keep one sign each.

    Args:
        rows: [S, 1 + M, N]; slack: [S, N]; mask: [N].
        lower, upper: [S, N] range of the rows over each star; infinite on the settled side where other
            bounds already proved the sign for the real network.
        drift: how far in each predicate variable the star may miss points, [S, 1] or 0.
    """
    active = (lower + upper > 0) | ~mask
    reach = drift * rows[:, 1:].abs().sum(1)
    over = torch.where(active, slack + (reach - lower).clamp(min=0), (upper + reach + slack).clamp(min=0))
    return rows * active[:, None, :], torch.where(mask, over, slack)
