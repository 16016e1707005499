"""Star batches: construction, set operations, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchreach as tr
from tests.networks import DEVICES
from torchreach.errors import InvalidSetError, ShapeError

INF = float("inf")


def triangle() -> tr.StarBatch:
    """{x in [0, 1]^2 : x_1 + x_2 <= 1}, as one star."""
    box = tr.StarBatch.from_box(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    return box.intersect(torch.ones(2), 1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_box_is_represented_exactly(device: str, dtype: torch.dtype) -> None:
    lower = torch.tensor([[0.1, -0.3, 7.0], [0.2, 5.0, 6.0]], dtype=dtype, device=device)
    upper = lower + torch.tensor([0.3, 0.0, 1e-3], dtype=dtype, device=device)
    stars = tr.StarBatch.from_box(lower, upper)
    assert (len(stars), stars.shape, stars.dim, stars.dtype) == (2, (3,), 2, dtype)
    low, high = stars.range()
    torch.testing.assert_close(low, lower, atol=1e-12, rtol=2e-7)
    assert (low <= lower).all()
    assert (high >= upper).all()
    samples = stars.sample(200, seed=1)
    assert (samples >= lower[:, None]).all()
    assert (samples <= upper[:, None]).all()


def test_an_image_star_moves_only_masked_pixels() -> None:
    image = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3, 1:3] = True
    stars = tr.StarBatch.from_image(image, 0.2, mask, clip=(0, 1))
    assert stars.shape == (1, 4, 4)
    assert stars.dim == 4
    samples = stars.sample(50)
    assert torch.equal(samples[:, :, :, ~mask], image[:, None, :, ~mask].expand(-1, 50, -1, -1))
    assert (samples >= 0).all()
    assert (samples <= 1).all()


def test_affine_map_is_the_layer_on_every_point() -> None:
    stars = tr.StarBatch.from_box(torch.zeros(2, 1, 6, 6), torch.ones(2, 1, 6, 6))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.Flatten())
    network[1].running_mean.uniform_(-1, 1)
    network[1].running_var.uniform_(0.5, 2)
    network.eval()
    image = stars
    for layer in network:
        image = image.affine_map(layer)
    predicate = torch.rand(2, 7, stars.dim) * 2 - 1
    with torch.no_grad():
        wanted = network(stars.point(predicate).flatten(0, 1).float()).reshape(2, 7, -1)
    torch.testing.assert_close(image.point(predicate).float(), wanted, atol=1e-5, rtol=1e-5)


def test_affine_map_takes_a_matrix() -> None:
    W, b = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])
    low, high = tr.StarBatch.from_box(-torch.ones(2), torch.ones(2)).affine_map(W, b).range()
    assert (low.item(), high.item()) == pytest.approx((0.0, 6.0), abs=1e-5)


def test_exact_ranges_respect_constraints() -> None:
    low, high = triangle().affine_map(torch.tensor([[1.0, 1.0], [2.0, 1.0]], dtype=torch.float64)).range()
    torch.testing.assert_close(low, torch.zeros(1, 2, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(high, torch.tensor([[1.0, 2.0]], dtype=torch.float64), atol=1e-8, rtol=0)


def test_contains_tells_points_inside_from_outside() -> None:
    points = torch.tensor([[[0.2, 0.3], [0.5, 0.5], [0.6, 0.6], [-0.1, 0.2], [0.0, 1.0]]], dtype=torch.float64)
    assert triangle().contains(points).tolist() == [[True, True, False, False, True]]


def test_samples_of_a_constrained_star_lie_in_it() -> None:
    stars = triangle()
    samples = stars.sample(300, seed=3)
    assert stars.contains(samples).all()
    # hit-and-run must not stay near its start
    assert samples[0, :, 0].max() > 0.8
    assert samples[0, :, 1].max() > 0.8


def test_select_and_cat_are_inverse() -> None:
    stars = tr.StarBatch.from_box(torch.zeros(3, 2), torch.rand(3, 2) + 0.5)
    parts = [stars.select([0]), stars.select(torch.tensor([1, 2]))]
    joined = tr.StarBatch.cat(parts)
    for name in ("basis", "A", "b", "lower", "upper", "origin"):
        assert torch.equal(getattr(joined, name), getattr(stars, name))


def test_cat_pads_constraints_without_changing_the_sets() -> None:
    free = tr.StarBatch.from_box(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    low, high = tr.StarBatch.cat([triangle(), free]).affine_map(torch.ones(1, 2, dtype=torch.float64)).range()
    torch.testing.assert_close(high[:, 0], torch.tensor([1.0, 2.0], dtype=torch.float64), atol=1e-8, rtol=0)


def test_to_moves_dtype() -> None:
    stars = triangle().to(dtype=torch.float32)
    assert {stars.basis.dtype, stars.A.dtype, stars.lower.dtype} == {torch.float32}
    assert stars.origin.dtype == torch.long


@pytest.mark.parametrize(
    ("lower", "upper", "error", "message"),
    [
        ([0.0, 2.0], [1.0, 1.0], InvalidSetError, r"lower must not exceed upper, got 2.0 > 1.0 at index \(1,\)"),
        ([0.0], [float("nan")], InvalidSetError, "upper must be finite"),
        ([-INF], [0.0], InvalidSetError, "lower must be finite, .* unbounded"),
        ([0.0], [1.0, 2.0], ShapeError, r"one shape, got \(1,\) and \(2,\)"),
        (0.0, 1.0, ShapeError, "at least one axis"),
    ],
)
def test_bad_boxes_are_refused(lower: list, upper: list, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        tr.StarBatch.from_box(torch.tensor(lower), torch.tensor(upper))


def test_boxes_of_whole_numbers_are_refused() -> None:
    with pytest.raises(ShapeError, match="floating-point dtype, got torch.int64"):
        tr.StarBatch.from_box(torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long))


def test_empty_stars_are_refused_by_index() -> None:
    stars = tr.StarBatch.from_box(torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [3.0, 3.0]]))
    with pytest.raises(InvalidSetError, match=r"empty stars at index \[0\]"):
        stars.intersect(torch.tensor([-1.0, -1.0]), -4.0)


def test_malformed_stars_are_refused() -> None:
    good = triangle()
    parts = {name: getattr(good, name) for name in ("basis", "A", "b", "lower", "upper", "origin")}
    wrong = [
        ({"A": good.A[:, :, :1]}, ShapeError, r"A must have shape \(1, 1, 2\)"),
        ({"b": good.b * float("nan")}, InvalidSetError, "b must be finite"),
        ({"upper": good.upper * INF}, InvalidSetError, "predicate bound upper must be finite: the star is unbounded"),
        ({"lower": good.upper + 1}, InvalidSetError, "lower > upper: the star is empty"),
        ({"b": good.b.float()}, ShapeError, "b must be torch.float64 like the basis"),
        ({"basis": good.basis[0, 0]}, ShapeError, "basis must be"),
    ]
    for change, error, message in wrong:
        with pytest.raises(error, match=message):
            tr.StarBatch(**{**parts, **change})


def test_image_options_are_checked() -> None:
    with pytest.raises(InvalidSetError, match="eps must be a number >= 0, got -0.1"):
        tr.StarBatch.from_image(torch.zeros(1, 4), -0.1)
    with pytest.raises(ShapeError, match=r"mask must broadcast to the image's shape \(1, 4\), got \(3,\)"):
        tr.StarBatch.from_image(torch.zeros(1, 4), 0.1, torch.ones(3, dtype=torch.bool))


def test_a_flat_star_is_not_empty() -> None:
    line = triangle().intersect(torch.tensor([[-1.0, -1.0]]), -1.0)  # x_1 + x_2 == 1
    low, high = line.affine_map(torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)).range()
    torch.testing.assert_close(low[0], torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(high[0], torch.tensor([1.0, 1.0], dtype=torch.float64), atol=1e-6, rtol=0)
