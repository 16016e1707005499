"""The demonstration's data, network and compression: handwritten digits, all seeded.

scikit-learn's digits come inside the package (1,797 pictures of 8 x 8, Alpaydin and Kaynak); MNIST (28 x 28,
LeCun, Cortes) is downloaded by torchvision into a folder the user names. Pixels lie in [0, 1].
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from torchreach.app.inputs import InputSet
from torchreach.core.errors import FileFormatError, OptionError
from torchreach.core.extras import need
from torchreach.sets.star import StarBatch

HIDDEN = (64, 32)
BATCH = 64
RATE = 2e-3


@dataclass(frozen=True)
class Digits:
    """Labelled pictures: x [B, height * width] float32 in [0, 1], y [B] long."""

    name: str
    picture_shape: tuple[int, int]
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread on the CPU: as fast for networks of this size, and sums are added in one order on any machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_data(name: str, root: Path | None, seed: int) -> Digits:
    """The pictures of "digits", or of "mnist" below `root`. Raises FileFormatError where MNIST cannot be had."""
    if name == "mnist":
        assert root is not None
        return _mnist(root)
    datasets = need("sklearn.datasets", "the demo")
    pictures, labels = datasets.load_digits(return_X_y=True)
    x = torch.as_tensor(pictures).float() / 16  # stored as whole numbers 0..16
    y = torch.as_tensor(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order[:360], order[360:]
    return Digits("scikit-learn digits", (8, 8), x[train], y[train], x[test], y[test])


def _mnist(root: Path) -> Digits:
    MNIST = need("torchvision.datasets", "--data mnist").MNIST
    try:
        parts = [MNIST(str(root), train=train, download=True) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileFormatError(f"--root {root}: MNIST could not be downloaded or read: {reason}") from None
    (train_x, train_y), (test_x, test_y) = ((p.data.flatten(1).float() / 255, p.targets) for p in parts)
    return Digits("MNIST", (28, 28), train_x, train_y, test_x, test_y)


def train(data: Digits, epochs: int, seed: int) -> nn.Sequential:
    """A fully connected ReLU classifier, trained by Adam on cross entropy."""
    sizes = (data.train_x.shape[1], *HIDDEN, 10)
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for n_in, n_out in pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    network = nn.Sequential(*layers[:-1])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, weight_decay=1e-4)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
    return network.eval()


def accuracy(network: nn.Module, data: Digits) -> float:
    """Share of the test pictures that `network` labels right."""
    parameter = next(network.parameters())
    with torch.no_grad():
        scores = network(data.test_x.to(parameter))
    return float((scores.argmax(1).cpu() == data.test_y).double().mean())


def compress(network: nn.Module, bits: int, prune: float) -> tuple[nn.Module, str]:
    """A compressed copy and what was done to it: small weights set to zero, then all put on a grid."""
    from torchreach.compress.constraints import prune_weights, quantize_weights

    small, how = copy.deepcopy(network), []
    if prune > 0:
        small = prune_weights(small, prune)
        how.append(f"{100 * prune:g} % of the weights pruned")
    if bits:
        small = quantize_weights(small, bits)
        how.append(f"int{bits} weights")
    return small, ", ".join(how) or "unchanged copy"


def input_set(data: Digits, images: int, pixels: int, eps: float) -> InputSet:
    """Test pictures, one of each digit in turn, with their `pixels` central pixels within `eps`, in [0, 1]."""
    count = data.test_x.shape[1]
    for option, value, most in (("--images", images, len(data.test_x)), ("--pixels", pixels, count)):
        if not 1 <= value <= most:
            raise OptionError(f"{option} must lie between 1 and {most}, got {value}")
    rank = torch.zeros_like(data.test_y)  # how many pictures of the same digit come before
    for digit in range(10):
        same = data.test_y == digit
        rank[same] = torch.arange(int(same.sum()))
    chosen = (rank * 10 + data.test_y).argsort(stable=True)[:images]
    height, width = data.picture_shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = (rows - (height - 1) / 2) ** 2 + (columns - (width - 1) / 2) ** 2
    mask = torch.zeros(count, dtype=torch.bool)
    mask[distance.flatten().argsort(stable=True)[:pixels]] = True
    stars = StarBatch.from_image(data.test_x[chosen].double(), eps, mask[None], (0.0, 1.0))
    labels = tuple(f"digit {int(data.test_y[i])}, test picture {int(i)}" for i in chosen)
    text = f"{images} test pictures of {data.name}, their {pixels} central pixels ± {eps:g}, clipped to [0, 1]"
    return InputSet("digits", text, stars, labels, data.picture_shape)
