"""CuPy: what it does as NumPy does, it inherits.

Needs: cupy (``pip install "slra[cupy]"``) and, to allocate anything, a CUDA device.
"""

from typing import Any

import numpy as np

from slra._backends.agnostic import Primitives
from slra._typing import Array

__all__ = ["CupyPrimitives"]


class CupyPrimitives(Primitives):
    """Overrides for CuPy."""

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """Fetch the values from the device."""
        values: np.ndarray[Any, Any] = x.get()
        return values
