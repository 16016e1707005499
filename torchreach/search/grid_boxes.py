"""Parts of a box of inputs that a deployed network rounds first: divided at thresholds of its input grid.

Axis letters: B parts, M inputs that vary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchreach.domains.input_grid import InputGrid
from torchreach.graph.steps import Step
from torchreach.search.best_first import largest, largest_excess

Part = tuple[Tensor, Tensor, InputGrid | None]  # lower and upper ends [M], and the codes between them


@dataclass(frozen=True)
class Parts:
    """Parts of a box: their ends and grid, upper bounds [B, 2, N_out], and whether they can be divided [B]."""

    boxes: list[Part]
    upper: Tensor
    more: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def excess(self, level: Tensor) -> Tensor:
        return largest_excess(self.upper, level)

    def top(self, like: Tensor) -> Tensor:
        return largest(self.upper, like)

    def select(self, index: Tensor) -> Parts:
        chosen = index.nonzero().flatten() if index.dtype == torch.bool else index
        return Parts([self.boxes[i] for i in chosen.tolist()], self.upper[index], self.more[index])

    def join(self, other: Parts) -> Parts:
        bounds = (torch.cat(both) for both in ((self.upper, other.upper), (self.more, other.more)))
        return Parts([*self.boxes, *other.boxes], *bounds)


def divided(step: Step, low: Tensor, high: Tensor, grid: InputGrid | None) -> list[Part]:
    """Two boxes that cover the box: apart at the middle threshold of an input with several codes, else halves.

    step: behind the grid, whose weights say which input matters.
    """
    weight = step.magnitude(torch.eye(len(low), dtype=low.dtype, device=low.device)).sum(1)
    if grid is None:
        at = int((weight * (high - low)).argmax())
        middle = (low[at] + high[at]) / 2
        return [(low, _set(high, at, middle), None), (_set(low, at, middle), high, None)]
    first, last = grid.codes(low, high)
    at = int((weight * (last - first)).argmax())
    code = ((first + last) / 2).floor()
    result: list[Part] = []
    for start, end in ((first, _set(last, at, code[at])), (_set(first, at, code[at] + 1), last)):
        cells = (grid.cell(start), grid.cell(end))
        bottom = torch.minimum(cells[0][0], cells[1][0])[at].clamp(low[at], high[at])
        top = torch.maximum(cells[0][1], cells[1][1])[at].clamp(low[at], high[at])
        result.append((_set(low, at, bottom), _set(high, at, top), replace(grid, first=start, last=end)))
    return result


def _set(values: Tensor, at: int, value: Tensor) -> Tensor:
    changed = values.clone()
    changed[at] = value
    return changed
