"""What a `.pt2` file may hold to be opened: tensors, and a program of names, numbers and operators.

`torch.export.load` unpickles without restriction, loads compiled libraries out of the archive, and evaluates sizes as
Python expressions: each runs code of the file's author. Operators are looked up as attributes of torch, and names end
up in the source of functions that torch compiles. So what torch opens is a copy of the archive, in memory, every part
of which was checked here, and it unpickles nothing but tensors meanwhile. What is refused is named.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchreach.core.errors import FileFormatError

# Members that torch would run or unpickle by other means than `torch.load`; it finds names in any case.
_CODE = {"aotinductor": "compiled code", "custom_obj": "an object of a class", "opaque_obj": "a pickled object"}
_PROGRAM = re.compile(r"(?:[^/]+/)?(?:models/[^/]+|serialized_exported_program)\.json")
_NAME = re.compile(r"[\w.-]*", re.ASCII)
# Operators are looked up as attributes of torch, all of which can be reached so: torch.os.system.
_OPERATOR = re.compile(
    r"torch\.ops\.(?!load_library|import_module)\w+\.\w+(\.\w+)?|torch\.sym_\w+|(_operator|math)\.\w+", re.ASCII
)
# Where torch wants text: it shows it, splits it, parses it as JSON or, of arguments, writes its `repr`.
_TEXT = {"metadata", "torch_version", "in_spec", "out_spec", "as_string", "as_strings"}
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
_ARITHMETIC = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop)
_FUNCTION = re.compile(r"[A-Z]\w*|floor|ceiling", re.ASCII)  # of sympy; no function of Python's own is spelt so


def checked_archive(path: Path) -> io.BytesIO:
    """A copy of the archive at `path` for `torch.export.load`, which is to run within `tensors_alone`.

    Raises: FileFormatError: no archive, or something in it that could run code when it is opened.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as checked:
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise FileFormatError(f"{path}: its parts are larger than the file; torch.export.save does not compress")
        if len({member.filename.lower() for member in members}) < len(members):
            raise FileFormatError(f"{path}: two parts of one name")
        for member in members:
            for part, what in _CODE.items():
                if part in member.filename.lower():
                    raise FileFormatError(f"{path}: {member.filename} is {what}, which could run anything; not opened")
            content = archive.read(member)
            if _PROGRAM.fullmatch(member.filename):
                content = _checked_program(path, content)
            checked.writestr(member.filename, content)
    copy.seek(0)
    return copy


@contextlib.contextmanager
def tensors_alone() -> Iterator[None]:
    """Within it `torch.load` unpickles tensors and plain containers alone, whatever its caller asks for.

    By torch's own variables of the environment; other threads are held to the same meanwhile.
    """
    changed = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _checked_program(path: Path, content: bytes) -> bytes:
    program = json.loads(content)
    if "guards_code" in program:  # Python source, for checks of sizes that are never asked for here
        program["guards_code"] = []
    _check(path, program, "")
    return json.dumps(program).encode()


def _check(path: Path, value: Any, key: str) -> None:
    """Raises FileFormatError where a string of the program could be more than a name, a size or a text."""
    if isinstance(value, dict):
        for name, part in value.items():
            _check(path, part, key if key in _TEXT else name)
    elif isinstance(value, list):
        for part in value:
            _check(path, part, key)
    elif isinstance(value, str):
        if key == "expr_str":
            fine = _is_size(value)
        elif key in ("target", "as_operator"):
            fine = _OPERATOR.fullmatch(value)
        elif key in ("in_spec", "out_spec"):
            fine = _is_structure(value)
        elif key in _TEXT:
            fine = "__enum__" not in value  # torch would import the module that it names
        else:
            fine = _NAME.fullmatch(value)
        if not fine:
            raise FileFormatError(f"{path}: {key} is {value[:60]!r}, which could run code; not opened")


def _is_structure(text: str) -> bool:
    """Whether inputs or outputs are nested tuples, lists and dictionaries: torch imports what other containers name."""
    try:
        return not text or all(
            node.get("type") in _CONTAINERS and "__enum__" not in node for node in _nodes(json.loads(text)[1])
        )
    except (ValueError, TypeError, IndexError, KeyError, RecursionError):
        return False


def _nodes(spec: Any) -> Iterator[dict[str, Any]]:
    """Each dictionary of a structure, those in its contexts too, which are JSON once more."""
    if isinstance(spec, dict):
        yield spec
        for key, part in spec.items():
            yield from _nodes(json.loads(part) if key == "context" and isinstance(part, str) else part)
    elif isinstance(spec, list):
        for part in spec:
            yield from _nodes(part)


def _is_size(text: str) -> bool:
    """Whether a size is arithmetic on numbers and symbols, such as `2*Symbol('s0', integer=True) + 1`."""
    if not text.isascii() or set(text) & set("\n\r#\\"):  # sympy takes line ends out before it parses
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    symbols: set[ast.AST] = set()  # their names, the only strings
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name), args=args) if _FUNCTION.fullmatch(name):
                symbols.update(args if name == "Symbol" else ())
            case ast.Constant(value=str(name)) if node in symbols and _NAME.fullmatch(name):
                pass
            case ast.Constant(value=int() | float()) | ast.Name() | ast.Load() | ast.keyword() | ast.Expression():
                pass
            case _ if not isinstance(node, _ARITHMETIC):
                return False
    return True
