"""Networks from files, read without any library of models: safetensors, and the initialisers and nodes of ONNX.

Read are chains of affine layers (Linear; Gemm, MatMul, Add, Sub of constants) and ReLUs; all else is refused by name.
Weights are taken as the numbers that are stored, exact in float64.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchreach.check.forms import Layer, Refused

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
ONNX_TYPES = {1: "<f4", 11: "<f8", 10: "<f2", 7: "<i8", 6: "<i4"}


def safetensors(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors by name, and the metadata. Raises Refused where the file is damaged."""
    try:
        size = int.from_bytes(content[:8], "little")
        if not 0 < size <= len(content) - 8:
            raise ValueError("its header does not fit")
        header, body, tensors = json.loads(content[8 : 8 + size]), memoryview(content)[8 + size :], {}
        more = header.pop("__metadata__", {})
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= len(body):
                raise ValueError(f"{name} lies outside of it")
            part, kind = body[first:last], entry["dtype"]
            if kind == "BF16":
                value = (np.frombuffer(part, "<u2").astype("<u4") << 16).view("<f4")
            else:
                value = np.frombuffer(part, TYPES[kind])
            tensors[name] = value.reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"a safetensors file that is damaged: {error}") from None
    return tensors, more


def network(path: Path) -> list[Layer]:
    """The layers of a file, the last without a ReLU. Raises Refused."""
    content = path.read_bytes()
    if path.suffix == ".onnx":
        return _onnx(content)
    if path.suffix != ".safetensors":
        raise Refused(f"{path.name}: networks are read from .safetensors and .onnx")
    tensors, _ = safetensors(content)
    order = sorted((n for n in tensors if n.endswith("weight")), key=lambda n: [int(p) if p.isdigit() else p for p in n.split(".")])
    layers, used = [], set(order)
    for name in order:
        weight, bias = tensors[name], tensors.get(name[: -len("weight")] + "bias")
        if weight.ndim != 2 or weight.dtype.kind != "f":
            raise Refused(f"{path.name}: {name} is no weight of a fully connected layer")
        used.add(name[: -len("weight")] + "bias")
        layers.append(_layer(weight, bias, name is not order[-1]))
    if not layers or set(tensors) - used:
        raise Refused(f"{path.name}: tensors that are no weight or bias: {', '.join(sorted(set(tensors) - used)) or 'none at all'}")
    return layers


def _layer(weight: np.ndarray, bias: np.ndarray | None, relu: bool) -> Layer:
    bias = np.zeros(len(weight)) if bias is None else bias.astype(np.float64)
    return Layer(np.ascontiguousarray(weight, np.float64), bias, np.full(len(weight), relu))


def digest(layers: list[Layer]) -> str:
    """SHA-256 of the layers: per layer its shape and whether ReLUs follow, as text, then W and b in float64, row by row."""
    found = hashlib.sha256()
    for layer in layers:
        found.update(f"{layer.weight.shape[0]} {layer.weight.shape[1]} {int(layer.relu.all())}\n".encode())
        found.update((layer.weight + 0.0).astype("<f8").tobytes())
        found.update((layer.bias + 0.0).astype("<f8").tobytes())
    return found.hexdigest()


