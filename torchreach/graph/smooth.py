"""The table of smooth activations: what every reader, bound and search knows of them, one entry each.

An entry gives the function, its slope, and where the slope turns, that is where it stops rising or falling; bounds
(`torchreach.domains.smooth`) follow from these alone. Functions are read as functions of real numbers. Where torch's
own differs from the formula in the table by more than rounding (softplus above its threshold), the entry says by how
much.

Rounding. Evaluated in float64, value and slope are off by at most `ERROR (height + steepest |x|)` and `ERROR steepest`.
torch's exp, log1p, tanh and erf are good to 1 ulp on processors (SLEEF) and 2 on CUDA devices; a value takes at most
two of them and six operations, each of which adds half an ulp of a number of that size, and what an argument's own
rounding moves is at most its ulp times the steepest slope (for exp(-g), g exp(-g) <= 1/e). 64 units are three times
what these add up to; tests measure it against arithmetic of 50 digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchreach.core.roundoff import allowance
from torchreach.graph.propagate import propagate

ERROR = allowance(1.0, 64)


@dataclass(frozen=True, eq=False)
class Turn:
    """A place where the slope stops rising or falling, or jumps.

    low, high: least and largest of its values on both sides, rounded outward. kink: whether the slope is not
    differentiable there.
    """

    at: float
    low: float
    high: float
    kink: bool = False

    @staticmethod
    def smooth(at: float, slope: float) -> Turn:
        """An inflection; `at` and `slope` to 1e-15."""
        return Turn(at, slope - 1e-14, slope + 1e-14)


@dataclass(frozen=True, eq=False)
class Smooth:
    """One activation sigma with its parameters.

    name: of the layer, with parameters; equal names are equal functions.
    value, slope: sigma and sigma', of float64 tensors; at kinks, the slope of either side.
    turns: between two neighbours of these, sigma' is monotone.
    height: a bound on |sigma(0)| and on the size of what is added up for small x. steepest: one on |sigma'|.
    curl: one on |sigma'''| away from kinks.
    jump: how far torch's function may be from `value`, beyond rounding, for x >= `after`.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    turns: tuple[Turn, ...]
    height: float
    steepest: float
    curl: float
    jump: float = 0.0
    after: float = math.inf

    def error(self, x: Tensor) -> Tensor:
        """Bound on |computed value - sigma| at all numbers of magnitude |x| at most."""
        return ERROR * (self.height + self.steepest * x.abs()) + self.jumps(x)

    def jumps(self, x: Tensor) -> Tensor:
        """The part of `error` that is no rounding."""
        return torch.where(x.abs() >= self.after, self.jump, 0.0).to(x)

    @property
    def slope_error(self) -> float:
        return ERROR * self.steepest


@dataclass(frozen=True)
class Entry:
    """A layer of torch, how else it is called, and what it computes.

    layer: its class; parameters: names of what it takes, in the order of the function. names: of torch functions,
    methods and ATen operators. onnx: the ONNX operator, whose attributes have the names and defaults of `parameters`.
    """

    layer: type[nn.Module]
    make: Callable[..., Smooth]
    names: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    onnx: str = ""

    def of(self, layer: nn.Module) -> Smooth:
        return self.make(*(getattr(layer, name) for name in self.parameters))

    def called(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The layer that a call of the function with these arguments, after x, computes. TypeError as a call."""
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        given.pop("inplace", None)  # whoever reads the call sees to it
        if len(args) > len(self.parameters) or not set(given) <= set(self.parameters):
            raise TypeError(f"{self.layer.__name__} takes {', '.join(self.parameters) or 'no parameters'}")
        return self.layer(**given)


def _sigmoid() -> Smooth:
    """s' = s (1 - s), s'' = s' (1 - 2 s): rises up to 0, then falls. |s'''| = s' |1 - 6 s'| <= 1/8, at 0."""
    return Smooth(
        "Sigmoid()",
        torch.sigmoid,
        lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
        (Turn.smooth(0.0, 0.25),),
        *(1.0, 0.25, 0.125),
    )


def _tanh() -> Smooth:
    """t' = 1 - t^2, t'' = -2 t t': rises up to 0, then falls. |t'''| = 2 t' |1 - 3 t^2| <= 2, at 0."""
    return Smooth("Tanh()", torch.tanh, lambda x: 1 - torch.tanh(x) ** 2, (Turn.smooth(0.0, 1.0),), 1.0, 1.0, 2.0)


class Erf(nn.Module):
    """torch.erf as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x)


def _erf() -> Smooth:
    """erf' = r exp(-x^2), r = 2 / sqrt pi: rises up to 0, then falls.

    Its third derivative is r exp(-x^2) (4 x^2 - 2), at most 2 r, at 0.
    """
    r = 2 / math.sqrt(math.pi)
    return Smooth("Erf()", torch.erf, lambda x: r * torch.exp(-(x**2)), (Turn.smooth(0.0, r),), *(1.0, 1.1284, 2.2568))


def _gelu(approximate: str = "none") -> Smooth:
    """x Phi(x); approximate="tanh": x S(x), S = (1 + tanh g) / 2, g = c (x + k x^3).

    (x Phi)'' = phi (2 - x^2): rises between -sqrt 2 and sqrt 2, falls outside. (x Phi)''' = phi (x^3 - 4 x), largest
    where x^4 - 7 x^2 + 4 = 0, 0.779. (x S)'' has the sign of (1 + 6 k x^2) / (x (1 + 3 k x^2)^2) - c tanh g for x > 0,
    a falling function less a rising one, and is even: one root 1.4185 and its mirror image. Its third derivative is at
    most 0.777; that it stays below 0.8 is shown by interval arithmetic (tests).
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    if approximate == "tanh":
        c, k, at, steepest = math.sqrt(2 / math.pi), 0.044715, 1.4185040087908284, 1.1289930686587718

        def twice(x: Tensor) -> Tensor:
            return 2 * c * (x + k * x**3)

        def slope(x: Tensor) -> Tensor:
            both = torch.sigmoid(twice(x)) * torch.sigmoid(-twice(x))
            return torch.sigmoid(twice(x)) + x * (2 * c * (1 + 3 * k * x**2)) * both

        return Smooth(
            "GELU(approximate='tanh')",
            lambda x: x * torch.sigmoid(twice(x)),
            slope,
            (Turn.smooth(-at, 1 - steepest), Turn.smooth(at, steepest)),
            *(1.0, 1.13, 0.8),
        )
    root, steepest = math.sqrt(2), 1.1289041451851548
    return Smooth(
        "GELU()",
        lambda x: 0.5 * x * torch.erfc(-x / root),
        lambda x: 0.5 * torch.erfc(-x / root) + x * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi),
        (Turn.smooth(-root, 1 - steepest), Turn.smooth(root, steepest)),
        *(1.0, 1.13, 0.8),
    )


