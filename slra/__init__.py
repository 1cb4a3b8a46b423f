"""Sparse and low-rank approximation, and attention on it, for every array library."""

import importlib
from typing import TYPE_CHECKING, Any

from slra import objective, prox
from slra._backends import register_backend
from slra.attn import (
    AttentionBasis,
    FoldedProjections,
    attention,
    attention_vjp,
    fit_attention,
    low_rank_attention,
    low_rank_attention_vjp,
    merge_attention,
)
from slra.cache import KVCache
from slra.decompose import (
    CompletionResult,
    LowRankPlusSparse,
    RobustPCAResult,
    SparseLowRankResult,
    complete,
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

if TYPE_CHECKING:
    from slra import baselines, integrations

__version__ = "0.1.0"

__all__ = [
    "AttentionBasis",
    "CompletionResult",
    "EighResult",
    "ErrorEstimate",
    "FoldedProjections",
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
    "baselines",
    "complete",
    "compress",
    "estimate_error",
    "fit_attention",
    "integrations",
    "low_rank_attention",
    "low_rank_attention_vjp",
    "merge_attention",
    "objective",
    "primal_dual",
    "prox",
    "proximal_gradient",
    "randomized_eigh",
    "randomized_svd",
    "register_backend",
    "robust_pca",
    "soft_threshold",
    "sparse_low_rank",
    "truncated_svd",
]


def __getattr__(name: str) -> Any:
    """Import what not everybody asks for once somebody does."""
    if name in ("baselines", "integrations"):
        return importlib.import_module(f"slra.{name}")
    raise AttributeError(f"module 'slra' has no attribute {name!r}")
