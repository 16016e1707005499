"""Planes that see the inputs of the first hidden layer together."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import torchreach as tr
from tests.data import require_data
from tests.networks import DEVICES, random_network
from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.domains import spectral
from torchreach.domains.difference import difference_bounds
from torchreach.domains.pair import Pair
from torchreach.read.steps import steps


def forms(seed: int, neurons: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """c [1, 1, F], A [1, 1, F, n] and weights [1, 2, F] of two rows."""
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(1, 1, neurons, generator=g, dtype=torch.float64) * (seed % 2)
    A = torch.randn(1, 1, neurons, inputs, generator=g, dtype=torch.float64)
    return c, A, torch.rand(1, 2, neurons, generator=g, dtype=torch.float64)


def corners(inputs: int) -> Tensor:
    return torch.tensor(list(product((-1.0, 1.0), repeat=inputs)), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(6))
def test_sums_of_absolute_values_are_bounded_within_pi_half(seed):
    c, A, weight = forms(seed, neurons=7, inputs=10)
    kappa, share = spectral._sizes(c, A, weight)
    omega = weight / (4 * kappa)
    # sum w |v| / 2 <= sum omega v^2 + w kappa / 4, v = c + A x; the linear part 2 omega c A x is taken at corners
    x = corners(10)
    v = c[0, 0, :, None] + A[0, 0] @ x.T  # [F, X]
    true = (weight[0, :, :, None] * v.abs() / 2).sum(1).amax(1)
    spread = spectral._spread(A, omega, share)[0]
    linear = ((2 * omega * c)[0] @ (A[0, 0] @ x.T)).amax(1)
    bound = spread + linear + (weight * kappa / 4 + omega * c**2).sum(2)[0]
    assert (bound >= true).all()
    assert (bound <= 1.65 * true).all()
    alone = (weight * (c.abs() + A.abs().sum(3)) / 2).sum(2)[0]
    assert (bound < 0.9 * alone).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_spread_holds_in_rational_arithmetic(seed):
    _, A, weight = forms(seed, neurons=5, inputs=6)
    omega, share = weight / 3, torch.rand(1, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    spread = spectral._spread(A, omega, share)[0]
    rows = [[Fraction(value) for value in row] for row in A[0, 0].tolist()]
    for r in range(2):
        weights = [Fraction(value) for value in omega[0, r].tolist()]
        for x in corners(6).long().tolist():
            values = [sum(a * k for a, k in zip(row, x, strict=True)) for row in rows]
            assert sum(w * v**2 for w, v in zip(weights, values, strict=True)) <= Fraction(float(spread[r]))


def test_numbers_that_overflow_say_nothing():
    _, A, weight = forms(0, neurons=4, inputs=5)
    spread = spectral._spread(A * 1e200, weight, torch.ones(1, 2, 5, dtype=torch.float64))
    assert not spread.isfinite().any()


def pair_of(sizes: list[int], seed: int, device: str, levels: int) -> tuple[Pair, torch.nn.Module, torch.nn.Module]:
    original = random_network(seed, sizes)
    compressed = tr.quantize_weights(original, bits=levels)
    both = [
        steps(network, (sizes[0],), dtype=torch.float64, device=torch.device(device))
        for network in (original, compressed)
    ]
    return Pair.of(tuple(both[0]), tuple(both[1])), original, compressed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [[40, 24, 16, 3], [60, 30, 12, 10, 2], [30, 16, 1]], ids=str)
def test_no_input_leaves_the_bounds_and_they_are_tighter(sizes, device):
    for seed in (1, 2):
        pair, original, compressed = pair_of(sizes, seed, device, 5)
        g = torch.Generator().manual_seed(seed)
        middle = torch.rand(1, sizes[0], generator=g, dtype=torch.float64)
        low, high = middle - 0.4, middle + 0.4
        before = difference_bounds(pair, low, high)
        after = difference_bounds(pair, low, high, together=NO_LIMIT)
        for old, new in zip(before, after, strict=True):
            assert (new.u1 - new.l1 <= old.u1 - old.l1 + 1e-9).all()
            assert (new.du - new.dl <= old.du - old.dl + 1e-9).all()
        old, new = before[-1].sides.cpu(), after[-1].sides.cpu()
        assert (new < 0.97 * old).all()
        x = torch.rand(4000, sizes[0], generator=g, dtype=torch.float64)
        x[2000:] = x[2000:].round()
        x = (low + (high - low) * x).requires_grad_()
        with torch.enable_grad():  # towards the worst corner of each output, from every point
            y = original(x) - compressed(x)
            (slope,) = torch.autograd.grad(y[torch.arange(len(y)), torch.arange(len(y)) % y.shape[1]].sum(), x)
        worst = torch.where(slope > 0, high, low)
        for points in (x.detach(), worst, low + high - worst):
            with torch.no_grad():
                y = original(points) - compressed(points)
                z = original[0](points).relu()
                z = original[2](z) if len(sizes) > 2 else z
            assert (y <= new[0, 0]).all()
            assert (-y <= new[0, 1]).all()
            if len(sizes) > 3:
                assert (z <= after[1].u1.cpu()).all()
                assert (z >= after[1].l1.cpu()).all()


def test_rows_whose_turn_comes_too_late_keep_their_bounds():
    pair, *_ = pair_of([40, 24, 16, 3], 1, "cpu", 5)
    low, high = torch.zeros(1, 40, dtype=torch.float64), torch.ones(1, 40, dtype=torch.float64)
    before, after = difference_bounds(pair, low, high), difference_bounds(pair, low, high, together=Clock(0.0))
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.pack(), new.pack())


def test_few_inputs_are_not_asked():
    pair, *_ = pair_of([6, 8, 2], 0, "cpu", 5)
    low, high = -torch.ones(1, 6, dtype=torch.float64), torch.ones(1, 6, dtype=torch.float64)
    before, after = difference_bounds(pair, low, high), difference_bounds(pair, low, high, together=NO_LIMIT)
    assert torch.equal(before[-1].sides, after[-1].sides)


def test_pictures_of_784_pixels():
    require_data("fnn_repair", "images.npy")
    from benchmarks import exact_mnist

    networks = exact_mnist.networks()
    images = np.load(require_data("fnn_repair", "images.npy"))
    both = [steps(f, (784,), dtype=torch.float64, device=torch.device("cpu")) for f in networks]
    pair = Pair.of(tuple(both[0]), tuple(both[1]))
    x = torch.from_numpy(images)[0].double().reshape(1, -1)
    low, high = (x - 0.1).clamp(-1, 1), (x + 0.1).clamp(-1, 1)
    before, after = difference_bounds(pair, low, high), difference_bounds(pair, low, high, together=NO_LIMIT)
    assert float(before[-1].sides.amax()) > 0.39
    assert float(after[-1].sides.amax()) < 0.28
    open_ = ~before[1].settled()
    widths = [(bounds[1].du - bounds[1].dl)[open_].mean() for bounds in (before, after)]
    assert widths[1] < 0.75 * widths[0]


@pytest.mark.parametrize(
    "seed", [6, 10, pytest.param(1, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)]
)
def test_bounds_and_searches_hold_the_exact_maximum(seed):
    inputs = (18, 24, 32)[seed % 3]
    original = random_network(seed, [inputs, 10, 6, 2])
    compressed = tr.quantize_weights(original, bits=4 + seed % 3) if seed % 2 else tr.prune_weights(original, 0.3)
    g = torch.Generator().manual_seed(seed)
    middle = torch.rand(inputs, generator=g, dtype=torch.float64)
    radius = 0.15 + 0.2 * float(torch.rand(1, generator=g))
    low, high = middle - radius, middle + radius
    stars = tr.StarBatch.from_box(low, high)
    exact = tr.discrepancy(original, compressed, stars, tr.Exact("programs"))
    assert exact.status == (tr.Status.EXACT,)
    both = [steps(f, (inputs,), dtype=torch.float64, device=torch.device("cpu")) for f in (original, compressed)]
    bounds = difference_bounds(Pair.of(tuple(both[0]), tuple(both[1])), low[None], high[None], together=NO_LIMIT)
    upper = torch.maximum(bounds[-1].sides[0, 0], bounds[-1].sides[0, 1])
    assert (upper >= exact.lower[0] - 1e-12).all()
    searched = tr.discrepancy(original, compressed, stars, tr.Search("signs"), budget=tr.Budget(stars=200))
    assert (searched.upper >= exact.lower - 1e-12).all()
    assert (searched.lower <= exact.upper + 1e-12).all()
