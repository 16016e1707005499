"""The network that repair trains: free numbers that collect small updates, and `network`, the one that is deployed.

A student knows how to become the deployed network again after training: `WeightStudent` puts floating-point
weights back on their grid and zeros; `torchreach.training.int8_student.DeployedStudent` converts to int8.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchreach.compress.constraints import Constraints
from torchreach.core.checkpoint import Checkpoint
from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import InvalidNetworkError
from torchreach.graph.weights import standalone_copy
from torchreach.training.fit import Data, RepairOptions, fit_once
from torchreach.training.loss import DiscrepancyLoss

BOXES = 16  # per optimiser step


class Student(Protocol):
    """What the repair loop asks of a network in training."""

    network: nn.Module
    files: Checkpoint | None  # where what was trained goes, and from which it is taken again

    def calibrate(self, x: Tensor, data: Data | None) -> bool:
        """Fits what is set from data alone, no training, once; whether there was anything to fit."""
        ...

    def retrain(self, x: Tensor, y: Tensor, data: Data | None, rate: float, clock: Clock = NO_LIMIT) -> float:
        """Fits y [B, N] at x [B, *shape], deploys the outcome, returns the mean squared error of the last epoch.

        Where `clock` ends it, the outcome is half trained.
        """
        ...

    def is_finite(self) -> bool:
        """Whether training went well enough to be evaluated."""
        ...

    def keep(self) -> None:
        """Remembers the present state for `go_back`."""
        ...

    def go_back(self) -> None:
        """The state of the last `keep`."""
        ...

    def finished(self, given: nn.Module) -> nn.Module:
        """The network of the last `keep`, every submodule in the mode it was given in."""
        ...


class WeightStudent:
    """A network of floating-point numbers, some of which lie on a grid or are zero.

    certified: original network, lower and upper [S, *shape]: retraining minimises `DiscrepancyLoss` over these boxes
        instead of the distance to targets, and returns its mean.
    """

    def __init__(
        self,
        compressed: nn.Module,
        constraints: Constraints,
        training: RepairOptions,
        seed: int,
        certified: tuple[nn.Module, Tensor, Tensor] | None = None,
    ) -> None:
        self.network = standalone_copy(compressed).eval()
        self.constraints = constraints
        self.files: Checkpoint | None = None
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
        self.boxes = None
        if certified is not None:
            # Sets that are evaluated again and again are small: hidden bounds may be held, see docs/training.md.
            self.bound = DiscrepancyLoss(certified[0], self.network, full_gradient=False)
            self.boxes = certified[1:]
            with torch.no_grad():  # says what does not fit before any work starts
                self._certified(*(part[:1] for part in self.boxes))
        self.keep()

    def calibrate(self, x: Tensor, data: Data | None) -> bool:  # noqa: ARG002
        return False

    def keep(self) -> None:
        held = (*self.free.values(), *self.network.parameters())
        self.kept = [value.detach().clone() for value in held]

    def go_back(self) -> None:
        with torch.no_grad():
            for value, old in zip((*self.free.values(), *self.network.parameters()), self.kept, strict=True):
                value.copy_(old)

    def adopt(self) -> None:
        """The free numbers become those that were written into `network`."""
        named = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, value in self.free.items():
                value.copy_(named[name])

    def is_finite(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self.free.values())

    def retrain(self, x: Tensor, y: Tensor, data: Data | None, rate: float, clock: Clock = NO_LIMIT) -> float:
        self.network.eval()
        points, training, objective = (x, y), self.training, None
        if self.boxes is not None:
            points, objective = self.boxes, self._certified
            training = replace(training, batch_size=min(training.batch_size, BOXES))
        free = list(self.free.values())
        rest = data, training, rate, self.generator, objective, clock
        loss = fit_once(self.files, free, self._output, points, *rest)
        with torch.no_grad():
            named = dict(self.network.named_parameters())
            for name, value in self.free.items():
                named[name].copy_(value)
            self.constraints.project(self.network)
        return loss

    def finished(self, given: nn.Module) -> nn.Module:
        self.go_back()
        for own, theirs in zip(self.network.modules(), given.modules(), strict=True):
            own.training = theirs.training
        return self.network

    def _values(self) -> dict[str, Tensor]:
        values = self.constraints.straight_through(self.free)
        return {name: value.to(self.dtypes[name]) for name, value in values.items()}

    def _certified(self, lower: Tensor, upper: Tensor) -> Tensor:
        return self.bound(lower, upper, self._values())

    def _output(self, x: Tensor) -> Tensor:
        values = self._values()
        like = next(iter(values.values()))
        return functional_call(self.network, values, (x.to(like.device, like.dtype),)).flatten(1)
