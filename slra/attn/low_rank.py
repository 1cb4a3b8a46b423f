"""Attention on low-rank approximations of the queries, keys and values, and its gradient."""

import operator
from typing import Any, Literal, NamedTuple, TypeAlias, Unpack, overload

from slra._backends.ambient import isolated
from slra._typing import AnyArray, Array, ArrayT, AttentionOptions, CausalAlign
from slra._validate import check_choice, check_count, check_flag, check_l1
from slra.attn._estimators import METHODS
from slra.attn._exact_keys import (
    ExactKeys,
    exact_key_gradients,
    find_exact_keys,
    output_with_exact_keys,
    without_exact_keys,
)
from slra.attn._top_keys import output_with_top_keys, top_key_gradients
from slra.attn.basis import AttentionBasis, check_basis
from slra.attn.exact import (
    OutputGradient,
    by_head_gradients,
    exact_gradients,
    exact_output_and_lse,
    output_gradient,
)
from slra.attn.fit import N_ROWS, fit_problem
from slra.attn.maps import Maps, mapped_given, mapped_gradients, mapped_output, mapped_problem
from slra.attn.problem import AttentionProblem, Three, make_problem
from slra.attn.projections import Projections, project_all
from slra.attn.rows import sample_seen_rows

__all__ = ["low_rank_attention", "low_rank_attention_vjp"]

L1: TypeAlias = "float | AnyArray | tuple[float | AnyArray, float | AnyArray, float | AnyArray]"
Thresholds: TypeAlias = tuple[Any, Any, Any]


class LowRankOptions(AttentionOptions, total=False):
    """What `low_rank_attention` takes besides, for the signatures that differ in their result only."""

    rtol: float | None
    method: str
    l1: L1
    n_exact: int
    n_top: int
    basis: AttentionBasis | None


@overload
def low_rank_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    rank: int | tuple[int, int] | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[LowRankOptions],
) -> ArrayT: ...


@overload
def low_rank_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    rank: int | tuple[int, int] | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[LowRankOptions],
) -> tuple[ArrayT, ArrayT]: ...


@overload
def low_rank_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    rank: int | tuple[int, int] | None = None,
    *,
    return_lse: bool,
    **options: Unpack[LowRankOptions],
) -> ArrayT | tuple[ArrayT, ArrayT]: ...


