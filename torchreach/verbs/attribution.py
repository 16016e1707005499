"""Which layers make the difference of two networks, and which of them to leave as they were.

Hybrids have some layers of the compressed network and the others of the original. With h_k the hybrid of the first k
compressed layers, h_0 the original and h_L the compressed network,

    |y1 - y2|  <=  sum over k of max |h_{k-1} - h_k|

over any set, so that certified differences of neighbouring hybrids bound the whole, and each says what its layer adds.

Axis letters: L layers, S stars, N outputs.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from torchreach.core.checkpoint import Checkpoint
from torchreach.core.clock import running
from torchreach.core.errors import OptionError, UnsupportedLayerError
from torchreach.core.options import Budget
from torchreach.core.plain import digest
from torchreach.core.results import Attribution, Discrepancy, KeptFloat
from torchreach.graph.layers import MergedAffine, alike
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.roundings import Roundings
from torchreach.graph.twin_blocks import WEIGHTED
from torchreach.read.joins import POINTWISE
from torchreach.read.load import as_network
from torchreach.read.module import chain, reading_once
from torchreach.sets.star import StarBatch
from torchreach.verbs.discrepancy import discrepancy, one_dtype
from torchreach.verbs.executed import formats
from torchreach.verbs.float_pair import bounded_once
from torchreach.verbs.int8_pair import rounds
from torchreach.verbs.questions import opened
from torchreach.verbs.softmax import both_scores
from torchreach.verbs.units import filed

# Without a budget, of comparisons that are no single pass: the first bounds of a search, and what an ascent attains.
ONE_PASS = Budget(stars=1)


@reading_once()
def attribute(
    original: nn.Module,
    compressed: nn.Module,
    stars: StarBatch,
    *,
    budget: Budget | None = None,
    samples: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: str | Path | None = None,
    ray: str | None = None,
) -> Attribution:
    """How much of |y1 - y2| each layer makes: certified, attained, and on random inputs.

    Args:
        original, compressed: networks with the same layers, of which only the numbers differ, as `quantize_weights`,
            `prune_weights` and retraining leave them; or `compressed` is a deployed copy that is a chain: a layer is
            then compressed with the rounding of its inputs and of its result.
        stars: input stars [S] of the networks' input shape.
        budget: of all comparisons together, of which there are three a layer; seconds are shared out equally. Without
            one, each is bounded once, before any split.
        samples: random inputs of each star for `sampled_mean`, `sampled_max` and `sqnr`.
        seed: of these inputs.
        progress: is told how many comparisons are done, and how many there are.
        checkpoint: as of `discrepancy`; the run goes on from the comparison that it was at.
        ray: as of `discrepancy`, for each comparison.

    Returns: per layer that differs, in the order of execution, three `Discrepancy`s: of the layer alone, of the step
        it makes after the layers before it, and of all layers up to it.

    Guarantee: as `discrepancy`, for each hybrid; the sum of the steps' upper ends bounds |y1 - y2|.

    Raises: as `discrepancy`; UnsupportedLayerError: the networks have other layers or equal ones, or the original
        rounds activations;
        OptionError: `samples` is not positive.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> stars = tr.StarBatch.from_box(torch.zeros(2), torch.ones(2))
        >>> tr.attribute(net, tr.quantize_weights(net, bits=4), stars).layers
        ('0', '2')
    """
    if samples < 1:
        raise OptionError(f"samples must be positive, got {samples}")
    hybrids = _Hybrids.of(original, compressed, stars)
    names, count = hybrids.names, len(hybrids.names)
    if not names:
        raise UnsupportedLayerError("there is no difference to attribute: all layers of the networks are equal")
    pairs = [((), (name,)) for name in names]
    pairs += [(names[:k], names[: k + 1]) for k in range(1, count)]
    pairs += [((), names[: k + 1]) for k in range(1, count)]
    found: list[Discrepancy] = []
    plain = hybrids.plain
    limits = budget or ONE_PASS
    networks = {"original": original, "compressed": compressed}
    files = opened(checkpoint, "attribute", networks, stars, limits, once=budget is None)
    with running(limits.seconds) as clock:
        for first, second in pairs:
            both = hybrids.of_layers(first), hybrids.of_layers(second)
            share, method = limits, "search" if budget is None else "auto"
            if clock.limited:
                share = replace(share, seconds=max(clock.left / (len(pairs) - len(found)), 1e-3))

            def compared(
                own: Checkpoint | None,
                both: tuple[nn.Module, nn.Module] = both,
                share: Budget = share,
                method: str = method,
            ) -> Discrepancy:
                if budget is None and plain:
                    return bounded_once(*both, stars, clock)
                return discrepancy(*both, stars, method, budget=share, checkpoint=own, ray=ray)

            found.append(filed(files, f"comparison-{len(found):03d}", clock, limits, compared))
            if progress is not None:
                progress(len(found), len(pairs))
    alone, more = found[:count], found[count:]
    steps, cumulative = (alone[:1] + part for part in (more[: count - 1], more[count - 1 :]))
    return Attribution(names, tuple(alone), tuple(steps), tuple(cumulative), *hybrids.sampled(stars, samples, seed))


@reading_once()
def keep_float(
    original: nn.Module,
    compressed: nn.Module,
    stars: StarBatch,
    tolerance: float,
    *,
    order: Sequence[str] | None = None,
    budget: Budget | None = None,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: str | Path | None = None,
    ray: str | None = None,
) -> KeptFloat:
    """The compressed network with as few layers of the original as it takes to be certified within `tolerance`.

    Layers are kept in the order of what `attribute` certifies of each alone, as many as needed; then each that turns
    out not to be needed is compressed again. No single layer of the result can be compressed too within the budget;
    that no smaller set would do is not claimed.

    Args:
        original, compressed, stars: as of `attribute`.
        tolerance: bound on |y1 - y2|, of every output.
        order: names of layers, those to keep first coming first; those that are not named come last. Default: by
            `attribute`.
        budget: seconds of all of it together; other limits hold for each comparison.
        progress: is told how many comparisons are done, and how many there may be.
        checkpoint, ray: as of `attribute`.

    Returns: the mixed network, the layers it keeps, and its `Discrepancy` from the original.

    Raises: as `attribute`; OptionError: a negative tolerance, or an unknown layer.
    """
    if not tolerance >= 0:
        raise OptionError(f"tolerance must be a number >= 0, got {tolerance!r}")
    hybrids = _Hybrids.of(original, compressed, stars)
    names = hybrids.names
    unknown = [name for name in order or () if name not in names]
    if unknown:
        raise OptionError(f"order names {unknown[0]!r}, which is no layer that differs; there are {', '.join(names)}")
    done, most = 0, len(names) + len(names).bit_length() + 1
    networks = {"original": original, "compressed": compressed}
    options = {"tolerance": tolerance, "order": repr(None if order is None else list(order))}
    files = opened(checkpoint, "keep_float", networks, stars, budget or Budget(), **options)
    with running((budget or Budget()).seconds) as clock:
        if order is None and names:
            part = budget if budget is None or budget.seconds is None else replace(budget, seconds=clock.left / 3)
            order = attribute(original, compressed, stars, budget=part).order
        order = [*(order or ()), *(name for name in names if name not in (order or ()))]
        not_enough: set[frozenset[str]] = set()

        def certified(kept: Sequence[str]) -> Discrepancy | None:
            """The certificate with these layers kept, where it meets the tolerance."""
            nonlocal done
            if frozenset(kept) in not_enough:
                return None
            limits = budget or Budget()
            if clock.limited:
                limits = replace(limits, seconds=max(clock.left / max(most - done, 1), 1e-3))
            mixed = hybrids.keeping(kept)

            def compared(own: Checkpoint | None) -> Discrepancy:
                return discrepancy(original, mixed, stars, tolerance=tolerance, budget=limits, checkpoint=own, ray=ray)

            result = filed(files, f"kept-{digest(sorted(kept))[:16]}", clock, limits, compared)
            done += 1
            if progress is not None:
                progress(done, max(done, most))
            if result.within(tolerance):
                return result
            not_enough.add(frozenset(kept))
            return None

        few, many, best = -1, len(names), None  # layers of `order` that are not enough, and that may be
        while many - few > 1:
            middle = 0 if few < 0 else (few + many) // 2
            found = certified(order[:middle])
            few, many, best = (middle, many, best) if found is None else (few, middle, found)
        kept = order[:many]
        spared = bool(kept)
        while spared:  # a layer less may make another one needless
            spared = False
            for name in reversed(kept):
                fewer = [other for other in kept if other != name]
                found = certified(fewer)
                if found is not None:
                    kept, best, spared = fewer, found, True
                    break
    mixed = hybrids.keeping(kept)
    best = best or discrepancy(original, mixed, stars, tolerance=tolerance)  # all of them: the original itself
    return KeptFloat(mixed, tuple(name for name in names if name in kept), tolerance, best)


class _Hybrids:
    """Networks between two with the same layers. names: of the layers whose numbers differ, in order."""

    def __init__(
        self,
        original: nn.Module,
        compressed: nn.Module,
        names: tuple[str, ...],
        shape: tuple[int, ...],
        *,
        deployed: bool = False,
    ) -> None:
        self.original, self.compressed, self.names, self.shape = original, compressed, names, shape
        self.deployed = deployed

    @staticmethod
    def of(original: nn.Module, compressed: nn.Module, stars: StarBatch) -> _Hybrids:
        original, compressed = as_network(original), as_network(compressed)
        if rounds(original, stars.shape) or rounds(compressed, stars.shape):
            return _Hybrids(*_rounded(original, compressed, stars.shape), stars.shape, deployed=True)
        original, compressed = one_dtype(original, compressed, stars.shape)
        units = _units(original), _units(compressed)
        if units[0].keys() != units[1].keys():
            original, compressed = (copy.deepcopy(chain(network, stars.shape)) for network in (original, compressed))
            units = _units(original), _units(compressed)
        if units[0].keys() != units[1].keys():
            raise UnsupportedLayerError(
                "layers are told apart in networks with the same layers; these have "
                f"{', '.join(units[0]) or 'none'} and {', '.join(units[1]) or 'none'}"
            )
        names = tuple(name for name in units[0] if not alike(units[0][name], units[1][name]))
        return _Hybrids(original, compressed, names, stars.shape)

    @property
    def plain(self) -> bool:
        """Whether they are compared as real-valued functions, and not in probabilities."""
        if self.deployed:
            return False
        head = both_scores(self.original, self.compressed, self.shape)[2]
        return head is None and formats(self.original, self.compressed, None) == (None, None)

    def of_layers(self, names: Iterable[str]) -> nn.Module:
        """The original with these layers of the compressed network."""
        result = copy.deepcopy(self.original)
        for name in names:
            if not name:
                return self.compressed
            place, _, own = name.rpartition(".")
            setattr(result.get_submodule(place), own, copy.deepcopy(self.compressed.get_submodule(name)))
        return result.eval()

    def keeping(self, names: Sequence[str]) -> nn.Module:
        """The compressed network with these layers of the original."""
        return self.of_layers(name for name in self.names if name not in names)

    @torch.no_grad()
    def sampled(self, stars: StarBatch, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and largest |y1 - h| [L] on random inputs, h with one layer compressed; and the SQNR in dB."""
        x = stars.sample(count, seed).flatten(0, 1)
        x = x.to(next((value.dtype for value in self.original.parameters()), x.dtype))
        y = self.original.eval()(x).double()
        off = [y - self.of_layers([name])(x).double() for name in self.names]
        power = y.square().sum()
        return (
            torch.stack([part.abs().mean() for part in off]),
            torch.stack([part.abs().max() for part in off]),
            torch.stack([10 * torch.log10(power / part.square().sum()) for part in off]),
        )


