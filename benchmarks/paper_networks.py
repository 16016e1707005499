"""Networks and pictures of the paper's experiment: the published pair, and networks trained here.

Everything is seeded, and runs on one thread. Pixels lie in [-1, 1], as the published networks expect them.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.ao import quantization as eager

import torchreach as tr
from benchmarks import common

PUBLISHED = (784, 256, 64, 10)
TRAINED_HERE = (784, 64, 32, 10)
EPS = 0.05
HELD_OUT = 100


class Classifier(nn.Module):
    """Fully connected ReLU network; the names of its layers are those of the published files."""

    def __init__(self, sizes: tuple[int, ...] = PUBLISHED) -> None:
        super().__init__()
        self.depth = len(sizes) - 1
        for i, (n_in, n_out) in enumerate(pairwise(sizes), 1):
            self.add_module(f"fc{i}", nn.Linear(n_in, n_out))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.depth):
            x = self.relu(self.get_submodule(f"fc{i}")(x))
        return self.get_submodule(f"fc{self.depth}")(x)


class Deployable(nn.Module):
    """A classifier between the stubs that eager-mode conversion asks for; its layers keep their names."""

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.depth = network.depth
        for name, layer in network.named_children():
            self.add_module(name, copy.deepcopy(layer))
        self.quant, self.dequant = eager.QuantStub(), eager.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(Classifier.forward(self, self.quant(x)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures: x [B, 784] float32 in [-1, 1], y [B] long."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def quiet() -> None:
    """torch announces the end of eager-mode quantisation at every step, and the shipped scales are uncalibrated."""
    warnings.filterwarnings("ignore", message=".*quanti", category=UserWarning)
    warnings.filterwarnings("ignore", message=".*reduce_range")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*calibrat")


def pictures() -> Pictures:
    """MNIST through torchvision, unpacked in a folder of its own."""
    from torchvision.datasets import MNIST

    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(common.require_folder() / "mnist", root, dirs_exist_ok=True, copy_function=shutil.copyfile)
        parts = [MNIST(root, train=train, download=True) for train in (True, False)]
        (train_x, train_y), (test_x, test_y) = (
            (part.data.flatten(1).float() / 127.5 - 1, part.targets.clone()) for part in parts
        )
    return Pictures(train_x, train_y, test_x, test_y)


def published_pair() -> tuple[Classifier, nn.Module]:
    """The paper's original, and its int8 network as shipped."""
    folder = common.require_folder() / "fnn_repair"
    original = Classifier()
    original.load_state_dict(load_file(folder / "original.safetensors"))
    return original.eval(), tr.load_int8(folder / "mnist_fnn_s_quan.pth", Classifier())


def trained(data: Pictures, seed: int, epochs: int) -> Classifier:
    """A small classifier, trained by Adam on cross entropy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(TRAINED_HERE)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    batches = epochs * -(-len(data.train_x) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)
    for _ in range(epochs):
        for part in torch.randperm(len(data.train_x), generator=generator).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(data.train_x[part]), data.train_y[part]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def deployed(network: Classifier, x: Tensor) -> nn.Module:
    """Eager-mode int8 module of `network` as torch's own tools make it, calibrated on x.

    The scale of the input alone is set by hand: calibrated on [-1, 1] it would be 2 / 127, and black, which is most
    of every picture, would lie half way between two codes.
    """
    module = Deployable(network).eval()
    weights = eager.default_per_channel_weight_observer
    activations = eager.MinMaxObserver.with_args(dtype=torch.quint8, reduce_range=True)
    inputs = eager.FixedQParamsObserver.with_args(scale=1 / 63, zero_point=63, dtype=torch.quint8)
    module.qconfig = eager.QConfig(activation=activations, weight=weights)  # type: ignore[assignment]
    module.quant.qconfig = eager.QConfig(activation=inputs, weight=weights)  # type: ignore[assignment]
    prepared = eager.prepare(module)
    with torch.no_grad():
        prepared(x)
    return eager.convert(prepared)


def ten_images() -> tuple[Tensor, Tensor]:
    """The paper's ten images [10, 784] float64 and their labels."""
    folder = common.require_folder() / "fnn_repair"
    return (
        torch.from_numpy(np.load(folder / "images.npy")).double().flatten(1),
        torch.from_numpy(np.load(folder / "labels.npy")).long(),
    )


def held_out(data: Pictures, count: int) -> Tensor:
    """Test pictures [count, 784] that are none of the ten and take no part in any training."""
    order = torch.randperm(len(data.test_x), generator=torch.Generator().manual_seed(0))
    images = ten_images()[0].float()
    fresh = [x for x in data.test_x[order[: count + 10]] if not bool((x == images).all(1).any())]
    return torch.stack(fresh[:count]).double()


def stars(images: Tensor) -> tr.StarBatch:
    """The images with their four centre pixels within EPS, in the networks' scale."""
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[13:15, 13:15] = True
    return tr.StarBatch.from_image(images, EPS, mask.flatten())


def accuracy(network: nn.Module, data: Pictures) -> float:
    """Share of the 10,000 test pictures that `network` labels right, in percent."""
    with torch.no_grad():
        return 100 * float((network(data.test_x).argmax(1) == data.test_y).double().mean())


def parameters(network: nn.Module) -> int:
    """Numbers in the weights and biases of linear layers."""
    total = 0
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            total += layer.weight.numel() + layer.bias.numel()
        elif isinstance(layer, torch.ao.nn.quantized.Linear):
            total += layer.weight().numel() + layer.bias().numel()
    return total


def saved(network: nn.Module, path: Path) -> float:
    """Size in KB of the file that the network's numbers are saved to."""
    torch.save(network.state_dict(), path)
    return path.stat().st_size / 1000
