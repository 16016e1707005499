"""What floating-point execution does to a network: bounds on (real-valued output) - (executed output) over boxes.

A network executed in a format (float16, bfloat16, float32, float64) rounds its input, and the result of every layer,
to the format. In between, products are summed in float32 (in float64 for float64 networks), in any order:

    sum       |fl(W x + b) - (W x + b)|  <=  A  =  c n u (|W| |x| + |b|)       n terms       (Higham, ch. 3)
    result    off by h(|W x + b| + A) more, h(s) being half the spacing of the format's numbers of magnitude s; by less
              where all that the sum can be is rounded to few numbers
    u         unit roundoff of what sums are kept in: 2^-24, or 2^-53
    c         2 for half precision, whose sums tensor cores truncate, else 1

Rounding less (a kernel that keeps float32 between layers) is inside these bounds; so are any batch size, thread count
and order of summation. More operations in place of one layer are counted one by one: a product and a sum that a file
lists apart, and int8 weights of torchao that are scaled after the product. ReLU, reshaping and dropout round nothing.

Method: a zonotope gives the magnitudes, the rounding of earlier layers included. The difference then goes back from the
    outputs to each layer's noise (`difference`, with both networks on the same weights), so that it is weighted by what
    the later layers make of it, and vanishes behind neurons that are off.
Property: sound. Refuses a layer where the format may overflow.

Axis letters: S boxes, N features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import InvalidNetworkError, ShapeError, UnsupportedLayerError
from torchreach.core.roundoff import SINGLE, allowance, ball, gamma, unit_roundoff
from torchreach.domains.difference import Backward
from torchreach.domains.hexagon import Hexagon
from torchreach.domains.pair import Pair
from torchreach.domains.zonotope import box_rows, relu_band
from torchreach.graph.arithmetic import Arithmetic
from torchreach.graph.layers import PASS_THROUGH, RESHAPING, ElementwiseAffine, fan_in, linear, magnitude
from torchreach.graph.steps import Step
from torchreach.graph.weights import torchao_kind

MAX_NUMBERS = 2**25  # in one batch of zonotopes; what is larger is boxed in
# Weights of torchao that its kernels multiply as codes and scale afterwards, or dequantise first.
SCALED_AFTER = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
# Codes of torchao's weights reach this far; products with them are rounded before they are scaled.
CODES = 128
UNDERFLOW = 2.0**-149  # what one operation in float32 loses at most to gradual underflow


# Layers whose kernels were measured; what is read from graphs that are no chains is none of them.
KNOWN = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.AvgPool1d, nn.AvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d),
    *(ElementwiseAffine, *RESHAPING),
)


@dataclass(frozen=True)
class Format:
    """A floating-point format that networks are executed in."""

    dtype: torch.dtype

    @property
    def unit(self) -> float:
        """Unit roundoff."""
        return unit_roundoff(self.dtype)

    @property
    def sum_unit(self) -> float:
        """Unit roundoff of what sums are kept in."""
        return min(self.unit, SINGLE)

    @property
    def sloppy(self) -> float:
        """Tensor cores truncate the sums of half precision where others round to nearest."""
        return 2.0 if self.unit > SINGLE else 1.0

    @property
    def tiny(self) -> float:
        """Half the spacing of its subnormal numbers."""
        return self.unit * torch.finfo(self.dtype).tiny

    @property
    def largest(self) -> float:
        return torch.finfo(self.dtype).max

    def half_spacing(self, size: Tensor) -> Tensor:
        """What rounding a number of at most this magnitude to the format changes at most."""
        _, exponent = torch.frexp(size.clamp(min=torch.finfo(self.dtype).tiny))  # size = m 2^exponent, m in [1/2, 1)
        return torch.ldexp(torch.full_like(size, self.unit), exponent - 1)

    def rounded(self, value: Tensor) -> Tensor:
        """`value` rounded to the format."""
        return value.to(self.dtype).to(value.dtype)

    def input_error(self, lower: Tensor, upper: Tensor) -> Tensor:
        """[S, N] bound on what rounding changes of inputs in boxes; exact where an input does not vary.

        Numbers may pass float32 on their way. Raises InvalidNetworkError: inputs that overflow.
        """
        size = torch.maximum(lower.abs(), upper.abs())
        self.check(size, "inputs")
        single = lower.float().to(lower.dtype) if self.unit > SINGLE else lower
        fixed = torch.maximum((lower - self.rounded(lower)).abs(), (lower - self.rounded(single)).abs())
        varying = self.half_spacing(size) + (SINGLE * size if self.unit > SINGLE else 0.0)
        return torch.where(lower == upper, fixed, varying)

    @property
    def _name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def check(self, size: Tensor, layer: str, *, sums: bool = False) -> None:
        """Raises InvalidNetworkError if a value of this magnitude may overflow."""
        largest = max(self.largest, torch.finfo(torch.float32).max) if sums else self.largest
        worst = float(size.max()) if size.numel() else 0.0
        if not worst <= largest:
            what = "sums" if sums else "values"
            raise InvalidNetworkError(
                f"{layer}: {what} may reach {worst:.3g} over the input set, but {self._name} ends at "
                f"{self.largest:.3g}: it may overflow as executed; make the set smaller, or ask for the real-valued "
                "reading (arithmetic='real')"
            )


@torch.no_grad()
def rounding(
    steps: tuple[Step, ...],
    lower: Tensor,
    upper: Tensor,
    kind: Format,
    *,
    rounded: bool = False,
    clock: Clock = NO_LIMIT,
) -> tuple[Tensor, Tensor]:
    """Bounds (low, high) [S, N_out] on (real output) - (output as executed) of `steps` over boxes [S, N_in].

    steps, lower, upper: in float64. rounded: whether inputs are numbers of the format already. clock: looked at between
        batches of boxes; when it is over the later ones get what |W| alone gives.

    Guarantee: for every real x in box s, executed on x rounded to the format.
    Raises: InvalidNetworkError: a layer may overflow. UnsupportedLayerError: layers or torchao weights of
        unknown kernels.
    """
    for step in steps:
        if step.curves:
            raise UnsupportedLayerError(
                f"{step.curves[0][0].name}: how smooth activations are executed is not known; ask for the real-valued "
                "reading (arithmetic='real')"
            )
        for layer in step.block:
            if not isinstance(layer, (*KNOWN, *PASS_THROUGH)):
                raise UnsupportedLayerError(
                    f"{type(layer).__name__} before {step.name}: how it is executed is not known, only chains of "
                    "Linear, convolution, average pooling and batch norm are; ask for the real-valued reading "
                    "(arithmetic='real')"
                )
    off = kind.input_error(lower, upper)
    off = torch.zeros_like(off) if rounded else off
    pair = _same_weights(steps)
    width, depth = max(step.features for step in steps), lower.shape[1] + sum(step.features for step in steps)
    size = max(1, MAX_NUMBERS // (width * depth))
    result = []
    for low, high, part in zip(lower.split(size), upper.split(size), off.split(size), strict=True):
        noisy, shifts, hexagons, bound = _forward(steps, low, high, part, kind)
        if pair is not None and not clock.over:
            both = replace(pair, second=noisy, db=[-shift for shift in shifts])
            tighter = _backward(both, low, high, part, hexagons)
            bound = torch.maximum(bound[0], tighter[0]), torch.minimum(bound[1], tighter[1])
        result.append(bound)
    low, high = zip(*result, strict=True)
    return torch.cat(low), torch.cat(high)


def _same_weights(steps: tuple[Step, ...]) -> Pair | None:
    """The network against itself, differing by what its steps' noise will be; None where ReLU leaves features out."""
    try:
        Pair.check(steps, steps)
    except (ShapeError, UnsupportedLayerError):
        return None
    pair = Pair.of(steps, steps)
    # The weights are one set of numbers: their difference is 0, whatever composing them rounded.
    return replace(pair, exact=[True] * len(steps), shared=0)


