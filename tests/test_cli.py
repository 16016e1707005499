"""The command line: exit statuses, one clear line for bad input, nothing half-written."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import torchreach as tr
from torchreach.app.cli import app
from torchreach.read.save import save

pytestmark = pytest.mark.usefixtures("no_log")
BOX = "-1,1;-1,1;0,0.5"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing them is most of the time of a run this small; the tests of reports and of the demonstration draw them."""
    for name in ("pictures.ranges_picture", "pictures.history_picture", "attribution.attribution_picture"):
        monkeypatch.setattr(f"torchreach.app.report.{name}", lambda _: b"not drawn")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two small networks as .onnx files, one its nearly equal copy, and one with other inputs."""
    folder = tmp_path_factory.mktemp("networks")
    generator = torch.Generator().manual_seed(0)
    original = _network(3, generator)
    compressed = _network(3, generator)
    compressed.load_state_dict({k: (v * 64).round() / 64 for k, v in original.state_dict().items()})
    for name, network in (("a", original), ("b", compressed), ("other", _network(4, generator))):
        save(network, folder / f"{name}.onnx", (network[0].in_features,))
    (folder / "corrupt.onnx").write_bytes(b"not a network")
    np.save(folder / "x.npy", np.array([0.0, 0.5, 0.2]))
    np.save(folder / "nan.npy", np.array([0.0, np.nan, 0.2]))
    np.save(folder / "short.npy", np.zeros(2))
    np.save(folder / "mask.npy", np.array([1, 0, 1]))
    np.save(folder / "two.npy", np.array([[0.0, 0.5, 0.2], [0.3, -0.5, 0.1]]))
    return folder


def _network(inputs, generator):
    network = nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return network


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def compare(files, *args, b="b.onnx"):
    return run("compare", files / "a.onnx", files / b, *args)


def test_help_names_every_command_and_option():
    text = run("--help").output
    for command in ("demo", "compare", "equivalent", "audit", "attribute", "repair"):
        assert command in text
    for command, options in (
        ("compare", "--box --vnnlib --center --eps --tolerance --seconds --memory --output --device"),
        ("repair", "--target --target-max --alpha --iterations --seed --save"),
        ("demo", "--data --root --bits --prune --images --seed"),
    ):
        text = run(command, "--help").output
        assert all(option in text for option in options.split())


def test_version_and_no_arguments():
    import torchreach

    assert run("--version").output == f"torchreach {torchreach.__version__}\n"
    assert "Usage" in run().output
    assert run().exit_code == 0


def test_interval_without_tolerance_is_reported(files):
    result = compare(files, "--box", BOX)
    assert result.exit_code == 0
    last = result.stdout.strip().splitlines()[-1]
    assert last.startswith("certified: |y1 - y2| <= ")
    assert "EXACT" in last
    assert "regions" in last
    assert result.stderr == ""  # no terminal, no progress


def test_methods_agree_and_are_named_in_the_report(files, tmp_path):
    upper = {}
    for method, used in (("auto", "vertices"), ("exact", "vertices"), ("search", "inputs"), ("programs", "programs")):
        folder = tmp_path / method
        result = compare(files, "--box", BOX, "--method", method, "--output", folder)
        assert result.exit_code == 0
        last = result.stdout.strip().splitlines()
        assert any(line.startswith("certified: ") and "EXACT" in line for line in last)
        assert any("branch" in line for line in last) == (method == "search")
        written = json.loads((folder / "report.json").read_text())
        assert written["settings"]["method"] == method
        assert written["discrepancy"]["stats"]["method"] == used
        upper[method] = max(star["max_upper"] for star in written["discrepancy"]["stars"])
    assert max(upper.values()) - min(upper.values()) < 1e-6


def test_a_repair_does_not_search(files):
    result = run("repair", files / "a.onnx", files / "b.onnx", "--box", BOX, "--method", "search")
    assert result.exit_code == 2
    assert "--method of a repair must be one of auto, exact, vertices, programs, got 'search'" in result.stderr


def test_a_repair_solves_and_says_so(files, tmp_path):
    options = ("--box", BOX, "--by", "solve", "--target", 0.9, "--save", tmp_path / "c.onnx", "--output", tmp_path)
    result = run("repair", files / "a.onnx", files / "b.onnx", *options)
    assert result.exit_code == 0, result.output
    history = json.loads((tmp_path / "report.json").read_text())["repair"]["history"]
    assert [step["method"] for step in history] == ["given", "solved"]
    again = compare(files, "--box", BOX, "--tolerance", 1.001 * history[-1]["max_upper"], b=tmp_path / "c.onnx")
    assert again.exit_code == 0, again.output
    wrong = run("repair", files / "a.onnx", files / "b.onnx", "--box", BOX, "--by", "luck")
    assert wrong.exit_code == 2
    assert "--by must be one of retrain, solve, auto, got 'luck'" in wrong.stderr


def test_exit_status_follows_the_tolerance(files):
    within = compare(files, "--box", BOX, "--tolerance", 1)
    assert within.exit_code == 0
    assert "within tolerance 1" in within.stdout
    exceeded = compare(files, "--box", BOX, "--tolerance", 1e-6)
    assert exceeded.exit_code == 1
    assert "exceeds tolerance 1e-06" in exceeded.stdout
    assert "x  = [" in exceeded.stdout
    assert "y1 = [" in exceeded.stdout
    assert "y2 = [" in exceeded.stdout


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's older exporter announces the newer one
def test_a_half_precision_file_is_certified_as_it_is_executed(files, tmp_path):
    network = tr.load(files / "a.onnx")
    half = copy.deepcopy(network).half()
    torch.onnx.export(half, (torch.zeros(1, 3).half(),), tmp_path / "half.onnx", dynamo=False)
    result = compare(files, "--box", BOX, "--output", tmp_path / "out", b=tmp_path / "half.onnx")
    assert result.exit_code == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["semantics"]["name"] == "as executed in float16"
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2000, 3, generator=g) * torch.tensor([2.0, 2.0, 0.5]) - torch.tensor([1.0, 1.0, 0.0])
    with torch.no_grad():
        off = (network.double()(x.double()) - half(x.half()).double()).abs().amax()
    assert 2.0**-13 < off <= found["discrepancy"]["max_upper"]


def test_tolerance_inside_the_interval_is_undecided(files, tmp_path):
    args = ("--box", BOX, "--seconds", 1e-9, "--output", tmp_path / "out")
    assert compare(files, *args).exit_code == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())["discrepancy"]
    assert found["max_lower"] < found["max_upper"]
    result = compare(
        files, "--box", BOX, "--seconds", 1e-9, "--tolerance", (found["max_lower"] + found["max_upper"]) / 2
    )
    assert result.exit_code == 1
    assert "undecided" in result.stdout
    assert "BOUNDED" in result.stdout


def test_input_sets_agree(files, tmp_path):
    """The same set said in several ways has the same discrepancy."""
    bounds = [[-0.1, 0.1], [0.5, 0.5], [0.1, 0.3]]
    (tmp_path / "box.json").write_text(json.dumps(bounds))
    np.save(tmp_path / "box.npy", np.array(bounds))
    np.savetxt(tmp_path / "box.csv", np.array(bounds), delimiter=",")
    names = "".join(f"(declare-const X_{i} Real)" for i in range(3))
    rows = "".join(f"(assert (>= X_{i} {low}))(assert (<= X_{i} {up}))" for i, (low, up) in enumerate(bounds))
    (tmp_path / "box.vnnlib").write_text(names + "(declare-const Y_0 Real)(declare-const Y_1 Real)" + rows)
    sets = [
        ("--box", "-0.1,0.1; 0.5,0.5; 0.1,0.3"),
        ("--box", tmp_path / "box.json"),
        ("--box", tmp_path / "box.npy"),
        ("--box", tmp_path / "box.csv"),
        ("--vnnlib", tmp_path / "box.vnnlib"),
        ("--center", files / "x.npy", "--eps", 0.1, "--mask", files / "mask.npy"),
    ]
    lasts = [compare(files, *s).stdout.splitlines()[-1].split(" for every input")[0] for s in sets]
    assert len(set(lasts)) == 1, lasts


def test_several_inputs_get_a_star_each(files, tmp_path):
    result = compare(files, "--center", files / "two.npy", "--eps", 0.1, "--output", tmp_path / "out")
    assert result.exit_code == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [star["label"] for star in found["discrepancy"]["stars"]] == ["input 0", "input 1"]


def test_float32_contains_float64(files, tmp_path):
    found = {}
    for dtype in ("float32", "float64"):
        out = tmp_path / dtype
        compare(
            files,
            "--center",
            files / "x.npy",
            "--eps",
            0.1,
            "--clip",
            "-1,1",
            "--dtype",
            dtype,
            "--output",
            out,
        )
        report = json.loads((out / "report.json").read_text())
        assert report["dtype"] == dtype
        found[dtype] = report["discrepancy"]["max_upper"]
    assert found["float64"] <= found["float32"] < found["float64"] + 1e-5


def test_fixed_inputs_cost_no_variable_in_float32(files, tmp_path):
    box = ("--box", "-0.1,0.1; 0.1,0.1; 0.3,0.3", "--dtype", "float32", "--output", tmp_path / "out")
    assert compare(files, *box).exit_code == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["input_set"]["variables"] == 1


def _bad(files):
    f = files
    a_b = (f / "a.onnx", f / "b.onnx")
    box = ("--box", BOX)
    return {
        "missing network": ((f / "none.onnx", f / "b.onnx", *box), "no such file: "),
        "corrupt onnx": ((f / "corrupt.onnx", f / "b.onnx", *box), "is not a readable ONNX file"),
        "unknown kind": ((f / "x.npy", f / "b.onnx", *box), "must end in .onnx, .tflite or .pt2"),
        "unknown option": ((*a_b, *box, "--tolerence", "1"), "No such option: --tolerence"),
        "missing argument": ((f / "a.onnx",), "Missing argument 'B'"),
        "not a number": ((*a_b, *box, "--tolerance", "x"), "Invalid value for '--tolerance'"),
        "two sets": (
            (*a_b, *box, "--center", f / "x.npy", "--eps", "0.1"),
            "exactly one input set is required (--box, --vnnlib or --center with --eps), got --box and --center",
        ),
        "no set": (a_b, "exactly one input set is required"),
        "eps without center": ((*a_b, *box, "--eps", "1"), "belong to --center, got --box"),
        "center without eps": ((*a_b, "--center", f / "x.npy"), "--center needs --eps"),
        "negative eps": (
            (*a_b, "--center", f / "x.npy", "--eps", "-1"),
            "--eps must be a finite number >= 0, got -1.0",
        ),
        "box size": ((*a_b, "--box", "0,1;0,1"), "--box must give bounds for 3 inputs, as the networks do, got 2"),
        "box order": (
            (*a_b, "--box", "0,1;2,1;0,1"),
            "--box: lower must not exceed upper, got 2 > 1 for input 1",
        ),
        "box grammar": ((*a_b, "--box", "0,1;2;0,1"), "pair 1 is '2'"),
        "box infinite": ((*a_b, "--box", "0,1;0,inf;0,1"), "--box must be finite, got inf at index [1, 1]"),
        "box file": ((*a_b, "--box", f / "x.npy"), "--box must have shape [inputs, 2], got [3]"),
        "no box file": ((*a_b, "--box", "gone.json"), "--box: no such file: gone.json"),
        "nan": ((*a_b, "--center", f / "nan.npy", "--eps", "0.1"), "must be finite, got nan at index [0, 1]"),
        "center size": (
            (*a_b, "--center", f / "short.npy", "--eps", "0.1"),
            "--center must hold 3 values per input, as the networks do, got shape [2]",
        ),
        "center outside clip": (
            (*a_b, "--center", f / "x.npy", "--eps", "0.1", "--clip", "0,0.3"),
            "must lie within --clip 0,0.3",
        ),
        "corrupt center": (
            (*a_b, "--center", f / "a.onnx", "--eps", "0.1"),
            "must end in .json, .npy, .csv, got '.onnx'",
        ),
        "no vnnlib": ((*a_b, "--vnnlib", "gone.vnnlib"), "no such file: gone.vnnlib"),
        "device": ((*a_b, *box, "--device", "tpu"), "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        "no such cuda": ((*a_b, *box, "--device", "cuda:99"), "--device cuda:99: this machine has"),
        "dtype": ((*a_b, *box, "--dtype", "int8"), "--dtype must be one of float32, float64, got 'int8'"),
        "method": ((*a_b, *box, "--method", "magic"), "--method must be one of auto, exact, search, vertices"),
        "seconds": ((*a_b, *box, "--seconds", "0"), "--seconds must be positive, got 0"),
        "memory": ((*a_b, *box, "--memory", "2 gigs"), "--memory must be a positive size such as 2GB"),
        "tolerance": ((*a_b, *box, "--tolerance", "-1"), "--tolerance must be a number >= 0, got -1"),
        "other inputs": ((f / "a.onnx", f / "other.onnx", *box), "inputs of shape (3,): it takes 4 numbers"),
    }  # fmt: skip


CASES = list(_bad(__import__("pathlib").Path()))


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gives_one_line_and_leaves_nothing(files, tmp_path, case):
    args, message = _bad(files)[case]
    result = run("compare", *args, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("torchreach: error: ")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def equivalent(files, *args, b="b.onnx"):
    return run("equivalent", files / "a.onnx", files / b, *args)


def test_equivalence_is_answered_by_exit_status_and_witness(files, tmp_path):
    yes = equivalent(files, "--box", BOX, "--epsilon", 0.5, "--output", tmp_path / "out")
    assert yes.exit_code == 0, yes.output
    assert yes.stdout.splitlines()[-1].startswith("equivalent: certified |y1 - y2| <= 0.5 for every input, at most ")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["answer"], report["settings"]["epsilon"]) == ("equivalent", 0.5)
    assert report["stars"][0]["upper"] <= 0.5
    no = equivalent(files, "--box", BOX, "--epsilon", 1e-6)
    assert no.exit_code == 1
    assert no.stdout.splitlines()[-1].startswith("not equivalent: |y1 - y2| >= ")
    x, y1, y2 = (
        torch.tensor(json.loads(no.stdout.split(f"{name} = ")[1].split("\n")[0])) for name in ("x ", "y1", "y2")
    )
    assert float((y1 - y2).abs().max()) > 1e-6
    assert x.shape == (3,)


def test_labels_are_compared(files):
    point = ("--center", files / "two.npy", "--eps", 0)
    same = equivalent(files, *point, "--top1", b="a.onnx")
    assert same.exit_code == 0, same.output
    assert "equivalent: certified the same label for every input (float, 2 stars" in same.stdout
    save(_negated(files / "a.onnx"), files / "negated.onnx", (3,))
    other = equivalent(files, *point, "--top1", b="negated.onnx")
    assert other.exit_code == 1
    assert "not equivalent: the labels differ at an input of star 0, 2 stars in all" in other.stdout


def test_labels_are_compared_where_the_original_is_sure(files, tmp_path):
    found = equivalent(files, "--box", BOX, "--top1", "--confidence", 0.99, "--output", tmp_path)
    assert found.exit_code == 0, found.output
    last = found.stdout.splitlines()[-1]
    assert last.startswith("equivalent: certified the same label wherever the original is sure to 0.99 for every input")
    assert "the original is nowhere as sure of a label as was asked for" in last
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["confidence"], report["stars"][0]["reason"]) == (0.99, "nowhere sure")


def audit(files, *args, b="b.onnx"):
    return run("audit", files / "a.onnx", files / b, *args)


def test_a_test_set_is_audited(files, tmp_path):
    np.save(tmp_path / "y.npy", np.array([0, 1]))
    data = ("--data", files / "two.npy")
    found = audit(files, *data, "--labels", tmp_path / "y.npy", "--output", tmp_path / "out")
    assert found.exit_code == 0, found.output
    assert found.stdout.splitlines()[-1].startswith(
        "the same label certified on 2 of 2 inputs, 0 differ, 0 open (float, "
    )
    assert "accuracy, original" in found.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["counts"]["equivalent"] == 2
    assert report["accuracy"]["original"] == report["accuracy"]["compressed"]
    assert len(report["inputs"]) == 2
    assert report["inputs"][0]["upper"] <= report["max_difference"]["upper"]
    assert len(report["test_set"]["data"]["two.npy"]) == 64
    ball = audit(files, *data, "--eps", 0.001, "--clip=-1,1", "--seconds", 5)
    assert "on 2 of 2 inputs and all within 0.001" in ball.stdout.splitlines()[-1]
    save(_negated(files / "a.onnx"), files / "negated.onnx", (3,))
    other = audit(files, *data, b="negated.onnx")
    assert other.exit_code == 1
    assert "on 0 of 2 inputs, 2 differ, 0 open" in other.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--data", "gone.npy"), "--data: no such file: gone.npy"),
        (("--data", "{}/a.onnx"), "must end in .json, .npy, .csv, got '.onnx'"),
        (("--data", "{}/short.npy"), "--data must hold 3 values per input"),
        (("--data", "{}/nan.npy"), "must be finite"),
        (("--data", "{}/two.npy", "--labels", "{}/x.npy"), "--labels must be one number for each of 2 inputs, got 3"),
        (("--data", "{}/two.npy", "--labels", "{}/halves.npy"), "must hold whole numbers"),
        (("--data", "{}/two.npy", "--eps", "-1"), "--eps must be a finite number >= 0, got -1"),
        (("--data", "{}/two.npy", "--clip", "0,1"), "--clip belongs to --eps"),
        (("--data", "{}/two.npy", "--eps", "1", "--clip", "0,1"), "must lie within --clip 0,1"),
        (("--data", "{}/two.npy", "--confidence", "1"), "--confidence must lie between 0 and 1, both excluded, got 1"),
    ],
)
def test_bad_audits(files, args, message):
    np.save(files / "halves.npy", np.array([0.5, 1.0]))
    result = audit(files, *(str(arg).format(files) for arg in args))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_file_that_ends_in_a_softmax_of_codes_is_audited(tmp_path):
    from tests.test_labels import ended_chain

    path = tmp_path / "chain.tflite"
    path.write_bytes(ended_chain(0))
    network = tr.load(path)
    np.save(tmp_path / "x.npy", np.zeros((2, *network.shape), dtype=np.float32))
    result = run("audit", path, path, "--data", tmp_path / "x.npy", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    same = run("equivalent", path, path, "--center", tmp_path / "x.npy", "--eps", 0, "--top1")
    assert same.exit_code == 0, same.output
    assert "fixed-point multipliers" in result.stdout.splitlines()[-1]


def _negated(path):
    from torchreach.read.load import load

    network = load(path)
    with torch.no_grad():
        for parameter in network[-1].parameters():
            parameter.neg_()
    return network


def attribute(files, *args, b="b.onnx"):
    return run("attribute", files / "a.onnx", files / b, *args)


def test_attribute_says_what_each_layer_makes_and_which_to_keep(files, tmp_path):
    plain = attribute(files, "--box", BOX)
    assert plain.exit_code == 0
    rows = [line.split() for line in plain.stdout.splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("0", "2")] == ["0", "2"]
    saved, folder = tmp_path / "mixed.onnx", tmp_path / "out"
    kept = attribute(files, "--box", BOX, "--keep-float", 0.0, "--save", saved, "--output", folder)
    assert kept.exit_code == 0
    last = kept.stdout.splitlines()[-1]
    assert last == "within 0: |y1 - y2| <= 0 certified with 2 layers of the original kept: 0, 2"
    x = torch.tensor([[0.1, -0.4, 0.3]])
    assert torch.equal(tr.load(saved)(x), tr.load(files / "a.onnx")(x))
    report = json.loads((folder / "report.json").read_text())
    assert report["kept"]["layers"] == [layer["name"] for layer in report["layers"]] == ["0", "2"]
    assert report["layers"][0]["alone"]["upper"][0] >= report["layers"][0]["sampled_max"] > 0
    assert (folder / "attribution.png").exists()
    some = attribute(files, "--box", BOX, "--keep-float", 10.0)
    assert "with 0 layers of the original kept: none" in some.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--keep-float", "-1"], "--keep-float must be a number >= 0, got -1"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--save", "mixed.onnx"], "--save belongs to --keep-float"),
        (["--keep-float", "1", "--save", "mixed.txt"], "a network is saved as .onnx or .pt2, got '.txt'"),
    ],
)
def test_attribute_refuses_what_it_cannot_do(files, args, message):
    result = attribute(files, "--box", BOX, *args)
    assert result.exit_code == 2
    assert message in result.stderr
    same = attribute(files, "--box", BOX, b="a.onnx")
    assert (same.exit_code, "no difference to attribute" in same.stderr) == (2, True)


def test_unknown_is_not_equivalent(files, monkeypatch):
    from torchreach.app import commands

    def equivalence(*args, **options):
        found = tr.equivalent(*args, **options)
        return replace(found, answer=(tr.Answer.UNKNOWN,), reasons=(tr.Reason.BUDGET,))

    monkeypatch.setattr(commands, "equivalence", equivalence)
    result = equivalent(files, "--box", BOX, "--epsilon", 0.5)
    assert result.exit_code == 1
    asked = "unknown: |y1 - y2| <= 0.5 is not decided on 1 star; a larger budget"
    assert result.stdout.splitlines()[-1].startswith(asked)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "exactly one of --epsilon and --top1 is required, got neither"),
        (("--epsilon", 1, "--top1"), "exactly one of --epsilon and --top1 is required, got both"),
        (("--epsilon", "nan"), "--epsilon must be a number >= 0, got nan"),
        (("--epsilon", "1", "--confidence", "0.9"), "--confidence belongs to --top1"),
        (("--top1", "--confidence", "0"), "--confidence must lie between 0 and 1, both excluded, got 0"),
    ],
)
def test_bad_questions_of_equivalence(files, args, message):
    result = equivalent(files, "--box", BOX, *args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_options_reach_the_comparison(files, monkeypatch):
    """Every option that says what to certify arrives at `discrepancy` as typed."""
    from torchreach.app import commands

    seen = {}

    def discrepancy(*_, **options):
        seen.update(options)
        raise OSError("enough")

    monkeypatch.setattr(commands, "discrepancy", discrepancy)
    options = ("--tolerance", 0.1, "--gap", 0.01, "--arithmetic", "executed", "--kernels", "any", "--seconds", 5)
    assert compare(files, "--box", BOX, *options, "--stars", 7, "--memory", "2GB").exit_code == 2
    assert (seen["tolerance"], seen["gap"], seen["arithmetic"], seen["kernels"]) == (0.1, 0.01, "executed", "any")
    budget = seen["budget"]
    assert (budget.seconds, budget.stars, budget.memory) == (5, 7, 2_000_000_000)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_gives_the_interval_so_far_and_status_130(files, monkeypatch):
    from torchreach.app import commands

    def discrepancy(*args, **options):
        found = tr.discrepancy(*args, **options)
        os.kill(os.getpid(), signal.SIGINT)
        reasons, status = (tr.Reason.INTERRUPTED,), (tr.Status.BOUNDED,)
        return replace(found, lower=0.01 * found.lower, upper=5 * found.upper, reasons=reasons, status=status)

    monkeypatch.setattr(commands, "discrepancy", discrepancy)
    result = compare(files, "--box", BOX, "--tolerance", 0.005)
    assert result.exit_code == 130, result.output
    assert result.stderr == "torchreach: interrupted; what is certified so far holds\n"
    assert "undecided: max |y1 - y2| lies in [" in result.stdout
    assert "interrupted" in result.stdout
    decided = compare(files, "--box", BOX, "--tolerance", 100)
    assert decided.exit_code == 0
    assert decided.stderr == ""


def test_ctrl_c_before_the_work_is_said(files, monkeypatch):
    from torchreach.app import commands

    def load(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "load", load)
    result = compare(files, "--box", BOX)
    assert result.exit_code == 130
    assert result.stderr.strip() == "torchreach: interrupted"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A convolutional network as a .pt2 file, and the numbers of its inputs in a row."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(3)
    network = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    save(network, folder / "a.pt2", (1, 3, 3))
    (folder / "box.json").write_text(json.dumps([[0.0, 0.25], [0.5, 0.75], *[[0.3, 0.3]] * 7]))
    names = "".join(f"(declare-const X_{i} Real)" for i in range(9))
    rows = "".join(f"(assert (>= X_{i} 0.5))(assert (<= X_{i} 0.5))" for i in range(9))
    (folder / "box.vnnlib").write_text(names + "(declare-const Y_0 Real)" + rows)
    return folder


def test_flat_boxes_take_the_shape_that_the_file_says(pictures, tmp_path):
    a = pictures / "a.pt2"
    for args in (("--box", pictures / "box.json"), ("--vnnlib", pictures / "box.vnnlib")):
        result = run("compare", a, a, *args, "--output", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / "out" / "report.json").read_text())["input_set"]["shape"] == [1, 3, 3]
    short = run("compare", a, a, "--box", "0,1;0,1")
    assert short.exit_code == 2
    assert "--box must give bounds for 9 inputs, as the networks of input shape [1, 3, 3] do, got 2" in short.stderr


def test_a_shape_can_be_given_where_no_file_says_it():
    from torchreach.app.arguments import SetOptions
    from torchreach.app.inputs import read_input_set
    from torchreach.core.errors import OptionError, ShapeError

    network, box = nn.Sequential(nn.Conv2d(1, 1, 2)), ";".join(["0,1"] * 6)
    stars = read_input_set(SetOptions(box, shape="1,2,3"), network, torch.float64).stars
    assert (stars.shape, stars.dim) == ((1, 2, 3), 6)
    assert stars.basis[0, 1].flatten().tolist() == [1, 0, 0, 0, 0, 0]
    with pytest.raises(
        ShapeError, match="--box gives 6 numbers in a row.* give it with --shape, for example --shape 1,28"
    ):
        read_input_set(SetOptions(box), network, torch.float64)
    with pytest.raises(ShapeError, match="--shape 1,2,3 must hold 5 values, as the networks take, got 6"):
        read_input_set(SetOptions(box, shape="1,2,3"), nn.Sequential(nn.Linear(5, 1)), torch.float64)
    for shape in ("", "1,x", "0,3", "-1,2", "1.5"):
        with pytest.raises(OptionError, match="--shape must be the sizes of one input without a batch axis"):
            SetOptions(box, shape=shape)


@pytest.mark.filterwarnings("ignore")  # torch announces the end of its eager-mode quantisation
def test_a_state_dict_of_int8_is_repaired_and_saved_as_one(tmp_path):
    class Named(nn.Module):
        def __init__(self, *around):
            super().__init__()
            self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 1)
            self.relu, self.around = nn.ReLU(), nn.ModuleList(around)

        def forward(self, x):
            before, after = self.around or (nn.Identity(), nn.Identity())
            return after(self.last(self.relu(self.first(before(x)))))

    quantise = torch.ao.quantization
    plain, stubbed = Named(), Named(quantise.QuantStub(), quantise.DeQuantStub())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one, two in zip(plain.parameters(), stubbed.parameters(), strict=True):
            one.copy_(torch.rand(one.shape, generator=generator) - 0.5)
            two.copy_(one)
    stubbed.eval().qconfig = quantise.get_default_qconfig("fbgemm")
    quantise.prepare(stubbed, inplace=True)
    stubbed(3 * torch.rand(50, 2, generator=generator))  # calibrated on more than the box: too coarse for it
    torch.save(quantise.convert(stubbed).state_dict(), tmp_path / "small.pth")
    example, batch = torch.zeros(2, 2), torch.export.Dim("batch")
    torch.export.save(torch.export.export(plain, (example,), dynamic_shapes=({0: batch},)), tmp_path / "a.pt2")
    paths, better = (tmp_path / "a.pt2", tmp_path / "small.pth"), tmp_path / "better.pth"
    options = ("--box", "0.2,0.3;0.4,0.5", "--iterations", 2, "--epochs", 2, "--target", 0.9)
    result = run("repair", *paths, *options, "--save", better, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["semantics"]["name"] == "deployed int8"
    again = run("compare", paths[0], better, "--box", "0.2,0.3;0.4,0.5", "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output
    found = json.loads((tmp_path / "again" / "report.json").read_text())["discrepancy"]
    assert found["max_upper"] == pytest.approx(report["repair"]["after"]["max_upper"], abs=1e-9)
    refused = run("repair", *paths, *options, "--save", tmp_path / "better.onnx")
    assert refused.exit_code == 2
    assert "a network is saved as .pth or .pt, got '.onnx'" in refused.stderr


def test_unknown_command_is_one_line():
    result = run("compere")
    assert result.exit_code == 2
    assert "No such command 'compere'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_output_that_is_a_file_is_refused_before_any_work(files, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = compare(files, "--box", BOX, "--output", tmp_path / "file")
    assert result.exit_code == 2
    assert "--output must name a folder, but" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_installed_program_exits_with_the_status(files):
    """The real entry point in its own process: 0, 1 and 2, without a traceback."""
    for args, status in (
        (("--version",), 0),
        (("compare", files / "a.onnx", files / "b.onnx", "--box", BOX, "--tolerance", "0"), 1),
        (("compare", files / "a.onnx", files / "none.onnx", "--box", BOX), 2),
    ):
        command = [sys.executable, "-m", "torchreach", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert "Traceback" not in done.stderr
        assert ("none.onnx" in done.stderr) == (status == 2)  # else progress at most, of a slow machine


TYPED = """
import sys
from torchreach.app.cli import app
for args in {commands}:
    status = app(args, standalone_mode=False)
    print(status, "torch" in sys.modules, "numpy" in sys.modules)
