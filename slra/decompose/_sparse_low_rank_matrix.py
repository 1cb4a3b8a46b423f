"""The compressed matrix: two factors and a few entries in every row."""

from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._npz import read_npz
from slra._typing import Array
from slra._validate import promote, resolve

__all__ = ["LowRankPlusSparse"]


class _Parts(NamedTuple):
    left: Array
    right: Array
    values: Array
    indices: Array


class LowRankPlusSparse(_Parts):
    """A matrix held as ``left @ right`` plus the same number of sparse entries in every row.

    A named tuple of four arrays, so that JAX and others can take it apart; what `compress` returns.

    Attributes
    ----------
    left : array, shape (..., m, r)
        Left factor; ``r`` may be 0.
    right : array, shape (..., r, n)
        Right factor.
    values : array, shape (..., m, k)
        Sparse entries; ``k`` may be 0.
    indices : array of signed integers, shape (..., m, k)
        Their columns, ascending in each row, in the narrowest dtype that holds ``n - 1``.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> x = np.outer(np.ones(4), np.arange(5.0))
    >>> x[2, 0] = 7.0
    >>> small = slra.compress(x, 1, 0.2)
    >>> small.shape, bool(np.allclose(small @ np.ones(5), x @ np.ones(5)))
    ((4, 5), True)
    """

    __slots__ = ()
    # NumPy would otherwise take this tuple for an array.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, (..., m, n)."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def dtype(self) -> Any:
        """Dtype of the entries."""
        return self.left.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the four arrays."""
        backend = resolve(left=self.left)
        return sum(size_in_bytes(backend, x) for x in self)

    @isolated
    def to_dense(self) -> Array:
        """Return the matrix as an array, shape (..., m, n)."""
        backend = resolve(left=self.left)
        sparse = backend.scatter_rows(self.values, self.indices, self.shape[-1])
        with backend.ignore_overflow():
            return self.left @ self.right + sparse

    @isolated
    def __matmul__(self, other: Array) -> Array:
        """Multiply by a vector (n,) or matrices (..., n, p)."""
        backend = resolve(left=self.left, other=other)
        _check_factor(backend, other)
        if other.shape[-1 if other.ndim == 1 else -2] != self.shape[-1]:
            raise ValueError(
                f"other must have {self.shape[-1]} rows for a matrix of shape {self.shape}, "
                f"got shape {tuple(other.shape)}"
            )
        if other.ndim == 1:
            return (self @ other[:, None])[..., 0]
        with backend.ignore_overflow():
            sparse = backend.sparse_matmul(self.values, self.indices, other)
            return self.left @ (self.right @ other) + sparse

    @isolated
    def __rmatmul__(self, other: Array) -> Array:
        """Multiply a vector (m,) or matrices (..., p, m) by this."""
        backend = resolve(left=self.left, other=other)
        _check_factor(backend, other)
        if other.shape[-1] != self.shape[-2]:
            raise ValueError(
                f"other must have {self.shape[-2]} columns for a matrix of shape {self.shape}, "
                f"got shape {tuple(other.shape)}"
            )
        if other.ndim == 1:
            return self.__rmatmul__(other[None, :])[..., 0, :]
        sparse = backend.scatter_rows(self.values, self.indices, self.shape[-1])
        with backend.ignore_overflow():
            return (other @ self.left) @ self.right + other @ sparse

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a ``.npz`` or ``.safetensors`` file (the latter needs the package safetensors).

        Parameters
        ----------
        path : str or path
            Where to; its suffix says which format.

        Raises
        ------
        ValueError
            If the suffix is another.
        """
        backend = resolve(left=self.left)
        arrays = {name: backend.to_numpy(x) for name, x in zip(self._fields, self, strict=True)}
        if _suffix(path) == ".npz":
            with Path(path).open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            return
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path)

    @classmethod
    def load(cls, path: str | PathLike[str], *, like: Array | None = None) -> "LowRankPlusSparse":
        """Read what `save` wrote; nothing in the file is executed.

        Parameters
        ----------
        path : str or path
            A ``.npz`` or ``.safetensors`` file.
        like : array, optional
            The arrays come back in its library and on its device; as NumPy arrays by default.

        Raises
        ------
        ValueError
            If the suffix is another, or the file does not hold such a matrix: damaged, incomplete, pickled, or
            with shapes, dtypes or columns that do not fit.
        """
        read = _read_npz if _suffix(path) == ".npz" else _read_safetensors
        arrays = read(Path(path))
        _check_parts(arrays, path)
        if like is not None:
            backend = resolve(like=like)
            for name, a in arrays.items():
                arrays[name] = backend.from_numpy(a, like, getattr(backend.xp, a.dtype.name))
        return cls(**arrays)


def _check_factor(backend: Backend, other: Array) -> None:
    promote(backend, other=other)
    if other.ndim == 0:
        raise ValueError("other must have 1 dimension or more, got shape ()")


def size_in_bytes(backend: Backend, x: Array) -> int:
    """Bytes of the entries of a floating or integer array."""
    xp, count = backend.xp, 1
    for n in x.shape:
        count *= n
    if xp.isdtype(x.dtype, "integral"):
        return count * int(xp.iinfo(x.dtype).bits) // 8
    return count * int(xp.finfo(x.dtype).bits) // 8 * (2 if backend.is_complex(x) else 1)


def _suffix(path: str | PathLike[str]) -> str:
    suffix = Path(path).suffix
    if suffix not in (".npz", ".safetensors"):
        raise ValueError(f"path must end in .npz or .safetensors, got {str(path)!r}")
    return suffix


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        loaded = read_npz(path)
        return {name: loaded[name] for name in LowRankPlusSparse._fields}
    except (ValueError, KeyError) as error:
        raise _not_one(path, error) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    content = path.read_bytes()
    try:
        loaded = load(content)
        return {name: loaded[name] for name in LowRankPlusSparse._fields}
    except (SafetensorError, KeyError, ValueError) as error:
        raise _not_one(path, error) from error


def _not_one(path: str | PathLike[str], why: object) -> ValueError:
    return ValueError(f"{str(path)!r} does not hold a LowRankPlusSparse: {why}")


def _check_parts(arrays: dict[str, np.ndarray[Any, Any]], path: str | PathLike[str]) -> None:
    """Raise ValueError unless four arrays make a matrix."""
    left, right, values, indices = (arrays[name] for name in LowRankPlusSparse._fields)
    if len({left.dtype, right.dtype, values.dtype}) > 1 or left.dtype.kind not in "fc":
        raise _not_one(path, "left, right and values must have one floating dtype")
    if indices.dtype.kind != "i":
        raise _not_one(path, f"indices must be signed integers, got {indices.dtype}")
    fits = (
        min(left.ndim, right.ndim, values.ndim) >= 2
        and left.shape[:-1] == values.shape[:-1]
        and left.shape[:-2] == right.shape[:-2]
        and left.shape[-1] == right.shape[-2]
        and values.shape == indices.shape
    )
    if not fits:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in arrays.items())
        raise _not_one(path, f"its shapes do not fit together: {shapes}")
    if indices.size and (indices.min() < 0 or indices.max() >= right.shape[-1]):
        raise _not_one(path, f"indices must be between 0 and {right.shape[-1] - 1}")
    if np.any(indices[..., 1:] <= indices[..., :-1]):
        raise _not_one(path, "indices must ascend in every row")
