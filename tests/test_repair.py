"""Repair: the loop, its target sets, and compressions that stay compressed."""

from __future__ import annotations

import copy
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tests.data import require_data
from tests.networks import DEVICES_SIM_SLOW
from torchreach import Exact, RepairStep, StarBatch, Status, discrepancy
from torchreach.compress.constraints import Constraints, FloatGrid, prune_weights, quantize_weights
from torchreach.core.errors import InvalidNetworkError, OptionError, ShapeError
from torchreach.core.options import Budget
from torchreach.training import fit as training
from torchreach.training.repair import RepairOptions, Target, repair

QUICK = RepairOptions(samples=50, epochs=20, batch_size=64)
FAST = partial(repair, exact=Exact(root_bounds="zonotope"), training=QUICK)


def network(seed: int = 0, sizes: tuple[int, ...] = (3, 8, 6, 2)) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layer = nn.Linear(n_in, n_out)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(n_out, n_in, generator=generator) / n_in**0.5)
            layer.bias.copy_(0.1 * torch.randn(n_out, generator=generator))
        layers += [layer] if i == len(sizes) - 2 else [layer, nn.ReLU()]
    return nn.Sequential(*layers)


def boxes(dtype: torch.dtype = torch.float32) -> StarBatch:
    centers = torch.tensor([[0.3, -0.2, 0.5], [-0.6, 0.4, 0.1]], dtype=dtype)
    return StarBatch.from_box(centers - 0.2, centers + 0.2)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest(found) -> float:
    return float(found.upper.max())


# -- the loop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["pointwise", "extremum", "midpoint"])
@pytest.mark.parametrize("compress", [partial(prune_weights, fraction=0.4), partial(quantize_weights, bits=4)])
def test_reached_target_is_what_an_independent_discrepancy_shows(step, compress):
    original = network()
    result = FAST(original, compress(original), boxes(), target=0.8, step=step)
    assert result.satisfied
    again = discrepancy(original, result.network, boxes(), Exact(root_bounds="zonotope"))
    torch.testing.assert_close(again.upper, result.after.upper, rtol=0, atol=1e-7)
    assert largest(again) <= 0.8 * largest(result.before) + 1e-7
    assert result.history[-1].discrepancy is result.after
    assert result.index == len(result.history) - 1


def test_missed_target_stops_at_the_iteration_limit_and_returns_the_closest_network():
    original = network()
    small = quantize_weights(original, bits=3)
    result = FAST(original, small, boxes(), target=1e-6, iterations=4)
    assert not result.satisfied
    assert [step.iteration for step in result.history] == [0, 1, 2, 3, 4]
    assert not any(step.satisfied for step in result.history)
    assert largest(result.after) == min(largest(step.discrepancy) for step in result.history)
    again = discrepancy(original, result.network, boxes(), Exact(root_bounds="zonotope"))
    torch.testing.assert_close(again.upper, result.after.upper, rtol=0, atol=1e-7)


def test_target_that_already_holds_trains_nothing():
    original = network()
    small = quantize_weights(original)
    result = FAST(original, small, boxes(), target=Target.bounds(-10.0, 10.0))
    assert result.satisfied
    assert len(result.history) == 1
    assert result.after is result.before
    assert result.network is not small
    assert same(state(result.network), state(small))


def test_spent_budget_misses_the_target_unless_its_certified_bounds_reach_it():
    original = network()
    pruned = prune_weights(original, 0.4)
    wide = StarBatch.from_box(-torch.ones(1, 3), torch.ones(1, 3))
    spent = partial(FAST, original, pruned, wide, budget=Budget(stars=1))
    loose = spent(target=Target.bounds(-50.0, 50.0))
    assert loose.before.status == (Status.BOUNDED,)
    assert loose.satisfied
    exact = FAST(original, pruned, wide, target=Target.bounds(-50.0, 50.0))
    limit = largest(exact.before) + 1e-4  # true of the networks, but a spent budget cannot show it
    assert largest(loose.before) > limit
    tight = spent(target=Target.bounds(-limit, limit), iterations=1)
    assert not tight.history[0].satisfied


