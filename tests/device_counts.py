"""What ran on the simulated device, counted by kind, operation and line."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torchreach

SOURCES = str(Path(torchreach.__file__).parent)


@dataclass
class Counts:
    """What ran while these were counted."""

    where: bool = False  # whether to look for the line of torchreach that an event comes from
    events: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # by (kind, operation, line)
    bytes: int = 0

    @property
    def launches(self) -> int:
        return self._number("launch")

    @property
    def reads(self) -> int:
        return self._number("read")

    @property
    def uploads(self) -> int:
        return self._number("upload")

    def of(self, kind: str) -> Counter[tuple[str, str]]:
        """Events of a kind ("launch", "read" or "upload") by (operation, line)."""
        return Counter({(name, line): number for (what, name, line), number in self.events.items() if what == kind})

    def _number(self, kind: str) -> int:
        return sum(number for (what, _, _), number in self.events.items() if what == kind)

    def add(self, kind: str, name: str) -> None:
        self.events[kind, name, _line() if self.where else ""] += 1


active: list[Counts] = []  # those that count at present


def note(kind: str, name: str) -> None:
    for counts in active:
        counts.add(kind, name)


def _line() -> str:
    """Line of torchreach that the present operation comes from."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(SOURCES):
            return f"torchreach{frame.f_code.co_filename.removeprefix(SOURCES)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
