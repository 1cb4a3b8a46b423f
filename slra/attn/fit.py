"""Fitting a basis to queries, keys and values."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from slra._typing import RNG, Array, CausalAlign
from slra._validate import check_choice, check_finite, check_rank, check_rng
from slra.attn._inputs import Inputs, check_inputs
from slra.attn._maps import METHODS, RowSample, cut
from slra.attn._predict import GroupedMaps, output_error
from slra.attn._rows import Grouped, group, sample_rows
from slra.attn.basis import AttentionBasis

__all__ = ["check_ranks", "fit_attention", "fit_inputs"]

# Rows of the attention matrix that a fit looks at, at least, over the query heads that share a key head.
N_ROWS = 128


def fit_attention(
    q: Array,
    k: Array,
    v: Array,
    rank: int | tuple[int, int],
    *,
    method: str = "output",
    pool_batch: bool = False,
    rng: RNG = None,
    mask: Array | None = None,
    is_causal: bool = False,
    causal_align: CausalAlign = "bottom_right",
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
) -> AttentionBasis:
    r"""Fit the linear maps under which attention on these queries, keys and values runs in few dimensions.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    rank : int or (int, int)
        Dimensions to keep; a pair gives that of queries and keys, and that of values.
    method : {"output", "joint", "svd"}
        What is approximated best: the output of attention; the products of queries and keys, and the values; or
        queries, keys and values each on its own, uncentred, per head.
    pool_batch : bool
        Whether to fit one basis to all leading axes before the head axis, as a calibration set needs; otherwise each
        batch element gets its own.
    rng : int, numpy.random.Generator or None
        Which rows of the attention are looked at: one from each of equal strata of the queries, drawn from this
        generator, or chosen deterministically (by the golden ratio) with None.
    mask, is_causal, causal_align, scale, enable_gqa, softcap
        As in `attention`: "output" weights keys by the attention they get under these.

    Returns
    -------
    AttentionBasis
        In the common dtype of the arguments (float32 for half precision), on their device. With ``enable_gqa`` the
        query heads that share a key head share its basis.

    Raises
    ------
    TypeError
        If an array is not real floating, or ``rank`` is not an int or a pair of them.
    ValueError
        If shapes do not fit, a rank is out of range, or an input is not finite where values can be looked at.

    Notes
    -----
    "svd" takes the right singular vectors of Q, K and V. "joint" takes the best rank of :math:`Q (K - 1 c^T)^T`, by QR
    of both and the SVD of the small core; the shift c, the mean key, changes no softmax weight. "output" replaces the
    Frobenius norm of the scores by one in which a key counts by the attention it receives, and projects V on the
    leading right singular vectors of the output; both are estimated from at least 128 rows of the attention matrix,
    and from at least twice the rank.

    A basis fitted on a whole sequence has seen all of it: under a causal mask fit on a prefix, or on other data, if
    no output may depend on later tokens.

    The result is constant: gradients do not flow into the fit.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> basis = slra.fit_attention(q, k, v, 8)
    >>> bool(np.allclose(basis.attend(q, k, v), slra.attention(q, k, v)))
    True
    """
    check_choice(method, tuple(METHODS), "method")
    inputs = check_inputs(
        q,
        k,
        v,
        mask=mask,
        is_causal=is_causal,
        causal_align=causal_align,
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
    )
    for name in ("q", "k", "v"):
        check_finite(inputs.table, getattr(inputs, name), name)
    ranks = check_ranks(inputs, rank)
    generator = None if rng is None else check_rng(rng)
    return fit_inputs(
        inputs, ranks, method, enable_gqa=enable_gqa, pool_batch=pool_batch, rng=generator
    )


def check_ranks(inputs: Inputs, rank: Any) -> tuple[int, int]:
    """Return the rank of queries and keys, and that of values."""
    pair = rank if isinstance(rank, Sequence) and not isinstance(rank, str) else (rank, rank)
    if len(pair) != 2:
        raise TypeError(f"rank must be an int or a pair (rank_qk, rank_v), got {rank!r}")
    limit_qk = min(inputs.q.shape[-2], inputs.k.shape[-2], inputs.q.shape[-1])
    limit_v = min(inputs.v.shape[-2:])
    return (
        check_rank(pair[0], limit_qk, limit_is="min of Nq, Nk and D"),
        check_rank(pair[1], limit_v, limit_is="min of Nk and Dv"),
    )


def fit_inputs(
    inputs: Inputs,
    ranks: tuple[int, int],
    method: str,
    *,
    enable_gqa: bool,
    pool_batch: bool = False,
    rng: np.random.Generator | None = None,
) -> AttentionBasis:
    """Fit validated inputs at a fixed rank."""
    table = inputs.table
    constant = inputs._replace(
        **{
            name: table.constant(getattr(inputs, name))
            for name in ("q", "k", "v", "mask")
            if getattr(inputs, name) is not None
        }
    )
    data = group(constant, enable_gqa=enable_gqa)
    n_rows = -(-max(N_ROWS, 2 * max(ranks)) // data.q.shape[-3])
    rows = sample_rows(data.q.shape[-2], n_rows, rng)
    factors = METHODS[method](data, RowSample(rows, pool_batch))
    wq, wk, wv = cut(factors, *ranks, table)
    maps = GroupedMaps(wq, wk, wv, factors.c, factors.mu)
    others = sample_rows(data.q.shape[-2], n_rows, rng, offset=0.5)
    error = output_error(data, maps, others, pool_batch=pool_batch)
    has_heads = max(x.ndim for x in (inputs.q, inputs.k, inputs.v)) > 2
    return _assemble(data, maps, ranks, error, has_heads=has_heads)


def _assemble(
    data: Grouped,
    maps: GroupedMaps,
    ranks: tuple[int, int],
    error: Array,
    *,
    has_heads: bool,
) -> AttentionBasis:
    """Lay the maps out by query head and key head; without a head axis if the inputs have none."""
    xp, n_shared = data.table.xp, data.q.shape[-3]
    wq = xp.broadcast_to(maps.wq, (*maps.wq.shape[:-3], n_shared, *maps.wq.shape[-2:]))
    n_heads = maps.wk.shape[-3]
    arrays = {
        "wq": xp.reshape(wq, (*wq.shape[:-4], n_heads * n_shared, *wq.shape[-2:])),
        "wk": maps.wk,
        "wv": maps.wv,
        "uv": xp.matrix_transpose(maps.wv),
        "c": maps.c,
        "mu": maps.mu,
        "error": xp.reshape(error, (*error.shape[:-2], n_heads * n_shared)),
    }
    if not has_heads:
        arrays = {name: x[0, ...] for name, x in arrays.items()}
    basis: AttentionBasis = data.table.record(AttentionBasis, arrays, {"ranks": (ranks,) * n_heads})
    return basis
