"""The most similar of many vectors: compared one by one, through a graph, or compressed.

FAISS builds the index (Johnson et al., *Billion-scale similarity search with GPUs*, 2019), but we
store it as plain arrays: FAISS's own reader trusts its input, so a forged file could make it read
or write anywhere in memory. `restore_index` checks its arrays first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from reid.neighbors.kernels import Floats
from reid.structures import ProgressBar

Kind = Literal["exact", "hnsw", "ivfpq"]
Rows = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[Any]]

FEWEST_FOR_IVFPQ = 10_000
"""Vectors: 39 for each of a code's 256 values, as FAISS advises."""

BLOCK_ROWS = 65_536
"""Number of a gallery's vectors that are copied at once."""

_LINKS = 16
_BUILD_EFFORT = 80
_CODE_VALUES = 256
_TRAINED_PER_LIST = 39
_TRAINED_PER_CODE = 64


def load_faiss() -> Any:
    """FAISS, imported late because it is 18 MB, and as `Any` because its types are incomplete."""
    import faiss

    return faiss


class Index(ABC):
    """Finds candidates in a gallery without comparing all of it.

    Attributes:
        kind: Its name.
        efforts: The possible efforts of a search, from fast to thorough.
        effort: The current effort.
    """

    kind: ClassVar[Kind]
    efforts: tuple[int, ...]

    def __init__(self, index: Any, effort: int) -> None:
        self._index = index
        self.effort = effort

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @abstractmethod
    def candidates(self, queries: Floats, count: int) -> Rows:
        """(Q, count or more) rows of the gallery that include most of the nearest; -1: none.

        Args:
            queries: (Q, D).
            count: Number of answers wanted.
        """

    @abstractmethod
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything that `restore_index` needs besides the features."""

    def add(self, features: Floats, progress: ProgressBar | None = None) -> None:
        """Appends vectors (N, D) to the gallery.

        Args:
            features: The vectors.
            progress: Called with (vectors done, N).
        """
        for start in range(0, len(features), BLOCK_ROWS // 4):
            stop = min(start + BLOCK_ROWS // 4, len(features))
            self._index.add(np.ascontiguousarray(features[start:stop]))
            if progress is not None:
                progress(stop, len(features))


class Graph(Index):
    """A navigable small world graph (Malkov & Yashunin, 2018), features in half precision."""

    kind = "hnsw"
    efforts = (32, 64, 128, 256, 512)

    @staticmethod
    def empty(dim: int) -> Any:
        """An index without vectors."""
        faiss = load_faiss()
        index = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_fp16, _LINKS)
        index.hnsw.efConstruction = _BUILD_EFFORT
        index.is_trained = True
        return index

    def candidates(self, queries: Floats, count: int) -> Rows:
        """See `Index`."""
        faiss = load_faiss()
        count = min(count + 10, len(self))  # half precision may swap near candidates
        settings = faiss.SearchParametersHNSW(efSearch=max(self.effort, count))
        rows: Rows = self._index.search(queries, count, params=settings)[1]
        return rows

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Levels (N,), the links of all nodes in one array, and the node to start from."""
        faiss = load_faiss()
        graph = self._index.hnsw
        return {
            "levels": faiss.vector_to_array(graph.levels),
            "links": faiss.vector_to_array(graph.neighbors),
            "start": np.array([graph.entry_point], np.int64),
        }

    @classmethod
    def restore(cls, arrays: Arrays, features: Floats, effort: int) -> Graph:
        """The index that gave `arrays`.

        Raises:
            ValueError: The arrays cannot belong to such an index.
        """
        faiss = load_faiss()
        index, count = cls.empty(features.shape[1]), len(features)
        widths = faiss.vector_to_array(index.hnsw.cum_nneighbor_per_level).astype(np.int64)
        levels = _expect(arrays, "levels", np.int32, (count,))
        _within(levels, "levels", 1, len(widths))
        offsets = np.concatenate(([0], np.cumsum(widths[levels])))
        links = _expect(arrays, "links", np.int32, (int(offsets[-1]),))
        _within(links, "links", -1, count)
        start = _expect(arrays, "start", np.int64, (1,))
        _within(start, "start", 0, count)
        if levels[start[0]] != levels.max():
            raise ValueError("start: expected a node of the topmost level")
        for level in range(1, int(levels.max())):
            nodes = np.flatnonzero(levels > level)
            places = np.arange(widths[level], widths[level + 1])
            linked = links[offsets[nodes][:, None] + places]
            if (levels[linked[linked >= 0]] <= level).any():
                raise ValueError(f"links: level {level} links to a node that is not on this level")
        faiss.copy_array_to_vector(levels, index.hnsw.levels)
        faiss.copy_array_to_vector(offsets.astype(np.uint64), index.hnsw.offsets)
        faiss.copy_array_to_vector(links, index.hnsw.neighbors)
        index.hnsw.entry_point, index.hnsw.max_level = int(start[0]), int(levels.max()) - 1
        for begin in range(0, count, BLOCK_ROWS):
            index.storage.add(features[begin : begin + BLOCK_ROWS])
        index.ntotal = count
        return cls(index, effort)


