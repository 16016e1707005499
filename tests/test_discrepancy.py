"""Certified discrepancy against the exact mixed-integer model, samples, and itself."""

from __future__ import annotations

import copy
import itertools
import os
import signal

import pytest
import torch
from torch import Tensor, nn

import torchreach as tr
from tests.networks import DEVICES_SIM_SLOW, METHODS, random_network, random_pair, rounded_copy
from tests.test_difference import noisy_copy, pair_of
from torchreach.core.errors import OptionError, ShapeError
from torchreach.domains import difference
from torchreach.domains.hexagon import height
from torchreach.search import dual
from torchreach.search.witness import ascend
from torchreach.verbs import float_pair as portfolio

RADIUS = 0.2
in_blocks = pytest.mark.parametrize("block", [0, pytest.param(1, marks=pytest.mark.slow)])  # of seeds


def random_box(seed: int, inputs: int) -> tr.StarBatch:
    g = torch.Generator().manual_seed(seed)
    middle = torch.randn(inputs, generator=g, dtype=torch.float64) * 0.5
    return tr.StarBatch.from_box(middle - RADIUS, middle + RADIUS)


def differences(original: nn.Module, compressed: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return original(x) - compressed(x)


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.slow) for block in range(1, 20))])
def test_discrepancy_equals_the_mixed_integer_model_and_holds_for_samples(block: int) -> None:
    for seed in range(10 * block, 10 * (block + 1)):
        original, compressed, inputs = random_pair(seed)
        stars = random_box(seed, inputs)
        found = tr.discrepancy(original, compressed, stars, tr.Exact(METHODS[seed % 2]))
        reference = tr.mixed_integer_discrepancy(original, compressed, stars)
        torch.testing.assert_close(found.upper, reference.max_abs, atol=1e-6, rtol=0, msg=f"seed {seed}")
        torch.testing.assert_close(found.lower, reference.max_abs, atol=1e-6, rtol=0, msg=f"seed {seed}")
        torch.testing.assert_close(found.range_lower, reference.range_lower, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.range_upper, reference.range_upper, atol=1e-6, rtol=0)
        y = differences(original, compressed, stars.sample(10_000, seed=seed)[0])
        assert (y >= found.range_lower).all(), f"seed {seed}"
        assert (y <= found.range_upper).all(), f"seed {seed}"
        assert (y.abs() <= found.upper).all(), f"seed {seed}"


