"""Files that are written whole or not at all, in places that are known to be writable before the work begins."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path

from torchreach.core.errors import OptionError

NETWORKS = (".onnx", ".pt2")
READABLE = (*NETWORKS, ".tflite")


def check_folder(folder: Path) -> None:
    """Raises OptionError where `write_files` could not write: tries it, and leaves nothing behind."""
    made: list[Path] = []
    try:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        nearest = missing[-1].parent if missing else folder
        if not nearest.is_dir():
            raise OptionError(f"--output must name a folder, but {nearest} is a file")
        for place in reversed(missing):
            place.mkdir()
            made.append(place)
        _try_to_write(folder)
    except OSError as error:
        raise OptionError(f"--output {folder}: the folder cannot be written: {error.strerror or error}") from None
    finally:
        for place in reversed(made):
            with contextlib.suppress(OSError):
                place.rmdir()


def check_target(path: Path, endings: tuple[str, ...] = NETWORKS) -> None:
    """Raises OptionError where a network could not be saved as `path`: tries it, and leaves nothing behind."""
    if path.suffix.lower() not in endings:
        raise OptionError(f"a network is saved as {' or '.join(endings)}, got {path.suffix or 'no ending'!r} in {path}")
    try:
        if path.is_dir():
            raise OptionError(f"cannot save a network as {path}: it is a folder")
        if not path.parent.is_dir():
            raise OptionError(f"cannot save a network in {path.parent}: no such folder")
        _try_to_write(path.parent, path.name)
    except OSError as error:
        raise OptionError(f"cannot save a network in {path.parent}: {error.strerror or error}") from None


def check_place(option: str, path: Path) -> None:
    """Raises OptionError where a file could not be written at `path`: tries it, and leaves nothing behind."""
    try:
        if path.is_dir() or not path.parent.is_dir():
            raise OptionError(f"{option} must name a file in a folder that exists, got {path}")
        _try_to_write(path.parent, path.name)
    except OSError as error:
        raise OptionError(f"{option} {path}: the file cannot be written: {error.strerror or error}") from None


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` into `folder`, made if missing: first all of them beside their places, then moved there."""
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder))
    try:
        for name, content in files.items():
            (draft / name).write_bytes(content)
        for name in files:
            os.replace(draft / name, folder / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):  # it holds the files
                folder.rmdir()


@contextlib.contextmanager
def whole(path: Path) -> Generator[Path, None, None]:
    """A draft to write, beside `path`, which it replaces when the block ends without an error."""
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        yield draft
        os.replace(draft, path)


def _try_to_write(folder: Path, name: str = "x") -> None:
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=folder) as draft:
        (Path(draft) / name).write_bytes(b"x")