def test_given_networks_their_modes_and_the_random_state_are_left_alone():
    original = network()
    small = prune_weights(original, 0.4)
    original.eval()
    small.train()
    before = state(original), state(small)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    result = FAST(original, small, boxes(), target=0.01, iterations=2)
    assert torch.equal(torch.rand(4), expected)
    assert same(state(original), before[0])
    assert same(state(small), before[1])
    assert not original.training
    assert small.training
    assert all(module.training for module in result.network.modules())
    assert all(value.grad is None for value in (*original.parameters(), *small.parameters()))
    assert not same(state(result.network), state(small))
    assert result.network[0].weight.requires_grad


def test_equal_seeds_give_equal_results_and_others_do_not():
    original = network()
    small = quantize_weights(original, bits=4)
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(points, original(points).detach()), batch_size=16, shuffle=True
    )
    results = []
    for seed in (5, 5, 6):
        torch.rand(3)  # whatever else the program draws does not matter
        results.append(FAST(original, small, boxes(), target=0.01, iterations=2, seed=seed, data=data))
    first, second, other = (state(result.network) for result in results)
    assert same(first, second)
    assert not same(first, other)
    for a, b in zip(results[0].history, results[1].history, strict=True):
        assert a.loss == b.loss
        assert torch.equal(a.discrepancy.upper, b.discrepancy.upper)


def test_history_records_accuracy_loss_and_progress_in_order():
    seen: list[RepairStep] = []
    asked: list[bool] = []

    def evaluate(module: nn.Module) -> float:
        asked.append(module.training)
        return 0.5 + len(asked) / 100

    original = network()
    result = FAST(
        original,
        prune_weights(original, 0.4),
        boxes(),
        target=0.001,
        iterations=2,
        evaluate=evaluate,
        progress=seen.append,
    )
    assert tuple(seen) == result.history
    assert [step.accuracy for step in seen] == [0.51, 0.52, 0.53]
    assert asked == [False] * 3
    assert seen[0].loss is None
    assert all(step.loss > 0 for step in seen[1:])
    assert all(step.seconds > 0 for step in seen)
    assert result.accuracy == seen[result.index].accuracy


def test_any_optimiser_trains_also_one_that_needs_a_closure():
    original = network()
    pruned = prune_weights(original, 0.4)
    for make in (
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.LBFGS(parameters, lr=0.5),
    ):
        training = RepairOptions(samples=50, epochs=5, optimizer=make)
        result = FAST(original, pruned, boxes(), target=0.7, training=training)
        assert result.satisfied


def test_diverging_training_is_undone_and_said(caplog):
    original = network()
    pruned = prune_weights(original, 0.4)
    training = RepairOptions(samples=20, epochs=20, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e12))
    result = FAST(original, pruned, boxes(), target=0.5, iterations=2, training=training)
    assert not result.satisfied
    assert same(state(result.network), state(pruned))
    assert "diverged" in caplog.text


def test_data_keeps_what_the_network_does_elsewhere():
    original = network()
    pruned = prune_weights(original, 0.5)
    points = 3 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    wanted = original(points).detach()

    def error(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module(points) - wanted).square().mean())

    def retrained(weight: float = 0.0, data=None) -> nn.Module:
        """The network after two iterations, whether or not the data drew it away from the original."""
        evaluations = iter(range(10))
        training = RepairOptions(samples=50, epochs=20, batch_size=64, data_weight=weight)
        return FAST(
            original, pruned, boxes(), target=lambda _: next(evaluations) == 2, data=data, training=training
        ).network

    alone = error(retrained())
    for data in ((points, wanted), [(points[:100], wanted[:100]), (points[100:], wanted[100:])]):
        assert error(retrained(1.0, data)) < 0.5 * alone

    labels = wanted.argmax(1)
    losses = []
    for module in (retrained(), retrained(1.0, (points, labels))):
        losses.append(float(nn.functional.cross_entropy(module(points), labels).detach()))
    assert losses[1] < 0.5 * losses[0]


