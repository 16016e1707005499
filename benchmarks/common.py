"""What the benchmarks share: the known cases, timing, the machine, tables and JSON.

Seconds are reported twice: wall, and CPU seconds of this process (all its threads), which other load on the
machine disturbs less. Both are medians over repeats, after a warm-up that is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import torchreach as tr
from tests.data import data_folder
from tests.networks import acasxu_pair

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One box and the network, or pair of networks, to enumerate on it; `record` is its entry in the data."""

    name: str
    record: dict[str, Any]
    expected: int | None  # number of regions that independent tools agree on

    @property
    def size(self) -> int:
        """Number of regions, or the best guess there is."""
        return self.expected or self.record["regions_one_tool_only"]

    @property
    def is_pair(self) -> bool:
        return "npz" in self.record

    def box(self) -> Tensor:
        """[N_in, 2] float64 lower and upper bounds."""
        return torch.tensor(self.record["box"], dtype=torch.float64)

    def networks(self) -> tuple[nn.Module, ...]:
        """The network, or the original and its compressed copy."""
        if self.is_pair:
            return acasxu_pair(self.record["npz"])
        return (tr.load(require_folder() / self.record["onnx"]),)

    def recorded_range(self) -> tuple[Tensor, Tensor]:
        """Exact (lower, upper) [N_out] of the output, or of the difference of the outputs."""
        low, high = ("diff_lo", "diff_hi") if self.is_pair else ("output_lo", "output_hi")
        return tuple(torch.tensor(self.record[key], dtype=torch.float64) for key in (low, high))  # type: ignore

    def recorded_cpu(self, tool: str) -> float | None:
        """CPU seconds another tool took for it, in another run on another machine."""
        entry = self.record.get(tool)
        return entry["cpu_s"] if entry and entry.get("status", "done") == "done" else None


def require_folder() -> Path:
    """The public data folder, or the end of the program."""
    folder = data_folder()
    if folder is None:
        sys.exit("public test data not found: set TORCHREACH_DATA to its folder")
    return folder


def acasxu_cases(regions: int) -> list[Case]:
    """Every ACAS Xu case, single networks and pairs, of at most this many regions, smallest first."""
    found = []
    for part in ("exact", "equivalence"):
        for record in json.loads((require_folder() / part / "acasxu.json").read_text())["cases"]:
            name = " ".join(record[key] for key in ("net", "case", "compression") if key in record)
            found.append(Case(name, record, record["regions"]))
    return sorted((case for case in found if case.size <= regions), key=lambda case: case.size)


def choose(cases: list[Case], names: Sequence[str] | None) -> list[Case]:
    """The cases named, in the order named; all of them where `names` is None."""
    if names is None:
        return cases
    by_name = {case.name: case for case in cases}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        sys.exit(f"no case is called {unknown[0]!r}; there are: {', '.join(by_name)}")
    return [by_name[name] for name in names]


@dataclass(frozen=True)
class Timing:
    """Medians over the repeats, and every repeat."""

    seconds: float
    cpu_seconds: float
    every_second: list[float]
    every_cpu_second: list[float]
    peak_rss_mb: float  # of this process, libraries included
    peak_device_mb: float | None  # allocated by torch on the CUDA device


def measure(
    work: Callable[[], T], *, repeats: int = 3, warmup: int = 1, device: torch.device | str = "cpu"
) -> tuple[T, Timing]:
    """Result of the last run of `work`, and what the runs after the warm-up took."""
    cuda = torch.device(device).type == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    for _ in range(warmup):
        work()
    wait()
    reset_peak_memory()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    wall, cpu = [], []
    while True:
        wait()
        began, began_cpu = time.perf_counter(), time.process_time()
        result = work()
        wait()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
        if len(wall) >= repeats:
            break
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else None
    return result, Timing(statistics.median(wall), statistics.median(cpu), wall, cpu, peak_memory_mb(), peak)


def reset_peak_memory() -> None:
    """Let the peak resident size start again from the present one, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_mb() -> float:
    """Largest resident size of this process, MiB, since the last reset or, where there is none, its start."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        scale = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchreach": tr.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def options(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each, median taken (default: 3)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser


def finish(name: str, args: argparse.Namespace, rows: list[dict[str, Any]], problems: list[str]) -> int:
    """Write the JSON file, say what went wrong, and return the exit status: 1 if anything did."""
    if args.json is not None:
        report = {
            "benchmark": name,
            "options": {key: value for key, value in vars(args).items() if key != "json"},
            "machine": machine(args.threads),
            "problems": problems,
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
    for problem in problems:
        print("PROBLEM:", problem)
    print(f"{len(rows)} rows, {len(problems)} problems")
    return 1 if problems else 0


def headline(args: argparse.Namespace) -> None:
    """Set the number of threads and print the machine."""
    torch.set_num_threads(args.threads)
    about = machine(args.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))


def say(text: str) -> None:
    """Progress, kept out of what the program prints as its result."""
    print(text, file=sys.stderr, flush=True)


def show(rows: list[dict[str, Any]], columns: Sequence[str], title: str, note: str = "") -> None:
    """Print the named columns as a table, with a line below it; "-" where a row has no value."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(text(row.get(column)) for column in columns))
    # Never folded: a table that is cut off in a pipe is worth nothing.
    Console(width=1000 if not sys.stdout.isatty() else None).print(table)
    if note:
        print(note)


def text(value: Any) -> str:
    """A cell: three significant digits for numbers, "-" for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def counts(stats: tr.ReachStats) -> dict[str, Any]:
    """What one run counted, layer by layer."""
    settled: dict[str, int] = {}
    for layer in stats.layers:
        for test, number in layer.settled.items():
            settled[test] = settled.get(test, 0) + number
    return {
        "method": stats.method,
        "root bounds": stats.root_bounds,
        "splits": stats.splits,
        "programs": stats.linear_programs,
        "settled": settled,
        "layers": [asdict(layer) for layer in stats.layers],
    }
