"""Discrepancy of networks as they are executed in floating point: float16, bfloat16, float32 or float64.

    y1 - y2 as executed  =  (y1 - y2 of the real-valued networks)  -  (y1 - executed y1)  +  (y2 - executed y2)

The first term is compared as ever (`verbs.float_pair`), the others are bounded by `domains.execution`; the certified
range is their sum. A lower bound is what this machine's kernels give: both modules, as they are, run on inputs of the
set. It is attained here; other kernels within the certified range may attain another value at that input.

Axis letters: S stars, N outputs, B inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import InvalidNetworkError, KernelMismatchError, OptionError
from torchreach.core.results import Discrepancy, Reason, Semantics, Status
from torchreach.core.roundoff import allowance, round_down, round_up
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.domains.execution import Format, rounding
from torchreach.domains.graph_execution import graph_rounding
from torchreach.graph.lowering import Graph
from torchreach.graph.steps import Step
from torchreach.graph.weights import evaluation_mode
from torchreach.read.module import graph
from torchreach.read.steps import steps
from torchreach.search.result import Question
from torchreach.sets.star import StarBatch
from torchreach.verbs.reach import replay, with_ends

log = logging.getLogger(__name__)

ARITHMETIC = (None, "real", "executed")
HALF = (torch.float16, torch.bfloat16)
SEMANTICS = {
    torch.float16: Semantics.FLOAT16,
    torch.bfloat16: Semantics.BFLOAT16,
    torch.float32: Semantics.FLOAT32,
    torch.float64: Semantics.FLOAT64,
}
# Inputs that are executed in search of a lower bound: of all stars together, at random and then around the best.
POINTS, ROUNDS, NEAR = 2048, 3, 8

Formats = tuple[Format | None, Format | None]


def formats(original: nn.Module, compressed: nn.Module, arithmetic: str | None) -> Formats:
    """The format each network is executed in; None where it is read as a real-valued function.

    arithmetic: "real", "executed", or None: executed where a network has parameters in half precision.

    Raises: OptionError; InvalidNetworkError: both half precisions in one network that is to be read as executed.
    """
    if arithmetic not in ARITHMETIC:
        raise OptionError(f"arithmetic must be 'real', 'executed' or None, got {arithmetic!r}")
    if arithmetic == "real":
        return None, None
    return _format(original, arithmetic), _format(compressed, arithmetic)


def _format(network: nn.Module, arithmetic: str | None) -> Format | None:
    values = (*network.parameters(), *network.buffers())
    dtypes = {value.dtype for value in values if value.is_floating_point()}
    half = [dtype for dtype in HALF if dtype in dtypes]
    if len(half) > 1:
        raise InvalidNetworkError(
            "a network as executed must have one half precision, got float16 and bfloat16; arithmetic='real' reads it "
            "as a real-valued function"
        )
    if half:
        return Format(half[0])
    if arithmetic is None or not dtypes:
        return None
    return Format(torch.float32 if torch.float32 in dtypes else torch.float64)


def semantics_of(kinds: Formats) -> Semantics:
    """What a result says of networks in these formats: that of the compressed one first."""
    kind = kinds[1] or kinds[0]
    return Semantics.FLOAT if kind is None else SEMANTICS[kind.dtype]


@dataclass(frozen=True)
class Side:
    """One network of a comparison, and the format it is executed in, None where it is read as real-valued."""

    module: nn.Module
    steps: tuple[Step, ...]
    kind: Format | None
    graph: Graph | None = None  # of a network that is no chain and is executed

    @staticmethod
    def of(module: nn.Module, stars: StarBatch, kind: Format | None) -> Side:
        """Raises as `steps`."""
        own = steps(module, stars.shape, dtype=COMPUTE_DTYPE, device=stars.device, smooth=True)
        if kind is None or any(step.curves for step in own):
            return Side(module, own, kind)
        read = graph(module, stars.shape)
        return Side(module, own, kind, None if read.is_chain() else read)

    def rounding(self, low: Tensor, high: Tensor, clock: Clock, *, rounded: bool = False) -> tuple[Tensor, Tensor]:
        """Bounds [S, N] on (real - executed) over boxes [S, N_in]: zero where the network is read as real-valued."""
        if self.kind is None:
            zero = low.new_zeros(len(low), self.steps[-1].features)
            return zero, zero
        if self.graph is not None:
            return graph_rounding(self.graph, low, high, self.kind, rounded=rounded, clock=clock)
        return rounding(self.steps, low, high, self.kind, rounded=rounded, clock=clock)

    @torch.no_grad()
    def values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [B, N] at x [B, *shape] in float64, run in the network's own format, and a bound on their error."""
        if self.kind is None:
            return replay(self.steps, x)
        device = next(iter((*self.module.parameters(), *self.module.buffers()))).device
        with evaluation_mode(self.module):
            y = self.module(x.to(device, self.kind.dtype)).flatten(1).to(x.device, COMPUTE_DTYPE)
        return y, torch.zeros_like(y)


