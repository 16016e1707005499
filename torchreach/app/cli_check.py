"""`torchreach check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def check(
    certificate: Annotated[Path, typer.Argument(help="What --certificate wrote.", metavar="CERTIFICATE")],
    original: Annotated[Path, typer.Argument(help="Network A, .onnx or .safetensors.", metavar="A")],
    compressed: Annotated[Path | None, typer.Argument(help="Network B, likewise.", metavar="[B]")] = None,
) -> None:
    """Verify a certificate against the networks' files, without the engine that found it.

    The checker is NumPy and Python's own library alone, reads the files itself, and computes the bound of every part of
    the input set anew. `python -m torchreach.check` is the same program.

    Example: torchreach check net.certificate net.onnx small.onnx
    """
    from torchreach.check.check import main

    raise typer.Exit(main([str(path) for path in (certificate, original, compressed) if path is not None]))
