"""What exact reach asks of an accelerator: launches, host reads, uploads and bytes, counted on a simulated device.

The device of the tests (tests/simulated_device.py) takes the batch sizes of CUDA and counts every operation, so the
numbers need no accelerator, and are the same in every run. Seconds are not measured: there is nothing to learn from
those of a simulation. The exit status is 1 where a count of regions is wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import nn

import torchreach as tr
from benchmarks import common, exact_mnist
from tests.simulated_device import NAME, WHY_NOT, Counts, counting

COLUMNS = (
    *("case", "method", "root bounds", "regions", "expected", "launches", "per region", "reads", "uploads", "MB"),
    "operations",
)
WHERE = ("case", "kind", "number", "share %", "operation", "line")
# One network and a pair, from little to much work; vertices, and programs (MNIST).
CASES = (
    *("3_7 prop_3 full", "3_7 prop_3 full identical", "2_3 prop_3 full", "1_1 prop_3 full"),
    *("img3_p4_eps0.2", "img3_p25_eps0.02", "img3_p784_eps0.001"),
)
MEMORY = tr.Budget(memory=40e9)  # half of a card of 80 GB; the simulation has none of its own
KINDS = ("launch", "read", "upload")


def cases() -> list[common.Case]:
    """Every case of ACAS Xu, and of the MNIST pair where the number of regions is known."""
    records = json.loads((common.require_folder() / "fnn_repair" / "scaling.json").read_text())["cases"]
    mnist = [
        common.Case(r["name"], r, exact_mnist.OUR_COUNT.get(r["name"], r["seed_code_stars"]))
        for r in records
        if r["seed_code_stars"] is not None
    ]
    return [*common.acasxu_cases(100_000), *mnist]


def instance(case: common.Case) -> tuple[nn.Module, tr.StarBatch]:
    """The network, merged where it is a pair, and the input set, both on the host."""
    if "pixels" in case.record:
        return tr.merge(*exact_mnist.networks()), exact_mnist.input_star(case.record, "cpu")
    networks, box = [network.double() for network in case.networks()], case.box()
    return (
        tr.merge(*networks) if case.is_pair else networks[0],
        tr.StarBatch.from_box(box[:, 0], box[:, 1]),
    )


def measure(case: common.Case, method: str, where: bool) -> tuple[dict, Counts]:
    """One row of the table, and all counts. The networks and the set are on the device before counting starts."""
    module, stars = instance(case)
    with counting():
        module, stars = module.to(NAME), stars.to(NAME)
        with counting(where=where) as counts:
            found = tr.reach(module, stars, tr.Exact(method), budget=MEMORY, keep_stars=False)
    launched = counts.of("launch")
    row = {
        "case": case.name,
        "method": found.stats.method,
        "root bounds": found.stats.root_bounds,
        "regions": len(found),
        "expected": case.expected,
        "launches": counts.launches,
        "per region": counts.launches / len(found),
        "reads": counts.reads,
        "uploads": counts.uploads,
        "MB": counts.bytes / 1e6,
        "operations": len({name for name, _ in launched}),
        "events": [[*event, number] for event, number in counts.events.most_common()],
        "counts": common.counts(found.stats),
    }
    return row, counts


def busiest(case: str, counts: Counts, most: int, by_line: bool) -> list[dict]:
    """The most frequent events of each kind, by operation or by operation and line."""
    rows = []
    for kind in KINDS:
        events = counts.of(kind)
        total = events.total()
        if not by_line:
            names = type(events)()
            for (name, _), number in events.items():
                names[name, ""] += number
            events = names
        for (name, line), number in events.most_common(most):
            share = 100 * number / total
            rows.append(
                {"case": case, "kind": kind, "number": number, "share %": share, "operation": name, "line": line}
            )
    return rows


def problems(row: dict) -> list[str]:
    """What this row shows to be wrong."""
    if row["expected"] is None or row["regions"] == row["expected"]:
        return []
    return [f"{row['case']}: {row['regions']} regions, expected {row['expected']}"]


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--case", action="append", help="only the case of this name; may be repeated")
    parser.add_argument("--regions", type=int, default=20_000, help="largest case, if none is named (default: 20000)")
    parser.add_argument("--method", default="auto", help="tr.Exact(method=...) (default: auto)")
    parser.add_argument("--top", type=int, default=0, help="also so many of the most frequent operations")
    parser.add_argument("--where", action="store_true", help="those (default: 15) with the line that issues them")
    args = parser.parse_args(argv)
    common.headline(args)
    if WHY_NOT is not None:
        sys.exit(f"no simulated device: {WHY_NOT}")
    chosen = common.choose(cases(), args.case or CASES)
    top = args.top or (15 if args.where else 0)
    rows, lines = [], []
    for case in chosen:
        if args.case or case.size <= args.regions:
            row, counts = measure(case, args.method, args.where)
            rows.append(row)
            lines += busiest(case.name, counts, top, args.where)
            common.say(f"{case.name}: {row['launches']:,} launches")
    common.show(rows, COLUMNS, "Exact reach on a simulated accelerator", "an operation counts as one launch")
    if top:
        columns = WHERE if args.where else WHERE[:-1]
        common.show(lines, columns, "Most frequent operations")
    return common.finish("launches", args, rows, [p for row in rows for p in problems(row)])


if __name__ == "__main__":
    sys.exit(main())
