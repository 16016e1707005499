"""One neuron of two networks at once: its hexagon, and planes above what its two ReLUs do to a linear objective.

z is the first network's pre-activation, z2 the second's, d = z - z2, a = relu(z), e = relu(z) - relu(z - d).
The pair lies in the hexagon

    H = {l1 <= z <= u1,  l2 <= z - d <= u2,  dl <= d <= du}

on each of whose four sign quadrants (of z and z2) a and e are linear. For ANY slopes (p, q) therefore

    alpha a + beta e  <=  p z + q d + r,    r = max over the vertices of H cut by z = 0 and z2 = 0
                                                of  alpha a + beta e - p z - q d              ("vertex height")

so that slopes decide how tight a plane is, never whether it holds. Slopes worth starting from, with
M = max(du, 0), m = max(-dl, 0), for beta > 0 (mirrored for beta < 0 by swapping networks: z -> z2, d -> -d):

    e <= relu(d) <= its chord                             e lies between 0 and d
    e <= d + k (u1 - z),   k = m / (max(u1, 0) + m)       e - d = relu(-z) - relu(-z2), at most m, 0 at z = u1
    e <= k (z - l1),       k = M / (M - min(l1, 0))       e <= min(z, M) where z >= 0, else e <= 0
    the chords (or 0, 1 below) of the two ReLUs apart

Every height carries an allowance for rounding, argued at `height` and `ClosedPlanes`. Bounds of a hexagon that are
derived from others are rounded outward.

Ideas: ReluDiff (Paulsen, Wang, Wang: ICSE 2020) and NeuroDiff (Paulsen, Wang, Wang, Wang: ASE 2020) for the
difference coordinates, VeryDiff (Teuber, Kern, Janzen, Beckert, 2024) for bounding z, z2 and d together,
CROWN (Zhang et al.: NeurIPS 2018) for planes chosen by the sign of the coefficient, and beta-CROWN (Wang et al.:
NeurIPS 2021) for split constraints as multipliers: here the free slopes over a hexagon that a split has cut.

Axis letters: B boxes or branches, R rows (one objective each), N neurons, K vertices; "..." are leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreach.core.masks import leading
from torchreach.core.roundoff import above, allowance, below, gamma

TINY = 1e-300
# Relative. A vertex is the crossing of two of the lines z, z2, d = constant; each coordinate is a bound itself or
# a sum of two, hence within the unit roundoff of the true one: this much keeps every true vertex.
TOUCH = allowance(1.0, 8)


@dataclass(frozen=True)
class Hexagon:
    """Bounds of N neurons, [B, N] each: l1 <= z <= u1, l2 <= z - d <= u2, dl <= d <= du."""

    l1: Tensor
    u1: Tensor
    l2: Tensor
    u2: Tensor
    dl: Tensor
    du: Tensor

    def parts(self) -> tuple[Tensor, ...]:
        return self.l1, self.u1, self.l2, self.u2, self.dl, self.du

    def map(self, rule: Callable[[Tensor], Tensor]) -> Hexagon:
        return Hexagon(*(rule(part) for part in self.parts()))

    def swapped(self) -> Hexagon:
        """The networks in each other's place."""
        return Hexagon(self.l2, self.u2, self.l1, self.u1, -self.du, -self.dl)

    def moved(self, shift: Tensor) -> Hexagon:
        """Both numbers plus shift [N]. Rounded outward."""
        l1, u1, l2, u2, dl, du = self.parts()
        return Hexagon(below(l1 + shift), above(u1 + shift), below(l2 + shift), above(u2 + shift), dl, du)

    def with_difference(self, dl: Tensor, du: Tensor) -> Hexagon:
        """The same bounds of z and z2 with others of d."""
        return Hexagon(self.l1, self.u1, self.l2, self.u2, dl, du)

    def within(self, other: Hexagon) -> Hexagon:
        """The points of both."""
        (l1, u1, l2, u2, dl, du), parts = self.parts(), other.parts()
        low = [torch.maximum(a, b) for a, b in zip((l1, l2, dl), parts[::2], strict=True)]
        high = [torch.minimum(a, b) for a, b in zip((u1, u2, du), parts[1::2], strict=True)]
        return Hexagon(low[0], high[0], low[1], high[1], low[2], high[2])

    def replaced(self, columns: Tensor, new: Hexagon) -> Hexagon:
        """With other bounds of the neurons `columns`."""
        return Hexagon(*(a.index_copy(1, columns, b) for a, b in zip(self.parts(), new.parts(), strict=True)))

    @property
    def sides(self) -> Tensor:
        """[B, 2, N] bounds above d and -d: of y1 - y2 and y2 - y1 where the neurons are outputs."""
        return torch.stack((self.du, -self.dl), 1)

    def pack(self) -> Tensor:
        """[B, 6, N]."""
        return torch.stack(self.parts(), 1)

    @staticmethod
    def unpack(packed: Tensor) -> Hexagon:
        return Hexagon(*packed.unbind(1))

    def tightened(self) -> Hexagon:
        """The same set with every bound that the others imply; two rounds reach the fixed point. Rounded outward."""
        l1, u1, l2, u2, dl, du = self.parts()
        for _ in range(2):
            l1, u1 = torch.maximum(l1, below(l2 + dl)), torch.minimum(u1, above(u2 + du))
            l2, u2 = torch.maximum(l2, below(l1 - du)), torch.minimum(u2, above(u1 - dl))
            dl, du = torch.maximum(dl, below(l1 - u2)), torch.minimum(du, above(u1 - l2))
        return Hexagon(l1, u1, l2, u2, dl, du)

    def settled(self) -> Tensor:
        """[B, N] whether both signs are known: (a, e) is then a linear function of (z, d)."""
        return ((self.l1 >= 0) | (self.u1 <= 0)) & ((self.l2 >= 0) | (self.u2 <= 0))

    def active(self) -> tuple[Tensor, Tensor]:
        """Slopes 0 or 1 of the two ReLUs where they are settled, [B, N] each."""
        return (self.l1 >= 0).to(self.l1), (self.l2 >= 0).to(self.l1)

    def linear(self, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients (p, q) [B, R, N] of alpha a + beta e on (z, d), right where both signs are settled."""
        s1, s2 = (slope[:, None] for slope in self.active())
        return s1 * alpha + (s1 - s2) * beta, s2 * beta

    def sizes(self) -> tuple[Tensor, Tensor]:
        """Bounds on max(|z|, |z2|) and on |d|, [B, N] each."""
        z = torch.stack((self.l1, self.u1, self.l2, self.u2)).abs().amax(0)
        return z, torch.maximum(self.dl.abs(), self.du.abs())


@dataclass(frozen=True)
class Graph:
    """Vertices of N neurons' graphs: z, d, a = relu(z), e = relu(z) - relu(z - d), [..., N, K] each.

    empty [B] is true only where no point satisfies some neuron's bounds: a branch that does not exist.
    """

    hexagon: Hexagon
    z: Tensor
    d: Tensor
    a: Tensor
    e: Tensor
    empty: Tensor

    @staticmethod
    def of(hexagon: Hexagon) -> Graph:
        """Graphs [B, N, K] of hexagons [B, N], which must be finite."""
        z, d, empty = _vertices(hexagon)
        return Graph(hexagon, z, d, z.clamp(min=0), relu_difference(z, d), empty.any(1))

    def for_rows(self) -> Graph:
        """With an axis for rows: [B, 1, N, K] and hexagons [B, 1, N]."""
        z, d, a, e = (part[:, None] for part in (self.z, self.d, self.a, self.e))
        return Graph(self.hexagon.map(lambda part: part[:, None]), z, d, a, e, self.empty)


def relu_difference(z: Tensor, d: Tensor) -> Tensor:
    """relu(z) - relu(z - d), from min(z, d) and d - z rather than two ReLUs: its error is relative to d, not to z."""
    return torch.where(z >= 0, torch.minimum(z, d), (d - z).clamp(max=0))


def _vertices(hexagon: Hexagon) -> tuple[Tensor, Tensor, Tensor]:
    """(z, d) [B, N, K] of points that include all vertices of H's quadrants, and whether [B, N] there is none.

    Unused places repeat the first point.
    """
    zero = torch.zeros_like(hexagon.l1)[..., None]
    z, d, there = vertices(hexagon, zero, zero)
    z, d = gathered(there, z, d)
    return z, d, ~there.any(2)


def gathered(there: Tensor, *parts: Tensor) -> list[Tensor]:
    """The values of parts [B, N, K] where `there` [B, N, K] is true; unused places repeat the first of them."""
    count = max(int(there.sum(2).max()), 1) if there.numel() else 1
    order = leading(there, count)
    order = torch.where(there.gather(2, order), order, order[..., :1])
    return [part.gather(2, order) for part in parts]


def vertices(hexagon: Hexagon, lines: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z, d) [B, N, K] of points and which of them lie in H: among these all vertices of H cut at some lines.

    lines: [B, N, I] numbers z, other: [B, N, J] numbers z2, NaN where there is none. The points are crossings of two of
    all lines: for one of each 21, of which at most 11 lie in H. A point that is kept although it lies outside by
    rounding only raises a height.
    """
    l1, u1, l2, u2, dl, du = hexagon.parts()
    lines_z, lines_y = torch.cat((torch.stack((l1, u1), 2), lines), 2), torch.cat((torch.stack((l2, u2), 2), other), 2)
    lines_d = torch.stack((dl, du), 2)
    z1, y1 = _cross(lines_z, lines_y)
    z2, d2 = _cross(lines_z, lines_d)
    y3, d3 = _cross(lines_y, lines_d)
    z = torch.cat((z1, z2, y3 + d3), 2)
    y = torch.cat((y1, z2 - d2, y3), 2)
    d = torch.cat((z1 - y1, d2, d3), 2)
    return z, d, _within(z, l1, u1) & _within(y, l2, u2) & _within(d, dl, du)


def _cross(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of [B, N, I] and [B, N, J]: [B, N, I J] each."""
    shape = (*first.shape, second.shape[2])
    return first[..., :, None].expand(shape).flatten(2), second[..., None, :].expand(shape).flatten(2)


def _within(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    slack = TOUCH * value.abs()
    return (value >= low[..., None] - slack) & (value <= high[..., None] + slack)


def height(graph: Graph, alpha: Tensor, beta: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Vertex height r [..., N] of the plane p z + q d + r above alpha a + beta e, and the vertex it touches.

    Rounding: a vertex's z and a are off by u |z|, its d and e by 3 u |d| (e moves with z only where
    |z| <= |d|), each product and sum by u of its terms. So r is off by less than
    16 u ((|alpha| + |p|) |z| + (|beta| + |q|) |d|), which `height_allowance` adds; a factor of two is spare.
    """
    value = alpha[..., None] * graph.a
    value.addcmul_(beta[..., None], graph.e).addcmul_(p[..., None], graph.z, value=-1)
    return value.addcmul_(q[..., None], graph.d, value=-1).max(-1)


def height_allowance(
    alpha: Tensor, beta: Tensor, p: Tensor, q: Tensor, sizes: tuple[Tensor, Tensor], terms: int
) -> Tensor:
    """[...] allowance for the sum over neurons of `height`s: sizes as `Hexagon.sizes`, `terms` of the sum."""
    z, d = sizes
    return 2 * gamma(terms + 8) * ((alpha.abs() + p.abs()) * z + (beta.abs() + q.abs()) * d).sum(-1)


def start_slopes(graph: Graph, alpha: Tensor, beta: Tensor, *, apart: bool = False) -> tuple[Tensor, Tensor]:
    """Slopes (p, q) [..., N] of a plane above alpha a + beta e: of the four above, the lowest at the mean vertex.

    apart: only the plane that bounds the two networks' ReLUs each on their own.
    """
    l1, u1, l2, u2, dl, du = graph.hexagon.parts()
    s1, s2, t1, t2 = _chord(l1, u1), _chord(l2, u2), (u1 > -l1).to(u1), (u2 > -l2).to(u2)
    # two networks apart: (alpha + beta) relu(z) - beta relu(z2)
    both = alpha + beta
    p1 = both * torch.where(both >= 0, s1, t1)
    p2 = -beta * torch.where(beta <= 0, s2, t2)
    if apart:
        return p1 + p2, -p2
    up = beta >= 0
    size, zero = beta.abs(), torch.zeros_like(beta)
    M, m = du.clamp(min=0), (-dl).clamp(min=0)
    pa = alpha * torch.where(alpha >= 0, s1, t1)
    chord = torch.where(up, _chord(dl, du), -_chord(-du, -dl))
    ka = torch.where(up, _share(m, u1), _share(M, u2))
    kb = torch.where(up, _share(M, -l1), _share(m, -l2))
    options = (
        (p1 + p2, -p2),
        (pa, size * chord),
        (pa - size * ka, size * torch.where(up, 1.0, ka - 1)),
        (pa + size * kb, size * torch.where(up, zero, -kb)),
    )
    ps, qs = (torch.stack([option[i] for option in options]) for i in (0, 1))
    z, d = graph.z.mean(-1), graph.d.mean(-1)
    with torch.no_grad():
        levels = [height(graph, alpha, beta, p, q)[0] + p * z + q * d for p, q in options]
        best = torch.stack(levels).argmin(0, keepdim=True)
    return ps.gather(0, best)[0], qs.gather(0, best)[0]


def _chord(low: Tensor, high: Tensor) -> Tensor:
    """Slope of the chord of relu over [low, high]."""
    chord = high / (high - low).clamp(min=TINY)
    return torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, chord))


