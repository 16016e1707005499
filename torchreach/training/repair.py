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

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchreach.compress.constraints import Constraints
from torchreach.core.checks import check_choice, check_count, check_positive
from torchreach.core.clock import running
from torchreach.core.errors import OptionError, ShapeError
from torchreach.core.options import Budget, Exact
from torchreach.core.results import Discrepancy, RepairResult, RepairStep
from torchreach.core.tolerances import Tolerances
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.weights import evaluation_mode
from torchreach.read.load import as_network
from torchreach.read.module import chain
from torchreach.sets.star import StarBatch
from torchreach.training.fit import Data, RepairOptions, run
from torchreach.training.int8_student import DeployedStudent
from torchreach.training.students import Student, WeightStudent
from torchreach.training.target import Target
from torchreach.verbs.discrepancy import discrepancy
from torchreach.verbs.merge import merge

__all__ = ["RepairOptions", "Target", "repair"]

log = logging.getLogger(__name__)

LOSSES = ("targets", "certified")
STEPS = ("pointwise", "extremum", "midpoint", "magnitude")


def repair(
    original: nn.Module,
    compressed: nn.Module,
    stars: StarBatch,
    *,
    target: Target | float | Callable[[Discrepancy], bool],
    alpha: float = 2.0,
    step: str = "pointwise",
    loss: str = "targets",
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

    A deployed network (an eager-mode int8 module, which rounds its activations) is trained with its rounding, and
    converted again for each evaluation: codes of the given scheme and weight scales in a copy of the given module,
    whose state dict loads into any module of that structure. Iteration 1 only fits the scales and zero points of
    the activations (smallest to largest value over the points and `data`; loss None), the later ones train and fit
    them again. Give `data`, or these grids fit nothing but the input sets.

    Args:
        original, compressed: networks of supported layers with equal input and output sizes.
        stars: input stars [S].
        target: the set O, see `Target`; a number in (0, 1) is `Target.factor`, a callable `Target.test`.
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
        method, budget, tolerances: of every `discrepancy`. Each evaluation has the whole budget; a bounded
            evaluation reaches the target only if its certified bounds do.
        progress: called with each `RepairStep`, the evaluation of the given network first.

    Ctrl-C ends it: the result is the best network so far, with its certificate.

    Raises: OptionError; InvalidNetworkError if no parameter trains; as `discrepancy`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> original = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))
        >>> compressed = tr.quantize_weights(original, bits=3)
        >>> stars = tr.StarBatch.from_box(torch.zeros(2), torch.ones(2))
        >>> quick = tr.RepairOptions(samples=50, epochs=10)
        >>> result = tr.repair(original, compressed, stars, target=0.9, iterations=5, training=quick)
        >>> result.satisfied, bool(result.after.max_upper <= 0.9 * result.before.max_upper)
        (True, True)
    """
    goal = Target.of(target)
    training = training or RepairOptions()
    check_choice("step", step, STEPS)
    check_choice("loss", loss, LOSSES)
    check_positive("alpha", alpha)
    check_count("iterations", iterations)
    if isinstance(data, tuple) and (len(data) != 2 or len(data[0]) != len(data[1])):
        sizes = " and ".join(str(len(part)) for part in data)
        raise ShapeError(f"data must be (inputs, labels) of equal length, got {sizes}")
    if not isinstance(stars, StarBatch):
        raise ShapeError(f"repair needs a torchreach.StarBatch, got {type(stars).__name__}")
    original, compressed = as_network(original), as_network(compressed)
    reference, student = _pair(original, compressed, stars, constraints, training, seed, loss)
    goal.check((len(stars), run(reference, stars.center).shape[1]))
    seeds = torch.Generator().manual_seed(seed)
    history: list[RepairStep] = []
    witnesses: list[Tensor] = []
    closest, index, rate = torch.inf, 0, 1.0

    with running(None) as clock:  # Ctrl-C ends the loop; an evaluation it meets ends as by a spent budget
        for iteration in range(iterations + 1):
            began = time.monotonic()
            error, calibrated = None, False
            if iteration:
                draw = int(torch.randint(2**31, (), generator=seeds))
                x = torch.cat((stars.sample(training.samples, draw), *witnesses), 1).flatten(0, 1)
                calibrated = iteration == 1 and student.calibrate(x, data)
                if not calibrated:
                    y1, y2 = run(reference, x), run(student.network, x)
                    y = _targets(y1, y2, history[index].discrepancy, step, alpha)
                    error = student.retrain(x, y, data, rate, clock)
                    if clock.over:  # half trained: not worth an evaluation
                        break
                if not student.is_finite():
                    log.warning("repair: training diverged in iteration %d; halving the learning rate", iteration)
                    student.go_back()
                    rate /= 2
                    continue
            found = discrepancy(original, student.network, stars, method, budget=budget, tolerances=tolerances)
            goal = goal if iteration else goal.anchored(found)
            with evaluation_mode(student.network):
                accuracy = None if evaluate is None else float(evaluate(student.network))
            record = RepairStep(iteration, found, accuracy, error, goal.holds(found), time.monotonic() - began)
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
                rate = rate if calibrated else rate / 2
            if record.satisfied or clock.over:
                break

    return RepairResult(student.finished(compressed), tuple(history), history[index].satisfied, index)


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


def _targets(y1: Tensor, y2: Tensor, last: Discrepancy, step: str, alpha: float) -> Tensor:
    """y2 + step / alpha at points ordered star by star: [S * P, N]."""
    y2 = y2.to(y1.device, torch.promote_types(y1.dtype, y2.dtype))
    shift = y1 - y2
    if step != "pointwise":
        low, high = last.range_lower, last.range_upper
        choice = {"midpoint": (low + high) / 2, "extremum": torch.where(-low > high, low, high)}
        signed = choice.get(step, last.upper)  # "magnitude" has no sign
        signed = signed.to(shift).repeat_interleave(len(y2) // len(low), 0)
        # A spent budget may leave an end of the range infinite; the difference itself never is.
        shift = torch.where(signed.isfinite(), signed, shift)
    return y2 + shift / alpha
