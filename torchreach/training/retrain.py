"""Retraining, iteration by iteration, each certified: the loop of the paper's Algorithm 1 (see `training.repair`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchreach.core.clock import Clock
from torchreach.core.results import Discrepancy
from torchreach.core.terms import Made
from torchreach.training.evaluations import Evaluations
from torchreach.training.fit import Data, RepairOptions, run
from torchreach.training.students import Student

log = logging.getLogger(__name__)


class Retraining:
    """Iterations on one student. step, alpha: of the targets; seed: of the points that are drawn."""

    def __init__(
        self,
        reference: nn.Module,
        student: Student,
        evaluations: Evaluations,
        training: RepairOptions,
        data: Data | None,
        step: str,
        alpha: float,
        seed: int,
    ) -> None:
        self.reference, self.student, self.evaluations = reference, student, evaluations
        self.training, self.data, self.step, self.alpha = training, data, step, alpha
        self.seeds = torch.Generator().manual_seed(seed)
        self.rate = 1.0

    def iterate(
        self,
        iteration: int,
        clock: Clock,
        limit: Clock | None = None,
        rescue: Callable[[], None] | None = None,
    ) -> None:
        """One iteration: calibrates or trains, certifies, and goes back if that came no closer to the target.

        clock: ends the training; what is half trained is not worth an evaluation. limit: of the certificate.
        rescue: is asked before it goes back: keeps what it can make better of the student, or goes back itself.
        """
        student, evaluations = self.student, self.evaluations
        began, error = time.monotonic(), None
        draw = int(torch.randint(2**31, (), generator=self.seeds))
        x = torch.cat((evaluations.stars.sample(self.training.samples, draw), *evaluations.witnesses), 1).flatten(0, 1)
        calibrated = iteration == 1 and student.calibrate(x, self.data)
        if not calibrated:
            y1, y2 = run(self.reference, x), run(student.network, x)
            y = _targets(y1, y2, evaluations.best.discrepancy, self.step, self.alpha)
            error = student.retrain(x, y, self.data, self.rate, clock)
            if clock.over:
                student.go_back()
                return
        if not student.is_finite():
            log.warning("repair: training diverged in iteration %d; halving the learning rate", iteration)
            student.go_back()
            self.rate /= 2
            return
        made = Made.CALIBRATED if calibrated else Made.RETRAINED
        if evaluations.take(student.network, iteration, made, began, error, limit):
            student.keep()
            return
        kept = evaluations.index
        if rescue is not None and not calibrated:
            rescue()
        else:
            student.go_back()
        if evaluations.index == kept and not calibrated:
            self.rate /= 2


def _targets(y1: Tensor, y2: Tensor, last: Discrepancy, step: str, alpha: float) -> Tensor:
    """y2 + step / alpha at points ordered star by star: [S * P, N]."""
    y2 = y2.to(y1.device, torch.promote_types(y1.dtype, y2.dtype))
    shift = y1 - y2
    if step != "pointwise":
        low, high = last.range_lower, last.range_upper
        choice = {"midpoint": (low + high) / 2, "extremum": torch.where(-low > high, low, high)}
        signed = choice.get(step, last.upper)  # "magnitude" has no sign
        signed = signed.to(shift).repeat_interleave(len(y2) // len(low), 0)
        # A spent budget may leave an end of the range infinite; the difference itself never is.
        shift = torch.where(signed.isfinite(), signed, shift)
    return y2 + shift / alpha
