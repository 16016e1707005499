"""The simulated accelerator refuses what CUDA refuses, counts what it should, and leaves no trace; verbs run on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import torchreach as tr
from tests.networks import random_network, rounded_copy
from tests.simulated_device import NAME, WHY_NOT, SimTensor, counting, simulated

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no simulated device: {WHY_NOT}")


@pytest.fixture
def device() -> Iterator[str]:
    with simulated():
        yield NAME


REFUSED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda x, host: x + host,
    "product": lambda x, host: host @ x,
    "concatenation": lambda x, host: torch.cat((x, host)),
    "choice": lambda x, host: torch.where(host > 0, x, x),
    "gathering by a host index": lambda x, host: x.gather(0, host.long()),
    "selection by a host index": lambda x, host: x.index_select(0, host.long()),
    "assignment of a host tensor": lambda x, host: x.index_put_((torch.arange(3, device=x.device),), host),
    "a bound of no dimension": lambda x, host: x.clamp(host[0]),
    "a host tensor and a number of the device": lambda x, host: host + x[0],
    "random numbers of the host": lambda x, _: torch.rand(3, generator=torch.Generator(), device=x.device),
}


@pytest.mark.parametrize("case", REFUSED)
def test_devices_do_not_mix(case: str, device: str) -> None:
    x, host = torch.ones(3, device=device), torch.ones(3)
    with pytest.raises(RuntimeError, match="^Expected (all tensors|a 'sim' device type)"):
        REFUSED[case](x, host)


def test_numpy_is_refused(device: str) -> None:
    with pytest.raises(TypeError, match="can't convert sim:0 device type tensor to numpy"):
        torch.ones(3, device=device).numpy()


def test_numbers_and_indices_of_the_host_are_taken(device: str) -> None:
    x, one = torch.ones(3, device=device), torch.ones(())
    assert (x + one).tolist() == torch.maximum(x, 2 * one).tolist() == [2, 2, 2]
    assert x[torch.tensor([0, 2])].tolist() == x[[0, 2]].tolist() == [1, 1]
    x[x > 0] = 3.0
    x[[0]] = 4.0
    assert x.tolist() == [4, 3, 3]
    assert x.device.type == device


READS: dict[str, tuple[int, Callable[[Tensor], object]]] = {
    "a number": (1, lambda x: float(x[0])),
    "a question": (1, lambda x: bool((x > 0).all())),
    "a list": (1, lambda x: x.tolist()),
    "a copy": (1, lambda x: x.cpu()),
    "where it is not zero": (1, lambda x: x.nonzero()),
    "a mask": (1, lambda x: x[x > 0]),
    "equality": (1, lambda x: torch.equal(x, x)),
    "repetition": (1, lambda x: x.repeat_interleave(x.long())),
    "repetition to a known size": (0, lambda x: x.repeat_interleave(x.long(), output_size=3)),
    "numbers": (2, lambda x: [int(part) for part in x[:2]]),
    "a masked number": (0, lambda x: x.masked_fill_(x > 0, 1.0)),
    "a shape": (0, lambda x: (x.shape, len(x), x[1:].numel())),
}


@pytest.mark.parametrize("case", READS)
def test_reads_are_counted(case: str, device: str) -> None:
    x = torch.ones(3, device=device)
    with counting() as counts:
        READS[case][1](x)
    assert counts.reads == READS[case][0]


def test_launches_uploads_and_bytes_are_counted(device: str) -> None:
    x = torch.ones(4, dtype=torch.float64, device=device)
    with counting(where=True) as counts:
        with counting() as first:
            y = x[1:].view(3, 1).expand(-1, 2).mT + 1  # views are no launches
        torch.empty(3, device=device).zero_()
        torch.tensor([1, 2], device=device)
        x[torch.tensor([0, 1])]
    assert y.shape == (2, 3)
    assert (first.launches, first.uploads, first.bytes) == (1, 0, 2 * 6 * 8)
    assert dict(counts.of("launch")) == {(name, "elsewhere"): 1 for name in ("add", "zero_", "index")}
    assert counts.uploads == 2


def test_lines_are_those_of_the_package(device: str) -> None:
    stars = tr.StarBatch.from_box(-torch.ones(2), torch.ones(2)).to(device)
    with counting(where=True) as counts:
        stars.bounding_box()
    assert counts.launches > 0
    assert all(line.startswith("torchreach/sets/star.py:") for _, line in counts.of("launch"))


def test_nothing_is_left_behind() -> None:
    before = torch.tensor, torch.Generator, torch.as_tensor, torch.__future__.get_swap_module_params_on_conversion()
    with simulated(), simulated():
        network = random_network(0, [2, 3, 1]).to(NAME)
        assert {type(p) for p in network.parameters()} == {SimTensor}
        network(torch.ones(2, dtype=torch.float64, device=NAME)).backward()
    after = torch.tensor, torch.Generator, torch.as_tensor, torch.__future__.get_swap_module_params_on_conversion()
    assert before == after
    assert not torch.sim.is_available()  # type: ignore[attr-defined]
    with torch.random.fork_rng():
        torch.manual_seed(0)


def test_modules_move_and_train_as_elsewhere(device: str) -> None:
    there = random_network(1, [3, 5, 2])
    here = copy.deepcopy(there).to(device)
    weight = here[0].weight
    for network in (here.float(), there.float()):
        x = torch.ones(4, 3, device=weight.device if network is here else "cpu")
        for _ in range(3):
            network.zero_grad()
            network(x).square().sum().backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.1 * parameter.grad
    assert here[0].weight is weight
    assert isinstance(weight, nn.Parameter)
    for one, other in zip(here.cpu().parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(one, other)


class Residual(nn.Module):
    """What tracing reads: masks of the features that a ReLU takes are made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (random_network(seed, [3, 3], dtype=torch.float64) for seed in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.first(x).relu())


