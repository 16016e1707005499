"""VNN-LIB files: the boxes they describe, and what is said about files that describe none."""

from __future__ import annotations

import pytest
import torch

from tests.data import require_data
from torchreach.core.errors import FileFormatError, InvalidSetError
from torchreach.sets.vnnlib import read_box

HEAD = """; a comment (with a bracket
(declare-const X_0 Real)
(declare-const X_1 Real)
(declare-const Y_0 Real)
"""
UNIT = "(assert (<= X_0 1)) (assert (>= X_0 0)) (assert (<= X_1 1)) (assert (>= X_1 0))\n"


def _file(tmp_path, text):
    path = tmp_path / "set.vnnlib"
    path.write_text(text)
    return path


def test_all_acasxu_properties_are_read():
    files = sorted(require_data("acasxu").glob("prop_*.vnnlib"))
    assert len(files) == 10
    for file in files:
        lower, upper = read_box(file)
        assert lower.shape == upper.shape == ((2 if file.stem == "prop_6" else 1), 5)
        assert lower.dtype == torch.float64
        assert bool((lower <= upper).all())  # property 4 fixes one input


def test_numbers_are_read_exactly():
    lower, upper = read_box(require_data("acasxu", "prop_1.vnnlib"))
    assert lower.tolist() == [[0.6, -0.5, -0.5, 0.45, -0.5]]
    assert upper.tolist() == [[0.679857769, 0.5, 0.5, 0.5, -0.45]]


def test_alternatives_become_boxes_in_their_order():
    lower, upper = read_box(require_data("acasxu", "prop_6.vnnlib"))
    assert lower[:, 1].tolist() == [0.11140846, -0.499999896]
    assert upper[:, 1].tolist() == [0.499999896, -0.11140846]


@pytest.mark.parametrize(
    ("formula", "lower", "upper"),
    [
        ("", [[0, 0]], [[1, 1]]),
        ("(assert (>= 0.5 X_0))", [[0, 0]], [[0.5, 1]]),
        ("(assert (and (>= X_0 (- 3)) (> X_1 0.25)))", [[0, 0.25]], [[1, 1]]),
        ("(assert (= X_1 1e-1))", [[0, 0.1]], [[1, 0.1]]),
        ("(assert (or (<= X_0 0.25) (>= X_0 0.75)))", [[0, 0], [0.75, 0]], [[0.25, 1], [1, 1]]),
        ("(assert (or (and (<= X_0 0.25)\n(>= Y_0 0)) (<= X_0 -1)))", [[0, 0]], [[0.25, 1]]),
        ("(assert (or (<= Y_0 0) (>= (* 2 Y_0) 5)))", [[0, 0]], [[1, 1]]),
    ],
)
def test_formulas(tmp_path, formula, lower, upper):
    path = _file(tmp_path, HEAD + UNIT + formula)
    boxes = read_box(path)
    assert boxes[0].tolist() == lower
    assert boxes[1].tolist() == upper


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", FileFormatError, "declares no input X_0"),
        (HEAD + UNIT + "(assert (<= X_0 1)", FileFormatError, "line 6: this bracket is never closed"),
        (HEAD + UNIT + ")", FileFormatError, "line 6: a closing bracket too many"),
        (HEAD + UNIT + "(assert (and\n(>= Y_0 X_9)))", FileFormatError, "line 7: constraints on inputs"),
        (HEAD + UNIT + "(assert (<= X_0 X_1))", FileFormatError, r"line 6: constraints .* got X_0 <= X_1"),
        (HEAD + UNIT + "(assert (<= (+ X_0 X_1) 1))", FileFormatError, r"got \(\+ X_0 X_1\) <= 1"),
        (HEAD + UNIT + "(assert (not (<= X_0 1)))", FileFormatError, r"line 6: expected .* got \(not"),
        (HEAD + UNIT + "(hello)", FileFormatError, r"expected a declaration .*, got \(hello"),
        (HEAD + UNIT + "(assert (<= X_0 nan))", FileFormatError, "must be bounds"),
        (HEAD + UNIT.replace("(<= X_1 1)", "(<= Y_0 1)"), InvalidSetError, "X_1 has no upper bound"),
        (HEAD + UNIT + "(assert (>= X_0 2))", InvalidSetError, "the input set is empty"),
    ],
)
def test_bad_files_give_one_clear_line(tmp_path, text, error, message):
    with pytest.raises(error, match=message) as caught:
        read_box(_file(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(FileFormatError, match="no such file"):
        read_box(tmp_path / "missing.vnnlib")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileFormatError, match="not a readable text file"):
        read_box(tmp_path / "binary")
