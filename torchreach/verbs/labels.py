"""When two networks certainly give one label, or certainly two: from bounds on how far outputs lead.

Of outputs y (the original's) and z (the compressed one's), K each, over a set of inputs:

    first[c, j]  >=  y_c - y_j        second[c, j]  >=  z_c - z_j        apart[c, j]  >=  (y_c - y_j) - (z_c - z_j)

In question are the labels c that y may give, and, where a confidence p is asked for, give with a softmax of at least p:

    softmax(y)_c = 1 / (1 + sum_{j != c} exp(y_j - y_c))  >=  p      with t = log(p / (1 - p)):
    lead of c  :=  -log sum_{j != c} exp(y_j - y_c)       >=  t

The lead is at most -log sum_{j != c} exp(-first[c, j]), so c is out of question where that is below t, and where
first[c, j] < 0 for some j. A sum is at least its largest term: the label c of a y that is so sure has y_c - y_j >= s
for every j, s = max(t, 0). Hence

    z_c - z_j  =  (y_c - y_j) - ((y_c - y_j) - (z_c - z_j))  >=  max(s, -first[j, c]) - apart[c, j]

and z has the label c wherever y is that sure of it, if for each j != c this is positive, or second[j, c] < 0. Holds
that for all c in question, then the labels agree on the whole set, whether or not they change in it; is none in
question, the original is nowhere that sure, and nothing could differ. Without a confidence t = -inf and s = 0.

A tie is no label: where two outputs may be equal and largest, nothing is certified and nothing refuted.

Property: sound. Complete at points: there all bounds are values, up to rounding.

Axis letters: B sets of inputs or points, R rows (a point and one of its possible outputs), K labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchreach.core.clock import Clock, OutOfTime
from torchreach.core.errors import OptionError
from torchreach.core.roundoff import SINGLE, above, below
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.domains.execution import Format
from torchreach.domains.input_grid import InputGrid
from torchreach.domains.rounding import outputs
from torchreach.graph.deployed import DeployedNetwork, Softmax
from torchreach.graph.steps import Step
from torchreach.read.steps import steps
from torchreach.sets.star import StarBatch
from torchreach.verbs.executed import Side
from torchreach.verbs.int8_compared import by_point, intervals, narrowed, quantised
from torchreach.verbs.int8_kernels import Executed, Run, check_outputs, executed, runner
from torchreach.verbs.softmax import scores

Rows = tuple[Tensor, Tensor, Tensor]  # of `outputs`: index of the point [R], low and high [R, K]
NUMBERS = 2**22  # in one intermediate tensor of leads
SHARE = 1e-12  # relative: more than what log, and sums of exp, lose


def check_confidence(confidence: float | None) -> None:
    """Raises OptionError."""
    if confidence is not None and not (isinstance(confidence, int | float) and 0 < confidence < 1):
        raise OptionError(f"confidence must lie between 0 and 1, both excluded, or be None, got {confidence!r}")


def odds(confidence: float | None) -> tuple[float, float]:
    """Ends around t = log(p / (1 - p)); -inf without a confidence."""
    if confidence is None:
        return -math.inf, -math.inf
    value = math.log(confidence) - math.log1p(-confidence)
    slack = SHARE * (1 + abs(value))
    return value - slack, value + slack


def leads(low: Tensor, high: Tensor) -> Tensor:
    """Upper bounds [B, K, K] on y_c - y_j for outputs between low and high [B, K]; 0 on the diagonal."""
    lead = above(high[:, :, None] - low[:, None, :])
    return lead.masked_fill(torch.eye(low.shape[1], dtype=torch.bool, device=low.device), 0.0)


def asked(first: Tensor, least: float) -> Tensor:
    """[B, K] which labels are in question, from upper bounds `first` [B, K, K]; least: lower end of `odds`."""
    possible = (first >= 0).all(2)  # the diagonal is 0
    if least == -math.inf:
        return possible
    own = torch.eye(first.shape[1], dtype=torch.bool, device=first.device)
    most = -(-first).masked_fill(own, -torch.inf).logsumexp(2)
    return possible & (most + SHARE * (1 + first.shape[1] + most.abs().nan_to_num(posinf=0.0)) >= least)


def label_of(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The label [B] of outputs between low and high [B, K], and by how much it leads at least [B]; it may not."""
    label = ((low + high) / 2).argmax(1)
    return label, -_but(high, label).amax(1) + low.gather(1, label[:, None])[:, 0]


