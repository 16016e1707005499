"""Published lists of VeryDiff and NNEquiv: pairs of networks, an input box, a question, and what others recorded.

Both are read where the data folder has them, laid out as in their repositories; nothing of them is in this project.

`verydiff/`, as verydiff-experiments: `specs/*.csv` of lines `network,network,vnnlib,epsilon,timeout`, in lists whose
name begins with lhc `network,network,vnnlib,confidence,...,timeout`; the files they name; and
`experiments_final/VeryDiff/*/results.csv` of lines `copy, vnnlib, SAFE | UNSAFE | UNKNOWN, nanoseconds, ...`.

`nnequiv/`, as nnequiv-experiments: `instances*.csv` of lines `networks,box,epsilon | top[,strategy]`; the networks
in `benchmarks-versions` (those of `instances.csv` in `benchmarks`); seconds in the notebook
`analysis/Comparison-NNEquiv-Buening.ipynb`; from the repository nnequiv `examples/equiv/properties.py`, the boxes.
"""

from __future__ import annotations

import ast
import csv
import json
import re
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchreach as tr
from benchmarks import common, labels

COLUMNS = (
    *("list", "instance", "asked", "answer", "lower", "upper", "CPU s", "wall s"),
    *("their answer", "their s", "theirs / ours"),
)
SUMMARY = ("peer", "list", "instances", "with files", "run", "decided", "they decided", "both", "theirs / ours, median")
NOTE = "their s: recorded by others on another machine, up to their timeout where they say unknown"
ANSWERS = {"SAFE": "equivalent", "UNSAFE": "not equivalent", "UNKNOWN": "unknown"}
# A folder of results, such as acas-0.05-120, acas-0.5, lhc-top1-0.9-600 and mnist-1.0-global_4-5-600.
RESULTS = re.compile(r"(?P<family>[a-z]+)(-top1)?-(?P<number>\d+\.\d+)(-.*?(?P<timeout>\d+))?")
DECIDED = ("equivalent", "not equivalent")
MARGIN = 1e-9  # rounding of a replay in float64


@dataclass(frozen=True)
class Instance:
    """One line of a list: is |y1 - y2| <= epsilon, or (None) is the label the same, where the original is so sure?"""

    list: str
    name: str
    networks: tuple[Path, Path]
    box: Callable[[], tr.StarBatch | None]  # None where its file or its entry is missing
    epsilon: float | None
    confidence: float | None = None
    their_answer: str | None = None
    their_seconds: float | None = None

    @property
    def asked(self) -> str:
        if self.epsilon is not None:
            return f"<= {self.epsilon:g}"
        return "label" if self.confidence is None else f"label, sure to {self.confidence:g}"

    @property
    def they_decided(self) -> bool:
        """NNEquiv's table has no answers: it decided all that it has seconds for."""
        return self.their_answer in DECIDED or (self.their_answer is None and self.their_seconds is not None)

    @property
    def is_here(self) -> bool:
        return all(path.is_file() for path in self.networks) and self.box() is not None


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return [[cell.strip() for cell in row] for row in csv.reader(file) if row]


def verydiff(folder: Path) -> Iterator[Instance]:
    """Every line and every confidence of the lists, without those for warming up."""
    recorded = {}
    for path in sorted(folder.glob("experiments_final/VeryDiff/*/results.csv")):
        named = RESULTS.fullmatch(path.parent.name)
        for copy, spec, answer, nanoseconds, *_ in rows(path) if named else ():
            key = (named["family"], float(named["number"]), named["timeout"], copy, spec)
            recorded[key] = ANSWERS[answer], int(nanoseconds) / 1e9
    for path in sorted(folder.glob("specs/*.csv")):
        if path.stem.endswith("warmup"):
            continue
        family = path.stem.split("-")[0]
        for first, second, spec, *numbers, timeout in rows(path):
            files, spec = (folder / first, folder / second), folder / spec
            for number in map(float, numbers):
                keys = [(family, number, limit, files[1].stem, spec.stem) for limit in (timeout, None)]
                theirs = next((recorded[key] for key in keys if key in recorded), (None, None))
                asked = (None, number) if family == "lhc" else (number, None)
                name = f"{files[1].stem} {spec.stem}"
                yield Instance(path.stem, name, files, partial(vnnlib_box, spec), *asked, *theirs)


def vnnlib_box(path: Path) -> tr.StarBatch | None:
    return tr.StarBatch.from_vnnlib(path) if path.is_file() else None


def nnequiv(folder: Path) -> Iterator[Instance]:
    """Every line of the lists once, whatever strategies it is listed with."""
    seconds = notebook_seconds(folder / "analysis" / "Comparison-NNEquiv-Buening.ipynb")
    for path in sorted(folder.glob("instances*.csv")):
        nets = folder / ("benchmarks" if path.stem == "instances" else "benchmarks-versions")
        for pair, box, asked in dict.fromkeys(tuple(row[:3]) for row in rows(path)):
            yield Instance(
                path.stem,
                f"{pair} {box}",
                (nets / f"{pair}.onnx", nets / f"{pair}-mirror.onnx"),
                partial(property_box, folder / "examples" / "equiv" / "properties.py", box),
                None if asked == "top" else float(asked),
                their_seconds=seconds.get(f"{pair}-{box}-{asked}"),
            )


