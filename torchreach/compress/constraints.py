"""Weight-only compressions, and the constraints that keep a compressed network compressed while it trains.

Quantised, weight only, dequantised:  W = scale * q,  q integer in [-(2^(b-1) - 1), 2^(b-1) - 1]
Pruned by magnitude:                  W = mask * W

Weights lie on their grid but are stored, and multiplied, as floating-point numbers; activations and biases
are not quantised. Layers keep their type, so that everything that takes a network takes these. The scale and
the mask travel as buffers `weight_scale`, `weight_codes` (lowest and highest code) and `weight_mask`, which
`state_dict` saves.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchreach.core.errors import InvalidNetworkError, OptionError
from torchreach.graph.weights import WeightOnly, standalone_copy

log = logging.getLogger(__name__)

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)
MAX_BITS = 16
# A grid that no buffer names is looked for up to 8 bits, in layers large enough that chance cannot mimic it.
INFERRED_BITS = 8
INFERRED_WEIGHTS = 16
INFERRED_LEVELS = 3
# Rounding alone makes zeros too; only above this share are they read as pruning in a layer with a bare grid.
PRUNED_SHARE = 0.5
# A weight this close to the grid, relative to the largest, is on it: codes were multiplied in another precision.
ROUNDING = 1e-5


def quantize_weights(network: nn.Module, bits: int = 8, per_channel: bool = False) -> nn.Module:
    """Copy of `network` with linear and convolution weights on a symmetric grid (weight-only, dequantised).

    The scale is max |W| / (2^(bits - 1) - 1), one per layer, or one per output channel. Zeros stay zero, and
    are remembered as pruned. Biases stay as they are. The network itself is not changed.

    Raises: OptionError for bits outside 2..16; InvalidNetworkError if there is nothing to quantise, or a
        weight is not finite.

    Examples:
        >>> network = nn.Linear(2, 1)
        >>> _ = network.weight.data.copy_(torch.tensor([[3.0, -1.2]]))
        >>> tr.quantize_weights(network, bits=3).weight.tolist()  # multiples of 3 / 3
        [[3.0, -1.0]]
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= MAX_BITS:
        raise OptionError(f"bits must be an integer from 2 to {MAX_BITS}, got {bits!r}")
    highest = 2 ** (bits - 1) - 1
    result = standalone_copy(network)
    for layer in _weighted_layers(result).values():
        weight = layer.weight.detach()
        over = tuple(range(1, weight.ndim)) if per_channel else tuple(range(weight.ndim))
        largest = weight.abs().amax(over, keepdim=True)
        scale = torch.where(largest > 0, largest / highest, 1.0)
        if not per_channel:
            scale = scale.reshape(())
        if bool((weight == 0).any()) and getattr(layer, "weight_mask", None) is None:
            layer.register_buffer("weight_mask", weight != 0)
        layer.register_buffer("weight_scale", scale)
        layer.register_buffer("weight_codes", torch.tensor([-highest, highest], device=weight.device))
        with torch.no_grad():
            layer.weight.copy_(Grid(scale, -highest, highest).snap(weight))
    return result


def prune_weights(network: nn.Module, fraction: float, across_layers: bool = False) -> nn.Module:
    """Copy of `network` with the `fraction` of smallest linear and convolution weights set to zero.

    The share is taken in each layer, or with `across_layers` over all of them together. Biases stay.

    Raises: OptionError for a fraction outside [0, 1); InvalidNetworkError if there is nothing to prune.
    """
    if not 0 <= fraction < 1:
        raise OptionError(f"fraction must lie in [0, 1), got {fraction!r}")
    result = standalone_copy(network)
    layers = list(_weighted_layers(result).values())
    groups = [layers] if across_layers else [[layer] for layer in layers]
    for group in groups:
        sizes = torch.cat([layer.weight.detach().abs().flatten() for layer in group])
        keep = torch.ones_like(sizes, dtype=torch.bool)
        keep[sizes.argsort(stable=True)[: round(fraction * sizes.numel())]] = False
        masks = keep.split([layer.weight.numel() for layer in group])
        for layer, mask in zip(group, masks, strict=True):
            mask = mask.reshape(layer.weight.shape) & (layer.weight.detach() != 0)
            layer.register_buffer("weight_mask", mask)
            with torch.no_grad():
                layer.weight.mul_(mask)
    return result


