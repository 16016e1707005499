"""Counters of one run, kept on the device: reading them back is left to the end."""

from __future__ import annotations

import threading
from dataclasses import replace

import torch
from torch import Tensor

from torchreach.core.results import LayerStats, ReachStats
from torchreach.graph.steps import Step


class Tally:
    """Work per activation layer; see `torchreach.core.results.LayerStats`."""

    def __init__(self, steps: tuple[Step, ...], left_out: list[int]) -> None:
        self.steps = steps
        self.left_out = left_out  # neurons of each layer that root bounds settled for every input star
        self.stars = [0] * len(steps)
        self.splits = [0] * len(steps)
        self.programs = [0] * len(steps)
        self._settled: list[dict[str, Tensor]] = [{} for _ in steps]
        self._lock = threading.Lock()

    def count(self, layer: int, *, stars: int = 0, splits: int = 0, programs: int = 0) -> None:
        """Add to the counters of one layer."""
        with self._lock:
            self.stars[layer] += stars
            self.splits[layer] += splits
            self.programs[layer] += programs

    def settle(self, layer: int, test: str, which: Tensor) -> None:
        """Count the true entries of `which` as neurons settled by `test`."""
        counts, number = self._settled[layer], which.sum()
        with self._lock:
            counts[test] = counts[test] + number if test in counts else number

    def take(self) -> tuple[list[list[int]], list[dict[str, int]]]:
        """The counters as numbers, for `add`; they start again from zero."""
        with self._lock:
            work = [self.stars, self.splits, self.programs]
            settled = [{test: int(n) for test, n in counts.items()} for counts in self._settled]
            self.stars, self.splits, self.programs = ([0] * len(self.steps) for _ in range(3))
            self._settled = [{} for _ in self.steps]
        return work, settled

    def add(self, work: list[list[int]], settled: list[dict[str, int]]) -> None:
        """Add counters that another tally of the same steps took."""
        for layer, (stars, splits, programs) in enumerate(zip(*work, strict=True)):
            self.count(layer, stars=stars, splits=splits, programs=programs)
            for test, number in settled[layer].items():
                self.settle(layer, test, torch.tensor(number))

    def layers(self) -> tuple[LayerStats, ...]:
        """The counts of every activation layer."""
        result = []
        for i, step in enumerate(self.steps):
            if step.relu is None:
                continue
            settled = {test: int(n) for test, n in self._settled[i].items()}
            settled["root"] = settled.get("root", 0) + self.left_out[i] * self.stars[i]
            result.append(
                LayerStats(
                    name=step.name,
                    neurons=int(step.relu.sum()),
                    stars=self.stars[i],
                    splits=self.splits[i],
                    linear_programs=self.programs[i],
                    settled={test: n for test, n in settled.items() if n},
                )
            )
        return tuple(result)


def added(one: ReachStats | None, other: ReachStats) -> ReachStats:
    """The work of two runs on one network, layer by layer."""
    if one is None:
        return other
    layers = tuple(
        replace(
            b,
            stars=a.stars + b.stars,
            splits=a.splits + b.splits,
            linear_programs=a.linear_programs + b.linear_programs,
            settled={name: a.settled.get(name, 0) + b.settled.get(name, 0) for name in {**a.settled, **b.settled}},
        )
        for a, b in zip(one.layers, other.layers, strict=True)
    )
    return replace(other, layers=layers, output_programs=one.output_programs + other.output_programs)
