"""Finds the public test data (see README, "Development"); tests that need it skip where it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def data_folder() -> Path | None:
    """Folder named by TORCHREACH_DATA, else ../shared/data beside the checkout, else None."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("TORCHREACH_DATA") or root.parent / "shared" / "data")
    return folder if folder.is_dir() else None


def require_data(*parts: str) -> Path:
    """Path below the data folder, or skip the test with a reason."""
    folder = data_folder()
    if folder is None:
        pytest.skip("public test data not found: set TORCHREACH_DATA to its folder")
    path = folder.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not in the data folder")
    return path
