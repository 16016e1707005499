"""What a user types, checked before anything is computed, and without torch: a typing error is answered at once.

Every check raises an error of `torchreach.core.errors` that names the option, what was required and what was received.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from torchreach.app.places import Places
from torchreach.core.errors import FileFormatError, InvalidSetError, OptionError
from torchreach.core.files import NETWORKS, READABLE, check_folder, check_target
from torchreach.core.options import Budget, Exact, Search

if TYPE_CHECKING:
    from torchreach.core.results import Discrepancy

TARGET = 0.5  # factor of the first certified bound
DTYPES = ("float32", "float64")
ARITHMETICS = ("real", "executed")
KERNELS = ("here", "exact", "saturating", "any")
METHODS = {
    "auto": None,
    "exact": Exact(),
    "search": Search(),
    "vertices": Exact("vertices"),
    "programs": Exact("programs"),
}
ARRAYS, STATE_DICTS = (".json", ".npy", ".csv"), (".pth", ".pt")


@dataclass(frozen=True)
class Setup:
    """What every command needs: where to compute, how long, where to write and print."""

    device: str  # cpu, cuda or cuda:N
    dtype: str  # one of `DTYPES`
    method: str  # one of `METHODS`
    budget: Budget
    output: Path | None
    command_line: str
    out: Console = field(default_factory=Console)
    err: Console = field(default_factory=lambda: Console(stderr=True))
    began: float = field(default_factory=time.monotonic)
    files: Mapping[str, Path] = field(default_factory=dict)  # what else is written, by option
    places: Places = field(default_factory=Places)

    @staticmethod
    def make(
        device: str,
        dtype: str,
        method: str,
        seconds: float | None,
        stars: int | None,
        memory: str | None,
        output: Path | None,
        command_line: str,
        places: Places | None = None,
    ) -> Setup:
        """Checked options; whether a CUDA device exists is asked later. Raises OptionError."""
        _check_choice("--dtype", dtype, DTYPES)
        _check_choice("--method", method, METHODS)
        for option, value in (("--seconds", seconds), ("--stars", stars)):
            if value is not None and not (value > 0 and isfinite(value)):
                raise OptionError(f"{option} must be positive, got {value:g}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise OptionError(f"--device must be cpu, cuda or cuda:N, got {device!r}")
        size = None if memory is None else _bytes(memory)
        if output is not None:
            check_folder(output)
        budget, places = Budget(seconds, stars, size), places or Places()
        return Setup(device, dtype, method, budget, output, command_line, places=places)

    def settings(self, **more: Any) -> dict[str, Any]:
        """The options as JSON values, for the report."""
        return {
            "method": self.method,
            **asdict(self.budget),
            **more,
        }


class _InputNumbers:
    """What options of inputs say in numbers; they are fields of the classes that are made of this one."""

    clip: str | None
    shape: str | None

    @property
    def span(self) -> tuple[float, float] | None:
        """The numbers of --clip."""
        return _span(self.clip)

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The numbers of --shape."""
        return _sizes(self.shape)


@dataclass(frozen=True)
class SetOptions(_InputNumbers):
    """One input set as the command line names it: a box, a VNN-LIB file, or a ball around given inputs."""

    box: str | None = None
    vnnlib: Path | None = None
    center: Path | None = None
    eps: float | None = None
    mask: Path | None = None
    clip: str | None = None
    shape: str | None = None

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in ("box", "vnnlib", "center") if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) if given else "none"
            raise OptionError(f"exactly one input set is required (--box, --vnnlib or --center with --eps), got {got}")
        if self.center is None and any(value is not None for value in (self.eps, self.mask, self.clip)):
            raise OptionError(f"--eps, --mask and --clip belong to --center, got {given[0]}")
        if self.center is not None and self.eps is None:
            raise OptionError("--center needs --eps, the radius around it")
        if self.eps is not None and not 0 <= self.eps < float("inf"):
            raise OptionError(f"--eps must be a finite number >= 0, got {self.eps}")
        _ = self.span, self.sizes
        if self.box is not None and self.box_file is None:
            parse_pairs(self.box)
        for option, path in (("--box", self.box_file), ("--center", self.center), ("--mask", self.mask)):
            if path is not None:
                check_array(option, path)
        if self.vnnlib is not None:
            check_exists(self.vnnlib, "--vnnlib: ")

    @property
    def box_file(self) -> Path | None:
        """The file that --box names, where it does not hold the pairs themselves."""
        path = None if self.box is None else Path(self.box)
        return path if path is not None and path.suffix.lower() in ARRAYS else None


