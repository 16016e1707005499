"""Star batches.

    star = { c + V a :  A a <= b,  l <= a <= u }

Centre c and generators V share one tensor, so an affine layer is one batched call for both; features may
have any shape, so an image star is the same class.

Reference: Duggirala, Viswanathan: Parsimonious, simulation based verification of linear systems, CAV 2016;
Tran et al.: Star-based reachability analysis of deep neural networks, FM 2019.

Axis letters: S stars, M predicate variables, P constraints, N features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torchreach.core.errors import InvalidSetError, ShapeError
from torchreach.core.roundoff import gamma, round_down, round_up
from torchreach.core.tolerances import COMPUTE_DTYPE, Tolerances
from torchreach.graph.layers import linear
from torchreach.lp.halfspaces import Halfspaces
from torchreach.lp.interior_point import centre, interior, maximize
from torchreach.lp.problem import LPBatch
from torchreach.read.builder import ChainBuilder
from torchreach.sets.checked import check_star, image_box, numbers


@dataclass(frozen=True, eq=False)
class StarBatch:
    """S stars of one feature shape. Refused at construction when empty, unbounded or malformed.

    Attributes:
        basis: [S, 1 + M, *shape] centre (row 0) and generators.
        A: [S, P, M], b: [S, P] predicate constraints A a <= b.
        lower, upper: [S, M] predicate bounds, finite.
        origin: [S] long; which input star each came from, for stars that a network has split.

    Two batches are equal only if they are one object. A star without predicate variables is a point, which
    constraints leave as it is or make empty; it keeps none.

    Raises: ShapeError, InvalidSetError.

    Examples:
        >>> stars = StarBatch.from_box(torch.zeros(2), torch.ones(2))
        >>> stars.shape, len(stars)
        ((2,), 1)
    """

    basis: Tensor
    A: Tensor
    b: Tensor
    lower: Tensor
    upper: Tensor
    origin: Tensor

    def __post_init__(self) -> None:
        check_star(self)
        if self.dim == 0:
            object.__setattr__(self, "A", self.A[:, :0])
            object.__setattr__(self, "b", self.b[:, :0])

    def __repr__(self) -> str:
        stars = f"{len(self)} star{'s' * (len(self) != 1)} of shape {self.shape}"
        return f"StarBatch({stars}, {self.dim} variables, {self.A.shape[1]} constraints, {self.dtype}, {self.device})"

    # -- constructors ---------------------------------------------------------------------------------

    @staticmethod
    def from_box(lower: Tensor | np.ndarray, upper: Tensor | np.ndarray) -> StarBatch:
        """Stars of the boxes [lower, upper], each [S, *shape] (one-dimensional: one box), tensors or numpy arrays.

        One predicate variable per feature that has width in some box. The star is the box exactly, in any
        dtype.

        Examples:
            >>> stars = tr.StarBatch.from_box(torch.zeros(5, 3), torch.ones(5, 3))
            >>> len(stars), stars.shape, stars.dim
            (5, (3,), 3)
        """
        lower, upper = numbers("lower", lower), numbers("upper", upper)
        if lower.shape != upper.shape:
            raise ShapeError(f"lower and upper must have one shape, got {tuple(lower.shape)} and {tuple(upper.shape)}")
        if lower.dtype != upper.dtype or lower.device != upper.device:
            raise ShapeError(
                f"lower and upper must have one floating-point dtype and device, got {lower.dtype} on {lower.device} "
                f"and {upper.dtype} on {upper.device}"
            )
        if lower.ndim == 0:
            raise ShapeError("lower and upper must have at least one axis, got scalars")
        for name, bound in (("lower", lower), ("upper", upper)):
            if not torch.isfinite(bound).all():
                raise InvalidSetError(f"{name} must be finite, got NaN or infinite entries: the box is unbounded")
        if (lower > upper).any():
            at = tuple((lower > upper).nonzero()[0].tolist())
            raise InvalidSetError(
                f"lower must not exceed upper, got {lower[at].item()} > {upper[at].item()} at index {at}"
            )
        if lower.ndim == 1:
            lower, upper = lower[None], upper[None]
        size, shape = lower.shape[0], lower.shape[1:]
        low, high = lower.flatten(1), upper.flatten(1)
        wide = (high > low).any(0).nonzero().flatten()
        # Predicates are the features themselves, bounded by the box: no midpoint or radius to round.
        basis = low.new_zeros(size, 1 + len(wide), low.shape[1])
        basis[:, 0] = low
        basis[:, 0, wide] = 0
        basis[:, 1 + torch.arange(len(wide), device=low.device), wide] = 1
        return StarBatch(
            basis.reshape(size, 1 + len(wide), *shape),
            low.new_zeros(size, 0, len(wide)),
            low.new_zeros(size, 0),
            low[:, wide],
            high[:, wide],
            torch.arange(size, device=low.device),
        )

    @staticmethod
    def from_image(
        image: Tensor | np.ndarray,
        eps: float | Tensor | np.ndarray,
        mask: Tensor | np.ndarray | None = None,
        clip: tuple[float, float] | None = None,
    ) -> StarBatch:
        """Image stars: pixels in `mask` within `eps` of `image`, the others fixed.

        The box is rounded outward to the image's dtype, so that it holds every real number within `eps`.

        Args:
            image: [S, *shape] images of floating-point numbers; one image [C, H, W] needs a leading axis.
            eps: radius, finite and >= 0, scalar or broadcastable to `image`.
            mask: bool (or 0 and 1), broadcastable to `image`; None perturbs every pixel.
            clip: lowest and highest valid pixel value, which the image must keep to; applied to the box.
        """
        return StarBatch.from_box(*image_box(image, eps, mask, clip))

    @staticmethod
    def from_vnnlib(path: str | Path, dtype: torch.dtype = torch.float64) -> StarBatch:
        """The input boxes of a VNN-LIB file, one star each, of shape [X]; `reshape` gives them that of a picture."""
        from torchreach.sets.vnnlib import read_box

        lower, upper = read_box(path)
        return StarBatch.from_box(round_down(lower, dtype), round_up(upper, dtype))

    @staticmethod
    def cat(batches: Sequence[StarBatch]) -> StarBatch:
        """One batch of several with equal feature shape and number of predicate variables."""
        if not batches:
            raise ShapeError("cat needs at least one StarBatch, got none")
        first = batches[0]
        for other in batches:
            if (other.shape, other.dim) != (first.shape, first.dim):
                raise ShapeError(
                    f"cat needs one feature shape and number of predicate variables, got {first.shape} with "
                    f"{first.dim} and {other.shape} with {other.dim}"
                )
        sets = Halfspaces.cat([Halfspaces(s.A, s.b) for s in batches])
        return StarBatch.trusted(
            torch.cat([s.basis for s in batches]),
            sets.A,
            sets.b,
            torch.cat([s.lower for s in batches]),
            torch.cat([s.upper for s in batches]),
            torch.cat([s.origin for s in batches]),
        )

    @staticmethod
    def trusted(basis: Tensor, A: Tensor, b: Tensor, lower: Tensor, upper: Tensor, origin: Tensor) -> StarBatch:
        """A StarBatch whose parts are known to be valid: construction checks are skipped."""
        star = object.__new__(StarBatch)
        parts = {"basis": basis, "A": A, "b": b, "lower": lower, "upper": upper, "origin": origin}
        for name, value in parts.items():
            object.__setattr__(star, name, value)
        return star

    # -- shape ----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.basis.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Feature shape, without the star axis."""
        return tuple(self.basis.shape[2:])

    @property
    def dim(self) -> int:
        """Number of predicate variables M."""
        return self.basis.shape[1] - 1

    @property
    def device(self) -> torch.device:
        return self.basis.device

    @property
    def dtype(self) -> torch.dtype:
        return self.basis.dtype

    @property
    def center(self) -> Tensor:
        """[S, *shape] image of the middle of the predicate bounds (which constraints may exclude)."""
        return self.point(self.lower.new_zeros(len(self), 1, self.dim))[:, 0].to(self.dtype)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> StarBatch:
        """The same stars elsewhere or in another dtype (a smaller one rounds the set itself; boxes outward)."""
        moved = {f.name: getattr(self, f.name).to(device=device) for f in fields(self)}
        if dtype is not None and dtype != self.dtype:
            # Ends of predicates and constraints outward, so that a box loses no point.
            rounding = {"lower": round_down, "upper": round_up, "b": round_up}
            for name in ("basis", "A", "b", "lower", "upper"):
                moved[name] = rounding.get(name, Tensor.to)(moved[name], dtype)
                if not torch.isfinite(moved[name]).all():
                    raise InvalidSetError(f"the stars must fit into {dtype}, but their {name} overflows")
        return StarBatch.trusted(**moved)

    def reshape(self, shape: Sequence[int]) -> StarBatch:
        """The same stars with features of another shape (no star axis; one size may be -1), in the same order."""
        try:
            basis = self.basis.reshape(*self.basis.shape[:2], *((shape,) if isinstance(shape, int) else shape))
        except (RuntimeError, TypeError):
            raise ShapeError(
                f"stars of shape {self.shape} hold {prod(self.shape)} features, which do not fit into {shape!r}"
            ) from None
        return StarBatch.trusted(basis, self.A, self.b, self.lower, self.upper, self.origin)

    def select(self, index: Tensor | slice | Sequence[int]) -> StarBatch:
        """The stars at `index` (slice, list, long or boolean tensor)."""
        if isinstance(index, Sequence):
            index = torch.as_tensor(index, device=self.device)
        return StarBatch.trusted(*(getattr(self, f.name)[index] for f in fields(self)))

    # -- set operations -------------------------------------------------------------------------------

    def affine_map(self, layer: nn.Module | Tensor, bias: Tensor | None = None) -> StarBatch:
        """Image under an affine layer, or under x -> W x + b for a matrix W [N', N] and bias [N']."""
        if isinstance(layer, Tensor):
            matrix = nn.Linear(layer.shape[1], layer.shape[0], bias=bias is not None)
            matrix.weight = nn.Parameter(layer, requires_grad=False)
            if bias is not None:
                matrix.bias = nn.Parameter(bias, requires_grad=False)
            layer = matrix
        builder = ChainBuilder(self.shape)
        builder.append(layer, "")
        size, rows = self.basis.shape[:2]
        image, zero = self.basis.flatten(0, 1), torch.zeros_like(self.basis[:1, 0])
        with torch.no_grad():
            try:
                for part in builder.layers:
                    image, zero = linear(part, image), part(zero)
            except RuntimeError as error:
                raise ShapeError(
                    f"{type(layer).__name__} does not accept features of shape {self.shape}: {error}"
                ) from None
        basis = image.reshape(size, rows, *image.shape[1:]).clone()
        basis[:, 0] += zero
        return StarBatch.trusted(basis, self.A, self.b, self.lower, self.upper, self.origin)

    def intersect(self, normal: Tensor, offset: Tensor | float) -> StarBatch:
        """Intersection with half-spaces normal . x <= offset on the features x.

        normal: [H, N] or [N] (N flattened features); offset: [H] or a number, finite. The half-space is rounded to the
        stars' dtype, its offset outward: no point is lost. Analyses thicken constraints by 1e-10 of the predicate's
        radius, so that flat stars have an interior: certified bounds stay valid, and a witness may lie that far outside
        a constraint. Raises InvalidSetError naming the stars that become empty.
        """
        normal = torch.atleast_2d(torch.as_tensor(normal, dtype=COMPUTE_DTYPE, device=self.device))
        flat = self.basis.flatten(2).to(COMPUTE_DTYPE)
        if normal.ndim != 2 or normal.shape[1] != flat.shape[2]:
            raise ShapeError(f"normal must be [H, {flat.shape[2]}], a number per feature, got {tuple(normal.shape)}")
        offset = torch.as_tensor(offset, dtype=COMPUTE_DTYPE, device=self.device)
        if offset.ndim > 1 or offset.numel() not in (1, len(normal)):
            raise ShapeError(f"offset must be a number or [{len(normal)}], one per normal, got {tuple(offset.shape)}")
        image = flat @ normal.T  # [S, 1 + M, H]
        exact = image[:, 1:].transpose(1, 2)
        A = exact.to(self.dtype)
        reach = torch.maximum(self.lower.abs(), self.upper.abs()).to(COMPUTE_DTYPE)[:, :, None]
        size = flat.abs() @ normal.abs().T
        terms = size[:, 0] + (size[:, 1:] * reach).sum(1) + offset.abs()
        lost = ((A.to(COMPUTE_DTYPE) - exact).abs() @ reach)[:, :, 0] + gamma(flat.shape[2]) * terms
        return StarBatch(
            self.basis,
            torch.cat((self.A, A), 1),
            torch.cat((self.b, round_up(offset - image[:, 0] + lost, self.dtype)), 1),
            self.lower,
            self.upper,
            self.origin,
        )

    def normalised(self) -> tuple[Tensor, Tensor, Tensor]:
        """The stars over the unit box, in float64: rows [S, 1 + M, N], A [S, P, M], b [S, P]."""
        middle = (self.lower.to(COMPUTE_DTYPE) + self.upper.to(COMPUTE_DTYPE)) / 2
        radius = (self.upper.to(COMPUTE_DTYPE) - self.lower.to(COMPUTE_DTYPE)) / 2
        rows = self.basis.flatten(2).to(COMPUTE_DTYPE).clone()
        rows[:, 0] += (middle[:, None, :] @ rows[:, 1:])[:, 0]
        rows[:, 1:] *= radius[:, :, None]
        A = self.A.to(COMPUTE_DTYPE)
        b = self.b.to(COMPUTE_DTYPE) - (A @ middle[:, :, None])[:, :, 0]
        A = A * radius[:, None, :]
        if b.shape[1]:  # a constraint on no variable says nothing, or (beyond rounding) that the star is empty
            b = torch.where((A == 0).all(2), torch.where(b >= -self.rounding()[1], 1.0, -1.0), b)
        return rows, A, b

    def rounding(self) -> tuple[Tensor, Tensor]:
        """Error bounds of `normalised`: of its features [S, N] at any predicate, and of its b [S, P]."""
        reach = torch.maximum(self.lower.abs(), self.upper.abs()).to(COMPUTE_DTYPE)[:, None]
        basis, A = self.basis.flatten(2).to(COMPUTE_DTYPE).abs(), self.A.to(COMPUTE_DTYPE).abs()
        share = gamma(self.dim + 4)
        features = basis[:, 0] + 2 * (reach @ basis[:, 1:])[:, 0]
        return share * features, share * (self.b.to(COMPUTE_DTYPE).abs() + 2 * (A @ reach.transpose(1, 2))[:, :, 0])

    def bounding_box(self) -> tuple[Tensor, Tensor, Tensor]:
        """Box (lower, upper) [S, N] around each star, float64, and whether it is the star itself [S].

        Constraints are left out of account; without them it is the smallest. Exact for stars made by `from_box`.
        """
        c, V = self.basis[:, 0].flatten(1).to(COMPUTE_DTYPE), self.basis[:, 1:].flatten(2)
        ends = torch.stack((self.lower, self.upper)).to(COMPUTE_DTYPE)
        used = V != 0
        moved, own = used.any(1), used.sum(1) <= 1
        plain = (used.sum(2) <= 1).all(1) & own.all(1) & (self.A.shape[1] == 0)
        if self.dim and bool(own.all()):  # one predicate for each feature: no products with all the others
            at = used.to(torch.uint8).argmax(1)
            V = V.gather(1, at[:, None]).to(COMPUTE_DTYPE)
            ends = ends.gather(2, at.expand(2, -1, -1))[:, :, None] * V
        else:
            V = V.to(COMPUTE_DTYPE)
            ends = ends[..., None] * V
        low, high = c + ends.amin(0).sum(1), c + ends.amax(0).sum(1)
        unrounded = ((c == 0) & (V.abs().sum(1) == 1)) | ~moved
        size = gamma(self.dim) * (c.abs() + ends.abs().amax(0).sum(1))
        size = torch.where(plain[:, None] & unrounded, 0.0, size)
        return low - size, high + size, plain

    def is_empty(self) -> Tensor:
        """[S] bool: proven to contain no point."""
        _, A, b = self.normalised()
        if self.dim == 0:
            return (b < 0).any(1)
        return interior(Halfspaces(A, b), Tolerances().sign)[2]

    def range(self) -> tuple[Tensor, Tensor]:
        """Certified exact range of every feature, (lower, upper) [S, *shape], by linear programs."""
        if self.dim == 0:
            return self.basis[:, 0], self.basis[:, 0]
        rows, A, b = self.normalised()
        size, _, features = rows.shape
        start = self._interior(A, b)
        bounds = []
        for sign in (-1.0, 1.0):
            programs = LPBatch(
                sign * rows[:, 1:].transpose(1, 2).flatten(0, 1),
                sign * rows[:, 0].flatten(),
                Halfspaces(A.repeat_interleave(features, 0), b.repeat_interleave(features, 0)),
            )
            upper = maximize(programs, start.repeat_interleave(features, 0), gap=Tolerances().gap).upper
            bounds.append(sign * upper.reshape(size, *self.shape))
        return round_down(bounds[0], self.dtype), round_up(bounds[1], self.dtype)

    def contains(self, x: Tensor, tolerance: float = 1e-6) -> Tensor:
        """Whether points lie in the star, up to `tolerance` in every feature: x [S, B, *shape] -> [S, B].

        Decided by a linear program: the smallest max-norm distance of c + V a to x over the predicate.
        """
        if x.shape[0] != len(self) or x.shape[2:] != self.shape:
            raise ShapeError(f"points must be [{len(self)}, B, {self.shape}], got {tuple(x.shape)}")
        rows, A, b = self.normalised()
        points = x.flatten(2).to(COMPUTE_DTYPE)  # [S, B, N]
        batch, features = points.shape[1:]
        start = self._interior(A, b)
        # variables (a, t), distance d = radius (1 + t); minimise d, so the objective is -radius t - radius
        apart = points - (rows[:, :1] + start[:, None, :] @ rows[:, 1:])  # [S, B, N]
        radius = apart.abs().amax(2) * 2 + 1.0  # [S, B]
        V = rows[:, 1:].transpose(1, 2)[:, None].expand(-1, batch, -1, -1)  # [S, B, N, M]
        room = radius[:, :, None, None].expand(-1, -1, features, 1)
        zero = A.new_zeros(len(self), batch, A.shape[1], 1)
        left = torch.cat(
            (
                torch.cat((A[:, None].expand(-1, batch, -1, -1), zero), 3),
                torch.cat((V, -room), 3),
                torch.cat((-V, -room), 3),
            ),
            2,
        )
        gap = points - rows[:, :1]
        right = torch.cat((b[:, None].expand(-1, batch, -1), gap + radius[:, :, None], radius[:, :, None] - gap), 2)
        objective = torch.zeros(len(self) * batch, self.dim + 1, dtype=A.dtype, device=A.device)
        objective[:, -1] = -radius.flatten()
        first = torch.cat((start[:, None].expand(-1, batch, -1), torch.full_like(radius, 0.9)[:, :, None]), 2)
        solution = maximize(
            LPBatch(objective, -radius.flatten(), Halfspaces(left.flatten(0, 1), right.flatten(0, 1))),
            first.flatten(0, 1),
            gap=tolerance / 100,
            above=-tolerance,
            below=-tolerance,
        )
        return (-solution.lower <= tolerance).reshape(len(self), batch)

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """[S, count, *shape] random points of each star: uniform on boxes, hit-and-run under constraints."""
        _, A, b = self.normalised()
        generator = torch.Generator(device=self.device).manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=COMPUTE_DTYPE, device=self.device)

        if A.shape[1] == 0:
            a = 2 * uniform(len(self), count, self.dim) - 1
        else:
            a = self._interior(A, b)[:, None].expand(-1, count, -1).clone()
            for _ in range(20 + 5 * self.dim):
                way = uniform(*a.shape) - 0.5
                room = (b[:, None] - a @ A.transpose(1, 2), 1 - a, 1 + a)
                speed = (way @ A.transpose(1, 2), way, -way)
                pace, space = torch.cat(speed, 2), torch.cat(room, 2).clamp(min=0)
                ahead = torch.where(pace > 0, space / pace, torch.inf).amin(2, keepdim=True)
                behind = torch.where(pace < 0, space / pace, -torch.inf).amax(2, keepdim=True)
                a = a + (behind + (ahead - behind) * uniform(*a.shape[:2], 1)) * way
        return self.point(a).to(self.dtype)

    def point(self, predicate: Tensor) -> Tensor:
        """Features c + V a at predicate points [S, B, M] over the unit box: [S, B, *shape], float64.

        Coordinates are mapped to the predicate bounds and kept inside them.
        """
        lower, upper = (bound.to(COMPUTE_DTYPE)[:, None] for bound in (self.lower, self.upper))
        a = (lower + upper) / 2 + (upper - lower) / 2 * predicate.to(COMPUTE_DTYPE)
        a = torch.minimum(torch.maximum(a, lower), upper)
        rows = self.basis.flatten(2).to(COMPUTE_DTYPE)
        return (rows[:, :1] + a @ rows[:, 1:]).reshape(len(self), predicate.shape[1], *self.shape)

    def _interior(self, A: Tensor, b: Tensor) -> Tensor:
        """[S, M] points near the analytic centre; flat stars are thickened by the sign tolerance."""
        if self.dim == 0:
            return b.new_zeros(len(self), 0)
        point, depth, _ = interior(Halfspaces(A, b), Tolerances().sign)
        return torch.where((depth > 0)[:, None], centre(Halfspaces(A, b), point, 5), point)
