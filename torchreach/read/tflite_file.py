"""What a `.tflite` file holds, checked: tensors with their grids and data, and operators in the order of execution.

The flatbuffer is parsed by the schema of `ai-edge-litert`; nothing in the file is executed. Everything that an operator
refers to is there and of the size that it says, or the file is refused as damaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from torchreach.core.errors import FileFormatError, InvalidNetworkError, UnsupportedLayerError
from torchreach.core.extras import need
from torchreach.graph.quantizer import Quantizer

# Element types of the schema that the reader knows, and how they lie in memory.
_STORED = {"FLOAT32": "<f4", "FLOAT16": "<f2", "INT32": "<i4", "INT64": "<i8", "INT8": "i1", "UINT8": "u1"}
CODES = {"INT8": (-128, 127), "UINT8": (0, 255)}
NAME = 60  # characters of a name in messages
LARGEST = 2**28  # numbers in one tensor


@dataclass(frozen=True, eq=False)
class TfliteTensor:
    """One tensor: its shape as in the file, element type, grid (scale [] or [C], zero point, axis), and data if any."""

    name: str
    shape: tuple[int, ...]
    kind: str
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int
    data: np.ndarray | None

    def grid(self) -> Quantizer:
        """The grid of activations, one scale for the tensor, with all codes of its type.

        Raises: UnsupportedLayerError, InvalidNetworkError.
        """
        if self.kind not in CODES:
            raise UnsupportedLayerError(f"{self.name!r}: activations must be int8 codes, got {self.kind}")
        if not len(self.scale):
            raise UnsupportedLayerError(f"{self.name!r}: codes without a scale and a zero point")
        scale, zero = torch.from_numpy(self.scale.copy()), torch.from_numpy(self.zero_point.copy())
        return Quantizer(scale, zero, *CODES[self.kind], arithmetic="fixed point", name=self.name)

    def numbers(self) -> Tensor:
        """The data of a constant, as it is stored; float16 as float32."""
        assert self.data is not None
        return torch.from_numpy(self.data.astype(np.float32 if self.kind == "FLOAT16" else self.data.dtype))

    def real(self) -> Tensor:
        """A constant as float32 numbers: weights on a grid are dequantised."""
        value = self.numbers()
        if self.kind not in CODES:
            return value.float()
        along = [-1 if i == self.axis and len(self.scale) > 1 else 1 for i in range(value.ndim)]
        scale, zero = (
            torch.from_numpy(part.astype(np.float32)).reshape(along) for part in (self.scale, self.zero_point)
        )
        return (value.float() - zero) * scale


@dataclass(frozen=True, eq=False)
class TfliteNode:
    """One operator: its kind as the schema spells it, options, tensors read (-1: left out) and written."""

    place: int
    name: str
    kind: str
    options: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def refuse(self, reason: str) -> NoReturn:
        raise UnsupportedLayerError(f"operator {self.place} ({self.name!r}, {self.kind}): {reason}")

    def option(self, name: str, default: Any) -> Any:
        return getattr(self.options, name, default)


@dataclass(frozen=True, eq=False)
class TfliteFile:
    """The one subgraph of a file."""

    path: Path
    tensors: tuple[TfliteTensor, ...]
    nodes: tuple[TfliteNode, ...]
    input: int
    output: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input, without the batch axis."""
        return self.tensors[self.input].shape[1:]


def parse(path: Path) -> TfliteFile:
    """Reads and checks a file.

    Raises: FileFormatError: a damaged file. MissingPackageError: no ai-edge-litert. UnsupportedLayerError: several
        subgraphs, inputs or outputs. InvalidNetworkError: scales that are not positive, weights that are not finite.
    """
    schema = need("ai_edge_litert.schema_py_generated", f"{path}: reading .tflite files")
    try:
        data = path.read_bytes()
        if data[4:8] != b"TFL3":
            raise ValueError("it does not begin as a TFLite model does")
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        kinds = _names(schema.TensorType), _names(schema.BuiltinOperator)
        return _checked(path, model, *kinds)
    except (UnsupportedLayerError, InvalidNetworkError) as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:  # whatever damaged offsets lead to
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise FileFormatError(f"{path} is not a readable TFLite file: {reason}") from None


def _names(enumeration: Any) -> dict[int, str]:
    return {value: key for key, value in vars(enumeration).items() if isinstance(value, int)}


