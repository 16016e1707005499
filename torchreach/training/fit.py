"""Training inside one iteration of repair: the options, and one run of an optimiser over points and data.

minimise  |f(x) - y|^2 over points (x, y)  +  data_weight * loss(f(inputs), labels)

with a certified bound over boxes in place of the first term where repair asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import cos, isfinite, pi
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from torchreach.core.checkpoint import Checkpoint
from torchreach.core.checks import check_count, check_positive
from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import OptionError
from torchreach.core.plain import digest

Batch = tuple[Tensor, Tensor]
Data = Batch | Iterable[Batch]


@dataclass(frozen=True)
class RepairOptions:
    """How the compressed network is retrained in one iteration of `repair`.

    Attributes:
        samples: random points of each input star, drawn anew in every iteration; the witnesses of all
            evaluations so far are added.
        epochs: passes over the points.
        batch_size: points per optimiser step; of boxes (`loss="certified"`), which cost more, at most 16.
        learning_rate: of Adam. Whatever the optimiser, its rate falls to zero along a cosine within an
            iteration, and is halved after one that brought the certificate no closer to the target.
        optimizer: takes a list of parameters, returns the `torch.optim.Optimizer` to use instead of Adam.
        data_weight: weight of the loss on `repair`'s `data`.
        reduce_range: of deployed networks: calibrate what goes into int8 layers to half of the codes, as torch does
            on x86, where processors without VNNI instructions saturate the kernels' 16-bit partial sums. Without it
            results are rounded half as coarsely; for processors that do not saturate.
    """

    samples: int = 200
    epochs: int = 50
    batch_size: int = 256
    learning_rate: float = 1e-2
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None
    data_weight: float = 0.1
    reduce_range: bool = True

    def __post_init__(self) -> None:
        for name in ("samples", "epochs", "batch_size"):
            check_count(f"RepairOptions.{name}", getattr(self, name))
        check_positive("RepairOptions.learning_rate", self.learning_rate)
        if not (self.data_weight >= 0 and isfinite(self.data_weight)):
            raise OptionError(f"RepairOptions.data_weight must be at least 0, got {self.data_weight!r}")
        if not (self.optimizer is None or callable(self.optimizer)):
            raise OptionError(f"RepairOptions.optimizer must be callable or None, got {self.optimizer!r}")


def fit(
    free: list[Tensor],
    output: Callable[[Tensor], Tensor],
    points: Batch,
    data: Data | None,
    training: RepairOptions,
    rate: float,
    generator: torch.Generator,
    objective: Callable[[Tensor, Tensor], Tensor] | None = None,
    clock: Clock = NO_LIMIT,
) -> float:
    """Trains `free`, in place, until output(x) is near y; returns the mean squared error of the last epoch.

    output: inputs -> outputs [B, N], differentiable in `free`.
    points: x [B, *shape] and y [B, N].
    rate: factor of the learning rate.
    objective: what to minimise over batches of the two tensors in `points`, in place of the mean squared error.
    clock: ends it between two batches; the outcome is then half trained.
    """
    objective = objective or partial(_loss, output)
    with _own_random_state(generator, free[0].device), torch.enable_grad():
        return _fit(free, output, points, data, training, rate, generator, objective, clock)


def fit_once(
    files: Checkpoint | None,
    free: list[Tensor],
    output: Callable[[Tensor], Tensor],
    points: Batch,
    data: Data | None,
    training: RepairOptions,
    rate: float,
    generator: torch.Generator,
    objective: Callable[[Tensor, Tensor], Tensor] | None = None,
    clock: Clock = NO_LIMIT,
) -> float:
    """`fit`, whose outcome a checkpoint keeps: from the same start, points and rate it is taken again from there."""
    if files is None:
        return fit(free, output, points, data, training, rate, generator, objective, clock)
    state = generator.get_state()
    name = f"trained-{digest(free, points, rate, state)[:32]}"
    found = files.load(name)
    if found is not None:
        with torch.no_grad():
            for value, new in zip(free, found["free"], strict=True):
                value.copy_(new)
        generator.set_state(found["generator"])
        return found["loss"]
    loss = fit(free, output, points, data, training, rate, generator, objective, clock)
    if not clock.over:
        files.save(name, {"free": list(free), "generator": generator.get_state(), "loss": loss})
    return loss


def run(network: nn.Module, x: Tensor) -> Tensor:
    """Outputs [B, N] at x [B, *shape], on the network's device and in its dtype."""
    like = next(network.parameters(), None)
    if like is None:  # int8 modules keep their numbers elsewhere, take float32 and run on the CPU
        like = torch.zeros(())
    with torch.no_grad():
        return network(x.to(like.device, like.dtype, copy=True)).flatten(1)  # it may change its input in place


def batches(data: Data, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Batches without end: random ones of two tensors, or those of an iterable over and over."""
    if isinstance(data, tuple) and isinstance(data[0], Tensor):
        inputs, labels = cast(Batch, data)
        while True:
            for part in torch.randperm(len(inputs), generator=generator).split(size):
                yield inputs[part.to(inputs.device)], labels[part.to(labels.device)]
    while True:
        empty = True
        for inputs, labels in data:
            empty = False
            yield inputs, labels
        if empty:
            raise OptionError("data must be (inputs, labels) or give batches each time it is iterated, got none")


def _fit(
    free: list[Tensor],
    output: Callable[[Tensor], Tensor],
    points: Batch,
    data: Data | None,
    training: RepairOptions,
    rate: float,
    generator: torch.Generator,
    objective: Callable[[Tensor, Tensor], Tensor],
    clock: Clock,
) -> float:
    make = training.optimizer or (lambda p: torch.optim.Adam(p, lr=training.learning_rate))
    optimizer = make(free)
    x, y = (part.to(free[0].device) for part in points)
    size = training.batch_size
    steps = training.epochs * -(-len(x) // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate * (1 + cos(pi * step / steps)) / 2)
    more = None if data is None else batches(data, size, generator)
    total = torch.zeros((), device=x.device)
    for _ in range(training.epochs):
        order = torch.randperm(len(x), generator=generator)
        total = torch.zeros_like(total)
        for part in order.to(x.device).split(size):
            if clock.over:
                return float(total)
            batch = None if more is None else next(more)
            error = torch.zeros_like(total)

            def closure(part: Tensor = part, batch: Batch | None = batch, error: Tensor = error) -> Tensor:
                optimizer.zero_grad()
                loss = objective(x[part], y[part])
                error.copy_(loss.detach())
                if batch is not None:
                    loss = loss + training.data_weight * _loss(output, *batch)
                loss.backward()
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]  # a closure, because L-BFGS needs one
            schedule.step()
            total += error * (len(part) / len(x))
    return float(total)


def _loss(output: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error to floating-point y [B, N], cross entropy to labels y [B]."""
    out = output(x)
    if y.is_floating_point():
        return mse_loss(out, y.to(out))
    return cross_entropy(out, y.to(out.device).long())


@contextmanager
def _own_random_state(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Global random numbers within the block follow from `generator`, and are what they were after it.

    Only the user's optimiser or data loader draws from them; our own draws have a generator.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        draw = int(torch.randint(2**31, (), generator=generator))
        torch.default_generator.manual_seed(draw)
        if devices:
            torch.cuda.manual_seed(draw)
        yield
