"""Writes a network so that `load` reads it back, as .onnx or .pt2, with its weights as they are."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from torchreach.core.errors import UnsupportedLayerError
from torchreach.core.extras import need
from torchreach.core.files import check_target, whole
from torchreach.graph.layers import MaskedReLU

_ONNX_OPSET, _ONNX_IR = 17, 8  # read by every runtime in use


class _Stretches(nn.Module):
    """`MaskedReLU` in operations that every reader knows: ReLU on stretches of the features [N], joined again."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        runs = mask.to(torch.int8).unique_consecutive(return_counts=True)
        self.on, self.sizes = (run.tolist() for run in runs)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.sizes, 1)
        return torch.cat([part.relu() if on else part for part, on in zip(parts, self.on, strict=True)], 1)


def save(network: nn.Module, path: str | Path, input_shape: tuple[int, ...]) -> None:
    """Writes `network` to `path`, whole or not at all. Weights are stored as they are.

    Args:
        network: a module that torch exports, or a flat chain as `load` returns it.
        input_shape: shape of one input, without batch axis; the batch axis stays free.

    Raises: OptionError for another ending; UnsupportedLayerError for a layer that torch does not write as .onnx.
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
            program = torch.export.export(_written(network).eval(), (example,), dynamic_shapes=({0: batch},))
            torch.export.save(program, draft)


def _written(network: nn.Module) -> nn.Module:
    if not any(isinstance(layer, MaskedReLU) for layer in network.children()):
        return network
    return nn.Sequential(*(_Stretches(f.mask) if isinstance(f, MaskedReLU) else f for f in network.children()))


def onnx_bytes(network: nn.Module, input_shape: tuple[int, ...]) -> bytes:
    """The contents of an .onnx file of `network`; as `save`."""
    onnx = need("onnx", "writing .onnx files")
    from onnx import helper, numpy_helper

    nodes, tensors, last = [], [], "x"
    dtype, outputs = torch.float32, 0
    for i, layer in enumerate(network if isinstance(network, nn.Sequential) else [network]):
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
                return _exported(network, input_shape)
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


def _exported(network: nn.Module, input_shape: tuple[int, ...]) -> bytes:
    """By torch's exporter that needs no other package, without its folding of weights."""
    parameter = next(network.parameters(), torch.zeros(()))
    example = torch.zeros(2, *input_shape, dtype=parameter.dtype, device=parameter.device)
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():  # it announces its end, and that the batch is free
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _written(network).eval(), (example,), buffer, dynamo=False,  # type: ignore[arg-type]
                opset_version=_ONNX_OPSET,
                input_names=["x"], dynamic_axes={"x": {0: "batch"}}, do_constant_folding=False,
                training=torch.onnx.TrainingMode.PRESERVE,
            )  # fmt: skip
    except Exception as error:  # of many kinds, one for each operator without a rule
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedLayerError(f"torch does not write this network as .onnx ({reason}); save as .pt2") from None
    return buffer.getvalue()
