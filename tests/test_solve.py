"""Repair by construction: least values against programs over brute-force vertices, proofs, what is kept, budgets."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import torchreach as tr
from tests.checks import run_example
from tests.clocks import expiring
from tests.networks import DEVICES_SIM_SLOW
from tests.test_repair_deployed import boxes as deployed_boxes
from tests.test_repair_deployed import dense, int8
from torchreach.compress.constraints import Constraints, quantize_weights
from torchreach.core.clock import NO_LIMIT, OutOfTime
from torchreach.core.errors import InvalidNetworkError, OptionError, ShapeError, UnsupportedLayerError
from torchreach.reference.certify import certify
from torchreach.training.fit import run
from torchreach.training.solve import LayerSolver

EXACT = tr.Exact(root_bounds="zonotope")
SOLVE = partial(tr.repair, method="solve", target=None, exact=EXACT)


def network(seed: int = 0, sizes: tuple[int, ...] = (2, 8, 6, 3), dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in zip(sizes, sizes[1:], strict=False):
        layer = nn.Linear(n_in, n_out, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(n_out, n_in, generator=generator, dtype=torch.float64) / n_in**0.5)
            layer.bias.copy_(0.3 * torch.randn(n_out, generator=generator, dtype=torch.float64))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def boxes(dtype: torch.dtype = torch.float64, half: float = 0.4) -> tr.StarBatch:
    centers = torch.tensor([[0.3, -0.2], [-0.6, 0.4]], dtype=dtype)
    return tr.StarBatch.from_box(centers - half, centers + half)


def features(module: nn.Sequential, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = module[:-1](x)
    return torch.cat((h, torch.ones_like(h[:, :1])), 1)


def crossings(original: nn.Sequential, compressed: nn.Sequential, low: Tensor, high: Tensor) -> Tensor:
    """Vertices of all joint regions over a box of two inputs, by brute force: halving segments where a pattern changes.

    A fine grid of lines in both directions: on each line all breakpoints are found by bisection. These are points of
    the regions' boundaries, and on them y1 and h2 are as linear as at vertices: no vertex can undercut them by much.
    """

    def patterns(x: Tensor) -> Tensor:
        bits = []
        for module in (original, compressed):
            h = x
            for layer in module[:-1]:
                h = layer(h)
                if isinstance(layer, nn.ReLU):
                    bits.append(h > 0)
        return torch.cat(bits, 1)

    points = []
    line = torch.linspace(0, 1, 400, dtype=torch.float64)
    with torch.no_grad():
        for axis in (0, 1):
            for other in torch.linspace(0, 1, 41, dtype=torch.float64):
                share = torch.stack((line, other.expand(400)), 1)
                share = share if axis == 0 else share.flip(1)
                x = low + share * (high - low)
                changed = (patterns(x)[1:] != patterns(x)[:-1]).any(1).nonzero()[:, 0]
                points += [x[:1], x[-1:], x[changed], x[changed + 1]]
    return torch.cat(points)


def chebyshev(h: Tensor, y: Tensor) -> float:
    """min over w of max |y - h w|, by scipy."""
    A, b = h.numpy(), y.numpy()
    rows = np.concatenate((np.c_[A, -np.ones(len(A))], np.c_[-A, -np.ones(len(A))]))
    found = linprog(
        np.r_[np.zeros(A.shape[1]), 1.0],
        A_ub=rows,
        b_ub=np.r_[b, -b],
        bounds=[(None, None)] * A.shape[1] + [(0, None)],
        method="highs",
    )
    assert found.status == 0
    return float(found.fun)


# -- the least value ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_least_value_is_that_of_an_independent_program_over_points_of_the_same_sets(seed):
    original = network(seed)
    small = tr.prune_weights(original, 0.4)
    free = Constraints({}, {})
    result = SOLVE(original, small, boxes(), constraints=free)
    low, high, _ = boxes().bounding_box()
    points = torch.cat([crossings(original, small, *ends) for ends in zip(low, high, strict=True)])
    h, y = features(small, points), original(points).detach()
    for n in range(3):
        below = chebyshev(h, y[:, n])  # over points alone: no more than the least over the sets
        assert below - 1e-7 <= float(result.least[n])
        assert float(result.least[n]) <= 1.05 * below + 1e-6


@pytest.mark.parametrize("free", [False, True])
def test_certificate_equals_the_least_value(free):
    original = network(1)
    small = tr.quantize_weights(original, 4) if free else tr.prune_weights(original, 0.4)
    result = SOLVE(original, small, boxes(), constraints=Constraints({}, {}) if free else None)
    assert result.method is tr.Made.SOLVED
    torch.testing.assert_close(result.after.upper.amax(0), result.least, rtol=0, atol=1e-6)
    assert bool((result.after.upper.amax(0) >= result.least - 1e-12).all())
    again = tr.discrepancy(original, result.network, boxes(), EXACT)
    torch.testing.assert_close(again.upper, result.after.upper, rtol=0, atol=1e-9)
    x = boxes().sample(5000, 3)
    for s in range(2):
        off = (original(x[s]) - result.network(x[s])).abs().amax(0)
        assert bool((off <= result.after.upper[s] + 1e-9).all())


@pytest.mark.parametrize("compress", [partial(tr.prune_weights, fraction=0.4), partial(tr.quantize_weights, bits=4)])
def test_the_mixed_integer_model_agrees_with_the_certificate_of_what_was_solved(compress):
    original = network(5)
    given = compress(original)
    result = SOLVE(original, given, boxes())
    assert result.after.upper.max() < result.before.upper.max()
    found = certify(result.after, original, result.network, boxes())
    assert found.agrees, found.where


def test_zeros_grids_and_hidden_layers_stay_and_nothing_given_changes():
    original = network(2)
    pruned, rounded = tr.prune_weights(original, 0.5), tr.quantize_weights(original, 4)
    before = {name: value.clone() for name, value in pruned.state_dict().items()}
    repaired = SOLVE(original, pruned, boxes()).network
    assert bool((repaired[-1].weight[pruned[-1].weight == 0] == 0).all())
    assert torch.equal(repaired[0].weight, pruned[0].weight)
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())
    found = SOLVE(original, rounded, boxes())
    Constraints.read(rounded).check(found.network)
    step = rounded[-1].weight_scale
    moved = (found.network[-1].weight - rounded[-1].weight) / step
    assert float((moved - moved.round()).abs().max().detach()) < 1e-9
    assert float(moved.abs().max().detach()) == pytest.approx(1)  # by other codes, each at most one step away
    assert float(found.after.upper.max()) < 0.7 * float(found.before.upper.max())
    assert bool((found.after.upper.amax(0) >= found.least).all())
    limit = 0.95 * float(found.before.upper.max())
    near = SOLVE(original, rounded, boxes(), target=tr.Target.bounds(-limit, limit))
    assert near.satisfied


def test_target_within_reach_is_met_with_the_least_change_and_otherwise_missed_with_a_proof():
    original = network(3)
    pruned = tr.prune_weights(original, 0.5)
    least = SOLVE(original, pruned, boxes()).least
    change = []
    for share in (1.01, 1.1, 1.3):
        limit = float(share * least.max())
        result = SOLVE(original, pruned, boxes(), target=tr.Target.bounds(-limit, limit))
        assert result.satisfied
        assert not result.conflicts
        change.append(float((result.network[-1].weight - pruned[-1].weight).norm().detach()))
    assert change[0] > change[1] > change[2]
    limit = float(0.9 * least.max())
    result = SOLVE(original, pruned, boxes(), target=tr.Target.bounds(-limit, limit))
    assert not result.satisfied
    assert int(least.argmax()) in [one.output for one in result.conflicts]


def test_conflict_holds_in_exact_arithmetic_on_the_networks_features():
    """sum u_i h_i is at most the residual, and the excess follows, in fractions of the floating-point numbers."""
    original = network(4)
    pruned = tr.prune_weights(original, 0.5)
    limit = 0.5 * float(SOLVE(original, pruned, boxes()).least.max())
    conflicts = SOLVE(original, pruned, boxes(), target=tr.Target.bounds(-limit, limit)).conflicts
    assert conflicts
    for one in conflicts:
        free = torch.cat((pruned[-1].weight[one.output] != 0, torch.tensor([True])))
        assert len(one.inputs) <= int(free.sum()) + 1
        h, y = features(pruned, one.inputs)[:, free], original(one.inputs)[:, one.output]
        u = [Fraction(value) for value in one.multipliers.tolist()]
        assert abs(float(sum(map(abs, u))) - 1) < 1e-9
        for column in h.T.tolist():
            assert abs(sum(m * Fraction(value) for m, value in zip(u, column, strict=True))) <= Fraction(one.residual)
        excess = sum(
            m * (Fraction(value) - Fraction(limit if m > 0 else -limit)) for m, value in zip(u, y.tolist(), strict=True)
        )
        assert 0 < one.excess <= float(excess)
        assert one.excess >= 0.99 * float(excess) - 1e-6


def test_float32_networks_and_sets_meet_the_least_value_to_their_precision():
    original = network(5, dtype=torch.float32)
    pruned = tr.prune_weights(original, 0.4)
    result = SOLVE(original, pruned, boxes(torch.float32))
    torch.testing.assert_close(result.after.upper.amax(0).double(), result.least, rtol=0, atol=2e-5)
    limit = 2 * float(result.least.max())
    assert SOLVE(original, pruned, boxes(torch.float32), target=tr.Target.bounds(-limit, limit)).satisfied


@pytest.mark.parametrize("device", DEVICES_SIM_SLOW)
def test_device_and_dtype_follow_the_tensors(device):
    original = network(5).to(device)
    result = SOLVE(original, tr.prune_weights(original, 0.4), boxes().to(device))
    assert result.least.device.type == device
    assert {value.device.type for value in result.network.parameters()} == {device}
    assert float((result.after.upper.amax(0) - result.least).abs().max()) < 1e-6


# -- what is kept -------------------------------------------------------------------------------------


def test_kept_points_and_stars_keep_their_tolerance():
    original = network(6)
    pruned = tr.prune_weights(original, 0.4)
    points = torch.tensor([[1.5, 1.5], [-1.5, 1.0], [1.0, -1.5]], dtype=torch.float64)
    far = tr.StarBatch.from_box(points - 0.1, points + 0.1)
    alone = SOLVE(original, pruned, boxes())
    allowed = 0.8 * float(tr.discrepancy(original, alone.network, far, EXACT).upper.max())
    kept = SOLVE(original, pruned, boxes(), keep=tr.Keep(far, allowed))
    assert kept.method is tr.Made.SOLVED
    assert float(tr.discrepancy(original, kept.network, far, EXACT).upper.max()) <= allowed + 1e-6
    assert float(kept.least.max()) >= float(alone.least.max()) - 1e-9
    changed = tr.discrepancy(pruned, kept.network, far, EXACT).upper.amax(0)
    torch.testing.assert_close(kept.harm, changed, rtol=0, atol=1e-9)
    held = SOLVE(original, pruned, boxes(), keep=tr.Keep(points, allowed))
    assert float((original(points) - held.network(points)).abs().max().detach()) <= allowed + 1e-6


def test_kept_points_without_tolerance_pull_the_layer_towards_them():
    original = network(7)
    pruned = tr.prune_weights(original, 0.4)
    points = 2 * torch.randn(300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    limit = 2 * float(SOLVE(original, pruned, boxes()).least.max())
    errors = []
    data = (points, torch.zeros(300, dtype=torch.long))
    for more in ({}, {"keep": points}, {"data": data}):
        repaired = SOLVE(original, pruned, boxes(), target=tr.Target.bounds(-limit, limit), **more)
        assert repaired.satisfied
        errors.append(float((original(points) - repaired.network(points)).square().mean().detach()))
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] == pytest.approx(errors[1], rel=1e-6)


def test_what_cannot_be_kept_leaves_the_network_as_it_is_and_says_why(caplog):
    original = network(6)
    pruned = tr.prune_weights(original, 0.4)
    points = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = SOLVE(original, pruned, boxes(), keep=tr.Keep(points, 1e-3))
    assert result.method is tr.Made.GIVEN
    assert result.conflicts
    assert "no last layer keeps what is to be kept" in caplog.text


# -- methods, budgets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [None, 0.001, 2.0])
def test_auto_returns_no_worse_certificate_than_the_given_one_and_says_what_made_it(seconds):
    original = network(8)
    pruned = tr.prune_weights(original, 0.5)
    quick = tr.RepairOptions(samples=50, epochs=10)
    budget = None if seconds is None else tr.Budget(seconds=seconds)
    result = tr.repair(
        original, pruned, boxes(), target=1e-3, method="auto", iterations=3, training=quick, exact=EXACT, budget=budget
    )
    assert float(result.after.upper.max()) <= float(result.before.upper.max())
    assert result.method is result.history[result.index].method
    assert str(result.method) in repr(result)
    if seconds is None:
        assert {step.method for step in result.history} >= {tr.Made.GIVEN, tr.Made.SOLVED, tr.Made.RETRAINED}
        alone = SOLVE(original, pruned, boxes())
        assert float(result.after.upper.max()) <= float(alone.after.upper.max()) + 1e-9
        assert result.least is None or bool((result.after.upper.amax(0) >= result.least - 1e-12).all())


@pytest.mark.parametrize("looks", [0, 1, 2, 4, 8])
def test_programs_look_at_their_clock(looks):
    original = network(8)
    pruned = tr.prune_weights(original, 0.5)
    solver = LayerSolver(
        original,
        pruned,
        boxes(),
        Constraints.read(pruned),
        budget=tr.Budget(),
        tolerances=tr.Tolerances(),
        clock=NO_LIMIT,
    )
    before = solver.layer.matrix
    with pytest.raises(OutOfTime):
        solver.solve(None, expiring(looks))
    assert torch.equal(solver.layer.matrix, before)
    assert solver.solve(None, NO_LIMIT).matrix is not None


def test_regions_that_are_too_many_are_solved_by_witnesses():
    original = network(9)
    pruned = tr.prune_weights(original, 0.4)
    exactly = SOLVE(original, pruned, boxes())
    rounds = tr.repair(
        original, pruned, boxes(), target=None, method="solve", exact=EXACT, budget=tr.Budget(stars=1), iterations=30
    )
    assert len(rounds.history) >= 2
    assert float(rounds.least.max()) <= float(exactly.least.max()) + 1e-9
    assert float(rounds.after.upper.max()) <= float(rounds.before.upper.max())


def test_many_inputs_are_solved_by_witnesses_to_the_least_value():
    original = network(10, (12, 10, 2))
    pruned = tr.prune_weights(original, 0.3)
    center = torch.randn(1, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stars = tr.StarBatch.from_box(center - 0.03, center + 0.03)
    result = tr.repair(original, pruned, stars, target=None, method="solve", iterations=30)
    assert float(result.after.upper.max()) < 0.2 * float(result.before.upper.max())
    assert float(result.after.upper.max()) == pytest.approx(float(result.least.max()), abs=1e-3)


def test_earlier_layers_reach_what_the_last_alone_cannot_and_keep_zeros():
    original = network(3)
    pruned = tr.prune_weights(original, 0.5)
    alone = SOLVE(original, pruned, boxes())
    result = SOLVE(original, pruned, boxes(), layers=3, iterations=12)
    assert float(result.after.upper.max()) < 0.9 * float(alone.least.max())
    assert result.method is tr.Made.SOLVED
    for k in (0, 2, 4):
        assert bool((result.network[k].weight[pruned[k].weight == 0] == 0).all())
    again = tr.discrepancy(original, result.network, boxes(), EXACT)
    torch.testing.assert_close(again.upper, result.after.upper, rtol=0, atol=1e-9)
    # the least value is that of the layers as they are returned
    torch.testing.assert_close(result.after.upper.amax(0), result.least, rtol=0, atol=1e-6)


# -- projection ---------------------------------------------------------------------------------------


def test_projection_keeps_the_certificate_in_a_training_loop():
    original = network(11)
    student = tr.prune_weights(original, 0.5)
    constraints = Constraints.read(student)
    tau = 1.5 * float(SOLVE(original, student, boxes()).least.max())
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
    for _ in range(3):
        loss = (student(x) - original(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        constraints.project(student)
        found = tr.project(original, student, boxes(), tau, constraints=constraints, exact=EXACT)
        assert found.within(tau)
        assert tr.discrepancy(original, student, boxes(), EXACT).within(tau)
    kept = student[-1].weight.clone()
    tr.project(original, student, boxes(), 10 * tau, constraints=constraints, exact=EXACT)
    assert torch.equal(kept, student[-1].weight)  # what holds already changes nothing
    missed = tr.project(original, student, boxes(), 1e-6, constraints=constraints, exact=EXACT)
    assert not missed.within(1e-6)


def test_the_example_of_the_docs_keeps_its_certificate() -> None:
    names = run_example("training.md", 1)
    assert max(names["certificates"]) <= 0.05
    assert tr.discrepancy(names["original"], names["student"], names["stars"], EXACT).within(0.05)


def test_another_user_of_highs_in_the_process_may_have_other_threads() -> None:
    script = """
