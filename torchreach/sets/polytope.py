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
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchreach.core.roundoff import floor_log2

# Children are grouped into batches whose vertex counts round up to the same multiple of this.
SLOTS = 16
# Incidence is held in the narrowest of these that has a bit for every facet, or in several of the last.
# The sign bit stays clear.
WORDS = (torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class PolytopeBatch:
    """S polytopes in [-1, 1]^M, padded to K vertex slots.

    Attributes:
        vertices: [S, K, 1 + M] homogeneous coordinates (column 0 is 1), so that an affine map [1 + M, N]
            applies as a matrix product. Unused slots repeat the first vertex, and its incidence.
        count: [S] number of vertices in use.
        incidence: [S, K, W] integers, one bit per facet (see WORDS). Facets are numbered per polytope, and the
            number of a facet that no vertex touches is used again.
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
        word = next((word for word in WORDS if _bits(word) >= 2 * dim), WORDS[-1])
        words = [(part << torch.arange(part.shape[1], device=device)).sum(1) for part in touched.split(_bits(word), 1)]
        incidence = torch.stack(words, 1).to(word) if dim else torch.zeros(1, 1, dtype=word, device=device)
        # whole groups of slots from the start
        spare = torch.arange(max(corners, SLOTS), device=device)
        spare = torch.where(spare < corners, spare, 0)
        planes = None
        if facets:
            eye = torch.eye(dim, dtype=dtype, device=device)
            planes = torch.cat((torch.ones(2 * dim, 1, dtype=dtype, device=device), torch.cat((-eye, eye))), 1)
            planes = planes.expand(size, -1, -1)
        return PolytopeBatch(
            vertices[spare].expand(size, -1, -1),
            torch.full((size,), corners, device=device),
            incidence[spare].expand(size, -1, -1),
            planes,
        )

    @property
    def dim(self) -> int:
        return self.vertices.shape[2] - 1

    def __len__(self) -> int:
        return self.vertices.shape[0]

    def select(self, index: Tensor) -> PolytopeBatch:
        """The polytopes at `index` [S'] (long)."""
        facets = None if self.facets is None else self.facets.index_select(0, index)
        return PolytopeBatch(
            self.vertices.index_select(0, index),
            self.count.index_select(0, index),
            self.incidence.index_select(0, index),
            facets,
        )

    def split(self, size: int) -> list[PolytopeBatch]:
        """The same polytopes, at most `size` at a time."""
        facets = [None] * len(self) if self.facets is None else self.facets.split(size)
        parts = (part.split(size) for part in (self.vertices, self.count, self.incidence))
        return [PolytopeBatch(*block) for block in zip(*parts, facets, strict=False)]

    def cut(
        self, values: Tensor, plane: Tensor | None, tolerance: Tensor | float, apart: Tensor | None = None
    ) -> tuple[list[tuple[PolytopeBatch, bool]], Tensor]:
        """Both sides of a hyperplane each, grouped by number of vertices.

        Args:
            values: [S, K] value of the hyperplane's function at each vertex slot.
            plane: [S, 1 + M] its coefficients (needed only when facets are kept).
            tolerance: vertices with |value| <= tolerance lie on the hyperplane; a number or [S, 1].
            apart: [S] bool; children of polytopes where it is true go to groups of their own.

        Returns: the groups, each with its value of `apart`, and child [S'], in the order of the groups: s for
            the side >= 0 of polytope s and S + s for the side <= 0. A side without vertices is left out.
        """
        size, slots = values.shape
        device = values.device
        used = torch.arange(slots, device=device) < self.count[:, None]
        above = (values > tolerance) & used
        below = (values < -tolerance) & used

        i, j, star, shared = _edges(above, below, self.incidence, self.dim)
        vertices = self.vertices.flatten(0, 1)
        value_i, value_j = (values.flatten().index_select(0, k) for k in (i, j))
        share = value_i / (value_i - value_j)
        crossing = torch.lerp(vertices.index_select(0, i), vertices.index_select(0, j), share[:, None])

        # Each child has the vertices kept of its parent, in their order, then the new ones. Children stand in
        # the order of their groups, each in as many slots as its group has.
        keep = used & ~torch.stack((below, above))  # [2, S, K]
        kept = keep.sum(2).flatten()
        fresh = kept.new_zeros(size).scatter_add_(0, star, torch.ones_like(star))  # bincount would read its maximum
        count = kept + fresh.repeat(2)
        room = (count + SLOTS - 1).div(SLOTS, rounding_mode="floor")
        group = 2 * room if apart is None else 2 * room + apart.repeat(2)
        sizes = torch.bincount(group).tolist()
        order = group.argsort()
        room = room.index_select(0, order) * SLOTS
        base = torch.empty_like(room)
        base[order] = room.cumsum(0) - room

        # Where each slot takes its vertex from: the parents' slots, then the new vertices.
        kept_at = keep.flatten().nonzero()[:, 0] % (size * slots)
        start = kept.cumsum(0) - kept
        first = kept_at.index_select(0, start.clamp(max=max(len(kept_at) - 1, 0)).index_select(0, order))
        total = SLOTS * sum(k // 2 * number for k, number in enumerate(sizes))
        source = first.repeat_interleave(room, output_size=total)
        at = (base - start).repeat_interleave(kept, output_size=len(kept_at))
        at += torch.arange(len(at), device=device)
        source.scatter_(0, at, kept_at)
        number = torch.arange(len(star), device=device)
        at = base + kept - (fresh.cumsum(0) - fresh).repeat(2)
        for side in at.split(size):
            source.scatter_(0, side.index_select(0, star) + number, number + size * slots)

        # The new facet takes the lowest number that no vertex of the parent touches; new vertices lie on
        # facets of kept ones only.
        incidence, shared, bit = _new_facet(self.incidence, shared)
        incidence = incidence | bit[:, None] * (keep[0] & keep[1])[..., None]
        bits = torch.cat((incidence.flatten(0, 1), shared | bit.index_select(0, star))).index_select(0, source)
        points = torch.cat((vertices, crossing)).index_select(0, source)
        count = count.index_select(0, order)

        children: list[tuple[PolytopeBatch, bool]] = []
        begin = first_child = 0
        for k, members in enumerate(sizes):
            if not members:
                continue
            slots = k // 2 * SLOTS
            end, last_child = begin + slots * members, first_child + members
            if slots:
                body = PolytopeBatch(
                    points[begin:end].view(members, slots, -1),
                    count[first_child:last_child],
                    bits[begin:end].view(members, slots, -1),
                    self._with_facet(order[first_child:last_child], bit, plane),
                )
                children.append((body, k % 2 == 1))
            begin, first_child = end, last_child
        empty = sum(sizes[:2])
        return children, order[empty:]

    def _with_facet(self, child: Tensor, bit: Tensor, plane: Tensor | None) -> Tensor | None:
        """Facets of children with the cut's half-space at its number."""
        if self.facets is None:
            return None
        assert plane is not None
        parent = child % len(self)
        sign = torch.where(child < len(self), 1.0, -1.0).to(plane.dtype)
        bit = bit[parent]
        word = (bit != 0).to(torch.uint8).argmax(1)
        number = floor_log2(bit.amax(1)) + _bits(bit.dtype) * word
        missing = int(number.max()) + 1 - self.facets.shape[1]
        facets = self.facets[parent]
        if missing > 0:
            facets = pad(facets, (0, 0, 0, missing))
        facets[torch.arange(len(child), device=child.device), number] = sign[:, None] * plane[parent]
        return facets


def _bits(word: torch.dtype) -> int:
    """Facets that one word of this type holds."""
    return 8 * word.itemsize - 1


def _edges(above: Tensor, below: Tensor, incidence: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs of flat vertex slots on different sides that share M - 1 facets.

    Returns: slots (i, j), their polytope, in order, and the facets [E, W] they share.
    """
    slots = above.shape[1]
    # Each vertex of the smaller side is held against the whole other side.
    fewer = (above.sum(1) <= below.sum(1))[:, None]
    one = torch.where(fewer, above, below).flatten().nonzero()[:, 0]
    other = torch.where(fewer, below, above)
    star = one.div(slots, rounding_mode="floor")
    shared = (incidence * other[..., None]).index_select(0, star)  # [R, K, W]
    shared &= incidence.flatten(0, 1).index_select(0, one)[:, None]
    # in one dimension every pair is an edge
    pair = _true(_has_bits(shared, dim - 1) if dim > 1 else other.index_select(0, star))
    row = pair.div(slots, rounding_mode="floor")
    star = star.index_select(0, row)
    return one.index_select(0, row), pair + (star - row) * slots, star, shared.flatten(0, 1).index_select(0, pair)


def _has_bits(words: Tensor, number: int) -> Tensor:
    """Non-zero where at least `number` >= 1 bits are set in a row of [..., W]."""
    if words.shape[-1] == 1:
        left = words[..., 0]
        for _ in range(number - 1):  # clear the lowest set bit
            left = (left - 1).bitwise_and_(left)
        return left
    parts = list(words.unbind(-1))
    for _ in range(number - 1):  # of the first word that has one
        pending = torch.ones_like(parts[0], dtype=torch.bool)
        for w, part in enumerate(parts):
            parts[w] = torch.where(pending, part & (part - 1), part)
            pending = pending & (part == 0)
    left = parts[0]
    for part in parts[1:]:
        left = left | part
    return left


def _true(mask: Tensor) -> Tensor:
    """Flat index of the non-zero integers of [R, K], K a multiple of eight; few of them are."""
    together = 8 // mask.dtype.itemsize
    if together == 1:
        return mask.flatten().nonzero()[:, 0]
    eight = mask.view(torch.int64).flatten()
    found = eight.nonzero()[:, 0]
    within = eight.index_select(0, found).view(mask.dtype).nonzero()[:, 0]
    return found.index_select(0, within.div(together, rounding_mode="floor")) * together + within % together


def _new_facet(incidence: Tensor, shared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both incidences, with a wider or another word where it is needed, and a bit [S, W] free in each polytope."""
    word, words = incidence.dtype, incidence.shape[2]
    touched = incidence
    while touched.shape[1] > 1:
        half = touched.shape[1] // 2
        joined = touched[:, :half] | touched[:, half : 2 * half]
        touched = torch.cat((joined, touched[:, 2 * half :]), 1) if touched.shape[1] % 2 else joined
    free = ~touched[:, 0] & torch.iinfo(word).max
    lowest = free & -free
    if words > 1:  # only the first word with a free bit counts
        lowest = lowest * ((lowest != 0).cumsum(1) <= 1)
    if bool((free != 0).any(1).all()):
        return incidence, shared, lowest
    if word != WORDS[-1]:
        word = WORDS[WORDS.index(word) + 1]
        return _new_facet(incidence.to(word), shared.to(word))
    return _new_facet(pad(incidence, (0, 1)), pad(shared, (0, 1)))


def merge(batches: list[PolytopeBatch]) -> PolytopeBatch:
    """One batch of several of the same dimension, with as many slots as the largest."""
    if len(batches) == 1:
        return batches[0]
    slots = max(b.vertices.shape[1] for b in batches)
    words = max(b.incidence.shape[2] for b in batches)
    word = max((b.incidence.dtype for b in batches), key=WORDS.index)
    # Neighbours of one size are put together before they are padded: on an accelerator each step counts, not its size.
    alike = [list(group) for _, group in groupby(batches, key=lambda b: b.vertices.shape[1])]
    facets = None
    if batches[0].facets is not None:
        numbers = max(b.facets.shape[1] for b in batches if b.facets is not None)
        facets = torch.cat(
            [pad(b.facets, (0, 0, 0, numbers - b.facets.shape[1])) for b in batches if b.facets is not None]
        )
    return PolytopeBatch(
        torch.cat([_padded(torch.cat([b.vertices for b in group]), slots) for group in alike]),
        torch.cat([b.count for b in batches]),
        torch.cat([_padded(torch.cat([_words(b.incidence, word, words) for b in group]), slots) for group in alike]),
        facets,
    )


def _words(incidence: Tensor, word: torch.dtype, words: int) -> Tensor:
    """[S, K, words] of that type."""
    missing = words - incidence.shape[2]
    return pad(incidence.to(word), (0, missing)) if missing else incidence.to(word)


def _padded(rows: Tensor, slots: int) -> Tensor:
    """[S, K, ...] with the first slot repeated up to `slots`."""
    missing = slots - rows.shape[1]
    return torch.cat((rows, rows[:, :1].expand(-1, missing, -1)), 1) if missing else rows
