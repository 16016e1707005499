"""Shared half-spaces against their own rows, and cheap answers about many programs against HiGHS."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.networks import DEVICES
from torchreach.lp.halfspaces import Halfspaces, Rows, SharedHalfspaces
from torchreach.lp.interior_point import centre, interior, maximize
from torchreach.lp.problem import LPBatch
from torchreach.lp.questions import look, refute, solve
from torchreach.reference.linear_programs import solve_reference


def shared(device: str, size: int = 12, constraints: int = 7, dim: int = 5) -> SharedHalfspaces:
    g = torch.Generator().manual_seed(dim)
    matrix = torch.randn(constraints, dim, generator=g, dtype=torch.float64)
    matrix = matrix / matrix.norm(dim=1, keepdim=True)
    sign = torch.randint(-1, 2, (size, constraints), generator=g).double()
    inside = torch.rand(size, dim, generator=g, dtype=torch.float64) - 0.5
    room = 0.3 * torch.rand(size, constraints, generator=g, dtype=torch.float64) + 0.05
    b = torch.where(sign == 0, 1.0, (inside @ matrix.T) * sign + room)
    return SharedHalfspaces(Rows(matrix.to(device)), sign.to(device), b.to(device))


def middle(sets: Halfspaces) -> Tensor:
    point, depth, _ = interior(sets, 1e-10)
    assert (depth > 0).all()
    return centre(sets, point, 6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [3, 20])
def test_shared_rows_multiply_like_rows_of_their_own(device: str, dim: int) -> None:
    sets = shared(device, dim=dim)
    own = sets.own()
    g = torch.Generator(device=device).manual_seed(1)
    x = torch.randn(len(sets), 3, dim, generator=g, dtype=torch.float64, device=device)
    whole = Halfspaces(sets.rows.matrix * sets.sign[:, :, None], sets.b)
    y = torch.rand(len(sets), 3, sets.constraints, generator=g, dtype=torch.float64, device=device)
    torch.testing.assert_close(sets.dot(x), whole.dot(x))
    torch.testing.assert_close(sets.mix(y), whole.mix(y))
    torch.testing.assert_close(sets.room(x[:, 0]), whole.room(x[:, 0]))
    torch.testing.assert_close(sets.over_variables(y[:, 0]), whole.over_variables(y[:, 0]))
    torch.testing.assert_close(sets.over_constraints(x[:, 0].abs()), whole.over_constraints(x[:, 0].abs()))
    assert own.constraints == int((sets.sign != 0).sum(1).max())
    inside = (sets.room(x[:, 0]).amin(1) >= 0) == (own.room(x[:, 0]).amin(1) >= 0)
    assert inside.all()
    assert (sets.reach >= whole.reach - 1e-12).all()


@pytest.mark.parametrize("dim", [3, 20])
def test_a_row_put_in_cuts_the_set(dim: int) -> None:
    sets = shared("cpu", dim=dim)
    row = torch.zeros(len(sets), dtype=torch.long)
    cut = sets.put(row, torch.ones(len(sets)).double(), torch.full((len(sets),), 0.25).double())
    x = torch.rand(len(sets), dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(cut.room(x)[:, 0], 0.25 - x @ sets.rows.matrix[0])
    torch.testing.assert_close(cut.room(x)[:, 1:], sets.room(x)[:, 1:])


@pytest.mark.parametrize("dim", [3, 20])
def test_programs_over_shared_rows_have_the_same_optima(dim: int) -> None:
    sets = shared("cpu", dim=dim)
    own = sets.own()
    start = middle(own)
    objective = torch.randn(len(sets), dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    zero = objective.new_zeros(len(sets))
    ones = torch.ones_like(objective)
    wanted = solve_reference(objective, own.A, own.b, -ones, ones)[0]
    for rows in (sets, own):
        found = maximize(LPBatch(objective, zero, rows), start, gap=1e-9)
        torch.testing.assert_close(found.upper, wanted, atol=1e-8, rtol=0)
        torch.testing.assert_close(found.lower, wanted, atol=1e-8, rtol=0)
        echo = LPBatch(objective, zero, rows).bound(found.dual)
        torch.testing.assert_close(echo, found.upper, atol=1e-12, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [3, 20])
def test_a_look_is_right_whatever_it_says(device: str, dim: int) -> None:
    sets = shared(device, dim=dim)
    own = sets.own()
    a = middle(own)
    g = torch.Generator(device=device).manual_seed(4)
    rows = torch.randn(len(sets), 6, 1 + dim, generator=g, dtype=torch.float64, device=device)
    rows[:, :, 0] -= (2 + dim / 4) * torch.arange(6, device=device)  # from surely positive to surely negative
    asked = torch.ones(len(sets), 6, dtype=torch.bool, device=device)
    answer = look(rows, asked, sets, a, 0.0)
    ones = torch.ones(dim, dtype=torch.float64).expand(len(sets), -1)
    for r in range(6):
        wanted = solve_reference(rows[:, r, 1:].cpu(), own.A.cpu(), own.b.cpu(), -ones, ones)[0]
        wanted = wanted.to(device) + rows[:, r, 0]
        assert (answer.upper[:, r] >= wanted - 1e-9).all()
        assert (answer.value[:, r] <= wanted + 1e-9).all()
        point = answer.point[:, r]
        assert sets.room(point).amin() >= 0
        assert point.abs().max() <= 1
        torch.testing.assert_close(rows[:, r, 0] + (rows[:, r, 1:] * point).sum(1), answer.value[:, r])
    assert (answer.value > 0).any()
    assert (answer.upper <= 0).any()


def test_descent_refutes_what_is_false_and_never_what_is_true() -> None:
    sets = shared("cpu", size=200, constraints=9, dim=6)
    own = sets.own()
    objective = torch.randn(len(sets), 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    zero = objective.new_zeros(len(sets))
    ones = torch.ones_like(objective)
    wanted = solve_reference(objective, own.A, own.b, -ones, ones)[0]
    start = torch.zeros_like(sets.b)
    problem = LPBatch(objective, zero, sets)
    for margin in (-0.1, 0.0, 0.1):
        bound = refute(problem, start, wanted + margin, 60)
        assert (bound >= wanted - 1e-9).all()
        if margin > 0:
            assert (bound <= wanted + margin).float().mean() > 0.8
            # which the box alone does not show
            assert (problem.bound(start) <= wanted + margin).float().mean() < 0.5


def test_solving_in_small_batches_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = shared("cpu", size=50)
    start = middle(sets.own())
    objective = torch.randn(50, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    problem = LPBatch(objective, objective.new_zeros(50), sets)
    whole = solve(problem, start, gap=1e-9)
    monkeypatch.setattr("torchreach.lp.questions.NUMBERS", {"cpu": 40, "cuda": 40})
    parts = solve(problem, start, gap=1e-9)
    torch.testing.assert_close(whole.upper, parts.upper, atol=1e-8, rtol=0)
    assert parts.point.shape == whole.point.shape
