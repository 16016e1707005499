"""Labels of deployed networks, labels where the original is sure, and audits: answers that no input refutes."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchreach as tr
from tests.data import require_data
from tests.networks import executed_steps, random_network
from tests.test_deployed import case, int8_network
from torchreach.core.errors import InvalidSetError, OptionError, ShapeError
from torchreach.graph.quantizer import Quantizer
from torchreach.verbs import label_witness
from torchreach.verbs import labels as rule
from torchreach.verbs.labels import Leads, agree, apart_by, asked, leads, may_give, odds, ties

YES, NO, UNKNOWN = tr.Answer.EQUIVALENT, tr.Answer.NOT_EQUIVALENT, tr.Answer.UNKNOWN
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def steep(seed: int, factor: float) -> tuple[nn.Sequential, nn.Module, Tensor]:
    """As `case`, the outputs `factor` times as large, so that softmax is sure of some labels."""
    original, _, x = case(seed)
    with torch.no_grad():
        original[-1].weight.mul_(factor)
        original[-1].bias.mul_(factor)
    data = 2 * torch.rand(500, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    return original, int8_network(copy.deepcopy(original), data), x.clamp(-0.8, 0.8)


@torch.no_grad()
def run(network: nn.Module, x: Tensor) -> Tensor:
    """Outputs in float64, of an int8 network at float32 inputs."""
    return network(x.double() if next(network.parameters(), None) is not None else x.float()).double()


def untied(y: Tensor) -> Tensor:
    top = y.topk(2).values
    return top[:, 0] > top[:, 1]


def assert_true(
    found: tr.Equivalence, original: nn.Module, compressed: nn.Module, stars: tr.StarBatch, count: int = 10_000
) -> None:
    """Every claim about the first star, against `count` samples and the witness."""
    p = found.confidence
    x = stars.sample(count)[0].float()
    y, z = run(original, x), run(compressed, x)
    sure = torch.ones(len(x), dtype=torch.bool) if p is None else y.softmax(1).amax(1) >= p
    differ = (y.argmax(1) != z.argmax(1)) & sure & untied(y) & untied(z)
    assert not (found.answer[0] is YES and bool(differ.any()))
    assert found.label is not None
    for value in (y, z):
        lead = value - value[:, found.label]
        lead[:, found.label] = -torch.inf
        assert float(lead.max()) <= float(found.upper[0]) + 1e-6 or found.reasons[0] is tr.Reason.NEVER_SURE
    if found.answer[0] is NO:
        assert stars.contains(found.witness[:, None]).all()
        w1, w2 = run(original, found.witness), run(compressed, found.witness)
        assert int(w1.argmax()) != int(w2.argmax())
        assert p is None or float(w1.softmax(1).max()) >= p


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 8))])
def test_answers_hold_for_all_samples_on_the_kernels(seed):
    """Random int8 networks, small and wide boxes, in both orders, with and without a confidence."""
    original, small, x = steep(seed, 6.0 if seed % 2 else 1.0)
    for eps in (0.02, 0.2):
        stars = tr.StarBatch.from_image(x[None], eps)
        for pair in ((original, small), (small, original)):
            for p in (None, 0.5, 0.8):
                found = tr.equivalent(*pair, stars, top1=True, confidence=p, budget=tr.Budget(seconds=1.5))
                assert found.semantics == "deployed int8"
                assert_true(found, *pair, stars)


def test_few_cells_are_decided_completely():
    answers = []
    for seed in range(8):
        original, small, x = steep(seed, 1.0)
        if seed % 2:  # where another label is near
            some = 1.8 * torch.rand(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.9
            top = run(original, some).topk(2).values
            x = some[(top[:, 0] - top[:, 1]).argmin()]
        stars = tr.StarBatch.from_image(x[None], 0.04)
        answers += tr.equivalent(original, small, stars, top1=True, budget=tr.Budget(seconds=20)).answer
    assert set(answers) == {YES, NO}


def test_a_lost_margin_is_caught(monkeypatch):
    """The property above can fail: a rule that forgets that another output leads claims too much, and it is noticed."""
    wrong = 0
    monkeypatch.setattr(Leads, "missed", lambda own, _: -torch.ones(len(own.first)))
    monkeypatch.setattr(label_witness.Witness, "run", lambda *_: None)
    for seed in range(4):
        original, small, x = steep(seed, 1.0)
        stars = tr.StarBatch.from_image(x[None], 0.4)
        found = tr.equivalent(original, small, stars, top1=True)
        try:
            assert_true(found, original, small, stars)
        except AssertionError:
            wrong += 1
    assert wrong


def test_two_deployed_networks_are_compared():
    _, small, x = steep(1, 6.0)
    _, other, _ = steep(2, 6.0)
    for eps, budget in ((0.0, None), (0.05, 3)):
        stars = tr.StarBatch.from_image(x[None], eps)
        assert_true(tr.equivalent(small, other, stars, top1=True, budget=tr.Budget(budget)), small, other, stars)
        assert tr.equivalent(small, copy.deepcopy(small), stars, top1=True).answer == (YES,)


def table_network(seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """One input, three outputs, 3-bit codes: the deployed network, and the original that it was made from."""
    original = random_network(seed, [1, 4, 3])
    first, relu, last = copy.deepcopy(original)
    small = nn.Sequential(
        Quantizer(0.25, 0, -4, 3), first, relu, Quantizer(0.2, 0, 0, 7), last, Quantizer(0.1, 0, -8, 7)
    )
    return original, small


@pytest.mark.parametrize("seed", range(6))
def test_the_answer_is_that_of_all_codes(seed):
    """Hello-world size: every code of the only input, and the original on a fine grid of each cell."""
    original, small = table_network(seed)
    stars = tr.StarBatch.from_box(torch.tensor([[-1.1]]).double(), torch.tensor([[0.8]]).double())
    x = torch.linspace(-1.1, 0.8, 200_001, dtype=torch.float64)[:, None].float().double()
    y, z = run(original, x), run(small, x)
    differ = (y.argmax(1) != z.argmax(1)) & untied(z)
    tie = ~untied(z)
    found = tr.equivalent(original, small, stars, top1=True)
    if bool(differ.any()):
        assert found.answer == (NO,)
    elif not bool(tie.any()):
        assert found.answer == (YES,)
    else:
        assert found.answer != (YES,)
    assert_true(found, original, small, stars)


def test_labels_need_two_outputs():
    path = require_data("mlperf_tiny", "hello_world_int8.tflite")
    network = tr.load(path)
    x = torch.linspace(0, 2 * math.pi, 500)[:, None]
    with pytest.raises(ShapeError, match="at least two outputs, got one"):
        tr.audit(network, network, x)


def ended_chain(seed: int) -> bytes:
    """A random chain of LiteRT's kernels, a softmax behind it."""
    from tests.test_tflite import Chain

    class Ended(Chain):
        def end(self, **options: bool) -> None:
            super().end(**options)
            out = self.model.tensor((1, 5), scale=1 / 256, zero=-128)
            self.scores, self.at = self.at, self.model.add("SOFTMAX", [self.at], out, "SoftmaxOptions", beta=1.0)

    return Ended(seed).build()