"""


def test_help_and_what_is_typed_wrongly_are_answered_without_torch(files):
    """Counted in modules, not in seconds: importing torch takes longer than anyone waits for an error."""
    a, b = str(files / "a.onnx"), str(files / "b.onnx")
    right = ["compare", a, b, "--box", BOX]
    wrong = [
        ["compare", a, str(files / "none.onnx"), "--box", BOX],
        ["compare", a, str(files / "x.npy"), "--box", BOX],
        ["compare", a, b],
        ["compare", a, b, "--box", "0,1;2"],
        ["compare", a, b, "--box", "gone.json"],
        ["compare", a, b, "--center", "gone.npy", "--eps", "1"],
        ["compare", a, b, "--vnnlib", "gone.vnnlib"],
        [*right, "--tolerence", "1"],
        [*right, "--tolerance", "-1"],
        [*right, "--gap", "0"],
        [*right, "--seconds", "-1"],
        [*right, "--memory", "much"],
        [*right, "--method", "magic"],
        [*right, "--device", "tpu"],
        [*right, "--output", a],
        [*right, "--shape", "3,x"],
        [*right, "--arithmetic", "imagined"],
        [*right, "--kernels", "all"],
        ["equivalent", *right[1:]],
        ["equivalent", *right[1:], "--top1", "--confidence", "2"],
        ["audit", a, b],
        ["audit", a, b, "--data", "gone.npy"],
        ["repair", *right[1:], "--save", "better.txt"],
        ["repair", *right[1:], "--alpha", "0"],
        ["demo", "--data", "letters"],
        ["compere"],
    ]
    helped = [
        ["--help"],
        ["--version"],
        ["compare", "--help"],
        ["repair", "--help"],
        ["equivalent", "--help"],
        ["audit", "--help"],
        ["demo", "--help"],
        [],
    ]
    code = TYPED.format(commands=[*helped, *wrong])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.endswith("False")]
    assert lines == ["0 False False"] * len(helped) + ["2 False False"] * len(wrong), done.stderr
    assert len(done.stderr.splitlines()) == len(wrong)


REPAIR = ("--iterations", 3, "--epochs", 10)


@pytest.fixture(scope="module")
def coarse(files):
    """A copy of the first network on a 4-bit grid."""
    from torchreach.compress.constraints import quantize_weights
    from torchreach.read.load import load

    path = files / "coarse.onnx"
    save(load(quantize_weights(load(files / "a.onnx"), 4)), path, (3,))
    return path


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_repair_saves_a_network_with_the_certified_discrepancy(files, coarse, tmp_path, ending):
    saved = tmp_path / f"better.{ending}"
    box = ("--box", BOX)
    result = run(
        "repair", files / "a.onnx", coarse, *box, *REPAIR, "--target", 0.9, "--save", saved, "--output", tmp_path / "o"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("repaired: certified |y1 - y2| <= ")
    repaired = json.loads((tmp_path / "o" / "report.json").read_text())["repair"]
    assert repaired["satisfied"]
    assert {path.name for path in tmp_path.iterdir()} == {"o", saved.name}
    again = run("compare", files / "a.onnx", saved, *box, "--output", tmp_path / "again")
    found = json.loads((tmp_path / "again" / "report.json").read_text())["discrepancy"]
    assert again.exit_code == 0
    assert found["max_upper"] == pytest.approx(repaired["after"]["max_upper"], abs=1e-12)


def test_missed_target_exits_1_and_says_so(files, coarse):
    result = run("repair", files / "a.onnx", coarse, "--box", BOX, *REPAIR, "--target-max", 1e-9)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("target missed, closest network kept: certified")
    assert "target 1e-09" in result.stdout
    solved = run("repair", files / "a.onnx", coarse, "--box", BOX, "--by", "solve", "--target-max", 1e-9)
    last = solved.stdout.splitlines()[-1]
    assert solved.exit_code == 1
    assert last.startswith("target missed, closest network kept: certified")
    found = re.search(r"<= (\S+) for every .* no last layer with these zeros gets below (\S+) ", last)
    assert found is not None, last
    assert 0 < float(found[2]) <= float(found[1])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--target", 2), "--target must lie in (0, 1), got 2"),
        (("--target", 0.5, "--target-max", 1), "at most one of --target and --target-max may be given, got both"),
        (("--target-max", -1), "--target-max must be a number >= 0, got -1"),
        (("--alpha", 0), "--alpha must be positive, got 0"),
        (("--rate", 0), "--rate must be positive, got 0"),
        (("--iterations", 0), "--iterations must be at least 1, got 0"),
        (("--epochs", 0), "--epochs must be at least 1, got 0"),
        (("--save", "better.txt"), "a network is saved as .onnx or .pt2, got '.txt'"),
        (("--save", "nowhere/better.onnx"), "cannot save a network in nowhere"),
    ],
)
def test_bad_repair_options(files, tmp_path, args, message):
    result = run("repair", files / "a.onnx", files / "b.onnx", "--box", BOX, *args, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_warnings_of_some_package_s_source_are_not_shown(monkeypatch, capsys):
    """Python compiles a fresh installation on its first run, and warns of what it finds in it."""

    def compiled(*_, **__):
        warnings.warn("invalid escape sequence '\\i'", SyntaxWarning, stacklevel=1)
        warnings.warn("scales were never calibrated", tr.UncalibratedWarning, stacklevel=1)

    monkeypatch.setattr("typer.core.TyperGroup.main", compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert app([], standalone_mode=False) == 0
    assert capsys.readouterr().err == "torchreach: warning: scales were never calibrated\n"
