"""Rotary position embedding, applied to what is read from the cache.

Source: J. Su et al., RoFormer, arXiv:2104.09864, in the layout that pairs feature i with feature i + F.
"""

import numpy as np

from slra._backends import Backend
from slra._typing import Array

__all__ = ["rotate"]


def rotate(x: Array, positions: Array, frequencies: tuple[float, ...], backend: Backend) -> Array:
    """Rotate the leading 2 F features of ``x`` (B, H, n, D) by positions (B or 1, n) times F frequencies."""
    xp, n = backend.xp, len(frequencies)
    if isinstance(positions, np.ndarray):
        angles = positions[:, None, :, None] * np.asarray(frequencies)
        cos, sin = (backend.from_numpy(f(angles), x) for f in (np.cos, np.sin))
    else:
        step = backend.from_numpy(np.asarray(frequencies), x)
        angles = xp.astype(positions, x.dtype)[:, None, :, None] * step
        cos, sin = xp.cos(angles), xp.sin(angles)
    first, second, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return xp.concat([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