@pytest.mark.parametrize("seed", range(3))
def test_files_of_litert_are_audited_by_their_own_codes(seed, tmp_path):
    """Labels are those of the codes before the softmax."""
    (tmp_path / "chain.tflite").write_bytes(ended_chain(seed))
    network = tr.load(tmp_path / "chain.tflite")
    twin = tr.weight_only(network.scores(), network.shape).double()
    g = torch.Generator().manual_seed(seed)
    x = network.entry.value(torch.randint(-128, 128, (200, *network.shape), generator=g)).float()
    found = tr.audit(twin, network, x)
    y, z = twin(x.double()).flatten(1), network.scores()(x).double()
    assert torch.equal(found.label[1][untied(z)], z.argmax(1)[untied(z)])
    top = [part >= part.amax(1, keepdim=True) - 1e-9 for part in (y, z)]  # outputs that may be the label
    for b, one in enumerate(found.answer):
        first, second = (set(part[b].nonzero().flatten().tolist()) for part in top)
        apart = len(first) == 1 and not first & second
        assert one is (NO if apart else YES if first == second and len(first) == 1 else UNKNOWN)
    assert not found.depends.any()
    stars = tr.StarBatch.from_box(x[:10] - 0.02, x[:10] + 0.02)
    ball = tr.equivalent(twin, network, stars, top1=True, budget=tr.Budget(seconds=2))
    near = x[:10, None] + 0.02 * (2 * torch.rand(10, 300, *network.shape, generator=g) - 1)
    with torch.no_grad():
        labels = [
            part.flatten(1).argmax(1).reshape(10, 300)
            for part in (twin(near.flatten(0, 1).double()), network.scores()(near.flatten(0, 1)))
        ]
    for b, one in enumerate(ball.answer):
        assert one is not YES or bool((labels[0][b] == labels[1][b]).all())


