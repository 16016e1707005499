"""Networks that end in Softmax or LogSoftmax: probabilities compared through the scores before them.

Of scores y (one network) and y - d (the other), probability i is s(l), s the logistic function, of the lead

    l = y_i - log sum_{j != i} exp y_j          p_i = exp y_i / (exp y_i + sum_{j != i} exp y_j) = s(l)

With q the first network's probabilities among the outputs j != i alone, the leads differ by

    t = l1 - l2 = d_i + log sum_{j != i} q_j exp(-d_j)

For d certified in [a, b] and q in a box of its own, sum q_j exp(-a_j) is largest, as sum q_j = 1, where what the lower
ends of q leave over goes to the outputs with the largest exp(-a_j) first; and likewise for the smallest. An output that
dominates the others outweighs them here, too. Now p1 - p2 = s(l) - s(l - t) rises in t. For fixed t its slope in l,
s'(l) - s'(l - t), vanishes at l = t / 2 alone, as s' is even and falls away from 0. So over l in an interval it is
largest and least at an end or at t / 2. For LogSoftmax log s takes the place of s: its slope falls, so that the ends of
l are enough.

Property: sound. What the ranges of different d_j have to do with each other, and with l, is given up: even with exact
ranges of the scores' differences the result need not be exact.

Axis letters: S stars, N outputs, B points.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from torchreach.core.clock import Clock
from torchreach.core.errors import UnsupportedLayerError
from torchreach.core.results import Discrepancy
from torchreach.core.roundoff import allowance, gamma
from torchreach.core.terms import Reason, Status
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.domains.zonotope import box_rows, zonotope_bounds
from torchreach.graph.layers import SOFTMAX
from torchreach.graph.smooth import smooth
from torchreach.graph.steps import Step
from torchreach.read.module import chain
from torchreach.read.steps import steps
from torchreach.search.result import Question
from torchreach.sets.star import StarBatch
from torchreach.verbs.first_look import evaluate
from torchreach.verbs.reach import replay, with_ends

SAMPLES, STEPS = 64, 20


def scores(network: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, type[nn.Module] | None]:
    """The network without a last Softmax or LogSoftmax, and which of them that was. Raises as `chain`."""
    layers = chain(network, shape)
    if len(layers) and isinstance(layers[-1], SOFTMAX):
        return nn.Sequential(*layers[:-1]), next(kind for kind in SOFTMAX if isinstance(layers[-1], kind))
    return network, None


def both_scores(
    original: nn.Module, compressed: nn.Module, shape: tuple[int, ...]
) -> tuple[nn.Module, nn.Module, type[nn.Module] | None]:
    """Both networks without their last Softmax or LogSoftmax, and which of them that was.

    Raises: UnsupportedLayerError: only one of them ends so, or they end in different ones.
    """
    first, kind = scores(original, shape)
    second, other = (first, kind) if compressed is original else scores(compressed, shape)
    if kind is not other:
        names = [part.__name__ if part else "neither Softmax nor LogSoftmax" for part in (kind, other)]
        raise UnsupportedLayerError(
            f"both networks must end in the same layer, but the original ends in {names[0]} and the compressed one in "
            f"{names[1]}: leave it out of both, or add it to both"
        )
    return first, second, kind


def asked_of_scores(question: Question, kind: type[nn.Module]) -> Question:
    """What to ask about the scores, so that what is left open of them moves no probability by more than the gap.

    Two ends of d move t by twice that much; s has slopes up to 1/4, log s up to 1.
    """
    if question == Question("signed"):
        return question
    share = 0.5 if kind is nn.LogSoftmax else 2.0
    if question.threshold > -torch.inf:
        return Question("outputs", max(1e-9, 1e-2 * question.threshold * share))
    return replace(question, tolerance=question.tolerance * share)


@torch.no_grad()
def probabilities(
    found: Discrepancy,
    networks: tuple[nn.Module, nn.Module],
    kind: type[nn.Module],
    stars: StarBatch,
    question: Question,
    clock: Clock,
) -> Discrepancy:
    """The discrepancy of the probabilities, from that of the scores, `found`, of `networks` without their last layer.

    Guarantee: as `discrepancy`; `lower` is attained at `witness`, replayed.
    """
    first, second = (
        steps(network, stars.shape, dtype=COMPUTE_DTYPE, device=stars.device, smooth=True) for network in networks
    )
    low, high = stars.bounding_box()[:2]
    y = zonotope_bounds(first, *box_rows(low, high), clock=clock)[-1]
    bottom, top = bounds(y, (found.range_lower.double(), found.range_upper.double()), kind)
    lower, witness = _attained(first, second, kind, found.witness, stars, clock)
    found = with_ends(found, lower.clamp(min=0), bottom, top, witness)
    exact = (status is Status.EXACT for status in found.status)
    ends = zip(found.lower, found.upper, found.reasons, exact, strict=True)
    return replace(found, reasons=tuple(_reason(question, *end) for end in ends))


def bounds(y: tuple[Tensor, Tensor], d: tuple[Tensor, Tensor], kind: type[nn.Module]) -> tuple[Tensor, Tensor]:
    """Range [S, N] of p1 - p2, from ranges of the first network's scores y and of the scores' differences d."""
    (low, high), (a, b) = y, d
    if low.shape[1] == 1:  # the probability is 1
        return torch.zeros_like(a), torch.zeros_like(b)
    lead_low, lead_high = low - _but_own(high).logsumexp(2), high - _but_own(low).logsumexp(2)
    low_q, high_q = _among_others(low, high)
    above, below = (torch.exp(-_but_own(end)) for end in (a, b))
    most = b + _largest_mean(above, low_q, high_q).log()
    least = a + (-_largest_mean(-below, low_q, high_q)).clamp(min=1e-300).log()
    size = torch.maximum(low.abs(), high.abs()).amax(1, keepdim=True) + 4 * low.shape[1]
    far = torch.maximum(a.abs(), b.abs()).amax(1, keepdim=True)
    off = allowance(size + far, 8)
    lead_low, lead_high, least, most = lead_low - off, lead_high + off, least - off, most + off
    f = smooth(nn.LogSigmoid() if kind is nn.LogSoftmax else nn.Sigmoid())
    ends = []
    for t in (least, most):
        at = torch.stack((lead_low, lead_high, (t / 2).clamp(lead_low, lead_high)))
        values = f.value(at) - f.value(at - t)
        error = (f.error(at) + f.error(at - t) + allowance(at.abs() + t.abs() + values.abs())).amax(0)
        ends.append((values.amin(0) - error, values.amax(0) + error))
    same = ((a == 0) & (b == 0)).all(1, keepdim=True)  # equal scores
    return torch.where(same, 0.0, ends[0][0]), torch.where(same, 0.0, ends[1][1])


def _but_own(value: Tensor) -> Tensor:
    """[S, N, N - 1] of each row all numbers but the one at hand."""
    n = value.shape[1]
    other = ~torch.eye(n, dtype=torch.bool, device=value.device)
    return value[:, None].expand(-1, n, -1)[:, other].reshape(len(value), n, n - 1)


def _among_others(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges [S, N, N - 1] of the probabilities of all outputs but the one at hand, from scores in [low, high].

    exp y_j / (exp y_j + rest): least for the lowest y_j and the highest others. The rest is a difference of sums, off
    by 2 n u of the larger.
    """
    low, high = _but_own(low), _but_own(high)
    top = high.amax(2, keepdim=True)
    least, most = (low - top).exp(), (high - top).exp()
    rests = []
    for size, sign in ((most, 1), (least, -1)):
        total = size.sum(2, keepdim=True)
        rests.append((total - size + sign * 8 * gamma(size.shape[2]) * total).clamp(min=0))
    shrunk = 1 - allowance(1 + top.abs() + low.abs(), 64)  # for the arguments of exp
    low_q = least / (least + rests[0]).clamp(min=1e-300) * shrunk.clamp(min=0)
    high_q = most / (most + rests[1]).clamp(min=1e-300) / shrunk.clamp(min=0.5)
    return low_q, high_q.clamp(max=1)


