"""Networks from ONNX files, `torch.export` programs (.pt2) and modules, all as the same flat chain."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import sys
from pathlib import Path

import torch
from torch import fx, nn

from torchreach.errors import FileFormatError
from torchreach.networks.builder import ChainBuilder, Shape, check_finite
from torchreach.networks.chain import add_graph_module, chain, exported_module
from torchreach.networks.quantizer import Quantizer


def load(source: str | Path | nn.Module, *, dtype: torch.dtype | None = None) -> nn.Sequential:
    """Network as a flat `nn.Sequential` of supported layers, in evaluation mode semantics (see `chain`).

    Args:
        source: path of an `.onnx` file, of a `.pt2` file written by `torch.export.save`, or a module (whose
            parameters the result shares, unless `dtype` asks for a converted copy).
        dtype: floating dtype of the result; None keeps the one in the file.

    An ONNX network whose input has axes of size 1 before it is flattened, such as [1, 1, 1, 5], accepts
    [B, 5] as well.

    Raises:
        FileFormatError: a file that is missing, corrupt, or of an unknown kind.
        UnsupportedLayerError: an operation without a sound rule, named with its position.
        InvalidNetworkError: a weight is NaN or infinite.
    """
    if isinstance(source, nn.Module):
        network = chain(source)
        if dtype is None:
            return network
        if any(isinstance(layer, Quantizer) for layer in network):  # int8 modules have no other dtype
            return copy.deepcopy(network).to(dtype)
        return chain(copy.deepcopy(source).to(dtype))
    path = Path(source)
    if not path.is_file():
        raise FileFormatError(f"no such file: {path}")
    kind = path.suffix.lower()
    if kind == ".onnx":
        from torchreach.networks.onnx_reader import read_onnx

        network = read_onnx(path)
    elif kind == ".pt2":
        network = _read_exported(path)
    elif kind in (".pth", ".pt"):
        raise FileFormatError(
            f"{path}: a state dict has no structure; read an eager-mode int8 one with "
            "torchreach.load_int8(path, float_network)"
        )
    else:
        raise FileFormatError(
            f"{path}: a network file must end in .onnx or .pt2 (torch.export.save), got {path.suffix or 'no ending'!r}"
        )
    return network if dtype is None else network.to(dtype)


def _read_exported(path: Path) -> nn.Sequential:
    module, shape = read_program(path)
    check_finite(module)
    builder = ChainBuilder(shape)
    add_graph_module(builder, module, "")
    return builder.finish()


def read_program(path: Path) -> tuple[fx.GraphModule, Shape | None]:
    """The module in a `.pt2` file, and the shape of one input where it has one input.

    Raises: FileFormatError.
    """
    if path.suffix.lower() != ".pt2" or not path.is_file():
        raise FileFormatError(f"a .pt2 file (torch.export.save) is required, got {path}")
    try:
        program = _load_program(path)
        module = exported_module(program)
        inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
        shape = inputs[0].meta["val"].shape if len(inputs) == 1 else None
    except Exception as error:  # zip, json and schema errors, all of them signs of a damaged file
        raise FileFormatError(f"{path} is not a readable .pt2 program: {first_line(error)}") from None
    return module, None if shape is None else tuple(int(n) for n in shape[1:])


def input_shape(path: Path) -> Shape | None:
    """Shape of one input, no batch axis, as an .onnx or .pt2 file says it; None where it does not.

    Raises: as `load`.
    """
    if path.suffix.lower() == ".pt2":
        return read_program(path)[1]
    from torchreach.networks.onnx_reader import read_input_shape

    return read_input_shape(path)


def _load_program(path: Path) -> torch.export.ExportedProgram:
    with contextlib.suppress(ImportError):  # registers the operations of quantised graphs
        importlib.import_module("torch.ao.quantization.fx._decomposed")
    try:
        return torch.export.load(path)
    except Exception:
        if importlib.util.find_spec("torchao") is None or "torchao" in sys.modules:
            raise
        importlib.import_module("torchao")  # the same for torchao's own, which take seconds to import
        return torch.export.load(path)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
