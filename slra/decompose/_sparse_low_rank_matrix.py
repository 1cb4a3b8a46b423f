"""The compressed matrix: two factors and a few entries, in every row or anywhere."""

from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._backends.standard.sparse import index_dtype
from slra._files import Arrays, File, npz, read_safetensors, write_file, write_safetensors
from slra._npz import read_npz
from slra._typing import Array
from slra._validate import dtype_limits, is_kind, promote, resolve

__all__ = ["LowRankPlusSparse", "scattered", "size_in_bytes"]

FORMAT = "slra.LowRankPlusSparse 1"


class _Parts(NamedTuple):
    left: Array
    right: Array
    values: Array
    indices: Array


class LowRankPlusSparse(_Parts):
    """A matrix held as ``left @ right`` plus a few sparse entries: as many in every row, or anywhere.

    A named tuple of four arrays, so that JAX and others can take it apart; what `compress` returns.

    Attributes
    ----------
    left : array, shape (..., m, r)
        Left factor; ``r`` may be 0.
    right : array, shape (..., r, n)
        Right factor.
    values : array, shape (..., m, k) or (..., k)
        Sparse entries, k in each row, or k in the whole matrix; ``k`` may be 0.
    indices : array of signed integers, shape of values
        Their columns, ascending in each row, in the narrowest dtype that holds ``n - 1``. In the second form their
        places ``row * n + column``, ascending, in the narrowest dtype that holds ``m n - 1``.

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

    @property
    def nbytes_exact(self) -> int:
        """Bytes of the dense matrix in the same dtype."""
        size = _itemsize(resolve(left=self.left), self.left)
        for n in self.shape:
            size *= n
        return size

    @property
    def T(self) -> "LowRankPlusSparse":
        """The transpose, whose sparse entries are counted over the whole matrix."""
        backend = resolve(left=self.left)
        xp, (*batch, m, n) = backend.xp, self.shape
        if not hasattr(xp, "take_along_axis"):
            raise TypeError(
                "T must sort the sparse entries, which lazy arrays cannot do; take it before"
            )
        places = xp.astype(self.indices, xp.int64 if m * n > 2**31 else xp.int32)
        if self.per == "row":
            rows = xp.arange(m, dtype=places.dtype, device=backend.creation_device(places))
            places = xp.reshape(places + n * rows[:, None], (*batch, -1))
        places = places % n * m + places // n
        order = xp.argsort(places, axis=-1)
        values = xp.reshape(self.values, places.shape)
        return LowRankPlusSparse(
            xp.matrix_transpose(self.right),
            xp.matrix_transpose(self.left),
            xp.take_along_axis(values, order, axis=-1),
            xp.astype(xp.take_along_axis(places, order, axis=-1), index_dtype(xp, m * n)),
        )

    @property
    def per(self) -> str:
        """What the sparse entries are counted by: "row" or "matrix"."""
        return "row" if self.values.ndim == self.left.ndim else "matrix"

    @isolated
    def to_dense(self) -> Array:
        """Return the matrix as an array, shape (..., m, n)."""
        backend = resolve(left=self.left)
        with backend.ignore_overflow():
            return self.left @ self.right + self._sparse(backend)

    def __repr__(self) -> str:
        n_entries, rank = self.values.shape[-1], self.left.shape[-1]
        return (
            f"LowRankPlusSparse(shape={self.shape}, rank={rank}, "
            f"sparse={n_entries} a {self.per}, dtype={self.dtype}, nbytes={self.nbytes} of {self.nbytes_exact})"
        )

    def _sparse(self, backend: Backend) -> Array:
        return scattered(self.values, self.indices, self.shape, backend)

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
            if self.per == "row":
                sparse = backend.sparse_matmul(self.values, self.indices, other)
            else:
                sparse = self._sparse(backend) @ other
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
        with backend.ignore_overflow():
            return (other @ self.left) @ self.right + other @ self._sparse(backend)

    def save(self, path: File) -> None:
        """Write to a ``.npz`` or ``.safetensors`` file (the latter needs the package safetensors).

        Parameters
        ----------
        path : str, path or file opened for bytes
            Where to; its suffix says which format, and an opened file gets ``.npz``. bfloat16, which NumPy does not
            have, is written as float32, which holds all its values. Both formats carry a checksum.

        Raises
        ------
        OSError
            If it cannot be written; a file that was there is then as it was.
        ValueError
            If the suffix is another.
        """
        suffix, backend = _suffix(path), resolve(left=self.left)
        arrays = {name: _stored(backend, x) for name, x in zip(self._fields, self, strict=True)}
        if suffix == ".npz":
            write_file(path, npz(arrays))
        else:
            write_safetensors(path, arrays, {"format": FORMAT})

    @classmethod
    def load(cls, path: File, *, like: Array | None = None) -> "LowRankPlusSparse":
        """Read what `save` wrote; nothing in the file is executed.

        Parameters
        ----------
        path : str, path or file opened for bytes
            A ``.npz`` or ``.safetensors`` file.
        like : array, optional
            The arrays come back in its library and on its device; as NumPy arrays by default.

        Raises
        ------
        OSError
            If there is no such file, or it is a folder or a pipe.
        ValueError
            If the suffix is another, or the file does not hold such a matrix: damaged, incomplete, pickled, or
            with shapes, dtypes or columns that do not fit.
        """
        suffix = _suffix(path)
        try:
            if suffix == ".npz":
                arrays = read_npz(path, check=_check_shapes)
            else:
                arrays, _ = read_safetensors(path, FORMAT)
                _check_shapes(arrays)
            _check_indices(arrays)
        except ValueError as error:
            raise ValueError(f"{path!s} does not hold a LowRankPlusSparse: {error}") from error
        if like is not None:
            backend = resolve(like=like)
            for name, a in arrays.items():
                arrays[name] = backend.from_numpy(a, like, getattr(backend.xp, a.dtype.name))
        return cls(**arrays)


def scattered(values: Array, indices: Array, shape: tuple[int, ...], backend: Backend) -> Array:
    """Dense matrix (..., m, n) of sparse entries, in every row or anywhere."""
    m, n = shape[-2:]
    if values.ndim == len(shape):
        return backend.scatter_rows(values, indices, n)
    flat = backend.scatter_rows(values[..., None, :], indices[..., None, :], m * n)
    return backend.xp.reshape(flat, shape)


def _stored(backend: Backend, x: Array) -> np.ndarray[Any, Any]:
    if str(x.dtype).endswith("bfloat16"):
        x = backend.xp.astype(x, backend.xp.float32)
    return backend.to_numpy(x)


def _check_factor(backend: Backend, other: Array) -> None:
    promote(backend, other=other)
    if other.ndim == 0:
        raise ValueError("other must have 1 dimension or more, got shape ()")


def size_in_bytes(backend: Backend, x: Array) -> int:
    """Bytes of the entries of a floating or integer array."""
    size = _itemsize(backend, x)
    for n in x.shape:
        size *= n
    return size


def _itemsize(backend: Backend, x: Array) -> int:
    """Bytes of an entry."""
    xp = backend.xp
    if is_kind(xp, x.dtype, "integral"):
        return int(xp.iinfo(x.dtype).bits) // 8
    return int(dtype_limits(xp, x.dtype).bits) // 8 * (2 if backend.is_complex(x) else 1)


def _suffix(path: File) -> str:
    if not isinstance(path, (str, PathLike)):
        return ".npz"
    suffix = Path(path).suffix
    if suffix not in (".npz", ".safetensors"):
        raise ValueError(f"path must end in .npz or .safetensors, got {str(path)!r}")
    return suffix


def _check_shapes(arrays: Arrays) -> None:
    """Raise ValueError unless names, shapes and dtypes are those of a matrix."""
    if set(arrays) != set(LowRankPlusSparse._fields):
        raise ValueError(f"it holds {sorted(arrays)}")
    left, right, values, indices = (arrays[name] for name in LowRankPlusSparse._fields)
    if len({left.dtype, right.dtype, values.dtype}) > 1 or left.dtype.kind not in "fc":
        raise ValueError("left, right and values must have one floating dtype")
    if indices.dtype.kind != "i":
        raise ValueError(f"indices must be signed integers, got {indices.dtype}")
    per_row = values.ndim == left.ndim
    fits = (
        min(left.ndim, right.ndim) >= 2
        and values.ndim >= 1
        and left.shape[: -1 if per_row else -2] == values.shape[:-1]
        and left.shape[:-2] == right.shape[:-2]
        and left.shape[-1] == right.shape[-2]
        and values.shape == indices.shape
    )
    if not fits:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in arrays.items())
        raise ValueError(f"its shapes do not fit together: {shapes}")


def _check_indices(arrays: Arrays) -> None:
    """Raise ValueError unless the places of the sparse entries are in the matrix, and ascend."""
    left, right, values, indices = (arrays[name] for name in LowRankPlusSparse._fields)
    per_row = values.ndim == left.ndim
    limit = right.shape[-1] if per_row else left.shape[-2] * right.shape[-1]
    if indices.size and (indices.min() < 0 or indices.max() >= limit):
        raise ValueError(f"indices must be between 0 and {limit - 1}")
    if np.any(indices[..., 1:] <= indices[..., :-1]):
        raise ValueError("indices must ascend in every row, or in the matrix")
