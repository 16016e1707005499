"""Repair: retrain a compressed network until a certificate says it is close enough to the original.

Mo, Yang, Lu, Xiang: Compression Repair for Feedforward Neural Networks Based on Model Equivalence Evaluation
(2024), Algorithm 1. One iteration, with y1 the original and y2 the compressed network:

    points   x in the input sets
    targets  y2(x) + step / alpha
    retrain  y2 on mean squared error, put it back on its grid and masks
    evaluate the certified discrepancy of the network as deployed; stop once it lies in the target set O

The step is signed, from y2 towards y1. Equation 20 as printed adds the maximal magnitude of y1 - y2, which
moves an output that is already too large further away; it is not offered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from torchreach.discrepancy import discrepancy
from torchreach.errors import InvalidNetworkError, OptionError, ShapeError
from torchreach.networks.chain import evaluation_mode
from torchreach.networks.merge import merge
from torchreach.networks.quantized import Constraints, standalone_copy
from torchreach.options import Budget, Exact
from torchreach.results import Discrepancy, RepairResult, RepairStep
from torchreach.sets.star import StarBatch
from torchreach.tolerances import Tolerances

log = logging.getLogger(__name__)

STEPS = ("pointwise", "extremum", "midpoint")
OVER = ("all", "stars", "outputs")
Batch = tuple[Tensor, Tensor]
Data = Batch | Iterable[Batch]


class Target:
    """A set of discrepancies. Made by `Target.factor`, `Target.bounds` and `Target.test`."""

    @staticmethod
    def factor(factor: float, over: str = "all") -> Target:
        """The certified upper bound of the largest |y1 - y2| falls to `factor` times its first value, or below.

        over: what it is the largest of: "all", every input star and output together; "stars", each star's
            outputs (equation 15), so that every star must improve by the factor; "outputs", each output of
            each star by itself (equation 16).
        """
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1:
            raise OptionError(f"a target factor must lie in (0, 1), got {factor!r}")
        _check_choice("over", over, OVER)
        return _Factor(float(factor), over, None)

    @staticmethod
    def bounds(lower: float | Tensor, upper: float | Tensor) -> Target:
        """The certified signed range of y1 - y2 lies in [lower, upper].

        lower, upper: numbers, or tensors that broadcast to [S, N] (stars, outputs).
        """
        try:
            low = torch.as_tensor(lower, dtype=torch.float64)
            high = torch.as_tensor(upper, dtype=torch.float64)
            ordered = bool((low <= high).all())
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(f"target bounds must be numbers or tensors of one shape: {error}") from None
        if not ordered:
            raise OptionError(f"target bounds must satisfy lower <= upper, got {lower} and {upper}")
        return _Bounds(low, high)

    @staticmethod
    def test(test: Callable[[Discrepancy], bool]) -> Target:
        """`test(discrepancy)` is true. Use its certified members: upper, range_lower, range_upper."""
        if not callable(test):
            raise OptionError(
                f"target must be a factor in (0, 1), a Target or a callable from Discrepancy to bool, got {test!r}"
            )
        return _Test(test)

    @staticmethod
    def of(value: Target | float | Callable[[Discrepancy], bool]) -> Target:
        """A Target as it is, a number as `Target.factor`, a callable as `Target.test`."""
        if isinstance(value, Target):
            return value
        return Target.factor(value) if isinstance(value, int | float) else Target.test(value)

    def check(self, shape: tuple[int, int]) -> None:
        """Raises OptionError if the target does not fit discrepancies [S, N]."""

    def anchored(self, first: Discrepancy) -> Target:  # noqa: ARG002
        """The target as it stands once the first discrepancy is known."""
        return self

    def holds(self, found: Discrepancy) -> bool:
        """Whether `found` is certified to lie in the set."""
        return self.excess(found) <= 0

    def excess(self, found: Discrepancy) -> float:
        """How far `found` is from the set; the smaller, the closer."""
        raise NotImplementedError


@dataclass(frozen=True)
class RepairOptions:
    """How the compressed network is retrained in one iteration of `repair`.

    Attributes:
        samples: random points of each input star, drawn anew in every iteration; the witnesses of all
            evaluations so far are added.
        epochs: passes over the points.
        batch_size: points per optimiser step.
        learning_rate: of Adam. Whatever the optimiser, its rate falls to zero along a cosine within an
            iteration, and is halved after one that brought the certificate no closer to the target.
        optimizer: takes a list of parameters, returns the `torch.optim.Optimizer` to use instead of Adam.
        data_weight: weight of the loss on `repair`'s `data`.
    """

    samples: int = 200
    epochs: int = 50
    batch_size: int = 256
    learning_rate: float = 1e-2
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None
    data_weight: float = 0.1

    def __post_init__(self) -> None:
        for name in ("samples", "epochs", "batch_size"):
            _check_count(f"RepairOptions.{name}", getattr(self, name))
        _check_positive("RepairOptions.learning_rate", self.learning_rate)
        if not (self.data_weight >= 0 and isfinite(self.data_weight)):
            raise OptionError(f"RepairOptions.data_weight must be at least 0, got {self.data_weight!r}")
        if not (self.optimizer is None or callable(self.optimizer)):
            raise OptionError(f"RepairOptions.optimizer must be callable or None, got {self.optimizer!r}")


def repair(
    original: nn.Module,
    compressed: nn.Module,
    stars: StarBatch,
    *,
    target: Target | float | Callable[[Discrepancy], bool],
    alpha: float = 2.0,
    step: str = "pointwise",
    iterations: int = 20,
    training: RepairOptions | None = None,
    data: Data | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    constraints: Constraints | None = None,
    seed: int = 0,
    method: Exact | None = None,
    budget: Budget | None = None,
    tolerances: Tolerances | None = None,
    progress: Callable[[RepairStep], None] | None = None,
) -> RepairResult:
    """Copy of `compressed`, retrained until its certified discrepancy to `original` lies in the target set.

    The certificate always speaks of the network as deployed: zeros back at zero, quantised weights back on
    their grid (trained through, with straight-through rounding). An iteration that brings it no closer to the
    target is undone, and the next trains at half the rate; so the result is the evaluated network closest to
    the target. Neither given network, nor torch's global random state, is changed; equal seeds give equal
    results on one machine and device.

    Args:
        original, compressed: networks of supported layers with equal input and output sizes.
        stars: input stars [S].
        target: the set O, see `Target`; a number in (0, 1) is `Target.factor`, a callable `Target.test`.
        alpha: targets lie 1 / alpha of the step away from the compressed network's output, alpha > 0.
        step: "pointwise": y1(x) - y2(x) at each training point. "extremum": the end of larger magnitude of
            the certified range of y1 - y2, per star and output. "midpoint": the middle of that range.
        iterations: most retrainings.
        training: points, epochs and optimiser of one retraining.
        data: (inputs, labels), or an iterable of such batches, to keep what the network does elsewhere:
            cross entropy for integer labels, mean squared error for floating-point ones (`original(inputs)`
            where there are no labels).
        evaluate: accuracy of a network, recorded in the history.
        constraints: what keeps the network compressed; by default `Constraints.read(compressed)`.
        method, budget, tolerances: of every `discrepancy`. Each evaluation has the whole budget; a bounded
            evaluation reaches the target only if its certified bounds do.
        progress: called with each `RepairStep`, the evaluation of the given network first.

    Raises: OptionError; InvalidNetworkError if no parameter trains; as `discrepancy`.
    """
    goal = Target.of(target)
    training = training or RepairOptions()
    _check_choice("step", step, STEPS)
    _check_positive("alpha", alpha)
    _check_count("iterations", iterations)
    if isinstance(data, tuple) and (len(data) != 2 or len(data[0]) != len(data[1])):
        sizes = " and ".join(str(len(part)) for part in data)
        raise ShapeError(f"data must be (inputs, labels) of equal length, got {sizes}")
    if not isinstance(stars, StarBatch):
        raise ShapeError(f"repair needs a torchreach.StarBatch, got {type(stars).__name__}")
    reference = merge(original, compressed, stars.shape).first  # in evaluation mode, whatever the original's
    goal.check((len(stars), _run(reference, stars.center).shape[1]))
    student = _Student(compressed, constraints or Constraints.read(compressed), training, seed)
    seeds = torch.Generator().manual_seed(seed)
    history: list[RepairStep] = []
    witnesses: list[Tensor] = []
    closest, index, rate = torch.inf, 0, 1.0

    for iteration in range(iterations + 1):
        began = time.monotonic()
        loss = None
        if iteration:
            draw = int(torch.randint(2**31, (), generator=seeds))
            x = torch.cat((stars.sample(training.samples, draw), *witnesses), 1).flatten(0, 1)
            y1, y2 = _run(reference, x), _run(student.network, x)
            loss = student.retrain(x, _targets(y1, y2, history[index].discrepancy, step, alpha), data, rate)
            if not student.is_finite():
                log.warning("repair: training diverged in iteration %d; halving the learning rate", iteration)
                student.go_back()
                rate /= 2
                continue
        found = discrepancy(original, student.network, stars, method, budget=budget, tolerances=tolerances)
        goal = goal if iteration else goal.anchored(found)
        with evaluation_mode(student.network):
            accuracy = None if evaluate is None else float(evaluate(student.network))
        record = RepairStep(iteration, found, accuracy, loss, goal.holds(found), time.monotonic() - began)
        history.append(record)
        witnesses.append(found.witness)
        if progress is not None:
            progress(record)
        excess = goal.excess(found)
        if not iteration or record.satisfied or excess < closest:
            closest, index = excess, len(history) - 1
            student.keep()
        else:
            student.go_back()
            rate /= 2
        if record.satisfied:
            break

    return RepairResult(student.finished(compressed), tuple(history), history[index].satisfied, index)


@dataclass(frozen=True)
class _Factor(Target):
    ratio: float
    over: str
    allowed: Tensor | None

    def anchored(self, first: Discrepancy) -> Target:
        return _Factor(self.ratio, self.over, self.ratio * self._largest(first))

    def excess(self, found: Discrepancy) -> float:
        assert self.allowed is not None
        return float((self._largest(found) - self.allowed).max())

    def _largest(self, found: Discrepancy) -> Tensor:
        upper = found.upper.double()
        if self.over == "outputs":
            return upper
        return upper.amax(1) if self.over == "stars" else upper.amax()


@dataclass(frozen=True)
class _Bounds(Target):
    lower: Tensor
    upper: Tensor

    def check(self, shape: tuple[int, int]) -> None:
        for bound in (self.lower, self.upper):
            try:
                bound.expand(shape)
            except RuntimeError:
                raise OptionError(
                    f"target bounds must broadcast to {shape} (stars, outputs), got {tuple(bound.shape)}"
                ) from None

    def excess(self, found: Discrepancy) -> float:
        below = self.lower.to(found.range_lower.device) - found.range_lower
        above = found.range_upper - self.upper.to(found.range_upper.device)
        return float(torch.maximum(below, above).max())


@dataclass(frozen=True)
class _Test(Target):
    function: Callable[[Discrepancy], bool]

    def holds(self, found: Discrepancy) -> bool:
        return bool(self.function(found))

    def excess(self, found: Discrepancy) -> float:
        return float(found.upper.max())


class _Student:
    """The network being trained: free parameters, and `network`, which holds them as deployed."""

    def __init__(self, compressed: nn.Module, constraints: Constraints, training: RepairOptions, seed: int) -> None:
        self.network = standalone_copy(compressed).eval()
        self.constraints = constraints
        self.training = training
        self.generator = torch.Generator().manual_seed(seed)
        constraints.check(self.network)
        named = dict(self.network.named_parameters())
        # Half-precision numbers are too coarse to collect small updates.
        self.free = {
            name: value.detach().to(torch.promote_types(value.dtype, torch.float32)).clone().requires_grad_()
            for name, value in named.items()
            if value.requires_grad
        }
        if not self.free:
            raise InvalidNetworkError("repair needs at least one parameter with requires_grad=True, got none")
        self.dtypes = {name: value.dtype for name, value in named.items()}
        self.keep()

    def keep(self) -> None:
        """Remembers the present state for `go_back`."""
        held = (*self.free.values(), *self.network.parameters())
        self.kept = [value.detach().clone() for value in held]

    def go_back(self) -> None:
        with torch.no_grad():
            for value, old in zip((*self.free.values(), *self.network.parameters()), self.kept, strict=True):
                value.copy_(old)

    def is_finite(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self.free.values())

    def retrain(self, x: Tensor, y: Tensor, data: Data | None, rate: float) -> float:
        """Fits y at x, deploys the outcome, returns the mean squared error of the last epoch."""
        device = next(iter(self.free.values())).device
        devices = [device] if device.type == "cuda" else []
        self.network.eval()
        with torch.random.fork_rng(devices):
            # Only the user's optimiser or data loader draws from these; our own draws have a generator.
            draw = int(torch.randint(2**31, (), generator=self.generator))
            torch.default_generator.manual_seed(draw)
            if devices:
                torch.cuda.manual_seed(draw)
            with torch.enable_grad():
                loss = self._fit(x, y, data, rate)
        with torch.no_grad():
            named = dict(self.network.named_parameters())
            for name, value in self.free.items():
                named[name].copy_(value)
            self.constraints.project(self.network)
        return loss

    def _fit(self, x: Tensor, y: Tensor, data: Data | None, rate: float) -> float:
        training = self.training
        free = list(self.free.values())
        make = training.optimizer or (lambda p: torch.optim.Adam(p, lr=training.learning_rate))
        optimizer = make(free)
        size = training.batch_size
        steps = training.epochs * -(-len(x) // size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate * (1 + cos(pi * step / steps)) / 2)
        batches = None if data is None else _batches(data, size, self.generator)
        x, y = x.to(free[0].device), y.to(free[0].device)
        total = torch.zeros((), device=x.device)
        for _ in range(training.epochs):
            order = torch.randperm(len(x), generator=self.generator)
            total = torch.zeros_like(total)
            for part in order.to(x.device).split(size):
                batch = None if batches is None else next(batches)
                error = torch.zeros_like(total)

                def closure(part: Tensor = part, batch: Batch | None = batch, error: Tensor = error) -> Tensor:
                    optimizer.zero_grad()
                    loss = self._loss(x[part], y[part])
                    error.copy_(loss.detach())
                    if batch is not None:
                        loss = loss + training.data_weight * self._loss(*batch)
                    loss.backward()
                    return loss

                optimizer.step(closure)  # type: ignore[arg-type]  # a closure, because L-BFGS needs one
                schedule.step()
                total += error * (len(part) / len(x))
        return float(total)

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error to floating-point y [B, N], cross entropy to labels y [B]."""
        values = self.constraints.straight_through(self.free)
        values = {name: value.to(self.dtypes[name]) for name, value in values.items()}
        like = next(iter(values.values()))
        out = functional_call(self.network, values, (x.to(like.device, like.dtype),)).flatten(1)
        if y.is_floating_point():
            return mse_loss(out, y.to(out))
        return cross_entropy(out, y.to(out.device).long())

    def finished(self, given: nn.Module) -> nn.Module:
        """The network of the last `keep`, every submodule in the mode it was given in."""
        self.go_back()
        for own, theirs in zip(self.network.modules(), given.modules(), strict=True):
            own.training = theirs.training
        return self.network


def _targets(y1: Tensor, y2: Tensor, last: Discrepancy, step: str, alpha: float) -> Tensor:
    """y2 + step / alpha at points ordered star by star: [S * P, N]."""
    y2 = y2.to(y1.device, torch.promote_types(y1.dtype, y2.dtype))
    shift = y1 - y2
    if step != "pointwise":
        low, high = last.range_lower, last.range_upper
        signed = (low + high) / 2 if step == "midpoint" else torch.where(-low > high, low, high)
        signed = signed.to(shift).repeat_interleave(len(y2) // len(low), 0)
        # A spent budget may leave an end of the range infinite; the difference itself never is.
        shift = torch.where(signed.isfinite(), signed, shift)
    return y2 + shift / alpha


def _run(network: nn.Module, x: Tensor) -> Tensor:
    """Outputs [B, N] at x [B, *shape], on the network's device and in its dtype."""
    like = next(network.parameters(), x)
    with torch.no_grad():
        return network(x.to(like.device, like.dtype)).flatten(1)


def _batches(data: Data, size: int, generator: torch.Generator) -> Iterator[Batch]:
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


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and isfinite(value)):
        raise OptionError(f"{name} must be a positive number, got {value!r}")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name} must be a positive integer, got {value!r}")
