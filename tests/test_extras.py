"""What is missing is named with its extra, before any work; and the extras are those of pyproject.toml."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import torchreach as tr
from torchreach.app.cli import main
from torchreach.core.extras import EXTRAS, MissingPackageError, need
from torchreach.read.save import save

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NETWORK = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


@pytest.fixture
def without(monkeypatch):
    """Makes packages impossible to import."""

    def hide(*names: str) -> None:
        for name in names:
            for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
                monkeypatch.delitem(sys.modules, module)
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[>=<~! ;]", text, maxsplit=1)[0].lower() for text in requirements}


def test_every_package_that_is_named_is_in_its_extra():
    extras = PROJECT["optional-dependencies"]
    for extra, package in EXTRAS.values():
        assert package in names(extras[extra])
    inside = re.findall(r"\[([^\]]*)\]", " ".join(extras["all"]))[0].split(",")
    assert {"onnx", "tflite", "vision", "report", "ray", "lirpa"} == set(inside)
    assert not names(PROJECT["dependencies"]) & {package for _, package in EXTRAS.values()}


@pytest.mark.parametrize("module", EXTRAS)
def test_a_missing_package_is_named_with_its_extra(module, without):
    without(module)
    extra, package = EXTRAS[module]
    with pytest.raises(MissingPackageError, match=rf"this needs the package {package}, .*torchreach\[{extra}\]"):
        need(f"{module}.part", "this")


def test_files_need_their_readers(without, tmp_path):
    save(NETWORK, tmp_path / "n.onnx", (2,))
    (tmp_path / "n.tflite").write_bytes(b"")
    without("onnx", "ai_edge_litert")
    with pytest.raises(MissingPackageError, match=r"n.onnx: reading .onnx files .*torchreach\[onnx\]"):
        tr.load(tmp_path / "n.onnx")
    with pytest.raises(MissingPackageError, match=r"writing .onnx files .*torchreach\[onnx\]"):
        save(NETWORK, tmp_path / "m.onnx", (2,))
    with pytest.raises(MissingPackageError, match=r"n.tflite: reading .tflite files .*torchreach\[tflite\]"):
        tr.load(tmp_path / "n.tflite")


def test_commands_say_what_is_missing_before_the_work(without, tmp_path):
    save(NETWORK, tmp_path / "n.pt2", (2,))
    without("matplotlib", "sklearn", "torchvision", "onnx")
    path = str(tmp_path / "n.pt2")
    run = CliRunner().invoke(main, ["compare", path, path, "--box", "0,1; 0,1", "--output", str(tmp_path / "o")])
    assert run.exit_code == 2
    assert "torchreach[report]" in run.stderr
    run = CliRunner().invoke(main, ["compare", path, path, "--box", "0,1; 0,1"])
    assert run.exit_code == 0, run.output


def test_the_demo_names_the_extra_of_its_pictures(without, tmp_path):
    without("sklearn")
    run = CliRunner().invoke(main, ["demo", "--output", str(tmp_path / "o")])
    assert run.exit_code == 2
    assert "the demo needs the package scikit-learn" in run.stderr.replace("\n", " ")


def test_reach_and_discrepancy_need_no_extra(without):
    without(*EXTRAS)
    stars = tr.StarBatch.from_box(torch.zeros(2), torch.ones(2))
    assert len(tr.reach(NETWORK, stars))
    assert tr.discrepancy(NETWORK, tr.prune_weights(NETWORK, 0.3), stars).status[0] is tr.Status.EXACT
