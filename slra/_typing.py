"""Names for the types that cross module borders.

A public signature says ``ArrayT`` where what comes out is of the library that came in, so that a type checker and an
editor show "NumPy in, NumPy out", and ``AnyArray`` where an array of that library goes in beside it. Below the public
functions an array of an unknown library has no static type: ``Array`` is ``Any``, a name for the reader.
"""

from typing import Any, Literal, Protocol, TypeAlias, TypedDict, TypeVar

import numpy as np


class AnyArray(Protocol):
    """What an array of any library shows to a type checker."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        ...

    @property
    def dtype(self) -> Any:
        """Type of the entries."""
        ...


ArrayT = TypeVar("ArrayT", bound=AnyArray)
Array: TypeAlias = Any
Namespace: TypeAlias = Any
DType: TypeAlias = Any
# Of a library's own: cupy.random.Generator, torch.Generator.
DeviceGenerator: TypeAlias = Any
RNG: TypeAlias = int | np.random.Generator | None
CausalAlign: TypeAlias = Literal["bottom_right", "top_left"] | int


class AttentionOptions(TypedDict, total=False):
    """What all attention functions take, for the signatures that differ in their result only."""

    mask: AnyArray | None
    is_causal: bool
    causal_align: CausalAlign | None
    window: tuple[int | None, int | None] | None
    lengths_q: Any
    lengths_k: Any
    sinks: AnyArray | None
    alibi: AnyArray | None
    scale: float | AnyArray | None
    enable_gqa: bool
    softcap: float | AnyArray | None


__all__ = [
    "RNG",
    "AnyArray",
    "Array",
    "ArrayT",
    "AttentionOptions",
    "CausalAlign",
    "DType",
    "DeviceGenerator",
    "Namespace",
]
