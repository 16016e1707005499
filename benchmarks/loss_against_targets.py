"""Repair on a certified loss against repair on targets, on the same budget of CPU seconds.

The paper's MNIST pair (weight-only int8) and a 4-bit copy of its original are retrained on boxes around training
images with the two losses of `tr.repair`: mean squared error to targets (pointwise step, alpha 2) at random points,
and `tr.DiscrepancyLoss`, with the bounds of hidden neurons held (as repair does) or in the gradient. All distil the
original on the training images as well (`data`). Judged by the certified discrepancy on the boxes of held-out test
images, largest output, and by accuracy on all test images.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import torchreach as tr
from benchmarks import common
from benchmarks.exact_mnist import networks
from torchreach.compress.constraints import Constraints
from torchreach.training.fit import run
from torchreach.training.students import BOXES, WeightStudent

COLUMNS = ("student", "boxes", "loss", "rate", "CPU s", "steps", "mean", "largest", "accuracy %")
LOSSES = ("targets", "certified", "certified, full gradient")
RATES = {"4 bits": (1e-3, 5e-3), "8 bits": (2e-5, 2e-4)}  # the loss that takes fewer steps needs larger ones
Box = tuple[Tensor, Tensor]


def mnist(train: bool) -> Box:
    """Images [B, 784] in [-1, 1] and labels, unpacked from the archives into a temporary folder."""
    from torchvision.datasets import MNIST

    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(common.require_folder() / "mnist", folder, dirs_exist_ok=True)
        data = MNIST(folder, train=train, download=True)
        return data.data.float().flatten(1) / 127.5 - 1, data.targets


def boxes(kind: str, images: Tensor) -> Box:
    """The 4 centre pixels within 0.05, or all pixels within 0.005."""
    if kind == "all +-0.005":
        return (images - 0.005).clamp(-1, 1), (images + 0.005).clamp(-1, 1)
    radius = torch.zeros(28, 28)
    radius[13:15, 13:15] = 0.05
    return images - radius.flatten(), images + radius.flatten()


def certified(original: nn.Module, student: nn.Module, box: Box) -> Tensor:
    """[B] certified bounds of the largest output difference."""
    loss = tr.DiscrepancyLoss(original, student, reduction="none")
    with torch.no_grad():
        return torch.cat([loss(*part).amax(1) for part in zip(*(end.split(20) for end in box), strict=True)])


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((run(network, images).argmax(1) == labels).double().mean())


def retrained(
    original: nn.Module, given: nn.Module, box: Box, data: Box, loss: str, rate: float, seconds: float
) -> tuple[nn.Module, int, float]:
    """The student, its number of optimiser steps and CPU seconds.

    As in repair, Adam starts afresh in every retraining, at a lower rate. One epoch shows what an epoch costs; every
    further retraining takes half of what is left.
    """
    training = tr.RepairOptions(samples=10, epochs=1, learning_rate=rate, data_weight=0.1)
    certify = None if loss == "targets" else (original, *box)
    student = WeightStudent(given, Constraints.read(given), training, 0, certify)
    if loss == "certified, full gradient":
        student.bound = tr.DiscrepancyLoss(original, student.network)
    generator = torch.Generator().manual_seed(0)
    images = len(box[0])
    per_epoch = -(-images // BOXES) if certify else -(-images * training.samples // training.batch_size)
    began, used, cost, epochs = time.process_time(), 0.0, 0.0, 0
    while used + cost < seconds:
        share = torch.rand(training.samples, *box[0].shape, generator=generator)
        x = (box[0] + (box[1] - box[0]) * share).flatten(0, 1)
        y1, y2 = run(original, x), run(student.network, x)
        student.retrain(x, y2 + (y1 - y2) / 2, data, 1 - used / seconds)
        epochs += student.training.epochs
        last, used = used, time.process_time() - began
        cost = (used - last) / student.training.epochs
        student.training = replace(training, epochs=max(1, int((seconds - used) / 2 / cost)))
    return student.network, epochs * per_epoch, used


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="CPU seconds of each repair (default: 8)")
    parser.add_argument("--images", type=int, default=200, help="training images with a box (default: 200)")
    parser.add_argument("--held-out", type=int, default=100, help="test images judged (default: 100)")
    args = parser.parse_args(argv)
    common.headline(args)
    torch.manual_seed(0)
    original, int8 = (network.float() for network in networks())
    students = {"4 bits": tr.quantize_weights(original, 4), "8 bits": int8}
    images, _ = mnist(train=True)
    tests, labels = mnist(train=False)
    data = images, run(original, images)
    held = tests[torch.randperm(len(tests), generator=torch.Generator().manual_seed(0))[: args.held_out]]
    rows = []
    for name, given in students.items():
        for kind in ("4 pixels +-0.05", "all +-0.005"):
            for loss, rate in (("none", None), *((loss, rate) for loss in LOSSES for rate in RATES[name])):
                network, steps, spent = given, 0, 0.0
                if rate is not None:
                    box = boxes(kind, images[: args.images])
                    network, steps, spent = retrained(original, given, box, data, loss, rate, args.seconds)
                bound = certified(original, network, boxes(kind, held))
                row = {
                    "student": name,
                    "boxes": kind,
                    "loss": loss,
                    "rate": rate,
                    "CPU s": spent,
                    "steps": steps,
                    "mean": float(bound.mean()),
                    "largest": float(bound.max()),
                    "accuracy %": accuracy(network, tests, labels),
                }
                rows.append(row)
                common.say(f"{name}, {kind}, {loss} at {rate}: {row['mean']:.4g}, {row['accuracy %']:.2f} %")
    common.show(rows, COLUMNS, "Certified discrepancy on held-out images after repair")
    return common.finish("loss_against_targets", args, rows, [])


if __name__ == "__main__":
    sys.exit(main())
