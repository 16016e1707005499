"""A MobileNet-like stack of blocks and students of other depth: certified, repaired, saved, loaded again."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchreach as tr
from torchreach.read.load import load
from torchreach.read.module import chain
from torchreach.read.save import save

SHAPE = (1, 4, 4)


class Block(nn.Module):
    """Expand, depthwise, project: an inverted residual block with ReLU6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1, bias=False), nn.BatchNorm2d(2 * channels), nn.ReLU6(),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels), nn.ReLU6(),
            nn.Conv2d(2 * channels, channels, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def mobile(blocks: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU6(), *(Block(2) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2),
    ).double().eval()  # fmt: skip


def few_pixels(radius: float, pixels: int = 2) -> tr.StarBatch:
    """One image of which a few pixels vary."""
    centre = torch.rand(1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spread = torch.zeros_like(centre)
    spread.flatten()[5 : 5 + pixels] = radius
    return tr.StarBatch.from_box(centre - spread, centre + spread)


def assert_same(found: tr.Discrepancy, expected: tr.Discrepancy) -> None:
    assert found.status == expected.status == (tr.Status.EXACT,)
    torch.testing.assert_close(found.upper, expected.upper, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.lower, expected.lower, rtol=0, atol=1e-9)


@pytest.mark.parametrize("depth", [0, 1], ids=["shallower", "same depth"])
def test_a_student_is_certified_repaired_saved_and_loaded(tmp_path: Path, depth: int) -> None:
    teacher, stars = mobile(1, 0), few_pixels(0.2)
    student = mobile(0, 1) if depth == 0 else tr.quantize_weights(teacher, bits=4)
    training = tr.RepairOptions(epochs=30, samples=50)
    result = tr.repair(teacher, student, stars, target=0.5, alpha=1.0, iterations=3, training=training)
    assert result.satisfied
    assert float(result.after.upper.max()) <= 0.5 * float(result.before.upper.max())
    x = stars.sample(500)[0]
    with torch.no_grad():
        assert ((teacher(x) - result.network(x)).abs() <= result.after.upper + 1e-9).all()
    certified = tr.discrepancy(teacher, result.network, stars)
    lowered = chain(result.network, SHAPE)
    for network, file in product((result.network, lowered), ("student.pt2", "student.onnx")):
        save(network, tmp_path / file, SHAPE)
        again = tr.discrepancy(teacher, load(tmp_path / file), stars)
        assert_same(again, certified)
        assert again.regions.equal(certified.regions)


def test_a_certified_loss_repairs_a_network_with_skips() -> None:
    teacher, stars = mobile(1, 0), few_pixels(0.05)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.05 * torch.randn(value.shape, dtype=value.dtype))
    training = tr.RepairOptions(epochs=20, learning_rate=1e-2)
    result = tr.repair(teacher, student, stars, target=0.5, loss="certified", iterations=2, training=training)
    assert result.satisfied


def test_the_certified_loss_bounds_networks_with_skips_and_has_gradients() -> None:
    teacher = mobile(1, 0)
    student = tr.quantize_weights(teacher, bits=4)
    loss = tr.DiscrepancyLoss(teacher, student, reduction="none")
    stars = few_pixels(0.05)
    lower, upper, _ = stars.bounding_box()
    bound = loss(lower.reshape(1, *SHAPE), upper.reshape(1, *SHAPE))
    x = stars.sample(500)[0]
    with torch.no_grad():
        assert ((teacher(x) - student(x)).abs() <= bound).all()
        assert (bound <= 20 * tr.discrepancy(teacher, student, stars).upper + 1e-9).all()
    bound.sum().backward()
    for value in student.parameters():
        assert value.grad is not None
        assert value.grad.isfinite().all()
    assert max(float(value.grad.abs().max()) for value in student.parameters()) > 0  # type: ignore[union-attr]
