"""Support function of stars as a differentiable layer.

A star {c + V a : A a <= b, l <= a <= u} reaches furthest in direction g at

    h(g) = g . c + max { w . a : A a <= b, l <= a <= u },   w = V^T g

a linear program, solved and differentiated by cvxpylayers. Where its solution a* and multipliers y* are unique, the
gradient is that of the envelope theorem:

    dh/dg = c + V a*,   dh/dc = g,   dh/dV = g a*^T,   dh/db = y*,   dh/dA = -y* a*^T

Agrawal, Amos, Barratt, Boyd, Diamond, Kolter: Differentiable convex optimization layers, NeurIPS 2019.

Axis letters: S stars, R directions of each, N features, M predicate variables, P constraints.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchreach.core.errors import InvalidSetError, ShapeError, TorchreachError
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.sets.star import StarBatch

# Interior point to full accuracy; the default, a first-order method, stops at 1e-4.
SOLVER = {"solve_method": "Clarabel"}
FEASIBLE = 1e-6  # relative; solutions are good to 1e-8


class StarSupport(nn.Module):
    """support(g): the largest g . x over each star of a batch, differentiable in g and in the stars' parameters.

    Args:
        stars: S stars, with at least one predicate variable. Their A, lower and upper stay fixed; what is passed to
            a call takes the place of their centre, generators and b.

    The value is the solver's, good to about 1e-8 of the star's size, and no certificate: for one take
    `stars.affine_map(g).range()`. Each call solves S * R linear programs on the CPU, whatever device the tensors
    are on.

    Raises: TorchreachError if cvxpylayers is not installed; ShapeError for stars without predicate variables.

    Examples:
        >>> support = StarSupport(StarBatch.from_box(torch.zeros(2), torch.ones(2)))
        >>> support(torch.tensor([[1.0, 2.0]]))
        tensor([3.])
    """

    def __init__(self, stars: StarBatch) -> None:
        super().__init__()
        if stars.dim == 0:
            raise ShapeError("StarSupport requires stars with predicate variables, got single points (dim 0)")
        self.stars = stars
        self._layer = _program(stars.dim, stars.A.shape[1])

    def forward(
        self, g: Tensor, *, center: Tensor | None = None, generators: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        """h(g) [S], or [S, R] for R directions of each star, in the dtype and on the device of g.

        Args:
            g: [S, *shape] or [S, R, *shape].
            center: c [S, *shape]; generators: V [S, M, *shape]; b: [S, P]. By default the stars' own.

        Raises: ShapeError for shapes that do not fit; InvalidSetError for numbers that are not finite, or if `b`
            leaves a star without points.
        """
        stars = self.stars
        own = stars.basis.flatten(2)
        size, features = len(stars), own.shape[2]
        one = g.ndim == 1 + len(stars.shape)
        if tuple(g.shape) not in ((size, *stars.shape), (size, *g.shape[1:2], *stars.shape)):
            raise ShapeError(
                f"directions must be [{size}, *{stars.shape}] or [{size}, R, *{stars.shape}], got {tuple(g.shape)}"
            )
        c = own[:, 0] if center is None else _shaped("center", center, (size, *stars.shape)).flatten(1)
        V = (
            own[:, 1:]
            if generators is None
            else _shaped("generators", generators, (size, stars.dim, *stars.shape)).flatten(2)
        )
        right = stars.b if b is None else _shaped("b", b, tuple(stars.b.shape))
        rows = g.reshape(size, -1, features)
        c, V, right, rows, A, low, high = (
            part.to("cpu", COMPUTE_DTYPE) for part in (c, V, right, rows, stars.A, stars.lower, stars.upper)
        )
        if not all(bool(part.isfinite().all()) for part in (c, V, right, rows)):
            raise InvalidSetError("directions and the parameters of stars must be finite, got NaN or infinity")
        # Over the unit box, so that the solver sees numbers of one size: a = middle + radius t.
        middle, radius = (low + high) / 2, (high - low) / 2
        c = c + (middle[:, None] @ V)[:, 0]
        V = V * radius[..., None]
        right = right - (A @ middle[..., None])[..., 0]
        A = A * radius[:, None]
        w = rows @ V.transpose(1, 2)  # [S, R, M]
        count = rows.shape[1]
        t = self._solve(w.flatten(0, 1), A.repeat_interleave(count, 0), right.repeat_interleave(count, 0))
        value = (rows @ c[..., None])[..., 0] + (w * t.reshape(w.shape)).sum(2)
        return (value[:, 0] if one else value).to(g.device, g.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.stars)} stars of shape {self.stars.shape}"

    def _solve(self, w: Tensor, A: Tensor, b: Tensor) -> Tensor:
        """Solutions [B, M] of max w . t over A t <= b, |t| <= 1."""
        parameters = (w, A, b) if A.shape[1] else (w,)
        (t,) = self._layer(*parameters, solver_args=SOLVER)
        # The layer reports no status; a program without feasible points leaves some iterate.
        excess = ((A @ t[..., None])[..., 0] - b) / (A.abs().sum(2) + b.abs()).clamp(min=1e-300)
        inside = (excess <= FEASIBLE).all(1) & (t.abs() <= 1 + FEASIBLE).all(1)
        if not bool(inside.all()):
            bad = (~inside).reshape(len(self.stars), -1).any(1).nonzero().flatten().tolist()
            raise InvalidSetError(f"stars must have points, but linear programs of stars {bad} have no solution")
        return t


def _shaped(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != shape:
        raise ShapeError(f"{name} must be of shape {shape}, got {tuple(value.shape)}")
    return value


def _program(variables: int, constraints: int) -> Any:
    """max w . t over A t <= b, |t| <= 1, as a layer of (w, A, b); of (w,) without constraints."""
    try:
        import cvxpy as cp
        from cvxpylayers.torch import CvxpyLayer  # pyright: ignore[reportPrivateImportUsage]
    except ImportError as error:
        raise TorchreachError(
            f"StarSupport requires cvxpylayers (uv add cvxpylayers, or pip install cvxpylayers), got: {error}"
        ) from error
    t, w = cp.Variable(variables), cp.Parameter(variables)
    inside: list[Any] = [t <= 1, t >= -1]
    parameters = [w]
    if constraints:
        A, b = cp.Parameter((constraints, variables)), cp.Parameter(constraints)
        inside.append(A @ t <= b)
        parameters += [A, b]
    return CvxpyLayer(cp.Problem(cp.Maximize(w @ t), inside), parameters=parameters, variables=[t])
