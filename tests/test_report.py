"""Reports: printed numbers never claim more than the certificate, files are whole, the schema holds."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from decimal import Decimal
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from torch import nn

import torchreach as tr
from torchreach.console import live, progress_line
from torchreach.input_sets import InputSet
from torchreach.report import NetworkInfo, Report, check_folder, render, report_dict, write_files
from torchreach.results import Progress, RepairResult, RepairStep, Status
from torchreach.verdict import State, at_least, at_most, compare_verdict, regions, repair_verdict

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    compressed = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    stars = tr.StarBatch.from_box(torch.tensor([[-1.0, -1], [0, 0]]).double(), torch.ones(2, 2).double())
    found = tr.discrepancy(original, compressed, stars)
    return Report(
        "compare",
        "torchreach compare 'a <b>.onnx' b.onnx",
        {"original": NetworkInfo.of("a <b>.onnx", original), "compressed": NetworkInfo.of("b.onnx", compressed)},
        InputSet("box", "two boxes & more", stars, ("box 0", "box 1")),
        compare_verdict(found),
        found,
        original(stars.center).detach(),
        settings={"target_bound": 0.25},
        seconds=1.5,
    )


@pytest.fixture(scope="module")
def repaired(report):
    found = report.found
    better = replace(found, lower=found.lower / 4, upper=found.upper / 4)
    steps = (RepairStep(0, found, 0.9, None, False, 1.0), RepairStep(1, better, 0.95, 0.1, True, 1.0))
    result = RepairResult(nn.Identity(), steps, True, 1)
    networks = {**report.networks, "repaired": report.networks["compressed"]}
    return replace(report, command="repair", networks=networks, repaired=result, verdict=repair_verdict(result, 0.25))


def test_printed_numbers_are_rounded_outward():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=generator).double() * 10.0 ** torch.randint(
        -12, 12, (500,), generator=generator
    )
    for value in [*values.tolist(), 0.0, 1.0, 0.1, -0.1, 99999.5, 1e-300]:
        low, high = Decimal(at_least(value)), Decimal(at_most(value))
        assert low <= Decimal(value) <= high
        assert float(high - low) <= 2e-4 * abs(value)
    assert at_most(0.123451) == "0.12346"
    assert at_least(-0.123451) == "-0.12346"
    assert at_most(math.inf) == "inf"


def test_region_count_is_that_of_reach(report):
    merged = tr.merge(*_networks())
    stars = report.inputs.stars
    found, reached = tr.discrepancy(*_networks(), stars), tr.reach(merged, stars)
    assert regions(found) == len(reached)
    # stars may be enumerated in several runs: the work is that of all of them
    assert found.stats.splits == reached.stats.splits
    assert regions(replace(report.found, status=(Status.EXACT, Status.BOUNDED))) is None


def _networks():
    generator = torch.Generator().manual_seed(3)
    networks = [nn.Sequential(nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3)) for _ in "ab"]
    with torch.no_grad():
        for parameter in (p for network in networks for p in network.parameters()):
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return networks


def test_progress_is_silent_unless_on_a_terminal():
    seen = io.StringIO()
    with live(Console(file=seen), "compare") as line:
        assert line is None
    assert seen.getvalue() == ""
    with live(Console(file=seen, force_terminal=True, width=200), "compare") as line:
        assert line is not None
        assert seen.getvalue() != ""


def test_progress_names_stars_and_interval():
    low, high = torch.tensor([[-2.0, -1.0]]), torch.tensor([[1.0, 1.5]])
    line = progress_line(Progress(1234, 56, low, high, low / 2, high / 2, 3.21))
    assert line == "1,234 stars done, 56 open, max |y1 - y2| in 1 .. 2, 3.2 s"


def test_verdict_states(report):
    found = report.found
    low, high = float(found.lower.max()), float(found.upper.max())
    assert compare_verdict(found).state is State.CERTIFIED
    assert compare_verdict(found, high).state is State.WITHIN
    assert compare_verdict(found, low - 1e-3).state is State.EXCEEDED
    bounded = replace(found, upper=found.upper + 1, status=(Status.BOUNDED,) * 2)
    verdict = compare_verdict(bounded, high)
    assert (verdict.state, verdict.ok) == (State.UNDECIDED, False)
    assert "BOUNDED" in verdict.text
    star, output = compare_verdict(found).witness
    assert float(found.lower[star, output]) == low


def test_missed_repair_speaks_of_the_kept_network(repaired):
    steps = tuple(replace(step, satisfied=False) for step in repaired.repaired.history)
    worse = RepairResult(nn.Identity(), (*steps, replace(steps[0], iteration=2)), False, 1)
    verdict = repair_verdict(worse, 0.25)
    assert not verdict.ok
    assert verdict.upper == float(steps[1].discrepancy.upper.max())
    assert verdict.tolerance == 0.25
    assert "2 iterations" in verdict.text


def test_json_schema(repaired):
    out = json.loads(render(repaired)["report.json"])
    assert set(out) == {
        *("schema", "command", "command_line", "versions", "device", "dtype", "semantics", "verdict", "settings"),
        *("networks", "input_set", "discrepancy", "repair", "timings"),
    }
    assert out["versions"]["torchreach"] == tr.__version__
    assert out["semantics"]["name"] == "float"
    assert (out["device"], out["dtype"]) == ("cpu", "float64")
    star = out["discrepancy"]["stars"][1]
    assert set(star) == {"label", "status", "max_lower", "max_upper", "outputs"}
    assert star["status"] == "exact"
    entry = star["outputs"][2]
    assert set(entry) == {"output", "lower", "upper", "range_lower", "range_upper", "witness"}
    assert entry["upper"] == float(repaired.found.upper[1, 2])
    assert entry["witness"] == repaired.found.witness[1, 2].tolist()
    stats = out["discrepancy"]["stats"]
    assert set(stats) == {"method", "root_bounds", "splits", "linear_programs", "layers"}
    assert stats["splits"] == sum(layer["splits"] for layer in stats["layers"])
    assert out["repair"]["satisfied"]
    assert [step["accuracy"] for step in out["repair"]["history"]] == [0.9, 0.95]
    assert set(out["timings"]) == {"total", "discrepancy", "repair"}


def test_timings_alone_hold_what_differs_between_runs(report):
    slower = replace(report, seconds=99.0, found=replace(report.found, stats=replace(report.found.stats, seconds=9.0)))
    one, two = report_dict(report), report_dict(slower)
    assert one != two
    del one["timings"], two["timings"]
    assert one == two


def test_infinite_bounds_become_null(report):
    upper = report.found.upper.clone()
    upper[0, 0] = torch.inf
    high = report.found.range_upper.clone()
    high[0, 0] = torch.inf
    found = replace(report.found, upper=upper, range_upper=high, status=(Status.BOUNDED, Status.EXACT))
    files = render(replace(report, found=found, verdict=compare_verdict(found)))
    assert json.loads(files["report.json"])["discrepancy"]["stars"][0]["outputs"][0]["upper"] is None


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.open, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_needs_nothing_else(repaired):
    files = render(repaired)
    html = files["report.html"].decode()
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert len(page.links) == 2
    for link, name in zip(page.links, ("ranges.png", "repair.png"), strict=True):
        head, data = link.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == files[name]
        assert files[name].startswith(PNG)
    assert not re.search(r"https?://|@import|url\(", html)
    assert "a <b>.onnx" in page.text  # escaped, not a tag
    assert "two boxes & more" in page.text
    assert at_most(repaired.verdict.upper) in page.text


def test_pictures_are_the_same_twice(repaired):
    one, two = render(repaired), render(repaired)
    assert one == two


def test_files_appear_all_or_none(tmp_path):
    with pytest.raises(TypeError):
        write_files(tmp_path / "out", {"a": b"whole", "b": "not bytes"})  # pyright: ignore
    assert list(tmp_path.iterdir()) == []
    write_files(tmp_path / "deep" / "out", {"a": b"1", "b": b"2"})
    write_files(tmp_path / "deep" / "out", {"a": b"3"})
    assert (tmp_path / "deep" / "out" / "a").read_bytes() == b"3"
    assert (tmp_path / "deep" / "out" / "b").read_bytes() == b"2"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(tr.TorchreachError, match=r"--output must name a folder, but .*file is a file"):
        check_folder(tmp_path / "file" / "out")
