"""Which layer makes the difference: hybrids, their certificates, and the layers that are left in float."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import torchreach as tr

HELLO = Path(__file__).resolve().parents[1] / "docs" / "hello_world"


SEEDS = [0, pytest.param(1, marks=pytest.mark.slow)]


def network(seed: int = 0, sizes: tuple[int, ...] = (2, 6, 6, 2)) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double()


def unit_box(size: int = 2) -> tr.StarBatch:
    return tr.StarBatch.from_box(-torch.ones(1, size).double(), torch.ones(1, size).double())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.second = nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Linear(18, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.first(x)).relu()
        return self.head((y + self.second(y).relu()).flatten(1))


@pytest.mark.parametrize("seed", SEEDS)
def test_each_hybrid_is_certified_and_the_steps_bound_the_whole(seed: int) -> None:
    original = network(seed)
    compressed = tr.quantize_weights(original, bits=4)
    found = tr.attribute(original, compressed, unit_box(), samples=2000)
    assert found.layers == ("0", "2", "4")
    for k, name in enumerate(found.layers):
        for part, hybrids in (
            (found.alone, [original, swapped(original, compressed, [name])]),
            (found.steps, [swapped(original, compressed, found.layers[:n]) for n in (k, k + 1)]),
            (found.cumulative, [original, swapped(original, compressed, found.layers[: k + 1])]),
        ):
            exact = tr.discrepancy(*hybrids, unit_box(), "exact")
            assert (part[k].upper >= exact.lower).all()
            assert (part[k].lower <= exact.upper).all()
        assert found.sampled_mean[k] <= found.sampled_max[k] <= found.alone[k].max_upper
        x = unit_box().sample(2000)[0]
        y = original(x).detach()
        off = y - swapped(original, compressed, [name])(x).detach()
        assert found.sqnr[k] == pytest.approx(float(10 * torch.log10(y.square().sum() / off.square().sum())))
    whole = tr.discrepancy(original, compressed, unit_box(), "exact")
    assert (found.bound >= whole.lower).all()
    assert (found.bound <= sum(step.upper for step in found.steps)).all()
    assert (found.bound <= found.cumulative[-1].upper).all()


def swapped(original: nn.Sequential, compressed: nn.Sequential, names) -> nn.Sequential:
    result = copy.deepcopy(original)
    for name in names:
        result[int(name)] = compressed[int(name)]
    return result


def test_layers_that_are_equal_take_no_blame() -> None:
    original = network()
    compressed = swapped(original, tr.quantize_weights(original, bits=3), ["2"])
    found = tr.attribute(original, compressed, unit_box())
    assert found.layers == ("2",)
    assert "2: at most" in repr(found)


def test_layers_of_a_residual_module_have_its_own_names() -> None:
    torch.manual_seed(0)
    original = Residual().eval()
    stars = tr.StarBatch.from_image(torch.rand(1, 1, 3, 3), 0.1)
    for compressed in (tr.quantize_weights(original, bits=5), tr.prune_weights(original, 0.4)):
        found = tr.attribute(original, compressed, stars, samples=50)
        assert found.layers == ("first", "second", "head")
    kept = tr.keep_float(original, compressed, stars, 0.0)
    assert kept.kept == found.layers
    assert isinstance(kept.network, Residual)


def test_a_layer_whose_weights_are_computed_is_taken_whole() -> None:
    original = network()
    compressed = copy.deepcopy(original)
    nn.utils.parametrizations.weight_norm(compressed[2])
    with torch.no_grad():
        compressed[2].parametrizations.weight.original0.mul_(1.1)
    found = tr.attribute(original, compressed, unit_box())
    assert "2" in found.layers
    assert not any(name.startswith("2.") for name in found.layers)


def test_a_half_precision_copy_is_read_in_float64() -> None:
    original = network()
    found = tr.attribute(original, copy.deepcopy(original).half(), unit_box(), samples=100)
    assert len(found.layers) == 3
    assert 0 < found.bound.max() < 1e-2


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_kept_is_certified_and_no_layer_of_it_can_be_spared(seed: int) -> None:
    original = network(seed)
    compressed = tr.quantize_weights(original, bits=3)
    whole = float(tr.discrepancy(original, compressed, unit_box(), "exact").upper.max())
    for share in (0.1, 0.4, 1.01):
        found = tr.keep_float(original, compressed, unit_box(), share * whole)
        assert found.satisfied
        off = [name for name in ("0", "2", "4") if name not in found.kept]
        exact = tr.discrepancy(original, swapped(original, compressed, off), unit_box(), "exact")
        assert exact.upper.max() <= share * whole + 1e-9
        x = unit_box().sample(100)[0]
        assert torch.equal(found.network(x), swapped(original, compressed, off)(x))
        for name in found.kept:
            more = tr.discrepancy(original, swapped(original, compressed, [*off, name]), unit_box(), "exact")
            assert more.upper.max() > share * whole - 1e-6
        if share > 1:
            assert not found.kept


def test_layers_are_kept_in_the_order_that_is_asked_for() -> None:
    original = network()
    compressed = tr.quantize_weights(original, bits=3)
    last = tr.attribute(original, compressed, unit_box()).alone[-1]
    seen: list[tuple[int, int]] = []
    found = tr.keep_float(
        original,
        compressed,
        unit_box(),
        float(last.upper.max()) * 1.001,
        order=["0", "2"],
        progress=lambda done, most: seen.append((done, most)),
    )
    assert found.satisfied
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert all(done <= most for done, most in seen)


def test_the_picture_has_a_bar_for_each_layer() -> None:
    from torchreach.app.report.pictures import attribution_picture

    original = network()
    found = tr.attribute(original, tr.quantize_weights(original, bits=4), unit_box(), samples=10)
    assert attribution_picture(found).startswith(b"\x89PNG")


def test_samples_are_taken_in_the_dtype_of_the_network() -> None:
    original = network().float()
    found = tr.attribute(original, tr.quantize_weights(original, bits=4), unit_box(), samples=10)
    assert found.sampled_max.max() <= found.bound.max()


def test_networks_of_probabilities_and_half_networks_are_attributed_as_they_are_compared() -> None:
    original = nn.Sequential(*network(sizes=(2, 4, 2)), nn.Softmax(1))
    found = tr.attribute(original, tr.quantize_weights(original, bits=4), unit_box(), samples=100)
    assert (found.sampled_max <= torch.stack([one.upper.max() for one in found.alone])).all()
    assert found.bound.max() <= 1
    half = network(sizes=(2, 4, 2)).half()
    found = tr.attribute(half, tr.quantize_weights(half, bits=4), unit_box(), samples=100)
    assert found.alone[0].semantics is tr.Semantics.FLOAT16


def test_a_budget_is_shared_by_all_comparisons() -> None:
    original = network()
    compressed = tr.quantize_weights(original, bits=4)
    found = tr.attribute(original, compressed, unit_box(), budget=tr.Budget(seconds=20), samples=10)
    assert all(status is tr.Status.EXACT for part in found.alone for status in part.status)


def test_layers_of_a_deployed_chain_are_attributed_with_their_rounding() -> None:
    original, deployed = (tr.load(HELLO / f"hello_world_{kind}.tflite") for kind in ("float", "int8"))
    stars = tr.StarBatch.from_box(torch.tensor([1.0]), torch.tensor([1.2]))
    found = tr.attribute(original, deployed, stars, budget=tr.Budget(seconds=2), samples=3000)
    assert len(found.layers) == 3
    assert (found.sampled_max <= torch.tensor([float(part.max_upper) for part in found.alone])).all()
    exact = tr.discrepancy(original, deployed, stars)
    assert (found.bound >= exact.lower).all()
    assert (found.cumulative[-1].upper >= exact.lower).all()
    assert (found.cumulative[-1].lower <= exact.upper).all()


def test_a_mixed_network_of_deployed_and_kept_layers_is_certified() -> None:
    original, deployed = (tr.load(HELLO / f"hello_world_{kind}.tflite") for kind in ("float", "int8"))
    stars = tr.StarBatch.from_box(torch.tensor([1.0]), torch.tensor([1.05]))
    kept = tr.keep_float(original, deployed, stars, 0.2, order=[], budget=tr.Budget(seconds=4))
    x = stars.sample(1000)[0]
    with torch.no_grad():
        off = (original(x) - kept.network(x.double())).abs().max()
    assert kept.satisfied
    assert off <= 0.2


def test_networks_that_cannot_be_told_apart_layer_by_layer_are_refused_by_reason() -> None:
    original = network()
    with pytest.raises(tr.TorchreachError, match="no difference to attribute"):
        tr.attribute(original, copy.deepcopy(original), unit_box())
    assert not tr.keep_float(original, copy.deepcopy(original), unit_box(), 0.0).kept
    student = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with pytest.raises(tr.TorchreachError, match="networks with the same layers; these have 0, 2, 4 and 0, 2"):
        tr.attribute(original, student, unit_box())
    compressed = tr.quantize_weights(original, bits=4)
    with pytest.raises(tr.TorchreachError, match="samples must be positive"):
        tr.attribute(original, compressed, unit_box(), samples=0)
    with pytest.raises(tr.TorchreachError, match="tolerance must be"):
        tr.keep_float(original, compressed, unit_box(), -1.0)
    with pytest.raises(tr.TorchreachError, match="order names 'x', which is no layer that differs; there are 0, 2, 4"):
        tr.keep_float(original, compressed, unit_box(), 1.0, order=["x"])
