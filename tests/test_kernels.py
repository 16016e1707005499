"""Integer kernels of both kinds, on a processor of either: a reference of ours does what the machine's own do not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import torchreach as tr
from tests.networks import random_network
from tests.test_deployed import assert_contains, int8_network, samples
from torchreach.graph.kernels import ENGINES, IntegerLayer, IntegerSums, Pairing, Unfolded, identified, rounds_bias
from torchreach.graph.quantizer import Quantizer
from torchreach.read.module import chain
from torchreach.verbs import int8_kernels as kernels
from torchreach.verbs import int8_pair as deployed
from torchreach.verbs import int8_star as deployed_star

PACKED = [name for name in ("fbgemm", "x86", "onednn", "qnnpack") if name in torch.backends.quantized.supported_engines]
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:.*quantized tensor creation functions")


def geometry(stride=1, padding=0, dilation=1, groups=1, dims=2) -> SimpleNamespace:
    """Of a convolution; what a linear layer has is None."""
    return SimpleNamespace(
        stride=(stride,) * dims, padding=(padding,) * dims, dilation=(dilation,) * dims, groups=groups
    )


# name -> shape of the weight, geometry, shape of an input
PLACES = {
    "linear": ((3, 7), None, (7,)),
    "linear in two halves": ((2, 301), None, (301,)),
    "linear on rows": ((3, 6), None, (2, 6)),
    "one channel": ((3, 1, 3, 3), geometry(padding=1), (1, 4, 4)),
    "odd channels": ((2, 3, 2, 3), geometry(stride=2, padding=1), (3, 5, 4)),
    "groups": ((4, 2, 3, 3), geometry(padding=1, groups=2), (4, 3, 4)),
    "depthwise": ((4, 1, 3, 3), geometry(padding=1, dilation=2, groups=4), (4, 5, 5)),
    "signal": ((3, 3, 3), geometry(padding=1, dims=1), (3, 6)),
}


def layer_of(
    name: str, seed: int = 0, largest: int = 127, zero_point: int = 140, **parts
) -> tuple[IntegerLayer, Tensor]:
    """A layer with weights of which many are large, and input codes [*shape] of which many are."""
    shape, fit, inputs = PLACES[name]
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-largest, largest + 1, shape, generator=g)
    weight = torch.where(torch.rand(shape, generator=g) < 0.4, largest, weight)
    codes = torch.randint(0, 256, inputs, generator=g)
    codes = torch.where(torch.rand(inputs, generator=g) < 0.4, 255, codes)
    ones = torch.ones(shape[0], dtype=torch.float64)
    return IntegerLayer("layer", weight, ones, 0 * ones, None, 1.0, zero_point, 255, fit, **parts), codes


def sums(layer: IntegerLayer, codes: Tensor, pairing: Pairing, zero_point: int | None = None) -> Tensor:
    """Sums less z sum w as the kernels compute them, one product after the other: an independent reference."""
    z = layer.zero_point if zero_point is None else zero_point
    weight, fit = layer.weight, layer.geometry
    if fit is None:
        rows = codes.reshape(-1, codes.shape[-1])
        patches = [(n, row.tolist(), weight[n].tolist()) for row in rows for n in range(len(weight))]
        size = weight.shape[1]
        blocks = [size]
        if pairing is Pairing.ONEDNN and 256 < size <= 768:
            blocks = [-(-size // 2), size // 2]
        return torch.tensor([total(a, w, blocks, pairing, z) for _, a, w in patches], dtype=torch.float64)
    image, flat = (codes[:, None], True) if weight.ndim == 3 else (codes, False)
    kernel = weight[:, :, None] if flat else weight
    (s, p, d), g = (
        (((1, *fit.stride), (0, *fit.padding), (1, *fit.dilation)), fit.groups)
        if flat
        else ((fit.stride, fit.padding, fit.dilation), fit.groups)
    )
    n_out, c, kh, kw = kernel.shape
    high, wide = image.shape[1:]
    found = []
    for n in range(n_out):
        first = n // (n_out // g) * c
        for y in range((high + 2 * p[0] - d[0] * (kh - 1) - 1) // s[0] + 1):
            for x in range((wide + 2 * p[1] - d[1] * (kw - 1) - 1) // s[1] + 1):
                a, w = [], []
                for i in range(kh):
                    for j in range(kw):
                        row, column = y * s[0] - p[0] + i * d[0], x * s[1] - p[1] + j * d[1]
                        inside = 0 <= row < high and 0 <= column < wide
                        for k in range(c):
                            a.append(int(image[first + k, row, column]) if inside else None)
                            w.append(int(kernel[n, k, i, j]))
                blocks = [c] * (kh * kw) if pairing is Pairing.ONEDNN else [len(a)]
                found.append(total(a, w, blocks, pairing, z))
    return torch.tensor(found, dtype=torch.float64)


def total(a: list, w: list[int], blocks: list[int], pairing: Pairing, z: int) -> int:
    skip = pairing is Pairing.ONEDNN  # padded taps
    exact = sum((z if x is None else x) * y - z * y for x, y in zip(a, w, strict=True))
    if pairing is Pairing.EXACT:
        return exact
    lost, start = 0, 0
    for block in blocks:
        for i in range(start, start + block - 1, 2):
            pair = sum((0 if skip else z) * w[k] if a[k] is None else a[k] * w[k] for k in (i, i + 1))
            lost += max(-32768, min(32767, pair)) - pair
        start += block
    return exact + lost


@pytest.mark.parametrize("name", PLACES)
def test_what_saturates_is_taken_off_pair_by_pair(name):
    for seed in range(3):
        layer, codes = layer_of(name, seed)
        at = Unfolded.of(layer, tuple(codes.shape), (), "cpu")
        exact = sums(layer, codes, Pairing.EXACT)
        value = (codes.double() - layer.zero_point).reshape(1, -1)
        for pairing in ENGINES:
            lost = IntegerSums(at, ((pairing,),)).loss(0, value, value)
            both = (0.0 * exact,) * 2 if lost is None else (lost[0][0], lost[1][0])
            expected = sums(layer, codes, pairing) - exact
            assert torch.equal(both[0], both[1])
            assert torch.equal(both[0], expected)
            # enclosures: of any pairing, and of a range of codes; with some of the inputs fixed
            low, high = IntegerSums(at, ((Pairing.UNKNOWN,),)).loss(0, value, value) or (0 * exact, 0 * exact)
            assert bool((low <= expected).all() and (expected <= high).all())
            low, high = (value + step for step in (-20, 20))
            ends = IntegerSums(at, ((pairing, Pairing.EXACT),)).loss(0, low, high)
            ends = ends or ((0 * exact)[None],) * 2
            assert bool((ends[0][0] <= expected).all() and (expected <= ends[1][0]).all())
            free = torch.arange(0, value.shape[1], 2)
            part = IntegerSums(at, ((pairing,),)).restricted(value[0] * (torch.arange(value.shape[1]) % 2), free)
            again = part.loss(0, value[:, free], value[:, free])
            assert lost is None or again is not None
            assert again is None or torch.equal(again[0][0], expected)


class Machine:
    """Packed parameters that add up in one way, whatever the processor."""

    def __init__(self, pairing: Pairing | None, *, whole_bias: bool = False) -> None:
        self.pairing, self.whole_bias = pairing, whole_bias

    def execute(self, layer, codes, scale, zero_point, out_scale, out_zero):
        if self.pairing is None:  # no sums that anyone knows
            acc = sums(layer, codes[0], Pairing.EXACT, zero_point) * 1.5
        else:
            acc = sums(layer, codes[0].long(), self.pairing, zero_point)
        places = len(acc) // len(layer.weight)
        bias = layer.bias.repeat(places) if layer.geometry is None else layer.bias.repeat_interleave(places)
        bias = (bias / scale).round() * scale if self.whole_bias else bias
        return ((acc * scale + bias) / out_scale + out_zero).round().clamp(0, 255)


@pytest.fixture
def emulated(monkeypatch):
    """Layers of a `Machine` are executed by it."""
    real = IntegerLayer.execute

    def execute(self, *args):
        return self.packed.execute(self, *args) if isinstance(self.packed, Machine) else real(self, *args)

    monkeypatch.setattr(IntegerLayer, "execute", execute)


@pytest.mark.parametrize("name", [name for name in PLACES if name != "linear on rows"])
@pytest.mark.parametrize("pairing", [Pairing.EXACT, *ENGINES])
def test_a_layer_is_known_by_what_it_does(name, pairing, emulated):  # noqa: ARG001
    layer, codes = layer_of(name, 1)
    layer = replace(layer, packed=Machine(pairing), bias=torch.full_like(layer.weight_scale, 3e4))
    at = Unfolded.of(layer, tuple(codes.shape), (), "cpu")
    found = identified(at)
    assert found
    values = (codes.double() - layer.zero_point).reshape(1, -1)
    as_told, as_is = (IntegerSums(at, (pairings,)).loss(0, values, values) for pairings in (found, (pairing,)))
    assert (as_told is None) == (as_is is None)
    assert as_told is None or as_is is None or torch.equal(as_told[0], as_is[0])


def test_a_layer_that_does_something_else_is_known_as_such(emulated):  # noqa: ARG001
    layer, codes = layer_of("linear")
    assert not rounds_bias(Unfolded.of(layer, tuple(codes.shape), (), "cpu"))
    for packed in (None, Machine(None)):
        other = replace(layer, packed=packed, bias=torch.zeros(3, dtype=torch.float64))
        assert identified(Unfolded.of(other, tuple(codes.shape), (), "cpu")) == ()


@pytest.mark.parametrize("whole", [True, False])
def test_biases_in_whole_units_are_noticed(whole, emulated):  # noqa: ARG001
    layer, codes = layer_of("linear")
    layer = replace(
        layer, packed=Machine(Pairing.EXACT, whole_bias=whole), bias=torch.tensor([0.2, -7.3, 4.4]).double()
    )
    assert rounds_bias(Unfolded.of(layer, tuple(codes.shape), (), "cpu")) == whole


def emulate(network: nn.Module, x: Tensor, pairing: Pairing) -> Tensor:
    """Outputs [B, N] of a deployed network in float64, its integers added up as `pairing` says."""
    layers, found = list(chain(network)), []
    for value in x.double():
        y, codes, shape = value[None], value[None], (1, *value.shape)
        for k, part in enumerate(layers):
            if isinstance(part, Quantizer):
                if part.layer is not None:
                    unit = part.layer.scale * part.layer.weight_scale
                    bias = 0 if part.layer.bias is None else part.layer.bias
                    acc = sums(part.layer, codes[0].long(), pairing).reshape(-1)
                    places = len(acc) // len(unit)
                    wide = [
                        v if places == 1 else v.repeat_interleave(places) for v in (unit, bias * torch.ones_like(unit))
                    ]
                    y = (acc * wide[0] + wide[1]).reshape(shape)
                    y = y.relu() if isinstance(layers[k - 1], nn.ReLU) else y
                codes = part.codes(y)
                y = part.value(codes)
            else:
                y = part(y)
                codes = part(codes) if isinstance(part, nn.Flatten) else codes
            shape = y.shape
        found.append(y.flatten())
    return torch.stack(found)


def saturating_case(seed: int, engine: str = "fbgemm", inputs: int = 3) -> tuple[nn.Module, nn.Module, tr.StarBatch]:
    """Networks without a reduced range, and a set on which codes are high."""
    network = random_network(seed, [inputs, 16, 12, 2])
    with torch.no_grad():
        for part in network[:-1:2]:
            part.weight.copy_(part.weight.abs() * (torch.rand(part.weight.shape[0], 1) < 0.7).double() + 0.2)
            part.bias.abs_()
    g = torch.Generator().manual_seed(seed)
    data = 2 * torch.rand(300, inputs, generator=g, dtype=torch.float64) - 1
    small = int8_network(network.double(), data, engine=engine, per_channel=bool(seed % 2))
    network = network.double()
    return network, small, tr.StarBatch.from_image(torch.full((1, inputs), 0.93, dtype=torch.float64), 0.05)


@pytest.mark.parametrize(("seed", "cells"), [(0, True), (1, False)])
def test_certificates_hold_for_both_kinds_of_kernels(monkeypatch, seed, cells):
    original, small, stars = saturating_case(seed)
    if not cells:
        monkeypatch.setattr(deployed_star, "LIMIT", 0)
        monkeypatch.setattr(deployed_star, "BOXES", 2)
    found = {choice: tr.discrepancy(original, small, stars, kernels=choice) for choice in kernels.CHOICES}
    assert {choice: found[choice].kernels for choice in ("exact", "saturating", "any")} == {
        "exact": tr.Kernels.EXACT, "saturating": tr.Kernels.SATURATING, "any": tr.Kernels.ANY,
    }  # fmt: skip
    assert found["here"].kernels in (tr.Kernels.EXACT, tr.Kernels.SATURATING)
    x = samples(stars, 8)
    y = original(x.double()).detach()
    differences = {pairing: y - emulate(small, x, pairing) for pairing in (Pairing.EXACT, *ENGINES)}
    assert not torch.equal(differences[Pairing.EXACT], differences[Pairing.FBGEMM])  # saturation does something
    for choice, covered in (("exact", (Pairing.EXACT,)), ("saturating", ENGINES), ("any", tuple(differences))):
        for pairing in covered:
            assert_contains(found[choice], differences[pairing])
    for choice in ("exact", "saturating"):
        assert bool((found["any"].upper >= found[choice].upper - 1e-9).all())


def test_a_certificate_of_one_kind_is_exceeded_by_the_other():
    """The test above can fail."""
    original, small, stars = saturating_case(0)
    exact = tr.discrepancy(original, small, stars, kernels="exact")
    y = original(samples(stars, 8).double()).detach() - emulate(small, samples(stars, 8), Pairing.FBGEMM)
    assert bool((y > exact.range_upper + 1e-3).any() or (y < exact.range_lower - 1e-3).any())


@pytest.mark.parametrize("engine", PACKED)
def test_what_this_machine_computes_without_a_reduced_range_is_covered(engine):
    original, small, stars = saturating_case(1, engine)
    found = tr.discrepancy(original, small, stars)
    x = samples(stars, 5_000)
    with torch.no_grad():
        assert_contains(found, original(x.double()) - small(x).double())
        replayed = (original(found.witness[0].double()) - small(found.witness[0].float()).double()).diagonal().abs()
    assert bool((replayed >= found.lower[0] - 1e-6).all())
    assert found.uncovered == ()
    assert found.max_upper - found.max_lower <= 1e-2 * found.max_upper


def test_where_no_pair_can_saturate_all_kernels_are_covered():
    """Codes up to 128: half of the range of the activations; or weights up to 64."""
    original, small, _ = saturating_case(1)
    low = tr.StarBatch.from_image(torch.full((1, 3), -0.5, dtype=torch.float64), 0.02)
    first = tr.discrepancy(original[:1], int8_network(original[:1], 2 * torch.rand(300, 3) - 1), low)
    assert first.kernels is tr.Kernels.ANY
    plain = tr.discrepancy(original, original, low)
    assert plain.kernels is tr.Kernels.NONE


def test_layers_of_unknown_kernels_are_named_in_a_warning(monkeypatch):
    original, small, stars = saturating_case(1)
    monkeypatch.setattr(kernels, "identified", lambda _: ())
    with pytest.warns(tr.UncoveredKernelsWarning, match=r"int8 kernels of 'module.*reduce_range"):
        found = tr.discrepancy(original, small, stars)
    assert found.uncovered
    assert set(found.uncovered) <= {name for name, _ in small.named_modules()}
    # bounds for any pairing contain those of each
    assert bool((found.upper >= tr.discrepancy(original, small, stars, kernels="saturating").upper - 1e-9).all())


def test_a_witness_that_computes_something_else_is_an_error(monkeypatch):
    original, small, stars = saturating_case(1)
    honest = deployed.check_replay
    monkeypatch.setattr(deployed, "check_replay", lambda run, *rest: honest(lambda x: run(x) + 0.5, *rest))
    with pytest.raises(tr.KernelMismatchError, match=r"computes \[.*\] at an input where .* predicted"):
        tr.discrepancy(original, small, stars)


def test_kernels_are_chosen_by_name():
    original, small, stars = saturating_case(1)
    with pytest.raises(tr.TorchreachError, match="kernels must be one of here, exact, saturating, any, got 'vnni'"):
        tr.discrepancy(original, small, stars, kernels="vnni")


@pytest.mark.parametrize("engine", PACKED)
@pytest.mark.parametrize("size", [(1, 2), (2, 2), (2, 3), (3, 3), (1, 14)])
def test_means_of_codes_are_rounded_as_kernels_do(engine, size):
    """All sums that a window of codes can have; exact ties are one code where the kernels agree on them."""
    torch.backends.quantized.engine = engine
    k = size[0] * size[1]
    total = torch.arange(255 * k + 1)
    codes = total[:, None] // k + (torch.arange(k) < (total % k)[:, None])
    for zero_point in (0, 64, 77):
        grid = Quantizer(0.037, zero_point, 0, 255).of_means(k)
        z = (total.double() / k - zero_point) * 0.037
        low, high = grid.code_range(z - 1e-7, z + 1e-7)
        for channels in (1, 16):
            x = codes.reshape(-1, 1, *size).expand(-1, channels, -1, -1).contiguous().to(torch.uint8)
            x = torch._make_per_tensor_quantized_tensor(x, 0.037, zero_point)
            y = nn.functional.avg_pool2d(x, size).int_repr().flatten(1).double()
            assert bool((y >= low[:, None]).all() and (y <= high[:, None]).all())
        ties = (2 * total % (2 * k) == k) & (k % 2 == 0)
        doubtful = zero_point % 2 == 1 or k == 14
        assert torch.equal(low != high, ties & doubtful)


def test_convolutions_around_pooling_are_exact():
    """A quarter of all means of four codes are exact ties; each is one code."""
    g = torch.Generator().manual_seed(3)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten())
    network = nn.Sequential(*layers, nn.Linear(64, 3))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    data = torch.rand(100, 1, 8, 8, generator=g)
    small = int8_network(nn.Sequential(*network), data)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[3:5, 3:5] = True
    stars = tr.StarBatch.from_image(data[:1].double(), 0.01, mask)
    found = tr.discrepancy(network.double(), small, stars)
    x = samples(stars, 2_000)
    with torch.no_grad():
        y = network(x.double()) - small(x).double()
    assert_contains(found, y)
    assert found.max_lower >= y.abs().max() - 1e-6
    assert found.max_upper - found.max_lower <= 0.02 * found.max_upper
