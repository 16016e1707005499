"""A plane above a sum of ReLUs that sees their inputs together: for many inputs, where no neuron alone can tell.

Over a box of n inputs |x_k| <= 1 a sum of m neurons' sum_i w_i |v_i(x)|, v_i = c_i + A_i x, w_i >= 0, is far below
sum_i w_i max |v_i|: the inputs that make one v_i large make others small. For any kappa_i, p_k > 0

    w |v| <= w v^2 / (2 kappa) + w kappa / 2,        sum_i (w_i / (2 kappa_i)) (A_i x)^2 <= lambda sum_k p_k,

lambda the largest eigenvalue of B B^T, B_ik = sqrt(w_i / (2 kappa_i)) A_ik / sqrt(p_k). With the best kappa and p it
is the dual of the semidefinite relaxation, at most pi/2 times the maximum where c = 0; bounds of single neurons are
loose by the order of sqrt(n). Here v is z of a ReLU, relu(z) = (z + |z|) / 2, or the difference d of two, as relu(z) -
relu(z - d) lies between 0 and d. Each neuron takes it where it is lower, at the middle, than its closed-form plane.

Method: kappa and p from a low-rank power iteration on the semidefinite program; lambda is certified by the residual of
    a computed eigendecomposition.
References: Nesterov: Semidefinite relaxation and nonconvex quadratic optimization, 1998; Burer, Monteiro: A nonlinear
    programming algorithm for solving semidefinite programs via low-rank factorization, Math. Prog. 2003; of networks:
    Raghunathan, Steinhardt, Liang: Semidefinite relaxations for certifying robustness, NeurIPS 2018.

Axis letters: B boxes, R rows, F neurons that are undecided, n inputs that vary, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from torchreach.core.clock import Clock
from torchreach.core.memory import batch_size
from torchreach.core.roundoff import allowance, gamma
from torchreach.domains.hexagon import ClosedPlanes, Hexagon
from torchreach.domains.pair import Pair

RANK, ROUNDS = 6, 8
MANY = 16  # inputs that vary, from which on it is worth it
# Products of numbers that bounding the rows of a layer may take: half a minute. Numbers in one intermediate tensor.
WORK, NUMBERS = {"cpu": 2**36, "cuda": 2**40}, {"cpu": 2**21, "cuda": 2**25}
TINY = 1e-150
Planes = tuple[Tensor, Tensor, Tensor]  # slopes p, q and summed heights


class Work(Protocol):
    """Of `difference.Backward`: a pass backward over boxes whose first hidden layers are known."""

    pair: Pair
    lower: Tensor
    middle: Tensor
    radius: Tensor
    hexagons: list[Hexagon]
    errors: list[tuple[Tensor, Tensor]]
    on: list[Tensor]
    free: list[Tensor]
    curves: list[Any]
    stairs: dict[int, Any]
    off: Tensor | None

    def best(self, k: int, alpha: Tensor, beta: Tensor) -> Planes: ...
    def bound(self, alpha: Tensor, beta: Tensor, rule: Callable[..., Planes]) -> tuple[Tensor, Tensor]: ...


def above(work: Work, W: Tensor, V: Tensor, D: Tensor, clock: Clock) -> Tensor:
    """[B, 6, C] `Backward.bound` of rows z, z2, d and -z, -z2, -d [C, N] of a layer on what the last one added gives.

    Infinite for z2, which z and d bound, where it is not worth it, and for rows whose turn comes when `clock` is over.
    """
    size, count = len(work.lower), len(W)
    result = torch.full((size, 6, count), torch.inf, dtype=W.dtype, device=W.device)
    if not _worth_it(work, 2 * count):
        return result
    none = torch.zeros_like(V)
    for place, alpha, beta, on_d in ((0, W, none, False), (2, D, V, True)):

        def rule(k: int, a: Tensor, b: Tensor, on_d: bool = on_d) -> Planes:
            return work.best(k, a, b) if k else _together(work, a, b, clock, on_d=on_d)

        found = work.bound(torch.cat((alpha, -alpha))[None], torch.cat((beta, -beta))[None], rule)[0]
        result[:, place], result[:, place + 3] = found.expand(size, -1).chunk(2, 1)
    return result


def _worth_it(work: Work, rows: int) -> bool:
    """Whether so many rows through the first hidden layer gain from it, and not at too high a price."""
    vary, free = int((work.radius > 0).any(0).sum()), len(work.free[0]) if work.free else 0
    if vary < MANY or free < 2 or work.off is not None or work.stairs or work.curves[0]:
        return False
    if work.pair.db[0].ndim > 1:  # biases of each box
        return False
    return len(work.lower) * rows * free**2 * (vary + 16 * free) <= batch_size(WORK, work.lower.device)


def _together(work: Work, alpha: Tensor, beta: Tensor, clock: Clock, *, on_d: bool) -> Planes:
    """Slopes p, q [B, R, N] and heights [B, R] of planes above alpha a + beta e [1 or B, R, N]."""
    hexagon, free = work.hexagons[0], work.free[0]
    terms, shape = alpha.shape[-1] + 8 * work.pair.depth, (len(hexagon.l1), *alpha.shape[1:])
    p, q = (part.expand(shape) for part in hexagon.linear(alpha, beta))
    raised = 2 * gamma(terms) * (p.abs() @ hexagon.sizes()[0][:, :, None])[..., 0]
    own = hexagon.map(lambda part: part[:, free])
    forms = _forms(work, free, on_d)
    parts = []
    half = shape[1] // 2 if on_d else shape[1]
    size = max(batch_size(NUMBERS, free.device) // max(shape[0] * forms[1].shape[1] * forms[1].shape[2], 1), 1)
    for some in torch.arange(half, device=free.device).split(size):
        both = torch.cat((some, some + half)) if on_d else some
        if clock.over:  # any slopes will do
            none = p.new_zeros(shape[0], len(both), len(free))
            parts.append((none, none, p.new_full(none.shape[:2], torch.inf)))
            continue
        mine, other = (part[:, both][..., free].expand(shape[0], -1, -1) for part in (alpha, beta))
        parts.append(_planes(own, forms, mine, other, terms, on_d))
    if on_d:  # each part has rows and then their negatives
        parts = [tuple(value.chunk(2, 1)[sign] for value in part) for sign in (0, 1) for part in parts]
    new_p, new_q, heights = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    index = free.expand(*shape[:2], -1)
    return p.scatter(2, index, new_p), q.scatter(2, index, new_q), raised + heights


def _forms(work: Work, free: Tensor, on_d: bool) -> tuple[Tensor, Tensor, Tensor]:
    """v = c + A x over |x| <= 1 of the neurons `free`: c [B, F], A [B, F, n], and how far [B, F] v may be from it."""
    neurons = work.on[0][free]
    W, _, D = work.pair.maps[0].rows(neurons)
    vary = (work.radius > 0).any(0).nonzero().flatten()
    rows, bias = (D, work.pair.db[0][neurons]) if on_d else (W, work.pair.b[0][neurons])
    # The same products that `Pair.error` allows for, in another order.
    off = 2 * work.errors[0][1 if on_d else 0][:, free]
    return work.middle @ rows.mT + bias, rows[:, vary] * work.radius[:, None, vary], off


def _planes(
    hexagon: Hexagon, forms: tuple[Tensor, Tensor, Tensor], alpha: Tensor, beta: Tensor, terms: int, on_d: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes [B, R, F] and summed heights [B, R] of the neurons F alone."""
    c, A, off = (part[:, None] for part in forms)  # [B, 1, F], [B, 1, F, n]
    closed = ClosedPlanes.of(hexagon)
    weight = beta.abs() if on_d else alpha.clamp(min=0)
    rest = (alpha, torch.zeros_like(beta)) if on_d else (alpha - weight, beta)
    p1, q1, r1 = closed.above(alpha, beta, terms)
    p0, q0, r0 = closed.above(*rest, terms)
    linear = (beta if on_d else weight) / 2  # on v
    # Of paired rows the weights are equal: one half tells.
    pairs = 2 if on_d else 1
    size = _sizes(c, A, weight.chunk(pairs, 1)[0])[0].repeat(1, pairs, 1)
    z, d = (hexagon.l1 + hexagon.u1)[:, None] / 2, (hexagon.dl + hexagon.du)[:, None] / 2
    alone, joint = p1 * z + q1 * d + r1, p0 * z + q0 * d + r0 + linear * c + weight * size / 2
    together = joint < alone
    if on_d:  # both of a pair, or neither
        together = (alone - joint).reshape(len(alone), 2, -1, alone.shape[2]).sum(1).repeat(1, 2, 1) > 0
    weight = torch.where(together, weight, 0.0)
    own = weight.chunk(pairs, 1)[0]
    kappa, stretch = _sizes(c, A, own)
    omega = torch.where(own > 0, own / (4 * kappa), 0.0)
    spread = _spread(A, omega, stretch)
    constant = torch.where(own > 0, own**2 / (16 * omega.clamp(min=TINY)), 0.0)  # own kappa / 4, of the rounded omega
    omega, constant, spread = omega.repeat(1, pairs, 1), constant.repeat(1, pairs, 1), spread.repeat(1, pairs)
    linear = torch.where(together, linear, 0.0) + 2 * omega * c
    # What the slopes and the heights lose to rounding, and how far v is from its form.
    extent = hexagon.sizes()[1 if on_d else 0][:, None]
    steep = weight / 2 + 2 * omega * c.abs()
    lost = steep * (off + 2 * gamma(terms) * (extent + c.abs())) + 2 * gamma(terms) * (constant + omega * c**2)
    p, q, r = (torch.where(together, b, a) for a, b in ((p1, p0), (q1, q0), (r1, r0)))
    p, q = (p, q + linear) if on_d else (p + linear, q)
    return p, q, (r + constant - omega * c**2 + lost).sum(2) + spread


