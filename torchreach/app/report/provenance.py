"""What a report identifies itself by: files, the input set, the machine."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchreach.sets.star import StarBatch

CPUINFO = Path("/proc/cpuinfo")


def file_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of a network's file, and of the file of weights that exporters put beside an .onnx file, by name."""
    beside = path.with_name(path.name + ".data")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, beside) if p.is_file()}


def stars_hash(stars: StarBatch) -> str:
    """SHA-256 of a set, independent of its device.

    Hashed are, for each of the tensors basis, A, b, lower and upper in this order, the line "name dtype shape\\n",
    such as "basis float64 [2, 5, 4]\\n", and then its values, row by row, as they lie in memory.
    """
    digest = hashlib.sha256()
    for name in ("basis", "A", "b", "lower", "upper"):
        value = getattr(stars, name).detach().cpu().contiguous()
        digest.update(f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def bounds(stars: StarBatch) -> list[dict[str, Any]]:
    """Per star the smallest box around it: "lower" and "upper", a number where all inputs have the same."""
    low, high, is_box = stars.bounding_box()
    return [
        {"lower": _short(low[s].tolist()), "upper": _short(high[s].tolist()), "is_the_set": plain}
        for s, plain in enumerate(is_box.tolist())
    ]


def _short(values: list[float]) -> float | list[float]:
    return values[0] if values and len(set(values)) == 1 else values


@dataclass(frozen=True)
class Machine:
    """Where a report was made. `vnni`: whether the processor has it; None where the system does not say."""

    processor: str
    capability: str  # of torch's kernels: "AVX2", "AVX512", "DEFAULT", ...
    vnni: bool | None
    engine: str  # torch's engine of int8 kernels
    accelerator: str | None
    system: str

    @staticmethod
    def here(device: torch.device) -> Machine:
        """This machine, with the accelerator that `device` names."""
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines() if CPUINFO.is_file() else []
        found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        flags = found.get("flags")  # of x86; ARM has "Features", without VNNI
        return Machine(
            found.get("model name") or platform.processor() or platform.machine(),
            torch.backends.cpu.get_cpu_capability(),
            None if flags is None else any(flag.endswith("vnni") for flag in flags.split()),
            torch.backends.quantized.engine,
            torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            f"{platform.system()} {platform.machine()}",
        )

    @property
    def text(self) -> str:
        """In one line."""
        vnni = "" if self.vnni is None else ", VNNI" if self.vnni else ", no VNNI"
        accelerator = "" if self.accelerator is None else f"; {self.accelerator}"
        return f"{self.processor} ({self.capability}{vnni}), {self.system}{accelerator}"
