"""The demonstration: small settings here, the defaults in the slow test."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from typer.testing import CliRunner

from tests.data import require_data
from torchreach.app.cli import app

pytestmark = pytest.mark.usefixtures("no_log")
SMALL = ("--images", "1", "--epochs", "2", "--bits", "4", "--iterations", "2", "--target", "0.95", "--output", "out")


def _demo(monkeypatch, folder, *args):
    folder.mkdir()
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, ["demo", *args])
    return result, json.loads((folder / "out" / "report.json").read_text())


def test_one_seed_gives_the_same_numbers_twice_on_any_number_of_threads(monkeypatch, tmp_path):
    before, reports = torch.get_num_threads(), []
    try:
        for name, threads in (("a", 1), ("b", 2)):
            torch.set_num_threads(threads)
            result, report = _demo(monkeypatch, tmp_path / name, *SMALL)
            assert torch.get_num_threads() == threads
            assert result.exit_code in (0, 1), result.output
            assert result.stderr == ""
            assert (result.exit_code == 0) == report["verdict"]["ok"] == report["repair"]["satisfied"]
            assert re.search(r"labels: +(certainly|an input|open).* 1 .*\(compressed\)", result.stdout), result.stdout
            assert "(repaired)" in result.stdout
            del report["timings"]
            reports.append(report)
    finally:
        torch.set_num_threads(before)
    assert reports[0] == reports[1]
    names = {path.name for path in (tmp_path / "a" / "out").iterdir()}
    assert names == {
        *("report.json", "report.csv", "report.html", "ranges.png", "repair.png"),
        *("original.onnx", "compressed.onnx", "repaired.onnx"),
    }
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    # the networks it leaves are the ones it speaks of
    box = json.dumps([[0.5, 0.5]] * 64)
    (tmp_path / "box.json").write_text(box)
    networks = [str(tmp_path / "a" / "out" / f"{name}.onnx") for name in ("original", "repaired")]
    again = CliRunner().invoke(app, ["compare", *networks, "--box", str(tmp_path / "box.json")])
    assert again.exit_code == 0, again.output


def test_another_seed_gives_other_numbers(monkeypatch, tmp_path):
    small = ("--images", "1", "--epochs", "1", "--iterations", "1", "--output", "out")
    reports = [_demo(monkeypatch, tmp_path / seed, *small, "--seed", seed)[1] for seed in "12"]
    assert reports[0]["discrepancy"]["max_upper"] != reports[1]["discrepancy"]["max_upper"]


def test_pruned_network_stays_pruned(monkeypatch, tmp_path):
    small = ("--images", "1", "--epochs", "1", "--iterations", "1", "--bits", "0", "--prune", "0.8", "--output", "out")
    networks = _demo(monkeypatch, tmp_path / "a", *small)[1]["networks"]
    weights = 64 * 64 + 64 * 32 + 32 * 10
    assert networks["compressed"]["name"] == "80 % of the weights pruned"
    assert networks["original"]["nonzero"] - networks["compressed"]["nonzero"] == pytest.approx(0.8 * weights, abs=3)
    assert networks["repaired"]["nonzero"] <= networks["compressed"]["nonzero"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--data", "letters"), "--data must be one of digits, mnist, got 'letters'"),
        (("--data", "mnist"), "--data mnist needs --root, the folder to download it to"),
        (("--root", "x"), "--root belongs to --data mnist, got --data digits"),
        (("--images", "0"), "--images must lie between 1 and 360, got 0"),
        (("--pixels", "65"), "--pixels must lie between 1 and 64, got 65"),
        (("--eps", "0"), "--eps must lie in (0, 1], got 0.0"),
        (("--bits", "1"), "--bits must lie between 2 and 16, or be 0 for float weights, got 1"),
        (("--prune", "1"), "--prune must lie in [0, 1), got 1"),
        (("--bits", "0", "--prune", "0"), "--bits 0 needs --prune"),
        (("--epochs", "0"), "--epochs must be at least 1, got 0"),
    ],
)
def test_bad_options_give_one_line_and_leave_nothing(monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo", *args])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_defaults_repair_the_digits(monkeypatch, tmp_path):
    result, report = _demo(monkeypatch, tmp_path / "a", "--output", "out")
    assert result.exit_code == 0, result.output
    assert report["repair"]["satisfied"]
    assert len(report["discrepancy"]["stars"]) == 10
    assert report["timings"]["total"] < 120
    accuracy = {role: network["accuracy"] for role, network in report["networks"].items()}
    assert accuracy["original"] > 0.95
    assert accuracy["compressed"] < accuracy["original"] - 0.1
    assert accuracy["repaired"] > accuracy["original"] - 0.02
    assert report["repair"]["history"][-1]["max_upper"] < 0.1 * report["repair"]["history"][0]["max_upper"]
    assert "certainly the same on 8 of 10 sets, an input tells them apart on 2 (compressed)" in result.stdout
    assert "certainly the same on 10 of 10 sets (repaired)" in result.stdout


@pytest.mark.slow
def test_mnist(monkeypatch, tmp_path):
    shutil.copytree(require_data("mnist"), tmp_path / "mnist")
    args = ("--data", "mnist", "--root", str(tmp_path / "mnist"), "--epochs", "1", "--images", "2", "--output", "out")
    result, report = _demo(monkeypatch, tmp_path / "a", *args)
    assert result.exit_code == 0, result.output
    assert report["input_set"]["shape"] == [784]
    assert report["networks"]["original"]["accuracy"] > 0.9