def fields(content: memoryview) -> Iterator[tuple[int, Any]]:
    """Fields of one protobuf message: numbers, and parts of the content."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number that does not end")

    while at < len(content):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        if size is None:
            if key & 7 != 2:
                raise ValueError("an unknown kind of field")
            size = varint()
        if size > len(content) - at:
            raise ValueError("a field that does not fit")
        yield key >> 3, content[at : at + size]
        at += size


def _ints(value: Any) -> list[int]:
    """A repeated number, packed or not."""
    if isinstance(value, int):
        return [value]
    wrapped = b"".join(bytes([8]) + bytes(part) for part in _varints(value))
    return [number for _, number in fields(memoryview(wrapped))]


def _varints(content: memoryview) -> Iterator[memoryview]:
    start = 0
    for at, byte in enumerate(content):
        if byte < 128:
            yield content[start : at + 1]
            start = at + 1


def _tensor(content: memoryview) -> tuple[str, np.ndarray]:
    name, dims, kind, value = "", [], 0, None
    for field, part in fields(content):
        if field == 1:
            dims += _ints(part)
        elif field == 2:
            kind = part
        elif field == 8:
            name = bytes(part).decode()
        elif field == 9 or (field == 4 and kind == 1) or (field == 10 and kind == 11):
            value = np.frombuffer(part, ONNX_TYPES[kind])
        elif field == 7 and kind == 7:
            value = np.array(_ints(part))
        elif field in (13, 14):
            raise ValueError(f"{name}: numbers in another file")
    if kind not in ONNX_TYPES:
        return name, np.zeros(0)
    return name, (np.zeros(0) if value is None else value).reshape(dims)


def _onnx(content: bytes) -> list[Layer]:
    try:
        graph = next(part for field, part in fields(memoryview(content)) if field == 7)
        constants = dict(_tensor(part) for field, part in fields(graph) if field == 5)
        nodes = [part for field, part in fields(graph) if field == 1]
        inputs = [bytes(next(v for f, v in fields(part) if f == 1)).decode() for field, part in fields(graph) if field == 11]
        result = [bytes(next(v for f, v in fields(part) if f == 1)).decode() for field, part in fields(graph) if field == 12]
        return _chain(nodes, constants, [name for name in inputs if name not in constants], result)
    except (ValueError, IndexError, KeyError, StopIteration, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise Refused(f"an ONNX file that is damaged or not understood: {error!r}") from None


def _chain(nodes: list[memoryview], constants: dict[str, np.ndarray], inputs: list[str], result: list[str]) -> list[Layer]:
    """Nodes in the order of a chain. Layers are (W, b, relu); consecutive W x and + b become one."""
    if len(inputs) != 1 or len(result) != 1:
        raise ValueError("a network of several inputs or outputs")
    now, parts, fresh = inputs[0], [], False  # fresh: the last part has no bias yet
    for node in nodes:
        names: list[str] = []
        outputs, op, attributes = [], "", {}
        for field, part in fields(node):
            if field == 1:
                names.append(bytes(part).decode())
            elif field == 2:
                outputs.append(bytes(part).decode())
            elif field == 4:
                op = bytes(part).decode()
            elif field == 5:
                entry = list(fields(part))
                key = bytes(dict(entry)[1]).decode()
                attributes[key] = {f: v for f, v in entry if f in (2, 3, 5)}
        if op == "Constant":
            constants[outputs[0]] = _tensor(attributes["value"][5])[1]
            continue
        given = [constants.get(name) for name in names]
        if now not in names or (len(names) > 1 and given[1] is None and names[1] != now):
            raise ValueError(f"{op}: no chain")
        now = outputs[0]
        scale = [np.frombuffer(attributes[key][2], "<f4")[0] for key in ("alpha", "beta") if key in attributes]
        whole = {key: attributes[key][3] for key in ("transA", "transB") if key in attributes}
        if op in ("Flatten", "Identity", "Dropout") or op == "Reshape":
            continue
        if op == "Relu" and parts and not parts[-1][2]:
            parts[-1][2], fresh = True, False
        elif op == "Gemm" and given[1] is not None and all(s == 1 for s in scale) and not whole.get("transA"):
            weight = given[1] if whole.get("transB") else given[1].T
            bias = given[2] if len(given) > 2 and given[2] is not None else np.zeros(len(weight))
            parts.append([weight, np.broadcast_to(bias, len(weight)), False])
            fresh = False
        elif op == "MatMul" and given[0] is None and given[1] is not None and given[1].ndim == 2:
            parts.append([given[1].T, np.zeros(given[1].shape[1]), False])
            fresh = True
        elif op in ("Add", "Sub") and len(names) == 2 and (given[0] is None) != (given[1] is None):
            value = (given[1] if given[1] is not None else given[0]).astype(np.float64)
            if op == "Sub" and given[1] is None:
                raise ValueError("Sub of a value from a constant")
            value = -value if op == "Sub" else value
            if fresh:
                parts[-1][1], fresh = np.broadcast_to(value.reshape(-1), len(parts[-1][0])), False
            elif value.any():
                raise ValueError(f"{op} that is not the bias of a MatMul")
        else:
            raise ValueError(f"{op} is not read here")
    if now != result[0] or not parts or parts[-1][2]:
        raise ValueError("no chain to the output, or one that ends in a ReLU")
    return [_layer(weight, bias, relu) for weight, bias, relu in parts]