def apart_by(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], most: float = -math.inf) -> Tensor:
    """[B] by how much y has certainly a label that z has not, and is sure of it; they differ where this is positive.

    first, second: lower and upper ends [B, K] of the outputs at points. most: upper end of `odds`.
    """
    label, lead = label_of(*first)
    other = _but(second[0], label).amax(1) - second[1].gather(1, label[:, None])[:, 0]
    found = below(torch.minimum(lead, other))
    if most == -math.inf:
        return found
    rest = _but(first[1], label).logsumexp(1)
    sure = first[0].gather(1, label[:, None])[:, 0] - rest
    slack = SHARE * (1 + first[0].shape[1] + rest.abs() + sure.abs())
    return torch.where(sure - slack >= most, found, -torch.inf)


def lead_over(low: Tensor, high: Tensor, label: Tensor) -> Tensor:
    """[B] certain lead of any output over `label` [B], for outputs between low and high [B, K]."""
    return _but(low, label).amax(1) - high.gather(1, label[:, None])[:, 0]


def near_apart(y: Tensor, z: Tensor, most: float) -> Tensor:
    """[B] what a witness makes positive: the lead in z [B, K] of another label than that of y, if y is sure of it."""
    label = y.argmax(1)
    lead = lead_over(z, z, label)
    if most == -math.inf:
        return lead
    sure = y.gather(1, label[:, None])[:, 0] - _but(y, label).logsumexp(1) - most
    return torch.minimum(lead, sure)


def _but(value: Tensor, label: Tensor) -> Tensor:
    """[B, K] `value` without the entries `label` [B]."""
    return value.scatter(1, label[:, None], -torch.inf)


def both_scored(
    networks: tuple[nn.Module, nn.Module], shape: tuple[int, ...]
) -> tuple[tuple[nn.Module, nn.Module], tuple[bool, bool]]:
    """Both networks without a softmax that they end in, and of each whether there was none. Raises as `chain`."""
    first = _scored(networks[0], shape)
    second = first if networks[0] is networks[1] else _scored(networks[1], shape)
    return (first[0], second[0]), (first[1], second[1])


def before_softmax(network: nn.Module) -> nn.Module:
    """A network of a file without the softmax of codes that it ends in, which no bound knows; any other as it is."""
    if isinstance(network, DeployedNetwork) and len(network.operations):
        return network.scores() if isinstance(network.operations[-1], Softmax) else network
    return network


def _scored(network: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, bool]:
    if isinstance(network, DeployedNetwork):
        return before_softmax(network), True
    other = scores(network, shape)[0]
    return other, other is network


def lead_rows(pairs: Tensor, count: int) -> Tensor:
    """[P, K] the leads y_c - y_j as rows of a linear layer on y, for pairs (c, j) [P, 2] of `count` labels."""
    eye = torch.eye(count, dtype=COMPUTE_DTYPE, device=pairs.device)
    return eye[pairs[:, 0]] - eye[pairs[:, 1]]


def lead_matrix(up: Tensor, down: Tensor, pairs: Tensor, count: int) -> Tensor:
    """[B, K, K] from upper bounds [B, P] on y_c - y_j and on y_j - y_c for pairs (c, j) [P, 2]; infinite elsewhere."""
    c, j = pairs.unbind(1)
    result = up.new_full((len(up), count, count), torch.inf)
    result[:, c, j], result[:, j, c] = up, down
    return result.masked_fill(torch.eye(count, dtype=torch.bool, device=up.device), 0.0)


@dataclass(frozen=True)
class Leads:
    """Upper bounds `first`, `second`, `apart` [B, K, K] over sets of inputs, as above."""

    first: Tensor
    second: Tensor
    apart: Tensor | None = None

    def both(self, other: Leads) -> Leads:
        """The better of two."""
        apart = self.apart if other.apart is None else other.apart
        if self.apart is not None and other.apart is not None:
            apart = torch.minimum(self.apart, other.apart)
        return Leads(torch.minimum(self.first, other.first), torch.minimum(self.second, other.second), apart)

    def widened(self, first: Tensor, second: Tensor) -> Leads:
        """Where outputs may be off by `first` and `second` [K] more."""
        one, two = (loss[:, None] + loss for loss in (first, second))
        apart = None if self.apart is None else above(self.apart + one + two)
        return Leads(above(self.first + one), above(self.second + two), apart)

    def over(self, label: Tensor) -> Tensor:
        """[B] upper bounds on the largest lead of any output over `label` [], in either network."""
        lead = torch.maximum(self.first[:, :, label], self.second[:, :, label])
        lead[:, label] = -torch.inf
        return lead.amax(1)

    def missed(self, least: float) -> Tensor:
        """[B] by how much the rule misses that the labels agree: they do where this is negative; -inf: nowhere sure.

        least: lower end of `odds`.
        """
        left = self.second.mT
        if self.apart is not None:
            left = torch.minimum(left, above(self.apart - (-self.first.mT).clamp(min=max(least, 0.0))))
        own = torch.eye(left.shape[1], dtype=torch.bool, device=left.device)
        left = left.masked_fill(own, -torch.inf).amax(2)
        return torch.where(asked(self.first, least), left, -torch.inf).amax(1)


