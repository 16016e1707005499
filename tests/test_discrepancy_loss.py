"""The certified loss: against samples, against the bounds it follows, its gradient, and what it does in training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import torchreach as tr
from benchmarks import loss_against_targets
from tests.checks import run_example
from tests.networks import DEVICES, DEVICES_SIM_SLOW, random_network, rounded_copy
from tests.test_difference import boxes, noisy_copy, pair_of, samples
from torchreach.compress.constraints import Constraints
from torchreach.core.errors import InvalidNetworkError, InvalidSetError, OptionError, ShapeError, UnsupportedLayerError
from torchreach.domains.difference import Backward
from torchreach.domains.hexagon import Hexagon
from torchreach.domains.pair import Pair
from torchreach.graph.quantizer import Quantizer

SHAPES = ([3, 4], [4, 12, 8, 3], [6, 10, 10, 10, 2], [20, 16, 12, 4])
NOISE = (1e-3, 1e-2, 0.3)


def evaluate(network: nn.Module, x: Tensor) -> Tensor:
    double = copy.deepcopy(network).double().eval()
    with torch.no_grad():
        return double(x)


@pytest.mark.parametrize("device", DEVICES_SIM_SLOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_no_sample_exceeds_the_loss(sizes: list[int], dtype: torch.dtype, device: str) -> None:
    """The networks are evaluated in float64: 1e-13 is what that rounds, whatever dtype the weights have."""
    for seed, noise in enumerate(NOISE):
        original = random_network(seed, sizes)
        student = noisy_copy(original, noise, seed).to(device, dtype)
        original = original.to(device, dtype)
        lower, upper = (part.to(device, dtype) for part in boxes(seed, 3, sizes[0]))
        bound = tr.DiscrepancyLoss(original, student, reduction="none")(lower, upper)
        assert bound.shape == (3, sizes[-1])
        assert bound.dtype == dtype
        assert bound.device.type == device
        x = samples(lower.double(), upper.double(), 5000, seed)
        y = (evaluate(original, x) - evaluate(student, x)).abs()
        assert (y <= bound.double() + 1e-13 * (1 + bound)).all()
        # not by being useless
        assert (y.amax(0) >= 0.05 * bound).all()


def closed_bounds(pair: Pair, lower: Tensor, upper: Tensor) -> Tensor:
    """Bounds of y1 - y2 and y2 - y1 with all rows multiplied out: z and d backward, by closed-form planes."""
    work = Backward(pair, lower, upper)
    for k in range(pair.depth - 1):
        W, V, D = work.columns(k, torch.arange(len(pair.b[k])))
        alpha, beta = torch.cat((W, D)), torch.cat((torch.zeros_like(V), V))
        value = work.bound(torch.cat((alpha, -alpha))[None], torch.cat((beta, -beta))[None], work.closed)[0]
        constant, error = torch.cat((pair.b[k], pair.db[k])), torch.cat(work.errors[k], 1)
        value = value + torch.cat((constant, -constant)) + error.repeat(1, 2)
        u1, du, l1, dl = value.reshape(len(lower), 4, -1).unbind(1)
        inf = torch.full_like(u1, torch.inf)
        work.add(Hexagon(-l1, u1, -inf, inf, -dl, du).tightened())
    return work.difference(work.closed)[0].expand(len(lower), -1).reshape(len(lower), 2, -1)


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_the_value_is_that_of_backward_bounds_of_every_neuron(sizes: list[int]) -> None:
    for seed, noise in enumerate(NOISE):
        original = random_network(seed, sizes)
        student = noisy_copy(original, noise, seed)
        lower, upper = boxes(seed, 4, sizes[0])
        lower[:, 1] = upper[:, 1]  # a coordinate without width
        expected = closed_bounds(pair_of(original, student, (sizes[0],)), lower, upper).amax(1)
        found = tr.DiscrepancyLoss(original, student, reduction="none")(lower, upper)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_networks_lose_nothing(dtype: torch.dtype, device: str) -> None:
    original = random_network(0, [5, 20, 20, 3], dtype=dtype).to(device)
    lower, upper = (part.to(device, dtype) for part in boxes(0, 4, 5))
    loss = tr.DiscrepancyLoss(original, copy.deepcopy(original), reduction="sum")(lower, upper)
    assert loss.item() == 0
    loss.backward()


def test_held_bounds_change_gradients_but_not_values() -> None:
    original = random_network(1, [4, 6, 5, 2])
    student = noisy_copy(original, 0.2, 1)
    lower, upper = boxes(2, 3, 4)
    found = {}
    for full in (False, True):
        value = tr.DiscrepancyLoss(original, student, full_gradient=full)(lower, upper)
        found[full] = value, torch.autograd.grad(value, list(student.parameters()))
    assert found[False][0] == found[True][0]
    assert any(not torch.allclose(a, b) for a, b in zip(found[False][1], found[True][1], strict=True))
    # without undecided neurons nothing is held that matters
    for full in (False, True):
        value = tr.DiscrepancyLoss(original, student, full_gradient=full)(lower, lower + 1e-9)
        found[full] = value, torch.autograd.grad(value, list(student.parameters()))
    for a, b in zip(found[False][1], found[True][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sizes", [[3, 2], [3, 4, 3, 2], [3, 4, 3, 3, 2]], ids=str)
def test_gradients_are_those_of_finite_differences(sizes: list[int]) -> None:
    original = random_network(1, sizes)
    student = noisy_copy(original, 0.2, 1)
    names, values = zip(*student.named_parameters(), strict=True)
    lower, upper = boxes(2, 2, sizes[0])
    loss = tr.DiscrepancyLoss(original, student, reduction="none")

    def bound(lower: Tensor, upper: Tensor, *parameters: Tensor) -> Tensor:
        return loss(lower, upper, dict(zip(names, parameters, strict=True)))

    inputs = [part.detach().clone().requires_grad_() for part in (lower, upper, *values)]
    assert torch.autograd.gradcheck(bound, inputs, eps=1e-7, atol=1e-6, rtol=1e-5)


def test_layers_that_are_equal_still_get_a_gradient() -> None:
    original = random_network(4, [4, 10, 2])
    student = copy.deepcopy(original)
    with torch.no_grad():
        list(student.parameters())[-1].add_(0.25)
    tr.DiscrepancyLoss(original, student)(*boxes(4, 3, 4)).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in student.parameters())


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("device", DEVICES_SIM_SLOW)
def test_training_on_the_loss_lowers_it_and_leaves_the_original_alone(device: str, full: bool) -> None:
    original = random_network(5, [6, 16, 16, 3], dtype=torch.float32).to(device)
    student = rounded_copy(original, 4)
    before = copy.deepcopy(original.state_dict())
    middle = boxes(5, 8, 6)[0].float().to(device)
    loss = tr.DiscrepancyLoss(original, student, full_gradient=full)
    assert not list(loss.parameters())
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        value = loss(middle - 0.05, middle + 0.05)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.3 * values[0]
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert all(p.grad is None for p in original.parameters())


def test_quantised_students_train_through_straight_through_rounding() -> None:
    original = random_network(6, [6, 16, 16, 3], dtype=torch.float32)
    student = tr.quantize_weights(original, bits=6)
    constraints = Constraints.read(student)
    free = {name: value.detach().clone().requires_grad_() for name, value in student.named_parameters()}
    middle = boxes(6, 4, 6)[0].float()
    lower, upper = middle - 0.02, middle + 0.02
    loss = tr.DiscrepancyLoss(original, student)
    optimizer = torch.optim.Adam(free.values(), lr=2e-3)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(lower, upper, constraints.straight_through(free))
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert min(values) < 0.6 * values[0]
    assert all(p.grad is None for p in student.parameters())
    # the loss of given parameters is that of a student that has them
    final = constraints.straight_through(free)
    with torch.no_grad():
        for name, value in student.named_parameters():
            value.copy_(final[name])
    constraints.check(student)
    assert torch.equal(loss(lower, upper), loss(lower, upper, final))


def test_pruned_students_train_and_keep_their_zeros() -> None:
    original = random_network(9, [4, 8, 3])
    student = copy.deepcopy(original)
    assert isinstance(student, nn.Sequential)
    layer = student[0]
    assert isinstance(layer, nn.Linear)
    prune.l1_unstructured(layer, "weight", 0.5)
    lower, upper = boxes(9, 3, 4)
    bound = tr.DiscrepancyLoss(original, student)(lower, upper)
    bound.backward()
    found = dict(student.named_parameters())["0.weight_orig"].grad
    assert found is not None
    assert torch.equal(found == 0, layer.weight == 0)
    plain = tr.prune_weights(original, 0)
    assert isinstance(plain, nn.Sequential)
    plain[0].weight.data.copy_(layer.weight)  # type: ignore[union-attr]
    assert tr.DiscrepancyLoss(original, plain)(lower, upper) == bound


def test_reductions() -> None:
    original = random_network(7, [4, 8, 3])
    student = rounded_copy(original, 4)
    box = boxes(7, 5, 4)
    none, mean, total = (tr.DiscrepancyLoss(original, student, reduction=r)(*box) for r in ("none", "mean", "sum"))
    assert none.shape == (5, 3)
    torch.testing.assert_close(mean, none.mean())
    torch.testing.assert_close(total, none.sum())


def test_convolutions_batch_norm_and_traced_modules_train() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1)
            self.norm = nn.BatchNorm2d(3)
            self.out = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.conv(x / 2)))
            return self.out(nn.functional.avg_pool2d(x, 2).flatten(1))

    torch.manual_seed(0)
    original = Net().double()
    student = rounded_copy(original, 16)
    lower, upper = (part.reshape(2, 1, 4, 4) for part in boxes(0, 2, 16))
    loss = tr.DiscrepancyLoss(original, student, reduction="none")
    bound = loss(lower, upper)
    x = samples(lower.flatten(1), upper.flatten(1), 2000, 0).reshape(-1, 1, 4, 4)
    y = (evaluate(original, x) - evaluate(student, x)).reshape(2000, 2, 3).abs()
    assert (y <= bound + 1e-13).all()
    bound.sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in student.parameters())
    assert loss(lower, upper).sum() == bound.sum()  # the mode of the student does not matter


def test_overflow_says_nothing_and_large_values_are_rounded_up() -> None:
    original = random_network(8, [3, 5, 2], dtype=torch.float32)
    student = rounded_copy(original, 4)
    loss = tr.DiscrepancyLoss(original, student, reduction="none")
    large = {name: 100 * value for name, value in student.named_parameters()}
    assert (loss(torch.full((1, 3), -3e38), torch.full((1, 3), 3e38), large) == torch.inf).any()
    double = tr.DiscrepancyLoss(copy.deepcopy(original).double(), copy.deepcopy(student).double(), reduction="none")
    lower, upper = (part.float() for part in boxes(8, 200, 3))
    single, exact = loss(lower, upper), double(lower, upper)
    assert (single.double() >= exact).all()
    assert (single.double() <= exact * (1 + 2e-7)).all()


def test_wrong_input_is_named() -> None:
    original = random_network(0, [3, 5, 2])
    student = rounded_copy(original, 8)
    loss = tr.DiscrepancyLoss(original, student)
    zero = torch.zeros(1, 3)
    with pytest.raises(OptionError, match=r"mean, sum, none, got 'max'"):
        tr.DiscrepancyLoss(original, student, reduction="max")
    with pytest.raises(ShapeError, match=r"one architecture.*\(3,\) -> 5 -> 2.*\(3,\) -> 6 -> 2"):
        tr.DiscrepancyLoss(original, random_network(1, [3, 6, 2]))(zero, zero)
    with pytest.raises(ShapeError, match=r"one shape.*got \(1, 3\) and \(2, 3\)"):
        loss(zero, torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"one shape \[B, \*input shape\].*got \(3,\)"):
        loss(zero[0], zero[0])
    with pytest.raises(ShapeError, match=r"does not accept inputs of shape \(4,\)"):
        loss(torch.zeros(1, 4), torch.zeros(1, 4))
    with pytest.raises(InvalidSetError, match="lower <= upper"):
        loss(zero + 1, zero)
    with pytest.raises(InvalidSetError, match="finite"):
        loss(zero, zero + torch.inf)
    with pytest.raises(InvalidNetworkError, match=r"parameters of the student, got '9\.weight'"):
        loss(zero, zero, {"9.weight": zero})
    with pytest.raises(ShapeError, match=r"'0\.weight' must have shape \(5, 3\), got \(1, 3\)"):
        loss(zero, zero, {"0.weight": zero})
    with pytest.raises(InvalidNetworkError, match="contains NaN"):
        loss(zero, zero, {"0.bias": torch.full((5,), torch.nan)})
    with pytest.raises(UnsupportedLayerError, match="Tanh"):
        tr.DiscrepancyLoss(original, nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))(zero, zero)
    unused = copy.deepcopy(student)
    unused.register_parameter("spare", nn.Parameter(zero))
    with pytest.raises(InvalidNetworkError, match=r"'spare' is unused.*parameters=\{"):
        tr.DiscrepancyLoss(original, unused)(zero, zero)
    parametrised = copy.deepcopy(student)
    assert isinstance(parametrised, nn.Sequential)
    nn.utils.parametrizations.orthogonal(parametrised[0])
    with pytest.raises(InvalidNetworkError, match=r"original' is unused or changed by the student's own code"):
        tr.DiscrepancyLoss(original, parametrised)(zero, zero)
    merged = tr.merge(original, student)
    with pytest.raises(UnsupportedLayerError, match="a merged network"):
        tr.DiscrepancyLoss(merged, merged)(zero, zero)


def test_the_example_of_the_docs_trains() -> None:
    names = run_example("training.md", 0)
    assert sum(names["history"][-10:]) < 0.7 * sum(names["history"][:10])
    assert torch.equal(names["student"][0].weight == 0, ~names["masks"]["0.weight"])


def small_boxes(seed: int, inputs: int) -> tr.StarBatch:
    middle = boxes(seed, 3, inputs)[0].float()
    return tr.StarBatch.from_box(middle - 0.05, middle + 0.05)


@pytest.mark.parametrize("compress", [lambda n: tr.prune_weights(n, 0.4), lambda n: tr.quantize_weights(n, 6)])
def test_repair_on_the_certified_loss(compress: Callable[[nn.Module], nn.Module]) -> None:
    original = random_network(10, [4, 8, 8, 2], dtype=torch.float32)
    given = compress(original)
    result = tr.repair(
        original,
        given,
        small_boxes(10, 4),
        target=0.5,
        loss="certified",
        iterations=4,
        training=tr.RepairOptions(samples=1, epochs=30, learning_rate=5e-3),
    )
    assert result.satisfied
    assert result.after.max_upper.max() <= 0.5 * result.before.max_upper.max()
    assert result.history[1].loss is not None
    Constraints.read(given).check(result.network)


def test_repair_refuses_what_has_no_certified_loss() -> None:
    original, stars = random_network(11, [4, 8, 2], dtype=torch.float32), small_boxes(11, 4)
    with pytest.raises(OptionError, match="loss must be one of targets, certified, got 'hinge'"):
        tr.repair(original, original, stars, target=0.5, loss="hinge")
    other = random_network(12, [4, 6, 2], dtype=torch.float32)
    with pytest.raises(ShapeError, match="one architecture"):
        tr.repair(original, other, stars, target=0.5, loss="certified")
    rounding = Quantizer(scale=torch.tensor(0.1), zero_point=0, lowest=0, highest=255)
    deployed = nn.Sequential(rounding, *random_network(11, [4, 8, 2], dtype=torch.float32))
    with pytest.raises(OptionError, match="does not round activations"):
        tr.repair(original, deployed, stars, target=0.5, loss="certified")
    with pytest.raises(UnsupportedLayerError, match="rounds? activations, but"):
        tr.DiscrepancyLoss(original, deployed)(torch.zeros(1, 4), torch.ones(1, 4))


def test_a_layer_too_large_for_a_matrix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchreach.graph.twins.LARGE", 14)
    network = random_network(0, [3, 5, 2], dtype=torch.float32)
    with pytest.raises(UnsupportedLayerError, match="at most 14 entries.*relu 1 has 5 x 3"):
        tr.DiscrepancyLoss(network, network)(torch.zeros(1, 3), torch.ones(1, 3))


def test_the_benchmark_spends_its_budget_on_each_loss() -> None:
    original = random_network(13, [4, 8, 2], dtype=torch.float32)
    given = tr.quantize_weights(original, 4)
    middle = boxes(13, 20, 4)[0].float()
    box = middle - 0.05, middle + 0.05
    data = middle, loss_against_targets.run(original, middle)
    for loss in ("targets", "certified", "certified, full gradient"):
        network, steps, spent = loss_against_targets.retrained(original, given, box, data, loss, 1e-2, 0.5)
        assert steps > 2
        assert 0.2 < spent < 5
        Constraints.read(given).check(network)
        assert loss_against_targets.certified(original, network, box).shape == (20,)
