"""Names for the types that cross module borders.

An array of an unknown library has no static type, so ``Array`` is ``Any``: the name is for the reader.
"""

from typing import Any, Literal, TypeAlias

import numpy as np

Array: TypeAlias = Any
Namespace: TypeAlias = Any
DType: TypeAlias = Any
RNG: TypeAlias = int | np.random.Generator | None
CausalAlign: TypeAlias = Literal["bottom_right", "top_left"]

__all__ = ["RNG", "Array", "CausalAlign", "DType", "Namespace"]
