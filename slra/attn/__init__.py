"""Exact attention and attention on low-rank factors.

The folder is not called ``attention`` because ``slra.attention`` is a function.
"""

from slra.attn.basis import AttentionBasis, FoldedProjections
from slra.attn.exact import attention, attention_vjp, merge_attention
from slra.attn.fit import fit_attention
from slra.attn.low_rank import low_rank_attention, low_rank_attention_vjp

__all__ = [
    "AttentionBasis",
    "FoldedProjections",
    "attention",
    "attention_vjp",
    "fit_attention",
    "low_rank_attention",
    "low_rank_attention_vjp",
    "merge_attention",
]
