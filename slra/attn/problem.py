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
from slra._backends.standard.attention import (
    Tile,
    TileBounds,
    broadcast_shapes,
    combine_masks,
    scores_batch_shape,
    sum_to,
)
from slra._backends.standard.hidden import any_to, hides, seen_keys, seen_queries, without_unseen
from slra._typing import AnyArray, Array, CausalAlign, DType, Namespace
from slra._validate import (
    broadcasts_to,
    check_choice,
    check_count,
    check_finite,
    check_flag,
    check_mask,
    check_matrix,
    check_positive,
    check_scalar,
    is_array,
    is_kind,
    promote,
    resolve,
    shown,
)
from slra.attn.lengths import (
    MOST,
    Lengths,
    Part,
    Placement,
    check_lengths,
    is_within,
    write_out,
)

__all__ = [
    "AttentionProblem",
    "Seen",
    "Three",
    "add_sinks",
    "check_by_head",
    "check_scale",
    "check_window",
    "group_heads",
    "make_problem",
    "ungroup_heads",
]

Three = tuple[Array, Array, Array]
HALF_BITS = 16
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
    lengths: Lengths | None = (
        None  # of the sequences in a row; they say what the options are in each
    )
    sinks: Array | None = None  # (..., Hkv or 1, G or 1): one more score, of a key whose value is 0

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
        n_queries, n_keys, options = self.q.shape[-2], self.k.shape[-2], self.options
        if self.mask is not None or self.lengths is not None or n_keys == 0:
            return True
        is_before_keys = options.is_causal and options.diagonal(n_queries, n_keys) < 0
        is_after_keys = options.first is not None and n_queries - 1 + options.first >= n_keys
        return is_before_keys or is_after_keys

    def broadcast(self) -> "AttentionProblem":
        """Give q, k and v all the leading axes of the result but G, which fits sum over."""
        xp = self.xp
        lead = broadcast_shapes(*(x.shape[:-3] for x in (self.q, self.k, self.v)))
        q, k, v = (xp.broadcast_to(x, (*lead, *x.shape[-3:])) for x in (self.q, self.k, self.v))
        return self._replace(q=q, k=k, v=v)

    def constant(self) -> "AttentionProblem":
        """Cut gradients off."""
        named = {name: getattr(self, name) for name in ("q", "k", "v", "mask", "sinks")}
        stop = self.backend.stop_gradient
        numbers = {name: getattr(self.options, name) for name in ("scale", "softcap", "alibi")}
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
            problem = self.with_lengths_written_out()
            if not hides(problem.mask, problem.options, self.q.shape[-2], self.k.shape[-2]):
                raise
            problem.without_hidden()._check_all_finite()

    def _check_all_finite(self) -> None:
        for name in ("q", "k", "v"):
            check_finite(self.backend, getattr(self, name), name)

    # What lengths and windows leave to do

    def part(self, part: Part) -> "AttentionProblem":
        """Cut one sequence out of rows."""
        queries, keys = part
        options, lengths = self.options, self.lengths
        if lengths is not None:
            options = lengths.placement.of(options, part.n_queries, part.n_keys)
        tile = Tile(queries.start, queries.stop, keys.start, keys.stop)
        return self._replace(
            q=self.q[..., queries, :],
            k=self.k[..., keys, :],
            v=self.v[..., keys, :],
            mask=None if self.mask is None else tile.of(self.mask),
            options=options,
            lengths=None,
        )

    def element(self, index: tuple[int, ...]) -> "AttentionProblem":
        """Take one element of the batch, without the axes before the heads."""

        def take(x: Any, n_trailing: int) -> Any:
            if x is None or x.ndim <= n_trailing:
                return x
            lead = x.shape[:-n_trailing]
            own = index[len(index) - len(lead) :]
            here = (0 if n == 1 else i for i, n in zip(own, lead, strict=True))
            return x[(*here, ...)]

        q, k, v, mask = (take(x, 4) for x in self[:4])
        options = self.options._replace(alibi=take(self.options.alibi, 4))
        return self._replace(q=q, k=k, v=v, mask=mask, options=options, sinks=take(self.sinks, 2))

    def without_unseen_keys(self) -> tuple["AttentionProblem", int]:
        """Cut off keys that causality and a window hide from all queries; with it the place of the first one left."""
        n_queries, n_keys, options = self.q.shape[-2], self.k.shape[-2], self.options
        if self.lengths is not None or options.sees_all(n_queries, n_keys):
            return self, 0
        start = options.first_key(0, n_keys)
        end = options.last_key(n_queries, n_queries, n_keys)
        if start >= end:
            return self, 0
        small = self
        if end - start < n_keys:
            small = self.part(Part(slice(0, n_queries), slice(start, end)))
            options = options._replace(
                causal_align=options.diagonal(n_queries, n_keys) - start,
                first=None if options.first is None else options.first - start,
                position=options.position - start,
            )
        if options.sees_all(n_queries, end - start):
            options = options._replace(is_causal=False, first=None)
        return small._replace(options=options), start

    def with_mask_for_lengths(self) -> "AttentionProblem":
        """Hide by the mask what lengths hide; where they only say what is padding it grows no more than a row."""
        lengths, n_queries, n_keys = self.lengths, self.q.shape[-2], self.k.shape[-2]
        if lengths is None:
            return self
        xp, backend, placement = self.xp, self.backend, lengths.placement
        depends = placement.hides or self.options.alibi is not None
        if lengths.n_sequences > 1 or (depends and placement.align == "bottom_right"):
            return self.with_lengths_written_out()
        seen = is_within(lengths.k, n_keys, backend, self.k)
        mask = self.mask
        if seen is not None:
            mask = combine_masks(xp, mask, seen[..., None, None, None, :])
        options = placement.of(self.options, n_queries, n_keys)
        return self._replace(mask=mask, options=options, lengths=None)

    def with_lengths_written_out(self) -> "AttentionProblem":
        """Hide by a mask of all queries and keys what lengths hide, padded queries too."""
        lengths, xp = self.lengths, self.xp
        if lengths is None:
            return self
        sizes = self.q.shape[-2], self.k.shape[-2]
        seen, distances = write_out(lengths, *sizes, self.backend, self.k)
        mask = combine_masks(xp, self.mask, seen[..., None, None, :, :])
        options = self.options._replace(is_causal=False, alibi=None)
        if self.options.alibi is not None:
            distances = xp.astype(distances, self.q.dtype)[..., None, None, :, :]
            mask = _added(xp, mask, -self.options.alibi * distances)
        return self._replace(mask=mask, options=options, lengths=None)

    def distances_written_out(self) -> Array:
        """How far each query stands from each key, where there are lengths, (..., 1, 1, Nq, Nk)."""
        if self.lengths is None:
            raise AssertionError("there are lengths")
        sizes = self.q.shape[-2], self.k.shape[-2]
        _, distances = write_out(self.lengths, *sizes, self.backend, self.k)
        return self.xp.astype(distances, self.q.dtype)[..., None, None, :, :]

    def with_options_written_out(self) -> "AttentionProblem":
        """Put all that hides keys and changes scores by place into the mask, (..., Nq, Nk)."""
        if self.lengths is not None:
            return self.with_lengths_written_out()
        xp, n_queries, n_keys = self.xp, self.q.shape[-2], self.k.shape[-2]
        options, device = self.options, self.backend.creation_device(self.q)
        tile = Tile(0, n_queries, 0, n_keys)
        bounds = TileBounds(self.mask, options, tile, options.diagonal(n_queries, n_keys))
        mask, seen = bounds.additive(xp, self.q.dtype, device), bounds.seen(xp, device)
        mask = mask if seen is None else combine_masks(xp, mask, seen)
        options = options._replace(is_causal=False, first=None, alibi=None)
        return self._replace(mask=mask, options=options)

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

    def with_sinks(self, out: Array, lse: Array) -> tuple[Array, Array]:
        """Let the sinks take their share of attention, given the output without them and its log-sum-exp."""
        if self.sinks is None:
            return out, lse
        return add_sinks(self.xp, out, lse, self.sinks)

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


