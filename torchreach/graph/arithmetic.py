"""x + c, x - c, c - x, x * c and x / c as elementwise affine layers, computed exactly as torch would.

`ElementwiseAffine` stores its scale and shift. Here they are derived from the operand at each use: a
trainable operand stays shared, x / c rounds as the network's own division does, and 1 / c is not frozen in
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchreach.graph.layers import ElementwiseAffine

OPERATIONS = ("add", "sub", "rsub", "mul", "div")


class Arithmetic(ElementwiseAffine):
    """x -> x (operation) operand; "rsub" is operand - x. The operand has no batch axis and broadcasts."""

    operand: Tensor

    def __init__(self, operation: str, operand: Tensor) -> None:
        nn.Module.__init__(self)  # the parent stores scale and shift, which are properties here
        assert operation in OPERATIONS, operation
        self.operation = operation
        if isinstance(operand, nn.Parameter):
            self.register_parameter("operand", operand)
        else:
            self.register_buffer("operand", operand)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        if self.operation == "mul":
            return self.operand
        if self.operation == "div":
            return 1 / self.operand
        ones = torch.ones_like(self.operand)
        return -ones if self.operation == "rsub" else ones

    @property
    def shift(self) -> Tensor:  # type: ignore[override]
        if self.operation in ("mul", "div"):
            return torch.zeros_like(self.operand)
        return -self.operand if self.operation == "sub" else self.operand

    def forward(self, x: Tensor) -> Tensor:
        if self.operation == "add":
            return x + self.operand
        if self.operation == "sub":
            return x - self.operand
        if self.operation == "rsub":
            return self.operand - x
        return x * self.operand if self.operation == "mul" else x / self.operand

    def extra_repr(self) -> str:
        return f"{self.operation}, operand={tuple(self.operand.shape)}"
