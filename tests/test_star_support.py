"""Differentiable support function of stars: values against linear programs, gradients against the envelope formula."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import torchreach as tr
from tests.checks import run_example
from tests.networks import DEVICES
from torchreach.core.errors import InvalidSetError, ShapeError, TorchreachError
from torchreach.lp.halfspaces import Halfspaces
from torchreach.lp.interior_point import maximize
from torchreach.lp.problem import LPBatch

pytest.importorskip("cvxpylayers")


def random_stars(seed: int, count: int = 3, features: int = 4, dim: int = 3, constraints: int = 4) -> tr.StarBatch:
    """Stars over boxes of different middles and sizes, whose constraints cut corners off."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    middle, radius = normal(count, dim), 0.01 + normal(count, dim).abs()
    A = normal(count, constraints, dim)
    inside = (A @ middle[..., None])[..., 0]
    b = inside + 0.4 * (A.abs() @ radius[..., None])[..., 0]
    origin = torch.arange(count)
    return tr.StarBatch(normal(count, 1 + dim, features), A, b, middle - radius, middle + radius, origin)


def directions(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def multipliers(stars: tr.StarBatch, g: Tensor) -> tuple[Tensor, Tensor]:
    """a* [S, M] and y* [S, P] by torchreach's own interior-point method."""
    rows, A, b = stars.normalised()
    w = (rows[:, 1:] @ g[..., None])[..., 0]
    start = stars._interior(A, b)
    found = maximize(LPBatch(w, (rows[:, 0] * g).sum(1), Halfspaces(A, b)), start, gap=1e-12)
    middle, radius = (stars.lower + stars.upper) / 2, (stars.upper - stars.lower) / 2
    return middle + radius * found.point, found.dual


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constraints", [0, 4])
def test_values_are_those_of_certified_linear_programs(constraints: int, dtype: torch.dtype, device: str) -> None:
    stars = random_stars(0, constraints=constraints).to(device, dtype)
    support = tr.StarSupport(stars)
    features = torch.eye(4, dtype=dtype, device=device).expand(3, -1, -1)
    lower, upper = stars.range()
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    found = support(features)
    assert found.dtype == dtype
    assert found.device.type == device
    torch.testing.assert_close(found, upper, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(-support(-features), lower, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(support(features[:, 1]), found[:, 1])


@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_those_of_the_envelope_theorem(seed: int) -> None:
    stars = random_stars(seed)
    g = directions(seed, 3, 4).requires_grad_()
    c, V, b = (part.clone().requires_grad_() for part in (stars.basis[:, 0], stars.basis[:, 1:], stars.b))
    value = tr.StarSupport(stars)(g, center=c, generators=V, b=b)
    dg, dc, dV, db = torch.autograd.grad(value.sum(), (g, c, V, b))
    a, y = multipliers(stars, g.detach())
    assert (y > 1e-3).any()  # constraints matter
    expected = {"g": c + (a[:, None] @ V)[:, 0], "c": g, "V": a[:, :, None] * g[:, None], "b": y}
    for found, envelope in zip((dg, dc, dV, db), expected.values(), strict=True):
        torch.testing.assert_close(found, envelope.detach(), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    stars = random_stars(5, count=2)
    support = tr.StarSupport(stars)
    inputs = (directions(5, 2, 2, 4), stars.basis[:, 0], stars.basis[:, 1:], stars.b)

    def value(g: Tensor, c: Tensor, V: Tensor, b: Tensor) -> Tensor:
        return support(g, center=c, generators=V, b=b)

    inputs = tuple(part.clone().requires_grad_() for part in inputs)
    assert torch.autograd.gradcheck(value, inputs, eps=1e-4, atol=1e-4, rtol=1e-3, nondet_tol=1e-6)


def test_a_star_grows_along_the_gradient_until_it_reaches_a_plane() -> None:
    stars = tr.StarBatch.from_box(torch.zeros(2), torch.ones(2)).intersect(torch.tensor([1.0, 1.0]), 1.0)
    support = tr.StarSupport(stars)
    b = stars.b.clone().requires_grad_()
    g = torch.tensor([[2.0, 1.0]])
    optimizer = torch.optim.SGD([b], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (support(g, b=b) - 2.5).square().sum().backward()
        optimizer.step()
    assert support(g, b=b).item() == pytest.approx(2.5, abs=1e-3)
    assert b.item() == pytest.approx(1.5, abs=1e-3)


def test_image_stars() -> None:
    stars = tr.StarBatch.from_image(torch.zeros(2, 1, 2, 2), 0.5)
    g = torch.ones(2, 1, 2, 2)
    torch.testing.assert_close(tr.StarSupport(stars)(g), torch.tensor([2.0, 2.0]))


def test_wrong_input_is_named() -> None:
    stars = random_stars(1)
    support = tr.StarSupport(stars)
    g = directions(1, 3, 4)
    with pytest.raises(ShapeError, match=r"\[3, R, \*\(4,\)\], got \(2, 4\)"):
        support(g[:2])
    with pytest.raises(ShapeError, match=r"got \(3, 1, 1, 4\)"):
        support(g[:, None, None])
    with pytest.raises(ShapeError, match=r"b must be of shape \(3, 4\), got \(3, 3\)"):
        support(g, b=stars.b[:, :3])
    with pytest.raises(ShapeError, match=r"generators must be of shape \(3, 3, 4\)"):
        support(g, generators=stars.basis)
    with pytest.raises(InvalidSetError, match="finite"):
        support(g * torch.nan)
    with pytest.raises(InvalidSetError, match=r"stars \[0, 1, 2\] have no solution"):
        support(g, b=stars.b - 100)
    with pytest.raises(ShapeError, match="predicate variables"):
        tr.StarSupport(tr.StarBatch.from_box(torch.zeros(2), torch.zeros(2)))


def test_missing_cvxpylayers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpylayers.torch", None)
    with pytest.raises(TorchreachError, match="requires cvxpylayers"):
        tr.StarSupport(tr.StarBatch.from_box(torch.zeros(2), torch.ones(2)))
    assert issubclass(TorchreachError, ValueError)


def test_the_example_of_the_docs_is_the_exact_distance_and_lowers_it():
    names = run_example("training.md", 2)
    before = tr.quantize_weights(names["original"], bits=3)
    first, last = (
        float(tr.discrepancy(names["original"], network, names["box"]).max_upper)
        for network in (before, names["student"])
    )
    assert names["history"][0] == pytest.approx(first, abs=1e-7)
    assert last < 0.5 * first
