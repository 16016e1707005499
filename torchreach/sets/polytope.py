"""Facet-vertex batch: polytopes as vertices and their incidence with facets.

    P = conv{v_1 .. v_K},  incidence[k, f] = 1 iff vertex k lies on facet f.

A hyperplane cuts P without any linear program: the vertices of one side stay, and one vertex is added on
every edge that crosses. Two vertices share an edge only if they share at least M - 1 facets; pairs that
share as many without being an edge give points inside the cut, which are harmless.

Vertices within `tolerance` of the hyperplane lie on it and belong to both sides. Then no edge joins the
strictly positive to the strictly negative vertices without a vertex on the cut, so coning every face from
such a vertex triangulates P into simplices of one side each: the two children cover P exactly, and no
point of a child violates its side by more than `tolerance`. Both facts are used for certified slack.

Reference: Yang, Johnson, Tran, Yamaguchi, Hoxha, Prokhorov: Reachability analysis of deep ReLU neural
networks using facet-vertex incidence, HSCC 2021.

Axis letters: S polytopes, K vertex slots, M dimension, F facet slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Incidence products are small whole numbers: exact in float32, which has the fastest matrix product.
INCIDENCE_DTYPE = torch.float32
# Children are grouped into batches whose vertex counts round up to the same multiple of this.
SLOTS = 8


@dataclass(frozen=True)
class PolytopeBatch:
    """S polytopes in [-1, 1]^M, padded to K vertex slots.

    Attributes:
        vertices: [S, K, 1 + M] homogeneous coordinates (column 0 is 1), so that an affine map [1 + M, N]
            applies as a matrix product. Unused slots repeat the first vertex.
        count: [S] number of vertices in use.
        incidence: [S, K, F] zero or one; column 0 is one for every vertex in use, unused slots are zero.
        facets: [S, F, 1 + M] half-spaces h . (1, a) >= 0, or None when they are not wanted. Column 0 is 0.
    """

    vertices: Tensor
    count: Tensor
    incidence: Tensor
    facets: Tensor | None

    @staticmethod
    def from_cube(size: int, dim: int, *, facets: bool, dtype: torch.dtype, device: torch.device) -> PolytopeBatch:
        """`size` copies of the cube [-1, 1]^dim."""
        corners = 1 << dim
        bits = (torch.arange(corners, device=device)[:, None] >> torch.arange(dim, device=device)) & 1
        vertices = torch.cat((torch.ones(corners, 1, device=device), 2.0 * bits - 1), 1).to(dtype)
        incidence = torch.cat((torch.ones(corners, 1, device=device), 1.0 * bits, 1.0 - bits), 1)
        planes = None
        if facets:
            eye = torch.eye(dim, dtype=dtype, device=device)
            normals = torch.cat((torch.zeros(1, dim, dtype=dtype, device=device), -eye, eye))
            offsets = torch.ones(2 * dim + 1, 1, dtype=dtype, device=device)
            offsets[0] = 0
            planes = torch.cat((offsets, normals), 1).expand(size, -1, -1)
        return PolytopeBatch(
            vertices.expand(size, -1, -1),
            torch.full((size,), corners, device=device),
            incidence.to(INCIDENCE_DTYPE).expand(size, -1, -1),
            planes,
        )

    @property
    def dim(self) -> int:
        return self.vertices.shape[2] - 1

    def __len__(self) -> int:
        return self.vertices.shape[0]

    def select(self, index: Tensor | slice) -> PolytopeBatch:
        """The polytopes at `index` (long, or a boolean mask)."""
        facets = None if self.facets is None else self.facets[index]
        return PolytopeBatch(self.vertices[index], self.count[index], self.incidence[index], facets)

    def cut(self, values: Tensor, plane: Tensor | None, tolerance: float) -> list[tuple[PolytopeBatch, Tensor]]:
        """Both sides of a hyperplane each, grouped by number of vertices.

        Args:
            values: [S, K] value of the hyperplane's function at each vertex slot.
            plane: [S, 1 + M] its coefficients (needed only when facets are kept).
            tolerance: vertices with |value| <= tolerance lie on the hyperplane.

        Returns: list of (children, child), child [S'] holding s for the side >= 0 of polytope s and S + s
            for the side <= 0. A side without vertices is left out.
        """
        size, slots = values.shape
        device = values.device
        used = torch.arange(slots, device=device) < self.count[:, None]
        above = (values > tolerance) & used
        below = (values < -tolerance) & used

        # Column 0 of the incidence adds one to every product of vertices in use.
        shared = (self.incidence * above[:, :, None]) @ (self.incidence * below[:, :, None]).transpose(1, 2)
        star, i, j = (shared >= self.dim).nonzero(as_tuple=True)
        value_i, value_j = values[star, i], values[star, j]
        vertex_i = self.vertices[star, i]
        crossing = vertex_i + (value_i / (value_i - value_j))[:, None] * (self.vertices[star, j] - vertex_i)
        crossing_incidence = self.incidence[star, i] * self.incidence[star, j]

        # Members of the 2 S children: kept vertices first, then the new ones; both lists are sorted by child.
        keep = torch.cat((used & ~below, used & ~above))
        kept_count = keep.sum(1)
        new_count = torch.bincount(star, minlength=size).repeat(2)
        count = kept_count + new_count
        kept_child, kept_slot = keep.nonzero(as_tuple=True)
        kept_rank = (keep.cumsum(1) - 1)[kept_child, kept_slot]
        first_new = new_count[:size].cumsum(0) - new_count[:size]
        new_rank = torch.arange(len(star), device=device) - first_new[star]
        kept_star = torch.where(kept_child < size, kept_child, kept_child - size)
        on = (used & ~above & ~below)[kept_star, kept_slot]

        children: list[tuple[PolytopeBatch, Tensor]] = []
        groups = (count + SLOTS - 1) // SLOTS
        for group in groups.unique().tolist():
            if group == 0:
                continue
            members = (groups == group).nonzero().flatten()
            row = torch.full((2 * size,), -1, device=device)
            row[members] = torch.arange(len(members), device=device)
            k = group * SLOTS
            vertices = self.vertices.new_empty(len(members), k, self.dim + 1)
            incidence = self.incidence.new_zeros(len(members), k, self.incidence.shape[2] + 1)
            mine = (row[kept_child] >= 0).nonzero().flatten()
            r, rank, s, slot = row[kept_child[mine]], kept_rank[mine], kept_star[mine], kept_slot[mine]
            vertices[r, rank] = self.vertices[s, slot]
            incidence[r, rank, :-1] = self.incidence[s, slot]
            incidence[r, rank, -1] = on[mine].to(incidence.dtype)
            for side in (0, size):
                target = row[star + side]
                mine = (target >= 0).nonzero().flatten()
                r, rank = target[mine], kept_count[star[mine] + side] + new_rank[mine]
                vertices[r, rank] = crossing[mine]
                incidence[r, rank, :-1] = crossing_incidence[mine]
                incidence[r, rank, -1] = 1
            filled = torch.arange(k, device=device) < count[members, None]
            vertices = torch.where(filled[:, :, None], vertices, vertices[:, :1])
            facets = None
            if self.facets is not None:
                assert plane is not None
                sign = torch.where(members < size, 1.0, -1.0).to(plane.dtype)
                parent = members % size
                facets = torch.cat((self.facets[parent], (sign[:, None] * plane[parent])[:, None]), 1)
            children.append((_compact(PolytopeBatch(vertices, count[members], incidence, facets)), members))
        return children


def _compact(batch: PolytopeBatch) -> PolytopeBatch:
    """Renumber facets so that slots which no vertex touches can be dropped (done when it saves a quarter)."""
    slots = batch.incidence.shape[2]
    if slots % 4:
        return batch
    touched = batch.incidence.amax(1)
    needed = int(touched.sum(1).max())
    if needed > slots * 3 // 4:
        return batch
    touched[:, 0] = 2  # column 0 stays first
    order = touched.argsort(dim=1, descending=True, stable=True)[:, :needed]
    incidence = batch.incidence.gather(2, order[:, None, :].expand(-1, batch.incidence.shape[1], -1))
    facets = batch.facets
    if facets is not None:
        facets = facets.gather(1, order[:, :, None].expand(-1, -1, facets.shape[2]))
        # Slots beyond a star's own facets repeat other facets that no longer touch it: valid half-spaces.
    return PolytopeBatch(batch.vertices, batch.count, incidence, facets)


def merge(batches: list[PolytopeBatch]) -> PolytopeBatch:
    """One batch of several; all must have the same number of vertex slots and the same dimension."""
    if len(batches) == 1:
        return batches[0]
    width = max(b.incidence.shape[2] for b in batches)
    facets = None
    if batches[0].facets is not None:
        facets = torch.cat([_widen(b.facets, 1, width) for b in batches if b.facets is not None])
    return PolytopeBatch(
        torch.cat([b.vertices for b in batches]),
        torch.cat([b.count for b in batches]),
        torch.cat([_widen(b.incidence, 2, width) for b in batches]),
        facets,
    )


def _widen(tensor: Tensor, dim: int, width: int) -> Tensor:
    missing = width - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat((tensor, tensor.new_zeros(shape)), dim)
