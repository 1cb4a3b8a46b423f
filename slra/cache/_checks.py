"""What a cache is made with, and the arguments of `KVCache.append` and `KVCache.attend`: checked, and laid out."""

from typing import Any

import array_api_compat as compat
import numpy as np

from slra._backends import Backend
from slra._backends.standard import ScoreOptions
from slra._typing import Array, DType
from slra._validate import (
    check_choice,
    check_count,
    check_flag,
    check_mask,
    check_positive,
    check_rank,
    promote,
    resolve,
    shown,
)
from slra.attn.basis import AttentionBasis, check_parts
from slra.attn.fit import METHODS
from slra.attn.problem import check_by_head, check_scale, check_window
from slra.attn.rotary import check_rotary
from slra.cache._contents import Contents
from slra.cache._layout import Layout, on_host
from slra.cache._queries import Queries

__all__ = [
    "MOST",
    "check_bits",
    "check_crop",
    "check_heads",
    "check_lengths",
    "check_options",
    "check_queries",
    "check_room",
    "check_selection",
    "check_tokens",
]

# Of tokens, or of sequences: what a position in 32 bits can count.
MOST = 2**31 - 1
# Of the coordinates of keys, and of values, so many are in the index: one in these.
INDEX_PARTS = {"leading": (4, 4), "query": (8, 16)}
# A header alone takes a quarter of a bit a number, and no integer more than 14.
LEAST_BITS, MOST_BITS = 0.5, 10
DTYPES = ("float16", "bfloat16", "float32", "float64")


def check_options(
    basis: AttentionBasis,
    *,
    batch: Any,
    dtype: Any,
    scale: Any,
    softcap: Any,
    rotary: Any,
    drift_bound: Any,
    method: Any,
    window: Any,
    n_sink: Any,
    n_sparse: Any,
    capacity: Any,
    bits: Any = None,
    rtol: Any = None,
    n_top: Any = None,
    top_p: Any = None,
    rank_index: Any = None,
    index: Any = "leading",
) -> Layout:
    """Check what a cache is made with; raise on the first that is wrong."""
    check_parts(basis)
    check_choice(index, tuple(INDEX_PARTS), "index")
    backend = resolve(basis=basis.wk)
    if not backend.is_functional and not backend.is_eager(basis.wk):
        raise TypeError(
            "basis must hold arrays in memory, which a cache writes to; compute lazy ones first"
        )
    if basis.wk.ndim < 3:
        raise ValueError(
            f"basis must have a head axis, got wk of shape {tuple(basis.wk.shape)}; fit it to (H, n, d)"
        )
    own, limits = tuple(basis.wk.shape[:-3]), backend.xp.finfo(basis.wk.dtype)
    n_heads, width, rank_qk = basis.wk.shape[-3:]
    width_v, rank_v = basis.wv.shape[-2:]
    across_heads = False
    if bits is not None or rtol is not None:
        # Without a coding there is an error below.
        across_heads = basis.coding is not None and basis.coding.wk.shape[-1] != width
        n_together = n_heads if across_heads else 1
        rank_qk, rank_v = n_together * width, n_together * width_v
    layout = Layout(
        xp=backend.xp,
        batch=_check_batch(batch, own),
        n_heads=n_heads,
        n_shared=basis.wq.shape[-3] // n_heads,
        width=width,
        width_v=width_v,
        rank=(width if index == "query" else rank_qk, rank_v),
        pool_batch=not own,
        window=check_count(window, "window", most=MOST),
        n_sink=check_count(n_sink, "n_sink", most=MOST),
        n_sparse=_check_n_sparse(n_sparse, min(width, width_v)),
        capacity=None if capacity is None else check_count(capacity, "capacity", most=MOST),
        dtype=None if dtype is None else _check_dtype(dtype, backend),
        bits=None if bits is None else check_bits(bits),
        rtol=None if rtol is None else check_positive(rtol, "rtol"),
        across_heads=across_heads,
        n_top=None if n_top is None else _check_n_top(n_top, n_heads),
        top_p=None if top_p is None else _check_share(top_p),
        rank_index=_check_rank_index(
            rank_index, index, (width, width_v), chooses=n_top is not None or top_p is not None
        ),
        index=index,
        score_options=ScoreOptions(
            scale=width**-0.5 if scale is None else check_scale(scale, limits),
            softcap=None if softcap is None else check_positive(softcap, "softcap", limits=limits),
        ),
        rotary=None if rotary is None else check_rotary(rotary, width),
        drift_bound=None if drift_bound is None else check_positive(drift_bound, "drift_bound"),
        method=method,
    )
    check_choice(method, tuple(METHODS), "method")
    _check_together(layout)
    if layout.rank_index is not None:
        _check_choosing(layout)
    if layout.is_coded:
        _check_coded(layout, basis)
    return layout


