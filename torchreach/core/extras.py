"""Packages that are not always needed: what one of them is missing for, and which extra brings it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torchreach.core.errors import TorchreachError

# The extra of pyproject.toml that brings a module, and the package's name where it is another.
EXTRAS = {
    "onnx": ("onnx", "onnx"),
    "ai_edge_litert": ("tflite", "ai-edge-litert"),
    "torchvision": ("vision", "torchvision"),
    "sklearn": ("vision", "scikit-learn"),
    "matplotlib": ("report", "matplotlib"),
    "ray": ("ray", "ray"),
}


class MissingPackageError(TorchreachError, ImportError):
    """A package of an extra that is not installed; the message names both."""


def need(module: str, purpose: str) -> Any:
    """A module of `EXTRAS`, or of one of its packages: "onnx", "matplotlib.figure".

    Raises: MissingPackageError: "`purpose` needs ...", where it cannot be imported.
    """
    try:
        import_module(module.partition(".")[0])
        return import_module(module)
    except ImportError as error:
        extra, package = EXTRAS[module.partition(".")[0]]
        raise MissingPackageError(
            f"{purpose} needs the package {package}, which comes with torchreach[{extra}]: "
            f"pip install 'torchreach[{extra}]' ({error})"
        ) from None
