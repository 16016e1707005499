"""Draws the README's first picture: TFLite Micro's hello_world, which learnt the sine, beside its int8 copy.

Both files lie in docs/hello_world. Fails where an output that is drawn lies outside of the certified band.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import torchreach as tr
from torchreach.app.report.pictures import AFTER, BEFORE, INK, ORIGINAL
from torchreach.core.outward import at_most

DOCS = Path(__file__).resolve().parents[1] / "docs"
FILES = tuple(DOCS / "hello_world" / f"hello_world_{kind}.tflite" for kind in ("float", "int8"))
PICTURE = DOCS / "pictures" / "hello_world.png"
POINTS = 8_001  # some thirty for each of the 256 input codes
BAND = "#f6e3cf"


def outputs(networks: list[nn.Module], x: Tensor) -> list[Tensor]:
    """y1 and y2, in float64, at the inputs x."""
    with torch.no_grad():
        return [network(x.float()[:, None]).double().flatten() for network in networks]


def draw(networks: list[nn.Module], found: tr.Discrepancy, x: Tensor) -> Figure:
    """Above both networks inside the band, below their difference, on its own scale."""
    low, high, at = float(found.range_lower), float(found.range_upper), found.witness.flatten()
    (y1, y2), (at1, at2) = outputs(networks, x), outputs(networks, at)
    dot = {"color": AFTER, "ls": "", "marker": "o", "ms": 6, "zorder": 5}
    figure = Figure(figsize=(8.4, 5.2), layout="constrained", facecolor="white")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 3))
    top.fill_between(x, y1 - high, y1 - low, color=BAND, lw=0, label="where y2 is certified to lie")
    top.plot(x, x.sin(), color="#999999", lw=1.2, ls=(0, (4, 3)), label="sin x")
    top.plot(x, y1, color=ORIGINAL, lw=1.4, label="y1, float32")
    top.plot(x, y2, color=BEFORE, lw=1.4, label="y2, int8")
    top.plot(at, at2, **dot, label="largest |y1 − y2|, attained")
    top.legend(frameon=False, fontsize=9)
    top.set_ylabel("output")
    below.axhspan(low, high, color=BAND, lw=0)
    below.axhline(0, color=ORIGINAL, lw=0.8)
    below.plot(x, y1 - y2, color=BEFORE, lw=1.0)
    below.plot(at, at1 - at2, **dot)
    below.set_yticks([low, 0, high], [f"−{at_most(-low, 3)}", "0", at_most(high, 4)])
    below.margins(y=0.08)
    below.set_ylabel("y1 − y2")
    below.set_xlabel("input x")
    below.set_xticks([k * math.pi / 2 for k in range(5)], ["0", "π/2", "π", "3π/2", "2π"])
    below.set_xlim(0, 2 * math.pi)
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, colors=INK)
    figure.align_ylabels()
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the PNG file (default: the README's)")
    args = parser.parse_args(argv)
    networks = [tr.load(path) for path in FILES]
    found = tr.discrepancy(*networks, tr.StarBatch.from_box(torch.zeros(1), torch.full((1,), 2 * math.pi)))
    x = torch.linspace(0, 2 * math.pi, POINTS)
    draw(networks, found, x).savefig(args.picture, dpi=130, metadata={"Software": None})
    y1, y2 = outputs(networks, x)
    outside = int(((y1 - y2 < found.range_lower) | (y1 - y2 > found.range_upper)).sum())
    print(f"certified |y1 - y2| <= {at_most(float(found.upper), 5)}, {outside} of {POINTS} outside: {args.picture}")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