def _check_together(layout: Layout) -> None:
    """Raise where options that are right by themselves do not go together."""
    if layout.capacity is not None and layout.capacity <= layout.n_sink:
        raise ValueError(
            f"capacity must be greater than n_sink, {layout.n_sink}, got {layout.capacity}"
        )
    if layout.drift_bound is None:
        return
    if layout.window < max(layout.rank):
        raise ValueError(
            f"window must be at least {max(layout.rank)}, the rank, with drift_bound, which fits to the window; "
            f"got {layout.window}"
        )
    if layout.capacity is not None:
        raise ValueError(
            f"drift_bound must be None with a capacity, as a new basis takes more room, got {layout.drift_bound}"
        )


def _check_n_top(n_top: Any, n_heads: int) -> int | tuple[int, ...]:
    if not isinstance(n_top, (tuple, list)):
        return check_count(n_top, "n_top", most=MOST)
    counts = tuple(check_count(one, "n_top", most=MOST) for one in n_top)
    if len(counts) != n_heads:
        raise ValueError(
            f"n_top must be an int, or {n_heads}, one for each key head, got {shown(n_top)}"
        )
    return counts


def _check_share(top_p: Any) -> float:
    share = check_positive(top_p, "top_p")
    if share > 1:
        raise ValueError(f"top_p must be at most 1, got {shown(top_p)}")
    return share