def _sizes(c: Tensor, A: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """kappa [B, R, F] and p [B, R, n]: sizes of v, and shares of the inputs, at the best correlations of the inputs.

    Maximises sum_i w_i |(c_i, A_i T)| over rows of T [n, r] of length 1, which never decreases.
    """
    n = A.shape[3]
    start = torch.arange(n * RANK, dtype=A.dtype, device=A.device).view(n, RANK)
    T = torch.cos(2.4 * start + 0.1 * start**2).expand(len(A), weight.shape[1], -1, -1)
    kappa = share = None
    for _ in range(ROUNDS):
        T = T / T.norm(dim=3, keepdim=True).clamp(min=TINY)
        V = A @ T
        kappa = (V.square().sum(3) + c**2).sqrt().clamp(min=TINY)
        T = A.mT @ (V * (weight / kappa)[..., None])
        share = T.norm(dim=3)
    assert kappa is not None
    assert share is not None
    # Inputs that hardly matter keep a share: it costs little, and without one lambda would be large.
    return kappa, (share + 1e-3 * share.mean(2, keepdim=True)).clamp(min=TINY)


def _spread(A: Tensor, omega: Tensor, stretch: Tensor) -> Tensor:
    """[B, R] above sum_i omega_i (A_i x)^2 over |x| <= 1; infinite where no eigenvalues were to be had."""
    F, n = A.shape[2:]
    # Entries are off by less than 8 u of themselves.
    scaled = omega.sqrt()[..., None] * A * stretch.rsqrt()[:, :, None]
    gram = scaled @ scaled.mT
    total = gram.diagonal(dim1=2, dim2=3).sum(2)
    try:
        top, V = torch.linalg.eigh(gram)
    except RuntimeError:  # no convergence
        return torch.full_like(total, torch.inf)
    largest = top.abs().amax(2)
    eye = torch.eye(F, dtype=A.dtype, device=A.device)
    apart = (gram - (V * top[:, :, None]) @ V.mT).flatten(2).norm(dim=2)
    askew = (V.mT @ V - eye).flatten(2).norm(dim=2)
    # gram = V top V^T + apart, and V^T V = 1 + askew; what these products and norms lose is below the last terms.
    rounding = 8 * gamma(n + F) * (total + F * largest)
    value = largest * (1 + askew + 8 * gamma(F) * F) + apart * (1 + gamma(F * F)) + rounding
    value = (value.sqrt() + allowance(total.sqrt(), 16)).square()
    return value * stretch.sum(2) * (1 + 4 * gamma(n))
