"""Work on a Ray cluster: here two workers of this machine, which count as two machines would."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torchreach as tr
from tests.networks import random_network
from tests.test_checkpoint import NETWORKS, SMALL, boxes, same
from tests.test_deployed import case as int8_case
from torchreach.core.clock import Clock
from torchreach.verbs.storage import to_plain
from torchreach.work import cluster, remote
from torchreach.work.cluster import Cluster

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'torchreach[ray]'")


@pytest.fixture(scope="module", autouse=True)
def two_workers() -> Iterator[None]:
    """A Ray of two workers, which find the tests' modules too."""
    root = str(Path(__file__).resolve().parents[1])
    options = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    ray.init(num_cpus=2, runtime_env={"env_vars": {"PYTHONPATH": root}}, **options)
    yield
    ray.shutdown()


BIG = random_network(0, [3, 20, 20, 2])


def test_the_same_regions_are_found(monkeypatch):
    monkeypatch.setattr(remote, "SECONDS", 0.05)  # many units
    monkeypatch.setattr(remote, "LARGEST", 64)
    for method in ("vertices", "programs"):
        network, stars = (BIG, boxes(3, 0.8)) if method == "vertices" else (SMALL[0], boxes(3, 0.5))
        found, here = (tr.reach(network, stars, tr.Exact(method), ray=where) for where in ("auto", None))
        assert found.count.tolist() == here.count.tolist()
        assert len(found.stars) == len(here.stars) == int(here.count)
        assert found.status == here.status
        assert found.stats.splits == here.stats.splits
        # linear programs end within 1e-9, of other batches elsewhere
        torch.testing.assert_close(found.upper, here.upper, rtol=0, atol=1e-8)
        torch.testing.assert_close(found.attained_lower, here.attained_lower, rtol=0, atol=1e-8)


def test_every_verb_gives_what_it_gives_here():
    x = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(10, 6)
    original, small, _ = int8_case(0)
    image = tr.StarBatch.from_image(torch.tensor([[0.1, 0.2, 0.3], [-0.2, 0.1, 0.0]]), 0.03)
    quick = tr.RepairOptions(samples=50, epochs=3)
    asked = [
        lambda **w: tr.discrepancy(*SMALL, boxes(3, 0.3, 10), tr.Exact(), **w),
        lambda **w: tr.discrepancy(*SMALL, boxes(3, 0.5), tr.Exact(), **w),
        lambda **w: tr.discrepancy(*NETWORKS, boxes(6, 0.1, 10), tr.Search(), gap=0.05, **w),
        lambda **w: tr.discrepancy(original, small, image, tr.Exact(), **w),
        lambda **w: tr.equivalent(*NETWORKS, boxes(6, 0.05, 3), top1=True, **w),
        lambda **w: tr.audit(*NETWORKS, x, 0.02, torch.arange(10) % 2, **w),
        lambda **w: tr.repair(*SMALL, boxes(3, 0.1, 9), target=0.01, iterations=1, training=quick, **w),
    ]
    for ask in asked:
        found, here = ask(ray="auto"), ask()
        if isinstance(found, tr.RepairResult):
            found, here = found.after, here.after
        for name in ("regions", "status", "answer", "label", "depends"):
            if hasattr(here, name):
                assert same(getattr(found, name), getattr(here, name)), name
        # Bounds of several stars together may be a little wider than of a few: each interval holds for both.
        assert bool((found.lower <= here.upper).all())
        assert bool((here.lower <= found.upper).all())
        if isinstance(found, tr.Discrepancy) and set(found.status) == {tr.Status.EXACT}:
            torch.testing.assert_close(found.upper, here.upper, rtol=0, atol=1e-8)


def dies_once(marker: str, recipe: Any, *rest: Any) -> Any:
    if not os.path.exists(marker):
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return remote.unit(recipe, *rest)


