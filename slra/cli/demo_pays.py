"""Where approximation pays and where it does not: the second half of ``python -m slra demo``."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace
from rich.table import Table

import slra
from slra.cli.backends import Backend
from slra.cli.bench.problems import attention_inputs
from slra.cli.demo import relative_errors
from slra.cli.timing import rounds

__all__ = ["CAPTION", "HEADERS", "TITLE", "Pay", "cells", "count_calls", "measure", "table"]

N_ROUNDS = 2
LENGTHS = (512, 2048, 8192)
HEADS, WIDTH, RANK, BITS = 2, 128, 32, 4
# So many matrices of so many rows and columns.
BATCH, BATCH_RANK = (96, 512, 64), 16

TITLE = "Where it pays"
HEADERS = ("what", "beside", "time", "bytes", "error")
CAPTION = (
    f"time and bytes: slra's over the other's, below 1 where it pays; medians of {N_ROUNDS} interleaved. Attention: "
    f"{HEADS} heads, d = {WIDTH}, made data whose singular values fall as 1/i; rank {RANK}, fitted to these tokens. "
    "Bits are decoded at each step: bytes are saved, not time. Where spectra are flat nothing here pays."
)


class Pay(NamedTuple):
    """One comparison."""

    what: str
    beside: str
    time: float | None  # over the other's
    n_bytes: float | None  # over the other's
    error: float


def count_calls() -> int:
    """How often `measure` calls `advance`."""
    return 2 + len(LENGTHS)


def measure(backend: Backend, advance: Callable[[], object]) -> list[Pay]:
    """Compare a batch of decompositions, attention by length, and a step from a cache."""
    found = [_svd(backend)]
    advance()
    for n in LENGTHS:
        q, k, v = map(backend.from_numpy, attention_inputs(1 / np.arange(1.0, WIDTH + 1), n, HEADS))
        basis = slra.fit_attention(q, k, v, RANK)
        calls = [
            partial(slra.low_rank_attention, q, k, v, RANK),
            partial(basis.attend, q, k, v),
        ]
        with_fit, before = _beside(backend, calls, partial(slra.attention, q, k, v))
        name, other = f"attention, {n} tokens", "exact attention"
        found += [
            Pay(f"{name}, with its fit", other, with_fit[0], None, with_fit[1]),
            Pay(f"{name}, fitted before", other, before[0], RANK / WIDTH, before[1]),
        ]
        advance()
    found += _caches(backend, q, k, v, basis)
    advance()
    return found


def _beside(
    backend: Backend, ours: Sequence[Callable[[], Any]], theirs: Callable[[], Any]
) -> list[tuple[float, float]]:
    """For each of ours: the ratio of the median times, and the error of the worst head."""
    calls = [theirs, *ours]
    # These calls also compile and warm up what the timings should not see.
    right, *outs = (backend.to_numpy(call()).astype(np.float64) for call in calls)
    base, *spent = (median(one) for one in rounds(calls, N_ROUNDS, backend.wait))
    errors = [float(relative_errors(out, right).max()) for out in outs]
    return [(seconds / base, error) for seconds, error in zip(spent, errors, strict=True)]


def _svd(backend: Backend) -> Pay:
    x = np.random.default_rng(0).standard_normal(BATCH, dtype=np.float32)
    given = backend.from_numpy(x)
    ((time, error),) = _beside(
        backend,
        [lambda: slra.randomized_svd(given, BATCH_RANK, rng=0).S],
        lambda: np.linalg.svd(x, full_matrices=False)[1][:, :BATCH_RANK],
    )
    what = f"SVD of {BATCH[0]} matrices, {BATCH[1]} x {BATCH[2]}, rank {BATCH_RANK}"
    return Pay(what, "numpy.linalg.svd", time, None, error)


def _caches(backend: Backend, q: Any, k: Any, v: Any, basis: slra.AttentionBasis) -> list[Pay]:
    """One query to all tokens, as in decoding, from caches of few dimensions and of few bits."""
    query = q[:, -1:]
    whole = slra.fit_attention(q, k, v, WIDTH)
    caches = [slra.KVCache(basis), slra.KVCache(whole, bits=BITS)]
    caches = [cache.append(k, v) for cache in caches]
    formula = partial(_formula, query, k, v)
    timed = _beside(backend, [partial(cache.attend, query) for cache in caches], formula)
    found = [
        Pay(
            f"a step from a cache, {LENGTHS[-1]} tokens, {name}",
            "the formula",
            time,
            cache.nbytes / cache.nbytes_exact,
            error,
        )
        for name, cache, (time, error) in zip(
            (f"rank {RANK}", f"{BITS} bits"), caches, timed, strict=True
        )
    ]
    out, right = map(backend.to_numpy, (slra.baselines.kivi(query, k, v, BITS), formula()))
    error = float(relative_errors(out, right).max())
    # A zero point and a scale in half precision for each 32 numbers.
    share = (BITS + 1) / 32
    return [*found, Pay(f"int{BITS} by groups of 32 (KIVI)", "the formula", None, share, error)]


def _formula(q: Any, k: Any, v: Any) -> Any:
    """Exact attention of one query, for which nothing need be clever."""
    xp = array_namespace(q)
    scores = q @ xp.matrix_transpose(k) * WIDTH**-0.5
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return weights / xp.sum(weights, axis=-1, keepdims=True) @ v


def cells(found: list[Pay]) -> list[list[str]]:
    """Return the cells under `HEADERS`."""
    return [
        [
            one.what,
            one.beside,
            "" if one.time is None else f"{one.time:.2f}",
            "" if one.n_bytes is None else f"{one.n_bytes:.2f}",
            f"{one.error:.2g}",
        ]
        for one in found
    ]


def table(found: list[Pay]) -> Table:
    """Return the table for the terminal."""
    drawn = Table(title=TITLE, caption=CAPTION, caption_justify="left")
    for i, header in enumerate(HEADERS):
        drawn.add_column(header, justify="left" if i < 2 else "right")
    for row in cells(found):
        drawn.add_row(*row)
    return drawn
