"""Lines and planes around smooth activations sigma, and around the difference of two of them, for sets of neurons.

An interval [l, u] of a pre-activation is cut into `CELLS` cells [x, x'] of width w. On each, sigma' is monotone between
the turns of `graph.smooth`, so its range [a, b] is that of its values at x, x' and the turns in between. For any
slope s, g = sigma - s x has slopes in [a - s, b - s] there, so that

    g  <=  max(g(x), g(x'))  +  (b - a) w / 4  where a < s < b, else  + 0                                (height)

(where a < s < b, g stays below both g(x) + (b - s)(t - x) and g(x') + (s - a)(x' - t), which cross no higher than
(b - s)(s - a) w / (b - a) <= (b - a) w / 4 above the larger end). The slope decides how tight a line is, never
whether it holds. Slopes worth trying: the chord, the slope in the middle, and the lines from either end that touch the
graph beyond the middle; the lowest in the middle, which has the least area below it, is kept.

Difference, with z - z2 = d, e = sigma(z) - sigma(z2): the mean of sigma' between z2 and z lies between the least and
the largest slope [a, b] over the hull of both, hence

    min(a d, b d)  <=  e  <=  max(a d, b d)                                                    (mean value theorem)

whose upper end is convex in d, and so below its chord over [dl, du]; the lower end is above its own. More tightly, let
sigma'(x) lie in c (x - m) + [a, b] over the hull, for any c. The mean of a linear function between z2 and z is its
value at the midpoint v = (z + z2) / 2 = z - d / 2, so

    c (v - m) d + min(a d, b d)  <=  e  <=  c (v - m) d + max(a d, b d)

For fixed d the upper end is linear in v, for fixed v convex in d: less any plane, it is largest at a corner of a box of
(v, d) around the hexagon, which gives the plane's offset. c = 0 is the mean value theorem. Where c is the slope of the
chord of sigma', the band [a, b] comes from the cells again: sigma' - c (x - m) is at most its larger end plus
curl w^2 / 8, for |sigma'''| <= curl, and at most what the range of sigma' says. Other planes bound sigma(z) and
sigma(z2) apart. Whichever is tightest in the middle is taken, neuron by neuron.

Every offset carries an allowance for rounding and for the error of sigma itself.

Axis letters: B boxes, N neurons, K cells; "..." are leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchreach.core.roundoff import above, allowance, ball, below, gamma
from torchreach.domains.hexagon import Hexagon
from torchreach.graph.smooth import Smooth
from torchreach.graph.steps import Step

CELLS = 16
TINY = 1e-300
NEAR = 1e-12  # a turn this close to a cell, relative, counts as inside

Ends = tuple[Tensor, Tensor]
Line = tuple[Tensor, Tensor]  # slope s, offset t of s x + t


@dataclass(frozen=True, eq=False)
class Cells:
    """sigma on intervals [...]: x, y = sigma(x) [1 + K, ...]; range of sigma' on each cell, low, high [K, ...].

    error: [...] on each computed y.
    """

    x: Tensor
    y: Tensor
    low: Tensor
    high: Tensor
    error: Tensor
    slope: Tensor  # sigma'(x) [1 + K, ...]
    smooth: Tensor  # [K, ...] cells without a kink

    @staticmethod
    def of(function: Smooth, lower: Tensor, upper: Tensor) -> Cells:
        """lower <= upper [...], finite, float64."""
        share = torch.linspace(0, 1, CELLS + 1, dtype=lower.dtype, device=lower.device)
        # Rounding is monotone, so the places are in order; the last is the end itself.
        x = torch.minimum(lower + (upper - lower) * share.reshape(-1, *[1] * lower.ndim), upper)
        x[-1] = upper
        slope = function.slope(x)
        low, high = torch.minimum(slope[:-1], slope[1:]), torch.maximum(slope[:-1], slope[1:])
        smooth = torch.ones_like(low, dtype=torch.bool)
        for turn in function.turns:
            near = NEAR * (1 + abs(turn.at))
            inside = (x[:-1] <= turn.at + near) & (x[1:] >= turn.at - near)
            low = torch.where(inside, low.clamp(max=turn.low), low)
            high = torch.where(inside, high.clamp(min=turn.high), high)
            smooth = smooth & ~inside if turn.kink else smooth
        error = function.error(torch.maximum(lower.abs(), upper.abs()))
        low, high = low - function.slope_error, high + function.slope_error
        return Cells(x, function.value(x), low, high, error, slope, smooth)

    @property
    def slopes(self) -> Ends:
        """Range of sigma'."""
        return self.low.amin(0), self.high.amax(0)

    def mirrored(self) -> Cells:
        """-sigma."""
        return Cells(self.x, -self.y, -self.high, -self.low, self.error, -self.slope, self.smooth)

    def height(self, slope: Tensor) -> Tensor:
        """t [...] with sigma(x) <= slope x + t."""
        g = self.y - slope * self.x
        bent = (self.low < slope) & (self.high > slope)
        excess = torch.where(bent, (self.high - self.low) * (self.x[1:] - self.x[:-1]) / 4, 0.0)
        top = (torch.maximum(g[:-1], g[1:]) + excess).amax(0)
        size = torch.maximum(self.x[0].abs(), self.x[-1].abs())
        return top + self.error + allowance(top.abs() + slope.abs() * size, 8)

    def above(self) -> Line:
        """The line above sigma that is lowest in the middle, of those tried."""
        x, y, half = self.x, self.y, CELLS // 2
        width = (x[-1] - x[0]).clamp(min=TINY)
        middle = (self.low[half] + self.high[half - 1]) / 2
        tries = (
            (y[-1] - y[0]) / width,
            middle,
            ((y[half:] - y[0]) / (x[half:] - x[0]).clamp(min=TINY)).amax(0),
            ((y[-1] - y[: half + 1]) / (x[-1] - x[: half + 1]).clamp(min=TINY)).amin(0),
        )
        low, high = self.slopes
        slopes = torch.stack([torch.minimum(torch.maximum(s, low), high) for s in tries])
        heights = torch.stack([self.height(s) for s in slopes])
        best = (heights + slopes * (x[0] + (x[-1] - x[0]) / 2)).argmin(0, keepdim=True)
        return slopes.gather(0, best)[0], heights.gather(0, best)[0]

    def below(self) -> Line:
        """The line below sigma that is highest in the middle."""
        slope, height = self.mirrored().above()
        return -slope, -height

    def tilt(self) -> Tensor:
        """Slope c [...] of the chord of sigma', 0 where the interval is too narrow to tell."""
        width, size = self.x[-1] - self.x[0], torch.maximum(self.x[0].abs(), self.x[-1].abs())
        return torch.where(width > 1e-6 * (1 + size), (self.slope[-1] - self.slope[0]) / width.clamp(min=TINY), 0.0)

    def lift(self, c: Tensor, middle: Tensor, curl: float, error: float) -> Tensor:
        """b [...] with sigma'(x) <= c (x - middle) + b away from kinks; error: of each computed slope."""
        line = c * (self.x - middle)
        g, width = self.slope - line, self.x[1:] - self.x[:-1]
        bent = torch.maximum(g[:-1], g[1:]) + curl * width**2 / 8 + error
        top = self.high - torch.minimum(line[:-1], line[1:])
        top = torch.where(self.smooth, torch.minimum(top, bent), top).amax(0)
        return top + allowance(top.abs() + line[0].abs() + line[-1].abs(), 16)

    def range(self) -> Ends:
        """Of sigma."""
        zero = torch.zeros_like(self.error)
        return -self.mirrored().height(zero), self.height(zero)

    def band(self) -> tuple[Tensor, Tensor, Tensor]:
        """Slope, middle and half height [...] of a band around sigma."""
        slope = (self.y[-1] - self.y[0]) / (self.x[-1] - self.x[0]).clamp(min=TINY)
        low, high = self.slopes
        slope = torch.minimum(torch.maximum(slope, low), high)
        top, bottom = self.height(slope), -self.mirrored().height(-slope)
        middle, half = ball(bottom, top)
        return slope, middle, half + TINY


