"""Integer kernels: does anything that torch's int8 engines compute leave its certified interval?

Networks on scikit-learn's digits, and the published autoencoder ad01 where the data folder has it, quantised with
torch's tools for each engine without a reduced range, so that sums of two products leave int16. Every certificate is
sampled on the engine that packed the network: uniform points, corners, and points that gradients choose. The exit
status is 1 if one difference lies outside, or if a layer's kernels are unknown.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn
from torch.ao import quantization as eager

import torchreach as tr
from benchmarks import common
from benchmarks.deployed import on_engine

ENGINES = [n for n in ("fbgemm", "x86", "onednn", "qnnpack") if n in torch.backends.quantized.supported_engines]
COLUMNS = ("network", "engine", "kernels", "status", "certified", "attained", "random", "chosen", "largest", "outside")
FRAME, FRAMES, WINDOW = 128, 200, 5
BATCH = 2_000


def digits() -> tuple[Tensor, Tensor]:
    """Pictures [B, 1, 8, 8] in [0, 1] and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images[:, None] / 16, dtype=torch.float32), torch.tensor(data.target)


def trained(network: nn.Sequential, x: Tensor, y: Tensor, epochs: int = 8) -> nn.Sequential:
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[part]), y[part]).backward()
            optimizer.step()
    return network.eval()


