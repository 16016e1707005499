"""Networks as executed in half precision and float32: does any input leave the certified interval, and how wide is it?

An MLP and a CNN trained on scikit-learn's digits, against their float16 and bfloat16 copies (by torch's CPU kernels;
the float16 file also by onnxruntime's) and an int8 weight-only copy in float32. Every pixel may move by 0.01 around
each of a few digits. Inputs: uniform, corners, gradient ascent for every output and sign, small steps around the best.
The exit status is 1 if one value lies outside, or if a certified bound is more than ten times what any kernels reach.
"""

from __future__ import annotations

import copy
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

import torchreach as tr
from benchmarks import common

EPS, WIDEST = 0.01, 10.0


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def trained(network: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(12):
        for batch in torch.randperm(len(x)).split(128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimiser.step()
    return network.eval()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def by_onnxruntime(network: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """`network` as onnxruntime's CPU kernels execute it."""
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
        torch.onnx.export(network, (example,), file, **options)  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(np.asarray(session.run(None, {"x": x.numpy()})[0]))


def inputs(
    original: nn.Module, run: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, count: int
) -> Iterator[Tensor]:
    """Batches of inputs of a box, float32, `count` in all."""
    g = torch.Generator().manual_seed(0)
    share = torch.rand(count // 2, *low.shape, generator=g)
    share[::2] = share[::2].round()
    x = low + (high - low) * share
    yield from x.split(10_000)
    real, n = copy.deepcopy(original).double(), 10
    sign = torch.cat((torch.eye(n), -torch.eye(n))).double().repeat_interleave(count // 40 // (2 * n), 0)
    x = x[: len(sign)]
    for step in range(10):  # of the real-valued output: rounding has no gradient, and grows with the values
        leaf = x.double().requires_grad_()
        (gradient,) = torch.autograd.grad((real(leaf) * sign).sum(), leaf)
        x = x + 0.5 * 0.8**step * (high - low) * gradient.sign().float()
        x = torch.minimum(torch.maximum(x, low), high)
        yield x
    with torch.no_grad():
        value = ((real(x.double()) - run(x)) * sign).sum(1)
    best = x[value.topk(len(x) // 10).indices]
    for _ in range(10):
        near = best.repeat(10, *[1] * low.ndim)
        near = near + 0.1 * (high - low) * (torch.rand(near.shape, generator=g) - 0.5)
        yield torch.minimum(torch.maximum(near, low), high)


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--samples", type=int, default=100_000, help="of each case (default: 100000)")
    parser.add_argument("--digits", type=int, default=2, help="input sets of each case (default: 2)")
    args = parser.parse_args(argv)
    common.headline(args)
    x, y = digits()
    rows = []
    for name, make, shape in (("MLP", mlp, (64,)), ("CNN", cnn, (1, 8, 8))):
        torch.manual_seed(0)
        original = trained(make(), x.reshape(-1, *shape), y)
        half = copy.deepcopy(original).half()
        runs: list[tuple[str, nn.Module, Callable[[Tensor], Tensor], torch.dtype]] = [
            ("torch", half, half, torch.float16),
            ("onnxruntime", half, by_onnxruntime(half, torch.zeros(1, *shape).half()), torch.float16),
        ]
        for dtype, copied in ((torch.bfloat16, original), (torch.float32, tr.quantize_weights(original))):
            copied = copy.deepcopy(copied).to(dtype)
            runs.append(("torch", copied, copied, dtype))
        for kernels, compressed, run, dtype in runs:
            single = dtype is torch.float32
            row = {"network": name, "executed in": str(dtype).removeprefix("torch."), "kernels": kernels}
            row |= {"inputs": 0, "outside": 0, "met": 0.0, "certified": 0.0, "ratio": 0.0}
            for image in x.reshape(-1, *shape)[: args.digits]:
                low, high = (image - EPS).clamp(0, 1), (image + EPS).clamp(0, 1)
                found = tr.discrepancy(
                    original,
                    compressed,
                    tr.StarBatch.from_box(low[None], high[None]),
                    gap=1e-3,
                    budget=tr.Budget(seconds=20),
                    arithmetic="executed" if single else None,
                )

                def executed(x: Tensor, run=run, dtype=dtype) -> Tensor:
                    return run(x.to(dtype)).double()

                met = 0.0
                for batch in inputs(original, executed, low, high, args.samples):
                    with torch.no_grad():
                        y1 = original(batch).double() if single else copy.deepcopy(original).double()(batch.double())
                        difference = y1 - executed(batch)
                    outside = (difference < found.range_lower - 1e-12) | (difference > found.range_upper + 1e-12)
                    row["inputs"] += len(batch)
                    row["outside"] += int(outside.any(1).sum())
                    met = max(met, float(difference.abs().max()))
                row["met"], row["certified"] = max(row["met"], met), max(row["certified"], float(found.max_upper))
                row["ratio"] = max(row["ratio"], float(found.max_upper) / met)
            rows.append(row)
    columns = ("network", "executed in", "kernels", "inputs", "outside", "met", "certified", "ratio")
    common.show(rows, columns, "As executed: inputs outside of the certified interval, and its width")
    wrong = [
        f"{row['network']} {row['executed in']} {row['kernels']}: {row['outside']}" for row in rows if row["outside"]
    ]
    # One certificate covers all kernels of a format: it is wide if it is so for each of them.
    least: dict[str, float] = {}
    for row in rows:
        name = f"{row['network']} {row['executed in']}"
        least[name] = min(least.get(name, torch.inf), row["ratio"])
    wide = [f"{name}: {ratio:.1f}" for name, ratio in least.items() if ratio > WIDEST]
    return common.finish("executed", args, rows, wrong + wide)


if __name__ == "__main__":
    sys.exit(main())