def _backward(pair: Pair, low: Tensor, high: Tensor, off: Tensor, hexagons: list[Hexagon]) -> tuple[Tensor, Tensor]:
    work = Backward(pair, low, high, off=off)
    for hexagon in hexagons:
        work.add(hexagon)
    value = work.difference(work.closed)[0]
    above, below = value.expand(len(low), -1).reshape(len(low), 2, -1).unbind(1)
    return -below, above


def _forward(
    steps: tuple[Step, ...], low: Tensor, high: Tensor, off: Tensor, kind: Format
) -> tuple[tuple[Step, ...], list[Tensor], list[Hexagon], tuple[Tensor, Tensor]]:
    """The steps with noise [S, N_out]; what execution adds to their biases [S, N_out]; hexagons of the hidden layers
    (real, executed); and bounds [S, N_out] on real - executed."""
    rows, slack = box_rows(low, high)
    real, run = Zonotope(rows, slack), Zonotope(rows, slack + off)
    apart = _Apart(torch.zeros_like(off), off)
    noisy: list[Step] = []
    shifts: list[Tensor] = []
    hexagons: list[Hexagon] = []
    dl, du = -off, off
    for step in steps:
        shape = step.in_shape
        real, run, apart = real.shaped(shape), run.shaped(shape), apart.shaped(shape)
        own = _Apart(torch.zeros_like(apart.middle), torch.zeros_like(apart.radius))
        for layer in step.block:
            if isinstance(layer, PASS_THROUGH):
                continue
            inputs, real = run.size, real.through(layer)
            run, product = run.through(layer), run.through(layer, biased=False)
            apart, own = apart.through(layer), own.through(layer)
            if isinstance(layer, RESHAPING):
                continue
            middle, radius = _rounded(layer, inputs, product, run, kind, f"{type(layer).__name__} before {step.name}")
            run, apart, own = run.moved(middle, radius), apart.moved(middle, radius), own.moved(middle, radius)
        real, run, apart, own = real.flat(), run.flat(), apart.flat(), own.flat()
        noisy.append(replace(step, noise=own.radius))
        shifts.append(own.middle)
        ends = real.ends, run.ends
        # real - executed: apart counts the other way round
        dl = torch.maximum(-apart.middle - apart.radius, ends[0][0] - ends[1][1])
        du = torch.minimum(-apart.middle + apart.radius, ends[0][1] - ends[1][0])
        if step.relu is None:
            break
        hexagon = Hexagon(*ends[0], *ends[1], dl, du).tightened()
        hexagons.append(hexagon)
        on = (hexagon.l1 >= 0) & (hexagon.l2 >= 0)
        none = (hexagon.u1 <= 0) & (hexagon.u2 <= 0) & step.relu
        # relu(z) - relu(z - d) lies between 0 and d
        ends = (hexagon.dl, hexagon.dl.clamp(max=0)), (hexagon.du, hexagon.du.clamp(min=0))
        dl, du = (torch.where(none, 0.0, torch.where(on | ~step.relu, d, between)) for d, between in ends)
        apart = _Apart(*ball(-du, -dl))
        real, run = real.relu(step.relu), run.relu(step.relu)
    return tuple(noisy), shifts, hexagons, (dl, du)


