"""Repair by construction against retraining: the paper's original pruned or rounded to int4, and ACAS Xu networks.

Section mnist: `tr.prune_weights(original, 0.8)` and `tr.quantize_weights(original, 4)` on the paper's ten images, four
centre pixels within 0.05; judged by certificates there and on 100 test images that no repair saw, by accuracy on all
test images, and by the change of the last layer. Section acasxu: copies with 30 % of their weights pruned, whole
property boxes; the repaired network is certified by `tr.discrepancy` and sampled. Section deployed: the published int8
network.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import torchreach as tr
from benchmarks import common
from benchmarks import paper_networks as networks
from tests.networks import box_of
from torchreach.compress.constraints import Constraints

EXACT = tr.Exact("vertices", "zonotope")
FREE = Constraints({}, {})  # neither zeros nor grids are kept
KEPT = 1000
TAU = 0.05
SAMPLES = 1_000_000
ROUNDING = 1e-9  # of float64 forward passes
COLUMNS = ("network", "repair", "by", "ten mean", "ten max", "least", "held out", "accuracy %", "|dW|", "CPU s")
ACAS_COLUMNS = ("pair", "regions", "before", "least", "after", "outside", "CPU s")
DEPLOYED_COLUMNS = ("step", "by", "mean", "max", "accuracy %", "seconds")


# -- the paper's images -------------------------------------------------------------------------------


class Digits:
    """One compressed network, its sets, and rows of what repairs make of it."""

    def __init__(self, name: str, original: nn.Module, compressed: nn.Module, pictures: networks.Pictures) -> None:
        self.name, self.original, self.compressed, self.pictures = name, original, compressed, pictures
        self.stars = networks.stars(networks.ten_images()[0])
        self.held = networks.stars(networks.held_out(pictures, networks.HELD_OUT))
        self.rows: list[dict[str, Any]] = []

    def data(self, number: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(self.pictures.train_x), generator=torch.Generator().manual_seed(0))[:number]
        x = self.pictures.train_x[chosen]
        with torch.no_grad():
            return x, self.original(x)

    def row(self, repair: str, network: nn.Module, seconds: float, result: tr.RepairResult | None = None) -> None:
        ten = tr.discrepancy(self.original, network, self.stars, EXACT).max_upper
        held = tr.discrepancy(self.original, network, self.held, EXACT).max_upper
        weights = [list(part.parameters())[-2] for part in (network, self.compressed)]
        row = {
            "network": self.name,
            "repair": repair,
            "by": "-" if result is None else str(result.method),
            "ten mean": float(ten.mean()),
            "ten max": float(ten.max()),
            "least": None if result is None or result.least is None else float(result.least.max()),
            "held out": float(held.mean()),
            "accuracy %": f"{networks.accuracy(network, self.pictures):.2f}",
            "|dW|": float((weights[0] - weights[1]).norm().detach()),
            "CPU s": seconds,
        }
        self.rows.append(row)
        common.say(" ".join(f"{key}: {common.text(value)}," for key, value in row.items()))

    def repaired(self, repair: str, start: nn.Module, **options: Any) -> tr.RepairResult:
        began = time.process_time()
        result = tr.repair(self.original, start, self.stars, exact=EXACT, **options)
        self.row(repair, result.network, time.process_time() - began, result)
        return result


def digits(
    name: str, compress: Callable[[nn.Module], nn.Module], pictures: networks.Pictures, epochs: int
) -> list[dict[str, Any]]:
    """All repairs of one compression."""
    original = networks.published_pair()[0]
    work = Digits(name, original, compress(original), pictures)
    given, bound = work.compressed, tr.Target.bounds(-TAU, TAU)
    work.row("none", given, 0.0)
    training = tr.RepairOptions(epochs=20, learning_rate=3e-3, data_weight=1.0)
    never = tr.Target.test(lambda _: False)
    work.repaired(
        "retrained, 12 iterations",
        given,
        target=never,
        alpha=1.0,
        iterations=12,
        training=training,
        data=work.data(10_000),
    )
    kept = work.data(KEPT)
    work.repaired("solved, least", given, target=None, method="solve")
    work.repaired(f"solved, {TAU}, {KEPT} kept", given, target=bound, method="solve", data=kept)
    work.repaired(f"solved free, {TAU}, {KEPT} kept", given, target=bound, method="solve", data=kept, constraints=FREE)
    long = tr.RepairOptions(samples=50, epochs=epochs, learning_rate=3e-3, data_weight=1.0)
    began = work.repaired(
        "retrained long", given, target=never, alpha=1.0, iterations=1, training=long, data=work.data(60_000)
    ).network
    work.repaired("long, then solved, least", began, target=None, method="solve", data=kept)
    work.repaired(f"long, then solved, {TAU}, {KEPT} kept", began, target=bound, method="solve", data=kept)
    work.repaired(
        f"long, then solved free, {TAU}, {KEPT} kept", began, target=bound, method="solve", data=kept, constraints=FREE
    )
    return work.rows


# -- ACAS Xu ------------------------------------------------------------------------------------------


def acasxu(regions: int) -> list[dict[str, Any]]:
    """Copies with 30 % pruned: those of the data folder, and of the networks on boxes of up to so many regions."""
    rows = []
    for case in common.acasxu_cases(regions):
        if case.is_pair and "prune30" not in case.name:
            continue
        if case.is_pair:
            original, compressed = case.networks()
        else:
            (original,) = (network.double() for network in case.networks())
            compressed = tr.prune_weights(original, 0.3)
        rows.append(acasxu_row(case.name, original, compressed, box_of(case.record)))
        common.say(" ".join(f"{key}: {common.text(value)}," for key, value in rows[-1].items()))
    return rows


def acasxu_row(name: str, original: nn.Module, compressed: nn.Module, star: tr.StarBatch) -> dict[str, Any]:
    began = time.process_time()
    result = tr.repair(original, compressed, star, target=None, method="solve", exact=EXACT)
    spent = time.process_time() - began
    outside = 0
    for k in range(10):
        x = star.sample(SAMPLES // 10, k)[0]
        with torch.no_grad():
            off = (original(x) - result.network(x)).abs()
        outside += int((off > result.after.upper[0] + ROUNDING).any(1).sum())
    return {
        "pair": name,
        "regions": int(result.after.regions.sum()),
        "before": float(result.before.upper.max()),
        "least": float(result.least.max()) if result.least is not None else None,
        "after": float(result.after.upper.max()),
        "outside": outside,
        "CPU s": spent,
    }


# -- deployed -----------------------------------------------------------------------------------------


def deployed(pictures: networks.Pictures, iterations: int) -> list[dict[str, Any]]:
    """The published int8 network: calibrated, then its biases moved, then trained and moved in turn."""
    original, compressed = networks.published_pair()
    x = pictures.train_x[torch.randperm(len(pictures.train_x), generator=torch.Generator().manual_seed(0))[:10_000]]
    with torch.no_grad():
        data = x, original(x)
    result = tr.repair(
        original,
        compressed,
        networks.stars(networks.ten_images()[0]),
        target=None,
        method="auto",
        iterations=iterations,
        data=data,
        training=tr.RepairOptions(epochs=10, learning_rate=3e-4, data_weight=0.3),
        evaluate=lambda network: networks.accuracy(network, pictures) / 100,
    )
    return [
        {
            "step": step.iteration,
            "by": str(step.method) + (" (returned)" if k == result.index else ""),
            "mean": float(step.discrepancy.max_upper.mean()),
            "max": float(step.discrepancy.max_upper.max()),
            "accuracy %": 100 * (step.accuracy or 0.0),
            "seconds": step.seconds,
        }
        for k, step in enumerate(result.history)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--section", choices=("mnist", "acasxu", "deployed"), nargs="*", default=["mnist", "acasxu"])
    parser.add_argument("--networks", choices=("pruned", "int4"), nargs="*", default=["pruned", "int4"])
    parser.add_argument("--epochs", type=int, default=1200, help="epochs of the long retraining (default: 1200)")
    parser.add_argument("--regions", type=int, default=20_000, help="most regions of an ACAS Xu box (default: 20000)")
    parser.add_argument("--iterations", type=int, default=6, help="iterations of the deployed repair (default: 6)")
    args = parser.parse_args(argv)
    common.headline(args)
    networks.quiet()
    rows, problems = [], []
    if "acasxu" in args.section:
        found = acasxu(args.regions)
        common.show(found, ACAS_COLUMNS, "ACAS Xu, 30 % pruned: certified max |y1 - y2| over whole boxes")
        problems += [f"{row['pair']}: {row['outside']} samples outside" for row in found if row["outside"]]
        rows += found
    if set(args.section) & {"mnist", "deployed"}:
        pictures = networks.pictures()
        compressions = {"pruned": lambda f: tr.prune_weights(f, 0.8), "int4": lambda f: tr.quantize_weights(f, 4)}
        if "mnist" in args.section:
            for name in args.networks:
                found = digits(name, compressions[name], pictures, args.epochs)
                common.show(found, COLUMNS, f"{name}: certified max |y1 - y2| of each image's box")
                rows += found
        if "deployed" in args.section:
            found = deployed(pictures, args.iterations)
            common.show(found, DEPLOYED_COLUMNS, "Published int8 network: certified max |y1 - y2| of each image's box")
            rows += found
    return common.finish("solve", args, rows, problems)


if __name__ == "__main__":
    sys.exit(main())
