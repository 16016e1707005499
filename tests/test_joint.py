"""Bounds backward through two networks of any shapes: against samples, attacks, exact values and planted faults."""

from __future__ import annotations

import copy
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import torchreach as tr
from tests.networks import DEVICES_SIM_SLOW, random_network
from tests.random_graphs import RandomGraph, graph_pair
from torchreach.domains import crown
from torchreach.domains.box_difference import quick_bounds
from torchreach.domains.crown import Neurons
from torchreach.domains.joint import Both, joint_bounds
from torchreach.domains.pair import Pair
from torchreach.read.steps import steps
from torchreach.search.boxes import search_boxes
from torchreach.search.result import Question
from torchreach.search.witness import ascend


class Residual(nn.Module):
    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(inputs, features), nn.Linear(features, features)
        self.last = nn.Linear(features, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last((self.middle(x) + x).relu())


def network(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    plain = {
        "student": [4, 6, 2],
        "plain": [4, 9, 7, 5, 2],
        "linear": [4, 2],
        "twin": [4, 8, 8, 2],
        "other": [4, 8, 8, 2],
    }
    if kind in plain:
        return random_network(seed, plain[kind])
    if kind == "residual":
        return Residual(4, 8).double()
    if kind == "smooth":
        return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    pooled = nn.MaxPool1d(2) if kind == "max-pool" else nn.AvgPool1d(2)
    image = [nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 2, padding=1), nn.ReLU(), pooled, nn.Flatten()]
    return nn.Sequential(*image, nn.Linear(6, 2)).double()


KINDS = [
    ("twin", "other"),
    ("twin", "student"),
    ("residual", "plain"),
    ("max-pool", "stride"),
    ("smooth", "residual"),
    ("linear", "max-pool"),
]
by_kind = pytest.mark.parametrize("kinds", KINDS, ids=" against ".join)


def both_of(kinds: tuple[str, str], seed: int, device: str = "cpu") -> Both:
    read = (
        steps(network(kind, seed + i), (4,), dtype=torch.float64, device=torch.device(device), smooth=True)
        for i, kind in enumerate(kinds)
    )
    return Both.of(*read)


def boxes(seed: int, count: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    middle, radius = torch.randn(count, 4, generator=g).double(), torch.rand(count, 4, generator=g).double()
    radius[:, 1] *= (torch.arange(count) % 3 > 0).double()  # some inputs do not vary
    return (middle - radius).to(device), (middle + radius).to(device)


def outside(both: Both, low: Tensor, high: Tensor, upper: Tensor, count: int, seed: int = 0) -> float:
    """By how much samples and attacks exceed bounds [B, 2, N] at most."""
    g = torch.Generator().manual_seed(seed)
    worst = -torch.inf
    for i in range(len(low)):
        share = torch.rand(count, 4, generator=g, dtype=torch.float64).to(low.device)
        x = low[i] + (high[i] - low[i]) * share
        attacked = ascend(both, low[i : i + 1], high[i : i + 1], starts=3, steps=15, seed=seed).met.witness
        y, error = both.evaluate(torch.cat((x, attacked.flatten(0, 1))))
        for value, bound in ((y - error, upper[i, 0]), (-y - error, upper[i, 1])):
            worst = max(worst, float((value - bound).max()))
    return worst


@by_kind
@pytest.mark.parametrize("device", DEVICES_SIM_SLOW)
def test_no_sample_and_no_attack_leaves_the_bounds(kinds: tuple[str, str], device: str) -> None:
    for seed in range(3):
        both, (low, high) = both_of(kinds, 10 * seed, device), boxes(seed, 6, device)
        assert outside(both, low, high, joint_bounds(both, low, high).upper, 2000, seed) <= 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kinds", [*KINDS, "graphs"], ids=lambda kinds: kinds if kinds == "graphs" else " against ".join(kinds)
)
@torch.no_grad()
def test_a_million_samples_and_attacks_stay_within_what_a_search_certifies(
    kinds: tuple[str, str] | str, dtype: torch.dtype
) -> None:
    for seed in range(2):
        if isinstance(kinds, str):
            inputs = graph_pair(seed)[2]
            networks = [RandomGraph(seed, 3, inputs), RandomGraph(seed + 1000, 2, inputs)]
        else:
            inputs, networks = 4, [network(kind, seed + i) for i, kind in enumerate(kinds)]
        networks = [module.to(dtype) for module in networks]
        low, high = (end[:1, :inputs].to(dtype) for end in boxes(seed, 1))
        stars = tr.StarBatch.from_box(low, high)
        found = tr.discrepancy(*networks, stars, "search", budget=tr.Budget(stars=200))
        first, second = (copy.deepcopy(module).double() for module in networks)
        g = torch.Generator().manual_seed(seed)
        for _ in range(5):
            x = low + (high - low) * torch.rand(100_000, inputs, generator=g, dtype=torch.float64)
            y = first(x) - second(x)
            assert (y <= found.range_upper[0] + 1e-12).all()
            assert (y >= found.range_lower[0] - 1e-12).all()


@by_kind
def test_points_have_no_width(kinds: tuple[str, str]) -> None:
    both, (low, _) = both_of(kinds, 5), boxes(5, 4)
    y, _ = both.evaluate(low)
    upper = joint_bounds(both, low, low).upper
    torch.testing.assert_close(upper, torch.stack((y, -y), 1), rtol=0, atol=1e-11)


@by_kind
def test_halves_keep_the_signs_of_the_whole_and_are_no_looser(kinds: tuple[str, str]) -> None:
    both, (low, high) = both_of(kinds, 3), boxes(3, 6)
    whole = joint_bounds(both, low, high)
    part = joint_bounds(both, low, (low + high) / 2, whole.signs)
    assert outside(both, low, (low + high) / 2, part.upper, 500) <= 0
    known = whole.signs != 0
    assert torch.equal(part.signs[known], whole.signs[known])
    assert (part.open <= whole.open).all()


def test_signs_that_are_asked_for_bound_the_inputs_that_have_them() -> None:
    both, (low, high) = both_of(("twin", "student"), 2), boxes(2, 1)
    whole = joint_bounds(both, low, high)
    g = torch.Generator().manual_seed(0)
    x = low + (high - low) * torch.rand(20_000, 4, generator=g, dtype=torch.float64)
    z = both.first.steps[0].linear(x) + both.first.steps[0].bias
    y, _ = both.evaluate(x)
    neuron = int((whole.signs[0, : z.shape[1]] == 0).nonzero()[0])
    for sign in (1, -1):
        signs = whole.signs.clone()
        signs[0, neuron] = sign
        some = y[z[:, neuron] * sign >= 0]
        upper = joint_bounds(both, low, high, signs).upper[0]
        assert (some <= upper[0]).all()
        assert (-some <= upper[1]).all()


@by_kind
def test_a_search_ends_with_what_is_attained(kinds: tuple[str, str]) -> None:
    both, (low, high) = both_of(kinds, 7), boxes(7, 1)
    low, high = low[0], (low + (high - low) / 4)[0]
    question = Question("outputs", 1e-2)
    state = next(state for state in search_boxes(both, low, high, question) if state.closed or state.branches > 20_000)
    assert state.closed
    assert (state.max_upper - state.max_lower <= 1e-2).all()
    y, error = both.evaluate(state.witness.flatten(0, 1))
    y, error = (part.reshape(2, 2, 2).diagonal(dim1=1, dim2=2) for part in (y, error))
    assert (state.lower <= torch.stack((y[0] + error[0], error[1] - y[1]))).all()


def test_splits_of_signs_hold_the_exact_answer_and_close_more_of_many_inputs_than_halves_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, other = random_network(3, [200, 6, 4, 2]), random_network(4, [200, 6, 2])
    ones = 0.05 * torch.ones(1, 200, dtype=torch.float64)
    stars = tr.StarBatch.from_box(-ones, ones)
    expected = tr.mixed_integer_discrepancy(original, other, stars)
    gaps = []
    for few in (5, 200):
        monkeypatch.setattr("torchreach.search.boxes.FEW_INPUTS", few)
        found = tr.discrepancy(original, other, stars, "search", budget=tr.Budget(stars=300))
        assert (found.range_lower <= expected.range_lower + 1e-6).all()
        assert (found.range_upper >= expected.range_upper - 1e-6).all()
        gaps.append(float((found.upper - found.lower).max()))
    assert gaps[0] < 0.8 * gaps[1]


def test_signs_that_no_input_has_bound_nothing() -> None:
    both, (low, high) = both_of(("twin", "student"), 2), boxes(2, 1)
    signs = joint_bounds(both, low, high).signs
    settled = int((signs[0] != 0).nonzero()[0])
    signs[0, settled] *= -1
    assert (joint_bounds(both, low, high, signs).upper == -torch.inf).all()


def test_differences_of_near_twins_are_bounded_far_more_tightly_in_their_own_coordinates() -> None:
    original = random_network(0, [4, 12, 12, 2])
    near = tr.quantize_weights(original, 12)
    first, second = (steps(n, (4,), dtype=torch.float64, device=torch.device("cpu")) for n in (original, near))
    both = Both.of(first, second, Pair.of(first, second))
    low, high = boxes(1, 8)
    known = joint_bounds(both, low, high)
    close = quick_bounds(both, low, high, known)
    assert outside(both, low, high, close.upper, 2000) <= 0
    assert (close.upper.amax((1, 2)) < known.upper.amax((1, 2)) / 5).all()


@pytest.mark.parametrize("fault", ["slope", "transpose"])
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both, (low, high) = both_of(("residual", "plain"), 4), boxes(4, 6)
    if fault == "slope":
        rule = Neurons.of

        def steeper(*args: object) -> Neurons:
            found = rule(*args)  # type: ignore[arg-type]
            return replace(found, above=(found.above[0], found.above[1] * 0.5))

        monkeypatch.setattr(crown.Neurons, "of", staticmethod(steeper))
    else:
        kind = type(both.first.maps[1])
        monkeypatch.setattr(kind, "transpose", lambda self, y: 0.9 * (y @ self.W))
    assert outside(both, low, high, joint_bounds(both, low, high).upper, 3000) > 0


def test_bounds_hold_in_exact_arithmetic_and_need_their_rounding_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = network("plain", 4), network("student", 5)
    with torch.no_grad():  # large biases on a small input: nothing but their sums is rounded
        for name, value in (*networks[0].named_parameters(), *networks[1].named_parameters()):
            value.mul_(1e8 if name.endswith("bias") else 1)
    cpu = torch.device("cpu")
    both = Both.of(*(steps(n, (4,), dtype=torch.float64, device=cpu) for n in networks))
    x = boxes(4, 12)[0] * 1e-9
    y = exactly(both, x)
    sides = torch.stack((y, -y), 1)
    assert (sides <= joint_bounds(both, x, x).upper).all()
    monkeypatch.setattr(
        crown.Network, "error", lambda self, k, A: torch.zeros_like(self.steps[k].bias).expand(len(A), -1)
    )
    assert (sides > joint_bounds(both, x, x).upper).any()


def exactly(both: Both, x: Tensor) -> Tensor:
    """y1 - y2 [B, N] in fractions, rounded to the nearest float64."""
    rows = []
    for point in x.tolist():
        result = [Fraction(0)] * both.outputs
        for sign, own in ((1, both.first), (-1, both.second)):
            assert own is not None
            values = [Fraction(v) for v in point]
            for step, maps in zip(own.steps, own.maps, strict=True):
                W = maps.own_rows(torch.arange(step.features)).tolist()
                sums = [sum(Fraction(w) * v for w, v in zip(row, values, strict=True)) for row in W]
                values = [s + Fraction(b) for s, b in zip(sums, step.bias.tolist(), strict=True)]
                if step.relu is not None:
                    values = [max(v, Fraction(0)) if r else v for v, r in zip(values, step.relu.tolist(), strict=True)]
            result = [r + sign * v for r, v in zip(result, values, strict=True)]
        rows.append([float(v) for v in result])
    return torch.tensor(rows, dtype=torch.float64)
