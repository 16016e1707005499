"""The benchmarks run on small cases, and notice wrong counts and failing tools."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import torchreach as tr
from benchmarks import (
    accelerator,
    budgets,
    common,
    deployed,
    exact_acasxu,
    exact_mnist,
    growth,
    kernels,
    labels,
    launches,
    peers,
    solve,
    split_counts,
    table,
)
from tests.data import require_data
from tests.networks import from_arrays, random_network
from tests.simulated_device import WHY_NOT


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch):
    """Benchmarks set the number of threads of their process; the other tests keep theirs. Nor is there a warm-up."""
    monkeypatch.setitem(common.measure.__kwdefaults__, "warmup", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def report(path: Path) -> dict:
    return json.loads(path.read_text())


def test_measure_runs_the_warm_up_and_takes_the_median():
    pauses = iter([0.0, 0.05, 0.5, 0.0])

    def work() -> float:
        pause = next(pauses)
        time.sleep(pause)
        return pause

    last, timing = common.measure(work, repeats=3, warmup=1)
    assert last == 0.0
    assert len(timing.every_second) == 3
    assert 0.05 <= timing.seconds < 0.5
    assert timing.cpu_seconds < 0.05  # sleep is no work
    assert timing.peak_rss_mb > 1
    assert timing.peak_device_mb is None


def test_a_table_prints_every_column_whole(capsys):
    common.show(
        [{"case": "x" * 150, "n": 71930, "s": 0.12345}, {"case": "b", "n": None, "s": True}], ["case", "n", "s"], "T"
    )
    printed = capsys.readouterr().out
    assert "x" * 150 in printed
    assert "71,930" in printed
    assert "0.123" in printed


def test_unknown_case_names_are_refused():
    cases = [common.Case("a", {}, 1), common.Case("b", {}, 2)]
    assert common.choose(cases, ["b", "a"]) == cases[::-1]
    with pytest.raises(SystemExit, match="no case is called 'c'; there are: a, b"):
        common.choose(cases, ["c"])


def test_exact_acasxu_counts_as_recorded(tmp_path, capsys):
    require_data("exact", "acasxu.json")
    assert exact_acasxu.main(["--regions", "60", "--repeats", "1", "--json", str(tmp_path / "out.json")]) == 0
    rows = report(tmp_path / "out.json")["rows"]
    assert [(row["regions"], row["expected"]) for row in rows] == [(38, 38), (52, 52)]
    assert all(row["CPU s"] > 0 and row["veritex CPU s*"] > 0 for row in rows)
    assert "1_1 prop_1 centre 0.02" in capsys.readouterr().out


def test_exact_acasxu_notices_a_wrong_count_and_a_wrong_range():
    row = {"case": "x", "regions": 5, "expected": 5, "deviation": 1e-12}
    assert exact_acasxu.problems(row) == []
    assert exact_acasxu.problems(row | {"regions": 6}) == ["x: 6 regions, expected 5"]
    assert exact_acasxu.problems(row | {"deviation": 1e-3}) == ["x: the range deviates by 0.001 from the recorded one"]
    assert exact_acasxu.problems(row | {"expected": None}) == []


def test_exact_mnist_counts_as_recorded(tmp_path):
    require_data("fnn_repair", "scaling.json")
    out = tmp_path / "out.json"
    assert exact_mnist.main(["--case", "img3_p4_eps0.02", "--repeats", "1", "--warmup", "0", "--json", str(out)]) == 0
    (row,) = report(out)["rows"]
    assert (row["stars"], row["inputs"], row["status"]) == (5, 4, "exact")
    assert row["deviation"] < 1e-5


def test_exact_mnist_notices_a_budget_that_ended_too_early():
    row = {"case": "x", "stars": 5, "expected": 9, "status": "bounded", "deviation": None}
    assert exact_mnist.problems(row) == ["x: the budget ended after 5 stars"]
    assert exact_mnist.problems(row | {"expected": None}) == []
    assert exact_mnist.problems(row | {"status": "exact"}) == ["x: 5 stars, expected 9"]


def test_counts_agree_over_dtypes_bounds_and_methods(tmp_path):
    require_data("exact", "acasxu.json")
    out = tmp_path / "out.json"
    command = ["--case", "1_1 prop_1 centre 0.02", "--repeats", "1", "--method", "vertices", "programs"]
    assert split_counts.main([*command, "--json", str(out)]) == 0
    found = report(out)
    devices = 2 if torch.cuda.is_available() else 1
    assert len(found["rows"]) == 2 * 3 * 2 * devices
    assert {row["regions"] for row in found["rows"]} == {38}
    assert found["problems"] == []


def test_counts_that_differ_are_named():
    layer = {"name": "relu 1", "stars": 3, "splits": 2, "settled": {"vertices": 7}}
    row = {
        **{"case": "x", "device": "cpu", "dtype": "float64", "root bounds": "none", "method": "vertices"},
        **{"regions": 3, "layers": [layer]},
    }
    other = row | {"device": "cuda", "layers": [layer | {"splits": 4}]}
    said = "x: splits of relu 1: 4 (cuda, float64, none, vertices), 2 (cpu, float64, none, vertices)"
    assert split_counts.disagreements([row, other]) == [said]
    fewer = row | {"dtype": "float32", "layers": [layer | {"settled": {"vertices": 6}}]}
    (said,) = split_counts.disagreements([row, fewer])
    assert "neurons of relu 1 settled by vertices: 6 (cpu, float32, none, vertices), 7" in said
    # other root bounds settle other neurons, but leave the regions
    bounded = row | {"root bounds": "zonotope", "layers": [layer | {"settled": {"root": 7}}]}
    assert split_counts.disagreements([row, bounded]) == []
    assert len(split_counts.disagreements([row, bounded | {"regions": 4}])) == 1


def test_dense_merged_weights_give_the_difference():
    first, second = (peers.affine(random_network(seed, [3, 4, 5, 2])) for seed in (1, 2))
    x = torch.rand(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    difference = from_arrays(*first)(x) - from_arrays(*second)(x)
    torch.testing.assert_close(from_arrays(*peers.merged(first, second))(x), difference)


PEER = """
class FFNN:
    def __init__(self, model, exact_outputd):
        pass
    def compute_state(self, state):
        raise SystemExit("Hyperplane intersect with vertices!")
