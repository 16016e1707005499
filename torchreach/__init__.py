"""torchreach: certified discrepancy between a neural network and its compressed copy.

Batched star-set reachability in PyTorch. See README.md for a tour.
"""

from torchreach.discrepancy import discrepancy
from torchreach.discrepancy_loss import DiscrepancyLoss
from torchreach.equivalence import equivalent
from torchreach.errors import KernelMismatchError, TorchreachError, UncalibratedWarning, UncoveredKernelsWarning
from torchreach.lp.certify import Certification, certify
from torchreach.lp.mixed_integer import MixedIntegerResult, mixed_integer_discrepancy
from torchreach.networks.chain import weight_only
from torchreach.networks.eager_int8 import load_int8
from torchreach.networks.load import load
from torchreach.networks.merge import Comparison, MergedLinear, MergedNetwork, MergedReLU, merge
from torchreach.networks.quantized import prune_weights, quantize_weights
from torchreach.options import Budget, Exact, Search
from torchreach.reach.api import reach
from torchreach.repair import RepairOptions, Target, repair
from torchreach.results import (
    Answer,
    Discrepancy,
    Equivalence,
    Kernels,
    Progress,
    ReachResult,
    ReachStats,
    Reason,
    RepairResult,
    RepairStep,
    Semantics,
    Status,
)
from torchreach.sets.star import StarBatch
from torchreach.star_support import StarSupport
from torchreach.tolerances import Tolerances

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Budget",
    "Certification",
    "Comparison",
    "Discrepancy",
    "DiscrepancyLoss",
    "Equivalence",
    "Exact",
    "KernelMismatchError",
    "Kernels",
    "MergedLinear",
    "MergedNetwork",
    "MergedReLU",
    "MixedIntegerResult",
    "Progress",
    "ReachResult",
    "ReachStats",
    "Reason",
    "RepairOptions",
    "RepairResult",
    "RepairStep",
    "Search",
    "Semantics",
    "StarBatch",
    "StarSupport",
    "Status",
    "Target",
    "Tolerances",
    "TorchreachError",
    "UncalibratedWarning",
    "UncoveredKernelsWarning",
    "certify",
    "discrepancy",
    "equivalent",
    "load",
    "load_int8",
    "merge",
    "mixed_integer_discrepancy",
    "prune_weights",
    "quantize_weights",
    "reach",
    "repair",
    "weight_only",
]
