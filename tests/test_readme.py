"""The README's example runs as printed and shows what it says."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import torchreach as tr

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


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
    root = Path(__file__).resolve().parents[1]
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (root / target).exists(), target
