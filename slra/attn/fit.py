"""Fitting a basis to queries, keys and values."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from slra._backends.ambient import isolated
from slra._typing import RNG, AnyArray, Array, ArrayT, CausalAlign
from slra._validate import (
    check_choice,
    check_count,
    check_flag,
    check_positive,
    check_rank,
    check_rng,
)
from slra.attn._estimators import METHODS, Factors, RowSample
from slra.attn._ranks import Ranks, choose_ranks, mask_ranks, output_error
from slra.attn.basis import AttentionBasis
from slra.attn.coding import fit_coding
from slra.attn.maps import Maps
from slra.attn.problem import AttentionProblem, Seen, make_problem, ungroup_heads
from slra.attn.rotary import check_rotary
from slra.attn.rows import Rows, sample_rows, sample_seen_rows

__all__ = ["METHODS", "N_ROWS", "Fitted", "Ranks", "fit_attention", "fit_problem"]

# Rows of the attention matrix that a fit samples, at least, of each query head: some head dimensions have 128
# directions, and fewer rows than directions would leave some without data.
N_ROWS = 128
# The same where the rank is to be chosen, and rows that ranks are chosen by.
N_TEST_ROWS = 512


@isolated
def fit_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    rank: int | tuple[int, int] | None = None,
    *,
    rtol: float | None = None,
    method: str = "output",
    pool_batch: bool = False,
    across_heads: bool = False,
    rotary: Sequence[float] | AnyArray | None = None,
    n_rows: int | None = None,
    rng: RNG = None,
    mask: AnyArray | None = None,
    is_causal: bool = False,
    causal_align: CausalAlign | None = None,
    window: tuple[int | None, int | None] | None = None,
    lengths_q: Any = None,
    lengths_k: Any = None,
    sinks: AnyArray | None = None,
    alibi: AnyArray | None = None,
    scale: float | AnyArray | None = None,
    enable_gqa: bool = False,
    softcap: float | AnyArray | None = None,
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
    across_heads : bool
        Whether ``coding``, by which a cache in bits stores keys and values, has one set of coordinates for all key
        heads of a layer together. Fewer bits say the same then; a cache decodes coordinates to heads before it
        computes scores, which takes Hkv times the products. All else, ranks too, remains that of each head.
    rotary : sequence of float, optional
        Frequencies of a rotary position embedding that comes after ``q`` and ``k``, as `KVCache` takes them. ``coding``
        then is for a cache with the same ones: values count by the attention after the rotation, keys by the queries
        that see them from any distance. All else, ``error`` too, is for ``q`` and ``k`` as they are.
    n_rows : int, optional
        Rows of the attention matrix to look at, of each query head; by default 128, or four times the rank if that is
        more (with ``rtol`` 512). More of them lower the error, and cost as much as attention of as many queries: for a
        calibration set take all. Methods other than "output" look at all queries, keys and values in any case.
    rng : int, numpy.random.Generator or None
        Which rows of the attention matrix are sampled: one from each of equal strata of the queries, drawn from this
        generator, or chosen deterministically (by the golden ratio) with None.
    mask, is_causal, causal_align, window, lengths_q, lengths_k, sinks, alibi, scale, enable_gqa, softcap
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
        input is not finite and concrete.

    Notes
    -----
    Whatever the method and the rank, where arrays are concrete the basis also records ``coding``: maps to all D
    dimensions, in units in which an error costs the same in each, and what each is worth. `KVCache` rounds in these.

    "svd" takes the right singular vectors of Q, K and V. "scores" takes the best rank of :math:`Q (K - 1 c^T)^T`, by QR
    of both and the SVD of the small core; the shift c, the mean key, changes no softmax weight. "output" replaces the
    Frobenius norm of the scores by one in which a key counts by the attention it receives, and projects V on the
    leading right singular vectors of the output; both are estimated from ``n_rows`` rows of the attention matrix.

    Keys that no query sees, and queries that see nothing, take no part, whatever they hold.

    ``error`` is held out: it is that of a basis of the same ranks, fitted to the first half of the queries (under
    causality with the keys that these see), on rows of the second half. On the data of the fit the error is smaller,
    for text 2 to 4 times. A single query has no other to be judged by: ``is_held_out`` is False then.

    With ``rtol`` the errors of all pairs of ranks on the data given are computed on up to 512 rows, others than those
    of the fit where there are as many. Where that is not all, but S of them, the target is lowered by the factor
    1 + 2/sqrt(S), as the error of all rows may exceed that of a sample. Where no pair of ranks is within ``rtol``,
    the largest is taken.

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
    check_flag(across_heads, "across_heads")
    problem = make_problem(
        q,
        k,
        v,
        mask=mask,
        is_causal=is_causal,
        causal_align=causal_align,
        window=window,
        lengths_q=lengths_q,
        lengths_k=lengths_k,
        sinks=sinks,
        alibi=alibi,
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
    )
    problem.check_finite()
    frequencies = None if rotary is None else check_rotary(rotary, problem.q.shape[-1])
    with (same_bits := problem.backend.same_bits()), same_bits:
        fitted = fit_problem(
            problem,
            rank,
            rtol=rtol,
            method=method,
            pool_batch=pool_batch,
            n_rows=n_rows,
            rng=None if rng is None else check_rng(rng),
        )
        error, is_held_out = predicted_error(fitted)
        arrays = {**fitted.maps.by_head(problem), "error": error}
        # Its steps are chosen by values.
        is_concrete = problem.backend.is_eager(problem.q)
        arrays["coding"] = None
        if is_concrete:
            how = {"pool_batch": pool_batch, "across_heads": across_heads}
            arrays["coding"] = fit_coding(fitted.problem, rotary=frequencies, **how)
    basis: AttentionBasis = problem.backend.make_dataclass(
        AttentionBasis, arrays, {"ranks": fitted.ranks, "is_held_out": is_held_out}
    )
    return basis


class Fitted(NamedTuple):
    """Maps for the ranks of each key head, and what they were made of and are judged by."""

    problem: AttentionProblem  # without what is hidden
    seen: Seen
    method: str
    n_rows: int
    pool_batch: bool
    rng: np.random.Generator | None
    factors: Factors
    maps: Maps

    @property
    def ranks(self) -> Ranks:
        """Rank of queries and keys, and of values, for each key head."""
        return self.maps.ranks


def fit_problem(
    problem: AttentionProblem,
    rank: Any,
    *,
    rtol: float | None,
    method: str,
    pool_batch: bool = False,
    n_rows: int | None = None,
    rng: np.random.Generator | None = None,
    keep: Array | None = None,
) -> Fitted:
    """Fit a problem, to the keys that are to be kept, (..., H, Nk); raise where rank, rtol or n_rows is wrong."""
    limits = _check_ranks(problem, rank, rtol, pool_batch=pool_batch)
    rtol = None if rtol is None else check_positive(rtol, "rtol")
    if n_rows is None:
        # Fewer rows than the rank would leave directions without data; four times as many determine the last of them.
        n_rows = max(N_ROWS if rtol is None else N_TEST_ROWS, 4 * max(limits))
    elif (n_rows := check_count(n_rows, "n_rows")) == 0:
        raise ValueError("n_rows must be 1 or more, got 0")
    problem = problem.constant().with_lengths_written_out().broadcast()
    seen = problem.seen()
    problem = problem.keep(seen)
    # The formula looks at all of them; what a generator gives later must not depend on the method.
    is_needed = method != "svd" or rng is not None
    rows = _sample(problem, seen.queries, n_rows, rng) if is_needed else []
    factors = METHODS[method](problem, RowSample(rows, pool_batch, keep, seen))
    if rtol is None:
        ranks: Ranks = (limits,) * factors.wk.shape[-4]
    else:
        test_rows = _sample(problem, seen.queries, n_rows, rng, offset=0.5)
        # A norm over some of the rows is not that over all of them: leave room where not all are seen.
        is_sample = n_rows < problem.q.shape[-2]
        target = rtol / (1 + 2 / math.sqrt(n_rows)) if is_sample else rtol
        ranks = choose_ranks(problem, factors, test_rows, target, limits, pool_batch=pool_batch)
        factors = mask_ranks(factors, ranks, problem)
    maps = factors.maps(ranks, problem.xp)
    return Fitted(problem, seen, method, n_rows, pool_batch, rng, factors, maps)


def _sample(
    problem: AttentionProblem,
    seen: Array | None,
    n_rows: int,
    rng: np.random.Generator | None,
    offset: float = 0.0,
) -> Rows:
    n_queries = problem.q.shape[-2]
    return sample_seen_rows(seen, n_queries, n_rows, rng, problem.backend, offset=offset)


def _check_ranks(
    problem: AttentionProblem, rank: Any, rtol: Any = None, *, pool_batch: bool = False
) -> tuple[int, int]:
    """Return the rank of queries and keys, and that of values: the largest, where rtol is to choose."""
    # A pooled fit has the rows of all sequences.
    n_rows = problem.k.shape[-2] * (math.prod(problem.k.shape[:-4]) if pool_batch else 1)
    limit_qk, limit_v = (min(n_rows, x.shape[-1]) for x in (problem.k, problem.v))
    if rtol is not None:
        check_positive(rtol, "rtol")
        if not problem.backend.is_eager(problem.q):
            raise ValueError("rank must be given instead of rtol for lazy arrays: ranks are static")
        if rank is None:
            return limit_qk, limit_v
    elif rank is None:
        raise TypeError("rank must be an int or a pair (rank_qk, rank_v) unless rtol is given")
    pair = rank if isinstance(rank, (tuple, list)) else (rank, rank)
    if len(pair) != 2:
        raise TypeError(f"rank must be an int or a pair (rank_qk, rank_v), got {rank!r}")
    return (
        check_rank(pair[0], limit_qk, limit_is="min of Nk and D"),
        check_rank(pair[1], limit_v, limit_is="min of Nk and Dv"),
    )


class Held(NamedTuple):
    """A problem in two parts: of the first queries, to fit to, and rows of the others, to test on."""

    first: AttentionProblem
    seen: Seen
    test_rows: Rows
    counted: Array | None = None  # which of the rows are of the others; None for all


def predicted_error(fitted: Fitted) -> tuple[Array, bool]:
    """Relative error of the output to expect of other queries, (..., Hq), and whether it could be held out.

    It is that of maps of the same ranks, fitted to the first half of the queries that see something, on the others.
    Under causality the first half sees the first keys only. A single query is judged by the fit to it.
    """
    problem, pooled = fitted.problem, fitted.pool_batch
    held = _held_out(fitted)
    if held is None:
        rows = _sample(problem, fitted.seen.queries, fitted.n_rows, fitted.rng, offset=0.5)
        maps, counted = fitted.maps, None
    else:
        rows, counted = held.test_rows, held.counted
        fit_rows = _sample(held.first, held.seen.queries, fitted.n_rows, fitted.rng)
        sample = RowSample(fit_rows, pooled, None, held.seen)
        factors = METHODS[fitted.method](held.first, sample)
        if len(set(fitted.ranks)) > 1:
            factors = mask_ranks(factors, fitted.ranks, problem)
        maps = factors.maps(fitted.ranks, problem.xp)
    error = output_error(problem, maps, rows, counted, pool_batch=pooled)
    error = ungroup_heads(error, any(problem.with_heads), problem.backend, n_trailing=0)
    return error, held is not None


def _held_out(fitted: Fitted) -> Held | None:
    """Cut the queries in two; None where there is only one."""
    problem = fitted.problem
    n_queries, n_keys = problem.q.shape[-2], problem.k.shape[-2]
    half = n_queries // 2
    if half == 0:
        return None
    queries = fitted.seen.queries
    if queries is None:
        options, mask = problem.options, problem.mask
        first = problem._replace(
            q=problem.q[..., :half, :],
            mask=mask if mask is None or mask.shape[-2] == 1 else mask[..., :half, :],
            options=options._replace(causal_align=options.diagonal(n_queries, n_keys)),
        )
        seen = first.seen()
        late = sample_rows(n_queries - half, fitted.n_rows, fitted.rng, offset=0.5)
        return Held(first.keep(seen), seen, [half + row for row in late])
    xp = problem.xp
    counts = xp.cumulative_sum(xp.astype(queries, xp.float32), axis=-1)
    is_first = queries & (2 * counts <= counts[..., -1:])
    seen, others = problem.seen(is_first), queries & ~is_first
    late = _sample(problem, others, fitted.n_rows, fitted.rng, offset=0.5)
    return Held(problem.keep(seen), seen, late, others if isinstance(late, list) else None)
