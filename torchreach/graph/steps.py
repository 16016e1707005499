"""A network as alternating affine steps and activations, in the compute dtype and on the device of the sets.

A step knows how rows of a star's affine map go through it, and how an error bound does:
rows [R, N_in] -> W rows [R, N_out]; |W| e for e >= 0; and the bias, for row 0 of each map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import ShapeError, UnsupportedLayerError
from torchreach.graph.kernels import IntegerSums, Unfolded
from torchreach.graph.layers import (
    RESHAPING,
    SOFTMAX,
    MaskedReLU,
    Rearrange,
    fan_in,
    linear,
    magnitude,
    with_bias_magnitude,
)
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.roundings import PlacedSums, Roundings
from torchreach.graph.smooth import SMOOTH, Activations, Smooth

WORK = 1 << 28  # products between two looks at the clock


@dataclass(frozen=True)
class Step:
    """Affine block followed by activations, or by a quantiser (neither: the output).

    ReLU acts on the features where `relu` is true, smooth functions on the features [n] listed in `curves`; the others
    pass. Who asks for steps says whether it knows what to do with `curves`.
    """

    name: str
    block: nn.Sequential
    in_shape: tuple[int, ...]
    bias: Tensor  # [N_out]
    bias_magnitude: Tensor  # [N_out], sum of the magnitudes of all terms of the bias
    terms: int  # upper bound on the number of products summed into one output
    relu: Tensor | None  # [N_out] bool
    quantizer: Quantizer | None = None
    noise: Tensor | None = None  # [N_out] the affine block is off by at most this, in either direction
    sums: IntegerSums | PlacedSums | None = None  # how int8 kernels add up what the quantiser rounds
    curves: tuple[tuple[Smooth, Tensor], ...] = ()

    @property
    def features(self) -> int:
        return self.bias.numel()

    def linear(self, rows: Tensor) -> Tensor:
        """W rows: [..., N_in] -> [..., N_out]."""
        return self._apply(linear, rows)

    def magnitude(self, rows: Tensor) -> Tensor:
        """|W| rows, rows >= 0: [..., N_in] -> [..., N_out]."""
        return self._apply(magnitude, rows)

    def with_noise(self, error: Tensor) -> Tensor:
        """An error bound [..., N_out] of the affine block, and its noise."""
        return error if self.noise is None else error + self.noise

    def activate(self, z: Tensor) -> Tensor:
        """Activations of pre-activations [..., N]."""
        if self.relu is None:
            return z
        result = torch.where(self.relu, z.clamp(min=0), z)
        for function, index in self.curves:
            result = result.index_copy(-1, index, function.value(z[..., index]))
        return result

    @property
    def passes(self) -> Tensor:
        """[N] features without an activation."""
        assert self.relu is not None
        result = ~self.relu
        for _, index in self.curves:
            result[index] = False
        return result

    def map_rows(self, rows: Tensor, clock: Clock = NO_LIMIT) -> Tensor:
        """Affine map of a star batch: rows [S, 1 + M, N_in] -> [S, 1 + M, N_out], bias on row 0.

        A part of the rows at a time where they are many. Raises OutOfTime between two parts.
        """
        flat, size = rows.flatten(0, 1), max(1, WORK // max(1, self.terms * self.features))
        parts: list[Tensor] = []
        for part in torch.split(flat, size) if len(flat) > size else ():
            clock.check()
            parts.append(self.linear(part))
        out = torch.cat(parts).reshape(*rows.shape[:2], -1) if parts else self.linear(rows)
        out[:, 0] += self.bias
        return out

    def _apply(self, rule: Callable[[nn.Module, Tensor], Tensor], rows: Tensor) -> Tensor:
        flat = rule(self.block, rows.reshape(rows.shape[:-1].numel(), *self.in_shape))
        return flat.reshape(*rows.shape[:-1], self.features)


def steps_of(
    layers: nn.Sequential,
    input_shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantized: bool = False,
    smooth: bool = False,
) -> tuple[Step, ...]:
    """A chain of `layers` as steps on inputs of `input_shape`; weights are copied, the layers are left alone.

    quantized: whether the caller knows what to do with quantisers. A ReLU next to one becomes part of it.
    smooth: whether it knows what to do with smooth activations.

    Raises: UnsupportedLayerError: a quantiser or a smooth activation where none may be; ShapeError: a wrong input.
    """
    blocks: list[tuple[nn.Sequential, nn.Module | None]] = [(nn.Sequential(), None)]
    for layer in layers:
        if isinstance(layer, Quantizer) and not quantized:
            raise UnsupportedLayerError(
                f"{layer.name or 'a layer'!r} rounds activations, which is no linear region's business: "
                "use torchreach.discrepancy(original, deployed, stars), or torchreach.weight_only(network)"
            )
        if isinstance(layer, SOFTMAX):
            raise UnsupportedLayerError(
                f"{type(layer).__name__}: only torchreach.discrepancy and torchreach.equivalent know it, as the last "
                "layer of both networks; leave it out (network[:-1], for instance)"
            )
        if isinstance(layer, (Activations, *SMOOTH)) and not smooth:
            names = [function.name for function, _ in Activations.of(layer, 0).parts]
            raise UnsupportedLayerError(
                f"{', '.join(names)} is smooth, so the network has no linear regions and no exact reach set: compare "
                "two networks with torchreach.discrepancy(original, compressed, stars, method='search')"
            )
        if isinstance(layer, (nn.ReLU, MaskedReLU, Quantizer, Activations, *SMOOTH)):
            fused = _fused(blocks, layer) if quantized else None
            if fused is not None:
                blocks[-2] = (blocks[-2][0], fused)
                continue
            blocks[-1] = (blocks[-1][0], layer)
            blocks.append((nn.Sequential(), None))
        else:
            blocks[-1][0].append(layer)
    result: list[Step] = []
    shape = tuple(input_shape)
    with torch.no_grad():
        for index, (block, activation) in enumerate(blocks):
            if not _fits(block, dtype, device):  # a copy, so that the caller's module stays what it is
                block = copy.deepcopy(block).to(device=device, dtype=dtype).eval()
            zero = torch.zeros(1, *shape, dtype=dtype, device=device)
            try:
                value = block(zero)[0]
            except RuntimeError as error:
                raise ShapeError(f"the network does not accept inputs of shape {tuple(input_shape)}: {error}") from None
            relu, curves = None, ()
            quantizer = None
            if isinstance(activation, Quantizer):
                quantizer = copy.deepcopy(activation).flat(tuple(value.shape)).to(device)
            if isinstance(activation, (Activations, *SMOOTH)):
                kinds = Activations.of(activation, value.numel())
                relu = kinds.relu.to(device)
                curves = tuple((f, mask.nonzero().flatten().to(device)) for f, mask in kinds.parts)
            elif activation is not None and quantizer is None:
                everywhere = torch.ones(value.numel(), dtype=torch.bool)
                relu = (activation.mask if isinstance(activation, MaskedReLU) else everywhere).to(device)
            result.append(
                Step(
                    name="output" if activation is None else f"{_kind(quantizer, curves)} {index + 1}",
                    block=block,
                    in_shape=shape,
                    bias=value.flatten(),
                    bias_magnitude=with_bias_magnitude(block, zero).flatten(),
                    terms=sum(fan_in(layer) for layer in block),
                    relu=relu,
                    curves=curves,
                    quantizer=quantizer,
                    sums=None if quantizer is None else _sums(quantizer, shape, block, device),
                )
            )
            shape = tuple(value.shape)
    return tuple(result)


def _kind(quantizer: Quantizer | None, curves: tuple[tuple[Smooth, Tensor], ...]) -> str:
    return "round" if quantizer is not None else "smooth" if curves else "relu"


def _fused(blocks: list[tuple[nn.Sequential, nn.Module | None]], layer: nn.Module) -> Quantizer | None:
    """The activation before `layer` and `layer` itself as one quantiser, where nothing but reshaping is between."""
    last = blocks[-2][1] if len(blocks) > 1 else None
    if not all(isinstance(part, RESHAPING) for part in blocks[-1][0]):
        return None
    if isinstance(last, Quantizer) and isinstance(layer, nn.ReLU):
        return last.with_relu()
    if isinstance(last, nn.ReLU) and isinstance(layer, Quantizer):
        return layer.with_relu()
    if isinstance(last, Quantizer) and isinstance(layer, Quantizer) and last.same_grid(layer):
        return last.limited(layer.lowest, layer.highest)
    return None


def _sums(
    quantizer: Quantizer, shape: tuple[int, ...], block: nn.Sequential, device: torch.device
) -> IntegerSums | PlacedSums | None:
    if isinstance(quantizer, Roundings):
        return quantizer.sums(prod(shape), device)
    if quantizer.layer is None:
        return None
    assert all(isinstance(part, (*RESHAPING, Rearrange)) for part in block[:-1])
    return IntegerSums(Unfolded.of(quantizer.layer, shape, block[:-1], device))


def _fits(block: nn.Sequential, dtype: torch.dtype, device: torch.device) -> bool:
    tensors = [*block.parameters(), *block.buffers()]
    # only these behave differently in training
    modes = nn.BatchNorm1d | nn.BatchNorm2d | nn.Dropout | nn.Dropout1d | nn.Dropout2d
    training = any(layer.training for layer in block.modules() if isinstance(layer, modes))
    return not training and all(t.device == device and (t.dtype == dtype or not t.is_floating_point()) for t in tensors)