def test_batch_norm_keeps_its_statistics_and_dropout_is_off():
    generator = torch.Generator().manual_seed(0)
    original = network()
    original.insert(1, nn.BatchNorm1d(8))
    original.insert(2, nn.Dropout(0.5))
    original[1].running_mean.copy_(torch.randn(8, generator=generator))
    original.train()
    small = quantize_weights(original, bits=3)
    result = FAST(original, small, boxes(), target=0.7)
    assert result.satisfied
    assert torch.equal(result.network[1].running_mean, original[1].running_mean)
    assert int(result.network[1].num_batches_tracked) == 0


def test_frozen_parameters_stay():
    original = network()
    pruned = prune_weights(original, 0.4)
    pruned[0].requires_grad_(False)
    result = FAST(original, pruned, boxes(), target=0.01, iterations=2)
    assert torch.equal(result.network[0].weight, pruned[0].weight)
    assert torch.equal(result.network[0].bias, pruned[0].bias)
    assert not torch.equal(result.network[2].weight, pruned[2].weight)
    with pytest.raises(InvalidNetworkError, match="at least one parameter with requires_grad=True, got none"):
        FAST(original, copy.deepcopy(pruned).requires_grad_(False), boxes(), target=0.5)


@pytest.mark.parametrize("device", DEVICES_SIM_SLOW)
@pytest.mark.parametrize(("net", "sets"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_networks_and_stars_keep_their_dtype_and_device(device, net, sets):
    original = network().to(device, net)
    small = quantize_weights(original, bits=4)
    result = FAST(original, small, boxes(sets).to(device), target=0.8)
    assert result.satisfied
    assert {(value.dtype, value.device.type) for value in result.network.parameters()} == {(net, device)}
    assert result.after.upper.dtype == sets


# -- target sets --------------------------------------------------------------------------------------


def test_factor_of_stars_and_of_outputs_ask_for_each_of_them():
    original = network()
    pruned = prune_weights(original, 0.4)
    stars = FAST(original, pruned, boxes(), target=Target.factor(0.7, "stars"))
    assert stars.satisfied
    assert bool((stars.after.max_upper <= 0.7 * stars.before.max_upper + 1e-7).all())
    outputs = FAST(original, pruned, boxes(), target=Target.factor(0.7, "outputs"), iterations=30)
    ratio = outputs.after.upper / outputs.before.upper
    assert outputs.satisfied == bool((ratio <= 0.7 + 1e-6).all())


def test_bounds_speak_of_the_signed_range_per_output():
    original = network()
    pruned = prune_weights(original, 0.4)
    found = discrepancy(original, pruned, boxes(), Exact(root_bounds="zonotope"))
    low, high = found.range_lower, found.range_upper
    exactly = FAST(original, pruned, boxes(), target=Target.bounds(low, high))
    assert len(exactly.history) == 1
    shrunk = Target.bounds(low, high - torch.tensor([0.0, 0.01]))
    assert not FAST(original, pruned, boxes(), target=shrunk, iterations=1).history[0].satisfied
    limit = 0.6 * max(float(high.max()), -float(low.min()))
    result = FAST(original, pruned, boxes(), target=Target.bounds(-limit, limit))
    assert result.satisfied
    assert bool((result.after.range_lower >= -limit).all())
    assert bool((result.after.range_upper <= limit).all())


def test_callable_target_decides():
    original = network()
    pruned = prune_weights(original, 0.4)
    calls = []

    def test(found) -> bool:
        calls.append(found)
        return len(calls) == 3

    result = FAST(original, pruned, boxes(), target=test)
    assert result.satisfied
    assert [id(step.discrepancy) for step in result.history] == [id(found) for found in calls]
    assert result.after is calls[-1]


# -- wrong options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 1.5}, r"factor must lie in \(0, 1\), got 1.5"),
        ({"target": True}, r"factor must lie in \(0, 1\), got True"),
        ({"target": "half"}, r"target must be a factor in \(0, 1\), a Target or a callable .* got 'half'"),
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"alpha": float("nan")}, "alpha must be a positive number, got nan"),
        ({"step": "newton"}, "step must be one of pointwise, extremum, midpoint, magnitude, got 'newton'"),
        ({"iterations": 0}, "iterations must be a positive integer, got 0"),
    ],
)
def test_wrong_option_is_named(arguments, message):
    original = network()
    with pytest.raises(OptionError, match=message):
        FAST(original, original, boxes(), **{"target": 0.5, **arguments})


