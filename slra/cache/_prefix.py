"""A cache that is fitted to the beginning of its sequence, and checked against it."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from slra._typing import Array
from slra._validate import check_matrix, check_positive, resolve
from slra.attn.basis import AttentionBasis
from slra.attn.exact import attention
from slra.attn.fit import fit_attention
from slra.attn.rows import sample_rows
from slra.cache._contents import Contents
from slra.cache._layout import on_host
from slra.cache._queries import Queries
from slra.cache._rotary import rotate, turns_at

__all__ = ["fit_prefix"]

# Steps that are checked, how much the tolerance of the fit is lowered where the check fails, and how often.
N_STEPS = 64
TIGHTER, N_TRIES = 0.6, 10


def fit_prefix(
    prefix: tuple[Array, Array, Array],
    rank: Any,
    fit: dict[str, Any],
    make: Callable[[AttentionBasis], Contents],
) -> Contents:
    """Fit, and ``make`` what holds the prefix; with rtol, more and more tightly until the check holds."""
    rtol, (q, k, v) = fit["rtol"], prefix
    resolve(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_matrix(x, name)
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"q and k must have the same length (second last axis), got shapes {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if rtol is None:
        return make(fit_attention(*prefix, rank, **fit))
    fit = {**fit, "rtol": check_positive(rtol, "rtol")}
    steps = None
    for basis in _bases(prefix, rank, fit):
        contents = make(basis)
        layout = contents.layout
        steps = steps or _exact_steps(prefix, contents)
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


def _exact_steps(prefix: tuple[Array, Array, Array], contents: Contents) -> tuple[Queries, Array]:
    """Choose steps of the prefix, the last among them, and compute what exact attention gives there."""
    layout, n_tokens = contents.layout, prefix[1].shape[-2]
    xp, backend = layout.xp, layout.backend
    rows = np.asarray(sorted({*sample_rows(n_tokens, N_STEPS - 1, None), n_tokens - 1}))
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
