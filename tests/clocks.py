"""Clocks that end after so many looks at them, so that no test depends on the machine's speed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

from torchreach.core.clock import Clock

PAST = 1e9


class Looks:
    """Counts looks; `over` from look number `looks` on. `where` says whether a look counts."""

    def __init__(self, looks: int, where: Callable[[], bool] = lambda: True) -> None:
        self.left, self.where = looks, where

    @property
    def over(self) -> bool:
        self.left -= self.where()
        return self.left < 0


def expiring(looks: int, where: Callable[[], bool] = lambda: True) -> Clock:
    """Time stands still for so many looks, and then is up."""
    count = Looks(looks + 1, where)
    return Clock(1.0, now=lambda: PAST if count.over else 0.0)


def creeping(looks: int) -> Clock:
    """Each look takes its share of the time."""
    times = iter(range(1_000_000_000))
    return Clock(looks, now=lambda: float(next(times)))


def pressed(looks: int, where: Callable[[], bool] = lambda: True) -> Clock:
    """Ctrl-C is pressed after so many looks."""
    return Clock(interrupted=_Pressed(looks, where))


def in_worker() -> bool:
    """Whether this is a forked worker process."""
    return multiprocessing.current_process().daemon


class _Pressed(Looks):
    def __len__(self) -> int:
        return int(self.over)
