"""What `audit` returns: of each input of a test set, whether two networks give it one label. Nothing here computes.

Axis letters: B inputs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from torchreach.core.outward import at_least, at_most, counted
from torchreach.core.results import Answer
from torchreach.core.terms import Kernels, Reason, Semantics


@dataclass(frozen=True, eq=False)
class Audit:
    """Two networks on a test set; see `audit`.

    Attributes:
        answer: per input: EQUIVALENT (the same label, certified), NOT_EQUIVALENT (a witness shows two), UNKNOWN (open).
        reasons: per input, why the work on it ended.
        label: [2, B] of the original and the compressed network, as this machine computes them at the inputs; -1 where
            the work ended before.
        depends: [B] whether at the input itself one of the networks may give several labels, depending on which of the
            kernels that are covered executes it.
        lower, upper: [B] largest |y1 - y2| over outputs: attained, and certified for every input within `eps` and every
            kernel that is covered; infinite where the work ended before.
        witness: [B, *input shape] where labels differ, an input that shows it; else the input itself.
        right, maybe_right: [2, B] whether both networks give the label of the test set at the inputs, whichever kernel
            executes them, and whether one may; None without labels.
        eps: how far each value of an input may move. confidence: as of an `Equivalence`.
        seconds: what it took.
        semantics, kernels, uncovered: as of a `Discrepancy`.
    """

    answer: tuple[Answer, ...]
    reasons: tuple[Reason, ...]
    label: Tensor
    depends: Tensor
    lower: Tensor
    upper: Tensor
    witness: Tensor
    right: Tensor | None
    maybe_right: Tensor | None
    eps: float
    confidence: float | None
    seconds: float
    semantics: Semantics = Semantics.FLOAT
    kernels: Kernels = Kernels.NONE
    uncovered: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.answer)

    def count(self, answer: Answer) -> int:
        """Number of inputs with this answer."""
        return self.answer.count(answer)

    @property
    def vacuous(self) -> int:
        """Number of inputs of EQUIVALENT about which nothing was to show: the original is not as sure as was asked."""
        return self.reasons.count(Reason.NEVER_SURE)

    @property
    def accuracy(self) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """Of the original and of the compressed network: ends of its accuracy in [0, 1] over all kernels."""
        if self.right is None or self.maybe_right is None:
            return None
        low, high = (part.double().mean(1) for part in (self.right, self.maybe_right))
        return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))

    def __repr__(self) -> str:
        answers = ", ".join(f"{n:,} {one.value}" for one, n in Counter(self.answer).items())
        kernels = "" if self.kernels is Kernels.NONE else f", {self.kernels}"
        lines = [
            f"Audit of {counted(len(self), 'input')}: {answers}; {self.semantics}{kernels}",
            f"label depends on the kernels: {counted(int(self.depends.sum()), 'input')}",
            f"max |y1 - y2|: {at_least(float(self.lower.max()))} attained, at most {at_most(float(self.upper.max()))}",
            f"{self.seconds:.2f} s",
        ]
        return "\n  ".join(lines)
