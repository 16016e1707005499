"""torchreach: certified discrepancy between a neural network and its compressed copy.

Batched star-set reachability in PyTorch. See README.md for a tour.

Names are imported on first use (PEP 562), so that `import torchreach` and the command line's help cost no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from torchreach.progress import show_progress
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
    from torchreach.storage import load_result, save_result
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
    "load_result",
    "merge",
    "mixed_integer_discrepancy",
    "prune_weights",
    "quantize_weights",
    "reach",
    "repair",
    "save_result",
    "show_progress",
    "weight_only",
]

# Where each of these names is defined, as in the imports above; a test holds the two equal.
_PLACES = {
    name: f"torchreach.{module}"
    for module, names in {
        "discrepancy": "discrepancy",
        "discrepancy_loss": "DiscrepancyLoss",
        "equivalence": "equivalent",
        "errors": "KernelMismatchError TorchreachError UncalibratedWarning UncoveredKernelsWarning",
        "lp.certify": "Certification certify",
        "lp.mixed_integer": "MixedIntegerResult mixed_integer_discrepancy",
        "networks.chain": "weight_only",
        "networks.eager_int8": "load_int8",
        "networks.load": "load",
        "networks.merge": "Comparison MergedLinear MergedNetwork MergedReLU merge",
        "networks.quantized": "prune_weights quantize_weights",
        "options": "Budget Exact Search",
        "progress": "show_progress",
        "reach.api": "reach",
        "repair": "RepairOptions Target repair",
        "results": "Answer Discrepancy Equivalence Kernels Progress ReachResult ReachStats Reason RepairResult "
        "RepairStep Semantics Status",
        "sets.star": "StarBatch",
        "star_support": "StarSupport",
        "storage": "load_result save_result",
        "tolerances": "Tolerances",
    }.items()
    for name in names.split()
}


class _Package(ModuleType):
    """The package, in which functions keep their names although `discrepancy`, `reach` and `repair` are modules too:
    the import system binds a module it has loaded to its name here, and would hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