@in_blocks
@pytest.mark.parametrize("device", DEVICES_SIM_SLOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_samples_never_leave_the_range(device: str, dtype: torch.dtype, method: str, block: int) -> None:
    """Samples are evaluated in float64: the certificate speaks of the real-valued networks."""
    count = 10 if method == "vertices" else 3
    for seed in range(count * block, count * (block + 1)):
        original, compressed, inputs = random_pair(seed + 500)
        original, compressed = original.to(device, dtype), compressed.to(device, dtype)
        g = torch.Generator().manual_seed(seed)
        lower = torch.randn(3, inputs, generator=g).to(device, dtype)
        stars = tr.StarBatch.from_box(lower, lower + torch.rand(3, inputs, generator=g).to(device, dtype))
        budget = tr.Budget(stars=20) if seed % 2 else None
        found = tr.discrepancy(original, compressed, stars, tr.Exact(method), budget=budget)
        samples = stars.sample(2000, seed=seed).flatten(0, 1).double()
        y = differences(copy.deepcopy(original).double(), copy.deepcopy(compressed).double(), samples)
        y = y.reshape(3, 2000, -1)
        assert (y.amin(1) >= found.range_lower.double()).all(), f"seed {seed}"
        assert (y.amax(1) <= found.range_upper.double()).all(), f"seed {seed}"
        assert (found.lower <= found.upper).all()
        if budget is None:
            assert found.status == (tr.Status.EXACT,) * 3
            assert (found.upper - found.lower).max() < (1e-6 if dtype == torch.float64 else 1e-4)


def test_witnesses_replay_and_lie_in_the_set() -> None:
    original = random_network(1, [8, 16, 12, 3])
    compressed = rounded_copy(original, 16)
    mask = torch.zeros(8, dtype=torch.bool)
    mask[2:6] = True
    stars = tr.StarBatch.from_image(torch.rand(4, 8, dtype=torch.float64), 0.3, mask, clip=(0, 1))
    found = tr.discrepancy(original, compressed, stars)
    assert found.witness.shape == (4, 3, 8)
    y = differences(original, compressed, found.witness.flatten(0, 1)).reshape(4, 3, 3)
    torch.testing.assert_close(y.diagonal(dim1=1, dim2=2).abs(), found.lower, atol=1e-10, rtol=0)
    assert stars.contains(found.witness, tolerance=1e-9).all()
    assert (found.witness >= 0).all()
    assert (found.witness <= 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_network_has_no_discrepancy_from_itself(method: str) -> None:
    network = random_network(4, [3, 10, 8, 2])
    stars = random_box(4, 3)
    found = tr.discrepancy(network, copy.deepcopy(network), stars, tr.Exact(method))
    assert found.lower.max() == 0
    assert found.upper.max() < 1e-9
    # and exactly the single network's regions, though every cut occurs twice
    assert found.regions.tolist() == [len(tr.reach(network, stars))]


def test_swapping_the_networks_mirrors_the_range() -> None:
    original, compressed, inputs = random_pair(2)
    stars = random_box(2, inputs)
    there, back = tr.discrepancy(original, compressed, stars), tr.discrepancy(compressed, original, stars)
    torch.testing.assert_close(there.range_lower, -back.range_upper, atol=1e-9, rtol=0)
    torch.testing.assert_close(there.upper, back.upper, atol=1e-9, rtol=0)


def test_a_constant_offset_is_found_exactly() -> None:
    original = random_network(6, [3, 8, 2])
    compressed = copy.deepcopy(original)
    with torch.no_grad():
        compressed[-1].bias.sub_(torch.tensor([0.25, -0.5]))
    found = tr.discrepancy(original, compressed, random_box(6, 3))
    wanted = torch.tensor([[0.25, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(found.range_lower, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.range_upper, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.upper, wanted.abs(), atol=1e-12, rtol=0)
    assert found.max_upper.item() == pytest.approx(0.5)
    assert found.within(0.51)
    assert not found.within(0.49)


def test_a_wrong_claim_would_be_noticed() -> None:
    """The checks above can fail: `certify` refuses a claim that is a little too good or too wide."""
    from dataclasses import replace

    original, compressed, inputs = random_pair(5)
    stars = random_box(5, inputs)
    found = tr.discrepancy(original, compressed, stars)
    assert tr.certify(found, original, compressed, stars).agrees
    for change in (-1e-4, 1e-4):
        wrong = replace(found, upper=found.upper + change, range_upper=found.range_upper + change)
        assert not tr.certify(wrong, original, compressed, stars).agrees


def test_slivers_are_neither_lost_nor_multiplied() -> None:
    """Two cuts a hair apart: 1e-7 keeps its own region, 1e-12 counts as coincident; both stay certified."""
    for gap, regions in ((1e-7, 3), (1e-12, 2)):
        pair = [nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1)).double() for _ in range(2)]
        with torch.no_grad():
            for network, shift in zip(pair, (0.0, gap), strict=True):
                network[0].weight.fill_(1.0)
                network[0].bias.fill_(shift)
                network[2].weight.fill_(1.0)
                network[2].bias.zero_()
        for method in METHODS:
            stars = tr.StarBatch.from_box(-torch.ones(2).double(), torch.ones(2).double())
            found = tr.discrepancy(pair[0], pair[1], stars, tr.Exact(method))
            assert found.regions.tolist() == [regions]
            assert gap <= found.upper.item() <= gap + 1e-9


# -- branch and bound, and both in turn ---------------------------------------------------------------------

SEARCHES = [tr.Search("inputs"), tr.Search("signs")]
by_split = pytest.mark.parametrize("method", SEARCHES, ids=lambda method: method.split)


def near_pair(seed: int, inputs: int = 3) -> tuple[nn.Module, nn.Module]:
    original = random_network(seed, [inputs, 10, 8, 2])
    return original, rounded_copy(original, 8) if seed % 2 else noisy_copy(original, 1e-3, seed)


def hard_pair() -> tuple[nn.Module, nn.Module, tr.StarBatch]:
    """Far too many regions for a test, and an interval that does not close soon."""
    original = random_network(7, [12, 40, 40, 2])
    return original, noisy_copy(original, 3e-2, 7), random_box(7, 12)


def assert_holds(found: tr.Discrepancy, original: nn.Module, compressed: nn.Module, stars: tr.StarBatch) -> None:
    """No sample leaves the interval; witnesses lie in their stars and attain its lower end."""
    size, n = found.lower.shape
    networks = [copy.deepcopy(network).double() for network in (original, compressed)]
    x = stars.sample(3000, seed=1).flatten(0, 1).double()
    y = differences(networks[0], networks[1], x).reshape(size, -1, n)
    assert (y.amax(1) <= found.range_upper.double() + 1e-12).all()
    assert (y.amin(1) >= found.range_lower.double() - 1e-12).all()
    assert (y.abs().amax(1) <= found.upper.double() + 1e-12).all()
    assert (found.lower <= found.upper).all()
    y = differences(networks[0], networks[1], found.witness.flatten(0, 1).double()).reshape(size, n, n)
    assert (y.diagonal(dim1=1, dim2=2).abs() >= found.lower.double() - 1e-12).all()
    assert stars.contains(found.witness, tolerance=1e-6).all()


@in_blocks
@pytest.mark.parametrize("method", ["auto", "search", *SEARCHES], ids=str)
def test_every_method_gives_the_exact_interval_of_small_pairs(method: str | tr.Search, block: int) -> None:
    for seed in (2 * block, 2 * block + 1):
        original, compressed = near_pair(seed)
        stars = random_box(seed, 3)
        exact = tr.discrepancy(original, compressed, stars, "exact")
        found = tr.discrepancy(original, compressed, stars, method)
        # A linear program of a sliver between two nearly equal cuts can stop short of the last digits.
        by_signs = method == tr.Search("signs")
        assert by_signs or found.status == (tr.Status.EXACT,)
        for name in ("lower", "upper", "range_lower", "range_upper"):
            close = 1e-4 if by_signs else 1e-6
            torch.testing.assert_close(getattr(found, name), getattr(exact, name), atol=close, rtol=0)
        assert_holds(found, original, compressed, stars)


@in_blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["auto", "search", *SEARCHES], ids=str)
def test_nothing_leaves_the_interval_of_a_search_that_ended_early(
    method: str | tr.Search, dtype: torch.dtype, block: int
) -> None:
    for seed in range(3 * block, 3 * (block + 1)):
        original, compressed, inputs = random_pair(seed + 700)
        original, compressed = original.to(dtype), compressed.to(dtype)
        g = torch.Generator().manual_seed(seed)
        lower = torch.randn(2, inputs, generator=g, dtype=dtype)
        stars = tr.StarBatch.from_box(lower, lower + torch.rand(2, inputs, generator=g, dtype=dtype))
        found = tr.discrepancy(original, compressed, stars, method, budget=tr.Budget(stars=3))
        assert_holds(found, original, compressed, stars)
        try:
            pair = pair_of(copy.deepcopy(original).double(), copy.deepcopy(compressed).double(), (inputs,))
        except ShapeError:
            continue
        for s, (low, high) in enumerate(zip(stars.lower.double(), stars.upper.double(), strict=True)):
            attack = ascend(pair, low[None], high[None], starts=4, seed=seed).met.lower
            assert (attack[0] <= found.range_upper[s]).all()
            assert (-attack[1] >= found.range_lower[s]).all()


@by_split
def test_stars_with_constraints_and_maps_are_searched_as_they_are(method: tr.Search) -> None:
    for seed in range(2):
        original, compressed = near_pair(seed)
        g = torch.Generator().manual_seed(seed)
        box = tr.StarBatch.from_box(-torch.ones(2).double(), torch.ones(2).double())
        stars = box.affine_map(torch.randn(3, 2, generator=g).double() * 0.2, torch.randn(3, generator=g).double())
        normal = torch.randn(2, 3, generator=g).double()
        centre = stars.center[0]
        stars = stars.intersect(normal, normal @ centre + torch.tensor([0.02, 0.3]).double())
        exact = tr.discrepancy(original, compressed, stars, "exact")
        found = tr.discrepancy(original, compressed, stars, method, budget=tr.Budget(stars=300))
        assert_holds(found, original, compressed, stars)
        assert (found.range_upper >= exact.range_upper - 1e-6).all()
        assert (found.range_lower <= exact.range_lower + 1e-6).all()
        assert (found.lower <= exact.upper + 1e-9).all()
        if method.split == "inputs":  # the constraints cut boxes, and the engine that finishes them knows them
            torch.testing.assert_close(found.upper, exact.upper, atol=1e-6, rtol=0)


def test_image_stars_and_convolutions_are_searched() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).double()
    compressed = rounded_copy(original, 32)
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[0, :2, :2] = True
    stars = tr.StarBatch.from_image(torch.rand(2, 1, 3, 3).double(), 0.4, mask)
    exact = tr.discrepancy(original, compressed, stars, "exact")
    found = tr.discrepancy(original, compressed, stars, "search")
    assert found.stats.method == "inputs"
    torch.testing.assert_close(found.upper, exact.upper, atol=1e-6, rtol=0)
    assert found.witness.shape == exact.witness.shape
    assert_holds(found, original, compressed, stars)


def test_a_gap_ends_the_work_early() -> None:
    original, compressed, stars = hard_pair()
    first = tr.discrepancy(original, compressed, stars, "search", budget=tr.Budget(stars=1))
    wanted = 0.9 * float((first.upper - first.lower).max())
    found = tr.discrepancy(original, compressed, stars, "search", gap=wanted)
    assert (found.upper - found.lower).max() <= wanted
    finer = tr.discrepancy(original, compressed, stars, gap=0.7 * wanted)
    assert (finer.upper - finer.lower).max() <= 0.7 * wanted
    assert first.stats.branches < found.stats.branches < finer.stats.branches
    assert_holds(finer, original, compressed, stars)


@pytest.mark.parametrize("budget", [tr.Budget(seconds=0.3), tr.Budget(memory=1e5), tr.Budget(stars=50)], ids=str)
def test_a_spent_budget_is_an_answer(budget: tr.Budget) -> None:
    original, compressed, stars = hard_pair()
    found = tr.discrepancy(original, compressed, stars, tr.Search(), budget=budget)
    assert found.status == (tr.Status.BOUNDED,)
    assert_holds(found, original, compressed, stars)


def test_each_star_of_a_batch_has_its_own_status() -> None:
    original, compressed, hard = hard_pair()
    low, high = hard.lower[0], hard.upper[0]
    point = (low + high) / 2
    stars = tr.StarBatch.from_box(torch.stack((low, point)), torch.stack((high, point + 1e-4)))
    found = tr.discrepancy(original, compressed, stars, budget=tr.Budget(seconds=2))
    assert found.status == (tr.Status.BOUNDED, tr.Status.EXACT)
    assert_holds(found, original, compressed, stars)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("method", ["auto", "search"])
def test_ctrl_c_returns_the_interval_so_far(method: str) -> None:
    original, compressed, stars = hard_pair()
    seen: list[tr.Progress] = []

    def stop(progress: tr.Progress) -> None:
        seen.append(progress)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    found = tr.discrepancy(original, compressed, stars, method, progress=stop)
    assert found.status == (tr.Status.BOUNDED,)
    assert found.stats.seconds < 30
    assert_holds(found, original, compressed, stars)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_progress_of_a_search_only_narrows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portfolio, "REPORT_SECONDS", 0)
    original, compressed, stars = hard_pair()
    seen: list[tr.Progress] = []
    found = tr.discrepancy(original, compressed, stars, "search", budget=tr.Budget(stars=300), progress=seen.append)
    assert len(seen) > 1
    assert seen[-1].done > 0
    for before, after in itertools.pairwise(seen):
        assert (after.upper <= before.upper).all()
        assert (after.lower >= before.lower).all()
        assert (after.attained_upper >= before.attained_upper).all()
        assert after.done >= before.done
    assert (found.range_upper <= seen[-1].upper).all()