def test_a_worker_that_dies_costs_only_its_unit(tmp_path, monkeypatch):
    marker, given = str(tmp_path / "died"), []

    class Counted(Cluster):
        def done(self, task, take, clock):  # noqa: ARG002
            def counted():
                one = take()
                if one is None:
                    return None
                given.append(one[0])
                return one[0], (marker, *one[1])

            return super().done(dies_once, counted, clock)

    monkeypatch.setattr(cluster, "Cluster", Counted)
    monkeypatch.setattr("torchreach.verbs.reach.Cluster.of", lambda _: Counted(ray))
    found, here = (tr.reach(BIG, boxes(3, 0.8), tr.Exact("vertices"), **where) for where in ({"ray": "auto"}, {}))
    assert os.path.exists(marker)
    assert found.count.tolist() == here.count.tolist()
    assert found.status == here.status


def test_what_the_head_leaves_is_gone_on_with(tmp_path, monkeypatch):
    """The driver ends between two results; what was under way then is done by the run that goes on."""
    monkeypatch.setattr("torchreach.core.checkpoint.SECONDS", 0.0)
    monkeypatch.setattr("torchreach.core.checkpoint.MULTIPLE", 0.0)
    monkeypatch.setattr(remote, "SECONDS", 0.05)
    stars = boxes(3, 0.8)
    results, result = [], Cluster._result

    def stops(self, ref):
        results.append(result(self, ref))
        if len(results) == 4:
            raise KeyboardInterrupt
        return results[-1]

    monkeypatch.setattr(Cluster, "_result", stops)
    with pytest.raises(KeyboardInterrupt):
        tr.reach(BIG, stars, tr.Exact("vertices"), checkpoint=tmp_path / "c", ray="auto")
    monkeypatch.setattr(Cluster, "_result", result)
    here = tr.reach(BIG, stars, tr.Exact("vertices"))
    for where in ({}, {"ray": "auto"}):
        found = tr.reach(BIG, stars, tr.Exact("vertices"), checkpoint=tmp_path / "c", **where)
        assert found.count.tolist() == here.count.tolist() == [len(found.stars)]
        torch.testing.assert_close(found.upper, here.upper, rtol=0, atol=1e-12)


def test_answers_of_units_are_filed_as_they_come(tmp_path):
    stars = boxes(3, 0.3, 20)
    found = tr.discrepancy(*SMALL, stars, tr.Exact(), checkpoint=tmp_path / "c", ray="auto")
    assert len([*(tmp_path / "c").glob("*.answer.safetensors")]) == 3
    assert same(to_plain(found), to_plain(tr.discrepancy(*SMALL, stars, tr.Exact(), checkpoint=tmp_path / "c")))


@pytest.mark.parametrize("stop", ["seconds", "ctrl-c"])
def test_a_run_that_ends_early_gives_a_valid_interval(stop, monkeypatch):
    stars = boxes(3, 0.8)
    here = tr.reach(BIG, stars, tr.Exact("vertices"), keep_stars=False)
    budget = tr.Budget(seconds=1.0 if stop == "seconds" else None)
    if stop == "ctrl-c":
        results, result = [], Cluster._result

        def pressed(self, ref):
            results.append(ref)
            if len(results) == 2:
                signal.raise_signal(signal.SIGINT)
            return result(self, ref)

        monkeypatch.setattr(Cluster, "_result", pressed)
    monkeypatch.setattr(remote, "SECONDS", 0.02)
    monkeypatch.setattr(remote, "LARGEST", 4)
    found = tr.reach(BIG, stars, tr.Exact("vertices"), budget=budget, ray="auto", keep_stars=False)
    assert found.status == (tr.Status.BOUNDED,)
    assert found.reasons[0] is (tr.Reason.BUDGET if stop == "seconds" else tr.Reason.INTERRUPTED)
    assert bool((found.upper >= here.attained_upper).all())
    assert bool((found.lower <= here.attained_lower).all())
    assert int(found.count) < int(here.count)


def fails(_: int) -> None:
    raise tr.TorchreachError("what a unit cannot do")


def test_errors_of_a_unit_are_raised_as_they_are():
    given = iter([(0, (0,))])
    with pytest.raises(tr.TorchreachError, match="what a unit cannot do"):
        list(Cluster(ray).done(fails, lambda: next(given, None), Clock()))


def test_without_ray_the_message_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(tr.TorchreachError, match=r"ray='auto' needs Ray: pip install 'torchreach\[ray\]'"):
        tr.reach(SMALL[0], boxes(3, 0.1), ray="auto")
