"""What the analyses return: frozen values, one per verb. Nothing here computes.

Axis letters: S input stars, N output features.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchreach.sets.star import StarBatch


class Status(enum.Enum):
    """How an interval was obtained, per input star."""

    EXACT = "exact"  # lower and upper meet, within 1e-6 (1 + magnitude) in float64, 1e-4 (1 + magnitude) in
    # float32: every linear region was enumerated, or a search closed
    BOUNDED = "bounded"  # the budget ended first, or numerical limits left a gap: certified but may be wide


class Semantics(enum.StrEnum):
    """Which reading of the compressed network a result speaks of (docs/certificates.md)."""

    FLOAT = "float"  # real-valued function of the weights as they are stored
    WEIGHT_ONLY = "weight-only"  # the same, of weights that lie on a grid
    DEPLOYED_INT8 = "deployed int8"  # activations rounded and clamped as int8 kernels do
    FLOAT16 = "as executed in float16"  # each layer's result rounded to the dtype, sums in float32
    BFLOAT16 = "as executed in bfloat16"
    FLOAT32 = "as executed in float32"


class Kernels(enum.StrEnum):
    """Which integer arithmetic a certificate of a deployed network covers."""

    NONE = "no integer kernels"
    EXACT = "exact integer sums"  # VNNI, ARM, GPU
    SATURATING = "pairs of products saturated to int16"  # AVX2 without VNNI
    ANY = "exact sums and saturating pairs"  # both: no pair can saturate, or the union was taken


class Reason(enum.StrEnum):
    """Why the work on a star ended."""

    CLOSED = "closed"  # lower and upper meet
    GAP = "gap"  # they are as close as was asked for
    WITHIN = "within"  # the certificate is below the tolerance that was asked for
    EXCEEDED = "exceeded"  # a witness exceeds it
    BUDGET = "budget"  # seconds, stars or memory are spent
    INTERRUPTED = "interrupted"  # Ctrl-C
    ROUNDING = "rounding"  # what is left is rounding inside the deployed network
    KERNEL_CODES = "kernel codes in doubt"  # a sum so near a threshold that kernels may give either code
    NUMERICAL = "numerical limits"  # slivers, or linear programs that did not converge


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
    settled: dict[str, int] = field(default_factory=dict)


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


@dataclass(frozen=True)
class Progress:
    """State of a running enumeration, handed to a `progress` callback.

    lower, upper: [S, N] certified range of the network's output (for a merged network: of y1 - y2) so far.
    attained_lower, attained_upper: [S, N] the part of it already met at points of the stars.
    """

    done: int
    open: int
    lower: Tensor
    upper: Tensor
    attained_lower: Tensor
    attained_upper: Tensor
    seconds: float


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class ReachResult:
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


@dataclass(frozen=True)
class Discrepancy:
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


class Answer(enum.Enum):
    """Answer to whether two networks are equivalent on an input star."""

    EQUIVALENT = "equivalent"  # certified for every input of the star
    NOT_EQUIVALENT = "not equivalent"  # a witness shows it
    UNKNOWN = "unknown"  # the budget ended first, or numerical limits left a gap


@dataclass(frozen=True)
class Equivalence:
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
    """

    answer: tuple[Answer, ...]
    lower: Tensor
    upper: Tensor
    witness: Tensor
    label: Tensor | None
    epsilon: float | None
    branches: int
    seconds: float

    def count(self, answer: Answer) -> int:
        """Number of stars with this answer."""
        return self.answer.count(answer)


@dataclass(frozen=True)
class RepairStep:
    """One iteration of the repair loop; iteration 0 is the compressed network as given."""

    iteration: int
    discrepancy: Discrepancy
    accuracy: float | None
    loss: float | None  # last training loss: mean squared error to the targets, or mean certified bound
    satisfied: bool
    seconds: float


@dataclass(frozen=True)
class RepairResult:
    """Outcome of `repair`.

    Attributes:
        network: the repaired network; its certificate is `after`.
        history: every evaluation, in order; the first is the compressed network as given.
        satisfied: whether `after` lies in the target set.
        index: position of `network` in `history`: the last entry if the target was reached, else the entry
            that came closest to it.
    """

    network: torch.nn.Module
    history: tuple[RepairStep, ...]
    satisfied: bool
    index: int = -1

    @property
    def before(self) -> Discrepancy:
        """Discrepancy of the compressed network as given."""
        return self.history[0].discrepancy

    @property
    def after(self) -> Discrepancy:
        """Discrepancy of `network`."""
        return self.history[self.index].discrepancy

    @property
    def accuracy(self) -> float | None:
        """Accuracy of `network`, where one was measured."""
        return self.history[self.index].accuracy
