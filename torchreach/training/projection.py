"""A step in a training loop of one's own that puts a certificate back in force."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from torchreach.compress.constraints import Constraints
from torchreach.core.checks import check_positive
from torchreach.core.clock import OutOfTime, running
from torchreach.core.errors import ShapeError
from torchreach.core.options import Budget, Exact
from torchreach.core.results import Discrepancy
from torchreach.core.tolerances import COMPUTE_DTYPE, Tolerances
from torchreach.graph.weights import evaluation_mode
from torchreach.read.load import as_network
from torchreach.sets.star import StarBatch
from torchreach.training.evaluations import remaining
from torchreach.training.fit import Data
from torchreach.training.keep import Keep
from torchreach.training.solve import LayerSolver
from torchreach.verbs.discrepancy import discrepancy


def project(
    original: nn.Module,
    student: nn.Module,
    stars: StarBatch,
    tau: float,
    *,
    keep: Keep | Tensor | StarBatch | None = None,
    data: Data | None = None,
    constraints: Constraints | None = None,
    exact: Exact | None = None,
    budget: Budget | None = None,
    tolerances: Tolerances | None = None,
) -> Discrepancy:
    """Changes the last layer of `student`, in place, by as little as makes |y1 - y2| <= tau on all stars; certifies it.

    Made for plain PyTorch loops: after an optimiser's steps it puts the certificate back in force. Where it holds
    already nothing changes; where no last layer reaches tau, the one that comes closest is written and the result says
    so (`found.within(tau)`). The layers before the last are left alone, zeros and grids are kept.

    Args:
        original, student: networks of supported layers; the student's last layer is an `nn.Linear`.
        stars: input stars [S].
        tau: the bound, positive.
        keep, data: as in `repair`: inputs on which the student is to stay near the original. Without them the change of
            the weights is as small as it can be.
        constraints: by default `Constraints.read(student)`; read them once, before a loop, where chance may make zeros.
        exact, budget, tolerances: as in `repair`; the budget's seconds are those of the whole step.

    Guarantee: the result is the certificate of the student as it is left.

    Raises: OptionError; UnsupportedLayerError for other last layers; as `discrepancy`.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> original = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))
        >>> student = tr.prune_weights(original, 0.5)
        >>> stars = tr.StarBatch.from_box(torch.zeros(2), torch.ones(2))
        >>> tr.project(original, student, stars, tau=0.1).within(0.1)
        True
    """
    check_positive("tau", tau)
    if not isinstance(stars, StarBatch):
        raise ShapeError(f"project needs a torchreach.StarBatch, got {type(stars).__name__}")
    original, student = as_network(original), as_network(student)
    constraints = constraints or Constraints.read(student)
    with running(None if budget is None else budget.seconds) as clock, evaluation_mode(student):
        found = discrepancy(
            original, student, stars, exact, budget=remaining(budget, clock.share(0.25)), tolerances=tolerances
        )
        if found.within(tau) or clock.over:
            return found
        try:
            solver = LayerSolver(
                original,
                student,
                stars,
                constraints,
                keep=Keep.each(keep),
                data=data,
                budget=replace(budget or Budget(), seconds=None),
                tolerances=tolerances or Tolerances(),
                clock=clock.share(0.5),
            )
            limit = torch.full_like(found.upper, tau, dtype=COMPUTE_DTYPE)
            matrix = solver.solve((-limit, limit), clock.share(0.5)).matrix
        except OutOfTime:
            return found
        if matrix is not None:
            before = solver.layer.matrix
            solver.layer.write(matrix)
            after = discrepancy(original, student, stars, exact, budget=remaining(budget, clock), tolerances=tolerances)
            if float(after.upper.max()) <= float(found.upper.max()):
                return after
            solver.layer.write(before)
        return found
