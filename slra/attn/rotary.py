"""Rotary position embedding: what stands between keys as they are stored and keys as queries see them.

Source: J. Su et al., RoFormer, arXiv:2104.09864, in the layout that pairs feature i with feature i + F.
"""

from typing import Any

import array_api_compat as compat
import numpy as np

from slra._backends import Backend
from slra._typing import Array
from slra._validate import resolve

__all__ = ["check_rotary", "turns_by"]


def check_rotary(rotary: Any, width: int) -> tuple[float, ...]:
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


def turns_by(
    places: Array, frequencies: tuple[float, ...], like: Array, backend: Backend
) -> tuple[Array, Array]:
    """Cosine and sine (..., n, F) of places (..., n), NumPy, times F frequencies, in the dtype of ``like``."""
    # In double precision: in single an angle of 1e5 is off by up to 0.004.
    angles = places[..., None] * np.asarray(frequencies)
    return backend.from_numpy(np.cos(angles), like), backend.from_numpy(np.sin(angles), like)