class Codes(Index):
    """An inverted file of product-quantised vectors (Jegou et al., 2011).

    A search takes ten times as many candidates as answers, since codes rank near ones badly.
    """

    kind = "ivfpq"

    def __init__(self, index: Any, effort: int) -> None:
        super().__init__(index, effort)
        powers = [2**power for power in range(20) if 2**power < index.nlist]
        self.efforts = (*powers, index.nlist)

    @staticmethod
    def empty(dim: int, lists: int) -> Any:
        """An index without vectors that is not trained."""
        faiss = load_faiss()
        length = next(size for size in (8, 7, 6, 5, 4, 3, 2, 1) if dim % size == 0)
        flat = faiss.IndexFlatIP(dim)
        index = faiss.IndexIVFPQ(flat, dim, lists, dim // length, 8, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.max_points_per_centroid = _TRAINED_PER_CODE  # a quarter of FAISS's own
        return index

    def candidates(self, queries: Floats, count: int) -> Rows:
        """See `Index`."""
        faiss = load_faiss()
        settings = faiss.SearchParametersIVF(nprobe=self.effort)
        count = min(max(10 * count, 100), len(self))
        rows: Rows = self._index.search(queries, count, params=settings)[1]
        return rows

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Centres of lists and of codes, and each vector's list and code."""
        faiss = load_faiss()
        index, width = self._index, self._index.code_size
        lists = np.empty(len(self), np.int32)
        codes = np.empty((len(self), width), np.uint8)
        for number in range(index.nlist):
            size = index.invlists.list_size(number)
            if size:
                rows = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
                lists[rows] = number
                packed = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * width)
                codes[rows] = packed.reshape(size, width)
        coarse = index.quantizer.reconstruct_n(0, index.nlist)
        return {
            "coarse": coarse,
            "centres": faiss.vector_to_array(index.pq.centroids),
            "lists": lists,
            "codes": codes,
        }

    @classmethod
    def restore(cls, arrays: Arrays, features: Floats, effort: int) -> Codes:
        """The index that gave `arrays`.

        Raises:
            ValueError: The arrays cannot belong to such an index.
        """
        faiss = load_faiss()
        count, dim = features.shape
        number = len(arrays["coarse"]) if "coarse" in arrays else 0
        if not 1 <= number <= count:
            raise ValueError(f"coarse: expected 1 to {count:,} centres, got {number:,}")
        coarse = _expect(arrays, "coarse", np.float32, (number, dim))
        index = cls.empty(dim, number)
        centres = _expect(arrays, "centres", np.float32, (_CODE_VALUES * dim,))
        if not (np.isfinite(coarse).all() and np.isfinite(centres).all()):
            raise ValueError("coarse, centres: expected finite numbers")
        lists = _expect(arrays, "lists", np.int32, (count,))
        _within(lists, "lists", 0, number)
        codes = _expect(arrays, "codes", np.uint8, (count, index.code_size))
        index.quantizer.add(coarse)
        faiss.copy_array_to_vector(centres, index.pq.centroids)
        index.is_trained = True
        order = np.argsort(lists, kind="stable")
        ends = np.cumsum(np.bincount(lists, minlength=number))
        for place, rows in enumerate(np.split(order, ends[:-1])):
            if len(rows):
                packed = np.ascontiguousarray(codes[rows])
                index.invlists.add_entries(
                    place, len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(packed)
                )
        index.ntotal = count
        return cls(index, effort)


