"""What checkpoints cost, and how exact reach spreads over the workers of a Ray cluster: units, bytes and merging.

One ACAS Xu network on a part of its property 1 box, alone on one thread, with a checkpoint, and on 1 and 2 workers.
`docs/scaling.md` carries the figures on to more workers. The exit status is 1 where counts differ.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os
import resource
import time
from collections.abc import Iterator
from typing import Any

import torch

import torchreach as tr
from benchmarks import common
from torchreach.core.checkpoint import Checkpoint
from torchreach.core.memory import size_of
from torchreach.work.cluster import Cluster

NETWORK = "acasxu/ACASXU_run2a_4_2_batch_2000.onnx"


class Measured(Cluster):
    """Counts what goes out and comes back, and the driver's time between two results."""

    def done(self, task: Any, take: Any, clock: Any) -> Iterator[tuple[Any, Any]]:
        self.units, self.sent, self.received, self.merging = 0, 0, 0, 0.0

        def counted() -> Any:
            began = time.perf_counter()
            one = take()
            self.merging += time.perf_counter() - began
            if one is not None:
                self.units += 1
                self.sent += size_of(list(one[1][1]))
            return one

        for key, result in super().done(task, counted, clock):
            self.received += size_of(list(result))
            began = time.perf_counter()
            yield key, result
            self.merging += time.perf_counter() - began


def box(fraction: float) -> tr.StarBatch:
    whole = tr.StarBatch.from_vnnlib(common.require_folder() / "acasxu" / "prop_1.vnnlib")
    middle, radius = (whole.lower[0] + whole.upper[0]) / 2, (whole.upper[0] - whole.lower[0]) / 2
    return tr.StarBatch.from_box(middle - fraction * radius, middle + fraction * radius)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=float, default=0.4, help="share of the box's side (0.4)")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    network, stars = tr.load(common.require_folder() / NETWORK), box(options.fraction)
    counts = []

    def run(name: str, **where: Any) -> None:
        began, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        found = tr.reach(network, stars, keep_stars=False, **where)
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        spent = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
        counts.append(int(found.count))
        print(
            f"{name:<24}{counts[-1]:>10,} regions {wall:>7.2f} s wall {spent:>7.2f} s CPU of this process", flush=True
        )

    tr.reach(network, box(0.05), keep_stars=False)  # a warm-up
    for _ in range(2):
        run("alone")
        largest, save = [0], Checkpoint.save

        def weighed(self: Checkpoint, name: str, tree: Any, save: Any = save, largest: Any = largest) -> None:
            save(self, name, tree)
            largest.append((self.folder / f"{name}.safetensors").stat().st_size)

        Checkpoint.save = weighed
        with tempfile.TemporaryDirectory() as folder:
            run("with a checkpoint", checkpoint=Path(folder) / "c")
        Checkpoint.save = save
        print(f"{'':<24}{len(largest) - 2} snapshots, {max(largest) / 1e6:.1f} MB the largest")
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    import ray

    for workers in options.workers:
        ray.init(num_cpus=workers, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        measured = Measured(ray)
        of, Cluster.of = Cluster.of, staticmethod(lambda _: measured)  # noqa: B023
        run("workers warm up", ray="local")
        run(f"{workers} workers", ray="local")
        Cluster.of = of
        ray.shutdown()
        units = max(measured.units, 1)
        sent, received = (number / units / 1e3 for number in (measured.sent, measured.received))
        driver = 1e3 * measured.merging / units
        print(f"{'':<24}{units} units; each {sent:.1f} kB out, {received:.1f} kB back, {driver:.1f} ms of the driver")
    return int(len(set(counts)) > 1)


if __name__ == "__main__":
    sys.exit(main())