@torch.no_grad()
def as_executed(
    original: nn.Module,
    compressed: nn.Module,
    stars: StarBatch,
    kinds: Formats,
    question: Question,
    real: Callable[[StarBatch, Question], Discrepancy],
    clock: Clock = NO_LIMIT,
) -> Discrepancy:
    """The discrepancy of two networks of which one at least is read as executed.

    real: the discrepancy of the real-valued networks, asked on other stars and for another threshold.

    Raises: as `rounding`; KernelMismatchError: this machine's kernels left the certified range.
    """
    semantics = semantics_of(kinds)
    if original is compressed:  # one module gives one answer, however it rounds
        return replace(real(stars, question), semantics=semantics)
    sides = tuple(Side.of(module, stars, kind) for module, kind in zip((original, compressed), kinds, strict=True))
    low, high, is_box = stars.bounding_box()
    # Two networks in one format are given the same rounded input.
    shared = kinds[0] == kinds[1] and bool(is_box.all()) and stars.dtype not in HALF
    asked = stars
    if shared:
        kind = kinds[0]
        assert kind is not None
        low, high = kind.rounded(low), kind.rounded(high)
        asked = StarBatch.from_box(*(end.reshape(-1, *stars.shape).to(stars.dtype) for end in (low, high)))
    (low1, high1), (low2, high2) = (side.rounding(low, high, clock, rounded=shared) for side in sides)
    below, above = low2 - high1, high2 - low1  # what execution adds to y1 - y2
    loss = torch.maximum(-below, above)
    found = real(asked, _before_rounding(question, float(loss.max())))
    result = _Result(stars, sides, semantics, question, found, below, above)
    result.attain(clock)
    # The largest loss of all stars and outputs was taken off the threshold; those with less may still be settled.
    for s in result.undecided(loss):
        if clock.over:
            break
        gap = max(question.tolerance, 1e-2 * float(loss[s].max()))
        result.take(s, real(asked.select([s]), Question("outputs", gap)))
    return result.finish()


@torch.no_grad()
def widened(
    deployed: Callable[[Question], Discrepancy],
    original: nn.Module,
    stars: StarBatch,
    kind: Format | None,
    question: Question,
    clock: Clock,
) -> Discrepancy:
    """The discrepancy of a deployed network from the original as executed, where `kind` is its format.

    deployed: answers a question about the discrepancy from the original as a real-valued function.
    """
    if kind is None:
        return deployed(question)
    low, high, _ = stars.bounding_box()
    below, above = Side.of(original, stars, kind).rounding(low, high, clock)
    loss = torch.maximum(-below, above)
    found = deployed(_before_rounding(question, float(loss.max())))
    dtype = stars.dtype
    range_lower = round_down(found.range_lower.to(COMPUTE_DTYPE) - above, dtype)
    range_upper = round_up(found.range_upper.to(COMPUTE_DTYPE) - below, dtype)
    found = replace(
        found,
        lower=round_down(found.lower.to(COMPUTE_DTYPE) - loss, dtype).clamp(min=0),
        upper=torch.maximum(-range_lower, range_upper).clamp(min=0),
        range_lower=range_lower,
        range_upper=range_upper,
        status=(Status.BOUNDED,) * len(stars),
    )
    undone = (Reason.EXCEEDED, Reason.WITHIN, Reason.CLOSED, Reason.GAP)
    reasons = (
        question.settled(lower, upper) or (Reason.ROUNDING if before in undone else before)
        for lower, upper, before in zip(found.lower, found.upper, found.reasons, strict=True)
    )
    return replace(found, reasons=tuple(reasons))


def _before_rounding(question: Question, loss: float) -> Question:
    if question.threshold == -torch.inf:
        return question
    return replace(question, threshold=max(question.threshold - loss, 0.0))


