"""A folder from which a run that was interrupted, killed or out of memory goes on: `checkpoint=` of the verbs.

    question.json          what is asked: verb, networks and sets by SHA-256, options, version
    <name>.safetensors     one piece of the answer, or of the state of the work: tensors, and plain data as metadata

A file stands under its name only when it is whole and on the disk (written beside its place, flushed, moved there),
carries a checksum over all that it says, and names the question that it belongs to. A file that is damaged, or of
another question, counts as missing, and its piece of work is done again: it can cost time, never a certificate.
Checksums show damage; they are no signature. Nothing is pickled.

One run at a time writes a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from torchreach.core.clock import Clock
from torchreach.core.errors import FileFormatError, OptionError
from torchreach.core.files import whole

log = logging.getLogger(__name__)

FORMAT, VERSION = "torchreach checkpoint", 1
QUESTION = "question.json"
ENDING = ".safetensors"
# Seconds of work between two snapshots of one state, at least, and as a multiple of what the last one took.
SECONDS, MULTIPLE = 10.0, 40.0


class Checkpoint:
    """Pieces of the answer to one question, by name. `part` gives those of a question inside of it."""

    def __init__(self, folder: Path, question: str, prefix: str = "", *, unit: bool = False) -> None:
        """question: digest of what is asked. unit: whether of one unit of work, which is not divided further.

        Callers have `Checkpoint.open` or `part`.
        """
        self.folder, self.question, self.prefix, self.unit = folder, question, prefix, unit
        self._due: dict[str, float] = {}

    @staticmethod
    def open(folder: str | Path, question: dict[str, Any]) -> Checkpoint:
        """The checkpoint of a question, made where there is none. question: JSON values by the names of options.

        Raises: OptionError: a folder that cannot be written, or that belongs to another question (the message names
            what differs) or to something else; FileFormatError: one whose `question.json` is damaged.
        """
        folder = Path(folder)
        asked = json.loads(json.dumps({"format": FORMAT, "format version": VERSION, **question}))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            place = folder / QUESTION
            if place.exists():
                _check_same(folder, asked, place)
            else:
                _check_empty(folder)
            with whole(place) as draft:  # also shows whether the folder can be written
                _flushed(draft, json.dumps(asked, indent=2).encode())
            _flush_folder(folder)
        except OSError as error:
            raise OptionError(f"checkpoint {folder}: the folder cannot be written: {error.strerror or error}") from None
        return Checkpoint(folder, hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest())

    def part(self, name: str, *question: str, unit: bool = False) -> Checkpoint:
        """The pieces of another question inside this one; question: what tells it from others of the same name."""
        own = hashlib.sha256("\n".join((self.question, name, *question)).encode()).hexdigest()
        return Checkpoint(self.folder, own, f"{self.prefix}{name}.", unit=unit)

    @property
    def outermost(self) -> bool:
        """Whether these are the pieces of the whole question."""
        return not self.prefix

    def load(self, name: str, device: torch.device | str = "cpu") -> Any:
        """The tree of `save`, its tensors on `device`; None where there is none, or it is damaged."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with cast("Any", safe_open(path, framework="pt", device="cpu")) as file:
                said: dict[str, str] = file.metadata() or {}
                tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in list(file.keys())}
            if said.get("question") != f"{self.question} {name}":
                log.info("%s belongs to another question: its work is done again", path)
                return None
            if said.get("sha256") != _checksum(said["question"], said["tree"], tensors):
                raise ValueError("its checksum does not hold")
            placed = {key: value.to(device) for key, value in tensors.items()}
            return _put(json.loads(said["tree"]), placed)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            log.warning("%s is damaged, its work is done again: %s", path, error)
            return None

    def save(self, name: str, tree: Any) -> None:
        """Writes lists and dictionaries of strings, numbers and tensors under a name, whole or not at all.

        Raises: OptionError where the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        text = json.dumps(_taken(tree, tensors))
        question = f"{self.question} {name}"
        said = {"question": question, "tree": text, "sha256": _checksum(question, text, tensors)}
        path = self._path(name)
        try:
            with whole(path) as draft:
                save_file(tensors, draft, said)
                with draft.open("rb+") as file:
                    os.fsync(file.fileno())
            _flush_folder(self.folder)
        except (OSError, SafetensorError) as error:
            raise OptionError(f"checkpoint {path} cannot be written: {error}") from None

    def tidy(self, keep: str) -> None:
        """Removes all pieces but one: once there is an answer, the state of the work on it is not needed."""
        kept = self._path(keep)
        for path in self.folder.glob(f"{self.prefix}*{ENDING}"):
            if path != kept:
                path.unlink(missing_ok=True)

    def wait(self, name: str, clock: Clock) -> float:
        """Seconds of work until another snapshot of this name is worth its time."""
        return self._due.setdefault(name, clock.elapsed + SECONDS) - clock.elapsed

    def due(self, name: str, clock: Clock) -> bool:
        """Whether that is now."""
        return self.wait(name, clock) <= 0

    def snapshot(self, name: str, tree: Callable[[], Any], clock: Clock) -> None:
        """`save`, and when the next one is due: so rarely that all of them take a small part of the time."""
        began = clock.elapsed
        self.save(name, tree())
        took = clock.elapsed - began
        self._due[name] = clock.elapsed + max(SECONDS, MULTIPLE * took)

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.prefix}{name}{ENDING}"


def _check_same(folder: Path, asked: dict[str, Any], place: Path) -> None:
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or cast("dict[str, Any]", found).get("format") != FORMAT:
        raise FileFormatError(f"{place} is damaged or no checkpoint's: give another folder, or remove this one")
    found = cast("dict[str, Any]", found)
    other = [
        f"{name} is {_short(found.get(name))} there and {_short(asked.get(name))} here"
        for name in dict.fromkeys((*asked, *found))
        if found.get(name) != asked.get(name)
    ]
    if other:
        raise OptionError(
            f"checkpoint {folder} belongs to another question: {'; '.join(other)}. Ask the same, give another folder, "
            "or remove this one"
        )


def _check_empty(folder: Path) -> None:
    others = [path.name for path in folder.iterdir() if not path.name.startswith(".draft-")]
    if others:
        raise OptionError(
            f"checkpoint {folder} must be a new or empty folder, or a checkpoint; it holds {sorted(others)[0]!r} and "
            f"no {QUESTION}"
        )


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return f"{text[:12]}..." if re.fullmatch("[0-9a-f]{64}", text) else text


def _flushed(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes a move inside a folder last, where the system can say so of a folder."""
    if hasattr(os, "O_DIRECTORY"):
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def _checksum(question: str, tree: str, tensors: dict[str, Tensor]) -> str:
    hashed = hashlib.sha256(f"{question}\n{tree}\n".encode())
    for key in sorted(tensors):
        value = tensors[key]
        hashed.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        hashed.update(cast("Any", value.flatten().view(torch.uint8).numpy()))
    return hashed.hexdigest()


def _taken(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """`tree` with a name in place of each tensor, which is put into `tensors`."""
    if isinstance(tree, Tensor):
        key = str(len(tensors))
        tensors[key] = tree.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(tree, list):
        return [_taken(part, tensors) for part in cast("list[Any]", tree)]
    if isinstance(tree, dict):
        return {"dict": [[key, _taken(part, tensors)] for key, part in cast("dict[Any, Any]", tree).items()]}
    return tree


def _put(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_put(part, tensors) for part in cast("list[Any]", tree)]
    if isinstance(tree, dict):
        node = cast("dict[str, Any]", tree)
        if "tensor" in node:
            return tensors[node["tensor"]]
        return {key: _put(part, tensors) for key, part in node["dict"]}
    return tree
