"""A cache that is fitted to the beginning of its sequence, and checked against it or by parts of it."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from slra._typing import Array
from slra._validate import check_choice, check_matrix, check_positive, resolve
from slra.attn.basis import AttentionBasis
from slra.attn.exact import attention
from slra.attn.fit import fit_attention
from slra.attn.rows import sample_rows
from slra.cache._contents import Contents
from slra.cache._layout import ALL, map_arrays, on_host
from slra.cache._queries import Queries
from slra.cache._rotary import rotate, turns_at

__all__ = ["fit_choosing", "fit_prefix"]

# Steps that are checked, how much the tolerance of the fit is lowered where the check fails, and how often.
N_STEPS = 64
# Of the coordinates, so many choose, by what they are; of the tokens, so many are chosen: one in these.
TRIED_PARTS, TOP_PARTS = {"query": (8, 4), "leading": (8, 4, 2)}, (64, 32, 16, 8, 4, 2)
# Values that are not chosen, together a few hundredths of the softmax, have one coordinate in so many.
VALUE_PART = 16
# Texts drift: choices must keep to so much of the tolerance. On SmolLM2, by 0.7 of 0.1, 96% of the heads kept to 0.1 on
# as many tokens more; by all of it 80%.
MARGIN = 0.7
TIGHTER, N_TRIES = 0.6, 10


def fit_prefix(
    prefix: tuple[Array, Array, Array],
    rank: Any,
    fit: dict[str, Any],
    make: Callable[[AttentionBasis], Contents],
) -> Contents:
    """Fit, and ``make`` what holds the prefix; with rtol, more and more tightly until the check holds."""
    rtol = fit["rtol"]
    _check(prefix)
    if rtol is None:
        return make(fit_attention(*prefix, rank, **fit))
    fit = {**fit, "rtol": check_positive(rtol, "rtol")}
    steps = None
    for basis in _bases(prefix, rank, fit):
        contents = make(basis)
        layout = contents.layout
        steps = steps or _exact_steps(prefix, contents, 0)
        queries, exact = steps
        # The ranks of this basis are those of another layout, places are the same.
        out, *_ = contents.attend(queries._replace(layout=layout))
        error = layout.relative_error(out, exact)
        worst = float(layout.xp.max(error))
        if worst <= fit["rtol"]:
            return contents._replace(error=error)
    raise ValueError(
        f"rtol must be larger: at rank {layout.rank} and with these options the error is {worst:.2g}, got {rtol}"
    )


def fit_choosing(
    prefix: tuple[Array, Array, Array],
    rank: Any,
    fit: dict[str, Any],
    make: Callable[..., Contents],
    index: str | None,
) -> Contents:
    """Fit, and choose for each key head how many keys a query reads in full: the fewest that keep to rtol.

    Tried is a basis of the first half, on queries of the second. All heads have the index with which least is read.
    """
    _check(prefix)
    if index is not None:
        check_choice(index, tuple(TRIED_PARTS), "index")
    rtol, (_, k, v) = check_positive(fit["rtol"], "rtol"), prefix
    n_tokens, fit = k.shape[-2], {**fit, "rtol": None}
    half, width = -(-n_tokens // 2), k.shape[-1] + v.shape[-1]
    rank_v = -(-v.shape[-1] // VALUE_PART)
    tried = [
        (index, (-(-k.shape[-1] // part), rank_v))
        for index in (TRIED_PARTS if index is None else [index])
        for part in TRIED_PARTS[index]
    ]

    def fitted(n: int) -> AttentionBasis:
        most = (min(n, k.shape[-1]), min(n, v.shape[-1])) if rank is None else rank
        first_q, first_k, first_v = (x[..., :n, :] for x in prefix)
        return fit_attention(first_q, first_k, first_v, most, **fit)

    early, steps, least, found = fitted(half), None, float("inf"), None
    for index, rank_index in tried:
        contents = make(early, n_top=0, rank_index=rank_index, index=index)
        steps = steps or _exact_steps(prefix, contents, half)
        shape = contents.layout.n_heads, contents.layout.n_shared
        n_tops, errors = np.full(shape[0], ALL), np.zeros(shape[0] * shape[1])
        for n_top in (n_tokens // part for part in TOP_PARTS):
            by_head = contents.layout.backend.to_numpy(_error(contents, steps, n_top))
            is_kept = (by_head.reshape(shape) <= MARGIN * rtol).all(axis=1)
            n_tops = np.where(is_kept & (n_tops == ALL), n_top, n_tops)
            errors = np.where(np.repeat(is_kept & (n_tops == n_top), shape[1]), by_head, errors)
        # Of what is chosen by features of the query, all are read.
        others = width - rank_v - (0 if index == "query" else rank_index[0])
        read = np.minimum(n_tops * others + n_tokens * sum(rank_index), n_tokens * width).sum()
        if read < least:
            least, found = read, ({"rank_index": rank_index, "index": index}, n_tops, errors)
    assert found is not None
    options, n_tops, errors = found
    contents = make(fitted(n_tokens), n_top=tuple(n_tops.tolist()), **options)
    return contents._replace(error=contents.layout.backend.from_numpy(errors, contents.like))


def _error(contents: Contents, steps: tuple[Queries, Array], n_top: int) -> Array:
    """Relative error of the output of each query head, choosing so many keys."""
    layout = dataclasses.replace(contents.layout, n_top=n_top)
    queries, exact = steps
    out, *_ = map_arrays(lambda x: x, contents, layout=layout).attend(
        queries._replace(layout=layout)
    )
    return layout.relative_error(out, exact)


def _check(prefix: tuple[Array, Array, Array]) -> None:
    q, k, v = prefix
    resolve(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_matrix(x, name)
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"q and k must have the same length (second last axis), got shapes {tuple(q.shape)} and {tuple(k.shape)}"
        )


def _bases(
    prefix: tuple[Array, Array, Array], rank: Any, fit: dict[str, Any]
) -> Iterator[AttentionBasis]:
    """Bases of more and more dimensions, and at last of as many as there may be."""
    tried = None
    for i in range(N_TRIES):
        basis = fit_attention(*prefix, rank, **{**fit, "rtol": fit["rtol"] * TIGHTER**i})
        if basis.ranks != tried:
            yield basis
        tried = basis.ranks
    _, k, v = prefix
    most = (min(k.shape[-2:]), min(v.shape[-2:])) if rank is None else rank
    yield fit_attention(*prefix, most, **{**fit, "rtol": None})


def _exact_steps(
    prefix: tuple[Array, Array, Array], contents: Contents, start: int
) -> tuple[Queries, Array]:
    """Choose steps of the prefix from ``start`` on, the last one too, and compute what exact attention gives there."""
    layout, n_tokens = contents.layout, prefix[1].shape[-2]
    xp, backend = layout.xp, layout.backend
    steps = [start + i for i in sample_rows(n_tokens - start, N_STEPS - 1, None)]
    rows = np.asarray(sorted({*steps, n_tokens - 1}))
    q, k, v = (layout.batched(xp.astype(x, contents.like.dtype, copy=False)) for x in prefix)
    q = xp.take(q, backend.from_numpy(rows, q, backend.place_dtype), axis=-2)
    seen = backend.from_numpy(np.arange(n_tokens) <= rows[:, None], q, xp.bool)
    positions: Array = rows[None, :]
    if not on_host(contents.lengths):
        positions = backend.from_numpy(positions, contents.lengths)
    queries = Queries(layout, q, positions, positions)
    if layout.rotary is not None:
        q = rotate(q, turns_at(positions, q, layout), layout)
        k = rotate(k, turns_at(np.arange(n_tokens)[None, :], k, layout), layout)
    options = layout.score_options
    out = attention(
        q, k, v, mask=seen, scale=options.scale, softcap=options.softcap, enable_gqa=True
    )
    return queries, out
