"""CuPy: what it does as NumPy does, it inherits.

Needs: cupy (``pip install "slra[cupy]"``) and, to allocate anything, a CUDA device.
"""

from slra._backends.agnostic import Primitives

__all__ = ["CupyPrimitives"]


class CupyPrimitives(Primitives):
    """Overrides for CuPy."""
