"""Dask: nothing is computed here; every result is a graph.

Needs: dask[array] over NumPy blocks. Dask's own QR and SVD take 2-D arrays only, so batches go block
by block, and small matrices go whole to one worker.

A chunk that several steps of one graph share stays in memory until the last of them has run: for the matrix of an
iteration that is the whole matrix, all the time. So each product with a large matrix has a copy of the graph that makes
it, which waits for the other factor: chunks are generated or read anew for each product, multiplied, and let go.
"""

import operator
from collections.abc import Callable
from functools import partial
from graphlib import TopologicalSorter
from typing import Any

import array_api_compat.numpy
import dask
import dask.array as da
import numpy as np
from dask import delayed
from dask.graph_manipulation import bind, clone

from slra._backends.gaussian import GaussianBlock, gaussian_blocks
from slra._backends.numpy import NumpyBackend
from slra._backends.standard import Backend, ScoreOptions
from slra._backends.standard.hidden import Attend
from slra._typing import Array

__all__ = ["DaskBackend"]

# Results of as many chunks are added at once.
SPLIT_EVERY = 8


def _thin_svd(b: Any) -> tuple[Any, Any, Any]:
    u, s, vh = np.linalg.svd(b, full_matrices=False)
    return u, s, vh


def _draw(block: GaussianBlock, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    return block.draw().astype(dtype)


def _adjoint_part(x: Any, w: Any, wide: Any) -> Any:
    """Return ``x^H w`` of one chunk, (1, n, l), in the wide dtype."""
    largest = float(np.max(np.abs(w)))
    # By a power of two: the squares that these are would leave the range of the narrow dtype.
    scale = 2.0 ** (np.frexp(largest)[1] - 1) if 0 < largest < np.inf else 1.0
    z = np.conj(w / w.dtype.type(scale)).T @ x
    return (scale * np.conj(z).T.astype(wide))[None]


def _both_parts(x: Any, v: Any, wide: Any) -> tuple[Any, Any]:
    """Return ``w = x v`` of one chunk that has all columns, and ``x^H w``."""
    w = x @ v
    return w, _adjoint_part(x, w, wide)


def _unit_columns(z: Any, dtype: np.dtype[Any]) -> Any:
    """Columns scaled to modulus 1, which is in range whatever they were."""
    largest = np.max(np.abs(z), axis=0)
    return (z / np.where(largest > 0, largest, 1)).astype(dtype)


def _triangle(x: Any, axis: Any, keepdims: bool) -> Any:
    return np.linalg.qr(x, mode="r")


def _again(x: Array, v: Array, use: str) -> Array:
    """``x`` from a copy of its graph that starts no sooner than ``v``, which it is to meet, is there.

    What was reduced on the way, such as means, is not copied but computed once. What came out of other passes is
    not copied at all: copies of copies would grow exponentially in a loop.
    """
    if any(name.startswith("checkpoint-") for name in x.dask.layers):
        return x
    return bind(x, v, omit=_reduced(x), seed=dask.base.tokenize(x.name, v.name, use))


def _reduced(x: Array) -> list[Array]:
    """Layers of the graph that have fewer pieces than ``x``, and fewer than a layer that they are made from."""
    graph, found = x.dask, []
    largest: dict[str, int] = {}
    for name in TopologicalSorter(graph.dependencies).static_order():
        size = len(graph.layers[name].get_output_keys())
        before = max((largest[other] for other in graph.dependencies[name]), default=0)
        largest[name] = max(size, before)
        if name != x.name and size < min(before, x.npartitions):
            found.append(da.Array(graph, name, chunks=((1,),), dtype=x.dtype))
    return found


def _row_fits(x: Array) -> bool:
    """Whether a row of chunks is one chunk, or may stay in memory as one."""
    limit = 2 * dask.utils.parse_bytes(dask.config.get("array.chunk-size"))
    size = max(x.chunks[0]) * x.shape[1] * x.dtype.itemsize
    return bool(x.numblocks[1] == 1 or size <= limit)


def _by_matrix(
    function: Callable[..., Any], signature: str, *xs: Array, dtypes: list[Any], **sizes: int
) -> Any:
    """Apply a NumPy function lazily to whole matrices, batch by batch."""
    whole = [x.rechunk({x.ndim - 2: -1, x.ndim - 1: -1}) for x in xs]
    # Meta rather than output_dtypes: Dask would cast a complex meta to the real dtype of S, with a warning.
    outputs = signature.split("->")[1].split("),(")
    metas = [
        np.empty((0,) * (max(x.ndim for x in xs) - 2 + output.count(",") + 1), dtype=dtype)
        for output, dtype in zip(outputs, dtypes, strict=True)
    ]
    return da.apply_gufunc(
        function,
        signature,
        *whole,
        meta=tuple(metas) if len(metas) > 1 else metas[0],
        output_sizes=sizes,
    )


class DaskBackend(Backend):
    """Overrides for Dask."""

    def is_eager(self, x: Array) -> bool:
        """Say no: reading a value would compute the graph."""
        return False

    def refusal(self, x: Array) -> str | None:
        """Refuse chunks that are not NumPy's, and shapes that are not known before the graph is computed."""
        if not isinstance(x._meta, np.ndarray) or isinstance(x._meta, np.ma.MaskedArray):
            return (
                f"must have NumPy arrays as chunks, got chunks of {type(x._meta).__module__}.{type(x._meta).__name__}; "
                "convert them first, sparse ones by x.map_blocks(lambda chunk: chunk.toarray())"
            )
        if any(np.isnan(n) for n in x.shape):
            return (
                f"must be a dense array, got an array of unknown shape {x.shape}; "
                "call compute_chunk_sizes() first"
            )
        return None

    def qr(self, y: Array) -> tuple[Array, Array]:
        """Tall-and-skinny QR for a matrix chunked by rows; batches by LAPACK, each matrix whole."""
        if y.ndim == 2:
            q, r = da.linalg.qr(y.rechunk({1: -1}))
            return q, r
        k = min(y.shape[-2:])
        q, r = _by_matrix(np.linalg.qr, "(m,n)->(m,k),(k,n)", y, dtypes=[y.dtype] * 2, k=k)
        return q, r

    def copied(self, x: Array) -> Array:
        """Return ``x``: a graph cannot be written to."""
        return x

    def column_means(self, x: Array) -> Array:
        """Take the means in a pass of their own."""
        wide, x = self.accumulation_dtype(x), clone(x, seed="mean")
        return da.mean(x, axis=-2, keepdims=True, dtype=wide, split_every=SPLIT_EVERY)

    def product(self, x: Array, v: Array) -> Array:
        """Multiply chunk by chunk, and add in a tree."""
        return _again(x, v, "product") @ v

    def adjoint_product(self, x: Array, y: Array) -> Array:
        """Multiply chunk by chunk, and add in a tree."""
        return super().adjoint_product(_again(x, y, "adjoint"), y)

    def normal_product(self, x: Array, v: Array) -> tuple[Array, Array]:
        """Both products with a row of chunks while it is there; without QR, which would have to wait for all rows."""
        if x.ndim > 2 or not _row_fits(x):
            return super().normal_product(x, v)
        x, v, wide = _again(x, v, "normal"), v.rechunk(-1), self.accumulation_dtype(x)
        part = {"meta": np.empty((0, 0, 0), dtype=wide)}
        if x.numblocks[1] == 1:
            # One task generates or reads, and multiplies twice: Dask fuses where no index is summed over.
            both = x.map_blocks(
                _both_parts, v, wide, chunks=(x.chunks[0], v.chunks[1]), meta=x._meta
            )
            image = both.map_blocks(operator.itemgetter(0), meta=x._meta)
            chunks = ((1,) * x.numblocks[0], *v.chunks)
            parts = both.map_blocks(operator.itemgetter(1), new_axis=1, chunks=chunks, **part)
        else:
            image = x @ v
            parts = da.blockwise(
                _adjoint_part,
                "ijk",
                *(x, "ij", image, "ik"),
                wide=wide,
                adjust_chunks={"i": 1},
                **part,
            )
        total = da.sum(parts, axis=0, split_every=SPLIT_EVERY).rechunk(-1)
        return image, total.map_blocks(_unit_columns, x.dtype, meta=x._meta)

    def triangular_factor(self, x: Array) -> Array:
        """Factors of rows of chunks, joined and factored again in a tree; batches by LAPACK, each matrix whole."""
        if x.ndim > 2:
            r = partial(np.linalg.qr, mode="r")
            return _by_matrix(r, "(m,n)->(k,n)", x, dtypes=[x.dtype], k=min(x.shape[-2:]))
        x = x.rechunk({1: -1} if _row_fits(x) else {0: "auto", 1: -1})
        return da.reduction(
            x,
            *(_triangle, _triangle),
            axis=0,
            keepdims=True,
            dtype=x.dtype,
            # Two at a time: these are as large as chunks.
            split_every=2,
            output_size=x.shape[1],
        )

    def small_svd(self, b: Array) -> tuple[Array, Array, Array]:
        """LAPACK on one worker, each matrix whole."""
        dtypes = [b.dtype, self.real_dtype(b.dtype), b.dtype]
        k = min(b.shape[-2:])
        u, s, vh = _by_matrix(_thin_svd, "(m,n)->(m,k),(k),(k,n)", b, dtypes=dtypes, k=k)
        return u, s, vh

    def small_eigh(self, g: Array) -> tuple[Array, Array]:
        """LAPACK on one worker, each matrix whole."""
        w, v = _by_matrix(
            np.linalg.eigh, "(n,n)->(n),(n,n)", g, dtypes=[self.real_dtype(g.dtype), g.dtype]
        )
        return w, v

    def cholesky(self, g: Array) -> Array:
        """LAPACK on one worker, each matrix whole; Dask's own gives the upper factor."""
        return _by_matrix(np.linalg.cholesky, "(n,n)->(n,n)", g, dtypes=[g.dtype])

    def small_inverse(self, g: Array) -> Array:
        """LAPACK on one worker, each matrix whole; Dask's own takes one matrix."""
        return _by_matrix(np.linalg.inv, "(n,n)->(n,n)", g, dtypes=[g.dtype])

    def take_places(self, x: Array, places: np.ndarray[Any, Any]) -> Array:
        """Index by a NumPy array; by one of Dask complex numbers fail."""
        return x[..., places]

    def top_indices(self, x: Array, k: int) -> Array:
        """Sort on one worker."""

        def top(x: Any) -> Any:
            return np.argsort(-x, axis=-1, stable=True)[..., :k]

        return _by_matrix(top, "(n)->(k)", x, dtypes=[np.int64], k=k)

    def kth_largest(self, x: Array, k: int) -> Array:
        """Select on one worker."""
        place = x.shape[-1] - k

        def select(x: Any) -> Any:
            return np.partition(x, place, axis=-1)[..., place : place + 1]

        return _by_matrix(select, "(n)->(k)", x, dtypes=[x.dtype], k=1)

    def takes_rows_to_numpy(self, x: Array, levels: Array) -> bool:
        """Say yes: when a block is computed its values are known."""
        return True

    def rows_by_numpy(self, function: Callable[..., Any], x: Array, levels: Array) -> Array:
        """Apply it to blocks in which the last axis is whole."""

        def rows(x: Any, levels: Any) -> Any:
            with np.errstate(all="ignore"):
                return function(x, levels).astype(x.dtype)

        whole = [a.rechunk({a.ndim - 1: -1}) for a in (x, levels)]
        return da.apply_gufunc(rows, "(n),(m)->(n)", *whole, output_dtypes=x.dtype)

    reads_rows = True

    def read_rows(self, x: Array, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Read the matrix once."""
        found: np.ndarray[Any, Any] = x[rows].compute()
        return found

    def map_rows(self, function: Callable[..., Any], x: Array, n: int, dtype: Any) -> Array:
        """Blocks that have all columns."""

        def block(x: Any) -> Any:
            with np.errstate(all="ignore"):
                return function(x) if len(x) else np.zeros((0, n), dtype)

        x = x.rechunk({1: -1})
        return x.map_blocks(block, chunks=(x.chunks[0], (n,)), meta=np.empty((0, 0), dtype))

    def gather_rows(self, x: Array, indices: Array) -> Array:
        """Gather on one worker, each matrix whole."""

        def gather(x: Any, indices: Any) -> Any:
            return np.take_along_axis(x, indices[..., None], axis=-2)

        return _by_matrix(gather, "(n,d),(m)->(m,d)", x, indices, dtypes=[x.dtype])

    def test_matrix(self, shape: tuple[int, ...], rng: Any, like: Array) -> Array:
        """Draw each block where it is needed."""
        blocks = [
            da.from_delayed(
                delayed(_draw)(block, like.dtype),
                shape=block.shape,
                dtype=like.dtype,
                meta=np.empty((0,) * len(block.shape), dtype=like.dtype),
            )
            for block in gaussian_blocks(shape, rng, is_complex=self.is_complex(like))
        ]
        return da.concatenate(blocks, axis=-2)

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
        numbers = {"scale": options.scale, "softcap": options.softcap}
        lazy = {n: x.reshape(1, 1) for n, x in numbers.items() if not isinstance(x, float | None)}
        if options.alibi is not None:
            lazy["alibi"] = options.alibi
        signature = "(q,d),(k,d),(k,e)" + ",(s,t)" * len(lazy) + ("" if mask is None else ",(m,n)")
        arrays = (q, k, v, *lazy.values()) if mask is None else (q, k, v, *lazy.values(), mask)

        def block(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any]:
            known: dict[str, Any] = {
                name: x if name == "alibi" else x.item()
                for name, x in zip(lazy, rest, strict=False)
            }
            mask = rest[len(lazy)] if len(rest) > len(lazy) else None
            # Values are known here, so this is where NaN is looked for.
            backend = NumpyBackend(array_api_compat.numpy)
            with backend.ignore_overflow():
                return backend.heeded(backend.attention, q, k, v, mask, options._replace(**known))

        out, lse = _by_matrix(block, f"{signature}->(q,e),(q)", *arrays, dtypes=[q.dtype] * 2)
        return out, lse