def test_wrong_target_or_training_option_is_named():
    with pytest.raises(OptionError, match="over must be one of all, stars, outputs, got 'rows'"):
        Target.factor(0.5, "rows")
    with pytest.raises(OptionError, match=r"lower <= upper, got 1.0 and -1.0"):
        Target.bounds(1.0, -1.0)
    with pytest.raises(OptionError, match="samples must be a positive integer, got 0"):
        RepairOptions(samples=0)
    with pytest.raises(OptionError, match="learning_rate must be a positive number, got -1.0"):
        RepairOptions(learning_rate=-1.0)
    with pytest.raises(OptionError, match="data_weight must be at least 0, got -0.5"):
        RepairOptions(data_weight=-0.5)
    with pytest.raises(OptionError, match="optimizer must be callable or None, got 'adam'"):
        RepairOptions(optimizer="adam")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"must broadcast to \(2, 2\) \(stars, outputs\), got \(3,\)"):
        FAST(network(), network(), boxes(), target=Target.bounds(-torch.ones(3), torch.ones(3)))


def test_wrong_shapes_are_named_before_any_work():
    wrong = {"target": 0.5, "evaluate": lambda _: pytest.fail("work was done")}
    with pytest.raises(ShapeError, match="equally many outputs"):
        FAST(network(), network(sizes=(3, 4, 3)), boxes(), **wrong)
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        FAST(network(sizes=(4, 5, 2)), network(sizes=(4, 5, 2)), boxes(), **wrong)
    with pytest.raises(ShapeError, match="StarBatch, got Tensor"):
        FAST(network(), network(), torch.zeros(2, 3), **wrong)
    with pytest.raises(ShapeError, match=r"\(inputs, labels\) of equal length, got 5 and 4"):
        FAST(network(), network(), boxes(), data=(torch.zeros(5, 3), torch.zeros(4)), **wrong)


# -- compressions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("per_channel", [False, True])
def test_quantised_weights_stay_on_their_grid(bits, per_channel):
    original = network()
    small = quantize_weights(original, bits, per_channel)
    result = FAST(original, small, boxes(), target=0.01, iterations=3)
    assert result.index > 0
    highest = 2 ** (bits - 1) - 1
    changed = False
    for given, layer in zip(small, result.network, strict=True):
        if isinstance(layer, nn.Linear):
            assert layer.weight_scale.shape == ((layer.out_features, 1) if per_channel else ())
            assert torch.equal(layer.weight_scale, given.weight_scale)
            codes = (layer.weight / layer.weight_scale).round()
            assert torch.equal(layer.weight, codes * layer.weight_scale)
            assert int(codes.abs().max()) <= highest
            changed |= not torch.equal(layer.weight, given.weight)
    assert changed


def test_quantisation_rounds_to_the_nearest_of_the_symmetric_codes():
    original = network()
    small = quantize_weights(original, 4)
    for layer, old in zip(small, original, strict=True):
        if isinstance(layer, nn.Linear):
            assert type(layer) is nn.Linear
            scale = layer.weight_scale
            torch.testing.assert_close(scale, old.weight.abs().max() / 7)
            assert float((layer.weight - old.weight).detach().abs().max()) <= float(scale) * 0.5001
            assert torch.equal(layer.bias, old.bias)
    fresh = quantize_weights(network(seed=1), 4)
    fresh.load_state_dict(small.state_dict())
    assert same(state(fresh), state(small))
    with pytest.raises(OptionError, match="bits must be an integer from 2 to 16, got 1"):
        quantize_weights(original, 1)
    with pytest.raises(InvalidNetworkError, match="Linear or convolution layer to compress, got none"):
        quantize_weights(nn.Sequential(nn.ReLU()))


