"""Independent answers, in long double where a formula will do, and LAPACK's in scaled double precision elsewhere."""

import math
from typing import Any

import array_api_compat as compat
import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from tests.backends import to_numpy

__all__ = [
    "close",
    "dense",
    "in_range",
    "naive",
    "naive_vjp",
    "prox",
    "real_dtype",
    "unit",
    "value",
]

HALF = ("float16", "bfloat16")


def dense(x: Any) -> np.ndarray:
    """Any accepted array or matrix as a NumPy array."""
    if scipy.sparse.issparse(x):
        return x.toarray()
    if isinstance(x, scipy.sparse.linalg.LinearOperator):
        return np.asarray(x @ np.eye(x.shape[1], dtype=x.dtype))
    if compat.is_array_api_obj(x) and not isinstance(x, (np.ndarray, np.generic)):
        return to_numpy(x)
    return np.asarray(x)


def wide(x: Any) -> np.ndarray:
    """In long double, real or complex."""
    a = dense(x)
    return a.astype(np.clongdouble if a.dtype.kind == "c" else np.longdouble)


def real_dtype(dtype: Any) -> np.dtype:
    return np.zeros(0, dtype).real.dtype.newbyteorder("=")


def eps_of(dtype: Any) -> float:
    return float(np.finfo(real_dtype(dtype)).eps)


def close(out: Any, right: Any, scale: Any = None, factor: float = 16) -> None:
    """Fail unless ``out`` is ``right`` but for rounding relative to ``scale``; infinite only beyond the dtype."""
    out, right = dense(out), np.asarray(right)
    assert out.shape == right.shape, (out.shape, right.shape)
    info = np.finfo(real_dtype(out.dtype))
    scale = np.abs(right) if scale is None else np.asarray(scale, dtype=np.longdouble)
    with np.errstate(all="ignore"):
        # Beyond the range, or so close to its end that rounding decides.
        beyond = ~(np.abs(right) < float(info.max) * (1 - factor * float(info.eps)))
        error = np.abs(wide(out) - right)
        allowed = factor * (float(info.eps) * scale + float(info.tiny))
        # Also where a larger number on the way decides.
        near = ~(scale * factor < float(info.max)) & np.isinf(out)
    assert not np.any(np.isnan(out) & ~np.isnan(right)), "NaN from finite input"
    good = beyond | near | (error <= allowed)
    assert np.all(good), f"{out[~good]} is not {right[~good]}"


# Proximal operators: each takes arrays in long double and returns the result.


def _soft(x: Any, tau: Any) -> Any:
    size = np.abs(x)
    unit = np.where(size == 0, 1, size)
    return x / unit * np.maximum(size - tau, 0)


def _hypot(x: Any, axis: Any) -> Any:
    return np.sqrt(np.sum(np.abs(x) ** 2, axis=axis, keepdims=True))


def _group(x: Any, tau: Any, axis: Any) -> Any:
    norm = _hypot(x, axis)
    return x / np.where(norm == 0, 1, norm) * np.maximum(norm - tau, 0)


def _level(x: Any, radius: Any, axis: int) -> Any:
    u = -np.sort(-x, axis=axis)
    counts = np.arange(1, x.shape[axis] + 1).reshape([-1] + [1] * (x.ndim - 1 - axis % x.ndim))
    return np.max((np.cumsum(u, axis=axis) - radius) / counts, axis=axis, keepdims=True)


def _simplex(x: Any, radius: Any, axis: int = -1) -> Any:
    x = x - np.max(x, axis=axis, keepdims=True)
    return np.maximum(x - _level(x, radius, axis), 0)


def _l1_ball(x: Any, radius: Any, axis: int = -1) -> Any:
    return _soft(x, np.maximum(_level(np.abs(x), radius, axis), 0))


def _l2_ball(x: Any, radius: Any, axis: Any = -1) -> Any:
    norm = _hypot(x, axis)
    return np.where(norm <= radius, x, x * (radius / np.where(norm == 0, 1, norm)))


def _huber(x: Any, tau: Any, delta: Any) -> Any:
    return np.where(np.abs(x) <= (1 + tau) * delta, x / (1 + tau), _soft(x, tau * delta))


def _norm_huber(x: Any, delta: Any) -> Any:
    small = np.minimum(np.abs(x), delta)
    return small * (np.abs(x) - small / 2)


def of_singular_values(x: Any, change: Any) -> Any:
    scale = unit(x)
    U, S, Vh = np.linalg.svd(
        (x / scale).astype(complex if x.dtype.kind == "c" else float), full_matrices=False
    )
    return (U * change(S.astype(np.longdouble) * scale[..., 0])[..., None, :]) @ Vh


def unit(x: Any) -> Any:
    largest = np.max(np.abs(x), axis=(-2, -1), keepdims=True)
    return np.where(largest == 0, 1, largest)


prox = {
    "prox_l1": _soft,
    "prox_nonneg_l1": lambda x, tau: np.maximum(x - tau, 0),
    "prox_elastic_net": lambda x, tau, l2: _soft(x, tau) / (1 + tau * l2),
    "prox_huber": _huber,
    "prox_l2": _group,
    "prox_l21": _group,
    "prox_linf": lambda x, tau, axis=-1: x - _l1_ball(x, tau, axis),
    "prox_nuclear": lambda x, tau: of_singular_values(x, lambda S: np.maximum(S - _first(tau), 0)),
    "project_l1_ball": _l1_ball,
    "project_l2_ball": _l2_ball,
    "project_simplex": _simplex,
    "project_box": lambda x, lo, hi: np.minimum(np.maximum(x, lo), hi),
}


