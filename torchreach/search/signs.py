"""Branch and bound on the signs of single neurons, for boxes of many dimensions.

A branch keeps the hexagons (see `domains.hexagon`) of the neurons that were undecided at the root; a split of z >= 0 or
z <= 0, or of z2, only moves one bound to zero. Its bound is the Lagrange dual

    U(p, q) = sum_layers sum_neurons r(alpha, beta, p, q) + constants + max over the box

of the linear program over the convex hulls of the neurons' graphs (z, d, a, e): jointly convex in all slopes, as r is a
maximum over vertices of functions linear in (alpha, beta, p, q), and a certified bound at any of them. No bound that
sees one pair of neurons at a time is tighter, and multipliers of the splits (beta-CROWN) need no variables of
their own: the slopes over the cut hexagon are free. The subgradient is the primal residual: with the touching vertex
(z*, d*, a*, e*) of each neuron, dU/dp = z - z* and dU/dq = d - d*, where (z, d) come forward from the
maximising corner of the box through the touching (a*, e*). So one step is a pass backward and a pass forward.

Which sign: alpha a + beta e = (alpha + beta) relu(z) - beta relu(z2), and only a term with positive coefficient is
loose from above (relu is convex). So z is split where alpha + beta >= -beta, else z2; after that one split the
neuron is tight from above. Which neuron: the largest gap between the averaged touching point and the
true graph, both terms added before clamping, because they cancel.

Method: best first over all outputs and signs at once, in batches; Adam with a subgradient of its own per branch, warm
    from the parent's slopes.
    A branch whose signs are all settled is one linear program (`leaves`); where affine layers are composed of
    several, descent alone.
Property: anytime; every state is certified, and its interval lies in the one before. It can stay open although nothing
    is left to split, by what linear programs or descent leave.
References: those of `domains.hexagon`; Bunel et al.: Branch and bound for piecewise linear neural network
    verification (JMLR 2020).

Axis letters: R branches, N undecided neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock, OutOfTime
from torchreach.domains.difference import CHUNK, Backward, difference_bounds
from torchreach.domains.hexagon import Graph, Hexagon, height, start_slopes
from torchreach.domains.pair import Pair
from torchreach.search.best_first import best_first
from torchreach.search.boxes import one_box
from torchreach.search.leaves import solve_leaves
from torchreach.search.reduced_pair import Reduced
from torchreach.search.result import Best, Constraints, Question, SearchResult
from torchreach.search.witness import ascend

ROOT_STEPS, STEPS, LEAF_STEPS = 150, 30, 200
RATE = 0.3
ROOT_DECAY, DECAY, LEAF_DECAY = 0.98, 0.92, 0.98
COPIES = 4  # of the open branches that one round holds at most
WORKING = 24  # copies of a neuron's vertices that a descent holds at most
VERTICES = 11  # of a neuron's graph
AVERAGE = 0.15  # share of the newest touching point in the mean that chooses splits


class Dual:
    """U of a batch of branches; rows `out` [R, 2 N_out] are the objectives on (y1, y1 - y2)."""

    def __init__(self, net: Reduced, hexagons: list[Hexagon], out: Tensor) -> None:
        self.net, self.out = net, out
        self.graphs = [Graph.of(h) for h in hexagons]
        self.empty = torch.zeros(len(out), dtype=torch.bool, device=out.device)
        for graph in self.graphs:
            self.empty = self.empty | graph.empty
        self.corner = net.middle.expand(len(out), -1)

    def start(self) -> list[Tensor]:
        """Slopes [2, R, N] per layer of planes lowest at the middle."""
        slopes, y = [], self.out
        for k in range(self.net.depth, 0, -1):
            y = self.net.back(k, y)
            slopes.append(torch.stack(start_slopes(self.graphs[k - 1], *self._free(k - 1, y))))
            y = self._joined(k - 1, y, slopes[-1])
        return slopes[::-1]

    def _free(self, k: int, y: Tensor) -> tuple[Tensor, Tensor]:
        free = self.net.free[k]
        return y[:, free], y[:, self.net.count[k] + free]

    def _joined(self, k: int, y: Tensor, slopes: Tensor) -> Tensor:
        """Coefficients on (z, d) from those on (a, e): exact where settled, `slopes` where not."""
        n, free, (s1, s2) = self.net.count[k], self.net.free[k], self.net.slopes[k]
        alpha, beta = y[:, :n], y[:, n:]
        joined = torch.cat((s1 * alpha + (s1 - s2) * beta, s2 * beta), 1)
        joined[:, free], joined[:, n + free] = slopes[0], slopes[1]
        return joined

    def value(self, slopes: list[Tensor]) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Certified bounds [R]; touching points (z, d, a, e) [4, R, N] and (alpha, beta) [R, N] per layer."""
        net, y = self.net, self.out
        total, loss = torch.zeros_like(y[:, 0]), y.abs() @ net.output_loss
        touch, coefficients = [], []
        for k in range(net.depth, 0, -1):
            total = total + y @ net.shifts[k]
            y = net.back(k, y)
            loss = loss + y.abs() @ net.before[k - 1]
            graph, (p, q) = self.graphs[k - 1], slopes[k - 1]
            alpha, beta = self._free(k - 1, y)
            raised, at = height(graph, alpha, beta, p, q)
            total = total + raised.sum(1)
            points = (part.expand(len(at), -1, -1) for part in (graph.z, graph.d, graph.a, graph.e))
            touch.append(torch.stack([part.gather(2, at[..., None])[..., 0] for part in points]))
            coefficients.append((alpha, beta))
            y = self._joined(k - 1, y, slopes[k - 1])
            loss = loss + y.abs() @ net.after[k - 1]
        total = total + y @ net.shifts[0]
        x = net.back(0, y)
        total = total + x @ net.middle[0] + x.abs() @ net.radius[0]
        self.corner = net.middle + net.radius * x.sign()
        return torch.nan_to_num(total + loss, nan=torch.inf, posinf=torch.inf), touch[::-1], coefficients[::-1]

    def residuals(self, touch: list[Tensor]) -> list[Tensor]:
        """Subgradients [2, R, N] per layer: forward values from the corner less the touching points."""
        net, state, result = self.net, self.corner, []
        for k in range(net.depth):
            n, free, (s1, s2) = net.count[k], net.free[k], net.slopes[k]
            state = net.forth(k, state) + net.shifts[k]
            z, d = state[:, :n], state[:, n:]
            result.append(torch.stack((z[:, free], d[:, free])) - touch[k][:2])
            state = torch.cat((s1 * z, (s1 - s2) * z + s2 * d), 1)
            state[:, free], state[:, n + free] = touch[k][2], touch[k][3]
        return result

    def descend(
        self, slopes: list[Tensor], steps: int, decay: float, enough: Tensor, clock: Clock = NO_LIMIT
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Adam on the slopes; ends early when all bounds are below `enough` [R], or the clock is over.

        Returns: best bounds [R] (-inf where the branch is empty), their slopes, mean touching points, coefficients.
        """
        slopes = [s.clone() for s in slopes]
        kept = [s.clone() for s in slopes]
        scale = [0.5 * s.abs() + 0.5 * s.abs().mean(2, keepdim=True) + 1e-9 for s in slopes]
        first, second = [torch.zeros_like(s) for s in slopes], [torch.zeros_like(s) for s in slopes]
        best, mean, coefficients = torch.full_like(self.out[:, 0], torch.inf), None, []
        for step in range(1, steps + 1):
            value, touch, coefficients = self.value(slopes)
            better = value < best
            best = torch.where(better, value, best)
            for old, new in zip(kept, slopes, strict=True):
                old.copy_(torch.where(better[None, :, None], new, old))
            mean = touch if mean is None else [m.lerp(t, AVERAGE) for m, t in zip(mean, touch, strict=True)]
            if bool((best <= enough).all()) or clock.over:
                break
            size = RATE * decay**step
            gradients = self.residuals(touch)
            for s, g, m, v, c in zip(slopes, gradients, first, second, scale, strict=True):
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.99).addcmul_(g, g, value=0.01)
                s.sub_((m * c).mul_(size / (1 - 0.9**step)).div_((v / (1 - 0.99**step)).sqrt_().add_(1e-12)))
        assert mean is not None
        return torch.where(self.empty, -torch.inf, best), kept, mean, coefficients


@dataclass(frozen=True)
class Branches:
    """Open branches: hexagons [R, 6, N] and slopes [2, R, N] per layer, objective, bound, and sign to split [R]."""

    hexagons: list[Tensor]
    slopes: list[Tensor]
    row: Tensor
    bound: Tensor
    split: Tensor  # column over the layers' signs of z, then of z2; one past the end: none is left
    more: Tensor  # [R] whether there is one

    def __len__(self) -> int:
        return len(self.row)

    def excess(self, level: Tensor) -> Tensor:
        return self.bound - level.flatten()[self.row]

    def top(self, like: Tensor) -> Tensor:
        none = torch.full_like(like, -torch.inf).flatten()
        return none.scatter_reduce(0, self.row, self.bound, "amax").reshape(like.shape)

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in (*self.hexagons, *self.slopes, *self._each()))

    def _each(self) -> tuple[Tensor, ...]:
        return self.row, self.bound, self.split, self.more

    def select(self, index: Tensor) -> Branches:
        return Branches(
            [h[index] for h in self.hexagons],
            [s[:, index] for s in self.slopes],
            *(part[index] for part in self._each()),
        )

    def join(self, other: Branches) -> Branches:
        return Branches(
            [torch.cat(pair) for pair in zip(self.hexagons, other.hexagons, strict=True)],
            [torch.cat(pair, 1) for pair in zip(self.slopes, other.slopes, strict=True)],
            *map(torch.cat, zip(self._each(), other._each(), strict=True)),
        )

    def children(self) -> Branches:
        """Both sides of every branch's split, >= 0 first. The sides overlap in zero, so nothing is lost."""
        two = self.join(self)
        upper_side = torch.arange(len(two.row), device=two.row.device) < len(self.row)
        offset, result = 0, []
        for hexagons in two.hexagons:
            hexagons = hexagons.clone()
            n = hexagons.shape[2]
            for low in (0, 2):  # bounds of z, then of z2
                i = ((two.split >= offset) & (two.split < offset + n)).nonzero().flatten()
                j, side = two.split[i] - offset, upper_side[i]
                below, above = hexagons[i, low, j], hexagons[i, low + 1, j]
                hexagons[i, low, j] = torch.where(side, below.clamp(min=0), below)
                hexagons[i, low + 1, j] = torch.where(side, above, above.clamp(max=0))
                offset += n
            result.append(Hexagon.unpack(hexagons).tightened().pack())
        return replace(two, hexagons=result)


def choose(
    hexagons: list[Tensor], mean: list[Tensor], coefficients: list[tuple[Tensor, Tensor]], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Sign to split [R] and whether there is one [R]. `like`: any tensor [R]."""
    scores = []
    for packed, (z, d, a, e), (alpha, beta) in zip(hexagons, mean, coefficients, strict=True):
        l1, u1, l2, u2, _, _ = packed.unbind(1)
        gap = (alpha + beta) * (a - z.clamp(min=0)) - beta * (a - e - (z - d).clamp(min=0))
        gap = gap.clamp(min=0) + 1e-15
        open1, open2 = (l1 < 0) & (u1 > 0), (l2 < 0) & (u2 > 0)
        first = open1 & ((alpha + beta >= -beta) | ~open2)
        scores += [torch.where(first, gap, -1.0), torch.where(open2 & ~first, gap, -1.0)]
    scores.append(torch.full_like(like, -0.5)[:, None])
    score, split = torch.cat(scores, 1).max(1)
    return split, score > 0


@torch.no_grad()
def search_signs(
    pair: Pair,
    lower: Tensor,
    upper: Tensor,
    question: Question | None = None,
    *,
    constraints: Constraints | None = None,
    memory: float = torch.inf,
    batch: int = 64,
    starts: int = 24,
    seed: int = 0,
    root: tuple[Hexagon, ...] | None = None,
    clock: Clock = NO_LIMIT,
) -> Iterator[SearchResult]:
    """States of a search over one box lower <= x <= upper [N_in], one per batch.

    It ends with a closed state, or when all that is left are branches with every sign settled.

    Args:
        constraints: witnesses lie in this part of the box; bounds hold for all of it.
        memory: bytes of open branches beyond which it ends, open, instead of splitting more.
        batch: branches split at a time. starts, seed: of the witness search that comes first (`ascend`).
        root: `difference_bounds` of the box, where they are at hand.
        clock: looked at in every step of every descent; when it is over, the state so far is the last one. OutOfTime
            only at the first state, and only without `root`.

    Raises: as `difference_bounds`, at the first state.
    """
    question = question or Question()
    low, high = one_box(pair, lower, upper)
    n = pair.outputs
    *hidden, output = difference_bounds(pair, low, high, clock=clock, memory=memory / 2) if root is None else root
    work = Backward(pair, low, high)
    for hexagon in hidden:
        work.add(hexagon)
    net = Reduced(pair, work)
    best = ascend(pair, low, high, constraints, starts=starts, seed=seed, clock=clock)
    eye = torch.eye(n, dtype=low.dtype, device=low.device)
    objectives = torch.cat((torch.zeros_like(torch.cat((eye, eye))), torch.cat((eye, -eye))), 1)
    packed = [h.pack().expand(2 * n, -1, -1) for h in net.root]
    numbers = min(CHUNK, memory / (8 * WORKING)) / (VERTICES * max([1, *(len(free) for free in net.free)]))
    limit = max(int(numbers), 1)  # rows that one descent takes

    def bounded(hexagons: list[Tensor], slopes: list[Tensor] | None, row: Tensor, caps: Tensor) -> Branches:
        """Branches with bounds, at most `caps`; those without a sign to split are solved."""
        enough = question.enough(best.met.lower).flatten()[row]
        bound, own, split, more = _bounded(net, hexagons, slopes, objectives[row], enough, best, limit, clock)
        bound = torch.minimum(bound, caps)
        leaf = (~more & (bound > enough)).nonzero().flatten()
        if len(leaf):
            slopes_of = [s[:, leaf] for s in own]
            found = _finish(net, [h[leaf] for h in hexagons], slopes_of, objectives, row[leaf], best, question, clock)
            bound[leaf] = torch.minimum(bound[leaf], found)
        return Branches(hexagons, own, row, bound, split, more)

    def divide(old: Branches) -> Branches:
        new = old.children()
        return bounded(new.hexagons, new.slopes, new.row, new.bound)

    def full(left: Branches) -> bool:
        return left.bytes * COPIES > memory or clock.over

    left = bounded(packed, None, torch.arange(2 * n, device=low.device), output.sides[0].flatten())
    most = min(batch, max(limit // 2, 1))
    yield from best_first(left, divide, question, best.met, batch=lambda *_: most, full=full)


def _bounded(
    net: Reduced,
    hexagons: list[Tensor],
    slopes: list[Tensor] | None,
    objectives: Tensor,
    enough: Tensor,
    best: Best,
    limit: int,
    clock: Clock,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Bounds [R], slopes, signs to split [R] and whether there is one [R] of branches, at most `limit` at a time.

    slopes: of the parents; None at the root. Offers the maximising corners to `best`.
    """
    parts = []
    for i in torch.arange(len(objectives), device=objectives.device).split(limit):
        own = [h[i] for h in hexagons]
        dual = Dual(net, net.root if slopes is None else [Hexagon.unpack(h) for h in own], objectives[i])
        if slopes is None:
            found = dual.descend(dual.start(), ROOT_STEPS, ROOT_DECAY, enough[i], clock)
        else:
            found = dual.descend([s[:, i] for s in slopes], STEPS, DECAY, enough[i], clock)
        bound, new, mean, coefficients = found
        best.offer(dual.corner)
        parts.append((bound, new, *choose(own, mean, coefficients, bound)))
    bounds, news, splits, more = zip(*parts, strict=True)
    joined = [torch.cat(layer, 1) for layer in zip(*news, strict=True)]
    return torch.cat(bounds), joined, torch.cat(splits), torch.cat(more)


def _finish(
    net: Reduced,
    hexagons: list[Tensor],
    slopes: list[Tensor],
    objectives: Tensor,
    row: Tensor,
    best: Best,
    question: Question,
    clock: Clock,
) -> Tensor:
    """Bounds [R] of branches without a sign to split, of the objectives of number `row` [R]; infinite out of time."""
    enough = question.enough(best.met.lower).flatten()[row]
    if net.exact:
        try:
            value, x = solve_leaves(net, hexagons, objectives[row], enough, question.tolerance / 4, clock)
        except OutOfTime:
            return torch.full_like(enough, torch.inf)
    else:
        dual = Dual(net, [Hexagon.unpack(h) for h in hexagons], objectives[row])
        value = dual.descend(slopes, LEAF_STEPS, LEAF_DECAY, enough, clock)[0]
        x = dual.corner
    best.offer(x)
    return value