@dataclass
class _Result:
    """What is certified and attained so far of the networks as executed."""

    stars: StarBatch
    sides: tuple[Side, ...]
    semantics: Semantics
    question: Question
    found: Discrepancy
    below: Tensor  # [S, N] what execution adds to y1 - y2 at least
    above: Tensor

    def __post_init__(self) -> None:
        found, shape = self.found, self.stars.shape
        self.range_lower = found.range_lower.to(COMPUTE_DTYPE) + self.below
        self.range_upper = found.range_upper.to(COMPUTE_DTYPE) + self.above
        low, high, is_box = self.stars.bounding_box()
        inside = torch.minimum(torch.maximum(found.witness.flatten(2), low[:, None]), high[:, None])
        self.witness = torch.where(is_box[:, None, None], inside, found.witness.flatten(2)).to(self.stars.dtype)
        self.witness = self.witness.reshape(*found.witness.shape[:2], *shape)
        # Whatever the kernels: what the real-valued networks attain there, less all rounding.
        self.lower = (found.lower.to(COMPUTE_DTYPE) - torch.maximum(-self.below, self.above)).clamp(min=0)
        if found.witness.dtype != self.witness.dtype or not torch.equal(found.witness, self.witness):
            self.lower = torch.zeros_like(self.lower)
        self.reasons = list(found.reasons)

    def attain(self, clock: Clock) -> None:
        """Runs the modules on the witnesses, at random and around the best inputs, and keeps what differs most."""
        stars = self.stars
        count = max(POINTS // len(stars), 4)
        x = torch.cat((self.witness, stars.center[:, None].to(stars.dtype), stars.sample(count).to(stars.dtype)), 1)
        best, at = self._offer(x)
        generator = torch.Generator(device=stars.device).manual_seed(0)
        low, high, is_box = (
            part.to(stars.dtype) if part.is_floating_point() else part for part in stars.bounding_box()
        )
        for near in range(ROUNDS):
            if clock.over:
                break
            n = at.shape[1]
            other = stars.sample(n * NEAR, seed=near + 1).to(stars.dtype)
            start = at.repeat_interleave(NEAR, 1)
            share = torch.rand(other.shape[:2], generator=generator, device=stars.device, dtype=COMPUTE_DTYPE) ** 4
            share = share.to(stars.dtype).reshape(*share.shape, *[1] * len(stars.shape))
            x = (start + share * (other - start)).flatten(2)
            inside = torch.minimum(torch.maximum(x, low[:, None]), high[:, None])
            x = torch.where(is_box[:, None, None], inside, x).reshape(start.shape)
            best, at = self._offer(torch.cat((at, x), 1))
        # The value of a witness is that of its star's witnesses in one batch.
        value, error, ok = self._differences(at)
        if ok:
            size = (value.abs() - error).diagonal(dim1=1, dim2=2)
            better = size > self.lower
            shaped = better.reshape(*better.shape, *[1] * len(stars.shape))
            self.witness = torch.where(shaped, at, self.witness)
            self.lower = torch.where(better, size, self.lower)

    def _offer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of inputs x [S, B, *shape]: largest |y1 - y2| [S, N] and where [S, N, *shape]."""
        value, error, _ = self._differences(x)
        best, index = (value.abs() - error).max(1)
        rows = torch.arange(len(x), device=x.device)[:, None]
        return best, x[rows, index]

    def _differences(self, x: Tensor) -> tuple[Tensor, Tensor, bool]:
        """y1 - y2 [S, B, N] at x [S, B, *shape], a bound on its error, and whether the modules could be run."""
        shape = (*x.shape[:2], -1)
        parts = []
        for side in self.sides:
            try:
                # star by star: kernels may choose their order of summation by the size of the batch
                parts.append([torch.stack(part).reshape(shape) for part in zip(*map(side.values, x), strict=True)])
            except (RuntimeError, NotImplementedError) as error:
                log.warning("a network cannot be run here, so that no value is attained: %s", str(error).split("\n")[0])
                parts.append([part.reshape(shape) for part in replay(side.steps, x.flatten(0, 1))])
                return parts[0][0] * 0, parts[0][0] * 0, False
        (y1, error1), (y2, error2) = parts
        value, error = y1 - y2, error1 + error2 + allowance(y1.abs() + y2.abs(), 10)
        low, high = self.range_lower[:, None] - error, self.range_upper[:, None] + error
        outside = (value < low) | (value > high)
        if bool(outside.any()) or not bool(value.isfinite().all()):
            excess = float(torch.maximum(low - value, value - high).max())
            raise KernelMismatchError(
                f"this machine's kernels leave the certified range {self.semantics.value} by {excess:.3g}: they round "
                "more than each layer's result, or keep sums in less than float32 (reduced-precision reductions, TF32, "
                "autocast); docs/certificates.md lists the flags"
            )
        return value, error, True

    def undecided(self, loss: Tensor) -> list[int]:
        """Stars that neither exceed the threshold nor are certified below it, and still can be: loss [S, N]."""
        largest = self.question.threshold
        if largest == -torch.inf:
            return []
        upper = torch.maximum(-self.range_lower, self.range_upper).amax(1)
        possible = (self.found.lower.to(COMPUTE_DTYPE) + loss <= largest).all(1)
        return ((self.lower.amax(1) <= largest) & (upper > largest) & possible).nonzero().flatten().tolist()

    def take(self, s: int, found: Discrepancy) -> None:
        """Intersects star s with another result of the real-valued networks."""
        self.range_lower[s] = torch.maximum(self.range_lower[s], found.range_lower[0].to(COMPUTE_DTYPE) + self.below[s])
        self.range_upper[s] = torch.minimum(self.range_upper[s], found.range_upper[0].to(COMPUTE_DTYPE) + self.above[s])
        if self.reasons:
            self.reasons[s] = found.reasons[0]

    def finish(self) -> Discrepancy:
        found = with_ends(self.found, self.lower, self.range_lower, self.range_upper, self.witness)
        reasons = tuple(self._reason(s, *ends) for s, ends in enumerate(zip(found.lower, found.upper, strict=True)))
        return replace(found, reasons=reasons, semantics=self.semantics)

    def _reason(self, s: int, lower: Tensor, upper: Tensor) -> Reason:
        if settled := self.question.settled(lower, upper):
            return settled
        before = self.reasons[s] if self.reasons else Reason.ROUNDING
        return before if before in (Reason.BUDGET, Reason.INTERRUPTED, Reason.NUMERICAL) else Reason.ROUNDING