@dataclass(frozen=True)
class Grid:
    """Weights scale * q for integers q in [lowest, highest]; `scale` broadcasts against the weight."""

    scale: Tensor
    lowest: int
    highest: int

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes q, as floating-point integers of the weight's shape."""
        return (weight / self.scale).round().clamp(self.lowest, self.highest)

    def around(self, weight: Tensor, within: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the weight's shape: the grid's steps, lowest and highest code at most `within` from the nearest."""
        step = torch.broadcast_to(self.scale.to(weight), weight.shape)
        low, high = ((weight / step).round() + sign * within for sign in (-1, 1))
        return step, low.clamp(self.lowest, self.highest), high.clamp(self.lowest, self.highest)

    def clamp(self, weight: Tensor) -> Tensor:
        """`weight` limited to the range of the grid."""
        ends = torch.stack((self.lowest * self.scale, self.highest * self.scale)).to(weight.dtype)
        return torch.clamp(weight, ends[0], ends[1])

    def snap(self, weight: Tensor) -> Tensor:
        """The nearest weight on the grid, multiplied in the scale's precision."""
        return (self.codes(weight).to(self.scale.dtype) * self.scale).to(weight.dtype)


@dataclass(frozen=True)
class FloatGrid:
    """Weights that a smaller floating-point format represents, whatever format they are stored in."""

    dtype: torch.dtype

    def clamp(self, weight: Tensor) -> Tensor:
        """`weight` limited to the range of the format."""
        return weight.clamp(-torch.finfo(self.dtype).max, torch.finfo(self.dtype).max)

    def snap(self, weight: Tensor) -> Tensor:
        """The nearest weight of the format."""
        return self.clamp(weight).to(self.dtype).to(weight.dtype)


@dataclass(frozen=True)
class Constraints:
    """What makes a network compressed: weights that are zero, and weights that lie on a grid.

    Attributes:
        masks: parameter name -> bool of its shape, False where the value must stay zero.
        grids: parameter name -> the grid its values must lie on.
    """

    masks: Mapping[str, Tensor]
    grids: Mapping[str, Grid | FloatGrid]

    @staticmethod
    def read(network: nn.Module) -> Constraints:
        """The constraints that `network` satisfies, read off its buffers or, without those, its weights.

        Masks: a buffer `<parameter>_mask` (as `prune_weights` and `torch.nn.utils.prune` leave it); without
        one, every exact zero of a weight stays zero. In a layer whose grid has no mask, zeros count as pruned
        only where they are more than half of the layer, because rounding makes zeros too.

        Grids: the buffers of `quantize_weights`. Without them (a network that went through ONNX, for
        instance) a grid of at most 8 bits, per layer or else per output channel, is recognised when
        q * scale gives every weight of the layer bit for bit and the layer has at least 16 weights and 3
        magnitudes; anything less sure is left free, and what was found is logged. A network stored in more
        precision whose every parameter is a float16 (or bfloat16) number keeps them so.
        """
        network = standalone_copy(network, keep_masks=True)
        names = {id(value): name for name, value in network.named_parameters()}
        masks: dict[str, Tensor] = {}
        grids: dict[str, Grid | FloatGrid] = {}
        for module in network.modules():
            for key, value in module.named_parameters(recurse=False):
                mask = module._buffers.get(f"{key}_mask")
                if mask is not None and mask.shape == value.shape:
                    masks[names[id(value)]] = mask != 0
        for prefix, layer in network.named_modules():
            if not isinstance(layer, WEIGHTED):
                continue
            name, weight = names[id(layer.weight)], layer.weight.detach()
            grid = _stored_grid(layer)
            if grid is None:
                grid = _infer_grid(weight)
                if grid is not None:
                    log.info(
                        "layer %r: weights found on a grid of %d codes",
                        prefix,
                        grid.highest - grid.lowest + 1,
                    )
            if grid is not None:
                grids[name] = grid
            zero = weight == 0
            pruned = bool(zero.any()) if grid is None else bool(zero.double().mean() > PRUNED_SHARE)
            if name not in masks and pruned:
                masks[name] = ~zero
        if not grids:
            grids.update(_half_precision(network))
        return Constraints(masks, grids)

    def check(self, network: nn.Module) -> None:
        """Raises InvalidNetworkError if `network` does not satisfy the constraints, up to rounding."""
        named = dict(network.named_parameters())
        for name in sorted({*self.masks, *self.grids}):
            if name not in named:
                raise InvalidNetworkError(f"constraints must name parameters of the network, got {name!r}")
            value = named[name].detach()
            off = float((self._constrain(name, value) - value).abs().max())
            if off > ROUNDING * float(value.abs().max()):
                raise InvalidNetworkError(
                    f"a compressed network must keep its zeros and lie on its grid, but parameter {name!r} is "
                    f"off by up to {off:.3g}; put it back with Constraints.project"
                )

    def project(self, network: nn.Module) -> None:
        """Puts the parameters of `network` back where the constraints want them, in place."""
        with torch.no_grad():
            for name, value in network.named_parameters():
                if name in self.masks or name in self.grids:
                    value.copy_(self._constrain(name, value))

    def straight_through(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Constrained values of free `parameters`, differentiable as if rounding were the identity.

        Gradients do not reach pruned entries, nor entries outside the grid's range.
        """
        result = {}
        for name, value in parameters.items():
            if name in self.masks or name in self.grids:
                final = self._constrain(name, value)
                if name in self.grids:
                    value = self.grids[name].clamp(value)
                if name in self.masks:
                    value = value * self.masks[name]
                value = _StraightThrough.apply(value, final)
            result[name] = value
        return result

    def _constrain(self, name: str, value: Tensor) -> Tensor:
        value = value.detach()
        if name in self.grids:
            value = self.grids[name].snap(value)
        return value * self.masks[name] if name in self.masks else value


def is_weight_only(network: nn.Module) -> bool:
    """Whether the weights are known to lie on a grid while activations are real numbers."""
    return isinstance(network, WeightOnly) or any(_stored_grid(layer) is not None for layer in network.modules())


def _weighted_layers(network: nn.Module) -> dict[str, nn.Linear | nn.Conv1d | nn.Conv2d]:
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, WEIGHTED)}
    if not layers:
        raise InvalidNetworkError("the network must have a Linear or convolution layer to compress, got none")
    for name, layer in layers.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise InvalidNetworkError(f"weights must be finite: parameter '{name}.weight' is not")
    return layers


def _stored_grid(layer: nn.Module) -> Grid | None:
    """The grid that the buffers of `quantize_weights` name; None where buffers of these names say something else."""
    scale, codes = (layer._buffers.get(name) for name in ("weight_scale", "weight_codes"))
    weight = getattr(layer, "weight", None)
    if scale is None or codes is None or codes.shape != (2,) or not isinstance(weight, Tensor):
        return None
    if scale.ndim not in (0, weight.ndim) or not bool((scale.isfinite() & (scale > 0)).all()):
        return None
    return Grid(scale, *(int(code) for code in codes.tolist()))


def _half_precision(network: nn.Module) -> dict[str, FloatGrid]:
    values = {name: value.detach() for name, value in network.named_parameters()}
    if sum(int((value != 0).sum()) for value in values.values()) < INFERRED_WEIGHTS:
        return {}
    for dtype in (torch.float16, torch.bfloat16):
        if all(bool((value.to(dtype).to(value.dtype) == value).all()) for value in values.values()):
            log.info("every parameter found to be a %s number", dtype)
            return {name: FloatGrid(dtype) for name in values}
    return {}


def _infer_grid(weight: Tensor) -> Grid | None:
    """The coarsest grid that gives `weight` bit for bit, per layer or else per output channel."""
    if weight.numel() < INFERRED_WEIGHTS or not bool((weight != 0).any()):
        return None
    # A float32 network read as float64 still has the grid it was multiplied on in float32.
    single = weight.to(torch.float32)
    if bool((single.to(weight.dtype) == weight).all()):
        weight = single
    grid = _fit(weight)
    if grid is not None:
        return grid
    rows = [_fit(row) if bool((row != 0).any()) else Grid(row.new_ones(()), -1, 1) for row in weight]
    found = [row for row in rows if row is not None]
    if len(found) < len(rows):
        return None
    scale = torch.stack([row.scale for row in found]).reshape(-1, *[1] * (weight.ndim - 1))
    return Grid(scale, min(row.lowest for row in found), max(row.highest for row in found))


def _fit(weight: Tensor) -> Grid | None:
    values = weight.unique()
    sizes = values.abs().unique()
    sizes = sizes[sizes > 0]
    most = 2 ** (INFERRED_BITS - 1)
    if not INFERRED_LEVELS <= len(sizes) <= most:
        return None
    # The largest magnitude is k * scale for some k: try each, with the neighbours that rounding may hide.
    exact = sizes[-1] / torch.arange(1, most + 1, dtype=weight.dtype, device=weight.device)
    candidates = [exact]
    for toward in (0.0, torch.inf):
        near = exact
        for _ in range(2):
            near = torch.nextafter(near, torch.full_like(near, toward))
            candidates.append(near)
    scales = torch.stack(candidates, 1).flatten()  # coarsest first
    codes = (values / scales[:, None]).round()
    fits = ((codes * scales[:, None] == values) & (codes.abs() <= most)).all(1)
    index = int(fits.byte().argmax())
    if not bool(fits[index]):
        return None
    low, high = int(codes[index].min()), int(codes[index].max())
    bits = next(b for b in range(2, INFERRED_BITS + 1) if low >= -(2 ** (b - 1)) and high < 2 ** (b - 1))
    highest = 2 ** (bits - 1) - 1
    return Grid(scales[index], min(low, -highest), highest)


class _StraightThrough(torch.autograd.Function):
    """The value `final` with the gradient of `value`; v + (final - v).detach() would be off by rounding."""

    @staticmethod
    def forward(ctx, value: Tensor, final: Tensor) -> Tensor:  # noqa: ARG004
        return final.clone()

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None
