"""Files are untrusted input: what would run code is refused before it does."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import torchreach as tr
from torchreach.app.cli import main
from torchreach.core.errors import FileFormatError, TorchreachError


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


NETWORK = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


def exported(path: Path) -> Path:
    torch.export.save(torch.export.export(NETWORK, (torch.zeros(1, 2),)), path)
    return path


def changed(source: Path, target: Path, edits: dict[str, bytes]) -> Path:
    """A copy of an archive in which entries whose names end so hold something else."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = next((data for ending, data in edits.items() if name.endswith(ending)), old.read(name))
            new.writestr(name, content)
    return target


def test_a_pickled_state_dict_is_refused(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"weight": Evil(mark)}, tmp_path / "n.pth")
    with pytest.raises(FileFormatError):
        tr.load_int8(tmp_path / "n.pth", NETWORK)
    assert not mark.exists()


def test_a_pickled_result_and_pickled_arrays_are_refused(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"format": "torchreach result", "x": Evil(mark)}, tmp_path / "r.pt")
    with pytest.raises(FileFormatError):
        tr.load_result(tmp_path / "r.pt")
    np.save(tmp_path / "x.npy", np.array([Evil(mark)], dtype=object), allow_pickle=True)
    path = str(exported(tmp_path / "n.pt2"))
    run = CliRunner().invoke(main, ["compare", path, path, "--box", str(tmp_path / "x.npy")])
    assert run.exit_code == 2
    assert not mark.exists()


def test_a_program_whose_example_inputs_are_pickled_code_is_refused(tmp_path):
    mark = tmp_path / "ran"
    torch.save(((Evil(mark),), {}), tmp_path / "inputs.pt")
    bad = changed(exported(tmp_path / "n.pt2"), tmp_path / "bad.pt2", {".pt": (tmp_path / "inputs.pt").read_bytes()})
    with pytest.raises(FileFormatError, match="read by unpickling, which can run code"):
        tr.load(bad)
    assert not mark.exists()


def test_a_program_whose_weights_are_pickled_code_is_refused(tmp_path):
    source, mark = exported(tmp_path / "n.pt2"), tmp_path / "ran"
    with zipfile.ZipFile(source) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("weights_config.json")]
        config = json.loads(archive.read(name))
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    edits = {"weights_config.json": json.dumps(config).encode(), first["path_name"]: pickle.dumps(Evil(mark))}
    with pytest.raises(FileFormatError, match="read by unpickling, which can run code"):
        tr.load(changed(source, tmp_path / "bad.pt2", edits))
    assert not mark.exists()


def test_programs_that_hold_tensors_alone_are_read(tmp_path):
    x = torch.rand(5, 2)
    assert torch.equal(tr.load(exported(tmp_path / "n.pt2"))(x), NETWORK(x))


def test_external_data_of_an_onnx_file_stays_in_its_folder(tmp_path):
    """A file may name weights beside it, and none elsewhere."""
    import onnx
    from onnx import TensorProto, helper

    (tmp_path / "secret").write_bytes(np.ones(6, np.float32).tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 2], np.ones(6, np.float32).tobytes(), raw=True)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../secret"), ("length", "24")):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 3])],
        [weight],
    )
    (folder / "n.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    assert onnx is not None
    with pytest.raises(TorchreachError):
        tr.load(folder / "n.onnx")
