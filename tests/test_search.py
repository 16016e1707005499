"""Branch and bound on signs and on inputs: intervals that hold exact values, shrink, and close."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import torchreach as tr
from benchmarks import search as benchmark
from tests.data import require_data
from tests.networks import DEVICES_SIM_SLOW, acasxu_pair, cases, random_network, rounded_copy
from tests.test_difference import boxes, layers_at, noisy_copy, pair_of, samples
from tests.test_scales import exactly
from torchreach.core.errors import OptionError, ShapeError
from torchreach.domains.difference import Backward, difference_bounds
from torchreach.search.boxes import search_boxes
from torchreach.search.dual import Dual
from torchreach.search.reduced_pair import Reduced
from torchreach.search.result import Constraints, Question, SearchResult
from torchreach.search.signs import Branches, choose, search_signs
from torchreach.search.witness import ascend
from torchreach.training.loss import matrices

SEARCHES = [search_signs, search_boxes]


BOTH = pytest.mark.parametrize("search", SEARCHES, ids=["signs", "boxes"])


def latest(states: Iterator[SearchResult], branches: float = torch.inf) -> SearchResult:
    """The first state that is closed or has taken so many branches, or the last."""
    for state in states:
        if state.closed or state.branches >= branches:
            break
    return state


def check(state: SearchResult, exact: tr.Discrepancy, slack: float = 1e-9) -> None:
    """The state's signed intervals contain the exact range of one star."""
    top = torch.stack((exact.range_upper[0], -exact.range_lower[0]))
    assert (state.upper >= top - slack).all()
    assert (state.lower <= top + slack).all()
    assert (state.max_upper >= exact.lower[0] - slack).all()
    assert (state.max_lower <= exact.upper[0] + slack).all()


@BOTH
@pytest.mark.parametrize("seed", range(6))
def test_every_state_holds_the_exact_value_and_the_last_is_closed(search, seed: int) -> None:
    sizes = ([2, 6, 5, 2], [3, 8, 2], [2, 5, 5, 5, 1])[seed % 3]
    original = random_network(seed, sizes)
    compressed = rounded_copy(original, 8) if seed % 2 else noisy_copy(original, 1e-3, seed)
    (middle,), _ = boxes(seed, 1, sizes[0])
    lower, upper = middle - 0.2, middle + 0.2
    exact = tr.discrepancy(original, compressed, tr.StarBatch.from_box(lower, upper))
    pair = pair_of(original, compressed, (sizes[0],))
    before = None
    for state in search(pair, lower, upper, Question("signed", 1e-6), batch=8, starts=2):
        check(state, exact)
        if before is not None:
            assert (state.upper <= before.upper).all()
            assert (state.lower >= before.lower).all()
            assert state.branches > before.branches
        before = state
    assert before is not None
    assert before.closed
    assert (before.upper - before.lower).max() <= 1e-6
    assert (before.max_upper - exact.lower[0]).abs().max() < 2e-6


def test_signs_close_boxes_of_many_inputs() -> None:
    for seed in range(3):
        original = random_network(seed, [9, 6, 5, 2])
        compressed = rounded_copy(original, 16)
        g = torch.Generator().manual_seed(seed)
        middle = torch.randn(9, generator=g, dtype=torch.float64)
        state = latest(search_signs(pair_of(original, compressed, (9,)), middle - 0.2, middle + 0.2))
        assert state.closed
        reference = tr.mixed_integer_discrepancy(
            original, compressed, tr.StarBatch.from_box(middle - 0.2, middle + 0.2)
        ).max_abs[0]
        assert (state.max_upper >= reference - 1e-6).all()
        assert (state.max_upper <= reference + 2e-6).all()


@BOTH
def test_witnesses_lie_in_the_box_and_replay(search) -> None:
    original = random_network(5, [4, 10, 8, 3])
    compressed = rounded_copy(original, 8)
    (lower,), (upper,) = boxes(5, 1, 4)
    state = latest(search(pair_of(original, compressed, (4,)), lower, upper), branches=40)
    assert state.witness.shape == (2, 3, 4)
    assert (state.witness >= lower).all()
    assert (state.witness <= upper).all()
    with torch.no_grad():
        y = original(state.witness) - compressed(state.witness)
    y = y.diagonal(dim1=1, dim2=2) * torch.tensor([[1.0], [-1.0]])
    torch.testing.assert_close(y, state.lower, atol=1e-12, rtol=0)
    with torch.no_grad():
        y = original(state.max_witness) - compressed(state.max_witness)
    torch.testing.assert_close(y.diagonal().abs(), state.max_lower, atol=1e-12, rtol=0)


