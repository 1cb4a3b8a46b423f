"""Matrices as a low-rank part and a sparse part."""

from slra.decompose._sparse_low_rank_matrix import LowRankPlusSparse
from slra.decompose.complete import CompletionResult, complete
from slra.decompose.compress import compress
from slra.decompose.robust_pca import RobustPCAResult, robust_pca
from slra.decompose.sparse_low_rank import SparseLowRankResult, sparse_low_rank

__all__ = [
    "CompletionResult",
    "LowRankPlusSparse",
    "RobustPCAResult",
    "SparseLowRankResult",
    "complete",
    "compress",
    "robust_pca",
    "sparse_low_rank",
]
