"""Networks and input sets shared by tests."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchreach as tr
from tests import simulated_device
from tests.data import require_data
from torchreach.graph.steps import Step
from torchreach.read.steps import steps
from torchreach.verbs.int8_kernels import executed


def devices(*marks: pytest.MarkDecorator) -> list[Any]:
    """What tests are parametrised by as `device`; `marks` are those of the simulated device alone."""
    cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    why_not = simulated_device.WHY_NOT
    simulated = pytest.mark.skipif(why_not is not None, reason=f"no simulated device: {why_not}")
    return [
        "cpu",
        pytest.param("cuda", marks=cuda),
        pytest.param(simulated_device.NAME, marks=(simulated, *marks)),
    ]


DEVICES = devices()
# For tests that take seconds there.
DEVICES_SIM_SLOW = devices(pytest.mark.slow)
METHODS = ["vertices", "programs"]


def random_network(
    seed: int, sizes: list[int], *, whole: bool = False, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    """Seeded ReLU network. `whole` numbers as weights make hyperplanes meet in vertices and coincide."""
    g = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        layer = nn.Linear(n_in, n_out, dtype=dtype)
        with torch.no_grad():
            if whole:
                layer.weight.copy_(torch.randint(-2, 3, layer.weight.shape, generator=g))
                layer.bias.copy_(torch.randint(-1, 2, layer.bias.shape, generator=g))
            else:
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=g, dtype=dtype) / n_in**0.5)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=g, dtype=dtype) * 0.3)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rounded_copy(network: nn.Module, levels: int) -> nn.Module:
    """Copy with weights rounded to multiples of 1 / levels."""
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_((parameter * levels).round() / levels)
    return twin


def random_pair(seed: int, *, max_depth: int = 4, max_width: int = 12) -> tuple[nn.Module, nn.Module, int]:
    """Two networks of one input and output size, and their number of inputs: near copies or strangers."""
    g = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    inputs, outputs = pick(2, 6), pick(1, 3)
    sizes = [inputs, *(pick(2, max_width) for _ in range(pick(1, max_depth) - 1)), outputs]
    original = random_network(seed, sizes, whole=seed % 7 == 6)
    if seed % 3 == 0:
        return original, rounded_copy(original, 8), inputs
    if seed % 3 == 1:
        return original, copy.deepcopy(original).half().double(), inputs
    other = [inputs, *(pick(2, max_width) for _ in range(pick(1, max_depth) - 1)), outputs]
    return original, random_network(seed + 10_000, other, whole=seed % 7 == 6), inputs


def from_arrays(weights: list[np.ndarray], biases: list[np.ndarray]) -> nn.Sequential:
    """Fully connected ReLU network in float64."""
    layers: list[nn.Module] = []
    for weight, bias in zip(weights, biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.array(weight, dtype=np.float64)))
            layer.bias.copy_(torch.from_numpy(np.array(bias, dtype=np.float64)))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def executed_steps(module: nn.Module, shape: tuple[int, ...], kernels: str = "here") -> tuple[Step, ...]:
    """Steps of a deployed network as kernels execute it."""
    found = steps(module, shape, dtype=torch.float64, device=torch.device("cpu"), quantized=True)
    return executed(found, kernels).steps


def cases(*parts: str) -> list[dict]:
    """Cases of one JSON file of the data folder."""
    return json.loads(require_data(*parts).read_text())["cases"]


def acasxu_pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Original and compressed network of one file of the `equivalence` folder."""
    with np.load(require_data("equivalence", name)) as data:
        return tuple(  # type: ignore[return-value]
            from_arrays([data[f"W{i}{tail}"] for i in range(7)], [data[f"b{i}{tail}"] for i in range(7)])
            for tail in ("_orig", "")
        )


def box_of(case: dict, dtype: torch.dtype = torch.float64) -> tr.StarBatch:
    """The input box of a data case, one star."""
    box = torch.tensor(case["box"], dtype=dtype)
    return tr.StarBatch.from_box(box[:, 0], box[:, 1])


def exact(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