def test_turns_grow_until_one_method_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portfolio, "FIRST_SECONDS", 1e-3)
    original = random_network(3, [4, 24, 24, 2])
    compressed = noisy_copy(original, 1e-2, 3)
    stars = random_box(3, 4)
    found = tr.discrepancy(original, compressed, stars)
    exact = tr.discrepancy(original, compressed, stars, "exact")
    assert found.status == (tr.Status.EXACT,)
    assert found.stats.method == "vertices + inputs"
    torch.testing.assert_close(found.upper, exact.upper, atol=1e-6, rtol=0)


def test_sets_of_very_many_regions_are_searched_first() -> None:
    original, compressed, stars = hard_pair()
    wide = tr.StarBatch.from_box(stars.lower - 3, stars.upper + 3)
    found = tr.discrepancy(original, compressed, wide, budget=tr.Budget(seconds=1))
    assert found.stats.method.startswith("signs")
    small = tr.discrepancy(*near_pair(0), random_box(0, 3), budget=tr.Budget(stars=10_000))
    assert small.stats.method == "vertices"


@pytest.mark.parametrize("method", ["auto", "search"])
def test_networks_of_two_architectures_are_searched_to_the_exact_value(method: str) -> None:
    original, other = random_network(0, [3, 8, 2]), random_network(1, [3, 5, 5, 2])
    stars = random_box(0, 3)
    found = tr.discrepancy(original, other, stars, method)
    assert found.stats.fallback == ""
    assert "inputs" in found.stats.method or method == "auto"
    exact = tr.discrepancy(original, other, stars, tr.Exact())
    torch.testing.assert_close(found.upper, exact.upper, rtol=0, atol=2e-6)
    assert (found.upper >= exact.lower).all()


