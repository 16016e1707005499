"""Exact discrepancy of two small networks by mixed-integer programming, modelled in cvxpy.

Method: max of y1 - y2 over a star, with one binary d for each ReLU that can change sign,

    h - s = z,   0 <= h <= U d,   0 <= s <= -L (1 - d),   L <= z <= U,

which makes h = max(z, 0); solved by HiGHS. The linear region it finds is then solved again as a linear
program, so that no big-M constant blurs the value, and the point is replayed through both networks.
Property: exact up to HiGHS's tolerances. Fully connected networks share nothing with the rest of torchreach, so that
an agreement of the two means something; others share its reader (`read.steps`), whose dense matrices they take.
Requirement: small networks. The time is exponential in the number of ReLUs that can change sign.
Reference: Tjeng, Xiao, Tedrake, "Evaluating Robustness of Neural Networks with Mixed Integer Programming",
ICLR 2019.

Axis letters: S stars, N outputs, M predicate variables, P constraints, K undecided ReLUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchreach.core.errors import InvalidNetworkError, InvalidSetError, ShapeError, UnsupportedLayerError
from torchreach.read.steps import steps
from torchreach.reference.linear_programs import Array, LinearProgram, as_array, run

Mask = NDArray[np.bool_]
AffineLayers = list[tuple[Array, Array, Mask]]

# Tighter feasibility tolerances make HiGHS lose optima; polishing makes up for looser ones.
COMMON = {
    "mip_rel_gap": 0.0,
    "mip_abs_gap": 1e-10,
    "mip_feasibility_tolerance": 1e-7,
    "primal_feasibility_tolerance": 1e-8,
    "dual_feasibility_tolerance": 1e-8,
}
OPTIONS = (
    COMMON,
    {**COMMON, "presolve": "off"},
    {**COMMON, "mip_feasibility_tolerance": 1e-6, "random_seed": 1},
)
BOUND_MARGIN = 1e-9  # relative widening of the big-M constants, far above the rounding of computing them
CLOSED = 1e-6  # relative distance between a point's value and the solver's bound beyond which HiGHS failed
EQUAL = 1e-9  # relative distance between values of two linear programs that means nothing
SAMPLES = 2000


@dataclass(frozen=True)
class MixedIntegerResult:
    """Exact signed range of y1 - y2 over each star, by mixed-integer programming.

    Attributes:
        range_lower, range_upper: [S, N] float64 minimum and maximum of y1 - y2.
        argmin, argmax: [S, N, *input shape] float64 inputs where they are taken.
        attained_lower, attained_upper: [S, N] y1 - y2 at those inputs, replayed in float64.
        undecided: [S] number of ReLUs of both networks that needed a binary variable.
    """

    range_lower: Tensor
    range_upper: Tensor
    argmin: Tensor
    argmax: Tensor
    attained_lower: Tensor
    attained_upper: Tensor
    undecided: Tensor

    @property
    def max_abs(self) -> Tensor:
        """[S, N] maximum of |y1 - y2|."""
        return torch.maximum(-self.range_lower, self.range_upper)


def affine_layers(module: nn.Module, shape: tuple[int, ...] | None = None) -> AffineLayers:
    """Float64 (W [out, in], b [out], bends [out]) of a network, with a ReLU on the features that bend after each.

    Takes nn.Linear, nn.ReLU and nn.Flatten, and nn.Sequential of them; neighbouring linear layers are
    multiplied together, and a ReLU at either end is followed or preceded by an identity layer. With the shape of one
    input, any network of affine and piecewise linear operations, whose affine layers become dense matrices.
    Raises: UnsupportedLayerError naming the layer and its position; InvalidNetworkError for weights that
    are not finite or do not fit together.
    """
    flat = list(_flat(module, ""))
    if shape is not None and not all(isinstance(layer, nn.Linear | nn.ReLU | nn.Flatten) for _, layer in flat):
        return _lowered(module, shape)
    layers: AffineLayers = []
    after_relu = False
    for name, layer in flat:
        if isinstance(layer, nn.ReLU):
            after_relu = True
        elif isinstance(layer, nn.Linear):
            W = as_array(layer.weight)
            b = np.zeros(len(W)) if layer.bias is None else as_array(layer.bias)
            if not (np.isfinite(W).all() and np.isfinite(b).all()):
                raise InvalidNetworkError(f"weights must be finite, got NaN or infinity in layer {name!r}")
            if layers and len(layers[-1][1]) != W.shape[1]:
                raise InvalidNetworkError(
                    f"layer {name!r} needs {W.shape[1]} inputs, got {len(layers[-1][1])} from those before"
                )
            if after_relu and not layers:
                layers.append(_identity(W.shape[1]))
            if layers and not after_relu:
                inner_W, inner_b, _ = layers.pop()
                W, b = W @ inner_W, W @ inner_b + b
            layers.append((W, b, np.ones(len(b), dtype=bool)))
            after_relu = False
        elif not (isinstance(layer, nn.Flatten) and layer.start_dim == 1 and layer.end_dim == -1):
            raise UnsupportedLayerError(
                "the mixed-integer model needs nn.Linear, nn.ReLU and nn.Flatten() in nn.Sequential, "
                f"got {type(layer).__name__} at {name or 'the top'!r}"
            )
    if not layers:
        raise UnsupportedLayerError("the mixed-integer model needs at least one nn.Linear layer, got none")
    return [*layers, _identity(len(layers[-1][1]))] if after_relu else layers


def _lowered(module: nn.Module, shape: tuple[int, ...]) -> AffineLayers:
    result: AffineLayers = []
    for step in steps(module, shape, dtype=torch.float64, device=torch.device("cpu")):
        unit = torch.eye(int(np.prod(step.in_shape)), dtype=torch.float64)
        W, b = step.linear(unit).T.numpy(), step.bias.numpy()
        if not (np.isfinite(W).all() and np.isfinite(b).all()):
            raise InvalidNetworkError(f"weights must be finite, got NaN or infinity before {step.name!r}")
        result.append((W, b, np.zeros(len(b), dtype=bool) if step.relu is None else step.relu.numpy()))
    return result


def mixed_integer_discrepancy(original: nn.Module, compressed: nn.Module, stars: Any) -> MixedIntegerResult:
    """Exact signed range of original(x) - compressed(x) over each star, with the inputs that take it.

    `stars` is a `StarBatch`: basis [S, 1 + M, *shape] (row 0 the centre), A [S, P, M], b [S, P], lower and
    upper [S, M]. Weights and stars are read as float64, whatever their dtype.
    The time is exponential in the number of ReLUs that can change sign: for small networks only.
    Raises: UnsupportedLayerError, InvalidNetworkError; ShapeError for stars the networks do not take;
    InvalidSetError for an empty or unbounded star; RuntimeError if HiGHS does not close the gap.
    """
    shape = tuple(stars.basis.shape[2:])
    networks = (affine_layers(original, shape), affine_layers(compressed, shape))
    basis, A, b, lower, upper = checked_stars(networks, stars)
    S, M = len(basis), basis.shape[1] - 1
    N = len(networks[0][-1][1])
    basis = basis.reshape(S, 1 + M, -1)

    value, attained = np.empty((2, S, N)), np.empty((2, S, N))
    point, undecided = np.empty((2, S, N, basis.shape[2])), np.empty(S, dtype=np.int64)
    for s in range(S):
        centre, generators = basis[s, 0], basis[s, 1:].T
        # The networks as functions of the predicate variables: the star's own map joins the first layer.
        pulled = tuple([(W0 @ generators, W0 @ centre + b0, bends), *rest] for (W0, b0, bends), *rest in networks)
        model = _Model(pulled, A[s], b[s], lower[s], upper[s])
        undecided[s] = model.undecided
        for side, sign in enumerate((-1.0, 1.0)):
            for n in range(N):
                best = model.maximise(sign, n)
                if best is None:
                    raise InvalidSetError(f"each star must contain a point, got an empty star at index {s}")
                value[side, s, n] = sign * best[0]
                point[side, s, n] = x = centre + generators @ best[1]
                attained[side, s, n] = (forward(networks[0], x) - forward(networks[1], x))[n]
    low, high = torch.from_numpy(value)
    argmin, argmax = torch.from_numpy(point.reshape(2, S, N, *shape))
    attained_low, attained_high = torch.from_numpy(attained)
    return MixedIntegerResult(low, high, argmin, argmax, attained_low, attained_high, torch.from_numpy(undecided))


class _Model:
    """Mixed-integer model of y1 - y2 on one star, compiled once and maximised for one output at a time.

    All quantities are affine in v = (a, h, 1): predicate variables, outputs of undecided ReLUs, constant.
    """

    def __init__(self, networks: tuple[AffineLayers, ...], A: Array, b: Array, lower: Array, upper: Array) -> None:
        self.star, self.networks = (A, b, lower, upper), networks
        self.bounds = bounds = [_preactivation_bounds(layers, lower, upper) for layers in networks]
        self.open = [
            [bends & (low < 0) & (high > 0) for (_, _, bends), (low, high) in zip(layers[:-1], own, strict=True)]
            for layers, own in zip(networks, bounds, strict=True)
        ]
        self.undecided = int(sum(open_.sum() for network in self.open for open_ in network))
        M, K = len(lower), self.undecided
        switching: list[Array] = [np.empty((0, M + K + 1))]
        ranges: list[Array] = [np.empty((0, 2))]
        outputs, seen = [], 0
        for layers, layer_bounds, opens in zip(networks, bounds, self.open, strict=True):
            value = np.eye(M, M + K + 1)
            for (W, offset, bends), (low, high), open_ in zip(layers[:-1], layer_bounds, opens, strict=True):
                value = _affine(W, offset, value)
                switching.append(value[open_])
                ranges.append(np.stack((low[open_], high[open_]), axis=1))
                value[bends & (high <= 0)] = 0
                value[open_] = np.eye(int(open_.sum()), M + K + 1, k=M + seen)
                seen += int(open_.sum())
            outputs.append(_affine(*layers[-1][:2], value))
        self.difference = outputs[0] - outputs[1]
        self.z = np.concatenate(switching)
        self._compile(np.concatenate(ranges))
        self.region = LinearProgram(len(A) + K, M)
        points = np.random.default_rng(0).uniform(lower, upper, (SAMPLES, M))
        self.points = points[(points @ A.T <= b).all(axis=1)]
        self.sampled = forward(networks[0], self.points) - forward(networks[1], self.points)

    def _compile(self, ranges: Array) -> None:
        import cvxpy as cp

        A, b, lower, upper = self.star
        M, K = len(lower), self.undecided
        self.a: Any = cp.Variable(M, bounds=[lower, upper])
        self.g = cp.Parameter(M + K)
        self.pattern: Any = None
        constraints: list[Any] = [A @ self.a <= b] if len(A) else []
        if K == 0:
            everything = self.a
        else:
            low, high = ranges.T
            h, s = cp.Variable(K, bounds=[0, high]), cp.Variable(K, bounds=[0, -low])
            self.pattern = d = cp.Variable(K, boolean=True)
            Z, H, q = self.z[:, :M], self.z[:, M:-1], self.z[:, -1]
            constraints += [
                h - s == Z @ self.a + H @ h + q,
                h <= cp.multiply(high, d),
                s <= cp.multiply(-low, 1 - d),
            ]
            everything = cp.hstack([self.a, h])
        self.problem = cp.Problem(cp.Maximize(self.g @ everything), constraints)

    def maximise(self, sign: float, output: int) -> tuple[float, Array] | None:
        """Maximum of sign * (y1 - y2)[output] and the a that takes it; None if the star is empty.

        HiGHS can prune the optimum away and not know (seen at feasibility tolerance 1e-9). Its answer must
        meet its bound and not lie below the best of the sampled regions; else the next options are tried.
        """
        objective = sign * self.difference[output]
        known = -np.inf
        if len(self.points):
            best = self.points[(sign * self.sampled[:, output]).argmax()]
            known = self._solve_region(objective, self._pattern_at(best))[0]
        self.g.value = objective[:-1]
        for options in OPTIONS:
            if run(self.problem, options) == "infeasible":
                if len(self.points) == 0:
                    return None
                continue
            bound = float(self.problem.value + objective[-1])
            value, a = self._polish(objective)
            scale = 1 + abs(bound)
            if abs(value - bound) <= CLOSED * scale and known <= value + EQUAL * scale:
                return value, a
        raise RuntimeError(f"HiGHS lost the optimum of a mixed-integer program, {self.undecided} binaries")

    def _polish(self, objective: Array) -> tuple[float, Array]:
        """Optimum over one linear region: free of the big-M constants' error.

        The region is the one that the binaries name, or the one around the solver's point: where two
        hyperplanes nearly coincide, the first can be empty by less than the solver's tolerance.
        """
        a = np.clip(self.a.value, *self.star[2:])
        named = np.zeros(0) if self.pattern is None else np.round(self.pattern.value)
        around = self._pattern_at(a)
        patterns = [named] if np.array_equal(named, around) else [named, around]
        return max((self._solve_region(objective, d) for d in patterns), key=lambda found: found[0])

    def _pattern_at(self, a: Array) -> Array:
        """[K] 1 where an undecided ReLU is on at a."""
        pattern = [np.zeros(0)]
        for layers, opens in zip(self.networks, self.open, strict=True):
            x = a
            for (W, b, bends), open_ in zip(layers[:-1], opens, strict=True):
                x = W @ x + b
                pattern.append((x > 0)[open_].astype(np.float64))
                x = np.where(bends, np.maximum(x, 0), x)
        return np.concatenate(pattern)

    def _solve_region(self, objective: Array, d: Array) -> tuple[float, Array]:
        """Optimum over the region of pattern d, as a linear program in a alone.

        With D = diag(d), h = D (Z a + H h + q), so h = (I - D H)^-1 D (Z a + q); H is strictly triangular.
        """
        A, b, lower, upper = self.star
        M, K = len(lower), self.undecided
        Zq, H = self.z[:, [*range(M), -1]], self.z[:, M:-1]
        h = np.linalg.solve(np.eye(K) - d[:, None] * H, d[:, None] * Zq)
        z = (1 - 2 * d)[:, None] * (Zq + H @ h)  # <= 0 in the region
        goal = objective[M:-1] @ h
        goal[:M] += objective[:M]
        value, a = self.region.solve(
            goal[:M], np.concatenate((A, z[:, :M])), np.concatenate((b, -z[:, M])), lower, upper
        )
        return value + goal[M] + objective[-1], a


def _preactivation_bounds(layers: AffineLayers, low: Array, high: Array) -> list[tuple[Array, Array]]:
    """[L, U] of every hidden layer's pre-activations over the box of predicate variables.

    Intervals, met with linear bounds substituted backwards layer by layer: an undecided ReLU lies below
    U (z - L) / (U - L) and above z or 0 (Zhang et al., "Efficient Neural Network Robustness Certification
    with General Activation Functions", 2018).
    """
    bounds: list[tuple[Array, Array]] = []
    middle, radius = (low + high) / 2, (high - low) / 2
    for k, (W, b, _) in enumerate(layers[:-1]):
        if k == 0:
            centre, reach = W @ middle + b, np.abs(W) @ radius
            below, above = centre - reach, centre + reach
        else:
            floor, ceiling = np.where(layers[k - 1][2], np.maximum(bounds[-1], 0), bounds[-1])
            centre, reach = W @ (floor + ceiling) / 2 + b, np.abs(W) @ (ceiling - floor) / 2
            above = np.minimum(centre + reach, _substituted(layers[:k], bounds, W, b, middle, radius))
            below = np.maximum(centre - reach, -_substituted(layers[:k], bounds, -W, -b, middle, radius))
        margin = BOUND_MARGIN * (1 + np.abs(centre) + reach)
        bounds.append((below - margin, above + margin))
    return bounds


def _substituted(
    layers: AffineLayers, bounds: list[tuple[Array, Array]], W: Array, b: Array, middle: Array, radius: Array
) -> Array:
    """Upper bound of W h + b, h being the output of the ReLU after `layers`."""
    for (inner_W, inner_b, bends), (low, high) in zip(reversed(layers), reversed(bounds), strict=True):
        undecided = bends & (low < 0) & (high > 0)
        upper_slope = np.where(undecided, high / np.where(undecided, high - low, 1), (low >= 0) | ~bends)
        lower_slope = np.where(undecided, high > -low, (low >= 0) | ~bends)
        rising, falling = np.maximum(W, 0), np.minimum(W, 0)
        b = b - rising @ np.where(undecided, low * upper_slope, 0)
        W = rising * upper_slope + falling * lower_slope
        W, b = W @ inner_W, W @ inner_b + b
    return W @ middle + np.abs(W) @ radius + b


def _affine(W: Array, b: Array, value: Array) -> Array:
    """W x + b for x given by rows affine in (a, h, 1)."""
    value = W @ value
    value[:, -1] += b
    return value


def forward(layers: AffineLayers, x: Array) -> Array:
    """The network at x, in float64: [..., in] -> [..., out]."""
    for W, b, bends in layers[:-1]:
        x = x @ W.T + b
        x = np.where(bends, np.maximum(x, 0), x)
    W, b, _ = layers[-1]
    return x @ W.T + b


def _identity(size: int) -> tuple[Array, Array, Mask]:
    return np.eye(size), np.zeros(size), np.ones(size, dtype=bool)


def _flat(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Layers in order with their dotted names; nested nn.Sequential opened."""
    if isinstance(module, nn.Sequential):
        for child_name, child in module.named_children():
            yield from _flat(child, f"{name}.{child_name}" if name else child_name)
    else:
        yield name, module


def checked_stars(networks: tuple[AffineLayers, AffineLayers], stars: Any) -> tuple[Array, ...]:
    """basis, A, b, lower, upper of the stars as float64 arrays, once they are known to fit the networks."""
    sizes = [(layers[0][0].shape[1], len(layers[-1][1])) for layers in networks]
    if sizes[0] != sizes[1]:
        raise ShapeError(
            f"two networks with equal input and output sizes needed, got {sizes[0][0]} -> {sizes[0][1]} "
            f"and {sizes[1][0]} -> {sizes[1][1]}"
        )
    basis, A, b, lower, upper = (as_array(getattr(stars, name)) for name in ("basis", "A", "b", "lower", "upper"))
    features = int(np.prod(basis.shape[2:]))
    if features != sizes[0][0]:
        raise ShapeError(f"stars of {sizes[0][0]} features needed by the networks, got {features}")
    if not all(np.isfinite(value).all() for value in (basis, A, lower, upper)) or np.isnan(b).any():
        raise InvalidSetError("stars with finite basis, constraints and bounds needed, got NaN or infinity")
    return basis, A, b, lower, upper
