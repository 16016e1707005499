"""The shape of the project: imports point one way, `import torchreach` is light, files stay short."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchreach

PACKAGE = Path(__file__).resolve().parents[1] / "torchreach"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in FILES}

BASE = {"clock", "errors", "files", "masks", "tolerances", "options", "outward", "results", "terms"}
ANALYSES = {
    "discrepancy",
    "discrepancy_loss",
    "repair",
    "checks",
    "target",
    "training",
    "students",
    "deployed",
    "deployed_pair",
    "deployed_star",
    "executed",
    "deployed_student",
    "kernels",
    "first_look",
    "star_search",
    "star_support",
    "storage",
    "portfolio",
    "equivalence",
}
REPORTS = {"arguments", "equivalence_report", "input_sets", "report", "page", "pictures", "provenance", "verdict"}
FOLDERS = {"networks", "lp", "sets", "bounds", "search", "reach"}
# What each group may import, itself aside. Any other top-level file belongs to the command line, which may
# import everything and which nothing else imports.
MAY_IMPORT = {
    "base": set(),
    "networks": {"base"},
    "lp": {"base"},
    "sets": {"base", "lp", "networks"},
    "bounds": {"base", "networks"},
    "search": {"base", "networks", "lp", "bounds"},
    "reach": {"base", "networks", "lp", "sets", "bounds"},
    "analyses": {"base", "networks", "lp", "sets", "bounds", "search", "reach"},
    "exports": {"base", "networks", "lp", "sets", "bounds", "search", "reach", "analyses"},
    "reports": {"base", "sets", "exports"},
    "command line": {"base", "networks", "lp", "sets", "bounds", "search", "reach", "analyses", "exports", "reports"},
}
HEAVY = (
    *("cvxpy", "cvxpylayers", "highspy", "auto_LiRPA", "torchao", "onnx", "matplotlib", "sklearn", "torchvision"),
    *("typer", "rich", "torch", "numpy"),
)
MAX_LINES = 450


def group(module: str) -> str:
    """Group of a module named by its path below the package, such as "lp/problem"."""
    top = module.split("/")[0]
    if top in FOLDERS:
        return top
    for name, members in (("base", BASE), ("analyses", ANALYSES), ("reports", REPORTS)):
        if top in members:
            return name
    return "exports" if top == "__init__" else "command line"


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that can run: all but what stands below `if TYPE_CHECKING`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for node in child.orelse:
                yield from executed(node)
        else:
            yield from executed(child)


def imported(source: str) -> set[str]:
    """Modules of this package that a source imports, at its top or inside functions."""
    found = set()
    for node in executed(ast.parse(source)):
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
    here = group(module)
    wrong = {
        f"{module} ({here}) imports {name} ({group(name)})"
        for name in imported(path.read_text(encoding="utf-8"))
        if group(name) not in MAY_IMPORT[here] | {here}
    }
    assert not wrong


def test_the_import_reader_sees_every_kind_of_import():
    source = """
from typing import TYPE_CHECKING
import torchreach.lp.reference
from torchreach import errors, Exact
def late():
    from torchreach.networks.layers import linear
if TYPE_CHECKING:
    from torchreach.results import Discrepancy
else:
    from torchreach.options import Budget
"""
    assert imported(source) == {"lp/reference", "errors", "__init__", "networks/layers", "options"}
    assert group("lp/reference") == "lp"
    assert group("cli") == "command line"


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


@pytest.mark.parametrize("name", ["discrepancy", "reach", "repair"])
def test_a_function_keeps_its_name_although_a_module_has_it_too(name, monkeypatch):
    """The import system binds a module it has loaded in its package, where the function must stay."""
    assert f"torchreach.{name}" in {f"torchreach.{module.removesuffix('/__init__')}" for module in MODULES}
    function = getattr(torchreach, name)
    module = importlib.import_module(f"torchreach.{name}")
    again = importlib.util.module_from_spec(module.__spec__)
    monkeypatch.setitem(sys.modules, f"torchreach.{name}", again)
    setattr(torchreach, name, again)  # what `import torchreach.reach` does
    assert getattr(torchreach, name) is function
    assert callable(function)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_stay_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines; one algorithm per file, at most {MAX_LINES} lines"
