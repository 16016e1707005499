"""Networks as executed in half precision and float32: no kernel leaves the certified interval, and it is not wide."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchreach as tr
from tests.networks import random_network
from torchreach.app.cli import main
from torchreach.core.errors import InvalidNetworkError, KernelMismatchError, OptionError, UnsupportedLayerError
from torchreach.core.results import Reason, Semantics
from torchreach.domains.execution import Format, rounding
from torchreach.read.steps import steps
from torchreach.verbs.executed import Side

HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32]


def convolutional(seed: int = 0) -> nn.Sequential:
    """Every kind of layer: convolution, batch norm, pooling, flatten, linear."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2, groups=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    for layer in network:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
            layer.running_mean.normal_()  # type: ignore[union-attr]
            layer.running_var.uniform_(0.1, 2)  # type: ignore[union-attr]
    return network.eval()


def digits_pair(dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Tensor]:
    """A seeded network with outputs of some ten, its half copy, and an input."""
    network = random_network(3, [64, 32, 32, 10], dtype=torch.float32)
    with torch.no_grad():
        network[0].weight.mul_(3)
        network[2].weight.mul_(2)
    x = torch.rand(64, generator=torch.Generator().manual_seed(1)).mul(16).round() / 16
    return network, copy.deepcopy(network).to(dtype), x


def outside(network: nn.Module, run, low: Tensor, high: Tensor, dtype: torch.dtype, shape, count: int = 2000) -> int:
    """How many of `count` inputs of a box give a (real - executed) outside of the bounds."""
    network_steps = steps(network, shape, dtype=torch.float64, device=torch.device("cpu"))
    below, above = rounding(network_steps, low.flatten()[None], high.flatten()[None], Format(dtype))
    share = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share[::2] = share[::2].round()
    x = low + (high - low) * share
    real = copy.deepcopy(network).double()
    with torch.no_grad():
        difference = real(x) - run(x.to(dtype)).double()
    margin = 1e-12 * (1 + difference.abs())
    return int(((difference < below - margin) | (difference > above + margin)).sum())


@pytest.mark.parametrize("dtype", HALF)
def test_half_copy_is_certified_as_executed_by_default(dtype):
    network, half, x = digits_pair(dtype)
    stars = tr.StarBatch.from_box(x - 0.01, x + 0.01)
    # a bound in between, with which the real-valued reading is content
    real = tr.discrepancy(network, half, stars, arithmetic="real", gap=1e-3, budget=tr.Budget(seconds=3))
    found = tr.discrepancy(network, half, stars, gap=1e-3, budget=tr.Budget(seconds=3))
    assert real.semantics is Semantics.FLOAT
    assert found.semantics is (Semantics.FLOAT16 if dtype is torch.float16 else Semantics.BFLOAT16)
    share = torch.rand(5000, 64, generator=torch.Generator().manual_seed(2))
    points = x - 0.01 + 0.02 * share
    with torch.no_grad():
        difference = network.double()(points.double()) - half(points.to(dtype)).double()
    sampled = float(difference.abs().max())
    assert float(real.max_upper) < sampled  # the real-valued reading does not cover what is executed
    assert bool((difference >= found.range_lower).all() and (difference <= found.range_upper).all())
    assert float(found.max_upper) < 10 * sampled
    assert found.reasons == (Reason.ROUNDING,)
    bound = (float(real.max_upper) + float(found.max_lower)) / 2
    assert not found.within(bound)
    assert float(found.max_lower) > bound


