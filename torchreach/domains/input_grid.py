"""The grid on which a deployed network rounds its inputs: which codes inputs may get, and which inputs get a code.

Axis letters: N inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchreach.core.roundoff import SINGLE
from torchreach.graph.arithmetic import Arithmetic
from torchreach.graph.layers import RESHAPING, ElementwiseAffine
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.steps import Step

INPUT_ERROR = 8 * SINGLE  # relative: rounding the input to float32, times the reciprocal of a float32 scale; one layer
ELEMENTWISE = (ElementwiseAffine, Arithmetic, nn.BatchNorm1d, nn.BatchNorm2d, *RESHAPING)


@dataclass(frozen=True)
class InputGrid:
    """The quantiser of the inputs: x -> scale x + shift, both [N], then `quantizer`.

    first, last: [N] codes that are of interest; inputs near a threshold, which may get others too, are looked at
    elsewhere.
    """

    scale: Tensor
    shift: Tensor
    terms: Tensor  # [N] how large the terms of the shift are; they may cancel
    share: float  # of the terms that float32 may round off
    quantizer: Quantizer
    first: Tensor | None = None
    last: Tensor | None = None

    @staticmethod
    def of(step: Step) -> InputGrid | None:
        """The grid of a first step that is elementwise and ends in a quantiser, else None."""
        if step.quantizer is None or not all(isinstance(layer, ELEMENTWISE) for layer in step.block):
            return None
        scale = step.linear(torch.ones_like(step.bias)[None])[0]
        if not bool((scale != 0).all()):
            return None
        layers = sum(not isinstance(layer, RESHAPING) for layer in step.block)
        return InputGrid(scale, step.bias, step.bias_magnitude, (1 + layers) * INPUT_ERROR, step.quantizer)

    def error(self, x: Tensor) -> Tensor:
        """Bound on what rounding does to scale x + shift before it is quantised."""
        return self.share * ((self.scale * x).abs() + 2 * self.terms) + SINGLE * self.quantizer.largest_sum

    def codes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest code [..., N] of inputs in [low, high]."""
        ends = torch.stack((low, high))
        z, error = self.scale * ends + self.shift, self.error(ends)
        first, last = self.quantizer.code_range((z - error).amin(0), (z + error).amax(0))
        # A single number has few ways to be rounded: those of the kernels, which agree on most ties.
        exact = (low == high) & (low.float().to(low.dtype) == low) & (self.scale == 1) & (self.terms == 0)
        if bool((exact & (first < last)).any()):
            codes = self.quantizer.kernel_codes(low)
            first, last = torch.where(exact, codes.amin(0), first), torch.where(exact, codes.amax(0), last)
        if self.first is not None and self.last is not None:
            first, last = first.clamp(self.first, self.last), last.clamp(self.first, self.last)
        return first, last

    def cell(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Ends [..., N] of the closed set of inputs that may get these codes, infinite at the last codes."""
        low, high = self.quantizer.cell(codes)
        size = torch.maximum(*(torch.where(end.isfinite(), end.abs(), 0.0) for end in (low, high)))
        error = 2 * (self.share * (size + 4 * self.terms) + SINGLE * self.quantizer.largest_sum)
        ends = torch.stack(((low - error - self.shift) / self.scale, (high + error - self.shift) / self.scale))
        return ends.amin(0), ends.amax(0)
