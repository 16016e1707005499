"""Branch and bound over one star of a batch, resumable: which coordinates, which split, and who finishes small parts.

A star that is a box is searched in its features. Any other star {c + V a : A a <= b, l <= a <= u} is searched in its
predicate variables: x = c + V a becomes a first affine layer of both networks, the box is [l, u], and A a <= b are
constraints of the search. Both are exact: no bounding box is put around the star.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchreach.core.checkpoint import Checkpoint
from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.options import Budget, Exact, Search
from torchreach.core.plain import builders, decode, digest, encode
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.domains.box_difference import FirstBounds
from torchreach.domains.hexagon import Hexagon
from torchreach.domains.joint import Both
from torchreach.domains.pair import Pair
from torchreach.graph.layers import Reshape
from torchreach.read.steps import steps
from torchreach.search.best_first import Tree
from torchreach.search.boxes import FEW_INPUTS, Boxes, search_boxes
from torchreach.search.result import Constraints, Question, SearchResult
from torchreach.search.signs import Branches, search_signs
from torchreach.sets.star import StarBatch
from torchreach.verbs.merge import merge
from torchreach.verbs.reach import VERTEX_DIM, reach_within

log = logging.getLogger(__name__)

KINDS = builders([Tree, Boxes, Branches, Hexagon])
TREE = "tree"
# Output stars that finishing a batch of boxes may take, per box and besides.
FINISH_STARS, FINISH_SPARE = 1000, 10_000
SAMPLES = 64


@dataclass(frozen=True)
class Coordinates:
    """Where one star is searched: x = c + V a for a in the box [lower, upper], A a <= b.

    lift: the map x = c + V a as a module, None where a is x itself.
    """

    shape: tuple[int, ...]
    lower: Tensor  # [N_in]
    upper: Tensor
    lift: nn.Sequential | None
    constraints: Constraints | None

    @staticmethod
    def of(star: StarBatch) -> Coordinates:
        """Coordinates of a batch of one star."""
        rows = star.basis[0].flatten(1).to(COMPUTE_DTYPE)
        low, high = star.lower[0].to(COMPUTE_DTYPE), star.upper[0].to(COMPUTE_DTYPE)
        centre, V = rows[0], rows[1:]
        used = V != 0
        moved = used.any(0)
        own = used.sum(1).eq(1).all() & used.sum(0).le(1).all() & V[used].eq(1).all() & centre[moved].eq(0).all()
        if (star.A.shape[1] == 0 or star.dim == 0) and bool(own):
            lower, upper = centre.clone(), centre.clone()
            lower[moved], upper[moved] = V.T[moved] @ low, V.T[moved] @ high
            return Coordinates(star.shape, lower, upper, None, None)
        linear = nn.Linear(len(V), len(centre), dtype=COMPUTE_DTYPE, device=centre.device)
        with torch.no_grad():
            linear.weight.copy_(V.T)
            linear.bias.copy_(centre)
        constraints = None
        if star.A.shape[1]:
            inside = _predicates(star).mean(0)
            constraints = Constraints(star.A[0].to(COMPUTE_DTYPE), star.b[0].to(COMPUTE_DTYPE), inside)
        return Coordinates(star.shape, low, high, nn.Sequential(linear, Reshape(star.shape)), constraints)

    @property
    def varying(self) -> int:
        return int((self.lower < self.upper).sum())

    def lifted(self, network: nn.Module) -> nn.Module:
        """`network` on these coordinates; a copy in the lift's dtype, which all floating-point weights fit exactly."""
        return network if self.lift is None else nn.Sequential(self.lift, copy.deepcopy(network).to(COMPUTE_DTYPE))

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of what lifted networks take."""
        return self.shape if self.lift is None else tuple(self.lower.shape)

    def features(self, a: Tensor) -> Tensor:
        """Features [..., *shape] of points [..., N_in]."""
        flat = a.reshape(-1, *self.in_shape)
        return (flat if self.lift is None else self.lift(flat)).reshape(*a.shape[:-1], *self.shape)

    def parts(self, low: Tensor, high: Tensor) -> StarBatch:
        """Parts of the star in boxes [B, N_in], as stars of `in_shape`; a part can be empty."""
        box = StarBatch.from_box(low.reshape(-1, *self.in_shape), high.reshape(-1, *self.in_shape))
        if self.constraints is None:
            return box
        # Features without width are no predicates of `box`.
        rows = box.basis
        A, b = self.constraints.A.expand(len(low), -1, -1), self.constraints.b.expand(len(low), -1)
        b = b - (A @ rows[:, 0, :, None])[..., 0]
        return StarBatch.trusted(rows, A @ rows[:, 1:].transpose(1, 2), b, box.lower, box.upper, box.origin)


def _predicates(star: StarBatch) -> Tensor:
    """Predicate points [SAMPLES, M] of one star."""
    identity = torch.eye(star.dim, dtype=COMPUTE_DTYPE, device=star.device)
    basis = torch.cat((torch.zeros_like(identity[:1]), identity))[None]
    A, b, lower, upper = (part.to(COMPUTE_DTYPE) for part in (star.A, star.b, star.lower, star.upper))
    return StarBatch.trusted(basis, A, b, lower, upper, star.origin).sample(SAMPLES)[0]


class StarSearch:
    """A search over one star that can be run on and on.

    It maximises first(x) - second(x) and second(x) - first(x), output by output.

    Attributes:
        split: "inputs" or "signs".
        state: the last state, None before the first.
        over: whether there is nothing left to do, be the interval closed or not.
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module | None,
        star: StarBatch,
        question: Question,
        options: Search,
        *,
        memory: float,
        compared: Both | None = None,
        root: FirstBounds | None = None,
        clock: Clock = NO_LIMIT,
        files: Checkpoint | None = None,
    ) -> None:
        """second: None where it is zero. star: a batch of one. memory: bytes for open sub-problems. compared, root: the
        networks on the star's features, and `first_bounds` on the box around the star, if they are at hand. clock: of
        all of it, however often it is run on. files: where snapshots of it go, and from which it goes on.

        Raises: OutOfTime: before there are any bounds.
        """
        self.space = space = Coordinates.of(star)
        networks = [space.lifted(network) for network in (first, second) if network is not None]
        if compared is None or space.lift is not None:
            both = [
                steps(network, space.in_shape, dtype=COMPUTE_DTYPE, device=star.device, smooth=True)
                for network in networks
            ]
            pair, root = None, None
            if len(both) == 2 and Pair.matches(both[0], both[1]):
                pair = Pair.of(both[0], both[1], (space.lower, space.upper), clock=clock)
            compared = Both.of(both[0], both[1] if len(both) == 2 else None, pair, clock)
        self.compared, self.memory = compared, memory
        self.module = networks[0] if len(networks) == 1 else merge(networks[0], networks[1], space.in_shape)
        self.split = options.split
        if self.split == "auto":
            self.split = "inputs" if space.varying <= FEW_INPUTS or compared.curved else "signs"
        if compared.pair is None:
            self.split = "inputs"
        self.clock = clock
        self.state: SearchResult | None = None
        self.over = False
        self.files, self.tree = files, Tree()
        # A branch is a part of its root only on the very networks and box that the root was bounded on.
        self.asked = "" if files is None else digest(self.split, compared, space.lower, space.upper, question)
        if files is not None:
            self._resume(files, star.device)
        args = (space.lower, space.upper, question)
        shared = {
            "tree": self.tree,
            "constraints": space.constraints,
            "memory": memory,
            "seed": options.seed,
            "clock": clock,
        }
        if compared.pair is not None and self.split == "signs":
            hexagons = None if root is None else root.hexagons
            self.states = search_signs(compared.pair, *args, root=hexagons, **shared)
        else:
            finish = self._finish if space.varying <= VERTEX_DIM and not compared.curved else None
            self.states = search_boxes(compared, *args, finish=finish, root=root, **shared)

    def run(self, enough: Callable[[SearchResult], bool]) -> None:
        """Goes on, by one state at least, until `enough` or over. OutOfTime: the clock is over before the first."""
        for state in self.states:
            self.state = state
            if self.files is not None and self.files.due(TREE, self.clock):
                self._save(self.files)
            if enough(state):
                self.over = state.closed
                break
        else:
            self.over = True
        if self.files is not None and self.state is not None and not self.state.closed:
            self._save(self.files)

    # -- checkpoint -------------------------------------------------------------------------------------

    def _save(self, files: Checkpoint) -> None:
        tree = {"asked": self.asked, "tree": encode(self.tree, KINDS)}
        files.snapshot(TREE, lambda: tree, self.clock)

    def _resume(self, files: Checkpoint, device: torch.device) -> None:
        found = files.load(TREE, device)
        if found is not None and found["asked"] == self.asked:
            self.tree = decode(found["tree"], KINDS)
            log.info("a search goes on with %d branches done and %d open", self.tree.branches, len(self.tree.left))

    def _finish(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, int]:
        parts = self.space.parts(low, high)
        some = ~parts.is_empty() if parts.A.shape[1] else torch.ones(len(low), dtype=torch.bool, device=low.device)
        size, n = len(low), self.compared.outputs
        upper = low.new_full((size, 2, n), -torch.inf)
        points = self.space.lower.expand(size, 2, n, -1).clone()
        regions = 0
        if bool(some.any()):
            found = reach_within(
                self.clock,
                self.module,
                parts.select(some),
                Exact(root_bounds="zonotope"),
                budget=Budget(stars=FINISH_STARS * size + FINISH_SPARE, memory=self.memory),
                keep_stars=False,
            )
            upper[some] = torch.stack((found.upper, -found.lower), 1)
            points[some] = torch.stack((found.argmax, found.argmin), 1).flatten(3)
            regions = int(found.count.sum())
        return upper, points, regions
