"""Lines and planes around smooth activations sigma, and around the difference of two of them, for sets of neurons.

An interval [l, u] of a pre-activation is cut into `CELLS` cells [x, x'] of width w. On each, sigma' is monotone between
the turns of `networks.smooth`, so its range [a, b] is that of its values at x, x' and the turns in between. For any
slope s, g = sigma - s x has slopes in [a - s, b - s] there, so that

    g  <=  max(g(x), g(x'))  +  (b - a) w / 4  where a < s < b, else  + 0                                (height)

(where a < s < b, g stays below both g(x) + (b - s)(t - x) and g(x') + (s - a)(x' - t), which cross no higher than
(b - s)(s - a) w / (b - a) <= (b - a) w / 4 above the larger end). The slope decides how tight a line is, never
whether it holds. Slopes worth trying: the chord, the slope in the middle, and the lines from either end that touch the
graph beyond the middle; the lowest in the middle, which has the least area below it, is kept.

Difference, with z - z2 = d, e = sigma(z) - sigma(z2): the mean of sigma' between z2 and z lies between the least and
the largest slope [a, b] over the hull of both, hence

    min(a d, b d)  <=  e  <=  max(a d, b d)                                                    (mean value theorem)

whose upper end is convex in d, and so below its chord over [dl, du]; the lower end is above its own. Other planes bound
sigma(z) and sigma(z2) apart. Whichever is tighter in the middle is taken, neuron by neuron.

Every offset carries an allowance for rounding and for the error of sigma itself.

Axis letters: B boxes, N neurons, K cells; "..." are leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchreach.core.tolerances import UNIT_ROUNDOFF
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

    @staticmethod
    def of(function: Smooth, lower: Tensor, upper: Tensor) -> Cells:
        """lower <= upper [...], finite, float64."""
        share = torch.linspace(0, 1, CELLS + 1, dtype=lower.dtype, device=lower.device)
        # Rounding is monotone, so the places are in order; the last is the end itself.
        x = torch.minimum(lower + (upper - lower) * share.reshape(-1, *[1] * lower.ndim), upper)
        x[-1] = upper
        slope = function.slope(x)
        low, high = torch.minimum(slope[:-1], slope[1:]), torch.maximum(slope[:-1], slope[1:])
        for turn in function.turns:
            near = NEAR * (1 + abs(turn.at))
            inside = (x[:-1] <= turn.at + near) & (x[1:] >= turn.at - near)
            low = torch.where(inside, low.clamp(max=turn.low), low)
            high = torch.where(inside, high.clamp(min=turn.high), high)
        error = function.error(torch.maximum(lower.abs(), upper.abs()))
        return Cells(x, function.value(x), low - function.slope_error, high + function.slope_error, error)

    @property
    def slopes(self) -> Ends:
        """Range of sigma'."""
        return self.low.amin(0), self.high.amax(0)

    def mirrored(self) -> Cells:
        """-sigma."""
        return Cells(self.x, -self.y, -self.high, -self.low, self.error)

    def height(self, slope: Tensor) -> Tensor:
        """t [...] with sigma(x) <= slope x + t."""
        g = self.y - slope * self.x
        bent = (self.low < slope) & (self.high > slope)
        excess = torch.where(bent, (self.high - self.low) * (self.x[1:] - self.x[:-1]) / 4, 0.0)
        top = (torch.maximum(g[:-1], g[1:]) + excess).amax(0)
        size = torch.maximum(self.x[0].abs(), self.x[-1].abs())
        return top + self.error + 8 * UNIT_ROUNDOFF * (top.abs() + slope.abs() * size)

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
        return slope, (top + bottom) / 2, (top - bottom) / 2 * (1 + 4 * UNIT_ROUNDOFF) + TINY


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
        low, high = Cells.of(function, lower.amin(0), upper.amax(0)).slopes
        return CurvePlanes(
            index,
            cells.above(),
            cells.below(),
            _rise(low, high, dl, du),
            tuple(-part for part in _rise(-high, -low, dl, du)),  # type: ignore[arg-type]
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
        return p, q, (r + 2 * (terms + 16) * UNIT_ROUNDOFF * loss).sum(-1)


def _rise(low: Tensor, high: Tensor, dl: Tensor, du: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, q, r of a plane above e = s d for all slopes s in [low, high], d in [dl, du]."""
    left, right = torch.maximum(low * dl, high * dl), torch.maximum(low * du, high * du)
    q = torch.where(du > dl, (right - left) / (du - dl).clamp(min=TINY), high)
    q = torch.minimum(torch.maximum(q, low), high)
    r = torch.maximum(left - q * dl, right - q * du)
    size = torch.maximum(low.abs(), high.abs()) * torch.maximum(dl.abs(), du.abs())
    return torch.zeros_like(q), q, r + 8 * UNIT_ROUNDOFF * size


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
        bottom, top = bottom - 4 * UNIT_ROUNDOFF * bottom.abs(), top + 4 * UNIT_ROUNDOFF * top.abs()
        far = 4 * UNIT_ROUNDOFF * (most.abs() + least.abs()).sum(0)
        bottom, top = torch.maximum(bottom, least[0] - most[1] - far), torch.minimum(top, most[0] - least[1] + far)
        low, high = low.index_copy(1, index, least[0]), high.index_copy(1, index, most[0])
        dl, du = dl.index_copy(1, index, bottom), du.index_copy(1, index, top)
    return (low, high), (dl, du)