@dataclass(frozen=True)
class Zonotope:
    """rows [S, 1 + G, *shape] over [-1, 1]^G, and a bound on their error [S, *shape]."""

    rows: Tensor
    slack: Tensor

    def shaped(self, shape: tuple[int, ...]) -> Zonotope:
        return Zonotope(self.rows.reshape(*self.rows.shape[:2], *shape), self.slack.reshape(-1, *shape))

    def flat(self) -> Zonotope:
        return Zonotope(self.rows.flatten(2), self.slack.flatten(1))

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        spread = self.rows[:, 1:].abs().sum(1) + self.slack
        return self.rows[:, 0] - spread, self.rows[:, 0] + spread

    @property
    def size(self) -> Tensor:
        """Largest magnitude [S, *shape]."""
        return self.rows.abs().sum(1) + self.slack

    def through(self, layer: nn.Module, *, biased: bool = True) -> Zonotope:
        """After an affine layer, with its bias or without; float64's own rounding included."""
        share = gamma(fan_in(layer) + self.rows.shape[1])
        slack = magnitude(layer, self.slack + share * self.rows.abs().sum(1))
        rows = linear(layer, self.rows.flatten(0, 1))
        rows = rows.reshape(*self.rows.shape[:2], *rows.shape[1:])
        if biased and not isinstance(layer, RESHAPING):
            bias, size = _bias(layer, self.slack[:1])
            rows[:, 0] += bias
            slack = slack + share * size
        return Zonotope(rows, slack + share * rows.abs().sum(1))

    def moved(self, middle: Tensor, radius: Tensor) -> Zonotope:
        """With a number within `radius` of `middle` added."""
        rows = self.rows.clone()
        rows[:, 0] += middle
        return Zonotope(rows, self.slack + radius + allowance(rows[:, 0].abs()))

    def relu(self, mask: Tensor) -> Zonotope:
        """After ReLU, boxed in where there are too many generators."""
        rows, slack = relu_band(self.rows, self.slack, *self.ends, mask)
        if rows.numel() > MAX_NUMBERS:
            rows, slack = rows[:, :1], slack + rows[:, 1:].abs().sum(1)
        return Zonotope(rows, slack)


@dataclass(frozen=True)
class _Apart:
    """(executed) - (real) lies within `radius` of `middle`, [S, *shape] each."""

    middle: Tensor
    radius: Tensor

    def shaped(self, shape: tuple[int, ...]) -> _Apart:
        return _Apart(self.middle.reshape(-1, *shape), self.radius.reshape(-1, *shape))

    def flat(self) -> _Apart:
        return _Apart(self.middle.flatten(1), self.radius.flatten(1))

    def through(self, layer: nn.Module) -> _Apart:
        return _Apart(
            linear(layer, self.middle), magnitude(layer, self.radius + gamma(fan_in(layer)) * self.middle.abs())
        )

    def moved(self, middle: Tensor, radius: Tensor) -> _Apart:
        total = self.middle + middle
        return _Apart(total, self.radius + radius + allowance(total.abs()))


