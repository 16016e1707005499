"""Files are written whole or not at all, and a place that cannot be written is noticed without leaving a trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchreach.core.errors import OptionError
from torchreach.core.files import check_folder, check_target, whole, write_files


def test_files_appear_all_or_none(tmp_path):
    with pytest.raises(TypeError):
        write_files(tmp_path / "out", {"a": b"whole", "b": "not bytes"})  # pyright: ignore
    assert list(tmp_path.iterdir()) == []
    write_files(tmp_path / "deep" / "out", {"a": b"1", "b": b"2"})
    write_files(tmp_path / "deep" / "out", {"a": b"3"})
    assert (tmp_path / "deep" / "out" / "a").read_bytes() == b"3"
    assert (tmp_path / "deep" / "out" / "b").read_bytes() == b"2"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == ["a", "b"]


def test_a_draft_replaces_its_file_only_when_it_is_done(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(TypeError), whole(path) as draft:
        draft.write_text("half") and draft.write_text(None)  # pyright: ignore
    assert path.read_text() == "old"
    with whole(path) as draft:
        draft.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", ["out", "out/deeper/still", "."])
def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path, folder):
    (tmp_path / "mine").write_text("1")
    check_folder(tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("file/out", "--output must name a folder, but .*file is a file"),
        ("file", "--output must name a folder, but .*file is a file"),
        ("new/" + 300 * "x", "the folder cannot be written: File name too long"),
        ("/proc/torchreach", "--output /proc/torchreach: the folder cannot be written: "),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, folder, message):
    (tmp_path / "file").touch()
    if folder.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc, a place where nobody can write")
    with pytest.raises(OptionError, match=message):
        check_folder(tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x.txt", "a network is saved as .onnx or .pt2, got '.txt' in .*x.txt"),
        ("x", "got 'no ending'"),
        ("none/x.onnx", "cannot save a network in .*none: no such folder"),
        ("folder.pt2", "folder.pt2: it is a folder"),
        (300 * "x" + ".onnx", "cannot save a network in .*: File name too long"),
    ],
)
def test_a_network_that_cannot_be_saved_is_refused(tmp_path, path, message):
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(OptionError, match=message):
        check_target(tmp_path / path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt2"]
