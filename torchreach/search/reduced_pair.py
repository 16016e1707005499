"""A pair of networks over one box: without the neurons that are off in both, maps of (z, d) side by side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchreach.core.roundoff import above, ball, below, gamma
from torchreach.domains.difference import CHUNK, Backward
from torchreach.domains.hexagon import Graph, Hexagon
from torchreach.domains.pair import Pair
from torchreach.domains.stairs import staircase_graph
from torchreach.graph.twins import Maps, Matrices


class Reduced:
    """The pair over one box: neurons that are off in both networks left out, maps of (z, d) side by side.

    `free[k]` are the undecided neurons among the kept ones of hidden layer k; `before`, `after` bound what rounding
    costs per unit of an objective's coefficients, before and after a layer's planes (as `Backward` does).
    rows: objectives are on these neurons of the first layer that `work` does not have yet; None: on the outputs.
    """

    def __init__(self, pair: Pair, work: Backward, rows: Tensor | None = None) -> None:
        self.middle, self.radius = work.middle, work.radius
        keep, hexagons, self.free = [*work.on], work.hexagons, work.free
        # Of the free neurons: their stairs, if they have any, and bounds [1, 6, N], codes in four rows more.
        self.stairs = [work.stairs[k].part(i) if k in work.stairs else None for k, i in enumerate(self.free)]
        packed = [h.pack()[:, :, i] for h, i in zip(hexagons, self.free, strict=True)]
        self.root = [
            h if s is None else torch.cat((h, s.codes[None]), 1) for h, s in zip(packed, self.stairs, strict=True)
        ]
        self.count = [len(i) for i in keep]
        self.slopes, self.constant = [], list[Tensor | None]()
        for k, h in enumerate(hexagons):
            slopes, constant = work.stairs[k].linear(h) if k in work.stairs else (tuple(s[0] for s in h.active()), None)
            if constant is not None:
                constant[torch.cat((self.free[k], self.count[k] + self.free[k]))] = 0.0
            self.slopes.append(slopes)
            self.constant.append(constant)
        self.maps: list[Tensor | Maps] = []  # as one matrix where they are matrices
        self.shifts: list[Tensor] = []
        outputs = len(pair.b[len(hexagons)])
        keep.append(torch.arange(outputs, device=pair.device) if rows is None else rows)
        for k, kept in enumerate(keep):
            part = pair.maps[k].part(kept, keep[k - 1] if k else None)
            if isinstance(part, Matrices):
                W, V, D = part.W, part.V, part.D
                below = torch.cat((D, V), 1) if k else D
                part = torch.cat((torch.cat((W, torch.zeros_like(W)), 1) if k else W, below))
            self.maps.append(part)
            self.shifts.append(torch.cat((pair.b[k][kept], pair.db[k][kept])))
        gammas = [2 * gamma(2 * n + 8 * pair.depth + 8) for n in self.count]
        sizes = [work.stairs[k].sizes(h) if k in work.stairs else h.sizes() for k, h in enumerate(hexagons)]
        self.before = [g * torch.cat(size, 1)[0] for g, size in zip(gammas, sizes, strict=True)]
        self.noise = [torch.cat(pair.noise(k))[torch.cat((i, i + len(pair.b[k])))] for k, i in enumerate(keep)]
        losses = [torch.cat((P[0], Q[0])) for P, Q in work.errors]
        self.after = [b + loss for b, loss in zip(self.before, losses, strict=False)]
        self.output_loss = losses[-1][torch.cat((keep[-1], outputs + keep[-1]))]
        self.exact = all(pair.exact) and not work.stairs  # whether branches are polytopes in the end
        self.count_terms = max(pair.terms(k) for k in range(pair.depth)) + pair.inputs
        self._made_of = pair, work

    @cached_property
    def onward(self) -> list[_Onward | None]:
        """Of layers after rounded ones: how the second network's free neurons depend on the layer before."""
        pair, work = self._made_of
        after = [k and k - 1 in work.stairs and k in work.stairs for k in range(self.depth)]
        return [_Onward.of(pair, work, k) if needed else None for k, needed in enumerate(after)]

    def steep(self, k: int, packed: Tensor) -> Tensor:
        """[R, N] where rounded neurons have few codes, with bounds as in `root`."""
        stairs = self.stairs[k]
        return torch.zeros_like(packed[:1, 0], dtype=torch.bool) if stairs is None else stairs.few(packed[:, 6:])

    @property
    def rounded(self) -> bool:
        return any(stairs is not None for stairs in self.stairs)

    def narrowed(self, k: int, before: Tensor, hexagon: Hexagon) -> Hexagon:
        """Bounds [R, N] of the free neurons of layer k, narrowed by what the codes of the layer before leave.

        before: bounds and codes [R, 10, N] of the layer before.
        """
        onward, stairs = self.onward[k], self.stairs[k - 1]
        if onward is None or stairs is None:
            return hexagon
        low, high = onward.range(*stairs.second.ends(before[:, 2], before[:, 3], before[:, 8], before[:, 9]))
        l1, u1, l2, u2, dl, du = hexagon.parts()
        return Hexagon(l1, u1, torch.maximum(l2, low), torch.minimum(u2, high), dl, du)

    @property
    def depth(self) -> int:
        return len(self.count)

    def graph(self, k: int, packed: Tensor) -> Graph:
        """Graphs of the free neurons of hidden layer k, with bounds as in `root` [R, 6 or 10, N]."""
        hexagon, stairs = Hexagon.unpack(packed[:, :6]), self.stairs[k]
        return Graph.of(hexagon) if stairs is None else staircase_graph(hexagon, stairs, packed[:, 6:])

    def forth(self, k: int, state: Tensor) -> Tensor:
        """(z, d) [R, 2 N] of layer k from (a, e) of the layer before, or from the input; without biases."""
        maps = self.maps[k]
        if isinstance(maps, Tensor):
            return state @ maps.T
        return torch.cat(maps.forth(*state.chunk(2, 1)) if k else maps.forth(state), 1)

    def back(self, k: int, y: Tensor) -> Tensor:
        """Coefficients on (a, e) of the layer before, or on the input, from those [R, 2 N] on (z, d) of layer k."""
        maps = self.maps[k]
        if isinstance(maps, Tensor):
            return y @ maps
        alpha, beta = maps.back(*y.chunk(2, 1), beta=k > 0)
        return alpha if beta is None else torch.cat((alpha, beta), 1)