def _largest_mean(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """[...] largest sum q value [..., N] for low <= q <= high, sum q = 1."""
    order = value.argsort(-1, descending=True)
    value, low, high = (part.gather(-1, order) for part in (value, low, high))
    room, left = high - low, (1 - low.sum(-1, keepdim=True)).clamp(min=0)
    given = torch.minimum((left - room.cumsum(-1) + room).clamp(min=0), room)
    over = (left - given.sum(-1, keepdim=True)).clamp(min=0)[..., 0]  # rounding has left no room for it
    mean = ((low + given) * value).sum(-1) + over * value[..., 0]
    return mean + 16 * gamma(value.shape[-1]) * value.abs().amax(-1)


def _attained(
    first: tuple[Step, ...],
    second: tuple[Step, ...],
    kind: type[nn.Module],
    witness: Tensor,
    stars: StarBatch,
    clock: Clock,
) -> tuple[Tensor, Tensor]:
    """Largest |p1 - p2| [S, N] met, less the rounding of its replay, and where [S, N, *shape].

    Tried: where the scores' differences are largest, samples, and, on boxes, gradient ascent from the best of these.
    """
    low, high, is_box = stars.bounding_box()
    x = torch.cat((witness, stars.sample(SAMPLES).to(witness.dtype)), 1)
    best, at = _offer(first, second, kind, x)
    for step in range(STEPS if bool(is_box.all()) else 0):
        if clock.over:
            break
        with torch.enable_grad():
            leaf = at.flatten(2).double().requires_grad_()
            p = [_last(kind, evaluate(network, leaf)) for network in (first, second)]
            value = (p[0] - p[1]).diagonal(dim1=1, dim2=2).abs().sum()
            (gradient,) = torch.autograd.grad(value, leaf)
        pace = 0.5 * 0.8**step * (high - low)[:, None] / 2
        moved = torch.minimum(torch.maximum(leaf.detach() + pace * gradient.sign(), low[:, None]), high[:, None])
        x = torch.cat((at, moved.reshape(at.shape).to(at.dtype)), 1)
        new, where = _offer(first, second, kind, x)
        better = new > best
        best = torch.where(better, new, best)
        at = torch.where(better.reshape(*better.shape, *[1] * len(stars.shape)), where, at)
    return best, at


def _offer(
    first: tuple[Step, ...], second: tuple[Step, ...], kind: type[nn.Module], x: Tensor
) -> tuple[Tensor, Tensor]:
    """Of inputs x [S, B, *shape]: the largest |p1 - p2| [S, N], less rounding, and where [S, N, *shape]."""
    size, count = x.shape[:2]
    values, errors = [], []
    for network in (first, second):
        y, error = replay(network, x.flatten(0, 1))
        values.append(_last(kind, y))
        # A probability moves by at most half of what the scores move, its logarithm by twice that much.
        own = allowance(y.shape[1] + y.abs().amax(1, keepdim=True), 16)
        errors.append(2 * error.amax(1, keepdim=True) + own)
    value = ((values[0] - values[1]).abs() - errors[0] - errors[1]).reshape(size, count, -1)
    best, index = value.max(1)
    return best, x[torch.arange(size, device=x.device)[:, None], index]


def _last(kind: type[nn.Module], y: Tensor) -> Tensor:
    return y.log_softmax(-1) if kind is nn.LogSoftmax else y.softmax(-1)


def _reason(question: Question, lower: Tensor, upper: Tensor, before: Reason, exact: bool) -> Reason:
    if settled := question.settled(lower, upper):
        return settled
    if exact:
        return Reason.CLOSED
    if bool((upper - lower <= question.tolerance).all()):
        return Reason.GAP
    return before if before in (Reason.BUDGET, Reason.INTERRUPTED) else Reason.NUMERICAL
