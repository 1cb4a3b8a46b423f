"""Rotary position embedding, applied to what is read from the cache."""

import numpy as np

from slra._typing import Array
from slra.attn import rotary
from slra.cache._layout import Layout, on_host

__all__ = ["rotate", "turns_at"]


def turns_at(positions: Array, like: Array, layout: Layout) -> tuple[Array, Array]:
    """Cosine and sine (B or 1, 1, n, F) of positions (B or 1, n) times F frequencies, in the dtype of ``like``."""
    backend, frequencies = layout.backend, layout.rotary or ()
    if on_host(positions):
        return rotary.turns_by(positions[:, None, :], frequencies, like, backend)
    xp, step = layout.xp, backend.from_numpy(np.asarray(frequencies), like)
    angles = xp.astype(positions, like.dtype)[:, None, :, None] * step
    return xp.cos(angles), xp.sin(angles)


def rotate(x: Array, turns: tuple[Array, Array], layout: Layout) -> Array:
    """Rotate the leading 2 F features of ``x`` (B, H, n, D); those beyond are left alone."""
    return layout.backend.rotated(x, *turns)