import highspy, numpy as np
first = getattr(highspy, "_Highs", highspy.Highs)()
first.setOptionValue("output_flag", False)
first.setOptionValue("threads", 2)
first.addVar(0.0, 1.0)
first.run()
from torchreach.core.clock import NO_LIMIT
from torchreach.lp.least_slack import LeastSlack
program = LeastSlack(1)
program.add(np.array([[1.0], [-1.0]]), np.array([0.0, -1.0]), np.ones(2))
print(program.solve(NO_LIMIT).value)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(0.5)


# -- deployed networks --------------------------------------------------------------------------------


def test_biases_of_a_deployed_network_move_its_outputs_and_samples_stay_inside():
    original = dense()
    given = quantize_weights(original, 6)
    with torch.no_grad():
        given[-1].bias += 0.3
    calibration = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    data = calibration, original(calibration).detach()
    stars = deployed_boxes()
    result = tr.repair(original, int8(given, inputs=calibration), stars, target=None, method="solve", data=data)
    made = [step.method for step in result.history]
    assert made[:3] == [tr.Made.GIVEN, tr.Made.CALIBRATED, tr.Made.SHIFTED]
    assert tr.Made.RECODED in made
    assert result.method in (tr.Made.SHIFTED, tr.Made.RECODED)
    assert float(result.after.upper.max()) < 0.6 * float(result.history[1].discrepancy.upper.max())
    best = [float(step.discrepancy.upper.max()) for step in result.history]
    assert best[result.index] == min(best)
    again = tr.discrepancy(original, result.network, stars)
    torch.testing.assert_close(again.upper, result.after.upper, rtol=0, atol=1e-6)
    for s, x in enumerate(stars.sample(2000, 1)):
        off = (run(original, x) - run(result.network, x)).abs().amax(0)
        assert bool((off <= result.after.upper[s] + 1e-5).all())


