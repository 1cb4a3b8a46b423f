"""Attention on randomly projected sequences.

Source: S. Wang et al., Linformer: self-attention with linear complexity, arXiv:2006.04768, equation 7, with the
Gaussian projection of their Theorem 2 in place of a trained one, shared by keys and values.
"""

from slra._typing import Array
from slra.attn._rows import Grouped

__all__ = ["linformer_attention"]


def linformer_attention(data: Grouped, rank: int, n_exact: int) -> Array:
    """Attend to ``rank`` random combinations of the keys, with entries of variance 1/rank."""
    backend = data.backend
    projection = backend.test_matrix((data.k.shape[-2], rank), 0, data.k)
    projection = backend.xp.matrix_transpose(projection) * rank**-0.5
    k, v = (projection @ x for x in (data.k, data.v))
    return backend.attention_output(
        data.q, k[..., None, :, :], v[..., None, :, :], None, data.options
    )