@isolated
def low_rank_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    rank: int | tuple[int, int] | None = None,
    *,
    rtol: float | None = None,
    method: str = "output",
    l1: L1 = 0.0,
    n_exact: int = 0,
    n_top: int = 0,
    basis: AttentionBasis | None = None,
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
    return_lse: bool = False,
) -> ArrayT | tuple[ArrayT, ArrayT]:
    r"""Attention on low-rank approximations of the queries, keys and values.

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
        Relative error of the output to stay within, by the smallest ranks that do, see `fit_attention`.
    method : {"output", "scores", "svd"}
        How the basis is fitted, see `fit_attention`: "svd" replaces Q, K and V each by its truncated SVD. Methods of
        others are in `slra.baselines`.
    l1 : float, 0-d array, or three of them
        Only with "svd": thresholds of the l1 proximal step on Q^, K^ and V^, in the units of their entries. 0 leaves
        it out; an array may be traced or learned. A thresholded matrix is sparse but no longer of low rank: attention
        then runs in all D dimensions.
    n_exact : int
        Number of keys, per key head, that keep exact scores and values: those that receive most attention. They are
        left out of the fit, and both parts meet in one softmax. Not with ``rtol`` or ``l1``.
    n_top : int
        Number of keys that each query reads exactly, those of most weight in r dimensions; the query heads that share a
        key head choose one set, by the sum of their weights. The other keys, and their values, stay at rank r, in the
        same softmax. Keys of ``n_exact`` are exact besides, and not among those chosen. With all keys, or more, it is
        exact attention. For few queries: each gathers keys of its own. Not with ``rtol`` or ``l1``.
    basis : AttentionBasis, optional
        A basis fitted before, instead of ``rank`` and ``method``.
    mask, is_causal, causal_align, window, lengths_q, lengths_k, sinks, alibi, scale, enable_gqa, softcap, return_lse
        As in `attention`. The default scale is ``1/sqrt(D)`` of the original D.

    Returns
    -------
    out : array, shape (..., Hq, Nq, Dv)
        In the common dtype of the inputs.
    lse : array, shape (..., Hq, Nq)
        Only with ``return_lse``: log-sum-exp of the approximate scores.

    Raises
    ------
    TypeError
        If an array is not real floating, or ``rank`` is not an int or a pair of them.
    ValueError
        If shapes do not fit, a rank is out of range, ``l1`` is negative, or an input that is concrete is not
        finite.

    Notes
    -----
    "svd" with ``l1`` is

    .. math::
        \operatorname{softmax}(S_{\lambda_q}(Q_r) S_{\lambda_k}(K_r)^T / \sqrt{d})\, S_{\lambda_v}(V_r)

    with truncated SVDs :math:`Q_r, K_r, V_r` and soft thresholds S. Without ``l1`` nothing is computed in D
    dimensions but the projections: since :math:`Q_r = Q V_Q V_Q^T`, the scores are
    :math:`(Q V_Q V_Q^T V_K)(K V_K)^T`, exact attention in r dimensions.

    The fit sees all tokens. Under a causal mask an early output therefore depends, through the basis, on later
    tokens; fit on a prefix and pass ``basis`` where that must not be. ``n_exact`` chooses its keys by the attention of
    all tokens too, with ``basis`` or without; ``n_top`` for each query, among the keys that it sees. Gradients treat
    the basis, and these choices, as constant.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> exact = slra.attention(q, k, v)
    >>> bool(np.allclose(slra.low_rank_attention(q, k, v, 8), exact))
    True
    """
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
    check_flag(return_lse, "return_lse")
    thresholds, n_exact, n_top = _check_options(problem, method, rtol, l1, n_exact, n_top)
    with (same_bits := problem.backend.same_bits()), same_bits:
        given = rank, rtol, method, thresholds, n_exact, n_top, basis
        problem, chosen = _approximate(problem, *given)
        small: Array
        lse: Array | None
        if isinstance(chosen, ThresholdedProjections):
            small, lse = exact_output_and_lse(chosen.replace(problem))
        elif chosen.n_top >= problem.k.shape[-2]:
            small, lse = exact_output_and_lse(problem)
        elif chosen.n_top:
            small, lse = output_with_top_keys(problem, chosen.maps, chosen.n_top, chosen.keys)
        elif chosen.keys is None:
            with_lse = return_lse or sinks is not None
            small, lse = mapped_output(problem, chosen.maps, with_lse=with_lse)
        else:
            small, lse = output_with_exact_keys(problem, chosen.maps, chosen.keys)
        if lse is not None:
            small, lse = problem.with_sinks(small, lse)
        out: ArrayT = problem.answer(small)
    return (out, problem.answer_lse(lse)) if return_lse else out


