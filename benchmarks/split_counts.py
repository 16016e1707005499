"""The same work on every device, in both dtypes, with and without auto_LiRPA: the counts must agree.

Geometry is float64 whatever the dtype of the input set, so for one case

    regions, and stars and splits of every layer,     agree over devices, dtypes and root bounds;
    neurons settled by each test, in every layer,     agree over devices and dtypes (vertices only: which
                                                      linear program settles a neuron is a matter of rounding).

The boxes are rounded to float32 first, so that both dtypes hold the same set. Exit status 1 if counts differ.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import torchreach as tr
from benchmarks import common

BOUNDS = ("lirpa", "zonotope", "none")
COLUMNS = (
    *("case", "device", "dtype", "root bounds", "method", "regions", "splits by layer", "settled", "programs"),
    *("CPU s", "wall s"),
)


def measure(case: common.Case, device: str, dtype: str, bounds: str, method: str, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    networks = [network.float().to(device, common.DTYPES[dtype]) for network in case.networks()]
    box = case.box().float().to(device, common.DTYPES[dtype])
    stars = tr.StarBatch.from_box(box[:, 0], box[:, 1])
    module = networks[0] if len(networks) == 1 else tr.merge(networks[0], networks[1])
    reached, timing = common.measure(
        lambda: tr.reach(module, stars, tr.Exact(method, bounds), keep_stars=False), repeats=repeats, device=device
    )
    counted = common.counts(reached.stats)
    tests = ", ".join(f"{test} {number:,}" for test, number in sorted(counted["settled"].items()))
    return {
        "case": case.name,
        "device": device,
        "dtype": dtype,
        "root bounds": bounds,
        "root bounds used": counted["root bounds"],
        "method": counted["method"],
        "regions": len(reached),
        "splits by layer": "+".join(str(layer["splits"]) for layer in counted["layers"]),
        "settled": tests,
        "programs": counted["programs"],
        "CPU s": timing.cpu_seconds,
        "wall s": timing.seconds,
        "peak MB": timing.peak_rss_mb,
        "peak device MB": timing.peak_device_mb,
        "timing": timing.__dict__,
        "layers": counted["layers"],
    }


def geometry(row: dict[str, Any]) -> dict[str, Any]:
    """What must agree in all rows of one case."""
    return {
        "regions": row["regions"],
        **{f"{key} of {layer['name']}": layer[key] for layer in row["layers"] for key in ("stars", "splits")},
    }


def settled(row: dict[str, Any]) -> dict[str, Any]:
    """What must agree in all rows of one case with the same root bounds."""
    return {
        f"neurons of {layer['name']} settled by {test}": number
        for layer in row["layers"]
        for test, number in layer["settled"].items()
    }


def disagreements(rows: list[dict[str, Any]]) -> list[str]:
    """Every count that differs where it must not, each compared with the first row of its kind."""
    found = []
    first: dict[tuple, tuple[dict, dict[str, Any]]] = {}

    def compare(key: tuple, row: dict[str, Any], values: dict[str, Any]) -> None:
        reference, expected = first.setdefault(key, (row, values))
        for name in expected.keys() | values.keys():
            if expected.get(name, 0) != values.get(name, 0):
                found.append(
                    f"{row['case']}: {name}: {values.get(name, 0)} ({label(row)}), "
                    f"{expected.get(name, 0)} ({label(reference)})"
                )

    for row in rows:
        compare((row["case"],), row, geometry(row))
        if row["method"] == "vertices":
            compare((row["case"], row["root bounds"]), row, settled(row))
    return found


def label(row: dict[str, Any]) -> str:
    return f"{row['device']}, {row['dtype']}, {row['root bounds']}, {row['method']}"


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--regions", type=int, default=3000, help="largest case (default: 3000)")
    parser.add_argument("--case", action="append", help="only the case of this name; may be repeated")
    parser.add_argument("--bounds", nargs="+", default=BOUNDS, choices=BOUNDS, help="default: all")
    parser.add_argument("--method", nargs="+", default=["vertices"], choices=("vertices", "programs"))
    args = parser.parse_args(argv)
    common.headline(args)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if len(devices) == 1:
        print("no CUDA device: only the dtypes and the root bounds are compared")
    rows = []
    for case in common.choose(common.acasxu_cases(args.regions), args.case):
        for method in args.method:
            for bounds in args.bounds:
                for device in devices:
                    for dtype in common.DTYPES:
                        rows.append(measure(case, device, dtype, bounds, method, args.repeats))
        common.say(f"{case.name}: done")
    if any(row["root bounds"] == "lirpa" and "LiRPA" not in row["root bounds used"] for row in rows):
        print("auto_LiRPA is not to be had here: rows called lirpa used zonotopes")
    common.show(rows, COLUMNS, "Counts by device, dtype and root bounds")
    return common.finish("split_counts", args, rows, disagreements(rows))


if __name__ == "__main__":
    sys.exit(main())
