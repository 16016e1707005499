"""Deployed int8 networks: certified ranges hold for what torch's kernels compute, and are attained."""

from __future__ import annotations

import copy
import json
import warnings
from collections import OrderedDict
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchreach as tr
from tests.data import require_data
from tests.networks import DEVICES_SIM_SLOW, executed_steps, random_network
from torchreach.domains import rounding
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.steps import steps_of
from torchreach.search import cells
from torchreach.search.signs import search_signs
from torchreach.verbs import int8_star as deployed

ENGINES = [name for name in ("x86", "fbgemm", "onednn") if name in torch.backends.quantized.supported_engines]


def int8_network(network: nn.Sequential, data: Tensor, *, per_channel: bool = True, engine: str = "x86") -> nn.Module:
    """Eager-mode int8 copy, calibrated on `data`, ReLU fused; executed by the engine it was converted under."""
    from torch.ao import quantization as q

    torch.backends.quantized.engine = engine
    wrapped = q.QuantWrapper(nn.Sequential(*(layer for layer in network)).float())
    names = [name for name, _ in wrapped.module.named_children()]
    pairs = [
        [f"module.{a}", f"module.{b}"]
        for a, b in zip(names[:-1], names[1:], strict=True)
        if isinstance(wrapped.module.get_submodule(a), nn.Linear | nn.Conv2d)
        and isinstance(wrapped.module.get_submodule(b), nn.ReLU)
    ]
    weights = q.default_per_channel_weight_observer if per_channel else q.default_weight_observer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.qconfig = q.QConfig(activation=q.MinMaxObserver.with_args(dtype=torch.quint8), weight=weights)
        wrapped = q.fuse_modules(wrapped.eval(), pairs) if pairs else wrapped.eval()
        prepared = q.prepare(wrapped)
        prepared(data.float())
        return q.convert(prepared)


def case(seed: int, *, inputs: int = 3, scale: float = 1.0, **options) -> tuple[nn.Sequential, nn.Module, Tensor]:
    """Network, its int8 copy, and a point of the calibrated domain [-1, 1]^n."""
    network = random_network(seed, [inputs, 12, 10, 3])
    g = torch.Generator().manual_seed(seed)
    data = scale * (2 * torch.rand(500, inputs, generator=g, dtype=torch.float64) - 1)
    small = int8_network(random_network(seed, [inputs, 12, 10, 3]), data, **options)
    return network, small, data[0]


def differences(original: nn.Module, small: nn.Module, x: Tensor) -> Tensor:
    """y1 in float64 less what the int8 kernels give, at float32 inputs x [B, ...]."""
    with torch.no_grad():
        return original(x.double()).flatten(1) - small(x.float()).double().flatten(1)


def assert_contains(found: tr.Discrepancy, y: Tensor, star: int = 0) -> None:
    margin = 1e-9
    assert bool((y >= found.range_lower[star] - margin).all())
    assert bool((y <= found.range_upper[star] + margin).all())


def samples(stars: tr.StarBatch, count: int) -> Tensor:
    """[count, ...] float32 inputs of the first star: uniform, and at its corners."""
    low, high = (end[0].float() for end in (stars.sample(count).amin(1), stars.sample(count).amax(1)))
    x = stars.sample(count)[0].float()
    corner = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.3, low, x)
    return torch.cat(
        (x, torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.3, high, corner))
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_exact_ranges_contain_what_the_kernels_compute(seed, per_channel, engine):
    original, small, x = case(seed, per_channel=per_channel, engine=engine)
    stars = tr.StarBatch.from_image(x[None], 0.05)
    found = tr.discrepancy(original, small, stars)
    assert found.semantics == "deployed int8"
    assert found.stats.method == "cells"
    y = differences(original, small, samples(stars, 50_000))
    assert_contains(found, y)
    # attained, by inputs that sampling comes close to
    assert found.max_lower >= y.abs().max() - 1e-6
    assert found.max_upper <= y.abs().max() * 1.2 + 1e-3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(4))