@isolated
def low_rank_attention_vjp(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    out: ArrayT,
    lse: ArrayT,
    grad_out: ArrayT,
    rank: int | tuple[int, int] | None = None,
    *,
    grad_lse: ArrayT | None = None,
    rtol: float | None = None,
    method: str = "output",
    l1: L1 = 0.0,
    n_exact: int = 0,
    n_top: int = 0,
    basis: AttentionBasis | None = None,
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
) -> tuple[ArrayT, ...]:
    r"""Vector-Jacobian product of `low_rank_attention`, its basis being constant.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, as given to `low_rank_attention`, real floating.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    out : array, shape (..., Hq, Nq, Dv)
        What `low_rank_attention` returned.
    lse : array, shape (..., Hq, Nq)
        The log-sum-exp that it returned with ``return_lse``.
    grad_out : array, shape (..., Hq, Nq, Dv)
        Gradient of a scalar with respect to ``out``.
    rank, rtol, method, l1, n_exact, n_top, basis
        As they were given to `low_rank_attention`. Without ``basis`` the fit is made a second time: to fit once, call
        `fit_attention` and give ``basis`` to both.
    grad_lse : array, shape (..., Hq, Nq), optional
        Gradient of the scalar with respect to ``lse``; zero by default.
    mask, is_causal, causal_align, window, lengths_q, lengths_k, sinks, alibi, scale, enable_gqa, softcap
        As they were given to `low_rank_attention`. The mask is treated as a constant.

    Returns
    -------
    dq, dk, dv : array
        In the shapes of q, k and v (summed over axes that were broadcast) and their common dtype.

    Raises
    ------
    TypeError
        If an array is not real floating, or they come from different libraries.
    ValueError
        If shapes do not fit, or options do not go together as in `low_rank_attention`.

    Notes
    -----
    Under a basis it is the gradient of attention, `attention_vjp`, in r + 1 dimensions: the shift of the keys is
    carried as one more, and the values have one more that counts what is attended to,

    .. math::
        Q' = Q\,[W_q, c^T], \quad K' = [(K - c) W_k, 1], \quad V' = [(V - \mu) W_v, 1], \quad U' = [U_v; \mu], \quad
        \bar O' = \bar O U'^T

    and :math:`\bar Q = \bar Q' [W_q, c^T]^T`, :math:`\bar K = \bar K'_{1..r} W_k^T`,
    :math:`\bar V = \bar V'_{1..r} W_v^T`. Heads of different ranks run at the largest.

    With ``l1`` the gradients for Q^, K^ and V^ pass where an entry is not zero, and then through the projections:
    :math:`\bar Q = (\bar{\hat Q} \circ [\hat Q \ne 0])\, V_Q V_Q^T`.

    References
    ----------
    T. Dao et al., FlashAttention, arXiv:2205.14135, Algorithm 4.

    Examples
    --------
    At full rank it is the gradient of exact attention.

    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> basis = slra.fit_attention(q, k, v, 8)
    >>> out, lse = slra.low_rank_attention(q, k, v, basis=basis, return_lse=True)
    >>> low_rank = slra.low_rank_attention_vjp(q, k, v, out, lse, out, basis=basis)
    >>> exact = slra.attention_vjp(q, k, v, out, lse, out)
    >>> [bool(np.allclose(*pair)) for pair in zip(low_rank, exact)]
    [True, True, True]
    """
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
    thresholds, n_exact, n_top = _check_options(problem, method, rtol, l1, n_exact, n_top)
    for name, number in (("n_exact", n_exact), ("n_top", n_top)):
        if number and alibi is not None:
            raise ValueError(f"{name} must be 0 with alibi in low_rank_attention_vjp, got {number}")
    given = (out, lse, grad_out, grad_lse)
    with (same_bits := problem.backend.same_bits()), same_bits:
        how = rank, rtol, method, thresholds, n_exact, n_top, basis
        answered, chosen = _approximate(problem, *how)
        if isinstance(chosen, ThresholdedProjections):
            through = _through_threshold(answered, chosen, given)
        else:
            through = _through_maps(answered, chosen, given)
        inputs = problem.sum_to_inputs(through.grads)
        grads: tuple[ArrayT, ...] = problem.answer_inputs(inputs)
        grads += by_head_gradients(through.attended, through.of_output, sinks, alibi)
    return grads


class MapsAndKeys(NamedTuple):
    """Maps to few dimensions, the keys, if any, that stay exact, and how many more each query chooses."""

    maps: Maps
    keys: ExactKeys | None
    n_top: int


class ThresholdedProjections(NamedTuple):
    """Projections in all dimensions, whose entries shrink by these thresholds."""

    projections: Projections
    thresholds: Thresholds

    def replace(self, problem: AttentionProblem) -> AttentionProblem:
        """Put Q^, K^ and V^, after the threshold, in the place of q, k and v."""
        hats = self.projections.approximate(*problem[:3])
        q, k, v = (
            problem.backend.soft_threshold(x, tau) if _shrinks(tau) else x
            for x, tau in zip(hats, self.thresholds, strict=True)
        )
        return problem._replace(q=q, k=k, v=v)


def _shrinks(*thresholds: Any) -> bool:
    """Whether one of them may be above 0: what is not a float cannot be looked at."""
    return any(not isinstance(one, float) or one > 0 for one in thresholds)


def _check_options(
    problem: AttentionProblem, method: str, rtol: Any, l1: Any, n_exact: Any, n_top: Any
) -> tuple[Thresholds, int, int]:
    """Check what does not depend on the kind of approximation; return thresholds and the numbers of exact keys."""
    check_choice(method, tuple(METHODS), "method")
    problem.check_finite()
    backend, dtype = problem.backend, problem.q.dtype
    weights = check_l1(l1, [problem.xp.finfo(dtype)] * 3, backend)
    l_q, l_k, l_v = [
        one if isinstance(one, float) else problem.xp.astype(one, dtype, copy=False)
        for one in weights
    ]
    thresholds = l_q, l_k, l_v
    n_exact, n_keys = check_count(n_exact, "n_exact"), int(problem.k.shape[-2])
    if n_exact >= n_keys:
        raise ValueError(f"n_exact must be less than {n_keys}, the number of keys, got {n_exact}")
    n_top = check_count(n_top, "n_top")
    for name, number in (("n_exact", n_exact), ("n_top", n_top)):
        if number and (rtol is not None or _shrinks(*thresholds)):
            raise ValueError(f"{name} must be 0 with rtol or l1, got {number}")
    return thresholds, n_exact, n_top


