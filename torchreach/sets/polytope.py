"""Facet-vertex batch: polytopes as vertices and their incidence with facets.

    P = conv{v_1 .. v_K},  bit f of incidence[k] is set iff vertex k lies on facet f.

A hyperplane cuts P without any linear program: the vertices of one side stay, and one vertex is added on
every edge that crosses. Two vertices share an edge only if they share at least M - 1 facets; pairs that
share as many without being an edge give points inside the cut, which are harmless.

Vertices within `tolerance` of the hyperplane lie on it and belong to both sides. Then no edge joins the
strictly positive to the strictly negative vertices without a vertex on the cut, so coning every face from
such a vertex triangulates P into simplices of one side each: the two children cover P exactly, and no
point of a child violates its side by more than `tolerance`. Both facts are used for certified slack.

Reference: Yang, Johnson, Tran, Yamaguchi, Hoxha, Prokhorov: Reachability analysis of deep ReLU neural
networks using facet-vertex incidence, HSCC 2021.

Axis letters: S polytopes, K vertex slots, M dimension, F facets (bits), W words
of bits, E crossing edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

# Bits used of each int64 word: the sign bit stays clear.
BITS = 62
# Children are grouped into batches whose vertex counts round up to the same multiple of this.
SLOTS = 16


@dataclass(frozen=True)
class PolytopeBatch:
    """S polytopes in [-1, 1]^M, padded to K vertex slots.

    Attributes:
        vertices: [S, K, 1 + M] homogeneous coordinates (column 0 is 1), so that an affine map [1 + M, N]
            applies as a matrix product. Unused slots repeat the first vertex.
        count: [S] number of vertices in use.
        incidence: [S, K, W] int64, one bit per facet; unused slots are zero. Facets are numbered per
            polytope, and the number of a facet that no vertex touches is used again.
        facets: [S, F, 1 + M] half-spaces h . (1, a) >= 0 by facet number, zero where there is none; or None
            when they are not wanted. Numbers out of use keep half-spaces that still hold.
    """

    vertices: Tensor
    count: Tensor
    incidence: Tensor
    facets: Tensor | None

    @staticmethod
    def from_cube(size: int, dim: int, *, facets: bool, dtype: torch.dtype, device: torch.device) -> PolytopeBatch:
        """`size` copies of the cube [-1, 1]^dim."""
        corners = 1 << dim
        high = (torch.arange(corners, device=device)[:, None] >> torch.arange(dim, device=device)) & 1
        vertices = torch.cat((torch.ones(corners, 1, device=device), 2.0 * high - 1), 1).to(dtype)
        touched = torch.cat((high, 1 - high), 1)  # facet m is a_m <= 1, facet dim + m is a_m >= -1
        words = [(part << torch.arange(part.shape[1], device=device)).sum(1) for part in touched.split(BITS, 1)] or [
            torch.zeros(corners, dtype=torch.long, device=device)
        ]
        planes = None
        if facets:
            eye = torch.eye(dim, dtype=dtype, device=device)
            planes = torch.cat((torch.ones(2 * dim, 1, dtype=dtype, device=device), torch.cat((-eye, eye))), 1)
            planes = planes.expand(size, -1, -1)
        return PolytopeBatch(
            vertices.expand(size, -1, -1),
            torch.full((size,), corners, device=device),
            torch.stack(words, 1).expand(size, -1, -1),
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

    def cut(
        self, values: Tensor, plane: Tensor | None, tolerance: Tensor | float
    ) -> list[tuple[PolytopeBatch, Tensor]]:
        """Both sides of a hyperplane each, grouped by number of vertices.

        Args:
            values: [S, K] value of the hyperplane's function at each vertex slot.
            plane: [S, 1 + M] its coefficients (needed only when facets are kept).
            tolerance: vertices with |value| <= tolerance lie on the hyperplane; a number or [S, 1].

        Returns: list of (children, child), child [S'] holding s for the side >= 0 of polytope s and S + s
            for the side <= 0. A side without vertices is left out.
        """
        size, slots = values.shape
        device = values.device
        words = self.incidence.shape[2]
        used = torch.arange(slots, device=device) < self.count[:, None]
        above = (values > tolerance) & used
        below = (values < -tolerance) & used
        vertices, incidence = self.vertices.flatten(0, 1), self.incidence.flatten(0, 1)

        i, j, shared = _edges(above, below, incidence, self.dim)
        star = i.div(slots, rounding_mode="floor")
        value_i, value_j = values.flatten()[i], values.flatten()[j]
        vertex_i = vertices[i]
        crossing = vertex_i + (value_i / (value_i - value_j))[:, None] * (vertices[j] - vertex_i)

        # Members of the 2 S children: kept vertices first, then the new ones; both lists are sorted by child.
        keep = torch.stack((used & ~below, used & ~above))  # [2, S, K]
        kept = keep.sum(2).flatten()
        fresh = torch.bincount(star, minlength=size)
        count = kept + fresh.repeat(2)
        room = (count + SLOTS - 1).div(SLOTS, rounding_mode="floor") * SLOTS
        order = room.argsort()
        base = torch.empty_like(room)
        base[order] = room[order].cumsum(0) - room[order]

        # Where each slot of the children takes its vertex from: parents' slots, then the new vertices.
        kept_at = keep.flatten().nonzero()[:, 0]
        child = kept_at.div(slots, rounding_mode="floor")
        rank = keep.cumsum(2).flatten()[kept_at] - 1
        new_rank = torch.arange(len(star), device=device) - (fresh.cumsum(0) - fresh)[star]
        total = int(room.sum())
        source = torch.empty(total, dtype=torch.long, device=device)
        source[base[child] + rank] = kept_at % (size * slots)
        for side in (star, star + size):
            source[base[side] + kept[side] + new_rank] = size * slots + torch.arange(len(star), device=device)
        owner = order.repeat_interleave(room[order], output_size=total)
        spare = torch.arange(total, device=device) - base[owner] >= count[owner]
        source = torch.where(spare, source[base[owner]], source)

        # The new facet takes the lowest number that no vertex of the child touches; new vertices lie on
        # facets of kept ones only.
        touched = _any_bits(torch.where(keep[..., None], self.incidence, 0).flatten(0, 1))  # [2 S, W]
        bit = _lowest_free(touched)
        if bit.shape[1] > words:
            incidence, shared = (pad(part, (0, 1)) for part in (incidence, shared))
        on_cut = torch.cat(((used & ~above & ~below).flatten(), torch.ones_like(star, dtype=torch.bool)))
        bits = torch.cat((incidence, shared))[source]
        bits = bits | torch.where(on_cut[source, None], bit[owner], 0)
        bits = torch.where(spare[:, None], 0, bits)
        points = torch.cat((vertices, crossing))[source]

        children: list[tuple[PolytopeBatch, Tensor]] = []
        sizes, numbers = room[order].unique_consecutive(return_counts=True)
        start = first = 0
        for k, number in zip(sizes.tolist(), numbers.tolist(), strict=True):
            members = order[first : first + number]
            stop = start + k * number
            if k:
                children.append(
                    (
                        PolytopeBatch(
                            points[start:stop].view(number, k, -1),
                            count[members],
                            bits[start:stop].view(number, k, -1),
                            self._with_facet(members, bit, plane),
                        ),
                        members,
                    )
                )
            start, first = stop, first + number
        return children

    def _with_facet(self, child: Tensor, bit: Tensor, plane: Tensor | None) -> Tensor | None:
        """Facets of children with the cut's half-space at its number."""
        if self.facets is None:
            return None
        assert plane is not None
        parent = child % len(self)
        sign = torch.where(child < len(self), 1.0, -1.0).to(plane.dtype)
        word = (bit[child] != 0).to(torch.uint8).argmax(1)
        # a power of two below 2^62 is exact in float64
        number = bit[child].amax(1).double().log2().long() + BITS * word
        missing = int(number.max()) + 1 - self.facets.shape[1]
        facets = self.facets[parent]
        if missing > 0:
            facets = pad(facets, (0, 0, 0, missing))
        facets[torch.arange(len(child), device=child.device), number] = sign[:, None] * plane[parent]
        return facets


def _edges(above: Tensor, below: Tensor, incidence: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (i above, j below) of flat vertex slots that share M - 1 facets, and the facets they share."""
    slots = above.shape[1]
    up, down = above.flatten().nonzero()[:, 0], below.flatten().nonzero()[:, 0]
    downs = below.sum(1)
    star = up.div(slots, rounding_mode="floor")
    repeats = downs[star]
    ends = repeats.cumsum(0)
    total = int(repeats.sum())
    # pair number -> its vertex below: the stars' lists of vertices below follow each other in `down`
    partner = ((downs.cumsum(0) - downs)[star] - (ends - repeats)).repeat_interleave(repeats, output_size=total)
    partner += torch.arange(total, device=above.device)
    shared = incidence[up].repeat_interleave(repeats, dim=0, output_size=total)
    shared &= incidence[down].index_select(0, partner)
    edge = _has_bits(shared, dim - 1).nonzero()[:, 0]
    return up[torch.searchsorted(ends, edge, right=True)], down[partner[edge]], shared[edge]


def _has_bits(words: Tensor, number: int) -> Tensor:
    """Whether at least `number` bits are set in each row of [E, W]."""
    if number <= 0:
        return torch.ones(len(words), dtype=torch.bool, device=words.device)
    parts = [part.clone() for part in words.unbind(1)]
    for _ in range(number - 1):  # clear the lowest set bit, of the first word that has one
        if len(parts) == 1:
            parts[0] &= parts[0] - 1
            continue
        pending = torch.ones_like(parts[0], dtype=torch.bool)
        for w, part in enumerate(parts):
            parts[w] = torch.where(pending, part & (part - 1), part)
            pending = pending & (part == 0)
    left = parts[0]
    for part in parts[1:]:
        left = left | part
    return left != 0


def _any_bits(words: Tensor) -> Tensor:
    """Bitwise or over the slots of [S, K, W]: [S, W]."""
    while words.shape[1] > 1:
        half = words.shape[1] // 2
        joined = words[:, :half] | words[:, half : 2 * half]
        words = torch.cat((joined, words[:, 2 * half :]), 1) if words.shape[1] % 2 else joined
    return words[:, 0]


def _lowest_free(touched: Tensor) -> Tensor:
    """The lowest bit clear in each row of [S, W]; one word more where a row has none."""
    free = ~touched & ((1 << BITS) - 1)
    lowest = free & -free
    # only the first word with a free bit counts
    earlier = (lowest != 0).cumsum(1) > 1
    lowest = torch.where(earlier, 0, lowest)
    if bool((lowest == 0).all(1).any()):
        extra = (lowest == 0).all(1).long()
        return torch.cat((lowest, extra[:, None]), 1)
    return lowest


def merge(batches: list[PolytopeBatch]) -> PolytopeBatch:
    """One batch of several; all must have the same number of vertex slots and the same dimension."""
    if len(batches) == 1:
        return batches[0]
    words = max(b.incidence.shape[2] for b in batches)
    facets = None
    if batches[0].facets is not None:
        numbers = max(b.facets.shape[1] for b in batches if b.facets is not None)
        facets = torch.cat(
            [pad(b.facets, (0, 0, 0, numbers - b.facets.shape[1])) for b in batches if b.facets is not None]
        )
    return PolytopeBatch(
        torch.cat([b.vertices for b in batches]),
        torch.cat([b.count for b in batches]),
        torch.cat([pad(b.incidence, (0, words - b.incidence.shape[2])) for b in batches]),
        facets,
    )
