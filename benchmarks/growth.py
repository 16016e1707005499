"""How the cost of exact reach grows: with the number of regions, with the input dimension, with the width.

Regions: one ACAS Xu network on growing parts of its property 1 box. Input dimension: the MNIST pair on growing
blocks of pixels, eps chosen for some hundred stars each. Width: random networks of two hidden layers on boxes
that shrink with the width, so that the number of regions stays of one order.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import torchreach as tr
from benchmarks import common, exact_mnist
from tests.networks import random_network

COLUMNS = ("sweep", "size", "regions", "method", "CPU s", "wall s", "CPU ms / region", "peak MB")
NETWORK = "acasxu/ACASXU_run2a_4_2_batch_2000.onnx"
FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
# side of the block of pixels, and eps
BLOCKS = ((1, 0.5), (2, 0.5), (3, 0.1), (4, 0.05), (5, 0.03), (8, 0.012), (12, 0.006), (20, 0.003), (28, 0.0015))
WIDTHS = (16, 32, 64, 128, 256, 512)


def by_regions() -> list[tuple[float, nn.Module, tr.StarBatch]]:
    """Parts of the property 1 box of network 4_2, by their share of its side."""
    network = tr.load(common.require_folder() / NETWORK)
    box = tr.StarBatch.from_vnnlib(common.require_folder() / "acasxu" / "prop_1.vnnlib")
    middle, radius = (box.lower[0] + box.upper[0]) / 2, (box.upper[0] - box.lower[0]) / 2
    return [(f, network, tr.StarBatch.from_box(middle - f * radius, middle + f * radius)) for f in FRACTIONS]


def by_inputs() -> list[tuple[float, nn.Module, tr.StarBatch]]:
    """The MNIST pair on a block of pixels in the middle of image 3, by the number of pixels."""
    merged = tr.merge(*exact_mnist.networks())
    cases = []
    for side, eps in BLOCKS:
        first = (28 - side) // 2
        pixels = [(i, j) for i in range(first, first + side) for j in range(first, first + side)]
        record = {"image_index": 3, "pixels": pixels, "eps": eps}
        cases.append((side * side, merged, exact_mnist.input_star(record, "cpu")))
    return cases


def by_width() -> list[tuple[float, nn.Module, tr.StarBatch]]:
    """Random networks 5-w-w-2, by w."""
    middle = torch.full((5,), 0.3, dtype=torch.float64)
    return [(w, random_network(w, [5, w, w, 2]), tr.StarBatch.from_box(middle - 6 / w, middle + 6 / w)) for w in WIDTHS]


SWEEPS = {"regions": by_regions, "inputs": by_inputs, "width": by_width}


def draw(rows: list[dict], path: Path) -> None:
    """One panel per sweep, logarithmic."""
    from matplotlib.figure import Figure

    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    figure = Figure(figsize=(4 * len(sweeps), 3.6), layout="constrained")
    panels = figure.subplots(1, len(sweeps), squeeze=False)[0]
    labels = {
        "regions": ("linear regions", "CPU seconds", "regions", "CPU s"),
        "inputs": ("perturbed inputs (MNIST pair)", "CPU milliseconds per region", "size", "CPU ms / region"),
        "width": ("neurons per hidden layer", "CPU milliseconds per region", "size", "CPU ms / region"),
    }
    colours = {"vertices": "#1f6f8b", "programs": "#c8553d"}
    for panel, sweep in zip(panels, sweeps, strict=True):
        x_label, y_label, x, y = labels[sweep]
        mine = [row for row in rows if row["sweep"] == sweep]
        panel.plot([r[x] for r in mine], [r[y] for r in mine], color="#bbbbbb", zorder=1)
        for method, colour in colours.items():
            chosen = [r for r in mine if r["method"] == method]
            if chosen:
                panel.scatter([r[x] for r in chosen], [r[y] for r in chosen], color=colour, label=method, zorder=2)
        panel.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        low, high = min(r[y] for r in mine), max(r[y] for r in mine)
        if high < 10 * low:  # at least a decade, or noise looks like a trend
            panel.set_ylim(low / 3, high * 3)
        if x == "size":
            sizes = [r[x] for r in mine]
            panel.set_xticks(sizes, [f"{size:g}" for size in sizes], fontsize=7)
            panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
        panel.legend(title="engine", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--sweep", action="append", choices=list(SWEEPS), help="only this one; may be repeated")
    parser.add_argument("--largest", type=float, help="leave out sizes above this")
    parser.add_argument("--picture", type=Path, help="draw the sweeps into this PNG file")
    args = parser.parse_args(argv)
    common.headline(args)
    rows = []
    for sweep in args.sweep or SWEEPS:
        for size, module, stars in SWEEPS[sweep]():
            if args.largest is not None and size > args.largest:
                continue
            reached, timing = common.measure(
                lambda m=module, s=stars: tr.reach(m, s, keep_stars=False), repeats=args.repeats
            )
            rows.append(
                {
                    "sweep": sweep,
                    "size": size,
                    "regions": len(reached),
                    "method": reached.stats.method,
                    "CPU s": timing.cpu_seconds,
                    "wall s": timing.seconds,
                    "CPU ms / region": 1000 * timing.cpu_seconds / len(reached),
                    "peak MB": timing.peak_rss_mb,
                    "timing": timing.__dict__,
                    "counts": common.counts(reached.stats),
                }
            )
            common.say(f"{sweep} {size}: {len(reached)} regions, {timing.cpu_seconds:.3g} CPU s")
    common.show(rows, COLUMNS, "How cost grows")
    if args.picture is not None:
        draw(rows, args.picture)
    return common.finish("growth", args, rows, [])


if __name__ == "__main__":
    sys.exit(main())
