"""Layers left in float for a certified tolerance: in the order of certified differences, or of sampled ones.

MLPerf Tiny's autoencoder and the paper's original network, each against a copy with 4-bit weights, around real inputs.
The tolerances are shares of the whole certified difference; each comparison has `--seconds`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

import torchreach as tr
from benchmarks import common, exact_mnist
from benchmarks.search import timed, tiny_inputs

BITS = 4
SHARES = (0.5, 0.25, 0.1)
COLUMNS = ("network", "layers", "certified", "allowed", "kept: certified", "kept: sampled", "kept: SQNR", "CPU s")


def problems() -> dict[str, tuple[nn.Module, tr.StarBatch]]:
    """Network and input set by name."""
    scale, frames = tiny_inputs()["ad01"]
    folder = common.require_folder()
    images = torch.from_numpy(np.load(folder / "fnn_repair" / "images.npy"))
    return {
        "ad01": (
            tr.load(folder / "mlperf_tiny" / "ad01_float.onnx"),
            tr.StarBatch.from_image(frames[0], scale / 1024),
        ),
        "paper": (
            exact_mnist.networks()[0],
            tr.StarBatch.from_image(images[0].double().flatten()[None], 0.01, clip=(-1, 1)),
        ),
    }


def rows(args: argparse.Namespace) -> list[dict]:
    found = []
    for name, (network, stars) in problems().items():
        copy = tr.quantize_weights(network, BITS)
        part, _ = timed(lambda n=network, c=copy, s=stars: tr.attribute(n, c, s))
        whole = float(part.bound.max())
        orders = {
            "certified": part.order,
            "sampled": [part.layers[k] for k in part.sampled_max.argsort(descending=True).tolist()],
            "SQNR": [part.layers[k] for k in part.sqnr.argsort().tolist()],
        }
        for share in SHARES:
            row = {"network": name, "layers": len(part.layers), "certified": whole, "allowed": share * whole}
            seconds = 0.0
            for kind, order in orders.items():
                budget = tr.Budget(seconds=args.seconds)
                kept, took = timed(
                    lambda n=network, c=copy, s=stars, a=share * whole, o=order, b=budget: tr.keep_float(
                        n, c, s, a, order=o, budget=b
                    )
                )
                seconds += took
                row[f"kept: {kind}"] = len(kept.kept) if kept.satisfied else "undecided"
            found.append({**row, "CPU s": seconds})
            common.say(f"{name} {share}: {found[-1]}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="budget of each choice of layers (default: 60)")
    args = parser.parse_args(argv)
    common.headline(args)
    found = rows(args)
    common.show(found, COLUMNS, "layers left in float")
    return common.finish("attribution", args, found, [])


if __name__ == "__main__":
    sys.exit(main())
