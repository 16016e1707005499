"""Integer arithmetic of int8 kernels: exact sums, or pairs of products that saturate in int16.

A kernel adds products of unsigned activation codes a and signed weight codes w in int32:

    exact sums          acc = sum_j a_j w_j                                        (VNNI, ARM, qnnpack)
    saturating pairs    acc = sum over pairs of clamp(a_i w_i + a_j w_j, -2^15, 2^15 - 1)        (x86 without VNNI)

and takes z sum_j w_j off, exactly, for the activations' zero point z. Which products form a pair is each engine's own
matter. Weights of a layer are read in the order (kernel row, kernel column, channel of the group):

    fbgemm    neighbours along all of it, across taps where channels are odd; padded taps carry the code z
    onednn    neighbours along the channels of one tap; padded taps add nothing. Linear layers: neighbours along the
              inputs, of which 257 to 768 are two halves, each with pairs of its own

as measured on torch 2.8 to 2.15; an odd last product stands alone and cannot saturate. Which of them a packed layer
really does is found by running it, on codes at which they differ (`identified`). Where that shows none of them, sums
are enclosed for any pairing: sum_j min(0, 16383.5 - a_j w_j) <= saturated - exact <= sum_j
max(0, -16384 - a_j w_j).

Axis letters: B points, G groups, N output channels of a group, P output positions, K products of one output.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOWEST, HIGHEST = -(2.0**15), 2.0**15 - 1
# Numbers in one intermediate tensor.
NUMBERS = 2**22
# onednn adds up linear layers of more than HALVED[0] and up to HALVED[1] inputs in two halves.
HALVED = (256, 768)
_FACTORS = cycle([1 + k * 2.0**-20 for k in range(1024)])
# Pairs of a layer, of each kind, that are run to see what it does.
TRIED = 4


class Pairing(enum.Enum):
    """Which products are added in int16, with saturation, before the sum in int32."""

    EXACT = "none"
    FBGEMM = "fbgemm"
    ONEDNN = "onednn"
    UNKNOWN = "any"


ENGINES = (Pairing.FBGEMM, Pairing.ONEDNN)


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """What a kernel reads of an int8 layer: the one whose sums a Quantizer rounds.

    weight: [N_out, *rest] int64 codes, zero points `weight_zero` [N_out] not taken off. weight_scale: [N_out] float64.
    scale, zero_point, highest: of the codes 0..highest that it is given. geometry: its stride, padding, dilation and
    groups, where it is a convolution. packed: torch's own packed parameters, which know the engine. pairing: that of
    another runtime.
    """

    name: str
    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor | None
    scale: float
    zero_point: int
    highest: int
    geometry: Any = None
    packed: Any = None
    pairing: Pairing | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> IntegerLayer:
        return self  # nothing in it changes, and a copy of `packed` would be packed anew

    @property
    def groups(self) -> int:
        return 1 if self.geometry is None else self.geometry.groups

    def pairs(self, pairing: Pairing) -> Tensor:
        """Pairs [T, 2] of products, as places in the order (kernel row, kernel column, channel of the group)."""
        channels, size = self.weight.shape[1], self.weight[0].numel()
        blocks = [size]
        if pairing is Pairing.ONEDNN and self.geometry is not None:
            blocks = [channels] * (size // channels)
        elif pairing is Pairing.ONEDNN and HALVED[0] < size <= HALVED[1]:
            blocks = [(size + 1) // 2, size // 2]
        first: list[Tensor] = []
        start = 0
        for block in blocks if pairing in ENGINES else ():
            first.append(torch.arange(start, start + block - 1, 2))
            start += block
        places = torch.cat(first) if first else torch.zeros(0, dtype=torch.long)
        return torch.stack((places, places + 1), 1)

    def execute(self, codes: Tensor, scale: float, zero_point: int, out_scale: float, out_zero: int) -> Tensor:
        """Output codes of the packed layer on input codes [B, ...], on other grids than the network's.

        qnnpack computes its multipliers when the input's scale changes, and only then: each run has a scale of its
        own, and the network's next one has another.
        """
        own = next(factor for factor in _FACTORS if factor * scale != self.scale)
        scale, out_scale = own * scale, own * out_scale
        x = torch._make_per_tensor_quantized_tensor(codes.to("cpu", torch.uint8), scale, zero_point)  # type: ignore
        kind = "linear" if self.geometry is None else f"conv{self.weight.ndim - 2}d"
        return getattr(torch.ops.quantized, kind)(x, self.packed, out_scale, out_zero).int_repr().to(torch.int64)


@dataclass(frozen=True, eq=False)
class Unfolded:
    """An int8 layer at its place in a network: which input each product of each output reads.

    index: [G, P, K] places among the N_in inputs, N_in itself where a tap is padded. weight: [G, N, K] codes.
    """

    layer: IntegerLayer
    index: Tensor
    weight: Tensor
    inputs: int
    shape: tuple[int, ...]  # of one input of the layer

    @staticmethod
    def of(layer: IntegerLayer, shape: tuple[int, ...], reshaping: Iterable[nn.Module], device: Any) -> Unfolded:
        """layer: reads what `reshaping` makes of inputs of `shape`."""
        inputs = int(torch.tensor(shape).prod())
        place = torch.arange(1, inputs + 1, dtype=torch.float64).reshape(1, *shape)
        for part in reshaping:
            place = part(place)
        shape = tuple(place.shape[1:])
        weight, g = layer.weight, layer.groups
        if layer.geometry is None:
            index = place.reshape(1, -1, shape[-1])
        else:
            image = place if len(shape) == 3 else place[:, :, None]  # a signal is a picture of one row
            kernel, stride, padding, dilation = _geometry(layer)
            image = F.pad(image, (padding[1], padding[1], padding[0], padding[0]))
            index = F.unfold(image, kernel, dilation, 0, stride)  # [1, C taps, P]
            taps = kernel[0] * kernel[1]
            index = index.reshape(g, -1, taps, index.shape[-1]).permute(0, 3, 2, 1).flatten(2)
        index = torch.where(index == 0, inputs + 1, index).long() - 1
        order = weight.flatten(2).mT if weight.ndim > 2 else weight  # [N_out, taps, C] as the kernels read it
        return Unfolded(
            layer,
            index.to(device),
            order.reshape(g, weight.shape[0] // g, -1).double().to(device),
            inputs,
            shape,
        )

    def features(self, group: Tensor, row: Tensor) -> Tensor:
        """Places [..., P] among the outputs of rows [...] of groups [...]."""
        positions = torch.arange(self.index.shape[1], device=row.device)
        channel = group * self.weight.shape[1] + row
        if self.layer.geometry is None:
            return positions * self.weight.shape[1] + channel[..., None]
        return channel[..., None] * len(positions) + positions

    def candidates(self, pairing: Pairing) -> Tensor:
        """Rows (group, row, place, place) [C, 4] of pairs that saturate for some codes; UNKNOWN: single products.

        The second place of a single product is K.
        """
        if pairing is Pairing.EXACT:
            return self.index.new_zeros(0, 4)
        high = self.layer.highest
        if pairing is Pairing.UNKNOWN:
            over = (self.weight * high > (HIGHEST / 2)) | (self.weight * high < LOWEST / 2)
            found = over.nonzero()
            return torch.cat((found, torch.full_like(found[:, :1], self.weight.shape[2])), 1)
        pairs = self.layer.pairs(pairing).to(self.weight.device)
        one, two = self.weight[..., pairs[:, 0]], self.weight[..., pairs[:, 1]]
        up, down = (s * one.mul(w).clamp(min=0) + s * two.mul(w).clamp(min=0) for s, w in ((high, 1), (high, -1)))
        found = ((up > HIGHEST) | (down > -LOWEST)).nonzero()
        return torch.cat((found[:, :2], pairs[found[:, 2]]), 1)

    def numbered(self, rows: Tensor) -> Tensor:
        """A number of its own for each of `candidates`."""
        size = self.weight.shape[2] + 1
        return ((rows[:, 0] * self.weight.shape[1] + rows[:, 1]) * size + rows[:, 2]) * size + rows[:, 3]

    @cached_property
    def padded(self) -> bool:
        """Whether pairs of padded taps saturate, where these hold the zero point's code."""
        layer = self.layer
        one, two = self.weights(self.saturable[Pairing.FBGEMM])
        both = layer.zero_point * (one + two)
        return bool((self.index == self.inputs).any()) and bool(((both > HIGHEST) | (both < LOWEST)).any())

    @cached_property
    def saturable(self) -> dict[Pairing, Tensor]:
        """`candidates` of each pairing, once it is asked for."""
        return _Kept(self.candidates)

    def weights(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of both products of `candidates`."""
        group, row, one, two = found.T
        padded = F.pad(self.weight, (0, 1))
        return padded[group, row, one], padded[group, row, two]


class _Kept(dict[Pairing, Tensor]):
    """Values of a function, computed once each."""

    def __init__(self, rule: Callable[[Pairing], Tensor]) -> None:
        super().__init__()
        self.rule = rule

    def __missing__(self, key: Pairing) -> Tensor:
        self[key] = self.rule(key)
        return self[key]


def _geometry(layer: IntegerLayer) -> list[tuple[int, int]]:
    """Kernel size, stride, padding and dilation along rows and columns."""
    flat = layer.weight.ndim == 3
    values = (layer.weight.shape[2:], layer.geometry.stride, layer.geometry.padding, layer.geometry.dilation)
    found: list[tuple[int, int]] = []
    for value, across in zip(values, (1, 1, 0, 1), strict=True):
        both = cast("Sequence[int]", value) if isinstance(value, tuple | list) else (value, value)
        along = [int(v) for v in both]
        found.append((across if flat else along[0], along[-1]))
    return found


@dataclass(frozen=True, eq=False)
class IntegerSums:
    """Sums of an int8 layer under one pairing or several, as a correction of exact ones.

    pairings: of each way that the network may be executed, those that are possible here; a way is the same one in all
    of its layers.
    rest, free: the values of all inputs and which of them are given, where others are fixed.
    """

    at: Unfolded
    pairings: tuple[tuple[Pairing, ...], ...] = ((Pairing.EXACT,),)
    rest: Tensor | None = None
    free: Tensor | None = None

    @property
    def name(self) -> str:
        return self.at.layer.name

    def restricted(self, values: Tensor, free: Tensor) -> IntegerSums:
        """The sums for inputs `free` [M] alone, the others fixed to `values` [N_in]."""
        if self.rest is not None and self.free is not None:
            values = self.rest.index_copy(0, self.free, values)
            free = self.free[free]
        return replace(self, rest=values, free=free)

    def codes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest codes [B, N_in] of input values in [low, high] [B, M]."""
        layer = self.at.layer
        if self.rest is not None and self.free is not None:
            rest = self.rest.expand(len(low), -1)
            low, high = (rest.index_copy(1, self.free, part) for part in (low, high))
        # Values stand for codes, up to what float64 rounds off.
        first = torch.ceil(low / layer.scale + layer.zero_point - 1e-6)
        last = torch.floor(high / layer.scale + layer.zero_point + 1e-6)
        return first.clamp(0, layer.highest), last.clamp(0, layer.highest)

    def loss(self, way: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
        """Range [B, N_out] of what saturation adds to the layer's results, for inputs in [low, high] [B, M].

        The two ends are equal where the codes are known and the pairing is. None: nothing saturates.
        """
        possible = [pairing for pairing in self.pairings[way] if len(self.at.saturable[pairing])]
        if not possible:
            return None
        codes = self.codes(low, high)
        lost = [self._loss(pairing, *codes) for pairing in possible]
        ends = [part for part in lost if part is not None]
        if not ends:
            return None
        below, above = (torch.stack(part) for part in zip(*ends, strict=True))
        if len(ends) < len(self.pairings[way]):  # one of them takes nothing off
            below, above = below.clamp(max=0), above.clamp(min=0)
        return below.amin(0) * self.unit, above.amax(0) * self.unit

    @cached_property
    def unit(self) -> Tensor:
        """What one unit of the sum stands for, [N_out]."""
        layer, at = self.at.layer, self.at
        scale = layer.scale * layer.weight_scale.to(at.weight)
        positions = at.index.shape[1]
        return scale.repeat(positions) if layer.geometry is None else scale.repeat_interleave(positions)

    def saturates(self, low: Tensor, high: Tensor) -> bool:
        """Whether any pair of any engine can leave int16 for some inputs in [low, high] [M]."""
        first, last = self.codes(low[None], high[None])
        return any(self._loss(pairing, first, last) is not None for pairing in ENGINES)

    def _loss(self, pairing: Pairing, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor] | None:
        """Range [B, N_out], in units of the sum, for codes from `first` to `last` [B, N_in]; None: it is zero."""
        at, batch, found = self.at, len(first), self.at.saturable[pairing]
        zero = at.layer.zero_point
        first = F.pad(first, (0, 1), value=zero if pairing is Pairing.FBGEMM else 0)
        last = F.pad(last, (0, 1), value=0 if pairing is Pairing.ONEDNN else zero)
        least, most = first.amin(0), last.amax(0)
        below = first.new_zeros(batch, at.weight.shape[:2].numel() * at.index.shape[1])
        above, changed = below.clone(), False
        index = F.pad(at.index, (0, 1), value=at.inputs)
        for part in torch.split(found, max(NUMBERS // max(index.shape[1], 1), 1)):
            one, two = (index[part[:, 0], :, part[:, k]] for k in (2, 3))  # [C, P]
            w = [weight[:, None].expand_as(one) for weight in at.weights(part)]
            low, high = _products((least[one], most[one], w[0]), (least[two], most[two], w[1]))
            down, up = _lost(pairing, low, high)
            active = ((down != 0) | (up != 0)).nonzero(as_tuple=True)
            if not len(active[0]):
                continue
            changed = True
            place = at.features(part[:, 0], part[:, 1])[active]
            one, two, w = one[active], two[active], [weight[active] for weight in w]
            known = (least[one] == most[one]) & (least[two] == most[two])
            for total, lost in ((below, down), (above, up)):
                total += total.new_zeros(total.shape[1]).index_add_(0, place[known], lost[active][known])
            rest = (~known).nonzero().flatten()
            for some in torch.split(rest, max(NUMBERS // max(batch, 1), 1)):
                i, j = one[some], two[some]
                bounds = _products((first[:, i], last[:, i], w[0][some]), (first[:, j], last[:, j], w[1][some]))
                for total, lost in zip((below, above), _lost(pairing, *bounds), strict=True):
                    total.index_add_(1, place[some], lost)
        return (below, above) if changed else None


def _products(*terms: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Range of the sum of a w, for terms (smallest a, largest a, w)."""
    low = sum(torch.where(w > 0, least, most) * w for least, most, w in terms)
    high = sum(torch.where(w > 0, most, least) * w for least, most, w in terms)
    return low, high  # type: ignore[return-value]


def _lost(pairing: Pairing, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Range of saturated - exact, which falls with the exact number, over [low, high]."""
    if pairing is Pairing.UNKNOWN:
        return (HIGHEST / 2 - high).clamp(max=0), (LOWEST / 2 - low).clamp(min=0)
    return high.clamp(LOWEST, HIGHEST) - high, low.clamp(LOWEST, HIGHEST) - low


def identified(at: Unfolded) -> tuple[Pairing, ...]:
    """The pairings by which the packed layer may add up: as a rule one; none where none fits what it does.

    Two codes are at their highest, where a pair of them leaves int16; others make up for their products, each alone
    in its pair. The layer's own operation says whether the pair saturates. Deterministic; a few runs of the layer.
    """
    found = {pairing: at.saturable[pairing] for pairing in (Pairing.EXACT, *ENGINES)}
    if not any(map(len, found.values())):
        return (Pairing.EXACT,)
    if at.layer.pairing is not None:
        return (at.layer.pairing,)
    if at.layer.packed is None:
        return ()
    numbers = {pairing: at.numbered(rows) for pairing, rows in found.items()}
    fitting = list(found)
    shared = torch.isin(numbers[Pairing.FBGEMM], numbers[Pairing.ONEDNN])
    alone = ~torch.isin(numbers[Pairing.ONEDNN], numbers[Pairing.FBGEMM])
    for pairing, among in ((Pairing.FBGEMM, shared), (Pairing.FBGEMM, ~shared), (Pairing.ONEDNN, alone)):
        rows = found[pairing][among]
        one, two = at.weights(rows)
        for row in rows[(one + two).abs().argsort(descending=True, stable=True)[:TRIED]]:
            seen = _saturated(at, row)
            if seen is not None:
                fitting = [p for p in fitting if int((numbers[p] == at.numbered(row[None])).any()) == seen]
    if set(ENGINES) <= set(fitting):
        padded = _padding_as(at)
        fitting = [p for p in fitting if p in padded]
    same = all(torch.equal(numbers[fitting[0]], numbers[p]) for p in fitting[1:])
    return tuple(fitting if Pairing.FBGEMM in fitting and at.padded else fitting[:1]) if same else tuple(fitting)


def _saturated(at: Unfolded, row: Tensor) -> int | None:
    """Whether the pair of `candidates` row [4] saturates in the packed layer, as `_nearest`: 0 no, 1 yes."""
    layer, (group, channel, *pair) = at.layer, [int(place) for place in row]
    position = int((at.index[group] < at.inputs).sum(1).argmax())
    index, raw = at.index[group, position], at.weight[group, channel]
    if bool((index[pair] >= at.inputs).any()):
        return None
    weight = raw - layer.weight_zero[group * len(at.weight[0]) + channel]
    codes = torch.zeros_like(raw)
    codes[pair] = layer.highest
    product = float(codes @ raw)
    lost = product - min(max(product, LOWEST), HIGHEST)
    total = float(codes @ weight)
    # Every third product, so that no two of them are neighbours; nor neighbours of the pair.
    others = torch.arange(len(raw), device=raw.device)
    apart = (others % 3 == 0) & ((others[:, None] - others[pair]).abs() > 1).all(1) & (index < at.inputs)
    for other in map(int, others[apart & (weight * total < 0)]):
        codes[other] = min(layer.highest, abs(total) // abs(float(weight[other])))
        total += float(codes[other] * weight[other])
        if abs(total) < abs(float(weight[other])):
            break
    x = codes.new_zeros(at.inputs)
    x[index[index < at.inputs]] = codes[index < at.inputs]
    place = int(at.features(row[0], row[1])[position])
    return _nearest(at, x, 0, place, (total, total - lost))


def _padding_as(at: Unfolded) -> tuple[Pairing, ...]:
    """Of two pairings that differ in what padded taps hold, those that fit the packed layer."""
    if not at.padded:
        return tuple(Pairing)
    highest = replace(at, layer=replace(at.layer, zero_point=at.layer.highest))
    zero = at.weight.new_zeros(1, at.inputs)
    sums = [IntegerSums(highest, ((pairing,),)) for pairing in ENGINES]
    lost = [part.loss(0, zero, zero) for part in sums]
    totals = [
        0.0 * part.unit if both is None else (both[0] / part.unit)[0] for part, both in zip(sums, lost, strict=True)
    ]
    place = int((totals[0] - totals[1]).abs().argmax())
    ends = (float(totals[0][place]), float(totals[1][place]))
    found = _nearest(at, zero[0] + at.layer.highest, at.layer.highest, place, ends)
    return tuple(Pairing) if found is None else (Pairing.EXACT, *ENGINES[found : found + 1])


def _nearest(at: Unfolded, codes: Tensor, zero_point: int, place: int, totals: tuple[float, float]) -> int | None:
    """Which of two sums the packed layer computes at an output, 2: neither; None where 8 bits cannot tell."""
    ends = (*totals, 0.0)
    step = max((max(ends) - min(ends)) / 250, 2.0)
    if abs(totals[0] - totals[1]) < 4 * step:
        return None
    layer = at.layer
    channel = place % len(layer.weight) if layer.geometry is None else place // at.index.shape[1]
    unit = float(layer.weight_scale[channel])
    bias = 0.0 if layer.bias is None else float(layer.bias.abs().max())
    scale = max(1.0, 100 * bias / unit)  # so large that the bias is nothing beside it
    zero = round(-min(ends) / step)
    out = layer.execute(codes.reshape(1, *at.shape), scale, zero_point, scale * unit * step, zero)
    off = [abs(int(out.flatten()[place]) - zero - total / step) for total in totals]
    return 2 if min(off) > 1.5 else off.index(min(off))


def rounds_bias(at: Unfolded) -> bool:
    """Whether the packed layer keeps its bias in whole units of the sum, as qnnpack does."""
    layer = at.layer
    if layer.bias is None or layer.packed is None or not bool((layer.bias != 0).any()):
        return False
    channel = int(layer.bias.abs().argmax())
    bias, unit = abs(float(layer.bias[channel])), float(layer.weight_scale[channel])
    group, row = divmod(channel, at.weight.shape[1])
    place = at.features(*torch.tensor([group, row], device=at.index.device))[0]
    # 0.3 units are rounded to none
    out = layer.execute(torch.zeros(1, *at.shape), bias / unit / 0.3, 0, bias / 100, 128)
    return abs(int(out.flatten()[place]) - 128) < 50