@pytest.mark.parametrize("kernels", ["here", "exact", "saturating", "any"])
def test_points_are_decided_exactly(kernels):
    original, small, _ = steep(3, 1.0)
    x = 2 * torch.rand(400, 3, generator=torch.Generator().manual_seed(0)) - 1
    found = tr.audit(original, small, x, kernels=kernels, labels=run(original, x).argmax(1))
    y, z = run(original, x), run(small, x)
    same = y.argmax(1) == z.argmax(1)
    known = torch.tensor([one is not UNKNOWN for one in found.answer])
    says = torch.tensor([one is YES for one in found.answer])
    if kernels in ("here", "any"):
        assert torch.equal(says[known], same[known])
        assert bool((known | ~untied(z) | found.depends).all())  # only ties and codes in doubt are open
        assert torch.equal(found.label[1][untied(z)], z.argmax(1)[untied(z)])
        off = (y - z).abs().amax(1)
        assert bool((off <= found.upper.double() * (1 + 1e-6) + 1e-6).all())
        assert bool((off >= found.lower.double() * (1 - 1e-6) - 1e-6).all())
        low, high = found.accuracy[1]
        assert low <= float(same.double().mean()) <= high
    assert found.accuracy[0] == (1.0, 1.0)
    for b, one in enumerate(found.answer):
        single = (
            tr.equivalent(
                original, small, tr.StarBatch.from_box(x[b : b + 1], x[b : b + 1]), top1=True, kernels=kernels
            )
            if b < 20
            else None
        )
        assert single is None or single.answer[0] is one


def test_a_label_that_depends_on_the_machine_is_named():
    """Sums of weights of 8 bits saturate in pairs: on some inputs another label comes out than of exact sums."""
    torch.backends.quantized.engine = "fbgemm"
    original, small, _ = case(0)
    x = 2 * torch.rand(3000, 3, generator=torch.Generator().manual_seed(1)) - 1
    both, exact, pairs = (tr.audit(small, small, x, kernels=kernels) for kernels in ("any", "exact", "saturating"))
    assert both.count(YES) == len(x)  # one network on one machine agrees with itself
    assert int(both.depends.sum()) > 0
    apart = exact.label[1] != pairs.label[1]
    assert bool(both.depends[apart & ~exact.depends & ~pairs.depends].all())


def test_ties_are_neither_certified_nor_refuted():
    network = nn.Sequential(nn.Linear(2, 2, dtype=torch.float64))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(2))
        network[0].bias.zero_()
    small = nn.Sequential(Quantizer(0.5, 0, -8, 7), copy.deepcopy(network[0]), Quantizer(0.5, 0, -8, 7))
    x = torch.tensor([[1.1, 0.9], [2.0, 0.0], [0.5, 0.5]])
    found = tr.audit(network, small, x)
    assert found.answer == (UNKNOWN, YES, UNKNOWN)
    assert found.reasons[0] is found.reasons[2] is tr.Reason.TIE
    assert not found.depends.any()
    stars = tr.StarBatch.from_box(x, x)
    ended = tr.equivalent(network, small, stars, top1=True)
    assert ended.answer == found.answer
    assert ended.reasons == found.reasons


def test_a_pair_whose_label_changes_has_a_witness():
    original, small, x = steep(1, 1.0)
    negated = copy.deepcopy(original)
    with torch.no_grad():
        negated[-1].weight.neg_()
        negated[-1].bias.neg_()
    stars = tr.StarBatch.from_image(x[None], 0.05)
    assert_true(found := tr.equivalent(negated, small, stars, top1=True), negated, small, stars)
    assert found.answer == (NO,)
    audited = tr.audit(negated, small, x[None])
    assert audited.answer == (NO,)
    assert torch.equal(audited.witness, x[None].float())


def test_the_budget_leaves_the_rest_open():
    original, small, _ = steep(1, 1.0)
    x = 2 * torch.rand(9000, 3, generator=torch.Generator().manual_seed(0)) - 1
    found = tr.audit(original, small, x, budget=tr.Budget(seconds=1e-3))
    assert found.answer[-1] is UNKNOWN
    assert found.reasons[-1] is tr.Reason.BUDGET
    assert found.answer[0] is not UNKNOWN or found.reasons[0] is not tr.Reason.BUDGET  # the first batch is done
    assert int(found.label[0, -1]) == -1
    stars = tr.StarBatch.from_image(x[:50], 0.1)
    ended = tr.equivalent(original, small, stars, top1=True, budget=tr.Budget(seconds=1e-3))
    assert ended.answer[-1] is UNKNOWN
    assert bool((ended.lower <= ended.upper).all())


