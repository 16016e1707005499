"""What the site needs beyond Markdown, so that the same documents read well in a repository and as pages.

    documents     those that lie outside of docs/ are pages too; links are those of the repository everywhere
    notebooks     executed while the site is built, and shown with what they print and draw
    ```math       LaTeX to MathML, which browsers draw by themselves
    ```mermaid    a graph of `a[name: text] --> b` lines to SVG

Nothing here, and nothing in a page, loads anything from elsewhere.
"""

from __future__ import annotations

import base64
import html
import posixpath
import re
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]

# Documents of the repository outside of docs/, and where the site has them.
OUTSIDE = {
    "README.md": "tour.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks/scripts.md",
    "LICENSE": "LICENSE.txt",
}
INSIDE = {place: document for document, place in OUTSIDE.items()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    fences = [{"name": "math", "class": "math", "format": formula}, {"name": "mermaid", "class": "", "format": graph}]
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = fences
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for document, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / document)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        page, pictures = shown(executed(path), path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as they lead through the repository, turned into those between pages."""
    here = page.file.src_uri
    document = INSIDE.get(here, f"docs/{here}")

    def moved(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(document), found[1]))
        place = OUTSIDE.get(target) or posixpath.relpath(target, "docs")
        if place.startswith("notebooks/"):
            place = place.replace(".ipynb", ".md")
        return f"]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{found[2] or ''})"

    return re.sub(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", moved, markdown)


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs; raises CellExecutionError where a cell does. It runs in the repository's folder."""
    notebook = nbformat.read(path, as_version=4)
    local = Config({"KernelManager": {"transport": "ipc"}})
    where = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, config=local, timeout=300, coalesce_streams=True, resources=where).execute()
    return notebook


def shown(notebook: nbformat.NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """Markdown of an executed notebook, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                file = f"{name}_{len(pictures)}.png"
                pictures[file] = base64.b64decode(data["image/png"])
                parts.append(f"![]({file})")
            elif text := output.get("text") or data.get("text/plain"):
                parts.append(f"```text\n{text.rstrip()}\n```")
    download = f"[This page as a notebook]({name}.ipynb){{: download }}"
    return "\n\n".join([*parts, download]), pictures


def formula(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="formula">{convert(source, display="block")}</div>'


WIDTH, HEIGHT, ACROSS, DOWN = 176, 54, 14, 46  # of a box, and between two


def graph(source: str, *_: Any, **__: Any) -> str:
    """Boxes in rows, each above all that its arrows lead to."""
    arrows = [(a, b) for a, _, b in re.findall(r"^\s*(\w+)(\[.*?\])? --> (\w+)", source, re.MULTILINE)]
    texts = dict(re.findall(r"(\w+)\[(.*?)\]", source))
    names = list(dict.fromkeys(sum(arrows, ())))
    row = dict.fromkeys(names, 0)
    for _ in names:
        row |= {a: max([row[a], *(row[b] + 1 for c, b in arrows if c == a)]) for a in names}
    rows = [[name for name in names if row[name] == level] for level in range(max(row.values()), -1, -1)]
    columns = max(map(len, rows))
    middle: dict[str, tuple[float, float]] = {}
    for level, members in enumerate(rows):
        above = {name: [middle[a][0] for a, b in arrows if b == name and a in middle] for name in members}
        members.sort(key=lambda name: sum(above[name]) / max(len(above[name]), 1))
        for place, name in enumerate(members):
            x = (place + 0.5 + (columns - len(members)) / 2) * (WIDTH + ACROSS)
            middle[name] = (x, level * (HEIGHT + DOWN) + HEIGHT / 2 + 2)
    width, height = columns * (WIDTH + ACROSS), len(rows) * (HEIGHT + DOWN) - DOWN + 4
    drawn = [
        f'<svg class="graph" viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker></defs>',
    ]
    for a, b in arrows:
        (x, y), (x2, y2) = middle[a], middle[b]
        y, y2 = y + HEIGHT / 2, y2 - HEIGHT / 2
        drawn.append(f'<path d="M{x} {y}C{x} {y + DOWN} {x2} {y2 - DOWN} {x2} {y2}" marker-end="url(#tip)"/>')
    for name, (x, y) in middle.items():
        _, _, what = texts.get(name, name).partition(": ")
        words = what.split()
        cut = next((i for i in range(len(words), 0, -1) if len(" ".join(words[:i])) <= 30), 0)
        lines = [" ".join(words[:cut]), " ".join(words[cut:])]
        drawn.append(f'<rect x="{x - WIDTH / 2}" y="{y - HEIGHT / 2}" width="{WIDTH}" height="{HEIGHT}" rx="4"/>')
        drawn.append(f'<text x="{x}" y="{y - 10}" class="name">{html.escape(name)}</text>')
        drawn += [
            f'<text x="{x}" y="{y + 6 + 13 * i}">{html.escape(line)}</text>' for i, line in enumerate(lines) if line
        ]
    return "".join(['<div class="wide">', *drawn, "</svg></div>"])
