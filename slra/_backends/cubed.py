"""Cubed: arrays in blocks that are computed later, each task in bounded memory. Nothing is computed here.

Needs: cubed, with NumPy blocks. What takes whole matrices or vectors, such as LAPACK, attention and sorting, is a task
for each block along the leading axes. A task that would not fit the memory that the input's `Spec` allows is refused
by Cubed when the plan is made. New arrays get the `Spec` of the input: here it goes where others have the device.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import array_api_compat.numpy
import cubed
import numpy as np

from slra._backends.numpy import NumpyBackend
from slra._backends.other import OtherBackend
from slra._backends.registered import register_backend
from slra._backends.standard import ScoreOptions
from slra._backends.standard.attention import sum_to
from slra._backends.standard.hidden import Attend
from slra._typing import Array, DType

__all__ = ["CubedBackend"]


def _with_spec(function: Callable[..., Array]) -> Callable[..., Array]:
    def call(*args: Any, device: Any = None, **kwargs: Any) -> Array:
        return function(*args, spec=device, **kwargs)

    return call


def _asarray(
    x: Any, *, dtype: DType | None = None, device: Any = None, copy: bool | None = None
) -> Array:
    """Bring NumPy's arrays and numbers; Cubed's own function does not convert them."""
    if isinstance(x, cubed.Array):
        return x if dtype is None else cubed.astype(x, dtype, copy=False)
    return cubed.from_array(np.asarray(x, dtype=dtype), spec=device)


def _by_vector(
    function: Callable[..., Any], *xs: Array, axis: int, dtype: DType, size: int | None = None
) -> Array:
    """Apply a NumPy function of whole vectors, which lie along the last axis of its arguments."""
    xs = tuple(cubed.moveaxis(x, axis, -1) for x in xs)
    found = _blocks(function, 1, *xs, core=(size or xs[-1].shape[-1],), dtype=dtype)
    return cubed.moveaxis(found, -1, axis)


def _blocks(
    function: Callable[..., Any], n_core: int, *xs: Array, core: tuple[int, ...], dtype: DType
) -> Array:
    """Apply a NumPy function to whole vectors (``n_core`` 1) or matrices (2), block by block along the other axes.

    ``core``: lengths of the axes of the result that are not along blocks.
    """
    n_lead = max(x.ndim for x in xs) - n_core
    # An array with fewer axes, or length one along an axis, meets each block of the others.
    sizes = [1] * n_lead
    for x in xs:
        for axis, size in enumerate(x.chunksize[: x.ndim - n_core], n_lead - x.ndim + n_core):
            if x.shape[axis - n_lead + x.ndim - n_core] > 1:
                sizes[axis] = size if sizes[axis] == 1 else min(sizes[axis], size)
    args: list[Any] = []
    for number, x in enumerate(xs):
        own = x.ndim - n_core
        lead = sizes[n_lead - own :] if own else []
        chunks = [min(a, b) for a, b in zip(lead, x.shape[:own], strict=True)]
        x = cubed.rechunk(x, (*chunks, *x.shape[own:]))
        labels = [f"b{axis}" for axis in range(n_lead - own, n_lead)]
        args += [x, (*labels, *(f"{number}c{axis}" for axis in range(n_core)))]
    new = {f"r{axis}": length for axis, length in enumerate(core)}
    out = (*(f"b{axis}" for axis in range(n_lead)), *new)
    return cubed.core.ops.blockwise(
        _called, out, *args, dtype=dtype, new_axes=new, function=function
    )


def _called(*blocks: Any, function: Callable[..., Any]) -> Any:
    # Axes that are summed over come as lists of blocks, of one block here.
    return function(*(_only(x) for x in blocks))


def _only(x: Any) -> Any:
    while isinstance(x, list):
        (x,) = x
    return x


def _sort(x: Array, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Array:
    def sort(x: Any) -> Any:
        found = np.sort(x, axis=-1)
        return found[..., ::-1] if descending else found

    return _by_vector(sort, x, axis=axis, dtype=x.dtype)


def _argsort(x: Array, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Array:
    def order(x: Any) -> Any:
        if not descending:
            return np.argsort(x, axis=-1, stable=True)
        return x.shape[-1] - 1 - np.argsort(x[..., ::-1], axis=-1, stable=True)[..., ::-1]

    return _by_vector(order, x, axis=axis, dtype=np.dtype(np.int64))


def _take_along_axis(x: Array, indices: Array, *, axis: int = -1) -> Array:
    def take(x: Any, indices: Any) -> Any:
        lead = np.broadcast_shapes(x.shape[:-1], indices.shape[:-1])
        x, indices = (np.broadcast_to(a, (*lead, a.shape[-1])) for a in (x, indices))
        return np.take_along_axis(x, indices, axis=-1)

    return _by_vector(take, x, indices, axis=axis, dtype=x.dtype)


def _take(x: Array, indices: Array, *, axis: int) -> Array:
    """Take lazily too: Cubed's own computes the indices, and counts axes from the front only."""

    def take(x: Any, indices: Any) -> Any:
        return np.take(x, indices, axis=-1)

    x = cubed.moveaxis(x, axis, -1)
    found = _blocks(take, 1, x, indices, core=tuple(indices.shape), dtype=x.dtype)
    return cubed.moveaxis(found, -1, axis)


