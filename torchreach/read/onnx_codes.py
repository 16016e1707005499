"""Quantised ONNX files as onnxruntime's CPU kernels execute them: QDQ graphs and QOperator graphs.

    DequantizeLinear, float operators, QuantizeLinear  ->  the integer kernel that onnxruntime fuses them to
    QLinearConv, QGemm, QLinearAdd and their like      ->  that kernel

Sums are integers; codes are float32(sum) (scale_in scale_weight / scale_out) rounded to even, all in float32
(`graph.requantise.SingleFloat`). Unsigned codes times signed weights saturate in pairs on x86 without VNNI, in those of
`graph.kernels.Pairing.FBGEMM`; signed codes of a QDQ graph become unsigned ones there, and saturate too. Measured on
onnxruntime 1.32: equal on networks of every format that its `quantize_static` writes, opsets 10 to 23, but for what is
refused. What only moves, joins or clamps dequantised numbers is executed on their codes, for it does the same to them.

Refused by name: dynamic scales (`quantize_dynamic`), sums that stay integers, and what onnxruntime sums in float32:
16-bit and 4-bit numbers, operators that it does not fuse, signed codes of a QDQ graph that two operators read.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from torchreach.core.errors import FileFormatError, InvalidNetworkError, UnsupportedLayerError
from torchreach.graph import deployed as ops
from torchreach.read.onnx_codes_operations import CodesOperations

_QUANTISED = ("QuantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")


def is_quantised(model: onnx.ModelProto) -> bool:
    """Whether a file has operators on integer codes; weights that are only stored so do not count."""
    kinds = {node.op_type for node in model.graph.node}
    return any(kind in _QUANTISED or kind.startswith(("QLinear", "QGemm")) for kind in kinds)


def read_codes(model: onnx.ModelProto, path: Path) -> ops.DeployedNetwork:
    """The network. Raises: UnsupportedLayerError, InvalidNetworkError, FileFormatError, each with the file's name."""
    try:
        return CodesOperations(model).network()
    except (UnsupportedLayerError, InvalidNetworkError, FileFormatError) as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:  # a stored tensor
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileFormatError(f"{path} is damaged: {reason}") from None
