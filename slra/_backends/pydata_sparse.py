"""Sparse arrays of pydata: elementwise functions keep them sparse; matrices are operators for the SVD.

Needs: sparse, with NumPy values. Nothing here makes an array dense: what would need that is refused.
"""

from typing import Any

import numpy as np

from slra._backends.lacking import LackingError
from slra._backends.other import OtherBackend
from slra._backends.registered import register_backend
from slra._backends.standard import ScoreOptions
from slra._backends.standard.hidden import Attend
from slra._typing import Array

__all__ = ["SparseBackend"]


class SparseBackend(OtherBackend):
    """Refuse what would be dense."""

    def refusal(self, x: Array) -> str | None:
        """Refuse arrays whose entries that are not stored are not zero."""
        if getattr(x, "fill_value", 0) != 0:
            return f"must have the fill value 0, got {x.fill_value}"
        return None

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """Numbers only: a sparse array is not made dense."""
        if x.ndim > 0:
            raise self._dense()
        return np.asarray(x.todense())

    def copied(self, x: Array) -> Array:
        """Return a copy that shares no memory with ``x``."""
        return x.copy()

    def heeded(
        self,
        attend: Attend,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        options: ScoreOptions,
    ) -> tuple[Array, Any]:
        """Refuse: a softmax is dense."""
        raise self._dense()

    def _dense(self) -> LackingError:
        return LackingError("a dense array", self.xp, "; if it fits, pass x.todense()")


register_backend("sparse", SparseBackend)