_KINDS: dict[str, type[Graph] | type[Codes]] = {"hnsw": Graph, "ivfpq": Codes}


def build_index(kind: Kind, features: Floats, progress: ProgressBar | None = None) -> Index | None:
    """An index of vectors; None for `exact`, which needs none.

    Args:
        kind: Of the index.
        features: (N, D) unit vectors.
        progress: Called with (vectors done, N); for IVF-PQ, only after the training.

    Raises:
        ValueError: The kind is unknown, or there are too few vectors for it.
    """
    count, dim = features.shape
    if kind == "exact":
        return None
    if kind == "hnsw":
        graph = Graph(Graph.empty(dim), Graph.efforts[0])
        graph.add(features, progress)
        return graph
    if kind != "ivfpq":
        raise ValueError(f"index: expected exact, hnsw or ivfpq, got {kind!r}")
    if count < FEWEST_FOR_IVFPQ:
        raise ValueError(
            f"index: ivfpq needs {FEWEST_FOR_IVFPQ:,} images or more, got {count:,}; exact is fast "
            "for so few"
        )
    lists = min(round(2 * count**0.5), count // _TRAINED_PER_LIST)
    index = Codes.empty(dim, lists)
    step = max(1, count // max(_TRAINED_PER_LIST * lists, FEWEST_FOR_IVFPQ))
    index.train(np.ascontiguousarray(features[::step]))
    codes = Codes(index, 1)
    codes.add(features, progress)
    return codes


def restore_index(kind: Kind, arrays: Arrays, features: Floats, effort: int) -> Index | None:
    """Restores an index from its `arrays`; None for `exact`.

    Args:
        kind: Of the index.
        arrays: The result of `Index.arrays`; may come from an untrusted file.
        features: (N, D) the vectors that it was built from.
        effort: The effort of searches.

    Raises:
        ValueError: The kind is unknown, or the arrays cannot belong to such an index.
    """
    if kind == "exact":
        return None
    if kind not in _KINDS:
        raise ValueError(f"index: expected exact, hnsw or ivfpq, got {kind!r}")
    index = _KINDS[kind].restore(arrays, features, effort)
    if not 1 <= effort <= index.efforts[-1]:
        raise ValueError(f"effort: expected 1 to {index.efforts[-1]:,}, got {effort:,}")
    return index


def _expect(
    arrays: Arrays, name: str, dtype: type[np.generic], shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    """An array of this type and shape.

    Raises:
        ValueError: It is missing, or has another type or shape.
    """
    value = arrays.get(name)
    if value is None or value.dtype != dtype or value.shape != shape:
        got = "nothing" if value is None else f"{value.dtype} {value.shape}"
        raise ValueError(f"{name}: expected {np.dtype(dtype)} {shape}, got {got}")
    return value


def _within(values: npt.NDArray[Any], name: str, low: int, end: int) -> None:
    if len(values) and not (low <= values.min() and values.max() < end):
        raise ValueError(
            f"{name}: expected {low} to {end - 1:,}, got {values.min()} to {values.max():,}"
        )
