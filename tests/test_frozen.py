"""Frozen answers: what each verb said of some sixty small cases when they were recorded (tests/frozen.json).

A change that is not meant to change answers leaves all of these alone: counts of regions are equal, statuses and
answers equal or better, bounds equal or tighter to within 1e-9 of their size, and searches take no more branches.
Everything is seeded, in float64 but for the networks in half precision, and limited by counts, never by seconds; of
networks as executed only `upper` is held, for `lower` is what one machine's kernels gave.

    python -m tests.test_frozen --record

writes the file anew. That is right where an answer is better than before, or a case is new; an answer that is worse
needs an error found in the old one (a bound that did not hold, a region counted twice), which the commit explains.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchreach as tr
from tests.networks import random_network, random_pair, rounded_copy
from tests.test_difference import noisy_copy
from tests.test_graphs import network as graph
from tests.test_repair_deployed import dense, int8, points

pytestmark = pytest.mark.filterwarnings("ignore")  # torch announces the end of its eager-mode quantisation

# Threads say how many workers share the work, and so which of it a budget leaves undone: recorded and run on one.
THREADS = 1
FILE = Path(__file__).with_name("frozen.json")
RELATIVE = 1e-9
BETTER = {"bounded": 0, "exact": 1, "unknown": 0}  # a decided answer must stay as it is


def box(seed: int, inputs: int, radius: float, stars: int = 1, dtype: torch.dtype = torch.float64) -> tr.StarBatch:
    g = torch.Generator().manual_seed(seed)
    middle = (torch.randn(stars, inputs, generator=g, dtype=torch.float64) * 0.5).to(dtype)
    return tr.StarBatch.from_box(middle - radius, middle + radius)


def rows(values: torch.Tensor) -> list:
    return values.detach().double().tolist()


def of_reach(found: tr.ReachResult) -> dict[str, Any]:
    return {
        "regions": found.count.tolist(),
        "status": [str(status.value) for status in found.status],
        "reasons": [str(reason.value) for reason in found.reasons],
        **{name: rows(getattr(found, name)) for name in ("lower", "upper")},
        "inside": {"lower": rows(found.attained_lower), "upper": rows(found.attained_upper)},
    }


def of_comparison(found: tr.Discrepancy, counted: bool = True, attained: bool = True) -> dict[str, Any]:
    record = {
        "status": [str(status.value) for status in found.status],
        "reasons": [str(reason.value) for reason in found.reasons],
        "semantics": str(found.semantics.value),
        "lower": rows(found.range_lower),
        "upper": rows(found.range_upper),
    }
    if attained:
        record["inside"] = {"upper": rows(found.lower)}
    if counted:
        record |= {"regions": found.regions.tolist(), "branches": found.stats.branches}
    return record


def of_equivalence(found: tr.Equivalence) -> dict[str, Any]:
    return {
        "status": [str(answer.value) for answer in found.answer],
        "reasons": [str(reason.value) for reason in found.reasons],
        "label": None if found.label is None else found.label.tolist(),
        "upper": rows(found.upper),
        "inside": {"upper": rows(found.lower)},
    }


def of_repair(result: tr.RepairResult) -> dict[str, Any]:
    return {
        "iterations": [step.iteration for step in result.history],
        "satisfied": result.satisfied,
        "index": result.index,
        "steps": [of_comparison(step.discrepancy) for step in result.history],
    }


def reach(engine: str, seed: int, sizes: list[int], whole: bool = False, stars: int = 1, **options: Any) -> dict:
    network = random_network(seed, sizes, whole=whole)
    return of_reach(tr.reach(network, box(seed, sizes[0], 0.8, stars), tr.Exact(engine), **options))


def reach_graph(engine: str, name: str, radius: float) -> dict:
    module, stars = graph_box(name, radius)
    return of_reach(tr.reach(module, stars, tr.Exact(engine)))


def graph_box(name: str, radius: float, varying: int = 2) -> tuple[nn.Module, tr.StarBatch]:
    module, shape = graph(name)
    centre = 0.3 * torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spread = torch.zeros_like(centre)
    spread.flatten()[:varying] = radius
    return module, tr.StarBatch.from_box(centre - spread, centre + spread)


def pair(method: Any, seed: int, radius: float = 0.4, counted: bool = True, **options: Any) -> dict:
    original, compressed, inputs = random_pair(seed)
    return of_comparison(tr.discrepancy(original, compressed, box(seed, inputs, radius), method, **options), counted)


def copies(method: Any, seed: int, sizes: list[int], radius: float, stars: int = 1, **options: Any) -> dict:
    original = random_network(seed, sizes)
    compressed = rounded_copy(original, 16) if seed % 2 else noisy_copy(original, 1e-2, seed)
    return of_comparison(tr.discrepancy(original, compressed, box(seed, sizes[0], radius, stars), method, **options))


def graphs(method: Any, name: str, radius: float, **options: Any) -> dict:
    module, stars = graph_box(name, radius)
    return of_comparison(tr.discrepancy(module, tr.quantize_weights(module, bits=5), stars, method, **options))


def deployed(method: Any, seed: int, radius: float, stars: int = 1, sizes: tuple[int, ...] = (3, 16, 12, 2)) -> dict:
    """Calibrated to half of the codes, so that no kernel saturates and all are one."""
    original = dense(seed, sizes)
    small = int8(original, inputs=points(features=sizes[0]))
    found = tr.discrepancy(original, small, box(seed, sizes[0], radius, stars), method, budget=tr.Budget(stars=2000))
    return of_comparison(found)


def executed(dtype: torch.dtype, method: Any, seed: int, radius: float) -> dict:
    network = random_network(seed, [4, 10, 8, 3], dtype=torch.float32)
    stars = box(seed, 4, radius, dtype=torch.float32)
    found = tr.discrepancy(network, copy.deepcopy(network).to(dtype), stars, method, gap=1e-3)
    return of_comparison(found, attained=False)


def equivalent(seed: int, sizes: list[int], noise: float, *epsilon: float, radius: float = 0.3, **options: Any) -> dict:
    original = random_network(seed, sizes)
    stars = box(seed, sizes[0], radius, 4)
    return of_equivalence(tr.equivalent(original, noisy_copy(original, noise, seed), stars, *epsilon, **options))


def repair(compress: Callable[[nn.Module], nn.Module], seed: int, **options: Any) -> dict:
    original = random_network(seed, [3, 8, 6, 2])
    training = tr.RepairOptions(samples=40, epochs=6, batch_size=32)
    stars = box(seed, 3, 0.2, 2)
    return of_repair(
        tr.repair(original, compress(original), stars, training=training, iterations=3, exact=tr.Exact(), **options)
    )


def repair_deployed(seed: int) -> dict:
    original = dense(seed)
    training = tr.RepairOptions(samples=40, epochs=6, batch_size=32, learning_rate=3e-3)
    stars = box(seed, 3, 0.05, 1, torch.float32)
    # calibrated alone: what float32 training gives is the machine's
    return of_repair(tr.repair(original, int8(original), stars, target=0.9, training=training, iterations=1))


SIGNS, INPUTS, SOME = tr.Search("signs"), tr.Search("inputs"), tr.Budget(stars=300)
QUANTISED = {bits: partial(tr.quantize_weights, bits=bits) for bits in (3, 4)}
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        f"reach {engine} {name}": partial(reach, engine, *case)
        for engine in ("vertices", "programs")
        for name, case in {
            "plane": (0, [2, 8, 6, 2]), "space": (1, [3, 10, 8, 2]), "whole numbers": (2, [2, 6, 6, 1], True),
            "batch": (3, [3, 8, 8, 2], False, 3),
        }.items()
    },
    **{
        f"reach {engine} {name}": partial(reach_graph, engine, name, radius)
        for engine in ("vertices", "programs")
        for name, radius in {"residual": 1.0, "extremes": 1.0, "dense": 1.0, "pooled": 3.0}.items()
    },
    "reach vertices block": partial(reach_graph, "vertices", "block", 0.4),
    "reach programs many inputs": partial(reach, "programs", 4, [8, 10, 2]),
    "reach programs budget": partial(reach, "programs", 5, [4, 12, 8, 2], budget=tr.Budget(stars=40)),
    "reach vertices budget": partial(reach, "vertices", 5, [3, 12, 12, 2], budget=tr.Budget(stars=40)),
    **{f"pair vertices {seed}": partial(pair, "exact", seed) for seed in (0, 1, 2, 6)},
    **{f"pair programs {seed}": partial(pair, tr.Exact("programs"), seed, 0.2) for seed in (0, 1, 4)},
    **{f"pair auto {seed}": partial(pair, None, seed, counted=False) for seed in (0, 1, 3, 5)},
    "pair auto tolerance": partial(pair, None, 3, counted=False, tolerance=0.05),
    **{f"signs {seed}": partial(copies, SIGNS, seed, [4, 10, 8, 2], 0.1) for seed in (0, 1)},
    "signs gap": partial(copies, SIGNS, 2, [6, 14, 12, 2], 0.15, gap=0.05, budget=SOME),
    "signs many inputs": partial(copies, SIGNS, 3, [12, 16, 16, 2], 0.1, budget=SOME),
    "signs tolerance": partial(copies, SIGNS, 4, [8, 14, 10, 2], 0.1, 2, tolerance=0.05, budget=SOME),
    **{f"inputs {seed}": partial(copies, INPUTS, seed, [3, 10, 8, 2], 0.2) for seed in (0, 1)},
    "inputs gap": partial(copies, INPUTS, 2, [4, 12, 10, 2], 0.2, gap=0.01, budget=SOME),
    "inputs tolerance": partial(copies, INPUTS, 4, [4, 12, 10, 2], 0.3, 2, tolerance=0.05, budget=SOME),
    **{
        f"graph exact {name}": partial(graphs, "exact", name, radius)
        for name, radius in {"residual": 1.5, "extremes": 0.4, "dense": 0.5}.items()
    },
    "graph exact block": partial(graphs, "exact", "block", 0.3),
    "graph signs residual": partial(graphs, SIGNS, "residual", 1.5, budget=SOME),
    "graph inputs pooled": partial(graphs, INPUTS, "pooled", 3.0, budget=SOME),
    "graph signs upsampled": partial(graphs, SIGNS, "upsampled", 0.5, budget=SOME),
    **{f"int8 cells {seed}": partial(deployed, "exact", seed, 0.03) for seed in (0, 1)},
    "int8 search": partial(deployed, "search", 2, 0.1),
    "int8 search batch": partial(deployed, "search", 3, 0.02, 2),
    "int8 search many inputs": partial(deployed, "search", 4, 0.02, 1, (10, 12, 8, 2)),
    "float16 exact": partial(executed, torch.float16, "exact", 0, 0.05),
    "float16 search": partial(executed, torch.float16, "search", 1, 0.02),
    "bfloat16 exact": partial(executed, torch.bfloat16, "exact", 2, 0.05),
    "equivalent epsilon": partial(equivalent, 0, [3, 10, 8, 2], 1e-2, 0.046),
    "equivalent tight epsilon": partial(equivalent, 1, [3, 10, 8, 2], 1e-2, 0.036),
    "equivalent many inputs": partial(equivalent, 2, [8, 12, 10, 2], 1e-2, 0.05, radius=0.05, budget=SOME),
    "equivalent labels": partial(equivalent, 3, [3, 10, 8, 4], 1e-2, top1=True),
    "equivalent labels far": partial(equivalent, 4, [3, 10, 8, 3], 1e-1, top1=True),
    "repair quantised": partial(repair, QUANTISED[3], 0, target=0.5),
    "repair midpoint": partial(repair, QUANTISED[4], 1, target=0.1, step="midpoint"),
    "repair pruned": partial(repair, partial(tr.prune_weights, fraction=0.4), 2, target=0.8),
    "repair certified": partial(repair, QUANTISED[4], 3, target=0.3, loss="certified"),
    "repair int8": partial(repair_deployed, 0),
}  # fmt: skip


def worse(now: Any, then: Any, sign: int) -> list[str]:
    """Numbers of nested lists that moved against `sign` (+1: must not rise) by more than the tolerance."""
    if isinstance(then, list):
        assert isinstance(now, list)
        assert len(now) == len(then)
        return [line for a, b in zip(now, then, strict=True) for line in worse(a, b, sign)]
    if math.isinf(then):
        return [] if now == then or sign * then > 0 else [f"{now} was {then}"]
    return [f"{now} was {then}"] if sign * (now - then) > RELATIVE * (1 + abs(then)) else []


def regressions(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """What is worse now than it was, in words."""
    found = []
    for name in ("regions", "semantics", "label", "iterations", "satisfied", "index"):
        if now.get(name) != then.get(name):
            found.append(f"{name} {now.get(name)} was {then.get(name)}")
    for i, before in enumerate(then.get("status", ())):
        status = now["status"][i]
        if status != before and BETTER.get(before, 1) >= BETTER.get(status, 1):
            found.append(f"status {status} was {before}")
        elif status == before and now["reasons"][i] != then["reasons"][i]:
            found.append(f"reason {now['reasons'][i]} was {then['reasons'][i]}")
    if now.get("branches", 0) > then.get("branches", 0):
        found.append(f"branches {now['branches']} were {then['branches']}")
    for name, sign in (("lower", -1), ("upper", 1)):
        if name in then:
            found += [f"{name} {line}" for line in worse(now[name], then[name], sign)]
        if name in then.get("inside", {}):
            inside = worse(now["inside"][name], then["inside"][name], -sign)
            found += [f"attained {name} {line}" for line in inside]
    for a, b in zip(now.get("steps", ()), then.get("steps", ()), strict=True):
        found += regressions(a, b)
    return found


@pytest.fixture(scope="module")
def frozen() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_no_answer_is_worse_than_it_was(name: str, frozen: dict[str, dict[str, Any]]) -> None:
    assert not regressions(CASES[name](), frozen[name])


def test_every_frozen_case_is_run(frozen: dict[str, dict[str, Any]]) -> None:
    assert list(frozen) == list(CASES)


def test_what_is_worse_is_seen() -> None:
    then = {
        "regions": [3], "status": ["exact"], "reasons": ["closed"], "lower": [[0.0]], "upper": [[1.0]],
        "inside": {"upper": [[0.9]]}, "branches": 5,
    }  # fmt: skip
    assert not regressions(then, then)
    assert not regressions({**then, "upper": [[0.95]], "lower": [[0.1]], "branches": 4}, then)
    assert not regressions(then, {**then, "status": ["bounded"], "reasons": ["budget"]})
    for change in (
        {"regions": [4]}, {"status": ["bounded"]}, {"reasons": ["gap"]}, {"lower": [[-1e-8]]},
        {"upper": [[1 + 1e-8]]}, {"inside": {"upper": [[0.89]]}}, {"branches": 6},
    ):  # fmt: skip
        assert len(regressions({**then, **change}, then)) == 1
    assert regressions({**then, "status": ["not equivalent"]}, {**then, "status": ["equivalent"]})
    assert regressions({**then, "steps": [{**then, "regions": [2]}]}, {**then, "steps": [then]})


def record() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    FILE.write_text(
        "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(case())}" for name, case in CASES.items()) + "\n}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(__doc__)
    record()
