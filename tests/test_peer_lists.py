"""Published lists are read in the formats of their repositories, answered, and held against samples and records."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import torchreach as tr
from benchmarks import peer_lists, peers
from tests.networks import random_network

VNNLIB = "\n".join(
    [f"(declare-const X_{i} Real)\n(assert (<= X_{i} 0.5))\n(assert (>= X_{i} -0.5))" for i in range(3)]
    + [f"(declare-const Y_{i} Real)" for i in range(3)]
)
PROPERTIES = """
PROPERTY = {}

def scaleInput(input, scale):
	pass

#PROPERTY["1"] = [[9], [9]]
PROPERTY["1"] = [[0.5, 0.25, 0.5],
	[-0.5, -0.25, 0.5]]
PROPERTY["1.1"] = scaleInput(PROPERTY["1"],0.5)
"""
LATEX = r"""\begin{tabular}{lrr}
           Name &  NNEquiv &  NNEquivOpt \\
\midrule
 SMALL\_retrain &   167.45 &   51.483027 \\
\bottomrule
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a tiny list of each peer: a network, itself, and one that is far from it."""
    monkeypatch.setenv("TORCHREACH_DATA", str(tmp_path))
    near, far = (random_network(seed, [3, 5, 3]).float() for seed in (1, 2))

    def written(path: str, network: nn.Module) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        torch.onnx.export(network, (torch.zeros(1, 3),), tmp_path / path, dynamo=False)

    def text(path: str, content: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)

    written("verydiff/nets/a.onnx", near)
    written("verydiff/nets/a_same.onnx", near)
    written("verydiff/nets/a_far.onnx", nn.Sequential(far, nn.Softmax(1)))
    text("verydiff/specs/box.vnnlib", VNNLIB)
    lines = [f"nets/a.onnx,nets/{copy}.onnx,specs/box.vnnlib,0.05,120\n" for copy in ("a_same", "a_far", "none")]
    text("verydiff/specs/acas-prune.csv", "".join(lines))
    text("verydiff/specs/acas-prune_warmup.csv", "nets/a.onnx,nets/a.onnx,specs/box.vnnlib,0.05,120")
    text("verydiff/specs/lhc.csv", "nets/a.onnx,nets/a_same.onnx,specs/box.vnnlib,0.8,0.9,600\n")
    results = "verydiff/experiments_final/VeryDiff"
    text(f"{results}/acas-0.05-120/results.csv", "a_same, box, SAFE, 2000000000, 15\na_far, box, UNSAFE, 1000000, 1\n")
    text(f"{results}/lhc-top1-0.9-600/results.csv", "a_same, box, UNKNOWN, 600000000000, 15, 0.1, 0.2\n")
    text(f"{results}/notes/results.csv", "not, of, theirs\n")
    written("nnequiv/benchmarks-versions/small.onnx", near)
    written("nnequiv/benchmarks-versions/small-mirror.onnx", near)
    text("nnequiv/instances-versions.csv", "small,1,0.05,DONT\nsmall,1,0.05,REFINE_UNTIL_MAX\nsmall,1.1,top,DONT\n"
         "small,nowhere,top,DONT")  # fmt: skip
    text("nnequiv/instances.csv", "small,1,0.05\n")
    text("nnequiv/examples/equiv/properties.py", PROPERTIES)
    cells = [
        {"source": ['labels = {\n"results/small-1-0.05":', '"SMALL_retrain"\n}']},
        {"source": ["print(table)"], "outputs": [{"text": LATEX.splitlines(keepends=True)}]},
    ]
    text("nnequiv/analysis/Comparison-NNEquiv-Buening.ipynb", json.dumps({"cells": cells}))
    return tmp_path


def test_lines_of_verydiff_are_read_with_what_is_recorded(folder: Path):
    found = list(peer_lists.verydiff(folder / "verydiff"))
    told = [(one.list, one.name, one.asked, one.is_here, one.their_answer, one.their_seconds) for one in found]
    assert told == [
        ("acas-prune", "a_same box", "<= 0.05", True, "equivalent", 2.0),
        ("acas-prune", "a_far box", "<= 0.05", True, "not equivalent", 0.001),
        ("acas-prune", "none box", "<= 0.05", False, None, None),
        ("lhc", "a_same box", "label, sure to 0.8", True, None, None),
        ("lhc", "a_same box", "label, sure to 0.9", True, "unknown", 600.0),
    ]


def test_lines_of_nnequiv_are_read_once_with_their_boxes_and_seconds(folder: Path):
    found = list(peer_lists.nnequiv(folder / "nnequiv"))
    told = [(one.list, one.name, one.asked, one.is_here, one.they_decided, one.their_seconds) for one in found]
    assert told == [
        ("instances-versions", "small 1", "<= 0.05", True, True, 167.45),
        ("instances-versions", "small 1.1", "label", True, False, None),
        ("instances-versions", "small nowhere", "label", False, False, None),
        ("instances", "small 1", "<= 0.05", False, True, 167.45),
    ]
    boxes = [one.box().bounding_box()[:2] for one in found[:2]]  # type: ignore[union-attr]
    # scaleInput reads the first row, the upper ends, as the lower ones
    assert [[end.tolist() for end in ends] for ends in boxes] == [
        [[[-0.5, -0.25, 0.5]], [[0.5, 0.25, 0.5]]],
        [[[0.5, 0.25, 0.5]], [[1.0, 0.5, 0.5]]],
    ]


def test_lists_are_answered_beside_what_is_recorded(folder: Path, capsys: pytest.CaptureFixture[str]):
    out = folder / "out.json"
    command = ["--section", "verydiff", "--section", "nnequiv", "--seconds", "5", "--repeats", "1", "--samples", "200"]
    assert peers.main([*command, "--json", str(out)]) == 0
    rows = [row for row in json.loads(out.read_text())["rows"] if not row.get("summary")]
    assert [(row["instance"], row["answer"]) for row in rows] == [
        ("a_same box", "equivalent"),
        ("a_far box", "not equivalent"),
        ("a_same box", "equivalent"),
        ("a_same box", "equivalent"),
        ("small 1", "equivalent"),
        ("small 1.1", "equivalent"),
    ]
    assert rows[0]["theirs / ours"] == 2.0 / rows[0]["wall s"]
    printed = capsys.readouterr().out
    assert "Published lists of nnequiv" in printed
    assert "167" in printed


def test_answers_that_samples_or_records_contradict_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    same, far, *_ = peer_lists.verydiff(folder / "verydiff")
    args = SimpleNamespace(seconds=5.0, repeats=1, samples=200)
    assert peer_lists.measure(same, args)["problems"] == []  # type: ignore[arg-type]
    honest = tr.equivalent

    def lie(first, second, stars, epsilon, **options):
        return honest(first, first if epsilon else second, stars, epsilon, **options)

    monkeypatch.setattr(tr, "equivalent", lie)
    samples, recorded = peer_lists.measure(far, args)["problems"]  # type: ignore[arg-type]
    assert "samples contradict the certificate" in samples
    assert recorded == "equivalent, recorded as not equivalent"
