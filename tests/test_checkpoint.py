"""Runs that are killed go on from their checkpoint, to the answer that an uninterrupted run gives."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchreach as tr
from tests.networks import random_network
from tests.test_cli import run
from tests.test_deployed import case as int8_case
from torchreach.core.checkpoint import Checkpoint
from torchreach.core.plain import digest
from torchreach.read.module import chain
from torchreach.read.save import onnx_bytes
from torchreach.verbs import units
from torchreach.verbs.storage import to_plain

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs that are killed are forked")


EVERY_STATE = {"torchreach.core.checkpoint.SECONDS": 0.0, "torchreach.core.checkpoint.MULTIPLE": 0.0}
PROCESSES = {
    "torchreach.work.run.FORK_SECONDS": 0.0,
    "torchreach.work.run.FORK_CHUNKS": 0.01,
    "torchreach.core.checkpoint.SECONDS": 0.05,
}


@pytest.fixture(autouse=True)
def every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot of every state, and one thread, so that steps have one order."""
    for place, value in EVERY_STATE.items():
        monkeypatch.setattr(place, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def killed(name: str, folder: Path, settings: dict[str, Any] | None = None) -> None:
    """A case in a process of its own, which is killed with SIGKILL right after so many files were written.

    Forked from a server that has computed nothing yet: threads of this process do not come along.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.test_checkpoint"])
    child = server.Process(target=_run_and_die, args=(name, folder, settings or {}))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL, f"it ended by itself ({child.exitcode}) before all files were written"


def _run_and_die(name: str, folder: Path, settings: dict[str, Any]) -> None:
    (case, saves), save = CASES[name], Checkpoint.save

    def counted(self: Checkpoint, piece: str, tree: Any) -> None:
        nonlocal saves
        save(self, piece, tree)
        saves -= 1
        if not saves:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoint.save = counted
    torch.set_num_threads(1)
    for place, value in {**EVERY_STATE, **settings}.items():
        module, _, attribute = place.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    case(folder)


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal but for the time that they took, and the last bits of replayed values."""
    if isinstance(one, Tensor) and one.is_quantized:
        return torch.equal(one, other)
    if isinstance(one, Tensor):
        return torch.allclose(one, other, rtol=0, atol=1e-12 if one.is_floating_point() else 0, equal_nan=True)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one if k != "seconds")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def pair(sizes: list[int], bits: int = 5) -> tuple[nn.Module, nn.Module]:
    network = random_network(0, sizes)
    return network, tr.quantize_weights(network, bits=bits)


def boxes(inputs: int, radius: float, count: int = 1) -> tr.StarBatch:
    centre = torch.linspace(-0.4, 0.4, count, dtype=torch.float64)[:, None].expand(count, inputs)
    return tr.StarBatch.from_box(centre - radius, centre + radius)


SMALL = pair([3, 12, 12, 2])
NETWORKS = pair([6, 10, 10, 2])


def reached(method: str) -> Callable[[Any], Any]:
    return lambda folder: tr.reach(SMALL[0], boxes(3, 0.5, 2), tr.Exact(method), checkpoint=folder)


def compared(method: Any, count: int = 2, **options: Any) -> Callable[[Any], Any]:
    networks, stars = (
        (SMALL, boxes(3, 0.5, count)) if isinstance(method, tr.Exact) else (NETWORKS, boxes(6, 0.2, count))
    )
    return lambda folder: tr.discrepancy(*networks, stars, method, checkpoint=folder, **options)


def deployed(folder: Any) -> Any:
    original, small, _ = int8_case(0)
    stars = tr.StarBatch.from_image(torch.tensor([[0.1, 0.2, 0.3], [-0.2, 0.1, 0.0]]), 0.03)
    return tr.discrepancy(original, small, stars, tr.Exact(), checkpoint=folder)


def audited(folder: Any) -> Any:
    x = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(10, 6)
    return tr.audit(*NETWORKS, x, 0.02, torch.arange(10) % 2, checkpoint=folder)