@dataclass(frozen=True)
class Reading:
    """One network of a comparison of labels, on inputs of `shape`: what outputs it may have, and which it has here.

    side: a network that does not round activations, as real-valued or as executed; None of one that does.
    executed: its steps, as kernels execute them. run: what the module computes here; None where that is not covered.
    """

    side: Side | None
    executed: Executed
    run: Run | None
    shape: tuple[int, ...]

    @staticmethod
    def of(
        network: nn.Module, stars: StarBatch, kind: Format | None, kernels: str, *, given: bool, smooth: bool
    ) -> Reading:
        """kind: of a network that does not round. given: whether `network` is the module whose kernels are asked about.
        smooth: whether it may have smooth activations.

        Raises as `steps`.
        """
        shape, device = tuple(stars.shape), stars.device
        own = steps(network, shape, dtype=COMPUTE_DTYPE, device=device, quantized=True, smooth=smooth)
        ways = executed(own, kernels)
        if not quantised(own):
            return Reading(Side.of(network, stars, kind), ways, None, shape)
        return Reading(None, ways, runner(network) if given and ways.here else None, shape)

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.executed.steps

    @property
    def outputs(self) -> int:
        return self.steps[-1].features

    def rows(self, x: Tensor) -> Rows:
        """All outputs that inputs x [B, N_in] may lead to, whatever kernel that is covered executes them."""
        if self.side is not None:
            y, error = self.side.values(x.reshape(-1, *self.shape))
            return torch.arange(len(x), device=x.device), below(y - error), above(y + error)
        grid = InputGrid.of(self.steps[0])
        if grid is None:
            return outputs(self.steps, x)
        # The kernels' own formulas leave fewer codes of the input in doubt than a bound on what they round off.
        first, last = grid.codes(x, x)
        known = (first == last).all(1)
        parts = []
        for index, own, values in (
            (known.nonzero().flatten(), self.steps[1:], grid.quantizer.value(first[known])),
            ((~known).nonzero().flatten(), self.steps, x[~known]),
        ):
            if len(index):
                row, low, high = outputs(own, values)
                parts.append((index[row], low, high))
        index, low, high = (torch.cat(part) for part in zip(*parts, strict=True))
        return index, low, high

    def here(self, x: Tensor, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
        """Ends [B, K] of the outputs at x [B, N_in]: what the module computes here where it runs. rows: those of x.

        Raises: KernelMismatchError: what it computes is none of them.
        """
        rows = self.rows(x) if rows is None else rows
        ends = by_point(rows, len(x))
        y = None if self.run is None else self.run(x.reshape(-1, *self.shape))
        if y is not None:
            check_outputs(y, rows)
        return narrowed(*ends, y)

    def rounding(self, low: Tensor, high: Tensor, clock: Clock) -> Tensor:
        """[B, K] by how much execution in the network's format may move outputs over boxes [B, N_in]."""
        if self.side is None or self.side.kind is None:
            return low.new_zeros(len(low), self.outputs)
        try:
            least, most = self.side.rounding(low, high, clock)
        except OutOfTime:
            return low.new_full((len(low), self.outputs), torch.inf)
        return torch.maximum(-least, most)

    def ranges(self, low: Tensor, high: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        """Certified ends [B, K] of the outputs over boxes [B, N_in], by interval arithmetic."""
        ends, loss = intervals(self.steps, low, high), self.rounding(low, high, clock)
        return below(ends[0] - loss), above(ends[1] + loss)


def may_give(rows: Rows, count: int, least: float = -math.inf) -> tuple[Tensor, Tensor]:
    """[B, K] which labels are in question (see `asked`) at each of `count` points: by any of its rows, and by all."""
    index, low, high = rows
    size = max(NUMBERS // max(low.shape[1], 1) ** 2, 1)
    each = [asked(leads(*part), least) for part in zip(low.split(size), high.split(size), strict=True)]
    found = torch.zeros(count, low.shape[1], dtype=torch.int64, device=low.device)
    found.index_add_(0, index, torch.cat(each).long())
    return found > 0, found == torch.bincount(index, minlength=count)[:, None]


def agree(first: Tensor, second: Tensor) -> Tensor:
    """[B] whether each label in question of the first network is the only one of the second, [B, K] both."""
    return ~first.any(1) | ((second.sum(1) == 1) & ~(first & ~second).any(1))


def ties(rows: Rows, count: int) -> Tensor:
    """[B] whether at one of `count` points two outputs may be equal and largest though each is known."""
    index, low, high = rows
    size = torch.maximum(low.abs(), high.abs()).amax(1)
    tied = (label_of(low, high)[1] <= 0) & ((high - low).amax(1) <= 16 * SINGLE * size)
    return torch.zeros(count, dtype=torch.int64, device=low.device).index_add_(0, index, tied.long()) > 0
