"""Any library that has no backend of its own: the reference, and nothing taken for granted.

What its namespace lacks is completed (`slra._backends.completed`); whether a device has double precision or 64-bit
integers is asked, as not all have.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from slra._backends.completed import brought, device_of, fetched
from slra._backends.standard import Backend
from slra._typing import Array, DType

__all__ = ["OtherBackend"]


class OtherBackend(Backend):
    """The reference for one completed namespace."""

    # What is called in place of a library's own functions, where these differ from the standard.
    functions: ClassVar[Mapping[str, Callable[..., Any]]] = MappingProxyType({})

    def device(self, x: Array) -> Any:
        """Device of ``x``, if there is such a thing."""
        return device_of(x)

    def creation_device(self, like: Array) -> Any:
        """Device of ``like``, if there is such a thing."""
        return device_of(like)

    def from_numpy(self, a: np.ndarray[Any, Any], like: Array, dtype: DType | None = None) -> Array:
        """By whatever way the library has."""
        return brought(a, dtype or like.dtype, self.creation_device(like), self.xp)

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """By whatever way the library has."""
        return fetched(x, self.xp)

    def real_dtype(self, dtype: DType) -> DType:
        """Look complex dtypes up only in a library that has them."""
        for name, real in (("complex64", "float32"), ("complex128", "float64")):
            # Not with None: not every library's dtypes can be compared with anything.
            if hasattr(self.xp, name) and dtype == getattr(self.xp, name):
                return getattr(self.xp, real)
        return dtype

    def accumulation_dtype(self, like: Array) -> DType:
        """Double precision where the library, and the device, have it."""
        return self._widest("complex128" if self.is_complex(like) else "float64", like) or (
            like.dtype if self._is_single(like) else self.xp.float32
        )

    @property
    def place_dtype(self) -> DType:
        """64 bits where every device of the library has them; not kept, as what array-api-strict says may change."""
        wide = getattr(self.xp, "int64", None)
        try:
            info = self.xp.__array_namespace_info__()
            is_there = all("int64" in info.dtypes(device=device) for device in info.devices())
        except Exception:  # before 2023.12 nobody says
            is_there = True
        return wide if wide is not None and is_there else self.xp.int32

    def take_places(self, x: Array, places: np.ndarray[Any, Any]) -> Array:
        """Bring the places to the library first."""
        return self.xp.take(x, self.from_numpy(places, x, self.place_dtype), axis=-1)

    def _is_single(self, x: Array) -> bool:
        return bool(self.xp.finfo(x.dtype).bits >= 32)

    def _widest(self, name: str, like: Array) -> DType | None:
        dtype = getattr(self.xp, name, None)
        if dtype is None or dtype == like.dtype:
            return dtype
        try:
            there = self.xp.__array_namespace_info__().dtypes(device=self.creation_device(like))
        except (
            Exception
        ):  # before 2023.12 nobody says; what a library says of no device may be an error
            return dtype
        return dtype if name in there else None
