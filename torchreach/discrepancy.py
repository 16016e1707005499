"""Certified discrepancy of two networks: how far the compressed one can be from the original.

    discrepancy_n = max over the input star of |y1_n - y2_n|          (Mo et al., equation 16)

The range of y1 - y2 is the exact reach set of the merged network; its upper bounds are certified, its lower
bounds are attained by witnesses that are replayed through both networks.
"""

from __future__ import annotations

import torch
from torch import nn

from torchreach.deployed import deployed_discrepancy, rounds
from torchreach.networks.merge import merge
from torchreach.options import Budget, Exact
from torchreach.reach.api import reach
from torchreach.results import Discrepancy, ProgressCallback
from torchreach.sets.star import StarBatch
from torchreach.tolerances import Tolerances


def discrepancy(
    original: nn.Module,
    compressed: nn.Module,
    stars: StarBatch,
    method: Exact | None = None,
    *,
    budget: Budget | None = None,
    tolerances: Tolerances | None = None,
    progress: ProgressCallback | None = None,
) -> Discrepancy:
    """Certified interval around max |y1 - y2| per output and input star, with witnesses.

    Args:
        original, compressed: networks of supported layers with equal input and output sizes.
        stars: input stars [S] of the networks' input shape.
        method, budget, tolerances, progress: as in `reach`.

    Guarantee: for every real input x of star s, |y1_n(x) - y2_n(x)| <= upper[s, n]; at witness[s, n] it is
    at least lower[s, n]. Both speak of the networks as real-valued functions of their weights.

    Raises: as `merge` and `reach`.
    """
    shape = None if len(stars.shape) == 1 else stars.shape
    if rounds(original, shape) or rounds(compressed, shape):
        return deployed_discrepancy(original, compressed, stars, budget or Budget(), tolerances or Tolerances())
    merged = merge(original, compressed, None if len(stars.shape) == 1 else stars.shape)
    reached = reach(
        merged,
        stars,
        method,
        budget=budget,
        tolerances=tolerances,
        keep_stars=False,
        progress=progress,
    )
    # A value may be attained on either side of zero; the other side's attained value can have any sign.
    below, above = -reached.attained_lower, reached.attained_upper
    use_above = above >= below
    mask = use_above.reshape(*use_above.shape, *[1] * len(stars.shape))
    return Discrepancy(
        lower=torch.maximum(above, below).clamp(min=0),
        upper=torch.maximum(reached.upper, -reached.lower),
        range_lower=reached.lower,
        range_upper=reached.upper,
        witness=torch.where(mask, reached.argmax, reached.argmin),
        regions=reached.count,
        status=reached.status,
        stats=reached.stats,
    )
