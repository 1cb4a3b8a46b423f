"""Sparse and low-rank approximation, and attention on it, for every array library."""

from slra import prox
from slra.attn import attention, low_rank_attention
from slra.prox import prox_l1 as soft_threshold
from slra.solvers import Progress, SolveResult, admm, proximal_gradient
from slra.svd import SVDResult, randomized_svd, truncated_svd

__version__ = "0.1.0"

__all__ = [
    "Progress",
    "SVDResult",
    "SolveResult",
    "admm",
    "attention",
    "low_rank_attention",
    "prox",
    "proximal_gradient",
    "randomized_svd",
    "soft_threshold",
    "truncated_svd",
]
