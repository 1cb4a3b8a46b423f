"""Exact attention and attention on low-rank factors.

The folder is not called ``attention`` because ``slra.attention`` is a function.
"""

from slra.attn.exact import attention
from slra.attn.low_rank import low_rank_attention

__all__ = ["attention", "low_rank_attention"]
