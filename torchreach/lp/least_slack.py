"""Least slack of linear inequalities, solved by HiGHS, row by row as they come to light.

    min t   over (w, t), t >= 0   subject to   a_i . w <= b_i + s_i t

with s_i = 1 where the row may give way and 0 where it may not. Rows are added between solutions; the dual simplex goes
on from the basis it had.

At an optimum the multipliers m_i >= 0 of the rows satisfy sum m_i a_i = 0 and sum m_i s_i = 1 (where t > 0), so that
t = -sum m_i b_i: every w violates one of these few rows by as much, which is the proof that t cannot be less. Where
rows without slack contradict each other, ask again with slack for all of them: its multipliers say which do.

Axis letters: R rows, F variables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchreach.core.clock import Clock, OutOfTime

Array = NDArray[np.float64]

# The tightest tolerances that HiGHS takes. No number of threads: HiGHS has one scheduler for the whole process, and
# refuses to solve with another number than whoever came first.
OPTIONS = {
    "output_flag": False,
    "parallel": "off",
    "primal_feasibility_tolerance": 1e-10,
    "dual_feasibility_tolerance": 1e-10,
}


@dataclass(frozen=True)
class Slack:
    """An optimum: point w [F], slack t (infinite where rows without slack contradict), multipliers [R] of the rows."""

    point: Array
    value: float
    multipliers: Array


class LeastSlack:
    """The program above over `variables` numbers, with rows that are added as they are found."""

    def __init__(self, variables: int) -> None:
        import highspy

        # `highspy.Highs` prints a banner, whatever the options say.
        self.highs: Any = getattr(highspy, "_Highs", highspy.Highs)()
        for name, value in OPTIONS.items():
            self.highs.setOptionValue(name, value)
        self.variables, self.rows = variables, 0
        self.ended = highspy.HighsModelStatus
        for _ in range(variables):
            self.highs.addVar(-highspy.kHighsInf, highspy.kHighsInf)
        self.highs.addVar(0.0, highspy.kHighsInf)
        self.highs.changeColCost(variables, 1.0)

    def add(self, rows: Array, bounds: Array, slack: Array) -> None:
        """a [R, F], b [R] and s [R] of more rows."""
        size = len(rows)
        if not size:
            return
        full = np.ascontiguousarray(np.concatenate((rows, -slack[:, None]), 1))
        width = self.variables + 1
        starts = np.arange(size, dtype=np.int32) * width
        index = np.tile(np.arange(width, dtype=np.int32), size)
        below = np.full(size, -np.inf)
        self.highs.addRows(size, below, bounds.astype(np.float64), full.size, starts, index, full.ravel())
        self.rows += size

    def limit(self, variable: int, low: float, high: float) -> None:
        """Keeps a variable in [low, high]."""
        self.highs.changeColBounds(variable, low, high)

    def solve(self, clock: Clock) -> Slack:
        """The optimum. Raises OutOfTime; RuntimeError if HiGHS fails."""
        clock.check()
        if clock.limited:
            self.highs.setOptionValue("time_limit", self.highs.getRunTime() + clock.left)
        self.highs.run()
        status = self.highs.getModelStatus()
        if status == self.ended.kTimeLimit:
            raise OutOfTime
        if status == self.ended.kInfeasible:
            return Slack(np.full(self.variables, np.nan), np.inf, np.zeros(self.rows))
        if status != self.ended.kOptimal:
            raise RuntimeError(f"HiGHS did not finish a program of {self.rows} rows: its status is {status}")
        solution = self.highs.getSolution()
        point, dual = np.array(solution.col_value), np.array(solution.row_dual)
        return Slack(point[: self.variables], float(point[self.variables]), np.maximum(-dual, 0.0))