def test_witnesses_replay_on_the_kernels_bit_for_bit(seed, engine):
    original, small, x = case(seed, engine=engine)
    found = tr.discrepancy(original, small, tr.StarBatch.from_image(x[None], 0.05))
    witness = found.witness[0]
    assert torch.equal(witness, witness.float().double())  # inputs that a float32 network can be given
    with torch.no_grad():
        executed = small(witness.float()).double()
    index, low, high = rounding.outputs(executed_steps(small, (3,)), witness)
    assert index.tolist() == [0, 1, 2]
    assert torch.allclose((low + high) / 2, executed, rtol=1e-6, atol=1e-9)
    assert bool((high - low <= 1e-6).all())
    attained = differences(original, small, witness).diagonal().abs()
    assert bool((attained >= found.lower[0] - 1e-6).all())
    assert bool((found.upper[0] - attained <= 1e-4).all())


def test_exact_range_equals_the_range_over_a_fine_grid():
    """Independent reference: every cell of the input grid, 20 x 20 points of each, through torch's kernels."""
    original, small, x = case(5, inputs=2)
    stars = tr.StarBatch.from_image(x[None], 0.04)
    found = tr.discrepancy(original, small, stars)
    side = [torch.linspace(float(c) - 0.04, float(c) + 0.04, 600, dtype=torch.float64) for c in x]
    grid = torch.stack(torch.meshgrid(*side, indexing="ij"), -1).reshape(-1, 2)
    y = differences(original, small, grid.float())
    assert_contains(found, y)
    assert torch.allclose(y.amin(0), found.range_lower[0], atol=2e-3)
    assert torch.allclose(y.amax(0), found.range_upper[0], atol=2e-3)


def without_cells(monkeypatch) -> None:
    """Leaves the relaxation over the whole box alone."""
    monkeypatch.setattr(deployed, "LIMIT", 0)
    monkeypatch.setattr(deployed, "BOXES", 0)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_relaxation_contains_the_exact_range(monkeypatch, seed, scale):
    """scale 0.3: calibrated on a smaller domain than the set's, so that codes saturate."""
    original, small, x = case(seed, scale=scale)
    stars = tr.StarBatch.from_image(x[None] / scale * 0.8, 0.04)
    exact = tr.discrepancy(original, small, stars)
    without_cells(monkeypatch)
    relaxed = tr.discrepancy(original, small, stars)
    assert relaxed.stats.method == "relaxation"
    assert bool((relaxed.range_lower <= exact.range_lower + 1e-9).all())
    assert bool((relaxed.range_upper >= exact.range_upper - 1e-9).all())
    assert bool((relaxed.lower <= exact.upper + 1e-9).all())
    assert_contains(relaxed, differences(original, small, samples(stars, 20_000)))
    attained = differences(original, small, relaxed.witness[0]).diagonal().abs()
    assert bool((attained >= relaxed.lower[0] - 1e-6).all())
    assert relaxed.max_upper < 3 * exact.max_upper + 0.5  # bounds that say something


def test_a_relaxation_that_forgets_rounding_is_caught(monkeypatch):
    """The containment above can fail: without the errors of the quantisers it does."""
    original, small, x = case(1)
    stars = tr.StarBatch.from_image(x[None], 0.04)
    exact = tr.discrepancy(original, small, stars)
    without_cells(monkeypatch)
    monkeypatch.setattr(deployed.DeployedStar, "ascend", lambda *_, **__: None)  # what is attained would hide it
    honest = rounding.excess
    monkeypatch.setattr(rounding, "excess", lambda *a, **k: tuple(0 * part for part in honest(*a, **k)))
    wrong = tr.discrepancy(original, small, stars)
    assert bool(
        (wrong.range_lower > exact.range_lower + 1e-3).any() or (wrong.range_upper < exact.range_upper - 1e-3).any()
    )


