"""Attention on NumPy: tiles computed in place, heads and tiles of queries on several threads.

NumPy lets other threads run while it computes, and BLAS is limited to one thread each. Every thread owns its buffers:
one tile of scores and a few rows, whatever the lengths.
"""

import contextlib
import functools
import itertools
import math
import operator
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from slra._backends.blas_threads import limit_this_thread, workers
from slra._backends.standard.attention import ScoreOptions, Tile, scores_batch_shape
from slra._typing import Array

__all__ = ["attention", "attention_vjp"]

# 512 x 512 scores: 1 MB in float32, which leaves room in the second-level cache for keys and values.
QUERY_TILE, KEY_TILE = 512, 512
# Under a single key head the gradients of keys and values are summed in so many parts, which run side by side.
N_PARTS = 8
# Below this many multiplications (about a millisecond) threads cost more than they save.
WORTH_THREADS = 1 << 26


# The shift of the softmax may stay this far below the largest score: weights then are at most exp(8), which costs no
# accuracy, and most tiles need no rescaling of what was summed before.
SLACK = 8


class Power(NamedTuple):
    """The exponential function to use, and what a score is multiplied by for it."""

    function: np.ufunc
    per_nat: float


NATURAL, BINARY = Power(np.exp, 1.0), Power(np.exp2, math.log2(math.e))


@functools.cache
def _fastest() -> Power:
    """Powers of two where NumPy computes them in vectors: then they take half the time of exp."""
    try:
        from numpy.lib.introspect import opt_func_info
    except ImportError:
        return NATURAL
    found = opt_func_info(func_name="^exp2$", signature="^float32$").get("exp2", {})
    is_vector = any(not one["current"].startswith("baseline") for one in found.values())
    return BINARY if is_vector else NATURAL


