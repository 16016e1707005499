"""The project's table: how tight certificates are and how fast enumeration is, beside what was recorded and asked.

weights: the MNIST pair, every pixel within eps, clipped to [-1, 1]: certified over attained difference.
deployed: the paper's original against its weights calibrated to int8, as the kernels execute them.
cnn: two convolutional networks on scikit-learn's digits, int8, four pixels of held-out digits within 0.05.
mnist: recorded CPU seconds of the paper's code over ours, exact enumeration.
acasxu: CPU seconds for the 71,930 regions of network 1_1 on the box of property 3.

Every certificate is sampled, the deployed ones on torch's kernels, and every witness replayed: the exit status is 1
if one fails, or if an enumeration counts wrong.
"""

from __future__ import annotations

import json
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import torchreach as tr
from benchmarks import common, deployed, exact_acasxu, exact_mnist, kernels, labels, paper_networks, search

Rows = Iterator[dict[str, Any]]
COLUMNS = ("work", "image", "certified", "attained", "sampled", "ratio", "speed-up", "CPU s")
SUMMARY = ("work", "then", "asked", "now", "median", "met", "CPU s")
NOTE = "now: smallest .. largest; met: how many of them are within what is asked; CPU s: median"
TEN = 10
ACASXU = "1_1 prop_3 full"
# Below this the fixed cost of a call decides.
RECORDED_SECONDS, PIXELS = 3.0, 9


@dataclass(frozen=True)
class Work:
    """One row of the table: `asked` bounds what `measured` names, from below for a speed-up."""

    title: str
    then: str
    asked: float
    run: Callable[[Namespace], Rows]
    measured: str = "ratio"

    def met(self, value: float) -> bool:
        return value >= self.asked if self.measured == "speed-up" else value <= self.asked


def pictures(args: Namespace) -> Iterator[tuple[str, Tensor]]:
    """Name and pixels [1, 784] in [-1, 1]: some of the paper's ten, and test pictures that are none of them."""
    ten = paper_networks.ten_images()[0]
    yield from ((str(i), ten[i : i + 1]) for i in args.images)
    if args.held_out:
        fresh = paper_networks.held_out(paper_networks.pictures(), args.held_out)
        yield from ((f"test {i}", x[None]) for i, x in enumerate(fresh))


def certified(image: str, row: dict[str, Any]) -> dict[str, Any]:
    row |= {"image": image, "ratio": row["certified"] / max(row["attained"], 1e-300)}
    return row | {"problems": deployed.refuted(f"image {image}", row)}


def weights(eps: float, args: Namespace) -> Rows:
    original, small = exact_mnist.networks()
    for image, x in pictures(args):
        stars = tr.StarBatch.from_image(x, eps, clip=(-1, 1))
        yield certified(image, deployed.certify(original, {"float64": small}, stars, args, search.CLOSED))


def on_kernels(pixels: int, eps: float, args: Namespace) -> Rows:
    original = paper_networks.published_pair()[0].double()
    copies = {engine: deployed.calibrated(engine) for engine in deployed.ENGINES}
    for image, x in pictures(args):
        stars = tr.StarBatch.from_image(x, eps, deployed.block(pixels))
        yield certified(image, deployed.certify(original, copies, stars, args))


def convolutions(args: Namespace) -> Rows:
    """Networks of `labels.py` and `kernels.py`, trained on the first digits; images are of the others."""
    x, y = kernels.digits()
    data = x[: labels.TRAIN]
    originals = {"strides": labels.networks()["convolution"][0].float()}
    torch.manual_seed(0)
    originals["pooling"] = kernels.trained(kernels.pooling(), data, y[: labels.TRAIN], epochs=4)
    indices = [*args.images, *range(TEN, TEN + args.held_out)]
    for name, original in originals.items():
        make = partial(kernels.int8, original, data)
        copies = {engine: deployed.on_engine(engine, make) for engine in deployed.ENGINES}
        original.double()
        for i in indices:
            stars = kernels.pixels(x[labels.TRAIN + i], 0.05, 2)
            row = deployed.certify(original, copies, stars, args)
            yield certified(f"{name} {i}", row)


