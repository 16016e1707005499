"""Which kernels a comparison of deployed networks covers, and whether this machine does what was predicted.

    "here"         what the engine that packed each layer does on this machine, found by running the layer
    "exact"        exact integer sums: VNNI, ARM
    "saturating"   pairs of products saturated in int16, as fbgemm and onednn form them without VNNI
    "any"          the union of all of these

Each is one way or several to execute the network, the same in all of its layers (`IntegerSums.pairings`). Where no pair
of products can leave int16 for any input of the set, all are one. Files of LiteRT have one way, whatever is asked for:
that of its reference kernels (`graph.requantise`).
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from torchreach.core.clock import NO_LIMIT, Clock, OutOfTime
from torchreach.core.errors import KernelMismatchError, UncoveredKernelsWarning, UnsupportedLayerError
from torchreach.core.results import Kernels
from torchreach.core.roundoff import SINGLE, allowance
from torchreach.domains.input_grid import InputGrid
from torchreach.domains.rounding import outputs, relax
from torchreach.graph.kernels import ENGINES, IntegerSums, Pairing, identified, rounds_bias
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.roundings import PlacedSums, leaves
from torchreach.graph.steps import Step
from torchreach.graph.weights import evaluation_mode, standalone_copy
from torchreach.read.dialects.qat import observers

log = logging.getLogger(__name__)

# What a deployed module computes here at inputs [B, *shape], [B, N_out]; None where it cannot be run.
Run = Callable[[Tensor], Tensor | None]

CHOICES = ("here", "exact", "saturating", "any")
NAMES = 5  # of layers that a message lists


@dataclass(frozen=True)
class Executed:
    """A network's steps with the ways in which they may be executed.

    own: of each int8 layer by name, how the packed layer may add up here; (): in no way that is known. None of them
    where `choice` does not ask for it.
    saturable: names of layers in which a pair may leave int16 over one of the sets that were looked at.
    """

    steps: tuple[Step, ...]
    choice: str
    own: dict[str, tuple[Pairing, ...]]
    saturable: set[str] = field(default_factory=set)

    @property
    def here(self) -> bool:
        """Whether the steps cover what this machine's kernels do."""
        return self.choice not in ("exact", "saturating") and () not in self.own.values()

    def look_at(
        self,
        steps: tuple[Step, ...],
        lower: Tensor,
        upper: Tensor,
        *,
        closely: bool = True,
        clock: Clock = NO_LIMIT,
    ) -> None:
        """Notes layers in which a pair may leave int16 over a box [M] of `steps`, these steps on M inputs.

        closely: from what the codes can be there; else, and where the clock is over, any code is taken to be possible.
        """
        sums = [part for step in steps if step.sums is not None for part in leaves(step.sums)]
        possible = tuple(part.name for part in sums if any(len(part.at.saturable[p]) for p in ENGINES))
        if not closely or set(possible) <= self.saturable:
            self.saturable.update(possible)
            return
        try:
            self.saturable.update(relax(steps, lower, upper, InputGrid.of(steps[0]), clock=clock).saturable)
        except (UnsupportedLayerError, OutOfTime) as error:
            log.info("any code is taken to be possible: %s", error)
            self.saturable.update(possible)


def executed(network: tuple[Step, ...], choice: str) -> Executed:
    """`network` as the kernels of `choice`, one of `CHOICES`, execute it."""
    sums = [part for step in network if step.sums is not None for part in leaves(step.sums)]
    own = {part.name: identified(part.at) for part in sums} if choice in ("here", "any") else {}
    uniform = {"here": (), "exact": (Pairing.EXACT,), "saturating": ENGINES, "any": (Pairing.EXACT, *ENGINES)}[choice]
    ways = [tuple(own[part.name] or (Pairing.UNKNOWN,) for part in sums)] if own else []
    for pairing in uniform:
        way = ((pairing,),) * len(sums)
        if not any(_alike(sums, way, other) for other in ways):
            ways.append(way)
    by_layer = iter(zip(*ways, strict=True))
    result: list[Step] = []
    for step in network:
        if isinstance(step.sums, PlacedSums):
            step = replace(step, sums=step.sums.with_pairings(by_layer))
        elif step.sums is not None:
            step = _whole_bias(replace(step, sums=replace(step.sums, pairings=next(by_layer))))
        result.append(step)
    return Executed(tuple(result), choice, own)


def _alike(sums: list[IntegerSums], one: tuple, other: tuple) -> bool:
    """Whether two ways form the same pairs, as far as they can saturate."""
    return all(
        a == b
        or (not part.at.padded and all(torch.equal(part.at.saturable[p], part.at.saturable[q]) for p in a for q in b))
        for part, a, b in zip(sums, one, other, strict=True)
    )