@cache
def property_boxes(path: Path) -> dict[str, list[list[float]]]:
    """[[upper], [lower]] by name: the assignments PROPERTY["name"] = literal, or scaleInput of an earlier one."""
    found: dict[str, list[list[float]]] = {}
    for line in ast.parse(path.read_text()).body:
        match line:
            case ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value=name))], value=ast.List() as value):
                found[name] = ast.literal_eval(value)
            case ast.Assign(
                targets=[ast.Subscript(slice=ast.Constant(value=name))],
                value=ast.Call(args=[ast.Subscript(slice=ast.Constant(value=whole)), ast.Constant(value=scale)]),
            ):
                # Theirs takes the first row as the lower end: |scale (first - second)| above the first.
                first, second = found[whole]
                found[name] = [[a + abs(scale * (b - a)) for a, b in zip(first, second, strict=True)], first]
    return found


def property_box(path: Path, name: str) -> tr.StarBatch | None:
    ends = property_boxes(path).get(name) if path.is_file() else None
    if ends is None:
        return None
    upper, lower = torch.tensor(ends, dtype=torch.float64)
    return tr.StarBatch.from_box(lower, upper)


def notebook_seconds(path: Path) -> dict[str, float]:
    """Seconds of NNEquiv by `networks-box-asked`: column NNEquiv of the LaTeX table in the notebook's outputs."""
    if not path.is_file():
        return {}
    cells = json.loads(path.read_text())["cells"]
    names = {k: v for cell in cells for v, k in re.findall(r'"results/(.+?)":\s*"(.+?)"', "".join(cell["source"]))}
    printed = "".join("".join(out.get("text", ())) for cell in cells for out in cell.get("outputs", ()))
    table = [
        [part.strip().replace("\\_", "_") for part in line.rstrip("\\ ").split("&")]
        for line in printed.splitlines()
        if "&" in line
    ]
    if not table:
        return {}
    column = table[0].index("NNEquiv")
    return {names[row[0]]: float(row[column]) for row in table[1:] if row[0] in names}


READERS = {"verydiff": verydiff, "nnequiv": nnequiv}


def scores(path: Path) -> nn.Module:
    """The network in float64, without a last softmax: labels and confidences are taken from what goes into it."""
    network = tr.load(path).double()
    if isinstance(network, nn.Sequential) and isinstance(network[-1], nn.Softmax):
        return network[:-1]
    return network


def differs(instance: Instance, y: Tensor, z: Tensor) -> Tensor:
    """[B]: whether outputs y and z [B, N_out] are an answer no; ties are not."""
    if instance.epsilon is not None:
        return (y - z).abs().amax(1) > instance.epsilon + MARGIN
    return labels.differ(y, z, instance.confidence or 0.0)


def measure(instance: Instance, args: Namespace) -> dict[str, Any]:
    """Our answer on one instance, held against samples and a replay, beside theirs."""
    pair, stars = tuple(map(scores, instance.networks)), instance.box()
    assert stars is not None
    budget = tr.Budget(seconds=args.seconds)
    found, timing = common.measure(
        lambda: tr.equivalent(
            *pair, stars, instance.epsilon, top1=instance.epsilon is None, confidence=instance.confidence, budget=budget
        ),
        repeats=args.repeats,
        warmup=0,
    )
    answer = found.answer[0].value
    refutes = answer == "not equivalent"
    x = found.witness if refutes else stars.sample(args.samples)[0]
    with torch.no_grad():
        no = differs(instance, *(network(x) for network in pair))
    wrong = []
    if answer == "equivalent" and bool(no.any()):
        wrong.append(f"{int(no.sum())} samples contradict the certificate")
    if refutes and not bool(no.all()):
        wrong.append("the witness does not replay")
    if answer in DECIDED and instance.their_answer in DECIDED and answer != instance.their_answer:
        wrong.append(f"{answer}, recorded as {instance.their_answer}")
    theirs = instance.their_seconds
    return {
        "list": instance.list,
        "instance": instance.name,
        "asked": instance.asked,
        "answer": answer,
        "lower": float(found.lower[0]),
        "upper": float(found.upper[0]),
        "CPU s": timing.cpu_seconds,
        "wall s": timing.seconds,
        "their answer": instance.their_answer,
        "their s": theirs,
        "theirs / ours": theirs / timing.seconds if theirs is not None and answer in DECIDED else None,
        "they decided": instance.they_decided,
        "problems": wrong,
    }


def run(peer: str, args: Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the instances whose files are here, until the time for the lists is over, and a summary of every list."""
    instances = [one for one in READERS[peer](common.require_folder() / peer) if args.list in (None, one.list)]
    here = [one for one in instances if one.is_here]
    began, found = time.perf_counter(), []
    for one in here:
        if time.perf_counter() - began > args.total:
            break
        found.append({"peer": peer, **measure(one, args)})
        common.say(f"{one.list}, {one.name}, {one.asked}: {found[-1]['answer']}, {found[-1]['CPU s']:.3g} CPU s")
    lines = [
        summary(
            peer,
            name,
            [one for one in instances if one.list == name],
            sum(one.list == name for one in here),
            [row for row in found if row["list"] == name],
        )
        for name in dict.fromkeys(one.list for one in instances)
    ]
    return found, lines


def summary(peer: str, name: str, instances: list[Instance], here: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """One list: how much of it was run, and how many of those either side decided."""
    both = [row["theirs / ours"] for row in found if row["they decided"] and row["theirs / ours"] is not None]
    return {
        "peer": peer,
        "list": name,
        "instances": len(instances),
        "with files": here,
        "run": len(found),
        "decided": sum(row["answer"] in DECIDED for row in found),
        "they decided": sum(row["they decided"] for row in found),
        "both": len(both),
        "theirs / ours, median": statistics.median(both) if both else None,
    }