@pytest.mark.parametrize("leading", [False, True])
def test_dividing_the_box_closes_the_interval(monkeypatch, leading):
    """leading: a float layer before the first quantiser, so that there is no input grid and boxes are halved."""
    if leading:
        original = random_network(2, [2, 6, 2])
        small = copy.deepcopy(nn.Sequential(*original[:2], Quantizer(0.2, 0, 0, 255), original[2])).float()
        stars = tr.StarBatch.from_box(torch.zeros(1, 2).double(), torch.full((1, 2), 0.2).double())
    else:
        original, small, x = case(3, inputs=2)
        stars = tr.StarBatch.from_image(x[None], 0.02)
    monkeypatch.setattr(deployed, "LIMIT", 0)
    monkeypatch.setattr(deployed, "LEAF", 8)
    intervals = []
    for boxes in (0, 4, 16):
        monkeypatch.setattr(deployed, "BOXES", boxes)
        found = tr.discrepancy(original, small, stars)
        assert_contains(found, differences(original, small, samples(stars, 5_000)))
        intervals.append(found)
    for before, after in zip(intervals[:-1], intervals[1:], strict=True):
        assert bool((after.upper <= before.upper + 1e-12).all() and (after.lower >= before.lower - 1e-12).all())
    first, last = (found.upper - found.lower for found in (intervals[0], intervals[-1]))
    assert last.max() < 0.7 * first.max()
    if not leading:
        monkeypatch.undo()
        assert torch.allclose(intervals[-1].upper, tr.discrepancy(original, small, stars).upper, atol=1e-6)


def test_thresholds_at_the_edge_of_the_set_count_on_both_sides():
    """x = 0.5 rounds to 0 (half to even), its float32 neighbour to 1: the closed cell of code 1 belongs to the set."""
    quantizer = Quantizer(1.0, 0, 0, 255, name="input")
    network = nn.Sequential(nn.Linear(1, 1, dtype=torch.float64))
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        network[0].bias.zero_()
    rounded = nn.Sequential(quantizer, network[0])
    stars = tr.StarBatch.from_box(torch.tensor([[0.2]]).double(), torch.tensor([[0.5]]).double())
    found = tr.discrepancy(network, rounded, stars)
    assert found.range_upper[0, 0] == pytest.approx(0.5, abs=1e-4)
    assert found.range_lower[0, 0] == pytest.approx(-0.5, abs=1e-4)  # x = 0.5 as a kernel may round it: 0.5 - 1
    inside = tr.StarBatch.from_box(torch.tensor([[0.2]]).double(), torch.tensor([[0.499]]).double())
    assert tr.discrepancy(network, rounded, inside).range_lower[0, 0] == pytest.approx(0.2, abs=1e-4)


@pytest.mark.parametrize("zero_point", [63, 64])
@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_fixed_on_a_threshold_are_rounded_as_kernels_do(engine, zero_point):
    """A background of -1 at scale 2 / 127 lies halfway between two codes: known all the same, so cells stay few."""
    scale = float(torch.tensor(2 / 127))
    x = torch.tensor([[-1.0, 1.0, 31.5 * scale, -0.25]])
    quantised = torch.quantize_per_tensor(x.repeat(9, 1), scale, zero_point, torch.quint8).int_repr()
    codes = Quantizer(scale, zero_point, 0, 255).kernel_codes(x)
    assert bool((codes.amin(0) <= quantised).all() and (quantised <= codes.amax(0)).all())
    network = random_network(4, [40, 8, 2])
    data = torch.cat((torch.full((1, 40), -1.0), torch.full((1, 40), 1.0), torch.rand(50, 40) * 2 - 1))
    small = int8_network(copy.deepcopy(network), data, engine=engine)
    small.quant.scale, small.quant.zero_point = torch.tensor([scale]), torch.tensor([zero_point])
    mask = torch.arange(40) < 2
    stars = tr.StarBatch.from_image(torch.full((1, 40), -1.0).double(), 0.05, mask)
    found = tr.discrepancy(network, small, stars)
    assert found.stats.method == "cells"
    assert_contains(found, differences(network, small, samples(stars, 5_000)))