class Arguments(NamedTuple):
    """What every tile needs; leading axes of the arrays broadcast to ``batch``."""

    q: Array
    k: Array
    v: Array
    mask: Array | None
    options: ScoreOptions
    batch: tuple[int, ...]

    def power(self) -> Power:
        """Natural beside an additive mask: its values may be the largest there are, and are not to be multiplied."""
        is_additive = self.mask is not None and self.mask.dtype != bool
        return NATURAL if is_additive else _fastest()

    def tops(self) -> range:
        """Where the tiles of queries begin."""
        n_queries, n_keys = self.q.shape[-2], self.k.shape[-2]
        return range(0, n_queries, self.options.tile_height(QUERY_TILE, n_queries, n_keys))

    def rows(self, top: int) -> list[Tile]:
        """Tiles of the keys that a tile of queries attends to."""
        n_queries, n_keys = self.q.shape[-2], self.k.shape[-2]
        bottom = min(top + self.tops().step, n_queries)
        end = self.options.last_key(bottom, n_queries, n_keys)
        lefts = range(self.options.first_key(top, n_keys), end, KEY_TILE)
        return [Tile(top, bottom, left, min(left + KEY_TILE, end)) for left in lefts]

    def n_scores(self) -> int:
        """Count the scores of all tiles, were they as long as the one in the middle, or all keys."""
        n_queries, n_keys = self.q.shape[-2], self.k.shape[-2]
        if self.options.first is not None:
            tops = self.tops()
            n_keys = sum(tile.right - tile.left for tile in self.rows(tops[len(tops) // 2]))
        return math.prod((*self.batch, n_queries, n_keys))


def head(arguments: Arguments, index: tuple[int, ...]) -> Arguments:
    """One head of each array."""
    q, k, v = (at(x, index) for x in (arguments.q, arguments.k, arguments.v))
    mask = None if arguments.mask is None else at(arguments.mask, index)
    options = arguments.options
    if options.alibi is not None:
        options = options._replace(alibi=at(options.alibi, index))
    return Arguments(q, k, v, mask, options, ())


def at(x: Array, index: tuple[int, ...]) -> Array:
    """View of one head of an array whose leading axes broadcast."""
    leading = x.shape[:-2]
    own = index[len(index) - len(leading) :]
    return x[tuple(0 if n == 1 else i for i, n in zip(own, leading, strict=True))]


class Buffers:
    """Memory of one thread, reused from tile to tile."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.held: dict[str, Array] = {}

    def get(self, name: str, *shape: int) -> Array:
        """Return an uninitialised contiguous array; the same memory whenever the name is the same."""
        size = int(np.prod(shape))
        if name not in self.held or self.held[name].size < size:
            self.held[name] = np.empty(size, self.dtype)
        return self.held[name][:size].reshape(shape)

    def ones(self, n: int) -> Array:
        """Return n ones."""
        if "ones" not in self.held:
            self.held["ones"] = np.ones(KEY_TILE, self.dtype)
        return self.held["ones"][:n]


def in_threads(
    tasks: list[Any],
    run: Callable[[Any, Buffers], None],
    dtype: np.dtype[Any],
    n_products: int,
    most_threads: int | None = None,
) -> None:
    """Call ``run(task, buffers)`` for all tasks, which take ``n_products`` multiplications altogether."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    if len(tasks) == 1 or n_products < WORTH_THREADS:
        _drain(waiting, run, dtype)
        return
    limits = workers()
    with limits as n_workers, limits:
        n_workers = min(n_workers, most_threads or n_workers)
        if n_workers > 1:
            with ThreadPoolExecutor(n_workers) as pool:
                try:
                    running = [
                        pool.submit(_drain_alone, waiting, run, dtype) for _ in range(n_workers)
                    ]
                    for future in running:
                        future.result()
                except BaseException:
                    # After an error or Ctrl-C nobody waits for what no thread has begun.
                    with contextlib.suppress(queue.Empty):
                        while True:
                            waiting.get_nowait()
                    raise
        # With one worker all of it; else what is left where BLAS cannot be limited in our threads.
        _drain(waiting, run, dtype)


def _drain_alone(*args: Any) -> None:
    """Run tasks in a thread of ours, unless BLAS would start more in it."""
    if limit_this_thread():
        _drain(*args)


def _drain(
    waiting: "queue.SimpleQueue[Any]", run: Callable[..., None], dtype: np.dtype[Any]
) -> None:
    """Run tasks until none is left."""
    buffers = Buffers(dtype)
    # NaN and infinities of the input propagate as they do elsewhere: silently.
    with np.errstate(all="ignore"):
        while True:
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                return
            run(task, buffers)


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    options: ScoreOptions,
    *,
    most_threads: int | None = None,
) -> tuple[Array, Array]:
    """Exact attention and its log-sum-exp."""
    batch = scores_batch_shape(q, k, v, mask)
    arguments = Arguments(q, k, v, mask, options, batch)
    out = np.zeros((*batch, q.shape[-2], v.shape[-1]), q.dtype)
    lse = np.full((*batch, q.shape[-2]), -np.inf, q.dtype)

    # Under a causal mask the last tiles are the longest: they go first, so that no thread ends late.
    tops = arguments.tops()[::-1]

    def run(task: Any, buffers: Buffers) -> None:
        index, top = task
        row = arguments.rows(top)
        if row:
            here = (*index, slice(top, row[0].bottom))
            _attend_rows(head(arguments, index), row, out[here], lse[here], buffers)

    tasks = list(itertools.product(np.ndindex(*batch), tops))
    n_products = arguments.n_scores() * (q.shape[-1] + v.shape[-1])
    in_threads(tasks, run, q.dtype, n_products, most_threads)
    return out, lse


def _attend_rows(one: Arguments, row: list[Tile], out: Array, lse: Array, buffers: Buffers) -> None:
    """Online softmax over the tiles of one row, as `standard.attention.SoftmaxState`, in place."""
    q, power = scaled_transposed(one, row[0], buffers), one.power()
    shift = np.full(q.shape[1], -np.inf, q.dtype)
    total = np.zeros(q.shape[1], q.dtype)
    for tile in row:
        scores = scores_of(one, q, tile, buffers)
        hide(one, scores, tile)
        peak = scores.max(axis=0)
        if np.any(peak > shift + SLACK):
            raised = np.maximum(shift, peak)
            decay = power.function(shift - finite(raised))
            total *= decay
            out *= decay[:, None]
            shift = raised
        np.subtract(scores, finite(shift), out=scores)
        power.function(scores, out=scores)
        # A product with ones is the fastest sum.
        total += np.matmul(buffers.ones(scores.shape[0]), scores)
        values = one.v[tile.left : tile.right]
        out += np.matmul(scores.T, values, out=buffers.get("out", *out.shape))
    empty = total == 0
    total[empty] = 1
    out /= total[:, None]
    lse[...] = np.where(empty, -np.inf, shift / power.per_nat + np.log(total))


def finite(shift: Array) -> Array:
    """Replace the -inf of rows that have met no key yet: -inf - -inf would be NaN."""
    return np.where(shift == -np.inf, 0, shift)


def scaled_transposed(one: Arguments, tile: Tile, buffers: Buffers) -> Array:
    """Return the queries of a tile, scaled as `scores_of` wants them, shape (D, queries)."""
    q, softcap = one.q[tile.top : tile.bottom].T, one.options.softcap
    factor = (
        one.options.scale * one.power().per_nat if softcap is None else one.options.scale / softcap
    )
    return np.multiply(q, factor, out=buffers.get("q", *q.shape))


def scores_of(one: Arguments, q: Array, tile: Tile, buffers: Buffers) -> Array:
    """Scores of one tile in a buffer, after softcap, in the units of the power, shape (keys, queries).

    Keys first: reductions over keys then run along whole vectors of queries, and are twice as fast.
    """
    scores = buffers.get("scores", tile.right - tile.left, q.shape[1])
    np.matmul(one.k[tile.left : tile.right], q, out=scores)
    cap(scores, one.options, one.power().per_nat)
    return scores


def cap(scores: Array, options: ScoreOptions, per_nat: float) -> None:
    """Apply the softcap to scores in its units, in place; they are in those of the power then."""
    if options.softcap is not None:
        np.tanh(scores, out=scores)
        scores *= options.softcap * per_nat


def hide(one: Arguments, scores: Array, tile: Tile) -> None:
    """Apply slopes, the mask, the causal bound and the window to a tile of scores, (keys, queries), in place."""
    if one.options.alibi is not None:
        rows = np.arange(tile.top, tile.bottom) + one.options.position
        distances = np.abs(np.arange(tile.left, tile.right)[:, None] - rows)
        slope = one.options.alibi[0, 0] * scores.dtype.type(one.power().per_nat)
        scores -= slope * distances.astype(scores.dtype)
    if one.mask is not None:
        part = tile.of(one.mask).T
        if part.dtype == bool:
            np.copyto(scores, -np.inf, where=~part)
        else:
            np.add(scores, part, out=scores, casting="same_kind")
    diagonal = one.options.diagonal(one.q.shape[-2], one.k.shape[-2])
    if one.options.is_causal and tile.crosses(diagonal):
        # Keys up to the diagonal of the first query are seen by every query of the tile.
        first = max(tile.left, tile.top + diagonal + 1)
        hidden = np.arange(first, tile.right)[:, None] > np.arange(tile.top, tile.bottom) + diagonal
        np.copyto(scores[first - tile.left :], -np.inf, where=hidden)
    start = one.options.first
    if start is not None and tile.is_left_of(start):
        # Keys from the first one of the last query on are seen by every query of the tile.
        end = min(tile.right, tile.bottom - 1 + start)
        hidden = np.arange(tile.left, end)[:, None] < np.arange(tile.top, tile.bottom) + start
        np.copyto(scores[: end - tile.left], -np.inf, where=hidden)


def attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    options: ScoreOptions,
    lse: Array,
    delta: Array,
    grad_out: Array,
    *,
    most_threads: int | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of attention with respect to q, k and v, as `standard.attention.tiled_attention_vjp`.

    Each task owns its rows of dq and a copy of dk and dv: sums are formed in one order, whatever the threads do.
    """
    batch = scores_batch_shape(q, k, v, mask)
    arguments = Arguments(q, k, v, mask, options, batch)
    apart = _unshared(arguments)
    n_parts = max(1, N_PARTS // math.prod(apart))
    dq, dk, dv = (
        np.zeros_like(q),
        np.zeros((n_parts, *k.shape), q.dtype),
        np.zeros((n_parts, *v.shape), q.dtype),
    )
    tops = arguments.tops()
    rest = [1 if alone == whole else whole for alone, whole in zip(apart, batch, strict=True)]

    def run(task: Any, buffers: Buffers) -> None:
        own, part = task
        for other, top in itertools.product(np.ndindex(*rest), tops[part::n_parts]):
            index = tuple(map(operator.add, own, other))
            grads = (at(dq, index), at(dk[part], index), at(dv[part], index))
            sums = (lse[index], delta[index], grad_out[index])
            _pull_back_rows(head(arguments, index), arguments.rows(top), sums, grads, buffers)

    tasks = list(itertools.product(np.ndindex(*apart), range(n_parts)))
    n_products = arguments.n_scores() * (3 * q.shape[-1] + 2 * v.shape[-1])
    in_threads(tasks, run, q.dtype, n_products, most_threads)
    return dq, dk.sum(axis=0) * options.scale, dv.sum(axis=0)


def _unshared(arguments: Arguments) -> tuple[int, ...]:
    """Lengths of the leading axes along which no gradient is summed; 1 for the others."""
    batch = arguments.batch
    leading = [
        (1,) * (len(batch) + 2 - x.ndim) + x.shape[:-2]
        for x in (arguments.q, arguments.k, arguments.v)
    ]
    return tuple(map(min, *leading)) if batch else ()


def _pull_back_rows(
    one: Arguments,
    row: list[Tile],
    sums: tuple[Array, Array, Array],
    grads: tuple[Array, Array, Array],
    buffers: Buffers,
) -> None:
    """Add to the gradients what one tile of queries contributes."""
    if not row:
        return
    rows = slice(row[0].top, row[0].bottom)
    dq, dk, dv = grads
    lse, delta, grad_out = (x[rows] for x in sums)
    q, plain_q, power = scaled_transposed(one, row[0], buffers), one.q[rows], one.power()
    shift = finite(lse * power.per_nat)
    dq_rows = buffers.get("dq", *plain_q.shape)
    dq_rows.fill(0)
    for tile in row:
        keys = slice(tile.left, tile.right)
        weights = scores_of(one, q, tile, buffers)
        slope = None if one.options.softcap is None else _softcap_slope(weights, one, buffers)
        hide(one, weights, tile)
        np.subtract(weights, shift, out=weights)
        power.function(weights, out=weights)
        dv[keys] += np.matmul(weights, grad_out, out=buffers.get("dv", *dv[keys].shape))
        d_scores = np.matmul(one.v[keys], grad_out.T, out=buffers.get("d_scores", *weights.shape))
        d_scores -= delta
        d_scores *= weights
        if slope is not None:
            d_scores *= slope
        dk[keys] += np.matmul(d_scores, plain_q, out=buffers.get("dk", *dk[keys].shape))
        dq_rows += np.matmul(d_scores.T, one.k[keys], out=buffers.get("dq part", *dq_rows.shape))
    dq_rows *= one.options.scale
    dq[rows] += dq_rows


def _softcap_slope(scores: Array, one: Arguments, buffers: Buffers) -> Array:
    """Return the derivative of the softcap, 1 - tanh^2, from its value."""
    slope = buffers.get("slope", *scores.shape)
    np.divide(scores, (one.options.softcap or 1) * one.power().per_nat, out=slope)
    np.multiply(slope, slope, out=slope)
    return np.subtract(1, slope, out=slope)
