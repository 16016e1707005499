"""Examples in documents run and print what they say, every public name has one, and the site loads nothing."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import torchreach as tr
from benchmarks import gallery
from tests.checks import DOCS, examples_of, run
from torchreach.app.cli import app

ROOT = DOCS.parent
# Pages whose examples are run in turn, in the names that those before leave; training.md has tests of its own.
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in (*DOCS.glob("*.md"), *DOCS.glob("api/*.md"), *DOCS.glob("howto/*.md"))
    if "```python" in path.read_text(encoding="utf-8") and path.name != "training.md"
)
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def alike(said: str, printed: str) -> bool:
    """Equal texts, but for seconds, and for the last digits of decimal fractions (one in a hundred)."""
    said, printed = (re.sub(r"[\d.]+ s\b", "s", text).strip() for text in (said, printed))
    if NUMBER.sub("#", said) != NUMBER.sub("#", printed):
        return False
    pairs = zip(NUMBER.findall(said), NUMBER.findall(printed), strict=True)
    return all(float(one) == pytest.approx(float(other), rel=0.01, abs=1e-9) for one, other in pairs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES)
def test_examples_of_a_page_print_what_stands_below_them(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    examples = examples_of(page)
    _, printed = run(page, [code for code, _ in examples])
    for (code, says), out in zip(examples, printed, strict=True):
        assert alike(says or "", out), f"{page} prints\n{out}\nafter\n{code}"


def test_a_page_that_lies_is_seen() -> None:
    assert alike("0.1000 certified, 0.1 s\n", "0.1001 certified, 2.5 s\n")
    for other in ("0.1100 certified, 0.1 s", "0.1000 attained, 0.1 s", ""):
        assert not alike("0.1000 certified, 0.1 s", other)


COMMANDS = re.findall(
    r"```bash\nuv run torchreach (.+)\n```\n\n```text\n(.+)\n```", (DOCS / "start.md").read_text(encoding="utf-8")
)


@pytest.mark.usefixtures("no_log")
@pytest.mark.parametrize(("command", "says"), COMMANDS)
def test_commands_say_what_stands_below_them(command: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ai_edge_litert", reason="reading .tflite files needs ai-edge-litert")
    monkeypatch.chdir(ROOT)
    ran = CliRunner().invoke(app, shlex.split(command))
    assert ran.exit_code == (1 if "exceeds" in says else 0)
    assert any(alike(says, line) for line in ran.stdout.splitlines()), ran.stdout


def test_every_public_name_is_on_a_page_with_an_example_that_runs() -> None:
    """The example is on the page, or a doctest of the docstring that the page shows (`tests/test_doctests.py`)."""
    shown: dict[str, str] = {}
    for path in DOCS.glob("api/*.md"):
        page = path.relative_to(DOCS).as_posix()
        code = "\n".join(code for code, _ in examples_of(page))
        for name in re.findall(r"^::: torchreach\.(\w+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert name not in shown, f"{name} is on two pages"
            shown[name] = code
    assert sorted(shown) == sorted(tr.__all__)
    for name, code in shown.items():
        doctests = ">>> " in (getattr(tr, name).__doc__ or "")
        assert doctests or re.search(rf"\btr\.{name}\b", code), f"no example uses tr.{name}"


def test_pages_of_the_gallery_are_small_and_made_by_its_script(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="reading .tflite files needs ai-edge-litert")
    names = [entry.name for entry in gallery.ENTRIES if "--output" in entry.command]
    assert {path.stem for path in (DOCS / "gallery").glob("*.html")} == set(names)
    assert all(path.stat().st_size < 300_000 for path in (DOCS / "gallery").iterdir())
    assert gallery.main(["--output", str(tmp_path), "--only", "tolerance"]) == 0
    section = (tmp_path / "README.md").read_text().partition("## ")[2].strip()
    page = (DOCS / "gallery" / "README.md").read_text()
    assert alike(section, page[page.index(section[:20]) :].partition("\n## ")[0])
    assert (tmp_path / "tolerance.html").stat().st_size > 10_000


def from_elsewhere(text: str) -> list[str]:
    """What a page or a style sheet loads from an address of its own: scripts, styles, fonts, pictures, frames."""
    tags = re.findall(r"<(?:script|img|iframe|source|video|audio|embed|link|use)\b[^>]*", text)
    loaded = [tag for tag in tags if re.search(r"""\b(?:src|href|srcset)=["']?(?:https?:)?//""", tag)]
    return loaded + re.findall(r"url\(\s*[\"']?(?:https?:)?//[^)]*\)|@import[^;]*", text)


def test_what_a_page_loads_from_elsewhere_is_seen() -> None:
    page = '<script src="https://cdn.example/a.js"></script><a href="https://example.org">fine</a><img src="a.png">'
    assert from_elsewhere(page) == ['<script src="https://cdn.example/a.js"']
    assert from_elsewhere("@font-face { src: url(//fonts.example/a.woff) }") == ["url(//fonts.example/a.woff)"]


@pytest.mark.parametrize("path", sorted(DOCS.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


def test_a_notebook_that_fails_stops_the_build(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="the site needs the dependency group docs")
    hooks = runpy.run_path(str(DOCS / "hooks.py"))
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None, "source": "1 / 0"}
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "a.ipynb").write_text(json.dumps(notebook))
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        hooks["executed"](tmp_path / "a.ipynb")


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Strict: links, anchors, notebooks that run. `.ci/run` builds it beforehand and says where it lies."""
    pytest.importorskip("mkdocs", reason="the site needs the dependency group docs")
    site = Path(os.environ.get("TORCHREACH_SITE", tmp_path))
    if site == tmp_path:
        build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
        ran = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert not ran.stdout + ran.stderr
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for path in [*pages, *site.rglob("*.css")]:
        assert not from_elsewhere(path.read_text(encoding="utf-8")), path
    formulas = (site / "algorithms.html").read_text(encoding="utf-8")
    assert formulas.count("<math") == (DOCS / "algorithms.md").read_text(encoding="utf-8").count("```math")
    assert "mermaid" not in (site / "architecture.html").read_text(encoding="utf-8").lower()
    for notebook in (DOCS / "notebooks").glob("*.ipynb"):
        page = (site / "notebooks" / f"{notebook.stem}.html").read_text(encoding="utf-8")
        assert f'src="{notebook.stem}_0.png"' in page
