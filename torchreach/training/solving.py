"""The iterations of a repair that solve: of a float network its last layer, of a deployed one biases and codes."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch
from torch import Tensor

from torchreach.core.clock import Clock, OutOfTime
from torchreach.core.options import Budget
from torchreach.core.repaired import Conflict
from torchreach.core.terms import Made
from torchreach.core.tolerances import COMPUTE_DTYPE, Tolerances
from torchreach.training.earlier_layer import step_earlier
from torchreach.training.evaluations import Evaluations
from torchreach.training.fit import Data
from torchreach.training.int8_student import DeployedStudent
from torchreach.training.keep import Keep
from torchreach.training.last_layer import evaluated, in_float64
from torchreach.training.solve import LayerSolver
from torchreach.training.students import Student, WeightStudent

log = logging.getLogger(__name__)

# Share of the time left that enumerating and solving may take; the certificate has the rest.
SOLVING = 0.6
# Share, and absolute, to which a certificate meets the least value.
CLOSE = 1e-6
# Inputs of each star on which the codes of a deployed last layer are solved, witnesses besides.
RECODED = 64
# How far the numbers of an earlier layer move in one step at first, as a share of its largest weight; by what that is
# divided after a step that came no closer, and the share of it at which the layer is left as it is.
RADIUS, SHORTER, SHORTEST = 0.05, 4.0, 1e-2


class Solving:
    """Solves a student's last layer, round by round where its regions are too many to enumerate.

    The outputs of a deployed network are moved by its int32 biases, which costs nothing, to where the certified range
    of y1 - y2 lies around zero.

    Attributes:
        deployed: whether the student rounds its activations.
        done: whether another round would bring nothing.
        least, conflicts: of the last layer that was solved; see `core.repaired.RepairResult`.
    """

    def __init__(
        self,
        evaluations: Evaluations,
        student: Student,
        keep: tuple[Keep, ...],
        data: Data | None,
        clock: Clock,
        seed: int,
        layers: int,
    ) -> None:
        self.evaluations, self.student, self.keep, self.data = evaluations, student, keep, data
        self.clock, self.seed, self.layers, self.radius = clock, seed, layers, RADIUS
        self.depth = 1  # of the layer that the next round changes, counted from the end
        self.deployed, self.done = isinstance(student, DeployedStudent), False
        self.least: Tensor | None = None
        self.conflicts: tuple[Conflict, ...] = ()
        self.shifted = False  # whether the biases of a deployed network are where they do best
        self.solver: LayerSolver | None = None
        self.trial = False  # whether the student is another than the best one before a round begins
        self.kept: tuple[LayerSolver | None, Tensor | None, tuple[Conflict, ...]] = (None, None, ())

    def _next(self) -> None:
        """The layer before the one that was last changed is next."""
        self.depth, self.radius = self.depth + 1, RADIUS
        self.done = self.depth > self.layers

    def again(self, kept: bool) -> None:
        """The layers before the last have changed: for good, or for one round that may be undone."""
        self.done, self.solver, self.depth, self.radius, self.trial = False, None, 1, RADIUS, not kept
        self.shifted = False
        if kept:
            self.least, self.conflicts, self.kept = None, (), (None, None, ())

    def iterate(self, iteration: int) -> None:
        """One round: solve, write, certify; goes back if that came no closer to the target."""
        began, evaluations, student = time.monotonic(), self.evaluations, self.student
        if isinstance(student, DeployedStudent):
            (self._recode if self.shifted else self._shift)(student, iteration, began)
            return
        assert isinstance(student, WeightStudent)
        part = self.clock.share(SOLVING)
        limits = evaluations.goal.limits(evaluations.history[0].discrepancy)
        try:
            if self.solver is not None and self.depth > 1:
                points = self.solver.points(limits)
                if not step_earlier(student.network, student.constraints, points, self.depth, self.radius, part):
                    self._next()
                    return
                student.adopt()
                self.solver = None
            solver = self.solver = self.solver or self._solver(student, part)
            outcome = solver.solve(limits, part)
        except OutOfTime:
            log.info("repair: no time to solve the last layer")
            student.go_back()
            self.done = True
            return
        trial, self.trial = self.trial or self.depth > 1, False
        self.least, self.conflicts = outcome.least, outcome.conflicts
        if outcome.matrix is None:
            log.warning("repair: no last layer keeps what is to be kept; the conflicts of the result say which inputs")
            student.go_back()
            self.done = True
            return
        solver.layer.write(outcome.matrix)
        student.adopt()
        better = evaluations.take(student.network, iteration, Made.SOLVED, began, clock=self.clock)
        found = evaluations.history[-1].discrepancy
        if better:
            student.keep()
        else:
            student.go_back()
            if trial:  # what was solved were other layers than those that are kept
                self.solver, (self.least, self.conflicts) = self.kept[0], self.kept[1:]
                self.radius /= SHORTER
            if trial and self.depth == 1:
                self.done = True
                return
        self.kept = self.solver, self.least, self.conflicts
        if solver.complete and self.layers > 1:
            if self.depth == 1 or self.radius < SHORTEST * RADIUS:
                self._next()
            return
        # All vertices are known, or what is certified is what no layer undercuts.
        close = bool((found.upper.amax(0) <= outcome.least * (1 + CLOSE) + CLOSE).all())
        self.done = solver.complete or close
        if not self.done:
            solver.witness(found.witness)

    def _shift(self, student: DeployedStudent, iteration: int, began: float) -> None:
        """Moves every output by the middle of its certified range over all stars, as long as that comes closer."""
        best = self.evaluations.best.discrepancy
        middle = (best.range_lower.amin(0) + best.range_upper.amax(0)) / 2
        if not bool(middle.isfinite().all()) or not student.shift(middle):
            self.shifted = True
            return
        if self.evaluations.take(student.network, iteration, Made.SHIFTED, began, clock=self.clock):
            student.keep()
            return
        student.go_back()
        self.shifted = True

    def _recode(self, student: DeployedStudent, iteration: int, began: float) -> None:
        """Solves codes and biases of the last layer on sampled inputs and witnesses, as long as that comes closer."""
        evaluations, stars = self.evaluations, self.evaluations.stars
        more = [witness.to(COMPUTE_DTYPE) for witness in evaluations.witnesses]
        x = torch.cat((stars.sample(RECODED, self.seed).to(COMPUTE_DTYPE), *more), 1).flatten(0, 1)
        try:
            solved = student.solve_codes(
                x, evaluated(in_float64(evaluations.original, stars), x), self.clock.share(SOLVING)
            )
        except OutOfTime:
            solved = False
        if solved and evaluations.take(student.network, iteration, Made.RECODED, began, clock=self.clock):
            student.keep()
            self.shifted = False  # biases may do better now
        else:
            student.go_back()
            self.done = True

    def _solver(self, student: WeightStudent, clock: Clock) -> LayerSolver:
        evaluations = self.evaluations
        return LayerSolver(
            evaluations.original,
            student.network,
            evaluations.stars,
            student.constraints,
            keep=self.keep,
            data=self.data,
            budget=replace(evaluations.budget or Budget(), seconds=None),
            tolerances=evaluations.tolerances or Tolerances(),
            clock=clock,
            seed=self.seed,
        )