def _rounded(
    layer: nn.Module, inputs: Tensor, product: Zonotope, result: Zonotope, kind: Format, name: str
) -> tuple[Tensor, Tensor]:
    """What execution adds to the layer's result: (middle, radius) [S, *shape].

    inputs: [S, *in_shape] sizes of what the layer is given. product, result: W x and W x + b of what it is given.
    """
    noise = unrounded(layer, inputs, product.size, kind, name)
    return settled(*result.ends, noise, kind, name)


def settled(low: Tensor, high: Tensor, noise: Tensor, kind: Format, name: str) -> tuple[Tensor, Tensor]:
    """What rounding to the format adds to values in [low, high] that are off by `noise`, this included: middle, radius.

    Raises InvalidNetworkError: they may overflow.
    """
    size = torch.maximum(low.abs(), high.abs())
    kind.check(size + noise, name)
    half = noise + kind.half_spacing(size + noise)
    # The result is monotone in the sum. Kernels that round less than every layer keep it as it is.
    least = torch.maximum(kind.rounded(low - noise) - high, -half)
    most = torch.minimum(kind.rounded(high + noise) - low, half)
    least, most = torch.minimum(least, -noise), torch.maximum(most, noise)
    middle, radius = ball(least, most)
    return middle, radius + allowance(low.abs() + high.abs() + noise)


def unrounded(layer: nn.Module, inputs: Tensor, product: Tensor, kind: Format, name: str) -> Tensor:
    """Bound [S, *shape] on what executing one layer changes before its result is rounded to the format.

    inputs, product: sizes of what the layer is given [S, *in_shape], and of W x [S, *shape].
    """
    n = fan_in(layer) + 2
    terms = magnitude(layer, inputs) + _bias(layer, inputs[:1])[1]
    kind.check(terms, name, sums=True)
    # gamma_n = n u / (1 - n u)
    noise = kind.sloppy * n * kind.sum_unit * (1 + 1e-3) * terms + n * UNDERFLOW
    packing = torchao_kind(layer)
    if packing is not None:
        if packing not in SCALED_AFTER:
            raise UnsupportedLayerError(
                f"{name}: what kernels for {packing} round is not known; ask for the real-valued reading of the "
                "dequantised weights (arithmetic='real')"
            )
        assert isinstance(layer, nn.Linear)
        # W = scale codes is rounded when it is dequantised, and so may scale be; codes x is a number of the format.
        largest = layer.weight.abs().amax(1)
        unscaled = CODES * (product + noise) / largest.clamp(min=torch.finfo(product.dtype).tiny)
        kind.check(torch.where(largest > 0, unscaled, 0.0), name)
        noise = noise + kind.unit * (2 * magnitude(layer, inputs) + product + noise) + kind.tiny * (1 + largest)
    apart = packing is not None or getattr(layer, "bias_apart", False)
    if isinstance(layer, ElementwiseAffine):
        noise = noise + _operand(layer, inputs, product, kind)
        apart = not isinstance(layer, Arithmetic)
    if apart:  # the product is rounded before the bias is added
        kind.check(product + noise, name)
        noise = noise + kind.half_spacing(product + noise)
    return noise


def _bias(layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Bias [1, *shape] of a layer on inputs shaped as `like` [1, *in_shape], and the sum of its terms' magnitudes."""
    zero = torch.zeros_like(like)
    bias = layer(zero)
    if not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return bias, bias.abs()
    assert layer.running_mean is not None
    mean = layer.running_mean.abs().reshape(-1, *[1] * (zero.ndim - 2)).expand_as(zero)
    return bias, bias.abs() + 2 * magnitude(layer, mean)


def _operand(layer: ElementwiseAffine, inputs: Tensor, product: Tensor, kind: Format) -> Tensor:
    """What rounding a constant to the format changes."""
    if isinstance(layer, Arithmetic):
        given, used = layer.operand, kind.rounded(layer.operand)
        if layer.operation == "div":
            return product * torch.where(given == used, 0.0, (given / used - 1).abs() * (1 + 1e-9))
        return (given - used).abs() * (inputs if layer.operation == "mul" else 1.0)
    scale, shift = ((part - kind.rounded(part)).abs() for part in (layer.scale, layer.shift))
    return scale * inputs + shift
