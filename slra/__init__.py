"""Sparse and low-rank approximation, and attention on it, for every array library."""

from slra import prox
from slra.attn import attention, low_rank_attention
from slra.prox import prox_l1 as soft_threshold
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
    "EighResult",
    "ErrorEstimate",
    "MatrixOperator",
    "SVDResult",
    "attention",
    "estimate_error",
    "low_rank_attention",
    "prox",
    "randomized_eigh",
    "randomized_svd",
    "soft_threshold",
    "truncated_svd",
]
