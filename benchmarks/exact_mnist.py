"""Exact discrepancy of the MNIST pair on boxes of 1 to 784 pixels, with the recorded cost of the paper's code.

Input dimension grows from 1 to 784, so vertices give way to linear programs. The recorded seconds are of
another run on another machine: their ratio to ours says an order of magnitude, no more.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn

import torchreach as tr
from benchmarks import common
from tests.networks import from_arrays

COLUMNS = ("case", "inputs", "stars", "expected", "status", "deviation", "gap", "CPU s", "wall s", "programs")
RECORDED = ("paper's code CPU s*", "times fewer*")
NOTE = "* CPU seconds of the paper's code are recorded: other run, other machine"
# The recorded ranges are of float32 stars.
TOLERANCE = 1e-5
# One region, 5e-8 wide in the input's units, is lost in float32; HiGHS finds it with a margin of 2.6e-5 of the box.
OUR_COUNT = {"img3_p784_eps0.002": 1834}


def networks() -> tuple[nn.Module, nn.Module]:
    """Original and weight-dequantised network, float64."""
    folder = common.require_folder() / "fnn_repair"
    files = [load_file(folder / name) for name in ("original.safetensors", "quantized_dequantized.safetensors")]
    return tuple(  # type: ignore[return-value]
        from_arrays([f[f"fc{i}.weight"] for i in (1, 2, 3)], [f[f"fc{i}.bias"] for i in (1, 2, 3)]) for f in files
    )


def input_star(record: dict, device: str) -> tr.StarBatch:
    """The image with its listed pixels within eps."""
    images = np.load(common.require_folder() / "fnn_repair" / "images.npy")
    image = torch.from_numpy(images)[record["image_index"]].double().flatten()[None]
    mask = torch.zeros(28, 28, dtype=torch.bool)
    if record["pixels"] == "all":
        mask[:] = True
    else:
        mask[tuple(torch.tensor(record["pixels"]).T)] = True
    return tr.StarBatch.from_image(image.to(device), record["eps"], mask.flatten())


def measure(record: dict, pair: tuple[nn.Module, nn.Module], args) -> dict:
    """One row of the table."""
    stars = input_star(record, args.device)
    method, budget = tr.Exact(args.method), tr.Budget(seconds=args.seconds)
    found, timing = common.measure(
        lambda: tr.discrepancy(*pair, stars, method, budget=budget),
        repeats=args.repeats,
        warmup=args.warmup,
        device=args.device,
    )
    deviation = None
    if record["lower"] is not None and found.status[0] is tr.Status.EXACT:
        low, high = torch.tensor(record["lower"]).double(), torch.tensor(record["upper"]).double()
        low_off, high_off = found.range_lower[0].cpu() - low, found.range_upper[0].cpu() - high
        deviation = float(max(low_off.abs().max(), high_off.abs().max()))
    counted = common.counts(found.stats)
    return {
        "case": record["name"],
        "inputs": record["predicates"],
        "stars": int(found.regions),
        "expected": record["seed_code_stars"],
        "status": found.status[0].value,
        "deviation": deviation,
        "gap": float((found.upper - found.lower).max()),
        "CPU s": timing.cpu_seconds,
        "wall s": timing.seconds,
        "programs": counted["programs"],
        RECORDED[0]: record["seed_code_reach_cpu_s"],
        "recorded status": record["seed_code_status"],
        # a run of theirs that did not finish gives a lower bound of the ratio
        RECORDED[1]: record["seed_code_reach_cpu_s"] / timing.cpu_seconds,
        "timing": timing.__dict__,
        "counts": counted,
    }


def problems(row: dict) -> list[str]:
    """What this row shows to be wrong."""
    if row["status"] != "exact":
        # where nobody else finished either, how far it got is the result
        return [] if row["expected"] is None else [f"{row['case']}: the budget ended after {row['stars']} stars"]
    found = []
    expected = OUR_COUNT.get(row["case"], row["expected"])
    if expected is not None and row["stars"] != expected:
        found.append(f"{row['case']}: {row['stars']} stars, expected {expected}")
    if row["deviation"] is not None and row["deviation"] > TOLERANCE:
        found.append(f"{row['case']}: the range deviates by {row['deviation']:.2g} from the recorded one")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--stars", type=int, default=700, help="largest case with a known count (default: 700)")
    parser.add_argument("--unknown", action="store_true", help="also the cases that the paper's code did not finish")
    parser.add_argument("--case", action="append", help="only the case of this name; may be repeated")
    parser.add_argument("--seconds", type=float, default=600.0, help="budget of one run (default: 600)")
    parser.add_argument("--warmup", type=int, default=1, help="runs of each case before the timed ones (default: 1)")
    parser.add_argument("--method", default="auto", help="tr.Exact(method=...) (default: auto)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    common.headline(args)
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit(f"no device {args.device} here")
    records = json.loads((common.require_folder() / "fnn_repair" / "scaling.json").read_text())["cases"]
    known = [r for r in records if r["seed_code_stars"] is not None and r["seed_code_stars"] <= args.stars]
    chosen = sorted(known, key=lambda r: (r["predicates"], r["seed_code_stars"]))
    if args.unknown:
        chosen += [r for r in records if r["seed_code_stars"] is None]
    cases = common.choose([common.Case(r["name"], r, r["seed_code_stars"]) for r in chosen], args.case)
    pair = tuple(network.to(args.device) for network in networks())
    rows = []
    for case in cases:
        rows.append(measure(case.record, pair, args))  # type: ignore[arg-type]
        common.say(f"{case.name}: {rows[-1]['CPU s']:.3g} CPU s")
    common.show(rows, [*COLUMNS, *RECORDED], "Exact discrepancy, MNIST", NOTE)
    return common.finish("exact_mnist", args, rows, [p for row in rows for p in problems(row)])


if __name__ == "__main__":
    sys.exit(main())