def _silu() -> Smooth:
    """x s with s = sigmoid(x). (x s)'' = s' (2 - x tanh(x / 2)): rises where x tanh(x / 2) < 2, |x| < 2.3994.

    (x s)''' = 3 s'' + x s''', |s''| <= 1 / (6 sqrt 3), |x s'''| = |x| s' |1 - 6 s'| <= |x| s' <= 0.224: at most 0.52.
    """
    at, steepest = 2.3993572805154677, 1.0998393201288669
    return Smooth(
        "SiLU()",
        lambda x: x * torch.sigmoid(x),
        lambda x: torch.sigmoid(x) * (1 + x * torch.sigmoid(-x)),
        (Turn.smooth(-at, 1 - steepest), Turn.smooth(at, steepest)),
        *(1.0, 1.1, 0.52),
    )


def _exponential(name: str, alpha: float, scale: float = 1.0, pace: float = 1.0) -> Smooth:
    """scale x for x >= 0, scale alpha (exp(pace x) - 1) below, pace > 0: ELU, SELU and CELU.

    The slope goes from 0 to scale alpha pace monotonely below 0, and is scale above; they meet in a kink.
    """
    if not all(map(math.isfinite, (alpha, scale, pace))) or pace <= 0:
        raise ValueError(f"its parameters must be finite, and alpha of CELU positive, got {name}")
    left = scale * alpha * pace
    return Smooth(
        name,
        lambda x: torch.where(x >= 0, scale * x, scale * alpha * torch.expm1(pace * x.clamp(max=0))),
        lambda x: torch.where(x >= 0, scale, left * torch.exp(pace * x.clamp(max=0))),
        (Turn(0.0, min(left, scale) - 1e-14 * abs(left), max(left, scale) + 1e-14 * abs(left), kink=True),),
        *(1 + abs(scale * alpha), max(abs(left), abs(scale)), abs(left) * pace**2),
    )


def _elu(alpha: float = 1.0) -> Smooth:
    return _exponential(f"ELU(alpha={float(alpha)!r})", alpha)


def _celu(alpha: float = 1.0) -> Smooth:
    return _exponential(f"CELU(alpha={float(alpha)!r})", alpha, pace=1 / alpha if alpha else 0.0)


def _selu() -> Smooth:
    return _exponential("SELU()", 1.6732632423543772, 1.0507009873554805)


def _hardswish() -> Smooth:
    """x min(max(x + 3, 0), 6) / 6: 0, then a parabola between -3 and 3 whose slope is (2 x + 3) / 6, then x."""
    return Smooth(
        "Hardswish()",
        lambda x: x * (x + 3).clamp(0, 6) / 6,
        lambda x: torch.where(x >= 3, 1.0, torch.where(x > -3, (2 * x + 3) / 6, 0.0)),
        (Turn(-3.0, -0.5, 0.0, kink=True), Turn(3.0, 1.0, 1.5, kink=True)),
        *(1.0, 1.5, 0.0),
    )