def test_codes_in_doubt_are_both_followed():
    """A sum that lands on a threshold may be rounded either way by a float32 kernel."""
    layer = nn.Linear(1, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.bias.zero_()
    steps = tr.read.steps.steps(
        nn.Sequential(layer, Quantizer(1.0, 0, 0, 7)),
        (1,),
        dtype=torch.float64,
        device=torch.device("cpu"),
        quantized=True,
    )
    index, low, high = rounding.outputs(steps, torch.tensor([[3.0], [4.0]], dtype=torch.float64))
    assert index.tolist().count(0) == 2  # 1.5: code 1 or 2
    assert index.tolist().count(1) == 1  # 2.0
    assert sorted(low[index == 0].flatten().round().tolist()) == [1.0, 2.0]
    assert bool((high - low <= 1e-5).all())


def test_kernel_errors_count_terms_that_cancel_in_a_composed_bias():
    """Fixed inputs are folded into the bias; what a kernel rounds off is in proportion to the terms."""
    layer = nn.Linear(3, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1000.0, 1.0]]))
        layer.bias.fill_(-1000.0)
    for arithmetic in ("integer", "float32"):
        head = nn.Sequential(layer, Quantizer(1.0, 0, 0, 255, arithmetic=arithmetic), nn.Linear(1, 1).double())
        whole = tr.read.steps.steps(head, (3,), dtype=torch.float64, device=torch.device("cpu"), quantized=True)
        x = torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
        part = rounding.restricted(whole, x, torch.tensor([0, 2]), x.abs())
        z = torch.ones(1, 1, dtype=torch.float64)
        assert part[0].bias.abs() <= 1e-9
        full = rounding.kernel_error(whole[0], z, x[None])
        assert rounding.kernel_error(part[0], z, x[None, [0, 2]]) >= full - 1e-15


def test_inputs_of_other_cells_attain_nothing_in_part_of_the_grid():
    """A part of a divided box knows the network's output on its own codes only."""
    from dataclasses import replace

    original, small, x = case(3, inputs=2)
    first, second = (
        tr.read.steps.steps(n, (2,), dtype=torch.float64, device=torch.device("cpu"), quantized=True)
        for n in (original, small)
    )
    grid = rounding.InputGrid.of(second[0])
    assert grid is not None
    low, high = grid.codes(x - 0.04, x + 0.04)
    one = replace(grid, first=torch.stack((low[0], low[1])), last=torch.stack((low[0], high[1])))
    part = cells.Cells(first, second, one, x - 0.04, x + 0.04)
    elsewhere = torch.stack((x[0] + 0.039, x[1]))[None]
    assert bool((part.attained(elsewhere) == -torch.inf).all())


def test_linear_networks_of_many_inputs():
    """Nothing to split: the single pass is the answer."""
    original = random_network(0, [30, 4])
    g = torch.Generator().manual_seed(0)
    small = int8_network(copy.deepcopy(original), 2 * torch.rand(300, 30, generator=g) - 1)
    stars = tr.StarBatch.from_image(torch.zeros(1, 30, dtype=torch.float64), 0.05)
    found = tr.discrepancy(original, small, stars)
    assert_contains(found, differences(original, small, samples(stars, 5_000)))
    assert found.max_lower > 0.2 * found.max_upper


def test_numbers_on_which_kernels_overflow_are_refused():
    original, small, _ = case(6)
    far = tr.StarBatch.from_box(torch.full((1, 3), 2e7).double(), torch.full((1, 3), 3e7).double())
    with pytest.raises(tr.TorchreachError, match=r"scale .* of 'quant' must be large enough .* 2\^31 steps"):
        tr.discrepancy(original, small, far)


