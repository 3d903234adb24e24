"""Sparse matrices as plain arrays, so that clustering works without scipy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

if TYPE_CHECKING:
    import scipy.sparse

_Array = npt.NDArray[Any]


class Compressed(Protocol):
    """What we read of a sparse matrix, be it scipy's CSR or CSC, or `Rows`."""

    @property
    def indptr(self) -> _Array:
        """Where each row (or column) begins and ends."""

    @property
    def indices(self) -> _Array:
        """The column (or row) of each entry."""

    @property
    def data(self) -> _Array:
        """The entries."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""


@dataclass(frozen=True)
class Rows:
    """A sparse matrix by rows, or its transpose by columns.

    Attributes:
        indptr: (N + 1,) where each row begins and ends.
        indices: Column of each entry, sorted in its row.
        data: The entries, single precision.
        shape: Rows and columns.
    """

    indptr: _Array
    indices: _Array
    data: _Array
    shape: tuple[int, int]

    def csr(self) -> scipy.sparse.csr_matrix:
        """The matrix as scipy's CSR, without a copy."""
        import scipy.sparse

        return scipy.sparse.csr_matrix((self.data, self.indices, self.indptr), shape=self.shape)