@BOTH
@pytest.mark.parametrize("device", DEVICES_SIM_SLOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_sample_and_no_attack_exceeds_a_search_that_ended_early(search, dtype: torch.dtype, device: str) -> None:
    for seed, noise in enumerate((0.0, 1e-2, 0.3)):
        original = random_network(seed, [8, 14, 10, 3])
        pair = pair_of(original, noisy_copy(original, noise, seed), (8,), device)
        lower, upper = (part.to(device, dtype) for part in boxes(seed, 1, 8))
        states = search(pair, lower[0], upper[0], starts=2, batch=16)
        state = latest(states, branches=30)
        lower, upper = lower.double(), upper.double()
        other = ascend(pair, lower, upper, seed=seed + 1).met.lower
        y, error = pair.evaluate(samples(lower, upper, 20_000, seed)[:, 0])
        assert (other <= state.upper).all()
        assert ((y - error).amax(0) <= state.upper[0]).all()
        assert ((-y - error).amax(0) <= state.upper[1]).all()
        assert (state.lower <= state.upper).all()


def test_every_sample_lies_in_a_branch_and_below_its_bound() -> None:
    original = random_network(2, [10, 20, 15, 2])
    pair = pair_of(original, noisy_copy(original, 1e-2, 2), (10,))
    lower, upper = torch.full((1, 10), -0.7).double(), torch.full((1, 10), 0.9).double()
    work = Backward(pair, lower, upper)
    *hidden, _ = difference_bounds(pair, lower, upper)
    for hexagon in hidden:
        work.add(hexagon)
    net = Reduced(pair, work)
    x = samples(lower, upper, 2000, 0)[:, 0]
    kept = [((h.u1 > 0) | (h.u2 > 0))[0] for h in hidden]
    values = [(z[:, k], z2[:, k]) for k, (z, z2) in zip(kept, layers_at(pair, x), strict=False)]
    y, error = pair.evaluate(x)
    zero = torch.zeros(4, 2, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    objectives = torch.cat((zero, torch.cat((eye, -eye))), 1)
    reached = torch.cat((y - error, -y - error), 1)
    low = torch.full((4,), -torch.inf, dtype=torch.float64)

    def inside(nodes: Branches) -> Tensor:
        """[R, samples] by the signs that were split, in the two networks each on its own."""
        result = torch.ones(len(nodes.row), len(x), dtype=torch.bool)
        for packed, root, free, (z, z2) in zip(nodes.hexagons, net.root, net.free, values, strict=True):
            was = root
            for part, v in ((0, z[:, free]), (2, z2[:, free])):
                above = (packed[:, part] == 0) & (was[:, part] < 0)
                below = (packed[:, part + 1] == 0) & (was[:, part + 1] > 0)
                result &= ((~above[:, None] | (v >= -1e-12)) & (~below[:, None] | (v <= 1e-12))).all(2)
        return result

    packed = [h.expand(4, -1, -1) for h in net.root]
    dual = Dual(net, net.root, objectives)
    bound, slopes, mean, coefficients = dual.descend(dual.start(), 30, 0.95, low)
    nodes = Branches(packed, slopes, torch.arange(4), bound, *choose(net, packed, mean, coefficients, bound))
    for _ in range(5):
        nodes = nodes.children(net)
        dual = Dual(net, nodes.hexagons, objectives[nodes.row])
        bound, slopes, mean, coefficients = dual.descend(nodes.slopes, 10, 0.95, low[nodes.row])
        members = inside(nodes)
        for row in range(4):
            assert members[nodes.row == row].any(0).all()
        assert (~members | (bound[:, None] >= reached[:, nodes.row].T)).all()
        chosen = choose(net, nodes.hexagons, mean, coefficients, bound)
        nodes = Branches(nodes.hexagons, slopes, nodes.row, bound, *chosen)


@BOTH
def test_identical_networks_close_at_once_at_zero(search) -> None:
    original = random_network(3, [5, 20, 20, 3])
    pair = pair_of(original, copy.deepcopy(original), (5,))
    state = next(search(pair, -torch.ones(5), torch.ones(5)))
    assert state.closed
    assert state.upper.abs().max() == 0
    assert state.lower.abs().max() == 0


@BOTH
def test_networks_without_hidden_layers_close_at_once(search) -> None:
    original = random_network(3, [4, 3])
    pair = pair_of(original, rounded_copy(original, 8), (4,))
    state = next(search(pair, -torch.ones(4), torch.ones(4)))
    assert state.closed
    top = (matrices(pair, 0)[2].abs().sum(1) + pair.db[0].abs()).tolist()
    assert state.max_upper.tolist() == pytest.approx(top, abs=1e-12)


@BOTH
def test_a_threshold_ends_the_search_once_it_is_certified(search) -> None:
    original = random_network(1, [3, 12, 12, 2])
    pair = pair_of(original, noisy_copy(original, 1e-2, 1), (3,))
    lower, upper = -torch.ones(3), torch.ones(3)
    full = latest(search(pair, lower, upper, Question("largest")), branches=300)
    limit = 1.3 * float(full.max_upper.max())
    state = latest(search(pair, lower, upper, Question("largest", threshold=limit)), branches=300)
    assert state.closed
    assert state.max_upper.max() <= limit
    assert state.branches < full.branches


@BOTH
def test_composed_layers_are_bounded_soundly(search) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    original = nn.Sequential(*layers).double().eval()
    compressed = rounded_copy(original, 32)
    pair = pair_of(original, compressed, (1, 3, 3))
    lower, upper = boxes(0, 1, 9)
    state = latest(search(pair, lower[0], upper[0], batch=8), branches=120)
    y = pair.evaluate(samples(lower, upper, 5000, 0)[:, 0])[0]
    assert (y.abs().amax(0) <= state.max_upper + 1e-12).all()
    assert (state.max_upper <= 3 * state.max_lower + 1e-6).all()


CASES = [("3_7", "prop_3 full", kind) for kind in ("float16", "int8", "prune30", "identical")] + [
    ("1_1", "prop_3 centre 0.25", kind) for kind in ("float16", "identical")
]


@BOTH
@pytest.mark.parametrize(("net", "box", "compression"), CASES)
def test_known_cases_lie_in_the_interval(search, net: str, box: str, compression: str) -> None:
    keys = {"net": net, "case": box, "compression": compression}
    case = next(c for c in cases("equivalence", "acasxu.json") if all(c[k] == v for k, v in keys.items()))
    pair = pair_of(*acasxu_pair(case["npz"]), (5,))
    limits = torch.tensor(case["box"], dtype=torch.float64)
    state = latest(search(pair, limits[:, 0], limits[:, 1], starts=2, batch=32), branches=60)
    high, low = (torch.tensor(case[key], dtype=torch.float64) for key in ("diff_hi", "diff_lo"))
    assert (state.upper >= torch.stack((high, -low)) - 1e-12).all()
    assert (state.lower <= torch.stack((high, -low)) + 1e-12).all()
    if compression == "identical":
        assert state.closed


def test_wrong_questions_are_named() -> None:
    with pytest.raises(OptionError, match="goal must be one of signed, outputs, largest, above, got 'all'"):
        Question("all")
    with pytest.raises(OptionError, match="tolerance must be positive, got 0"):
        Question(tolerance=0)
    original = random_network(0, [3, 4, 2])
    pair = pair_of(original, rounded_copy(original, 8), (3,))
    for search in SEARCHES:
        with pytest.raises(ShapeError, match=r"one box.*\[3\]; got \(2, 3\)"):
            next(search(pair, torch.zeros(2, 3), torch.ones(2, 3)))


def test_replays_are_within_their_error_in_rational_arithmetic() -> None:
    for seed, noise in enumerate((0.0, 1e-6, 1e-1)):
        original = random_network(seed, [3, 30, 30, 2])
        compressed = noisy_copy(original, noise, seed)
        lower, upper = boxes(seed, 1, 3)
        x = samples(lower, upper, 12, seed)[:, 0]
        y, error = pair_of(original, compressed, (3,)).evaluate(x)
        assert error.max() < 1e-9
        for point, row, off in zip(x, y.tolist(), error.tolist(), strict=True):
            true = [a - b for a, b in zip(exactly(original, point), exactly(compressed, point), strict=True)]
            assert all(abs(Fraction(v) - t) <= Fraction(e) for v, t, e in zip(row, true, off, strict=True))


def test_boxes_that_a_finisher_bounds_are_not_halved() -> None:
    original = random_network(1, [2, 8, 8, 2])
    pair = pair_of(original, noisy_copy(original, 1e-2, 1), (2,))
    lower, upper = torch.full((2,), -1.0).double(), torch.ones(2).double()
    alone = latest(search_boxes(pair, lower, upper, Question("signed", 1e-4)), branches=5000)
    calls = []

    def finish(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, int]:
        assert (low <= high).all()
        calls.append(len(low))
        return alone.upper.expand(len(low), -1, -1), alone.witness.expand(len(low), -1, -1, -1), 1

    state = latest(search_boxes(pair, lower, upper, Question("signed", 1e-3), finish=finish))
    assert calls == [1]
    assert state.closed
    assert (state.upper <= alone.upper).all()
    assert (state.lower - alone.lower).abs().max() < 1e-12


@BOTH
def test_a_search_without_memory_ends_open_and_valid(search) -> None:
    original = random_network(1, [4, 16, 16, 2])
    pair = pair_of(original, noisy_copy(original, 1e-1, 1), (4,))
    lower, upper = -torch.ones(4).double(), torch.ones(4).double()
    states = list(search(pair, lower, upper, memory=1, batch=4))
    assert len(states) == 1
    assert not states[0].closed
    y, error = pair.evaluate(samples(lower[None], upper[None], 20_000, 0)[:, 0])
    assert ((y - error).amax(0) <= states[0].upper[0]).all()


@BOTH
def test_a_signed_search_closes_the_larger_sides_first(search) -> None:
    original = random_network(4, [2, 6, 5, 3])
    pair = pair_of(original, noisy_copy(original, 1e-2, 4), (2,))
    lower, upper = torch.full((2,), -0.6).double(), torch.full((2,), 0.6).double()
    outputs = Question("outputs", 5e-3)
    for state in search(pair, lower, upper, Question("signed", 5e-3), batch=4):
        first = bool((state.upper <= outputs.enough(state.lower)).all())
        if first or state.closed:
            break
    assert first
    assert not state.closed


def test_constraints_cut_boxes_and_pull_points() -> None:
    half = Constraints(torch.tensor([[1.0, 1.0]]).double(), torch.tensor([1.0]).double(), torch.zeros(2).double())
    low, high = torch.tensor([[0.6, 0.6], [0.4, 0.4]]).double(), torch.ones(2, 2).double()
    assert half.miss(low, high).tolist() == [True, False]
    pulled = half.pull(torch.tensor([[2.0, 0.0], [0.25, 0.25], [-9.0, 3.0]]).double())
    assert pulled.tolist() == [[1.0, 0.0], [0.25, 0.25], [-9.0, 3.0]]


@BOTH
def test_only_one_side_counts_where_one_is_asked_for(search) -> None:
    original = random_network(2, [2, 6, 5, 2])
    pair = pair_of(original, noisy_copy(original, 1e-2, 2), (2,))
    lower, upper = torch.full((2,), -0.5).double(), torch.full((2,), 0.5).double()
    full = latest(search(pair, lower, upper, Question("signed", 1e-3)), branches=5000)
    assert full.closed
    state = latest(search(pair, lower, upper, Question("above", 1e-3)), branches=5000)
    assert state.closed
    assert state.branches <= full.branches
    assert float(state.upper[0].max() - full.lower[0].max()) <= 2e-3
    assert (state.upper >= full.lower - 1e-12).all()


def test_the_benchmark_closes_recorded_pairs_and_notices_what_is_wrong(capsys: pytest.CaptureFixture) -> None:
    require_data("equivalence", "acasxu.json")
    threads = torch.get_num_threads()
    assert benchmark.main(["--section", "cases", "--quick"]) == 0
    torch.set_num_threads(threads)
    assert "3_7 prop_3 full int8" in capsys.readouterr().out
    row = {"case": "x", "holds": True, "gap": 1e-9}
    assert benchmark.problems("cases", row) == []
    assert benchmark.problems("cases", row | {"holds": False}) == [
        "x: the interval does not contain the recorded range"
    ]
    assert benchmark.problems("cases", row | {"gap": 1e-3}) == ["x: not closed to 1e-06, gap 0.001"]
    assert benchmark.problems("mnist", {"attained": 2.0, "upper": 1.0}) == ["mnist: attained 2 above certified 1"]
