"""Networks from files, read without any library of models: safetensors, and the initialisers and nodes of ONNX.

Read are chains of affine layers (Linear; Gemm, MatMul, and Add or Sub of constants behind it) and ReLUs; all else is
refused by name. Weights are taken as the numbers that are stored, exact in float64.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchreach.check.forms import Layer, Refused

TYPES = dict(F64="<f8", F32="<f4", F16="<f2", BF16="<u2", I64="<i8", I32="<i4", I16="<i2", I8="i1", U8="u1")
ONNX_TYPES = {1: "<f4", 10: "<f2", 11: "<f8", 7: "<i8", 6: "<i4"}


def safetensors(content: bytes) -> dict[str, np.ndarray]:
    """Tensors by name. Raises Refused where the file is damaged."""
    try:
        size = int.from_bytes(content[:8], "little")
        header, body, tensors = json.loads(content[8 : 8 + size]), memoryview(content)[8 + size :], {}
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            value = np.frombuffer(body[first:last], TYPES[entry["dtype"]])
            value = (value.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else value
            tensors[name] = value.reshape(entry["shape"])
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"a safetensors file that is damaged: {error}") from None


def network(path: Path) -> list[Layer]:
    """The layers of a file. Raises Refused, OSError."""
    readers = {".onnx": onnx, ".safetensors": dense}
    if path.suffix not in readers:
        raise Refused(f"{path.name}: networks are read from .safetensors and .onnx files")
    try:
        return readers[path.suffix](path.read_bytes())
    except (ValueError, IndexError, KeyError, StopIteration, TypeError, AttributeError, Refused) as error:
        raise Refused(f"{path.name} is damaged, or not read here: {error}") from None


def dense(content: bytes) -> list[Layer]:
    """Weights and biases of fully connected layers in the order of their names, with ReLUs between them."""
    tensors = safetensors(content)
    weights = [name for name, value in tensors.items() if name.endswith("weight") and value.ndim == 2]
    weights.sort(key=lambda name: [(not part.isdigit(), part.zfill(9)) for part in name.split(".")])
    biases = [name.removesuffix("weight") + "bias" for name in weights]
    other = set(tensors) - set(weights) - set(biases)
    if other or not weights or any(value.dtype.kind != "f" for value in tensors.values()):
        raise Refused(f"not only weights and biases of fully connected layers: {', '.join(sorted(other))}")
    return chain([[tensors[w], tensors.get(b), w != weights[-1]] for w, b in zip(weights, biases, strict=True)])


def chain(parts: list[list[Any]]) -> list[Layer]:
    """Layers from weight, bias or None, and whether a ReLU follows; the last has none."""
    layers = []
    for weight, bias, relu in parts:
        bias = np.zeros(1) if bias is None else bias.astype(np.float64).reshape(-1)
        bias, relu = np.broadcast_to(bias, len(weight)).copy(), np.full(len(weight), relu)
        layers.append(Layer(np.ascontiguousarray(weight, np.float64), bias, relu))
    sizes = [layer.weight.shape for layer in layers]
    fit = bool(layers) and all(one[0] == two[1] for one, two in zip(sizes, sizes[1:], strict=False))
    if not fit or layers[-1].relu.any() or not all(np.isfinite(x.weight.sum() + x.bias.sum()) for x in layers):
        raise Refused("layers that do not follow one another, end in a ReLU, or have weights that are not finite")
    return layers


def digest(layers: list[Layer]) -> str:
    """SHA-256 of the layers: of each its sizes and whether ReLUs follow, as text, then W and b in float64, by rows."""
    found = hashlib.sha256()
    for layer in layers:
        found.update(f"{len(layer.weight)} {layer.weight.shape[1]} {int(layer.relu.all())}\n".encode())
        found.update(b"".join((part + 0.0).astype("<f8").tobytes() for part in (layer.weight, layer.bias)))
    return found.hexdigest()


def varint(content: memoryview, at: int) -> tuple[int, int]:
    """A protobuf number, and where what follows begins."""
    value = 0
    for shift in range(0, 70, 7):
        byte, at = content[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number that does not end")


def fields(content: memoryview) -> Iterator[tuple[int, Any]]:
    """Fields of one protobuf message: numbers, and parts of the content."""
    at = 0
    while at < len(content):
        key, at = varint(content, at)
        size, at = ({1: 8, 5: 4}[key & 7], at) if key & 7 in (1, 5) else varint(content, at)
        if key & 7 == 0:
            yield key >> 3, size  # the number itself
            continue
        if key & 7 not in (1, 2, 5) or size > len(content) - at:
            raise ValueError("a field that does not fit")
        yield key >> 3, content[at : at + size]
        at += size


def integers(value: Any) -> list[int]:
    """A repeated number, packed or not."""
    found, at = [value], 0
    while not isinstance(value, int) and at < len(value):
        found[-1], at = varint(value, at)
        found.append(0)
    return found if isinstance(value, int) else found[:-1]


def tensor(content: memoryview) -> tuple[str, np.ndarray]:
    """A TensorProto; of a kind that is not read, without numbers."""
    parts = list(fields(content))
    name, kind = b"".join(bytes(v) for f, v in parts if f == 8).decode(), next((v for f, v in parts if f == 2), 0)
    if any(f in (13, 14) and v for f, v in parts):
        raise ValueError(f"{name}: numbers in another file")
    value = np.zeros(0)
    for field, part in parts:
        if kind in ONNX_TYPES and (field == 9 or (field, kind) in ((4, 1), (10, 11))):
            value = np.frombuffer(part, ONNX_TYPES[kind])
        elif (field, kind) == (7, 7):
            value = np.array(integers(part))
    return name, value.reshape([n for f, v in parts if f == 1 for n in integers(v)]) if value.size else value


def onnx(content: bytes) -> list[Layer]:
    """A chain of nodes, in their order; W x and + b become one layer."""
    graph = list(fields(next(part for field, part in fields(memoryview(content)) if field == 7)))
    constants = dict(tensor(part) for field, part in graph if field == 5)
    names = [[bytes(dict(fields(p))[1]).decode() for f, p in graph if f == field] for field in (11, 12)]
    (now,), (result,) = [name for name in names[0] if name not in constants], names[1]
    parts: list[list[Any]] = []
    for node in (list(fields(part)) for field, part in graph if field == 1):
        inputs, outputs, op = ([bytes(v).decode() for f, v in node if f == field] for field in (1, 2, 4))
        more = {bytes(dict(fields(v))[1]).decode(): dict(fields(v)) for f, v in node if f == 5}
        if op == ["Constant"]:
            constants[outputs[0]] = tensor(more["value"][5])[1]
            continue
        given: list[Any] = [constants.get(name) for name in inputs]
        ones = all(np.frombuffer(more[key][2], "<f4")[0] == 1 for key in ("alpha", "beta") if key in more)
        if [name for name in inputs if name not in constants] != [now]:
            raise ValueError(f"{op}: no chain")
        now = outputs[0]
        match op, given:
            case ["Flatten" | "Identity" | "Dropout" | "Reshape"], [None, *_]:
                pass
            case ["Relu"], _ if parts and not parts[-1][2]:
                parts[-1][2] = True
            case ["Gemm"], [None, weight, *bias] if ones and "transA" not in more:
                parts.append([weight if more.get("transB", {}).get(3) else weight.T, bias[0] if bias else None, False])
            case ["MatMul"], [None, weight] if weight.ndim == 2:
                parts.append([weight.T, None, False])
            case (["Add"], [None, value] | [value, None]) | (["Sub"], [None, value]):
                if parts and parts[-1][1] is None and not parts[-1][2]:
                    parts[-1][1] = -value if op == ["Sub"] else value
                elif value.any():
                    raise ValueError(f"{op} of a constant that is no bias")
            case _:
                raise ValueError(f"{op} is not read here")
    if now != result:
        raise ValueError("no chain to the output")
    return chain(parts)
