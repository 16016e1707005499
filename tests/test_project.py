"""The shape of the project: imports point one way, `import torchreach` is light, files stay short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchreach

PACKAGE = Path(__file__).resolve().parents[1] / "torchreach"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in FILES}

# What each room may import, itself aside: core <- graph <- {read, compress, domains}; core <- lp <- sets <- domains <-
# engines <- work <- verbs; {domains, lp} <- search <- verbs <- training <- app. A star's affine map takes any layer
# that a reader knows, so `sets` imports `read` too. `reference` shares with what it checks words, errors and, for
# networks that are no chains of fully connected layers, their reader.
BELOW_VERBS = {"core", "graph", "read", "compress", "lp", "sets", "domains", "engines", "work", "search"}
MAY_IMPORT = {
    "core": set(),
    "graph": {"core"},
    "read": {"core", "graph"},
    "compress": {"core", "graph"},
    "lp": {"core"},
    "sets": {"core", "graph", "lp", "read"},
    "domains": {"core", "graph", "lp", "sets"},
    "engines": {"core", "graph", "lp", "sets", "domains"},
    "work": {"core", "graph", "lp", "sets", "domains", "engines"},
    "search": {"core", "graph", "lp", "domains"},
    "check": set(),
    "verbs": BELOW_VERBS | {"check", "top"},  # the version
    "training": BELOW_VERBS | {"verbs"},
    "reference": {"core", "graph", "read"},
    "app": BELOW_VERBS | {"check", "verbs", "training", "reference", "top"},
    "top": {"app"},
}
HEAVY = (
    *("cvxpy", "cvxpylayers", "highspy", "auto_LiRPA", "torchao", "onnx", "matplotlib", "sklearn", "torchvision"),
    *("typer", "rich", "torch", "numpy"),
)
MAX_LINES = 450


def room(module: str) -> str:
    """Room of a module named by its path below the package, such as "lp/problem"; "top" of what lies in none."""
    top, _, rest = module.partition("/")
    return top if rest else "top"


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that can run: all but what stands below `if TYPE_CHECKING`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for node in child.orelse:
                yield from executed(node)
        else:
            yield from executed(child)


def imported(source: str, *, types: bool = False) -> set[str]:
    """Modules of this package that a source imports, in functions too; types: also those for types alone."""
    found = set()
    tree = ast.parse(source)
    for node in ast.walk(tree) if types else executed(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only, so that this test can read them"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "torchreach":
                found.add(module_of(parts[1:]))
    return found


def module_of(parts: list[str]) -> str:
    """Longest prefix of dotted parts that is a module; "__init__" for the package itself."""
    while parts:
        path = "/".join(parts)
        for candidate in (path, f"{path}/__init__"):
            if candidate in MODULES:
                return candidate
        parts = parts[:-1]
    return "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path):
    module = path.relative_to(PACKAGE).with_suffix("").as_posix()
    here = room(module)
    wrong = {
        f"{module} imports {name}"
        for name in imported(path.read_text(encoding="utf-8"))
        if room(name) not in MAY_IMPORT[here] | {here}
    }
    assert not wrong


def test_every_room_is_named_and_nothing_else_lies_at_the_top():
    assert {room(module) for module in MODULES} == set(MAY_IMPORT)
    assert {module for module in MODULES if room(module) == "top"} == {"__init__", "__main__"}


def circles(edges: dict[str, set[str]]) -> list[str]:
    """One circle, as the names along it and the first again, or none."""
    done: set[str] = set()
    for start in edges:
        path, open_edges = [start], [iter(sorted(edges[start]))]
        while path:
            step = next((name for name in open_edges[-1] if name in edges and name not in done), None)
            if step is None:
                done.add(path.pop())
                open_edges.pop()
            elif step in path:
                return [*path[path.index(step) :], step]
            else:
                path.append(step)
                open_edges.append(iter(sorted(edges[step])))
    return []


def test_no_module_imports_itself_through_others():
    edges = {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): imported(path.read_text(encoding="utf-8"), types=True)
        for path in FILES
        if path.name != "__init__.py"
    }
    assert not circles(edges)
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": {"d", "b"}, "d": set()}) == ["b", "c", "b"]
    assert not circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()})


def test_the_import_reader_sees_every_kind_of_import():
    source = """
