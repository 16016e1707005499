"""Certified discrepancy of networks whose activations are rounded: deployed int8 semantics.

Few cells of the input grid: enumeration, exact (`search.cells`). Many: the deployed network is relaxed to a ReLU
network with bounded noise (`domains.rounding.relax`), and the two are compared in difference coordinates, in one pass
and then by branch and bound for as long as the budget allows (`domains.difference`, `search.signs`). Both where both
apply; the interval is their intersection (`verbs.int8_star`).

What is certified: y1 as the real-valued function of its weights; y2 as any kernel executes it that computes its sums
within `domains.rounding.kernel_error`, for inputs in float32. What is attained: by the networks as given, y2 as the
module computes it on this machine. One star at a time: each has a grid of its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import OptionError, ShapeError
from torchreach.core.evidence import Evidence
from torchreach.core.memory import default_budget
from torchreach.core.options import Budget, Exact, Search
from torchreach.core.results import Discrepancy, Progress, ProgressCallback, ReachStats, Semantics, Status
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.domains.input_grid import InputGrid
from torchreach.graph.quantizer import Quantizer
from torchreach.read.module import chain
from torchreach.read.steps import steps
from torchreach.search.cells import LIMIT, cells_of, representable
from torchreach.search.result import Question
from torchreach.sets.star import StarBatch
from torchreach.verbs.first_look import Places
from torchreach.verbs.int8_compared import Compared, one_network, quantised
from torchreach.verbs.int8_kernels import check_replay, coverage, executed, runner
from torchreach.verbs.int8_star import COPIES, DeployedStar

POINTS = 512  # of a star that is no box, besides its centre
REPORT_SECONDS = 0.25
START = 0.3  # share of the time in which all stars are begun


def rounds(network: nn.Module, input_shape: tuple[int, ...] | None) -> bool:
    """Whether `network` quantises activations."""
    return any(isinstance(layer, Quantizer) for layer in chain(network, input_shape))


@torch.no_grad()
def deployed_discrepancy(
    original: nn.Module,
    compressed: nn.Module,
    stars: StarBatch,
    question: Question,
    *,
    method: Exact | Search | None = None,
    budget: Budget | None = None,
    progress: ProgressCallback | None = None,
    kernels: str = "here",
    clock: Clock = NO_LIMIT,
) -> Discrepancy:
    """Certified interval around max |y1 - y2| per output and star, where one network or both round activations.

    method: None uses all there is; `Exact()` enumerates cells of the input grid alone; `Search()` relaxes and divides.
    budget: its `stars` limits the cells, and the branches, of each star; its seconds are the clock's, which the stars
    share: all are begun (intervals, and an ascent) before one is finished. progress: called a few times a second.
    kernels: one of `torchreach.verbs.int8_kernels.CHOICES`.

    Guarantee: `upper` holds for every input of the star. `lower` is attained at `witness` by the networks as given, and
    is at least what they attain at the centre.

    Two modules of one description and one structure, which agree bit for bit wherever they were run, count as one
    network executed by one set of kernels: their difference is zero.

    Raises: ShapeError: sizes that do not fit. UnsupportedLayerError, InvalidNetworkError as `chain`. OptionError: a
        method that a deployed network does not have. KernelMismatchError: a witness at which the module as given
        computes something else.
    """
    budget = budget or Budget()
    modules = [original, compressed]
    both = [
        executed(steps(network, stars.shape, dtype=COMPUTE_DTYPE, device=stars.device, quantized=True), kernels)
        for network in modules
    ]
    first, second = (network.steps for network in both)
    if first[-1].features != second[-1].features:
        raise ShapeError(
            f"networks must have equally many outputs: the original has {first[-1].features}, "
            f"the compressed {second[-1].features}"
        )
    swapped = quantised(first) and not quantised(second)
    if swapped:  # the rounded one second; rows of y1 - y2 and y2 - y1 change places at the end
        modules.reverse()
        both.reverse()
    runs = [runner(module) if network.here else None for module, network in zip(modules, both, strict=True)]
    networks = Compared(modules[0], (both[0], both[1]), (runs[0], runs[1]), tuple(stars.shape), stars.dtype)
    run = _Comparison(stars, networks, question, method, budget, progress, clock, swapped)
    run.check()
    if one_network(modules[0], modules[1], networks, stars):
        for star in run.stars:
            zero, star.complete = torch.zeros_like(star.evidence.upper), True
            star.evidence.certify(zero)
            star.evidence.attain(zero, star.evidence.witness)
    else:
        run.work()
    for star in run.stars:
        star.look_at_kernels()
    result = run.result()
    for module_run, network in zip(runs, both, strict=True):
        if module_run is not None:
            check_replay(module_run, network, result.witness.flatten(0, 1))
    covered, uncovered = coverage(*both)
    return replace(result, kernels=covered, uncovered=uncovered)


class _Comparison:
    """All stars of one call."""

    def __init__(
        self,
        batch: StarBatch,
        networks: Compared,
        question: Question,
        method: Exact | Search | None,
        budget: Budget,
        progress: ProgressCallback | None,
        clock: Clock,
        swapped: bool,
    ) -> None:
        self.batch, self.networks, self.method, self.swapped = batch, networks, method, swapped
        self.progress, self.clock, self.reported = progress, clock.part(None), 0.0
        memory = budget.memory or default_budget(batch.device)
        low, high, box = batch.bounding_box()
        widest = max(step.features for step in (*networks.first, *networks.second))
        size = max(int(memory / 8 / COPIES / max(widest, low.shape[1])), 1)
        upper = torch.cat([
            networks.intervals(*part) for part in zip(low.split(size), high.split(size), strict=True)
        ])  # fmt: skip
        places = None if bool(box.all()) else Places.of(batch, low, high, box)
        self.stars = [
            DeployedStar(
                networks,
                low[s],
                high[s],
                question,
                upper=upper[s],
                places=None if places is None or bool(box[s]) else places.select(torch.tensor([s], device=low.device)),
                points=None if bool(box[s]) else self._points(s),
                budget=budget,
                memory=memory,
                clock=self.clock,
                seed=method.seed if isinstance(method, Search) else 0,
                report=self._report,
            )
            for s in range(len(batch))
        ]
        self._centres(size)

    def _centres(self, size: int) -> None:
        """What the centres of boxes attain, `size` of them at a time."""
        networks = self.networks
        boxes = [star for star in self.stars if star.points is None]
        for i in range(0, len(boxes), size):
            some = boxes[i : i + size]
            low, high = (torch.stack([star.box[k] for star in some]) for k in (0, 1))
            x = representable((low + high) / 2, low, high, networks.dtype)
            value = networks.attained(networks.first, networks.second, x, x)
            for star, own, at in zip(some, value, x, strict=True):
                star.evidence.attain(own, at.expand_as(star.evidence.witness))

    def _points(self, s: int) -> Tensor:
        """Inputs [B, N_in] of star s."""
        star = self.batch.select([s])
        points, centre = star.sample(POINTS), star.center[:, None]
        if bool(star.contains(centre).all()):
            points = torch.cat((centre, points), 1)
        return points[0].flatten(1).to(COMPUTE_DTYPE)

    def check(self) -> None:
        """Raises OptionError."""
        if not isinstance(self.method, Exact):
            return
        if self.method != Exact():
            raise OptionError(
                f"{self.method} does not apply to networks that round activations: Exact() enumerates the cells of "
                "the input grid, Search() relaxes and divides, None does both"
            )
        grid = None if quantised(self.networks.first) else InputGrid.of(self.networks.second[0])
        if grid is None:
            raise OptionError(
                "method 'exact' needs one network that rounds activations, its inputs first: its cells are "
                "enumerated; here ask for method 'search' or 'auto'"
            )
        for s, star in enumerate(self.stars):
            count = cells_of(grid, *star.box)
            if count > LIMIT:
                raise OptionError(
                    f"method 'exact' enumerates at most {LIMIT} cells of the input grid, and star {s} has {count:.3g}; "
                    "here ask for method 'search' or 'auto', or for a smaller set"
                )

    def work(self) -> None:
        """Begins all stars, then finishes one after the other."""
        begin = self.clock.share(START)
        for s, star in enumerate(self.stars):
            if star.points is not None or s == 0 or not begin.over:
                star.start(begin.part(begin.left / (len(self.stars) - s)))
        for s, star in enumerate(self.stars):
            star.clock = self.clock.part(self.clock.left / (len(self.stars) - s))
            exact, search = isinstance(self.method, Exact), isinstance(self.method, Search)
            split = self.method.split if isinstance(self.method, Search) else "auto"
            star.run(cells=not search, relaxation=not exact, split=split)
            self._report()
        self._report(last=True)

    def _ends(self, name: str) -> Tensor:
        """[S, 2, N, ...] of all stars, row 0 of original - compressed."""
        value = torch.stack([getattr(star.evidence, name) for star in self.stars])
        return value.flip(1) if self.swapped else value

    def _report(self, *, last: bool = False) -> None:
        now = self.clock.elapsed
        if self.progress is None or (now - self.reported < REPORT_SECONDS and not last):
            return
        self.reported = now
        done = sum(star.answered for star in self.stars)
        lower, upper = self._ends("lower"), self._ends("upper")
        self.progress(
            Progress(done, len(self.stars) - done, -upper[:, 1], upper[:, 0], -lower[:, 1], lower[:, 0], seconds=now)
        )

    def result(self) -> Discrepancy:
        found = Evidence(self._ends("top"), self._ends("witness").unflatten(-1, self.batch.shape))
        found.attain(self._ends("lower"), found.witness)
        return found.discrepancy(
            self.batch.dtype,
            regions=torch.tensor([star.cells for star in self.stars], device=self.batch.device),
            status=tuple(Status.EXACT if star.closed else Status.BOUNDED for star in self.stars),
            stats=ReachStats(
                layers=(),
                method=self._name(),
                root_bounds="zonotope",
                seconds=self.clock.elapsed,
                branches=sum(star.branches for star in self.stars),
                fallback=next((star.fallback for star in self.stars if star.fallback), ""),
            ),
            semantics=Semantics.DEPLOYED_INT8,
            reasons=tuple(star.reason for star in self.stars),
        )

    def _name(self) -> str:
        """What the bounds come from."""
        if any(star.relaxed for star in self.stars):
            return "relaxation"
        return "cells" if any(star.cells for star in self.stars) else "intervals"
