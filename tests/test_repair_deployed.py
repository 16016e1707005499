"""Repair of deployed int8 networks: calibrated, trained with their rounding, converted, certified, saved and loaded."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as quantise

from torchreach import StarBatch, discrepancy, load_int8
from torchreach.compress.constraints import Constraints, prune_weights, quantize_weights
from torchreach.core.errors import InvalidNetworkError, ShapeError, UnsupportedLayerError
from torchreach.graph.quantizer import Quantizer
from torchreach.read.module import chain
from torchreach.training.fit import run
from torchreach.training.int8_student import DeployedStudent
from torchreach.training.repair import RepairOptions, repair

pytestmark = pytest.mark.filterwarnings("ignore")  # torch announces the end of its eager-mode quantisation

QUICK = RepairOptions(samples=50, epochs=20, batch_size=64, learning_rate=3e-3)
FAST = partial(repair, training=QUICK)
INT8 = (torch.ao.nn.quantized.Linear, torch.ao.nn.quantized.Conv2d)
SYMMETRIC = quantise.default_weight_observer
PER_CHANNEL = quantise.default_per_channel_weight_observer
AFFINE = quantise.MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_affine)


class Net(nn.Module):
    """A network as people write it for torch.ao.quantization: layers by name, order in `forward`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.dequant = quantise.DeQuantStub()
        self.body = nn.Sequential(*layers)
        self.quant = quantise.QuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.body(self.quant(x)))


def dense(seed: int = 0, sizes: tuple[int, ...] = (3, 16, 12, 2)) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in zip(sizes, sizes[1:], strict=False):
        layer = nn.Linear(n_in, n_out)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(n_out, n_in, generator=generator) * 1.5 / n_in**0.5)
            layer.bias.copy_(0.2 * torch.randn(n_out, generator=generator))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def points(count: int = 300, features: int = 3) -> Tensor:
    return 2 * torch.rand(count, features, generator=torch.Generator().manual_seed(5)) - 1


def int8(network: nn.Module, weights=PER_CHANNEL, inputs: Tensor | None = None, fuse: bool = False) -> Net:
    """Eager-mode int8 module of `network`, calibrated on `inputs`; without those every scale is 1."""
    module = Net(*copy.deepcopy(network).children()).eval()
    if fuse:
        names = [[f"body.{i}", f"body.{i + 1}"] for i in range(0, len(module.body) - 1, 2)]
        module = quantise.fuse_modules(module, names)
    activations = quantise.MinMaxObserver.with_args(dtype=torch.quint8, reduce_range=True)
    module.qconfig = quantise.QConfig(activation=activations, weight=weights)  # type: ignore[assignment]
    prepared = quantise.prepare(module)
    if inputs is not None:
        prepared(inputs)
    return quantise.convert(prepared)  # type: ignore[return-value]


def boxes() -> StarBatch:
    centers = torch.tensor([[0.3, -0.2, 0.5], [-0.6, 0.4, 0.1]])
    return StarBatch.from_box(centers - 0.03, centers + 0.03)


def layers(module: nn.Module) -> list:
    return [layer for layer in module.modules() if isinstance(layer, INT8)]


def codes(module: nn.Module) -> list[Tensor]:
    return [layer.weight().int_repr().int() for layer in layers(module)]


def student(module: nn.Module, constraints: Constraints | None = None, training: RepairOptions = QUICK):
    return DeployedStudent(module, chain(module, (3,)), torch.device("cpu"), constraints, training, 0)


def largest(found) -> float:
    return float(found.upper.max())


# -- the loop -----------------------------------------------------------------------------------------


def test_uncalibrated_network_is_calibrated_first_and_starts_from_its_own_weights():
    original = dense()
    given = int8(original)
    before = [code.clone() for code in codes(given)]
    result = FAST(original, given, boxes(), target=0.3, data=(points(), original(points()).detach()))
    assert result.satisfied
    assert result.index == 1
    assert result.history[1].loss is None  # no training was needed
    assert all(torch.equal(a, b) for a, b in zip(codes(result.network), before, strict=True))
    assert largest(result.before) > 0.5
    torch.testing.assert_close(largest(discrepancy(original, given, boxes())), largest(result.before))
    assert given.quant.scale == 1