def test_only_elementwise_layers_before_the_first_quantiser_make_an_input_grid():
    wide = nn.Sequential(nn.Linear(1, 50), nn.Linear(50, 1), Quantizer(0.1, 0, 0, 255), nn.Linear(1, 1)).double()
    plain = nn.Sequential(Quantizer(0.1, 0, 0, 255), nn.Linear(1, 1)).double()
    for network, expected in ((wide, False), (plain, True)):
        first = tr.read.steps.steps(network, (1,), dtype=torch.float64, device=torch.device("cpu"), quantized=True)[0]
        assert (rounding.InputGrid.of(first) is not None) == expected


def test_float_layers_behind_the_input_quantiser_count_as_float32():
    """The lower bound holds for what float32 sums give, not for real ones."""
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(3, 1)
    with torch.no_grad():
        layer.weight.copy_(1000 * torch.randn(1, 3, generator=g))
        layer.bias.fill_(900.0)
    small = nn.Sequential(Quantizer(0.01, 100, 0, 255, arithmetic="float32"), layer)
    original = copy.deepcopy(layer).double()
    stars = tr.StarBatch.from_box(torch.full((1, 3), 0.1).double(), torch.full((1, 3), 0.13).double())
    found = tr.discrepancy(original, small, stars)
    attained = differences(original, small, found.witness[0]).diagonal().abs()
    assert bool((attained >= found.lower[0]).all())


def test_a_quantiser_of_one_code_is_a_constant():
    """A ReLU after a grid whose zero point is its highest code leaves zero."""
    small = nn.Sequential(Quantizer(0.1, 0, 0, 255), nn.Linear(2, 3), Quantizer(0.1, 255, 0, 255), nn.ReLU())
    original = nn.Sequential(nn.Linear(2, 3)).double()
    stars = tr.StarBatch.from_box(torch.zeros(1, 2).double(), torch.ones(1, 2).double())
    found = tr.discrepancy(original, small, stars)
    alone = tr.reach(original, stars)
    assert torch.allclose(found.range_upper, alone.upper, atol=1e-5)
    assert torch.allclose(found.range_lower, alone.lower, atol=1e-5)


def test_one_module_is_equal_to_itself():
    _, small, x = case(6)
    found = tr.discrepancy(small, small, tr.StarBatch.from_image(x[None], 0.02))
    assert bool((found.upper == 0).all())
    assert found.status == (tr.Status.EXACT,)


def test_points_without_an_input_grid(monkeypatch):
    monkeypatch.setattr(deployed, "BOXES", 8)
    network = random_network(2, [2, 6, 2])
    small = nn.Sequential(*network[:2], Quantizer(0.2, 0, 0, 255), network[2])
    point = torch.full((1, 2), 0.1, dtype=torch.float64)
    found = tr.discrepancy(network, small, tr.StarBatch.from_box(point, point))
    assert bool((found.upper - found.lower <= 0.2).all())


def test_small_outputs_are_not_called_exact_with_a_wide_gap(monkeypatch):
    original, small, x = case(2)
    with torch.no_grad():
        for layer in (original[-1],):
            layer.weight.mul_(1e-5)
            layer.bias.mul_(1e-5)
    small.module[-1].scale *= 1e-5
    without_cells(monkeypatch)
    found = tr.discrepancy(original, small, tr.StarBatch.from_image(x[None], 0.04))
    if bool((found.upper > 1.01 * found.lower).any()):
        assert found.status == (tr.Status.BOUNDED,)


def test_a_point_is_a_star():
    original, small, x = case(6)
    found = tr.discrepancy(original, small, tr.StarBatch.from_box(x[None].float(), x[None].float()))
    y = differences(original, small, x[None].float())
    assert_contains(found, y.float().double())
    assert bool((found.upper - found.lower <= 1e-4).all())


