"""Branch and bound on the signs of single neurons, for boxes of many dimensions.

A branch keeps the hexagons (see `domains.hexagon`) of the neurons that were undecided at the root; a split of z >= 0 or
z <= 0, or of z2, only moves one bound to zero; a split of a rounded neuron's codes (`domains.stairs`), one to the
threshold between two of them. Its bound is the Lagrange dual of `search.dual`.

Which sign: alpha a + beta e = (alpha + beta) relu(z) - beta relu(z2), and only a term with positive coefficient is
loose from above (relu is convex). So z is split where alpha + beta >= -beta, else z2; after that one split the
neuron is tight from above. Which neuron: the largest gap between the averaged touching point and the
true graph, both terms added before clamping, because they cancel; of rounded neurons the distance from the nearest
code, times its coefficient. What codes leave of those of the next layer is found by intervals (`Reduced.narrowed`).

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
from torchreach.core.memory import batch_size
from torchreach.domains.difference import CHUNK, Backward, difference_bounds
from torchreach.domains.hexagon import Hexagon
from torchreach.domains.pair import Pair
from torchreach.domains.stairs import StairPair
from torchreach.search.best_first import Tree, best_first
from torchreach.search.boxes import one_box
from torchreach.search.dual import Dual
from torchreach.search.leaves import solve_leaves
from torchreach.search.reduced_pair import Reduced
from torchreach.search.result import Attained, Best, Constraints, Question, SearchResult
from torchreach.search.witness import ascend

ROOT_STEPS, STEPS, LEAF_STEPS, LAYER_STEPS = 150, 30, 200, 40
ROUNDED_STEPS, ROUNDED_DECAY = 60, 0.94
# Shares of the time that is left, for better bounds of a layer and of all that see the inputs together.
LAYER, CLOSER = 0.1, 0.15
ROOT_DECAY, DECAY, LEAF_DECAY = 0.98, 0.92, 0.98
# Branches split at a time: twice as many every round, up to so many.
FIRST, BATCH = 64, {"cpu": 64, "cuda": 1024}
COPIES = 4  # of the open branches that one round holds at most
WORKING = 24  # copies of a neuron's vertices that a descent holds at most
VERTICES, ROUNDED_VERTICES = 11, 4  # of a neuron's graph, and how many times as many of a rounded one


@dataclass(frozen=True)
class Branches:
    """Open branches: hexagons [R, 6 or 10, N] (see `Reduced.root`) and slopes [2, R, N] per layer, objective, bound,
    and sign to split [R]: of a rounded neuron whether it has this code `at` [R] at most."""

    hexagons: list[Tensor]
    slopes: list[Tensor]
    row: Tensor
    bound: Tensor
    split: Tensor  # column over the layers' signs of z, then of z2; one past the end: none is left
    at: Tensor
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
        return self.row, self.bound, self.split, self.at, self.more

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

    def children(self, net: Reduced) -> Branches:
        """Both sides of every branch's split, >= 0 first. The sides overlap in zero, so nothing is lost."""
        two = self.join(self)
        upper_side = torch.arange(len(two.row), device=two.row.device) < len(self.row)
        offset, result = 0, list[Tensor]()
        for k, (hexagons, stairs) in enumerate(zip(two.hexagons, net.stairs, strict=True)):
            hexagons = hexagons.clone()
            n = hexagons.shape[2]
            for low in (0, 2):  # bounds of z, then of z2
                i = ((two.split >= offset) & (two.split < offset + n)).nonzero().flatten()
                j, side = two.split[i] - offset, upper_side[i]
                below, above = hexagons[i, low, j], hexagons[i, low + 1, j]
                limit = torch.zeros_like(below)
                if stairs is not None:
                    own, code = (stairs.first, stairs.second)[low // 2].part(j), two.at[i]
                    limit = torch.where(own.rounds, own.threshold(code), limit)
                    first, last = hexagons[i, 6 + low, j], hexagons[i, 7 + low, j]
                    hexagons[i, 6 + low, j] = torch.where(own.rounds & side, torch.maximum(first, code + 1), first)
                    hexagons[i, 7 + low, j] = torch.where(own.rounds & ~side, torch.minimum(last, code), last)
                hexagons[i, low, j] = torch.where(side, torch.maximum(below, limit), below)
                hexagons[i, low + 1, j] = torch.where(side, above, torch.minimum(above, limit))
                offset += n
            tight = Hexagon.unpack(hexagons[:, :6])
            tight = (net.narrowed(k, result[-1], tight) if k else tight).tightened()
            result.append(tight.pack() if stairs is None else stairs.packed(tight, hexagons[:, 6:]))
        return replace(two, hexagons=result)


def choose(
    net: Reduced, hexagons: list[Tensor], mean: list[Tensor], coefficients: list[tuple[Tensor, Tensor]], like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sign or code to split [R], the code [R], and whether there is one [R]. `like`: any tensor [R]."""
    scores, codes = [], []
    for packed, stairs, (z, d, a, e), (alpha, beta) in zip(hexagons, net.stairs, mean, coefficients, strict=True):
        l1, u1, l2, u2 = packed[:, :4].unbind(1)
        gap = (alpha + beta) * (a - z.clamp(min=0)) - beta * (a - e - (z - d).clamp(min=0))
        gap = gap.clamp(min=0) + 1e-15
        open1, open2 = (l1 < 0) & (u1 > 0), (l2 < 0) & (u2 > 0)
        first = open1 & ((alpha + beta >= -beta) | ~open2)
        pair = [torch.where(first, gap, -1.0), torch.where(open2 & ~first, gap, -1.0)]
        ats = [torch.zeros_like(z), torch.zeros_like(z)]
        if stairs is not None:
            values = (stairs.first, z, a, alpha + beta, open1), (stairs.second, z - d, a - e, beta, open2)
            mixed = stairs.first.rounds | stairs.second.rounds
            for w, (own, at, value, weight, signs) in enumerate(values):
                low, high = packed[:, 6 + 2 * w], packed[:, 7 + 2 * w]
                off = weight.abs() * (value - own.nearest(at, low, high)).abs() + 1e-15
                undecided = torch.where(own.rounds, high > low, signs)
                pair[w] = torch.where(mixed, torch.where(undecided, off, -1.0), pair[w])
                ats[w] = torch.minimum(torch.maximum((own.position(at) - 0.5).round(), low), high - 1)
        scores += pair
        codes += ats
    none = torch.full_like(like, -0.5)[:, None]
    score, split = torch.cat([*scores, none], 1).max(1)
    return split, torch.cat([*codes, none], 1).gather(1, split[:, None])[:, 0], score > 0


@torch.no_grad()
def search_signs(
    pair: Pair,
    lower: Tensor,
    upper: Tensor,
    question: Question | None = None,
    *,
    constraints: Constraints | None = None,
    memory: float = torch.inf,
    batch: int | None = None,
    starts: int = 24,
    seed: int = 0,
    root: tuple[Hexagon, ...] | None = None,
    stairs: tuple[StairPair | None, ...] = (),
    best: Attained | None = None,
    tree: Tree | None = None,
    clock: Clock = NO_LIMIT,
) -> Iterator[SearchResult]:
    """States of a search over one box lower <= x <= upper [N_in], one per batch.

    It ends with a closed state, or when all that is left are branches with every sign settled.

    Args:
        constraints: witnesses lie in this part of the box; bounds hold for all of it.
        memory: bytes of open branches beyond which it ends, open, instead of splitting more.
        batch: most branches split at a time; by default what suits the device. starts, seed: of the witness search
            that comes first (`ascend`).
        root: `difference_bounds` of the box, where they are at hand.
        stairs: of each hidden layer, where networks round (`RelaxedDifference.staircases`); then with `root`.
        best: what is attained, where the pair itself attains nothing; else witnesses are searched.
        tree: kept up to date for another search to go on from (where nothing rounds); this one goes on from it where it
            is of one.
        clock: looked at in every step of every descent; when it is over, the state so far is the last one. OutOfTime
            only at the first state, and only without `root`.

    Raises: as `difference_bounds`, at the first state.
    """
    question = question or Question()
    low, high = one_box(pair, lower, upper)
    n = pair.outputs
    if tree is not None and tree.left is not None:
        best, root = Best(pair, low, high, low, constraints, clock), tree.root
        tree.attained(best.met)
    root = difference_bounds(pair, low, high, clock=clock, memory=memory / 2) if root is None else root
    if best is None:  # of what rounds nothing was gained by `_closer`: noise outweighs what inputs share
        best = ascend(pair, low, high, constraints, starts=starts, seed=seed, clock=clock)
        if bool((root[-1].sides[0] > question.enough(best.met.lower)).any()):
            root = _closer(pair, low, high, root, memory, clock)
    if tree is not None:
        tree.root = root
    *hidden, output = root
    work = Backward(pair, low, high)
    for k, hexagon in enumerate(hidden):
        own = stairs[k] if stairs else None
        if k and stairs:
            hexagon = _tightened(pair, work, hexagon, own, memory, clock)
        work.add(hexagon, own and own.limited(hexagon))
    net = Reduced(pair, work)
    eye = torch.eye(n, dtype=low.dtype, device=low.device)
    objectives = torch.cat((torch.zeros_like(torch.cat((eye, eye))), torch.cat((eye, -eye))), 1)
    packed = [h.expand(2 * n, -1, -1) for h in net.root]
    limit = _rows(VERTICES * (ROUNDED_VERTICES if net.rounded else 1), memory, net.free)

    def bounded(hexagons: list[Tensor], slopes: list[Tensor] | None, row: Tensor, caps: Tensor) -> Branches:
        """Branches with bounds, at most `caps`; those without a sign to split are solved."""
        enough = question.enough(best.met.lower).flatten()[row]
        bound, own, split, at, more = _bounded(net, hexagons, slopes, objectives[row], enough, best, limit, clock)
        bound = torch.minimum(bound, caps)
        leaf = (~more & (bound > enough)).nonzero().flatten()
        if len(leaf):
            slopes_of = [s[:, leaf] for s in own]
            found = _finish(net, [h[leaf] for h in hexagons], slopes_of, objectives, row[leaf], best, question, clock)
            bound[leaf] = torch.minimum(bound[leaf], found)
        return Branches(hexagons, own, row, bound, split, at, more)

    def divide(old: Branches) -> Branches:
        new = old.children(net)
        return bounded(new.hexagons, new.slopes, new.row, new.bound)

    def full(left: Branches) -> bool:
        return left.bytes * COPIES > memory or clock.over

    most = min(batch or batch_size(BATCH, low.device), max(limit // 2, 1))
    rounds = 0
    if tree is not None and tree.left is not None:
        left, rounds = tree.left, tree.learned
    else:
        left = bounded(packed, None, torch.arange(2 * n, device=low.device), output.sides[0].flatten())

    def size(*_: object) -> int:
        nonlocal rounds
        rounds += 1
        return min(FIRST << min(rounds - 1, 30), most)

    know = {"tree": tree, "learned": lambda: rounds}
    yield from best_first(left, divide, question, best.met, batch=size, full=full, **know)


def _rows(vertices: int, memory: float, layers: list[Tensor]) -> int:
    """Rows that one descent takes at a time, of layers with so many neurons of so many vertices."""
    widest = max([1, *map(len, layers)])
    return max(int(min(CHUNK, memory / (8 * WORKING)) / (vertices * widest)), 1)


def _bounded(
    net: Reduced,
    hexagons: list[Tensor],
    slopes: list[Tensor] | None,
    objectives: Tensor,
    enough: Tensor,
    best: Attained,
    limit: int,
    clock: Clock,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """Bounds [R], slopes, and what `choose` says of branches, at most `limit` at a time.

    slopes: of the parents; None at the root. Offers the maximising corners to `best`.
    """
    parts = []
    for i in torch.arange(len(objectives), device=objectives.device).split(limit):
        own = [h[i] for h in hexagons]
        dual = Dual(net, net.root if slopes is None else own, objectives[i])
        if slopes is None:
            found = dual.descend(dual.start(), ROOT_STEPS, ROOT_DECAY, enough[i], clock)
        else:
            pace = (ROUNDED_STEPS, ROUNDED_DECAY) if net.rounded else (STEPS, DECAY)
            found = dual.descend([s[:, i] for s in slopes], *pace, enough[i], clock)
        bound, new, mean, coefficients = found
        best.offer(dual.corner)
        parts.append((bound, new, *choose(net, own, mean, coefficients, bound)))
    bounds, news, splits, ats, more = zip(*parts, strict=True)
    joined = [torch.cat(layer, 1) for layer in zip(*news, strict=True)]
    return torch.cat(bounds), joined, torch.cat(splits), torch.cat(ats), torch.cat(more)


def _closer(
    pair: Pair, low: Tensor, high: Tensor, root: tuple[Hexagon, ...], memory: float, clock: Clock
) -> tuple[Hexagon, ...]:
    """The bounds `root`, and those that see the inputs together where there is time for them."""
    patience = clock.share(CLOSER)
    try:
        found = difference_bounds(pair, low, high, together=patience, clock=clock, memory=memory / 2)
    except OutOfTime:
        return root
    return tuple(new.within(old).tightened() for new, old in zip(found, root, strict=True))


def _tightened(
    pair: Pair, work: Backward, hexagon: Hexagon, stairs: StairPair | None, memory: float, clock: Clock
) -> Hexagon:
    """Better bounds of the undecided neurons of the layer to be added next, by a descent for each of their ends."""
    open = ~hexagon.settled() if stairs is None else stairs.undecided(hexagon)
    rows = open[0].nonzero().flatten()
    n, parts = len(rows), [rows, *work.free]
    if not n or (not clock.limited and 6 * n * max(map(len, parts)) > CHUNK):
        return hexagon
    net, limit = Reduced(pair, work, rows), _rows(VERTICES * ROUNDED_VERTICES, memory, parts)
    # l1, u1, l2, u2, dl, du as objectives on (z, d), with z2 = z - d
    sides = hexagon.l1.new_tensor([[-1, 0], [1, 0], [-1, 1], [1, -1], [0, -1], [0, 1]])
    found, clock = hexagon.map(lambda part: part[:, rows]).parts(), clock.share(LAYER)
    bounds = torch.stack([-found[0], found[1], -found[2], found[3], -found[4], found[5]])[:, 0].flatten()
    for i in torch.arange(6 * n, device=rows.device).split(limit):
        if clock.over:
            break
        objectives, own, side = bounds.new_zeros(len(i), 2, n), i % n, sides[i // n]
        objectives.scatter_(2, own[:, None, None].expand(-1, 2, 1), side[..., None])
        dual = Dual(net, net.root, objectives.flatten(1))
        value = dual.descend(dual.start(), LAYER_STEPS, DECAY, torch.full_like(bounds[i], -torch.inf), clock)[0]
        bounds[i] = torch.minimum(bounds[i], value)
    l1, u1, l2, u2, dl, du = bounds.reshape(6, 1, n)
    return hexagon.replaced(rows, Hexagon(-l1, u1, -l2, u2, -dl, du).tightened())


def _finish(
    net: Reduced,
    hexagons: list[Tensor],
    slopes: list[Tensor],
    objectives: Tensor,
    row: Tensor,
    best: Attained,
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
        dual = Dual(net, hexagons, objectives[row])
        value = dual.descend(slopes, LEAF_STEPS, LEAF_DECAY, enough, clock)[0]
        x = dual.corner
    best.offer(x)
    return value
