"""Fitting a basis to queries, keys and values."""

import math
from typing import Any, NamedTuple

import numpy as np

from slra._backends.ambient import isolated
from slra._typing import RNG, Array, CausalAlign
from slra._validate import (
    check_choice,
    check_finite,
    check_flag,
    check_positive,
    check_rank,
    check_rng,
)
from slra.attn._adaptive import choose_ranks, mask_ranks
from slra.attn._inputs import Inputs, check_inputs
from slra.attn._maps import METHODS, Factors, RowSample, cut
from slra.attn._predict import GroupedMaps, output_error
from slra.attn._rows import Grouped, group, sample_rows
from slra.attn.basis import AttentionBasis, Maps

__all__ = [
    "N_ROWS",
    "Fitted",
    "check_ranks",
    "constant_inputs",
    "fit_attention",
    "fit_inputs",
    "lay_out",
    "of_query_heads",
]

# Rows of the attention matrix that a fit looks at, at least, over the query heads that share a key head.
N_ROWS = 128
# The same where the rank is to be chosen, and rows that ranks are chosen by.
N_TEST_ROWS = 512


@isolated
def fit_attention(
    q: Array,
    k: Array,
    v: Array,
    rank: int | tuple[int, int] | None = None,
    *,
    rtol: float | None = None,
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
        Dimensions to keep; a pair gives that of queries and keys, and that of values. With ``rtol``, at most as many.
    rtol : float, optional
        Relative Frobenius error of the output, per query head, to stay within. Each key head gets the pair of ranks
        with the smallest sum that does, and runs at these ranks. Not on lazy arrays: ranks would depend on data.
    method : {"output", "scores", "svd"}
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
        If shapes do not fit, a rank is out of range, ``rtol`` meets a lazy array, or an
        input is not finite where values can be looked at.

    Notes
    -----
    "svd" takes the right singular vectors of Q, K and V. "scores" takes the best rank of :math:`Q (K - 1 c^T)^T`, by QR
    of both and the SVD of the small core; the shift c, the mean key, changes no softmax weight. "output" replaces the
    Frobenius norm of the scores by one in which a key counts by the attention it receives, and projects V on the
    leading right singular vectors of the output; both are estimated from at least 128 rows of the attention matrix,
    and from at least twice the rank.

    With ``rtol`` the errors of all pairs of ranks are computed on up to 512 rows, others than those of the fit where
    there are as many. Where that is not all, but S of them, the target is lowered by the factor 1 + 2/sqrt(S), as the
    error of all rows may exceed that of a sample; ``error`` holds what is predicted. Where no pair of ranks is within
    ``rtol``, the largest is taken.

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
    check_flag(pool_batch, "pool_batch")
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
        check_finite(inputs.backend, getattr(inputs, name), name)
    with inputs.backend.ignore_overflow():
        fitted = fit_inputs(
            inputs,
            rank,
            rtol=rtol,
            method=method,
            enable_gqa=enable_gqa,
            pool_batch=pool_batch,
            rng=None if rng is None else check_rng(rng),
        )
        maps = lay_out(fitted)
        arrays = {**maps._asdict(), "error": predict_error(fitted)}
    ranks = arrays.pop("ranks")
    basis: AttentionBasis = inputs.backend.make_dataclass(AttentionBasis, arrays, {"ranks": ranks})
    return basis


class Fitted(NamedTuple):
    """Maps by key head, the ranks of each, and what is needed to judge them."""

    data: Grouped
    factors: Factors
    maps: GroupedMaps
    ranks: tuple[tuple[int, int], ...]
    test_rows: list[int]
    pool_batch: bool
    has_heads: bool


def fit_inputs(
    inputs: Inputs,
    rank: Any,
    *,
    rtol: float | None,
    method: str,
    enable_gqa: bool,
    pool_batch: bool = False,
    rng: np.random.Generator | None = None,
    keep: Array | None = None,
) -> Fitted:
    """Fit validated inputs, to the keys that are to be kept; raise where rank or rtol is wrong."""
    backend = inputs.backend
    limits = check_ranks(inputs, rank, rtol)
    rtol = None if rtol is None else check_positive(rtol, "rtol")
    data = group(constant_inputs(inputs), enable_gqa=enable_gqa)
    n_rows = max(N_ROWS if rtol is None else N_TEST_ROWS, 2 * max(limits))
    rows, test_rows = (
        sample_rows(data.q.shape[-2], -(-n_rows // data.q.shape[-3]), rng, offset=offset)
        for offset in (0.0, 0.5)
    )
    factors = METHODS[method](data, RowSample(rows, pool_batch, keep))
    if rtol is None:
        ranks = [limits] * factors.wk.shape[-3]
    else:
        # A norm over some of the rows is not that over all of them: leave room where not all are seen.
        is_sample = len(test_rows) < data.q.shape[-2]
        target = rtol / (1 + 2 / math.sqrt(len(test_rows))) if is_sample else rtol
        ranks = choose_ranks(data, factors, test_rows, target, limits, pool_batch=pool_batch)
        factors = mask_ranks(factors, ranks, data)
    widest = max(qk for qk, _ in ranks), max(v for _, v in ranks)
    maps = GroupedMaps(*cut(factors, *widest, backend), factors.c, factors.mu)
    return Fitted(data, factors, maps, tuple(ranks), test_rows, pool_batch, inputs.has_heads)


def constant_inputs(inputs: Inputs) -> Inputs:
    """Cut gradients off."""
    named = {name: getattr(inputs, name) for name in ("q", "k", "v", "mask")}
    constant = {name: inputs.backend.stop_gradient(x) for name, x in named.items() if x is not None}
    return inputs._replace(**constant)


def check_ranks(inputs: Inputs, rank: Any, rtol: Any = None) -> tuple[int, int]:
    """Return the rank of queries and keys, and that of values: the largest, where rtol is to choose."""
    limit_qk = min(inputs.q.shape[-2], inputs.k.shape[-2], inputs.q.shape[-1])
    limit_v = min(inputs.v.shape[-2:])
    if rtol is not None:
        check_positive(rtol, "rtol")
        if not inputs.backend.is_eager(inputs.q):
            raise ValueError("rank must be given instead of rtol for lazy arrays: ranks are static")
        if rank is None:
            return limit_qk, limit_v
    elif rank is None:
        raise TypeError("rank must be an int or a pair (rank_qk, rank_v) unless rtol is given")
    pair = rank if isinstance(rank, (tuple, list)) else (rank, rank)
    if len(pair) != 2:
        raise TypeError(f"rank must be an int or a pair (rank_qk, rank_v), got {rank!r}")
    return (
        check_rank(pair[0], limit_qk, limit_is="min of Nq, Nk and D"),
        check_rank(pair[1], limit_v, limit_is="min of Nk and Dv"),
    )


def lay_out(fitted: Fitted) -> Maps:
    """Lay the maps out by query head and key head; without a head axis if the inputs have none."""
    maps = fitted.maps
    uv = fitted.data.backend.xp.matrix_transpose(maps.wv)
    wq = of_query_heads(maps.wq, fitted)
    laid_out = Maps(wq, maps.wk, maps.wv, uv, maps.c, maps.mu, fitted.ranks)
    if fitted.has_heads:
        return laid_out
    return Maps(*(x[0, ...] for x in laid_out[:-1]), ranks=fitted.ranks)  # type: ignore[misc]


def of_query_heads(x: Array, fitted: Fitted) -> Array:
    """Lay (..., H, G or 1, M, N) out by query head."""
    xp, n_shared = fitted.data.backend.xp, fitted.data.q.shape[-3]
    x = xp.broadcast_to(x, (*x.shape[:-3], n_shared, *x.shape[-2:]))
    return xp.reshape(x, (*x.shape[:-4], x.shape[-4] * n_shared, *x.shape[-2:]))


def predict_error(fitted: Fitted) -> Array:
    """Relative error of the output on rows other than those of the fit, (..., Hq)."""
    data = fitted.data
    error = output_error(data, fitted.maps, fitted.test_rows, pool_batch=fitted.pool_batch)
    error = data.backend.xp.reshape(error, (*error.shape[:-2], -1))
    return error if fitted.has_heads else error[..., 0]
