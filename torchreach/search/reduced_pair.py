"""A pair of networks over one box: without the neurons that are off in both, maps of (z, d) side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from torchreach.core.roundoff import gamma
from torchreach.domains.difference import Backward
from torchreach.domains.pair import Pair
from torchreach.graph.twins import Maps, Matrices


class Reduced:
    """The pair over one box: neurons that are off in both networks left out, maps of (z, d) side by side.

    `free[k]` are the undecided neurons among the kept ones of hidden layer k; `before`, `after` bound what rounding
    costs per unit of an objective's coefficients, before and after a layer's planes (as `Backward` does).
    """

    def __init__(self, pair: Pair, work: Backward) -> None:
        self.middle, self.radius = work.middle, work.radius
        keep, hexagons, self.free = [*work.on], work.hexagons, work.free
        self.root = [h.map(lambda part, i=i: part[:, i]) for h, i in zip(hexagons, self.free, strict=True)]
        self.count = [len(i) for i in keep]
        self.slopes = [tuple(s[0] for s in h.active()) for h in hexagons]
        self.maps: list[Tensor | Maps] = []  # as one matrix where they are matrices
        self.shifts: list[Tensor] = []
        keep.append(torch.arange(pair.outputs, device=pair.device))
        for k, rows in enumerate(keep):
            part = pair.maps[k].part(rows, keep[k - 1] if k else None)
            if isinstance(part, Matrices):
                W, V, D = part.W, part.V, part.D
                below = torch.cat((D, V), 1) if k else D
                part = torch.cat((torch.cat((W, torch.zeros_like(W)), 1) if k else W, below))
            self.maps.append(part)
            self.shifts.append(torch.cat((pair.b[k][rows], pair.db[k][rows])))
        gammas = [2 * gamma(2 * n + 8 * pair.depth + 8) for n in self.count]
        self.before = [g * torch.cat(h.sizes(), 1)[0] for g, h in zip(gammas, hexagons, strict=True)]
        self.noise = [torch.cat(pair.noise(k))[torch.cat((i, i + len(pair.b[k])))] for k, i in enumerate(keep)]
        losses = [torch.cat((P[0], Q[0])) for P, Q in work.errors]
        self.after = [b + loss for b, loss in zip(self.before, losses, strict=False)]
        self.output_loss = losses[-1]
        self.exact = all(pair.exact)
        self.count_terms = max(pair.terms(k) for k in range(pair.depth)) + pair.inputs

    @property
    def depth(self) -> int:
        return len(self.count)

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