def test_an_audit_of_balls_holds_for_samples():
    original, small, _ = steep(1, 6.0)
    x = (2 * torch.rand(12, 3, generator=torch.Generator().manual_seed(0)) - 1).clamp(-0.8, 0.8)
    found = tr.audit(original, small, x, eps=0.02, clip=(-1.0, 1.0), budget=tr.Budget(seconds=6))
    assert YES in found.answer
    near = x[:, None] + 0.02 * (2 * torch.rand(12, 800, 3, generator=torch.Generator().manual_seed(1)) - 1)
    y, z = (run(network, near.flatten(0, 1)).reshape(12, 800, 3) for network in (original, small))
    differ = ((y.argmax(2) != z.argmax(2)) & untied(z.flatten(0, 1)).reshape(12, 800)).any(1)
    for b, one in enumerate(found.answer):
        assert not (one is YES and bool(differ[b]))
        if one is NO:
            w = found.witness[b : b + 1]
            assert int(run(original, w).argmax()) != int(run(small, w).argmax())
    assert bool(((y - z).abs().amax((1, 2)) <= found.upper.double() + 1e-6).all())


def test_float_pairs_are_audited_too():
    original = random_network(4, [3, 10, 4])
    small = tr.quantize_weights(original, bits=4)
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, z = run(original, x), run(small, x)
    found = tr.audit(original, small, x, labels=y.argmax(1))
    assert [one is YES for one in found.answer] == (y.argmax(1) == z.argmax(1)).tolist()
    assert found.semantics == "weight-only"
    assert float(found.upper.max()) == pytest.approx(float((y - z).abs().max()), rel=1e-9)
    softmax = tr.audit(nn.Sequential(original, nn.Softmax(1)), nn.Sequential(small, nn.Softmax(1)), x)
    assert softmax.answer == found.answer
    assert tr.audit(original, original, x).count(YES) == 300


# -- the rule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [None, 0.3, 0.5, 0.9])
def test_the_rule_holds_for_all_outputs_in_random_ranges(p):
    """Boxes of y and z, and of their difference: where the rule says yes, no sample of both differs."""
    g = torch.Generator().manual_seed(0)
    counts = [0, 0]
    for _ in range(300):
        y0 = 4 * torch.rand(1, generator=g) * torch.randn(4, generator=g).double()
        near = 3 * 10 ** float(-2 * torch.rand(1, generator=g))
        wide = float(3 * torch.rand(1, generator=g))
        y = y0 + wide * (2 * torch.rand(400, 4, generator=g).double() - 1)
        z = y + near * (2 * torch.rand(400, 4, generator=g).double() - 1)
        low, high = (y0 - wide)[None], (y0 + wide)[None]
        first, second = leads(low, high), leads(low - near, high + near)
        apart = torch.full((1, 4, 4), 2 * near).double()
        missed = Leads(first, second, apart).missed(odds(p)[0])
        sure = torch.ones(400, dtype=torch.bool) if p is None else y.softmax(1).amax(1) >= p
        if float(missed) < 0:
            counts[0] += 1
            assert bool((y.argmax(1) == z.argmax(1))[sure].all())
        counts[1] += float(missed) == -math.inf
        assert bool(asked(first, odds(p)[0])[0][y.argmax(1)[sure]].all())
    assert 0 < counts[0] < 300
    assert (counts[1] > 0) == (p in (0.5, 0.9))


