"""Rounded activations as what they are, staircases, where `rounding.relax` makes free noise of them.

Over the range of its pre-activation a rounded neuron takes few codes, often two. As noise it may be off by half a step
whatever the input is; as a staircase it is off upwards and downwards at different inputs, and once its code is known
not at all. So a neuron of a pair is a hexagon (`domains.hexagon`) cut at the thresholds of either staircase: on each
piece a = f(z) and e = f(z) - g(z - d) are linear, and

    alpha a + beta e  <=  p z + q d + r,    r = max over the vertices of all pieces of  alpha a + beta e - p z - q d

for any slopes. A vertex on a threshold has both values: whoever executes the network may give either code there. A
neuron of more than `FEW` thresholds is bounded by the two lines half a step above and below, which end at its first and
last code; their kinks are thresholds then.

z here is what is rounded, plus the shift of `rounding.relax`: what the affine block computes, whose rounding by the
kernel stays noise. The bounds of a relaxation, which hold for any noise, are therefore too wide by the noise that this
takes out of it (`Stairs.spare`).

Axis letters: R branches, N neurons, K vertices.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from torchreach.core.roundoff import above, allowance, ball, below
from torchreach.domains.hexagon import Graph, Hexagon, gathered, height, relu_difference, vertices
from torchreach.graph.quantizer import Quantizer

FEW = 3  # thresholds of a neuron that are looked at one by one
# Steps from a threshold within which both codes count: far more than positions are off by, which are differences of
# numbers of at most some hundred steps.
NEAR = 1e-9


@dataclass(frozen=True)
class Stairs:
    """Activations of N neurons of one network, rounded where `rounds` is true, else relu; [N] each.

    base: value of the first code; scale: from code to code; count: last code, the first being 0; shift: what was added
    to the number that is rounded; radius: bound on |f(z) - relu(z)|; spare: what `rounding.relax` has of noise beyond
    what the affine block is off by.
    """

    rounds: Tensor
    base: Tensor
    scale: Tensor
    count: Tensor
    shift: Tensor
    radius: Tensor
    spare: Tensor

    @staticmethod
    def none(like: Tensor) -> Stairs:
        """Neurons of which none rounds."""
        zero = torch.zeros_like(like)
        return Stairs(zero.bool(), zero, torch.ones_like(like), zero, zero, zero, zero)

    @staticmethod
    def of(
        quantizer: Quantizer,
        codes: tuple[Tensor, Tensor],
        size: Tensor,
        shift: Tensor,
        radius: Tensor,
        noise: Tensor,
        own: Tensor,
    ) -> Stairs:
        """Of a quantiser of numbers |z| <= size [N] that have these smallest and largest codes.

        shift, radius: as `rounding.excess` gives them. noise: all that the relaxation has of it, own: that of the
        affine block and of its kernel.
        """
        first, last = codes
        base, scale = quantizer.value(first), quantizer.value(first + 1) - quantizer.value(first)
        # By how much a code may be that of another number: it then counts as noise of the affine block.
        off = (quantizer.half_step(size) - scale / 2).clamp(min=0)
        rounds = ~torch.as_tensor(quantizer.passing, device=size.device).expand_as(size)
        spare = noise - above(own + off + allowance(size + shift.abs() + base.abs() + scale + noise.abs(), 16))
        stairs = Stairs(rounds, base, scale, last - first, shift, above(radius + off), spare)
        return stairs.only(rounds)

    def only(self, rounds: Tensor) -> Stairs:
        """The same where `rounds` is true; the others do not round."""
        none = Stairs.none(self.base)
        return Stairs(
            *(torch.where(rounds, getattr(self, each.name), getattr(none, each.name)) for each in fields(self))
        )

    def fixed(self, constant: Tensor) -> Stairs:
        """The same where neurons that have one code are `constant` in the relaxation too, and have no noise in it."""
        zero = torch.zeros_like(self.base)
        return replace(self, **{name: torch.where(constant, zero, getattr(self, name)) for name in ("shift", "spare")})

    def moved(self, shift: Tensor) -> Stairs:
        """Both z and f(z) plus shift [N]; where nothing is rounded z must be positive."""
        return replace(self, base=torch.where(self.rounds, self.base + shift, self.base))

    def part(self, index: Tensor) -> Stairs:
        return Stairs(*(getattr(self, each.name)[index] for each in fields(self)))

    @property
    def largest(self) -> Tensor:
        """[N] bound on |f(z)|."""
        return torch.maximum(self.base.abs(), (self.base + self.scale * self.count).abs())

    def position(self, z: Tensor) -> Tensor:
        """Where z [..., N] lies, in codes: k - 1/2 and k + 1/2 are the thresholds of code k."""
        return (z - self.shift - self.base) / self.scale

    def threshold(self, code: Tensor) -> Tensor:
        """z [..., N] between the code and the next one."""
        return self.shift + self.base + self.scale * (code + 0.5)

    def within(self, low: Tensor, high: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Codes first..last [R, N] that z in [low, high] may have."""
        first = torch.maximum(first, torch.ceil(self.position(low) - 0.5 - NEAR).clamp(max=self.count))
        last = torch.minimum(last, torch.floor(self.position(high) + 0.5 + NEAR).clamp(min=0))
        return first, last

    def limited(self, low: Tensor, high: Tensor) -> Stairs:
        """The same with only the codes that z in [low, high] [N] may have."""
        first, last = self.within(low, high, torch.zeros_like(self.count), self.count)
        count = (last - first).clamp(min=0)
        return replace(self, base=torch.where(self.rounds, self.base + self.scale * first, self.base), count=count)

    def lines(self, first: Tensor, last: Tensor) -> Tensor:
        """[R, N, L] numbers z at which the pieces end, of codes first..last; NaN where there are fewer."""
        none = torch.full_like(first, torch.nan)
        few = last - first <= FEW
        steps = [torch.where(first + k < last, self.threshold(first + k), none) for k in range(FEW)]
        ends = [self.threshold(part) for part in (first, last - 1, first - 1, last)]
        stairs = [torch.where(few, step, end) for step, end in zip((*steps, none), ends, strict=True)]
        kink = [torch.zeros_like(first), none, none, none]
        return torch.stack([torch.where(self.rounds, s, k) for s, k in zip(stairs, kink, strict=True)], 2)

    def values(self, z: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest f(z) at z [R, N, K], given codes first..last [R, N]."""
        rounds, base, scale = (part[:, None] for part in (self.rounds, self.base, self.scale))
        few, first, last = (last - first <= FEW)[..., None], first[..., None], last[..., None]
        at, ends = self.position(z.mT).mT, []
        for low in (True, False):
            # The code at a threshold, of many codes the line half a step off.
            code = torch.ceil(at - 0.5 - NEAR) if low else torch.floor(at + 0.5 + NEAR)
            line = at - 0.5 - NEAR if low else at + 0.5 + NEAR
            code = torch.minimum(torch.maximum(torch.where(few, code, line), first), last)
            ends.append(torch.where(rounds, base + scale * code, z.clamp(min=0)))
        return ends[0], ends[1]

    def ends(self, low: Tensor, high: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest f(z) [R, N] for z in [low, high] and codes first..last."""
        values = [(end.clamp(min=0), self.base + self.scale * code) for end, code in ((low, first), (high, last))]
        result = [torch.where(self.rounds, value, relu) for relu, value in values]
        return result[0], torch.maximum(result[0], result[1])

    def nearest(self, z: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """f(z) [R, N] by the nearest of the codes first..last."""
        code = torch.minimum(torch.maximum(self.position(z).round(), first), last)
        return torch.where(self.rounds, self.base + self.scale * code, z.clamp(min=0))


@dataclass(frozen=True)
class StairPair:
    """Stairs of one layer of two networks: what is known of its neurons [N] without looking at single vertices.

    one: whether the first network rounds none of them.
    """

    first: Stairs
    second: Stairs
    one: bool

    @staticmethod
    def of(first: Stairs | None, second: Stairs | None, like: Tensor) -> StairPair | None:
        """None where neither rounds. like: [N]."""
        if first is None and second is None:
            return None
        pair = [Stairs.none(like) if stairs is None else stairs for stairs in (first, second)]
        return StairPair(pair[0], pair[1], first is None)

    def moved(self, shift: Tensor) -> StairPair:
        return StairPair(self.first.moved(shift), self.second.moved(shift), self.one)

    def part(self, index: Tensor) -> StairPair:
        return StairPair(self.first.part(index), self.second.part(index), self.one)

    def limited(self, hexagon: Hexagon) -> StairPair:
        """The same with only the codes that there are in a hexagon [1, N]."""
        l1, u1, l2, u2, _, _ = (part[0] for part in hexagon.parts())
        return StairPair(self.first.limited(l1, u1), self.second.limited(l2, u2), self.one)

    @property
    def codes(self) -> Tensor:
        """[4, N] first and last code of either."""
        zero = torch.zeros_like(self.first.count)
        return torch.stack((zero, self.first.count, zero, self.second.count))

    def few(self, codes: Tensor) -> Tensor:
        """[R, N] where a neuron is rounded to few of the codes [R, 4, N]."""
        one, other = codes[:, 1] - codes[:, 0] <= FEW, codes[:, 3] - codes[:, 2] <= FEW
        return (self.first.rounds & one) | (self.second.rounds & other)

    def packed(self, hexagon: Hexagon, codes: Tensor) -> Tensor:
        """[R, 10, N] bounds and the codes [R, 4, N] that z and z2 may have within them."""
        first = self.first.within(hexagon.l1, hexagon.u1, *codes[:, :2].unbind(1))
        second = self.second.within(hexagon.l2, hexagon.u2, *codes[:, 2:].unbind(1))
        return torch.cat((hexagon.pack(), torch.stack((*first, *second), 1)), 1)

    def used(self, hexagon: Hexagon) -> Tensor:
        """[B, N] where one of the activations may be other than zero."""
        ends = (self.first, hexagon.u1), (self.second, hexagon.u2)
        one, other = (torch.where(s.rounds, (s.count > 0) | (s.base != 0), top > 0) for s, top in ends)
        return one | other

    def undecided(self, hexagon: Hexagon) -> Tensor:
        """[B, N] where an activation has more than one code or, not rounded, more than one sign."""
        ends = (self.first, hexagon.l1, hexagon.u1), (self.second, hexagon.l2, hexagon.u2)
        one, other = (torch.where(s.rounds, s.count > 0, (low < 0) & (high > 0)) for s, low, high in ends)
        return one | other

    def linear(self, hexagon: Hexagon) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Of neurons that are decided: slopes [N] of both activations, and [2 N] what is added to (a, e)."""
        s1, s2 = (
            torch.where(s.rounds, 0.0, slope[0])
            for s, slope in zip((self.first, self.second), hexagon.active(), strict=True)
        )
        a, a2 = (torch.where(s.rounds, s.base, 0.0) for s in (self.first, self.second))
        return (s1, s2), torch.cat((a, a - a2))

    def sizes(self, hexagon: Hexagon) -> tuple[Tensor, Tensor]:
        """Bounds [B, N] on |z|, |z2|, |a| and |a2|, and on |d| and |e|, with room for how e is computed."""
        z, d = hexagon.sizes()
        radius = self.first.radius + self.second.radius
        return above(z + radius), above(d + 2 * (z + radius))


def staircase_graph(hexagon: Hexagon, both: StairPair, codes: Tensor) -> Graph:
    """Graphs [R, N, K] of hexagons [R, N]; codes: [R, 4, N] first and last code of either network."""
    first, second = both.first, both.second
    own, other = codes[:, :2].unbind(1), codes[:, 2:].unbind(1)
    kink = torch.zeros_like(hexagon.l1)[..., None]
    z, d, there = vertices(hexagon, kink if both.one else first.lines(*own), second.lines(*other))
    low2, high2 = second.values(z - d, *other)
    smooth = ~(first.rounds | second.rounds)[:, None]
    if both.one:
        a = z.clamp(min=0)
        ways = [(a, low2, there), (a, high2, there & (high2 > low2))]
    else:
        low1, high1 = first.values(z, *own)
        more1, more2 = there & (high1 > low1), there & (high2 > low2)
        ways = [(low1, low2, there), (low1, high2, more2), (high1, low2, more1), (high1, high2, more1 & more2)]
    points = [(z, d, a, torch.where(smooth, relu_difference(z, d), a - a2), found) for a, a2, found in ways]
    z, d, a, e, there = (torch.cat(part, 2) for part in zip(*points, strict=True))
    empty = (~there.any(2) | (codes[:, 0] > codes[:, 1]) | (codes[:, 2] > codes[:, 3])).any(1)
    z, d, a, e = (part.nan_to_num(nan=0.0) for part in gathered(there, z, d, a, e))
    return Graph(hexagon, z, d, a, e, empty)


def chord_slopes(
    graph: Graph, both: StairPair, alpha: Tensor, beta: Tensor, p: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """Slopes (p, q) [R, N], or those of the lines through both ends of either activation: what is lower at the mean.

    Of codes that change within less than a step such a line is far steeper than that of a relu.
    """
    l1, u1, l2, u2, _, _ = graph.hexagon.parts()
    chords = []
    for own, low, high in ((both.first, l1, u1), (both.second, l2, u2)):
        ends = [own.values(end[..., None], torch.zeros_like(end), own.count.expand_as(end)) for end in (low, high)]
        rise = (ends[1][1] - ends[0][0])[..., 0]
        chords.append(torch.where(high > low, rise / (high - low).clamp(min=1e-12), 0.0))
    own = (alpha + beta) * chords[0] - beta * chords[1], beta * chords[1]
    z, d = graph.z.mean(-1), graph.d.mean(-1)
    levels = [height(graph, alpha, beta, *part)[0] + part[0] * z + part[1] * d for part in ((p, q), own)]
    better = levels[1] < levels[0]
    return torch.where(better, own[0], p), torch.where(better, own[1], q)


def without_noise(hexagon: Hexagon, first: Stairs | None, second: Stairs | None) -> Hexagon:
    """Bounds [B, N] without what of the noise is none of the affine blocks': they hold for any values of it."""
    zero = torch.zeros_like(hexagon.l1)
    s1, s2 = (zero if stairs is None else stairs.spare.expand_as(zero) for stairs in (first, second))
    l1, u1, l2, u2, dl, du = hexagon.parts()
    return Hexagon(
        below(l1 + s1),
        above(u1 - s1),
        below(l2 + s2),
        above(u2 - s2),
        below(dl + below(s1 + s2)),
        above(du - below(s1 + s2)),
    ).tightened()


def excess(
    quantizer: Quantizer,
    low: Tensor,
    high: Tensor,
    kernel: Tensor | float = 0.0,
    codes: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Range (middle, radius) of Q(computed z) - z over z in [low, high] with the smallest and largest of `codes`.

    kernel: how far the computed z may be from z.
    """
    low, high = low - kernel, high + kernel
    first, last = quantizer.code_range(low, high) if codes is None else codes
    half, several = quantizer.half_step(torch.maximum(low.abs(), high.abs())), last > first
    most, least = quantizer.value(first) - low, quantizer.value(last) - high
    most = torch.where(several, torch.maximum(most, half), most) + kernel
    least = torch.where(several, torch.minimum(least, -half), least) - kernel
    middle, radius = ball(least, most)
    radius = radius + allowance(high.abs() + low.abs())
    passing = torch.as_tensor(quantizer.passing, device=low.device)
    return torch.where(passing, 0.0, middle), torch.where(passing, 0.0, radius)


def clamped_line(
    quantizer: Quantizer, low: Tensor, high: Tensor, kernel: Tensor, codes: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, middle and radius [N] with Q(computed z) in slope z + middle +- radius over z in [low, high]; as `excess`.

    What a quantiser cuts off beyond its first or last code it cuts off as a relu does: a line through both ends.
    """
    middle, radius = excess(quantizer, low, high, kernel, codes)
    slope = torch.ones_like(low)
    bottom, top = (quantizer.value(torch.as_tensor(end).to(low)) for end in (quantizer.lowest, quantizer.highest))
    half = quantizer.half_step(torch.maximum(low.abs(), high.abs()) + kernel)
    width = high - low
    for end, inside, beyond in ((bottom, high, low), (top, low, high)):
        cut = (beyond - end).abs()
        one = (
            (inside > bottom) & (inside < top) & ((beyond < bottom) if end is bottom else (beyond > top)) & (width > 0)
        )
        line = torch.where(one, (inside - end).abs() / width.clamp(min=1e-300), 1.0)
        # relu(t) lies between line t and line (t + cut), t being how far z is on the inside of the end
        rise = line * cut / 2
        off = rise + half + kernel
        at = (1 - line) * end + (rise if end is bottom else -rise)
        off = off + allowance(at.abs() + end.abs() + low.abs() + high.abs(), 16)
        better = one & (off < radius)
        slope, middle, radius = (
            torch.where(better, new, old) for new, old in ((line, slope), (at, middle), (off, radius))
        )
    return slope, middle, radius
