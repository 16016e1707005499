"""Budgets of seconds on every path of a comparison: what was asked for, what was taken.

Networks are random and seeded, most of them too large for their path to finish. A budget of T seconds is kept if the
call is back within 1.2 T + 2 s, with an interval whose ends are not below what 1,000 random inputs attain. Prints a
table in Markdown; the exit status is 1 if one call was late or one interval wrong.

--interrupt: Ctrl-C after the given seconds instead; the call is to be back 3 s later. --memory: a budget of so many MB
beside the seconds; the resident memory is to grow by at most 1.3 times as much.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import torchreach as tr
from benchmarks import common

SECONDS = (1.0, 5.0, 20.0)
SAMPLES = 1000


@dataclass(frozen=True)
class Case:
    """One path: two networks, stars, and how they are compared."""

    original: nn.Module
    compressed: nn.Module
    stars: tr.StarBatch
    run: Callable[..., tr.Discrepancy | tr.Equivalence]


def network(sizes: list[int]) -> nn.Sequential:
    layers = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


def convolutions() -> nn.Sequential:
    channels = ((1, 10), (10, 10), (10, 10), (10, 1))
    parts = [part for a, b in channels for part in (nn.Conv2d(a, b, (5, 1)), nn.ReLU())]
    return nn.Sequential(*parts[:-1], nn.Flatten(), nn.Linear(80, 1)).eval()


def int8(original: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    wrapped = torch.ao.quantization.QuantWrapper(copy.deepcopy(original)).eval()
    own = torch.ao.quantization.get_default_qconfig(torch.backends.quantized.engine)
    wrapped.qconfig = own  # type: ignore[assignment]
    prepared = torch.ao.quantization.prepare(wrapped)
    prepared(torch.randn(64, *shape))
    return torch.ao.quantization.convert(prepared)


def box(shape: tuple[int, ...], radius: float, count: int = 1, vary: int | None = None) -> tr.StarBatch:
    width = torch.full((count, *shape), radius)
    if vary is not None:
        width.flatten(1)[:, vary:] = 0
    return tr.StarBatch.from_image(torch.rand(count, *shape), width)


def floats(sizes: list[int], radius: float, method: object = None, *, count: int = 1) -> Case:
    original = network(sizes)
    return Case(original, tr.quantize_weights(original, 8), box((sizes[0],), radius, count), by(method))


def deployed(sizes: list[int], radius: float, vary: int | None = None) -> Case:
    original = network(sizes)
    return Case(original, int8(original, (sizes[0],)), box((sizes[0],), radius, vary=vary), by(None))


def deployed_convolutions(vary: int | None, radius: float) -> Case:
    original = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 13 * 13, 10),
    ).eval()
    return Case(original, int8(original, (1, 28, 28)), box((1, 28, 28), radius, vary=vary), by(None))


def by(method: object, **options: object) -> Callable[..., tr.Discrepancy]:
    return lambda a, b, stars, budget: tr.discrepancy(a, b, stars, method, budget=budget, **options)  # type: ignore


def constrained() -> Case:
    path = floats([5, 50, 50, 2], 1.0)
    stars = path.stars.intersect(torch.ones(1, 5), float(path.stars.center.sum()))
    return Case(path.original, path.compressed, stars, path.run)


def convolution() -> Case:
    original = convolutions()
    return Case(original, tr.quantize_weights(original, 8), box((1, 20, 20), 0.1, vary=200), by(None))


def linear() -> Case:
    original = nn.Sequential(nn.Linear(4096, 25))
    return Case(original, tr.quantize_weights(original, 8), box((4096,), 0.01), by(None))


def half() -> Case:
    original = network([64, 100, 100, 10])
    return Case(original, copy.deepcopy(original).half(), box((64,), 0.3), by(None))


def equivalent() -> Case:
    path = floats([64, 100, 100, 10], 0.3)
    run = lambda a, b, stars, budget: tr.equivalent(a, b, stars, 1e-2, budget=budget)  # noqa: E731
    return Case(path.original, path.compressed, path.stars, run)


def same_label() -> Case:
    path = floats([64, 100, 100, 10], 0.05)
    run = lambda a, b, stars, budget: tr.equivalent(a, b, stars, top1=True, budget=budget)  # noqa: E731
    return Case(path.original, path.compressed, path.stars, run)


PATHS: dict[str, Callable[[], Case]] = {
    "exact, vertices": lambda: floats([5, 50, 50, 50, 5], 1.0, tr.Exact("vertices")),
    "exact, programs": lambda: floats([64, 100, 100, 10], 0.3, tr.Exact("programs")),
    "auto, 5 inputs": lambda: floats([5, 50, 50, 50, 5], 1.0),
    "auto, 784 inputs": lambda: floats([784, 200, 200, 10], 0.05),
    "search, inputs": lambda: floats([5, 50, 50, 50, 5], 1.0, tr.Search("inputs")),
    "search, signs": lambda: floats([64, 100, 100, 10], 0.3, tr.Search("signs")),
    "convolution, 200 inputs": convolution,
    "linear, 4,096 inputs": linear,
    "640 outputs": lambda: floats([640, 128, 128, 8, 128, 128, 640], 0.05),
    "constrained star": constrained,
    "16 stars": lambda: floats([64, 100, 100, 10], 0.1, count=16),
    "equivalent, epsilon": equivalent,
    "equivalent, label": same_label,
    "half, as executed": half,
    "deployed, cells": lambda: deployed([4, 32, 32, 4], 0.2),
    "deployed, relaxation": lambda: deployed([64, 100, 100, 10], 0.1),
    "deployed, convolution, 784 inputs": lambda: deployed_convolutions(None, 0.02),
    "deployed, convolution, 6 inputs": lambda: deployed_convolutions(6, 0.1),
    "deployed, 640 outputs": lambda: deployed([640, 128, 128, 8, 128, 128, 640], 0.05),
}


def attained(path: Case) -> Tensor:
    """[S] largest |y1 - y2| at random inputs, as the networks compute it."""
    x = path.stars.sample(SAMPLES)
    y = []
    with torch.no_grad():
        for part in x.flatten(0, 1).split(SAMPLES):
            second = path.compressed(part.to(next((p.dtype for p in path.compressed.parameters()), part.dtype)))
            y.append((path.original(part) - second.to(part.dtype)).abs().amax(1))
    return torch.cat(y).reshape(len(path.stars), SAMPLES).amax(1)


def measure(name: str, seconds: float, *, interrupt: bool = False, memory: float | None = None) -> dict:
    """One row of the table. interrupt: whether Ctrl-C ends the call after `seconds`. memory: of the budget, MB."""
    torch.manual_seed(0)
    path = PATHS[name]()
    budget = tr.Budget(seconds=None if interrupt else seconds, memory=None if memory is None else int(memory * 2**20))
    path.run(path.original, path.compressed, path.stars, tr.Budget(seconds=0.01))  # imports and caches
    common.reset_peak_memory()
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    before, began = common.peak_memory_mb(), time.monotonic()
    if interrupt:
        timer.start()
    try:
        found = path.run(path.original, path.compressed, path.stars, budget)
    finally:
        timer.cancel()
    taken = time.monotonic() - began
    row = {
        "path": name,
        "asked s": seconds,
        "taken s": taken,
        "taken / asked": taken / seconds,
        "peak MB": common.peak_memory_mb() - before,
        "ended": ", ".join(sorted({str(reason) for reason in found.reasons})),
    }
    if isinstance(found, tr.Discrepancy):
        row |= {"lower": float(found.max_lower.max()), "upper": float(found.max_upper.max())}
        row["sampled"] = float(attained(path).max())
    return row


COLUMNS = ("path", "asked s", "taken s", "taken / asked", "peak MB", "lower", "sampled", "upper", "ended")


def problems(row: dict, *, interrupt: bool = False, memory: float | None = None) -> list[str]:
    """What is wrong with a row."""
    found, name = [], f"{row['path']}, {row['asked s']:g} s"
    if row["taken s"] > (row["asked s"] + 3 if interrupt else 1.2 * row["asked s"] + 2):
        found.append(f"{name}: back after {row['taken s']:.1f} s")
    if memory is not None and row["peak MB"] > 1.3 * memory:
        found.append(f"{name}: {row['peak MB']:.0f} MB of {memory:g}")
    if "upper" in row:
        slack = 1e-6 + 1e-4 * row["upper"]
        if not row["lower"] <= row["upper"]:
            found.append(f"{name}: lower {row['lower']:.6g} above upper {row['upper']:.6g}")
        if row["sampled"] > row["upper"] + slack:
            found.append(f"{name}: a sample attains {row['sampled']:.6g}, above {row['upper']:.6g}")
        if row["sampled"] > row["lower"] + slack and not interrupt:  # which may come before any search
            found.append(f"{name}: a sample attains {row['sampled']:.6g}, more than the witness, {row['lower']:.6g}")
    return found


def markdown(rows: list[dict]) -> str:
    """A row per path; a column per budget: seconds taken, and the interval when they were over."""
    budgets = sorted({row["asked s"] for row in rows})
    lines = [f"| path | {' | '.join(f'{b:g} s' for b in budgets)} | peak MB |", "|---" * (len(budgets) + 2) + "|"]
    for name in dict.fromkeys(row["path"] for row in rows):
        own = {row["asked s"]: row for row in rows if row["path"] == name}
        cells = [f"{own[b]['taken s']:.1f}" if b in own else "" for b in budgets]
        lines.append(f"| {name} | {' | '.join(cells)} | {max(row['peak MB'] for row in own.values()):.0f} |")
    worst = max(rows, key=lambda row: row["taken / asked"])
    lines.append("")
    lines.append(
        f"Largest ratio: {worst['taken / asked']:.2f} ({worst['path']}, {worst['asked s']:g} s); largest excess: "
        f"{max(row['taken s'] - row['asked s'] for row in rows):.1f} s."
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--path", action="append", choices=list(PATHS), help="only this one; may be repeated")
    parser.add_argument("--seconds", type=float, action="append", help="budget; may be repeated (default: 1, 5, 20)")
    parser.add_argument("--interrupt", action="store_true", help="Ctrl-C after so many seconds, and no budget of them")
    parser.add_argument("--memory", type=float, help="budget of memory, MB")
    args = parser.parse_args(argv)
    limits = {"interrupt": args.interrupt, "memory": args.memory}
    common.headline(args)
    warnings.simplefilter("ignore")
    rows = []
    for name in args.path or PATHS:
        for seconds in args.seconds or SECONDS:
            rows.append(measure(name, seconds, **limits))
            common.say(f"{name}, {seconds:g} s: {rows[-1]['taken s']:.2f} s")
    common.show(rows, COLUMNS, "budgets")
    print(markdown(rows))
    return common.finish("budgets", args, rows, [problem for row in rows for problem in problems(row, **limits)])


if __name__ == "__main__":
    sys.exit(main())
