"""Counters of one run, kept on the device: reading them back is left to the end."""

from __future__ import annotations

from torch import Tensor

from torchreach.networks.steps import Step
from torchreach.results import LayerStats


class Tally:
    """Work per activation layer; see `torchreach.results.LayerStats`."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.steps = steps
        self.stars = [0] * len(steps)
        self.splits = [0] * len(steps)
        self.programs = [0] * len(steps)
        self._settled: list[dict[str, Tensor]] = [{} for _ in steps]

    def settle(self, layer: int, test: str, which: Tensor) -> None:
        """Count the true entries of `which` as neurons settled by `test`."""
        counts = self._settled[layer]
        counts[test] = counts[test] + which.sum() if test in counts else which.sum()

    def layers(self) -> tuple[LayerStats, ...]:
        """The counts of every activation layer."""
        return tuple(
            LayerStats(
                name=step.name,
                neurons=int(step.relu.sum()),
                stars=self.stars[i],
                splits=self.splits[i],
                linear_programs=self.programs[i],
                settled={test: int(n) for test, n in self._settled[i].items() if int(n)},
            )
            for i, step in enumerate(self.steps)
            if step.relu is not None
        )
