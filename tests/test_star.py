"""Star batches: construction, set operations, refusals."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import torchreach as tr
from tests.networks import DEVICES
from torchreach.core.errors import InvalidSetError, OptionError, ShapeError, UnsupportedLayerError

INF = float("inf")
ROW = torch.zeros(1, 4)
image_star, box_star = tr.StarBatch.from_image, tr.StarBatch.from_box


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


def test_a_point_with_constraints_is_the_point_or_empty() -> None:
    point = tr.StarBatch.from_box(torch.tensor([[0.1, 0.2]]), torch.tensor([[0.1, 0.2]]))
    inside = point.intersect(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([0.4, 1.0]))
    assert inside.is_empty().tolist() == [False]
    x = torch.tensor([[0.1, 0.2]])
    low, high, box = inside.bounding_box()
    assert torch.equal(low.float(), x)
    assert torch.equal(high.float(), x)
    assert box.all()
    assert all(torch.equal(end, x) for end in inside.range())
    assert torch.equal(inside.sample(3), x[:, None].expand(-1, 3, -1))
    assert inside.contains(torch.stack((x, x + 0.1), 1)).tolist() == [[True, False]]
    found = tr.reach(nn.Linear(2, 1), inside)
    assert found.status == (tr.Status.EXACT,)
    with pytest.raises(InvalidSetError, match=r"empty stars at index \[0\]"):
        point.intersect(torch.tensor([[1.0, 1.0]]), 0.2)


def test_a_constraint_on_fixed_features_keeps_what_rounding_alone_excludes() -> None:
    box = tr.StarBatch.from_box(torch.tensor([[0.1, 0.2, 0.0]]), torch.tensor([[0.1, 0.2, 1.0]]))
    same = box.intersect(torch.tensor([1.0, 1.0, 0.0]), float(box.basis[0, 0, :2].double().sum()))
    assert not same.is_empty().any()
    assert tr.reach(nn.Linear(3, 1), same).status == (tr.Status.EXACT,)
    with pytest.raises(InvalidSetError, match="empty stars"):
        box.intersect(torch.tensor([1.0, 1.0, 0.0]), 0.29)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_images_and_half_spaces_are_rounded_outward(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(5)
    image = torch.rand(3, 40, generator=g).to(dtype)
    eps = 0.0123456789
    stars = tr.StarBatch.from_image(image, eps)
    low, high, _ = stars.bounding_box()
    exact = [float(v) for v in image.double().flatten()]
    for v, lo, hi in zip(exact, low.flatten().tolist(), high.flatten().tolist(), strict=True):
        assert Fraction(lo) <= Fraction(v) - Fraction(eps)
        assert Fraction(hi) >= Fraction(v) + Fraction(eps)
    spacing = torch.finfo(dtype).eps
    assert float(((image.double() - low) - eps).abs().max()) <= 2 * spacing
    mask = torch.rand(40, generator=g) < 0.5
    fixed = tr.StarBatch.from_image(image, eps, mask)
    assert fixed.dim == int(mask.sum())
    assert torch.equal(fixed.bounding_box()[0][:, ~mask], image[:, ~mask].double())
    small = tr.StarBatch.from_box(low, high).to(dtype=dtype)
    assert (small.bounding_box()[0] <= low).all()
    assert (small.bounding_box()[1] >= high).all()
    half = tr.StarBatch.from_box(torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)).intersect(
        torch.tensor([0.1, 0.3], dtype=torch.float64), 0.2
    )
    corner = torch.rand(2000, 2, generator=g, dtype=torch.float64)
    inside = corner[corner @ torch.tensor([0.1, 0.3], dtype=torch.float64) <= 0.2]
    assert (inside @ half.A[0, 0].double() <= half.b[0, 0].double()).all()


def test_clip_is_a_range_that_holds_the_image() -> None:
    image = torch.tensor([[0.0, 0.3, 0.9]])
    stars = tr.StarBatch.from_image(image, 0.2, clip=(0, 0.9))
    low, high, _ = stars.bounding_box()
    assert low.min() == 0
    assert high.max() == pytest.approx(0.9)
    with pytest.raises(OptionError, match=r"clip must be \(lowest, highest\) with lowest <= highest, got \(1, 0\)"):
        tr.StarBatch.from_image(image, 0.2, clip=(1, 0))
    with pytest.raises(InvalidSetError, match=r"image must lie within clip \(0, 0.5\), got values from 0 to 0.9"):
        tr.StarBatch.from_image(image, 0.2, clip=(0, 0.5))
    with pytest.raises(OptionError, match="clip must be"):
        tr.StarBatch.from_image(image, 0.2, clip=(0, float("nan")))


def test_numpy_arrays_are_taken() -> None:
    image = np.linspace(0, 1, 8).reshape(2, 4)
    stars = tr.StarBatch.from_image(image, 0.1, np.array([1, 0, 0, 1]), clip=(0, 1))
    assert (len(stars), stars.shape, stars.dim, stars.dtype) == (2, (4,), 2, torch.float64)
    assert tr.StarBatch.from_box(image, image + 1).dim == 4


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: image_star(ROW.to(torch.uint8), 1), ShapeError, r"image.float\(\) / 255"),
        (lambda: image_star(ROW.long().numpy(), 1), ShapeError, "floating-point dtype, got torch.int64"),
        (lambda: image_star(ROW, float("nan")), InvalidSetError, "eps must be a number >= 0"),
        (lambda: image_star(ROW, INF), InvalidSetError, "eps must be a number >= 0"),
        (lambda: image_star(ROW, torch.ones(3)), ShapeError, r"eps must broadcast .* \(3,\)"),
        (lambda: image_star(ROW, 1, torch.full((4,), 0.5)), InvalidSetError, "mask must hold False and True"),
        (lambda: box_star(ROW[:0], ROW[:0]), InvalidSetError, "at least one star"),
        (lambda: box_star(ROW.to_sparse(), ROW), ShapeError, "lower must be a dense tensor"),
        (lambda: box_star(ROW, ROW.to("meta")), ShapeError, "upper must be a dense tensor with values"),
        (lambda: box_star(ROW + 0j, ROW), ShapeError, "real floating-point dtype"),
        (lambda: box_star("zero", ROW), ShapeError, "lower must be a tensor or a numpy array"),
        (lambda: triangle().intersect(torch.ones(3), 1.0), ShapeError, r"normal must be \[H, 2\]"),
        (lambda: triangle().intersect(torch.ones(2), torch.ones(3)), ShapeError, r"offset must be a number or \[1\]"),
        (lambda: triangle().reshape((3,)), ShapeError, r"stars of shape \(2,\) hold 2 features"),
        (lambda: triangle().affine_map(nn.ReLU()), UnsupportedLayerError, "no affine rule for layer ReLU"),
        (lambda: triangle().affine_map(nn.Linear(3, 1)), ShapeError, r"does not accept .*: it takes 3 numbers"),
        (lambda: box_star(ROW, ROW + 1e6).to(dtype=torch.float16), InvalidSetError, "must fit into torch.float16"),
    ],
)
def test_sets_that_make_no_sense_are_refused(make, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_stars_compare_by_identity_and_print_in_one_line() -> None:
    stars = triangle()
    assert stars == stars
    assert stars != triangle()
    assert len({stars, triangle()}) == 2
    assert repr(stars) == "StarBatch(1 star of shape (2,), 2 variables, 1 constraints, torch.float64, cpu)"


def test_affine_map_reads_layers_as_networks_are_read() -> None:
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(UnsupportedLayerError, match="Twice"):
        triangle().affine_map(Twice(2, 1).double())


def test_flat_stars_take_the_shape_of_a_picture() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    flat = tr.StarBatch.from_box(torch.zeros(1, 16), torch.full((1, 16), 0.01))
    with pytest.raises(ShapeError, match=r"shape \(1, H, W\), got \(16,\); .*stars.reshape\(\(1, H, W\)\)"):
        tr.discrepancy(net, net, flat)
    picture = torch.zeros(1, 4, 4)
    with pytest.raises(ShapeError, match=r"got \(4, 4\); the first axis counts stars: one picture .* picture\[None\]"):
        tr.discrepancy(net, net, tr.StarBatch.from_box(picture, picture))
    shaped = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), net)
    assert len(tr.reach(net, flat.reshape((1, 4, 4)))) == len(tr.reach(shaped, flat))