def test_a_network_and_its_twins_satisfy_the_triangle_inequality():
    original, small, x = case(7)
    stars = tr.StarBatch.from_image(x[None], 0.03)
    twin = tr.weight_only(small)
    itself = tr.discrepancy(original, original, stars)
    weights = tr.discrepancy(original, twin, stars)
    assert (itself.semantics, weights.semantics) == ("float", "weight-only")
    rounding_only = tr.discrepancy(twin, small, stars)
    both = tr.discrepancy(original, small, stars)
    assert itself.max_upper <= 1e-9
    assert bool((both.lower <= weights.upper + rounding_only.upper).all())
    assert bool((rounding_only.lower <= weights.upper + both.upper).all())
    assert bool((weights.lower <= rounding_only.upper + both.upper).all())


def test_either_network_or_both_may_be_deployed(monkeypatch):
    monkeypatch.setattr(deployed, "BOXES", 8)
    original, small, x = case(8)
    stars = tr.StarBatch.from_image(x[None], 0.03)
    forth, back = tr.discrepancy(original, small, stars), tr.discrepancy(small, original, stars)
    assert torch.allclose(forth.range_lower, -back.range_upper)
    assert torch.allclose(forth.upper, back.upper)
    _, other, _ = case(9)
    both = tr.discrepancy(small, other, stars)
    inputs = samples(stars, 20_000)
    with torch.no_grad():
        y = small(inputs).double() - other(inputs).double()
    assert_contains(both, y)


def test_networks_of_different_architecture_are_compared_by_their_own_ranges(monkeypatch):
    original, _, x = case(10)
    other = random_network(3, [3, 6, 3])
    small = int8_network(other, torch.rand(200, 3) * 2 - 1)
    stars = tr.StarBatch.from_image(x[None], 0.03)
    for limit in (deployed.LIMIT, 0):
        monkeypatch.setattr(deployed, "LIMIT", limit)
        found = tr.discrepancy(original, small, stars)
        assert_contains(found, differences(original, small, samples(stars, 20_000)))


def test_convolutions():
    g = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    data = torch.rand(100, 1, 4, 4, generator=g) * 2 - 1
    small = int8_network(nn.Sequential(*network), data)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3, 1] = True
    stars = tr.StarBatch.from_image(data[:1].double(), 0.05, mask)
    found = tr.discrepancy(network.double(), small, stars)
    assert found.stats.method == "cells"
    assert_contains(found, differences(network, small, samples(stars, 20_000)))
    assert found.max_upper - found.max_lower <= 1e-3


def test_constrained_stars_are_bounded_by_their_box_and_attained_inside():
    original, small, x = case(11)
    box = tr.StarBatch.from_image(x[None], 0.04)
    star = box.intersect(torch.ones(3, dtype=torch.float64), float(x.sum()))
    found = tr.discrepancy(original, small, star)
    whole = tr.discrepancy(original, small, box)
    assert bool((found.upper <= whole.upper + 1e-9).all())
    assert bool(star.contains(found.witness.reshape(1, -1, 3)).all())
    assert found.status == (tr.Status.BOUNDED,)
    assert_contains(found, differences(original, small, samples(star, 5_000)[:5_000]))


def test_a_spent_budget_gives_a_valid_interval(monkeypatch):
    original, small, x = case(12, inputs=4)
    stars = tr.StarBatch.from_image(x[None], 0.04)
    monkeypatch.setattr(cells, "NUMBERS", 2**12)
    found = tr.discrepancy(original, small, stars, budget=tr.Budget(seconds=1e-3))
    assert found.status == (tr.Status.BOUNDED,)
    assert_contains(found, differences(original, small, samples(stars, 20_000)))
    monkeypatch.undo()
    assert bool((tr.discrepancy(original, small, stars).upper <= found.upper + 1e-9).all())


