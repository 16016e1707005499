"""Networks that end in Softmax: probabilities against samples, attacks and the formula's own extremes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchreach as tr
from torchreach.core.errors import UnsupportedLayerError
from torchreach.read.module import chain
from torchreach.verbs.softmax import bounds

KINDS = {"softmax": nn.Softmax(1), "log": nn.LogSoftmax(-1)}


def random(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classifier(act: nn.Module, last: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8), act, nn.Linear(8, 4), last).to(dtype)


def box(radius: float, dtype: torch.dtype = torch.float64) -> tr.StarBatch:
    ends = torch.full((2, 3), radius, dtype=dtype)
    ends[1] /= 2
    return tr.StarBatch.from_box(-ends, ends)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_all_scores_in_range_are_inside(kind: str) -> None:
    n, size = 4, 300
    low = 6 * random(1, size, n) - 3
    high = low + 3 * random(2, size, n) ** 3
    a = 2 * random(3, size, n) - 1
    b = a + random(4, size, n) ** 3
    a[::5], b[::5] = 0, 0
    last = KINDS[kind]
    bottom, top = bounds((low, high), (a, b), type(last))
    share, part = random(5, 400, size, n), random(6, 400, size, n)
    share[::2], part[::2] = share[::2].round(), part[::2].round()
    y, d = low + (high - low) * share, a + (b - a) * part
    p = last(y.flatten(0, 1)) - last((y - d).flatten(0, 1))
    p = p.reshape(400, size, n)
    assert bool(((p >= bottom - 1e-15) & (p <= top + 1e-15)).all())
    assert bool((top[::5] == bottom[::5]).all())  # equal scores
    # Two outputs leave nothing open: the lead is a difference of scores.
    fixed = (low[:, :2], low[:, :2])
    bottom, top = bounds(fixed, (a[:, :2], a[:, :2]), type(last))
    exact = last(fixed[0]) - last(fixed[0] - a[:, :2])
    torch.testing.assert_close(top, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(bottom, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("act", "dtype"),
    [
        *((act, torch.float64) for act in (nn.ReLU(), nn.Tanh())),
        (nn.ReLU(), torch.float32),
        pytest.param(nn.Tanh(), torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_certified_and_attained(kind: str, act: nn.Module, dtype: torch.dtype) -> None:
    original = classifier(act, KINDS[kind], dtype)
    compressed = tr.quantize_weights(original, 5)
    found = tr.discrepancy(original, compressed, box(0.3, dtype), budget=tr.Budget(stars=200))
    first, second = copy.deepcopy(original).double(), copy.deepcopy(compressed).double()
    low, high = (end.double() for end in box(0.3, dtype).bounding_box()[:2])
    x = low[:, None] + (high - low)[:, None] * random(7, 2, 4000, 3)
    with torch.no_grad():
        value = (first(x.flatten(0, 1)) - second(x.flatten(0, 1))).reshape(2, 4000, 4)
        assert bool((value.abs().amax(1) <= found.upper * (1 + 1e-6)).all())
        assert bool((value.amax(1) <= found.range_upper + 1e-7).all())
        assert bool((value.amin(1) >= found.range_lower - 1e-7).all())
        for s in range(2):
            at = found.witness[s].double()
            met = (first(at) - second(at)).abs().diagonal()
            assert bool((met >= found.lower[s].double() * (1 - 1e-6)).all())
    assert bool((found.lower >= 0.98 * value.abs().amax(1)).all())
    assert float((found.upper / found.lower).max()) < 6
    # what one compares without the last layer says nothing of probabilities
    assert not torch.equal(found.upper, tr.discrepancy(original[:-1], compressed[:-1], box(0.3, dtype), gap=1.0).upper)


def test_equal_networks_differ_by_nothing() -> None:
    original = classifier(nn.ReLU(), nn.Softmax(1))
    assert float(tr.discrepancy(original, copy.deepcopy(original), box(1.0)).upper.max()) == 0
    assert tr.equivalent(original, original, box(1.0), top1=True).answer == (tr.Answer.EQUIVALENT,) * 2


def test_tolerances_and_labels_are_answered() -> None:
    original = classifier(nn.Tanh(), nn.Softmax(1))
    compressed = tr.quantize_weights(original, 7)
    wide = tr.discrepancy(original, compressed, box(0.1), budget=tr.Budget(stars=10))
    yes = tr.equivalent(original, compressed, box(0.1), 1.1 * float(wide.upper.max()), budget=tr.Budget(stars=50))
    no = tr.equivalent(original, compressed, box(0.1), 0.5 * float(wide.lower.min()), budget=tr.Budget(stars=50))
    assert yes.answer == (tr.Answer.EQUIVALENT,) * 2
    assert no.answer == (tr.Answer.NOT_EQUIVALENT,) * 2
    label = tr.equivalent(original, compressed[:-1], box(0.01), top1=True, budget=tr.Budget(stars=50))
    assert label.answer == (tr.Answer.EQUIVALENT,) * 2


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.layer(x), dim=-1)


class Method(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).log_softmax(1)


class TooEarly(Functional):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.layer(x)
        return scores + torch.softmax(scores, 1)


class Unused(Functional):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.layer(x)
        torch.softmax(scores, 1)
        return scores


@pytest.mark.parametrize("traced", ["fx", "export", "file"])
@pytest.mark.parametrize("kind", [Functional, Method])
def test_calls_are_read(kind: type[nn.Module], traced: str, tmp_path: Path) -> None:
    module, x = kind(), torch.randn(20, 3)
    if traced == "file":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, (x[:1],), tmp_path / "net.onnx", dynamo=False, input_names=["x"])
        layers = tr.load(tmp_path / "net.onnx")
    else:
        read = module if traced == "fx" else torch.export.export(module, (x[:2],)).module(check_guards=False)
        layers = chain(read, (3,))
    assert isinstance(layers[-1], nn.Softmax | nn.LogSoftmax)
    torch.testing.assert_close(layers(x), module(x))


def test_only_the_last_layer_may_be_one() -> None:
    with pytest.raises(UnsupportedLayerError, match="Softmax as the last layer"):
        chain(TooEarly(), (3,))
    assert not any(isinstance(layer, nn.Softmax) for layer in chain(Unused(), (3,)))
    with pytest.raises(UnsupportedLayerError, match="over the features"):
        chain(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Softmax(1)), (1, 3, 3))


def test_what_does_not_fit_is_refused_by_name() -> None:
    original = classifier(nn.ReLU(), nn.Softmax(1), torch.float32)
    with pytest.raises(UnsupportedLayerError, match="the original ends in Softmax and the compressed one in neither"):
        tr.discrepancy(original, original[:-1], box(0.1, torch.float32))
    with pytest.raises(UnsupportedLayerError, match="ends in Softmax and the compressed one in LogSoftmax"):
        tr.discrepancy(original, nn.Sequential(*original[:-1], nn.LogSoftmax(1)), box(0.1, torch.float32))
    with pytest.raises(UnsupportedLayerError, match="Softmax.*leave it out"):
        tr.reach(original, box(0.1, torch.float32))
    with pytest.raises(UnsupportedLayerError, match=r"Softmax.*arithmetic='real'"):
        tr.discrepancy(original, copy.deepcopy(original).half(), box(0.1, torch.float32))