@dataclass(frozen=True, eq=False)
class CurvePlanes:
    """Planes for n neurons [B, n] of two networks over a hexagon: everything that does not depend on an objective.

    over, under: lines of sigma over the intervals of z [0] and of z2 [1]: slopes, offsets [2, B, n].
    rise, fall: planes p z + q d + r above and below e.
    """

    index: Tensor  # of the neurons
    over: Line
    under: Line
    rise: tuple[Tensor, Tensor, Tensor]
    fall: tuple[Tensor, Tensor, Tensor]
    middle: Ends  # of z and d
    sizes: Ends

    @staticmethod
    def of(function: Smooth, hexagon: Hexagon, index: Tensor) -> CurvePlanes:
        l1, u1, l2, u2, dl, du = hexagon.parts()
        lower, upper = torch.stack((l1, l2)), torch.stack((u1, u2))
        # Bounds that rounding has crossed hold of no point: any interval will do.
        lower, upper = torch.minimum(lower, upper), torch.maximum(lower, upper)
        dl, du = torch.minimum(dl, du), torch.maximum(dl, du)
        cells = Cells.of(function, lower, upper)
        hull = Cells.of(function, lower.amin(0), upper.amax(0))
        middle, tilt = (hull.x[0] + hull.x[-1]) / 2, hull.tilt()
        c = torch.stack((torch.zeros_like(tilt), tilt))
        curl, error = function.curl, function.slope_error
        high = torch.stack([hull.lift(slope, middle, curl, error) for slope in c])
        low = -torch.stack([hull.mirrored().lift(-slope, middle, curl, error) for slope in c])
        vl = torch.stack(((l1 + l2) / 2, l1 - du / 2, l2 + dl / 2)).amax(0)
        vu = torch.stack(((u1 + u2) / 2, u1 - dl / 2, u2 + du / 2)).amin(0)
        size = allowance(vl.abs() + vu.abs() + dl.abs() + du.abs())
        box = torch.minimum(vl, vu) - size, torch.maximum(vl, vu) + size, dl, du
        # torch's function may be off twice
        jump = torch.where(
            (dl == 0) & (du == 0), 0.0, 2 * function.jumps(torch.maximum(lower.abs(), upper.abs()).amax(0))
        )
        rise, fall = _rise(c, middle, low, high, box), _rise(-c, middle, -high, -low, box)
        return CurvePlanes(
            index,
            cells.above(),
            cells.below(),
            (*rise[:2], rise[2] + jump),
            (-fall[0], -fall[1], -fall[2] - jump),
            ((l1 + u1) / 2, (dl + du) / 2),
            hexagon.sizes(),
        )

    def above(self, alpha: Tensor, beta: Tensor, terms: int, *, apart: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Slopes p, q [B, R, n] of planes above alpha a + beta e, a = sigma(z), and their summed height [B, R].

        apart: only the planes of the two networks each on its own. `terms` as in `hexagon.height_allowance`.

        Rounding: p, q and a height are each off by 4 u of the terms they are summed from.
        """
        (s1, s2), (t1, t2) = (part[:, :, None] for part in self.over)
        (v1, v2), (w1, w2) = (part[:, :, None] for part in self.under)
        z, d = (part[:, None] for part in self.middle)
        size_z, size_d = (part[:, None] for part in self.sizes)
        both = alpha + beta
        up, down = both >= 0, beta <= 0  # (alpha + beta) sigma(z) - beta sigma(z2)
        p1, r1 = both * torch.where(up, s1, v1), both * torch.where(up, t1, w1)
        p2, r2 = beta * torch.where(down, s2, v2), beta * torch.where(down, t2, w2)
        p, q, r = p1 - p2, p2, r1 - r2
        loss = (both.abs() + alpha.abs() + p1.abs() + p2.abs()) * size_z + r1.abs() + r2.abs() + p2.abs() * size_d
        if not apart:
            up, rises = alpha >= 0, beta >= 0
            rise, fall = ([part[:, None] for part in plane] for plane in (self.rise, self.fall))
            p1, r1 = alpha * torch.where(up, s1, v1), alpha * torch.where(up, t1, w1)
            p2, q2, r2 = (beta * torch.where(rises, a, b) for a, b in zip(rise, fall, strict=True))
            joint = p1 + p2, q2, r1 + r2
            lost = (p1.abs() + p2.abs()) * size_z + q2.abs() * size_d + r1.abs() + r2.abs()
            better = joint[0] * z + joint[1] * d + joint[2] < p * z + q * d + r
            p, q, r = (torch.where(better, a, b) for a, b in zip(joint, (p, q, r), strict=True))
            loss = torch.where(better, lost, loss)
        return p, q, (r + 2 * gamma(terms + 8) * loss).sum(-1)


def _rise(
    c: Tensor, m: Tensor, low: Tensor, high: Tensor, box: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """p, q, r [B, n] of a plane p z + q d + r above (c (v - m) + s) d for all s in [low, high] and (v, d) in the box.

    c, low, high: [2, B, n], of which the choice that is lower in the middle is taken. v = z - d / 2.

    Rounding: a corner's value is off by 8 u of the terms it is summed from.
    """
    vl, vu, dl, du = box
    v, d = (vl + vu) / 2, (dl + du) / 2
    left, right = torch.maximum(low * dl, high * dl), torch.maximum(low * du, high * du)
    chord = torch.where(du > dl, (right - left) / (du - dl).clamp(min=TINY), high)
    p = c * d
    q = c * (v - m) + torch.minimum(torch.maximum(chord, low), high) - p / 2
    corners = [
        c * (x - m) * y + top - p * (x + y / 2) - q * y for x in (vl, vu) for y, top in ((dl, left), (du, right))
    ]
    size_v, size_d = torch.maximum(vl.abs(), vu.abs()), torch.maximum(dl.abs(), du.abs())
    size = (c.abs() * (size_v + m.abs()) + torch.maximum(low.abs(), high.abs()) + q.abs()) * size_d
    r = torch.stack(corners).amax(0) + allowance(size + p.abs() * (size_v + size_d), 16)
    best = (p * (v + d / 2) + q * d + r).argmin(0, keepdim=True)
    p, q, r = (part.gather(0, best)[0] for part in (p, q, r))
    return p, q, r


def activated(step: Step, hexagon: Hexagon) -> tuple[Ends, Ends]:
    """Bounds [B, N] of a, and of e, of a hidden layer whose pre-activations lie in the hexagon."""
    low, high = hexagon.l1.clamp(min=0), hexagon.u1.clamp(min=0)
    dl, du = hexagon.dl.clamp(max=0), hexagon.du.clamp(min=0)
    for function, index in step.curves:
        l1, u1, l2, u2, d1, d2 = hexagon.map(lambda part, index=index: part[:, index]).parts()
        ranges = Cells.of(function, torch.stack((l1, l2)), torch.stack((torch.maximum(u1, l1), torch.maximum(u2, l2))))
        least, most = ranges.range()
        a, b = Cells.of(function, torch.minimum(l1, l2), torch.stack((u1, u2, l1, l2)).amax(0)).slopes
        ends = torch.stack((a * d1, b * d1, a * d2, b * d2))
        bottom, top = ends.amin(0), ends.amax(0)
        jump = torch.where((d1 == 0) & (d2 == 0), 0.0, 2 * function.jumps(torch.stack((l1, u1, l2, u2)).abs().amax(0)))
        bottom, top = below(bottom) - jump, above(top) + jump
        far = allowance((most.abs() + least.abs()).sum(0))
        bottom, top = torch.maximum(bottom, least[0] - most[1] - far), torch.minimum(top, most[0] - least[1] + far)
        low, high = low.index_copy(1, index, least[0]), high.index_copy(1, index, most[0])
        dl, du = dl.index_copy(1, index, bottom), du.index_copy(1, index, top)
    return (low, high), (dl, du)
