"""Certificates that others check: what the proof takes, what the checker takes, and how large the file is.

ACAS Xu networks and pairs with recorded region counts, and the MNIST networks of the paper with 8-bit weights.
The checker runs as its own program (`python -m torchreach.check`), NumPy alone; its time is that of the whole program.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from torch import nn

import torchreach as tr
from benchmarks import common, exact_mnist

COLUMNS = (
    "case",
    "method",
    "regions",
    "parts",
    "CPU s",
    "proof CPU s",
    "check CPU s",
    "times",
    "bytes / part",
    "wider",
)
PIXELS = ((9, 0.1), (16, 0.1), (64, 0.02))


def cases(regions: int) -> list[tuple[str, tuple[nn.Module, ...], tr.StarBatch]]:
    found = []
    for case in common.acasxu_cases(regions):
        box = case.box()
        stars = tr.StarBatch.from_box(box[:, 0], box[:, 1])
        found.append((case.name, tuple(net.double() for net in case.networks()), stars))
    pair = tuple(net.double() for net in exact_mnist.networks())
    for pixels, eps in PIXELS:
        side = int(pixels**0.5)
        first = (28 - side) // 2
        block = [(i, j) for i in range(first, first + side) for j in range(first, first + side)]
        record = {"image_index": 3, "pixels": block, "eps": eps}
        found.append((f"MNIST, {pixels} pixels ± {eps}", pair, exact_mnist.input_star(record, "cpu")))
    return found


def checked(folder: Path, networks: tuple[nn.Module, ...]) -> float:
    """CPU seconds of the checker's process. Raises RuntimeError where it refuses."""
    files = []
    for i, net in enumerate(networks):
        files.append(folder / f"{i}.safetensors")
        state = {k: v.contiguous() for k, v in net.state_dict().items() if k.endswith(("weight", "bias"))}
        save_file(state, files[-1])
    before = os.times()
    command = [sys.executable, "-m", "torchreach.check", folder / "certificate", *files]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = os.times()
    if run.returncode:
        raise RuntimeError(run.stdout + run.stderr)
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure(name: str, networks: tuple[nn.Module, ...], stars: tr.StarBatch, seconds: float, repeats: int) -> dict:
    def analyse() -> tr.Discrepancy | tr.ReachResult:
        if len(networks) == 1:
            return tr.reach(networks[0], stars, keep_stars=False)
        return tr.discrepancy(*networks, stars, budget=tr.Budget(seconds=seconds))

    found, timing = common.measure(analyse, repeats=repeats)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        made = found.save_certificate(Path(folder) / "certificate", tr.Budget(seconds=seconds))
        proof = time.process_time() - began
        check = min(checked(Path(folder), networks) for _ in range(repeats))
    pair = isinstance(found, tr.Discrepancy)
    upper = found.upper if pair else torch.maximum(-found.lower, found.upper)
    return {
        "case": name,
        "method": found.stats.method,
        "regions": int((found.regions if pair else found.count).sum()),
        "parts": sum(made.leaves),
        "CPU s": timing.cpu_seconds,
        "proof CPU s": proof,
        "check CPU s": check,
        "times": check / timing.cpu_seconds,
        "bytes / part": made.size / sum(made.leaves),
        "wider": float(made.upper.max() / upper.double().max()) if float(upper.max()) else 1.0,
    }


def main() -> int:
    parser = common.options(__doc__)
    parser.add_argument("--regions", type=int, default=20_000, help="only cases of at most this many (default: 20000)")
    parser.add_argument("--seconds", type=float, default=60, help="for each analysis and proof (default: 60)")
    args = parser.parse_args()
    common.headline(args)
    rows, problems = [], []
    for name, networks, stars in cases(args.regions):
        common.say(name)
        try:
            rows.append(measure(name, networks, stars, args.seconds, args.repeats))
        except RuntimeError as error:
            problems.append(f"{name}: {error}")
    common.show(
        rows, COLUMNS, "Certificates", "times: CPU time of the checker, its start included, over the analysis alone"
    )
    return common.finish("certificates", args, rows, problems)


if __name__ == "__main__":
    sys.exit(main())