def _logsigmoid() -> Smooth:
    """log s: slope 1 - s, which falls everywhere; |(log s)'''| = |s''| <= 1 / (6 sqrt 3)."""
    return Smooth(
        "LogSigmoid()",
        lambda x: x.clamp(max=0) - torch.log1p(torch.exp(-x.abs())),
        lambda x: torch.sigmoid(-x),
        (),
        *(1.0, 1.0, 0.097),
    )


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Smooth:
    """log(1 + exp(b x)) / b, of slope sigmoid(b x), which rises everywhere, and third derivative b^2 sigmoid''.

    |sigmoid''| <= 1 / (6 sqrt 3). torch's is x where b x > threshold, too little by log(1 + exp(-b x)) / b.
    """
    if not (math.isfinite(beta) and beta > 0 and not math.isnan(threshold)):
        raise ValueError(f"beta must be positive, got beta={beta!r} and threshold={threshold!r}")
    jump = max(-threshold, 0.0) + math.log1p(math.exp(-abs(threshold)))
    return Smooth(
        f"Softplus(beta={float(beta)!r}, threshold={float(threshold)!r})",
        lambda x: x.clamp(min=0) + torch.log1p(torch.exp(-beta * x.abs())) / beta,
        lambda x: torch.sigmoid(beta * x),
        (),
        *(max(1.0, 1 / beta), 1.0, 0.097 * beta**2),
        jump=jump / beta * (1 + 1e-12),
        after=threshold / beta * (1 - 1e-12) if threshold > 0 else -math.inf,
    )


ENTRIES: tuple[Entry, ...] = (
    Entry(nn.Sigmoid, _sigmoid, ("sigmoid",), onnx="Sigmoid"),
    Entry(nn.Tanh, _tanh, ("tanh",), onnx="Tanh"),
    Entry(Erf, _erf, ("erf",), onnx="Erf"),
    Entry(nn.GELU, _gelu, ("gelu",), ("approximate",), onnx="Gelu"),
    Entry(nn.SiLU, _silu, ("silu",)),
    Entry(nn.ELU, _elu, ("elu",), ("alpha",), onnx="Elu"),
    Entry(nn.CELU, _celu, ("celu",), ("alpha",), onnx="Celu"),
    Entry(nn.SELU, _selu, ("selu",), onnx="Selu"),
    Entry(nn.Hardswish, _hardswish, ("hardswish",), onnx="HardSwish"),
    Entry(nn.Softplus, _softplus, ("softplus",), ("beta", "threshold"), onnx="Softplus"),
    Entry(nn.LogSigmoid, _logsigmoid, ("logsigmoid", "log_sigmoid")),
)
SMOOTH = tuple(entry.layer for entry in ENTRIES)
BY_NAME = {name: entry for entry in ENTRIES for name in entry.names}
BY_ONNX = {entry.onnx: entry for entry in ENTRIES if entry.onnx}
FUNCTIONS = {
    getattr(where, name): name for name in BY_NAME for where in (F, torch) if callable(getattr(where, name, None))
}


def smooth(layer: nn.Module) -> Smooth:
    """What one of the `SMOOTH` layers computes."""
    return next(entry for entry in ENTRIES if isinstance(layer, entry.layer)).of(layer)


class Activations(nn.Module):
    """ReLU on the features [N] where `relu` is true, smooth functions on others; the rest pass. Takes N features.

    parts: functions, and the mask [N] of the features of each.
    """

    relu: Tensor

    def __init__(self, relu: Tensor, parts: Sequence[tuple[Smooth, Tensor]]) -> None:
        super().__init__()
        self.register_buffer("relu", relu, persistent=False)
        self.functions = tuple(function for function, _ in parts)
        for i, (_, mask) in enumerate(parts):
            self.register_buffer(f"mask{i}", mask, persistent=False)

    @property
    def parts(self) -> list[tuple[Smooth, Tensor]]:
        return [(function, self.get_buffer(f"mask{i}")) for i, function in enumerate(self.functions)]

    @staticmethod
    def of(layer: nn.Module, features: int) -> Activations:
        """One of the `SMOOTH` layers on so many features, or `layer` itself."""
        if isinstance(layer, Activations):
            return layer
        everywhere = torch.ones(features, dtype=torch.bool)
        return Activations(~everywhere, [(smooth(layer), everywhere)])

    def forward(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return propagate(x, self)
        flat = x.flatten(1)
        result = torch.where(self.relu, flat.relu(), flat)
        for function, mask in self.parts:
            result = torch.where(mask, function.value(flat), result)
        return result.reshape(x.shape)

    def extra_repr(self) -> str:
        shown = [f"{f.name} on {int(mask.sum())}" for f, mask in self.parts]
        return ", ".join([f"ReLU on {int(self.relu.sum())}", *shown])
