"""The merged network: Lemma 1, Lemma 2 and Theorem 1 of Mo, Yang, Lu, Xiang (2024), and its layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torchreach as tr
from tests.networks import DEVICES, random_network
from torchreach.core.errors import InvalidNetworkError, ShapeError, UnsupportedLayerError
from torchreach.graph.layers import linear, magnitude


def merged_pair(sizes1: list[int], sizes2: list[int]) -> tuple[nn.Module, nn.Module, tr.MergedNetwork]:
    original, compressed = random_network(1, sizes1), random_network(2, sizes2)
    return original, compressed, tr.merge(original, compressed)


SHAPES = [
    ([3, 5, 2], [3, 5, 2]),
    ([3, 5, 2], [3, 4, 6, 2]),  # different depths
    ([3, 7, 5, 4, 2], [3, 2, 2]),  # different depths and widths
    ([3, 2], [3, 4, 4, 2]),  # one network without any ReLU
    ([3, 2], [3, 2]),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("sizes1", "sizes2"), SHAPES)
def test_theorem_1_the_merged_network_is_the_difference(device: str, sizes1: list[int], sizes2: list[int]) -> None:
    original, compressed, merged = (module.to(device) for module in merged_pair(sizes1, sizes2))
    x = torch.randn(50, 3, dtype=torch.float64, device=device)
    torch.testing.assert_close(merged(x), original(x) - compressed(x), atol=1e-12, rtol=0)


def test_lemma_1_a_hidden_merged_layer_is_both_layers_side_by_side() -> None:
    original, compressed, merged = merged_pair([3, 5, 4, 2], [3, 6, 3, 2])
    x = torch.randn(20, 3, dtype=torch.float64)
    features, z1, z2 = x, x, x
    for i in range(4):
        features, z1, z2 = merged[i](features), original[i](z1), compressed[i](z2)
        torch.testing.assert_close(features, torch.cat((z1, z2), 1), atol=1e-13, rtol=0)


def test_lemma_2_extension_by_identity_layers_changes_nothing() -> None:
    original, compressed, merged = merged_pair([3, 5, 2], [3, 4, 6, 4, 2])
    x = torch.randn(20, 3, dtype=torch.float64)
    features = x
    for layer in list(merged)[:-1]:
        features = layer(features)
    # negative outputs of the shorter network pass the longer one's ReLUs
    assert (original(x) < 0).any()
    torch.testing.assert_close(features, torch.cat((original(x), compressed(x)), 1), atol=1e-13, rtol=0)


def test_the_comparison_layer_is_the_difference_of_its_halves() -> None:
    x = torch.arange(8.0).reshape(2, 4)
    assert torch.equal(tr.Comparison(2)(x), x[:, :2] - x[:, 2:])


def test_parts_of_merged_layers_equal_their_dense_twins() -> None:
    _, _, merged = merged_pair([3, 5, 4, 2], [3, 6, 3, 2])
    layer = merged[2]
    dense = torch.block_diag(layer.first[0].weight, layer.second[0].weight)
    x = torch.randn(7, 11, dtype=torch.float64)
    torch.testing.assert_close(linear(layer, x), x @ dense.T)
    torch.testing.assert_close(magnitude(layer, x.abs()), x.abs() @ dense.T.abs())
    comparison = torch.cat((torch.eye(2), -torch.eye(2)), 1).double()
    y = torch.randn(7, 4, dtype=torch.float64)
    torch.testing.assert_close(linear(merged[-1], y), y @ comparison.T)
    torch.testing.assert_close(magnitude(merged[-1], y.abs()), y.abs() @ comparison.abs().T)


def test_no_parameter_is_copied_or_stored_densely() -> None:
    original, compressed, merged = merged_pair([3, 5, 4, 2], [3, 6, 3, 2])
    given = {id(p) for module in (original, compressed) for p in module.parameters()}
    assert {id(p) for p in merged.parameters()} == given


def test_training_the_compressed_network_changes_the_merged_one() -> None:
    original, compressed, merged = merged_pair([3, 5, 2], [3, 4, 2])
    x = torch.randn(10, 3, dtype=torch.float64)
    before = merged(x).detach()
    optimizer = torch.optim.SGD(compressed.parameters(), lr=0.1)
    merged(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(merged(x), before)
    torch.testing.assert_close(merged(x), original(x) - compressed(x))


def test_merging_leaves_the_modes_of_the_networks_alone() -> None:
    original = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).train()
    mean = original[1].running_mean.clone()
    tr.merge(original, copy.deepcopy(original).eval())
    assert original.training
    assert original[1].training
    assert torch.equal(original[1].running_mean, mean)


def test_star_batches_go_through_the_layers_as_points_do() -> None:
    original, compressed, merged = merged_pair([2, 5, 4, 2], [2, 4, 2])
    stars = tr.StarBatch.from_box(-torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    union = stars
    for layer in merged:
        union = layer(union)
    assert isinstance(union, tr.StarBatch)
    assert len(union) == len(tr.reach(merged, stars))
    assert (union.origin == 0).all()
    x = stars.sample(40)[0]
    y = (original(x) - compressed(x)).detach()
    covered = union.contains(y[None].expand(len(union), -1, -1), tolerance=1e-7)
    assert covered.any(0).all()


def test_convolutions_need_and_use_the_input_shape() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).double()
    compressed = copy.deepcopy(original)
    with torch.no_grad():
        compressed[0].weight.mul_(0.9)
    with pytest.raises(ShapeError, match=r"input_shape=\(...\) is required"):
        tr.merge(original, compressed)
    merged = tr.merge(original, compressed, (1, 4, 4))
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(merged(x), original(x) - compressed(x))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 1:3] = True
    stars = tr.StarBatch.from_image(x[:2], 0.5, mask)
    found = tr.discrepancy(original, compressed, stars)
    samples = stars.sample(2000)
    y = (original(samples.flatten(0, 1)) - compressed(samples.flatten(0, 1))).reshape(2, 2000, -1).abs()
    assert (y.amax(1) <= found.upper).all()
    assert (found.upper - found.lower).max() < 1e-9


def test_networks_that_cannot_be_compared_are_refused() -> None:
    good = random_network(0, [3, 4, 2])
    with pytest.raises(ShapeError, match="equally many inputs: the original has 3, the compressed 5"):
        tr.merge(good, random_network(0, [5, 4, 2]))
    with pytest.raises(ShapeError, match="equally many outputs: the original has 2, the compressed 3"):
        tr.merge(good, random_network(0, [3, 4, 3]))
    with pytest.raises(UnsupportedLayerError, match=r"layer 1 \('1', Softsign\)"):
        tr.merge(good, nn.Sequential(nn.Linear(3, 2), nn.Softsign()))
    broken = random_network(0, [3, 4, 2])
    with torch.no_grad():
        broken[2].weight[0, 0] = float("nan")
    with pytest.raises(InvalidNetworkError, match=r"2\.weight"):
        tr.merge(good, broken)


def test_layers_say_what_they_take() -> None:
    _, _, merged = merged_pair([3, 5, 2], [3, 4, 2])
    with pytest.raises(ShapeError, match="MergedReLU takes a torch.Tensor or a torchreach.StarBatch, got list"):
        merged[1]([1.0])
