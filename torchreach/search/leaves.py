"""Branches whose signs are all settled: one linear program each, solved in batches.

On such a branch z, d and the objective are affine in the input x = middle + radius t, |t| <= 1, and the branch is the
polytope of its signs. Rows are composed forward, with the running error bound of `reach.activation`

    error  ->  |A| (error + gamma size) + gamma |shift|,      size = sums of magnitudes of the rows

by which the half-spaces are moved outward and the objective is raised, so that the program's certified dual bound holds
for the real-valued networks. A branch without interior is widened a little first, which only loosens.

Axis letters: R branches, N_in inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.roundoff import allowance, gamma
from torchreach.lp.halfspaces import Halfspaces
from torchreach.lp.interior_point import interior, maximize
from torchreach.lp.problem import LPBatch
from torchreach.search.reduced_pair import Reduced

FLAT = 1e-10  # margin, in the box's half widths, below which a branch counts as without interior
CHUNK = 2**23


def solve_leaves(
    net: Reduced,
    hexagons: list[Tensor],
    objectives: Tensor,
    enough: Tensor,
    gap: float,
    clock: Clock = NO_LIMIT,
) -> tuple[Tensor, Tensor]:
    """Certified upper bounds [R] (-inf: no such input) and inputs [R, N_in] that nearly attain them.

    hexagons: [R, 6, N] per layer, all signs settled. objectives: [R, 2 N_out] on (y1, y1 - y2). A program stops
    at `gap`, or when its bound is at most `enough` [R]. clock: OutOfTime when it is over before all are solved.
    """
    inputs = net.middle.shape[1]
    constraints = 2 * sum(len(free) for free in net.free) + 1
    limit = max(CHUNK // (constraints * inputs + max(len(shift) for shift in net.shifts) * inputs), 1)
    results = [
        _solve(net, [h[i] for h in hexagons], objectives[i], enough[i], gap, clock)
        for i in torch.arange(len(objectives), device=objectives.device).split(limit)
    ]
    value, point = (torch.cat(parts) for parts in zip(*results, strict=True))
    return value, net.middle + net.radius * point


def _solve(
    net: Reduced, hexagons: list[Tensor], objectives: Tensor, enough: Tensor, gap: float, clock: Clock
) -> tuple[Tensor, Tensor]:
    clock.check()
    count = len(objectives)
    # [R, 2 n, 1 + N_in]: constant, then coefficients on t; errors [R, 2 n]
    rows = torch.cat((net.middle[..., None], torch.diag_embed(net.radius)), 2).expand(count, -1, -1)
    error = torch.zeros_like(rows[..., 0])
    A, b = [], []
    for k in range(net.depth + 1):
        rows, error = _affine(net, k, rows, error)
        if k == net.depth:
            break
        n, free = net.count[k], net.free[k]
        l1, u1, l2, u2, _, _ = hexagons[k].unbind(1)
        on = (l1 >= 0).to(rows), (l2 >= 0).to(rows)
        z, d = rows[:, :n][:, free], rows[:, n:][:, free]
        slack = error[:, :n][:, free], (error[:, :n] + error[:, n:])[:, free]
        for side, part, off in ((2 * on[0] - 1, z, slack[0]), (2 * on[1] - 1, z - d, slack[1])):
            # side * (row) >= 0; u |z - d| is covered by the margin between gamma and what it must be
            A.append(-side[..., None] * part[..., 1:])
            b.append(side * part[..., 0] + off + allowance(part.abs().sum(2)))
        s1, s2 = (s.expand(count, -1).clone() for s in net.slopes[k])
        s1[:, free], s2[:, free] = on
        z, d = rows[:, :n], rows[:, n:]
        rows = torch.cat((s1[..., None] * z, (s1 - s2)[..., None] * z + s2[..., None] * d), 1)
        z, d = error[:, :n], error[:, n:]
        error = torch.cat((s1 * z, (s1 - s2).abs() * z + s2 * d), 1)
        error = error + allowance(rows.abs().sum(2))
    objective = (objectives[:, None] @ rows)[:, 0]
    raised = (objectives.abs() * (error + 4 * gamma(net.count_terms) * rows.abs().sum(2))).sum(1)
    A, b = torch.cat(A, 1), torch.cat(b, 1)
    point, depth, empty = interior(Halfspaces(A, b), FLAT)
    b = b + A.norm(dim=2) * (2 * FLAT - depth.clamp(max=2 * FLAT))[:, None]
    # Zero rows have no margin of their own.
    b = torch.where(A.abs().amax(2) == 0, torch.ones_like(b), b) if A.shape[1] else b
    problem = LPBatch(objective[:, 1:], objective[:, 0] + raised, Halfspaces(A, b))
    solution = maximize(problem, point, gap=gap, below=enough)
    return torch.where(empty, -torch.inf, solution.upper), solution.point


def _affine(net: Reduced, k: int, rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, 2 n, 1 + N_in] and errors [R, 2 n] after affine layer k; the input is a row set [R, N_in, ...]."""
    weights, shift = net.maps[k], net.shifts[k]
    assert isinstance(weights, Tensor)  # of exact pairs all are
    share = 2 * gamma(net.count_terms)
    size = rows.abs().sum(2)
    out = weights @ rows
    out[..., 0] += shift
    error = (error + share * size) @ weights.abs().T + share * shift.abs() + net.noise[k]
    return out, error
