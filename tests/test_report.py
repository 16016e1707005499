"""Reports: printed numbers never claim more than the certificate, files are whole, the schema holds."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import threading
from array import array
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from torch import nn

import torchreach as tr
from torchreach.app.console import Live, Log, live, print_discrepancy, print_reading, print_verdict, progress_line
from torchreach.app.inputs import InputSet
from torchreach.app.report.content import NetworkInfo, Report
from torchreach.app.report.page import html_page
from torchreach.app.report.provenance import Machine, bounds, file_hashes, stars_hash
from torchreach.app.report.report import render, report_dict
from torchreach.app.verdict import State, compare_verdict, regions, repair_verdict, star_status, worst_first
from torchreach.core.outward import at_least, at_most
from torchreach.core.repaired import RepairResult, RepairStep
from torchreach.core.results import Progress
from torchreach.core.terms import Kernels, Reason, Semantics, Status
from torchreach.verbs.equivalence import _within as answered

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    compressed = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    stars = tr.StarBatch.from_box(torch.tensor([[-1.0, -1], [0, 0]]).double(), torch.ones(2, 2).double())
    found = replace(tr.discrepancy(original, compressed, stars), reasons=(Reason.CLOSED,) * 2)
    sha = {"a <b>.onnx": "5" * 64}
    return Report(
        "compare",
        "torchreach compare 'a <b>.onnx' b.onnx",
        {
            "original": NetworkInfo.of("a <b>.onnx", original, sha256=sha),
            "compressed": NetworkInfo.of("b.onnx", compressed),
        },
        InputSet("box", "two boxes & more", stars, ("box 0", "box 1")),
        compare_verdict(found),
        found,
        original(stars.center).detach(),
        values={
            "compressed": tuple(
                torch.stack([network(x).diagonal() for x in found.witness]).detach()
                for network in (original, compressed)
            )
        },
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


def test_progress_is_one_line_on_a_terminal_and_now_and_then_a_line_in_a_log():
    low = torch.zeros(1, 1)
    lines: list[str] = []
    times = [0.0]
    log = Log("compare", lines.append, lambda: times[-1])

    def wait(seconds: float) -> bool:
        times.append(times[-1] + seconds)
        if len(times) in (3, 5):  # work that reports at times
            for done in range(len(times)):
                Live("compare", log.keep).stars(Progress(done, 0, low, low, low, low, 0.0))
        return len(times) > 9

    log.run(wait)
    assert times[1:] == [2, 6, 14, 30, 62, 122, 182, 242, 302]
    assert [text.split(" done")[0] for text in lines] == [
        *("compare: working, 2 s", "compare: 2 stars", "compare: working, 14 s", "compare: 4 stars"),
        *(f"compare: working, {seconds} s" for seconds in (62, 122, 182, 242)),
    ]
    seen = io.StringIO()
    with live(Console(file=seen, force_terminal=True, width=200), "compare") as line:
        line.stars(Progress(7, 0, low, low, low, low, 0.0))
        assert seen.getvalue() != ""


def test_long_steps_show_in_a_log_and_short_work_does_not(monkeypatch):
    low = torch.zeros(1, 1)
    seen = io.StringIO()
    monkeypatch.setattr("torchreach.app.console.FIRST", threading.TIMEOUT_MAX)
    with live(Console(file=seen), "compare") as line:  # over at once
        line.stars(Progress(7, 0, low, low, low, low, 0.0))
    assert seen.getvalue() == ""
    written = threading.Event()

    class Seen(io.StringIO):
        def write(self, text: str) -> int:
            written.set()
            return super().write(text)

    monkeypatch.setattr("torchreach.app.console.FIRST", 1e-3)
    seen = Seen()
    with live(Console(file=seen), "compare"):  # a step that reports nothing
        assert written.wait(60)
    assert seen.getvalue().startswith("compare: working, 0 s\n")


def test_progress_names_stars_and_interval():
    low, high = torch.tensor([[-2.0, -1.0]]), torch.tensor([[1.0, 1.5]])
    line = progress_line(Progress(1234, 56, low, high, low / 2, high / 2, 3.21))
    assert line == "1,234 stars done, 56 open, max |y1 - y2| in 1 .. 2, 3.2 s"
    line = progress_line(Progress(2, 3, low, high, low / 2, high / 2, 0.0, "branch"))
    assert line.startswith("2 branches done, 3 open")


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
        *("schema", "command", "command_line", "versions", "machine", "device", "dtype"),
        *("semantics", "kernels", "verdict", "settings"),
        *("networks", "input_set", "discrepancy", "repair", "timings"),
    }
    assert out["versions"]["torchreach"] == tr.__version__
    assert out["semantics"]["name"] == "float"
    assert (out["device"], out["dtype"]) == ("cpu", "float64")
    star = out["discrepancy"]["stars"][1]
    assert set(star) == {"label", "status", "reason", "max_lower", "max_upper", "outputs"}
    assert (star["status"], star["reason"]) == ("exact", "closed")
    entry = star["outputs"][2]
    assert set(entry) == {"output", "lower", "upper", "range_lower", "range_upper", "y1", "y2", "witness"}
    assert abs(entry["y1"] - entry["y2"]) == pytest.approx(entry["lower"], abs=1e-9)
    assert entry["upper"] == float(repaired.found.upper[1, 2])
    assert entry["witness"] == repaired.found.witness[1, 2].tolist()
    stats = out["discrepancy"]["stats"]
    assert set(stats) == {
        *("method", "root_bounds", "splits", "branches", "linear_programs", "output_programs", "fallback", "layers"),
    }
    assert stats["splits"] == sum(layer["splits"] for layer in stats["layers"])
    assert out["repair"]["satisfied"]
    assert [step["accuracy"] for step in out["repair"]["history"]] == [0.9, 0.95]
    assert set(out["timings"]) == {"date", "threads", "total", "discrepancy", "repair"}


def test_timings_alone_hold_what_differs_between_runs(report):
    found = replace(report.found, stats=replace(report.found.stats, seconds=9.0))
    later = report.date + timedelta(days=1)
    slower = replace(report, seconds=99.0, found=found, verdict=compare_verdict(found), date=later)
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
    assert "5" * 64 in page.text
    assert stars_hash(repaired.inputs.stars) in page.text
    assert repaired.machine.text in page.text
    assert repaired.date.isoformat(sep=" ", timespec="seconds") in page.text
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


# -- what happened, from typed fields ------------------------------------------------------------------------


def _ended(report, status, reasons, tolerance=None, **changes):
    """The report with other endings: upper ends twice as high where it is BOUNDED."""
    found = report.found
    bounded = torch.tensor([s is Status.BOUNDED for s in status])[:, None]
    changes = {"upper": torch.where(bounded, 2 * found.upper, found.upper), **changes}
    found = replace(found, status=status, reasons=reasons, **changes)
    return replace(report, found=found, verdict=compare_verdict(found, tolerance))


def _texts(report):
    """Everything that a person reads, by where it stands."""
    seen = io.StringIO()
    console = Console(file=seen, width=80)
    print_discrepancy(console, report.found, report.inputs.labels, tolerance=report.verdict.tolerance)
    print_reading(console, report.found)
    print_verdict(console, report.verdict)
    page = _Page()
    page.feed(html_page(report, {}))
    return {
        "terminal": " ".join(seen.getvalue().split()),
        "page": " ".join(page.text.split()),
        "json": json.dumps(report_dict(report)),
        "repr": repr(report.found),
    }


@pytest.mark.parametrize("kind", [Status, Semantics, Kernels, Reason])
def test_every_member_has_its_own_sentence(kind):
    sentences = [member.meaning for member in kind]
    assert all(len(sentence) > 15 for sentence in sentences)
    assert len(set(sentences)) == len(sentences)
    for member in kind:
        assert kind(member.value) is member
        assert member == member.value  # plain strings in JSON and CSV
        if kind is Reason:
            assert member.cure
            assert ("a larger budget narrows it" in member.cure) == (member is Reason.BUDGET)


@pytest.mark.parametrize("reason", list(Reason))
def test_undecided_advises_what_can_help_there(report, reason):
    open_ = (Status.BOUNDED,) * 2
    high = float(report.found.upper.max())
    told = _ended(report, open_, (reason,) * 2, tolerance=1.5 * high)
    assert told.verdict.state is State.UNDECIDED
    assert told.verdict.open
    texts = _texts(told)
    for other in Reason:
        for where in ("page", "terminal"):
            assert (other.meaning in texts[where]) == (other is reason), where
            assert (other.cure in texts[where]) == (other.cure == reason.cure), where
        assert (f"({other} 2)" in texts["repr"]) == (other is reason)
    assert f"BOUNDED ({reason})" in texts["terminal"]


def test_advice_is_about_the_stars_that_are_open(report):
    largest = report.found.max_upper
    first = int(largest.argmax())
    reasons = [Reason.ROUNDING, Reason.ROUNDING]
    reasons[first] = Reason.BUDGET
    tolerance = 1.9 * float(largest.max())  # between the two upper ends
    told = _ended(report, (Status.BOUNDED,) * 2, tuple(reasons), tolerance, lower=report.found.lower / 2)
    assert float(told.found.max_upper.min()) <= tolerance < float(told.found.max_upper.max())
    assert Reason.BUDGET.cure in told.verdict.text
    assert Reason.ROUNDING.cure not in told.verdict.text


def test_deployed_reports_have_no_words_of_float(report):
    told = _ended(
        report,
        (Status.EXACT,) * 2,
        (Reason.CLOSED,) * 2,
        semantics=Semantics.DEPLOYED_INT8,
        kernels=Kernels.SATURATING,
    )
    for where, text in _texts(told).items():
        assert Kernels.SATURATING in text, where
        for word in ("real arithmetic", "comes on top", "region", "float:", Kernels.EXACT.meaning):
            assert word not in text.replace('"regions":', ""), (where, word)
    assert f"{int(told.found.regions.sum())} cells" in told.verdict.text
    assert regions(told.found) == int(told.found.regions.sum())


def test_uncovered_kernels_are_named_and_never_certified(report, repaired):
    changes = {
        "semantics": Semantics.DEPLOYED_INT8,
        "kernels": Kernels.EXACT,
        "uncovered": ("layer 0 (fc1)", "layer 2"),
    }
    told = _ended(report, (Status.EXACT,) * 2, (Reason.CLOSED,) * 2, **changes)
    assert told.verdict.state is State.UNCOVERED
    assert not told.verdict.ok
    assert compare_verdict(told.found, 1e9).state is State.UNCOVERED
    assert compare_verdict(told.found, 0.0).state is State.EXCEEDED  # a witness is one whatever else is not covered
    for where, text in _texts(told).items():
        assert "certified" not in text.lower(), where
        assert "layer 0 (fc1)" in text, where
    after = replace(repaired.repaired.after, **changes)
    steps = (repaired.repaired.history[0], replace(repaired.repaired.history[1], discrepancy=after))
    verdict = repair_verdict(replace(repaired.repaired, history=steps), 0.25)
    assert (verdict.state, verdict.ok) == (State.UNCOVERED, False)
    assert "certified" not in verdict.text


def test_a_bound_that_meets_what_is_attained_is_not_called_open(report):
    """Other outputs, or the other end of the range, may be open where the largest difference is known."""
    found = replace(
        report.found, lower=report.found.upper, status=(Status.BOUNDED,) * 2, reasons=(Reason.ROUNDING,) * 2
    )
    assert star_status(found, 0) == "BOUNDED (rounding), largest known"
    assert "BOUNDED (rounding), largest known" in compare_verdict(found).text


def test_work_is_not_dropped(report):
    stats = replace(report.found.stats, branches=1234, output_programs=77, fallback="the architectures differ")
    told = replace(report, found=replace(report.found, stats=stats))
    for where, text in _texts(told).items():
        if where != "repr":
            for word in ("1234" if where == "json" else "1,234", "77", "the architectures differ"):
                assert word in text, (where, word)


def test_worst_first():
    lower = torch.tensor([0.0, 3.0, 0.5, 2.0])
    upper = torch.tensor([9.0, 4.0, 1.0, 8.0])
    assert worst_first(lower, upper, None) == [0, 3, 1, 2]
    assert worst_first(lower, upper, 1.0) == [1, 3, 0, 2]  # those that a witness shows to exceed it come first
    assert worst_first(torch.ones(3), torch.ones(3), None) == [0, 1, 2]


def test_rows_are_sorted_and_those_beyond_twenty_are_folded(report):
    found, copies = report.found, 15
    size = copies * len(report.inputs.labels)
    factor = torch.linspace(1, 2, size, dtype=torch.float64)[:, None]
    parts = ("lower", "upper", "range_lower", "range_upper")
    found = replace(
        found,
        **{name: getattr(found, name).repeat(copies, 1) * factor for name in parts},
        witness=found.witness.repeat(copies, *[1] * (found.witness.ndim - 1)),
        regions=found.regions.repeat(copies),
        status=found.status * copies,
        reasons=found.reasons * copies,
    )
    labels = tuple(f"<{i}>" for i in range(size))
    stars = report.inputs.stars.select(list(range(2)) * copies)
    inputs = replace(report.inputs, stars=stars, labels=labels)
    told = replace(report, found=found, inputs=inputs, verdict=compare_verdict(found), values={})
    page = _Page()
    page.feed(html_page(told, {}))
    order = [labels[s] for s in worst_first(found.max_lower, found.max_upper, None)]
    table = page.text.split("Per input star")[1].split("Every output")[0]
    assert re.findall(r"<\d+>", table) == order
    assert "10 more stars" in table
    assert table.index(order[19]) < table.index("10 more stars") < table.index(order[20])
    seen = io.StringIO()
    print_discrepancy(Console(file=seen, width=80), found, labels)
    assert re.findall(r"<\d+>", seen.getvalue()) == order[:20]
    assert max(map(len, seen.getvalue().splitlines())) <= 80


# -- what a report is about ----------------------------------------------------------------------------------


def test_csv_says_what_json_says(repaired):
    values = {**repaired.values, "repaired": tuple(value + 1 for value in repaired.values["compressed"])}
    files = render(replace(repaired, values=values))
    out = json.loads(files["report.json"])
    rows = list(csv.DictReader(io.StringIO(files["report.csv"].decode())))
    results = {"compressed": out["discrepancy"], "repaired": out["repair"]["after"]}
    wanted = [
        (network, s, star["label"], star["status"], star["reason"], row)
        for network, found in results.items()
        for s, star in enumerate(found["stars"])
        for row in star["outputs"]
    ]
    assert len(rows) == len(wanted) == 2 * repaired.found.lower.numel()
    for row, (network, s, label, status, reason, entry) in zip(rows, wanted, strict=True):
        assert (row["network"], row["star"], row["label"]) == (network, str(s), label)
        assert (row["status"], row["reason"], row["output"]) == (status, reason, str(entry["output"]))
        for key in ("lower", "upper", "range_lower", "range_upper", "y1", "y2"):
            assert float(row[key]) == entry[key]


def test_an_unknown_end_is_empty_in_csv(report):
    upper = report.found.upper.clone()
    upper[0, 1] = torch.inf
    files = render(replace(report, found=replace(report.found, upper=upper), values={}))
    rows = list(csv.DictReader(io.StringIO(files["report.csv"].decode())))
    assert [row["upper"] == "" for row in rows] == [False, True, False, False, False, False]
    assert all(row["y1"] == "" for row in rows)


def test_files_are_named_by_their_sha256(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert file_hashes(path) == {"net.onnx": known}
    (tmp_path / "net.onnx.data").write_bytes(b"")
    assert set(file_hashes(path)) == {"net.onnx", "net.onnx.data"}
    assert file_hashes(tmp_path / "none.onnx") == {}


def test_sets_are_named_by_their_numbers(report):
    """The digest by the words of its docstring, from plain lists."""
    stars = report.inputs.stars
    digest = hashlib.sha256()
    for name in ("basis", "A", "b", "lower", "upper"):
        value = getattr(stars, name)
        digest.update(f"{name} float64 {list(value.shape)}\n".encode())
        digest.update(array("d", value.flatten().tolist()).tobytes())
    assert stars_hash(stars) == digest.hexdigest()
    basis = stars.basis.clone()
    basis[0, 0, 0] += 1e-15
    assert stars_hash(replace(stars, basis=basis)) != stars_hash(stars)
    assert stars_hash(stars.select([0])) != stars_hash(stars)


def test_bounds_are_short_where_they_are_uniform(report):
    assert bounds(report.inputs.stars) == [
        {"lower": -1.0, "upper": 1.0, "is_the_set": True},
        {"lower": 0.0, "upper": 1.0, "is_the_set": True},
    ]
    low = torch.tensor([[0.0, 1.0, 0.0]]).double()
    assert bounds(tr.StarBatch.from_box(low, torch.ones(1, 3).double())) == [
        {"lower": [0.0, 1.0, 0.0], "upper": 1.0, "is_the_set": True}
    ]


def test_the_machine_is_read_where_the_system_tells(monkeypatch, tmp_path):
    for flags, vnni in (("fpu avx2", False), ("fpu avx512_vnni", True), ("fpu avx_vnni avx2", True)):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n")
        monkeypatch.setattr("torchreach.app.report.provenance.CPUINFO", tmp_path / "cpuinfo")
        machine = Machine.here(torch.device("cpu"))
        assert (machine.processor, machine.vnni) == ("Some CPU", vnni)
        assert machine.text.startswith(
            f"Some CPU ({torch.backends.cpu.get_cpu_capability()}, {'' if vnni else 'no '}VNNI)"
        )
    monkeypatch.setattr("torchreach.app.report.provenance.CPUINFO", tmp_path / "none")
    assert Machine.here(torch.device("cpu")).vnni is None


def test_repr_is_a_summary_and_results_compare_by_identity(report, repaired):
    found = report.found
    reached = tr.reach(nn.Sequential(nn.Linear(2, 3), nn.ReLU()).double(), report.inputs.stars)
    same = tr.equivalent(*_networks(), tr.StarBatch.from_box(torch.zeros(2), torch.ones(2)), 10.0)
    for result, first in (
        (found, "Discrepancy: 2 stars, 3 outputs, float64; float"),
        (reached, "ReachResult: 2 stars, 3 outputs, float64"),
        (same, "Equivalence (|y1 - y2| <= 10): 1 equivalent; float"),
        (repaired.repaired, "RepairResult: target met after 1 iteration, accuracy 95.00 %; float"),
    ):
        lines = repr(result).splitlines()
        assert lines[0].startswith(first)
        assert len(lines) <= 6
        assert max(map(len, lines)) <= 100
        assert "tensor" not in repr(result)
        assert result == result
        assert result != replace(result)
        assert len({result, result}) == 1
    assert at_most(float(found.upper.max())) in repr(found)
    assert "2 EXACT" in repr(found)


def test_equivalence_is_not_claimed_for_kernels_that_are_not_covered(report):
    found = replace(report.found, semantics=Semantics.DEPLOYED_INT8, kernels=Kernels.EXACT)
    for uncovered, answer in (((), tr.Answer.EQUIVALENT), (("fc1",), tr.Answer.UNKNOWN)):
        same = answered(replace(found, uncovered=uncovered), 1e9)
        assert same.answer == (answer,) * 2
        assert (same.semantics, same.kernels, same.uncovered) == (found.semantics, found.kernels, uncovered)
        assert Kernels.EXACT in repr(same)
    refuted = answered(replace(found, uncovered=("fc1",)), 0.0)
    assert refuted.answer == (tr.Answer.NOT_EQUIVALENT,) * 2
    assert "not covered: kernels of fc1" in repr(refuted)
