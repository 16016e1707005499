"""Simple polytopes by their vertices, cut by hyperplanes in general position.

Each vertex lies on exactly M facets, by whose names it is known; two vertices that share M - 1 of them are the ends of
an edge, and every edge has two ends, which is checked at every cut. {w >= 0} cuts off the vertices with w < 0 and adds
one where an edge crosses w = 0, on the edge's M - 1 facets and the new one. So the list is that of all vertices of the
exact polytope as long as every sign is certain; a hyperplane that comes too near to a vertex is moved outward first,
which only adds points.

err bounds how far each computed vertex x is from the exact one, in every coordinate. With the facets' planes
G x + c = 0 and R close to the inverse of G, the exact one is x - (I - E)^-1 R (G x + c), E = I - R G; and both lie in
the box.

Axis letters: B polytopes, T vertices of all of them, M variables, K most vertices of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torchreach.check.forms import Form, Refused, gamma

MOST = 8  # variables


@dataclass(eq=False)
class Polytopes:
    """x [T, M], err [T]; facets [T, M], in order; planes [T, M, 1 + M] of these, c and then the row of G, whose
    magnitudes add up to 1. sizes [B]: vertices of each polytope. named: facets that have been named so far."""

    x: np.ndarray
    err: np.ndarray
    facets: np.ndarray
    planes: np.ndarray
    sizes: np.ndarray
    named: int

    @staticmethod
    def boxes(count: int, variables: int) -> Polytopes:
        """So many boxes [-1, 1]^M."""
        bits = np.tile((np.arange(2**variables)[:, None] >> np.arange(variables)) & 1, (count, 1))
        x, eye = 2.0 * bits - 1, np.broadcast_to(np.eye(variables), (*bits.shape, variables))
        planes = np.concatenate((-x[:, :, None], eye), 2)
        sizes = np.full(count, 2**variables)
        return Polytopes(x, np.zeros(len(x)), 2 * np.arange(variables) + bits, planes, sizes, 2 * variables)

    def take(self, index: np.ndarray) -> Polytopes:
        """Polytopes [C], in this order; some may come twice."""
        sizes, start = self.sizes[index], np.cumsum(self.sizes) - self.sizes
        at = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes - start[index], sizes)
        return Polytopes(self.x[at], self.err[at], self.facets[at], self.planes[at], sizes, self.named)

    @staticmethod
    def join(parts: list[Polytopes]) -> Polytopes:
        names = "x", "err", "facets", "planes", "sizes"
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return Polytopes(**joined, named=max(part.named for part in parts))

    def ends(self, form: Form) -> tuple[np.ndarray, np.ndarray]:
        """Certified range [B, n] of a form over each polytope; of an empty one, (inf, -inf)."""
        variables, start = self.x.shape[1], np.cumsum(self.sizes) - self.sizes
        at = np.arange(max(int(self.sizes.max(initial=0)), 1))
        table = np.minimum(start[:, None] + np.where(at < self.sizes[:, None], at, 0), max(len(self.x) - 1, 0))
        linear = form.rows[:, 1 : 1 + variables]
        value, size = self.x[table] @ linear, np.abs(linear).sum(1)
        rest = np.abs(form.rows[:, 1 + variables :]).sum(1) + form.error + self.err[table].max(1)[:, None] * size
        lost = gamma(variables + 4) * (np.abs(form.rows[:, 0]) + 1.01 * size)
        rest = rest * (1 + gamma(form.rows.shape[1] + 2)) + lost
        low, high = form.rows[:, 0] + value.min(1) - rest, form.rows[:, 0] + value.max(1) + rest
        empty = (self.sizes == 0)[:, None]
        return np.where(empty, np.inf, low), np.where(empty, -np.inf, high)

    def cut(self, form: Form, which: np.ndarray) -> Polytopes:
        """Both parts of the polytopes `which` [C], form [C, R, 1] <= 0 at even places and >= 0 at odd ones; [2 C].

        Only the predicate's part of the form may be other than its error. Raises Refused where signs stay in doubt.
        """
        part, variables = self.take(np.repeat(which, 2)), self.x.shape[1]
        if np.any(form.rows[:, 1 + variables :]):
            raise Refused("a split of a neuron that depends on relaxed ones")
        owner = np.repeat(np.arange(len(part.sizes)), part.sizes)
        rows = np.repeat(form.rows[:, : 1 + variables, 0], 2, 0)
        rows[::2] *= -1
        w, gain = rows[owner, 0] + (part.x * rows[owner, 1:]).sum(1), np.abs(rows[:, 1:]).sum(1)
        share = gamma(variables + 4)
        off = 2 * (gain[owner] * (part.err + share) + share * np.abs(rows[owner, 0])) + 1e-300
        out = np.repeat(form.error[:, 0], 2) * (1 + share) + 1e-14 * np.abs(rows).sum(1) + 1e-300
        for _ in range(60):
            doubt = np.unique(owner[np.abs(w + out[owner]) <= off])
            if not len(doubt):
                rows[:, 0] += out
                return part._kept(w + out[owner], rows / np.maximum(gain, 1e-300)[:, None], owner)
            out[doubt] *= 2
        raise Refused("a cut that comes too near to a vertex")

    def _kept(self, w: np.ndarray, rows: np.ndarray, owner: np.ndarray) -> Polytopes:
        """The parts w >= 0; w [T] at the vertices, of the polytopes `owner` [T], is the plane rows [B, 1 + M]."""
        variables, names = self.x.shape[1], 2 ** (63 // max(self.x.shape[1] - 1, 2))
        if self.named >= names:
            raise Refused(f"more than {names} cuts one after the other")
        others = np.array([[i for i in range(variables) if i != j] for j in range(variables)], np.int64)
        edge = (self.facets[:, others] @ names ** np.arange(variables - 1)).reshape(-1)
        vertex, facet = np.divmod(np.arange(len(edge)), variables)
        order = np.lexsort((edge, owner[vertex]))
        u, v = order[0::2], order[1::2]
        ends = np.stack((owner[vertex[u]], edge[u]), 1)
        if (ends != np.stack((owner[vertex[v]], edge[v]), 1)).any() or (ends[1:] == ends[:-1]).all(1).any():
            raise Refused("an edge of a polytope that has not two ends")
        keep = w > 0
        crossed = keep[vertex[u]] != keep[vertex[v]]
        u, v = u[crossed], v[crossed]
        left, u, v = others[facet[u]], vertex[u], vertex[v]
        x = self.x[u] + (w[u] / (w[u] - w[v]))[:, None] * (self.x[v] - self.x[u])
        planes = np.concatenate((self.planes[u[:, None], left], rows[owner[u]][:, None]), 1)
        facets = np.concatenate((self.facets[u[:, None], left], np.full((len(u), 1), self.named)), 1)
        x, err = refined(x, planes)
        pairs = {"x": x, "err": err, "facets": facets, "planes": planes}
        places = np.argsort(np.concatenate((owner[keep], owner[u])), kind="stable")
        sizes = np.bincount(owner[keep], minlength=len(rows)) + np.bincount(owner[u], minlength=len(rows))
        joined = {name: np.concatenate((getattr(self, name)[keep], new))[places] for name, new in pairs.items()}
        return Polytopes(**joined, sizes=sizes, named=self.named + 1)


def refined(x: np.ndarray, planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points [T, M] on M planes [T, M, 1 + M] each, from points nearby, and how far they may be off [T]."""
    c, G, share = planes[:, :, 0], planes[:, :, 1:], gamma(x.shape[1] + 8)
    with np.errstate(all="ignore"):
        try:
            R = np.linalg.inv(G)
        except np.linalg.LinAlgError:  # one is singular
            R = np.full_like(G, np.inf)
        x = np.clip(np.nan_to_num(x - (R @ (c + (G @ x[:, :, None])[:, :, 0])[:, :, None])[:, :, 0], nan=0.0), -1, 1)
        left = np.abs(c + (G @ x[:, :, None])[:, :, 0]).max(1) + share * (np.abs(c).max(1) + 1)
        size = np.abs(R).sum(2).max(1)
        wrong = np.abs(np.eye(x.shape[1]) - R @ G).sum(2).max(1) + share * (1 + size)
        err = size * left / (1 - wrong) * (1 + share)
    return x, np.where(wrong < 0.5, np.minimum(err, 2.0), 2.0)
