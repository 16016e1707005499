"""torchreach: certified discrepancy between a neural network and its compressed copy.

Batched star-set reachability in PyTorch. See README.md for a tour.

Names are imported on first use (PEP 562), so that `import torchreach` and the command line's help cost no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchreach.app.progress import show_progress
    from torchreach.compress.constraints import prune_weights, quantize_weights
    from torchreach.core.audited import Audit
    from torchreach.core.errors import (
        KernelMismatchError,
        TorchreachError,
        UncalibratedWarning,
        UncoveredKernelsWarning,
    )
    from torchreach.core.options import Budget, Exact, Search
    from torchreach.core.repaired import Conflict, RepairResult, RepairStep
    from torchreach.core.results import (
        Answer,
        Attribution,
        Certificate,
        Discrepancy,
        Equivalence,
        KeptFloat,
        Kernels,
        Progress,
        ReachResult,
        ReachStats,
        Reason,
        Semantics,
        Status,
    )
    from torchreach.core.terms import Made
    from torchreach.core.tolerances import Tolerances
    from torchreach.graph.merged import Comparison, MergedLinear, MergedNetwork, MergedReLU
    from torchreach.read.dialects.state_dict import load_int8
    from torchreach.read.load import load
    from torchreach.read.module import weight_only
    from torchreach.reference.certify import Certification, certify
    from torchreach.reference.mixed_integer import MixedIntegerResult, mixed_integer_discrepancy
    from torchreach.sets.star import StarBatch
    from torchreach.training.keep import Keep
    from torchreach.training.loss import DiscrepancyLoss
    from torchreach.training.projection import project
    from torchreach.training.repair import RepairOptions, Target, repair
    from torchreach.training.support import StarSupport
    from torchreach.verbs.attribution import attribute, keep_float
    from torchreach.verbs.audit import audit
    from torchreach.verbs.discrepancy import discrepancy
    from torchreach.verbs.equivalence import equivalent
    from torchreach.verbs.merge import merge
    from torchreach.verbs.reach import reach
    from torchreach.verbs.storage import load_result, save_result

__version__ = "0.2.0"

__all__ = [
    "Answer",
    "Attribution",
    "Audit",
    "Budget",
    "Certificate",
    "Certification",
    "Comparison",
    "Conflict",
    "Discrepancy",
    "DiscrepancyLoss",
    "Equivalence",
    "Exact",
    "Keep",
    "KeptFloat",
    "KernelMismatchError",
    "Kernels",
    "Made",
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
    "attribute",
    "audit",
    "certify",
    "discrepancy",
    "equivalent",
    "keep_float",
    "load",
    "load_int8",
    "load_result",
    "merge",
    "mixed_integer_discrepancy",
    "project",
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
        "app.progress": "show_progress",
        "compress.constraints": "prune_weights quantize_weights",
        "core.audited": "Audit",
        "core.errors": "KernelMismatchError TorchreachError UncalibratedWarning UncoveredKernelsWarning",
        "core.options": "Budget Exact Search",
        "core.results": "Answer Attribution Certificate Discrepancy Equivalence KeptFloat Kernels Progress ReachResult "
        "ReachStats Reason Semantics Status",
        "core.repaired": "Conflict RepairResult RepairStep",
        "core.terms": "Made",
        "core.tolerances": "Tolerances",
        "graph.merged": "Comparison MergedLinear MergedNetwork MergedReLU",
        "read.dialects.state_dict": "load_int8",
        "read.load": "load",
        "read.module": "weight_only",
        "reference.certify": "Certification certify",
        "reference.mixed_integer": "MixedIntegerResult mixed_integer_discrepancy",
        "sets.star": "StarBatch",
        "training.keep": "Keep",
        "training.loss": "DiscrepancyLoss",
        "training.projection": "project",
        "training.repair": "RepairOptions Target repair",
        "training.support": "StarSupport",
        "verbs.attribution": "attribute keep_float",
        "verbs.audit": "audit",
        "verbs.discrepancy": "discrepancy",
        "verbs.equivalence": "equivalent",
        "verbs.merge": "merge",
        "verbs.reach": "reach",
        "verbs.storage": "load_result save_result",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