def add_sinks(xp: Namespace, out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """Merge an output (..., Nq, Dv) and its log-sum-exp with one more score a head, of a key whose value is 0."""
    sinks = sinks[..., None] + xp.zeros_like(lse)
    empty = lse == -math.inf
    # Where nothing else is attended to, -inf - -inf would be NaN, and so would gradients.
    whole = xp.where(empty, xp.zeros_like(lse), lse)
    total = xp.logaddexp(whole, sinks)
    return out * xp.exp(whole - total)[..., None], xp.where(empty, sinks, total)


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


def _added(xp: Namespace, mask: Array, bias: Array) -> Array:
    if mask.dtype != xp.bool:
        return mask + bias
    return xp.where(mask, bias, xp.full_like(bias, -math.inf))


def make_problem(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    is_causal: bool = False,
    causal_align: CausalAlign | None = None,
    window: Any = None,
    lengths_q: Any = None,
    lengths_k: Any = None,
    sinks: Array | None = None,
    alibi: Array | None = None,
    scale: float | AnyArray | None = None,
    enable_gqa: bool = False,
    softcap: float | AnyArray | None = None,
    may_be_empty: bool = False,
    keep_half: bool = False,
    key_width: int | None = None,
) -> AttentionProblem:
    """Check what all attention functions share, and lay it out; raise on the first argument that is wrong.

    Without queries, keys or anything at all there is something to answer, where the caller says so, but nothing to fit.
    With ``keep_half`` half precision stays as it is where the backend's attention takes it.
    ``key_width`` is that of keys that have been mapped already, where they are not as wide as the queries.
    """
    backend = resolve(q=q, k=k, v=v, optional={"mask": mask, "sinks": sinks, "alibi": alibi})
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_matrix(x, name, may_be_empty=may_be_empty)
    _check_lengths(q, k, v, key_width)
    batch = _check_batch(q, k, v, enable_gqa=enable_gqa)
    if mask is not None:
        scores = (*batch, q.shape[-2], k.shape[-2])
        check_mask(backend, mask, scores, "(..., Hq, Nq, Nk)")
        if isinstance(mask, np.ndarray) and mask.dtype.name == "bfloat16":
            # Which NumPy's own functions do not know.
            mask = mask.astype(np.float32)
    # What is an array too, such as a learned scale, meets scores in single precision.
    others = (scale, softcap, sinks, alibi, lengths_q, lengths_k)
    keep_half = keep_half and backend.attends_in_half and not any(map(is_array, others))
    promoted = promote(backend, allow_complex=False, keep_half=keep_half, q=q, k=k, v=v)
    work_q, work_k, work_v = promoted.arrays
    by_head = {
        name: check_by_head(backend, x, name, batch, work_q)
        for name, x in (("sinks", sinks), ("alibi", alibi))
        if x is not None
    }
    placement = Placement(causal_align, check_flag(is_causal, "is_causal"), check_window(window))
    rows = check_lengths(
        backend,
        {"lengths_q": lengths_q, "lengths_k": lengths_k},
        {"lengths_q": q.shape[-2], "lengths_k": k.shape[-2]},
        batch[:-1],
        placement,
        like=q,
    )
    is_square = q.shape[-2] == k.shape[-2] and (rows is None or rows.are_equal)
    depends = placement.hides or alibi is not None
    placement = placement._replace(align=_check_alignment(causal_align, q, k, depends, is_square))
    options = ScoreOptions(
        scale=1 / math.sqrt(q.shape[-1])
        if scale is None
        else check_factor(backend, scale, "scale", work_q),
        softcap=None if softcap is None else check_factor(backend, softcap, "softcap", work_q),
    )
    n_shared = q.shape[-3] // max(1, k.shape[-3]) if enable_gqa else 1
    laid_out = {
        name: group_heads(x, n_shared if x.shape[-1] > 1 else 1, backend, n_trailing=0)
        for name, x in by_head.items()
    }
    if "alibi" in laid_out:
        options = options._replace(alibi=laid_out["alibi"][..., None, None])
    if rows is None:
        options = placement.of(options, q.shape[-2], k.shape[-2])
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
        None if rows is None else rows._replace(placement=placement),
        laid_out.get("sinks"),
    )