def test_pruned_weights_are_the_smallest_and_stay_zero():
    original = network()
    for across in (False, True):
        small = prune_weights(original, 0.5, across_layers=across)
        kept, gone = [], []
        for layer, old in zip(small, original, strict=True):
            if isinstance(layer, nn.Linear):
                sizes = old.weight.detach().abs()
                kept.append(sizes[layer.weight != 0])
                gone.append(sizes[layer.weight == 0])
                assert across or len(gone[-1]) == round(0.5 * old.weight.numel())
        assert len(torch.cat(gone)) == sum(w.numel() for w in original.parameters() if w.ndim == 2) // 2
        pairs = [(torch.cat(kept), torch.cat(gone))] if across else zip(kept, gone, strict=True)
        assert all(float(a.min()) >= float(b.max()) for a, b in pairs)
    for given in (small, quantize_weights(small, 4), prune_weights(quantize_weights(original, 4), 0.5)):
        result = FAST(original, given, boxes(), target=0.01, iterations=2)
        assert result.index > 0
        for layer, old in zip(result.network, given, strict=True):
            if isinstance(layer, nn.Linear):
                assert bool((layer.weight[~old.weight_mask] == 0).all())
    with pytest.raises(OptionError, match=r"fraction must lie in \[0, 1\), got 1"):
        prune_weights(original, 1)


def test_zeros_without_a_mask_and_torch_pruning_stay_zero():
    original = network()
    bare = network()
    with torch.no_grad():
        bare[2].weight[:, ::2] = 0
    result = FAST(original, bare, boxes(), target=0.01, iterations=2)
    assert result.index > 0
    assert bool((result.network[2].weight[:, ::2] == 0).all())
    assert bool((result.network[2].weight[:, 1::2] != 0).all())

    hooked = network()
    prune.l1_unstructured(hooked[0], "weight", amount=10)
    prune.random_unstructured(hooked[2], "bias", amount=3)
    before = state(hooked)
    result = FAST(original, hooked, boxes(), target=0.01, iterations=2)
    assert result.index > 0
    assert bool((result.network[0].weight[hooked[0].weight_mask == 0] == 0).all())
    assert bool((result.network[2].bias[hooked[2].bias_mask == 0] == 0).all())
    assert same(state(hooked), before)


def test_zeros_of_rounding_may_move():
    small = quantize_weights(network(sizes=(8, 40, 2)), 3)
    zeros = small[0].weight == 0
    assert 0.1 < float(zeros.double().mean()) < 0.9
    assert "0.weight" not in Constraints.read(small).masks


