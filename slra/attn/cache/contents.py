"""What must hold of a cache that comes from a file: settings of the right kind, arrays that fit them."""

import numbers
from typing import Any

import numpy as np

from slra._typing import Array
from slra.attn.cache.state import Segment, Settings, SparseTokens, State
from slra.attn.fit import METHODS

__all__ = ["check_contents"]

COUNTS = ("n_heads", "n_shared", "width", "width_v", "window", "n_sink", "n_sparse")


def check_contents(state: State, settings: Settings) -> None:
    """Raise ValueError where an array does not have the shape and kind that the settings say, or a setting is none."""
    _check_settings(settings)
    if not state.segments:
        raise ValueError("it holds no segment")
    work = state.segments[0].maps.wk.dtype
    if work not in (np.float32, np.float64):
        raise ValueError(f"its maps are {work}")
    n_batch, heads = settings.n_batch, settings.n_heads
    _check(state.lengths, "lengths", (n_batch,), "i")
    if np.any(state.lengths < 0):
        raise ValueError("its lengths are negative")
    for i, segment in enumerate(state.segments):
        _check_segment(segment, f"segments.{i}", settings, work)
    starts = [segment.start for segment in state.segments]
    if np.any(starts[0] != settings.n_sink):
        raise ValueError("its first segment does not start after the sinks")
    for segment, end in zip(state.segments, [*starts[1:], state.lengths], strict=True):
        if np.any(end - segment.start > segment.k.shape[2]):
            raise ValueError("its segments hold fewer tokens than its lengths say")
    n_exact = settings.n_sink + settings.window
    if (state.exact is None) != (n_exact == 0) or (state.recent is None) != (
        settings.update == "fixed"
    ):
        raise ValueError("it lacks arrays that its settings ask for")
    if state.exact is not None:
        _check(state.exact.k, "exact.k", (n_batch, heads, n_exact, settings.width), work)
        _check(state.exact.v, "exact.v", (n_batch, heads, n_exact, settings.width_v), work)
    if state.recent is not None:
        n_queries = min(settings.window, state.recent.q.shape[2])
        shape = (n_batch, heads * settings.n_shared, n_queries, settings.width)
        _check(state.recent.q, "recent.q", shape, work)
        _check(state.recent.since_check, "recent.since_check", (), "i")


def _check_settings(settings: Settings) -> None:
    options = settings.options
    counts = [getattr(settings, name) for name in COUNTS]
    kinds: list[tuple[type, list[Any]]] = [
        (numbers.Integral, [*counts, *settings.batch, *settings.rank]),
        (numbers.Real, [options.scale, *(settings.rotary or ())]),
    ]
    optional: list[tuple[type, Any]] = [
        (numbers.Integral, settings.capacity),
        (numbers.Real, options.softcap),
        (numbers.Real, settings.drift_bound),
        (str, settings.dtype),
    ]
    kinds += [(kind, [x]) for kind, x in optional if x is not None]
    wrong = [x for kind, xs in kinds for x in xs if not isinstance(x, kind)]
    if wrong or settings.update not in ("fixed", "drift") or settings.method not in METHODS:
        raise ValueError(f"its settings are not those of a cache: {settings}")


def _check_segment(segment: Segment, name: str, settings: Settings, work: Any) -> None:
    heads, n_shared, width, width_v = settings[1:5]
    rank_qk, rank_v = settings.rank
    # NumPy has no bfloat16: it is saved as float32.
    stored = np.dtype({None: work, "bfloat16": "float32"}.get(settings.dtype, settings.dtype))
    lead = 1 if settings.pool_batch else settings.n_batch
    shapes = {
        "wq": (lead, heads * n_shared, width, rank_qk),
        "wk": (lead, heads, width, rank_qk),
        "wv": (lead, heads, width_v, rank_v),
        "uv": (lead, heads, rank_v, width_v),
        "c": (lead, heads, 1, width),
        "mu": (lead, heads, 1, width_v),
    }
    for field, shape in shapes.items():
        _check(getattr(segment.maps, field), f"{name}.maps.{field}", shape, work)
    _check(segment.start, f"{name}.start", (settings.n_batch,), "i")
    rows = (settings.n_batch, heads, segment.k.shape[2] if segment.k.ndim == 4 else 0)
    _check(segment.k, f"{name}.k", (*rows, rank_qk + settings.carries_shift), stored)
    _check(segment.v, f"{name}.v", (*rows, rank_v), stored)
    for field, limit in (("sparse_k", width), ("sparse_v", width_v)):
        shape = (*rows, settings.n_sparse)
        _check_sparse(getattr(segment, field), f"{name}.{field}", shape, limit, stored)


def _check_sparse(
    tokens: SparseTokens | None, name: str, shape: tuple[int, ...], limit: int, stored: Any
) -> None:
    if (tokens is None) != (shape[-1] == 0):
        raise ValueError(f"its {name} is there or not, against its settings")
    if tokens is None:
        return
    _check(tokens.values, f"{name}.values", shape, stored)
    _check(tokens.indices, f"{name}.indices", shape, "i")
    if tokens.indices.size and not 0 <= tokens.indices.min() <= tokens.indices.max() < limit:
        raise ValueError(f"its {name}.indices are not between 0 and {limit - 1}")


def _check(x: Array, name: str, shape: tuple[int, ...], dtype: Any) -> None:
    """Compare with a shape, and with a dtype or "i" for any integers."""
    found: Any = np.asarray(x)
    is_kind = found.dtype.kind == "i" if dtype == "i" else found.dtype == dtype
    if found.shape != shape or not is_kind:
        raise ValueError(
            f"its {name} is {found.dtype} of shape {found.shape}, not {dtype} of {shape}"
        )
