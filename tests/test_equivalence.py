"""Equivalence to within epsilon and in labels: certified answers, witnesses that replay, honest unknowns."""

from __future__ import annotations

import copy
import os
import signal
import threading

import pytest
import torch
from torch import Tensor, nn

import torchreach as tr
from tests.networks import DEVICES_SIM_SLOW, random_network, rounded_copy
from tests.test_difference import noisy_copy
from torchreach.core.errors import OptionError, ShapeError, UnsupportedLayerError
from torchreach.verbs import equivalence

YES, NO, UNKNOWN = tr.Answer.EQUIVALENT, tr.Answer.NOT_EQUIVALENT, tr.Answer.UNKNOWN


def boxes(seed: int, inputs: int, count: int = 3, radius: float = 0.3, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(seed)
    middle = torch.randn(count, inputs, generator=g).to(dtype)
    return tr.StarBatch.from_box(middle - radius, middle + radius)


def outputs(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(network).double()(x.double())


def assert_true(found: tr.Equivalence, original: nn.Module, compressed: nn.Module, stars: tr.StarBatch) -> None:
    """Every claim of a result, against samples and its own witnesses."""
    size = len(stars)
    x = stars.sample(5000, seed=3)
    y1, y2 = (outputs(network, x.flatten(0, 1)).reshape(size, 5000, -1) for network in (original, compressed))
    w1, w2 = (outputs(network, found.witness) for network in (original, compressed))
    assert stars.contains(found.witness[:, None], tolerance=1e-6).all()
    assert (found.lower <= found.upper).all()
    if found.label is None:
        assert found.epsilon is not None
        apart, differs = (y1 - y2).abs().flatten(1).amax(1), (w1 - w2).abs().amax(1) > found.epsilon
        equal = apart <= found.epsilon
    else:
        equal = (y1.argmax(2) == y2.argmax(2)).all(1)
        differs = w1.argmax(1) != w2.argmax(1)
        own = found.label[:, None, None].expand(-1, 5000, 1)
        leads = [(y.scatter(2, own, -torch.inf).amax(2) - y.gather(2, own)[..., 0]).amax(1) for y in (y1, y2)]
        apart = torch.stack(leads).amax(0)
    assert (apart <= found.upper.double() + 1e-12).all()
    for s, answer in enumerate(found.answer):
        assert equal[s] or answer is not YES
        assert differs[s] or answer is not NO


@pytest.mark.parametrize("device", DEVICES_SIM_SLOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_epsilon_is_decided_on_both_sides_of_the_exact_value(dtype: torch.dtype, device: str) -> None:
    for seed in range(2):
        original = random_network(seed, [3, 10, 8, 3], dtype=dtype).to(device)
        compressed = noisy_copy(original.cpu(), 1e-2, seed).to(device)
        original = original.to(device)
        stars = boxes(seed, 3, dtype=dtype).to(device)
        exact = tr.discrepancy(original, compressed, stars, "exact").max_upper
        for factor, answer in ((0.99, NO), (1.01, YES)):
            for s in range(len(stars)):
                found = tr.equivalent(original, compressed, stars.select([s]), factor * float(exact[s]))
                assert found.answer == (answer,)
                assert found.count(answer) == 1
                assert_true(found, original, compressed, stars.select([s]))


def test_each_star_of_a_batch_gets_its_own_answer() -> None:
    original = random_network(1, [3, 10, 8, 3])
    compressed = noisy_copy(original, 1e-2, 1)
    stars = boxes(1, 3, count=5)
    exact = tr.discrepancy(original, compressed, stars, "exact").max_upper
    middle = float(exact.median())
    found = tr.equivalent(original, compressed, stars, middle + 1e-4)
    assert found.answer == tuple(YES if value <= middle else NO for value in exact.tolist())
    assert_true(found, original, compressed, stars)


def test_wide_boxes_of_many_inputs_are_decided() -> None:
    original = random_network(7, [12, 30, 30, 2])
    compressed = noisy_copy(original, 1e-3, 7)
    stars = boxes(7, 12, count=1)
    lower = tr.discrepancy(original, compressed, stars, "search", budget=tr.Budget(stars=1)).max_lower
    for factor, answer in ((3.0, YES), (0.9, NO)):
        found = tr.equivalent(original, compressed, stars, factor * float(lower), budget=tr.Budget(seconds=20))
        assert found.answer == (answer,)
        assert_true(found, original, compressed, stars)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_are_certified_or_refuted(dtype: torch.dtype) -> None:
    answers = []
    for seed in range(3):
        original = random_network(seed, [3, 10, 8, 4], dtype=dtype)
        compressed = noisy_copy(original, 1e-2, seed)
        stars = boxes(seed, 3, count=4, dtype=dtype)
        found = tr.equivalent(original, compressed, stars, top1=True)
        assert_true(found, original, compressed, stars)
        answers += found.answer
        # the same from each network's exact range of leads
        for s, answer in enumerate(found.answer):
            assert found.label is not None
            leads = []
            for network in (original, compressed):
                label = int(found.label[s])
                margin = nn.Linear(4, 4, bias=False, dtype=dtype)
                with torch.no_grad():
                    margin.weight.copy_(torch.eye(4, dtype=dtype))
                    margin.weight[:, label] -= 1
                top = tr.reach(nn.Sequential(network, margin), stars.select([s])).upper[0]
                leads.append(float(top[[i for i in range(4) if i != label]].max()))
            assert (answer is YES) == (max(leads) < 0)
            assert max(leads) <= float(found.upper[s]) + 1e-5
    assert set(answers) == {YES, NO}


def test_networks_of_two_architectures_can_have_the_same_label() -> None:
    for seed in range(3):
        first, second = random_network(seed, [3, 8, 3]), random_network(seed + 50, [3, 5, 5, 3])
        with torch.no_grad():
            for network in (first, second):
                network[-1].bias.add_(torch.tensor([5.0, 0.0, 0.0]))
        stars = boxes(seed, 3)
        found = tr.equivalent(first, second, stars, top1=True)
        assert found.answer == (YES,) * 3
        assert_true(found, first, second, stars)


def test_a_network_is_equivalent_to_itself_even_where_labels_change() -> None:
    original = random_network(2, [3, 10, 8, 3])
    stars = boxes(2, 3, radius=2.0)
    assert len(outputs(original, stars.sample(500)[0]).argmax(1).unique()) > 1
    assert tr.equivalent(original, copy.deepcopy(original), stars, top1=True).answer == (YES,) * 3
    assert tr.equivalent(original, copy.deepcopy(original), stars, 0.0).answer == (YES,) * 3


def test_thin_slivers_between_two_decision_surfaces_are_found() -> None:
    original = random_network(2, [3, 10, 8, 3])
    compressed = noisy_copy(original, 1e-7, 2)
    stars = boxes(2, 3, radius=2.0)
    x = stars.sample(2000)[0]
    assert torch.equal(outputs(original, x).argmax(1), outputs(compressed, x).argmax(1))
    found = tr.equivalent(original, compressed, stars, top1=True)
    assert found.answer == (NO,) * 3
    assert_true(found, original, compressed, stars)


def test_stars_with_constraints_are_answered_soundly() -> None:
    original = random_network(3, [3, 10, 8, 3])
    compressed = noisy_copy(original, 1e-2, 3)
    box = boxes(3, 3, count=1)
    stars = box.intersect(torch.tensor([1.0, 1.0, 0.0]).double(), float(box.center[0, :2].sum()))
    exact = float(tr.discrepancy(original, compressed, stars, "exact").max_upper.max())
    for found in (
        tr.equivalent(original, compressed, stars, 1.01 * exact),
        tr.equivalent(original, compressed, stars, 0.8 * exact),
        tr.equivalent(original, compressed, stars, top1=True),
    ):
        assert_true(found, original, compressed, stars)
        assert UNKNOWN not in found.answer


@pytest.mark.parametrize("top1", [False, True])
def test_a_spent_budget_is_unknown_with_a_valid_interval(top1: bool) -> None:
    original = random_network(7, [12, 40, 40, 2])
    compressed = noisy_copy(original, 3e-2, 7)
    stars = boxes(7, 12, count=2, radius=0.25)
    full = tr.discrepancy(original, compressed, stars, "search", budget=tr.Budget(stars=1))
    epsilon = None if top1 else float(full.max_lower.max() + full.max_upper.max()) / 2
    found = tr.equivalent(original, compressed, stars, epsilon, top1=top1, budget=tr.Budget(seconds=0.5))
    assert_true(found, original, compressed, stars)
    if not top1:
        assert UNKNOWN in found.answer


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_what_is_not_answered_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    original = random_network(0, [3, 8, 3])
    compressed = rounded_copy(original, 64)
    work = equivalence._Labels._constant

    def interrupted(self, s, end):
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.01)
        return work(self, s, end)

    monkeypatch.setattr(equivalence._Labels, "_constant", interrupted)
    monkeypatch.setattr(equivalence._Labels, "_differ", lambda *_: None)
    stars = boxes(0, 3, count=4)
    found = tr.equivalent(original, compressed, stars, top1=True)
    assert found.answer[1:] == (UNKNOWN,) * 3
    assert_true(found, original, compressed, stars)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_planted_wrong_bound_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above can fail: a search that claims too little makes wrong answers, and they are noticed."""
    original = random_network(1, [3, 10, 8, 3])
    compressed = noisy_copy(original, 1e-2, 1)
    stars = boxes(1, 3, count=1)
    exact = float(tr.discrepancy(original, compressed, stars, "exact").max_upper)
    right = equivalence.discrepancy

    def wrong(*args, **kwargs):
        from dataclasses import replace

        found = right(*args, **kwargs)
        return replace(found, upper=found.upper * 0, lower=found.lower * 0)

    monkeypatch.setattr(equivalence, "discrepancy", wrong)
    found = tr.equivalent(original, compressed, stars, 0.7 * exact)
    with pytest.raises(AssertionError):
        assert_true(found, original, compressed, stars)


def test_wrong_input_is_named() -> None:
    original = random_network(0, [3, 4, 2])
    compressed = rounded_copy(original, 8)
    stars = boxes(0, 3)
    for options, message in (
        ({}, "either epsilon or top1=True, got neither"),
        ({"epsilon": 0.1, "top1": True}, "either epsilon or top1=True, got both"),
        ({"epsilon": -1.0}, "epsilon must be a number >= 0, got -1"),
        ({"epsilon": float("nan")}, "epsilon must be a number >= 0, got nan"),
    ):
        with pytest.raises(OptionError, match=message):
            tr.equivalent(original, compressed, stars, **options)
    single = random_network(0, [3, 4, 1])
    with pytest.raises(ShapeError, match="at least two outputs"):
        tr.equivalent(single, rounded_copy(single, 8), stars, top1=True)
    with pytest.raises(ShapeError, match="StarBatch, got Tensor"):
        tr.equivalent(original, compressed, torch.zeros(3), 0.1)  # type: ignore[arg-type]
    for options in ({"epsilon": 0.1}, {"top1": True}):
        with pytest.raises(ShapeError):
            tr.equivalent(original, compressed, boxes(0, 4), **options)
        with pytest.raises(UnsupportedLayerError, match="Softsign"):
            tr.equivalent(nn.Sequential(original, nn.Softsign()), compressed, stars, **options)
