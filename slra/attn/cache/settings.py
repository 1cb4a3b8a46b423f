"""The options of a cache, checked."""

from typing import Any

import array_api_compat as compat
import numpy as np

from slra._backends import Backend
from slra._backends.standard import ScoreOptions
from slra._validate import check_choice, check_count, check_positive, promote, resolve
from slra.attn.basis import AttentionBasis, check_parts
from slra.attn.cache.state import SegmentMaps, Settings
from slra.attn.fit import METHODS
from slra.attn.problem import check_scale

__all__ = ["check_settings", "maps_of"]


# Of tokens, or of sequences: what a position in 32 bits can count.
MOST = 2**31 - 1


def check_settings(
    basis: AttentionBasis,
    *,
    batch: Any,
    window: Any,
    n_sink: Any,
    n_sparse: Any,
    capacity: Any,
    dtype: Any,
    scale: Any,
    softcap: Any,
    rotary: Any,
    update: Any,
    drift_bound: Any,
    method: Any,
) -> tuple[Backend, Settings]:
    """Check what a cache is made with; raise on the first that is wrong."""
    check_parts(basis)
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
    settings = Settings(
        batch=_check_batch(batch, own),
        n_heads=n_heads,
        n_shared=basis.wq.shape[-3] // n_heads,
        width=width,
        width_v=width_v,
        rank=(rank_qk, rank_v),
        pool_batch=not own,
        window=check_count(window, "window", most=MOST),
        n_sink=check_count(n_sink, "n_sink", most=MOST),
        n_sparse=_check_n_sparse(n_sparse, min(width, width_v)),
        capacity=None if capacity is None else check_count(capacity, "capacity", most=MOST),
        dtype=_check_dtype(dtype, backend),
        options=ScoreOptions(
            scale=width**-0.5 if scale is None else check_scale(scale, limits),
            softcap=None if softcap is None else check_positive(softcap, "softcap", limits=limits),
        ),
        rotary=None if rotary is None else _check_rotary(rotary, width),
        update=update,
        drift_bound=_check_update(update, drift_bound),
        method=method,
    )
    check_choice(method, tuple(METHODS), "method")
    _check_together(settings)
    return backend, settings


def _check_together(settings: Settings) -> None:
    """Raise where options that are right by themselves do not go together."""
    if settings.capacity is not None and settings.capacity <= settings.n_sink:
        raise ValueError(
            f"capacity must be greater than n_sink, {settings.n_sink}, got {settings.capacity}"
        )
    if settings.update == "drift":
        if settings.window < max(settings.rank):
            raise ValueError(
                f"window must be at least {max(settings.rank)}, the rank, with update='drift', which fits "
                f"to the window; got {settings.window}"
            )
        if settings.capacity is not None:
            raise ValueError("update must be 'fixed' with a capacity: a new basis takes more room")


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


def _check_dtype(dtype: Any, backend: Backend) -> str | None:
    if dtype is None:
        return None
    check_choice(dtype, ("float16", "bfloat16", "float32", "float64"), "dtype")
    if not hasattr(backend.xp, dtype):
        raise ValueError(f"dtype must be one that the library of the basis has, got {dtype!r}")
    return str(dtype)


def _check_rotary(rotary: Any, width: int) -> tuple[float, ...]:
    """Return the frequencies as floats."""
    if compat.is_array_api_obj(rotary) and not isinstance(rotary, np.generic):
        rotary = resolve(rotary=rotary).to_numpy(rotary)
    try:
        given = np.asarray(rotary)
    except (TypeError, ValueError):  # ragged lists
        given = np.asarray(None)
    if given.dtype.kind not in "fiu":
        raise TypeError(f"rotary must be real numbers, got {type(rotary).__name__}")
    frequencies = given.astype(np.float64)
    if frequencies.ndim != 1 or not 1 <= frequencies.size <= width // 2:
        raise ValueError(
            f"rotary must be 1 to {width // 2} frequencies, half of D, got shape {frequencies.shape}"
        )
    if not np.all(np.isfinite(frequencies)):
        raise ValueError("rotary must be finite, got NaN or infinity")
    return tuple(frequencies.tolist())


def _check_update(update: Any, drift_bound: Any) -> float | None:
    check_choice(update, ("fixed", "drift"), "update")
    if (update == "drift") != (drift_bound is not None):
        raise ValueError(
            f"drift_bound must be given with update='drift', and only then, got {drift_bound!r}"
        )
    return None if drift_bound is None else check_positive(drift_bound, "drift_bound")


def maps_of(basis: AttentionBasis, n_batch: int, backend: Backend) -> SegmentMaps:
    """Lay the maps of a basis out with one batch axis, of length one where all elements share them."""
    xp = backend.xp
    named = {name: getattr(basis, name) for name in SegmentMaps._fields}
    arrays = promote(backend, allow_complex=False, **named).arrays
    lead = n_batch if basis.wk.ndim > 3 else 1
    return SegmentMaps(*(xp.reshape(x, (lead, *x.shape[-3:])) for x in arrays))