def test_float_networks_agree_wherever_the_original_is_sure():
    """Labels change in the box, and so in both networks: only with a confidence are they certified to agree."""
    original = random_network(2, [2, 10, 3])
    with torch.no_grad():
        original[-1].weight.mul_(8)
    small = tr.quantize_weights(original, bits=8)
    stars = tr.StarBatch.from_box(-torch.ones(1, 2).double(), torch.ones(1, 2).double())
    x = stars.sample(20_000)[0]
    y, z = run(original, x), run(small, x)
    assert len(y.argmax(1).unique()) > 1
    worst = float(y.softmax(1).amax(1)[y.argmax(1) != z.argmax(1)].amax())
    assert tr.equivalent(original, small, stars, top1=True).answer == (NO,)
    found = tr.equivalent(original, small, stars, top1=True, confidence=0.9)
    assert found.answer == (YES,)
    assert found.reasons == (tr.Reason.WITHIN,)
    assert "wherever the original is sure to 0.9" in repr(found)
    below = tr.equivalent(original, small, stars, top1=True, confidence=min(worst, 0.49))
    assert below.answer == (NO,)
    w = below.witness
    assert float(run(original, w).softmax(1).max()) >= min(worst, 0.49)
    assert int(run(original, w).argmax()) != int(run(small, w).argmax())
    ended = nn.Sequential(original, nn.Softmax(1)), nn.Sequential(small, nn.LogSoftmax(1))
    assert tr.equivalent(*ended, stars, top1=True, confidence=0.9).answer == (YES,)


def test_an_original_that_is_nowhere_sure_says_so():
    original = random_network(2, [2, 10, 3])
    with torch.no_grad():
        original[-1].weight.mul_(0.01)
        original[-1].bias.zero_()
    stars = tr.StarBatch.from_box(-torch.ones(1, 2).double(), torch.ones(1, 2).double())
    found = tr.equivalent(original, random_network(3, [2, 5, 3]), stars, top1=True, confidence=0.9)
    assert found.answer == (YES,)
    assert found.reasons == (tr.Reason.NEVER_SURE,)


def test_points_by_rows():
    """Two rows of a point whose labels differ are two labels; a tie within one row is a tie."""
    index = torch.tensor([0, 0, 1, 2])
    y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 1.0]]).double()
    may, every = may_give((index, y, y), 3)
    assert every.tolist() == [[False, False], [True, True], [True, False]]
    assert may.tolist() == [[True, True], [True, True], [True, False]]
    assert ties((index, y, y), 3).tolist() == [False, True, False]
    assert agree(may, may).tolist() == [False, False, True]
    assert (apart_by((y, y), (y.flip(1), y.flip(1))) > 0).tolist() == [True, True, False, True]


def test_bad_questions_are_named():
    original, small, x = case(0)
    stars = tr.StarBatch.from_image(x[None], 0.01)
    for p in (0, 1, -0.5, float("nan"), "much"):
        with pytest.raises(OptionError, match=r"confidence must lie between 0 and 1, both excluded, or be None"):
            tr.equivalent(original, small, stars, top1=True, confidence=p)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="it needs top1=True"):
        tr.equivalent(original, small, stars, 0.1, confidence=0.9)
    with pytest.raises(OptionError, match="do not round activations"):
        tr.equivalent(original, small, stars, top1=True, arithmetic="real")
    with pytest.raises(OptionError, match="kernels must be one of"):
        tr.equivalent(original, small, stars, top1=True, kernels="all")
    points = x[None]
    for arguments, error, message in (
        ((points, -1.0), OptionError, "eps must be a finite number >= 0"),
        ((points[0],), ShapeError, r"points must be inputs \[B, \*shape\]"),
        ((points.long(),), ShapeError, "points must be floating-point numbers, got int64"),
        ((points * math.nan,), InvalidSetError, "points must be finite, got 3"),
        ((points, 0.0, torch.zeros(2)), ShapeError, "labels must be one number for each of 1 inputs"),
        ((points, 0.0, torch.tensor([0.5])), ShapeError, "labels must be whole numbers"),
        ((points, 0.0, np.array([7])), ShapeError, "labels must lie in 0 to 2"),
        ((torch.zeros(2, 5),), ShapeError, ""),
    ):
        with pytest.raises(error, match=message):
            tr.audit(original, small, *arguments)


def test_a_result_is_kept_in_a_file(tmp_path):
    original, small, x = case(0)
    found = tr.audit(original, small, x[None], confidence=0.4)
    tr.save_result(found, tmp_path / "found.pt")
    again = tr.load_result(tmp_path / "found.pt")
    assert isinstance(again, tr.Audit)
    assert again.answer == found.answer
    assert again.reasons == found.reasons
    assert repr(again) == repr(found)


def test_steps_of_a_deployed_network_are_read_as_executed():
    _, small, x = case(0)
    stars = tr.StarBatch.from_image(x[None], 0.0)
    reading = rule.Reading.of(small, stars, None, "here", given=True, smooth=False)
    assert len(reading.steps) == len(executed_steps(small, (3,)))
    low, high = reading.here(x[None].float().double())
    assert torch.allclose((low + high) / 2, run(small, x[None]))