def _whole_bias(step: Step) -> Step:
    """The step with its bias in whole units of the sum, where its engine rounds it so."""
    assert isinstance(step.sums, IntegerSums)
    if not rounds_bias(step.sums.at):
        return step
    unit = step.sums.unit
    units = step.bias / unit
    # float32 decides which of two units is nearest
    doubt = ((units - units.floor() - 0.5).abs() <= 8 * SINGLE * (1 + units.abs())).to(unit)
    bias = torch.where(doubt > 0, units.floor() + 0.5, units.round()) * unit
    noise = step.with_noise((doubt / 2 + allowance(1 + units.abs(), 8)) * unit)
    return replace(step, bias=bias, bias_magnitude=torch.maximum(step.bias_magnitude, bias.abs()) + unit, noise=noise)


def coverage(*networks: Executed) -> tuple[Kernels, tuple[str, ...]]:
    """What a certificate of the sets that were looked at covers, and names of layers that it does not.

    Warns: UncoveredKernelsWarning of layers that add up on this machine in no way that is known.
    """
    if not any(step.sums is not None for network in networks for step in network.steps):
        rounded = [step.quantizer for network in networks for step in network.steps if step.quantizer is not None]
        exact = [quantizer.rule.kernels for quantizer in rounded if quantizer.rule is not None]
        return (exact[-1] if exact else Kernels.NONE), ()
    if not any(network.saturable for network in networks):
        return Kernels.ANY, ()
    choice = networks[0].choice
    own = [(name, network.own[name]) for network in networks for name in network.own if name in network.saturable]
    uncovered = tuple(name for name, pairings in own if not pairings)
    if uncovered:
        listed = ", ".join(map(repr, uncovered[:NAMES])) + (", ..." if len(uncovered) > NAMES else "")
        warnings.warn(
            f"the int8 kernels of {listed} add up products on this machine in a way that torchreach does not know: "
            "the bounds hold for saturation of any pairs of products, and are no certificate of what these layers "
            "compute here; reduce the range of weights or activations (reduce_range), or use another engine",
            UncoveredKernelsWarning,
            stacklevel=4,
        )
    if choice == "here":
        exact = all(pairings == (Pairing.EXACT,) for _, pairings in own)
        return (Kernels.EXACT if exact else Kernels.SATURATING), uncovered
    return {"exact": Kernels.EXACT, "saturating": Kernels.SATURATING, "any": Kernels.ANY}[choice], uncovered


@torch.no_grad()
def check_replay(run: Run, network: Executed, x: Tensor) -> None:
    """Runs inputs x [B, *shape] once through the module as given; what comes out must be among the predicted outputs.

    network: its steps on all inputs, as they are executed `here`. Nothing is checked where the module cannot be run.

    Raises: KernelMismatchError.
    """
    x = x.flatten(1).unique(dim=0).reshape(-1, *x.shape[1:])
    y = run(x)
    if y is None:
        return
    check_outputs(y, outputs(network.steps, x.flatten(1).float().to(network.steps[0].bias)))


def check_outputs(y: Tensor, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    """Raises KernelMismatchError where an output [B, N_out] of the module as given is none of `rows` of `outputs`."""
    index, low, high = rows
    y = y.to(low)
    known = torch.zeros(len(y), dtype=torch.bool, device=low.device)
    known[index[fits(y[index], low, high).all(1)]] = True
    if bool(known.all()):
        return
    b = int((~known).nonzero()[0])
    own = index == b
    raise KernelMismatchError(
        f"the deployed network as given computes {_show(y[b])} at an input where its kernels were predicted to compute "
        f"{_show(low[own].amin(0))} to {_show(high[own].amax(0))}: they do something that torchreach does not know, "
        "so there is no certificate"
    )


def fits(y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Whether outputs are among those predicted. What comes after the last quantiser is one product in float32."""
    slack = 4 * SINGLE * torch.maximum(low.abs(), high.abs())
    return (y >= low - slack) & (y <= high + slack)


def runner(module: nn.Module) -> Run:
    """What a deployed module computes here at inputs [B, *shape], as [B, N_out]; None where it cannot be run."""
    if any(isinstance(part, Quantizer) for part in module.modules()):
        module = copy.deepcopy(module).double()  # a description: what float32 would round off is no kernel's
    elif any(hasattr(part, "observer_enabled") for part in module.modules()) or observers(module):
        module = standalone_copy(module).apply(torch.ao.quantization.disable_observer)  # a run moves the observers
    value = next((v for v in (*module.parameters(), *module.buffers()) if v.is_floating_point()), torch.zeros(()))
    failed: list[Exception] = []

    def run(x: Tensor) -> Tensor | None:
        if failed:
            return None
        x = x.to(value.device, torch.float64 if value.dtype == torch.float64 else torch.float32)
        mode = nullcontext() if isinstance(module, fx.GraphModule) else evaluation_mode(module)
        try:
            with mode:
                try:
                    return module(x.clone()).flatten(1)  # which may change its input in place
                except Exception:  # exported with a fixed batch size
                    return torch.cat([module(row.clone()).flatten(1) for row in x.split(1)])
        except Exception as error:  # whatever the module's own code does
            failed.append(error)
            log.info("witnesses are not replayed: the module as given cannot be run (%s)", error)
            return None

    return run


def _show(values: Tensor) -> str:
    return (
        "[" + ", ".join(f"{value:.6g}" for value in values[:NAMES].tolist()) + ("]" if len(values) <= NAMES else " ..]")
    )