def _check_rank_index(
    rank_index: Any, index: str, widths: tuple[int, int], *, chooses: bool
) -> tuple[int, int] | None:
    """Return how many coordinates choose, and how many values have; None where there is nothing to choose."""
    if not chooses:
        if rank_index is not None:
            raise ValueError(
                f"rank_index must be None without n_top or top_p, got {shown(rank_index)}"
            )
        if index != "leading":
            raise ValueError(f"index must be 'leading' without n_top or top_p, got {index!r}")
        return None
    if rank_index is None:
        of_k, of_v = (-(-d // part) for d, part in zip(widths, INDEX_PARTS[index], strict=True))
        return of_k, of_v
    if not isinstance(rank_index, (tuple, list)):
        most = check_rank(rank_index, widths[0], "rank_index", "D")
        return most, min(most, widths[1])
    if len(rank_index) != 2:
        raise ValueError(
            f"rank_index must be an int or a pair, for keys and for values, got {shown(rank_index)}"
        )
    of_k, of_v = (
        check_rank(one, d, "rank_index", name)
        for one, d, name in zip(rank_index, widths, ("D", "Dv"), strict=True)
    )
    return of_k, of_v


def _check_choosing(layout: Layout) -> None:
    """Raise where an option does not go with queries that choose."""
    others: dict[str, Any] = {"n_sparse": layout.n_sparse or None}
    others |= {"rotary": layout.rotary, "drift_bound": layout.drift_bound}
    for name, given in others.items():
        if given is not None:
            raise ValueError(f"{name} must be left out with n_top or top_p, got {given}")
    if layout.is_coded and layout.reads_by_query:
        raise ValueError(f"index must be 'leading' with bits or rtol, got {layout.index!r}")
    if layout.across_heads:
        raise ValueError(
            "basis must be fitted without across_heads for bits with n_top or top_p: each head chooses by its own "
            "coordinates"
        )
    if layout.is_static and layout.n_top is None:
        raise ValueError("n_top must be given besides top_p where shapes are static: the most keys")


def _check_coded(layout: Layout, basis: AttentionBasis) -> None:
    """Raise where what goes with floats does not go with bits."""
    if layout.bits is not None and layout.rtol is not None:
        raise ValueError(f"bits or rtol must be None, got {layout.bits} and {layout.rtol}")
    if basis.coding is None:
        raise ValueError(
            "basis must have its coding to store bits: fit it to concrete arrays by fit_attention"
        )
    numbers = map(layout.backend.to_numpy, (basis.coding.importance_k, basis.coding.importance_v))
    if not all(np.all(np.isfinite(one)) for one in numbers):
        raise ValueError(
            "basis must have a finite coding to store bits: squares of scores leave the range of its dtype"
        )
    frequencies = layout.backend.to_numpy(basis.coding.rotary)
    given = () if layout.rotary is None else layout.rotary
    # Of a fit that knew of none nothing is known.
    if frequencies.shape[-1] and (
        frequencies.shape[-1] != len(given)
        or not np.allclose(frequencies, given, rtol=1e-3, atol=1e-9)
    ):
        raise ValueError(
            "rotary must be what the basis was fitted with: its coding is for keys before that rotation; "
            f"got {layout.rotary}"
        )
    if layout.n_sparse:
        raise ValueError(f"n_sparse must be 0 with bits or rtol, got {layout.n_sparse}")


def check_bits(bits: Any) -> tuple[float, float]:
    """Return the average bits of a number of the keys, and of the values."""
    pair = bits if isinstance(bits, (tuple, list)) else (bits, bits)
    if len(pair) != 2:
        raise TypeError(f"bits must be a number or a pair (keys, values), got {shown(bits)}")
    both = tuple(check_positive(one, "bits") for one in pair)
    if not all(LEAST_BITS <= one <= MOST_BITS for one in both):
        raise ValueError(f"bits must be between {LEAST_BITS} and {MOST_BITS}, got {shown(bits)}")
    return both[0], both[1]


def _check_batch(batch: Any, own: tuple[int, ...]) -> tuple[int, ...]:
    if batch is None:
        return own
    if not isinstance(batch, (tuple, list)):
        raise TypeError(f"batch must be a tuple of ints, got {type(batch).__name__}")
    shape = tuple(check_count(n, "batch", most=MOST) for n in batch)
    if 0 in shape or (own and shape != own):
        right = f"{own}, that of the basis" if own else "without zeros"
        raise ValueError(f"batch must be {right}, got {shape}")
    return shape


def _check_n_sparse(n_sparse: Any, limit: int) -> int:
    count = check_count(n_sparse, "n_sparse")
    if count > limit:
        raise ValueError(f"n_sparse must be at most {limit}, min of D and Dv, got {count}")
    return count


def _check_dtype(dtype: Any, backend: Backend) -> str:
    """Return the name of a dtype: of one of the library, of one of NumPy, or as it is."""
    name = dtype
    if isinstance(dtype, (np.dtype, type)):
        name = np.dtype(dtype).name
    elif isinstance(dtype, type(backend.xp.float32)):
        own = [name for name in DTYPES if hasattr(backend.xp, name)]
        name = next((name for name in own if getattr(backend.xp, name) == dtype), None)
    if not isinstance(name, str) or name not in DTYPES:
        known = ", ".join(map(repr, DTYPES))
        raise ValueError(
            f"dtype must be one of {known}, by name or as a dtype of the library of the basis, got {shown(dtype)}"
        )
    if not hasattr(backend.xp, name):
        raise ValueError(f"dtype must be one that the library of the basis has, got {dtype!r}")
    return str(name)


def check_tokens(
    k: Array, v: Array, q: Array | None, contents: Contents
) -> tuple[Array, Array, Array | None, DType]:
    """Return k, v and, where needed, q, (B, H, m, .) in the dtype to compute in, and the dtype that k and v have."""
    layout = contents.layout
    if layout.capacity is None and not on_host(contents.lengths):
        raise ValueError(
            "capacity must be given to append under a transformation: shapes are static"
        )
    if layout.drift_bound is None:
        q = None
    elif q is None:
        raise ValueError("q must be given with drift_bound: the basis is refitted to it")
    resolve(basis=contents.like, k=k, v=v, optional={"q": q})
    promote(layout.backend, allow_complex=False, k=k, v=v, q=q)
    n_new = k.shape[-2] if k.ndim > 1 else 0
    _check_shape(k, "k", layout, layout.n_heads, n_new, layout.width)
    _check_shape(v, "v", layout, layout.n_heads, n_new, layout.width_v)
    dtype = layout.xp.result_type(k, v)
    if q is not None:
        _check_shape(q, "q", layout, layout.n_query_heads, n_new, layout.width)
        q = _prepared(q, contents)
    return _prepared(k, contents), _prepared(v, contents), q, dtype


def _check_shape(x: Array, name: str, layout: Layout, heads: int, n_rows: int, width: int) -> None:
    expected = (*layout.batch, heads, n_rows, width)
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")


def _prepared(x: Array, contents: Contents) -> Array:
    layout = contents.layout
    x = layout.xp.astype(x, contents.like.dtype, copy=False)
    return layout.batched(layout.backend.stop_gradient(x))


def check_queries(
    q: Array,
    mask: Array | None,
    lengths: Array | None,
    is_causal: Any,
    window: Any,
    alibi: Array | None,
    contents: Contents,
) -> Queries:
    """Return queries (B, H * shared, M, D) in the dtype to compute in, and a mask by key heads, placed."""
    layout = contents.layout
    resolve(basis=contents.like, q=q, optional={"mask": mask, "alibi": alibi})
    promote(layout.backend, allow_complex=False, q=q)
    is_causal = check_flag(is_causal, "is_causal")
    n_rows = q.shape[-2] if q.ndim > 1 else 0
    _check_shape(q, "q", layout, layout.n_query_heads, n_rows, layout.width)
    if n_rows == 0:
        raise ValueError(f"q must have no empty axis, got shape {tuple(q.shape)}")
    if mask is not None:
        mask = _check_mask(mask, (*q.shape[:-1], contents.n_tokens), layout)
    counts = check_lengths(lengths, n_rows, contents)
    work = layout.batched(layout.xp.astype(q, contents.like.dtype, copy=False))
    queries = Queries.at_the_end(
        layout,
        work,
        contents.lengths,
        counts,
        is_causal=is_causal,
        window=check_window(window),
    )
    slopes = check_heads(alibi, "alibi", contents)
    if slopes is not None:
        shape = (slopes.shape[0], layout.n_heads, layout.n_shared)
        slopes = layout.xp.reshape(slopes, shape)
    return queries._replace(mask=mask, slopes=slopes)


def check_heads(x: Array | None, name: str, contents: Contents) -> Array | None:
    """Return numbers for each query head, (B or 1, Hq), in the dtype to compute in."""
    if x is None:
        return None
    layout, like = contents.layout, contents.like
    resolve(basis=like, **{name: x})
    x = check_by_head(layout.backend, x, name, (*layout.batch, layout.n_query_heads), like)
    lead = layout.batch if x.ndim > 1 else ()
    x = layout.xp.broadcast_to(x, (*lead, layout.n_query_heads))
    x = layout.backend.stop_gradient(x)
    return layout.xp.reshape(x, (layout.n_batch if lead else 1, layout.n_query_heads))


def _check_mask(mask: Array, scores: tuple[int, ...], layout: Layout) -> Array:
    xp = layout.xp
    check_mask(layout.backend, mask, scores, "(..., Hq, m, n)")
    heads, *core = ((1,) * max(0, 3 - mask.ndim) + tuple(mask.shape))[-3:]
    lead = () if mask.ndim <= 3 else layout.batch
    mask = xp.broadcast_to(mask, (*lead, heads, *core))
    groups = (1, 1) if heads == 1 else (layout.n_heads, layout.n_shared)
    return xp.reshape(mask, (layout.n_batch if lead else 1, *groups, *core))


def check_lengths(lengths: Array | None, n_rows: int, contents: Contents) -> Array | None:
    """Return how many rows of each sequence count, (B,), beside the lengths of the cache; None for all."""
    layout = contents.layout
    if lengths is None:
        return None
    if layout.drift_bound is not None:
        raise ValueError("lengths must be None with drift_bound")
    if not on_host(contents.lengths):
        return _check_traced(lengths, n_rows, contents)
    counts = _host_integers(lengths, "lengths")
    if counts.shape != layout.batch or np.any(counts < 0) or np.any(counts > n_rows):
        raise ValueError(
            f"lengths must have shape {layout.batch} and be between 0 and {n_rows}, got {counts.tolist()}"
        )
    return counts.reshape(-1).astype(np.int64)


def _check_traced(lengths: Array, n_rows: int, contents: Contents) -> Array:
    """Clip traced values to what is possible."""
    layout, xp = contents.layout, contents.layout.xp
    counts = lengths if compat.is_array_api_obj(lengths) else np.asarray(lengths)
    if isinstance(counts, np.ndarray):
        counts = layout.backend.from_numpy(counts, contents.lengths, counts.dtype)
    if not xp.isdtype(counts.dtype, "integral"):
        raise TypeError(f"lengths must be integers, got {counts.dtype}")
    if tuple(counts.shape) != layout.batch:
        raise ValueError(f"lengths must have shape {layout.batch}, got {tuple(counts.shape)}")
    return xp.clip(xp.astype(xp.reshape(counts, (-1,)), contents.lengths.dtype), 0, n_rows)


def check_crop(n: Any, contents: Contents) -> Array:
    """Return how many tokens each sequence keeps at most, (B,), beside the lengths of the cache."""
    layout, lengths = contents.layout, contents.lengths
    if not on_host(lengths) and compat.is_array_api_obj(n) and not isinstance(n, np.ndarray):
        return _check_traced(n, MOST, contents)
    given = _host_integers(n, "n")
    if given.shape not in ((), layout.batch) or np.any(given < 0):
        raise ValueError(
            f"n must be 0 or more, one number or of shape {layout.batch}, got {shown(n)}"
        )
    if layout.drift_bound is not None and len(np.unique(given)) > 1:
        raise ValueError("n must be one number with drift_bound")
    kept = np.broadcast_to(given, layout.batch).reshape(-1).astype(np.int64)
    if on_host(lengths):
        return kept
    return layout.backend.from_numpy(np.minimum(kept, MOST), lengths, lengths.dtype)


def check_selection(indices: Any, layout: Layout) -> np.ndarray[Any, Any]:
    """Return which elements of the batch are wanted."""
    chosen = _host_integers(indices, "indices")
    if len(layout.batch) != 1:
        raise ValueError(
            f"a cache must have one batch axis to select from, got batch {layout.batch}"
        )
    (n,) = layout.batch
    if chosen.ndim != 1 or not chosen.size or np.any((chosen < 0) | (chosen >= n)):
        raise ValueError(f"indices must be one or more from 0 to {n - 1}, got {chosen.tolist()}")
    return chosen


def _host_integers(x: Any, name: str) -> np.ndarray[Any, Any]:
    is_foreign = compat.is_array_api_obj(x) and not isinstance(x, (np.ndarray, np.generic))
    if is_foreign:
        # Of the library of the cache, or of any other whose values can be looked at.
        x = resolve(**{name: x}).to_numpy(x)
    try:
        values = np.asarray(x)
    except (TypeError, ValueError):  # ragged lists
        raise TypeError(f"{name} must be integers, got {type(x).__name__}") from None
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {values.dtype}")
    return values


def check_room(n_new: int, counts: Array | None, contents: Contents) -> None:
    """Raise ValueError where the tokens would not fit, where that can be known."""
    capacity = contents.layout.capacity
    if capacity is None or not on_host(contents.lengths):
        return
    needed = int(np.max(contents.lengths + (n_new if counts is None else counts)))
    if needed > capacity:
        raise ValueError(
            f"capacity must be at least {needed} to append these tokens, got {capacity}"
        )
