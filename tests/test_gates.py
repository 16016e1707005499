"""Verdicts for CI systems, and the page of work that is going on."""

from __future__ import annotations

import hashlib
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import torchreach as tr
from torchreach.app.cli import main
from torchreach.app.live_page import LivePage
from torchreach.app.report.gates import Outcome, audit_cases, comparison_cases, equivalence_cases, junit, sarif
from torchreach.read.save import save

BOXES = ("--box", "0,1; 0,1")


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)).double()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    save(network(0), folder / "a.onnx", (2,))
    save(tr.prune_weights(network(0), 0.4), folder / "b.onnx", (2,))
    np.save(folder / "x.npy", np.array([[0.1, 0.2], [0.5, -0.4], [0.9, 0.9]]))
    return folder


def run(folder, command, *args):
    paths = [str(folder / "a.onnx"), str(folder / "b.onnx")]
    out = {name: str(folder / f"o.{name}") for name in ("junit", "sarif")}
    more = [text for name, path in out.items() for text in (f"--{name}", path)]
    result = CliRunner().invoke(main, [command, *paths, *map(str, args), *more])
    assert result.exit_code < 2, result.output
    return result, ET.parse(out["junit"]).getroot(), json.loads((folder / "o.sarif").read_text())


@pytest.mark.parametrize(("tolerance", "outcome"), [(1e-4, "exceeded"), (100, None)])
def test_compare_writes_a_case_for_each_set(files, tolerance, outcome):
    result, root, log = run(files, "compare", *BOXES, "--tolerance", tolerance)
    assert result.exit_code == (0 if outcome is None else 1), result.output
    suite = root.find("testsuite")
    assert root.tag == "testsuites"
    assert suite.get("tests") == "1"
    assert suite.get("failures") == ("0" if outcome is None else "1")
    case = suite.find("testcase")
    assert (case.get("classname"), case.get("name")) == ("torchreach.compare", "box")
    (only,) = log["runs"]
    assert log["version"] == "2.1.0"
    assert only["invocations"][0]["exitCode"] == result.exit_code
    hashes = [artifact["hashes"]["sha-256"] for artifact in only["artifacts"]]
    assert hashes == [hashlib.sha256((files / name).read_bytes()).hexdigest() for name in ("a.onnx", "b.onnx")]
    if outcome is None:
        assert case.find("failure") is None
        assert only["results"] == []
        return
    failure = case.find("failure")
    assert failure.get("type") == outcome
    assert "attained" in failure.get("message")
    (shown,) = only["results"]
    assert (shown["ruleId"], shown["level"], shown["kind"]) == (outcome, "error", "fail")
    x = torch.tensor(shown["properties"]["input"], dtype=torch.float64)
    a, b = (tr.load(files / name)(x[None]) for name in ("a.onnx", "b.onnx"))
    assert float((a - b).abs().max()) >= tolerance
    assert only["tool"]["driver"]["rules"][shown["ruleIndex"]]["id"] == outcome


def test_equivalence_audits_and_repairs_write_them_too(files):
    result, root, log = run(files, "equivalent", *BOXES, "--epsilon", 1e-4)
    assert (result.exit_code, root.find("testsuite").get("failures")) == (1, "1")
    assert log["runs"][0]["results"][0]["ruleId"] == "exceeded"
    result, root, log = run(files, "audit", "--data", files / "x.npy")
    assert root.find("testsuite").get("tests") == "3"
    assert len(log["runs"][0]["results"]) == int(root.find("testsuite").get("failures"))
    result, root, log = run(files, "repair", *BOXES, "--target", 0.9, "--by", "solve", "--iterations", 1)
    assert (result.exit_code, root.find("testsuite").get("failures")) == (0, "0"), result.output


