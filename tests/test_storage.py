"""Results come back from their files as they were, and no other file is taken for one."""

from __future__ import annotations

import copy
import dataclasses
import enum
import pickle

import pytest
import torch
from torch import nn

import torchreach as tr
from torchreach.core.results import LayerStats


@pytest.fixture(scope="module")
def case():
    original = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    lower = torch.tensor([[0.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    return original, tr.quantize_weights(original, 3), tr.StarBatch.from_box(lower, lower + 0.5)


def results(case):
    original, compressed, stars = case
    return {
        "discrepancy": lambda: tr.discrepancy(original, compressed, stars),
        "reach": lambda: tr.reach(original, stars),
        "equivalent": lambda: tr.equivalent(original, compressed, stars, 1e-3),
        "repair": lambda: repaired(case),
    }


def repaired(case):
    """The result of a repair that trained nothing."""
    original, compressed, stars = case
    steps = [tr.RepairStep(i, tr.discrepancy(original, compressed, stars), None, 0.5, i > 0, 1.0) for i in range(2)]
    return tr.RepairResult(compressed, tuple(steps), True, 1)


def same(one, two):
    """Whether two values are equal in every field and tensor, dtypes included."""
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, nn.Module):
        return all(same(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    if dataclasses.is_dataclass(one) and not isinstance(one, enum.Enum):
        kept = [f.name for f in dataclasses.fields(one) if f.metadata.get("kept", True)]
        return all(same(getattr(one, name), getattr(two, name)) for name in kept)
    if isinstance(one, tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    return one == two


@pytest.mark.parametrize("verb", ["discrepancy", "reach", "equivalent", "repair"])
def test_a_result_comes_back_as_it_was(case, tmp_path, verb):
    result = results(case)[verb]()
    tr.save_result(result, tmp_path / "result.pt")
    structure = copy.deepcopy(case[1])
    with torch.no_grad():
        structure[0].weight.zero_()
    back = tr.load_result(tmp_path / "result.pt", structure if verb == "repair" else None)
    assert same(result, back)
    assert bool((structure[0].weight == 0).all())
    assert [path.name for path in tmp_path.iterdir()] == ["result.pt"]


def test_only_what_is_seen_of_a_view_is_written(case, tmp_path):
    result = tr.discrepancy(*case)
    result = dataclasses.replace(result, witness=torch.zeros(500_000, *result.witness.shape)[0])
    tr.save_result(result, tmp_path / "result.pt")
    assert (tmp_path / "result.pt").stat().st_size < 50_000


def test_infinite_bounds_and_statistics_are_kept(case, tmp_path):
    result = tr.discrepancy(*case)
    layer = LayerStats("fc", 3, settled={"root": 2})
    result = dataclasses.replace(
        result, upper=torch.full_like(result.upper, torch.inf), stats=dataclasses.replace(result.stats, layers=(layer,))
    )
    tr.save_result(result, tmp_path / "result.pt")
    assert same(result, tr.load_result(tmp_path / "result.pt"))


def test_the_result_of_a_repair_needs_its_network(case, tmp_path):
    tr.save_result(repaired(case), tmp_path / "r.pt")
    with pytest.raises(tr.TorchreachError, match="load_result needs network=, a module of the structure"):
        tr.load_result(tmp_path / "r.pt")
    with pytest.raises(tr.TorchreachError, match="network must have the structure of the repaired one, got Linear: "):
        tr.load_result(tmp_path / "r.pt", nn.Linear(2, 2))


def test_what_is_no_result_is_not_saved(case, tmp_path):
    with pytest.raises(tr.TorchreachError, match="a result of discrepancy, reach, .* is required, got Tensor"):
        tr.save_result(torch.zeros(1), tmp_path / "r.pt")  # pyright: ignore
    with pytest.raises(FileNotFoundError):
        tr.save_result(tr.discrepancy(*case), tmp_path / "nowhere" / "r.pt")
    assert list(tmp_path.iterdir()) == []


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize(
    "kind", ["missing", "text", "cut", "pickle", "state dict", "version", "class", "field", "enum"]
)
def test_other_and_damaged_files_are_refused(case, tmp_path, kind):
    path = tmp_path / "r.pt"
    if kind != "missing":
        tr.save_result(tr.discrepancy(*case), path)
        content = torch.load(path, weights_only=True)
    match kind:
        case "text":
            path.write_text("not a result")
        case "cut":
            path.write_bytes(path.read_bytes()[:-200])
        case "pickle":
            path.write_bytes(pickle.dumps(Harmful(), 2))
        case "state dict":
            torch.save(case[0].state_dict(), path)
        case "version":
            torch.save({**content, "version": 9}, path)
        case "class":
            content["result"]["type"] = "Budget"
            torch.save(content, path)
        case "field":
            del content["result"]["value"]["lower"]
            torch.save(content, path)
        case "enum":
            content["result"]["value"]["status"]["value"][0]["value"] = "certain"
            torch.save(content, path)
    with pytest.raises(tr.TorchreachError, match="r.pt") as caught:
        tr.load_result(path)
    assert type(caught.value).__name__ == "FileFormatError"