def test_training_comes_closer_than_calibration_and_the_certificate_is_of_the_converted_network():
    original = dense()
    given = int8(prune_weights(original, 0.6))
    result = FAST(original, given, boxes(), target=0.02, iterations=6, data=(points(), original(points()).detach()))
    calibrated, trained = result.history[1].discrepancy, result.after
    assert result.index > 1
    assert result.history[2].loss is not None
    assert largest(trained) < 0.5 * largest(calibrated)
    x = boxes().sample(2000, 3)
    difference = (run(original, x.flatten(0, 1)) - run(result.network, x.flatten(0, 1))).unflatten(0, x.shape[:2])
    assert bool((difference <= trained.range_upper[:, None] + 1e-6).all())
    assert bool((difference >= trained.range_lower[:, None] - 1e-6).all())
    assert bool((difference.abs().amax(1) <= trained.upper + 1e-6).all())


@pytest.mark.parametrize(
    ("weights", "fuse"), [(PER_CHANNEL, False), (PER_CHANNEL, True), (SYMMETRIC, False), (AFFINE, True)]
)
def test_saved_and_loaded_into_a_converted_module_it_has_the_same_certificate(tmp_path, weights, fuse):
    original = dense()
    given = int8(original, weights, fuse=fuse)
    result = FAST(original, given, boxes(), target=1e-6, iterations=2)
    torch.save(result.network.state_dict(), tmp_path / "repaired.pth")
    fresh = int8(dense(seed=1), weights, points(), fuse=fuse)
    fresh.load_state_dict(torch.load(tmp_path / "repaired.pth", weights_only=False))
    assert torch.equal(fresh(points()), result.network(points()))
    again = discrepancy(original, fresh, boxes())
    assert torch.equal(again.upper, result.after.upper)
    assert torch.equal(again.range_lower, result.after.range_lower)
    assert [type(layer) for layer in fresh.modules()] == [type(layer) for layer in result.network.modules()]


def test_network_read_from_a_state_dict_is_repaired_and_saved_like_it(tmp_path):
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = dense()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    original = Plain().eval()
    torch.save(int8(original.body).state_dict(), tmp_path / "shipped.pth")
    shipped = load_int8(tmp_path / "shipped.pth", original)
    result = FAST(original, shipped, boxes(), target=0.3)
    assert result.satisfied
    torch.save(result.network.state_dict(), tmp_path / "repaired.pth")
    again = load_int8(tmp_path / "repaired.pth", Plain())
    assert torch.equal(again(points()), result.network(points()))
    assert torch.equal(discrepancy(original, again, boxes()).upper, result.after.upper)


def test_scheme_and_weight_scales_stay_as_given():
    original = dense()
    for weights in (PER_CHANNEL, SYMMETRIC, AFFINE):
        given = int8(original, weights)
        learner = student(given)
        assert learner.calibrate(boxes().sample(20, 0).flatten(0, 1), None)
        learner.retrain(points(), original(points()).detach(), None, 1.0)
        moved = False
        for ours, theirs in zip(layers(learner.network), layers(given), strict=True):
            a, b = ours.weight(), theirs.weight()
            assert a.qscheme() == b.qscheme()
            moved |= not torch.equal(a.int_repr(), b.int_repr())
            if weights is PER_CHANNEL:
                assert torch.equal(a.q_per_channel_scales(), b.q_per_channel_scales())
                assert torch.equal(a.q_per_channel_zero_points(), b.q_per_channel_zero_points())
            else:
                assert (a.q_scale(), a.q_zero_point()) == (b.q_scale(), b.q_zero_point())
            assert not torch.equal(ours.bias(), theirs.bias())
        assert moved


def test_equal_seeds_give_equal_networks_and_nothing_given_changes():
    original, given = dense(), int8(prune_weights(dense(), 0.6))
    given.train()
    before = copy.deepcopy(given.state_dict()), codes(given)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, second, other = (
        FAST(original, given, boxes(), target=1e-6, iterations=2, seed=seed).network for seed in (5, 5, 6)
    )
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(first(points()), second(points()))
    assert not torch.equal(first(points()), other(points()))
    assert all(torch.equal(a, b) for a, b in zip(codes(given), before[1], strict=True))
    assert torch.equal(given.quant.scale, before[0]["quant.scale"])
    assert all(module.training for module in first.modules())


def test_evaluation_sees_the_converted_network_and_no_better_iteration_is_lost():
    original, seen = dense(), []
    given = int8(original, inputs=points())
    result = FAST(
        original,
        given,
        boxes(),
        target=1e-6,
        iterations=3,
        evaluate=lambda module: seen.append(module) or float(len(seen)),
    )
    assert [step.accuracy for step in result.history] == [1.0, 2.0, 3.0, 4.0]
    assert all(len(layers(module)) == 3 for module in seen)
    assert largest(result.after) == min(largest(step.discrepancy) for step in result.history)
    assert torch.equal(result.network(points()), seen[result.index](points()))