@pytest.mark.parametrize("name", ["acas_1_1_int8", "acas_3_7_int8", "acas_2_3_int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grid_is_recognised_without_its_buffers(name, dtype):
    with np.load(require_data("equivalence", f"{name}.npz")) as data:
        arrays = {key: torch.from_numpy(data[key]) for key in data.files}
    layers = nn.Sequential(*(nn.Linear(*reversed(arrays[f"W{i}"].shape), dtype=dtype) for i in range(7)))
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.weight.copy_(arrays[f"W{i}"])
    constraints = Constraints.read(layers)
    assert set(constraints.grids) == {f"{i}.weight" for i in range(7)}
    for i, layer in enumerate(layers):
        grid = constraints.grids[f"{i}.weight"]
        codes, known = grid.codes(layer.weight.detach()), arrays[f"q{i}"]
        divisor = int(np.gcd.reduce(known.int().flatten().tolist()))
        assert torch.equal(codes.int() * divisor, known.int())  # the coarsest grid that fits
        assert torch.equal(grid.snap(layer.weight.detach()), layer.weight)


def test_grid_per_channel_and_half_precision_are_recognised_without_buffers():
    small = quantize_weights(network(sizes=(6, 8, 5)), 8, per_channel=True)
    plain = network(sizes=(6, 8, 5))
    plain.load_state_dict(small.state_dict(), strict=False)
    grids = Constraints.read(plain).grids
    for name in ("0.weight", "2.weight"):
        scale = dict(small.named_buffers())[f"{name}_scale"]
        torch.testing.assert_close(grids[name].scale, scale, rtol=1e-6, atol=0)

    original = network()
    half = network().half().float()
    assert set(Constraints.read(half).grids.values()) == {FloatGrid(torch.float16)}
    with torch.no_grad():
        half[0].weight.add_(0.05).copy_(half[0].weight.half())
    result = FAST(original, half, boxes(), target=0.5)
    assert result.satisfied
    assert all(torch.equal(value, value.half().float()) for value in result.network.parameters())


def test_float_weights_are_not_taken_for_a_grid():
    for seed in range(20):
        constraints = Constraints.read(network(seed, sizes=(4, 5, 3)))
        assert not constraints.grids
        assert not constraints.masks
    blank = network(sizes=(4, 5, 3))
    with torch.no_grad():
        blank[0].weight.zero_()
    constraints = Constraints.read(blank)
    assert not constraints.grids
    assert not bool(constraints.masks["0.weight"].any())


def test_straight_through_has_the_constrained_value_and_the_free_gradient():
    small = quantize_weights(prune_weights(network(), 0.4), 4)
    constraints = Constraints.read(small)
    generator = torch.Generator().manual_seed(0)
    free = {
        name: (value.detach() + 0.02 * torch.randn(value.shape, generator=generator)).requires_grad_()
        for name, value in small.named_parameters()
    }
    values = constraints.straight_through(free)
    sum(value.sum() for value in values.values()).backward()
    with torch.no_grad():
        for name, value in small.named_parameters():
            value.copy_(free[name])
    constraints.project(small)
    constraints.check(small)
    for name, value in small.named_parameters():
        assert torch.equal(values[name], value)
        if name in constraints.masks:
            assert bool((free[name].grad[~constraints.masks[name]] == 0).all())
            assert 0 < int((free[name].grad == 1).sum()) <= int(constraints.masks[name].sum())
        else:
            assert bool((free[name].grad == 1).all())


def test_network_off_its_grid_is_refused():
    small = quantize_weights(network(), 4)
    with torch.no_grad():
        small[0].weight.add_(0.01)
    with pytest.raises(InvalidNetworkError, match=r"lie on its grid, but parameter '0.weight' is off by up to 0.01"):
        FAST(network(), small, boxes(), target=0.5)
    free = FAST(network(), small, boxes(), target=0.5, constraints=Constraints({}, {}))
    assert free.satisfied


def test_convolutions_and_image_stars_are_repaired():
    generator = torch.Generator().manual_seed(0)
    original = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        for value in original.parameters():
            value.copy_(0.4 * torch.randn(value.shape, generator=generator))
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1:3, 1] = True
    stars = StarBatch.from_image(torch.rand(2, 1, 4, 4, generator=generator), 0.1, mask)
    small = quantize_weights(prune_weights(original, 0.3), 4, per_channel=True)
    assert small[0].weight_scale.shape == (3, 1, 1, 1)
    result = FAST(original, small, stars, target=0.5)
    assert result.satisfied
    Constraints.read(small).check(result.network)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("when", ["evaluated", "trained"])
def test_ctrl_c_gives_the_best_network_so_far(monkeypatch, when):
    """It comes after the first evaluation, or in the middle of training: neither is followed by another."""
    original = network()
    compressed, batches = quantize_weights(original, 4), []

    def press(*_):
        os.kill(os.getpid(), signal.SIGINT)

    def loss(output, x, y):
        batches.append(len(x))
        press()
        return nn.functional.mse_loss(output(x), y)

    monkeypatch.setattr(training, "_loss", loss)
    result = FAST(
        original, compressed, boxes(), target=1e-9, iterations=5, progress=press if when == "evaluated" else None
    )
    assert len(result.history) == 1
    assert len(batches) == (when == "trained")
    assert same(state(result.network), state(compressed))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
