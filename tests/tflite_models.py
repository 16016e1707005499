"""Small TFLite models written by the schema of ai-edge-litert, and the interpreter as their judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

schema: Any = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="ai-edge-litert is not installed")
interpreter: Any = pytest.importorskip("ai_edge_litert.interpreter")

DTYPES = {"FLOAT32": np.float32, "INT8": np.int8, "UINT8": np.uint8, "INT32": np.int32, "FLOAT16": np.float16}


class Model:
    """One graph, built tensor by tensor and operator by operator."""

    def __init__(self) -> None:
        self.model, self.graph = schema.ModelT(), schema.SubGraphT()
        self.model.version, self.model.subgraphs = 3, [self.graph]
        self.model.buffers, self.model.operatorCodes = [schema.BufferT()], []
        self.graph.tensors, self.graph.operators = [], []

    def tensor(
        self,
        shape: tuple[int, ...],
        kind: str = "INT8",
        *,
        data: Any = None,
        scale: Any = None,
        zero: Any = 0,
        axis: int = 0,
    ) -> int:
        """Index of a new tensor; `data` makes it a constant."""
        tensor, buffer = schema.TensorT(), schema.BufferT()
        tensor.shape, tensor.type = np.array(shape, dtype=np.int32), getattr(schema.TensorType, kind)
        tensor.name = f"t{len(self.graph.tensors)}"
        if scale is not None:
            grid = schema.QuantizationParametersT()
            grid.scale = np.atleast_1d(np.asarray(scale, dtype=np.float32))
            grid.zeroPoint = np.broadcast_to(np.asarray(zero, dtype=np.int64), grid.scale.shape).copy()
            grid.quantizedDimension = axis
            tensor.quantization = grid
        if data is not None:
            stored = np.ascontiguousarray(np.asarray(data, dtype=DTYPES[kind]))
            buffer.data = np.frombuffer(stored.tobytes(), dtype=np.uint8)
            assert stored.size == np.prod(shape, dtype=int)
        self.model.buffers.append(buffer)
        tensor.buffer = len(self.model.buffers) - 1
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def add(self, kind: str, inputs: list[int], output: int, options: str = "", **values: Any) -> int:
        """An operator; returns its output."""
        code, operator = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode = getattr(schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), 1
        self.model.operatorCodes.append(code)
        operator.opcodeIndex = len(self.model.operatorCodes) - 1
        operator.inputs, operator.outputs = (np.array(part, dtype=np.int32) for part in (inputs, [output]))
        if options:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            operator.builtinOptions = getattr(schema, f"{options}T")()
            for name, value in values.items():
                assert hasattr(operator.builtinOptions, name)
                setattr(operator.builtinOptions, name, value)
        self.graph.operators.append(operator)
        return output

    def packed(self, head: int, output: int) -> bytes:
        """The file's bytes, for a network from tensor `head` to `output`."""
        import flatbuffers

        self.graph.inputs, self.graph.outputs = (np.array([i], dtype=np.int32) for i in (head, output))
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())


def executed(content: bytes, x: np.ndarray, *, reference: bool = True) -> np.ndarray:
    """What LiteRT computes at inputs [B, *shape], one at a time: [B, *]."""
    kinds = interpreter.OpResolverType
    kind = kinds.BUILTIN_REF if reference else kinds.AUTO
    judge = interpreter.Interpreter(model_content=content, experimental_op_resolver_type=kind)
    judge.allocate_tensors()
    head, output = judge.get_input_details()[0]["index"], judge.get_output_details()[0]["index"]
    result = []
    for row in x:
        judge.set_tensor(head, row[None])
        judge.invoke()
        result.append(judge.get_tensor(output)[0].copy())
    return np.stack(result)
