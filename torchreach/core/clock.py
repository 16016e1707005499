"""The one clock of a call: how much of its budget of seconds is left, and whether Ctrl-C was pressed.

A verb makes one `Clock` and hands it down; every loop and every long step looks at it, and nothing else reads the
time to decide when to stop. `check` ends a computation that has no half-way answer; whoever called it keeps the
valid interval that was there before.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Sized
from contextlib import contextmanager
from types import FrameType


class OutOfTime(Exception):  # noqa: N818
    """Raised by `Clock.check`; a verb catches it and answers with what it has. It never reaches a user."""


class Clock:
    """Time that is left, in seconds of wall-clock time.

    seconds: from now on; None for no limit. interrupted: what Ctrl-C fills (`first_interrupt`). now: what is read;
    tests bring their own, so that none depends on the machine's speed.
    """

    def __init__(
        self,
        seconds: float | None = None,
        interrupted: Sized | None = None,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now, self._pressed = now, () if interrupted is None else interrupted
        self.began = now()
        self.deadline = math.inf if seconds is None else self.began + seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return self._now() - self.began

    @property
    def limited(self) -> bool:
        """Whether there is a deadline at all."""
        return self.deadline < math.inf

    @property
    def left(self) -> float:
        """Seconds until the deadline, never negative; infinite without one."""
        return max(0.0, self.deadline - self._now()) if self.limited else math.inf

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return len(self._pressed) > 0

    @property
    def over(self) -> bool:
        """Whether to stop: the time is up, or Ctrl-C was pressed."""
        return self.interrupted or (self.limited and self._now() >= self.deadline)

    def check(self) -> None:
        """Raises OutOfTime if `over`."""
        if self.over:
            raise OutOfTime

    def part(self, seconds: float | None, interrupted: Sized | None = None) -> Clock:
        """A clock that ends `seconds` from now, but no later than this one; one Ctrl-C ends both.

        interrupted: what ends the part in place of Ctrl-C, in a process that Ctrl-C does not reach.
        """
        clock = Clock(seconds, self._pressed if interrupted is None else interrupted, now=self._now)
        clock.deadline = min(clock.deadline, self.deadline)
        return clock

    def share(self, part: float) -> Clock:
        """A clock that ends after this part of the time that is left."""
        return self.part(part * self.left if self.limited else None)

    def grace(self, seconds: float) -> Clock:
        """A clock for what has to be done even after this one is over: it ends `seconds` from now.

        A Ctrl-C that has come does not end it; the first one that comes does.
        """
        return Clock(seconds, () if self.interrupted else self._pressed, now=self._now)


NO_LIMIT = Clock()  # for callers without a budget; nobody can interrupt it


class Watch:
    """What a part of a clock takes for Ctrl-C: that of the clock, or `ended`. Each look calls `tick`, in one thread."""

    def __init__(self, clock: Clock, tick: Callable[[], object]) -> None:
        self.clock, self.tick, self.thread, self.ended = clock, tick, threading.get_ident(), False

    def __len__(self) -> int:
        if threading.get_ident() == self.thread:
            self.tick()
        return int(self.ended or self.clock.interrupted)


@contextmanager
def first_interrupt() -> Generator[list[int], None, None]:
    """Make the first Ctrl-C fill the list this yields instead of raising; the second one raises as usual.

    An exception could come between taking work off a queue and putting its children back, and lose it. Inside another
    `first_interrupt` it yields the outer one's list, so that one Ctrl-C ends all of them. Where the signal is ignored,
    as shells have it for what they start in the background, or someone else handles it outside Python, it stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    ours = isinstance(before, _Note)
    if ours or before in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
        yield before.pressed if isinstance(before, _Note) else []
        return
    note = _Note()
    signal.signal(signal.SIGINT, note)
    try:
        yield note.pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def running(seconds: float | None) -> Generator[Clock, None, None]:
    """The clock of one call of a verb, which the first Ctrl-C ends."""
    with first_interrupt() as interrupted:
        yield Clock(seconds, interrupted)


class _Note:
    """Handler that notes the first signal."""

    def __init__(self) -> None:
        self.pressed: list[int] = []

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed.append(number)
