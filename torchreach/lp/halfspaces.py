"""Batches of sets {a : A a <= b, |a_m| <= 1}, and the products with A that linear programs need.

Rows are kept in one of two ways. `Halfspaces` has a matrix per set. `SharedHalfspaces` has one matrix for all
sets of a batch and a sign per set and row: pieces cut out of one star by the same planes differ in nothing
else, and every product is then one matrix product for the whole batch.

Axis letters: B sets, P constraints, M variables, R vectors per set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchreach.core.masks import leading


class _Batch:
    """What both kinds count the same way, from b [B, P]."""

    b: Tensor

    def __len__(self) -> int:
        return len(self.b)

    @property
    def constraints(self) -> int:
        return self.b.shape[1]


@dataclass(frozen=True)
class Halfspaces(_Batch):
    """Sets with rows of their own: A [B, P, M], b [B, P]."""

    A: Tensor
    b: Tensor

    @property
    def variables(self) -> int:
        return self.A.shape[2]

    @property
    def row_numbers(self) -> int:
        """Numbers that the rows of one set take."""
        return self.constraints * self.variables

    @cached_property
    def reach(self) -> Tensor:
        """[B, P] bound on the terms of A a - b, for rounding."""
        return self.b.abs() + self.A.abs().sum(2)

    def select(self, index: Tensor | slice) -> Halfspaces:
        return Halfspaces(self.A[index], self.b[index])

    def dot(self, x: Tensor) -> Tensor:
        """A x: [B, R, M] -> [B, R, P]."""
        return x @ self.A.transpose(1, 2)

    def mix(self, y: Tensor) -> Tensor:
        """A^T y: [B, R, P] -> [B, R, M]."""
        return y @ self.A

    def room(self, a: Tensor) -> Tensor:
        """b - A a at one point per set: [B, M] -> [B, P]."""
        return self.b - (self.A @ a[:, :, None])[:, :, 0]

    def over_variables(self, weights: Tensor) -> Tensor:
        """A^T diag(weights) A: [B, P] -> [B, M, M]."""
        return (self.A * weights[:, :, None]).transpose(1, 2) @ self.A

    def over_constraints(self, weights: Tensor) -> Tensor:
        """A diag(weights) A^T: [B, M] -> [B, P, P]."""
        return (self.A * weights[:, None, :]) @ self.A.transpose(1, 2)

    def add(self, row: Tensor, bound: Tensor) -> Halfspaces:
        """One constraint more per set: row [B, M], bound [B]."""
        return Halfspaces(torch.cat((self.A, row[:, None]), 1), torch.cat((self.b, bound[:, None]), 1))

    def own(self) -> Halfspaces:
        """The same sets with rows of their own."""
        return self

    def pad(self, constraints: int) -> Halfspaces:
        """The same sets with as many constraints, the new ones 0 . a <= 1."""
        missing = constraints - self.constraints
        if missing == 0:
            return self
        size, _, dim = self.A.shape
        return Halfspaces(
            torch.cat((self.A, self.A.new_zeros(size, missing, dim)), 1),
            torch.cat((self.b, self.b.new_ones(size, missing)), 1),
        )

    @staticmethod
    def cat(batches: list[Halfspaces]) -> Halfspaces:
        """One batch of several, padded to the longest."""
        width = max(s.constraints for s in batches)
        batches = [s.pad(width) for s in batches]
        return Halfspaces(torch.cat([s.A for s in batches]), torch.cat([s.b for s in batches]))


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that sets share: matrix [P, M], and its products with itself, which are computed when asked for."""

    matrix: Tensor

    @cached_property
    def size(self) -> Tensor:
        """[P] sums of magnitudes."""
        return self.matrix.abs().sum(1)

    @cached_property
    def over_variables(self) -> Tensor:
        """[P, M^2] outer product of every row with itself."""
        return (self.matrix[:, :, None] * self.matrix[:, None, :]).flatten(1)

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Products of every two rows, entry by entry, [M, P (P + 1) / 2], and their places [P, P]."""
        rows = len(self.matrix)
        i, j = torch.triu_indices(rows, rows, device=self.matrix.device)
        place = torch.zeros(rows, rows, dtype=torch.long, device=i.device)
        place[i, j] = place[j, i] = torch.arange(len(i), device=i.device)
        return (self.matrix[i] * self.matrix[j]).T.contiguous(), place


@dataclass(frozen=True)
class SharedHalfspaces(_Batch):
    """Sets with signed rows of one matrix: row p of set b is sign[b, p] * rows[p], absent where the sign is 0."""

    rows: Rows
    sign: Tensor  # [B, P], of the dtype of b
    b: Tensor  # [B, P], 1 where the row is absent

    @property
    def variables(self) -> int:
        return self.rows.matrix.shape[1]

    @property
    def row_numbers(self) -> int:
        return 0

    @cached_property
    def reach(self) -> Tensor:
        return self.b.abs() + self.rows.size

    def select(self, index: Tensor | slice) -> SharedHalfspaces:
        return SharedHalfspaces(self.rows, self.sign[index], self.b[index])

    def dot(self, x: Tensor) -> Tensor:
        return x @ self.rows.matrix.T * self.sign[:, None]

    def mix(self, y: Tensor) -> Tensor:
        return (y * self.sign[:, None]) @ self.rows.matrix

    def room(self, a: Tensor) -> Tensor:
        return torch.addcmul(self.b, a @ self.rows.matrix.T, self.sign, value=-1)

    def over_variables(self, weights: Tensor) -> Tensor:
        dim = self.variables
        return ((weights * self.sign * self.sign) @ self.rows.over_variables).view(-1, dim, dim)

    def over_constraints(self, weights: Tensor) -> Tensor:
        pairs, place = self.rows.pairs
        return (weights @ pairs)[:, place] * (self.sign[:, :, None] * self.sign[:, None])

    def put(self, row: Tensor, sign: Tensor, bound: Tensor) -> SharedHalfspaces:
        """Row number row [B] present with the given sign and bound [B]."""
        at = (torch.arange(len(self), device=row.device), row)
        return SharedHalfspaces(
            self.rows,
            self.sign.index_put(at, sign),
            self.b.index_put(at, bound),
        )

    def own(self) -> Halfspaces:
        """The same sets with rows of their own, absent ones left out as far as every set can spare them."""
        present = self.sign != 0
        width = int(present.sum(1).max()) if self.sign.numel() else 0
        order = leading(present, width)
        A = self.rows.matrix[order] * self.sign.gather(1, order)[:, :, None]
        return Halfspaces(A, self.b.gather(1, order))

    @staticmethod
    def cat(batches: list[SharedHalfspaces]) -> SharedHalfspaces:
        """One batch of several of the same rows."""
        return SharedHalfspaces(
            batches[0].rows, torch.cat([s.sign for s in batches]), torch.cat([s.b for s in batches])
        )


Sets = Halfspaces | SharedHalfspaces
