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
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


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


def run_python(blocks: list[str]) -> dict:
    names: dict = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for code in blocks:
            exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_first_python_example_runs() -> None:
    names = run_python(PYTHON[:1])
    found, result = names["found"], names["result"]
    assert found.upper.shape == (5, 3)
    assert found.status == (tr.Status.EXACT,) * 5
    assert result.after.max_upper.max() <= found.max_upper.max()


@pytest.mark.filterwarnings("ignore")
def test_the_int8_example_runs_and_no_sample_leaves_the_interval() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    setting, short = PYTHON[0].split("found = tr.discrepancy")[0], PYTHON[1].replace("seconds=5", "seconds=1")
    names = run_python([setting, short])
    found, stars = names["found_int8"], names["stars"]
    assert found.semantics.value == "deployed int8"
    generator = torch.Generator().manual_seed(0)
    inside = stars.lower + (stars.upper - stars.lower) * torch.rand(100, 5, 8, generator=generator)
    for x in inside:  # 100 batches of one input from each box
        padded = torch.cat([x, torch.zeros(95, 8)])  # the program is fixed to the example's batch
        with torch.no_grad():
            difference = (names["original"](padded).double() - names["int8"](padded).double())[:5]
        assert (difference >= found.range_lower - 1e-6).all()
        assert (difference <= found.range_upper + 1e-6).all()


def test_pictures_and_files_named_in_the_readme_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
