"""A fitted basis: the small linear maps that turn attention in D dimensions into attention in r."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Unpack, overload

from slra._backends.ambient import isolated
from slra._files import File
from slra._typing import AnyArray, Array, ArrayT, AttentionOptions, CausalAlign
from slra._validate import check_flag, check_matrix, check_rank, promote, resolve, shown
from slra.attn._basis_io import CODING, NAMES, read_bases, shapes_of, write_bases
from slra.attn.coding import Coding
from slra.attn.maps import NAMES_OF_MAPS, Maps, mapped_output
from slra.attn.problem import AttentionProblem, Three, make_problem

__all__ = [
    "AttentionBasis",
    "FoldedProjections",
    "check_basis",
    "check_parts",
    "load_bases",
    "save_bases",
]


class FoldedProjections(NamedTuple):
    """Projection weights and biases that already contain a basis; weights multiply from the right, ``x @ w``.

    Attributes
    ----------
    w_q : array, shape (Hq, E, r)
    w_k : array, shape (Hkv, E, r)
    w_v : array, shape (Hkv, E, r_v)
    w_o : array, shape (Hq, r_v, E)
    b_q : array, shape (Hq, 1, r), or None
    b_k : array, shape (Hkv, 1, r)
    b_v : array, shape (Hkv, 1, r_v)
    b_o : array, shape (E,)

    Examples
    --------
    See `AttentionBasis.fold` for attention on what they project.

    >>> import numpy as np
    >>> import slra
    >>> x, weights = np.random.default_rng(0).standard_normal((2, 50, 16)), np.ones((3, 2, 16, 8))
    >>> basis = slra.fit_attention(x @ weights[0, :1], x @ weights[1, :1], x @ weights[2, :1], 1)
    """

    w_q: Array
    w_k: Array
    w_v: Array
    w_o: Array
    b_q: Array | None
    b_k: Array
    b_v: Array
    b_o: Array


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
        Predicted relative Frobenius error of the output, see `fit_attention`.
    is_held_out : bool
        Whether ``error`` is of queries that the fit behind it has not seen.
    coding : Coding, or None
        Coordinates of all dimensions in which `KVCache` rounds to bits, and the importance of each. None where the
        arrays of the fit were lazy or traced.

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
    is_held_out: bool = False
    coding: Coding | None = None

    def __repr__(self) -> str:
        """Shapes, ranks, dtype, bytes and, where it is concrete, the error, on three lines."""
        shapes = ", ".join(f"{name} {_shape(getattr(self, name))}" for name in NAMES_OF_MAPS)
        return f"AttentionBasis({_size(self)},\n  {shapes},\n  {_ranks(self.ranks)})"

    @overload
    def attend(
        self,
        q: ArrayT,
        k: ArrayT,
        v: ArrayT,
        *,
        return_lse: Literal[False] = False,
        **options: Unpack[AttentionOptions],
    ) -> ArrayT: ...

    @overload
    def attend(
        self,
        q: ArrayT,
        k: ArrayT,
        v: ArrayT,
        *,
        return_lse: Literal[True],
        **options: Unpack[AttentionOptions],
    ) -> tuple[ArrayT, ArrayT]: ...

    @overload
    def attend(
        self,
        q: ArrayT,
        k: ArrayT,
        v: ArrayT,
        *,
        return_lse: bool,
        **options: Unpack[AttentionOptions],
    ) -> ArrayT | tuple[ArrayT, ArrayT]: ...

    @isolated
    def attend(
        self,
        q: ArrayT,
        k: ArrayT,
        v: ArrayT,
        *,
        mask: AnyArray | None = None,
        is_causal: bool = False,
        causal_align: CausalAlign | None = None,
        window: tuple[int | None, int | None] | None = None,
        lengths_q: Any = None,
        lengths_k: Any = None,
        sinks: AnyArray | None = None,
        alibi: AnyArray | None = None,
        scale: float | AnyArray | None = None,
        enable_gqa: bool = False,
        softcap: float | AnyArray | None = None,
        return_lse: bool = False,
    ) -> ArrayT | tuple[ArrayT, ArrayT]:
        """Attention on the projected queries, keys and values.

        Parameters
        ----------
        q, k, v : array
            As in `attention`, with the heads and widths the basis was fitted on; any lengths.
        mask, is_causal, causal_align, window, lengths_q, lengths_k, sinks, alibi, scale, enable_gqa, softcap
        return_lse
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
        problem = make_problem(
            q,
            k,
            v,
            mask=mask,
            is_causal=is_causal,
            causal_align=causal_align,
            window=window,
            lengths_q=lengths_q,
            lengths_k=lengths_k,
            sinks=sinks,
            alibi=alibi,
            scale=scale,
            enable_gqa=enable_gqa,
            softcap=softcap,
            may_be_empty=True,
        )
        out: ArrayT
        lse: ArrayT
        out, lse = self._attended(problem, Maps.project, return_lse=return_lse)
        return (out, lse) if return_lse else out

    def _attended(
        self,
        problem: AttentionProblem,
        project: Callable[[Maps, AttentionProblem], Three],
        *,
        return_lse: bool,
    ) -> tuple[Any, Any]:
        problem = check_basis(self, problem, is_projected=project is Maps.project_queries)
        check_flag(return_lse, "return_lse")
        with (same_bits := problem.backend.same_bits()), same_bits:
            with_lse = return_lse or problem.sinks is not None
            small, lse = mapped_output(
                problem, Maps.of(self, problem), with_lse=with_lse, project=project
            )
            if lse is not None:
                small, lse = problem.with_sinks(small, lse)
            out = problem.answer(small)
        return out, problem.answer_lse(lse) if return_lse else None

    @isolated
    def project(self, q: ArrayT, k: ArrayT, v: ArrayT) -> tuple[ArrayT, ArrayT, ArrayT]:
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
        has_shared_heads = _n_heads(self.wq) != _n_heads(self.wk)
        problem = make_problem(q, k, v, enable_gqa=has_shared_heads, may_be_empty=True)
        problem = check_basis(self, problem)
        with problem.backend.ignore_overflow():
            small = Maps.of(self, problem).project(problem)
            q, k, v = problem.answer_inputs(small)
        return q, k, v

    @isolated
    def project_keys(self, k: ArrayT, v: ArrayT) -> tuple[ArrayT, ArrayT]:
        """Map keys and values once, for `attend_projected` to attend to them often.

        Parameters
        ----------
        k : array, shape (..., Hkv, Nk, D)
        v : array, shape (..., Hkv, Nk, Dv)

        Returns
        -------
        tuple of arrays
            k' (..., Hkv, Nk, r) and v' (..., Hkv, Nk, r_v), in the common dtype of the arguments.

        Raises
        ------
        TypeError, ValueError
            As in `attend`.

        Examples
        --------
        >>> import numpy as np
        >>> import slra
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
        >>> basis = slra.fit_attention(q, k, v, 4)
        >>> small = basis.project_keys(k, v)
        >>> bool(np.allclose(basis.attend_projected(q, *small), basis.attend(q, k, v)))
        True
        """
        # A query for each key head, which takes no part.
        n_shared = _n_heads(self.wq) // _n_heads(self.wk)
        xp = resolve(k=k, v=v, basis=self.wq).xp
        check_matrix(k, "k", may_be_empty=True)
        keys: Array = k
        q = xp.zeros_like(keys[..., :0, :])
        q = q if n_shared == 1 else xp.concat([q] * n_shared, axis=-3)
        _, k, v = self.project(q, k, v)
        return k, v

    @isolated
    def attend_projected(
        self,
        q: ArrayT,
        k: ArrayT,
        v: ArrayT,
        *,
        mask: AnyArray | None = None,
        is_causal: bool = False,
        causal_align: CausalAlign | None = None,
        window: tuple[int | None, int | None] | None = None,
        lengths_q: Any = None,
        lengths_k: Any = None,
        sinks: AnyArray | None = None,
        alibi: AnyArray | None = None,
        scale: float | AnyArray | None = None,
        enable_gqa: bool = False,
        softcap: float | AnyArray | None = None,
        return_lse: bool = False,
    ) -> ArrayT | tuple[ArrayT, ArrayT]:
        """Attend as `attend`, to keys and values that `project_keys` returned.

        Parameters
        ----------
        q : array, shape (..., Hq, Nq, D)
            Queries, not projected.
        k : array, shape (..., Hkv, Nk, r)
            Projected keys.
        v : array, shape (..., Hkv, Nk, r_v)
            Projected values.
        mask, is_causal, causal_align, window, lengths_q, lengths_k, sinks, alibi, scale, enable_gqa, softcap
        return_lse
            As in `attend`. The default scale is ``1/sqrt(D)`` of the original D.

        Returns
        -------
        out, lse : array
            As `attend` returns.

        Raises
        ------
        TypeError, ValueError
            As in `attend`.

        Examples
        --------
        See `project_keys`.
        """
        problem = make_problem(
            q,
            k,
            v,
            mask=mask,
            is_causal=is_causal,
            causal_align=causal_align,
            window=window,
            lengths_q=lengths_q,
            lengths_k=lengths_k,
            sinks=sinks,
            alibi=alibi,
            scale=scale,
            enable_gqa=enable_gqa,
            softcap=softcap,
            may_be_empty=True,
            key_width=self.wk.shape[-1],
        )
        out: ArrayT
        lse: ArrayT
        out, lse = self._attended(problem, Maps.project_queries, return_lse=return_lse)
        return (out, lse) if return_lse else out

    @isolated
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
        return _fold(
            {name: getattr(self, name) for name in NAMES_OF_MAPS},
            {"w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o},
            {"b_q": b_q, "b_k": b_k, "b_v": b_v, "b_o": b_o},
        )

    def save(self, path: File) -> None:
        """Write the basis to a file: an .npz archive of plain arrays.

        Parameters
        ----------
        path : str, path-like or file opened for bytes
            Written as it is, no suffix is added. Lazy arrays are computed.

        Raises
        ------
        OSError
            If it cannot be written; a file that was there is then as it was.
        """
        write_bases(path, {"": self}, layered=False)

    @classmethod
    def load(cls, path: File, *, like: Array | None = None) -> "AttentionBasis":
        """Read a basis written by `save`; nothing is unpickled.

        Parameters
        ----------
        path : str, path-like or file opened for bytes
        like : array, optional
            Whose library, device and dtype the arrays get, float32 for half precision; NumPy, and the dtype saved, by
            default.

        Returns
        -------
        AttentionBasis

        Raises
        ------
        OSError
            If there is no such file, or it is a folder or a pipe.
        ValueError
            If the file is damaged, or not what `save` writes.
        """
        return _basis_from(read_bases(path, "AttentionBasis.save", layered=False)[""], like)


def save_bases(path: File, bases: Mapping[str, AttentionBasis]) -> None:
    """Write several bases, by the names of their layers, to one file."""
    write_bases(path, bases, layered=True)


def load_bases(
    path: File, writer: str, from_numpy: Callable[[Any], Array]
) -> dict[str, AttentionBasis]:
    """Read what `save_bases` wrote, and bring it to a library; ValueError, which names the writer, on other files."""
    layers = read_bases(path, writer, layered=True)
    return {name: _basis_from(x, from_numpy(x["wq"])) for name, x in layers.items()}


def _basis_from(arrays: Mapping[str, Any], like: Array | None) -> AttentionBasis:
    """Make a basis of the arrays that were stored, in the library, dtype and device of ``like``.

    No narrower than float32, as a fit to half precision has it: problems in half precision are computed in that.
    """
    named = dict(arrays)
    static: dict[str, Any] = {
        "ranks": tuple((int(qk), int(v)) for qk, v in named.pop("ranks")),
        "is_held_out": bool(named.pop("is_held_out")),
    }
    if like is not None:
        backend = resolve(like=like)
        dtype = promote(backend, allow_complex=False, like=like).arrays[0].dtype
        named = {name: backend.from_numpy(x, like, dtype) for name, x in named.items()}
    coded = {name: named.pop(name) for name in CODING if name in named}
    named["coding"] = Coding(**{name[7:]: x for name, x in coded.items()}) if coded else None
    if like is None:
        return AttentionBasis(**named, **static)
    basis: AttentionBasis = backend.make_dataclass(AttentionBasis, named, static)
    return basis


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


def check_basis(
    basis: AttentionBasis, problem: AttentionProblem, *, is_projected: bool = False
) -> AttentionProblem:
    """Raise unless a problem has the library, device, heads and widths of the basis; return it as it is answered.

    Values that ``is_projected`` have the columns of the map.
    """
    check_parts(basis)
    q, k, v = problem[:3]
    resolve(q=q, basis=basis.wq)
    width_v = basis.uv.shape[-2 if is_projected else -1]
    widths, expected = (q.shape[-1], v.shape[-1]), (basis.wq.shape[-2], width_v)
    if widths != expected:
        raise ValueError(
            f"q and v must have the widths (D, Dv) of the basis, {expected}, got {widths}"
        )
    heads = q.shape[-4] * q.shape[-3], k.shape[-4]
    expected = _n_heads(basis.wq), _n_heads(basis.wk)
    # Heads that are not shared broadcast.
    fits = expected[0] == expected[1] == max(heads) or (problem.n_shared > 1 and heads == expected)
    if not fits:
        raise ValueError(
            f"q and k must have the numbers of heads of the basis, {expected}, got {heads}"
            + (
                ""
                if problem.n_shared > 1 or expected[0] == expected[1]
                else "; pass enable_gqa=True"
            )
        )
    return problem.with_head_axis() if basis.wq.ndim > 2 else problem


# Parts of the repr. Transformations put other things than arrays into a pytree, which must print all the same.


def _shape(x: Any) -> str:
    shape = getattr(x, "shape", None)
    return type(x).__name__ if shape is None else str(tuple(shape)).replace(" ", "")


def _size(basis: AttentionBasis) -> str:
    arrays = {name: getattr(basis, name) for name in NAMES}
    try:
        backend = resolve(**arrays)
    except (TypeError, ValueError):
        return "no arrays"
    bits = backend.xp.finfo(basis.wq.dtype).bits
    n_bytes = sum(math.prod(x.shape) for x in arrays.values()) * bits // 8
    dtype = str(basis.wq.dtype).rpartition(".")[2]
    if not backend.is_eager(basis.error):
        return f"{dtype}, {n_bytes:,} bytes"
    low, high = (float(f(basis.error)) for f in (backend.xp.min, backend.xp.max))
    error = f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"
    kind = "held out" if basis.is_held_out else "in sample"
    return f"{dtype}, {n_bytes:,} bytes, error {error} {kind}"


def _ranks(ranks: Any) -> str:
    pairs = set(ranks)
    n_heads = f"{len(ranks)} key head" + ("s" if len(ranks) != 1 else "")
    if len(pairs) == 1:
        return f"ranks {ranks[0]} in {n_heads}"
    low, high = (tuple(f(column) for column in zip(*ranks, strict=True)) for f in (min, max))
    return f"ranks {low} to {high} in {n_heads}"


def _fold(
    maps: dict[str, Array],
    weights: dict[str, Array],
    biases: dict[str, Array | None],
) -> FoldedProjections:
    """Fold the arrays of a basis into weights (heads, E, D) and biases (heads, 1, D), both by name."""
    given = {**weights, **{name: x for name, x in biases.items() if x is not None}}
    backend = resolve(basis=maps["wq"], **given)
    _check_weights(maps, given)
    promoted = promote(backend, allow_complex=False, **given, **maps)
    cast = dict(zip([*given, *maps], promoted.arrays, strict=True))
    wq, wk, wv, uv, c, mu = (cast[name] for name in ("wq", "wk", "wv", "uv", "c", "mu"))
    w_q, w_k, w_v, w_o = (cast[name] for name in ("w_q", "w_k", "w_v", "w_o"))
    n_shared = wq.shape[0] // wk.shape[0]
    xp = backend.xp
    uv, mu_q = (x if n_shared == 1 else xp.repeat(x, n_shared, axis=0) for x in (uv, mu))
    b_q = cast.get("b_q")
    b_k = (cast["b_k"] - c) if "b_k" in cast else -c
    b_v = (cast["b_v"] - mu) if "b_v" in cast else -mu
    b_o = xp.sum(mu_q @ w_o, axis=0)[0, ...]
    folded = (w_q @ wq, w_k @ wk, w_v @ wv, uv @ w_o, b_k @ wk, b_v @ wv)
    w_q, w_k, w_v, w_o, b_k, b_v = promoted.cast_back(backend, *folded)
    if b_q is not None:
        (b_q,) = promoted.cast_back(backend, b_q @ wq)
    (b_o,) = promoted.cast_back(backend, b_o + cast["b_o"] if "b_o" in cast else b_o)
    return FoldedProjections(w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o)


def _check_weights(maps: dict[str, Array], given: dict[str, Array]) -> None:
    """Raise ValueError unless all shapes are those the basis is for."""
    wq, wk, uv = maps["wq"], maps["wk"], maps["uv"]
    if wq.ndim != 3:
        raise ValueError(
            f"a basis to fold must have one set of maps, (Hq, D, r), got {tuple(wq.shape)}; "
            f"fit with pool_batch=True"
        )
    if given["w_q"].ndim != 3:
        raise ValueError(f"w_q must have shape (Hq, E, D), got {tuple(given['w_q'].shape)}")
    n_heads_q, width, _ = wq.shape
    n_heads_k, width_v, n_model = wk.shape[0], uv.shape[-1], given["w_q"].shape[-2]
    right = {
        "w_q": (n_heads_q, n_model, width),
        "w_k": (n_heads_k, n_model, width),
        "w_v": (n_heads_k, n_model, width_v),
        "w_o": (n_heads_q, width_v, n_model),
        "b_q": (n_heads_q, 1, width),
        "b_k": (n_heads_k, 1, width),
        "b_v": (n_heads_k, 1, width_v),
        "b_o": (n_model,),
    }
    for name, x in given.items():
        if tuple(x.shape) != right[name]:
            raise ValueError(f"{name} must have shape {right[name]}, got {tuple(x.shape)}")