@pytest.mark.parametrize("device", DEVICES_SIM_SLOW)
def test_batches_and_dtypes(device):
    original, small, x = case(13)
    images = torch.stack((x, x.flip(0), 0 * x)).to(device)
    double = tr.discrepancy(original.to(device), small, tr.StarBatch.from_image(images, 0.02))
    single = tr.discrepancy(original, small, tr.StarBatch.from_image(images.float(), 0.02))
    assert single.upper.dtype == torch.float32
    assert torch.allclose(single.upper.double(), double.upper, rtol=1e-4, atol=1e-4)
    alone = tr.discrepancy(original, small, tr.StarBatch.from_image(images[1:2], 0.02))
    assert torch.equal(alone.upper[0], double.upper[1])


def test_exact_reach_and_merging_refuse_rounded_activations():
    original, small, x = case(14)
    stars = tr.StarBatch.from_image(x[None], 0.02)
    for use in (lambda: tr.merge(original, small), lambda: tr.reach(small, stars)):
        with pytest.raises(tr.TorchreachError, match=r"rounds activations.*weight_only"):
            use()


def test_noise_of_affine_steps_is_bounded_everywhere():
    """Zonotopes, exact reach's error bound, reduced networks and difference bounds all contain a noisy network."""
    from dataclasses import replace

    from torchreach.domains.box_difference import quick_bounds
    from torchreach.domains.difference import difference_bounds
    from torchreach.domains.joint import Both
    from torchreach.domains.pair import Pair
    from torchreach.domains.zonotope import box_rows, interval_bounds, zonotope_bounds
    from torchreach.graph.reduced import reduce
    from torchreach.read.steps import steps

    g = torch.Generator().manual_seed(0)
    one, two = (
        steps(random_network(seed, [3, 8, 8, 2]), (3,), dtype=torch.float64, device=torch.device("cpu"))
        for seed in (1, 2)
    )
    noise = [torch.rand(step.features, generator=g, dtype=torch.float64) * 0.1 for step in two]
    two = tuple(replace(step, noise=part) for step, part in zip(two, noise, strict=True))
    low, high = -torch.ones(1, 3, dtype=torch.float64) * 0.3, torch.ones(1, 3, dtype=torch.float64) * 0.3
    x = low + (high - low) * torch.rand(4000, 3, generator=g, dtype=torch.float64)
    y1, y2 = x, x
    for k in range(3):
        y1, y2 = one[k].linear(y1) + one[k].bias, two[k].linear(y2) + two[k].bias
        extremes = torch.rand(y2.shape, generator=g, dtype=torch.float64).round() * 2 - 1
        y2 = y2 + extremes * noise[k]
        if k < 2:
            y1, y2 = y1.relu(), y2.relu()
    rows = box_rows(low, high)
    bounds = zonotope_bounds(two, *rows)
    signs = [(a >= 0).long() - (b <= 0).long() for a, b in bounds]
    reduced = reduce(two, signs, bounds)
    ranges = [bounds[-1], interval_bounds(two, *rows)[-1]]
    if reduced is not None:
        ranges.append(zonotope_bounds(reduced[0], *rows)[-1])
    for a, b in ranges:
        assert bool((y2 >= a).all() and (y2 <= b).all())
    pair = Pair.of(one, two)
    d = y1 - y2
    output = difference_bounds(pair, low, high)[-1]
    assert bool((d >= output.dl).all() and (d <= output.du).all())
    value = quick_bounds(Both.of(pair.first, pair.second, pair), low, high).upper
    assert bool((d <= value[0, 0]).all() and (-d <= value[0, 1]).all())
    question = deployed.Question("signed", 0.05)
    *_, last = islice(search_signs(pair, low[0], high[0], question), 10)
    assert bool((d <= last.upper[0]).all() and (-d <= last.upper[1]).all())


# The paper's shipped network.


