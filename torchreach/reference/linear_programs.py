"""Reference linear programs: max g.a over {A a <= b, l <= a <= u}, modelled in cvxpy and solved by HiGHS.

Method: dual simplex, one program after the other; compiled once for each shape.
Property: exact up to HiGHS's feasibility tolerance (1e-10). Nothing is shared with torchreach's own
solvers, so that an agreement of the two means something.

Axis letters: B programs, M variables, P constraints.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from torchreach.core.errors import InvalidSetError, ShapeError

Array = NDArray[np.float64]

# Presolve stays off: with it HiGHS may answer "infeasible or unbounded" without saying which.
OPTIONS = {"presolve": "off", "primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


def solve_reference(
    objective: ArrayLike | Tensor,
    A: ArrayLike | Tensor,
    b: ArrayLike | Tensor,
    lower: ArrayLike | Tensor,
    upper: ArrayLike | Tensor,
) -> tuple[Tensor, Tensor]:
    """Maximum of g.a over {A a <= b, lower <= a <= upper}, and a point that takes it.

    Args: objective [..., M], A [..., P, M], b [..., P], lower and upper [..., M]; leading axes broadcast.
        Bounds may be infinite. One program after the other is solved: this is a reference, not a fast path.
    Returns: value [...] and point [..., M], float64 on the CPU. An infeasible program has value -inf, an
        unbounded one +inf; the point of either is NaN.
    Raises: ShapeError if the shapes do not fit; InvalidSetError for NaN; RuntimeError if HiGHS fails.
    """
    g, rows, right, low, high = (as_array(value) for value in (objective, A, b, lower, upper))
    if g.ndim < 1 or rows.ndim < 2 or right.ndim < 1:
        raise ShapeError(
            "a linear program needs objective [..., M], A [..., P, M] and b [..., P], "
            f"got shapes {g.shape}, {rows.shape} and {right.shape}"
        )
    P, M = rows.shape[-2:]
    try:
        batch = np.broadcast_shapes(g.shape[:-1], rows.shape[:-2], right.shape[:-1], low.shape[:-1], high.shape[:-1])
        B = math.prod(batch)
        g, low, high = (np.broadcast_to(value, (*batch, M)).reshape(B, M) for value in (g, low, high))
        rows = np.broadcast_to(rows, (*batch, P, M)).reshape(B, P, M)
        right = np.broadcast_to(right, (*batch, P)).reshape(B, P)
    except ValueError:
        raise ShapeError(
            "a linear program needs objective, lower and upper [..., M], A [..., P, M] and b [..., P] with "
            f"leading axes that broadcast, got shapes {g.shape}, {low.shape}, {high.shape}, {rows.shape} and "
            f"{right.shape}"
        ) from None
    if any(np.isnan(value).any() for value in (g, rows, right, low, high)):
        raise InvalidSetError("a linear program needs numbers, got NaN in its objective or constraints")

    value, point = np.empty(B), np.empty((B, M))
    program = LinearProgram(P, M)
    for i in range(B):
        value[i], point[i] = program.solve(g[i], rows[i], right[i], low[i], high[i])
    return torch.from_numpy(value.reshape(batch)), torch.from_numpy(point.reshape(*batch, M))


class LinearProgram:
    """max g.a over {A a <= b, l <= a <= u} of fixed size, compiled once and solved for many numbers."""

    def __init__(self, P: int, M: int) -> None:
        import cvxpy as cp

        self.a: Any = cp.Variable(M)
        self.g, self.low, self.high = cp.Parameter(M), cp.Parameter(M), cp.Parameter(M)
        constraints: list[Any] = [self.a >= self.low, self.a <= self.high]
        self.A, self.b = (cp.Parameter((P, M)), cp.Parameter(P)) if P else (None, None)
        if self.A is not None:
            constraints.append(self.A @ self.a <= self.b)
        self.problem = cp.Problem(cp.Maximize(self.g @ self.a), constraints)

    def solve(self, g: Array, A: Array, b: Array, low: Array, high: Array) -> tuple[float, Array]:
        """Value and point; (-inf, NaN) where infeasible, (inf, NaN) where unbounded."""
        if (low > high).any() or (low == np.inf).any() or (high == -np.inf).any() or (b == -np.inf).any():
            return -np.inf, np.full(len(g), np.nan)
        self.g.value, self.low.value, self.high.value = g, low, high
        if self.A is not None and self.b is not None:
            self.A.value, self.b.value = A, b
        status = run(self.problem, OPTIONS)
        if status == "infeasible":
            return -np.inf, np.full(len(g), np.nan)
        if status == "unbounded":
            return np.inf, np.full(len(g), np.nan)
        point = np.clip(self.a.value, low, high)
        return float(g @ point), point


def run(problem: Any, options: dict[str, Any]) -> str:
    """Solve a cvxpy problem with HiGHS; returns "optimal", "infeasible" or "unbounded".

    Raises RuntimeError for any other outcome.
    """
    import cvxpy as cp

    try:
        problem.solve(solver=cp.HIGHS, warm_start=False, **options)
    except cp.SolverError as error:
        raise RuntimeError(f"HiGHS failed on a reference program: {error}") from error
    if problem.status not in (cp.OPTIMAL, cp.INFEASIBLE, cp.UNBOUNDED):
        raise RuntimeError(f"HiGHS did not finish a reference program: its status is {problem.status!r}")
    return problem.status


def as_array(value: ArrayLike | Tensor) -> Array:
    """`value` as a float64 array on the CPU."""
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    return np.asarray(value, dtype=np.float64)
