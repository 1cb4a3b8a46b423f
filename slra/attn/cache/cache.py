"""The public cache: keys and values appended token by token, attended to in r dimensions."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._typing import RNG, Array
from slra._validate import check_flag, resolve
from slra.attn.basis import AttentionBasis
from slra.attn.cache import checks
from slra.attn.cache.ask import ask
from slra.attn.cache.drift import follow, remember
from slra.attn.cache.files import load_cache, save_cache
from slra.attn.cache.flow import attend_state, empty_state, read_state, select_state, store
from slra.attn.cache.prefix import fit_prefix
from slra.attn.cache.settings import check_settings, maps_of
from slra.attn.cache.state import Settings, State, arrays_of, is_host
from slra.decompose._sparse_low_rank_matrix import size_in_bytes

__all__ = ["KVCache"]


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
    capacity : int, optional
        Tokens to make room for; not with "drift". Then memory does not grow, and more tokens are an error. On JAX it
        makes the cache a pytree of static shapes, to be used under ``jax.jit``, where tokens beyond it make every
        output NaN.
    dtype : {"float16", "bfloat16", "float32", "float64"}, optional
        What k', v' and sparse entries are stored in, by default the dtype of the basis. Computed is in the latter.
    scale, softcap : float, optional
        As in `attention`. The default scale is ``1/sqrt(D)`` of the original D.
    rotary : sequence of float, optional
        Frequencies of a rotary position embedding, in radians a token: feature i is paired with feature i + F for
        F frequencies, features from 2F on are left alone. Then `append` and `attend` take keys and queries that are
        not rotated yet, and the cache rotates what it decodes.
    update : {"fixed", "drift"}
        Whether to refit where new tokens do not fit the basis.
    drift_bound : float, optional
        With "drift": the relative error of the output, over the tokens of the window alone and for their own
        queries, beyond which the basis is fitted to the window. It is measured each time the window has been
        replaced, on the worst head, and with ``rotary`` before the rotation. The new basis serves the tokens of the
        window and those to come.
    method : {"output", "scores", "svd"}
        How a refit is done, see `fit_attention`.

    Attributes
    ----------
    lengths : array of int, shape (...,)
        Tokens of each sequence.
    nbytes : int
        Bytes of all arrays held: maps, buffers with the room they have left, exact tokens, indices.
    n_segments : int
        Bases in use.
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
    ``rotary``: all keys are decoded to D features at every step. Keys that were rotated before they were appended
    cost r, but a basis of the same rank fits them less well.

    Query heads that share a key head but not a basis (method "svd") see the sparse entries, and the decoded keys of
    ``rotary`` and `decode`, through the mean of their maps.

    Gradients do not flow into a cache.

    References
    ----------
    The exact first tokens: G. Xiao et al., Efficient streaming language models with attention sinks, arXiv:2309.17453.

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

    _state: State
    _settings: Settings

    def __init__(
        self,
        basis: AttentionBasis,
        *,
        batch: tuple[int, ...] | None = None,
        window: int = 0,
        n_sink: int = 0,
        n_sparse: int = 0,
        capacity: int | None = None,
        dtype: str | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        rotary: Sequence[float] | Array | None = None,
        update: str = "fixed",
        drift_bound: float | None = None,
        method: str = "output",
    ) -> None:
        backend, settings = check_settings(
            basis,
            batch=batch,
            window=window,
            n_sink=n_sink,
            n_sparse=n_sparse,
            capacity=capacity,
            dtype=dtype,
            scale=scale,
            softcap=softcap,
            rotary=rotary,
            update=update,
            drift_bound=drift_bound,
            method=method,
        )
        maps = maps_of(basis, settings.n_batch, backend)
        self._settings = settings
        self._state = empty_state(maps, basis.error, settings, backend)
        backend.make_pytree(KVCache, _take_apart, _put_together)

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
            As in `fit_attention`.
        rtol : float, optional
            Relative error of the output to stay within, for every query head. It is checked on up to 64 steps of
            the prefix, the last one among them, against exact keys and values, with all that the cache does to
            them; where it is exceeded, ranks are raised. Not under `jax.jit`.
        method, pool_batch, rng
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
        """
        if "batch" in options:
            raise TypeError("batch must be left out of from_prefix: it is that of k")
        fit: dict[str, Any] = {"rtol": rtol, "method": method, "pool_batch": pool_batch, "rng": rng}
        fit |= {name: options[name] for name in ("scale", "softcap") if name in options}
        fit |= {"is_causal": True, "enable_gqa": True}

        def make(basis: AttentionBasis) -> tuple[State, Settings]:
            cache = cls(basis, batch=tuple(k.shape[:-3]), method=method, **options)
            cache = cache.append(k, v, q=q)
            return cache._state, cache._settings

        return _made(*fit_prefix((q, k, v), rank, fit, make))

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
            Queries of the same tokens. Needed with ``update="drift"``, ignored otherwise.
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
        backend, settings, state = self._table(), self._settings, self._state
        checks.check_can_grow(state, settings)
        k, v, q = checks.check_tokens(k, v, q, state, settings, backend)
        counts = checks.check_lengths(lengths, k.shape[-2], state, settings, backend)
        checks.check_room(state, k.shape[-2], counts, settings)
        with backend.ignore_overflow():
            if k.shape[-2]:
                state = store(state, k, v, counts, settings, backend)
                if state.recent is not None:
                    state = state._replace(recent=remember(state.recent, q, settings, backend))
                    state = follow(state, settings, backend)
        if backend.is_functional:
            return _made(state, settings)
        self._state = state
        return self

    @isolated
    def attend(
        self,
        q: Array,
        *,
        mask: Array | None = None,
        is_causal: bool = True,
        lengths: Array | None = None,
        return_lse: bool = False,
    ) -> Array | tuple[Array, Array]:
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
        lengths : array of int, shape (...,), optional
            How many of the ``m`` queries each sequence has, the first ones: as given to `append`. The others get 0.
        return_lse : bool
            Whether to return the log-sum-exp of the scores too.

        Returns
        -------
        out : array, shape (..., Hq, m, Dv)
            In the dtype of ``q``. A query that attends to nothing gets 0.
        lse : array, shape (..., Hq, m)
            Only with ``return_lse``: natural logarithm, in the dtype computed in.

        Raises
        ------
        TypeError
            If ``q`` is not real floating, or comes from another library than the basis.
        ValueError
            If shapes do not fit.

        Notes
        -----
        With ``m`` queries that are many, the whole prompt say, exact attention on its keys and values is as fast and
        exact. Here memory is in proportion to ``m n`` where a mask is needed.
        """
        backend, settings, state = self._table(), self._settings, self._state
        check_flag(return_lse, "return_lse")
        work, mask = checks.check_queries(q, mask, is_causal, state, settings, backend)
        counts = checks.check_lengths(lengths, q.shape[-2], state, settings, backend)
        asked = ask(work, mask, counts, state.lengths, is_causal=is_causal, backend=backend)
        with backend.ignore_overflow():
            out, lse = attend_state(state, asked, settings, backend)
            xp = backend.xp
            out = xp.astype(xp.reshape(out, (*q.shape[:-1], settings.width_v)), q.dtype, copy=False)
        return (out, xp.reshape(lse, q.shape[:-1])) if return_lse else out

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
        backend, settings = self._table(), self._settings
        with backend.ignore_overflow():
            k, v = read_state(self._state, settings, backend)
        lead = (*settings.batch, settings.n_heads)
        k, v = (backend.xp.reshape(x, (*lead, *x.shape[2:])) for x in (k, v))
        return k, v

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
        backend, settings = self._table(), self._settings
        chosen = checks.check_selection(indices, settings, backend)
        state = select_state(self._state, chosen, settings, backend)
        return _made(state, settings._replace(batch=(len(chosen),)))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the cache to a file, with a checksum (needs the package safetensors).

        Parameters
        ----------
        path : str or path-like
            Written as it is, no suffix is added. Room that is left is not written.
        """
        save_cache(path, self._state, self._settings, self._table())

    @classmethod
    def load(cls, path: str | PathLike[str], *, like: Array | None = None) -> "KVCache":
        """Read a cache written by `save`, to attend or append to; nothing in the file is executed.

        Parameters
        ----------
        path : str or path-like
        like : array, optional
            Whose library and device the arrays get; NumPy by default.

        Returns
        -------
        KVCache

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is cut short, changed, or not what `save` writes; or if it holds a dtype that the library of
            ``like`` does not have (bfloat16 on NumPy).
        """
        backend = resolve(like=np.empty(0) if like is None else like)
        state, settings = load_cache(path, np.empty(0) if like is None else like, backend)
        backend.make_pytree(KVCache, _take_apart, _put_together)
        return _made(state, settings)

    @property
    def lengths(self) -> Array:
        """Tokens of each sequence, shape (...,)."""
        lengths = self._state.lengths
        if is_host(lengths):
            return lengths.reshape(self._settings.batch).copy()
        return self._table().xp.reshape(lengths, self._settings.batch)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""
        backend = self._table()
        return sum(
            int(x.nbytes) if isinstance(x, np.ndarray) else size_in_bytes(backend, x)
            for x in arrays_of(self._state)
        )

    @property
    def n_segments(self) -> int:
        """Bases in use."""
        return len(self._state.segments)

    @property
    def error(self) -> Array | None:
        """Relative error of the output on the data of the fit, shape (..., Hq)."""
        return self._state.error

    def __repr__(self) -> str:
        settings = self._settings
        return (
            f"KVCache(batch={settings.batch}, heads={settings.n_heads}, rank={settings.rank}, "
            f"window={settings.window}, n_sink={settings.n_sink}, n_segments={self.n_segments})"
        )

    def _table(self) -> Backend:
        return resolve(basis=self._state.segments[0].maps.wk)


def _made(state: State, settings: Settings) -> KVCache:
    """Make a cache of what it is made of."""
    cache = object.__new__(KVCache)
    cache._state, cache._settings = state, settings
    return cache


def _take_apart(cache: KVCache) -> tuple[tuple[State], Settings]:
    return (cache._state,), cache._settings


def _put_together(settings: Settings, children: tuple[State]) -> KVCache:
    return _made(children[0], settings)