def shipped() -> tuple[nn.Module, nn.Module, Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(require_data("fnn_repair", "original.safetensors"))
    layers: list[tuple[str, nn.Module]] = []
    for i in (1, 2, 3):
        weight = tensors[f"fc{i}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = weight, tensors[f"fc{i}.bias"]
        layers += [(f"fc{i}", layer), (f"relu{i}", nn.ReLU())]
    original = nn.Sequential(OrderedDict(layers[:-1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = tr.load_int8(require_data("fnn_repair", "mnist_fnn_s_quan.pth"), original)
    images = torch.from_numpy(np.load(require_data("fnn_repair", "images.npy"))).flatten(1)
    return original.double(), small, images.double()


def test_the_shipped_network_is_certified_as_it_is_executed():
    original, small, images = shipped()
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[13:15, 13:15] = True
    stars = tr.StarBatch.from_image(images, 0.05, mask.flatten())
    found = tr.discrepancy(original, small, stars)
    assert found.status == (tr.Status.EXACT,) * 10
    records = json.loads(require_data("fnn_repair", "ten_images.json").read_text())["images"]
    recorded = torch.tensor([record["int8_point_difference"] for record in records], dtype=torch.float64)
    assert bool((recorded >= found.range_lower - 1e-5).all() and (recorded <= found.range_upper + 1e-5).all())
    for s in range(0, 10, 3):
        assert_contains(found, differences(original, small, stars.select([s]).sample(5_000)[0]), s)


def test_all_pixels_of_the_shipped_network_get_a_certified_interval():
    original, small, images = shipped()
    stars = tr.StarBatch.from_image(images[:1], 0.01)
    found = tr.discrepancy(original, small, stars, budget=tr.Budget(seconds=2))
    x = samples(stars, 2_000)
    assert_contains(found, differences(original, small, x))
    assert found.max_upper <= 1.01 * found.max_lower


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_original_of_a_deployed_network_may_be_read_as_executed(dtype):
    original, small, x = case(0)
    original = original.to(dtype)
    stars = tr.StarBatch.from_image(x[None].float(), 0.02)
    real = tr.discrepancy(copy.deepcopy(original).double(), small, stars)
    found = tr.discrepancy(original, small, stars, arithmetic="executed")
    assert bool((found.upper >= real.upper).all())
    assert found.status == ("bounded",)
    # what was closed is so no longer; kernels of processors with VNNI leave codes open besides
    assert found.reasons == (("rounding",) if real.status == ("exact",) else real.reasons)
    inputs = samples(stars, 3000)
    with torch.no_grad():
        y = original(inputs.to(dtype)).double() - small(inputs.float()).double()
    assert_contains(found, y)
    high, low = float(found.max_upper), float(found.max_lower)
    for tolerance, reason in ((2 * high, "within"), (0.5 * low, "exceeded"), ((low + high) / 2, "rounding")):
        asked = tr.discrepancy(original, small, stars, arithmetic="executed", tolerance=tolerance)
        assert asked.reasons == (reason,)
        assert (asked.max_upper <= tolerance) == (reason == "within")


def test_what_kernels_round_off_is_each_neurons_own():
    """Relaxing a layer whose neurons change places changes the places of its noise, and nothing else."""

    def noise(order: list[int]) -> Tensor:
        layer = nn.Linear(1, 2).double()
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[1e-3], [1e3]])[order])
            layer.bias.copy_(torch.tensor([0.0, 1e3])[order])
        first, second = Quantizer(0.1, 0, -128, 127), Quantizer(100.0, 0, -128, 127)
        network = nn.Sequential(first, layer, second, nn.Linear(2, 1).double())
        steps = steps_of(network, (1,), dtype=torch.float64, device=torch.device("cpu"), quantized=True)
        box = torch.zeros(1, dtype=torch.float64), torch.full((1,), 5.0, dtype=torch.float64)
        found = rounding.relax(steps, *box, rounding.InputGrid.of(steps[0])).steps[0].noise
        assert found is not None
        return found

    assert torch.allclose(noise([0, 1]), noise([1, 0]).flip(0), rtol=0, atol=1e-12)
