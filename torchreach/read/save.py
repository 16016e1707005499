"""Writes a flat chain of layers so that `load` reads it back: .onnx (fully connected ReLU networks) or .pt2."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from torchreach.core.errors import UnsupportedLayerError
from torchreach.core.files import check_target, whole

_ONNX_OPSET, _ONNX_IR = 17, 8  # read by every runtime in use


def save(network: nn.Sequential, path: str | Path, input_shape: tuple[int, ...]) -> None:
    """Writes `network` to `path`, whole or not at all. Weights are stored as they are.

    Args:
        network: a flat chain as `load` returns it; for .onnx of Linear, ReLU and Flatten layers.
        input_shape: shape of one input, without batch axis; the batch axis stays free.

    Raises: OptionError for another ending; UnsupportedLayerError for a layer that .onnx is not written for.
    """
    path = Path(path)
    check_target(path)
    with whole(path) as draft:
        if path.suffix.lower() == ".onnx":
            draft.write_bytes(onnx_bytes(network, input_shape))
        else:
            parameter = next(network.parameters(), torch.zeros(()))
            example = torch.zeros(2, *input_shape, dtype=parameter.dtype, device=parameter.device)
            batch = torch.export.Dim("batch")
            program = torch.export.export(network.eval(), (example,), dynamic_shapes=({0: batch},))
            torch.export.save(program, draft)


def onnx_bytes(network: nn.Sequential, input_shape: tuple[int, ...]) -> bytes:
    """The contents of an .onnx file of `network`; as `save`."""
    import onnx
    from onnx import helper, numpy_helper

    nodes, tensors, last = [], [], "x"
    dtype, outputs = torch.float32, 0
    for i, layer in enumerate(network):
        name = f"layer{i}"
        match layer:
            case nn.Linear():
                dtype, outputs = layer.weight.dtype, layer.out_features
                bias = torch.zeros(outputs, dtype=dtype) if layer.bias is None else layer.bias
                values = {f"{name}.weight": layer.weight, f"{name}.bias": bias}
                tensors += [numpy_helper.from_array(v.detach().cpu().numpy(), key) for key, v in values.items()]
                nodes.append(helper.make_node("Gemm", [last, *values], [name], name=name, transB=1))
            case nn.ReLU():
                nodes.append(helper.make_node("Relu", [last], [name], name=name))
            case nn.Flatten(start_dim=1, end_dim=-1):
                nodes.append(helper.make_node("Flatten", [last], [name], name=name, axis=1))
            case _:
                raise UnsupportedLayerError(
                    f"layer {i} ({type(layer).__name__}): .onnx is written for Linear, ReLU and Flatten; save as .pt2"
                )
        last = name
    kind = helper.np_dtype_to_tensor_dtype(torch.zeros((), dtype=dtype).numpy().dtype)
    graph = helper.make_graph(
        nodes,
        "torchreach",
        [helper.make_tensor_value_info("x", kind, ["batch", *input_shape])],
        [helper.make_tensor_value_info(last, kind, ["batch", outputs])],
        tensors,
    )
    opsets = [helper.make_opsetid("", _ONNX_OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_ONNX_IR, producer_name="torchreach")
    onnx.checker.check_model(model)
    return model.SerializeToString()
