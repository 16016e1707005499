"""Input boxes of a VNN-LIB 1 file (an SMT-LIB subset: variables X_i for inputs, Y_i for outputs).

A small parser, because only bounds on inputs are needed and none of the packages tried fits: vnnlib 1.0.2
reads VNN-LIB 2 only and refuses the files of version 1 that benchmarks come in; its 0.0.1 read them but was
given up.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from torchreach.core.errors import FileFormatError, InvalidSetError

_TOKEN = re.compile(r"[()]|[^\s()]+")
_INPUT = re.compile(r"X_(\d+)$")
_OUTPUT = re.compile(r"Y_\d+$")
_MOST_BOXES = 100_000

Term = tuple["str | list[Term]", int]  # a symbol or a list of terms, and the line it starts on
Box = dict[int, tuple[float, float]]  # bounds of each constrained input


def read_box(path: str | Path) -> tuple[Tensor, Tensor]:
    """Lower and upper corners [S, X] (float64) of the S input boxes of a VNN-LIB file.

    S is the number of alternatives that `(or (and ...) ...)` gives the inputs, in their order in the file;
    conjunctions of several such alternatives give their products, empty ones are left out. Constraints on
    outputs are not read; an alternative that mixes both contributes its input part.

    Raises:
        FileFormatError: a missing file, or one that is not VNN-LIB 1, with the line; a constraint on inputs
            that is not a bound on one variable.
        InvalidSetError: an input without a finite lower or upper bound, named; or no box that is not empty.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise FileFormatError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is not a readable text file: {error}") from None
    inputs: set[int] = set()
    boxes: list[Box] = [{}]
    for term, line in _parse(path, text):
        match term:
            case [("declare-const", _), (str(name), _), ("Real", _)]:
                if found := _INPUT.match(name):
                    inputs.add(int(found[1]))
            case [("declare-fun", _), (str(name), _), ([], _), ("Real", _)]:
                if found := _INPUT.match(name):
                    inputs.add(int(found[1]))
            case [("assert", _), formula]:
                boxes = _conjunction(boxes, _boxes(path, formula))
                if len(boxes) > _MOST_BOXES:
                    raise FileFormatError(f"{path}, line {line}: more than {_MOST_BOXES} alternative input boxes")
            case [("set-logic" | "set-info" | "set-option" | "check-sat" | "get-model" | "exit", _), *_]:
                pass
            case _:
                raise _error(path, line, "a declaration or an assertion", term)
    if not inputs:
        raise FileFormatError(f"{path} is not a VNN-LIB file of version 1: it declares no input X_0")
    return _corners(path, inputs, boxes)


def _corners(path: Path, inputs: set[int], boxes: list[Box]) -> tuple[Tensor, Tensor]:
    size = max(inputs) + 1
    rows = []
    for box in boxes:
        for i in range(size):
            low, high = box.get(i, (-math.inf, math.inf))
            if not (math.isfinite(low) and math.isfinite(high)):
                side = "lower" if not math.isfinite(low) else "upper"
                raise InvalidSetError(f"{path}: every input must be bounded, X_{i} has no {side} bound")
        rows.append([box[i] for i in range(size)])
    if not rows:
        raise InvalidSetError(f"{path}: the input set is empty: the bounds contradict each other")
    corners = torch.tensor(rows, dtype=torch.float64)
    return corners[..., 0], corners[..., 1]


def _conjunction(first: list[Box], second: list[Box]) -> list[Box]:
    """Every box of `first` cut with every box of `second`, without the empty ones."""
    if second == [{}]:
        return first
    result = []
    for a, b in itertools.product(first, second):
        cut = dict(a)
        for i, (low, high) in b.items():
            old = cut.get(i, (-math.inf, math.inf))
            cut[i] = (max(old[0], low), min(old[1], high))
        if all(low <= high for low, high in cut.values()):
            result.append(cut)
    return result


def _boxes(path: Path, formula: Term) -> list[Box]:
    """A formula as alternative boxes; [{}] where it says nothing about inputs, [] where it is false."""
    term, line = formula
    match term:
        case [("and", _), *parts]:
            boxes: list[Box] = [{}]
            for part in parts:
                boxes = _conjunction(boxes, _boxes(path, part))
            return boxes
        case [("or", _), *parts]:
            alternatives: list[Box] = []
            for part in parts:
                alternatives += [box for box in _boxes(path, part) if box not in alternatives]
            return alternatives
        case [(("<=" | ">=" | "<" | ">" | "=") as sign, _), left, right]:
            return _comparison(path, line, sign, left, right)
    raise _error(path, line, "(and ...), (or ...) or a comparison", term)


def _comparison(path: Path, line: int, sign: str, left: Term, right: Term) -> list[Box]:
    names = _symbols(left) | _symbols(right)
    if names and all(_OUTPUT.match(name) for name in names):
        return [{}]
    flipped = {"<=": ">=", ">=": "<=", "<": ">", ">": "<", "=": "="}
    variable, constant = left, right
    if _number(left) is not None:
        variable, constant, sign = right, left, flipped[sign]
    found = _INPUT.match(variable[0]) if isinstance(variable[0], str) else None
    value = _number(constant)
    if found is None or value is None or not math.isfinite(value):
        raise FileFormatError(
            f"{path}, line {line}: constraints on inputs must be bounds (<= X_i number), "
            f"got {_text(left)} {sign} {_text(right)}"
        )
    # A box is closed: a strict bound is read as its closure.
    low = value if sign in (">=", ">", "=") else -math.inf
    high = value if sign in ("<=", "<", "=") else math.inf
    return [{int(found[1]): (low, high)}]


def _number(term: Term) -> float | None:
    match term[0]:
        case str(text):
            try:
                return float(text)
            except ValueError:
                return None
        case [("-", _), part]:
            value = _number(part)
            return None if value is None else -value
    return None


def _symbols(term: Term) -> set[str]:
    """Names of variables in a term (operators come first in a list, numbers have no name)."""
    if isinstance(term[0], str):
        return set() if _number(term) is not None else {term[0]}
    return set().union(*(_symbols(part) for part in term[0][1:]))


def _parse(path: Path, text: str) -> list[Term]:
    stack: list[tuple[list[Term], int]] = [([], 1)]
    for number, line in enumerate(text.splitlines(), start=1):
        for token in _TOKEN.findall(line.split(";", 1)[0]):
            if token == "(":
                stack.append(([], number))
            elif token == ")":
                if len(stack) == 1:
                    raise FileFormatError(f"{path}, line {number}: a closing bracket too many")
                stack[-2][0].append(stack.pop())
            else:
                stack[-1][0].append((token, number))
    if len(stack) > 1:
        raise FileFormatError(f"{path}, line {stack[-1][1]}: this bracket is never closed")
    return stack[0][0]


def _text(term: Term) -> str:
    value = term[0]
    return value if isinstance(value, str) else "(" + " ".join(_text(part) for part in value) + ")"


def _error(path: Path, line: int, required: str, received: object) -> FileFormatError:
    text = _text((received, line))  # type: ignore[arg-type]
    return FileFormatError(f"{path}, line {line}: expected {required}, got {text[:60]}")