def _rounded(
    original: nn.Module, compressed: nn.Module, shape: tuple[int, ...]
) -> tuple[nn.Module, nn.Module, tuple[str, ...]]:
    """A network and a deployed one as layers that can stand for each other, in float64, and their names.

    A layer is one that has weights, with what lies between it and the one before, its activation, and, where it is
    deployed, the rounding of its result; and of its inputs, which changes nothing behind another deployed one.
    """
    if rounds(original, shape):
        raise UnsupportedLayerError("layers are told apart from an original that does not round activations")
    groups: list[list[list[nn.Module]]] = []
    for network in (original, compressed):
        layers = [*copy.deepcopy(chain(network, shape)).double()]
        if any(isinstance(layer, Roundings | MergedAffine) for layer in layers):
            raise UnsupportedLayerError(
                "layers are told apart in networks that are chains, where activations are rounded; compare "
                "torchreach.weight_only(network)"
            )
        found: list[list[nn.Module]] = [[]]
        for layer, after in zip(layers, [*layers[1:], None], strict=True):
            found[-1].append(layer)
            weighted = any(isinstance(part, WEIGHTED) for part in found[-1])
            if weighted and after is not None and not isinstance(after, (*POINTWISE, Quantizer)):
                found.append([])
        if len(found) > 1 and not any(isinstance(part, WEIGHTED) for part in found[-1]):
            found[-2:] = [[*found[-2], *found[-1]]]
        groups.append(found)
    if len(groups[0]) != len(groups[1]):
        raise UnsupportedLayerError(
            "layers are told apart in networks with the same layers; these have "
            f"{len(groups[0])} and {len(groups[1])} with weights"
        )
    names: list[str] = []
    grid: Quantizer | None = None
    for k, group in enumerate(groups[1]):
        rounding = [layer for layer in group if isinstance(layer, Quantizer)]
        if grid is not None:
            group.insert(0, grid.changed(rule=None, layer=None))
        grid = rounding[-1] if rounding else grid
        name = (rounding[-1].name if rounding else "").replace(".", "/") or str(k)
        names.append(name if name not in names else f"{name} ({k})")
    parts = [[nn.Sequential(*group) for group in found] for found in groups]
    pair = [nn.Sequential(OrderedDict(zip(names, part, strict=True))).eval() for part in parts]
    return pair[0], pair[1], tuple(names)


def _units(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold numbers of their own, by name; one whose weights are computed stands for its parts."""
    result: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        within = any(name.startswith(f"{other}.") for other, unit in result.items() if is_parametrized(unit))
        if not within and (is_parametrized(module) or [*module.parameters(False), *module.buffers(False)]):
            result[name] = module
    return result