def _checked(path: Path, model: Any, types: dict[int, str], operators: dict[int, str]) -> TfliteFile:
    if model.subgraphs is None or not len(model.subgraphs):
        raise ValueError("it holds no graph")
    if len(model.subgraphs) != 1:
        raise UnsupportedLayerError(f"torchreach needs a network of one graph, got {len(model.subgraphs)}")
    graph = model.subgraphs[0]
    ends = [list(_whole(part)) for part in (graph.inputs, graph.outputs)]
    if any(len(part) != 1 for part in ends):
        raise UnsupportedLayerError(
            f"torchreach needs a network of one input and one output, got {len(ends[0])} and {len(ends[1])}"
        )
    tensors = tuple(_tensor(part, model.buffers, types) for part in graph.tensors)
    nodes = []
    known = {i for i, tensor in enumerate(tensors) if tensor.data is not None} | {-1, ends[0][0]}
    for place, part in enumerate(graph.operators or ()):
        code = model.operatorCodes[part.opcodeIndex]
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        kind = operators.get(number, f"operator {number}")
        if kind == "CUSTOM":
            kind = f"CUSTOM {_text(code.customCode)}"
        inputs, outputs = (tuple(int(i) for i in _whole(at)) for at in (part.inputs, part.outputs))
        if not all(-1 <= i < len(tensors) for i in inputs) or not all(0 <= i < len(tensors) for i in outputs):
            raise ValueError(f"operator {place} ({kind}) refers to a tensor that is not there")
        name = tensors[outputs[0]].name if outputs else ""
        node = TfliteNode(place, name, kind, part.builtinOptions, inputs, outputs)
        if not set(inputs) <= known:
            raise ValueError(f"operator {place} ({kind}) reads a tensor that no operator before it computes")
        known.update(outputs)
        nodes.append(node)
    if not all(0 <= i < len(tensors) for i in (ends[0][0], ends[1][0])) or ends[1][0] not in known:
        raise ValueError("its input or output is not there")
    if tensors[ends[0][0]].data is not None or len(tensors[ends[0][0]].shape) < 2:
        raise UnsupportedLayerError("the input must have a batch axis and features, and no value of its own")
    return TfliteFile(path, tensors, tuple(nodes), ends[0][0], ends[1][0])


def _tensor(part: Any, buffers: Any, types: dict[int, str]) -> TfliteTensor:
    name, kind = _text(part.name), types.get(part.type, f"type {part.type}")
    shape = tuple(int(n) for n in _whole(part.shape))
    if not all(0 < n < LARGEST for n in shape) or prod(shape) > LARGEST:
        raise ValueError(f"{name!r} has the shape {shape}")
    grid = part.quantization
    scale = np.zeros(0) if grid is None or grid.scale is None else np.asarray(grid.scale, dtype=np.float32)
    zero = np.zeros(len(scale)) if grid is None or grid.zeroPoint is None else np.asarray(grid.zeroPoint)
    zero = zero.astype(np.int64)
    if len(zero) == 1:
        zero = zero.repeat(len(scale))
    axis = 0 if grid is None else int(grid.quantizedDimension)
    if len(scale):
        if len(zero) != len(scale) or (len(scale) > 1 and not (0 <= axis < len(shape) and shape[axis] == len(scale))):
            raise ValueError(f"{name!r} has {len(scale)} scales and {len(zero)} zero points for the shape {shape}")
        if not bool((np.isfinite(scale) & (scale > 0)).all()):
            raise InvalidNetworkError(f"scales must be positive and finite, those of {name!r} are not")
    buffer = buffers[part.buffer]
    data = None
    if buffer.data is not None and len(buffer.data):
        data = _data(name, kind, shape, np.asarray(buffer.data, dtype=np.uint8))
        if data.dtype.kind == "f" and not bool(np.isfinite(data).all()):
            raise InvalidNetworkError(f"weights must be finite, those of {name!r} are not")
    elif buffer.offset > 1:
        raise UnsupportedLayerError(f"{name!r}: weights that lie outside of the flatbuffer are not supported")
    if part.isVariable or part.sparsity is not None:
        raise UnsupportedLayerError(f"{name!r}: variables and sparse tensors are not supported")
    return TfliteTensor(name, shape, kind, scale, zero, axis, data)


def _data(name: str, kind: str, shape: tuple[int, ...], raw: np.ndarray) -> np.ndarray:
    if kind == "INT4":
        raise UnsupportedLayerError(f"{name!r}: weights must be int8, float16 or float32, got {kind}")
    if kind not in _STORED:
        raise UnsupportedLayerError(f"{name!r}: constants of type {kind} are not supported")
    if raw.nbytes != prod(shape) * np.dtype(_STORED[kind]).itemsize:
        raise ValueError(f"{name!r} holds {raw.nbytes} bytes, which is not {shape} of {kind}")
    return np.frombuffer(raw.tobytes(), dtype=_STORED[kind]).reshape(shape)


def _whole(values: Any) -> Any:
    return () if values is None else np.atleast_1d(values)


def _text(value: Any) -> str:
    return (value or b"").decode(errors="replace").split(";")[0][:NAME]
