"""Networks of integer codes that are no chains, with sums, joins and maxima: points, intervals, certificates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import torchreach as tr
from tests.test_onnx_code_forms import FORMS, joined, made, plain
from tests.test_onnx_codes import FORMATS, quantised, random_network
from tests.test_tflite import Random, file
from torchreach.core.clock import NO_LIMIT
from torchreach.core.errors import UnsupportedLayerError
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.domains.input_grid import InputGrid
from torchreach.domains.relaxed_difference import rounded_bounds
from torchreach.domains.rounding import excess, outputs, relax
from torchreach.domains.zonotope import box_rows, zonotope_bounds
from torchreach.graph.deployed import DeployedNetwork, Softmax
from torchreach.graph.quantizer import Quantizer
from torchreach.read.steps import steps
from torchreach.verbs.int8_kernels import executed as as_executed

POINTS = 10
# Forms of `quantize_static` that are executed in one way.
ONNX = [form for form in FORMATS if form[:2] != ("QDQ", "QInt8")]


def random_graph(seed: int, folder: Path) -> DeployedNetwork:
    """Skips those with a product of two values."""
    path = folder / "random.tflite"
    path.write_bytes(Random(seed).build())
    network = tr.load(path)
    assert isinstance(network, DeployedNetwork)
    network = network.scores() if isinstance(network.operations[-1], Softmax) else network
    try:
        tr.weight_only(network, network.shape)
    except UnsupportedLayerError as error:
        pytest.skip(str(error))
    return network


def random_onnx(seed: int, form: tuple, folder: Path) -> DeployedNetwork:
    source, shape = random_network(seed, folder)
    rows = np.random.default_rng(seed).normal(0, 1, (5, *shape)).astype(np.float32)
    network = tr.load(quantised(source, folder / "q.onnx", rows, *form))
    assert isinstance(network, DeployedNetwork)
    return network


def drawn(network: DeployedNetwork, seed: int, count: int) -> Tensor:
    """Codes of inputs [count, *shape]."""
    ends = int(network.entry.lowest), int(network.entry.highest) + 1
    return torch.randint(*ends, (count, *network.shape), generator=torch.Generator().manual_seed(seed))


def described(network: DeployedNetwork):
    """As this machine's kernels execute it."""
    device = torch.device("cpu")
    return as_executed(steps(network, network.shape, dtype=COMPUTE_DTYPE, device=device, quantized=True), "here").steps


def executed(network: DeployedNetwork, codes: Tensor) -> Tensor:
    return network.grid.value(network.codes(codes)).flatten(1)


def check_points(network: DeployedNetwork, codes: Tensor) -> None:
    """All outputs that the description allows are the one that the runtime computes."""
    index, low, high = outputs(described(network), network.entry.value(codes).flatten(1))
    want = executed(network, codes)
    assert torch.equal(index, torch.arange(len(codes)))
    assert bool(((low <= want) & (want <= high)).all())
    assert float((high - low).max()) <= 1e-5 * (1 + float(want.abs().max()))


@pytest.mark.parametrize("seed", range(8))
def test_codes_of_points_are_exact(seed, tmp_path):
    network = random_graph(seed, tmp_path)
    check_points(network, drawn(network, seed, POINTS))


@pytest.mark.parametrize("form", ONNX)
@pytest.mark.parametrize("seed", range(1))
def test_codes_of_points_are_exact_as_onnxruntime_computes_them(seed, form, tmp_path):
    network = random_onnx(seed, form, tmp_path)
    check_points(network, drawn(network, seed, POINTS))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("net", [joined, plain])
def test_codes_of_points_are_exact_in_rarer_forms_of_onnx(net, form, tmp_path):
    try:
        network = tr.load(made(tmp_path, net(17, 0), *form, per_channel=False))
    except UnsupportedLayerError as error:
        pytest.skip(str(error))
    assert isinstance(network, DeployedNetwork)
    check_points(network, drawn(network, 0, POINTS))
    check_intervals(network, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 108))
def test_many_graphs_hold_what_litert_computes(seed, tmp_path):
    network = random_graph(seed, tmp_path)
    check_points(network, drawn(network, seed, POINTS))
    check_intervals(network, seed, count=10_000)


@pytest.mark.slow
@pytest.mark.parametrize("form", ONNX)
@pytest.mark.parametrize("seed", range(1, 13))
def test_many_graphs_hold_what_onnxruntime_computes(seed, form, tmp_path):
    network = random_onnx(seed, form, tmp_path)
    check_points(network, drawn(network, seed, POINTS))
    check_intervals(network, seed, count=10_000)


def test_the_codes_of_a_residual_network_are_exact():
    network = tr.load(file("pretrainedResnet_quant"))
    assert isinstance(network, DeployedNetwork)
    network = network.scores()
    check_points(network, drawn(network, 0, 2))


