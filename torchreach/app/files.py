"""What a command writes beside its report: a certificate, verdicts for CI systems, and a page while it works."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torchreach.app import console as show
from torchreach.app.arguments import Setup
from torchreach.app.report.gates import Case, junit, sarif
from torchreach.app.report.provenance import file_hashes
from torchreach.core.files import check_place, whole
from torchreach.core.options import Budget
from torchreach.core.outward import at_most, counted
from torchreach.core.repaired import RepairResult
from torchreach.core.results import PROOF_SECONDS, Certifiable

READ = (".onnx", ".safetensors")  # networks' files that the checker reads


def writing(setup: Setup, **files: Path | None) -> Setup:
    """`setup` with files to be written, by option. Raises OptionError where one cannot be."""
    asked = {name: path for name, path in files.items() if path is not None}
    for name, path in asked.items():
        check_place(f"--{name}", path)
    return replace(setup, files=asked)


def certify(setup: Setup, found: Certifiable | RepairResult, networks: tuple[Path, Path | None]) -> None:
    """Writes the certificate that was asked for, and says what it proves and how it is checked."""
    if "certificate" not in setup.files:
        return
    made = found.save_certificate(setup.files["certificate"], Budget(seconds=setup.budget.seconds or PROOF_SECONDS))
    parts, most = counted(sum(made.leaves), "part"), at_most(float(made.upper.max()))
    show.print_line(setup.out, f"certificate: {made.path}, {made.size:,} bytes, {parts}; proves |y1 - y2| <= {most}")
    files = [str(path) if path is not None and path.suffix in READ else "NETWORK" for path in networks]
    more = "" if "NETWORK" not in files else f" (reads {' and '.join(READ)} files)"
    show.print_line(setup.out, f"check it: torchreach check {shlex.join([str(made.path), *files])}{more}")


def gate(setup: Setup, command: str, paths: tuple[Path, Path], status: int, cases: Callable[[], list[Case]]) -> int:
    """Writes the verdicts that were asked for; the exit status as it is given."""
    if {"junit", "sarif"} & set(setup.files):
        found, seconds = cases(), time.monotonic() - setup.began
        hashes = {path.as_posix(): file_hashes(path)[path.name] for path in paths}
        contents = {
            "junit": lambda: junit(command, found, seconds),
            "sarif": lambda: sarif(command, found, hashes, setup.command_line, status),
        }
        for name, content in contents.items():
            if name in setup.files:
                with whole(setup.files[name]) as draft:
                    draft.write_bytes(content())
    return status
