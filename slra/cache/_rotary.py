"""Rotary position embedding, applied to what is read from the cache.

Source: J. Su et al., RoFormer, arXiv:2104.09864, in the layout that pairs feature i with feature i + F.
"""

import numpy as np

from slra._typing import Array
from slra.cache._layout import Layout, on_host

__all__ = ["rotate", "turns_at"]


def turns_at(positions: Array, like: Array, layout: Layout) -> tuple[Array, Array]:
    """Cosine and sine (B or 1, 1, n, F) of positions (B or 1, n) times F frequencies, in the dtype of ``like``."""
    backend, frequencies = layout.backend, np.asarray(layout.rotary)
    if on_host(positions):
        # In double precision: in single an angle of 1e5 is off by up to 0.004.
        angles = positions[:, None, :, None] * frequencies
        return backend.from_numpy(np.cos(angles), like), backend.from_numpy(np.sin(angles), like)
    xp, step = layout.xp, backend.from_numpy(frequencies, like)
    angles = xp.astype(positions, like.dtype)[:, None, :, None] * step
    return xp.cos(angles), xp.sin(angles)


def rotate(x: Array, turns: tuple[Array, Array], layout: Layout) -> Array:
    """Rotate the leading 2 F features of ``x`` (B, H, n, D); those beyond are left alone."""
    return layout.backend.rotated(x, *turns)
