"""What every attention function takes, checked once and laid out in one way.

All functions below the public ones take an `AttentionProblem`, in which heads are grouped by the key head that they
share, q (..., Hkv, G, Nq, D): whether the caller's arrays had a head axis, or shared heads, matters no more until
the way back.
"""

import math
import numbers
from typing import Any, NamedTuple

import numpy as np

from slra._backends import Backend
from slra._backends.standard import ScoreOptions
from slra._backends.standard.attention import scores_batch_shape, sum_to
from slra._backends.standard.hidden import any_to, seen_keys, seen_queries, without_unseen
from slra._typing import AnyArray, Array, CausalAlign, DType, Namespace
from slra._validate import (
    check_choice,
    check_finite,
    check_flag,
    check_mask,
    check_matrix,
    check_positive,
    check_scalar,
    promote,
    resolve,
    shown,
)

__all__ = [
    "AttentionProblem",
    "Seen",
    "Three",
    "check_scale",
    "group_heads",
    "make_problem",
    "ungroup_heads",
]

Three = tuple[Array, Array, Array]
ALIGNMENTS = ("bottom_right", "top_left")


class Seen(NamedTuple):
    """What takes part in attention; None where all does."""

    queries: Array | None  # (..., Hkv, G, Nq), True where a query sees a key
    keys: Array | None  # (..., Hkv, 1, Nk), True where a query sees the key


class AttentionProblem(NamedTuple):
    """Queries, keys and values to attend with, in the dtype to compute in, and how to answer.

    What changes scores and is a plain value goes into ``options``; what is an array, such as the mask, is a field.
    """

    q: Array  # (..., Hkv, G, Nq, D): the G query heads that share a key head lie together
    k: Array  # (..., Hkv, 1, Nk, D)
    v: Array  # (..., Hkv, 1, Nk, Dv)
    mask: Array | None  # 2 or more axes, broadcastable to (..., Hkv, G, Nq, Nk)
    options: ScoreOptions
    backend: Backend
    dtype: DType  # to answer in: the common one of the caller's arrays
    with_heads: tuple[bool, bool, bool]  # which of the caller's q, k and v had a head axis

    @property
    def xp(self) -> Namespace:
        """Namespace of the arrays."""
        return self.backend.xp

    @property
    def n_shared(self) -> int:
        """Number of query heads that share a key head."""
        return int(self.q.shape[-3])

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to attend with or to."""
        return 0 in (*self.q.shape, *self.k.shape, *self.v.shape)

    @property
    def may_leave_query_without_keys(self) -> bool:
        """Whether the mask or causality may hide all keys from a query."""
        n_queries, n_keys = self.q.shape[-2], self.k.shape[-2]
        is_before_keys = self.options.is_causal and self.options.diagonal(n_queries, n_keys) < 0
        return self.mask is not None or is_before_keys or n_keys == 0

    def broadcast(self) -> "AttentionProblem":
        """Give q, k and v all the leading axes of the result but G, which fits sum over."""
        xp = self.xp
        lead = np.broadcast_shapes(*(x.shape[:-3] for x in (self.q, self.k, self.v)))
        q, k, v = (xp.broadcast_to(x, (*lead, *x.shape[-3:])) for x in (self.q, self.k, self.v))
        return self._replace(q=q, k=k, v=v)

    def constant(self) -> "AttentionProblem":
        """Cut gradients off."""
        named = {name: getattr(self, name) for name in ("q", "k", "v", "mask")}
        stop = self.backend.stop_gradient
        numbers = {name: getattr(self.options, name) for name in ("scale", "softcap")}
        arrays = {n: stop(x) for n, x in numbers.items() if not isinstance(x, float | None)}
        options = self.options._replace(**arrays)
        return self._replace(
            options=options, **{name: stop(x) for name, x in named.items() if x is not None}
        )

    def with_head_axis(self) -> "AttentionProblem":
        """Answer with a head axis, whether or not the caller's arrays had one."""
        return self._replace(with_heads=(True, True, True))

    def check_finite(self) -> None:
        """Raise ValueError where an array that is concrete holds NaN or infinity that takes part."""
        try:
            self._check_all_finite()
        except ValueError:
            if self.mask is None and not self.options.is_causal:
                raise
            self.without_hidden()._check_all_finite()

    def _check_all_finite(self) -> None:
        for name in ("q", "k", "v"):
            check_finite(self.backend, getattr(self, name), name)

    def without_hidden(self) -> "AttentionProblem":
        """Zero queries that see nothing, and keys and values that no query sees."""
        q, k, v = without_unseen(self.backend, *self[:5])
        return self._replace(q=q, k=k, v=v)

    def seen(self, among: Array | None = None) -> Seen:
        """Find which queries see a key, or which of those ``among``, and which keys they see.

        Leading axes have to be equal, see `broadcast`.
        """
        given = self.backend, self.q, self.mask, self.options, self.q.shape[-2], self.k.shape[-2]
        queries, keys = seen_queries(*given), seen_keys(*given, among)
        if among is not None:
            queries = among if queries is None else queries & among
        return Seen(self._whole(queries, self.q), self._whole(keys, self.k))

    def _whole(self, seen: Array | None, x: Array) -> Array | None:
        """Give ``seen`` the shape of ``x`` but for the last axis; None where all is known to be seen."""
        if seen is None or (self.backend.is_eager(seen) and bool(self.xp.all(seen))):
            return None
        shape = tuple(x.shape[:-1])
        return self.xp.broadcast_to(any_to(self.backend, seen, shape), shape)

    def keep(self, seen: Seen) -> "AttentionProblem":
        """Zero what takes no part."""

        def kept(x: Array, these: Array | None) -> Array:
            return x if these is None else self.xp.where(these[..., None], x, self.xp.zeros_like(x))

        k, v = (kept(x, seen.keys) for x in (self.k, self.v))
        return self._replace(q=kept(self.q, seen.queries), k=k, v=v)

    # The way in and out for what belongs to the output

    def lse_shape(self) -> tuple[int, ...]:
        """Shape of the log-sum-exp as the caller sees it, (..., Hq, Nq)."""
        n_queries = self.q.shape[-2]
        if not any(self.with_heads):
            return (n_queries,)
        *batch, n_heads, n_shared = scores_batch_shape(self.q, self.k, self.v, self.mask)
        return (*batch, n_heads * n_shared, n_queries)

    def lay_out(self, out: Array) -> Array:
        """Lay (..., Hq, Nq, Dv) out by key head."""
        return group_heads(out, self.n_shared, self.backend)

    def lay_out_rows(self, lse: Array) -> Array:
        """Lay (..., Hq, Nq) out by key head."""
        return group_heads(lse, self.n_shared, self.backend, n_trailing=1)

    def answer(self, out: Array) -> Array:
        """Return the output as the caller's arrays are laid out, (..., Hq, Nq, Dv), in their dtype."""
        return self._cast(ungroup_heads(out, any(self.with_heads), self.backend))

    def answer_lse(self, lse: Array) -> Array:
        """Return the log-sum-exp as the caller's arrays are laid out, (..., Hq, Nq)."""
        return ungroup_heads(lse, any(self.with_heads), self.backend, n_trailing=1)

    def answer_inputs(self, arrays: Three) -> Three:
        """Return what belongs to q, k and v as the caller's are laid out, in their dtype."""
        q, k, v = (
            self._cast(ungroup_heads(x, has_heads, self.backend))
            for x, has_heads in zip(arrays, self.with_heads, strict=True)
        )
        return q, k, v

    def sum_to_inputs(self, grads: Three) -> Three:
        """Sum gradients over the axes along which q, k and v were broadcast."""
        arrays = (self.q, self.k, self.v)
        dq, dk, dv = (sum_to(dx, x.shape, self.xp) for dx, x in zip(grads, arrays, strict=True))
        return dq, dk, dv

    def _cast(self, x: Array) -> Array:
        if x.dtype == self.dtype:
            return x
        with self.backend.ignore_overflow():
            return self.xp.astype(x, self.dtype)