@pytest.mark.parametrize("dtype", HALF)
def test_lower_is_what_this_machine_computes_at_the_witness(dtype):
    network, half, x = digits_pair(dtype)
    upper = x.clone()
    upper[:3] += 0.01
    found = tr.discrepancy(network, half, tr.StarBatch.from_box(x, upper))
    witness = found.witness[0]
    with torch.no_grad():
        difference = (network.double()(witness.double()) - half(witness.to(dtype)).double()).abs().diagonal()
    assert torch.allclose(difference, found.lower[0].double(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        centre = (network((x + upper)[None].double() / 2) - half(((x + upper) / 2)[None].to(dtype)).double()).abs()[0]
    assert bool((found.lower[0] >= centre - 1e-4).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [0.0, 0.01, 0.5])
def test_torch_kernels_stay_inside_the_rounding_bound(dtype, width):
    network = convolutional().to(dtype)
    low = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert outside(network, network, low, low + width, dtype, (1, 6, 6)) == 0


@pytest.mark.parametrize("dtype", HALF)
def test_kernels_that_round_less_stay_inside(dtype):
    """Such as onnxruntime's, which keeps float32 between the layers of a float16 file."""
    network = convolutional().to(dtype)
    wide = copy.deepcopy(network).float()
    low = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for width in (0.0, 0.02):
        assert outside(network, lambda x: wide(x.float()).to(dtype), low, low + width, dtype, (1, 6, 6)) == 0


@pytest.mark.parametrize("dtype", HALF)
def test_long_sums_that_cancel_and_subnormal_results_stay_inside(dtype):
    g = torch.Generator().manual_seed(6)
    layer = nn.Linear(3000, 4)
    with torch.no_grad():
        half = torch.randn(4, 1500, generator=g)
        layer.weight.copy_(torch.stack((half, -half), 2).flatten(1))
        layer.bias.zero_()
    x = 1 + torch.rand(3000, generator=g, dtype=torch.float64) / 256
    assert outside(layer.to(dtype), layer, x, x + 1e-3, dtype, (3000,), count=300) == 0
    small = random_network(7, [5, 4, 2], dtype=torch.float32)
    with torch.no_grad():
        for value in small.parameters():
            value.mul_(2.0**-9)
    low = torch.full((5,), 2.0**-9, dtype=torch.float64)
    assert outside(small.to(dtype), small, low, 3 * low, dtype, (5,)) == 0


def test_onnxruntime_stays_inside():
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)).half().eval()
    )
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = torch.zeros(1, 1, 6, 6, dtype=torch.float16)
        torch.onnx.export(network, (example,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})  # type: ignore[call-overload]
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {"x": x.numpy()})[0]))

    low = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    for width in (0.0, 0.05):
        assert outside(network, run, low, low + width, torch.float16, (1, 6, 6)) == 0


