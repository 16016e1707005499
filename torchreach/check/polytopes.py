"""Simple polytopes by their vertices, cut by hyperplanes in general position.

Each vertex lies on exactly M facets, and leaving one of them leads along an edge to one other vertex. {w >= 0} cuts off
the vertices with w < 0 and adds one where an edge crosses w = 0, on the edge's M - 1 facets and the new one. Two new vertices
are neighbours if they lie on one two-dimensional face, that is if they share M - 2 of the old facets: such a face is cut
in exactly two of its edges, which is checked. So the list is that of all vertices of the exact polytope as long as every
sign is certain; a hyperplane that comes too near to a vertex is moved outward first, which only adds points.

err bounds how far each computed vertex x is from the exact one, in every coordinate. With the facets' planes G x + c = 0 and
R close to the inverse of G, the exact one is x - (I - E)^-1 R (G x + c), E = I - R G; and both lie in the box.

Axis letters: B polytopes, T vertices of all of them, M variables, K most vertices of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torchreach.check.forms import UNIT, Form, Refused, gamma

FACETS = 1024  # names of facets: 2 M of the box, then one for each cut
MOST = 8  # variables


@dataclass(eq=False)
class Polytopes:
    """x [T, M], err [T]; facets, near [T, M]: the facets of a vertex, and which vertex comes when it leaves each.

    planes: [T, M, 1 + M] of the facets, c and then the row of G, whose magnitudes add up to 1.
    start: [B + 1] where the vertices of each polytope begin. named: facets that have been named so far.
    """

    x: np.ndarray
    err: np.ndarray
    facets: np.ndarray
    near: np.ndarray
    planes: np.ndarray
    start: np.ndarray
    named: int

    @staticmethod
    def boxes(count: int, variables: int) -> Polytopes:
        """So many boxes [-1, 1]^M."""
        bits = (np.arange(2**variables)[:, None] >> np.arange(variables)) & 1
        near = np.arange(2**variables)[:, None] ^ (1 << np.arange(variables))
        start = np.arange(count + 1) * 2**variables
        x = np.tile(2.0 * bits - 1, (count, 1))
        facets = np.tile(2 * np.arange(variables) + bits, (count, 1))
        near = (near[None] + start[:-1, None, None]).reshape(-1, variables)
        planes = np.concatenate((-x[:, :, None], np.broadcast_to(np.eye(variables), (*x.shape, variables))), 2)
        return Polytopes(x, np.zeros(len(x)), facets, near, planes, start, 2 * variables)

    def __len__(self) -> int:
        return len(self.start) - 1

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.start)

    @property
    def owner(self) -> np.ndarray:
        """[T]"""
        return np.repeat(np.arange(len(self)), self.sizes)

    def take(self, index: np.ndarray) -> Polytopes:
        """Polytopes [C], in this order; some may come twice."""
        sizes = self.sizes[index]
        start = np.concatenate(([0], np.cumsum(sizes)))
        shift = np.repeat(start[:-1] - self.start[index], sizes)
        rows = np.arange(start[-1]) - shift
        near = self.near[rows] + shift[:, None]
        parts = (part[rows] for part in (self.x, self.err, self.facets))
        return Polytopes(*parts, near, self.planes[rows], start, self.named)

    @staticmethod
    def join(parts: list[Polytopes]) -> Polytopes:
        """All of them, one after the other."""
        if len(parts) == 1:
            return parts[0]
        shift = np.cumsum([0, *(len(part.x) for part in parts)])
        names = "x", "err", "facets", "planes"
        x, err, facets, planes = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
        near = np.concatenate([part.near + by for part, by in zip(parts, shift, strict=False)])
        start = np.concatenate([[0], *(part.start[1:] + by for part, by in zip(parts, shift, strict=False))])
        return Polytopes(x, err, facets, near, planes, start, max(part.named for part in parts))

    def table(self) -> np.ndarray:
        """[B, K] vertices of each, filled up with its first."""
        most = max(int(self.sizes.max()), 1) if len(self) else 1
        at = np.arange(most)
        table = self.start[:-1, None] + np.where(at < self.sizes[:, None], at, 0)
        return np.minimum(table, max(len(self.x) - 1, 0))

    def ends(self, form: Form) -> tuple[np.ndarray, np.ndarray]:
        """Certified range [B, n] of a form over each polytope; of an empty one, (inf, -inf)."""
        variables, table = self.x.shape[1], self.table()
        linear = form.rows[:, 1 : 1 + variables]
        value = self.x[table] @ linear
        off = self.err[table].max(1)[:, None] * np.abs(linear).sum(1)
        rest = (np.abs(form.rows[:, 1 + variables :]).sum(1) + form.error + off) * (1 + gamma(form.rows.shape[1] + 2))
        middle = form.rows[:, 0]
        rest = rest + gamma(variables + 4) * (np.abs(middle) + np.abs(linear).sum(1) * 1.01)
        low, high = middle + value.min(1) - rest, middle + value.max(1) + rest
        empty = self.sizes == 0
        low[empty], high[empty] = np.inf, -np.inf
        return low, high

    def cut(self, form: Form, which: np.ndarray) -> Polytopes:
        """Both parts of the polytopes `which` [C], form [C, R, 1] <= 0 at even places and >= 0 at odd ones; [2 C].

        Only the predicate's part of the form may be other than its error. Raises Refused where signs stay in doubt.
        """
        part = self.take(np.repeat(which, 2))
        variables = self.x.shape[1]
        if np.any(form.rows[:, 1 + variables :]):
            raise Refused("a split of a neuron that depends on relaxed ones")
        side = np.where(np.arange(len(part)) % 2, 1.0, -1.0)
        rows, error = np.repeat(form.rows[:, : 1 + variables, 0], 2, 0) * side[:, None], np.repeat(form.error[:, 0], 2)
        owner = part.owner
        gain = rows[owner, 1:]
        w = rows[owner, 0] + (part.x * gain).sum(1)
        off = np.abs(gain).sum(1) * (part.err + gamma(variables + 4))
        off = 2 * (off + gamma(variables + 4) * np.abs(rows[owner, 0])) + 1e-300
        out = np.maximum(error, 1e-14 * np.abs(rows).sum(1)) + 1e-300
        for _ in range(60):
            doubt = np.zeros(len(part), bool)
            doubt[owner[np.abs(w + out[owner]) <= 2 * off]] = True
            if not doubt.any():
                break
            out[doubt] *= 2
        else:
            raise Refused("a cut that comes too near to a vertex")
        rows[:, 0] += out
        return part._kept(w + out[owner], rows / np.maximum(np.abs(rows[:, 1:]).sum(1), 1e-300)[:, None])

    def _kept(self, w: np.ndarray, rows: np.ndarray) -> Polytopes:
        """The parts w >= 0 [T] at the vertices, which is the plane rows [B, 1 + M]."""
        variables, keep, owner = self.x.shape[1], w > 0, self.owner
        u, j = np.nonzero(keep[:, None] & ~keep[self.near])
        v = self.near[u, j]
        x = self.x[u] + (w[u] / (w[u] - w[v]))[:, None] * (self.x[v] - self.x[u])
        planes = self.planes[u].copy()
        planes[np.arange(len(u)), j] = rows[owner[u]]
        x, err = refined(x, planes)
        facets = self.facets[u].copy()
        facets[np.arange(len(u)), j] = self.named
        if self.named >= FACETS:
            raise Refused(f"more than {FACETS} cuts one after the other")
        # The order of the parts' vertices: those kept, then the new ones.
        kept = np.flatnonzero(keep)
        order = np.argsort(np.concatenate((owner[kept], owner[u])), kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        old = np.full(len(self.x), -1)
        old[kept] = place[: len(kept)]
        new = place[len(kept) :]
        near = old[self.near[kept]]
        at = np.full(self.near.shape, -1)
        at[u, j] = new
        near = np.where(near >= 0, near, at[kept])
        near_new = np.full(facets.shape, -1)
        near_new[np.arange(len(u)), j] = old[u]
        if variables > 1 and len(u):
            row, i = np.nonzero(np.arange(variables) != j[:, None])
            rest = facets[row].copy()
            rest[np.arange(len(row)), i] = FACETS
            rest[np.arange(len(row)), j[row]] = FACETS
            rest.sort(1)
            key = np.zeros(len(row), np.int64)
            for column in range(variables - 2):
                key = key * FACETS + rest[:, column]
            ranks = np.lexsort((key, owner[u[row]]))
            a, b = ranks[0::2], ranks[1::2]
            same = len(ranks) % 2 == 0
            same = same and bool(((key[a] == key[b]) & (owner[u[row[a]]] == owner[u[row[b]]])).all())
            nexts = (key[a[1:]] != key[a[:-1]]) | (owner[u[row[a[1:]]]] != owner[u[row[a[:-1]]]]) if same else np.zeros(1)
            if not same or not nexts.all():
                raise Refused("a two-dimensional face that a cut meets in more than two edges")
            near_new[row[a], i[a]], near_new[row[b], i[b]] = new[row[b]], new[row[a]]
        sizes = np.bincount(owner[kept], minlength=len(self)) + np.bincount(owner[u], minlength=len(self))
        start = np.concatenate(([0], np.cumsum(sizes)))
        pairs = (self.x, x), (self.err, err), (self.facets, facets)
        parts = [np.concatenate((before[kept], added))[order] for before, added in pairs]
        parts += [np.concatenate((near, near_new))[order], np.concatenate((self.planes[kept], planes))[order]]
        return Polytopes(*parts, start, self.named + 1)


def refined(x: np.ndarray, planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points [T, M] on M planes [T, M, 1 + M] each, from points nearby, and how far they may be off [T]."""
    count, variables = x.shape
    c, G = planes[:, :, 0], planes[:, :, 1:]
    try:
        R = np.linalg.inv(G)
    except np.linalg.LinAlgError:  # one is singular: none is refined
        return x, np.full(count, 2.0)
    with np.errstate(all="ignore"):
        x = np.clip(x - (R @ (c + (G @ x[:, :, None])[:, :, 0])[:, :, None])[:, :, 0], -1, 1)
        left = np.abs(c + (G @ x[:, :, None])[:, :, 0]).max(1) + gamma(variables + 4) * (np.abs(c).max(1) + 1)
        size = np.abs(R).sum(2).max(1)
        wrong = np.abs(np.eye(variables) - R @ G).sum(2).max(1) + gamma(variables + 4) * (1 + size)
        err = size * left / (1 - wrong) * (1 + gamma(variables + 8))
    err = np.where((wrong < 0.5) & np.isfinite(err) & np.isfinite(x).all(1), np.minimum(err, 2.0), 2.0)
    return np.nan_to_num(x), err