@pytest.mark.parametrize("sizes", [[12, 9, 2], [12, 6, 6, 2]], ids=str)
def test_networks_of_two_architectures_and_many_inputs_get_bounds(sizes: list[int]) -> None:
    original, other = random_network(0, [12, 10, 8, 2]), random_network(1, sizes)
    stars = random_box(0, 12)
    found = tr.discrepancy(original, other, stars, "search", budget=tr.Budget(stars=200))
    assert_holds(found, original, other, stars)
    apart = sum(
        tr.discrepancy(n, zeros(n), stars, "search", budget=tr.Budget(stars=1)).upper for n in (original, other)
    )
    assert (found.upper < apart).all()


def zeros(network: nn.Module) -> nn.Module:
    """The network with weights that are all zero."""
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for value in twin.parameters():
            value.zero_()
    return twin


@by_split
def test_a_planted_wrong_slope_is_caught(method: tr.Search, monkeypatch: pytest.MonkeyPatch) -> None:
    """The soundness checks above can fail: heights a little too low put true values outside the interval."""
    original = random_network(1, [3, 12, 12, 2])
    compressed = noisy_copy(original, 1e-2, 1)
    stars = tr.StarBatch.from_box(-torch.ones(3).double(), torch.ones(3).double())

    def search() -> tr.Discrepancy:
        return tr.discrepancy(original, compressed, stars, method, budget=tr.Budget(stars=600))

    assert_holds(search(), original, compressed, stars)

    def low(*args, **kwargs):
        value, at = height(*args, **kwargs)
        return value - 0.02, at

    for module in (difference, dual):
        monkeypatch.setattr(module, "height", low)
    with pytest.raises(AssertionError):
        assert_holds(search(), original, compressed, stars)


def test_wrong_input_is_named() -> None:
    original, compressed = near_pair(0)
    stars = random_box(0, 3)
    for method, message in (
        ("best", "method must be one of auto, exact, search, got 'best'"),
        (3, r"method must be a name, Exact\(...\) or Search\(...\), got 3"),
    ):
        with pytest.raises(OptionError, match=message):
            tr.discrepancy(original, compressed, stars, method)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="gap must be positive or None, got 0"):
        tr.discrepancy(original, compressed, stars, gap=0)
    with pytest.raises(OptionError, match=r"Search.split must be one of auto, inputs, signs, got 'both'"):
        tr.Search("both")
    for method in ("auto", "search"):
        with pytest.raises(ShapeError):
            tr.discrepancy(original, compressed, random_box(0, 4), method)
