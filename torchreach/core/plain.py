"""Values of this package as plain data, dictionaries, numbers, strings and tensors, and back; and their digests.

Nothing is pickled: a value of a class is a dictionary of its fields under the name of the class, and is built again
only by the classes that the reader names.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

Builders = Mapping[str, Callable[..., Any]]


def builders(kinds: Iterable[Any]) -> dict[str, Callable[..., Any]]:
    """Those of `kinds` that `decode` can build, dataclasses and enumerations, by name."""
    return {
        kind.__name__: kind
        for kind in kinds
        if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, enum.Enum))
    }


def encode(value: Any, known: Builders, other: Callable[[Any], Any] | None = None, *, shared: bool = False) -> Any:
    """`value` as plain data; tensors of a view are the part that is seen.

    known: the classes that may occur. other: what to do with values of any other kind. shared: whether an object that
        occurs twice is to be one object again when it is read.

    Raises: TypeError: a value of a class that is neither known nor handled by `other`.
    """
    seen: dict[int, int] = {}

    def walk(value: Any) -> Any:
        kind = type(value).__name__
        match value:
            case enum.Enum():
                return {"type": kind, "value": value.value}
            case None | bool() | int() | float() | str():
                return value
            case Tensor():
                return value.detach().clone()
            case list() | tuple():
                parts = [walk(part) for part in cast("list[Any]", value)]
                return parts if isinstance(value, list) else {"type": "tuple", "value": parts}
            case dict():
                content = cast("dict[Any, Any]", value)
                return {"type": "dict", "value": {key: walk(part) for key, part in content.items()}}
            case _ if kind in known and dataclasses.is_dataclass(value):
                if id(value) in seen:
                    return {"type": "again", "value": seen[id(value)]}
                own = [part.name for part in dataclasses.fields(value) if part.init and part.metadata.get("kept", True)]
                content = {name: walk(getattr(value, name)) for name in own}
                if shared:
                    seen[id(value)] = len(seen)
                return {"type": kind, "value": content}
            case _:
                pass
        if other is None:
            raise TypeError(f"no plain data for a {kind}")
        return other(value)

    return walk(value)


def decode(tree: Any, known: Builders, other: Mapping[str, Callable[[Any], Any]] | None = None) -> Any:
    """The value that `encode` made `tree` of. known, other: what builds values of each name, of fields or as a whole.

    Raises: KeyError, TypeError, ValueError: what is not of that making.
    """
    built: list[Any] = []

    def walk(tree: Any) -> Any:
        if isinstance(tree, list):
            return [walk(part) for part in cast("list[Any]", tree)]
        if not isinstance(tree, dict):
            return tree
        node = cast("dict[str, Any]", tree)
        kind, content = node["type"], node["value"]
        if other is not None and kind in other:
            return other[kind](content)
        if kind == "again":
            return built[content]
        if kind == "tuple":
            return tuple(walk(part) for part in content)
        if kind == "dict":
            return {key: walk(part) for key, part in content.items()}
        make = known[kind]
        if isinstance(make, type) and issubclass(make, enum.Enum):
            return make(content)
        result = make(**{key: walk(part) for key, part in content.items()})
        built.append(result)
        return result

    return walk(tree)


def digest(*values: Any) -> str:
    """SHA-256 of tensors, plain data, modules and values of classes: of names, types, shapes, dtypes and all numbers.

    Of a module its parameters, buffers, submodules and attributes, but for the mode it is in. Functions count by name.
    Equal on every device.
    """
    hashed, seen = hashlib.sha256(), dict[int, int]()

    def say(*words: object) -> None:
        hashed.update(" ".join(map(str, words)).encode() + b"\n")

    def walk(value: Any) -> None:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        match value:
            case None | bool() | int() | float() | str() | torch.dtype() | torch.Size():
                say(kind, repr(value))
            case torch.device():
                say("device")
            case enum.Enum():
                say(kind, value.name)
            case Tensor():
                _tensor(value)
            case list() | tuple():
                parts = cast("list[Any]", value)
                say(kind, len(parts))
                for part in parts:
                    walk(part)
            case dict():
                content = cast("dict[Any, Any]", value)
                say(kind, len(content))
                for key, part in content.items():
                    say(repr(key))
                    walk(part)
            case _ if callable(value) and hasattr(value, "__qualname__"):
                function = cast("Any", value)
                say("function", function.__module__, function.__qualname__)
            case _:
                if id(value) in seen:
                    say("again", seen[id(value)])
                    return
                seen[id(value)] = len(seen)
                say(kind)
                walk(_contents(value))

    def _tensor(value: Tensor) -> None:
        value = value.detach()
        if value.is_quantized:
            say("quantized", value.qscheme(), *([value.q_scale(), value.q_zero_point()] if _one_scale(value) else []))
            if not _one_scale(value):
                walk([value.q_per_channel_scales(), value.q_per_channel_zero_points(), value.q_per_channel_axis()])
            value = value.int_repr()
        if type(value) not in (Tensor, nn.Parameter):  # a subclass whose numbers lie in other tensors
            value = value.dequantize()
        value = value.cpu().contiguous()
        say("tensor", value.dtype, list(value.shape))
        hashed.update(value.flatten().view(torch.uint8).numpy().tobytes())

    for value in values:
        walk(value)
    return hashed.hexdigest()


def _one_scale(value: Tensor) -> bool:
    return value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)


def _contents(value: object) -> dict[str, Any]:
    """The attributes of a value, by name; of a module without its mode, hooks and torch's own bookkeeping."""
    if isinstance(value, nn.Module):
        own = {name: part for name, part in vars(value).items() if name not in _BOOKKEEPING}
        return {**own, **value._parameters, **value._buffers, **value._modules}  # pyright: ignore[reportPrivateUsage]
    if dataclasses.is_dataclass(value):
        return {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
    if isinstance(value, torch.ScriptObject):  # packed weights of int8 layers
        return {"": value.__getstate__()}
    return dict(vars(value)) if hasattr(value, "__dict__") else {"": repr(value)}


_BOOKKEEPING = frozenset(vars(nn.Module()))