# -- what stays, what moves ---------------------------------------------------------------------------


def test_pruned_codes_stay_zero_and_few_bits_stay_few():
    original = dense()
    for small, low, high in ((prune_weights(original, 0.8), -128, 127), (quantize_weights(original, 4), -7, 7)):
        given = int8(small)
        if high == 7:  # int4 weights kept in int8: the codes of a coarse scale
            for layer in layers(given):
                packed = layer.weight()
                scales = packed.q_per_channel_scales() * 127 / 7
                zeros = packed.q_per_channel_zero_points()
                weight = torch.quantize_per_channel(packed.dequantize(), scales, zeros, 0, torch.qint8)
                layer.set_weight_bias(weight, layer.bias())
        learner = student(given)
        learner.calibrate(points(), None)
        learner.retrain(points(), original(points()).detach(), None, 1.0)
        moved = False
        for ours, theirs in zip(codes(learner.network), codes(given), strict=True):
            assert low <= int(ours.min()) <= int(ours.max()) <= high
            moved |= not torch.equal(ours, theirs)
            if low == -128:
                assert bool((ours[theirs == 0] == 0).all())
        assert moved


def test_masks_may_be_given():
    original = dense()
    given = int8(prune_weights(original, 0.3))  # too few zeros to be taken for pruning
    mask = codes(given)[1] != 0
    learner = student(given, constraints=Constraints({"body.2.weight": mask}, {}))
    learner.calibrate(points(), None)
    learner.retrain(points(), original(points()).detach(), None, 1.0)
    assert bool((codes(learner.network)[1][~mask] == 0).all())
    assert bool((codes(learner.network)[0][codes(given)[0] == 0] != 0).any())
    with pytest.raises(InvalidNetworkError, match="mask of 'body.2.weight' must have its shape and name zeros"):
        student(given, constraints=Constraints({"body.2.weight": ~mask}, {}))


@pytest.mark.parametrize(("fuse", "reduce"), [(False, True), (True, True), (True, False)])
def test_calibration_spans_what_the_points_and_the_data_reach(fuse, reduce):
    network = dense()
    given = int8(network, fuse=fuse)
    learner = student(given, training=replace(QUICK, reduce_range=reduce))
    inner = 127 if reduce else 255
    x = points()
    learner.calibrate(x[:100], (x[100:], torch.zeros(200)))
    assert not learner.calibrate(x, None)  # once
    first, *others = [layer for layer in chain(learner.network, (3,)) if isinstance(layer, Quantizer)]
    # both ends within a code, zero on the grid
    assert float(first.value(first.codes(x.double())).sub(x).abs().max()) <= float(first.scale) * 0.51
    assert inner - 1 <= int(first.codes(x).max() - first.codes(x).min()) <= inner
    assert int(first.codes(x).max()) <= inner
    value = x
    for index, (layer, quantizer) in enumerate(zip(network[::2], others, strict=True)):
        value = layer(value)
        last = index == 2
        value = value if last else value.relu()
        # nothing below zero gets a code where a ReLU follows
        assert (int(quantizer.zero_point) > 0) == last
        reached = quantizer.codes(value.detach())
        top = 255 if last else inner
        assert top - 4 <= int(reached.max() - reached.min())
        assert int(reached.max()) <= top + 2
    assert not isinstance(learner.network, nn.Sequential)


def test_scales_follow_what_training_makes_of_the_outputs():
    original = dense()
    learner = student(int8(original), training=replace(QUICK, epochs=60, learning_rate=1e-2))
    learner.calibrate(points(), None)
    far = float(original(points()).abs().max()) * 1.8
    assert float(learner.network(points()).abs().max()) < far / 1.5
    learner.retrain(points(), 1.8 * original(points()).detach(), None, 1.0)
    assert float(learner.network(points()).abs().max()) > 0.9 * far


