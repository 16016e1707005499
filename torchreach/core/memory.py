"""How much memory there is, and how much a value's tensors take.

On Linux the free memory of a machine is what /proc/meminfo calls available, or what is left below the limit
of a control group (a container) if that is less; on CUDA what the device and torch's own cache have free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

# Share of the free memory that a run takes unless it is told otherwise.
SHARE = 0.5
# Assumed to be free where nothing says how much is.
UNKNOWN = 4 << 30
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def default_budget(device: torch.device) -> int:
    """Bytes that a run may take on `device` if its caller does not say."""
    return int(SHARE * free_memory(device))


def free_memory(device: torch.device) -> int:
    """Bytes free on `device`."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return UNKNOWN
    free = [room for room in (_available(), *_group_rooms()) if room is not None]
    return max(0, min(free)) if free else UNKNOWN


def batch_size(sizes: Mapping[str, int], device: torch.device) -> int:
    """The one of `sizes` for this device: "cpu", where batches should stay in cache, or "cuda", for all accelerators,
    where each operation costs the same until it is large."""
    return sizes.get(device.type, sizes["cuda"])


def size_of(value: Any) -> int:
    """Bytes that the tensors in a dataclass, a list or a tuple show, at any depth."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


class Ledger:
    """Bytes of the storages behind values in use: what several share counts once, and views count as a whole."""

    def __init__(self) -> None:
        self.bytes = 0
        self._users: dict[int, int] = {}

    def add(self, value: Any) -> None:
        """Take a value in. It must stay as it is until it is removed."""
        for tensor in _tensors(value):
            storage = tensor.untyped_storage()
            number = self._users.get(storage.data_ptr(), 0)
            self._users[storage.data_ptr()] = number + 1
            self.bytes += 0 if number else storage.nbytes()

    def remove(self, value: Any) -> None:
        """Undo `add` of the same value."""
        for tensor in _tensors(value):
            storage = tensor.untyped_storage()
            number = self._users.pop(storage.data_ptr()) - 1
            if number:
                self._users[storage.data_ptr()] = number
            else:
                self.bytes -= storage.nbytes()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in cast("Sequence[Any]", value):
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _available() -> int | None:
    """What the kernel estimates can be used without swapping."""
    return _field(PROC / "meminfo", "MemAvailable:", 1024)


def _group_rooms() -> list[int | None]:
    """Room below the limit of every control group this process is in, of either version."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms: list[int | None] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage, idle = CGROUP, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            idle = "total_inactive_file"
        else:
            continue
        # A container often sees its own group mounted at the base, whatever its path is called.
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                most, used = _number(folder / limit), _number(folder / usage)
                if most is not None and used is not None:
                    rooms.append(most - used + (_field(folder / "memory.stat", idle) or 0))
    return rooms


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" is no limit


def _field(path: Path, name: str, unit: int = 1) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((unit * int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)
