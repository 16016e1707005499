"""Comparisons of float networks under any budget: a valid interval that is attained, wherever the clock ends it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import torchreach as tr
from tests.checks import assert_attained, assert_valid
from tests.clocks import expiring, pressed
from tests.networks import random_network, rounded_copy
from tests.test_difference import boxes, noisy_copy, pair_of, samples
from torchreach.core.clock import OutOfTime
from torchreach.core.results import Reason
from torchreach.domains.box_difference import first_bounds
from torchreach.domains.difference import difference_bounds, interval_difference
from torchreach.domains.joint import Both
from torchreach.search import signs
from torchreach.search.boxes import search_boxes
from torchreach.search.result import Question
from torchreach.search.signs import search_signs
from torchreach.verbs.float_pair import compare

METHODS = {
    "auto": None,
    "vertices": tr.Exact("vertices"),
    "programs": tr.Exact("programs", "zonotope"),
    "inputs": tr.Search("inputs"),
    "signs": tr.Search("signs"),
}
SIGNED = Question("signed")
ENDED = {Reason.CLOSED, Reason.BUDGET}


def networks(dtype: torch.dtype, sizes: tuple[int, ...] = (4, 8, 7, 2)) -> tuple[nn.Module, nn.Module]:
    original = random_network(3, list(sizes)).to(dtype)
    return original, tr.quantize_weights(original, 6)


def star(kind: str, dtype: torch.dtype) -> tr.StarBatch:
    """A box, a box under a constraint that its centre satisfies, or the image of a box."""
    box = tr.StarBatch.from_image(torch.linspace(-0.3, 0.5, 4, dtype=dtype)[None], 0.25)
    if kind == "constrained":
        return box.intersect(torch.ones(1, 4, dtype=dtype), 0.6)
    g = torch.Generator().manual_seed(1)
    return box if kind == "box" else box.affine_map(torch.randn(4, 4, generator=g, dtype=torch.float64).to(dtype) / 2)


def differences(original: nn.Module, compressed: nn.Module) -> Callable[[Tensor], Tensor]:
    one, two = copy.deepcopy(original).double(), copy.deepcopy(compressed).double()
    return lambda x: (one(x.double()) - two(x.double())).detach()


def compared(
    pair: tuple[nn.Module, nn.Module], stars: tr.StarBatch, clock, method=None, question: Question = SIGNED, **options
) -> tr.Discrepancy:
    budget = options.pop("budget", tr.Budget())
    return compare(
        *pair, stars, method, question, budget=budget, tolerances=tr.Tolerances(), progress=None, clock=clock, **options
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["box", "constrained", "mapped"])
def test_a_comparison_that_ends_at_any_look_is_valid_and_attained(kind: str, method: str) -> None:
    for dtype, looks in ((torch.float32, 0), (torch.float64, 8), (torch.float32, 40)):
        pair, stars = networks(dtype), star(kind, dtype)
        found = compared(pair, stars, expiring(looks), METHODS[method])
        assert_valid(found, differences(*pair), stars)
        assert set(found.reasons) <= ENDED
        assert found.max_lower.min() > 0


def test_a_first_look_attains_more_than_random_inputs_do() -> None:
    torch.manual_seed(0)
    original = random_network(0, [16, 64, 32, 32, 5])
    compressed = tr.prune_weights(original, 0.7)
    stars = tr.StarBatch.from_image(torch.randn(2, 16, dtype=torch.float64), 0.05)
    found = compared((original, compressed), stars, expiring(0))
    seen = differences(original, compressed)(stars.sample(3000).flatten(0, 1)).unflatten(0, (2, 3000)).abs().amax(1)
    assert (found.lower >= seen).all()


def test_linear_networks_of_many_inputs_are_exact_without_time() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(1024, 25))
    compressed = tr.quantize_weights(original, 8)
    stars = tr.StarBatch.from_box(torch.zeros(1024), torch.full((1024,), 0.01))
    found = compared((original, compressed), stars, expiring(0))
    W = (original[0].weight - compressed[0].weight).detach().double()
    exact = 0.01 * torch.maximum(W.clamp(min=0).sum(1), -W.clamp(max=0).sum(1))
    assert ((found.upper[0] - exact).abs() <= 1e-5 * exact).all()
    assert ((found.lower[0] - exact).abs() <= 1e-5 * exact).all()
    assert found.reasons == (Reason.CLOSED,)


def test_ctrl_c_is_the_reason_wherever_it_comes() -> None:
    pair, stars = networks(torch.float64), star("box", torch.float64)
    for looks in (0, 6):
        for method in METHODS.values():
            found = compared(pair, stars, pressed(looks), method)
            assert_attained(found, differences(*pair), stars)
            assert found.reasons == (Reason.INTERRUPTED,)


@pytest.mark.parametrize("method", METHODS)
def test_a_tolerance_ends_every_method_with_the_first_answer(method: str) -> None:
    pair, stars = networks(torch.float64), star("box", torch.float64)
    full = tr.discrepancy(*pair, stars)
    low = tr.discrepancy(*pair, stars, METHODS[method], tolerance=0.9 * float(full.max_lower))
    assert low.reasons == (Reason.EXCEEDED,)
    assert low.max_lower > 0.9 * full.max_lower
    assert low.regions.sum() < full.regions.sum()
    high = tr.discrepancy(*pair, stars, METHODS[method], tolerance=1.5 * float(full.max_upper))
    assert high.reasons == (Reason.WITHIN,)
    assert high.within(1.5 * float(full.max_upper))


@pytest.mark.parametrize("method", [None, "exact", "search"])
def test_a_network_against_itself_is_within_zero(method: str | None) -> None:
    original, stars = networks(torch.float32)[0], star("constrained", torch.float32)
    for other in (original, copy.deepcopy(original)):
        found = tr.discrepancy(original, other, stars, method, tolerance=0)
        assert found.reasons == (Reason.WITHIN,)
        assert found.status == (tr.Status.EXACT,)
        assert found.upper.max() == 0


def test_a_gap_that_is_reached_is_the_reason() -> None:
    pair, stars = networks(torch.float64), star("box", torch.float64)
    found = tr.discrepancy(*pair, stars, "search", gap=0.5)
    assert found.reasons == (Reason.GAP,)
    assert (found.upper - found.lower).max() <= 0.5


def test_intervals_hold_without_a_root_pass_and_difference_bounds_lie_inside() -> None:
    for seed, noise in enumerate((0.0, 1e-3, 0.3)):
        original = random_network(seed, [6, 12, 10, 3])
        pair = pair_of(original, noisy_copy(original, noise, seed), (6,))
        lower, upper = boxes(seed, 3, 6)
        wide, h = interval_difference(pair, lower, upper), difference_bounds(pair, lower, upper)[-1]
        y, error = pair.evaluate(samples(lower, upper, 2000, seed).flatten(0, 1))
        y, error = (part.reshape(-1, 3, 3) for part in (y, error))
        assert (y - error <= wide.du).all()
        assert (y + error >= wide.dl).all()
        assert (h.du <= wide.du + 1e-12).all()
        assert (h.dl >= wide.dl - 1e-12).all()


@pytest.mark.parametrize(("search", "first"), [(search_signs, difference_bounds), (search_boxes, first_bounds)])
def test_searches_keep_the_last_state_when_the_clock_ends(search, first) -> None:
    original = random_network(1, [4, 12, 12, 2])
    pair = pair_of(original, noisy_copy(original, 1e-1, 1), (4,))
    lower, upper = -torch.ones(4).double(), torch.ones(4).double()
    with pytest.raises(OutOfTime):
        next(search(pair, lower, upper, clock=expiring(0)))
    both = pair if first is difference_bounds else Both.of(pair.first, pair.second, pair)
    root = first(both, lower[None], upper[None])
    y, error = pair.evaluate(samples(lower[None], upper[None], 5000, 0)[:, 0])
    for looks in (0, 12, 60):
        states = list(search(pair, lower, upper, SIGNED, root=root, clock=expiring(looks), starts=2))
        assert not states[-1].closed
        assert ((y - error).amax(0) <= states[-1].upper[0]).all()
        assert ((-y - error).amax(0) <= states[-1].upper[1]).all()


def test_progress_is_reported_before_and_during_a_root_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchreach.verbs.float_pair.REPORT_SECONDS", 0.0)
    pair, stars, seen = networks(torch.float64), star("box", torch.float64), []
    found = tr.discrepancy(*pair, stars, "search", progress=seen.append)
    assert len(seen) > 10
    first, last = seen[0], seen[-1]
    assert (first.upper >= found.range_upper - 1e-9).all()
    assert (first.attained_upper <= found.range_upper + 1e-9).all()
    assert (last.upper - last.attained_upper <= first.upper - first.attained_upper).all()


def test_networks_of_two_architectures_keep_the_clock_too() -> None:
    original, compressed = random_network(1, [4, 8, 7, 2]), random_network(2, [4, 5, 2])
    stars = star("box", torch.float64)
    for looks in (0, 20):
        found = compared((original, compressed), stars, expiring(looks))
        assert_valid(found, differences(original, compressed), stars)


@pytest.mark.parametrize("question", [{"epsilon": 1e-3}, {"top1": True}])
def test_equivalence_reports_and_says_why_it_ended(question: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchreach.verbs.equivalence.REPORT_SECONDS", 0.0)
    original = random_network(3, [4, 8, 7, 2])
    compressed, stars, seen = rounded_copy(original, 1024), star("constrained", torch.float64), []
    found = tr.equivalent(original, compressed, stars, **question, progress=seen.append)
    assert seen
    assert len(found.reasons) == 1
    assert (found.reasons[0] is Reason.WITHIN) == (found.answer[0] is tr.Answer.EQUIVALENT)
    assert found.semantics is tr.Semantics.FLOAT


def test_progress_is_shown_in_terminals_and_notebooks(capsys: pytest.CaptureFixture) -> None:
    pair, stars = networks(torch.float64), star("box", torch.float64)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    for console in (terminal, Console(force_jupyter=True)):
        with tr.show_progress("two networks", console) as progress:
            found = tr.discrepancy(*pair, stars, progress=progress)
            progress(tr.RepairStep(3, found, None, None, False, 0.0))
    assert isinstance(terminal.file, io.StringIO)
    assert "two networks" in terminal.file.getvalue()
    shown = capsys.readouterr().err
    assert "max |y1 - y2| in" in shown
    assert "iteration 3" in shown


def test_many_outputs_get_fewer_starts_and_rows_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    original = random_network(1, [6, 10, 8, 4])
    pair = pair_of(original, noisy_copy(original, 1e-2, 1), (6,))
    lower, upper = -torch.ones(6).double(), torch.ones(6).double()
    monkeypatch.setattr(signs, "ROOT_STEPS", 40)
    whole = next(search_signs(pair, lower, upper, SIGNED, starts=1))
    sizes, descend = [], signs.Dual.descend

    def counted(self, *args, **options):
        sizes.append(len(self.out))
        return descend(self, *args, **options)

    monkeypatch.setattr(signs.Dual, "descend", counted)
    monkeypatch.setattr("torchreach.search.witness.NUMBERS", 1)
    memory = 3 * 8 * signs.WORKING * signs.VERTICES * 10.0  # of three rows at most
    part = next(search_signs(pair, lower, upper, SIGNED, memory=memory))
    assert max(sizes) <= 3 < sum(sizes)
    torch.testing.assert_close(part.upper, whole.upper, atol=0, rtol=0.05)  # ties are broken otherwise
