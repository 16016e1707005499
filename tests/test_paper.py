"""The paper's experiment: its tables, pictures and checks on made-up results, and its networks and input sets."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

import torchreach as tr
from benchmarks import paper, paper_report
from benchmarks import paper_networks as networks
from tests.data import require_data

pytestmark = pytest.mark.filterwarnings("ignore")  # torch announces the end of its eager-mode quantisation


def certificate(size: float, images: int = 2) -> dict[str, Any]:
    return {
        "semantics": "deployed int8",
        "status": ["exact"] * images,
        "maximum": [size] * images,
        "attained": [size] * images,
        "mean of midranges": [size / 4] * images,
        "range lower": [[-size] * 10] * images,
        "range upper": [[size / 2] * 10] * images,
    }


def results() -> dict[str, Any]:
    """What a good run of two images could give."""
    pairs = {}
    for kind in ("published", *paper.COMPRESSIONS):
        accuracy = {"original": 97.1, "compressed": 90.6, "repaired": 97.05}
        pairs[kind] = {
            "table 1": [
                {
                    "network": f"{kind} {name}",
                    "parameters": 1000,
                    "zero weights": 3,
                    "size KB": 12.3,
                    "accuracy": value,
                }
                for name, value in accuracy.items()
            ],
            "labels": [0, 1],
            "scores": [[float(n) for n in range(10)]] * 2,
            "before": certificate(8.0),
            "after": certificate(0.25),
            "satisfied": True,
            "iteration": 2,
            "history": [{"seconds": 1.0}],
            "kernels before": {"samples": 10, "outside": 0, "largest share of the bound": 0.9},
            "kernels after": {"samples": 10, "outside": 0, "largest share of the bound": 0.9},
            "zeros kept": True,
            "held out": {"before": [9.0, 8.0], "after": [0.3, 0.2]},
            "reloaded": {"after": certificate(0.25), "accuracy": 97.05},
        }
    side = {"itself": [0.0], "weights": [0.1], "rounding": [0.2], "both": [0.25], "holds": True}
    steps = [
        {"iteration": i, "maximum": m, "mean": m, "accuracy": 90.0 + i} for i, m in enumerate((8.0, 3.0, 4.0, 1.0))
    ]
    curves = [
        {"kind": kind, "alpha": alpha, "step": "pointwise", "images": 2, "history": steps}
        for kind in ("published", "pruned")
        for alpha in (2.0, 20.0)
    ]
    return {"pairs": pairs, "triangle": [{"network": "shipped", **side}], "curves": curves}


RECORDED = [
    {
        "published_mean_before": 0.5,
        "published_setup_range": {"lower": [-9.0] * 4 + [1.0] * 6, "upper": [5.0] * 10},
        "exact_dequantised": {"mean_of_midranges": 0.02},
    }
] * 2


def test_a_good_run_has_no_problems_and_each_fault_is_noticed():
    good = results()
    assert paper_report.problems(good) == []

    def after(*path_and_value: Any) -> list[str]:
        bad = copy.deepcopy(good)
        *path, last, value = path_and_value
        place: Any = bad
        for key in path:
            place = place[key]
        place[last] = value
        return paper_report.problems(bad)

    one = ("pairs", "published")
    assert "3 sampled outputs outside" in after(*one, "kernels after", "outside", 3)[0]
    assert "read from its file" in after("pairs", "int4", "reloaded", "after", "maximum", [0.25, 0.26])[0]
    assert "pruned weight came back" in after("pairs", "pruned", "zeros kept", False)[0]
    assert after("pairs", "int8", "zeros kept", False) == []  # zeros of rounding may move
    assert "triangle" in after("triangle", 0, "holds", False)[0]
    assert "triangle" in after("triangle", 0, "itself", [0.05])[0]
    assert "known 90.6" in after(*one, "table 1", 1, "accuracy", 90.7)[0]
    assert "0.1 points below" in after(*one, "table 1", 2, "accuracy", 96.9)[0]
    assert "two thirds" in after(*one, "before", "maximum", [0.3, 30.0])[0]
    assert "fell less than ten times" in after(*one, "before", "maximum", [2.0, 2.0])[0]
    assert "held-out" in after(*one, "held out", "after", [1.0, 1.0])[0]
    short = copy.deepcopy(good)
    short["pairs"]["published"]["held out"]["after"] = [1.0, 1.0]
    assert paper_report.problems(short, quick=True) == []


def test_table_2_counts_labels_that_the_published_range_does_not_contain():
    rows = paper_report.table_2(results()["pairs"]["published"], RECORDED)
    # certified [-8, 4]: four labels inside [-9, 5], six outside of [1, 5]
    assert [row["labels missed"] for row in rows] == [6, 6]
    assert rows[0]["published before"] == 0.5
    assert (rows[0]["maximum before"], rows[0]["after"]) == (8.0, 0.0625)


def test_tables_go_between_the_marks_of_the_page(tmp_path):
    found = results() | {"table 2": paper_report.table_2(results()["pairs"]["published"], RECORDED)}
    text = paper_report.tables(found)
    for line in ("| the paper's networks, int8: repaired | 1,000 | 3 | 12 | 97.05 |", "| mean | 0.5 | 0.02 |"):
        assert line in text
    page = tmp_path / "README.md"
    page.write_text(f"before\n{paper_report.MARKS[0]}\nold\n{paper_report.MARKS[1]}\nafter\n")
    paper_report.fill(page, text)
    paper_report.fill(page, text)
    written = page.read_text()
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert written.count("**Table II**") == 1
    assert "old" not in written
    bare = tmp_path / "other.md"
    bare.write_text("no marks")
    paper_report.fill(bare, text)
    assert bare.read_text() == "no marks"


def test_lines_show_the_network_that_repair_would_return():
    history = results()["curves"][0]["history"]
    assert paper_report.kept(history, "mean") == [8.0, 3.0, 3.0, 1.0]
    assert paper_report.kept(history, "accuracy") == [90.0, 91.0, 91.0, 93.0]


def test_pictures_are_drawn(tmp_path):
    paper_report.draw(results(), tmp_path)
    for name in ("fig2.png", "fig3.png", "fig4.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_numbers_are_written_with_seven_digits():
    assert json.dumps(paper_report.rounded({"a": (0.123456789, 3, None), "b": [True, "x"]})) == (
        '{"a": [0.1234568, 3, null], "b": [true, "x"]}'
    )


def small(seed: int = 0) -> networks.Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return networks.Classifier((784, 8, 10)).eval()


def grey(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 784, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_conversion_keeps_names_so_that_its_file_loads_with_the_float_network(tmp_path):
    network = small()
    module = networks.deployed(network, grey(50))
    assert networks.parameters(module) == networks.parameters(network) == 784 * 8 + 8 + 8 * 10 + 10
    assert networks.saved(module, tmp_path / "int8.pth") < networks.saved(network, tmp_path / "float.pth")
    again = tr.load_int8(tmp_path / "int8.pth", small(1))
    assert torch.equal(again(grey(20, 1)), module(grey(20, 1)))
    assert float((network(grey(20, 1)) - module(grey(20, 1))).abs().max()) < 0.1
    # black lies on the grid, not half way between two codes
    assert float(module.quant(torch.tensor([-1.0])).dequantize()) == pytest.approx(-1, abs=1e-6)
    pruned = networks.deployed(tr.prune_weights(network, 0.8), grey(9))
    zeros = sum(int((codes == 0).sum()) for codes in paper.weights(pruned))
    assert zeros >= 0.8 * (784 * 8 + 80)


def test_input_sets_move_four_centre_pixels():
    sets = networks.stars(torch.zeros(3, 784, dtype=torch.float64))
    low, high, is_box = sets.bounding_box()
    assert bool(is_box.all())
    moved = ((high - low) > 0).reshape(3, 28, 28)
    assert int(moved.sum()) == 12
    assert bool(moved[:, 13:15, 13:15].all())
    torch.testing.assert_close(high.max(), torch.tensor(0.05, dtype=torch.float64))


def test_held_out_pictures_are_none_of_the_ten():
    require_data("fnn_repair", "images.npy")
    ten, labels = networks.ten_images()
    assert labels.tolist() == list(range(10))
    data = networks.Pictures(grey(1), labels[:1], torch.cat((ten.float(), grey(12))), torch.zeros(22).long())
    fresh = networks.held_out(data, 12)
    assert fresh.shape == (12, 784)
    assert not bool((fresh[:, None] == ten).all(2).any())


def test_certificate_as_table_and_sampled_outputs_outside_of_it(monkeypatch):
    require_data("fnn_repair", "images.npy")
    network = small()
    module = networks.deployed(network, torch.cat((grey(50), networks.ten_images()[0].float())))
    monkeypatch.setattr(paper, "pair", lambda *_: (network, module))
    settings = paper.Settings(images=2, samples=200)
    found = tr.discrepancy(network, module, paper.stars(settings))
    row = paper.described(found)
    assert row["semantics"] == "deployed int8"
    low, high = torch.tensor(row["range lower"]), torch.tensor(row["range upper"])
    torch.testing.assert_close(torch.tensor(row["maximum"]), torch.maximum(high, -low).amax(1))
    torch.testing.assert_close(torch.tensor(row["mean of midranges"]), ((low + high) / 2).abs().mean(1))
    kernels = paper.outside("published", settings, module, found)
    assert kernels["samples"] == 400
    assert kernels["outside"] == 0
    assert 0.3 < kernels["largest share of the bound"] <= 1 + 1e-6
    other = networks.deployed(small(1), grey(50))
    assert paper.outside("published", settings, other, found)["outside"] > 0


@pytest.mark.slow
def test_smoke_run(tmp_path):
    require_data("mnist")
    assert paper.main(["--quick", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["problems"] == []
    assert set(report["pairs"]) == {"published", *paper.COMPRESSIONS}
