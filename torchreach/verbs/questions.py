"""What a checkpoint is asked: networks and sets by SHA-256, and every option that the answer depends on.

A network counts by what is read of it, layers and their numbers, and not by its file, class or device. Seconds and
memory do not count: they say how long one call goes on, and the next one may be given more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchreach.core.checkpoint import Checkpoint
from torchreach.core.options import Budget, Exact, Search
from torchreach.core.plain import digest
from torchreach.core.tolerances import Tolerances
from torchreach.read.load import as_network
from torchreach.read.module import chain
from torchreach.sets.star import StarBatch


def network_digest(network: nn.Module, shape: tuple[int, ...]) -> str:
    """SHA-256 of the layers that a network is read as, on inputs of `shape`. Raises: as `chain`."""
    return digest(*chain(as_network(network), shape))


def opened(
    checkpoint: str | Path | Checkpoint | None,
    verb: str,
    networks: Mapping[str, nn.Module],
    inputs: StarBatch | Tensor,
    budget: Budget,
    **options: Any,
) -> Checkpoint | None:
    """The checkpoint of a verb's question: that of a folder, or a part of another verb's as it is, or None.

    options: by name. Raises: as `Checkpoint.open` and `chain`.
    """
    if checkpoint is None or isinstance(checkpoint, Checkpoint):
        return checkpoint
    shape = tuple(inputs.shape if isinstance(inputs, StarBatch) else inputs.shape[1:])
    parts = [inputs] if isinstance(inputs, Tensor) else [getattr(inputs, part.name) for part in fields(inputs)]
    question = {
        "verb": verb,
        "torchreach": _version(),
        **{role: network_digest(network, shape) for role, network in networks.items()},
        "inputs": digest(parts),
        "stars": budget.stars,
        **{name: _plain(value) for name, value in options.items()},
    }
    return Checkpoint.open(checkpoint, question)


def _version() -> str:
    try:
        return version("torchreach")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


def _plain(value: Any) -> Any:
    """A JSON value that tells options apart: their text, or the digest of tensors and what holds some."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return repr(value) if isinstance(value, Exact | Search | Tolerances) else digest(value)
