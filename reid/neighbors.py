"""Exact nearest neighbours and the sparse k-reciprocal Jaccard distance.

No N x N matrix is built: scores are computed in square blocks, each pair of blocks once, and only
the best candidates of each row are kept. Candidates are found in half precision (bfloat16) where
the CPU multiplies it faster, otherwise in single precision, and are then scored again in double
precision in a fixed order of operations. A rounding bound tells for each row whether a neighbour
could have been missed; such rows are searched again in the next higher precision. So the result is
exact, and the same for any block size, number of threads and machine.

k-reciprocal sets and the Jaccard distance are those of Zhong et al., *Re-ranking Person
Re-identification with k-reciprocal Encoding* (CVPR 2017), in the form that unsupervised
re-identification has used since Ge et al., *Self-paced Contrastive Learning* (NeurIPS 2020).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import faiss
import numba
import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from numba import njit, prange
from torch import Tensor

from reid import distributed
from reid.structures import ProgressBar

T = TypeVar("T")
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int64]

Search = Literal["exact", "ivf", "hnsw"]

TIE_TOLERANCE = 1e-6
"""Distances up to eps + this count as within eps.

The local query expansion averages k2 rows, so that distances of simple fractions are frequent: with
k2 = 6, two images that share 4 of 6 rows lie at exactly 0.5, the usual eps. There the rounding of
the last bit would decide. Distances are sums in double precision, rounded once to single precision
(6e-8), so that this tolerance is above any rounding and far below any difference that means
something.
"""

_BLOCK = 2048
_MARGIN = 12
_HALF_MARGIN = 44
_BFLOAT16_TESTS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
_CHUNK = 64
_NO_NANS = {"nnan", "nsz"}
_PART = 1024
_GPU_COLUMNS = 65536
_helped = ContextVar("_helped", default=False)


def nearest_neighbors(
    features: Tensor,
    k: int,
    *,
    block_size: int = _BLOCK,
    half_precision: bool | None = None,
    progress: ProgressBar | None = None,
) -> Indices:
    """Exact nearest neighbours of N vectors among themselves, by Euclidean distance.

    Args:
        features: (N, D), finite; need not be of unit length. On a CUDA device candidates are
            found there, and scored again on the CPU: the result is the same.
        k: Length of the lists, the vector itself included; at most N.
        block_size: Rows in a block of scores; does not change the result.
        half_precision: Look for candidates in bfloat16. None: where the device has instructions
            for it. Does not change the result.
        progress: Called with (images' worth of pairs done, N).

    Returns:
        (N, k) int32, nearest first. The vector itself is in first place; equal distances are
        ordered by index.

    Raises:
        ValueError: An argument is out of its range, or a feature is not finite.
    """
    rows = _as_rows(features)
    count = len(rows)
    if not 1 <= k <= count:
        raise ValueError(f"k: expected 1 to the number of vectors, {count}, got {k}")
    if block_size < 1:
        raise ValueError(f"block_size: expected 1 or more, got {block_size}")
    task = _Task(rows, k, block_size, half_precision, features.device.type)
    if not _helped.get():
        return _neighbors_of(task, 0, count, progress)
    distributed.broadcast_object(task)
    return _search_own_part(task, progress)


def run_on_main(work: Callable[[], T]) -> T:
    """Runs `work` on the main process; the others take their parts of its neighbour searches.

    Every process must call it. While the main process works, each `nearest_neighbors` in it sends
    its vectors to the others; the process of number r searches and certifies the rows from
    N r / R to N (r + 1) / R, R processes in all, and the main process gets all lists. They are
    those that it would have found alone, bit for bit. Everything else is done once, and what
    searches no neighbours needs to know nothing of this.

    Two rows of different processes are multiplied by both of them, so that two processes save a
    quarter of the multiplications that one would wait for, and eight three quarters.

    Returns:
        What `work` returned on the main process, on every process; must be picklable.

    Raises:
        Exception: What `work` raised on the main process, on every process.
    """
    if not distributed.is_distributed():
        return work()
    outcome: _Task | _Outcome[T]
    if not distributed.is_main():
        while isinstance(outcome := distributed.broadcast_object(None), _Task):
            with contextlib.suppress(SearchError):  # the main process tells how it ends
                _search_own_part(outcome, None)
    else:
        token = _helped.set(True)
        try:
            outcome = _Outcome(work(), None)
        except Exception as error:  # noqa: BLE001 - raised below, on every process
            outcome = _Outcome(None, error)
        finally:
            _helped.reset(token)
        distributed.broadcast_object(outcome)
    if outcome.error is not None:
        raise outcome.error
    return outcome.value  # type: ignore[return-value]


def farthest_distances(features: Tensor, *, block_size: int = _BLOCK) -> Floats:
    """(N,) largest squared Euclidean distance from each vector to any other, single precision.

    Raises:
        ValueError: A feature is not finite.
    """
    rows = _as_rows(features)
    norms = (2 * _half_squared_norms(rows)).astype(np.float32)
    tensor, squares = torch.from_numpy(rows), torch.from_numpy(norms)
    largest = torch.zeros(len(rows))
    for start in range(0, len(rows), block_size):
        one = slice(start, start + block_size)
        for other_start in range(start, len(rows), block_size):
            other = slice(other_start, other_start + block_size)
            block = torch.addmm(squares[other], tensor[one], tensor[other].T, alpha=-2)
            block += squares[one, None]
            largest[one] = torch.maximum(largest[one], block.amax(1))
            largest[other] = torch.maximum(largest[other], block.amax(0))
    found: Floats = largest.numpy()
    return found


def approximate_neighbors(features: Tensor, k: int, search: Search) -> Indices:
    """Nearest neighbours through FAISS, some of them missed (Johnson et al. 2019).

    For more vectors than the exact search can take, some millions. Missed neighbours cost clusters:
    at 130,000 points an inverted file with a recall of 0.74 left an adjusted Rand index of 0.44.

    Args:
        features: (N, D), finite.
        k: Length of the lists, the vector itself included; at most N.
        search: `ivf`: an inverted file of 4 sqrt(N) lists, a sixteenth of which is looked through;
            `hnsw`: a navigable small world graph with 32 links (Malkov & Yashunin 2018).

    Returns:
        (N, k) int32, in the order of `nearest_neighbors`.

    Raises:
        ValueError: An argument is out of its range, or a feature is not finite.
    """
    rows = _as_rows(features)
    count, dim = rows.shape
    if not 1 <= k <= count:
        raise ValueError(f"k: expected 1 to the number of vectors, {count}, got {k}")
    index: Any
    if search == "ivf":
        lists = max(1, min(round(4 * count**0.5), count // 39))
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dim), dim, lists)
        index.train(rows[:: max(1, count // (256 * lists))])
        index.nprobe = max(1, lists // 16)
    elif search == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 32)
        index.hnsw.efConstruction, index.hnsw.efSearch = 100, max(100, 2 * k)
    else:
        raise ValueError(f"search: expected exact, ivf or hnsw, got {search!r}")
    index.add(rows)
    _, found = index.search(rows, min(k + _MARGIN, count))
    everyone = np.arange(count, dtype=np.int32)
    without_itself = ~(found == everyone[:, None]).any(1)
    found[without_itself, -1] = everyone[without_itself]
    half_norms = _half_squared_norms(rows)
    scores = np.zeros(found.shape, np.float32)  # all alike: every candidate is scored again
    neighbors, _ = _rescore(rows, half_norms, everyone, scores, found.astype(np.int32), k, 0.0)
    too_few = (found < 0).any(1)
    neighbors[too_few] = _search_all_exactly(rows, half_norms, everyone[too_few], k)
    return neighbors


def fast_bfloat16(device: str = "cpu") -> bool:
    """Whether a `cpu` (AVX-512 BF16 or AMX) or a `cuda` device multiplies bfloat16 itself."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    tests = (getattr(torch.cpu, name, None) for name in _BFLOAT16_TESTS)
    return any(bool(test()) for test in tests if test is not None)


def jaccard_distance(
    features: Tensor,
    k1: int = 20,
    k2: int = 6,
    *,
    max_distance: float = 1.0,
    search: Search = "exact",
    block_size: int = _BLOCK,
    progress: ProgressBar | None = None,
) -> scipy.sparse.csr_matrix:
    """k-reciprocal Jaccard distances of N images among themselves, those below 1.

    Lists of k1 neighbours (the image itself counted in), k-reciprocal sets expanded by the half
    lists of round(k1 / 2) + 1 entries, softmax of the negative squared distances, mean over the
    k2 nearest rows, and 1 - m / (2 - m) where m is the sum of minima of two rows.

    Args:
        features: (N, D), of unit length.
        k1: Length of the neighbour lists; lists of a smaller set are as long as the set.
        k2: Rows averaged in the local query expansion, the image's own included.
        max_distance: Larger distances are left out, which saves memory.
        search: `exact`, or one of `approximate_neighbors`.
        block_size: Rows in a block of scores; does not change the result.
        progress: Called with (images' worth of work done, N).

    Returns:
        (N, N) float32 CSR, symmetric, with sorted columns. Distances of 0 are stored, those of
        each image to itself among them; what is not stored is 1 (or above `max_distance`).

    Raises:
        ValueError: An argument is out of its range, or a feature is not finite.
    """
    for name, value in (("k1", k1), ("k2", k2)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    rows = _as_rows(features)
    count = len(rows)
    k = min(max(k1, k2), count)
    if search == "exact":
        neighbors = nearest_neighbors(features, k, block_size=block_size, progress=progress)
    else:
        neighbors = approximate_neighbors(features, k, search)
    encoding = encode_neighbors(rows, neighbors, min(k1, count), half_length(k1, count), k2)
    return jaccard_of_rows(encoding, encoding, max_distance)


def jaccard_memory_mb(count: int, dim: int, k1: int = 20, k2: int = 6) -> float:
    """About how many MB `jaccard_distance` takes above the features, without what it returns.

    A half-precision copy of the features, the candidates, and the rows of weights.
    """
    candidates = 8 * (max(k1, k2) + _HALF_MARGIN)
    return count * (2 * dim + candidates + 12 * k1 * k2) / 2**20


def half_length(k1: int, count: int) -> int:
    """Length of the half lists, round(k1 / 2) + 1 (half to even), at most `count`."""
    return min(round(k1 / 2) + 1, count)


def encode_neighbors(
    rows: Floats,
    neighbors: Indices,
    length: int,
    half: int,
    k2: int,
    farthest: Floats | None = None,
) -> scipy.sparse.csr_matrix:
    """Each image as weights on its expanded k-reciprocal set, averaged over its k2 neighbours.

    Args:
        rows: (N, D) features.
        neighbors: (N, k) lists, the image itself first.
        length: Entries of the lists that count, at most k.
        half: The same for the half lists.
        k2: Rows averaged; 1 = no expansion.
        farthest: None: weights are the softmax of -d, d squared Euclidean distances. (N,) largest
            d of each row: the softmax of -(d / farthest)^2, as in re-ranking.

    Returns:
        (N, N) float32 CSR with sorted columns; rows sum to 1.
    """
    norms = _half_squared_norms(rows)
    scale = np.ones(len(rows), np.float32) if farthest is None else farthest
    lists = np.ascontiguousarray(neighbors[:, :length])
    reciprocal = (*_reciprocal(lists), *_reciprocal(np.ascontiguousarray(lists[:, :half])))
    sizes, _ = _expanded_sets(*reciprocal, 0)
    _, members = _expanded_sets(*reciprocal, int(sizes.max()))
    indptr = np.concatenate(([0], np.cumsum(sizes)))
    indices = members[np.arange(members.shape[1]) < sizes[:, None]]
    del members
    data = _soft_weights(rows, norms, indptr, indices, scale, farthest is not None)
    k2 = min(k2, neighbors.shape[1])
    if k2 > 1:
        nearest = np.ascontiguousarray(neighbors[:, :k2])
        sizes = _expanded_sizes(indptr, indices, data, nearest)
        new_indptr = np.concatenate(([0], np.cumsum(sizes)))
        indices, data = _expand(indptr, indices, data, nearest, new_indptr)
        indptr = new_indptr
    return scipy.sparse.csr_matrix((data, indices, indptr), shape=(len(rows), len(rows)))


def jaccard_of_rows(
    queries: scipy.sparse.csr_matrix,
    gallery: scipy.sparse.csr_matrix | scipy.sparse.csc_matrix,
    max_distance: float = 1.0,
) -> scipy.sparse.csr_matrix:
    """Jaccard distances 1 - m / (2 - m) below 1, m the sum of minima of two rows that sum to 1.

    Args:
        queries: (Q, N) with sorted columns.
        gallery: (G, N), by columns (CSC) where it is used more than once.
        max_distance: Larger distances are left out.

    Returns:
        (Q, G) float32 CSR with sorted columns and stored zeros.
    """
    columns = gallery.tocsc()
    arrays = (
        queries.indptr.astype(np.int64),
        queries.indices,
        queries.data,
        columns.indptr.astype(np.int64),
        columns.indices,
        columns.data,
    )
    counts = np.zeros(queries.shape[0], np.int64)

    def part(start: int) -> tuple[Indices, Floats]:
        stop = min(start + _PART, queries.shape[0])
        found: tuple[Indices, Floats] = _jaccard_part(
            *arrays, gallery.shape[0], start, stop, max_distance, counts
        )
        return found

    with ThreadPoolExecutor(numba.get_num_threads()) as pool:
        try:
            parts = [*pool.map(part, range(0, queries.shape[0], _PART))]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for what is left
            raise
    indptr = np.concatenate(([0], np.cumsum(counts)))
    kind = np.int32 if indptr[-1] < 2**31 else np.int64
    return scipy.sparse.csr_matrix(
        (
            np.concatenate([data for _, data in parts]),
            np.concatenate([indices for indices, _ in parts]).astype(kind, copy=False),
            indptr.astype(kind),
        ),
        shape=(queries.shape[0], gallery.shape[0]),
    )


def dbscan(
    distances: scipy.sparse.csr_matrix,
    eps: float,
    min_samples: int,
    tolerance: float = TIE_TOLERANCE,
) -> Labels:
    """DBSCAN (Ester et al., KDD 1996) on a sparse graph of distances.

    The labels are scikit-learn's: a point counts among its own neighbours, clusters are numbered
    by their first core point in index order, and a border point goes to the first cluster that
    reaches it.

    Args:
        distances: (N, N) symmetric CSR; what is not stored is far away. Zeros count as stored.
        eps: Largest distance of neighbours.
        min_samples: Neighbours that make a core point, itself included.
        tolerance: Ties count as within eps: distances up to `eps + tolerance` are neighbours
            (see `TIE_TOLERANCE`).

    Returns:
        (N,) int64 clusters from 0; -1 = outlier.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not eps > 0 or min_samples < 1 or not tolerance >= 0:
        raise ValueError(
            "expected eps above 0, min_samples of 1 or more and tolerance of 0 or more, got "
            f"{eps}, {min_samples}, {tolerance}"
        )
    return _dbscan(
        distances.indptr.astype(np.int64, copy=False),
        distances.indices,
        distances.data,
        np.float32(eps + tolerance),
        min_samples,
    )


def _as_rows(features: Tensor) -> Floats:
    if features.ndim != 2 or not len(features) or not features.shape[1]:
        raise ValueError(f"features: expected (N, D) with N, D > 0, got {tuple(features.shape)}")
    rows: Floats = np.ascontiguousarray(features.detach().float().cpu().numpy())
    if not all_finite(rows):
        raise ValueError("features: expected finite numbers, got NaN or infinity")
    return rows


@dataclass(frozen=True)
class _Task:
    """The arguments of `nearest_neighbors`, checked; rows are (N, D)."""

    rows: Floats
    k: int
    block_size: int
    half_precision: bool | None
    device: str


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """How the main process's work ended."""

    value: T | None
    error: Exception | None


class SearchError(RuntimeError):
    """A process failed in its part of a search."""


def _search_own_part(task: _Task, progress: ProgressBar | None) -> Indices:
    """(N, k) lists, those of this process's rows found here and the others by the others.

    The processes of a machine share its threads.

    Raises:
        SearchError: Some process failed; every process raises it.
    """
    count, rank, world = len(task.rows), distributed.rank(), distributed.world_size()
    threads = numba.get_num_threads()
    found: Indices | str
    try:
        numba.set_num_threads(max(1, threads // distributed.local_world_size()))
        first, last = count * rank // world, count * (rank + 1) // world
        found = _neighbors_of(task, first, last, progress)
    except Exception as error:  # noqa: BLE001 - told to every process
        found = f"neighbour search of process {rank}: {type(error).__name__}: {error}"
    finally:
        numba.set_num_threads(threads)
    parts = distributed.gather_objects(found)
    for part in parts:
        if isinstance(part, str):
            raise SearchError(part)
    return np.concatenate(parts)


def _neighbors_of(task: _Task, first: int, last: int, progress: ProgressBar | None) -> Indices:
    """(last - first, k) lists of the rows from `first` to `last`, among all rows."""
    rows, k, block_size = task.rows, task.k, task.block_size
    count = len(rows)
    half_norms = _half_squared_norms(rows)
    half_precision = task.half_precision
    if half_precision is None:
        half_precision = fast_bfloat16(task.device)
    own = np.arange(first, last, dtype=np.int32)
    searched = _Candidates.empty(len(own), k + (_HALF_MARGIN if half_precision else _MARGIN), count)
    tensor = torch.from_numpy(rows)
    if half_precision:
        tensor = tensor.bfloat16()
        bound = _half_rounding_bound(rows, tensor, half_norms)
    else:
        bound = _rounding_bound(rows.shape[1], half_norms)
    norms = half_norms.astype(np.float32)
    if task.device == "cuda":
        on_gpu = tensor.cuda(), torch.from_numpy(norms).cuda()
        _search_on_gpu(*on_gpu, first, block_size, searched, progress)
        del on_gpu
    else:
        _search(tensor, norms, first, block_size, searched, progress)
    found, doubtful = _rescore(rows, half_norms, own, searched.scores, searched.index, k, bound)
    del searched, tensor
    if half_precision and doubtful.any():
        which = own[doubtful]
        again = _Candidates.empty(len(which), k + _MARGIN, count)
        _search_some(rows, norms, which, block_size, again)
        bound = _rounding_bound(rows.shape[1], half_norms)
        found[doubtful], still = _rescore(
            rows, half_norms, which, again.scores, again.index, k, bound
        )
        doubtful[doubtful] = still
    found[doubtful] = _search_all_exactly(rows, half_norms, own[doubtful], k)
    return found


def _search_all_exactly(rows: Floats, half_norms: Doubles, which: Indices, k: int) -> Indices:
    """`_search_exactly` in pieces of less than a second, between which Ctrl-C is answered."""
    found = np.empty((len(which), k), np.int32)
    step = max(1, int(2e8 / rows.size))
    for start in range(0, len(which), step):
        piece = slice(start, start + step)
        _search_exactly(rows, half_norms, which[piece], found[piece])
    return found


@dataclass(frozen=True)
class _Candidates:
    """The best of each row so far, as heaps: the worst of them is in first place.

    Attributes:
        scores: (n, kept) float32, x.y - y.y / 2: larger is nearer.
        index: (n, kept) int32.
    """

    scores: Floats
    index: Indices

    @classmethod
    def empty(cls, num_rows: int, kept: int, count: int) -> _Candidates:
        kept = min(kept, count)
        return cls(
            np.full((num_rows, kept), -np.inf, np.float32), np.full((num_rows, kept), -1, np.int32)
        )


def _rounding_bound(dim: int, half_norms: Doubles) -> float:
    """Largest error of a single-precision score x.y - y.y / 2."""
    unit = 2.0**-24
    return (dim + 4) * unit / (1 - (dim + 4) * unit) * 4 * float(half_norms.max())


def _half_rounding_bound(rows: Floats, halves: Tensor, half_norms: Doubles) -> float:
    """Largest error of a score whose product is taken in bfloat16 and summed in float32.

    By the Cauchy-Schwarz inequality, rounding x and y moves their product by no more than
    |x - x'| |y'| + |x| |y - y'|; the product itself is rounded to bfloat16 (2^-9 of it).
    """
    largest = float(np.sqrt(2 * half_norms.max()))
    residual = 0.0
    for start in range(0, len(rows), _BLOCK):
        part = torch.from_numpy(rows[start : start + _BLOCK])
        error = (part - halves[start : start + _BLOCK].float()).square().sum(1).sqrt().max()
        residual = max(residual, float(error))
    rounded = largest + residual
    product = rounded * rounded * (1 + rows.shape[1] * 2.0**-22)
    inputs = 1.0001 * residual * (largest + rounded)
    sums = rows.shape[1] * 2.0**-22 * rounded * rounded
    return float(inputs + sums + 2.0**-9 * product + _rounding_bound(4, half_norms))


def _search(
    tensor: Tensor,
    half_norms: Floats,
    first: int,
    block_size: int,
    found: _Candidates,
    progress: ProgressBar | None,
) -> None:
    """Finds candidates of the rows from `first` on, as many as `found` has, among all.

    Each pair of blocks of these rows is multiplied once.
    """
    count, last = len(tensor), first + len(found.scores)
    side = min(block_size, count)
    products = torch.empty(side * side, dtype=tensor.dtype)
    scores = products if tensor.dtype == torch.float32 else products.float()
    pairs = 0
    for left in range(first, last, block_size):
        one = tensor[left : min(left + block_size, last)]
        for start, stop in ((0, first), (left, last), (last, count)):
            for right in range(start, stop, block_size):
                other = tensor[right : min(right + block_size, stop)]
                shape, size = (len(one), len(other)), len(one) * len(other)
                torch.mm(one, other.T, out=products[:size].view(shape))
                if scores is not products:
                    scores[:size] = products[:size]
                block = scores[:size].view(shape).numpy()
                _take_rows(block, half_norms, left - first, right, found.scores, found.index)
                pairs += size
                if start == left and right != left:  # both are rows to find candidates of
                    _take_columns(block, half_norms, left, right - first, found.scores, found.index)
                    pairs += size
                if progress is not None:
                    progress(pairs // (last - first), count)


@contextlib.contextmanager
def _exact_sums() -> Iterator[None]:
    """Matrix products as the rounding bounds take them: no TF32, sums in single precision."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_tf32 = matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = before


def _search_on_gpu(
    tensor: Tensor,
    half_norms: Tensor,
    first: int,
    block_size: int,
    found: _Candidates,
    progress: ProgressBar | None,
) -> None:
    """`_search` with torch on the device of `tensor`: blocks of scores, their best ones merged."""
    kept = found.scores.shape[1]
    with _exact_sums():
        for left in range(0, len(found.scores), block_size):
            own = slice(left, min(left + block_size, len(found.scores)))
            one = tensor[first + own.start : first + own.stop]
            scores = torch.full((len(one), kept), -torch.inf, device=tensor.device)
            index = torch.full((len(one), kept), -1, dtype=torch.int32, device=tensor.device)
            for right in range(0, len(tensor), _GPU_COLUMNS):
                other = slice(right, right + _GPU_COLUMNS)
                block = (one @ tensor[other].T).float() - half_norms[other]
                best, place = block.topk(min(kept, block.shape[1]), 1)
                both = torch.cat((scores, best), 1)
                indices = torch.cat((index, (place + right).int()), 1)
                scores, order = both.topk(kept, 1)
                index = indices.gather(1, order)
            # the worst in first place, as in a heap
            found.scores[own] = scores.flip(1).cpu().numpy()
            found.index[own] = index.flip(1).cpu().numpy()
            if progress is not None:
                progress(len(tensor) * own.stop // len(found.scores), len(tensor))


def _search_some(
    rows: Floats, half_norms: Floats, which: Indices, block_size: int, found: _Candidates
) -> None:
    """Finds candidates of some rows among all, in single precision."""
    tensor = torch.from_numpy(rows)
    for left in range(0, len(which), block_size):
        one = tensor[torch.from_numpy(which[left : left + block_size].astype(np.int64))]
        for right in range(0, len(rows), block_size):
            products = one @ tensor[right : right + block_size].T
            _take_rows(products.numpy(), half_norms, left, right, found.scores, found.index)


@njit(cache=True)
def _insert(value: float, item: int, scores: npt.NDArray[Any], index: Indices) -> None:
    """Puts an item into a list that is sorted by score, then index, in place of its last."""
    place = len(scores) - 1
    while place > 0 and (
        scores[place - 1] < value or (scores[place - 1] == value and index[place - 1] > item)
    ):
        scores[place] = scores[place - 1]
        index[place] = index[place - 1]
        place -= 1
    scores[place] = value
    index[place] = item


@njit(cache=True)
def _replace_worst(value: float, item: int, scores: Floats, index: Indices) -> None:
    """Puts an item into a heap, whose worst item is at its root, in place of that one."""
    place = 0
    while True:
        child = 2 * place + 1
        if child >= len(scores):
            break
        if child + 1 < len(scores) and scores[child + 1] < scores[child]:
            child += 1
        if scores[child] >= value:
            break
        scores[place] = scores[child]
        index[place] = index[child]
        place = child
    scores[place] = value
    index[place] = item


@njit(parallel=True, cache=True, fastmath=_NO_NANS)
def _take_rows(
    products: Floats,
    half_norms: Floats,
    left: int,
    right: int,
    scores: Floats,
    index: Indices,
) -> None:
    """Takes x.y - y.y / 2 of a block as candidates of the x, whose heaps start at `left`."""
    height, width = products.shape
    for r in prange(height):
        i = left + r
        threshold = scores[i, 0]
        for start in range(0, width, _CHUNK):
            product = products[r, start : start + _CHUNK]
            norm = half_norms[right + start : right + start + len(product)]
            hits = np.int32(0)  # counting without a branch is what the CPU does 16 at a time
            for c in range(len(product)):
                hits += np.int32(product[c] - norm[c] > threshold)
            if hits:
                for c in range(len(product)):
                    score = product[c] - norm[c]
                    if score > threshold:
                        _replace_worst(score, right + start + c, scores[i], index[i])
                        threshold = scores[i, 0]


@njit(parallel=True, cache=True, fastmath=_NO_NANS)
def _take_columns(
    products: Floats,
    half_norms: Floats,
    left: int,
    right: int,
    scores: Floats,
    index: Indices,
) -> None:
    """Takes x.y - x.x / 2 of a block as candidates of the y, whose heaps start at `right`."""
    height, width = products.shape
    for chunk in prange((width + _CHUNK - 1) // _CHUNK):
        start = chunk * _CHUNK
        first = right + start
        threshold = scores[first : first + min(_CHUNK, width - start), 0].copy()
        for r in range(height):
            norm = half_norms[left + r]
            product = products[r, start : start + _CHUNK]
            hits = np.int32(0)
            for c in range(len(threshold)):
                hits += np.int32(product[c] - norm > threshold[c])
            if hits:
                for c in range(len(threshold)):
                    score = product[c] - norm
                    if score > threshold[c]:
                        _replace_worst(score, left + r, scores[first + c], index[first + c])
                        threshold[c] = scores[first + c, 0]


@njit(cache=True)
def _dot(one: Floats, other: Floats) -> float:
    """Inner product in double precision, in the same order of additions on every machine.

    The product of two single-precision numbers is exact in double precision, so that fused
    multiply-adds make no difference.
    """
    dim = len(one)
    whole = dim - dim % 8
    a = b = c = d = e = f = g = h = 0.0
    for x in range(0, whole, 8):
        a += np.float64(one[x]) * np.float64(other[x])
        b += np.float64(one[x + 1]) * np.float64(other[x + 1])
        c += np.float64(one[x + 2]) * np.float64(other[x + 2])
        d += np.float64(one[x + 3]) * np.float64(other[x + 3])
        e += np.float64(one[x + 4]) * np.float64(other[x + 4])
        f += np.float64(one[x + 5]) * np.float64(other[x + 5])
        g += np.float64(one[x + 6]) * np.float64(other[x + 6])
        h += np.float64(one[x + 7]) * np.float64(other[x + 7])
    for x in range(whole, dim):
        a += np.float64(one[x]) * np.float64(other[x])
    return ((a + e) + (c + g)) + ((b + f) + (d + h))


@njit(parallel=True, cache=True)
def _half_squared_norms(rows: Floats) -> Doubles:
    norms = np.empty(len(rows), np.float64)
    for i in prange(len(rows)):
        norms[i] = 0.5 * _dot(rows[i], rows[i])
    return norms


@njit(parallel=True, cache=True)
def _rescore(
    rows: Floats,
    half_norms: Doubles,
    which: Indices,
    scores: Floats,
    index: Indices,
    k: int,
    bound: float,
) -> tuple[Indices, npt.NDArray[np.bool_]]:
    """The k best candidates of the rows `which`, and whether one could have been missed."""
    count, kept = len(rows), scores.shape[1]
    found = np.empty((len(which), k), np.int32)
    doubtful = np.zeros(len(which), np.bool_)
    for number in prange(len(which)):
        i = which[number]
        best = np.full(k, -np.inf, np.float64)
        best_index = np.full(k, count, np.int32)
        # What lies lower by more than both errors cannot be among the k best.
        enough = np.sort(scores[number])[kept - k] - 2 * bound
        for place in range(kept):
            j = index[number, place]
            if scores[number, place] < enough and j != i:
                continue
            score = np.inf if j == i else _dot(rows[i], rows[j]) - half_norms[j]
            if score > best[k - 1] or (score == best[k - 1] and j < best_index[k - 1]):
                _insert(score, j, best, best_index)
        found[number] = best_index
        missed = best[0] != np.inf or best[k - 1] <= scores[number, 0] + bound
        doubtful[number] = missed and kept < count
    return found, doubtful


@njit(parallel=True, cache=True)
def _search_exactly(rows: Floats, half_norms: Doubles, which: Indices, found: Indices) -> None:
    """The same for some rows, with every score in double precision."""
    count, k = len(rows), found.shape[1]
    for number in prange(len(which)):
        i = which[number]
        scores = np.full(k, -np.inf, np.float64)
        index = np.full(k, -1, np.int32)
        for j in range(count):
            score = np.inf if j == i else _dot(rows[i], rows[j]) - half_norms[j]
            if score > scores[k - 1]:
                _insert(score, j, scores, index)
        found[number] = index


@njit(parallel=True, cache=True)
def all_finite(rows: Floats) -> bool:
    """Whether there is neither NaN nor infinity, without a mask of the size of the rows."""
    bad = 0
    for i in prange(len(rows)):
        for value in rows[i]:
            if not np.isfinite(value):
                bad += 1
    return bad == 0


@njit(cache=True)
def _holds(items: Indices, item: int) -> bool:
    for other in items:  # noqa: SIM110 - numba compiles no generator here
        if other == item:
            return True
    return False


@njit(parallel=True, cache=True)
def _reciprocal(lists: Indices) -> tuple[Indices, Indices]:
    """Sizes (N,) and members (N, k) of the sets {j in list(i): i in list(j)}, in list order."""
    count, k = lists.shape
    sizes = np.zeros(count, np.int32)
    members = np.empty((count, k), np.int32)
    for i in prange(count):
        size = 0
        for place in range(k):
            j = lists[i, place]
            if _holds(lists[j], i):
                members[i, size] = j
                size += 1
        sizes[i] = size
    return sizes, members


@njit(cache=True)
def _expanded_set(
    i: int, sizes: Indices, members: Indices, half_sizes: Indices, half_members: Indices
) -> tuple[int, Indices]:
    """R(i) and the half sets of its members that lie in it by more than two thirds, sorted.

    The size, and an array whose first entries are the set.
    """
    own = members[i, : sizes[i]]
    room = len(own)
    for c in own:
        room += half_sizes[c]
    union = np.empty(room, np.int32)
    size = 0
    for j in own:
        size = _add(j, union, size)
    for c in own:
        theirs = half_members[c, : half_sizes[c]]
        shared = 0
        for j in theirs:
            shared += _holds(own, j)
        if 3 * shared > 2 * len(theirs):
            for j in theirs:
                size = _add(j, union, size)
    return size, union


@njit(cache=True)
def _add(item: int, ordered: Indices, size: int) -> int:
    """Puts an item into a sorted set of some size, and returns the new size."""
    place = size
    while place > 0 and ordered[place - 1] > item:
        place -= 1
    if place > 0 and ordered[place - 1] == item:
        return size
    for other in range(size, place, -1):
        ordered[other] = ordered[other - 1]
    ordered[place] = item
    return size + 1


@njit(parallel=True, cache=True)
def _expanded_sets(
    sizes: Indices, members: Indices, half_sizes: Indices, half_members: Indices, room: int
) -> tuple[Offsets, Indices]:
    """Sizes of the expanded sets, and their first `room` members."""
    count = len(sizes)
    found_sizes = np.zeros(count, np.int64)
    found = np.empty((count, room), np.int32)
    for i in prange(count):
        size, union = _expanded_set(i, sizes, members, half_sizes, half_members)
        found_sizes[i] = size
        kept = min(size, room)
        found[i, :kept] = union[:kept]
    return found_sizes, found


@njit(parallel=True, cache=True)
def _soft_weights(
    rows: Floats,
    half_norms: Doubles,
    indptr: Offsets,
    indices: Indices,
    scale: Floats,
    squared: bool,
) -> Floats:
    """Softmax of the negative distances from each image to the members of its set."""
    weights = np.empty(len(indices), np.float32)
    for i in prange(len(rows)):
        first, last = indptr[i], indptr[i + 1]
        exact = np.empty(last - first, np.float64)
        total = 0.0
        for place in range(first, last):
            j = indices[place]
            product = _dot(rows[i], rows[j])
            distance = max(2 * (half_norms[i] + half_norms[j] - product), 0.0)
            if squared:
                distance = (distance / scale[i]) ** 2 if scale[i] > 0 else 0.0
            exact[place - first] = np.exp(-distance)
            total += exact[place - first]
        for place in range(first, last):
            weights[place] = exact[place - first] / total
    return weights


@njit(cache=True)
def _next_column(
    nearest: Indices, indptr: Offsets, indices: Indices, data: Floats, heads: Offsets
) -> tuple[int, float]:
    """The first column not taken yet of some sorted rows, and its sum over them; -1 = none left."""
    column = -1
    for n in range(len(nearest)):
        if heads[n] < indptr[nearest[n] + 1] and (column < 0 or indices[heads[n]] < column):
            column = indices[heads[n]]
    total = 0.0
    for n in range(len(nearest)):
        if heads[n] < indptr[nearest[n] + 1] and indices[heads[n]] == column:
            total += data[heads[n]]
            heads[n] += 1
    return column, total


@njit(parallel=True, cache=True)
def _expanded_sizes(indptr: Offsets, indices: Indices, data: Floats, nearest: Indices) -> Offsets:
    sizes = np.zeros(len(nearest), np.int64)
    for i in prange(len(nearest)):
        heads = indptr[nearest[i]]
        size = 0
        while _next_column(nearest[i], indptr, indices, data, heads)[0] >= 0:
            size += 1
        sizes[i] = size
    return sizes


@njit(parallel=True, cache=True)
def _expand(
    indptr: Offsets, indices: Indices, data: Floats, nearest: Indices, new_indptr: Offsets
) -> tuple[Indices, Floats]:
    """Local query expansion: each row becomes the mean of the rows near it."""
    new_indices = np.empty(new_indptr[-1], np.int32)
    new_data = np.empty(new_indptr[-1], np.float32)
    for i in prange(len(nearest)):
        heads = indptr[nearest[i]]
        for out in range(new_indptr[i], new_indptr[i + 1]):
            column, total = _next_column(nearest[i], indptr, indices, data, heads)
            new_indices[out] = column
            new_data[out] = total / nearest.shape[1]
    return new_indices, new_data


@njit(nogil=True, cache=True)
def _jaccard_part(
    indptr: Offsets,
    indices: Indices,
    data: Floats,
    column_indptr: Offsets,
    column_indices: Indices,
    column_data: Floats,
    num_gallery: int,
    start: int,
    stop: int,
    max_distance: float,
    counts: Offsets,
) -> tuple[Indices, Floats]:
    """Columns and distances of the rows start to stop, row after row; fills in their counts."""
    shared = np.zeros(num_gallery, np.float64)
    touched = np.empty(num_gallery, np.int32)
    room = 64 * (stop - start)
    found = np.empty(room, np.int32)
    distances = np.empty(room, np.float32)
    size = 0
    for i in range(start, stop):
        num_touched = 0
        for place in range(indptr[i], indptr[i + 1]):
            column, weight = indices[place], data[place]
            for other in range(column_indptr[column], column_indptr[column + 1]):
                j = column_indices[other]
                smaller = min(weight, column_data[other])
                if smaller == 0.0:
                    continue  # underflow of a far member's weight
                if shared[j] == 0.0:
                    touched[num_touched] = j
                    num_touched += 1
                shared[j] += smaller
        if size + num_touched > room:
            room = 2 * (size + num_touched)
            found = _grown(found[:size], room)
            distances = _grown(distances[:size], room)
        before = size
        for j in np.sort(touched[:num_touched]):
            overlap = shared[j]
            shared[j] = 0.0
            distance = np.float32(max(1.0 - overlap / (2.0 - overlap), 0.0))
            if distance < 1.0 and distance <= max_distance:
                found[size] = j
                distances[size] = distance
                size += 1
        counts[i] = size - before
    return found[:size].copy(), distances[:size].copy()


@njit(nogil=True, cache=True)
def _grown(values: npt.NDArray[Any], room: int) -> npt.NDArray[Any]:
    larger = np.empty(room, values.dtype)
    larger[: len(values)] = values
    return larger


@njit(cache=True)
def _dbscan(
    indptr: Offsets, indices: Indices, data: Floats, eps: np.float32, min_samples: int
) -> Labels:
    count = len(indptr) - 1
    core = np.zeros(count, np.bool_)
    for i in range(count):
        near = 1  # itself, stored or not
        for place in range(indptr[i], indptr[i + 1]):
            near += data[place] <= eps and indices[place] != i
        core[i] = near >= min_samples
    labels = np.full(count, -1, np.int64)
    stack = np.empty(count, np.int64)
    cluster = 0
    for seed in range(count):
        if labels[seed] != -1 or not core[seed]:
            continue
        labels[seed] = cluster
        stack[0] = seed
        depth = 1
        while depth:
            depth -= 1
            i = stack[depth]
            for place in range(indptr[i], indptr[i + 1]):
                j = indices[place]
                if data[place] <= eps and labels[j] == -1:
                    labels[j] = cluster
                    if core[j]:
                        stack[depth] = j
                        depth += 1
        cluster += 1
    return labels
