"""The batched interior-point method against HiGHS, and its certificates when it stops early."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.networks import DEVICES
from torchreach.lp.halfspaces import Halfspaces
from torchreach.lp.interior_point import centre, interior, maximize
from torchreach.lp.problem import LPBatch
from torchreach.reference.linear_programs import solve_reference


def programs(size: int, constraints: int, dim: int, *, whole: bool = False) -> LPBatch:
    """Random programs whose sets contain a ball; `whole` numbers make many constraints meet in one vertex."""
    g = torch.Generator().manual_seed(constraints * 100 + dim)
    if whole:
        A = torch.randint(-2, 3, (size, constraints, dim), generator=g).double()
        b = (A.abs().sum(2) - 1).clamp(min=0.5)
        objective = torch.randint(-3, 4, (size, dim), generator=g).double()
    else:
        A = torch.randn(size, constraints, dim, generator=g, dtype=torch.float64)
        inside = torch.rand(size, dim, generator=g, dtype=torch.float64) * 1.6 - 0.8
        b = (A @ inside[:, :, None])[:, :, 0] + torch.rand(size, constraints, generator=g, dtype=torch.float64)
        objective = torch.randn(size, dim, generator=g, dtype=torch.float64)
    return LPBatch(objective, objective.new_zeros(size), Halfspaces(A, b))


def start(problem: LPBatch) -> Tensor:
    point, depth, empty = interior(problem.sets, 1e-10)
    assert (depth > 0).all()
    assert not empty.any()
    return centre(problem.sets, point, 5)


def optimum(problem: LPBatch) -> Tensor:
    ones = torch.ones_like(problem.objective)
    return solve_reference(problem.objective, problem.sets.A, problem.sets.b, -ones, ones)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("constraints", "dim"), [(0, 3), (3, 2), (12, 5), (40, 5), (10, 60), (80, 30)])
@pytest.mark.parametrize("whole", [False, True])
def test_certified_interval_meets_the_optimum(device: str, constraints: int, dim: int, whole: bool) -> None:
    problem = programs(12, constraints, dim, whole=whole)
    wanted = optimum(problem)
    sets = Halfspaces(problem.sets.A.to(device), problem.sets.b.to(device))
    moved = LPBatch(problem.objective.to(device), problem.constant.to(device), sets)
    solution = maximize(moved, start(moved), gap=1e-9)
    assert (solution.upper.cpu() >= wanted - 1e-9).all()
    assert (solution.lower.cpu() <= wanted + 1e-9).all()
    assert (solution.upper - solution.lower).max() < 1e-8
    inside = moved.sets.room(solution.point)
    assert constraints == 0 or inside.min() >= 0
    assert solution.point.abs().max() <= 1


@pytest.mark.parametrize("iterations", [0, 1, 2, 4])
def test_stopping_early_keeps_the_interval_valid(iterations: int) -> None:
    problem = programs(30, 12, 6)
    wanted = optimum(problem)
    solution = maximize(problem, start(problem), gap=1e-9, iterations=iterations)
    assert (solution.upper >= wanted - 1e-9).all()
    assert (solution.lower <= wanted + 1e-9).all()
    assert (solution.upper - solution.lower).max() > 1e-6


def test_a_question_ends_at_its_answer() -> None:
    problem = programs(30, 12, 6)
    wanted = optimum(problem)
    full = maximize(problem, start(problem), gap=1e-9)
    asked = maximize(problem, start(problem), gap=1e-9, above=wanted - 0.5, below=wanted - 0.5)
    assert (asked.lower > wanted - 0.5).all()
    assert asked.iterations < full.iterations
    asked = maximize(problem, start(problem), gap=1e-9, above=wanted + 0.5, below=wanted + 0.5)
    assert (asked.upper <= wanted + 0.5).all()


def test_emptiness_is_proven_and_flatness_is_not_emptiness() -> None:
    A = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]] * 3, dtype=torch.float64)
    b = torch.tensor([[-0.5, 0.2], [0.3, -0.3], [0.3, 0.1]], dtype=torch.float64)  # empty, a line, a strip
    point, depth, empty = interior(Halfspaces(A, b), 1e-9)
    assert empty.tolist() == [True, False, False]
    assert depth[2] > 0.05
    assert abs(depth[1]) < 1e-8
    assert abs(point[1, 0] - 0.3) < 1e-8


def test_a_batch_does_not_fail_because_of_one_program() -> None:
    problem = programs(4, 6, 3)
    problem.sets.A[2] = float("nan")
    solution = maximize(problem, torch.zeros_like(problem.objective), gap=1e-9)
    good = [0, 1, 3]
    wanted = optimum(problem.select(torch.tensor(good)))
    assert (solution.upper[good] >= wanted - 1e-9).all()