def test_what_was_not_shown_fails_as_something_else():
    stars = tr.StarBatch.from_box(torch.zeros(2, 2).double(), torch.ones(2, 2).double())
    found = tr.discrepancy(network(0), network(1), stars)
    between = float(found.upper.max()) + 1
    wide = replace(found, upper=found.upper + 2)
    assert [case.outcome for case in comparison_cases(wide, ("p", "q"), between)] == [Outcome.UNDECIDED] * 2
    cases = comparison_cases(replace(found, uncovered=("fc1",)), ("p", "q"), 1e9)
    assert [case.outcome for case in cases] == [Outcome.UNCOVERED] * 2
    assert "computed" in cases[0].text
    levels = [result["level"] for result in json.loads(sarif("compare", cases, {}, "", 1))["runs"][0]["results"]]
    assert levels == ["warning"] * 2
    assert junit("compare", cases, 1.0).count(b'type="uncovered"') == 2
    same = tr.equivalent(network(0), network(1), stars, epsilon=1.0)
    unknown = replace(same, answer=(tr.Answer.UNKNOWN,) * 2)
    assert {case.outcome for case in equivalence_cases(unknown, ("p", "q"))} == {Outcome.UNDECIDED}


def test_an_audit_that_ended_early_has_numbers_that_json_has():
    audit = tr.audit(network(0), network(1), torch.rand(4, 2).double(), 0.2, budget=tr.Budget(seconds=1e-9))
    text = sarif("audit", audit_cases(audit), {"a": "0"}, "", 1).decode()
    assert "Infinity" not in text
    json.loads(text)


def test_places_that_cannot_be_written_are_refused_before_the_work(files):
    paths = [str(files / "a.onnx"), str(files / "b.onnx")]
    for option in ("--junit", "--sarif", "--live", "--certificate"):
        result = CliRunner().invoke(main, ["compare", *paths, *BOXES, option, str(files / "none" / "x")])
        assert result.exit_code == 2
        assert f"{option} must name a file in a folder that exists" in result.stderr


# -- the page -------------------------------------------------------------------------------------------


def test_the_page_shows_the_line_and_the_interval_and_stops_reloading(tmp_path):
    time = [0.0]
    page = LivePage(tmp_path / "p.html", "compare <a>", 60.0, lambda: time[0])
    first = page.path.read_text()
    assert 'http-equiv="refresh"' in first
    assert "compare &lt;a&gt;" in first
    for step in range(5):
        time[0] += 2
        page.interval(0.1 + 0.01 * step, 1.0 / (step + 1))
        page.say(f"{step} stars done")
    shown = page.path.read_text()
    assert "4 stars done" in shown
    assert "50.0 s" in shown  # left
    assert all(text in shown for text in ("0.14", "0.2", "polyline"))
    page.write(over=True)
    last = page.path.read_text()
    assert "refresh" not in last
    assert "finished" in last
    assert not re.search(r"(src|href)=", last)


def test_the_page_is_written_once_a_second_at_most_and_its_picture_stays_small(tmp_path):
    time, written = [0.0], []

    class Counted(LivePage):
        def write(self, *, over: bool) -> None:
            self.written = self.elapsed
            written.append(over)

    page = Counted(tmp_path / "p.html", "compare", None, lambda: time[0])
    for _ in range(3000):
        time[0] += 0.01
        page.interval(0.0, 1.0)
        page.say("x")
    assert len(written) <= 31
    assert len(page.history) <= 401


def test_show_progress_and_commands_keep_a_page(files, tmp_path):
    stars = tr.StarBatch.from_box(torch.zeros(2).double(), torch.ones(2).double())
    with tr.show_progress(html=tmp_path / "p.html", seconds=5) as progress:
        tr.discrepancy(network(0), network(1), stars, progress=progress)
    assert "finished" in (tmp_path / "p.html").read_text()
    paths = [str(files / "a.onnx"), str(files / "b.onnx")]
    assert CliRunner().invoke(main, ["compare", *paths, *BOXES, "--live", str(tmp_path / "q.html")]).exit_code == 0
    assert "finished" in (tmp_path / "q.html").read_text()
