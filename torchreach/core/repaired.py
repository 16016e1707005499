"""What `repair` returns. Nothing here computes.

Axis letters: S input stars, N outputs, C inputs of a conflict, F free numbers of an output's layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from torchreach.core.options import Budget
from torchreach.core.outward import at_least, at_most, counted
from torchreach.core.results import Certificate, Discrepancy, ended, lines
from torchreach.core.terms import Made


@dataclass(frozen=True, eq=False)
class RepairStep:
    """One evaluation of the repair; iteration 0 is the compressed network as given."""

    iteration: int
    discrepancy: Discrepancy
    accuracy: float | None
    loss: float | None  # last training loss: mean squared error to the targets, or mean certified bound
    satisfied: bool
    seconds: float
    method: Made = Made.RETRAINED


@dataclass(frozen=True, eq=False)
class Conflict:
    """Inputs that prove how close an output cannot come, whatever the free numbers w of its last layer are.

    At the inputs x_i, h_i is what goes into the layer (1 for the bias appended), c_i what its entries that are not free
    add, and y1 - y2 is to lie in [lower_i, upper_i]. With multipliers u_i, positive where y1 - y2 is to be lowered:

        sum_i u_i h_i = 0,   sum_gives |u_i| = 1
        excess = sum_(u > 0) u_i (y1_i - c_i - upper_i) + sum_(u < 0) u_i (y1_i - c_i - lower_i)

    so that one of the inputs that give way exceeds its limit by that much, for every w with which the others keep
    theirs. The multipliers are floating-point numbers: the first sum is a small `residual`, and `excess` is less by
    residual * |w|_1, rounded outward.

    Attributes:
        output: n.
        inputs: [C, *shape] at most one more than there are free numbers.
        multipliers: [C] u.
        lower, upper: [C] limits of y1 - y2; 0 where the least |y1 - y2| was asked for.
        gives: [C] whether the input is of the sets, whose limits may be exceeded, and not of what was to be kept.
        residual: largest |sum u_i h_i| over the free features, the error of computed features included.
        weights: |w|_1 up to which the excess is certified.
        excess: certified: every such layer exceeds a limit by this; at most 0 where nothing conflicts.
    """

    output: int
    inputs: Tensor
    multipliers: Tensor
    lower: Tensor
    upper: Tensor
    gives: Tensor
    residual: float
    weights: float
    excess: float

    def __repr__(self) -> str:
        return lines(
            f"Conflict of output {self.output}: {counted(len(self.inputs), 'input')}",
            f"every last layer of these masks exceeds a limit by {at_least(self.excess)} at one of them",
        )


@dataclass(frozen=True, eq=False)
class RepairResult:
    """Outcome of `repair`.

    Attributes:
        network: the repaired network; its certificate is `after`.
        history: every evaluation, in order; the first is the compressed network as given.
        satisfied: whether `after` lies in the target set.
        index: position of `network` in `history`: the last entry if the target was reached, else the entry
            that came closest to it.
        least: [N] certified: no last layer of the masks keeps an output's |y1 - y2| below it on the stars (with the
            layers before it as they were when it was last solved); None where none was solved.
        conflicts: of a target that no last layer reaches: per output in question the inputs that prove it.
        harm: [N] certified, largest change of the network on the stars that `keep` named; None without.
    """

    network: nn.Module
    history: tuple[RepairStep, ...]
    satisfied: bool
    index: int = -1
    least: Tensor | None = None
    conflicts: tuple[Conflict, ...] = ()
    harm: Tensor | None = None

    @property
    def before(self) -> Discrepancy:
        """Discrepancy of the compressed network as given."""
        return self.history[0].discrepancy

    @property
    def after(self) -> Discrepancy:
        """Discrepancy of `network`."""
        return self.history[self.index].discrepancy

    @property
    def accuracy(self) -> float | None:
        """Accuracy of `network`, where one was measured."""
        return self.history[self.index].accuracy

    @property
    def method(self) -> Made:
        """What made `network`."""
        return self.history[self.index].method

    def save_certificate(self, path: str | Path, budget: Budget | None = None) -> Certificate:
        """That of `after`, of the original and `network`: see `Certifiable.save_certificate`."""
        return self.after.save_certificate(path, budget)

    def __repr__(self) -> str:
        before, after = float(self.before.upper.max()), float(self.after.upper.max())
        accuracy = "" if self.accuracy is None else f", accuracy {100 * self.accuracy:.2f} %"
        least = "" if self.least is None else f"no last layer gets below {at_least(float(self.least.max()))}"
        harm = "" if self.harm is None else f"changed by at most {at_most(float(self.harm.max()))} on the kept stars"
        return lines(
            f"RepairResult: target {'met' if self.satisfied else 'missed'} after "
            f"{counted(self.history[-1].iteration, 'iteration')}{accuracy}; {self.after.covers}; {self.method}",
            f"max |y1 - y2|: {self.after.claim} {at_most(before)} before, {at_most(after)} after",
            least,
            harm,
            ended(self.after.status, self.after.reasons),
        )
