"""What results say in words: status, semantics, kernels, and why work ended, each with its one sentence.

Every output (terminal, JSON, CSV, page, pictures, `repr`, exit message) reads these, so that none can say otherwise.
"""

from __future__ import annotations

import enum
from typing import Self


class _Worded(enum.StrEnum):
    """Names that carry the sentence which every output prints for them, and what may help where work ended so."""

    meaning: str
    cure: str

    def __new__(cls, value: str, meaning: str, cure: str = "") -> Self:
        """A member: "value", "its sentence", "its cure"."""
        member = str.__new__(cls, value)
        member._value_, member.meaning, member.cure = value, meaning, cure
        return member


class Status(_Worded):
    """How an interval was obtained, per input star."""

    # within 1e-6 (1 + magnitude) in float64, 1e-4 (1 + magnitude) in float32, 1e-4 of the magnitude where deployed
    EXACT = "exact", "both ends of each interval meet, but for rounding"
    BOUNDED = "bounded", "the intervals hold and may be wide"


class Semantics(_Worded):
    """Which reading of the compressed network a result speaks of (docs/certificates.md)."""

    FLOAT = (
        "float",
        "both networks as exact functions of the weights that are stored, in real arithmetic; what a floating-point "
        "forward pass rounds off comes on top",
    )
    WEIGHT_ONLY = (
        "weight-only",
        "both networks as exact functions of their weights, which lie on a grid, with activations in real arithmetic; "
        "what a forward pass rounds off comes on top",
    )
    DEPLOYED_INT8 = (
        "deployed int8",
        "a network that rounds its activations as its int8 kernels execute it, rounding and clamping included; one "
        "that does not as the exact function of its weights",
    )
    FLOAT16 = (
        "as executed in float16",
        "networks as executed in float16: inputs and the result of each layer rounded to it, sums in float32",
    )
    BFLOAT16 = (
        "as executed in bfloat16",
        "networks as executed in bfloat16: inputs and the result of each layer rounded to it, sums in float32",
    )
    FLOAT32 = ("as executed in float32", "networks as executed in float32, the rounding of their sums included")
    FLOAT64 = ("as executed in float64", "networks as executed in float64, the rounding of their sums included")

    @property
    def piece(self) -> str:
        """What `Discrepancy.regions` counts."""
        return "cell" if self is Semantics.DEPLOYED_INT8 else "region"


class Made(_Worded):
    """What made the network of one evaluation of `repair`."""

    GIVEN = "given", "the compressed network as it was given"
    CALIBRATED = "calibrated", "scales and zero points of its activations were fitted"
    RETRAINED = "retrained", "it was trained, and put back on its grids and masks"
    SOLVED = "solved", "a layer was solved as a linear program over the vertices of the linear regions"
    RECODED = "recoded", "int8 codes and int32 biases of its last layer were solved on inputs of the sets"
    SHIFTED = "shifted", "the int32 biases of its last layer were shifted to the middle of the certified range"


class Kernels(_Worded):
    """Which integer arithmetic a certificate of a deployed network covers."""

    NONE = "no integer kernels", "no integer kernels are involved"
    EXACT = "exact integer sums", "kernels whose integer sums are exact, as on VNNI, ARM and GPUs"
    SATURATING = (
        "pairs of products saturated to int16",
        "kernels that add products in pairs and saturate each pair to int16, as AVX2 without VNNI does",
    )
    ANY = "exact sums and saturating pairs", "kernels of both kinds: exact integer sums, and pairs saturated to int16"
    FIXED_POINT = (
        "fixed-point multipliers",
        "LiteRT's reference kernels, bit for bit: exact integer sums, scaled to codes by fixed-point multipliers (in "
        "fully connected layers by float64)",
    )
    SINGLE_FLOAT = (
        "float32 multipliers",
        "onnxruntime's CPU kernels with exact integer sums, scaled to codes in float32, bit for bit",
    )


class Reason(_Worded):
    """Why the work on a star ended."""

    CLOSED = (
        "closed",
        "both ends of the interval meet",
        "its ends meet but for rounding: a tolerance outside of them is decided",
    )
    GAP = "gap", "both ends are as close as was asked for", "a smaller gap narrows it"
    WITHIN = "within", "the upper end is at most the tolerance", "without a tolerance the work goes on"
    EXCEEDED = "exceeded", "a witness exceeds the tolerance", "without a tolerance the work goes on"
    BUDGET = "budget", "the budget of seconds, stars or memory was spent", "a larger budget narrows it"
    INTERRUPTED = "interrupted", "it was interrupted", "a run that is not interrupted narrows it"
    ROUNDING = (
        "rounding",
        "rounding inside the deployed network is what is left",
        "smaller boxes narrow it, a larger budget does not",
    )
    KERNEL_CODES = (
        "kernel codes in doubt",
        "a sum lies so near a threshold that kernels may give either code",
        "a gap of about one code of the output stays, whatever the budget",
    )
    NUMERICAL = (
        "numerical limits",
        "slivers, or linear programs that did not converge, left a gap",
        "smaller boxes may close it, a larger budget does not",
    )
    TIE = (
        "tie",
        "two outputs of a network are equal and largest: either may be taken for the label",
        "neither a budget nor other kernels decide it",
    )
    NEVER_SURE = (
        "nowhere sure",
        "the original is nowhere as sure of a label as was asked for, so that no label counts",
        "a smaller confidence asks more",
    )