@dataclass(frozen=True)
class CompareSetup:
    """What `torchreach compare` asks: the bound in question, how close the answer has to be, and of which reading."""

    tolerance: float | None
    gap: float | None
    arithmetic: str | None = None
    kernels: str = "here"

    def __post_init__(self) -> None:
        _check_reading(self.arithmetic, self.kernels)
        if self.tolerance is not None and not 0 <= self.tolerance < float("inf"):
            raise OptionError(f"--tolerance must be a number >= 0, got {self.tolerance:g}")
        if self.gap is not None and not 0 < self.gap < float("inf"):
            raise OptionError(f"--gap must be a positive number, got {self.gap:g}")


@dataclass(frozen=True)
class EquivalentSetup:
    """What `torchreach equivalent` asks: outputs within epsilon, or the same label."""

    epsilon: float | None
    top1: bool
    arithmetic: str | None = None
    kernels: str = "here"
    confidence: float | None = None

    def __post_init__(self) -> None:
        _check_reading(self.arithmetic, self.kernels)
        _check_confidence(self.confidence)
        if self.confidence is not None and not self.top1:
            raise OptionError("--confidence belongs to --top1: it is about labels")
        if (self.epsilon is not None) == self.top1:
            given = "both" if self.top1 else "neither"
            raise OptionError(f"exactly one of --epsilon and --top1 is required, got {given}")
        if self.epsilon is not None and not 0 <= self.epsilon < float("inf"):
            raise OptionError(f"--epsilon must be a number >= 0, got {self.epsilon:g}")


@dataclass(frozen=True)
class AuditSetup(_InputNumbers):
    """What `torchreach audit` asks: on which inputs, with which right labels, and how far these may move."""

    data: Path
    labels: Path | None
    eps: float
    clip: str | None
    shape: str | None
    confidence: float | None
    arithmetic: str | None
    kernels: str

    def __post_init__(self) -> None:
        _check_reading(self.arithmetic, self.kernels)
        _check_confidence(self.confidence)
        if not 0 <= self.eps < float("inf"):
            raise OptionError(f"--eps must be a finite number >= 0, got {self.eps:g}")
        if self.clip is not None and not self.eps:
            raise OptionError("--clip belongs to --eps: without it no value moves")
        _ = self.span, self.sizes
        for option, path in (("--data", self.data), ("--labels", self.labels)):
            if path is not None:
                check_array(option, path)

    def settings(self) -> dict[str, Any]:
        """The options as JSON values."""
        files = {"data": str(self.data), "labels": None if self.labels is None else str(self.labels)}
        return {**asdict(self), **files}


@dataclass(frozen=True)
class AttributeSetup:
    """What `torchreach attribute` asks: how many random inputs, and which difference the kept layers are to give."""

    samples: int
    seed: int
    keep_float: float | None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise OptionError(f"--samples must be at least 1, got {self.samples}")
        if self.keep_float is not None and not 0 <= self.keep_float < float("inf"):
            raise OptionError(f"--keep-float must be a number >= 0, got {self.keep_float:g}")