def repaired(method: str) -> Callable[[Any], Any]:
    def run(folder: Any) -> Any:
        quick = tr.RepairOptions(samples=50, epochs=3)
        options = {"iterations": 3, "training": quick, "method": method, "checkpoint": folder}
        return tr.repair(*SMALL, boxes(3, 0.2, 2), target=0.01, **options)

    return run


def repaired_int8(folder: Any) -> Any:
    original, small, x = int8_case(0)
    stars = tr.StarBatch.from_image(torch.tensor([[0.1, 0.2, 0.3]]), 0.03)
    quick = tr.RepairOptions(samples=50, epochs=3)
    return tr.repair(original, small, stars, target=1e-9, iterations=3, training=quick, checkpoint=folder)


# The files after which the run is killed: what it had written by then is a part of the answer, or of a state.
CASES = {
    "reach by vertices": (reached("vertices"), 4),
    "reach by programs": (reached("programs"), 6),
    "exact by vertices": (compared(tr.Exact("vertices")), 4),
    "exact by programs": (compared(tr.Exact("programs")), 4),
    "search of boxes": (compared(tr.Search("inputs"), gap=0.02), 2),
    "search of signs": (compared(tr.Search("signs"), gap=0.03), 6),
    "many stars": (compared(tr.Exact("vertices"), 10), 5),
    "deployed cells": (deployed, 1),
    "equivalent": (lambda folder: tr.equivalent(*NETWORKS, boxes(6, 0.05, 3), top1=True, checkpoint=folder), 2),
    "within epsilon": (lambda folder: tr.equivalent(*SMALL, boxes(3, 0.2, 2), 0.2, checkpoint=folder), 1),
    "audit": (audited, 1),
    "attribute": (lambda folder: tr.attribute(*SMALL, boxes(3, 0.2), checkpoint=folder), 3),
    "keep float": (lambda folder: tr.keep_float(*SMALL, boxes(3, 0.2), 0.05, checkpoint=folder), 2),
    "repair by retraining": (repaired("retrain"), 4),
    "repair by solving": (repaired("solve"), 1),
    "repair of int8": (repaired_int8, 3),
}


@pytest.mark.parametrize("name", [*CASES])
def test_a_killed_run_goes_on_to_the_same_answer(name, tmp_path, monkeypatch):
    run, _ = CASES[name]
    folder = tmp_path / "checkpoint"
    killed(name, folder)
    assert len([*folder.glob("*.safetensors")]) >= 1
    loaded = []
    load = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self, *args: (found := load(self, *args), loaded.append(found))[0])
    resumed = to_plain(run(folder))
    assert any(found is not None for found in loaded), "nothing was taken from the checkpoint"
    assert same(resumed, to_plain(run(tmp_path / "other")))
    assert same(resumed, to_plain(run(folder)))


def in_processes(folder: Any) -> Any:
    torch.get_num_threads = lambda: 2
    return tr.reach(random_network(0, [3, 20, 20, 2]), boxes(3, 0.8), tr.Exact("vertices"), checkpoint=folder)


CASES["processes"] = in_processes, 4