def test_training_sees_what_the_kernels_compute():
    original = dense()
    for weights, fuse in ((PER_CHANNEL, True), (AFFINE, False)):
        learner = student(int8(original, weights, fuse=fuse))
        learner.calibrate(points(), None)
        learner.retrain(points(), original(points()).detach(), None, 1.0)
        x = points(2000)
        ours, theirs = learner._output(x).detach(), learner.network(x)
        step = float(next(q for q in reversed(chain(learner.network, (3,))) if isinstance(q, Quantizer)).scale)
        assert float(((ours - theirs).abs() > 0.5 * step).double().mean()) < 0.01  # ties only
        assert float((ours - theirs).abs().max()) < 3.5 * step


def test_gradients_pass_inside_the_range_of_a_quantiser_only():
    given = int8(dense(), inputs=points())
    learner = student(given)
    rounding = learner.model[0]
    low, high = (float(end) for end in rounding.quantizer.value(torch.tensor([0.0, 255.0])))
    x = torch.tensor([low - 1, low + 1e-3, 0.1, high - 1e-3, high + 1], requires_grad=True)
    rounding(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_targets_between_two_codes_are_met_by_the_sum_and_not_by_the_threshold():
    """Through the last rounding, training would make the output jump between both codes."""
    original = dense(sizes=(3, 1))
    learner = student(int8(original))
    learner.calibrate(points(), None)
    x = points(1).expand(16, -1)
    last = learner.model[-1].quantizer
    y = (learner.network(x) + 0.3 * last.scale).float()
    learner.training = replace(QUICK, epochs=100, learning_rate=1e-3)
    learner.retrain(x, y, None, 1.0)
    assert float((learner.network(x) - y).abs().max()) < 0.35 * float(last.scale)


def test_convolutions_and_pools_are_repaired():
    generator = torch.Generator().manual_seed(0)
    original = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2)
    ).eval()
    with torch.no_grad():
        for value in original.parameters():
            value.copy_(0.4 * torch.randn(value.shape, generator=generator))
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    mask[0, 2:4, 1] = True
    stars = StarBatch.from_image(torch.rand(2, 1, 6, 6, generator=generator), 0.05, mask)
    result = FAST(original, int8(original), stars, target=0.3)
    assert result.satisfied
    x = stars.sample(200, 1).flatten(0, 1)
    worst = (run(original, x) - run(result.network, x)).abs().unflatten(0, (2, -1)).amax(1)
    assert bool((worst <= result.after.upper + 1e-6).all())


# -- steps and errors ---------------------------------------------------------------------------------


def test_printed_equation_20_ignores_the_sign_and_moves_what_is_too_large_further_away():
    original = dense()
    given = copy.deepcopy(quantize_weights(original, 4))
    with torch.no_grad():
        given[-1].bias += 0.5
    data = (points(), original(points()).detach())
    found = {}
    for step in ("pointwise", "midpoint", "magnitude"):
        run_ = FAST(original, int8(given), boxes(), target=1e-6, step=step, iterations=2, data=data)
        # whether or not it brought anything: what the first training led to
        found[step] = largest(run_.history[2].discrepancy)
        calibrated = largest(run_.history[1].discrepancy)
    assert found["pointwise"] < 0.8 * calibrated
    assert found["midpoint"] < 0.8 * calibrated
    assert found["magnitude"] > 1.1 * calibrated


def test_other_deployed_networks_are_refused_with_what_to_pass():
    original = dense()
    given = int8(original, inputs=points())
    message = r"needs an eager-mode int8 module .*'quant' is no module; pass such a module.*torchreach.weight_only"
    with pytest.raises(UnsupportedLayerError, match=message):
        FAST(original, chain(given, (3,)), boxes(), target=0.5)
    trained = Net(*copy.deepcopy(original)).train()
    trained.qconfig = quantise.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    trained = quantise.prepare_qat(trained)
    trained(points())
    with pytest.raises(UnsupportedLayerError, match="needs an eager-mode int8 module"):
        FAST(original, trained.eval(), boxes(), target=0.5)
    with pytest.raises(ShapeError, match="the original has 4, the compressed 2"):
        FAST(dense(sizes=(3, 8, 4)), given, boxes(), target=0.5)


def test_a_layer_that_is_used_twice_is_refused():
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.dequant(self.body(self.body(self.quant(x))))

    module = Twice(nn.Linear(3, 3)).eval()
    module.qconfig = quantise.get_default_qconfig("fbgemm")  # type: ignore[assignment]
    prepared = quantise.prepare(module)
    prepared(points())
    with pytest.raises(UnsupportedLayerError, match=r"used once, but 'body.0' is used again"):
        FAST(dense(sizes=(3, 3)), quantise.convert(prepared), boxes(), target=0.5)