@dataclass(frozen=True)
class RepairSetup:
    """Options of the repair loop, as `torchreach.repair` takes them.

    Both targets speak of the certified bound on |y1 - y2| over all input stars and outputs: `target` is a factor
    of the first one, `largest` an absolute value.
    """

    target: float | None
    largest: float | None
    alpha: float
    iterations: int
    epochs: int
    rate: float
    seed: int
    by: str

    def __post_init__(self) -> None:
        _check_choice("--by", self.by, ("retrain", "solve", "auto"))
        if self.target is not None and self.largest is not None:
            raise OptionError("at most one of --target and --target-max may be given, got both")
        if self.target is not None and not 0 < self.target < 1:
            raise OptionError(f"--target must lie in (0, 1), got {self.target:g}")
        if self.largest is not None and not 0 <= self.largest < float("inf"):
            raise OptionError(f"--target-max must be a number >= 0, got {self.largest:g}")
        for option, value in (("--alpha", self.alpha), ("--rate", self.rate)):
            if not 0 < value < float("inf"):
                raise OptionError(f"{option} must be positive, got {value:g}")
        for option, value in (("--iterations", self.iterations), ("--epochs", self.epochs)):
            if value < 1:
                raise OptionError(f"{option} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"--seed must be a whole number from 0 to 2^63 - 1, got {self.seed}")

    @property
    def factor(self) -> float:
        """Factor in use where no absolute bound is given."""
        return TARGET if self.target is None else self.target

    def wanted(self, first: Discrepancy) -> float:
        """The bound to reach, once the first discrepancy is known."""
        return self.factor * float(first.upper.max()) if self.largest is None else self.largest

    def settings(self) -> dict[str, Any]:
        """The options as JSON values."""
        kind, value = ("factor", self.factor) if self.largest is None else ("max", self.largest)
        return {
            "target": {"kind": kind, "value": value},
            "alpha": self.alpha,
            "iterations": self.iterations,
            "epochs": self.epochs,
            "rate": self.rate,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class DemoSetup:
    """Options of the demonstration; see `torchreach.app.demo`. What depends on the data is checked with the data."""

    data: str
    root: Path | None
    images: int
    pixels: int
    eps: float
    epochs: int
    bits: int
    prune: float

    def __post_init__(self) -> None:
        _check_choice("--data", self.data, ("digits", "mnist"))
        if self.data == "mnist" and self.root is None:
            raise OptionError("--data mnist needs --root, the folder to download it to")
        if self.data != "mnist" and self.root is not None:
            raise OptionError(f"--root belongs to --data mnist, got --data {self.data}")
        if not (self.bits == 0 or 2 <= self.bits <= 16):
            raise OptionError(f"--bits must lie between 2 and 16, or be 0 for float weights, got {self.bits}")
        if not 0 <= self.prune < 1:
            raise OptionError(f"--prune must lie in [0, 1), got {self.prune:g}")
        if self.bits == 0 and self.prune == 0:
            raise OptionError("--bits 0 needs --prune: without either there is nothing to compress")
        if not 0 < self.eps <= 1:
            raise OptionError(f"--eps must lie in (0, 1], got {self.eps}")
        if self.epochs < 1:
            raise OptionError(f"--epochs must be at least 1, got {self.epochs}")

    def settings(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {
            "data": self.data, "images": self.images, "pixels": self.pixels, "eps": self.eps,
            "training_epochs": self.epochs, "bits": self.bits, "prune": self.prune,
        }  # fmt: skip


def check_repair(method: str, compressed: Path | None = None, saved: Path | None = None) -> None:
    """Raises OptionError where a repair could not use `method`, or not save what becomes of `compressed`."""
    if isinstance(METHODS[method], Search):
        names = ", ".join(name for name, value in METHODS.items() if not isinstance(value, Search))
        raise OptionError(f"--method of a repair must be one of {names}, got {method!r}")
    if saved is not None and compressed is not None:
        check_target(saved, STATE_DICTS if is_state_dict(compressed) else NETWORKS)


def check_networks(original: Path, compressed: Path) -> None:
    """Raises FileFormatError where A or B is missing, or of a kind that is not read."""
    if is_state_dict(original):
        raise FileFormatError(
            f"{original}: A must be an .onnx, .tflite or .pt2 file; a state dict has no structure, so only B can be one"
        )
    for path in (original, compressed):
        check_exists(path)
        if path.suffix.lower() not in READABLE and not is_state_dict(path):
            raise FileFormatError(
                f"{path}: a network file must end in .onnx, .tflite or .pt2 (torch.export.save), "
                f"got {path.suffix or 'no ending'!r}"
            )


def is_state_dict(path: Path) -> bool:
    """Whether a file by its name holds a state dict."""
    return path.suffix.lower() in STATE_DICTS


def check_array(option: str, path: Path) -> None:
    """Raises FileFormatError where there is no file that may be an array."""
    check_exists(path, f"{option}: ")
    if path.suffix.lower() not in ARRAYS:
        raise FileFormatError(f"{option}: {path} must end in {', '.join(ARRAYS)}, got {path.suffix or 'no ending'!r}")


def _span(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--clip must be 'lo,hi', got {text!r}") from None
    if not low <= high:
        raise OptionError(f"--clip must be 'lo,hi' with lo <= hi, got {text!r}")
    return low, high


def _sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() and int(part) for part in parts):
        raise OptionError(
            f"--shape must be the sizes of one input without a batch axis, whole numbers such as 1,28,28, got {text!r}"
        )
    return tuple(int(part) for part in parts)


def _check_reading(arithmetic: str | None, kernels: str) -> None:
    if arithmetic is not None:
        _check_choice("--arithmetic", arithmetic, ARITHMETICS)
    _check_choice("--kernels", kernels, KERNELS)


def _check_confidence(value: float | None) -> None:
    if value is not None and not 0 < value < 1:
        raise OptionError(f"--confidence must lie between 0 and 1, both excluded, got {value:g}")


def check_exists(path: Path, start: str = "") -> None:
    """Raises FileFormatError, whose message begins with `start`, where there is no file that can be read."""
    if path.is_dir():
        raise FileFormatError(f"{start}{path} is a folder, a file is required")
    if not path.is_file():
        raise FileFormatError(f"{start}no such file: {path}")
    if not os.access(path, os.R_OK):
        raise FileFormatError(f"{start}{path} cannot be read: permission denied")


def parse_pairs(text: str) -> list[tuple[float, float]]:
    """Lower and upper bound of each input from "lower,upper; lower,upper".

    Raises: OptionError, InvalidSetError.
    """
    pairs = []
    for i, row in enumerate(text.strip().strip(";").split(";")):
        try:
            low, high = (float(part) for part in row.split(","))
        except ValueError:
            raise OptionError(
                f"--box must be 'lower,upper' pairs separated by ';', one per input, or a file ending in "
                f"{', '.join(ARRAYS)}; pair {i} is {row.strip()!r}"
            ) from None
        pairs.append((low, high))
    check_pairs(pairs)
    return pairs


def check_pairs(pairs: Iterable[tuple[float, float]]) -> None:
    """Raises InvalidSetError where a bound is not finite, or a lower one exceeds its upper one."""
    for i, pair in enumerate(pairs):
        for j, value in enumerate(pair):
            if not isfinite(value):
                raise InvalidSetError(f"--box must be finite, got {value} at index [{i}, {j}]")
        if pair[0] > pair[1]:
            raise InvalidSetError(f"--box: lower must not exceed upper, got {pair[0]:g} > {pair[1]:g} for input {i}")


def _check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise OptionError(f"{option} must be one of {', '.join(choices)}, got {value!r}")


def _bytes(text: str) -> int:
    """The number of bytes that "2GB", "500 MB", "1.5GiB" or "1000000" says. Raises OptionError."""
    found = re.fullmatch(r"(\d+|\d*\.\d+)\s*(?:([kmgt])(i?))?b?", text.strip().lower())
    number = 0
    if found is not None:
        size, unit, binary = found.groups()
        number = int(float(size) * (1024 if binary else 1000) ** ("kmgt".index(unit) + 1 if unit else 0))
    if number <= 0:
        raise OptionError(f"--memory must be a positive size such as 2GB, 500MB or 1.5GiB, got {text!r}")
    return number
