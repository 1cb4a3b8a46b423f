"""Every primitive, written in the array API standard (2024.12, linalg extension) and nothing else.

This is the reference that each override is tested against, and what an unknown library runs on.
Arguments have been validated: matching namespaces, devices and a floating dtype of 32 or 64 bits.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import array_api_compat as compat
import numpy as np

from slra._backends.gaussian import gaussian
from slra._backends.standard import hidden
from slra._backends.standard.attention import Attention, ScoreOptions
from slra._backends.standard.bits import Bits
from slra._backends.standard.linalg import LinearAlgebra, matrix_h
from slra._backends.standard.rows import Rows
from slra._backends.standard.sparse import SparseRows
from slra._typing import Array, DType, Namespace

__all__ = ["Backend", "ScoreOptions", "matrix_h"]


class Backend(Attention, Bits, LinearAlgebra, SparseRows, Rows):
    """Primitives for one namespace, ``xp``."""

    # Whether an array cannot be written to: a function then returns a new one.
    is_functional = False
    # Whether the thresholds and sums of moduli take half precision as it is, and convert as they read.
    takes_half = False
    # Whether attention takes half precision as it is: it accumulates in single, and gives the log-sum-exp in it.
    attends_in_half = False

    # Columns by which a space grows until a tolerance is met.
    tolerance_width = 16
    # Entries of a large matrix that are looked at together: so many stay in a CPU's cache.
    n_at_once = 1 << 20

    def __init__(self, xp: Namespace) -> None:
        self.xp = xp

    # What kind of array is this?

    # Whether arrays of NumPy's own type are always right, wherever they are.
    takes_every_ndarray = False

    def is_eager(self, x: Array) -> bool:
        """Whether ``x`` is concrete: its values can be read now, unlike those of traced and lazy arrays."""
        return True

    def is_known(self, size: int) -> bool:
        """Whether a size is a number, and not a symbol that any may take the place of."""
        return isinstance(size, (int, np.integer))

    def can_iterate(self, x: Array) -> bool:
        """Whether an algorithm may go on until values say that it is done."""
        return self.is_eager(x)

    def freezes_draws(self, x: Array) -> bool:
        """Whether numbers drawn by NumPy beside ``x`` become constants of a compiled function."""
        return False

    def refusal(self, x: Array) -> str | None:
        """Say what an array of this library must be and is not, or None."""
        return None

    def common_dtype(self, *arrays: Array) -> DType:
        """Dtype that these arrays are promoted to."""
        return self.xp.result_type(*arrays)

    def device(self, x: Array) -> Any:
        """Device of ``x`` as a comparable value; None where it can be used beside any other."""
        return compat.device(x)

    def creation_device(self, like: Array) -> Any:
        """Device to create an array on that is to meet ``like``; None where the library finds out."""
        return compat.device(like)

    def make_dataclass(self, kind: type, arrays: dict[str, Array], static: dict[str, Any]) -> Any:
        """Make a dataclass of arrays and of plain values that a transformation must keep as they are."""
        return kind(**arrays, **static)

    def make_pytree(self, kind: type, take: Callable[[Any], Any], make: Callable[..., Any]) -> None:
        """Let transformations take objects of a class apart, and make them again."""

    def from_numpy(self, a: np.ndarray[Any, Any], like: Array, dtype: DType | None = None) -> Array:
        """Bring a small NumPy array to the library, device and (unless given) dtype of ``like``."""
        return self.xp.asarray(a, dtype=dtype or like.dtype, device=self.creation_device(like))

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """Bring an array to NumPy; lazy ones are computed."""
        try:
            return np.asarray(x)
        except RuntimeError:  # on another device, as array-api-strict has it
            info = self.xp.__array_namespace_info__()
            return np.asarray(compat.to_device(x, info.default_device()))

    def takes_rows_to_numpy(self, x: Array, levels: Array) -> bool:
        """Whether `rows_by_numpy` can be had: values that are known when it runs, and no derivative."""
        return all(self.is_eager(a) and not self.is_differentiated(a) for a in (x, levels))

    def rows_by_numpy(self, function: Callable[..., Any], x: Array, levels: Array) -> Array:
        """Apply a NumPy function of ``x`` (..., n) and ``levels`` (..., m) that treats each last axis by itself."""
        return self.from_numpy(function(self.to_numpy(x), self.to_numpy(levels)), x)

    # Whether arrays are lazy, and yet some rows can be had as NumPy's.
    reads_rows = False

    def read_rows(self, x: Array, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Compute some rows of a matrix."""
        raise NotImplementedError

    def map_rows(self, function: Callable[..., Any], x: Array, n: int, dtype: Any) -> Array:
        """Apply a NumPy function lazily to rows, some at a time, each of which gives one of ``n`` numbers."""
        raise NotImplementedError

    def ignore_overflow(self) -> contextlib.AbstractContextManager[Any]:
        """Let numbers leave the range of their dtype without NumPy's warnings, which other libraries do not have."""
        return np.errstate(all="ignore")

    def same_bits(self) -> contextlib.AbstractContextManager[Any]:
        """Let calls in other threads not change the order of sums, around products that go with attention.

        To be entered twice at once: Ctrl-C can then cut short only one of the exits.
        """
        return contextlib.nullcontext()

    def is_own_generator(self, rng: Any) -> bool:
        """Whether this is a generator of the library's own, by which `test_matrix` can draw on its device."""
        return False

    def test_matrix(self, shape: tuple[int, ...], rng: Any, like: Array) -> Array:
        """Draw a standard Gaussian matrix of the dtype of ``like``, the same on every backend.

        ``rng`` is a seed, a generator of NumPy's, or one of the library's own, whose numbers are others.
        """
        return self.from_numpy(gaussian(shape, rng, is_complex=self.is_complex(like)), like)

    def copied(self, x: Array) -> Array:
        """Return a copy that shares no memory with ``x``; ``x`` itself where arrays cannot be written to."""
        return self.xp.asarray(x, copy=True, device=self.creation_device(x))

    @property
    def place_dtype(self) -> DType:
        """Dtype of places in an array, wide enough for any."""
        return self.xp.int64

    def heeded(
        self,
        attend: hidden.Attend,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        options: ScoreOptions,
    ) -> tuple[Array, Any]:
        """Attend such that what is hidden does not matter, whatever it holds."""
        return hidden.heeded(self, attend, q, k, v, mask, options)

    def matmul(self, a: Array, b: Array) -> Array:
        """Multiply operands that may be views: ``a @ b``."""
        return a @ b

    # Control flow

    def scan(
        self, advance: Callable[[Any], tuple[Any, tuple[Array, ...]]], state: Any, length: int
    ) -> tuple[Any, tuple[Array, ...]]:
        """Advance ``state`` a fixed number of times; stack what each call gives beside it."""
        given = []
        for _ in range(length):
            state, shown = advance(state)
            given.append(shown)
        return state, tuple(self.xp.stack(each) for each in zip(*given, strict=True))