from typing import TYPE_CHECKING
import torchreach.lp.problem
from torchreach.core import errors
from torchreach import Exact
def late():
    from torchreach.graph.layers import linear
if TYPE_CHECKING:
    from torchreach.core.results import Discrepancy
else:
    from torchreach.core.options import Budget
"""
    assert imported(source) == {"lp/problem", "core/errors", "__init__", "graph/layers", "core/options"}
    assert room("lp/problem") == "lp"
    assert room("app/report/page") == "app"
    assert room("__main__") == "top"


def test_import_is_light():
    """Optional and heavy libraries are imported where they are used, not by `import torchreach`."""
    code = f"import sys, torchreach; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []


def test_exports_are_what_type_checkers_see():
    """The imports below `if TYPE_CHECKING`, the table of places and `__all__` name the same things."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == torchreach._PLACES
    assert sorted(seen) == torchreach.__all__
    assert all(getattr(torchreach, name).__name__ == name for name in torchreach.__all__)
    assert set(torchreach.__all__) <= set(dir(torchreach))
    with pytest.raises(AttributeError, match="module 'torchreach' has no attribute 'discrepency'"):
        _ = torchreach.discrepency


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_stay_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines; one algorithm per file, at most {MAX_LINES} lines"


def test_unit_roundoffs_lie_in_one_file():
    """Elsewhere an allowance for rounding is a call of `torchreach.core.roundoff`; the checker has its own."""
    unit = re.compile(r"UNIT_ROUNDOFF|finfo\([^)]*\)\.eps|2(?:\.0)?\*\*-(?:24|53)\b")
    found = {path for path in FILES if unit.search(path.read_text(encoding="utf-8"))}
    assert found == {PACKAGE / "core" / "roundoff.py", PACKAGE / "check" / "forms.py"}


ROOT = PACKAGE.parent
PROSE = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("benchmarks/*.md"))]
ROOMS = "|".join(sorted(set(MAY_IMPORT) - {"top"}))


def names_of(module: str) -> set[str]:
    """What a module defines or imports at its top, and what its classes do."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name) | ast.alias(name=name):
                found.add(name)
    return found


def unknown(text: str, files: tuple[Path, ...], links: bool = False) -> set[str]:
    """Names of modules and paths in backticks, and `links`, that lead nowhere; paths start in one of `files`."""
    missing = set()
    for name in re.findall(rf"`(?:torchreach\.)?((?:{ROOMS})(?:\.(?!py`)\w+)+)`", text):
        module = module_of(name.split("."))
        rest = name.split(".")[len(module.split("/")) :]
        if module.endswith("__init__") or not set(rest) <= names_of(module):
            missing.add(name)
    paths = re.findall(r"`([\w./-]+\.(?:py|md)|[\w.-]+/[\w./-]+\.(?:json|toml|png))`", text)
    if links:
        paths += re.findall(r"\]\((?!https?:)([\w./-]+)", text)
    for path in paths:
        if not any((start / path).exists() for start in files):
            missing.add(path)
    return missing


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_name_what_there_is(path):
    assert not unknown(path.read_text(encoding="utf-8"), (path.parent, ROOT, PACKAGE), links=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_docstrings_and_comments_name_what_there_is(path):
    assert not unknown(path.read_text(encoding="utf-8"), (ROOT, PACKAGE))


def test_names_that_lead_nowhere_are_seen():
    text = "`graph.steps.Step`, `torchreach.graph.stairs`, `graph.steps.Stair`, `graph/steps.py`, `graph/stairs.py`"
    assert unknown(text, (PACKAGE,)) == {"graph.stairs", "graph.steps.Stair", "graph/stairs.py"}


def test_the_version_is_one():
    version = torchreach.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{version}] - 20" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dynamic"]


def test_the_picture_of_the_rooms_shows_the_directions():
    """Every arrow of docs/architecture.md is allowed, and every room that may be imported lies along the arrows."""
    picture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    arrows = re.findall(r"^\s*(\w+)(?:\[.*?\])? --> (\w+)", picture, re.M)
    assert set(sum(arrows, ())) == set(MAY_IMPORT) - {"top"}
    for one, other in arrows:
        assert other in MAY_IMPORT[one]
    for one, others in MAY_IMPORT.items():
        below = {one}
        for _ in MAY_IMPORT:
            below |= {b for a, b in arrows if a in below}
        assert one == "top" or others - {"top"} <= below
