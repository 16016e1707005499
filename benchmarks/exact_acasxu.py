"""Exact reach on every ACAS Xu case with a known number of regions, one network or a pair of them.

Each row: regions counted and expected, the largest deviation from the recorded exact range, CPU and wall
seconds, and what two public tools took (recorded in another run on another machine: no ratio is taken).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import torchreach as tr
from benchmarks import common

COLUMNS = ("case", "regions", "expected", "deviation", "gap", "CPU s", "wall s", "regions / CPU s", "peak MB")
RECORDED = ("veritex CPU s*", "nnenum CPU s*")
NOTE = "* recorded, other run and other machine"
# The recorded ranges come from linear programs and vertices in float64, good to about 1e-11.
TOLERANCE = 1e-9


def measure(case: common.Case, method: tr.Exact, repeats: int, device: str) -> dict:
    """One row of the table."""
    networks = [network.double().to(device) for network in case.networks()]
    box = case.box().to(device)
    stars = tr.StarBatch.from_box(box[:, 0], box[:, 1])
    module = networks[0] if len(networks) == 1 else tr.merge(networks[0], networks[1])
    reached, timing = common.measure(
        lambda: tr.reach(module, stars, method, keep_stars=False), repeats=repeats, device=device
    )
    low, high = case.recorded_range()
    deviation = max((reached.lower[0].cpu() - low).abs().max(), (reached.upper[0].cpu() - high).abs().max())
    gap = max((reached.upper - reached.attained_upper).max(), (reached.attained_lower - reached.lower).max())
    return {
        "case": case.name,
        "regions": len(reached),
        "expected": case.expected,
        "deviation": float(deviation),
        "gap": float(gap),
        "CPU s": timing.cpu_seconds,
        "wall s": timing.seconds,
        "regions / CPU s": len(reached) / timing.cpu_seconds,
        "peak MB": timing.peak_rss_mb,
        "peak device MB": timing.peak_device_mb,
        **dict(zip(RECORDED, map(case.recorded_cpu, ("veritex", "nnenum")), strict=True)),
        "timing": timing.__dict__,
        "counts": common.counts(reached.stats),
    }


def problems(row: dict) -> list[str]:
    """What this row shows to be wrong."""
    found = []
    if row["expected"] is not None and row["regions"] != row["expected"]:
        found.append(f"{row['case']}: {row['regions']} regions, expected {row['expected']}")
    if row["deviation"] > TOLERANCE:
        found.append(f"{row['case']}: the range deviates by {row['deviation']:.2g} from the recorded one")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--regions", type=int, default=20_000, help="largest case (default: 20000)")
    parser.add_argument("--case", action="append", help="only the case of this name; may be repeated")
    parser.add_argument("--method", default="auto", help="tr.Exact(method=...) (default: auto)")
    parser.add_argument("--root-bounds", default="auto", help="tr.Exact(root_bounds=...) (default: auto)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    common.headline(args)
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit(f"no device {args.device} here")
    rows = []
    for case in common.choose(common.acasxu_cases(args.regions), args.case):
        rows.append(measure(case, tr.Exact(args.method, args.root_bounds), args.repeats, args.device))
        common.say(f"{case.name}: {rows[-1]['CPU s']:.3g} CPU s")
    columns = [*COLUMNS, *(["peak device MB"] if args.device != "cpu" else []), *RECORDED]
    common.show(rows, columns, "Exact reach, ACAS Xu", NOTE)
    return common.finish("exact_acasxu", args, rows, [p for row in rows for p in problems(row)])


if __name__ == "__main__":
    sys.exit(main())
