"""Files of strangers: nothing in one is run when it is read. Each attack leaves a file behind where it succeeds."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import torchreach as tr
from torchreach.app.cli import main
from torchreach.core.errors import FileFormatError
from torchreach.read.save import save

NETWORK = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


class Harmful:
    """Unpickled, it leaves a file at `mark`."""

    def __init__(self, mark):
        self.code = f"open({str(mark)!r}, 'w').close()"

    def __reduce__(self):
        return exec, (self.code,)


@pytest.fixture
def mark(tmp_path):
    """What an attack leaves behind."""
    return tmp_path / "mark"


@pytest.fixture
def written(tmp_path):
    """A .pt2 file of `NETWORK`, its parts changed by a function."""

    def write(change):
        path, changed = tmp_path / "n.pt2", tmp_path / "changed.pt2"
        batch = torch.export.Dim("batch")
        program = torch.export.export(NETWORK.eval(), (torch.zeros(2, 2),), dynamic_shapes=({0: batch},))
        torch.export.save(program, path)
        with zipfile.ZipFile(path) as archive:
            parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        change(parts)
        with zipfile.ZipFile(changed, "w") as archive:
            for name, content in parts.items():
                archive.writestr(f"n/{name}", content)
        return changed

    return write


def program(parts, change):
    content = json.loads(parts["models/model.json"])
    change(content)
    parts["models/model.json"] = json.dumps(content).encode()


def pickled(value, protocol=2):
    return pickle.dumps(value, protocol)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_an_honest_file_is_read(written):
    x = torch.rand(4, 2)
    torch.testing.assert_close(tr.load(written(dict))(x), NETWORK(x))


@pytest.mark.parametrize("protocol", [0, 2, "zip"])
@pytest.mark.parametrize("part", ["weight", "sample inputs", "constants"])
def test_pickles_in_a_program_are_not_run(written, mark, part, protocol):
    content = saved(Harmful(mark)) if protocol == "zip" else pickled(Harmful(mark), protocol)

    def change(parts):
        if part == "weight" and "data/weights/model.pt" in parts:  # the layout of torch 2.8
            parts["data/weights/model.pt"] = content
        elif part == "weight":
            config = json.loads(parts["data/weights/model_weights_config.json"])
            entry = config["config"]["0.bias"]
            entry["use_pickle"] = True
            parts[f"data/weights/{entry['path_name']}"] = content
            parts["data/weights/model_weights_config.json"] = json.dumps(config).encode()
        elif part == "constants":
            parts["data/constants/model.pt"] = content  # an older layout, which torch still reads
        else:
            parts["data/sample_inputs/model.pt"] = content

    with pytest.raises(FileFormatError, match=r"changed.pt2 holds pickles of more than tensors, which could run code"):
        tr.load(written(change))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("data/aotinductor/model/x.so", "compiled code"),
        ("data/constants/custom_obj_0", "an object of a class"),
        ("data/constants/CUSTOM_OBJ_0", "an object of a class"),
        ("data/constants/opaque_obj_0", "a pickled object"),
    ],
)
def test_code_in_a_program_is_refused_by_name(written, mark, name, what):
    path = written(lambda parts: parts.update({name: pickled(Harmful(mark))}))
    with pytest.raises(FileFormatError, match=rf"n/{name} is {what}, which could run anything; not opened"):
        tr.load(path)
    assert not mark.exists()


def harm(mark):
    return f"open({str(mark)!r}, 'w').close()"


def first_size(content, text):
    content["graph_module"]["graph"]["tensor_values"]["input"]["sizes"][0]["as_expr"]["expr_str"] = text


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "2*{}",
        "Max({}, 2)",
        "[{}]",
        "(lambda: {})()",
        "Symbol('s0').__class__",
        'S("{}")',
        'Symbol("{}")',
        "getattr(s0, 'x')",
        "(1 #\n)",
    ],
)
def test_sizes_that_are_more_than_arithmetic_are_refused(written, mark, text):
    text = text.replace("{}", harm(mark))
    path = written(lambda parts: program(parts, lambda content: first_size(content, text)))
    with pytest.raises(FileFormatError, match=r"changed.pt2: expr_str is .*, which could run code; not opened"):
        tr.load(path)
    assert not mark.exists()


@pytest.mark.parametrize("text", ["Symbol('s31', integer=True, positive=True)", "Max(2, Symbol('s31'))"])
def test_sizes_of_a_symbol_are_read(written, text):
    tr.load(written(lambda parts: program(parts, lambda content: first_size(content, text))))


def renamed(content, name):
    text = json.dumps(content).replace('"name": "input"', f'"name": {json.dumps(name)}')
    content.update(json.loads(text))
    values = content["graph_module"]["graph"]["tensor_values"]
    values[name] = values.pop("input")


def called(content, target):
    content["graph_module"]["graph"]["nodes"][1]["target"] = target


def test_names_that_are_source_are_refused(written, mark):
    path = written(lambda parts: program(parts, lambda content: renamed(content, f"input={harm(mark)}")))
    with pytest.raises(FileFormatError, match="name is .*, which could run code; not opened"):
        tr.load(path)
    assert not mark.exists()


@pytest.mark.parametrize("target", ["torch.os.system", "torch.ops.load_library.x", "#x:y", "os.x"])
def test_calls_of_what_is_no_operator_are_refused(written, target):
    path = written(lambda parts: program(parts, lambda content: called(content, target)))
    with pytest.raises(FileFormatError, match="target is .*, which could run code; not opened"):
        tr.load(path)


def test_guards_are_not_run(written, mark):
    def change(content):
        if "guards_code" in content:  # torch 2.8 has none
            content["guards_code"] = [f"{harm(mark)} is None"]

    path = written(lambda parts: program(parts, change))
    stars = tr.StarBatch.from_box(torch.zeros(2), torch.ones(2))
    assert float(tr.discrepancy(path, NETWORK, stars).upper) < 1e-6
    assert not mark.exists()


def test_archives_that_two_readers_may_see_differently_are_refused(written, tmp_path):
    path = written(dict)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("n/models/model.json", b"{}")
    with pytest.raises(FileFormatError, match="two parts of one name"):
        tr.load(path)
    small = tmp_path / "small.pt2"
    with zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("n/data/weights/weight_0", bytes(10**6))
    with pytest.raises(FileFormatError, match="its parts are larger than the file"):
        tr.load(small)


def test_the_environment_is_as_before(written, monkeypatch):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before = dict(os.environ)
    tr.load(written(dict))
    assert dict(os.environ) == before


def test_state_dicts_and_results_are_not_unpickled(mark, tmp_path):
    for name, content in (("a.pth", pickled(Harmful(mark))), ("b.pth", saved({"x": Harmful(mark)}))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileFormatError):
            tr.load_int8(tmp_path / name, NETWORK)
        with pytest.raises(FileFormatError):
            tr.load_result(tmp_path / name)
    assert not mark.exists()


def test_arrays_are_not_unpickled(mark, tmp_path):
    save(NETWORK, tmp_path / "n.onnx", (2,))
    np.save(tmp_path / "x.npy", np.array([Harmful(mark)] * 2), allow_pickle=True)
    path = str(tmp_path / "n.onnx")
    run = CliRunner().invoke(main, ["compare", path, path, "--center", str(tmp_path / "x.npy"), "--eps", "0.1"])
    assert run.exit_code == 2
    assert "x.npy is not a readable array of numbers: Object arrays cannot be loaded" in run.stderr
    assert not mark.exists()


@pytest.mark.parametrize("place", ["../weights.bin", "{}/weights.bin", "link.bin"])
def test_numbers_beside_an_onnx_file_are_read_from_its_folder_alone(tmp_path, place):
    import onnx

    inside = tmp_path / "inside"
    inside.mkdir()
    save(NETWORK, inside / "n.onnx", (2,))
    model = onnx.load(inside / "n.onnx")
    onnx.save(model, inside / "n.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    x = torch.rand(3, 2)
    torch.testing.assert_close(tr.load(inside / "n.onnx")(x), NETWORK(x))
    (inside / "weights.bin").rename(tmp_path / "weights.bin")
    (inside / "link.bin").symlink_to(tmp_path / "weights.bin")
    model = onnx.load(inside / "n.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = place.format(tmp_path)
    (inside / "n.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(FileFormatError, match="n.onnx is not a readable ONNX file"):
        tr.load(inside / "n.onnx")


@pytest.mark.parametrize("which", ["in_spec", "out_spec"])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_structure_that_names_a_module_is_refused(which, hidden, tmp_path, monkeypatch):
    """torch would import the module; also where the key that says so is written with an escape."""
    (tmp_path / "planted_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.export.save(torch.export.export(nn.Linear(2, 1), (torch.zeros(1, 2),)), tmp_path / "n.pt2")
    context = {"default_factory_module": "planted_module", "default_factory_name": "x", "dict_context": []}
    node = {"type": "collections.defaultdict", "context": context, "children_spec": []}
    text = json.dumps([1, node])
    if hidden:
        key = '[{"\\u005f_enum__": true, "fqn": "planted_module:X", "name": "A"}]'
        text = json.dumps([1, {"type": "builtins.dict", "context": key, "children_spec": []}])
    with zipfile.ZipFile(tmp_path / "n.pt2") as old, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if re.search(r"(models/model|serialized_exported_program)\.json$", name):
                program = json.loads(content)
                for call in program["graph_module"]["module_call_graph"]:
                    if call.get("signature"):
                        call["signature"][which] = text
                content = json.dumps(program).encode()
            new.writestr(name, content)
    with pytest.raises(FileFormatError, match=f"{which} is .* could run code"):
        tr.load(tmp_path / "bad.pt2")
    assert not (tmp_path / "ran").exists()
