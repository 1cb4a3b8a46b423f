"""Keys of a model before and after its rotary embedding.

Needs: torch.
"""

from collections.abc import Sequence

import numpy as np
import torch

from slra._validate import resolve
from slra.attn.rotary import turns_by

__all__ = ["turned"]


def turned(
    x: torch.Tensor, frequencies: Sequence[float], start: int = 0, *, back: bool = False
) -> torch.Tensor:
    """Rotate features (..., n, D) of tokens from ``start`` on, or undo it; in the dtype that they have.

    A length that the rotation changes too (YaRN) stays as it is: what is undone is done again by the same angles.
    """
    backend = resolve(x=x)
    places = np.arange(start, start + x.shape[-2]) * (-1 if back else 1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    turns = turns_by(places, tuple(frequencies), wide, backend)
    turned: torch.Tensor = backend.rotated(wide, *turns).to(x.dtype)
    return turned
