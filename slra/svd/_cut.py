"""Where to cut a spectrum so that what is left out meets a tolerance. Eager arrays only."""

from slra._backends import Backend
from slra._typing import Array

__all__ = ["cut_at_tolerance", "cut_values", "keep_leading", "ranks_for"]


def cut_at_tolerance(S: Array, rtol: float, cap: int, backend: Backend) -> Array:
    """Smallest rank, at most ``cap``, for each set of *all* singular values; eager only."""
    xp = backend.xp
    values, largest = xp.astype(S, backend.accumulation_dtype(S)), xp.max(S, axis=-1, keepdims=True)
    # Of values over the largest, because squares overflow.
    squares = (values / xp.where(largest > 0, largest, xp.ones_like(largest))) ** 2
    # From the small end: the tail of a long sum is not the difference of two large ones.
    tails = xp.flip(xp.cumulative_sum(xp.flip(squares, axis=-1), axis=-1), axis=-1)
    after = xp.concat([tails[..., 1:], xp.zeros_like(tails[..., :1])], axis=-1)
    return ranks_for(after, rtol**2 * tails[..., 0], cap, backend)


def cut_values(S: Array, rtol: float, cap: int, backend: Backend) -> tuple[Array, int]:
    """Cut *all* singular values at the tolerance: the largest rank of a batch, zeros beyond that of each element."""
    ranks = cut_at_tolerance(S, rtol, cap, backend)
    rank = int(backend.xp.max(ranks))
    return keep_leading(S[..., :rank], ranks, backend), rank


def ranks_for(tails: Array, allowed: Array, cap: int, backend: Backend) -> Array:
    """Smallest rank, at most ``cap``, whose squared residual is allowed; ``tails`` are those after rank 1, 2, ..."""
    xp = backend.xp
    missed = xp.astype(tails > allowed[..., None], xp.int32)
    ranks = 1 + xp.sum(missed, axis=-1)
    return xp.where(ranks > cap, xp.full_like(ranks, cap), ranks)


def keep_leading(S: Array, ranks: Array, backend: Backend) -> Array:
    """``S`` with zeros from ``ranks`` on."""
    xp = backend.xp
    index = xp.arange(S.shape[-1], device=backend.creation_device(S))
    return xp.where(index < ranks[..., None], S, xp.zeros_like(S))
