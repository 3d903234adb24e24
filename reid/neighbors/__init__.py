"""Exact nearest neighbours and the sparse k-reciprocal Jaccard distance.

No N x N matrix is built: scores are computed in tiles that fit into a cache, each pair of blocks
once, and only the best candidates of each row are kept. Candidates are found in half precision
(bfloat16) where the CPU multiplies it faster, otherwise in single precision, and are then scored
again in double precision in a fixed order of operations. A rounding bound tells for each row
whether a neighbour may have been missed; if so, the row is searched again in the next higher
precision. So the result is exact, and the same for any block size, number of threads and machine.

Features of a trained network lie near few directions. Then products of short, projected rows bound
those of the features (`projection`), and the search for candidates takes a fraction of the
time. A sample decides in how many dimensions, or that it does not pay (`plan`). Rows for which the
bound leaves more candidates than there is room for are searched again without a projection, so
that the lists are the same. On a GPU all dimensions are multiplied.

Many rows are first put into an order in which near ones follow each other (`order`), so files in a
random order take hardly longer.

`reid.neighbors.shards` does this and what follows for more rows than memory holds, on disk.

k-reciprocal sets and the Jaccard distance are those of Zhong et al., *Re-ranking Person
Re-identification with k-reciprocal Encoding* (CVPR 2017), in the form that unsupervised
re-identification has used since Ge et al., *Self-paced Contrastive Learning* (NeurIPS 2020).
"""

from reid.neighbors.agreement import list_agreement, other_neighbors
from reid.neighbors.density import TIE_TOLERANCE, dbscan
from reid.neighbors.footprint import jaccard_memory_mb, log_memory, neighbors_memory_mb
from reid.neighbors.jaccard import (
    by_columns,
    encode_neighbors,
    half_length,
    jaccard_distance,
    jaccard_of_rows,
    jaccard_rows,
)
from reid.neighbors.kernels import Labels, all_finite, as_rows, run_in_pieces
from reid.neighbors.processes import SearchError
from reid.neighbors.reranking import (
    DistanceColumns,
    Reranked,
    rerank_distances,
    row_blocks,
    smallest_of_rows,
)
from reid.neighbors.search import (
    Search,
    approximate_neighbors,
    farthest_distances,
    nearest_neighbors,
)
from reid.neighbors.sourced import SparseDistances, reranked_jaccard, source_push

__all__ = [
    "TIE_TOLERANCE",
    "DistanceColumns",
    "Labels",
    "Reranked",
    "Search",
    "SearchError",
    "SparseDistances",
    "all_finite",
    "approximate_neighbors",
    "as_rows",
    "by_columns",
    "dbscan",
    "encode_neighbors",
    "farthest_distances",
    "half_length",
    "jaccard_distance",
    "jaccard_memory_mb",
    "jaccard_of_rows",
    "jaccard_rows",
    "list_agreement",
    "log_memory",
    "nearest_neighbors",
    "neighbors_memory_mb",
    "other_neighbors",
    "rerank_distances",
    "reranked_jaccard",
    "row_blocks",
    "run_in_pieces",
    "smallest_of_rows",
    "source_push",
]
