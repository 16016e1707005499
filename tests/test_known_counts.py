"""Region counts and exact ranges that two independent public tools agree on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import torchreach as tr
from tests.data import data_folder, require_data
from tests.networks import METHODS, acasxu_pair, box_of, cases, exact, from_arrays

# (network, box) of exact/acasxu.json up to 20,000 regions, and of equivalence/acasxu.json up to 10,000
EXACT = [
    *(("3_7", "prop_3 full"), ("3_7", "prop_4 full"), ("2_3", "prop_4 full"), ("2_3", "prop_3 full")),
    *(("1_1", "prop_4 full"), ("1_1", "prop_3 centre 0.25"), ("1_1", "prop_3 centre 0.5")),
    *(("1_1", f"prop_1 centre {share}") for share in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)),
    ("2_3", "prop_1 centre 0.05"),
]
PAIRS = [
    *(("3_7", "prop_3 full", kind) for kind in ("float16", "int8", "prune30", "identical")),
    *(("1_1", "prop_3 centre 0.25", kind) for kind in ("float16", "int8", "prune30", "identical")),
    *(("3_7", "prop_4 full", kind) for kind in ("float16", "int8", "prune30")),
    *(("2_3", "prop_4 full", kind) for kind in ("float16", "int8")),
]
# The one tool that finishes this case counts coincident cuts twice (7,025); both engines here agree on this.
OUR_COUNT = {("3_7", "prop_4 full", "prune30"): 6740}


def find(file: str, **keys: str) -> dict:
    return next(c for c in cases(file, "acasxu.json") if all(c[k] == v for k, v in keys.items()))


def test_every_known_case_within_the_size_limits_is_listed() -> None:
    listed = {(c["net"], c["case"]) for c in cases("exact", "acasxu.json") if c["regions"] <= 20_000}
    assert listed == set(EXACT)
    pairs = cases("equivalence", "acasxu.json")
    sizes = {(c["net"], c["case"], c["compression"]): c["regions"] or c["regions_one_tool_only"] for c in pairs}
    assert {key for key, size in sizes.items() if size <= 10_000} == set(PAIRS)


@pytest.mark.parametrize(("net", "box"), EXACT)
def test_regions_and_ranges_of_one_network(net: str, box: str) -> None:
    case = find("exact", net=net, case=box)
    network = tr.load(require_data(*case["onnx"].split("/")))
    reached = tr.reach(network, box_of(case), keep_stars=False)
    assert len(reached) == case["regions"]
    assert reached.status == (tr.Status.EXACT,)
    torch.testing.assert_close(reached.lower[0], exact(case["output_lo"]), atol=1e-9, rtol=0)
    torch.testing.assert_close(reached.upper[0], exact(case["output_hi"]), atol=1e-9, rtol=0)
    # certified outside, attained inside
    assert (reached.lower <= reached.attained_lower).all()
    assert (reached.attained_upper <= reached.upper).all()
    assert (reached.upper - reached.attained_upper).max() < 1e-9


def check_pair(net: str, box: str, compression: str, method: str, atol: float) -> None:
    case = find("equivalence", net=net, case=box, compression=compression)
    original, compressed = acasxu_pair(case["npz"])
    found = tr.discrepancy(original, compressed, box_of(case), tr.Exact(method))
    count = OUR_COUNT.get((net, box, compression), case["regions"])
    assert found.regions.tolist() == [count]
    torch.testing.assert_close(found.upper[0], exact(case["max_abs_diff"]), atol=atol, rtol=0)
    torch.testing.assert_close(found.range_lower[0], exact(case["diff_lo"]), atol=atol, rtol=0)
    torch.testing.assert_close(found.range_upper[0], exact(case["diff_hi"]), atol=atol, rtol=0)
    replayed = (original(found.witness[0]) - compressed(found.witness[0])).diagonal().abs()
    torch.testing.assert_close(replayed, found.lower[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize(("net", "box", "compression"), PAIRS)
def test_joint_regions_and_ranges_of_a_pair(net: str, box: str, compression: str) -> None:
    check_pair(net, box, compression, "vertices", 1e-9)


@pytest.mark.parametrize(
    ("net", "box", "compression"),
    [p if p[0] == "3_7" else pytest.param(*p, marks=pytest.mark.slow) for p in PAIRS if p[1] != "prop_4 full"],
)
def test_linear_programs_count_the_same_regions(net: str, box: str, compression: str) -> None:
    check_pair(net, box, compression, "programs", 2e-9)


@pytest.mark.parametrize("method", METHODS)
def test_identical_networks_have_no_discrepancy(method: str) -> None:
    original, twin = acasxu_pair("acas_3_7_identical.npz")
    case = find("equivalence", net="3_7", case="prop_3 full", compression="identical")
    found = tr.discrepancy(original, twin, box_of(case), tr.Exact(method))
    assert found.regions.tolist() == [107]
    assert found.lower.max() == 0
    assert found.upper.max() < 1e-9


def test_float32_intervals_contain_the_float64_ones() -> None:
    for compression in ("float16", "int8"):
        case = find("equivalence", net="3_7", case="prop_3 full", compression=compression)
        original, compressed = acasxu_pair(case["npz"])
        double = tr.discrepancy(original, compressed, box_of(case))
        single = tr.discrepancy(original.float(), compressed.float(), box_of(case, torch.float32))
        assert single.upper.dtype == torch.float32
        assert (single.lower.double() <= double.lower).all()
        assert (single.upper.double() >= double.upper).all()
        assert (single.range_lower.double() <= double.range_lower).all()
        assert (single.range_upper.double() >= double.range_upper).all()
        assert (single.upper - single.lower).max() < 1e-5


def mnist_pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    names = ("original.safetensors", "quantized_dequantized.safetensors")
    files = [load_file(require_data("fnn_repair", name)) for name in names]
    return tuple(  # type: ignore[return-value]
        from_arrays([f[f"fc{i}.weight"] for i in (1, 2, 3)], [f[f"fc{i}.bias"] for i in (1, 2, 3)]) for f in files
    )


QUICK = {2, 12, 14, 34, 66, 74, 90, 109, 487}  # star counts: one on each set of pixels, more where that is quick


def scaling_cases() -> list:
    folder = data_folder()
    if folder is None or not (folder / "fnn_repair" / "scaling.json").exists():
        return []  # pytest shows one skipped test in their place
    every = cases("fnn_repair", "scaling.json")
    known = [(c["name"], c["seed_code_stars"]) for c in every if c["seed_code_status"] == "ok"]
    return [n if stars in QUICK else pytest.param(n, marks=pytest.mark.slow) for n, stars in known if stars <= 700]


@pytest.mark.parametrize("name", scaling_cases())
def test_digit_networks_on_growing_sets_of_pixels(name: str) -> None:
    case = next(c for c in cases("fnn_repair", "scaling.json") if c["name"] == name)
    image = torch.from_numpy(np.load(require_data("fnn_repair", "images.npy")))[case["image_index"]].double()
    mask = torch.zeros(28, 28, dtype=torch.bool)
    if case["pixels"] == "all":
        mask[:] = True
    else:
        mask[tuple(torch.tensor(case["pixels"]).T)] = True
    stars = tr.StarBatch.from_image(image.flatten()[None], case["eps"], mask.flatten())
    found = tr.discrepancy(*mnist_pair(), stars)
    # the reference stars are in float32, good to about 3e-6; its star counts agree all the same
    assert found.regions.tolist() == [case["seed_code_stars"]]
    torch.testing.assert_close(found.range_lower[0], exact(case["lower"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.range_upper[0], exact(case["upper"]), atol=1e-5, rtol=0)
    assert (found.upper - found.lower).max() < 1e-8


@pytest.mark.parametrize("method", METHODS)
def test_halves_of_a_box_count_the_whole_and_the_regions_their_border_cuts(method: str) -> None:
    case = find("exact", net="3_7", case="prop_3 full")
    network = tr.load(require_data(*case["onnx"].split("/")))
    box = exact(case["box"])
    middle = box[3].mean()

    def count(lower: torch.Tensor, upper: torch.Tensor) -> int:
        return len(tr.reach(network, tr.StarBatch.from_box(lower, upper), tr.Exact(method), keep_stars=False))

    to_middle, from_middle = box[:, 1].clone(), box[:, 0].clone()
    to_middle[3] = from_middle[3] = middle
    # on the dividing plane input 3 is fixed: the regions there are those that it cuts in two
    low, high = box[:, 0].clone(), box[:, 1].clone()
    low[3] = high[3] = middle
    border = count(low, high)
    assert border > 0
    assert count(box[:, 0], to_middle) + count(from_middle, box[:, 1]) == case["regions"] + border
