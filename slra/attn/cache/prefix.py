"""A cache that is fitted to the beginning of its sequence, and checked against it."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from slra._backends import Backend
from slra._typing import Array
from slra._validate import check_matrix, check_positive, resolve
from slra.attn.basis import AttentionBasis
from slra.attn.cache.ask import Ask
from slra.attn.cache.flow import attend_state
from slra.attn.cache.rotary import rotate
from slra.attn.cache.state import Settings, State, is_host
from slra.attn.exact import attention
from slra.attn.fit import fit_attention
from slra.attn.rows import sample_rows

__all__ = ["fit_prefix"]

# Steps that are checked, how much the tolerance of the fit is lowered where the check fails, and how often.
N_STEPS = 64
TIGHTER, N_TRIES = 0.6, 10


def fit_prefix(
    prefix: tuple[Array, Array, Array],
    rank: Any,
    fit: dict[str, Any],
    make: Callable[[AttentionBasis], tuple[State, Settings]],
) -> tuple[State, Settings]:
    """Fit, and ``make`` a cache that holds the prefix; with rtol, more and more tightly until the check holds."""
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
    rtol = check_positive(rtol, "rtol")
    fit = {**fit, "rtol": rtol}
    exact = None
    for basis in _bases(prefix, rank, fit):
        state, settings = make(basis)
        backend = resolve(basis=state.segments[0].maps.wk)
        steps = exact or _exact_steps(prefix, state, settings, backend)
        exact = steps
        error = _error(steps, state, settings, backend)
        if float(backend.xp.max(error)) <= rtol:
            error = backend.xp.reshape(error, basis.error.shape[-1:])
            return state._replace(error=error), settings
    raise ValueError(
        f"rtol must be larger: at rank {settings.rank} and with these options the error is "
        f"{float(backend.xp.max(error)):.2g}, got {rtol}"
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
    prefix: tuple[Array, Array, Array], state: State, settings: Settings, backend: Backend
) -> tuple[Ask, Array]:
    """Choose steps of the prefix, the last among them, and compute what exact attention gives there."""
    xp, n_tokens = backend.xp, prefix[1].shape[-2]
    rows = sorted({*sample_rows(n_tokens, N_STEPS - 1, None), n_tokens - 1})
    q, k, v = (
        xp.reshape(xp.astype(x, state.segments[0].maps.wk.dtype, copy=False), (-1, *x.shape[-3:]))
        for x in prefix
    )
    q = xp.take(q, backend.from_numpy(np.asarray(rows), q, xp.int64), axis=-2)
    positions: Array = np.asarray(rows)[None, :]
    seen = backend.from_numpy(np.arange(n_tokens) <= np.asarray(rows)[:, None], q, xp.bool)
    if not is_host(state.lengths):
        positions = backend.from_numpy(positions, state.lengths)
    asked = Ask(q, positions, positions, None)
    if settings.rotary is not None:
        q = rotate(q, positions, settings.rotary, backend)
        k = rotate(k, np.arange(n_tokens)[None, :], settings.rotary, backend)
    options = settings.options
    out = attention(
        q, k, v, mask=seen, scale=options.scale, softcap=options.softcap, enable_gqa=True
    )
    return asked, out


def _error(steps: tuple[Ask, Array], state: State, settings: Settings, backend: Backend) -> Array:
    """Relative Frobenius error of these steps, for each query head."""
    xp, (asked, exact) = backend.xp, steps
    out, _ = attend_state(state, asked, settings, backend)
    error, whole = (xp.sqrt(xp.sum(x * x, axis=(0, -2, -1))) for x in (out - exact, exact))
    return error / xp.where(whole == 0, xp.ones_like(whole), whole)
