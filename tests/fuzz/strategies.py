"""What the arguments are drawn from: values that are fair but nasty, and values that are simply wrong."""

import functools
import importlib.util
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as st

__all__ = ["HUGE_REQUESTS", "arrays", "floats", "foreign", "odd_arrays", "plain_values"]

FLOATS = ("float16", "float32", "float64")
COMPLEX = ("complex64", "complex128")
# Integers that are a legitimate request for more time or memory than a test has.
HUGE_REQUESTS = (2**31, 10**30)

KINDS = (
    *("normal", "normal", "constant", "zero", "negative zero", "rank one", "integers", "sparse"),
    *("huge", "largest", "tiny", "denormal", "wide range"),
)
LAYOUTS = ("C", "C", "F", "reversed", "strided", "read-only", "zero stride")


def _entries(kind: str, shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Real entries of a kind, in the range of the dtype."""
    rng = np.random.default_rng(seed)
    info = np.finfo(dtype)
    a = rng.standard_normal(shape)
    unit = a / max(1.0, float(np.max(np.abs(a), initial=0)))
    with np.errstate(all="ignore"):
        return {
            "normal": lambda: a,
            "constant": lambda: np.full(shape, 0.3),
            "zero": lambda: np.zeros(shape),
            "negative zero": lambda: np.full(shape, -0.0),
            "rank one": lambda: np.broadcast_to(a[..., :1], shape) if shape else a,
            "integers": lambda: np.round(2 * a),
            "sparse": lambda: np.where(rng.random(shape) < 0.8, 0.0, a),
            "huge": lambda: unit * float(info.max) / 64,
            "largest": lambda: np.where(a > 0, float(info.max), -float(info.max)),
            "tiny": lambda: unit * 100 * float(info.tiny),
            "denormal": lambda: np.round(3 * a) * float(info.smallest_subnormal),
            "wide range": lambda: np.clip(
                unit * 10.0 ** rng.uniform(-30, 30, shape), -float(info.max), float(info.max)
            ),
        }[kind]()


def _laid_out(a: np.ndarray, layout: str) -> np.ndarray:
    """Same values in another layout (but for zero strides, which repeat the first slice of the first axis)."""
    if layout == "F" and a.ndim:
        return np.asfortranarray(a)
    if layout == "reversed" and a.ndim:
        turned = (slice(None, None, -1),) * a.ndim
        return a[turned].copy()[turned]
    if layout == "strided" and a.ndim:
        wide = np.repeat(a, 2, axis=-1)
        return wide[..., ::2]
    if layout == "zero stride" and a.ndim and a.size:
        return np.broadcast_to(a[:1], a.shape)
    if layout == "read-only":
        a = a.copy()
        a.flags.writeable = False
    return a


@st.composite
def arrays(
    draw: Any,
    shape: tuple[int, ...],
    *,
    dtypes: tuple[str, ...] = (*FLOATS, *COMPLEX),
    kinds: tuple[str, ...] = KINDS,
) -> np.ndarray:
    """Fair arrays: of floating numbers, all finite, in any layout."""
    dtype, kind = draw(st.sampled_from(dtypes)), draw(st.sampled_from(kinds))
    seed = draw(st.integers(0, 2**16))
    real = {"complex64": "float32", "complex128": "float64"}.get(dtype, dtype)
    with np.errstate(all="ignore"):
        a = np.asarray(_entries(kind, shape, real, seed)).astype(real)
        if real != dtype:
            # The modulus of a complex number stays in range.
            a = (a / 2 + 0.5j * _entries(kind, shape, real, seed + 1).astype(real)).astype(dtype)
    return _laid_out(np.asarray(a), draw(st.sampled_from(LAYOUTS)))


def floats(low: float = 0.0, high: float = 1e300) -> Any:
    """Fair numbers of any size, and of any type that is a real number."""
    values = [0.0, -0.0, 5e-324, 1e-310, 1e-30, 0.1, 1.0, 3, 1e10, 1e30, 1e300]
    values += [np.float32(0.25), np.float64(2.0), np.int64(1), Fraction(1, 3)]
    return st.sampled_from([x for x in values if low <= float(x) <= high])


@functools.cache
def plain_values() -> list[Any]:
    """Values of the wrong type, or out of range, for most arguments."""
    return [
        *(None, True, False, np.True_, 0, 1, -1, 2, 7, *HUGE_REQUESTS, -(10**30), 10**400),
        *(np.int8(1), np.uint64(2), np.int64(-3), 0.0, -0.0, 0.5, 1.0, 2.0, -1.5, 1e300, 1e-300),
        *(5e-324, 1e-30, float("nan"), float("inf"), -float("inf"), 1j, complex("nan")),
        *(np.float16(1), np.float32("nan"), np.float64(0.5), np.longdouble(1), np.complex64(1)),
        *(Fraction(1, 3), Fraction(10**400), Decimal("0.5")),
        *("", "auto", "svd", "nonsense", "1", b"", b"\x01\x02", b"\x01\x02\x03"),
        *([], [1], [1.0], [2, 2], [[1.0, 2.0], [3.0]], [None], (), (1,), (1, 2), (1, 2, 3)),
        *((0, 0), (-1,), (0.5, 0.5, 0.5), ("a", "b"), (None, None), (-1, 5), (10**30, 1)),
        *({}, {"rank": 1}, {1}, frozenset(), range(3), slice(1), iter(()), Ellipsis, object()),
        *(len, float, Exception("no"), SimpleNamespace(shape=(3, 3), dtype="float64", ndim=2)),
        *(np.dtype("float32"), np.random.RandomState(0), np.random.SeedSequence(0)),
    ]


class Subclass(np.ndarray):
    """An array of a class of the caller's."""


@functools.cache
def odd_arrays() -> list[np.ndarray]:
    """Arrays of wrong shapes, dtypes and values."""
    ones = np.ones((3, 3))
    shapes = [
        (),
        (1,),
        (5,),
        (0,),
        (0, 3),
        (3, 0),
        (1, 1),
        (1, 7),
        (7, 1),
        (2, 3),
        (3, 2),
        (1, 1, 1),
    ]
    shapes += [(2, 3, 3), (2, 0, 3), (1, 2, 3, 4), (5, 1, 3, 3), (1,) * 9]
    dtypes = ["bool", "int8", "uint8", "int64", "float16", "float32", "longdouble", "complex64"]
    dtypes += ["clongdouble", "object", "U3", "S2", "M8[s]", "m8[s]", "V4", ">f8", ">f4", ">c16"]
    dtypes += [[("a", "f8")]]
    return [
        *(np.ones(shape) for shape in shapes),
        *(np.zeros((3, 3), dtype) for dtype in dtypes),
        *(np.full((3, 3), x) for x in (np.nan, np.inf, -np.inf, -1.0, 1e300, 5e-324, -0.0)),
        *(np.asarray(x) for x in (-1.0, np.nan, 0.5, 2, True, "a", None)),
        *(np.full(3, x) for x in (np.nan, -1.0, 0.5, 7)),
        *(ones.view(Subclass), ones[::-1, ::-2], np.broadcast_to(1.0, (3, 3)), ones.T[:, :2]),
    ]


@functools.cache
def foreign() -> list[Any]:
    """Arrays that are not, or not of the library of the others."""
    import scipy.sparse
    import scipy.sparse.linalg

    found = [
        np.ma.masked_array(np.ones((3, 3)), mask=np.eye(3)),
        scipy.sparse.csr_array(np.eye(3)),
        scipy.sparse.coo_array(np.ones(3)),
        scipy.sparse.csr_array(np.eye(3, dtype=int)),
        scipy.sparse.csr_array((0, 3)),
        scipy.sparse.csr_array(np.full((3, 3), np.nan)),
        scipy.sparse.linalg.aslinearoperator(np.eye(3)),
        scipy.sparse.linalg.aslinearoperator(np.full((3, 3), np.nan)),
        scipy.sparse.linalg.aslinearoperator(np.eye(3, dtype=int)),
        memoryview(np.ones(3)),
        np.ones((3, 3)).flat,
    ]
    if importlib.util.find_spec("torch"):
        import torch

        found += [torch.ones(3, 3), torch.tensor(0.5), torch.eye(3).to_sparse(), torch.tensor(1)]
    if importlib.util.find_spec("array_api_strict"):
        import array_api_strict

        found += [array_api_strict.ones((3, 3)), array_api_strict.asarray(1)]
    if importlib.util.find_spec("dask"):
        import dask.array

        found += [dask.array.ones((3, 3)), dask.array.ones(3)[dask.array.ones(3) > 0]]
    return found