def _qr(x: Array, *, mode: str = "reduced") -> tuple[Array, Array]:
    """Cubed's own for a tall matrix in blocks of rows; else LAPACK, each matrix whole."""
    m, n = x.shape[-2:]
    if x.ndim == 2 and min(x.chunks[0]) >= n and len(x.chunks[0]) > 1:
        q, r = cubed.array_api.linalg.qr(cubed.rechunk(x, (x.chunksize[0], n)))
        return q, r
    k = min(m, n)

    def factor(x: Any) -> Any:
        q, r = np.linalg.qr(x)
        return np.concatenate([q, np.swapaxes(r, -1, -2)], axis=-2)

    both = _blocks(factor, 2, x, core=(m + n, k), dtype=x.dtype)
    return both[..., :m, :], cubed.matrix_transpose(both[..., m:, :])


def _svd(x: Array, *, full_matrices: bool = False) -> tuple[Array, Array, Array]:
    """LAPACK in one task, each matrix whole."""
    m, n = x.shape[-2:]

    def factor(x: Any) -> Any:
        u, s, vh = np.linalg.svd(x, full_matrices=False)
        return np.concatenate([u, s[..., None, :], np.swapaxes(vh, -1, -2)], axis=-2)

    whole = _blocks(factor, 2, x, core=(m + 1 + n, min(m, n)), dtype=x.dtype)
    u, s, v = whole[..., :m, :], whole[..., m, :], whole[..., m + 1 :, :]
    return u, _real(s), cubed.matrix_transpose(v)


def _real(x: Array) -> Array:
    return cubed.real(x) if cubed.isdtype(x.dtype, "complex floating") else x


def _eigh(x: Array) -> tuple[Array, Array]:
    """LAPACK in one task, each matrix whole."""
    n = x.shape[-1]

    def factor(x: Any) -> Any:
        w, v = np.linalg.eigh(x)
        return np.concatenate([w[..., None, :], v], axis=-2)

    both = _blocks(factor, 2, x, core=(n + 1, n), dtype=x.dtype)
    return _real(both[..., 0, :]), both[..., 1:, :]


def _same_shape(function: Callable[[Any], Any]) -> Callable[[Array], Array]:
    def call(x: Array) -> Array:
        return _blocks(function, 2, x, core=tuple(x.shape[-2:]), dtype=x.dtype)

    return call


def _in_numpy() -> NumpyBackend:
    return NumpyBackend(array_api_compat.numpy)


