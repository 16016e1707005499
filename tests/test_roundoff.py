"""Allowances for rounding, held in rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from tests.networks import DEVICES
from torchreach.core.roundoff import SINGLE, UNIT_ROUNDOFF, above, allowance, ball, below, floor_log2, gamma


def numbers(seed: int, count: int) -> torch.Tensor:
    """Numbers of many sizes and both signs, subnormal ones among them."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-40, 40, (count,), generator=g)
    sizes[:: count // 8] = -1074 + torch.arange(len(sizes[:: count // 8]))
    return torch.ldexp(torch.randn(count, generator=g, dtype=torch.float64), sizes)


def exact(values: torch.Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.tolist()]


@pytest.mark.parametrize("seed", range(4))
def test_a_ball_covers_its_interval(seed):
    first = numbers(seed, 400)
    near = torch.nextafter(first, torch.full_like(first, torch.inf))
    for second in (numbers(seed + 10, 400), first * (1 + 3e-16), near, first, torch.zeros_like(first)):
        low, high = torch.minimum(first, second), torch.maximum(first, second)
        middle, radius = ball(low, high)
        for a, b, m, r in zip(*map(exact, (low, high, middle, radius)), strict=True):
            assert m - r <= a <= b <= m + r
        assert (radius <= (high - low) * 0.5 * (1 + 1e-14) + 1e-15 * middle.abs() + 1e-300).all()


@pytest.mark.parametrize("seed", range(4))
def test_above_and_below_undo_the_last_operations(seed):
    a, b = numbers(seed, 400), numbers(seed + 20, 400)
    for x, y, low, high in zip(*map(exact, (a, b, below(a + b), above(a + b))), strict=True):
        assert low <= x + y <= high
    large = (a * b).abs() > 1e-290  # products may underflow
    for x, y, low, high in zip(*(exact(part[large]) for part in (a, b, below(a * b), above(a * b))), strict=True):
        assert low <= x * y <= high


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float64, UNIT_ROUNDOFF), (torch.float32, SINGLE)])
@pytest.mark.parametrize("terms", [1, 3, 50, 400])
def test_gamma_holds_for_sums_in_any_order(terms, dtype, unit):
    g = torch.Generator().manual_seed(terms)
    for _ in range(10):
        a, b = (torch.randn(terms, generator=g, dtype=dtype) for _ in range(2))
        b[-1] = -(a[:-1] @ b[:-1]) / a[-1]  # nearly all of it cancels
        products = [x * y for x, y in zip(exact(a), exact(b), strict=True)]
        size = sum(map(abs, products))
        running = (a * b).cumsum(0)[-1]
        for computed in (a @ b, b.flip(0) @ a.flip(0), (a * b).sum(), running):
            lost = abs(Fraction(computed.item()) - sum(products))
            assert lost <= Fraction(gamma(terms, unit)) * size


def test_an_allowance_counts_operations():
    x = numbers(5, 100)
    value = ((x + 0.1) * 0.7 - 0.3) / 3
    size = x.abs() + 1
    for computed, at, allowed in zip(*map(exact, (value, x, allowance(size, 8))), strict=True):
        true = ((at + Fraction(0.1)) * Fraction(0.7) - Fraction(0.3)) / 3
        assert abs(computed - true) <= allowed


@pytest.mark.parametrize("device", DEVICES)
def test_powers_of_two_are_exact(device):
    exponents = torch.arange(-1000, 1001)
    powers = torch.tensor([2.0**k for k in exponents.tolist()], dtype=torch.float64).to(device)
    assert floor_log2(powers).cpu().equal(exponents)
    below_next = torch.nextafter(2 * powers, torch.zeros_like(powers))
    assert floor_log2(below_next).cpu().equal(exponents)
    # what fixed-point kernels and float formats are read with
    exponents = exponents.to(device)
    assert torch.exp2(exponents.double()).equal(powers)
    assert torch.ldexp(torch.ones_like(powers), exponents).equal(powers)


@pytest.mark.parametrize("device", DEVICES)
def test_logarithms_of_whole_numbers(device):
    bits = torch.arange(63)
    assert floor_log2((torch.ones_like(bits) << bits).to(device)).cpu().equal(bits)
    near = torch.tensor([3, 7, 8, 9, 1023, 1024, 2**40 - 1, 2**52 - 1], device=device)
    assert floor_log2(near).tolist() == [1, 2, 3, 3, 9, 10, 39, 51]
