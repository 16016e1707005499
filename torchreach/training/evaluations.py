"""Evaluations of one repair: every certificate in order, and which of them came closest to the target."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from torchreach.core.checkpoint import Checkpoint
from torchreach.core.clock import Clock
from torchreach.core.options import Budget, Exact
from torchreach.core.repaired import RepairStep
from torchreach.core.results import Discrepancy
from torchreach.core.terms import Made
from torchreach.core.tolerances import Tolerances
from torchreach.graph.weights import evaluation_mode
from torchreach.sets.star import StarBatch
from torchreach.training.target import Target
from torchreach.verbs.certificate import provable
from torchreach.verbs.discrepancy import discrepancy
from torchreach.verbs.questions import network_digest
from torchreach.verbs.units import filed

# Seconds that a certificate has at least, whatever is left.
LEAST_SECONDS = 1e-3


@dataclass
class Evaluations:
    """What is asked of every network of a repair, and what came of it.

    Attributes:
        goal: the target, anchored at the first evaluation.
        history: all evaluations. index: the closest to the goal, the first one of equals.
        witnesses: [S, N, *shape] of each evaluation.
    """

    original: nn.Module
    stars: StarBatch
    goal: Target
    exact: Exact | None
    budget: Budget | None
    tolerances: Tolerances | None
    evaluate: Callable[[nn.Module], float] | None
    progress: Callable[[RepairStep], None] | None
    files: Checkpoint | None = None
    ray: str | None = None
    history: list[RepairStep] = field(default_factory=list)
    witnesses: list[Tensor] = field(default_factory=list)
    index: int = 0
    closest: float = torch.inf

    @property
    def best(self) -> RepairStep:
        return self.history[self.index]

    def take(
        self,
        network: nn.Module,
        iteration: int,
        made: Made,
        began: float,
        loss: float | None = None,
        clock: Clock | None = None,
    ) -> bool:
        """Certifies a network; whether it is the first, or closer to the goal than all before it.

        began: when work on it did, by `time.monotonic`. clock: ends the certificate, in place of the budget's seconds.
        """
        found = self.certify(network, self.stars, remaining(self.budget, clock))
        self.goal = self.goal if self.history else self.goal.anchored(found)
        with evaluation_mode(network):
            accuracy = None if self.evaluate is None else float(self.evaluate(network))
        excess = self.goal.excess(found)
        record = RepairStep(iteration, found, accuracy, loss, self.goal.holds(found), time.monotonic() - began, made)
        first = not self.history
        self.history.append(record)
        self.witnesses.append(found.witness)
        if self.progress is not None:
            self.progress(record)
        better = first or (record.satisfied and not self.best.satisfied) or excess < self.closest
        if better:
            self.closest, self.index = excess, len(self.history) - 1
        return better

    def certify(self, network: nn.Module, stars: StarBatch, budget: Budget | None) -> Discrepancy:
        def compared(own: Checkpoint | None) -> Discrepancy:
            options = {"budget": budget, "tolerances": self.tolerances, "checkpoint": own, "ray": self.ray}
            return discrepancy(self.original, network, stars, self.exact, **options)

        if self.files is None:
            return compared(None)
        # By the network's own numbers: a certificate is taken again for no other one.
        name = f"certificate-{network_digest(network, stars.shape)[:32]}"
        limits = budget or Budget()
        found = filed(self.files, name, Clock(limits.seconds), limits, compared)
        return provable(found, self.original, network, stars)


def remaining(budget: Budget | None, clock: Clock | None) -> Budget | None:
    """`budget` with the seconds that are left of a limited clock."""
    if clock is None or not clock.limited:
        return budget
    return replace(budget or Budget(), seconds=max(clock.left, LEAST_SECONDS))
