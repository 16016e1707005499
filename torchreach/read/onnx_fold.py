"""Nodes of an ONNX file that read constants alone: their values, by onnx's own reference implementation."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import onnx

FOLDED = {
    *("Constant", "ConstantOfShape", "Shape", "Identity", "Cast", "Concat", "Gather", "Slice", "Expand"),
    *("Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose"),
    *("Add", "Sub", "Mul", "Div", "Neg", "MatMul", "Sqrt", "Reciprocal", "DequantizeLinear"),
}

_GROWING = ("ConstantOfShape", "Expand")  # to the shape that their last input says
_LARGEST = 2**28  # numbers of one constant: a damaged file may ask for any size


def folded(node: onnx.NodeProto, constants: Mapping[str, np.ndarray], opsets: Mapping[str, int]) -> list[Any]:
    """Outputs of a node. Raises whatever onnx does about a damaged one."""
    from onnx.reference import ReferenceEvaluator

    if node.op_type in _GROWING and prod(int(n) for n in constants[node.input[-1]].reshape(-1)) > _LARGEST:
        raise ValueError(f"a constant must have at most {_LARGEST} numbers")
    feeds = {n: constants[n] for n in node.input if n}
    return list(ReferenceEvaluator(_alone(node, opsets)).run(None, feeds))


def _alone(node: onnx.NodeProto, opsets: Mapping[str, int]) -> onnx.ModelProto:
    """`node` as a model of the file's opset, which says where its arguments stand (as inputs or attributes)."""
    inputs, outputs = ([onnx.ValueInfoProto(name=n) for n in names if n] for names in (node.input, node.output))
    graph = onnx.helper.make_graph([node], "node", inputs, outputs)
    versions = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return onnx.helper.make_model(graph, opset_imports=versions)
