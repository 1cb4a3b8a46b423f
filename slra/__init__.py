"""Sparse and low-rank approximation, and attention on it, for every array library."""

from slra import prox
from slra.attn import (
    AttentionBasis,
    attention,
    attention_vjp,
    fit_attention,
    low_rank_attention,
    merge_attention,
)
from slra.prox import prox_l1 as soft_threshold
from slra.svd import SVDResult, randomized_svd, truncated_svd

__version__ = "0.1.0"

__all__ = [
    "AttentionBasis",
    "SVDResult",
    "attention",
    "attention_vjp",
    "fit_attention",
    "low_rank_attention",
    "merge_attention",
    "prox",
    "randomized_svd",
    "soft_threshold",
    "truncated_svd",
]