def _approximate(
    problem: AttentionProblem,
    rank: Any,
    rtol: float | None,
    method: str,
    thresholds: Thresholds,
    n_exact: int,
    n_top: int,
    basis: AttentionBasis | None,
) -> tuple[AttentionProblem, MapsAndKeys | ThresholdedProjections]:
    """Fit, or take the basis that is given; with it the problem as it is answered. Raise where options clash."""
    if basis is not None:
        if rank is not None or rtol is not None or _shrinks(*thresholds):
            raise ValueError("rank, rtol and l1 must be left out where a basis is given")
        problem = check_basis(basis, problem)
    if _shrinks(*thresholds):
        if method != "svd" or rtol is not None:
            raise ValueError(
                'l1 must be 0 unless method is "svd" and rank is given, '
                f"got {thresholds!r} and {method!r}"
            )
        fitted = fit_problem(problem, rank, rtol=None, method=method)
        return problem, ThresholdedProjections(project_all(fitted), thresholds)
    options, has_rows = problem.options, problem.lengths is not None
    is_placed = has_rows or options.first is not None or options.alibi is not None
    if (n_exact and is_placed) or 0 < n_top < problem.k.shape[-2]:
        # The keys that stay exact are not in a row: what goes by places is in the mask for them.
        problem = problem.with_options_written_out()
    keys = _most_attended_keys(problem, n_exact) if n_exact else None
    if basis is not None:
        return problem, MapsAndKeys(Maps.of(basis, problem), keys, n_top)
    keep = None if keys is None else keys.keep
    fitted = fit_problem(problem, rank, rtol=rtol, method=method, keep=keep)
    return problem, MapsAndKeys(fitted.maps, keys, n_top)


def _most_attended_keys(problem: AttentionProblem, n_exact: int) -> ExactKeys:
    problem = problem.constant().broadcast()
    seen, n_queries = problem.seen(), problem.q.shape[-2]
    rows = sample_seen_rows(seen.queries, n_queries, N_ROWS, None, problem.backend)
    return find_exact_keys(problem, rows, n_exact)


Given: TypeAlias = tuple[Array, Array, Array, Array | None]


class Through(NamedTuple):
    """Gradients for q, k and v, and what they went through: attention, and its output."""

    grads: Three
    attended: AttentionProblem
    of_output: OutputGradient


def _through_threshold(
    problem: AttentionProblem, chosen: ThresholdedProjections, given: Given
) -> Through:
    """Gradient through exact attention, soft thresholds and projections."""
    xp, hats = problem.xp, chosen.replace(problem)
    of_output = output_gradient(problem, hats.lse_shape(), *given)
    grads = exact_gradients(hats, of_output)
    passed = (
        xp.where(x != 0, gradient, xp.zeros_like(gradient)) if _shrinks(tau) else gradient
        for gradient, x, tau in zip(grads, hats[:3], chosen.thresholds, strict=True)
    )
    return Through(chosen.projections.pull_back(*passed), hats, of_output)


def _through_maps(problem: AttentionProblem, chosen: MapsAndKeys, given: Given) -> Through:
    """Gradient through attention in few dimensions, and the keys beside it that stay exact.

    Both see the same log-sum-exp and output, as the shards of the keys do.
    """
    maps, keys, n_top = chosen
    if n_top:
        of_output = output_gradient(problem, problem.lse_shape(), *given)
        if n_top >= problem.k.shape[-2]:
            return Through(exact_gradients(problem, of_output), problem, of_output)
        grads = top_key_gradients(problem, maps, n_top, keys, of_output)
        return Through(grads, problem, of_output)
    small = mapped_problem(problem, maps)
    if keys is not None:
        small = small._replace(mask=without_exact_keys(problem, keys))
    of_output = output_gradient(problem, small.lse_shape(), *given)
    grads = mapped_gradients(small, maps, of_output)
    if keys is None:
        return Through(grads, small, mapped_given(maps, of_output, problem.xp))
    grads, exact = (
        problem.sum_to_inputs(part)
        for part in (grads, exact_key_gradients(problem, keys, of_output))
    )
    dq, dk, dv = map(operator.add, grads, exact)
    return Through((dq, dk, dv), small, of_output)
