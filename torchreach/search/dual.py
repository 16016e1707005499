"""The bound of branches of `search.signs`: a Lagrange dual in the slopes of all neurons, lowered by its subgradients.

    U(p, q) = sum_layers sum_neurons r(alpha, beta, p, q) + constants + max over the box

of the linear program over the convex hulls of the neurons' graphs (z, d, a, e): jointly convex in all slopes, as r is a
maximum over vertices of functions linear in (alpha, beta, p, q), and a certified bound at any of them. No bound that
sees one pair of neurons at a time is tighter, and multipliers of the splits (beta-CROWN) need no variables of
their own: the slopes over the cut hexagon are free. The subgradient is the primal residual: with the touching vertex
(z*, d*, a*, e*) of each neuron, dU/dp = z - z* and dU/dq = d - d*, where (z, d) come forward from the
maximising corner of the box through the touching (a*, e*). So one step is a pass backward and a pass forward.

Method: Adam with a subgradient and steps of its own per branch; of rounded neurons of few codes in the slopes on
    (z, z2), in units of their ranges (`Dual._scale`).
References: those of `domains.hexagon`.

Axis letters: R branches, N undecided neurons of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.domains.hexagon import height, start_slopes
from torchreach.domains.stairs import chord_slopes
from torchreach.search.reduced_pair import Reduced

# First steps of Adam: of rounded neurons some must be long for a branch to turn out to be empty.
PLAIN, STEEP = 0.3, 1.0
AVERAGE = 0.15  # share of the newest touching point in the mean that chooses splits


class Dual:
    """U of a batch of branches; rows `out` [R, 2 N_out] are the objectives on (y1, y1 - y2)."""

    def __init__(self, net: Reduced, hexagons: list[Tensor], out: Tensor) -> None:
        """hexagons: per layer, as `Reduced.root`, of every branch or of all together."""
        self.net, self.out = net, out
        self.graphs = [net.graph(k, packed) for k, packed in enumerate(hexagons)]
        self.steep = [net.steep(k, packed) for k, packed in enumerate(hexagons)]
        self.empty = torch.zeros(len(out), dtype=torch.bool, device=out.device)
        for graph in self.graphs:
            self.empty = self.empty | graph.empty
        self.corner = net.middle.expand(len(out), -1)

    def start(self) -> list[Tensor]:
        """Slopes [2, R, N] per layer of planes lowest at the middle."""
        slopes, y = [], self.out
        for k in range(self.net.depth, 0, -1):
            y = self.net.back(k, y)
            part = self._free(k - 1, y)
            start = start_slopes(self.graphs[k - 1], *part)
            stairs = self.net.stairs[k - 1]
            if stairs is not None:
                start = chord_slopes(self.graphs[k - 1], stairs, *part, *start)
            slopes.append(torch.stack(start))
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
            constant = net.constant[k - 1]
            total = total if constant is None else total + y @ constant
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
            constant = net.constant[k]
            state = state if constant is None else state + constant
            state[:, free], state[:, n + free] = touch[k][2], touch[k][3]
        return result

    def _scale(self, k: int, slopes: Tensor) -> Tensor:
        """How far slopes [2, R, N] may move in a step: about as far as they are from zero, or others are.

        Of neurons of few codes, slopes on (z, z2) instead of (z, d), in units that give each neuron's range the same
        effect: where a code's range is narrow, only steep slopes show that no input has it.
        """
        scale = PLAIN * (0.5 * slopes.abs() + 0.5 * slopes.abs().mean(2, keepdim=True) + 1e-9)
        if not self.net.rounded:
            return scale
        hexagon = self.graphs[k].hexagon
        width = torch.stack((hexagon.u1 - hexagon.l1, hexagon.u2 - hexagon.l2))
        width = width.clamp(min=1e-12) + 1e-6 * width.clamp(min=0).mean(2, keepdim=True)
        size = torch.stack((slopes[0] + slopes[1], slopes[1])).abs() * width
        return torch.where(self.steep[k], STEEP * (0.5 * size + 0.5 * size.mean(2, keepdim=True) + 1e-9) / width, scale)

    def descend(
        self,
        slopes: list[Tensor],
        steps: int,
        decay: float,
        enough: Tensor,
        clock: Clock = NO_LIMIT,
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Adam on the slopes; ends early when all bounds are below `enough` [R], or the clock is over.

        Returns: best bounds [R] (-inf where the branch is empty), their slopes, mean touching points, coefficients.
        """
        slopes = [s.clone() for s in slopes]
        kept = [s.clone() for s in slopes]
        scale = [self._scale(k, s) for k, s in enumerate(slopes)]
        if scale:  # neurons of the last hidden layer without coefficients, which never change, need no slopes
            alpha, beta = self._free(self.net.depth - 1, self.net.back(self.net.depth, self.out))
            scale[-1] = torch.where((alpha != 0) | (beta != 0), scale[-1], 0.0)
        first, second = [torch.zeros_like(s) for s in slopes], [torch.zeros_like(s) for s in slopes]
        best, mean, coefficients = torch.full_like(self.out[:, 0], torch.inf), None, []
        fast, slow = (0.8, 0.9) if self.net.rounded else (0.9, 0.99)  # memories of Adam
        for step in range(1, steps + 1):
            value, touch, coefficients = self.value(slopes)
            better = value < best
            best = torch.where(better, value, best)
            for old, new in zip(kept, slopes, strict=True):
                old.copy_(torch.where(better[None, :, None], new, old))
            mean = touch if mean is None else [m.lerp(t, AVERAGE) for m, t in zip(mean, touch, strict=True)]
            if bool((best <= enough).all()) or clock.over:
                break
            gradients = self.residuals(touch)
            for s, g, m, v, c, steep in zip(slopes, gradients, first, second, scale, self.steep, strict=True):
                if self.net.rounded:
                    g = torch.stack((g[0], torch.where(steep, g[0] - g[1], g[1])))
                m.mul_(fast).add_(g, alpha=1 - fast)
                v.mul_(slow).addcmul_(g, g, value=1 - slow)
                size = decay**step / (1 - fast**step)
                move = (m * c).mul_(size).div_((v / (1 - slow**step)).sqrt_().add_(1e-12))
                if self.net.rounded:
                    move = torch.stack(
                        (torch.where(steep, move[0] + move[1], move[0]), torch.where(steep, -move[1], move[1]))
                    )
                s.sub_(move)
        assert mean is not None
        return torch.where(self.empty, -torch.inf, best), kept, mean, coefficients
