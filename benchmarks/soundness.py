"""Random pairs of networks: does any input leave its certified interval?

Every pair is bounded by branch and bound that a short budget ends, or by the default method, in float32 and float64,
and then attacked: uniform samples, corners, and gradient ascent for every output and sign. The exit status is 1 if
one value lies outside.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import torchreach as tr
from benchmarks import common
from tests.networks import random_pair


def attacked(original: nn.Module, small: nn.Module, low: Tensor, high: Tensor, count: int, seed: int) -> Tensor:
    """Differences [B, N_out] at `count` random inputs, half of them at random corners, and after gradient ascent."""
    g = torch.Generator().manual_seed(seed)
    share = torch.rand(count, len(low), generator=g, dtype=torch.float64)
    share[count // 2 :] = torch.where(share[count // 2 :] < 0.9, share[count // 2 :].round(), share[count // 2 :])
    x = low + (high - low) * share
    with torch.no_grad():
        values = [original(x) - small(x)]
    n = values[0].shape[1]
    sign = torch.cat((torch.eye(n), -torch.eye(n))).double().repeat_interleave(8, 0)
    x = x[: len(sign)].clone()
    for step in range(30):
        x.requires_grad_()
        y = original(x) - small(x)
        (gradient,) = torch.autograd.grad((y * sign).sum(), x)
        values.append(y.detach())
        x = x.detach() + 0.3 * 0.9**step * (high - low) * gradient.sign()
        x = torch.minimum(torch.maximum(x, low), high)
    return torch.cat(values)


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--pairs", type=int, default=200, help="(default: 200)")
    parser.add_argument("--samples", type=int, default=5000, help="of each pair and dtype (default: 5000)")
    args = parser.parse_args(argv)
    common.headline(args)
    rows = []
    for dtype in (torch.float64, torch.float32):
        row = {"dtype": str(dtype).removeprefix("torch."), "pairs": args.pairs, "inputs": 0, "outside": 0, "bounded": 0}
        for seed in range(args.pairs):
            original, small, inputs = random_pair(seed)
            g = torch.Generator().manual_seed(seed)
            low = 2 * torch.rand(inputs, generator=g, dtype=torch.float64) - 1
            low, high = low.to(dtype), (low + torch.rand(inputs, generator=g, dtype=torch.float64)).to(dtype)
            options = {} if seed % 2 else {"method": "search", "budget": tr.Budget(seconds=0.1)}
            found = tr.discrepancy(original, small, tr.StarBatch.from_box(low, high), **options)
            y = attacked(original, small, low.double(), high.double(), args.samples, seed)
            margin = 1e-12 * (1 + y.abs())  # of evaluating y itself
            outside = (y < found.range_lower - margin) | (y > found.range_upper + margin)
            row["inputs"] += len(y)
            row["outside"] += int(outside.any(1).sum())
            row["bounded"] += int(found.status[0] is tr.Status.BOUNDED)
        rows.append(row)
    common.show(rows, ("dtype", "pairs", "bounded", "inputs", "outside"), "Inputs outside of the certified interval")
    return common.finish("soundness", args, rows, [f"{r['dtype']}: {r['outside']}" for r in rows if r["outside"]])


if __name__ == "__main__":
    sys.exit(main())
