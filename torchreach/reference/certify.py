"""Checks a `Discrepancy`, claim by claim, against the mixed-integer model of the same networks and stars.

Property: finds every claim of a discrepancy that is wrong by more than the tolerance.
Requirement: small networks, as for the mixed-integer model.

Axis letters: S stars, N outputs, M predicate variables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from torchreach.core.errors import ShapeError
from torchreach.core.results import Discrepancy, Status
from torchreach.reference.linear_programs import Array, as_array, solve_reference
from torchreach.reference.mixed_integer import (
    MixedIntegerResult,
    affine_layers,
    checked_stars,
    forward,
    mixed_integer_discrepancy,
)


@dataclass(frozen=True)
class Certification:
    """Whether a `Discrepancy` agrees with the mixed-integer model.

    Attributes:
        agrees: no deviation is above the tolerance.
        deviation: the largest deviation found, absolute; 0 where every claim holds exactly.
        where: the claim that deviates most, with its star and output.
        reference: the mixed-integer model's own result.
    """

    agrees: bool
    deviation: float
    where: str
    reference: MixedIntegerResult


def certify(
    discrepancy: Discrepancy, original: nn.Module, compressed: nn.Module, stars: Any, tolerance: float = 1e-6
) -> Certification:
    """Check every claim of a `Discrepancy` against the mixed-integer model of the same networks and stars.

    Certified bounds must enclose the model's range; where a star's status is EXACT they must also meet it,
    as must `lower` and `upper` the largest magnitude. Each witness must lie in its star and, replayed in
    float64, attain `lower`. All of it within `tolerance`, absolute: results in float32 need a wider one
    than the default.
    Exponential, for small networks only; raises what `mixed_integer_discrepancy` raises, and ShapeError if
    the discrepancy speaks of another number of stars or outputs.
    """
    reference = mixed_integer_discrepancy(original, compressed, stars)
    shape = tuple(reference.range_lower.shape)
    if tuple(discrepancy.upper.shape) != shape:
        raise ShapeError(
            f"discrepancy of {shape[0]} stars and {shape[1]} outputs needed, got shape {tuple(discrepancy.upper.shape)}"
        )
    claimed = {name: as_array(getattr(discrepancy, name)) for name in ("range_lower", "range_upper", "lower", "upper")}
    low, high, largest = (value.numpy() for value in (reference.range_lower, reference.range_upper, reference.max_abs))
    replayed, distance = _replay(discrepancy, original, compressed, stars)
    exact = np.array([status is Status.EXACT for status in discrepancy.status])[:, None]
    deviations = {
        "range_lower": _one_sided(claimed["range_lower"] - low, exact),
        "range_upper": _one_sided(high - claimed["range_upper"], exact),
        "lower": _one_sided(claimed["lower"] - largest, exact),
        "upper": _one_sided(largest - claimed["upper"], exact),
        "value at witness": _one_sided(claimed["lower"] - replayed, exact),
        "distance of witness": distance,
    }
    # A NaN claim is the worst of all.
    table = np.nan_to_num(np.stack(list(deviations.values())), nan=np.inf)
    claim, s, n = np.unravel_index(table.argmax(), table.shape)
    deviation = float(table[claim, s, n])
    where = f"{list(deviations)[claim]} of star {s}, output {n}"
    return Certification(deviation <= tolerance, deviation, where, reference)


def _one_sided(excess: Array, exact: NDArray[np.bool_]) -> Array:
    """How far a claim is unsound (excess > 0), or off on either side where it claims to be exact."""
    return np.where(exact, np.abs(excess), np.maximum(excess, 0))


def _replay(discrepancy: Discrepancy, original: nn.Module, compressed: nn.Module, stars: Any) -> tuple[Array, Array]:
    """|y1 - y2| at each witness [S, N], and the witness's distance (max norm) from its star [S, N]."""
    shape = tuple(stars.basis.shape[2:])
    networks = (affine_layers(original, shape), affine_layers(compressed, shape))
    basis, A, b, lower, upper = checked_stars(networks, stars)
    S, M = len(basis), basis.shape[1] - 1
    basis = basis.reshape(S, 1 + M, -1)
    witness = as_array(discrepancy.witness).reshape(S, -1, basis.shape[2])
    N = witness.shape[1]
    values = np.abs(forward(networks[0], witness) - forward(networks[1], witness))
    # Over (a, t): the least t with |c + V a - x| <= t.
    ones = np.ones((basis.shape[2], 1))
    distance = np.empty((S, N))
    for s in range(S):
        V = basis[s, 1:].T
        rows = np.block([[V, -ones], [-V, -ones], [A[s], np.zeros((len(A[s]), 1))]])
        for n in range(N):
            x = witness[s, n] - basis[s, 0]
            value, _ = solve_reference(
                np.append(np.zeros(M), -1.0),
                rows,
                np.concatenate((x, -x, b[s])),
                np.append(lower[s], 0.0),
                np.append(upper[s], np.inf),
            )
            distance[s, n] = -float(value)
    return values[np.arange(S)[:, None], np.arange(N), np.arange(N)], distance
