"""The public cache: keys and values appended token by token, attended to in r dimensions."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._files import File
from slra._typing import RNG, Array, DType
from slra._validate import check_flag, resolve
from slra.attn.basis import AttentionBasis
from slra.cache._checks import (
    check_crop,
    check_heads,
    check_lengths,
    check_options,
    check_queries,
    check_room,
    check_selection,
    check_tokens,
)
from slra.cache._contents import Contents
from slra.cache._files import load_contents, save_contents
from slra.cache._layout import named_arrays, on_host, register
from slra.cache._prefix import fit_choosing, fit_prefix
from slra.cache._segment import FloatRows, maps_of
from slra.decompose._sparse_low_rank_matrix import size_in_bytes

__all__ = ["ErrorBound", "KVCache"]


class ErrorBound(NamedTuple):
    """How far tokens of a cache in bits may be from what came, in Euclidean norm.

    Attributes
    ----------
    keys : array, shape (..., Hkv)
        Of each key before any rotation; a score ``scale * q @ k`` is off by at most ``scale * norm(q)`` times that.
    values : array, shape (..., Hkv)
        Of each value.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> cache = slra.KVCache(slra.fit_attention(q, k, v, 8), bits=4).append(k, v)
    >>> keys, values = cache.decode()
    >>> bool(np.all(np.linalg.norm(keys - k, axis=-1) <= cache.error_bound.keys[:, None]))
    True
    """

    keys: Array
    values: Array


class KVCache:
    r"""Keys and values of a decoder in the dimensions of an `AttentionBasis`, and attention on them.

    Stored are :math:`k' = (k - c) W_k` and :math:`v' = (v - \mu) W_v`, r numbers a token instead of D. Exactly kept
    are the first tokens and the last ones. `attend` answers for all of them in one softmax.

    Parameters
    ----------
    basis : AttentionBasis
        Fitted with heads, on calibration data (``pool_batch=True``) or on the beginning of the sequence, as
        `from_prefix` does. Its library, device and dtype are those of the cache.
    batch : tuple of int, optional
        Leading axes before the heads. By default those of the basis, none where it was pooled.
    window : int
        How many of the last tokens are exact, in a ring.
    n_sink : int
        How many of the first tokens are exact for good.
    n_sparse : int
        How many entries of each key and each value are stored beside the low rank: the largest of what it leaves.
    bits : float or (float, float), optional
        Average bits, 0.5 to 10, that a number of the keys and values (of D + Dv a token) takes, headers counted; a
        pair for keys and for values. Then coordinates of the basis' ``coding`` are stored, all of them whatever its
        rank, rounded to integers of as many bits as each block of 16 tokens needs. Where the basis was fitted
        ``across_heads``, all heads share coordinates: fewer bits do, and a step takes Hkv times the products. The first
        append fixes the steps, if it brings 256 tokens, and otherwise the fit; ``bits`` of the cache says what came of
        it. None: floats.
    rtol : float, optional
        Instead of ``bits``: the largest error of a token's coordinates, keys and values each, relative to the root
        mean square of those of the fit.
    n_top : int or sequence of int, optional
        How many keys, of those in the coordinates of the basis, a query reads in all of them; or as many as there are
        key heads, one for each, a head being exact where it is no less than the tokens there are. The leading
        ``rank_index`` coordinates of all keys choose, one set for the query heads that share a key head, and are what
        counts of the other keys and of their values; all meet in one softmax. So the basis may be of rank D: what is
        stored then is exact. With ``bits`` or ``rtol`` leading coordinates are those of the coding, and are stored
        once more, a byte each; only those chosen are decoded, and a block that is not full is exact. Not with
        ``n_sparse``, ``rotary``, ``drift_bound``, or a basis fitted ``across_heads``.
    top_p : float, optional
        Instead of ``n_top``, or besides: as few keys as hold this share of the softmax, exact tokens counted, as far
        as the leading coordinates tell, on average over the query heads that share a key head.
    rank_index : int or (int, int), optional
        Coordinates of each key that choose, and of each value that is not chosen; an int is both. By default D/4 and
        Dv/4, or with ``index="query"`` D/8 and Dv/16.
    index : {"leading", "query"}
        Which coordinates of the keys choose: the leading ones of the basis; or the features that are largest in the
        query, of the sum over the query heads that share a key head. Then keys are stored as they came, twice: by
        feature, and by token; not with ``bits`` or ``rtol``. On decoders that rotate by position this errs far less for
        as much read.
    capacity : int, optional
        Tokens to make room for; not with ``drift_bound``. Then memory does not grow, and more tokens are an error. On
        JAX it makes the cache a pytree of static shapes, to be used under ``jax.jit``, where tokens beyond it make
        every output NaN.
    dtype : {"float16", "bfloat16", "float32", "float64"} or dtype, optional
        What k', v' and sparse entries are stored in. By default the dtype of the keys and values that come, but no
        wider than that of the basis, which is computed in; where shapes are static (JAX, ``capacity``) the latter.
    scale, softcap : float, optional
        As in `attention`. The default scale is ``1/sqrt(D)`` of the original D.
    rotary : sequence of float, optional
        Frequencies of a rotary position embedding, in radians a token: feature i is paired with feature i + F for
        F frequencies, features from 2F on are left alone. Then `append` and `attend` take keys and queries that are
        not rotated yet, and the cache rotates what it decodes.
    drift_bound : float, optional
        The relative error of the output, over the tokens of the window alone and for their own queries, beyond which
        the basis is fitted anew, to the window. It is measured each time the window has been replaced, on the worst
        head, and with ``rotary`` before the rotation. The new basis serves the tokens of the window and those to
        come. By default the basis stays.
    method : {"output", "scores", "svd"}
        How a refit is done, see `fit_attention`.

    Attributes
    ----------
    lengths : array of int, shape (...,)
        Tokens of each sequence.
    nbytes : int
        Bytes of all arrays held: maps, buffers with the room they have left, exact tokens, indices.
    nbytes_exact : int
        Bytes that the keys and values of the tokens held would take as they came.
    n_segments : int
        Bases in use.
    bits : float
        Bits that a number of the keys and values takes, of those that are neither sinks nor wait for their block to be
        full; NaN where there is none. What queries choose by is counted. Maps, and room that is left, are not counted
        here but in ``nbytes``.
    error_bound : ErrorBound
        With ``bits`` or ``rtol``: how far any key and any value may be from what came.
    error : array, shape (..., Hq), or None
        What `AttentionBasis` predicted, or `from_prefix` measured.

    Raises
    ------
    TypeError
        If ``basis`` is not an AttentionBasis of arrays in memory with heads, or an option is of a wrong type.
    ValueError
        If an option is out of range, or options do not go together.

    Notes
    -----
    One decoding step over n tokens reads n (r + r_v) numbers a key head where exact attention reads n (D + Dv). Where
    reading is the limit, as it is for one query, that is the gain in time too. ``dtype`` and ``n_sparse`` save bytes
    but not time: half precision is widened, and sparse entries are computed with as D more features. So does
    ``rotary``: all keys are decoded to D features at every step. With ``n_top`` a step reads ``rank_index`` numbers of
    each key and each value, and the others of the few chosen. Keys that were rotated before they were appended
    cost r, but a basis of the same rank fits them less well.

    In bits every coordinate of every token is within half a step, whatever the text: nothing saturates, and what does
    not fit in 14 bits, or is not finite, stays as it came. Integers are decoded at each step to all D dimensions. On
    JAX with ``capacity``, where shapes are static, each number takes a byte, and each token has a step of its own.

    Query heads that share a key head but not a basis (method "svd") see the sparse entries, and the decoded keys of
    ``rotary`` and `decode`, through the mean of their maps.

    Gradients do not flow into a cache.

    References
    ----------
    The exact first tokens: G. Xiao et al., Efficient streaming language models with attention sinks, arXiv:2309.17453.
    Keys chosen by leading coordinates: P. Singhania et al., Loki, arXiv:2406.02542; by the largest of the query:
    L. Ribar et al., SparQ, arXiv:2312.04985; by mass: C. Lin et al., Twilight, arXiv:2502.02770. They drop the others.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> cache = slra.KVCache(slra.fit_attention(q, k, v, 4), window=16)
    >>> cache = cache.append(k[:, :49], v[:, :49])
    >>> cache = cache.append(k[:, 49:], v[:, 49:])
    >>> cache.attend(q[:, 49:]).shape
    (2, 1, 8)
    >>> int(cache.lengths)
    50
    """

    _contents: Contents

    def __init__(
        self,
        basis: AttentionBasis,
        *,
        batch: tuple[int, ...] | None = None,
        window: int = 0,
        n_sink: int = 0,
        n_sparse: int = 0,
        bits: float | tuple[float, float] | None = None,
        rtol: float | None = None,
        n_top: int | Sequence[int] | None = None,
        top_p: float | None = None,
        rank_index: int | tuple[int, int] | None = None,
        index: str = "leading",
        capacity: int | None = None,
        dtype: str | DType | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        rotary: Sequence[float] | Array | None = None,
        drift_bound: float | None = None,
        method: str = "output",
    ) -> None:
        layout = check_options(
            basis,
            batch=batch,
            window=window,
            n_sink=n_sink,
            n_sparse=n_sparse,
            bits=bits,
            rtol=rtol,
            n_top=n_top,
            top_p=top_p,
            rank_index=rank_index,
            index=index,
            capacity=capacity,
            dtype=dtype,
            scale=scale,
            softcap=softcap,
            rotary=rotary,
            drift_bound=drift_bound,
            method=method,
        )
        self._contents = Contents.empty(layout, maps_of(basis, layout), basis.error)
        _register(layout.backend)

    @classmethod
    @isolated
    def from_prefix(
        cls,
        q: Array,
        k: Array,
        v: Array,
        rank: int | tuple[int, int] | None = None,
        *,
        rtol: float | None = None,
        method: str = "output",
        pool_batch: bool = True,
        across_heads: bool = False,
        rng: RNG = None,
        **options: Any,
    ) -> "KVCache":
        """Fit a basis to the beginning of a sequence, and make a cache that holds it.

        Parameters
        ----------
        q : array, shape (..., Hq, n, D)
            Queries of the prefix, each of which sees the tokens up to its own.
        k : array, shape (..., Hkv, n, D)
        v : array, shape (..., Hkv, n, Dv)
        rank : int or (int, int), optional
            As in `fit_attention`. With ``bits`` it plays no part, nor is there ``rtol``. With ``n_top`` or ``top_p`` it
            is what is stored, all there is by default.
        rtol : float, optional
            Relative error of the output to stay within, for every query head. It is checked on up to 64 steps of
            the prefix, the last one among them, against exact keys and values, with all that the cache does to
            them; where it is exceeded, ranks are raised. With ``n_top="auto"`` instead each key head gets the fewest
            keys that keep to it, by a margin for what comes, and ``rank_index`` and, unless given, ``index`` are what
            makes the step read least: found with a basis of the first half of the prefix on steps of the second. Not
            under `jax.jit`.
        method, pool_batch, across_heads, rng
            As in `fit_attention`; by default one basis serves all leading axes.
        **options
            As for `KVCache`, but for ``batch``, which is that of ``k``.

        Returns
        -------
        KVCache
            With the measured error as ``error``, if ``rtol`` was given.

        Raises
        ------
        TypeError, ValueError
            As in `fit_attention` and for `KVCache`; ValueError where ``rtol`` is exceeded at full rank too, which
            half precision or a cap on the rank may do.

        Examples
        --------
        >>> import numpy as np
        >>> import slra
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
        >>> cache = slra.KVCache.from_prefix(q, k, v, rtol=0.1)
        >>> bool(np.all(cache.error <= 0.1))
        True
        >>> choosing = slra.KVCache.from_prefix(q, k, v, rtol=0.3, n_top="auto")
        >>> bool(np.all(choosing.error <= 0.3))
        True
        """
        if "batch" in options:
            raise TypeError("batch must be left out of from_prefix: it is that of k")
        if options.get("bits") is not None:
            if rtol is not None:
                raise ValueError(
                    f"rtol must be None with bits, which ranks do not change, got {rtol}"
                )
            rank = 1
        is_auto, chooses = options.get("n_top") == "auto", False
        if is_auto:
            if rtol is None or options.get("top_p") or options.get("rank_index"):
                raise ValueError(
                    'n_top="auto" must come with rtol, and without top_p and rank_index'
                )
        elif options.get("n_top") is not None or options.get("top_p") is not None:
            if rtol is not None:
                raise ValueError(
                    f'rtol must be None with top_p or n_top unless that is "auto", got {rtol}'
                )
            chooses = True
        fit: dict[str, Any] = {"rtol": rtol, "method": method, "rng": rng}
        fit |= {"pool_batch": pool_batch, "across_heads": across_heads}
        of_both = ("scale", "softcap", "rotary")
        fit |= {name: options[name] for name in of_both if name in options}
        fit |= {"is_causal": True, "enable_gqa": True}

        def make(basis: AttentionBasis, **chosen: Any) -> Contents:
            cache = cls(basis, batch=tuple(k.shape[:-3]), method=method, **options | chosen)
            return cache.append(k, v, q=q)._contents

        if is_auto:
            return _made(fit_choosing((q, k, v), rank, fit, make, options.get("index")))
        if chooses and rank is None and min(k.ndim, v.ndim) > 1:
            rank = min(k.shape[-2:]), min(v.shape[-2:])
        return _made(fit_prefix((q, k, v), rank, fit, make))

    @isolated
    def append(
        self, k: Array, v: Array, *, q: Array | None = None, lengths: Array | None = None
    ) -> "KVCache":
        """Take in the next tokens of every sequence.

        Parameters
        ----------
        k : array, shape (..., Hkv, m, D)
            Keys, real floating, of ``m`` tokens for each sequence.
        v : array, shape (..., Hkv, m, Dv)
            Values.
        q : array, shape (..., Hq, m, D), optional
            Queries of the same tokens. Needed with ``drift_bound``, ignored otherwise.
        lengths : array of int, shape (...,), optional
            How many of the ``m`` tokens each sequence has, the first ones; all by default.

        Returns
        -------
        KVCache
            The cache with these tokens. Where arrays can be written to this is the same object, changed in place; on
            JAX it is another one, and the old one is as it was. ``cache = cache.append(k, v)`` is right for both.

        Raises
        ------
        TypeError
            If an array is not real floating, or comes from another library than the basis.
        ValueError
            If shapes do not fit, the capacity is exceeded, or ``q`` is missing.
        """
        held = self._contents
        k, v, q, dtype = check_tokens(k, v, q, held)
        n_new = k.shape[-2]
        counts = check_lengths(lengths, n_new, held)
        check_room(n_new, counts, held)
        with (same_bits := held.layout.backend.same_bits()), same_bits:
            held = held.append(k, v, counts, q, dtype) if n_new else held
        if held.layout.backend.is_functional:
            return _made(held)
        self._contents = held
        return self

    @isolated
    def attend(
        self,
        q: Array,
        *,
        mask: Array | None = None,
        is_causal: bool = True,
        window: tuple[int | None, int | None] | None = None,
        sinks: Array | None = None,
        alibi: Array | None = None,
        lengths: Array | None = None,
        return_lse: bool = False,
        return_rest: bool = False,
    ) -> Array | tuple[Array, ...]:
        """Attention of one or a few queries to the tokens held.

        Parameters
        ----------
        q : array, shape (..., Hq, m, D)
            Queries of the last ``m`` tokens of each sequence.
        mask : array, optional
            Broadcastable to (..., Hq, m, n), n being the largest of ``lengths`` or the static capacity; column j is
            token j. Boolean: True attends. Floating: added to the scaled scores.
        is_causal : bool
            Whether a query sees no token after its own; otherwise it sees all. No difference for one query.
        window : (int or None, int or None), optional
            How many tokens a query sees before and after its own, as in `attention`; not the ``window`` of the cache,
            which says what is exact. Tokens before it stay in the cache and are not read.
        sinks, alibi : array, shape (..., Hq), optional
            As in `attention`.
        lengths : array of int, shape (...,), optional
            How many of the ``m`` queries each sequence has, the first ones: as given to `append`. The others get 0.
        return_lse : bool
            Whether to return the log-sum-exp of the scores too.
        return_rest : bool
            Whether to return what was left to the leading coordinates too, in a cache with ``n_top`` or ``top_p``.

        Returns
        -------
        out : array, shape (..., Hq, m, Dv)
            In the dtype of ``q``. A query that attends to nothing gets 0.
        lse : array, shape (..., Hq, m)
            Only with ``return_lse``: natural logarithm, in the dtype computed in.
        rest : array, shape (..., Hq, m)
            Only with ``return_rest``, the last one: share of the softmax that keys not chosen have, by their leading
            coordinates. 0 says that all that was attended to was read in all coordinates.

        Raises
        ------
        TypeError
            If ``q`` is not real floating, or comes from another library than the basis.
        ValueError
            If shapes do not fit, or ``return_rest`` is asked of a cache whose queries do not choose.

        Notes
        -----
        With ``m`` queries that are many, the whole prompt say, exact attention on its keys and values is as fast and
        exact. Here memory is in proportion to ``m n`` where a mask is needed.
        """
        held = self._contents
        check_flag(return_lse, "return_lse")
        if check_flag(return_rest, "return_rest") and held.layout.rank_index is None:
            raise ValueError("return_rest must be False in a cache without n_top or top_p")
        queries = check_queries(q, mask, lengths, is_causal, window, alibi, held)
        sinks = check_heads(sinks, "sinks", held)
        xp = held.layout.xp
        with (same_bits := held.layout.backend.same_bits()), same_bits:
            out, lse, rest = held.attend(queries._replace(sinks=sinks))
            rest = xp.zeros_like(lse) if return_rest and rest is None else rest
            out = xp.reshape(out, (*q.shape[:-1], held.layout.width_v))
            out = xp.astype(out, q.dtype, copy=False)
        asked = [x for x, is_asked in ((lse, return_lse), (rest, return_rest)) if is_asked]
        return (out, *(xp.reshape(x, q.shape[:-1]) for x in asked)) if asked else out

    @isolated
    def decode(self) -> tuple[Array, Array]:
        """Keys and values that the cache stands for, in all dimensions.

        Returns
        -------
        k : array, shape (..., Hkv, n, D)
            As they were appended, before any rotation; zero beyond the length of a sequence. ``n`` is the largest
            of ``lengths``, or the static capacity.
        v : array, shape (..., Hkv, n, Dv)
        """
        layout = self._contents.layout
        with (same_bits := layout.backend.same_bits()), same_bits:
            k, v = self._contents.decode()
        return layout.unbatched(k), layout.unbatched(v)

    @isolated
    def select(self, indices: Array | Sequence[int]) -> "KVCache":
        """Make a cache of some of the sequences, in any order and as often as wanted, as beam search does.

        Parameters
        ----------
        indices : array or sequence of int, shape (n,)
            Which sequences, along the one batch axis; known values, not traced ones.

        Returns
        -------
        KVCache
            Of batch ``(n,)``. This one is as it was.

        Raises
        ------
        TypeError
            If ``indices`` are not integers.
        ValueError
            If the cache does not have one batch axis, or an index is out of range.
        """
        return _made(self._contents.select(check_selection(indices, self._contents.layout)))

    @isolated
    def crop(self, n: int | Array) -> "KVCache":
        """Forget all but the first tokens, as speculative decoding does with those that were refused.

        Parameters
        ----------
        n : int or array of int, shape (...,)
            Tokens that each sequence keeps, at most; it keeps all where it has no more.

        Returns
        -------
        KVCache
            As `append` does: where arrays can be written to the same object. Tokens that are in the window again are
            what the cache stands for, not what came.

        Raises
        ------
        TypeError
            If ``n`` is not an int or integers.
        ValueError
            If it is negative, of a wrong shape, or differs between sequences with ``drift_bound``.
        """
        held = self._contents
        lengths = check_crop(n, held)
        with (same_bits := held.layout.backend.same_bits()), same_bits:
            held = held.crop(lengths)
        if held.layout.backend.is_functional:
            return _made(held)
        self._contents = held
        return self

    @isolated
    def save(
        self,
        path: File,
        *,
        bits: float | tuple[float, float] | None = None,
        basis: AttentionBasis | None = None,
    ) -> None:
        """Write the cache to a file, with a checksum (needs the package safetensors).

        Parameters
        ----------
        path : str, path-like or file opened for bytes
            Written as it is, no suffix is added. Room that is left is not written.
        bits : float or (float, float), optional
            Park a cache that has bits: 0.5 to 10 bits a number of the keys and values, a pair for keys and for values,
            under an entropy code (needs the package constriction: extra ``codec``). Coordinates are
            rounded once more, by one step for each head that is no finer than that of the cache: where there are bits
            enough, what was rounded before stays as it is. Counted is the code with all that says how it is to be
            read, where that is a tenth at most; not maps, exact tokens, and some 2.5 KB that describe the file. What is
            loaded is a cache in bits as any other, this one is as it was.
        basis : AttentionBasis, optional
            The one that a cache in bits was made with: its maps, which may take more than a thousand tokens, are then
            left out, and `load` must be given it too.

        Raises
        ------
        ImportError
            If a package is missing.
        OSError
            If it cannot be written; a file that was there is then as it was.
        TypeError, ValueError
            If ``bits`` are not such numbers, or the cache stores floats or has static shapes; if ``basis`` is another
            one.
        """
        save_contents(path, self._contents, bits, basis)

    @classmethod
    @isolated
    def load(
        cls, path: File, *, like: Array | None = None, basis: AttentionBasis | None = None
    ) -> "KVCache":
        """Read a cache written by `save`, to attend or append to; nothing in the file is executed.

        Parameters
        ----------
        path : str, path-like or file opened for bytes
        like : array, optional
            Whose library and device the arrays get; NumPy by default.
        basis : AttentionBasis, optional
            For a file that was saved with it: the same one, of any library.

        Returns
        -------
        KVCache

        Raises
        ------
        OSError
            If there is no such file, or it is a folder or a pipe.
        ValueError
            If the file is cut short, changed, or not what `save` writes; of a parked one it says which tokens are
            damaged. Or if it holds a dtype that the library of ``like`` does not have (bfloat16 on NumPy).
        ImportError
            If a package is missing: safetensors, or constriction for a parked one.
        """
        like = np.empty(0) if like is None else like
        backend = resolve(like=like)
        contents = load_contents(path, like, backend, basis)
        _register(backend)
        return _made(contents)

    @property
    def lengths(self) -> Array:
        """Tokens of each sequence, shape (...,)."""
        layout, lengths = self._contents.layout, self._contents.lengths
        if on_host(lengths):
            return lengths.reshape(layout.batch).copy()
        return layout.xp.reshape(lengths, layout.batch)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""
        backend = self._contents.layout.backend
        return sum(
            int(x.nbytes) if isinstance(x, np.ndarray) else size_in_bytes(backend, x)
            for x in named_arrays(self._contents).values()
        )

    @property
    def nbytes_exact(self) -> int:
        """Bytes of the keys and values of as many tokens as they came, those of short sequences padded."""
        layout = self._contents.layout
        n_numbers = layout.n_batch * layout.n_heads * (layout.width + layout.width_v)
        bits = layout.xp.finfo(self._contents.exact.k.dtype).bits
        return self._contents.n_tokens * n_numbers * int(bits) // 8

    @property
    def n_segments(self) -> int:
        """Bases in use."""
        return len(self._contents.segments)

    @property
    def bits(self) -> float:
        """Bits that a stored number of the keys and values takes, on average."""
        layout = self._contents.layout
        if not layout.is_coded:
            bits = layout.xp.finfo(self._contents.segments[-1].rows.dtype).bits
            return float(bits * sum(layout.rank) / (layout.width + layout.width_v))
        rows = [segment.rows for segment in self._contents.segments]
        counted = [one.counted() for one in rows if not isinstance(one, FloatRows)]
        bits, numbers = (sum(column) for column in zip(*counted, strict=True))
        return bits / numbers if numbers else math.nan

    @property
    def error_bound(self) -> "ErrorBound":
        """How far any key, and any value, may be from what came."""
        held, xp = self._contents, self._contents.layout.xp
        if not held.layout.is_coded:
            raise AttributeError(
                "error_bound is that of a cache with bits or rtol: ranks have none"
            )
        bounds = [segment.error_bound() for segment in held.segments]
        keys, values = (functools.reduce(xp.maximum, one) for one in zip(*bounds, strict=True))
        shape = (*held.layout.batch, held.layout.n_heads)
        return ErrorBound(xp.reshape(keys, shape), xp.reshape(values, shape))

    @property
    def error(self) -> Array | None:
        """Relative error of the output on the data of the fit, shape (..., Hq)."""
        return self._contents.error

    def __repr__(self) -> str:
        layout, held = self._contents.layout, self._contents
        heads = f"{layout.n_query_heads} on {layout.n_heads}"
        stored = f"bits={self.bits:.3g}" if layout.is_coded else f"rank={layout.rank}"
        names = ("n_top", "top_p", "rank_index")
        given = {name: getattr(layout, name) for name in names}
        chosen = "".join(f"{name}={x}, " for name, x in given.items() if x is not None)
        return (
            f"KVCache(batch={layout.batch}, n_tokens={held.n_tokens}, heads={heads}, "
            f"D={layout.width}, Dv={layout.width_v},\n"
            f"        {stored}, window={layout.window}, n_sink={layout.n_sink}, "
            f"n_sparse={layout.n_sparse}, {chosen}n_segments={self.n_segments},\n"
            f"        dtype={held.segments[-1].rows.dtype}, nbytes={self.nbytes}, nbytes_exact={self.nbytes_exact})"
        )


def _made(contents: Contents) -> KVCache:
    """Make a cache of what it holds."""
    cache = object.__new__(KVCache)
    cache._contents = contents
    return cache


def _register(backend: Backend) -> None:
    """Let transformations see through caches."""
    register(backend)
    backend.make_pytree(KVCache, _take_apart, _put_together)


def _take_apart(cache: KVCache) -> tuple[tuple[Contents], None]:
    return (cache._contents,), None


def _put_together(_: None, children: tuple[Contents]) -> KVCache:
    return _made(children[0])
