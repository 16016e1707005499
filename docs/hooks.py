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

import griffe
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
    "SECURITY.md": "security.md",
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

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)  # every second one is code
    parts[::2] = [re.sub(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", moved, part) for part in parts[::2]]
    return "".join(parts)


class Paragraphs(griffe.Extension):
    """ "Raises: this; that" in one line is a sentence, and "lower, upper: what both are" one entry of a section."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r"(?m)^([A-Z]\w+): (?=\S)", r"**\1**: ", obj.docstring.value)
            obj.docstring.value = re.sub(r"(?m)^    \w+(, \w+)+: ", lambda names: names[0].replace(", ", ",\xa0"), text)


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs; raises CellExecutionError where a cell does. It runs in the root folder."""
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
                parts.append(f"![Picture that the cell above draws]({file})")
            elif text := output.get("text") or data.get("text/plain"):
                parts.append(f"```text\n{text.rstrip()}\n```")
    download = f"[This page as a notebook]({name}.ipynb){{: download }}"
    return "\n\n".join([*parts, download]), pictures


def formula(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="formula">{convert(source, display="block")}</div>'


WIDTH, HEIGHT, LANE, ACROSS, DOWN = 190, 50, 16, 14, 26  # of a box and of a passing line, and between them


def graph(source: str, *_: Any, **__: Any) -> str:
    """Boxes in rows, each above all that its arrows lead to; long arrows pass between boxes, in lanes of their own."""
    arrows = [(a, b) for a, _, b in re.findall(r"^\s*(\w+)(\[.*?\])? --> (\w+)", source, re.MULTILINE)]
    texts = dict(re.findall(r"(\w+)\[(.*?)\]", source))
    names = list(dict.fromkeys(sum(arrows, ())))
    height = dict.fromkeys(names, 0)
    for _ in names:
        height |= {a: max([height[a], *(height[b] + 1 for c, b in arrows if c == a)]) for a in names}
    # an arrow as the places that it passes: its two ends, and one lane in every row between
    paths = [[a, *(f"{a} {b} {level}" for level in range(height[a] - 1, height[b], -1)), b] for a, b in arrows]
    rows: list[list[str]] = [[] for _ in range(max(height.values()) + 1)]
    for name in names:
        rows[-1 - height[name]].append(name)
    for path in paths:
        for lane in path[1:-1]:
            rows[-1 - int(lane.split()[-1])].append(lane)
    middle: dict[str, tuple[float, float]] = {}
    for row, places in enumerate(rows):
        above = {place: [middle[p[p.index(place) - 1]][0] for p in paths if place in p[1:]] for place in places}
        places.sort(key=lambda place: sum(above[place]) / max(len(above[place]), 1))
        widths = [WIDTH if place in texts or place in names else LANE for place in places]
        left = -(sum(widths) + ACROSS * (len(widths) - 1)) / 2
        for place, width in zip(places, widths, strict=True):
            middle[place] = (left + width / 2, row * (HEIGHT + DOWN) + HEIGHT / 2 + 2)
            left += width + ACROSS
    edge = min(x for x, _ in middle.values()) - WIDTH / 2 - 2
    size = (-2 * edge, len(rows) * (HEIGHT + DOWN) - DOWN + 4)
    drawn = [
        f'<svg class="graph" style="max-width: {size[0]}px" viewBox="{edge} 0 {size[0]} {size[1]}" role="img">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker></defs>',
    ]
    for path in paths:
        curve = ""
        for a, b in zip(path, path[1:], strict=False):
            (x, y), (x2, y2) = middle[a], middle[b]
            y, y2 = y + HEIGHT / 2, y2 - HEIGHT / 2
            curve += f"{'L' if curve else 'M'}{x} {y}C{x} {y + DOWN / 2} {x2} {y2 - DOWN / 2} {x2} {y2}"
        drawn.append(f'<path d="{curve}" marker-end="url(#tip)"/>')
    for name in names:
        x, y = middle[name]
        words = texts.get(name, name).partition(": ")[2].split()
        cut = next((i for i in range(len(words), 0, -1) if len(" ".join(words[:i])) <= 32), 0)
        drawn.append(f'<rect x="{x - WIDTH / 2}" y="{y - HEIGHT / 2}" width="{WIDTH}" height="{HEIGHT}" rx="4"/>')
        drawn.append(f'<text x="{x}" y="{y - 9}" class="name">{html.escape(name)}</text>')
        for i, line in enumerate((" ".join(words[:cut]), " ".join(words[cut:]))):
            drawn.append(f'<text x="{x}" y="{y + 6 + 13 * i}">{html.escape(line)}</text>')
    return "".join(['<div class="wide">', *drawn, "</svg></div>"])
