"""The same work on the CPU and on a CUDA device: counts and intervals must agree; then time, launches and memory.

reach: enumeration of ACAS Xu boxes and of the MNIST pair: linear regions a second.
signs, inputs: branch and bound for 8 seconds: branches a second, and what is certified then.
cells: a deployed int8 pair: cells of the input grid a second.
loss: one backward pass of the certified loss over boxes: boxes a second.

Launches and host reads are those torch's profiler saw in one more run, and "busy" is the share of the device run's
seconds in which a kernel or copy ran. Exit status 1 where counts or intervals differ between devices.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import torchreach as tr
from benchmarks import common, deployed, exact_mnist, launches, paper_networks

COLUMNS = (
    *("work", "case", "device", "threads", "units", "certified", "wall s", "units / s", "times", "launches", "reads"),
    *("busy %", "peak MB"),
)
REACH = ("3_7 prop_3 full", "2_3 prop_3 full", "1_1 prop_3 full", "img3_p4_eps0.2", "img3_p16_eps0.1")
LARGEST = "4_2 prop_1 whole"
LAUNCHES = {"cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cudaMemsetAsync"}
SECONDS, BOXES, TIMED = 8, 256, ("signs", "inputs")
PROFILED = 1.0  # seconds of a run up to which it is profiled, which takes minutes for long ones
# Ends of intervals: float64 sums in another order.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Outcome:
    """What one run found, to be compared between devices, and how many units of work it did."""

    units: int
    exact: tuple[int, ...]  # counts that must be equal
    ends: Tensor  # ends of intervals, on the host, that must agree where the work is the same


Run = Callable[[], Outcome]
Work = Callable[[str], Run]  # moves networks and sets to the device, returns what is timed


def of_reach(module: nn.Module, stars: tr.StarBatch) -> Work:
    def prepared(device: str) -> Run:
        moved, there = copy.deepcopy(module).to(device), stars.to(device)

        def run() -> Outcome:
            found = tr.reach(moved, there, keep_stars=False)
            splits = tuple(layer.splits for layer in found.stats.layers)
            return Outcome(len(found), (len(found), *splits), torch.cat((found.lower, found.upper)).cpu())

        return run

    return prepared


def of_search(pair: tuple[nn.Module, ...], stars: tr.StarBatch, split: str) -> Work:
    def prepared(device: str) -> Run:
        moved, there = [copy.deepcopy(network).to(device) for network in pair], stars.to(device)

        def run() -> Outcome:
            found = tr.discrepancy(*moved, there, tr.Search(split), budget=tr.Budget(seconds=SECONDS))
            return Outcome(found.stats.branches, (), torch.cat((found.lower, found.upper)).cpu())

        return run

    return prepared


def of_cells(pair: tuple[nn.Module, nn.Module], stars: tr.StarBatch) -> Work:
    def prepared(device: str) -> Run:
        moved, there = copy.deepcopy(pair[0]).to(device), stars.to(device)

        def run() -> Outcome:
            found = tr.discrepancy(moved, pair[1], there)
            cells = int(found.regions.sum())
            return Outcome(cells, (cells,), torch.cat((found.lower, found.upper)).cpu())

        return run

    return prepared


def of_loss(pair: tuple[nn.Module, nn.Module], boxes: int) -> Work:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(boxes, 784, dtype=torch.float64, generator=generator)

    def prepared(device: str) -> Run:
        original, student = (copy.deepcopy(network).to(device) for network in pair)
        loss, inputs = tr.DiscrepancyLoss(original, student, reduction="none"), x.to(device)

        def run() -> Outcome:
            student.zero_grad()
            bound = loss(inputs - 0.02, inputs + 0.02)
            bound.sum().backward()
            return Outcome(boxes, (), bound.detach().cpu().reshape(-1))

        return run

    return prepared


def works() -> Iterator[tuple[str, str, Work]]:
    """(kind, case, work)."""
    known = {case.name: case for case in launches.cases()}
    for name in REACH:
        yield "reach", name, of_reach(*launches.instance(known[name]))
    folder = common.require_folder()
    whole = tr.StarBatch.from_vnnlib(folder / "acasxu" / "prop_1.vnnlib")
    yield "reach", LARGEST, of_reach(tr.load(folder / "acasxu" / "ACASXU_run2a_4_2_batch_2000.onnx").double(), whole)
    pair = exact_mnist.networks()
    images = paper_networks.ten_images()[0]
    wide = tr.StarBatch.from_image(images[:1].double(), 0.05, clip=(-1, 1))
    yield "signs", "784 pixels 0.05", of_search(pair, wide, "signs")
    acas = known["1_1 prop_3 centre 0.25 int8"]
    networks = [network.double() for network in acas.networks()]
    box = tr.StarBatch.from_vnnlib(folder / "acasxu" / "prop_1.vnnlib")
    yield "inputs", "1_1 int8 prop_1", of_search(tuple(networks), box, "inputs")
    float_network = paper_networks.published_pair()[0]
    small = paper_networks.deployed(float_network, images.float())
    stars = tr.StarBatch.from_image(images[:1], 0.15, deployed.block(4))
    yield "cells", "4 pixels 0.15", of_cells((copy.deepcopy(float_network).double(), small), stars)
    yield "loss", f"{BOXES} boxes, 784 pixels", of_loss(pair, BOXES)


def profiled(run: Run) -> dict[str, Any]:
    """Launches, host reads, and milliseconds in which the device worked, of one run."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        run()
        torch.cuda.synchronize()
    names = {"launches": 0, "reads": 0, "device ms": 0.0}
    for event in seen.key_averages():
        if event.key in LAUNCHES:
            names["launches"] += event.count
        elif event.key.startswith("Memcpy DtoH"):
            names["reads"] += event.count
        if event.device_type == torch.autograd.DeviceType.CUDA:
            names["device ms"] += event.self_device_time_total / 1000
    names["table"] = seen.key_averages().table(sort_by="self_device_time_total", row_limit=40)
    return names


