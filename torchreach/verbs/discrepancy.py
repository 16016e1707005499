"""Certified discrepancy of two networks: how far the compressed one can be from the original.

    discrepancy_n = max over the input star of |y1_n - y2_n|          (Mo et al., equation 16)

The range of y1 - y2 is the exact reach set of the merged network, enumerated, or enclosed by branch and bound
(`verbs.float_pair`). Upper bounds are certified, lower bounds are attained by witnesses that are replayed through both
networks.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from torch import nn

from torchreach.compress.constraints import is_weight_only
from torchreach.core.checkpoint import Checkpoint
from torchreach.core.clock import running
from torchreach.core.errors import OptionError, ShapeError, UnsupportedLayerError
from torchreach.core.options import Budget, Exact, Search
from torchreach.core.results import Discrepancy, ProgressCallback, Semantics
from torchreach.core.tolerances import Tolerances
from torchreach.read.load import as_network
from torchreach.read.module import chain, reading_once
from torchreach.search.result import Question
from torchreach.sets.star import StarBatch
from torchreach.verbs.certificate import provable
from torchreach.verbs.executed import as_executed, formats, widened
from torchreach.verbs.float_pair import compare
from torchreach.verbs.int8_kernels import CHOICES
from torchreach.verbs.int8_pair import deployed_discrepancy, rounds
from torchreach.verbs.questions import opened
from torchreach.verbs.softmax import asked_of_scores, both_scores, probabilities
from torchreach.verbs.units import ALONE, TOGETHER, Asked, in_units
from torchreach.work.cluster import Cluster

METHODS = {"auto": None, "exact": Exact(), "search": Search()}


@reading_once()
def discrepancy(
    original: nn.Module,
    compressed: nn.Module,
    stars: StarBatch,
    method: Exact | Search | str | None = None,
    *,
    tolerance: float | None = None,
    gap: float | None = None,
    budget: Budget | None = None,
    tolerances: Tolerances | None = None,
    progress: ProgressCallback | None = None,
    kernels: str = "here",
    arithmetic: str | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    ray: str | None = None,
) -> Discrepancy:
    """Certified interval around max |y1 - y2| per output and input star, with witnesses.

    Args:
        original, compressed: networks of supported layers with equal input and output sizes.
        stars: input stars [S] of the networks' input shape.
        method: "auto" (or None) enumerates the linear regions where they are few, searches by branch and bound
            where they are many, and takes turns where that is not clear. `Exact(...)` or "exact" only enumerates,
            `Search(...)` or "search" only searches. Networks of two architectures are searched by their inputs.
        tolerance: the bound on |y1 - y2| that is in question: a star is done as soon as its certificate is at most
            this, or a witness exceeds it.
        gap: end on a star as soon as upper - lower is at most this for each of its outputs. Without one, a
            search ends when both ends of every range are known to 1e-6.
        budget: when to stop; a spent budget, or Ctrl-C, gives the interval so far.
        tolerances, progress: as in `reach`; for a search, `progress` counts branches in place of stars.
        kernels: of a deployed network, whose integer arithmetic is covered: what "here" executes it on this machine,
            "exact" sums, "saturating" pairs of products (x86 without VNNI), or the union of "any" of these. Where no
            pair can leave int16 over the set these are all one, and `kernels` of the result says so.
        arithmetic: "real" reads networks as real-valued functions of their weights; "executed" as their format
            (float16, bfloat16, float32, float64) executes them, inputs and each layer's result rounded to it; None
            does so only for networks in half precision. A float32 original of a half network is then real-valued.
        checkpoint: a folder from which the run goes on if it is interrupted, killed or out of memory
            (docs/scaling.md). The stars are then answered a few at a time, and `budget.seconds` are those of each call.
        ray: "auto", "local" or the address of a Ray cluster, whose workers then answer these units (docs/scaling.md).

    Guarantee: for every real input x of star s, |y1_n(x) - y2_n(x)| <= upper[s, n]; at witness[s, n] it is
    at least lower[s, n]. `semantics` of the result says which reading of the networks both speak of: "float",
    "weight-only" (weights on a grid, activations real), "as executed in float16" and the like, where `lower` is what
    this machine's kernels gave and `upper` holds for every kernel that keeps sums in float32 (docs/certificates.md), or
    "deployed int8": where a network rounds its activations, as int8 kernels execute it, for inputs in float32 (see
    `verbs.int8_pair`): there "exact" enumerates the cells of the input grid, and "search" relaxes the rounding.

    Networks that both end in Softmax (or LogSoftmax) are compared in probabilities, which are certified through the
    scores (see `verbs.softmax`): `gap` and `tolerance` are about probabilities, but only the scores are searched, so
    that an interval can stay wider than was asked for.

    Raises: as `merge` and `reach`; OptionError: an unknown method, kind of kernels or arithmetic, a negative tolerance,
        a gap that is not positive, or a checkpoint of another question. InvalidNetworkError: a layer that may overflow
        its format as executed. KernelMismatchError: this machine's kernels left the certified range, see
        `torchreach.verbs.int8_kernels`.

    Warns: UncoveredKernelsWarning: int8 kernels that add up in a way that is not known.

    Examples:
        >>> original, compressed = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(original.weight, 1.0), nn.init.constant_(compressed.weight, 0.75)
        >>> found = tr.discrepancy(original, compressed, tr.StarBatch.from_box(torch.zeros(2), torch.ones(2)))
        >>> round(float(found.max_upper), 4), found.witness[0, 0].tolist()
        (0.5, [1.0, 1.0])
    """
    if tolerance is not None and not tolerance >= 0:
        raise OptionError(f"tolerance must be a number >= 0 or None, got {tolerance!r}")
    if kernels not in CHOICES:
        raise OptionError(f"kernels must be one of {', '.join(CHOICES)}, got {kernels!r}")
    if gap is not None and not gap > 0:
        raise OptionError(f"gap must be positive or None, got {gap!r}")
    budget, tolerances = budget or Budget(), tolerances or Tolerances()
    if not isinstance(stars, StarBatch):
        raise ShapeError(f"two networks are compared on a torchreach.StarBatch, got {type(stars).__name__}")
    if tolerance is not None:
        question = Question("largest", gap or min(1e-6, max(1e-9, 1e-3 * tolerance)), tolerance)
    else:
        question = Question("signed") if gap is None else Question("outputs", gap)
    way = chosen(method)
    with running(budget.seconds) as clock:
        original, compressed = as_network(original), as_network(compressed)
        given = original, compressed
        kinds = formats(original, compressed, arithmetic)
        asked = {"method": method, "tolerance": tolerance, "gap": gap, "tolerances": tolerances}
        asked |= {"kernels": kernels, "arithmetic": arithmetic}
        networks = {"original": original, "compressed": compressed}
        files = opened(checkpoint, "discrepancy", networks, stars, budget, **{**asked, "method": way})
        deploys = rounds(original, stars.shape) or rounds(compressed, stars.shape)
        cluster, size = Cluster.of(ray), ALONE if deploys else TOGETHER
        several = cluster is not None and len(stars) > size  # else the regions of one unit are shared out
        if several or (files is not None and not files.unit):
            options = asked if several else {**asked, "ray": ray}
            some = Asked(discrepancy, (original, compressed), stars, options)
            on = cluster if several else None
            found = in_units(some, size, clock, budget, files, on, lambda _: progress)
            return provable(found, original, compressed, stars)
        if deploys:
            if arithmetic == "real":
                raise OptionError(
                    "arithmetic='real' requires networks that do not round activations: compare "
                    "torchreach.weight_only(network)"
                )
            if tolerance is None and gap is None:
                question = Question("signed", tolerances.gap)

            def deployed(question: Question) -> Discrepancy:
                return deployed_discrepancy(
                    original,
                    compressed,
                    stars,
                    question,
                    method=way,
                    budget=budget,
                    progress=progress,
                    kernels=kernels,
                    clock=clock,
                )

            kind = None if rounds(original, stars.shape) else kinds[0]
            return widened(deployed, original, stars, kind, question, clock)
        weight_only = is_weight_only(compressed)
        original, compressed, head = both_scores(original, compressed, stars.shape)
        if head is not None and kinds != (None, None):
            raise UnsupportedLayerError(
                f"{head.__name__}: how it is executed is not known; ask for the real-valued reading (arithmetic='real')"
            )
        networks = one_dtype(original, compressed, stars.shape)

        def real(stars: StarBatch, question: Question) -> Discrepancy:
            return compare(
                *networks,
                stars,
                way,
                question,
                budget=budget,
                tolerances=tolerances,
                progress=progress,
                clock=clock,
                files=files,
                cluster=cluster,
            )

        if kinds != (None, None):
            return as_executed(original, compressed, stars, kinds, question, real, clock)
        if head is None:
            found = real(stars, question)
        else:
            found = real(stars, asked_of_scores(question, head))
            found = probabilities(found, networks, head, stars, question, clock)
    found = replace(found, semantics=Semantics.WEIGHT_ONLY if weight_only else Semantics.FLOAT)
    return provable(found, *given, stars)


def one_dtype(original: nn.Module, compressed: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """The two networks, as float64 chains where their dtypes differ: a float network and a twin with exact weights.

    Read before they are converted: weights that a parametrisation computes would come out otherwise in float64.
    """
    networks = original, compressed
    if len({value.dtype for network in networks for value in network.parameters()}) < 2:
        return networks
    original, compressed = (copy.deepcopy(chain(network, shape)).double() for network in networks)
    return original, compressed


def chosen(method: Exact | Search | str | None) -> Exact | Search | None:
    """A method given by name or as options; None: auto. Raises OptionError."""
    if isinstance(method, str):
        if method not in METHODS:
            raise OptionError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        return METHODS[method]
    if method is not None and not isinstance(method, Exact | Search):
        raise OptionError(f"method must be a name, Exact(...) or Search(...), got {method!r}")
    return method