def group_heads(x: Array, n_shared: int, backend: Backend, *, n_trailing: int = 2) -> Array:
    """Lay (..., H * n_shared, M, N) out as (..., H, n_shared, M, N); without a head axis H is 1."""
    axis, shape = x.ndim - n_trailing - 1, tuple(x.shape)
    if axis < 0:
        return backend.reshape(x, (1, 1, *shape))
    heads = shape[axis] // n_shared, n_shared
    return backend.reshape(x, (*shape[:axis], *heads, *shape[axis + 1 :]))


def ungroup_heads(x: Array, has_heads: bool, backend: Backend, *, n_trailing: int = 2) -> Array:
    """Undo `group_heads`."""
    axis, shape = x.ndim - n_trailing - 1, tuple(x.shape)
    if not has_heads and axis == 1 and shape[0] == 1:
        return backend.reshape(x, shape[2:])
    n_heads = shape[axis - 1] * shape[axis]
    return backend.reshape(x, (*shape[: axis - 1], n_heads, *shape[axis + 1 :]))


def make_problem(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    is_causal: bool = False,
    causal_align: CausalAlign | None = None,
    scale: float | AnyArray | None = None,
    enable_gqa: bool = False,
    softcap: float | AnyArray | None = None,
    may_be_empty: bool = False,
) -> AttentionProblem:
    """Check what all attention functions share, and lay it out; raise on the first argument that is wrong.

    Without queries, keys or anything at all there is something to answer, where the caller says so, but nothing to fit.
    """
    backend = resolve(q=q, k=k, v=v, optional={"mask": mask})
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_matrix(x, name, may_be_empty=may_be_empty)
    _check_lengths(q, k, v)
    batch = _check_batch(q, k, v, enable_gqa=enable_gqa)
    if mask is not None:
        scores = (*batch, q.shape[-2], k.shape[-2])
        check_mask(backend, mask, scores, "(..., Hq, Nq, Nk)")
    promoted = promote(backend, allow_complex=False, q=q, k=k, v=v)
    work_q, work_k, work_v = promoted.arrays
    is_causal = check_flag(is_causal, "is_causal")
    options = ScoreOptions(
        scale=1 / math.sqrt(q.shape[-1])
        if scale is None
        else check_factor(backend, scale, "scale", work_q),
        is_causal=is_causal,
        causal_align=_check_alignment(causal_align, q.shape[-2], k.shape[-2], is_causal),
        softcap=None if softcap is None else check_factor(backend, softcap, "softcap", work_q),
    )
    n_shared = q.shape[-3] // max(1, k.shape[-3]) if enable_gqa else 1
    if mask is not None and mask.ndim > 2:
        mask = group_heads(mask, 1 if mask.shape[-3] == 1 else n_shared, backend)
    return AttentionProblem(
        group_heads(work_q, n_shared, backend),
        group_heads(work_k, 1, backend),
        group_heads(work_v, 1, backend),
        mask,
        options,
        backend,
        work_q.dtype if promoted.narrow is None else promoted.narrow,
        (q.ndim > 2, k.ndim > 2, v.ndim > 2),
    )


