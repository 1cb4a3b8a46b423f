"""A fitted basis: the small linear maps that turn attention in D dimensions into attention in r."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from slra._backends import Backend
from slra._typing import Array, CausalAlign, Namespace
from slra._validate import check_flag, check_rank, promote, resolve, shown
from slra.attn._inputs import Inputs, check_inputs
from slra.attn.exact import attend, attend_output
from slra.attn.fold import FoldedProjections, fold_maps
from slra.attn.storage import NAMES, load_arrays, save_arrays, shapes_of

__all__ = [
    "AttentionBasis",
    "Maps",
    "attend_maps",
    "basis_from",
    "check_basis",
    "check_parts",
    "per_query_head",
]

# Heads whose ranks round up to the same multiple of this run together: a kernel's register holds as many numbers.
RANK_STEP = 8


@dataclass(frozen=True, eq=False)
class AttentionBasis:
    r"""Linear maps on the feature axis, made by `fit_attention`, under which attention runs in few dimensions.

    .. math::
        q' = q W_q, \quad k' = (k - c) W_k, \quad v' = (v - \mu) W_v, \qquad
        \operatorname{softmax}(s\, q' k'^T)\, v' U_v + \mu

    Attributes
    ----------
    wq : array, shape (..., Hq, D, r)
        Map of the queries.
    wk : array, shape (..., Hkv, D, r)
        Map of the keys.
    wv : array, shape (..., Hkv, Dv, r_v)
        Map of the values.
    uv : array, shape (..., Hkv, r_v, Dv)
        Map of the output back to Dv dimensions.
    c : array, shape (..., Hkv, 1, D)
        Shift of the keys; it changes no softmax weight.
    mu : array, shape (..., Hkv, 1, Dv)
        Shift of the values; weights sum to one, so it comes back whole.
    ranks : tuple of (int, int)
        Rank of queries and keys, and rank of values, for each key head. Columns beyond a head's rank are zero.
    error : array, shape (..., Hq)
        Predicted relative Frobenius error of the output, on the data of the fit.

    Notes
    -----
    The maps carry no gradient: they are constants of whatever is differentiated through them. On JAX the basis is a
    pytree whose ``ranks`` are static.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> basis = slra.fit_attention(q, k, v, (4, 6))
    >>> basis.ranks
    ((4, 6), (4, 6))
    >>> [x.shape for x in basis.project(q, k, v)]
    [(2, 50, 4), (2, 50, 4), (2, 50, 6)]
    >>> basis.attend(q, k, v).shape
    (2, 50, 8)
    """

    wq: Array
    wk: Array
    wv: Array
    uv: Array
    c: Array
    mu: Array
    ranks: tuple[tuple[int, int], ...]
    error: Array

    def attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        mask: Array | None = None,
        is_causal: bool = False,
        causal_align: CausalAlign = "bottom_right",
        scale: float | None = None,
        enable_gqa: bool = False,
        softcap: float | None = None,
        return_lse: bool = False,
    ) -> Array | tuple[Array, Array]:
        """Attention on the projected queries, keys and values.

        Parameters
        ----------
        q, k, v : array
            As in `attention`, with the heads and widths the basis was fitted on; any lengths.
        mask, is_causal, causal_align, scale, enable_gqa, softcap, return_lse
            As in `attention`. The default scale is ``1/sqrt(D)`` of the original D.

        Returns
        -------
        out : array, shape (..., Hq, Nq, Dv)
            In the common dtype of ``q``, ``k`` and ``v``. A query that attends to nothing gets 0.
        lse : array, shape (..., Hq, Nq)
            Only with ``return_lse``: log-sum-exp of the approximate scores, the shift of the keys put back.

        Raises
        ------
        TypeError, ValueError
            As in `attention`, and ValueError where heads or widths are not those of the basis.
        """
        inputs = check_inputs(
            q,
            k,
            v,
            mask=mask,
            is_causal=is_causal,
            causal_align=causal_align,
            scale=scale,
            enable_gqa=enable_gqa,
            softcap=softcap,
        )
        check_basis(self, inputs, enable_gqa=enable_gqa)
        check_flag(return_lse, "return_lse")
        same_bits = inputs.backend.same_bits()
        with inputs.backend.ignore_overflow(), same_bits, same_bits:
            maps = Maps.of(self, inputs.q)
            out, lse = attend_maps(maps, inputs, enable_gqa=enable_gqa, with_lse=return_lse)
            (out,) = inputs.promoted.cast_back(inputs.backend, out)
        return (out, lse) if return_lse else out

    def project(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Map queries, keys and values to the dimensions of the basis.

        Parameters
        ----------
        q : array, shape (..., Hq, Nq, D)
        k : array, shape (..., Hkv, Nk, D)
        v : array, shape (..., Hkv, Nk, Dv)

        Returns
        -------
        tuple of arrays
            q' (..., Hq, Nq, r), k' (..., Hkv, Nk, r) and v' (..., Hkv, Nk, r_v), in the common dtype of the arguments.
            ``attention(q', k', v', scale=1/sqrt(D)) @ uv + mu`` is what `attend` computes without softcap.

        Raises
        ------
        TypeError, ValueError
            As in `attend`.
        """
        enable_gqa = _n_heads(self.wq) != _n_heads(self.wk)
        inputs = check_inputs(
            q,
            k,
            v,
            mask=None,
            is_causal=False,
            causal_align="bottom_right",
            scale=None,
            enable_gqa=enable_gqa,
            softcap=None,
        )
        check_basis(self, inputs, enable_gqa=enable_gqa)
        with inputs.backend.ignore_overflow():
            maps = Maps.of(self, inputs.q)
            q, k, v = inputs.promoted.cast_back(
                inputs.backend, *maps.project(inputs.q, inputs.k, inputs.v)
            )
            return q, k, v

    def fold(
        self,
        w_q: Array,
        w_k: Array,
        w_v: Array,
        w_o: Array,
        *,
        b_q: Array | None = None,
        b_k: Array | None = None,
        b_v: Array | None = None,
        b_o: Array | None = None,
    ) -> FoldedProjections:
        r"""Absorb the maps into projection weights, where nothing position-dependent stands between.

        Parameters
        ----------
        w_q : array, shape (Hq, E, D)
            Weights with ``q[h] = x @ w_q[h] + b_q[h]``.
        w_k : array, shape (Hkv, E, D)
        w_v : array, shape (Hkv, E, Dv)
        w_o : array, shape (Hq, Dv, E)
            Weights with ``y = sum over h of out[h] @ w_o[h], plus b_o``.
        b_q, b_k, b_v : array, optional, shapes (Hq, 1, D), (Hkv, 1, D), (Hkv, 1, Dv)
        b_o : array, optional, shape (E,)

        Returns
        -------
        FoldedProjections
            The same with r and r_v in place of D and Dv. Attention on what they project needs the scale of the
            original D, ``1/sqrt(D)``, given explicitly.

        Raises
        ------
        TypeError
            If an array is not real floating, or they come from different libraries.
        ValueError
            If shapes do not fit, or the basis has batch axes: fit it with ``pool_batch=True``.

        Notes
        -----
        With rotary positions (or a norm of queries and keys) between projection and attention the maps of queries and
        keys cannot be folded. A softcap sees the shift c, and a query that attends to nothing gets the share of
        :math:`\mu`: neither is what `attend` computes.

        Examples
        --------
        >>> import numpy as np
        >>> import slra
        >>> rng = np.random.default_rng(0)
        >>> x, w_q, w_k, w_v = rng.standard_normal((50, 16)), *rng.standard_normal((3, 2, 16, 8))
        >>> w_o = rng.standard_normal((2, 8, 16))
        >>> basis = slra.fit_attention(x @ w_q, x @ w_k, x @ w_v, 4)
        >>> small = basis.fold(w_q, w_k, w_v, w_o)
        >>> q, k, v = x @ small.w_q, x @ small.w_k + small.b_k, x @ small.w_v + small.b_v
        >>> y = np.sum(slra.attention(q, k, v, scale=8**-0.5) @ small.w_o, axis=0) + small.b_o
        >>> unfolded = np.sum(basis.attend(x @ w_q, x @ w_k, x @ w_v) @ w_o, axis=0)
        >>> bool(np.allclose(y, unfolded))
        True
        """
        return fold_maps(
            {name: getattr(self, name) for name in ("wq", "wk", "wv", "uv", "c", "mu")},
            {"w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o},
            {"b_q": b_q, "b_k": b_k, "b_v": b_v, "b_o": b_o},
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the basis to a file: an .npz archive of plain arrays.

        Parameters
        ----------
        path : str or path-like
            Written as it is, no suffix is added. Lazy arrays are computed.
        """
        save_arrays(path, self)

    @classmethod
    def load(cls, path: str | PathLike[str], *, like: Array | None = None) -> "AttentionBasis":
        """Read a basis written by `save`; nothing is unpickled.

        Parameters
        ----------
        path : str or path-like
        like : array, optional
            Whose library, device and dtype the arrays get; NumPy, and the dtype saved, by default.

        Returns
        -------
        AttentionBasis

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is damaged, or not what `save` writes.
        """
        return basis_from(load_arrays(path), like)


def basis_from(arrays: Mapping[str, Any], like: Array | None) -> AttentionBasis:
    """Make a basis of the arrays that were stored, in the library, dtype and device of ``like``."""
    named = dict(arrays)
    ranks = tuple((int(qk), int(v)) for qk, v in named.pop("ranks"))
    if like is None:
        return AttentionBasis(**named, ranks=ranks)
    backend = resolve(like=like)
    named = {name: backend.from_numpy(x, like) for name, x in named.items()}
    basis: AttentionBasis = backend.make_dataclass(AttentionBasis, named, {"ranks": ranks})
    return basis


class Maps(NamedTuple):
    """The maps of a basis, in the dtype to compute in, for all heads or for some."""

    wq: Array
    wk: Array
    wv: Array
    uv: Array
    c: Array
    mu: Array
    ranks: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, basis: "AttentionBasis | Maps", like: Array) -> "Maps":
        """Take the maps of a basis, in the dtype of ``like``."""
        xp = resolve(basis=basis.wq).xp
        named = {name: getattr(basis, name) for name in cls._fields[:-1]}
        cast = {
            name: x if x.dtype == like.dtype else xp.astype(x, like.dtype)
            for name, x in named.items()
        }
        return cls(**cast, ranks=basis.ranks)

    def project(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Shifts are taken off after the map: r numbers a row instead of D."""
        k = k @ self.wk - self.c @ self.wk
        return q @ self.wq, k, v @ self.wv - self.mu @ self.wv

    def cut(self, rank_qk: int, rank_v: int) -> "Maps":
        """Keep the leading columns."""
        wq, wk = self.wq[..., :rank_qk], self.wk[..., :rank_qk]
        return self._replace(wq=wq, wk=wk, wv=self.wv[..., :rank_v], uv=self.uv[..., :rank_v, :])


def _n_heads(x: Array) -> int:
    return int(x.shape[-3]) if x.ndim > 2 else 1


def check_parts(basis: Any) -> None:
    """Raise unless this is a basis, which anybody can make, whose arrays and ranks belong together."""
    if not isinstance(basis, AttentionBasis):
        raise TypeError(f"basis must be an AttentionBasis, got {type(basis).__name__}")
    arrays = {name: getattr(basis, name) for name in NAMES}
    promote(resolve(**arrays), allow_complex=False, **arrays)
    expected = shapes_of(basis.wq, basis.wk, basis.wv)
    (n_heads,) = expected.pop("ranks")
    for name, shape in expected.items():
        if tuple(arrays[name].shape) != shape:
            raise ValueError(
                f"{name} of a basis must have shape {shape}, got {tuple(arrays[name].shape)}"
            )
    if not isinstance(basis.ranks, (tuple, list)) or len(basis.ranks) != n_heads:
        raise ValueError(f"ranks of a basis must be {n_heads} pairs, got {shown(basis.ranks)}")
    limits = basis.wk.shape[-1], basis.wv.shape[-1]
    for pair in basis.ranks:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"ranks of a basis must be pairs of ints, got {shown(pair)}")
        for rank, limit in zip(pair, limits, strict=True):
            check_rank(rank, limit, "ranks of a basis")


def check_basis(basis: AttentionBasis, inputs: Inputs, *, enable_gqa: bool) -> None:
    """Raise unless the inputs have the library, device, heads and widths of the basis."""
    check_parts(basis)
    q, k, v = inputs.q, inputs.k, inputs.v
    resolve(q=q, basis=basis.wq)
    widths, expected = (q.shape[-1], v.shape[-1]), (basis.wq.shape[-2], basis.uv.shape[-1])
    if widths != expected:
        raise ValueError(
            f"q and v must have the widths (D, Dv) of the basis, {expected}, got {widths}"
        )
    heads, expected = (_n_heads(q), _n_heads(k)), (_n_heads(basis.wq), _n_heads(basis.wk))
    fits = heads == expected if enable_gqa else expected[0] == expected[1] == max(heads)
    if not fits:
        raise ValueError(
            f"q and k must have the numbers of heads of the basis, {expected}, got {heads}"
            + ("" if enable_gqa or expected[0] == expected[1] else "; pass enable_gqa=True")
        )


def per_query_head(x: Array, like: Array, xp: Namespace) -> Array:
    """Repeat what belongs to a key head for the query heads of ``like`` that share it."""
    repeats = _n_heads(like) // _n_heads(x)
    return x if repeats <= 1 else xp.repeat(x, repeats, axis=-3)


def attend_maps(
    maps: Maps, inputs: Inputs, *, enable_gqa: bool, with_lse: bool
) -> tuple[Array, Array | None]:
    """Attention under maps that fit the inputs, and its log-sum-exp; heads of like rank together."""
    buckets = list(_buckets(maps))
    if len(buckets) == 1:
        ((_, *ranks),) = buckets
        return _attend(maps.cut(*ranks), inputs, enable_gqa=enable_gqa, with_lse=with_lse)
    xp, backend = inputs.backend.xp, inputs.backend
    n_shared = _n_heads(maps.wq) // _n_heads(maps.wk)
    outs, lses, order = [], [], []
    for heads, *ranks in buckets:
        query_heads = [head * n_shared + i for head in heads for i in range(n_shared)]
        some, part = _take_heads(maps, inputs, heads, query_heads, backend)
        out, lse = _attend(some.cut(*ranks), part, enable_gqa=enable_gqa, with_lse=with_lse)
        outs.append(out)
        lses.append(lse)
        order += query_heads
    back = backend.from_numpy(np.argsort(order), inputs.q, xp.int64)
    out = xp.take(xp.concat(outs, axis=-3), back, axis=-3)
    return out, xp.take(xp.concat(lses, axis=-2), back, axis=-2) if with_lse else None


def _buckets(maps: Maps) -> Iterator[tuple[list[int], int, int]]:
    """Key heads that run together, and the ranks they run at: padded to a multiple of RANK_STEP where mixed."""
    if len(set(maps.ranks)) == 1:
        yield list(range(len(maps.ranks))), *maps.ranks[0]
        return
    together: dict[tuple[int, int], list[int]] = {}
    for head, ranks in enumerate(maps.ranks):
        rank_qk, rank_v = (math.ceil(rank / RANK_STEP) * RANK_STEP for rank in ranks)
        key = min(rank_qk, maps.wk.shape[-1]), min(rank_v, maps.wv.shape[-1])
        together.setdefault(key, []).append(head)
    for key in sorted(together):
        yield together[key], *key


def _take_heads(
    maps: Maps, inputs: Inputs, heads: list[int], query_heads: list[int], backend: Backend
) -> tuple[Maps, Inputs]:
    """Cut some key heads, and the query heads that share them, out of a basis and its inputs."""
    xp = backend.xp
    of_keys, of_queries = (
        backend.from_numpy(np.asarray(one), inputs.q, xp.int64) for one in (heads, query_heads)
    )

    def take(x: Any, indices: Array) -> Any:
        shared = x is None or x.ndim < 3 or x.shape[-3] == 1
        return x if shared else xp.take(x, indices, axis=-3)

    ranks = tuple(maps.ranks[head] for head in heads)
    small = Maps(
        take(maps.wq, of_queries),
        take(maps.wk, of_keys),
        take(maps.wv, of_keys),
        take(maps.uv, of_keys),
        take(maps.c, of_keys),
        take(maps.mu, of_keys),
        ranks,
    )
    return small, inputs._replace(
        q=take(inputs.q, of_queries),
        k=take(inputs.k, of_keys),
        v=take(inputs.v, of_keys),
        mask=take(inputs.mask, of_queries),
    )


def _attend(
    maps: Maps, inputs: Inputs, *, enable_gqa: bool, with_lse: bool
) -> tuple[Array, Array | None]:
    """Exact attention in the dimensions of the basis, and back."""
    xp, options = inputs.backend.xp, inputs.options
    q, k, v = maps.project(inputs.q, inputs.k, inputs.v)
    uv, mu, c = (per_query_head(x, inputs.q, xp) for x in (maps.uv, maps.mu, maps.c))
    if options.softcap is not None:
        shift = inputs.q @ xp.matrix_transpose(c)
        # tanh sees the shift of the scores, so it is carried as one more dimension.
        q = xp.concat([q, xp.broadcast_to(shift, (*q.shape[:-1], 1))], axis=-1)
        k = xp.concat([k, xp.ones_like(k[..., :1])], axis=-1)
    may_be_empty = inputs.mask is not None or (
        options.is_causal and options.diagonal(inputs.q.shape[-2], inputs.k.shape[-2]) < 0
    )
    if may_be_empty:
        # A row that attends to nothing must not get mu: one more value counts what is attended to.
        v = xp.concat([v, xp.ones_like(v[..., :1])], axis=-1)
        uv = xp.concat([uv, mu], axis=-2)
    small = inputs._replace(q=q, k=k, v=v)
    if with_lse:
        out, lse = attend(small, enable_gqa=enable_gqa)
        if options.softcap is None:
            lse = lse + options.scale * (inputs.q @ xp.matrix_transpose(c))[..., 0]
    else:
        out, lse = attend_output(small, enable_gqa=enable_gqa), None
    return out @ uv if may_be_empty else out @ uv + mu, lse
