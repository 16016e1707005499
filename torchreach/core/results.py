"""What the analyses return: frozen values, one per verb. Nothing here computes.

Values that hold tensors are compared by identity. Their `repr` is a summary of a few lines.

Axis letters: S input stars, N output features.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchreach.core.errors import OptionError
from torchreach.core.options import Budget
from torchreach.core.outward import at_least, at_most, counted
from torchreach.core.terms import Kernels, Reason, Semantics, Status

if TYPE_CHECKING:
    from torchreach.sets.star import StarBatch

PROOF_SECONDS = 60.0  # for the proof of a certificate, where no budget says how many


@dataclass(frozen=True)
class LayerStats:
    """Work done at one activation layer, summed over all stars that reached it.

    `settled` counts (star, neuron) pairs by the test that showed the neuron cannot change sign on the star:
    "root" (bounds of the whole input set, before any split), "vertices" (its values at all vertices of the
    star); with linear programs instead of vertices: "box" (the predicate box alone), "dual" (a dual bound
    from the star's analytic centre, one factorisation for all its neurons), "program" (its own program).
    """

    name: str
    neurons: int
    stars: int = 0
    splits: int = 0
    linear_programs: int = 0
    settled: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class ReachStats:
    """Counts of one reachability run, or of a comparison of two networks.

    A comparison that enumerated several times, longer each time, gives `layers` of the last run.
    """

    layers: tuple[LayerStats, ...]
    method: str  # "vertices", "programs", "inputs", "signs", or several of them in the order of their use
    root_bounds: str  # which library bounded the neurons before any split
    seconds: float
    output_programs: int = 0  # linear programs spent on the output range
    branches: int = 0  # bounds of sub-problems taken by searches
    fallback: str = ""  # why a search could not be used, where one was wanted

    @property
    def splits(self) -> int:
        return sum(layer.splits for layer in self.layers)

    @property
    def linear_programs(self) -> int:
        return sum(layer.linear_programs for layer in self.layers) + self.output_programs


@dataclass(frozen=True, eq=False)
class Progress:
    """State of a running enumeration, handed to a `progress` callback.

    lower, upper: [S, N] certified range of the network's output (for a merged network: of y1 - y2) so far.
    attained_lower, attained_upper: [S, N] the part of it already met at points of the stars.
    done, open: pieces of work, of the kind that `unit` names.
    """

    done: int
    open: int
    lower: Tensor
    upper: Tensor
    attained_lower: Tensor
    attained_upper: Tensor
    seconds: float
    unit: str = "star"  # or "branch", "cell"


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, eq=False)
class Certificate:
    """A certificate in a file, which `torchreach check` verifies on its own; see `Certifiable.save_certificate`.

    Attributes:
        path: the file.
        upper: [S, N] certified bound on |y1 - y2| (on |y| of one network) that it proves, in float64.
        leaves: [S] parts of each star that are bounded one by one.
        size: of the file, in bytes.
    """

    path: Path
    upper: Tensor
    leaves: tuple[int, ...]
    size: int

    def __repr__(self) -> str:
        count = sum(self.leaves)
        each = f"{self.size / count:.1f} for each of {count:,} leaves"
        return lines(
            f"Certificate: {self.path}, {counted(self.size, 'byte')}, {each}",
            f"proves at most {at_most(float(self.upper.max()))}",
        )


@dataclass(frozen=True, eq=False)
class Certifiable:
    """A result whose bounds others can check, without trusting what found them.

    prover: writes the certificate; None where this reading of the networks has none, or the result came from a file.
    """

    prover: Callable[[Any, Path, Budget], Certificate] | None = field(
        default=None, repr=False, kw_only=True, metadata={"kept": False}
    )

    def save_certificate(self, path: str | Path, budget: Budget | None = None) -> Certificate:
        """Finds a proof of the bounds and writes it at `path`, whole or not; `torchreach check` verifies it.

        budget: seconds for the proof, by default 60. When they are spent, or where the analysis used bounds that the
            checker does not know, it proves a wider bound, which `upper` of the return value says.

        Guarantee: the file is accepted by `torchreach check PATH A B` for the same networks, as .onnx or .safetensors
        files, and what it says there follows from these files and the sets alone.

        Raises: OptionError: no certificate is known for this result. UnsupportedLayerError: networks that are no chains
            of Linear layers and ReLUs. OSError: `path` cannot be written.
        """
        if self.prover is None:
            raise OptionError(
                "this result has no certificate for others to check: they are written of what discrepancy, reach, "
                "equivalent (to within epsilon) and repair return themselves, for networks as real-valued functions of "
                "their weights"
            )
        return self.prover(self, Path(path), budget or Budget(seconds=PROOF_SECONDS))


@dataclass(frozen=True, eq=False)
class ReachResult(Certifiable):
    """Reach set of a network: the union of the output stars, and its certified range.

    Attributes:
        lower, upper: [S, N] certified range of each output over input star s. Sound: no input of star s
            gives an output outside it.
        attained_lower, attained_upper: [S, N] outputs really attained, at `argmin` and `argmax`; they equal
            `lower` and `upper` up to tolerance where `status` is EXACT.
        argmin, argmax: [S, N, *input shape] the inputs.
        count: [S] number of output stars (linear regions that were enumerated) per input star.
        stars: the output stars, `stars.origin` naming the input star of each; None if `keep_stars=False`.
        status: per input star.
        stats: what it took.
        reasons: per input star, why the work ended.
    """

    lower: Tensor
    upper: Tensor
    attained_lower: Tensor
    attained_upper: Tensor
    argmin: Tensor
    argmax: Tensor
    count: Tensor
    stars: StarBatch | None
    status: tuple[Status, ...]
    stats: ReachStats
    reasons: tuple[Reason, ...] = ()

    def __len__(self) -> int:
        return int(self.count.sum())

    def __repr__(self) -> str:
        low, high = float(self.lower.min()), float(self.upper.max())
        met_low, met_high = float(self.attained_lower.min()), float(self.attained_upper.max())
        return lines(
            f"ReachResult: {_size(self.lower)}, {counted(len(self), 'output star')}",
            f"outputs certified in {at_least(low)} .. {at_most(high)}, "
            f"attained {at_most(met_low)} .. {at_least(met_high)}",
            ended(self.status, self.reasons),
            _took(self.stats),
        )


@dataclass(frozen=True, eq=False)
class Discrepancy(Certifiable):
    """Certified discrepancy of two networks over input stars.

    Attributes:
        lower, upper: [S, N] certified interval around max over the star of |y1 - y2|, per output
            (the paper's equation 16). `lower` is attained at `witness`.
        range_lower, range_upper: [S, N] certified signed range of y1 - y2.
        witness: [S, N, *input shape] input that attains `lower`, replayed through both networks.
        status: per input star: EXACT, or BOUNDED if the budget or the tolerance asked for ended the work first.
        semantics: which reading of the networks the numbers speak of.
        kernels: which integer arithmetic they cover, where the semantics is deployed int8.
        uncovered: names of layers whose kernels may do something else, about which a warning was given.
        reasons: per input star, why the work ended.
        regions: [S] number of joint linear regions that were enumerated; of a deployed network, cells of its
            input grid.
        stats: what it took.
    """

    lower: Tensor
    upper: Tensor
    range_lower: Tensor
    range_upper: Tensor
    witness: Tensor
    regions: Tensor
    status: tuple[Status, ...]
    stats: ReachStats
    semantics: Semantics = Semantics.FLOAT
    kernels: Kernels = Kernels.NONE
    uncovered: tuple[str, ...] = ()
    reasons: tuple[Reason, ...] = ()

    @property
    def max_upper(self) -> Tensor:
        """[S] certified upper bound of max over inputs and outputs of |y1 - y2| (equation 15, max norm)."""
        return self.upper.amax(dim=1)

    @property
    def max_lower(self) -> Tensor:
        """[S] largest |y1 - y2| attained by a witness."""
        return self.lower.amax(dim=1)

    def within(self, tolerance: float | Tensor) -> bool:
        """Whether the certificate shows |y1 - y2| <= tolerance for every input of every star and output."""
        return bool((self.upper <= torch.as_tensor(tolerance, device=self.upper.device)).all())

    @property
    def covers(self) -> str:
        """The semantics, and the kernels where there are any: "deployed int8, exact integer sums"."""
        return self.semantics if self.kernels is Kernels.NONE else f"{self.semantics}, {self.kernels}"

    @property
    def claim(self) -> str:
        """What the upper ends may be called: "certified", unless layers are uncovered."""
        return "computed" if self.uncovered else "certified"

    def __repr__(self) -> str:
        low, high = float(self.lower.max()), float(self.upper.max())
        return lines(
            f"Discrepancy: {_size(self.lower)}; {self.covers}",
            f"max |y1 - y2|: {at_least(low)} attained, {at_most(high)} {self.claim}",
            *([f"not covered: kernels of {', '.join(self.uncovered)}"] if self.uncovered else []),
            ended(self.status, self.reasons),
            _took(self.stats),
        )


@dataclass(frozen=True, eq=False)
class Attribution:
    """How much each layer makes of the difference of two networks; see `attribute`.

    Attributes:
        layers: [L] names of the layers that differ, in the order of execution.
        alone: of the original from itself with this layer compressed.
        steps: of the hybrid with the layers before this one compressed from that with this one too. The sum of their
            upper ends bounds the whole difference.
        cumulative: of the original from itself with all layers up to this one compressed; the last is the whole.
        sampled_mean, sampled_max: [L] mean and largest difference of each layer alone on random inputs.
        sqnr: [L] signal to quantisation noise of each layer alone on these inputs, at the outputs, in dB.
    """

    layers: tuple[str, ...]
    alone: tuple[Discrepancy, ...]
    steps: tuple[Discrepancy, ...]
    cumulative: tuple[Discrepancy, ...]
    sampled_mean: Tensor
    sampled_max: Tensor
    sqnr: Tensor

    @property
    def order(self) -> list[str]:
        """The layers, those that make the largest certified difference alone first."""
        largest = [float(one.upper.max()) for one in self.alone]
        return [self.layers[k] for k in sorted(range(len(largest)), key=lambda k: -largest[k])]

    @property
    def bound(self) -> Tensor:
        """[S, N] certified upper bound of |y1 - y2|: the sum of the steps, or the last of `cumulative` where less."""
        return torch.minimum(torch.stack([step.upper for step in self.steps]).sum(0), self.cumulative[-1].upper)

    def __repr__(self) -> str:
        rows = [
            f"{name}: at most {at_most(float(one.upper.max()))} alone (attained {at_least(float(one.lower.max()))}, "
            f"sampled {at_least(float(most))}), {at_most(float(up_to.upper.max()))} up to here"
            for name, one, up_to, most in zip(self.layers, self.alone, self.cumulative, self.sampled_max, strict=True)
        ]
        return lines(f"Attribution: {counted(len(self.layers), 'layer')}", *rows)


@dataclass(frozen=True, eq=False)
class KeptFloat:
    """A network of which some layers are the original's, the others compressed; see `keep_float`.

    Attributes:
        network: the mixed network.
        kept: names of the layers that are the original's, of those that differ.
        tolerance: what was asked for.
        discrepancy: of `network` from the original.
    """

    network: torch.nn.Module
    kept: tuple[str, ...]
    tolerance: float
    discrepancy: Discrepancy

    @property
    def satisfied(self) -> bool:
        """Whether the certificate meets the tolerance."""
        return self.discrepancy.within(self.tolerance)

    def __repr__(self) -> str:
        high = at_most(float(self.discrepancy.upper.max()))
        return lines(
            f"KeptFloat: {', '.join(self.kept) or 'no layer'} kept",
            f"max |y1 - y2|: {high} {self.discrepancy.claim}, {at_most(self.tolerance)} allowed",
        )


class Answer(enum.Enum):
    """Answer to whether two networks are equivalent on an input star."""

    EQUIVALENT = "equivalent"  # certified for every input of the star
    NOT_EQUIVALENT = "not equivalent"  # a witness shows it
    UNKNOWN = "unknown"  # the budget ended first, or numerical limits left a gap


@dataclass(frozen=True, eq=False)
class Equivalence(Certifiable):
    """Whether two networks agree on input stars: to within `epsilon`, or in their label.

    Attributes:
        answer: per input star.
        lower, upper: [S] certified interval. To within epsilon: around max over inputs and outputs of |y1 - y2|.
            Labels: around the largest lead that any output has over output `label`, in either network; a
            negative `upper` shows that all inputs have this label.
        witness: [S, *input shape] where `answer` is NOT_EQUIVALENT, an input that shows it, replayed through both
            networks; else the input that attains `lower`.
        label: [S] the original's label at a point of the star; None where labels were not asked for.
        epsilon: what was asked for; None where labels were.
        branches: bounds of sub-problems taken by searches.
        seconds: what it took.
        semantics, kernels, uncovered, reasons: as of a `Discrepancy`; NEVER_SURE where no input counts.
        confidence: labels count where the original's softmax is at least this; None: everywhere.
    """

    answer: tuple[Answer, ...]
    lower: Tensor
    upper: Tensor
    witness: Tensor
    label: Tensor | None
    epsilon: float | None
    branches: int
    seconds: float
    semantics: Semantics = Semantics.FLOAT
    kernels: Kernels = Kernels.NONE
    uncovered: tuple[str, ...] = ()
    reasons: tuple[Reason, ...] = ()
    confidence: float | None = None

    def count(self, answer: Answer) -> int:
        """Number of stars with this answer."""
        return self.answer.count(answer)

    @property
    def asked(self) -> str:
        """What the answers are about, in words."""
        if self.epsilon is not None:
            return f"|y1 - y2| <= {self.epsilon:g}"
        sure = "" if self.confidence is None else f" wherever the original is sure to {self.confidence:g}"
        return f"the same label{sure}"

    def __repr__(self) -> str:
        what = "lead" if self.epsilon is None else "|y1 - y2|"
        low, high = float(self.lower.max()), float(self.upper.max())
        answers = ", ".join(f"{n:,} {answer.value}" for answer, n in Counter(self.answer).items())
        kernels = "" if self.kernels is Kernels.NONE else f", {self.kernels}"
        return lines(
            f"Equivalence ({self.asked}): {answers}; {self.semantics}{kernels}",
            f"max {what}: {at_least(low)} attained, at most {at_most(high)}",
            *([f"not covered: kernels of {', '.join(self.uncovered)}"] if self.uncovered else []),
            _reasons(self.reasons),
            f"{counted(self.branches, 'branch')}, {self.seconds:.2f} s",
        )


def ended(status: tuple[Status, ...], reasons: tuple[Reason, ...]) -> str:
    """Status of the stars, and why those that are not exact ended: "8 EXACT, 2 BOUNDED (budget 1, rounding 1)"."""
    counts = Counter(status)
    parts = [f"{counts[kind]:,} {kind.name}" for kind in Status if counts[kind]]
    why = Counter(reason for kind, reason in zip(status, reasons, strict=False) if kind is not Status.EXACT)
    return ", ".join(parts) + (f" ({_reasons(tuple(why.elements()))})" if why else "")


def _reasons(reasons: tuple[Reason, ...]) -> str:
    return ", ".join(f"{reason} {n:,}" for reason, n in Counter(reasons).items())


def _size(values: Tensor) -> str:
    stars, outputs = values.shape
    return f"{counted(stars, 'star')}, {counted(outputs, 'output')}, {str(values.dtype).removeprefix('torch.')}"


def _took(stats: ReachStats) -> str:
    return f"{stats.method}, {stats.seconds:.2f} s"


def lines(first: str, *more: str) -> str:
    return "\n".join([first, *(f"  {line}" for line in more if line)])