def _share(part: Tensor, rest: Tensor) -> Tensor:
    """part / (part + max(rest, 0)) for part >= 0."""
    return part / (part + rest.clamp(min=0)).clamp(min=TINY)


@dataclass(frozen=True)
class ClosedPlanes:
    """Closed-form planes above alpha a + beta e of N neurons over B boxes; no vertices. All parts [B, 1, N].

    The triangle bounds a; of the four planes above, the lowest at the middle bounds e. Which it is depends on the sign
    of beta alone, so that it is chosen once for all rows. Looser than vertex heights of the same slopes where a and e
    trade off, and many times faster.

    Rounding: slopes are off by 3 u of themselves and each height is a slope times a bound, so that planes are off
    by less than 8 u times slope times |z| or |d|; where the networks are bounded apart, heights are of size |z|.

    a: slopes above and below relu(z), and the height of the one above. up, down: above e and -e, slopes on (z, d),
    height, and 1 where the networks are bounded apart. sizes: `Hexagon.sizes`.
    """

    a: tuple[Tensor, Tensor, Tensor]
    up: tuple[Tensor, Tensor, Tensor, Tensor]
    down: tuple[Tensor, Tensor, Tensor, Tensor]
    sizes: tuple[Tensor, Tensor]

    @staticmethod
    def of(hexagon: Hexagon) -> ClosedPlanes:
        hexagon = hexagon.map(lambda part: part[:, None])
        l1, u1 = hexagon.l1, hexagon.u1
        s1, undecided = _chord(l1, u1), (l1 < 0) & (u1 > 0)
        below = torch.where(undecided, (u1 > -l1).to(u1), s1)
        p, q, r, apart = _above_e(hexagon.swapped())
        # back: a swapped network's z is z2 = z - d, its d is -d
        return ClosedPlanes(
            (s1, below, torch.where(undecided, -s1 * l1, 0.0)),
            _above_e(hexagon),
            (p, -q - p, r, apart),
            hexagon.sizes(),
        )

    def above(self, alpha: Tensor, beta: Tensor, terms: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slopes p, q and heights [B, R, N]; alpha, beta: [1 or B, R, N]. `terms` as in `height_allowance`."""
        chord, below, rise = self.a
        # e from above with weight |beta|: for beta < 0 the networks swap places
        swap, size = beta < 0, beta.abs()
        p, q, r, apart = (size * torch.where(swap, b, a) for a, b in zip(self.up, self.down, strict=True))
        z, d = self.sizes
        raised = 2 * gamma(terms + 8) * ((alpha.abs() + p.abs() + apart) * z + (size + q.abs()) * d)
        over = alpha >= 0
        return alpha * torch.where(over, chord, below) + p, q, torch.where(over, alpha * rise, 0.0) + r + raised


def _above_e(hexagon: Hexagon) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The plane above e that is lowest at the middle: slopes, height, and 1 where it bounds the networks apart."""
    l1, u1, l2, u2, dl, du = hexagon.parts()
    M, m, zero = du.clamp(min=0), (-dl).clamp(min=0), torch.zeros_like(du)
    chord, k2, k3 = _chord(dl, du), _share(m, u1), _share(M, -l1)
    s1, t2 = _chord(l1, u1), torch.where(l2 >= 0, 1.0, torch.where(u2 <= 0, 0.0, (u2 > -l2).to(u2)))
    p = torch.stack((zero, -k2, k3, s1 - t2))
    q = torch.stack((chord, torch.ones_like(chord), zero, t2))
    r = torch.stack((
        torch.where((dl < 0) & (du > 0), -chord * dl, zero),
        k2 * u1.clamp(min=0),
        -k3 * l1.clamp(max=0),
        torch.where((l1 < 0) & (u1 > 0), -s1 * l1, zero),
    ))  # fmt: skip
    best = (p * ((l1 + u1) / 2) + q * ((dl + du) / 2) + r).argmin(0, keepdim=True)
    p, q, r = (part.gather(0, best)[0] for part in (p, q, r))
    on, off = (l1 >= 0) & (l2 >= 0), (u1 <= 0) & (u2 <= 0)
    flat = on | off
    p, r = torch.where(flat, zero, p), torch.where(flat, zero, r)
    return p, torch.where(flat, on.to(q), q), r, torch.where((best[0] == 3) & ~flat, 1.0, zero)