# -- wrong input --------------------------------------------------------------------------------------


def test_wrong_input_is_named():
    original = network()
    with pytest.raises(OptionError, match="method must be one of retrain, solve, auto, got 'guess'"):
        SOLVE(original, original, boxes(), method="guess")
    with pytest.raises(OptionError, match="layers must be a positive integer, got 0"):
        SOLVE(original, original, boxes(), layers=0)
    with pytest.raises(OptionError, match="a target is required .* got None"):
        SOLVE(original, original, boxes(), method="retrain")
    with pytest.raises(OptionError, match="keep requires method='solve' or 'auto'"):
        SOLVE(original, original, boxes(), method="retrain", target=0.5, keep=torch.zeros(1, 2))
    with pytest.raises(OptionError, match=r"Keep.tolerance must be a positive number or None, got -1"):
        tr.Keep(torch.zeros(1, 2), -1)
    with pytest.raises(OptionError, match="Keep.inputs must be a tensor of points or a StarBatch, got str"):
        tr.Keep("all")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"keep must hold inputs of shape \(2,\), got \(3,\)"):
        SOLVE(original, original, boxes(), keep=torch.zeros(1, 3))
    with pytest.raises(UnsupportedLayerError, match="last layer is an nn.Linear .* got ReLU"):
        SOLVE(nn.Sequential(*original, nn.ReLU()), nn.Sequential(*network(1), nn.ReLU()), boxes())
    frozen = network()
    frozen[-1].requires_grad_(False)
    with pytest.raises(InvalidNetworkError, match="free numbers for every output"):
        SOLVE(network(1), frozen, boxes())
    deployed = int8(dense(), inputs=torch.randn(50, 3))
    with pytest.raises(OptionError, match="tolerances of keep require a network that does not round activations"):
        SOLVE(dense(), deployed, deployed_boxes(), keep=tr.Keep(torch.zeros(1, 3), 0.1))
    with pytest.raises(OptionError, match="tau must be a positive number, got 0"):
        tr.project(original, network(), boxes(), 0)