def test_a_run_in_processes_goes_on_to_the_same_regions(tmp_path, monkeypatch):
    for place, value in PROCESSES.items():
        monkeypatch.setattr(place, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    folder = tmp_path / "checkpoint"
    killed("processes", folder, PROCESSES)
    resumed, whole = in_processes(folder), in_processes(None)
    assert int(resumed.count) == int(whole.count) == len(resumed.stars)
    torch.testing.assert_close(resumed.upper, whole.upper, rtol=0, atol=1e-12)
    assert resumed.stats.splits == whole.stats.splits


def test_a_finished_run_gives_its_result_at_once(tmp_path, monkeypatch):
    found = tr.discrepancy(*SMALL, boxes(3, 0.5, 2), checkpoint=tmp_path / "c")
    monkeypatch.setattr("torchreach.verbs.discrepancy.compare", lambda *_, **__: pytest.fail("it computes again"))
    again = tr.discrepancy(*SMALL, boxes(3, 0.5, 2), checkpoint=tmp_path / "c")
    assert same(to_plain(found), to_plain(again))
    assert again.stats.seconds == found.stats.seconds


def test_a_spent_budget_is_gone_on_from(tmp_path):
    """What is cut short is not filed: the next call, with more time, ends where one call would have."""
    stars = boxes(3, 0.5, 2)
    short = tr.discrepancy(*SMALL, stars, tr.Exact(), budget=tr.Budget(seconds=1e-6), checkpoint=tmp_path / "c")
    assert short.status == (tr.Status.BOUNDED,) * 2
    assert same(
        to_plain(tr.discrepancy(*SMALL, stars, tr.Exact(), checkpoint=tmp_path / "c")),
        to_plain(tr.discrepancy(*SMALL, stars, tr.Exact(), checkpoint=tmp_path / "d")),
    )


OTHERS = {
    "compressed is": {"compressed": tr.quantize_weights(SMALL[0], bits=6)},
    "original is": {"original": random_network(1, [3, 12, 12, 2])},
    "inputs is": {"stars": boxes(3, 0.4)},
    "tolerance is nothing there and 0.5 here": {"tolerance": 0.5},
    "method is Exact.* there and Search": {"method": tr.Search()},
    "stars is nothing there and 7 here": {"budget": tr.Budget(stars=7)},
    "verb is discrepancy there and attribute here": None,
}


@pytest.mark.parametrize("difference", OTHERS)
def test_another_question_is_refused_by_what_differs(difference, tmp_path):
    asked = {"original": SMALL[0], "compressed": SMALL[1], "stars": boxes(3, 0.5), "method": tr.Exact()}
    tr.discrepancy(**asked, checkpoint=tmp_path / "c")
    change = OTHERS[difference]
    ask = tr.attribute if change is None else tr.discrepancy
    asked = (
        {**asked, **(change or {})}
        if change is not None
        else dict(zip(("original", "compressed"), SMALL, strict=True), stars=asked["stars"])
    )
    with pytest.raises(tr.TorchreachError, match=f"belongs to another question: .*{difference}"):
        ask(**asked, checkpoint=tmp_path / "c")


def test_another_dtype_is_another_question(tmp_path):
    tr.reach(SMALL[0], boxes(3, 0.2), checkpoint=tmp_path / "c")
    with pytest.raises(tr.TorchreachError, match="inputs is"):
        tr.reach(SMALL[0], boxes(3, 0.2).to(dtype=torch.float32), checkpoint=tmp_path / "c")


@pytest.mark.parametrize("damage", ["cut", "bit", "other", "empty"])
def test_a_damaged_file_is_done_again(damage, tmp_path, caplog):
    run = CASES["exact by vertices"][0]
    folder = tmp_path / "c"
    killed("exact by vertices", folder)
    whole = to_plain(run(None))
    for path in folder.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        if damage == "cut":
            del content[len(content) // 2 :]
        elif damage == "bit":
            content[-9] ^= 16
        elif damage == "empty":
            content.clear()
        else:
            content[:] = next(p for p in folder.glob("*.safetensors") if p != path).read_bytes()
        path.write_bytes(content)
    with caplog.at_level("INFO"):
        assert same(to_plain(run(folder)), whole)
    assert "is damaged" in caplog.text or "another question" in caplog.text


def test_every_bit_of_an_answer_counts(tmp_path):
    """No change of a file is taken for an answer: it is done again, whatever part of the file it is in."""
    run = CASES["exact by vertices"][0]
    whole = to_plain(run(tmp_path / "c"))
    (path,) = (tmp_path / "c").glob("*.safetensors")
    content = path.read_bytes()
    g = torch.Generator().manual_seed(0)
    for at in torch.randint(len(content), (12,), generator=g).tolist():
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert same(to_plain(run(tmp_path / "c")), whole)


def test_regions_of_other_weights_are_not_gone_on_with(tmp_path, monkeypatch, caplog):
    """The last guard, should composed weights come out otherwise, as on another machine."""
    run = CASES["reach by vertices"][0]
    killed("reach by vertices", tmp_path / "c")
    monkeypatch.setattr("torchreach.work.snapshot.digest", lambda *_: "another network")
    assert same(to_plain(run(tmp_path / "c")), to_plain(run(None)))
    assert "begins anew" in caplog.text


def test_folders_that_are_no_checkpoint_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        tr.TorchreachError, match="must be a new or empty folder, or a checkpoint; it holds 'notes.txt'"
    ):
        tr.reach(SMALL[0], boxes(3, 0.1), checkpoint=tmp_path)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "question.json").write_text('{"format": "torchreach che')
    with pytest.raises(tr.TorchreachError, match="is damaged or no checkpoint's"):
        tr.reach(SMALL[0], boxes(3, 0.1), checkpoint=tmp_path / "c")
    with pytest.raises(tr.TorchreachError, match="the folder cannot be written: "):
        tr.reach(SMALL[0], boxes(3, 0.1), checkpoint=tmp_path / "notes.txt" / "c")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(tr.TorchreachError, match="the folder cannot be written: Permission denied"):
        tr.reach(SMALL[0], boxes(3, 0.1), checkpoint=tmp_path)


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    CASES["reach by programs"][0](tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        assert {value["dtype"] for key, value in header.items() if key != "__metadata__"} <= {
            "F64",
            "I64",
            "I32",
            "I16",
            "I8",
        }
    assert json.loads((tmp_path / "question.json").read_text())["verb"] == "reach"


def test_networks_are_told_apart_by_every_number_they_hold():
    _, small, _ = int8_case(0)
    _, again, _ = int8_case(0)
    _, other, _ = int8_case(0, engine=small.module[0]._packed_params and "x86", per_channel=False)
    digests = [digest(*chain(network, (3,))) for network in (small, again, other)]
    assert digests[0] == digests[1] != digests[2]
    moved = random_network(0, [3, 5, 2])
    before = digest(*chain(moved, (3,)))
    with torch.no_grad():
        moved[0].bias[2] += 1e-15
    assert digest(*chain(moved, (3,))) != before


def test_units_are_answered_in_the_order_of_their_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "TOGETHER", 3)
    monkeypatch.setattr("torchreach.verbs.discrepancy.TOGETHER", 3)
    stars = boxes(3, 0.3, 8)
    found, whole = (tr.discrepancy(*SMALL, stars, checkpoint=place) for place in (tmp_path / "c", None))
    assert len([*(tmp_path / "c").glob("*.answer.safetensors")]) == 3
    assert found.regions.tolist() == whole.regions.tolist()
    assert found.status == whole.status
    torch.testing.assert_close(found.upper, whole.upper, rtol=0, atol=1e-12)
    assert replace(found.stats, seconds=0).splits == replace(whole.stats, seconds=0).splits


def test_the_commands_go_on_from_a_checkpoint(tmp_path):
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for network, path in zip(SMALL, files, strict=True):
        path.write_bytes(onnx_bytes(network, (3,)))
    command = ["compare", *files, "--box", "0,0.5; 0,0.5; 0,0.5", "--checkpoint", tmp_path / "c"]
    first, second = run(*command), run(*command)
    assert first.exit_code == second.exit_code == 0
    assert "certified: |y1 - y2| <= " in first.output
    assert first.output.splitlines()[-1].split("(")[0] == second.output.splitlines()[-1].split("(")[0]
    other = run(*command, "--tolerance", "0.1")
    assert other.exit_code == 2
    assert "tolerance is nothing there and 0.1 here" in other.output.replace("\n", " ")