def dense() -> nn.Module:
    return random_network(1, [3, 5, 4, 2])


def pooled() -> nn.Module:
    """One of which the order of maxima is made of indices."""
    torch.manual_seed(0)
    layers = (nn.Unflatten(1, (1, 1, 3)), nn.Conv2d(1, 2, (1, 2)), nn.ReLU(), nn.MaxPool2d((1, 2)), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(2, 2)).double()


VERBS: dict[str, tuple[Callable[[], nn.Module], Callable[..., tr.Discrepancy | tr.Equivalence]]] = {
    "exact": (dense, lambda *pair: tr.discrepancy(*pair, "exact")),
    "search": (dense, lambda *pair: tr.discrepancy(*pair, "search", gap=0.5)),
    "epsilon": (dense, lambda *pair: tr.equivalent(*pair, 0.5)),
    "labels": (dense, lambda *pair: tr.equivalent(*pair, top1=True, confidence=0.6)),
    "executed": (dense, lambda one, other, x: tr.discrepancy(one.float(), other.half(), x, arithmetic="executed")),
    "a sum": (Residual, lambda *pair: tr.discrepancy(*pair, "exact")),
    "max-pooling": (pooled, lambda *pair: tr.discrepancy(*pair, "exact")),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_give_the_intervals_of_the_cpu(verb: str) -> None:
    make, run = VERBS[verb]
    middle = torch.linspace(-1, 1, 3, dtype=torch.float64)[None]
    stars = tr.StarBatch.from_box(middle - 0.01, middle + 0.01)
    original = make()
    compressed, found = rounded_copy(original, 16), []
    for device in ("cpu", NAME):
        with simulated():
            one, other = (copy.deepcopy(network).to(device) for network in (original, compressed))
            found.append(run(one, other, stars.to(device)))
    here, there = found
    assert there.upper.device.type == NAME
    torch.testing.assert_close(there.upper.cpu(), here.upper, atol=1e-12, rtol=0)
    torch.testing.assert_close(there.lower.cpu(), here.lower, atol=1e-12, rtol=0)