def check_factor(backend: Backend, value: Any, name: str, like: Array) -> Any:
    """Return a scale or softcap as a float, or as a 0-d array of the dtype of ``like`` where it is traced or learned.

    The values of such arrays are not looked at.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]  # a number, whatever the library of the other arrays
    value, limits = check_scalar(backend, value, name), backend.xp.finfo(like.dtype)
    if not isinstance(value, float):
        resolve(q=like, **{name: value})
        if backend.is_differentiated(value) or not backend.is_eager(value):
            return value if value.dtype == like.dtype else backend.xp.astype(value, like.dtype)
        value = float(value)
    return (
        check_scale(value, limits)
        if name == "scale"
        else check_positive(value, name, limits=limits)
    )


def check_scale(scale: Any, limits: Any = None) -> float:
    """Return a finite number, of either sign, as a float."""
    negative = isinstance(scale, numbers.Real) and scale < 0
    size = check_positive(-scale if negative else scale, "scale", allow_zero=True, limits=limits)
    return -size if negative else size


def _check_alignment(align: Any, n_queries: int, n_keys: int, is_causal: bool) -> CausalAlign:
    """Return where the causal diagonal lies; it has to be said where lengths differ."""
    if align is None:
        if is_causal and n_queries != n_keys:
            # Libraries disagree: torch and JAX mean "top_left", FlashAttention "bottom_right".
            raise ValueError(
                'causal_align must be "bottom_right" (the last query meets the last key) or "top_left" (the first '
                "the first), or the position of the first query, where attention is causal and lengths differ, "
                f"got None for {n_queries} queries and {n_keys} keys"
            )
        return "top_left"
    if isinstance(align, (int, np.integer)) and not isinstance(align, bool):
        # As far as a position in 32 bits counts.
        if abs(int(align)) >= 2**31:
            raise ValueError(f"causal_align must be a position below 2**31, got {shown(align)}")
        return int(align)
    check_choice(align, ALIGNMENTS, "causal_align")
    choice: CausalAlign = align
    return choice


def _check_lengths(q: Array, k: Array, v: Array) -> None:
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q and k must have the same last axis, got shapes {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"k and v must have the same length (second last axis), "
            f"got shapes {tuple(k.shape)} and {tuple(v.shape)}"
        )


def _check_batch(q: Array, k: Array, v: Array, *, enable_gqa: bool) -> tuple[int, ...]:
    """Return the leading axes of the result.

    Leading axes broadcast; with ``enable_gqa`` the heads of q are a multiple of those of k and v.
    """
    heads: tuple[int, ...] = ()
    shapes = [tuple(x.shape[:-2]) for x in (q, k, v)]
    if check_flag(enable_gqa, "enable_gqa"):
        if min(map(len, shapes)) < 1:
            raise ValueError("q, k and v must have a head axis, (..., H, N, D), with enable_gqa")
        heads_q, heads_k, heads_v = (shape[-1] for shape in shapes)
        if heads_k != heads_v or heads_q % max(1, heads_k):
            raise ValueError(
                f"the heads of q must be a multiple of those of k and v with enable_gqa, "
                f"got {heads_q}, {heads_k} and {heads_v}"
            )
        heads = (heads_q,)
        shapes = [shape[:-1] for shape in shapes]
    try:
        return np.broadcast_shapes(*shapes) + heads
    except ValueError:
        raise ValueError(
            f"the leading axes of q, k and v must broadcast, got shapes "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        ) from None