def check_intervals(network: DeployedNetwork, seed: int, count: int = 500) -> None:
    generator = torch.Generator().manual_seed(seed)
    ends = int(network.entry.lowest), int(network.entry.highest)
    middle, reach = drawn(network, seed, 1)[0], torch.randint(0, 3, network.shape, generator=generator)
    first, last = (middle - reach).clamp(*ends), (middle + reach).clamp(*ends)
    spread = torch.rand(count, *network.shape, generator=generator) * (last - first + 1)
    codes = torch.minimum(first + spread.floor().long(), last)
    want = executed(network, codes)
    low, high = (network.entry.value(end).flatten() for end in (first, last))
    found = described(network)
    _, least, most = outputs(found, ((low + high) / 2)[None], ((high - low) / 2 + 1e-9)[None])
    assert bool(((least.amin(0) <= want) & (want <= most.amax(0))).all())
    relaxed = relax(found, low, high, InputGrid.of(found[0]))
    ones = low.new_ones(relaxed.extra)
    rows = box_rows(torch.cat((low, -ones))[None], torch.cat((high, ones))[None])
    below, above = (
        torch.minimum(torch.maximum(end[0], relaxed.lowest), relaxed.highest)
        for end in zonotope_bounds(relaxed.steps, *rows)[-1]
    )
    assert bool(((below <= want + 1e-5) & (want <= above + 1e-5)).all())
    # Backward through both networks as they are, without a relaxation.
    twin = tr.weight_only(network, network.shape).double()
    real = steps(twin, network.shape, dtype=COMPUTE_DTYPE, device=torch.device("cpu"))
    upper = rounded_bounds(real, found, low, high, NO_LIMIT)
    assert upper is not None
    with torch.no_grad():
        off = twin(network.entry.value(codes)).flatten(1) - want
    assert bool((off.amax(0) <= upper[0]).all())
    assert bool((-off.amin(0) <= upper[1]).all())


@pytest.mark.parametrize("seed", range(6))
def test_intervals_and_relaxations_hold_what_is_executed(seed, tmp_path):
    check_intervals(random_graph(seed, tmp_path), seed)


@pytest.mark.parametrize("form", ONNX)
@pytest.mark.parametrize("seed", range(1))
def test_intervals_and_relaxations_hold_what_onnxruntime_computes(seed, form, tmp_path):
    check_intervals(random_onnx(seed, form, tmp_path), seed)


@pytest.mark.parametrize("seed", [4, 9, 11])
@pytest.mark.parametrize("inputs", [1, 200])
def test_certificates_hold_what_is_executed(seed, inputs, tmp_path):
    network = random_graph(seed, tmp_path)
    twin = tr.weight_only(network, network.shape).double()
    generator = torch.Generator().manual_seed(seed)
    centre = network.entry.value(drawn(network, seed, 1)[0]).float()
    radius = torch.zeros(centre.numel())
    radius[torch.randperm(centre.numel(), generator=generator)[:inputs]] = 1.5 * float(network.entry.scale)
    radius = radius.reshape(centre.shape)
    stars = tr.StarBatch.from_box((centre - radius)[None], (centre + radius)[None])
    found = tr.discrepancy(twin, network, stars, budget=tr.Budget(seconds=None if inputs == 1 else 1))
    x = centre + radius * torch.empty(2000, *network.shape).uniform_(-1, 1, generator=generator)
    with torch.no_grad():
        off = (twin(x.double()) - network(x)).abs().amax(0)
    assert bool((off <= found.upper[0] * (1 + 1e-6) + 1e-6).all())
    assert bool((found.lower <= found.upper).all())
    if inputs == 1:
        assert bool((found.upper - found.lower).max() <= 1e-3 * found.upper.max() + 1e-6)


def test_twins_without_rounding_keep_activations_that_end_codes(tmp_path):
    network = random_graph(1, tmp_path)  # it has a ReLU6
    assert "relu6" in [part.activation for part in network.operations]
    twin = tr.weight_only(network, network.shape)
    x = network.entry.value(drawn(network, 0, 50)).float()
    steps_off = (twin.double()(x.double()) - network(x)).abs().max()
    assert steps_off <= 0.05 * network(x).abs().max() + 20 * network.grid.scale


def test_a_value_beyond_the_last_code_is_off_by_exactly_what_is_cut():
    grid = Quantizer(0.1, 0, -128, 127)
    low, high = torch.tensor([20.0, 20.0, -30.0]).double(), torch.tensor([20.0, 21.0, -30.0]).double()
    middle, radius = excess(grid, low, high)
    assert (middle - torch.tensor([-7.3, -7.8, 17.2]).double()).abs().max() < 1e-6
    assert (radius - torch.tensor([0.0, 0.5, 0.0]).double()).abs().max() < 1e-6