@dataclass(frozen=True)
class _Onward:
    """z2 = V a2 + b of M neurons of a layer, by interval arithmetic of the layer before.

    V: [M, F] on its F free neurons; low, high: [M] what its other neurons and b add, rounding and noise included.
    """

    V: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of(pair: Pair, work: Backward, k: int) -> _Onward | None:
        """Of layer k; None where its matrix would be large."""
        step, rows, hexagon = pair.second[k], work.on[k][work.free[k]], work.hexagons[k - 1]
        free, stairs = work.free[k - 1], work.stairs[k - 1]
        if len(rows) * pair.maps[k].shape[1] > CHUNK // 4:
            return None
        V = pair.maps[k].rows(rows)[1][:, work.on[k - 1]]
        low, high = stairs.second.ends(
            hexagon.l2, hexagon.u2, torch.zeros_like(hexagon.l2), stairs.second.count.expand_as(hexagon.l2)
        )
        middle, radius = ball(low[0], high[0])
        size = step.bias.new_zeros(1, pair.maps[k].shape[1])
        size[0, work.on[k - 1]] = torch.maximum(low[0].abs(), high[0].abs())
        share, bias = 4 * gamma(step.terms + size.shape[1]), pair.b[k] - pair.db[k]
        loss = share * (step.magnitude(size)[0] + step.bias_magnitude + bias.abs() + pair.b[k].abs())
        slack, bias = step.with_noise(loss)[rows], bias[rows]
        middle, radius = middle.index_fill(0, free, 0.0), radius.index_fill(0, free, 0.0)
        fixed, spread = V @ middle + bias, V.abs() @ radius + slack
        return _Onward(V[:, free], below(fixed - spread), above(fixed + spread))

    def range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """[R, M] ends of z2 for values in [low, high] [R, F] of the free neurons."""
        middle, radius = ball(low, high)
        fixed, spread = middle @ self.V.T, radius @ self.V.abs().T
        return below(self.low + fixed - spread), above(self.high + fixed + spread)
