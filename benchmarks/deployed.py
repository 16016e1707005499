"""Certified ranges of deployed int8 networks against what torch's int8 kernels compute.

The paper's original against its int8 network as shipped, and against the same weights calibrated on its ten images,
on sets from four pixels to all 784. Every set is sampled on every engine of torch: the exit status is 1 if one
difference lies outside of the certified range, or a witness does not replay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import torchreach as tr
from benchmarks import common, paper_networks

COLUMNS = (
    "network",
    "image",
    "pixels",
    "eps",
    "method",
    "status",
    "cells",
    "certified",
    "attained",
    "sampled",
    "CPU s",
)
# onednn's kernel takes 10 ms a sample here once zero points are not 0, fbgemm's a thousandth of that.
SHARE = {"onednn": 0.01}
ENGINES = [name for name in ("fbgemm", "onednn", "x86") if name in torch.backends.quantized.supported_engines]
SETS = ((4, 0.05), (4, 0.15), (16, 0.05), (784, 0.01))


def block(pixels: int) -> Tensor:
    """Mask [784] of a square of pixels in the middle, or of all."""
    side = round(pixels**0.5)
    first = (28 - side) // 2
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[first : first + side, first : first + side] = True
    return mask.flatten()


def on_engine(engine: str, make: Callable[[], nn.Module]) -> nn.Module:
    """A network whose weights are packed for `engine`."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        return make()
    finally:
        torch.backends.quantized.engine = before


def differences(original: nn.Module, small: nn.Module, x: Tensor) -> Tensor:
    """y1 - y2 of inputs in the copy's own dtype; kernels of codes take float32."""
    dtype = next((parameter.dtype for parameter in small.parameters()), torch.float32)
    with torch.no_grad():
        parts = [original(part.double()) - small(part).double() for part in x.to(dtype).split(10_000)]
    return torch.cat(parts)


def certify(
    original: nn.Module, copies: dict[str, nn.Module], stars: tr.StarBatch, args, gap: float | None = None
) -> dict[str, Any]:
    """Certified and attained difference from the first copy on one star, and what inputs of it show on each copy.

    The copies are one network, by the engine that executes it.
    """
    small = next(iter(copies.values()))
    budget = tr.Budget(seconds=args.seconds)
    found, timing = common.measure(
        lambda: tr.discrepancy(original, small, stars, budget=budget, gap=gap), repeats=args.repeats, warmup=0
    )
    outside, largest, replayed = 0, 0.0, True
    for engine, network in copies.items():
        count = max(int(args.samples * SHARE.get(engine, 1)), 1)
        y = differences(original, network, stars.sample(count, seed=len(engine))[0])
        outside += int(((y < found.range_lower[0] - 1e-9) | (y > found.range_upper[0] + 1e-9)).any(1).sum())
        largest = max(largest, float(y.abs().max()))
        y = differences(original, network, found.witness[0]).diagonal().abs()
        replayed &= bool((y >= found.lower[0] - 1e-6).all())
    return {
        "method": found.stats.method,
        "status": found.status[0].value,
        "cells": int(found.regions),
        "certified": float(found.max_upper),
        "attained": float(found.max_lower),
        "sampled": largest,
        "CPU s": timing.cpu_seconds,
        "outside": outside,
        "replayed": replayed,
        "timing": timing.__dict__,
    }


def measure(name: str, kernels: dict[str, nn.Module], original: nn.Module, image: int, shape: tuple, args) -> dict:
    """One row of the table."""
    pixels, eps = shape
    images = paper_networks.ten_images()[0]
    stars = tr.StarBatch.from_image(images[image : image + 1], eps, block(pixels))
    row = {"network": name, "image": image, "pixels": pixels, "eps": eps}
    return row | certify(original, kernels, stars, args)


def calibrated(engine: str) -> nn.Module:
    """The paper's weights, calibrated on its ten images, packed for `engine`."""
    float_network, images = paper_networks.published_pair()[0], paper_networks.ten_images()[0]
    return on_engine(engine, lambda: paper_networks.deployed(float_network, images.float()))


def refuted(what: str, row: dict[str, Any]) -> list[str]:
    """What inputs show to be wrong with a certificate and its witnesses."""
    found = [f"{what}: {row['outside']} samples outside of the certified range"] if row["outside"] else []
    return found if row["replayed"] else [*found, f"{what}: a witness does not replay"]


def problems(row: dict[str, Any]) -> list[str]:
    """What this row shows to be wrong."""
    return refuted(f"{row['network']}, image {row['image']}, {row['pixels']} pixels", row)


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[0, 3, 7], help="of the ten (default: 0 3 7)")
    parser.add_argument("--samples", type=int, default=100_000, help="of every set, less on onednn (default: 100000)")
    parser.add_argument("--seconds", type=float, default=60.0, help="budget of one run (default: 60)")
    parser.add_argument("--pixels", type=int, nargs="+", default=[4, 16, 784], help="(default: 4 16 784)")
    args = parser.parse_args(argv)
    common.headline(args)
    paper_networks.quiet()
    double = paper_networks.published_pair()[0].double()
    makers = {
        "shipped": lambda engine: on_engine(engine, lambda: paper_networks.published_pair()[1]),
        "calibrated": calibrated,
    }
    rows = []
    for name, make in makers.items():
        kernels = {engine: make(engine) for engine in ENGINES}
        for image in args.images:
            for shape in SETS:
                if shape[0] in args.pixels:
                    rows.append(measure(name, kernels, double, image, shape, args))
                    common.say(f"{name} {image} {shape}: {rows[-1]['CPU s']:.3g} CPU s")
    common.show(rows, COLUMNS, "Deployed int8 networks, largest |y1 - y2|")
    return common.finish("deployed", args, rows, [p for row in rows for p in problems(row)])


if __name__ == "__main__":
    sys.exit(main())