def _first(tau: Any) -> Any:
    return tau if tau.ndim == 0 else tau[..., 0]


def _sum(function: Any) -> Any:
    return lambda x, axis=None, **options: np.sum(function(x, **options), axis=axis)


def _nonneg(x: Any) -> Any:
    return np.where(x < 0, np.inf, x)


def _nuclear(x: Any) -> Any:
    scale = unit(x)
    S = np.linalg.svd(
        (x / scale).astype(complex if x.dtype.kind == "c" else float), compute_uv=False
    )
    return np.sum(S.astype(np.longdouble) * scale[..., 0], axis=-1)


value = {
    "norm_l1": _sum(np.abs),
    "norm_l0": _sum(lambda x: (x != 0).astype(np.longdouble)),
    "norm_elastic_net": _sum(lambda x, l2: np.abs(x) + l2 / 2 * np.abs(x) ** 2),
    "norm_nonneg_l1": _sum(_nonneg),
    "norm_huber": _sum(_norm_huber),
    "norm_l2": lambda x, axis: np.squeeze(_hypot(x, axis), axis=axis),
    "norm_l21": lambda x, axis: np.sum(_hypot(x, axis), axis=(-2, -1)),
    "norm_linf": lambda x, axis=-1: np.max(np.abs(x), axis=axis),
    "norm_nuclear": _nuclear,
}


# Attention


def _scores(q: Any, k: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Scores before the mask, and with it."""
    scale = options.get("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else np.longdouble(float(scale))
    scores = scale * (q @ np.swapaxes(k, -1, -2))
    if (softcap := options.get("softcap")) is not None:
        softcap = np.longdouble(float(softcap))
        scores = softcap * np.tanh(scores / softcap)
    masked = scores
    if (mask := options.get("mask")) is not None:
        mask = dense(mask)
        masked = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + wide(mask)
    n, m = masked.shape[-2:]
    align = options.get("causal_align")
    shift = {None: 0, "top_left": 0, "bottom_right": m - n}.get(align, align)
    left, right = (None if x == -1 else x for x in options.get("window") or (None, None))
    right = 0 if options.get("is_causal") else right
    ahead = np.arange(m) - np.arange(n)[:, None] - shift
    if right is not None:
        masked = np.where(ahead <= right, masked, -np.inf)
    if left is not None:
        masked = np.where(ahead >= -left, masked, -np.inf)
    return scores, masked


def _repeated(q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    if not options.get("enable_gqa"):
        return k, v
    times = q.shape[-3] // k.shape[-3]
    return np.repeat(k, times, axis=-3), np.repeat(v, times, axis=-3)


def naive(q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Attention, log-sum-exp and weights."""
    q, k, v = wide(q), wide(k), wide(v)
    k, v = _repeated(q, k, v, options)
    _, scores = _scores(q, k, options)
    peak = np.max(scores, axis=-1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0)
    weights = np.exp(scores - peak)
    total = np.sum(weights, axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (peak + np.log(total))[..., 0]
    weights = weights / np.where(total == 0, 1, total)
    return weights @ v, np.where(total[..., 0] == 0, -np.inf, lse), weights


def naive_vjp(args: dict[str, Any]) -> Any:
    """Gradients, without grouped heads, for q, k and v of one batch shape."""
    q, k, v, out, lse, grad = (wide(args[n]) for n in ("q", "k", "v", "out", "lse", "grad_out"))
    scores, masked = _scores(q, k, args)
    weights = np.exp(masked - np.where(np.isinf(lse), 0, lse)[..., None])
    delta = np.sum(grad * out, axis=-1)
    if args.get("grad_lse") is not None:
        delta = delta - wide(args["grad_lse"])
    ds = weights * (grad @ np.swapaxes(v, -1, -2) - delta[..., None])
    if (softcap := args.get("softcap")) is not None:
        ds = ds * (1 - (scores / np.longdouble(float(softcap))) ** 2)
    scale = args.get("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else np.longdouble(float(scale))
    return scale * ds @ k, scale * np.swapaxes(ds, -1, -2) @ q, np.swapaxes(weights, -1, -2) @ grad


def in_range(q: Any, k: Any, v: Any, options: dict[str, Any], *, room: float = 1.0) -> bool:
    """Whether scores, and sums of values, stay in the range of the dtype: what attention asks for."""
    limit = float(np.finfo(real_dtype(np.result_type(*map(dense, (q, k, v))))).max)
    if limit < 1e5:  # half precision is computed in single
        limit = float(np.finfo("float32").max)
    scale = options.get("scale")
    factor = max(1.0, abs(float(scale))) if scale is not None else 1.0
    sizes = [np.max(np.abs(wide(x)), initial=0) for x in (q, k, v)]
    softcap = options.get("softcap")
    capped = 1.0 if softcap is None else max(1.0, 1 / float(softcap))
    n_keys, width = dense(k).shape[-2:]
    products = max(1, sizes[0]) * factor * max(1, sizes[1]) * width * 2 * capped
    return bool(products * room < limit and sizes[2] * n_keys * 2 * room < limit)