def measure(kind: str, case: str, work: Work, device: str, threads: int, repeats: int) -> tuple[dict, Outcome]:
    """One row."""
    torch.set_num_threads(threads)
    run = work(device)
    repeats = 1 if kind in TIMED else repeats
    outcome, timing = common.measure(run, repeats=repeats, warmup=int(device != "cpu"), device=device)
    row: dict[str, Any] = {
        "work": kind,
        "case": case,
        "device": device,
        "threads": threads,
        "units": outcome.units,
        "certified": float(outcome.ends.max()),
        "wall s": timing.seconds,
        "units / s": outcome.units / timing.seconds,
        "peak MB": timing.peak_device_mb or timing.peak_rss_mb,
        "timing": timing.__dict__,
    }
    if device != "cpu" and timing.seconds < PROFILED:
        seen = profiled(run)
        row |= {"launches": seen["launches"], "reads": seen["reads"], "profile": seen["table"]}
        row["busy %"] = 100 * seen["device ms"] / 1000 / timing.seconds
    return row, outcome


def differences(what: str, here: Outcome, there: Outcome) -> list[str]:
    """What must agree between two devices and does not."""
    if here.exact != there.exact:
        return [f"{what}: counts {there.exact}, on the first {here.exact}"]
    if not here.exact and here.units != there.units:  # searches that went other ways: their intervals must meet
        (low, high), (low_, high_) = here.ends.chunk(2), there.ends.chunk(2)
        apart = float(torch.maximum(low - high_, low_ - high).max())
    else:
        apart = float((here.ends - there.ends).abs().max())
    return [f"{what}: intervals {apart:.3g} apart"] if not apart <= TOLERANCE else []


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--work", nargs="+", choices=("reach", "signs", "inputs", "cells", "loss"), help="default: all")
    parser.add_argument("--case", action="append", help="only the case of this name; may be repeated")
    args = parser.parse_args(argv)
    common.headline(args)
    paper_networks.quiet()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if len(devices) == 1:
        print("no CUDA device: only the CPU is timed")
    rows, problems = [], []
    for kind, case, work in works():
        if (args.work and kind not in args.work) or (args.case and case not in args.case):
            continue
        first: tuple[dict, Outcome] | None = None
        for device in devices:
            row, outcome = measure(kind, case, work, device, args.threads, args.repeats)
            first = first or (row, outcome)
            row["times"] = row["units / s"] / first[0]["units / s"]
            problems += differences(f"{kind} {case} on {device}", first[1], outcome)
            rows.append(row)
            common.say(f"{kind} {case} {device}: {row['wall s']:.3g} s")
    common.show(rows, COLUMNS, "CPU and accelerator")
    return common.finish("accelerator", args, rows, problems)


if __name__ == "__main__":
    sys.exit(main())
