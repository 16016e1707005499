"""Facet-vertex polytopes against brute force: vertices are the feasible intersections of M facets."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from tests.networks import DEVICES, DEVICES_SIM_SLOW
from torchreach.sets.polytope import PolytopeBatch, merge

TOLERANCE = 1e-10


def cube(size: int, dim: int, device: str = "cpu") -> PolytopeBatch:
    return PolytopeBatch.from_cube(size, dim, facets=True, dtype=torch.float64, device=torch.device(device))


def both_sides(body: PolytopeBatch, planes: Tensor) -> list[tuple[PolytopeBatch, Tensor]]:
    """(children, child) for one hyperplane [S, 1 + M] each."""
    planes = planes.to(body.vertices.device)
    values = (body.vertices @ planes[:, :, None])[:, :, 0]
    groups, child = body.cut(values, planes, TOLERANCE)
    return list(zip([g for g, _ in groups], child.split([len(g) for g, _ in groups]), strict=True))


def singly(sides: list[tuple[PolytopeBatch, Tensor]]) -> list[tuple[PolytopeBatch, float]]:
    """The sides of one polytope, each with its sign."""
    return [
        (side.select(torch.tensor([k])), 1.0 if c == 0 else -1.0)
        for side, child in sides
        for k, c in enumerate(child.tolist())
    ]


def upper_side(body: PolytopeBatch, plane: Tensor) -> PolytopeBatch:
    """One polytope cut down to the side >= 0."""
    (found,) = [side for side, sign in singly(both_sides(body, plane[None])) if sign > 0]
    return found


def points(body: PolytopeBatch, s: int = 0) -> Tensor:
    return body.vertices[s, : int(body.count[s]), 1:]


def corners(planes: Tensor) -> Tensor:
    """All vertices of {a : h . (1, a) >= 0 for every h in planes [F, 1 + M]}, repeated where degenerate."""
    dim = planes.shape[1] - 1
    chosen = planes[torch.tensor(list(combinations(range(len(planes)), dim)))]  # [C, M, 1 + M]
    chosen = chosen[torch.linalg.matrix_rank(chosen[:, :, 1:], tol=1e-7) == dim]
    x = torch.linalg.solve(chosen[:, :, 1:], -chosen[:, :, 0])
    return x[((planes[:, 1:] @ x.T).T + planes[:, 0] >= -1e-8).all(1)]


def assert_same_hull(found: Tensor, wanted: Tensor, atol: float = 1e-8) -> None:
    directions = torch.randn(200, found.shape[1], dtype=found.dtype, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close((directions @ found.T).amax(1), (directions @ wanted.T).amax(1), atol=atol, rtol=0)


def assert_on_facets(body: PolytopeBatch) -> None:
    """Every bit names a facet that its vertex lies on, and every vertex lies on as many as a vertex must."""
    assert body.facets is not None
    bits = 8 * body.incidence.dtype.itemsize - 1
    for s in range(len(body)):
        used = int(body.count[s])
        words = [(word[:, None] >> torch.arange(bits, device=word.device)) & 1 for word in body.incidence[s, :used].mT]
        touched = torch.cat(words, 1)[:, : body.facets.shape[1]].bool()
        distance = body.vertices[s, :used] @ body.facets[s].T
        assert distance[touched].abs().max() <= 1e-9
        assert (distance >= -1e-9).all()
        assert touched.sum(1).min() >= body.dim


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5])
def test_both_sides_of_random_cuts_have_the_vertices_of_brute_force(dim: int, device: str) -> None:
    g = torch.Generator().manual_seed(dim)
    size = 3
    groups = [(cube(size, dim, device), torch.arange(size, device=device))]
    held = {s: [cube(1, dim).facets[0]] for s in range(size)}  # type: ignore[index]
    for _ in range(3):
        after, known = [], {}
        for body, name in groups:
            normal = torch.randn(len(body), dim, generator=g, dtype=torch.float64)
            middle = (body.vertices[:, :, 1:].cpu() * torch.rand(1, body.vertices.shape[1], 1, generator=g)).mean(1)
            planes = torch.cat((-(normal * middle).sum(1, keepdim=True), normal), 1)
            for side, child in both_sides(body, planes):
                parent = child.cpu() % len(body)
                names = []
                for c, p in zip(child.tolist(), parent.tolist(), strict=True):
                    sign = 1.0 if c < len(body) else -1.0
                    names.append(len(known) + 1000)
                    known[names[-1]] = [*held[int(name[p])], sign * planes[p : p + 1]]
                after.append((side, torch.tensor(names)))
        groups, held = after, known
    assert sum(len(body) for body, _ in groups) > 2 * size
    for body, name in groups:
        assert_on_facets(body)
        for s in range(len(body)):
            wanted = corners(torch.cat(held[int(name[s])]))
            found = points(body, s).cpu()
            assert_same_hull(found, wanted)
            if dim <= 2:  # pairs that only look like edges appear from three dimensions on
                assert len(found) == len(wanted)


@pytest.mark.parametrize("dim", [2, 3, 4])
@pytest.mark.parametrize(
    ("normal", "offset"),
    [
        ((1, -1, 0, 0), 0.0),  # through opposite edges
        ((1, 1, 1, 1), 0.0),  # through corners of even cubes
        ((1, 1, 0, 0), 2 - 1e-7),  # a sliver at an edge
        ((1, 0, 0, 0), 1 - 1e-7),  # a sliver along a facet
        ((1, 0, 0, 0), 1.0),  # a facet itself
        ((1, 1, 1, 1), 1e-11),  # corners within tolerance of the cut
    ],
)
def test_degenerate_cuts_lose_nothing(dim: int, normal: tuple[int, ...], offset: float) -> None:
    """Vertices on the cut belong to both sides; the same cut again changes neither side."""
    plane = torch.tensor([offset, *(-torch.tensor(normal[:dim]).double())], dtype=torch.float64)
    body = cube(1, dim)
    sides = singly(both_sides(body, plane[None]))
    assert body.facets is not None
    for side, sign in sides:
        wanted = corners(torch.cat((body.facets[0], sign * plane[None])))
        assert_same_hull(points(side), wanted)
        assert_on_facets(side)
        nudged = sign * plane + 0.5e-10 * (torch.arange(dim + 1) == 0)
        assert_same_hull(torch.cat([points(again) for again, _ in singly(both_sides(side, nudged[None]))]), wanted)
    assert_same_hull(torch.cat([points(side) for side, _ in sides]), points(body))


def test_two_almost_equal_cuts_leave_a_sliver_between_them() -> None:
    plane = torch.tensor([0.1, 0.3, -1.0, 0.7], dtype=torch.float64)
    shifted = plane + 1e-8 * torch.tensor([1.0, 0.5, 0, 0])
    sliver = upper_side(upper_side(cube(1, 3), -plane), shifted)
    assert_same_hull(points(sliver), corners(torch.cat((cube(1, 3).facets[0], -plane[None], shifted[None]))), 1e-6)  # type: ignore[index]
    assert points(sliver).matmul(plane[1:]).add(plane[0]).abs().max() <= 4e-8


@pytest.mark.parametrize("device", DEVICES_SIM_SLOW)
def test_facets_beyond_one_word_are_kept_apart(device: str) -> None:
    """A cube cut down towards a ball: the words widen from 15 to 31 to 63 facets, and then there are two."""
    normal = torch.randn(90, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    planes = torch.cat((torch.ones(90, 1), -normal / normal.norm(dim=1, keepdim=True)), 1)
    body, seen = cube(2, 3, device), set()
    for k, plane in enumerate(planes):
        lifted = []
        for side, child in both_sides(body, plane.repeat(2, 1)):
            lifted.append(side.select((child < 2).nonzero()[:, 0]))
        body = merge([part for part in lifted if len(part)])
        seen.add((body.incidence.dtype, body.incidence.shape[2]))
        if k in (5, 20, 50, 89):
            assert_on_facets(body)
            wanted = corners(torch.cat((cube(1, 3).facets[0], planes[: k + 1])))  # type: ignore[index]
            for s in range(2):
                assert len(points(body, s)) == len(wanted)
                assert_same_hull(points(body, s).cpu(), wanted)
    assert seen == {(torch.int16, 1), (torch.int32, 1), (torch.int64, 1), (torch.int64, 2)}


def test_numbers_of_facets_are_used_again() -> None:
    """Cuts that each push the last one out need no wider word."""
    body = cube(1, 2)
    for k in range(100):
        body = upper_side(body, torch.tensor([1 - k / 200, -1.0, -0.1], dtype=torch.float64))
    assert body.incidence.dtype == torch.int16
    assert_on_facets(body)
    assert body.facets is not None
    assert body.facets.shape[1] <= 6


def test_groups_are_of_one_size_and_kind() -> None:
    body = cube(40, 4)
    planes = torch.randn(40, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = (body.vertices @ planes[:, :, None])[:, :, 0]
    apart = torch.arange(40) % 3 == 0
    groups, child = body.cut(values, planes, TOLERANCE, apart)
    assert len(groups) > 2
    whole = (values > TOLERANCE).any(1).sum() + (values < -TOLERANCE).any(1).sum()
    assert len(child) == sum(len(part) for part, _ in groups) == whole
    for (part, flag), own in zip(groups, child.split([len(part) for part, _ in groups]), strict=True):
        assert (apart[own % 40] == flag).all()
        slots = part.vertices.shape[1]
        assert slots % 16 == 0
        assert (part.count > slots - 16).all()
        assert (part.count <= slots).all()
        sign = torch.where(own < 40, 1.0, -1.0)[:, None]
        own_values = (part.vertices @ planes[own % 40][:, :, None])[:, :, 0]
        assert (sign * own_values >= -1e-12).all()


def test_merging_pads_with_copies_of_the_first_vertex() -> None:
    small, large = cube(1, 3), cube(1, 3)
    for plane in torch.randn(30, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64):
        large = upper_side(large, torch.cat((torch.tensor([1.0]), plane[1:] / plane[1:].norm())))
    both = merge([small, large])
    assert both.vertices.shape[1] == large.vertices.shape[1] > small.vertices.shape[1]
    assert (both.vertices[0, 8:] == small.vertices[0, :1]).all()
    assert both.incidence.dtype == large.incidence.dtype != small.incidence.dtype
    for body, s in ((small, 0), (large, 1)):
        assert torch.equal(points(both, s), points(body))
        assert_on_facets(both.select(torch.tensor([s])))