def mnist(args: Namespace) -> Rows:
    """Cases of 9 pixels and more that the paper's code finished in no less than `RECORDED_SECONDS`."""
    pair = exact_mnist.networks()
    options = Namespace(device="cpu", method="auto", seconds=600.0, warmup=1, repeats=args.repeats)
    for record in json.loads((common.require_folder() / "fnn_repair" / "scaling.json").read_text())["cases"]:
        known = record["seed_code_stars"] is not None and record["predicates"] >= PIXELS
        if known and record["seed_code_reach_cpu_s"] >= RECORDED_SECONDS and record["seed_code_stars"] <= args.stars:
            row = exact_mnist.measure(record, pair, options)
            speed_up = row[exact_mnist.RECORDED[1]]
            yield row | {"image": row["case"], "speed-up": speed_up, "problems": exact_mnist.problems(row)}


def acasxu(args: Namespace) -> Rows:
    (case,) = common.choose(common.acasxu_cases(10**5), [ACASXU])
    row = exact_acasxu.measure(case, tr.Exact(), args.repeats, "cpu")
    yield row | {"image": row["case"], "problems": exact_acasxu.problems(row)}


TABLE = {
    "weights-0.02": Work("weights int8, 784 pixels ± 0.02", "1.00 .. 1.26", 1.02, partial(weights, 0.02)),
    "weights-0.05": Work("weights int8, 784 pixels ± 0.05", "1.3 .. 2.6", 1.2, partial(weights, 0.05)),
    "weights-0.1": Work("weights int8, 784 pixels ± 0.1", "3.2 .. 3.8", 2.0, partial(weights, 0.1)),
    "deployed-784": Work("deployed int8, 784 pixels ± 0.01", "2.33 / 0.706", 1.5, partial(on_kernels, 784, 0.01)),
    "deployed-16": Work("deployed int8, 16 pixels ± 0.05", "1.15 / 0.287", 1.3, partial(on_kernels, 16, 0.05)),
    "cnn": Work("deployed CNNs on digits, 4 pixels ± 0.05", "2.2-2.95 / 0.34-0.78 (sampled)", 1.5, convolutions),
    "mnist": Work("MNIST enumeration, times faster than recorded", "23 .. 56", 100.0, mnist, "speed-up"),
    "acasxu": Work("ACAS Xu enumeration, 71,930 regions, CPU s", "2.3", 1.2, acasxu, "CPU s"),
}


def summary(work: Work, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the table: smallest .. largest and median of what was measured."""
    values = [row[work.measured] for row in rows]
    ends = [common.text(float(end)) for end in (min(values), max(values))]
    return {
        "work": work.title,
        "then": work.then,
        "asked": work.asked,
        "now": " .. ".join(dict.fromkeys(ends)),
        "median": statistics.median(values),
        "met": f"{sum(map(work.met, values))} of {len(values)}",
        "CPU s": statistics.median(row["CPU s"] for row in rows),
    }


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.set_defaults(repeats=1)
    parser.add_argument("--rows", nargs="+", choices=list(TABLE), default=list(TABLE), help="(default: all)")
    parser.add_argument("--images", type=int, nargs="+", choices=range(TEN), default=list(range(TEN)), metavar="I",
                        help="of the ten (default: all)")  # fmt: skip
    parser.add_argument("--held-out", type=int, default=0, metavar="N", help="and N test pictures (default: 0)")
    parser.add_argument("--seconds", type=float, default=60.0, help="budget of each certificate (default: 60)")
    parser.add_argument("--samples", type=int, default=10_000, help="of each set, less on onednn (default: 10000)")
    parser.add_argument("--stars", type=int, default=10**6, help="largest MNIST enumeration (default: all)")
    args = parser.parse_args(argv)
    common.headline(args)
    paper_networks.quiet()
    rows, lines = [], []
    for key in args.rows:
        work, found = TABLE[key], []
        for row in work.run(args):
            found.append({"key": key, "work": work.title, **row})
            common.say(f"{key}, {row['image']}: {row[work.measured]:.3g}, {row['CPU s']:.3g} CPU s")
        rows += found
        lines += [summary(work, found)] if found else []
    common.show(rows, COLUMNS, "Every measurement")
    common.show(lines, SUMMARY, "Table", NOTE)
    wrong = [f"{row['work']}: {problem}" for row in rows for problem in row["problems"]]
    return common.finish("table", args, [*rows, *({"summary": True, **line} for line in lines)], wrong)


if __name__ == "__main__":
    sys.exit(main())
