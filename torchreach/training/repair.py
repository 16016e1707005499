"""Repair: retrain a compressed network until a certificate says it is close enough to the original.

Mo, Yang, Lu, Xiang: Compression Repair for Feedforward Neural Networks Based on Model Equivalence Evaluation
(2024), Algorithm 1. One iteration, with y1 the original and y2 the compressed network:

    points   x in the input sets
    targets  y2(x) + step / alpha
    retrain  y2 on mean squared error, put it back on its grid and masks, or convert it to int8;
             or, with no targets, on the certified bound of max |y1 - y2| (`DiscrepancyLoss`)
    evaluate the certified discrepancy of the network as deployed; stop once it lies in the target set O

The step is signed, from y2 towards y1, but for "magnitude", equation 20 as printed: it adds the maximal magnitude
of y1 - y2, and so moves an output that is already too large further away. It is there for comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from torchreach.compress.constraints import Constraints
from torchreach.core.checks import check_choice, check_count, check_positive
from torchreach.core.clock import Clock, running
from torchreach.core.errors import OptionError, ShapeError
from torchreach.core.options import Budget, Exact
from torchreach.core.repaired import RepairResult, RepairStep
from torchreach.core.results import Discrepancy
from torchreach.core.terms import Made
from torchreach.core.tolerances import Tolerances
from torchreach.graph.quantizer import Quantizer
from torchreach.read.load import as_network
from torchreach.read.module import chain
from torchreach.sets.star import StarBatch
from torchreach.training.evaluations import Evaluations, remaining
from torchreach.training.fit import Data, RepairOptions, run
from torchreach.training.int8_student import DeployedStudent
from torchreach.training.keep import Keep
from torchreach.training.retrain import Retraining
from torchreach.training.solving import Solving
from torchreach.training.students import Student, WeightStudent
from torchreach.training.target import Target
from torchreach.verbs.discrepancy import discrepancy
from torchreach.verbs.merge import merge
from torchreach.verbs.questions import opened

__all__ = ["RepairOptions", "Target", "repair"]

METHODS = ("retrain", "solve", "auto")
LOSSES = ("targets", "certified")
STEPS = ("pointwise", "extremum", "midpoint", "magnitude")
FIRST = 0.25  # share of the time that the certificate of the given network may take, when solving


def repair(
    original: nn.Module,
    compressed: nn.Module,
    stars: StarBatch,
    *,
    target: Target | float | Callable[[Discrepancy], bool] | None,
    method: str = "retrain",
    alpha: float = 2.0,
    step: str = "pointwise",
    loss: str = "targets",
    iterations: int = 20,
    training: RepairOptions | None = None,
    data: Data | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    constraints: Constraints | None = None,
    seed: int = 0,
    layers: int = 1,
    keep: Keep | Tensor | StarBatch | Sequence[Keep] | None = None,
    exact: Exact | None = None,
    budget: Budget | None = None,
    tolerances: Tolerances | None = None,
    progress: Callable[[RepairStep], None] | None = None,
    checkpoint: str | Path | None = None,
    ray: str | None = None,
) -> RepairResult:
    """Copy of `compressed`, retrained until its certified discrepancy to `original` lies in the target set.

    The certificate always speaks of the network as deployed: zeros back at zero, quantised weights back on
    their grid (trained through, with straight-through rounding). An iteration that brings it no closer to the
    target is undone, and the next trains at half the rate; so the result is the evaluated network closest to
    the target. Neither given network, nor torch's global random state, is changed; equal seeds give equal
    results on one machine and device.

    A deployed network (an eager-mode int8 module, which rounds its activations) is trained with its rounding, and
    converted again for each evaluation: codes of the given scheme and weight scales in a copy of the given module,
    whose state dict loads into any module of that structure. Iteration 1 only fits the scales and zero points of
    the activations (smallest to largest value over the points and `data`; loss None), the later ones train and fit
    them again. Give `data`, or these grids fit nothing but the input sets.

    Args:
        original, compressed: networks of supported layers with equal input and output sizes.
        stars: input stars [S].
        target: the set O, see `Target`; a number in (0, 1) is `Target.factor`, a callable `Target.test`. None, when
            solving: as close as the last layer gets, which `least` of the result bounds from below.
        method: "retrain", the loop above; "solve", the last layer as a linear program over the vertices of all linear
            regions (`training.solve`), of a deployed network its int32 biases and last codes; "auto": solves first, and
            where that misses the target retrains and solves in turn. No method returns a certificate further from the
            target than the given network's, and `method` of the result says what made the network that is returned.
        alpha: targets lie 1 / alpha of the step away from the compressed network's output, alpha > 0.
        step: "pointwise": y1(x) - y2(x) at each training point. "extremum": the end of larger magnitude of
            the certified range of y1 - y2, per star and output. "midpoint": the middle of that range.
            "magnitude": the certified maximal magnitude of y1 - y2 (equation 20 as printed), which ignores the
            sign: an output that is already too large is moved further away. For comparison only.
        loss: "targets": mean squared error to the targets above. "certified": mean of `DiscrepancyLoss` over the
            bounding boxes of the stars (hidden bounds held), `alpha` and `step` unused; requires one architecture and
            no rounding of activations. docs/training.md compares the two.
        iterations: most retrainings, the calibration of a deployed network included.
        training: points, epochs and optimiser of one retraining.
        data: (inputs, labels), or an iterable of such batches, to keep what the network does elsewhere:
            cross entropy for integer labels, mean squared error for floating-point ones (`original(inputs)`
            where there are no labels).
        evaluate: accuracy of a network, recorded in the history.
        constraints: what keeps the network compressed; by default `Constraints.read(compressed)`.
        layers: when solving, how many linear layers from the end may change. Those before the last move by linear
            programs with activation patterns held, a step at a time (`training.earlier_layer`), each step certified.
        keep: when solving, inputs to keep near the original: points, stars, or `Keep`s that name a tolerance.
        exact, budget, tolerances: of every `discrepancy`. While retraining each evaluation has the whole budget;
            solving and "auto" spend its seconds once, in all. A bounded evaluation reaches the target only if its
            certified bounds do.
        progress: called with each `RepairStep`, the evaluation of the given network first.
        checkpoint: as of `discrepancy`. A run that goes on takes what was trained and certified from it, and does the
            rest again; `data` that is no pair of tensors has to be the same by itself.
        ray: as of `discrepancy`, for the certificates.

    Ctrl-C ends it: the result is the best network so far, with its certificate.

    Raises: OptionError; InvalidNetworkError if no parameter trains, or none of the last layer is free;
        UnsupportedLayerError: when solving, a last layer that is no nn.Linear; as `discrepancy`.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> original = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))
        >>> compressed = tr.quantize_weights(original, bits=3)
        >>> stars = tr.StarBatch.from_box(torch.zeros(2), torch.ones(2))
        >>> quick = tr.RepairOptions(samples=50, epochs=10)
        >>> result = tr.repair(original, compressed, stars, target=0.9, iterations=5, training=quick)
        >>> result.satisfied, bool(result.after.max_upper <= 0.9 * result.before.max_upper)
        (True, True)
    """
    check_choice("method", method, METHODS)
    if target is None and method == "retrain":
        raise OptionError("a target is required to know when retraining may stop, got None; or solve for the least one")
    goal = Target.bounds(0.0, 0.0) if target is None else Target.of(target)
    keep = Keep.each(keep)
    training = training or RepairOptions()
    check_choice("step", step, STEPS)
    check_choice("loss", loss, LOSSES)
    check_positive("alpha", alpha)
    check_count("iterations", iterations)
    check_count("layers", layers)
    if isinstance(data, tuple) and (len(data) != 2 or len(data[0]) != len(data[1])):
        sizes = " and ".join(str(len(part)) for part in data)
        raise ShapeError(f"data must be (inputs, labels) of equal length, got {sizes}")
    if not isinstance(stars, StarBatch):
        raise ShapeError(f"repair needs a torchreach.StarBatch, got {type(stars).__name__}")
    for part in keep:
        part.check(stars.shape)
    if keep and method == "retrain":
        raise OptionError("keep requires method='solve' or 'auto': retraining keeps what `data` holds, got 'retrain'")
    original, compressed = as_network(original), as_network(compressed)
    reference, student = _pair(original, compressed, stars, constraints, training, seed, loss)
    if isinstance(student, DeployedStudent) and any(part.tolerance is not None for part in keep):
        raise OptionError(
            "tolerances of keep require a network that does not round activations: biases of a deployed one are moved "
            "by the stars alone"
        )
    goal.check((len(stars), run(reference, stars.center).shape[1]))
    asked = {"target": goal, "method": method, "alpha": alpha, "step": step, "loss": loss, "seed": seed}
    asked |= {"training": training, "exact": exact, "tolerances": tolerances, "layers": layers}
    asked |= {"data": data if isinstance(data, tuple) else None, "constraints": constraints, "keep": keep or None}
    networks = {"original": original, "compressed": compressed}
    files = student.files = opened(checkpoint, "repair", networks, stars, budget or Budget(), **asked)
    evaluations = Evaluations(original, stars, goal, exact, budget, tolerances, evaluate, progress, files, ray)
    retraining = Retraining(reference, student, evaluations, training, data, step, alpha, seed)
    # By construction the budget's seconds are those of the whole; while retraining each evaluation has them.
    with running(None if method == "retrain" or budget is None else budget.seconds) as clock:
        limit = None if method == "retrain" else clock
        evaluations.take(student.network, 0, Made.GIVEN, time.monotonic(), clock=limit and limit.share(FIRST))
        student.keep()
        solver = None
        if method != "retrain":
            solver = Solving(evaluations, student, keep, data, clock, seed, layers)
        for iteration in range(1, iterations + 1):
            if evaluations.best.satisfied or clock.over:
                break
            # Biases are moved once the scales of activations are fitted, which a first iteration does.
            first = iteration == 1 and solver is not None and solver.deployed
            if solver is not None and not solver.done and not first:
                solver.iterate(iteration)
            elif method == "solve" and not first:
                break
            else:
                index, rescue = evaluations.index, None
                if solver is not None and not solver.deployed:
                    solver.again(kept=False)
                    rescue = partial(solver.iterate, iteration)
                retraining.iterate(iteration, clock, limit, rescue)
                if solver is not None:
                    made = evaluations.best.method
                    if evaluations.index != index and made is not Made.SOLVED:
                        solver.again(kept=True)
                    else:
                        solver.done = True
        network = student.finished(compressed)
        harm = None if not keep else _harm(compressed, network, keep, evaluations, limit)

    best = evaluations.best
    found = (None, ()) if solver is None else (solver.least, () if best.satisfied else solver.conflicts)
    return RepairResult(network, tuple(evaluations.history), best.satisfied, evaluations.index, *found, harm)


def _harm(
    compressed: nn.Module, network: nn.Module, keep: tuple[Keep, ...], evaluations: Evaluations, clock: Clock | None
) -> Tensor | None:
    """[N] certified, how far the repaired network can be from the given one on kept stars."""
    sets, upper = [part.inputs for part in keep if isinstance(part.inputs, StarBatch)], []
    exact, tolerances = evaluations.exact, evaluations.tolerances
    for k, one in enumerate(sets):
        budget = remaining(evaluations.budget, clock and clock.share(1 / (len(sets) - k)))
        upper.append(discrepancy(compressed, network, one, exact, budget=budget, tolerances=tolerances).upper.amax(0))
    return torch.stack(upper).amax(0) if upper else None


def _pair(
    original: nn.Module,
    compressed: nn.Module,
    stars: StarBatch,
    constraints: Constraints | None,
    training: RepairOptions,
    seed: int,
    loss: str,
) -> tuple[nn.Module, Student]:
    """The original in evaluation mode, whatever mode it is in, and the compressed network ready to be trained."""
    layers = chain(compressed, stars.shape)
    if not any(isinstance(layer, Quantizer) for layer in layers):
        reference = merge(original, compressed, stars.shape).first
        certified = None
        if loss == "certified":
            low, high, _ = stars.bounding_box()
            certified = reference, low.reshape(-1, *stars.shape), high.reshape(-1, *stars.shape)
        constraints = constraints or Constraints.read(compressed)
        return reference, WeightStudent(compressed, constraints, training, seed, certified)
    if loss == "certified":
        raise OptionError(
            "loss='certified' requires a network that does not round activations, but the compressed one does: use "
            "loss='targets'"
        )
    reference = chain(original, stars.shape)
    outputs = [run(network, stars.center[:1]).shape[1] for network in (reference, layers)]
    if outputs[0] != outputs[1]:
        raise ShapeError(
            f"networks must have equally many outputs: the original has {outputs[0]}, the compressed {outputs[1]}"
        )
    return reference, DeployedStudent(compressed, layers, stars.center.device, constraints, training, seed)
