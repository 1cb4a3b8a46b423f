"""Exact attention and attention on low-rank factors.

The folder is not called ``attention`` because ``slra.attention`` is a function.
"""

from slra.attn.basis import AttentionBasis
from slra.attn.exact import attention
from slra.attn.fit import fit_attention
from slra.attn.low_rank import low_rank_attention
from slra.attn.low_rank_vjp import low_rank_attention_vjp
from slra.attn.merge import merge_attention
from slra.attn.vjp import attention_vjp

__all__ = [
    "AttentionBasis",
    "attention",
    "attention_vjp",
    "fit_attention",
    "low_rank_attention",
    "low_rank_attention_vjp",
    "merge_attention",
]
