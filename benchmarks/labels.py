"""Labels of deployed networks: certified, refuted and open over a test set, and does any sample contradict them?

A dense and a convolutional network on scikit-learn's digits, quantised with torch's tools (per channel, full range of
codes), on the held-out pictures themselves and with every pixel moving. Each star that is certified is sampled on the
kernels; the exit status is 1 if one sample has two labels there, or a witness has one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import torchreach as tr
from benchmarks import common
from benchmarks.kernels import digits, int8, trained

COLUMNS = ("network", "eps", "sure", "same", "differ", "open", "depends", "accuracy", "max |y1 - y2|", "s", "wrong")
TRAIN = 1200


def networks() -> dict[str, tuple[nn.Sequential, nn.Module]]:
    """Original and int8 copy by name."""
    torch.manual_seed(0)
    x, y = (part[:TRAIN] for part in digits())
    dense = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10)
    )  # fmt: skip
    convolution = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 10),
    )  # fmt: skip
    found = {}
    for name, network in (("dense", dense), ("convolution", convolution)):
        small = int8(trained(network, x, y, epochs=30), x)
        found[name] = network.double().requires_grad_(requires_grad=False), small
    return found


def differ(y: Tensor, z: Tensor, confidence: float) -> Tensor:
    """[B]: whether scores y and z [B, N_out] have two labels where y is sure to `confidence`; a tie is no label."""
    single = [scores.topk(2).values.diff()[:, 0] < 0 for scores in (y, z)]
    sure = y.softmax(1).amax(1) >= confidence
    return (y.argmax(1) != z.argmax(1)) & sure & single[0] & single[1]


def wrong(original: nn.Module, small: nn.Module, x: Tensor, eps: float, found: tr.Audit, count: int) -> int:
    """How many answers an input contradicts, of `count` random ones in each set; ties do not count."""
    g, bad = torch.Generator().manual_seed(1), 0
    for b, answer in enumerate(found.answer):
        near = x[b : b + 1] + eps * (2 * torch.rand(count, *x.shape[1:], generator=g) - 1)
        points = found.witness[b : b + 1] if answer is tr.Answer.NOT_EQUIVALENT else near.clamp(0, 1)
        with torch.no_grad():
            y, z = original(points.double()), small(points.float()).double()
        differing = differ(y, z, found.confidence or 0.0)
        bad += bool(differing.any()) if answer is tr.Answer.EQUIVALENT else False
        bad += not bool((y.argmax(1) != z.argmax(1)).all()) if answer is tr.Answer.NOT_EQUIVALENT else False
    return bad


def row(name: str, pair: tuple[nn.Module, nn.Module], eps: float, p: float | None, args) -> dict[str, Any]:
    x, y = (part[TRAIN:] for part in digits())
    if eps:
        x, y = x[: args.pictures], y[: args.pictures]
    budget = tr.Budget(seconds=args.seconds * len(x)) if eps else None
    found = tr.audit(*pair, x, eps, y, confidence=p, clip=(0.0, 1.0) if eps else None, budget=budget)
    (_, _), (low, high) = found.accuracy or ((0, 0), (0, 0))
    return {
        "network": name,
        "eps": eps,
        "sure": "" if p is None else p,
        "same": found.count(tr.Answer.EQUIVALENT),
        "differ": found.count(tr.Answer.NOT_EQUIVALENT),
        "open": found.count(tr.Answer.UNKNOWN),
        "depends": int(found.depends.sum()),
        "accuracy": f"{100 * low:.2f} to {100 * high:.2f} %",
        "max |y1 - y2|": float(found.upper.max()),
        "s": found.seconds,
        "wrong": wrong(*pair, x, eps, found, args.samples),
    }


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--eps", type=float, nargs="+", default=[0.005, 0.02, 0.05], help="radii besides 0")
    parser.add_argument("--pictures", type=int, default=20, help="pictures of each radius (default: 20)")
    parser.add_argument("--seconds", type=float, default=4.0, help="budget of each picture (default: 4)")
    parser.add_argument("--samples", type=int, default=2000, help="random inputs around each picture (default: 2000)")
    args: argparse.Namespace = parser.parse_args(argv)
    common.headline(args)
    found = []
    for name, pair in networks().items():
        for eps in (0.0, *args.eps):
            for p in (None, 0.9):
                found.append(row(name, pair, eps, p, args))
                common.say(f"{name}, {eps}, {p}: {found[-1]}")
    common.show(found, COLUMNS, "labels of int8 networks over held-out digits")
    problems = [
        f"{one['network']}, eps {one['eps']}: {one['wrong']} answers are wrong" for one in found if one["wrong"]
    ]
    return common.finish("labels", args, found, problems)


if __name__ == "__main__":
    sys.exit(main())
