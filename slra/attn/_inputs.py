"""What every attention function takes: checked, promoted, and laid out by groups of heads."""

import math
import numbers
from typing import Any, NamedTuple

import numpy as np

from slra._backends import Backend
from slra._backends.standard import ScoreOptions
from slra._typing import Array, CausalAlign
from slra._validate import (
    Promoted,
    check_choice,
    check_flag,
    check_mask,
    check_matrix,
    check_positive,
    promote,
    resolve,
)

__all__ = ["Inputs", "check_inputs", "check_scale", "group_heads", "join_heads", "split_heads"]


class Inputs(NamedTuple):
    """Validated arguments of attention, in the dtype to compute in."""

    backend: Backend
    q: Array
    k: Array
    v: Array
    mask: Array | None
    options: ScoreOptions
    promoted: Promoted

    @property
    def has_heads(self) -> bool:
        """Whether any of q, k and v has a head axis."""
        return any(x.ndim > 2 for x in (self.q, self.k, self.v))


def check_inputs(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None,
    is_causal: bool,
    causal_align: CausalAlign,
    scale: float | None,
    enable_gqa: bool,
    softcap: float | None,
) -> Inputs:
    """Check the arguments that all attention functions share; raise on the first that is wrong."""
    backend = resolve(q=q, k=k, v=v, optional={"mask": mask})
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_matrix(x, name)
    _check_lengths(q, k, v)
    batch = _check_batch(q, k, v, enable_gqa=enable_gqa)
    if mask is not None:
        scores = (*batch, q.shape[-2], k.shape[-2])
        check_mask(backend, mask, scores, "(..., Hq, Nq, Nk)")
    check_choice(causal_align, ("bottom_right", "top_left"), "causal_align")
    promoted = promote(backend, allow_complex=False, q=q, k=k, v=v)
    work_q, work_k, work_v = promoted.arrays
    limits = backend.xp.finfo(work_q.dtype)
    options = ScoreOptions(
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else check_scale(scale, limits),
        is_causal=check_flag(is_causal, "is_causal"),
        causal_align=causal_align,
        softcap=None if softcap is None else check_positive(softcap, "softcap", limits=limits),
    )
    return Inputs(backend, work_q, work_k, work_v, mask, options, promoted)


def check_scale(scale: Any, limits: Any = None) -> float:
    """Return a finite number, of either sign, as a float."""
    negative = isinstance(scale, numbers.Real) and scale < 0
    size = check_positive(-scale if negative else scale, "scale", allow_zero=True, limits=limits)
    return -size if negative else size


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
        if heads_k != heads_v or heads_q % heads_k:
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


def group_heads(inputs: Inputs) -> Inputs:
    """Split the heads of q into (Hkv, group), so that k and v broadcast against them unrepeated."""
    xp, n_heads = inputs.backend.xp, inputs.k.shape[-3]
    q, mask = inputs.q, inputs.mask
    group = q.shape[-3] // n_heads
    q = xp.reshape(q, (*q.shape[:-3], n_heads, group, *q.shape[-2:]))
    if mask is not None and mask.ndim >= 3:
        heads = (1, 1) if mask.shape[-3] == 1 else (n_heads, group)
        mask = xp.reshape(mask, (*mask.shape[:-3], *heads, *mask.shape[-2:]))
    k, v = inputs.k[..., None, :, :], inputs.v[..., None, :, :]
    return inputs._replace(q=q, k=k, v=v, mask=mask)


def split_heads(x: Array, inputs: Inputs, n_trailing: int) -> Array:
    """Lay out a result or its gradient as `group_heads` did ``inputs``."""
    n_heads, group = inputs.k.shape[-4], inputs.q.shape[-3]
    at = x.ndim - n_trailing - 1
    return inputs.backend.xp.reshape(x, (*x.shape[:at], n_heads, group, *x.shape[at + 1 :]))


def join_heads(x: Array, inputs: Inputs, n_trailing: int) -> Array:
    """Undo `group_heads` on a result, whose heads are followed by ``n_trailing`` axes."""
    *batch, n_heads, group = x.shape[: x.ndim - n_trailing]
    return inputs.backend.xp.reshape(x, (*batch, n_heads * group, *x.shape[x.ndim - n_trailing :]))
