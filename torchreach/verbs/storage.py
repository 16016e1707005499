"""Results in files that are safe to read.

A file is what `torch.save` makes of dictionaries, lists, tensors, numbers and strings, and is read with
`weights_only=True`: nothing in it is executed. Each value of a class of `torchreach.core.results` is a dictionary of
its fields under the name of the class, so files stay readable when a field with a default is added.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchreach.core import audited, repaired, results
from torchreach.core.audited import Audit
from torchreach.core.errors import FileFormatError, InvalidNetworkError, OptionError
from torchreach.core.files import whole
from torchreach.core.plain import builders, decode, encode
from torchreach.core.repaired import RepairResult
from torchreach.core.results import Discrepancy, Equivalence, ReachResult
from torchreach.sets.star import StarBatch

Result = Discrepancy | ReachResult | Equivalence | RepairResult | Audit

_FORMAT, _VERSION = "torchreach result", 1
_CLASSES = {
    **builders([*vars(results).values(), *vars(audited).values(), *vars(repaired).values()]),
    "StarBatch": StarBatch.trusted,
}


def save_result(result: Result, path: str | Path) -> None:
    """Writes what `discrepancy`, `reach`, `equivalent`, `audit` or `repair` returned, for `load_result`; whole or not.

    Tensors keep their dtype. Of a repaired network the state dict is kept, not the structure.

    Raises: OptionError for anything else; OSError where `path` cannot be written.
    """
    if not isinstance(result, Result):
        raise OptionError(
            f"a result of discrepancy, reach, equivalent, audit or repair is required, got {_kind(result)}"
        )
    content = {"format": _FORMAT, "version": _VERSION, "result": to_plain(result)}
    with whole(Path(path)) as draft:
        torch.save(content, draft)


def load_result(path: str | Path, network: nn.Module | None = None, *, device: torch.device | str = "cpu") -> Result:
    """The result in a file of `save_result`, its tensors on `device`.

    network: for the result of a repair, a module of the structure of the one that was repaired, such as the compressed
        network; its numbers do not matter, and it is not changed.

    Raises: FileFormatError: a file that is missing, damaged, or no result; OptionError: the result of a repair, and no
        network; InvalidNetworkError: a network of another structure.
    """
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(f"no such file: {path}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # zip and pickle errors, and what weights_only refuses
        reason = (str(error).strip().splitlines() or [_kind(error)])[0]
        raise FileFormatError(f"{path} is not a readable result of torchreach.save_result: {reason}") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise FileFormatError(f"{path} is not a result of torchreach.save_result")
    if content.get("version") != _VERSION:
        raise FileFormatError(
            f"{path} must be of version {_VERSION}, got {content.get('version')!r}: another torchreach wrote it"
        )
    try:
        result = from_plain(content.get("result"), network)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, OptionError | InvalidNetworkError):
            raise
        raise FileFormatError(f"{path} is damaged or was written by another torchreach: {error}") from None
    if not isinstance(result, Result):
        raise FileFormatError(f"{path} must hold a result, got {_kind(result)}")
    return result


def to_plain(value: Any) -> Any:
    """A result, or a part of one, as plain data and tensors; of a network its state dict."""
    return encode(value, _CLASSES, _other)


def from_plain(tree: Any, network: nn.Module | None = None) -> Any:
    """What `to_plain` made a tree of. network: the structure of networks in it."""
    return decode(tree, _CLASSES, {"network": lambda state: _filled(network, state)})


def _other(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return {"type": "network", "value": dict(value.state_dict())}
    raise OptionError(f"a result cannot keep a {_kind(value)}")


def _filled(network: nn.Module | None, state: dict[str, Any]) -> nn.Module:
    """A copy of `network` with the numbers of `state`."""
    if network is None:
        raise OptionError(
            "the result of a repair holds the numbers of its network, not the structure: load_result needs network=, "
            "a module of the structure of the one that was repaired"
        )
    filled = copy.deepcopy(network)
    try:
        filled.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).splitlines()[1:2]).strip()
        raise InvalidNetworkError(
            f"network must have the structure of the repaired one, got {_kind(network)}: {reason}"
        ) from None
    return filled


def _kind(value: object) -> str:
    return type(value).__name__
