"""Output range of a batch of stars: a few linear programs, and dual bounds for all others.

Only stars whose bound exceeds what is already attained can matter. A few likely stars are solved first; dual
descent, which aims at what they attain, rules out most others; what is left is solved, the hardest first.

Axis letters: S stars, N outputs, L = 2 N signed outputs (f of every output, then -f), M predicate variables,
W known points, P constraints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.engines.record import PointOf, RangeRecord
from torchreach.lp.halfspaces import Sets
from torchreach.lp.problem import LPBatch
from torchreach.lp.questions import multipliers, refute, slices, solve

# Stars solved first, per input star and signed output.
LEADERS = 2
STEPS = 24


def output_range(
    rows: Tensor,
    slack: Tensor,
    sets: Sets,
    points: Tensor,
    origin: Tensor,
    record: RangeRecord,
    gap: float,
    clock: Clock = NO_LIMIT,
) -> int:
    """Take outputs rows [S, N, 1 + M] with error slack [S, N] over `sets` into the record.

    Args:
        points: [S, W, M] points of each star, the first strictly inside; origin: [S] its input star.
        gap: how far the certified range may end above what is attained.

    Returns: the number of linear programs solved.
    Raises: OutOfTime; the record then has points of these stars, but no bound.
    """
    inputs = record.attained.shape[1]
    values = rows[:, None, :, 0] + points @ rows[:, :, 1:].transpose(1, 2)  # [S, W, N]
    best, slot = torch.cat((values, -values), 2).max(1)
    attained = _Attained(record, origin, rows.shape[1])
    attained.take(best, lambda s, n: points[s, slot[s, n]])
    solved = torch.zeros_like(best, dtype=torch.bool)
    upper = torch.full_like(best, torch.inf)
    programs, batch = 0, LEADERS
    score = best  # bounds are not known yet
    while True:
        floor = attained.floor()
        left = ~solved & (upper > floor + gap)
        star, output = _leaders(torch.where(left, score, -torch.inf), origin, inputs, batch)
        if len(star) == 0:
            break
        solved[star, output] = True
        programs += len(star)
        asked = _programs(rows, sets, star, output)
        solution = solve(asked, points[star, 0], below=floor[star, output], gap=gap, clock=clock)
        upper[star, output] = upper[star, output].minimum(solution.upper)
        found = torch.full_like(upper, -torch.inf)
        found[star, output] = solution.lower
        number = torch.zeros_like(solved, dtype=torch.long)
        number[star, output] = torch.arange(len(star), device=star.device)
        attained.take(found, lambda s, n, p=solution.point, k=number: p[k[s, n]])
        if score is best:
            floor = attained.floor()
            upper = torch.where(solved, upper, _refuted(rows, sets, points[:, 0], floor, ~solved, clock))
        score = upper
        batch *= 8
    high, low = (upper + slack.repeat(1, 2)).split(rows.shape[1], 1)
    record.certify(origin, -low, high)
    return programs


def _refuted(rows: Tensor, sets: Sets, a: Tensor, floor: Tensor, wanted: Tensor, clock: Clock) -> Tensor:
    """Bounds [S, L], of the pairs wanted, by dual descent that ends at the floor [S, L]."""
    upper = torch.full_like(floor, torch.inf)
    for i in slices(len(rows), rows[0].numel() + rows.shape[1] * sets.constraints, rows.device):
        here = sets.select(i)
        held = multipliers(rows[i, :, 1:], here, a[i])
        held = torch.cat((held, -held), 1).clamp(min=0)
        star, output = wanted[i].nonzero(as_tuple=True)
        asked = _programs(rows[i], here, star, output)
        bounds = refute(asked, held[star, output], floor[i][star, output], STEPS, clock)
        upper[i] = upper[i].index_put((star, output), bounds)
    return upper


def _programs(rows: Tensor, sets: Sets, star: Tensor, output: Tensor) -> LPBatch:
    outputs = rows.shape[1]
    sign = torch.where(output < outputs, 1.0, -1.0).to(rows.dtype)
    row = rows[star, output % outputs] * sign[:, None]
    return LPBatch(row[:, 1:], row[:, 0], sets.select(star))


def _leaders(score: Tensor, origin: Tensor, inputs: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` stars of highest finite score [S, L] of each input star and output, as pairs."""
    if inputs == 1:
        value, star = score.topk(min(count, len(score)), dim=0)
    else:  # the best of every input star
        top = score.new_full((inputs, score.shape[1]), -torch.inf)
        top = top.scatter_reduce(0, origin[:, None].expand_as(score), score, "amax")
        value = torch.where(score == top[origin], score, -torch.inf)
        star = torch.arange(len(score), device=score.device)[:, None].expand_as(score)
    row, output = (value > -torch.inf).nonzero(as_tuple=True)
    return star[row, output], output


class _Attained:
    """What the record has attained, both directions side by side, as stars of its input stars see it."""

    def __init__(self, record: RangeRecord, origin: Tensor, outputs: int) -> None:
        self.record, self.origin, self.outputs = record, origin, outputs

    def floor(self) -> Tensor:
        """[S, L] best value met for f and -f of every output."""
        return self.record.attained[:, self.origin].transpose(0, 1).flatten(1)

    def take(self, value: Tensor, point: PointOf) -> None:
        """Values [S, L] and the points where they are met."""
        for direction, part in enumerate(value.split(self.outputs, 1)):
            first = direction * self.outputs
            self.record.attain(direction, self.origin, part, lambda s, n, first=first: point(s, n + first))