"""
CUBE = """
class CubeDomain:
    def __init__(self, lower, upper):
        pass
    def to_FVIM(self):
        return None
"""


def test_a_peer_that_ends_the_process_is_recorded_as_failed(tmp_path):
    require_data("exact", "acasxu.json")
    for folder, file, source in (("networks", "ffnn.py", PEER), ("sets", "cubedomain.py", CUBE)):
        path = tmp_path / "src" / "veritex" / folder / file
        path.parent.mkdir(parents=True)
        path.write_text(source)
    out = tmp_path / "out.json"
    case = "1_1 prop_1 centre 0.02"
    assert peers.main(["--veritex", str(tmp_path), "--case", case, "--repeats", "1", "--json", str(out)]) == 0
    ours, theirs = report(out)["rows"]
    assert (ours["tool"], ours["status"], ours["regions"]) == ("torchreach", "done", 38)
    assert theirs["status"] == "exit 1: Hyperplane intersect with vertices!"
    assert "CPU s" not in theirs


def test_a_peer_that_takes_too_long_is_ended_with_its_children(tmp_path):
    child = f"import time; time.sleep(1.5); open({str(tmp_path / 'alive')!r}, 'w')"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    ended = peers.run_once([sys.executable, "-c", parent], 1.0, None)
    assert ended == {"status": "not finished in 1 s"}
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


def test_the_outcome_of_a_peer_is_its_last_line():
    code = "print('so many stars'); print('{\"regions\": 3}')"
    assert peers.run_once([sys.executable, "-c", code], 60, None) == {"status": "done", "regions": 3}
    assert peers.run_once([sys.executable, "-c", "import os; os.abort()"], 60, None)["status"].startswith("signal 6: ")


def test_growth_counts_regions_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sweep", "width", "--largest", "32", "--repeats", "1"]
    files = ["--json", str(tmp_path / "growth.json"), "--picture", str(tmp_path / "growth.png")]
    assert growth.main([*options, *files]) == 0
    rows = json.loads((tmp_path / "growth.json").read_text())["rows"]
    assert [row["size"] for row in rows] == [16, 32]
    assert all(row["regions"] > 100 and row["CPU s"] > 0 for row in rows)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "How cost grows" in capsys.readouterr().out


def test_deployed_holds_against_the_kernels(tmp_path):
    require_data("fnn_repair", "mnist_fnn_s_quan.pth")
    out = tmp_path / "out.json"
    arguments = ["--images", "7", "--pixels", "4", "--samples", "200", "--seconds", "1", "--repeats", "1"]
    arguments += ["--json", str(out)]
    assert deployed.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["network"] for row in rows] == ["shipped"] * 2 + ["calibrated"] * 2
    assert all(row["sampled"] <= row["certified"] for row in rows)


def test_kernels_are_sampled_and_what_lies_outside_is_noticed():
    row = {"network": "x", "engine": "fbgemm", "outside": 2, "uncovered": ["fc1"]}
    assert kernels.problems(row) == [
        "x on fbgemm: 2 samples outside of the certified range",
        "x on fbgemm: unknown kernels at ['fc1']",
    ]
    assert kernels.problems(row | {"outside": 0, "uncovered": []}) == []
    g = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    small = kernels.int8(network, torch.rand(100, 3, generator=g))
    stars = tr.StarBatch.from_box(torch.full((1, 3), 0.6).double(), torch.full((1, 3), 0.65).double())
    args = SimpleNamespace(samples=200, chosen=100, seconds=5.0)
    found = kernels.measure("x", "here", network.double(), small, stars, args)
    assert (found["outside"], found["random"], found["chosen"]) == (0, 200, 100)
    assert 0 < found["attained"] <= found["certified"]
    assert found["largest"] <= found["certified"]


@pytest.mark.skipif(WHY_NOT is not None, reason=f"no simulated device: {WHY_NOT}")
def test_launches_are_counted_with_the_lines_that_issue_them(tmp_path, capsys):
    require_data("exact", "acasxu.json")
    out = tmp_path / "out.json"
    assert launches.main(["--case", "1_1 prop_1 centre 0.02", "--where", "--json", str(out)]) == 0
    (row,) = report(out)["rows"]
    assert row["regions"] == 38
    assert row["launches"] == sum(number for kind, *_, number in row["events"] if kind == "launch") > row["reads"] > 0
    assert "torchreach/sets/polytope.py:" in capsys.readouterr().out
    assert launches.problems(row | {"regions": 5}) == ["1_1 prop_1 centre 0.02: 5 regions, expected 38"]


def test_devices_are_compared_and_what_differs_is_noticed(tmp_path):
    require_data("exact", "acasxu.json")
    out = tmp_path / "out.json"
    assert accelerator.main(["--work", "reach", "--case", "3_7 prop_3 full", "--repeats", "1", "--json", str(out)]) == 0
    row = report(out)["rows"][0]
    assert (row["device"], row["units"]) == ("cpu", 107)
    here = accelerator.Outcome(5, (5,), torch.tensor([[1.0], [2.0]]))
    assert accelerator.differences("x", here, here) == []
    assert accelerator.differences("x", here, replace(here, exact=(6,))) == ["x: counts (6,), on the first (5,)"]
    assert accelerator.differences("x", here, replace(here, ends=here.ends + 1)) == ["x: intervals 1 apart"]
    searched = replace(here, exact=())
    other = replace(searched, units=7, ends=torch.tensor([[1.5], [1.8]]))
    assert accelerator.differences("x", searched, other) == []
    apart = replace(other, ends=torch.tensor([[2.5], [2.8]]))
    assert accelerator.differences("x", searched, apart) == ["x: intervals 0.5 apart"]


def test_deployed_notices_a_sample_outside_and_a_witness_that_fails():
    row = {"network": "x", "image": 1, "pixels": 4, "outside": 3, "replayed": False}
    assert deployed.problems(row) == [
        "x, image 1, 4 pixels: 3 samples outside of the certified range",
        "x, image 1, 4 pixels: a witness does not replay",
    ]
    assert deployed.problems(row | {"outside": 0, "replayed": True}) == []


def test_budgets_are_measured_and_what_is_late_or_wrong_is_noticed(capsys):
    assert budgets.main(["--path=search, signs", "--path=half, as executed", "--seconds", "0.05"]) == 0
    assert "| search, signs |" in capsys.readouterr().out
    row = {"path": "p", "asked s": 1.0, "taken s": 3.1, "lower": 1.0, "upper": 2.0, "sampled": 0.5}
    assert budgets.problems(row) == []
    assert budgets.problems(row | {"taken s": 3.3}) == ["p, 1 s: back after 3.3 s"]
    assert budgets.problems(row | {"lower": 2.5}) == ["p, 1 s: lower 2.5 above upper 2"]
    assert budgets.problems(row | {"sampled": 1.5}) == ["p, 1 s: a sample attains 1.5, more than the witness, 1"]
    assert len(budgets.problems(row | {"sampled": 2.5})) == 2


@pytest.mark.filterwarnings("ignore")
def test_an_answer_about_labels_that_samples_contradict_is_counted():
    g = torch.Generator().manual_seed(0)
    network = random_network(0, [3, 8, 4]).float()
    small = kernels.int8(network, torch.rand(100, 3, generator=g))
    x = torch.rand(30, 3, generator=g)
    found = tr.audit(network.double(), small, x)
    assert labels.wrong(network, small, x, 0.0, found, 2) == 0
    swapped = {tr.Answer.EQUIVALENT: tr.Answer.NOT_EQUIVALENT}
    lied = replace(found, answer=tuple(swapped.get(one, one) for one in found.answer))
    assert labels.wrong(network, small, x, 0.0, lied, 2) == found.count(tr.Answer.EQUIVALENT) > 0


def test_the_table_says_what_is_met(tmp_path, capsys, request):
    require_data("fnn_repair", "scaling.json")
    out = tmp_path / "out.json"
    rows = ["weights-0.02", "deployed-16", *(["cnn"] if request.config.getoption("--slow") else []), "mnist"]
    command = ["--rows", *rows, "--images", "7", "--seconds", "0.3", "--samples", "100", "--stars", "40"]
    assert table.main([*command, "--json", str(out)]) == 0
    found = [row for row in report(out)["rows"] if not row.get("summary")]
    assert list(dict.fromkeys(row["key"] for row in found)) == rows
    assert all(row["certified"] >= row["attained"] > 0 for row in found[:-1])
    assert found[-1]["image"] == "img3_p784_eps0.0005"
    assert "0 of 1" in capsys.readouterr().out


def test_a_row_of_the_table_counts_what_is_within_the_goal():
    rows = [{"ratio": ratio, "CPU s": 1.0} for ratio in (1.0, 1.1, 3.0)]
    line = table.summary(table.TABLE["weights-0.05"], rows)
    assert (line["now"], line["median"], line["met"]) == ("1 .. 3", 1.1, "2 of 3")
    faster = table.summary(table.TABLE["mnist"], [{"speed-up": 120.0, "CPU s": 1.0}, {"speed-up": 90.0, "CPU s": 2.0}])
    assert (faster["now"], faster["met"]) == ("90 .. 120", "1 of 2")
    row = {"certified": 1.0, "attained": 2.0, "outside": 3, "replayed": True}
    assert table.certified("0", row)["problems"] == ["image 0: 3 samples outside of the certified range"]


def test_solved_networks_are_certified_and_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "SAMPLES", 1000)
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    star = tr.StarBatch.from_box(-torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    row = solve.acasxu_row("small", original, tr.prune_weights(original, 0.3), star)
    assert row["outside"] == 0
    assert row["after"] < row["before"]
    assert row["after"] == pytest.approx(row["least"], abs=1e-6)
