"""Networks from ONNX and TFLite files, `torch.export` programs (.pt2) and modules, as flat chains.

Quantised files whose runtime is known to the bit are read as `graph.deployed.DeployedNetwork` instead, which executes
their integers as that runtime does.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import pickle
import sys
from pathlib import Path

import torch
from torch import fx, nn

from torchreach.core.errors import FileFormatError
from torchreach.core.extras import need
from torchreach.read.builder import ChainBuilder, Shape, check_finite
from torchreach.read.module import add_graph_module, chain, check_module, exported_module
from torchreach.read.pt2_file import checked_archive, tensors_alone


def load(
    source: str | Path | nn.Module | torch.export.ExportedProgram,
    *,
    dtype: torch.dtype | None = None,
    input_shape: Shape | None = None,
) -> nn.Module:
    """Network as a flat `nn.Sequential` of supported layers, in evaluation mode semantics (see `chain`).

    A quantised `.tflite` file gives a module that computes what LiteRT's reference kernels compute, bit for bit, on
    real inputs and outputs (its `codes` maps integer codes). Inputs and outputs keep the file's own order of axes.

    Args:
        source: path of an `.onnx` or `.tflite` file, of a `.pt2` file written by `torch.export.save`, an exported
            program, or a module (whose parameters the result shares, unless `dtype` asks for a converted copy).
        dtype: floating dtype of the result; None keeps the one in the file.
        input_shape: of a module: shape of one input, no batch axis, where a layer's meaning depends on it. Files and
            programs have their own.

    An ONNX network whose input has several axes, such as [1, 1, 1, 5] or [1, 3, 32, 32], accepts flat inputs
    [B, 5] or [B, 3072] as well.

    Raises:
        FileFormatError: a file that is missing, corrupt, or of an unknown kind.
        UnsupportedLayerError: an operation without a sound rule, named with its position.
        InvalidNetworkError: a weight is NaN or infinite.
    """
    if not isinstance(source, str | Path):
        if input_shape is None and isinstance(source, torch.export.ExportedProgram):
            input_shape = _input_shape(source)
        network = chain(as_network(source), input_shape)
        return network if dtype is None else copy.deepcopy(network).to(dtype)
    path = Path(source)
    if not path.is_file():
        raise FileFormatError(f"no such file: {path}")
    kind = path.suffix.lower()
    if kind == ".onnx":
        need("onnx", f"{path}: reading .onnx files")
        from torchreach.read.onnx import read_onnx

        network = read_onnx(path)
    elif kind == ".tflite":
        from torchreach.read.tflite import read_tflite

        network = read_tflite(path)
    elif kind == ".pt2":
        network = _read_exported(path)
    elif kind in (".pth", ".pt"):
        raise FileFormatError(
            f"{path}: a state dict has no structure; read an eager-mode int8 one with "
            "torchreach.load_int8(path, float_network)"
        )
    else:
        raise FileFormatError(
            f"{path}: a network file must end in .onnx, .tflite or .pt2 (torch.export.save), got "
            f"{path.suffix or 'no ending'!r}"
        )
    return network if dtype is None else network.to(dtype)


def as_network(source: nn.Module | str | Path | torch.export.ExportedProgram) -> nn.Module:
    """What analyses take for a network: a module as it is, an exported program or a file of `load` as a module.

    Raises: OptionError for anything else; as `load`.
    """
    if isinstance(source, str | Path):
        return read_program(Path(source))[0] if Path(source).suffix.lower() == ".pt2" else load(source)
    if isinstance(source, torch.export.ExportedProgram):
        return exported_module(source)
    check_module(source)
    return source


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
        shape = _input_shape(program)
    except FileFormatError:
        raise
    except pickle.UnpicklingError:  # torch's own message says how to read it all the same
        raise FileFormatError(f"{path} holds pickles of more than tensors, which could run code; not opened") from None
    except Exception as error:  # zip, json and schema errors, all of them signs of a damaged file
        raise FileFormatError(f"{path} is not a readable .pt2 program: {first_line(error)}") from None
    return module, shape


def _input_shape(program: torch.export.ExportedProgram) -> Shape | None:
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    return tuple(int(n) for n in inputs[0].meta["val"].shape[1:]) if len(inputs) == 1 else None


def input_shape(path: Path) -> Shape | None:
    """Shape of one input, no batch axis, as an .onnx, .tflite or .pt2 file says it; None where it does not.

    Raises: as `load`.
    """
    if path.suffix.lower() == ".pt2":
        return read_program(path)[1]
    if path.suffix.lower() == ".tflite":
        from torchreach.read import tflite

        return tflite.read_input_shape(path)
    need("onnx", f"{path}: reading .onnx files")
    from torchreach.read.onnx import read_input_shape

    return read_input_shape(path)


def _load_program(path: Path) -> torch.export.ExportedProgram:
    with contextlib.suppress(ImportError):  # registers the operations of quantised graphs
        importlib.import_module("torch.ao.quantization.fx._decomposed")
    archive = checked_archive(path)
    with tensors_alone():
        try:
            return torch.export.load(archive)
        except Exception:
            if importlib.util.find_spec("torchao") is None or "torchao" in sys.modules:
                raise
            importlib.import_module("torchao")  # the same for torchao's own, which take seconds to import
            archive.seek(0)
            return torch.export.load(archive)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
