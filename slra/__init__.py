"""Sparse and low-rank approximation, and attention on it, for every array library."""

from slra import objective, prox
from slra.attn import (
    AttentionBasis,
    KVCache,
    attention,
    attention_vjp,
    fit_attention,
    low_rank_attention,
    low_rank_attention_vjp,
    merge_attention,
)
from slra.decompose import (
    LowRankPlusSparse,
    RobustPCAResult,
    SparseLowRankResult,
    compress,
    robust_pca,
    sparse_low_rank,
)
from slra.prox import prox_l1 as soft_threshold
from slra.solvers import Progress, SolveResult, admm, primal_dual, proximal_gradient
from slra.svd import (
    EighResult,
    ErrorEstimate,
    MatrixOperator,
    SVDResult,
    estimate_error,
    randomized_eigh,
    randomized_svd,
    truncated_svd,
)

__version__ = "0.1.0"

__all__ = [
    "AttentionBasis",
    "EighResult",
    "ErrorEstimate",
    "KVCache",
    "LowRankPlusSparse",
    "MatrixOperator",
    "Progress",
    "RobustPCAResult",
    "SVDResult",
    "SolveResult",
    "SparseLowRankResult",
    "admm",
    "attention",
    "attention_vjp",
    "compress",
    "estimate_error",
    "fit_attention",
    "low_rank_attention",
    "low_rank_attention_vjp",
    "merge_attention",
    "objective",
    "primal_dual",
    "prox",
    "proximal_gradient",
    "randomized_eigh",
    "randomized_svd",
    "robust_pca",
    "soft_threshold",
    "sparse_low_rank",
    "truncated_svd",
]
