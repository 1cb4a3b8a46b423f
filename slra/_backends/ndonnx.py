"""ndonnx: arrays that become an ONNX graph. Those made of values have them; what `ndonnx.argument` makes has none.

Needs: ndonnx. A graph is written once for all values, as code is traced by JAX.
"""

from typing import Any

import numpy as np

from slra._backends.lacking import LackingError
from slra._backends.other import OtherBackend
from slra._backends.registered import register_backend
from slra._typing import Array

__all__ = ["NdonnxBackend"]


class NdonnxBackend(OtherBackend):
    """Values are looked at where there are any."""

    def is_eager(self, x: Array) -> bool:
        """Whether ``x`` has values."""
        try:
            x.unwrap_numpy()
        except ValueError:
            return False
        return True

    def can_iterate(self, x: Array) -> bool:
        """Refuse: nodes of hundreds of iterations took all memory (12 x 9 numbers, twenty minutes)."""
        if self.is_eager(x):
            hint = ": each operation is a node of a graph; pass x.unwrap_numpy()"
            raise LackingError("iterations", self.xp, hint)
        return False

    def freezes_draws(self, x: Array) -> bool:
        """Say yes where a graph is written: what is drawn becomes a constant of it."""
        return not self.is_eager(x)

    def refusal(self, x: Array) -> str | None:
        """Refuse shapes that are not known before the graph runs."""
        if any(not isinstance(n, int) for n in x.shape):
            return (
                f"must have a shape that is known, got {x.shape}; "
                "make a graph for each length, and give the lengths within as lengths_k"
            )
        return None

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """Values, which were there before."""
        try:
            found: np.ndarray[Any, Any] = np.asarray(x.unwrap_numpy())
        except ValueError:
            raise LackingError("values, not a graph", self.xp) from None
        return found

    def copied(self, x: Array) -> Array:
        """Return a copy, which later assignments to ``x`` do not reach."""
        return x.copy()


register_backend("ndonnx", NdonnxBackend)