def pooling() -> nn.Sequential:
    """Two convolutions and an average pooling, of pictures [B, 1, 8, 8]."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


def int8(network: nn.Sequential, data: Tensor, *, per_channel: bool = True) -> nn.Module:
    """Eager-mode int8 copy with the full range of codes, packed for the engine in use."""
    weight = eager.default_per_channel_weight_observer if per_channel else eager.default_weight_observer
    wrapped = eager.QuantWrapper(copy.deepcopy(network).float()).eval()
    wrapped.qconfig = eager.QConfig(activation=eager.MinMaxObserver.with_args(dtype=torch.quint8), weight=weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = eager.prepare(wrapped)
        prepared(data)
        return eager.convert(prepared)


def autoencoder() -> tuple[nn.Sequential, Tensor]:
    """The anomaly detector of MLPerf Tiny and its windows [B, 640] of one recording."""
    folder = common.require_folder() / "mlperf_tiny"
    frames = np.fromfile(folder / "ad01_normal_id_01.bin", dtype=np.float32).reshape(FRAMES, FRAME)
    windows = np.stack([frames[i : i + WINDOW].reshape(-1) for i in range(FRAMES - WINDOW + 1)])
    network = tr.load(folder / "ad01_float.onnx")
    return nn.Sequential(*copy.deepcopy(network)), torch.from_numpy(windows)


def differences(original: nn.Module, small: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return original(x.double()).flatten(1) - small(x.float()).double().flatten(1)


def random(low: Tensor, high: Tensor, count: int) -> Iterator[Tensor]:
    """`count` points [B, *shape] in batches, half of them near corners."""
    g = torch.Generator().manual_seed(0)
    for size in [BATCH] * (count // BATCH) + [count % BATCH]:
        share = torch.rand(size, *low.shape, generator=g, dtype=torch.float64)
        share[::2] = torch.where(share[::2] < 0.7, share[::2].round(), share[::2])
        yield low + (high - low) * share


def chosen(original: nn.Module, small: nn.Module, low: Tensor, high: Tensor, count: int) -> Iterator[Tensor]:
    """`count` points of a walk along the signs of gradients of y1 - y2, y2's those of its weights."""
    twin = tr.weight_only(small, tuple(low.shape)).double()
    g = torch.Generator().manual_seed(1)
    x = low + (high - low) * torch.rand(64, *low.shape, generator=g, dtype=torch.float64)
    for start in range(0, count, len(x)):
        x.requires_grad_()
        y = original(x).flatten(1) - twin(x).flatten(1)
        side = torch.randint(0, 2 * y.shape[1], (len(x),), generator=g)
        value = y.gather(1, (side // 2)[:, None])[:, 0] * (1 - 2 * (side % 2))
        (gradient,) = torch.autograd.grad(value.sum(), x)
        step = torch.rand(len(x), *[1] * low.ndim, generator=g, dtype=torch.float64)
        moved = x.detach() + step * (high - low) * gradient.sign()
        moved = torch.minimum(torch.maximum(moved, low), high)
        yield moved[: count - start]
        fresh = low + (high - low) * torch.rand(x.shape, generator=g, dtype=torch.float64)
        x = torch.where(torch.rand(len(x), *[1] * low.ndim, generator=g) < 0.9, moved, fresh)


def measure(name: str, engine: str, original: nn.Module, small: nn.Module, stars: tr.StarBatch, args) -> dict[str, Any]:
    found = tr.discrepancy(original, small, stars, budget=tr.Budget(seconds=args.seconds))
    low, high = (end[0].reshape(stars.shape) for end in stars.bounding_box()[:2])
    row = {
        "network": name,
        "engine": engine,
        "kernels": str(found.kernels),
        "status": found.status[0].value,
        "certified": float(found.max_upper),
        "attained": float(found.max_lower),
        "random": 0,
        "chosen": 0,
        "largest": 0.0,
        "outside": 0,
        "uncovered": list(found.uncovered),
    }
    points = {"random": random(low, high, args.samples), "chosen": chosen(original, small, low, high, args.chosen)}
    for kind, batches in points.items():
        for x in batches:
            y = differences(original, small, x)
            outside = (y < found.range_lower[0] - 1e-9) | (y > found.range_upper[0] + 1e-9)
            row[kind] += len(x)
            row["outside"] += int(outside.any(1).sum())
            row["largest"] = max(row["largest"], float(y.abs().max())) if len(y) else row["largest"]
    return row


def problems(row: dict[str, Any]) -> list[str]:
    """What this row shows to be wrong."""
    what = f"{row['network']} on {row['engine']}"
    found = [f"{what}: {row['outside']} samples outside of the certified range"] if row["outside"] else []
    return [*found, f"{what}: unknown kernels at {row['uncovered']}"] if row["uncovered"] else found


def pixels(x: Tensor, eps: float, size: int) -> tr.StarBatch:
    """One picture with a square of `size` x `size` pixels in the middle that vary by `eps`."""
    mask = torch.zeros(8, 8, dtype=torch.bool)
    first = (8 - size) // 2
    mask[first : first + size, first : first + size] = True
    return tr.StarBatch.from_image(x[None].double(), eps, mask, clip=(0, 1))


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--samples", type=int, default=100_000, help="random, of every certificate (default: 100000)")
    parser.add_argument("--chosen", type=int, default=10_000, help="by gradients (default: 10000)")
    parser.add_argument("--seconds", type=float, default=10.0, help="budget of one certificate (default: 10)")
    parser.add_argument("--engines", nargs="+", default=ENGINES, help="(default: all that torch has)")
    parser.add_argument("--only", default="", help="cases whose name begins so (default: all)")
    args = parser.parse_args(argv)
    common.headline(args)
    torch.manual_seed(0)
    x, y = digits()
    dense = trained(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), x, y)
    pooled = trained(pooling(), x, y, epochs=4)
    cases: list[tuple[str, nn.Sequential, Tensor, tr.StarBatch]] = [
        ("digits, dense, 4 pixels", dense, x, pixels(x[0], 0.02, 2)),
        ("digits, dense, 64 pixels", dense, x, pixels(x[1], 0.02, 8)),
        ("digits, pooling, 4 pixels", pooled, x, pixels(x[0], 0.01, 2)),
        ("digits, pooling, 64 pixels", pooled, x, pixels(x[1], 0.01, 8)),
    ]
    if (common.require_folder() / "mlperf_tiny").is_dir():
        network, windows = autoencoder()
        mask = torch.arange(640) % 160 == 0
        cases.append(("ad01, 4 inputs", network, windows, tr.StarBatch.from_image(windows[:1].double(), 0.3, mask)))
    rows = []
    for name, network, data, stars in [case for case in cases if case[0].startswith(args.only)]:
        for engine in args.engines:
            small = on_engine(engine, lambda network=network, data=data: int8(network, data))
            rows.append(measure(name, engine, copy.deepcopy(network).double(), small, stars, args))
            common.say(f"{name}, {engine}: {rows[-1]}")
    common.show(rows, COLUMNS, "int8 kernels, largest |y1 - y2|")
    return common.finish("kernels", args, rows, [p for row in rows for p in problems(row)])


if __name__ == "__main__":
    sys.exit(main())