def check_by_head(
    backend: Backend, x: Array, name: str, batch: tuple[int, ...], like: Array
) -> Array:
    """Return numbers for each query head, (..., Hq) or (..., 1), in the dtype of ``like``."""
    if not is_kind(backend.xp, x.dtype, "real floating"):
        raise TypeError(f"{name} must be real floating, got {x.dtype}")
    heads = batch or (1,)
    if x.ndim == 0 or not broadcasts_to(x.shape, heads):
        raise ValueError(
            f"{name} must have an axis of query heads and broadcast to (..., Hq), here {heads}, "
            f"got shape {tuple(x.shape)}"
        )
    return x if x.dtype == like.dtype else backend.xp.astype(x, like.dtype)


def check_window(window: Any, name: str = "window") -> tuple[int | None, int | None] | None:
    """Return how far a query sees to the left and to the right, None for as far as there are keys."""
    if window is None:
        return None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(
            f"{name} must be a pair (left, right) of ints or None: keys that a query sees before and after its own; "
            f"got {shown(window)}"
        )
    # FlashAttention writes -1 for an end that is open.
    is_open = [one is None or (one == -1 and not isinstance(one, bool)) for one in window]
    left, right = (
        None if none else check_count(one, name, most=MOST)
        for one, none in zip(window, is_open, strict=True)
    )
    return None if left is None and right is None else (left, right)


def check_factor(backend: Backend, value: Any, name: str, like: Array) -> Any:
    """Return a scale or softcap as a float, or as a 0-d array of the dtype of ``like`` where it is traced or learned.

    The values of such arrays are not looked at.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]  # a number, whatever the library of the other arrays
    value, limits = check_scalar(backend, value, name), backend.xp.finfo(like.dtype)
    if limits.bits == HALF_BITS:
        limits = backend.xp.finfo(backend.xp.float32)
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


def _check_alignment(align: Any, q: Array, k: Array, depends: bool, is_square: bool) -> CausalAlign:
    """Return where queries stand among the keys; it has to be said where lengths differ and something depends on it."""
    if align is None:
        if depends and not is_square:
            n_queries, n_keys = q.shape[-2], k.shape[-2]
            # Libraries disagree: torch and JAX mean "top_left", FlashAttention "bottom_right".
            raise ValueError(
                'causal_align must be "bottom_right" (the last query meets the last key) or "top_left" (the first '
                "the first), or the position of the first query, where attention is causal and lengths differ "
                "(or has a window, or slopes: each query has a place among the keys), "
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


def _check_lengths(q: Array, k: Array, v: Array, key_width: int | None) -> None:
    if key_width is not None and k.shape[-1] != key_width:
        raise ValueError(
            f"k must have the {key_width} columns that project_keys gives, got shape {tuple(k.shape)}"
        )
    if key_width is None and q.shape[-1] != k.shape[-1]:
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
        return broadcast_shapes(*shapes) + heads
    except ValueError:
        raise ValueError(
            f"the leading axes of q, k and v must broadcast, got shapes "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        ) from None
