"""Any graph of affine and piecewise linear operations as a chain of affine layers and ReLUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchreach.graph.layers import ElementwiseAffine, Rearrange, linear, magnitude, with_bias_magnitude
from torchreach.graph.lowering import ABSOLUTE, HARDSIGMOID, RELU, Graph, Node, PiecewiseLinear, lower

FUNCTIONS = {
    "relu": (RELU, torch.relu),
    "leaky": (PiecewiseLinear.leaky(0.1), lambda z: nn.functional.leaky_relu(z, 0.1)),
    "relu6": (PiecewiseLinear.clamp(0, 6), nn.functional.relu6),
    "hardtanh": (PiecewiseLinear.clamp(-1, 2), lambda z: z.clamp(-1, 2)),
    "at least": (PiecewiseLinear.clamp(-1.5, None), lambda z: z.clamp(min=-1.5)),
    "at most": (PiecewiseLinear.clamp(None, 0.5), lambda z: z.clamp(max=0.5)),
    "absolute": (ABSOLUTE, torch.abs),
    "hardsigmoid": (HARDSIGMOID, nn.functional.hardsigmoid),
}


def dense(n: int, m: int, seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(n, m, dtype=torch.float64)


def chain_of(*parts: tuple) -> Graph:
    """A graph from (op, inputs, shape, value) of each node after the input, whose shape comes first."""
    nodes = [Node("input", (), parts[0], "x")]
    for i, (op, inputs, shape, value) in enumerate(parts[1:]):
        nodes.append(Node(op, inputs, shape, f"n{i}", value))
    return Graph(tuple(nodes))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_piecewise_linear_function_is_a_sum_of_relus(name: str) -> None:
    f, reference = FUNCTIONS[name]
    graph = chain_of((3,), ("layer", (0,), (4,), dense(3, 4, 0)), ("pointwise", (1,), (4,), f))
    x = 5 * torch.randn(200, 3, dtype=torch.float64)
    torch.testing.assert_close(lower(graph)(x), reference(graph.nodes[1].value(x)))


def residual() -> tuple[Graph, nn.Module]:
    first, second, last = dense(3, 4, 0), dense(4, 4, 1), dense(8, 2, 2)
    graph = chain_of(
        (3,),
        ("layer", (0,), (4,), first),
        ("pointwise", (1,), (4,), RELU),
        ("layer", (2,), (4,), second),
        ("pointwise", (3,), (4,), PiecewiseLinear.leaky(0.2)),
        ("add", (2, 4), (4,), None),
        ("maximum", (5, 1), (4,), None),
        ("cat", (5, 6), (8,), 1),
        ("layer", (7,), (2,), last),
    )

    class Reference(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = first(x)
            h = z.relu()
            s = h + nn.functional.leaky_relu(second(h), 0.2)
            return last(torch.cat((s, torch.maximum(s, z)), 1))

    return graph, Reference()


def test_values_that_are_needed_later_are_carried_past_relus() -> None:
    graph, reference = residual()
    network = lower(graph)
    x = 3 * torch.randn(500, 3, dtype=torch.float64)
    torch.testing.assert_close(network(x), reference(x))
    assert sum(type(layer).__name__ in ("ReLU", "MaskedReLU") for layer in network) == 3


def test_a_chain_of_relus_stays_a_plain_chain() -> None:
    layers = dense(3, 4, 0), dense(4, 2, 1)
    graph = chain_of(
        (3,), ("layer", (0,), (4,), layers[0]), ("pointwise", (1,), (4,), RELU), ("layer", (2,), (2,), layers[1])
    )
    network = lower(graph)
    assert [type(layer) for layer in network] == [nn.Linear, nn.ReLU, nn.Linear]
    assert network[0] is layers[0]


def test_affine_graphs_know_their_matrix_and_its_magnitude() -> None:
    graph, _ = residual()
    for layer, size in zip(lower(graph)[::2], (3, 8, 16, 8), strict=True):
        unit = torch.eye(size, dtype=torch.float64)
        bias = layer(torch.zeros_like(unit[:1]))
        matrix = linear(layer, unit)
        torch.testing.assert_close(layer(unit) - bias, matrix)
        assert (magnitude(layer, unit) >= matrix.abs() - 1e-12).all()
        assert (with_bias_magnitude(layer, unit) >= magnitude(layer, unit) + bias.abs() - 1e-12).all()


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}], ids=str)
def test_transposed_convolutions_have_an_affine_rule(kind: type, options: dict) -> None:
    torch.manual_seed(0)
    layer = kind(4, 6, 3, dtype=torch.float64, **options)
    shape = (4, 5) if kind is nn.ConvTranspose1d else (4, 5, 4)
    x, e = (torch.randn(2, *shape, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(linear(layer, x), layer(x) - layer(torch.zeros_like(x)))
    assert (linear(layer, e).abs() <= magnitude(layer, e.abs()) + 1e-12).all()


def test_rearrangements_act_on_every_row() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    torch.testing.assert_close(Rearrange("permute", 0, 2, 1)(x), x.transpose(1, 2))
    torch.testing.assert_close(Rearrange("slice", 2, 1, None, 2)(x), x[:, :, 1::2])
    torch.testing.assert_close(Rearrange("mean", (1,), False, terms=3)(x), x.mean(1))
    torch.testing.assert_close(Rearrange("index_select", 1, torch.tensor([2, 0, 0]))(x), x[:, [2, 0, 0]])
    torch.testing.assert_close(ElementwiseAffine(torch.tensor(2.0), torch.tensor(1.0))(x), 2 * x + 1)
