"""Seeded random networks of skips, concatenations, maxima and functions that bend, small enough for exact answers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BENDS = {
    "relu": F.relu,
    "leaky": lambda z: F.leaky_relu(z, 0.2),
    "clamp": lambda z: z.clamp(-0.4, 0.6),
    "relu6": lambda z: F.relu6(12 * z) / 6,
    "abs": torch.abs,
}
JOINS = ("add", "sub", "cat", "maximum", "minimum", "pool")


class RandomGraph(nn.Module):
    """A network of `inputs` numbers: blocks of a linear layer, a function that bends and a join with older values."""

    def __init__(self, seed: int, blocks: int, inputs: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def pick(count: int) -> int:
            return int(torch.randint(count, (), generator=draw))

        def dense(n: int, m: int) -> nn.Linear:
            layer = nn.Linear(n, m, dtype=torch.float64)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(m, n, generator=draw, dtype=torch.float64) / n**0.5)
                layer.bias.copy_(0.3 * torch.randn(m, generator=draw, dtype=torch.float64))
            return layer

        self.plan: list[tuple[str, str, int, int]] = []
        self.linear, self.project = nn.ModuleList(), nn.ModuleList()
        sizes = [inputs]
        for _ in range(blocks):
            source, other, width = pick(len(sizes)), pick(len(sizes)), 2 + pick(2)
            bend, join = list(BENDS)[pick(len(BENDS))], JOINS[pick(len(JOINS))]
            self.plan.append((bend, join, source, other))
            self.linear.append(dense(sizes[source], width))
            self.project.append(nn.Identity() if join in ("cat", "pool") else dense(sizes[other], width))
            sizes.append(width + sizes[other] if join == "cat" else width - 1 if join == "pool" else width)
        self.last = dense(sizes[-1] + sizes[-2], 2)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for (bend, join, source, other), linear, project in zip(self.plan, self.linear, self.project, strict=True):
            h = BENDS[bend](linear(values[source]))
            if join == "cat":
                h = torch.cat((h, values[other]), 1)
            elif join == "pool":
                h = F.max_pool1d(h.unsqueeze(1), 2, 1).flatten(1)
            else:
                h = getattr(torch, join)(h, project(values[other]))
            values.append(h)
        return self.last(torch.cat((values[-1], values[-2]), 1))


def graph_pair(seed: int) -> tuple[nn.Module, nn.Module, int]:
    """A random graph, a copy of it with other weights, and its number of inputs, 2 to 4."""
    inputs = 2 + seed % 3
    original = RandomGraph(seed, 3 if seed >= 20 and seed % 5 == 0 else 2, inputs)
    other = copy.deepcopy(original)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in other.parameters():
            if seed % 4 < 2:
                value.copy_((8 * value).round() / 8)
            else:
                value.add_(0.05 * torch.randn(value.shape, generator=draw, dtype=value.dtype))
    return original, other, inputs
