"""The README's example runs as printed and shows what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import torchreach as tr
from benchmarks import hello_world
from torchreach.app.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def without_seconds(line: str) -> str:
    return re.sub(r"[\d.]+ s\)", "s)", line)


@pytest.mark.usefixtures("no_log")
def test_the_first_command_prints_what_is_printed_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ai_edge_litert", reason="reading .tflite files needs ai-edge-litert")
    ((command, printed),) = re.findall(
        r"^uv run torchreach (.+)\n```\n\n```text\n(.+)\n```", README, flags=re.MULTILINE
    )
    monkeypatch.chdir(ROOT)
    ran = CliRunner().invoke(app, shlex.split(command))
    assert ran.exit_code == 0, ran.output
    assert without_seconds(printed) in map(without_seconds, ran.stdout.splitlines())


def test_the_picture_is_drawn_and_no_output_leaves_its_band(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="reading .tflite files needs ai-edge-litert")
    assert hello_world.main(["--picture", str(tmp_path / "picture.png")]) == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_python_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(code, "README.md", "exec"), names)
    found, result = names["found"], names["result"]
    assert found.upper.shape == (5, 3)
    assert found.status == (tr.Status.EXACT,) * 5
    assert result.after.max_upper.max() <= found.max_upper.max()


def test_pictures_and_files_named_in_the_readme_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