def test_torchao_weights_of_a_bfloat16_network_are_covered():
    quantization = pytest.importorskip("torchao.quantization")
    network, half, x = digits_pair(torch.bfloat16)
    quantization.quantize_(half, quantization.Int8WeightOnlyConfig())
    stars = tr.StarBatch.from_box(x - 0.01, x + 0.01)
    found = tr.discrepancy(network, half, stars, gap=0.1, budget=tr.Budget(seconds=2))
    points = x - 0.01 + 0.02 * torch.rand(2000, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        difference = network.double()(points.double()) - half(points.bfloat16()).double()
    assert bool((difference >= found.range_lower).all() and (difference <= found.range_upper).all())
    assert found.semantics is Semantics.BFLOAT16


def test_command_line_does_not_pass_what_half_kernels_exceed(tmp_path, capsys):
    """A tolerance between the real-valued reading and what is executed: exit 1, and 0 with --arithmetic real."""
    network, half, x = digits_pair(torch.float16)
    upper = x.clone()
    upper[:2] += 0.01
    found, real = (
        tr.discrepancy(network, half, tr.StarBatch.from_box(x, upper), arithmetic=kind) for kind in (None, "real")
    )
    tolerance = (float(real.max_upper) + float(found.max_lower)) / 2
    assert float(real.max_upper) < tolerance < float(found.max_lower)
    for name, module in (("a", network), ("b", half)):
        value = next(module.parameters())
        program = torch.export.export(module, (torch.zeros(2, 64, dtype=value.dtype),))
        torch.export.save(program, tmp_path / f"{name}.pt2")
    np.save(tmp_path / "box.npy", torch.stack((x, upper), 1).double().numpy())
    files = [str(tmp_path / name) for name in ("a.pt2", "b.pt2")]
    args = ["compare", *files, "--box", str(tmp_path / "box.npy"), "--tolerance", str(tolerance)]
    assert main(args, standalone_mode=False) == 1
    assert "float16" in capsys.readouterr().out
    assert main([*args, "--arithmetic", "real"], standalone_mode=False) == 0


def test_possible_overflow_is_refused_by_name_of_layer():
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        network[0].weight.fill_(300.0)
    stars = tr.StarBatch.from_box(torch.zeros(2), torch.full((2,), 200.0))
    with pytest.raises(InvalidNetworkError, match=r"Linear before relu 1: values may reach 1\.2e\+05 .*float16"):
        tr.discrepancy(network, copy.deepcopy(network).half(), stars)
    assert tr.discrepancy(network, copy.deepcopy(network).half(), stars, arithmetic="real").semantics is Semantics.FLOAT
    assert float(tr.discrepancy(network, copy.deepcopy(network).bfloat16(), stars).max_upper) < torch.inf


def test_float32_as_executed_is_asked_for():
    network = random_network(0, [6, 8, 3], dtype=torch.float32)
    twin = nn.Sequential(copy.deepcopy(network[:2]), nn.Linear(8, 3))
    twin[1].load_state_dict(network[2].state_dict())
    stars = tr.StarBatch.from_box(torch.zeros(6), torch.ones(6))
    assert float(tr.discrepancy(network, twin, stars).max_upper) < 1e-9
    found = tr.discrepancy(network, twin, stars, arithmetic="executed")
    assert found.semantics is Semantics.FLOAT32
    assert 0 < float(found.max_upper) < 1e-4
    with pytest.raises(OptionError, match="'real', 'executed' or None"):
        tr.discrepancy(network, twin, stars, arithmetic="float32")


def test_half_networks_against_each_other_share_rounded_inputs():
    network, half, x = digits_pair(torch.float16)
    pruned = tr.prune_weights(half, 0.3)
    stars = tr.StarBatch.from_box(x - 0.003, x + 0.003)
    found = tr.discrepancy(half, pruned, stars, gap=0.1, budget=tr.Budget(seconds=2))
    points = x - 0.003 + 0.006 * torch.rand(2000, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        difference = half(points.half()).double() - pruned(points.half()).double()
    assert bool((difference >= found.range_lower).all() and (difference <= found.range_upper).all())
    low, high, _ = stars.bounding_box()
    assert bool((found.witness.flatten(2) >= low[:, None]).all() and (found.witness.flatten(2) <= high[:, None]).all())
    assert float(tr.discrepancy(half, half, stars, gap=0.1).max_upper) < 1e-9


def test_kernels_that_leave_the_range_are_an_error(monkeypatch):
    network, half, x = digits_pair(torch.float16)
    values = Side.values

    def reduced(side: Side, points: Tensor) -> tuple[Tensor, Tensor]:
        y, error = values(side, points)
        return (y, error) if side.kind is None else (y + 1, error)

    monkeypatch.setattr(Side, "values", reduced)
    with pytest.raises(KernelMismatchError, match="kernels leave the certified range as executed in float16"):
        tr.discrepancy(network, half, tr.StarBatch.from_box(x, x), budget=tr.Budget(seconds=2))


def test_sets_that_are_no_boxes_and_batches():
    network, half, x = digits_pair(torch.float16)
    turned = tr.StarBatch.from_box(torch.zeros(2, 2), torch.full((2, 2), 0.1)).affine_map(torch.ones(64, 2), x)
    found = tr.discrepancy(network, half, turned)
    points = turned.sample(500)
    with torch.no_grad():
        difference = network.double()(points.double()) - half(points.half()).double()
    assert bool((difference >= found.range_lower[:, None]).all() and (difference <= found.range_upper[:, None]).all())


@pytest.mark.parametrize("dtype", HALF)
def test_equivalence_of_a_half_copy(dtype):
    network, half, x = digits_pair(dtype)
    upper = x.clone()
    upper[:2] += 0.01
    stars = tr.StarBatch.from_box(x, upper)
    found = tr.discrepancy(network, half, stars)
    answer = tr.equivalent(network, half, stars, float(found.max_upper) * 1.01).answer[0]
    assert answer is tr.Answer.EQUIVALENT
    answer = tr.equivalent(network, half, stars, float(found.max_lower) / 2).answer[0]
    assert answer is tr.Answer.NOT_EQUIVALENT
    labels = tr.equivalent(network, half, stars, top1=True)
    assert labels.answer[0] is tr.Answer.EQUIVALENT
    assert float(labels.upper) > float(tr.equivalent(network, half, stars, top1=True, arithmetic="real").upper)


def test_label_that_only_execution_changes_is_not_called_equivalent():
    """Outputs closer than float16 can tell apart: a tie, or another label, as executed."""
    network = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[100.0], [1.0]]))
        network[2].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 2.0**-10]]))
    half = copy.deepcopy(network).half()
    stars = tr.StarBatch.from_box(torch.tensor([1.0]), torch.tensor([1.5]))
    assert tr.equivalent(network, half, stars, top1=True, arithmetic="real").answer[0] is tr.Answer.EQUIVALENT
    assert tr.equivalent(network, half, stars, top1=True).answer[0] is not tr.Answer.EQUIVALENT


def test_repaired_half_network_stays_half_and_is_certified_as_executed():
    network = random_network(1, [2, 6, 2], dtype=torch.float32)
    half = tr.prune_weights(copy.deepcopy(network), 0.3).half()
    training = tr.RepairOptions(samples=32, epochs=5)
    stars = tr.StarBatch.from_box(torch.zeros(2), torch.ones(2))
    result = tr.repair(network, half, stars, target=0.9, iterations=2, training=training)
    assert result.before.semantics is result.after.semantics is Semantics.FLOAT16
    assert all(value.dtype is torch.float16 for value in result.network.parameters())


def test_layers_whose_kernels_are_not_known_are_refused_by_name():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.ConvTranspose2d(2, 1, 2), nn.Flatten(), nn.Linear(9, 1))
    network = network.half()
    stars = tr.StarBatch.from_box(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.1))
    with pytest.raises(UnsupportedLayerError, match="ConvTranspose2d before output: how it is executed is not known"):
        tr.discrepancy(copy.deepcopy(network).float(), network, stars)
    real = tr.discrepancy(copy.deepcopy(network).float(), network, stars, arithmetic="real", gap=0.1)
    assert real.semantics is Semantics.FLOAT
