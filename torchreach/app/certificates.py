"""`--certificate`, and `torchreach check`, which verifies the file on its own."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from torchreach.app import console as show
from torchreach.app.arguments import Setup
from torchreach.core.files import check_place
from torchreach.core.options import Budget
from torchreach.core.outward import at_most, counted
from torchreach.core.repaired import RepairResult
from torchreach.core.results import PROOF_SECONDS, Certifiable

READ = (".onnx", ".safetensors")  # networks' files that the checker reads


def certifying(setup: Setup, path: Path | None) -> Setup:
    """`setup` with a certificate to be written at `path`. Raises OptionError where it cannot be."""
    if path is not None:
        check_place("--certificate", path)
    return replace(setup, certificate=path)


def certify(setup: Setup, found: Certifiable | RepairResult, networks: tuple[Path, Path | None]) -> None:
    """Writes the certificate that was asked for, and says what it proves and how it is checked."""
    if setup.certificate is None:
        return
    made = found.save_certificate(setup.certificate, Budget(seconds=setup.budget.seconds or PROOF_SECONDS))
    parts, most = counted(sum(made.leaves), "part"), at_most(float(made.upper.max()))
    show.print_line(setup.out, f"certificate: {made.path}, {made.size:,} bytes, {parts}; proves |y1 - y2| <= {most}")
    files = [str(path) if path is not None and path.suffix in READ else "NETWORK" for path in networks]
    more = "" if "NETWORK" not in files else f" (reads {' and '.join(READ)} files)"
    show.print_line(setup.out, f"check it: torchreach check {shlex.join([str(made.path), *files])}{more}")