class CubedBackend(OtherBackend):
    """Whole matrices in a task each, and the `Spec` for a device."""

    functions: ClassVar[Mapping[str, Callable[..., Any]]] = {
        "asarray": _asarray,
        "sort": _sort,
        "argsort": _argsort,
        "take": _take,
        "take_along_axis": _take_along_axis,
        "linalg.qr": _qr,
        "linalg.svd": _svd,
        "linalg.eigh": _eigh,
        "linalg.eigvalsh": lambda x: _eigh(x)[0],
        "linalg.cholesky": _same_shape(np.linalg.cholesky),
        "linalg.inv": _same_shape(np.linalg.inv),
        **{
            name: _with_spec(getattr(cubed, name))
            for name in ("arange", "empty", "eye", "full", "linspace", "ones", "zeros")
        },
    }

    def is_eager(self, x: Array) -> bool:
        """Say no: reading a value would compute the plan."""
        return False

    def device(self, x: Array) -> Any:
        """Arrays meet where they have the same `Spec`."""
        return x.spec

    def creation_device(self, like: Array) -> Any:
        """Take the `Spec`."""
        return like.spec

    def copied(self, x: Array) -> Array:
        """Return ``x``: a plan cannot be written to."""
        return x

    def scatter_rows(self, values: Array, indices: Array, n: int) -> Array:
        """Row by row, in NumPy."""

        def scatter(values: Any, indices: Any) -> Any:
            dense = np.zeros((*values.shape[:-1], n), dtype=values.dtype)
            np.put_along_axis(dense, indices.astype(np.int64), values, axis=-1)
            return dense

        return _blocks(scatter, 1, values, indices, core=(n,), dtype=values.dtype)

    def takes_rows_to_numpy(self, x: Array, levels: Array) -> bool:
        """Say yes: when a block is computed its values are known."""
        return True

    def rows_by_numpy(self, function: Callable[..., Any], x: Array, levels: Array) -> Array:
        """Apply it to blocks in which the last axis is whole."""

        def rows(x: Any, levels: Any) -> Any:
            with np.errstate(all="ignore"):
                return function(x, levels).astype(x.dtype)

        return _blocks(rows, 1, x, levels, core=tuple(x.shape[-1:]), dtype=x.dtype)

    def heeded(
        self,
        attend: Attend,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        options: ScoreOptions,
    ) -> tuple[Array, Any]:
        """Leave it to the blocks."""
        return attend(q, k, v, mask, options)

    def attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> tuple[Array, Array]:
        """NumPy's kernel on each block of batches and heads, in which the lengths are whole."""
        rest, read = _read_options(mask, options)

        def block(q: Any, k: Any, v: Any, *rest: Any) -> Any:
            backend, (mask, options) = _in_numpy(), read(rest)
            with backend.ignore_overflow():
                out, lse = backend.heeded(backend.attention, q, k, v, mask, options)
            return np.concatenate([out, lse[..., None]], axis=-1)

        core = (q.shape[-2], v.shape[-1] + 1)
        both = _blocks(block, 2, q, k, v, *rest, core=core, dtype=q.dtype)
        return both[..., :-1], both[..., -1]

    def attention_vjp(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        options: ScoreOptions,
        lse: Array,
        delta: Array,
        grad_out: Array,
    ) -> tuple[Array, Array, Array]:
        """NumPy's, likewise."""
        rest, read = _read_options(mask, options)
        n_queries, n_keys, d, e = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
        width = max(d, e)

        def block(q: Any, k: Any, v: Any, grad: Any, rows: Any, *rest: Any) -> Any:
            backend, (mask, options) = _in_numpy(), read(rest)
            arrays = [q, k, v, grad]
            lead = np.broadcast_shapes(*(x.shape[:-2] for x in arrays))
            q, k, v, grad = (np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in arrays)
            with backend.ignore_overflow():
                grads = backend.attention_vjp(
                    q, k, v, mask, options, rows[..., 0], rows[..., 1], grad
                )
            pads = [[(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])] for x in grads]
            return np.concatenate(list(map(np.pad, grads, pads)), axis=-2)

        rows = cubed.stack([lse, delta], axis=-1)
        core = (n_queries + 2 * n_keys, width)
        arrays = (q, k, v, grad_out, rows, *rest)
        whole = _blocks(block, 2, *arrays, core=core, dtype=q.dtype)
        dq = whole[..., :n_queries, :d]
        dk = whole[..., n_queries : n_queries + n_keys, :d]
        dv = whole[..., n_queries + n_keys :, :e]
        shapes = (q.shape, k.shape, v.shape)
        dq, dk, dv = (sum_to(x, n, self.xp) for x, n in zip((dq, dk, dv), shapes, strict=True))
        return dq, dk, dv


def _read_options(
    mask: Array | None, options: ScoreOptions
) -> tuple[list[Array], Callable[[Any], tuple[Any, ScoreOptions]]]:
    """Return the arrays among what changes scores, and what puts their blocks back in their places."""
    numbers = {"scale": options.scale, "softcap": options.softcap}
    lazy = {n: cubed.reshape(x, (1, 1)) for n, x in numbers.items() if isinstance(x, cubed.Array)}
    if options.alibi is not None:
        lazy["alibi"] = options.alibi
    none: dict[str, Any] = dict.fromkeys(lazy)
    plain = options._replace(**none)
    names = list(lazy)

    def read(blocks: Any) -> tuple[Any, ScoreOptions]:
        known: dict[str, Any] = {
            name: x if name == "alibi" else x.item() for name, x in zip(names, blocks, strict=False)
        }
        return blocks[len(names)] if len(blocks) > len(names) else None, plain._replace(**known)

    return [*lazy.values(), *([] if mask is None else [mask])], read


register_backend("cubed", CubedBackend)
register_backend("cubed.array_api", CubedBackend)
