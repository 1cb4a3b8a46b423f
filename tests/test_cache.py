"""The cache against attention on whole matrices of what it stands for, in double precision."""

import dataclasses
import doctest
import functools
import gc
import io
import json
import sys
from importlib.util import find_spec

import array_api_compat as compat
import array_api_compat.numpy as numpy_xp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import slra
from slra._backends import backend_of
from slra._backends import numpy as numpy_backend
from slra._backends.standard.rows import runs
from slra.attn import chosen as choosing
from slra.cache import _layout
from slra.cache import kv_cache as module
from tests.backends import structure_to_xp, to_numpy, to_xp
from tests.naive_attention import SINKS, SLOPES, decaying, naive_attention


# JAX compiles every operation anew for every shape: there, only the cases that take another path than elsewhere.
def skip_most_on_jax(xp, case=None, kept="window and sinks"):
    if compat.is_jax_namespace(xp) and case != kept:
        pytest.skip("takes the same path on JAX as elsewhere, and long to compile")


EAGER = pytest.mark.eager_only(
    "a cache writes to arrays in memory; under jit it goes in and out as a whole, with a capacity"
)
D, DV, HQ, HK = 8, 6, 4, 2
FREQUENCIES = (1.0, 0.3, 0.05)


def tokens(n=40, seed=0, batch=(), dtype="float64"):
    return decaying(seed, heads=HQ, heads_k=HK, n_q=n, n_k=n, d=D, d_v=DV, batch=batch, dtype=dtype)


@functools.cache
def basis_of(rank, method="output", across_heads=False):
    q, k, v = tokens(60, seed=9)
    options = {"method": method, "across_heads": across_heads, "enable_gqa": True}
    return slra.fit_attention(q, k, v, rank, **options)


def moved(basis, xp):
    """The basis with arrays of another library."""
    arrays = {
        name: to_xp(xp, np.ascontiguousarray(getattr(basis, name)))
        for name in ("wq", "wk", "wv", "uv", "c", "mu", "error")
    }
    coding = type(basis.coding)(*(to_xp(xp, np.ascontiguousarray(x)) for x in basis.coding))
    return slra.AttentionBasis(**arrays, ranks=basis.ranks, coding=coding)


def rotated(x, frequencies=FREQUENCIES):
    """Rotary embedding by complex numbers, features i and i + F as real and imaginary part."""
    n = len(frequencies)
    turn = np.exp(1j * np.arange(x.shape[-2])[:, None] * np.asarray(frequencies))
    z = (x[..., :n] + 1j * x[..., n : 2 * n]) * turn
    return np.concatenate([z.real, z.imag, x[..., 2 * n :]], axis=-1)


def kept_entries(x, n):
    """x with all but the n largest entries of each row set to zero."""
    place = np.argsort(np.argsort(-np.abs(x), axis=-1), axis=-1)
    return np.where(place < n, x, 0)


def stood_for(k, v, basis, window, n_sink, n_sparse):
    """Keys (one set for each query head) and values that a cache of these tokens stands for."""
    k, v = (np.repeat(x, HQ // HK, axis=-3) for x in (k, v))
    wk, wv, uv, c, mu = (
        np.repeat(getattr(basis, x), HQ // HK, axis=0) for x in ("wk", "wv", "uv", "c", "mu")
    )
    low_k = (k - c) @ wk @ basis.wq.swapaxes(-1, -2) + c
    low_v = (v - mu) @ wv @ uv + mu
    low_k, low_v = (
        low_k + kept_entries(k - low_k, n_sparse),
        low_v + kept_entries(v - low_v, n_sparse),
    )
    place = np.arange(k.shape[-2])
    is_exact = ((place < n_sink) | (place >= k.shape[-2] - window))[:, None]
    return np.where(is_exact, k, low_k), np.where(is_exact, v, low_v)


def expected(q, k, v, basis, *, n_queries, mask=None, is_causal=True, **options):
    """Attention of the last queries of one sequence, on whole matrices."""
    parts = [options.pop(name, 0) for name in ("window", "n_sink", "n_sparse")]
    k, v = stood_for(k, v, basis, *parts)
    if frequencies := options.pop("rotary", None):
        q, k = rotated(q, frequencies), rotated(k, frequencies)
    q = q[..., q.shape[-2] - n_queries :, :]
    return naive_attention(q, k, v, mask=mask, is_causal=is_causal, **options)


def appended(cache, k, v, sizes, q=None):
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        more = {} if q is None else {"q": q[..., rows, :]}
        cache = cache.append(k[..., rows, :], v[..., rows, :], **more)
        start += size
    return cache


OPTIONS = {
    "plain": {},
    "window and sinks": {"window": 7, "n_sink": 3},
    "softcap": {"window": 4, "softcap": 2.0, "scale": 0.5},
    "sparse": {"n_sink": 2, "n_sparse": 3},
    "sparse, softcap": {"window": 2, "n_sparse": 2, "softcap": 3.0},
    "rotary": {"window": 5, "n_sink": 2, "rotary": FREQUENCIES},
    "rotary, sparse, softcap": {"window": 5, "rotary": FREQUENCIES, "n_sparse": 2, "softcap": 2.0},
}


@EAGER
@pytest.mark.parametrize("case", list(OPTIONS))
def test_it_is_attention_to_what_it_stands_for(xp, case):
    skip_most_on_jax(xp, case)
    options = OPTIONS[case]
    q, k, v = tokens()
    basis = basis_of((4, 3))
    cache = slra.KVCache(moved(basis, xp), **options)
    cache = appended(cache, to_xp(xp, k), to_xp(xp, v), [20, 1, 0, 9, 1, 9])
    rows = to_xp(xp, q[..., -9:, :])
    out, lse = cache.attend(rows, return_lse=True)
    right, right_lse = expected(q, k, v, basis, n_queries=9, **options)
    np.testing.assert_allclose(to_numpy(out), right, atol=1e-12)
    np.testing.assert_allclose(to_numpy(lse), right_lse, atol=1e-12)
    assert compat.array_namespace(out) is compat.array_namespace(rows)


STEPS = {
    "window": {"window": (9, 0)},
    "both sides": {"window": (3, 1), "is_causal": False},
    "sinks": {"sinks": np.asarray([0.5, -1.0, 2.0, 0.0])},
    "alibi": {"alibi": np.asarray([0.5, 0.25, 0.1, 1.0])},
    "everything": {
        "window": (12, None),
        "sinks": np.asarray([[0.5, -1.0, 2.0, 0.0], [0.0, 0.1, 0.2, 0.3]]),
        "alibi": np.asarray([0.5, 0.25, 0.1, 1.0]),
        "mask": np.arange(40) % 3 > 0,
    },
}


@EAGER
@pytest.mark.parametrize("case", list(STEPS))
def test_steps_with_windows_sinks_and_slopes(xp, case):
    """At full rank, of a cache with exact tokens and segments, a softcap, and one dtype or a narrower one."""
    skip_most_on_jax(xp, case, kept="everything")
    q, k, v = tokens(batch=(2,))
    step = {"is_causal": True, **STEPS[case]}
    if "mask" in step:
        step["mask"] = np.broadcast_to(step["mask"], (3, 40)).copy()
    right, right_lse = naive_attention(
        q[..., -3:, :], k, v, enable_gqa=True, softcap=2.0, causal_align="bottom_right", **step
    )
    basis = moved(basis_of((D, DV)), xp)
    for options in ({}, {"window": 5, "n_sink": 2}, {"n_sparse": 2, "capacity": 40}):
        cache = slra.KVCache(basis, batch=(2,), softcap=2.0, **options)
        cache = appended(cache, to_xp(xp, k), to_xp(xp, v), [30, 10])
        given = structure_to_xp(xp, step)
        out, lse = cache.attend(to_xp(xp, q[..., -3:, :]), return_lse=True, **given)
        np.testing.assert_allclose(to_numpy(out), right, rtol=0, atol=1e-9)
        np.testing.assert_allclose(to_numpy(lse), right_lse, rtol=0, atol=1e-9)


@EAGER
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 5, "n_sink": 2},
        {"n_sparse": 2},
        {"rotary": FREQUENCIES},
        {"bits": 10},
        {"n_top": 6},
        {"n_top": 6, "index": "query"},
        {"bits": 10, "n_top": 6},
    ],
)
def test_what_a_query_does_not_see_takes_no_part_whatever_it_holds(xp, options):
    """Under a mask, and where queries of a chunk see up to their own token."""
    skip_most_on_jax(xp, options, kept={})
    q, k, v = tokens()
    lost_k, lost_v = k.copy(), v.copy()
    lost_k[0, [3, 9, 37]], lost_v[:, [9, 20, 38], 0], lost_v[1, 2] = np.nan, np.inf, -np.inf
    lost = [2, 3, 9, 20, 37, 38]
    basis = moved(basis_of((D, DV)), xp)
    clean, cache = (
        slra.KVCache(basis, **options).append(*(to_xp(xp, x) for x in given))
        for given in ((k, v), (lost_k, lost_v))
    )
    rows = to_xp(xp, q[:, -3:])
    mask = np.broadcast_to(~np.isin(np.arange(40), lost[:-2]), (3, 40)).copy()
    # What is next to a hidden token in bits is rounded in another way.
    tolerance = {"rtol": 0, "atol": 0.02 if "bits" in options else 1e-12}
    (right, right_lse), (out, lse) = (
        map(to_numpy, one.attend(rows, mask=to_xp(xp, mask), is_causal=True, return_lse=True))
        for one in (clean, cache)
    )
    # The first query is at token 37, whose key two query heads see, and the second at 38, with a value that all do.
    assert not np.isfinite(out[:2]).any()
    assert not np.isfinite(out[2:, 1:, 0]).any()
    everywhere = to_numpy(cache.attend(rows, mask=to_xp(xp, mask & (np.arange(40) < 37))))
    below = to_numpy(clean.attend(rows, mask=to_xp(xp, mask & (np.arange(40) < 37))))
    np.testing.assert_allclose(everywhere, below, **tolerance)
    np.testing.assert_allclose(out[2:, 0], right[2:, 0], **tolerance)
    np.testing.assert_allclose(lse[2:, 0], right_lse[2:, 0], **tolerance)


def test_a_window_over_tokens_in_bits_is_its_mask():
    """Rows before the window are not read, and those in bits come in blocks."""
    q, k, v = tokens(100)
    cache = slra.KVCache(slra.fit_attention(q, k, v, 4, enable_gqa=True), bits=4)
    cache = cache.append(k, v)
    for left in (0, 20, 37, 99):
        mask = np.arange(100) >= np.asarray([98, 99])[:, None] - left
        out = cache.attend(q[:, -2:], window=(left, 0))
        np.testing.assert_allclose(out, cache.attend(q[:, -2:], mask=mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["svd", "scores"])
def test_query_heads_may_have_maps_of_their_own(method):
    q, k, v = tokens()
    basis = basis_of((4, 3), method)
    cache = slra.KVCache(basis, window=5).append(k, v)
    right, _ = expected(q, k, v, basis, n_queries=2, window=5)
    np.testing.assert_allclose(cache.attend(q[:, -2:]), right, atol=1e-12)


# Choices by which all keys are read in all coordinates.
ALL_KEYS = [
    {},
    {"top_p": 1.0},
    {"top_p": 1.0, "n_top": 64, "rank_index": 5},
    {"n_top": 64, "rank_index": 1},
    {"n_top": 0, "rank_index": D},
    {"top_p": 1.0, "index": "query"},
    {"n_top": 64, "index": "query", "rank_index": (1, 2)},
    {"n_top": 0, "index": "query", "rank_index": (D, DV)},
]


@st.composite
def histories(draw):
    """Options of a cache, sizes of the blocks appended, how many tokens of each a sequence has, and what is asked."""
    batch = draw(st.sampled_from([(), (3,), (2, 1)]))
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    used = [
        draw(
            st.lists(
                st.integers(0, size), min_size=int(np.prod(batch)), max_size=int(np.prod(batch))
            )
        )
        for size in sizes
    ]
    options = {
        "window": draw(st.integers(0, 8)),
        "n_sink": draw(st.integers(0, 5)),
        "n_sparse": draw(st.sampled_from([0, 0, 2])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "rotary": draw(st.sampled_from([None, None, FREQUENCIES])),
        "capacity": draw(st.sampled_from([None, 64])),
    }
    if not options["n_sparse"] and options["rotary"] is None:
        options |= draw(st.sampled_from(ALL_KEYS))
    ragged = draw(st.booleans()) and batch != ()
    asked = {"mask": draw(st.sampled_from([None, bool, float])), "is_causal": draw(st.booleans())}
    asked["window"] = draw(st.sampled_from([None, None, (4, 0), (7, None)]))
    return batch, sizes, used if ragged else None, options, asked, draw(st.integers(0, 99))


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(histories(), st.sampled_from(["output", "scores", "svd"]))
def test_at_full_rank_it_is_exact_whatever_was_appended(history, method):
    batch, sizes, used, options, asked, seed = history
    q, k, v = tokens(sum(sizes), seed=seed, batch=batch)
    cache = slra.KVCache(basis_of((D, DV), method), batch=batch, **options)
    start = 0
    for i, size in enumerate(sizes):
        rows = slice(start, start + size)
        counts = None if used is None else np.reshape(used[i], batch)
        cache = cache.append(k[..., rows, :], v[..., rows, :], lengths=counts)
        start += size
    # What each sequence has, cut out of the blocks; its queries are those of the last block.
    n_last = sizes[-1]
    if n_last == 0:
        return
    lengths = np.broadcast_to(cache.lengths, batch)
    rng = np.random.default_rng(seed)
    longest = int(lengths.max()) if lengths.size else 0
    mask = {
        None: None,
        bool: rng.random((HQ, n_last, longest)) < 0.7,
        float: rng.standard_normal((n_last, longest)),
    }[asked["mask"]]
    counts = None if used is None else np.reshape(used[-1], batch)
    out, lse = cache.attend(
        q[..., start - n_last :, :],
        mask=mask,
        is_causal=asked["is_causal"],
        window=asked["window"],
        lengths=counts,
        return_lse=True,
    )
    bounds = np.cumsum([0, *sizes])
    for at in np.ndindex(*batch):
        flat = int(np.ravel_multi_index(at, batch)) if batch else 0
        mine = [sizes[i] if used is None else used[i][flat] for i in range(len(sizes))]
        own = np.concatenate(
            [np.arange(b, b + n) for b, n in zip(bounds[:-1], mine, strict=True)]
        ).astype(int)
        assert len(own) == lengths[at]
        here = [x[at][:, own] for x in (q, k, v)]
        part = None if mask is None else mask[..., : mine[-1], : len(own)]
        np.testing.assert_array_equal(out[at][:, mine[-1] :], 0)
        if mine[-1] == 0:
            continue
        right, right_lse = _exactly(*here, mine[-1], options, **{**asked, "mask": part})
        np.testing.assert_allclose(out[at][:, : mine[-1]], right, atol=1e-6)
        np.testing.assert_allclose(lse[at][:, : mine[-1]], right_lse, atol=1e-6)


def _exactly(q, k, v, n_queries, options, **asked):
    if options["rotary"]:
        q, k = rotated(q), rotated(k)
    return naive_attention(
        q[:, q.shape[1] - n_queries :],
        k,
        v,
        softcap=options["softcap"],
        enable_gqa=True,
        **asked,
    )


@EAGER
def test_sequences_of_different_length(xp):
    skip_most_on_jax(xp)
    q, k, v = tokens(12, batch=(3,))
    basis = basis_of((4, 3))
    cache = slra.KVCache(moved(basis, xp), batch=(3,), window=4, n_sink=1)
    first, second = np.asarray([7, 2, 5]), np.asarray([5, 3, 0])
    cache = cache.append(to_xp(xp, k[..., :7, :]), to_xp(xp, v[..., :7, :]), lengths=first)
    cache = cache.append(to_xp(xp, k[..., 7:, :]), to_xp(xp, v[..., 7:, :]), lengths=second)
    np.testing.assert_array_equal(to_numpy(cache.lengths), first + second)
    rng = np.random.default_rng(0)
    mask = rng.standard_normal((3, 1, 5, 12))
    out = to_numpy(cache.attend(to_xp(xp, q[..., 7:, :]), mask=to_xp(xp, mask), lengths=second))
    for b in range(3):
        own = [*range(first[b]), *range(7, 7 + second[b])]
        here = [x[b][:, own] for x in (q, k, v)]
        part = mask[b, :, : second[b], : len(own)]
        if second[b]:
            right, _ = expected(*here, basis, n_queries=second[b], window=4, n_sink=1, mask=part)
            np.testing.assert_allclose(out[b, :, : second[b]], right, atol=1e-12)
        np.testing.assert_array_equal(out[b, :, second[b] :], 0)


@EAGER
@pytest.mark.parametrize("case", ["window and sinks", "rotary, sparse, softcap"])
def test_decoded_tokens_are_those_it_stands_for(xp, case):
    skip_most_on_jax(xp, case)
    options = OPTIONS[case]
    _, k, v = tokens()
    basis = basis_of((4, 3))
    cache = appended(
        slra.KVCache(moved(basis, xp), **options), to_xp(xp, k), to_xp(xp, v), [30, 10]
    )
    low_k, low_v = (to_numpy(x) for x in cache.decode())
    parts = [options.get(name, 0) for name in ("window", "n_sink", "n_sparse")]
    right_k, right_v = (x[:: HQ // HK] for x in stood_for(k, v, basis, *parts))
    np.testing.assert_allclose(low_k, right_k, atol=1e-12)
    np.testing.assert_allclose(low_v, right_v, atol=1e-12)


@EAGER
def test_sequences_can_be_selected(xp):
    skip_most_on_jax(xp)
    q, k, v = (to_xp(xp, x) for x in tokens(12, batch=(3,)))
    cache = slra.KVCache(moved(basis_of((4, 3)), xp), batch=(3,), window=4, n_sparse=1)
    cache = cache.append(k, v, lengths=np.asarray([12, 3, 8]))
    some = cache.select([2, 0, 2])
    np.testing.assert_array_equal(some.lengths, [8, 12, 8])
    right = to_numpy(cache.attend(q[..., -1:, :]))
    ordered = to_xp(xp, to_numpy(q[..., -1:, :])[[2, 0, 2]])
    np.testing.assert_allclose(to_numpy(some.attend(ordered)), right[[2, 0, 2]], atol=1e-14)
    with pytest.raises(ValueError, match="indices must be one or more from 0 to 2"):
        cache.select([3])


@EAGER
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_bytes(xp, dtype):
    skip_most_on_jax(xp, dtype, "bfloat16")
    if not hasattr(xp, dtype):
        with pytest.raises(ValueError, match="dtype must be one that the library of the basis has"):
            slra.KVCache(moved(basis_of((4, 3)), xp), dtype=dtype)
        return
    q, k, v = tokens(dtype="float32")
    basis = basis_of((4, 3))
    caches = [
        appended(slra.KVCache(moved(basis, xp), dtype=d), to_xp(xp, k), to_xp(xp, v), [40])
        for d in (dtype, "float32")
    ]
    assert caches[1].nbytes - caches[0].nbytes == HK * 40 * (4 + 3) * 2
    out, right = (to_numpy(cache.attend(to_xp(xp, q[:, -1:]))) for cache in caches)
    eps = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    # Scores move by eps times their size, which is below 20 here, and values by eps.
    assert 0 < np.max(np.abs(out - right)) < 20 * eps * np.max(np.abs(v))
    assert out.dtype == np.float32


@EAGER
def test_tokens_are_stored_in_the_dtype_they_come_in(xp, tmp_path):
    skip_most_on_jax(xp)
    half = getattr(xp, "bfloat16", getattr(xp, "float16", xp.float32))
    q, k, v = (xp.astype(to_xp(xp, x), half) for x in tokens())
    basis = moved(basis_of((4, 3)), xp)
    start = slra.KVCache(basis, window=4, n_sink=2).nbytes
    cache = slra.KVCache(basis, window=4, n_sink=2).append(k[..., :30, :], v[..., :30, :])
    bits = xp.finfo(half).bits
    # Buffers of as many rows as came, and six tokens as they came.
    numbers = 28 * (4 + 3) + 6 * (D + DV)
    assert cache.nbytes - start == HK * (numbers * bits - 6 * (D + DV) * 64) // 8
    assert cache.nbytes_exact == HK * 30 * (D + DV) * bits // 8
    cache.save(tmp_path / "cache")
    for one in (cache, slra.KVCache.load(tmp_path / "cache", like=q)):
        for held, came in zip(one.decode(), (k, v), strict=True):
            for rows in (slice(0, 2), slice(26, 30)):
                right = to_numpy(xp.astype(came[..., :30, :], xp.float64))[:, rows]
                np.testing.assert_array_equal(to_numpy(held)[:, rows], right)
        # What comes wider is not rounded either.
        one = one.append(*(to_xp(xp, x[..., 30:, :]) for x in tokens()[1:]))
        np.testing.assert_array_equal(to_numpy(one.decode()[0])[:, 36:], tokens()[1][:, 36:])


def test_a_dtype_is_a_name_or_an_object():
    basis = basis_of((4, 3))
    for dtype in ("float16", np.float16, np.dtype("float16")):
        assert slra.KVCache(basis, dtype=dtype)._contents.layout.dtype == "float16"
    torch = pytest.importorskip("torch")
    moved_basis = moved(basis, compat.array_namespace(torch.empty(0)))
    for dtype in ("bfloat16", torch.bfloat16):
        assert slra.KVCache(moved_basis, dtype=dtype)._contents.layout.dtype == "bfloat16"
    for dtype in (np.int8, torch.float16, np.ones(2), None.__class__, "half"):
        with pytest.raises(ValueError, match="dtype must be one of"):
            slra.KVCache(basis, dtype=dtype)


def test_it_shows_its_bytes_beside_those_of_an_exact_cache():
    _, k, v = tokens()
    cache = slra.KVCache(basis_of((4, 3)), window=4).append(k, v)
    shown = repr(cache)
    assert len(shown.splitlines()) <= 3
    assert max(map(len, shown.splitlines())) <= 100
    assert cache.nbytes_exact == k.nbytes + v.nbytes
    for part in ("rank=(4, 3)", "float64", f"nbytes={cache.nbytes}", str(k.nbytes + v.nbytes)):
        assert part in shown


def test_a_step_computes_no_rotation_of_stored_keys(monkeypatch):
    q, k, v = tokens(9000)
    cache = slra.KVCache(basis_of((4, 3)), window=4, rotary=FREQUENCIES)
    cache = appended(cache, k, v, [100, 20, 8880])
    right, _ = expected(q, k, v, basis_of((4, 3)), n_queries=1, window=4, rotary=FREQUENCIES)
    cos, angles = np.cos, []
    monkeypatch.setattr(np, "cos", lambda x: angles.append(x.size) or cos(x))
    np.testing.assert_allclose(cache.attend(q[:, -1:]), right, atol=1e-10)
    # The query for each chunk, and the window; not the 9000 keys.
    assert sum(angles) < 100


def test_appending_copies_each_row_a_few_times_at_most():
    basis = basis_of((3, 2))
    _, k, v = tokens(10_000)
    cache = slra.KVCache(basis, window=8)
    slope = HK * (3 + 2) * 8
    fixed = cache.nbytes
    copied, bytes_before, sizes = 0, fixed, []
    for i in range(10_000):
        cache = cache.append(k[:, i : i + 1], v[:, i : i + 1])
        if cache.nbytes != bytes_before:
            copied += bytes_before - fixed
            bytes_before = cache.nbytes
        sizes.append(cache.nbytes - fixed)
    held = np.arange(1, 10_001) * slope
    assert np.all(sizes >= held)
    # No more room than a quarter, or what the first buffer has.
    assert np.all(sizes <= np.maximum(1.25 * held + slope, 16 * slope))
    # 1 + 1/1.25 + 1/1.25^2 + ... copies of all rows, and no growth with their number.
    assert copied <= 5 * held[-1]


def test_memory_is_what_it_says():
    import tracemalloc

    basis = basis_of((3, 2))
    _, k, v = tokens(4000)
    options = {"window": 8, "n_sink": 2, "n_sparse": 1}
    slra.KVCache(basis, **options).append(k, v)  # what the first call of all imports and remembers
    tracemalloc.start()
    cache = slra.KVCache(basis, **options)
    for i in range(0, 4000, 10):
        cache = cache.append(k[:, i : i + 10], v[:, i : i + 10])
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The rest is Python's own: objects, and the maps that belong to the basis.
    assert cache.nbytes - 20_000 < held < cache.nbytes + 90_000


@EAGER
def test_with_a_capacity_memory_stays(xp):
    skip_most_on_jax(xp)
    _, k, v = tokens()
    cache = slra.KVCache(moved(basis_of((4, 3)), xp), capacity=40, window=4)
    before = cache.nbytes
    cache = appended(cache, to_xp(xp, k), to_xp(xp, v), [30, 10])
    assert cache.nbytes == before
    with pytest.raises(ValueError, match="capacity must be at least 41"):
        cache.append(to_xp(xp, k[:, :1]), to_xp(xp, v[:, :1]))


# A few keys in full


def read_in_part(q, k, v, basis, how, **asked):
    """Output, log-sum-exp and what is left, of the last queries of one sequence, each key chosen or not in a table."""
    parts = [how.get(name, 0) for name in ("window", "n_sink")]
    ranks = np.broadcast_to(how.get("rank_index", D // 4), 2)
    low = [stood_for(k, v, cut(basis, r), *parts, 0) for r in (*ranks, max(D, DV))]
    (low_k, _), (_, low_v), (all_k, all_v) = low
    by_row = [low_k] * q.shape[-2]
    if how.get("index") == "query":
        all_k = np.repeat(k, HQ // HK, axis=0)
        by_row = [by_its_features(x, all_k, basis, ranks[0], *parts) for x in np.moveaxis(q, -2, 0)]
    place = np.arange(k.shape[-2])
    is_exact = (place < parts[1]) | (place >= len(place) - parts[0])
    return read_of(q, (by_row, low_v), (all_k, all_v), is_exact, how, asked)


def read_of(q, low, whole, is_exact, how, asked):
    """The same of keys and values in their leading coordinates and in all; of the former keys for each query."""
    (by_row, low_v), (all_k, all_v) = low, whole
    shared, n = HQ // HK, all_k.shape[-2]
    asked |= {"is_causal": True, "scale": how.get("scale"), "softcap": how.get("softcap")}
    eye, place = np.broadcast_to(np.eye(n), (HQ, n, n)), np.arange(n)
    weights = [naive_attention(q, x, eye, **asked)[0][:, i] for i, x in enumerate(by_row)]
    mass = np.stack(weights, axis=1).reshape(HK, shared, -1, n).sum(1)
    mass = np.where(is_exact, 0, mass)
    order = np.argsort(-mass, axis=-1, kind="stable")
    ranked = np.take_along_axis(mass, order, axis=-1)
    before = np.cumsum(ranked, axis=-1) - ranked
    needed = mass.sum(-1, keepdims=True) - before > (1 - how.get("top_p", 2)) * shared
    needed &= place < np.broadcast_to(how.get("n_top", n), HK)[:, None, None]
    is_chosen = np.take_along_axis(needed, np.argsort(order, axis=-1), axis=-1)
    is_chosen = np.repeat(is_chosen, shared, axis=0)[..., None]
    rows = []
    for i, low_k in enumerate(by_row):
        keys, values = (
            np.where(is_chosen[:, i], a, b) for a, b in ((all_k, low_k), (all_v, low_v))
        )
        out, lse = naive_attention(q, keys, values, **asked)
        weights, _ = naive_attention(q, keys, eye, **asked)
        is_left = ~(is_chosen[:, i, :, 0] | is_exact)
        rows.append((out[:, i], lse[:, i], np.sum(weights[:, i] * is_left, axis=-1)))
    return [np.stack(x, axis=1) for x in zip(*rows, strict=True)]


def by_its_features(q, k, basis, n_features, window, n_sink):
    """Keys of each query head in the features where the query, and those that share the keys, are largest together."""
    c = np.repeat(basis.c, HQ // HK, axis=0)
    sizes = np.repeat(np.abs(q).reshape(HK, -1, D).sum(1), HQ // HK, axis=0)
    is_largest = sizes >= np.sort(sizes, axis=-1)[:, D - n_features, None]
    place = np.arange(k.shape[-2])[:, None]
    is_exact = (place < n_sink) | (place >= k.shape[-2] - window)
    return np.where(is_exact | is_largest[:, None, :], k, c)


def cut(basis, rank):
    """The basis with no more than so many coordinates."""
    parts = {"wq": basis.wq[..., :rank], "wk": basis.wk[..., :rank]}
    parts |= {"wv": basis.wv[..., :rank], "uv": basis.uv[..., :rank, :]}
    return dataclasses.replace(basis, **parts)


CHOICES = {
    "number": {"n_top": 5},
    "number, window and sinks": {"n_top": 4, "window": 5, "n_sink": 2},
    "mass, softcap": {"top_p": 0.8, "softcap": 2.0, "scale": 0.5},
    "both": {"n_top": 6, "top_p": 0.6, "n_sink": 1, "rank_index": 5},
    "none": {"n_top": 0, "rank_index": 1, "window": 3},
    "by head": {"n_top": (3, 40), "n_sink": 1},
    "features": {"n_top": (40, 4), "n_sink": 1, "index": "query", "rank_index": (3, 2)},
    "features, softcap": {"top_p": 0.7, "softcap": 2.0, "index": "query", "rank_index": [5, 1]},
}


@EAGER
@pytest.mark.parametrize("case", list(CHOICES))
def test_each_query_reads_a_few_keys_in_full(xp, case):
    skip_most_on_jax(xp, case, kept="both")
    q, k, v = tokens()
    basis = basis_of((6, 5))
    cache = slra.KVCache(moved(basis, xp), **CHOICES[case])
    cache = appended(cache, to_xp(xp, k), to_xp(xp, v), [20, 1, 0, 9, 10])
    for asked in ({}, {"window": (20, 0), "sinks": SINKS, "alibi": SLOPES}):
        given = structure_to_xp(xp, asked)
        right = read_in_part(q[:, -3:], k, v, basis, CHOICES[case], **asked)
        for m in (3, 1):
            last = to_xp(xp, q[:, -m:])
            found = cache.attend(last, return_lse=True, return_rest=True, **given)
            for one, other in zip(found, right, strict=True):
                np.testing.assert_allclose(to_numpy(one), other[:, -m:], rtol=0, atol=1e-12)


def test_features_of_keys_are_read_tile_by_tile(monkeypatch):
    """On NumPy, a few tokens at once, the last of them fewer; from keys that are part of a larger buffer."""
    rng = np.random.default_rng(0)
    buffer, q = rng.standard_normal((2, 3, 5, 20)), rng.standard_normal((2, 3, 4, 2))
    k, places = (
        buffer.swapaxes(-1, -2)[:, :, 2:19],
        rng.permuted(np.tile(range(5), (2, 3, 1)), axis=-1),
    )
    monkeypatch.setattr(numpy_backend, "CACHED_SCORES", 8)
    found = backend_of(numpy_xp).few_features(q, k, places[..., :2])
    right = q @ np.take_along_axis(k, places[..., None, :2], axis=-1).swapaxes(-1, -2)
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-14)


@pytest.mark.parametrize("index", [{}, {"index": "query", "rank_index": (3, 2)}])
def test_what_a_query_chooses_does_not_depend_on_the_others(monkeypatch, tmp_path, index):
    """Nor on how many are computed at once; and a cache that was written, cropped or selected from chooses the same."""
    q, k, v = tokens(batch=(2,))
    basis, options = basis_of((6, 5)), {"n_top": 9, "top_p": 0.9, "window": 3, "n_sink": 1} | index
    cache = slra.KVCache(basis, batch=(2,), **options)
    cache = cache.append(k, v, lengths=np.asarray([40, 31]))
    asked = {"return_lse": True, "return_rest": True}
    whole = cache.attend(q[..., -6:, :], lengths=np.asarray([6, 4]), **asked)
    for b, (n, m) in enumerate([(40, 6), (31, 4)]):
        here = [x[b, :, :n] for x in (k, v)]
        right = read_in_part(q[b, :, -6:][:, :m], *here, basis, options)
        for one, other in zip(whole, right, strict=True):
            np.testing.assert_allclose(one[b, :, :m], other, rtol=0, atol=1e-12)
            assert not np.any(one[b, :, m:]) or np.all(np.isneginf(one[b, :, m:]))
    cache.save(tmp_path / "cache")
    monkeypatch.setattr(choosing, "MOST_NUMBERS", 1 << 8)
    for other in (cache, slra.KVCache.load(tmp_path / "cache"), cache.select([0, 1])):
        found = other.attend(q[..., -6:, :], lengths=np.asarray([6, 4]), **asked)
        for one, right in zip(found, whole, strict=True):
            np.testing.assert_allclose(one, right, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="return_rest must be False in a cache without n_top"):
        slra.KVCache(basis).append(k[0], v[0]).attend(q[0], return_rest=True)


def test_heads_get_as_few_keys_as_keep_to_rtol(monkeypatch):
    """Checked on steps that the fit has not seen: at fewer keys each head errs more, and one that misleads is exact."""
    q, k, v = tokens(200)
    # The second head attends to many keys, whose coordinates all count alike.
    rng = np.random.default_rng(0)
    q[HQ // HK :], k[1:], v[1:] = (rng.standard_normal(x.shape) for x in (q[2:], k[1:], v[1:]))
    made = []
    init = slra.KVCache.__init__
    monkeypatch.setattr(
        slra.KVCache,
        "__init__",
        lambda self, *args, **more: made.append((args, more)) or init(self, *args, **more),
    )
    cache = slra.KVCache.from_prefix(q, k, v, rtol=0.2, n_top="auto", n_sink=2)
    assert np.all(cache.error <= 0.2)
    layout = cache._contents.layout
    assert layout.index == "leading"
    assert layout.n_top[0] < 100
    assert layout.n_top[1] == _layout.ALL
    (early,), _ = made[0]
    fitted = slra.fit_attention(
        q[:, :100], k[:, :100], v[:, :100], (D, DV), is_causal=True, enable_gqa=True
    )
    np.testing.assert_allclose(early.wk, fitted.wk)
    last = cache.attend(q[:, -1:])
    exact, _ = naive_attention(q[:, -1:], k, v, enable_gqa=True)
    np.testing.assert_allclose(last[2:], exact[2:], rtol=0, atol=1e-10)
    # Two features of each query are large, other ones each time: no basis has them all among its first.
    large = np.argsort(rng.random(q[::2].shape), axis=-1)[..., :2]
    sparse = np.repeat(np.where((np.arange(D) == large[..., None]).any(-2), 6, 0.1), 2, axis=0)
    cache = slra.KVCache.from_prefix(sparse * np.sign(q), k, v, rtol=0.3, n_top="auto")
    assert cache._contents.layout.index == "query"
    assert np.all(cache.error <= 0.3)
    for options in ({"n_top": "auto"}, {"n_top": "auto", "rtol": 0.1, "top_p": 0.5}):
        with pytest.raises(ValueError, match='n_top="auto" must come with rtol'):
            slra.KVCache.from_prefix(q, k, v, **options)
    with pytest.raises(ValueError, match="rtol must be None with top_p or n_top"):
        slra.KVCache.from_prefix(q, k, v, rtol=0.1, n_top=4)
    whole = slra.KVCache.from_prefix(q, k, v, n_top=200)
    np.testing.assert_allclose(whole.attend(q[:, -1:]), exact, rtol=0, atol=1e-10)


# JAX: one structure, compiled once


def jitted(cache, q, k, v, sizes, lengths=None):
    """Append block by block and attend after each, in a compiled function."""
    jax = pytest.importorskip("jax")
    traces = 0

    @jax.jit
    def step(cache, q, k, v, counts):
        nonlocal traces
        traces += 1
        cache = cache.append(k, v, lengths=counts)
        return cache, cache.attend(q, lengths=counts)

    outs, start = [], 0
    for i, size in enumerate(sizes):
        rows = [jax.numpy.asarray(x[..., start : start + size, :]) for x in (q, k, v)]
        counts = None if lengths is None else jax.numpy.asarray(lengths[i])
        cache, out = step(cache, *rows, counts)
        outs.append(out)
        start += size
    assert traces == len(set(sizes))
    return cache, outs


@pytest.mark.parametrize("case", ["window and sinks", "rotary, sparse, softcap"])
def test_under_jit_it_is_compiled_once_and_the_same(case):
    jnp = pytest.importorskip("jax.numpy")
    options = OPTIONS[case]
    q, k, v = tokens(15)
    basis = basis_of((4, 3))
    cache = slra.KVCache(moved(basis, jnp), capacity=17, **options)
    cache, outs = jitted(cache, q, k, v, [10, 1, 1, 1, 1, 1])
    n = 10
    for out, size in zip(outs, [10, 1, 1, 1, 1, 1], strict=True):
        n += size - (10 if size == 10 else 0)
        here = [x[:, :n] for x in (q, k, v)]
        right, _ = expected(*here, basis, n_queries=size, **options)
        np.testing.assert_allclose(out, right, atol=1e-12)
    assert int(cache.lengths) == 15


def test_under_jit_sequences_differ_in_length_and_an_overflow_shows():
    jnp = pytest.importorskip("jax.numpy")
    q, k, v = tokens(8, batch=(2,))
    options = {"window": 2, "n_sink": 1, "batch": (2,)}
    lengths = [np.asarray([4, 1]), np.asarray([2, 4])]
    cache = slra.KVCache(moved(basis_of((4, 3)), jnp), capacity=6, **options)
    cache, outs = jitted(cache, q, k, v, [4, 4], lengths)
    host = slra.KVCache(basis_of((4, 3)), **options)
    for i, out in enumerate(outs):
        rows = slice(4 * i, 4 * i + 4)
        host = host.append(k[..., rows, :], v[..., rows, :], lengths=lengths[i])
        right = host.attend(q[..., rows, :], lengths=lengths[i])
        np.testing.assert_allclose(out, right, atol=1e-12)
    last = jnp.asarray(k[..., :1, :]), jnp.asarray(v[..., :1, :])
    out = cache.append(*last, lengths=np.asarray([1, 0])).attend(jnp.asarray(q[..., :1, :]))
    assert np.all(np.isnan(out[0]))
    assert not np.any(np.isnan(out[1]))


@pytest.mark.parametrize(("index", "m"), [("leading", 20), ("query", 1)])
def test_under_jit_queries_choose(index, m):
    jax = pytest.importorskip("jax")
    q, k, v = tokens(20, batch=(2,))
    options = {"n_top": 4, "top_p": 0.7, "window": 2, "batch": (2,), "index": index}
    lengths = np.asarray([20, 13])
    cache = slra.KVCache(moved(basis_of((6, 5)), jax.numpy), capacity=22, **options)
    host = slra.KVCache(basis_of((6, 5)), **options).append(k, v, lengths=lengths)

    @jax.jit
    def step(cache, q, k, v, lengths):
        cache = cache.append(k, v, lengths=lengths)
        return cache.attend(q, lengths=asked, return_lse=True, return_rest=True)

    q, asked = (q, lengths) if m > 1 else (q[..., -1:, :], None)
    found = step(cache, *(jax.numpy.asarray(x) for x in (q, k, v, lengths)))
    for one, right in zip(
        found, host.attend(q, lengths=asked, return_lse=True, return_rest=True), strict=True
    ):
        np.testing.assert_allclose(one, right, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="n_top must be given besides top_p"):
        slra.KVCache(moved(basis_of((6, 5)), jax.numpy), capacity=22, top_p=0.7)


def test_a_cache_that_grows_does_not_pass_through_jit():
    jax = pytest.importorskip("jax")
    _, k, v = (jax.numpy.asarray(x) for x in tokens(4))
    cache = slra.KVCache(moved(basis_of((4, 3)), jax.numpy))
    with pytest.raises(ValueError, match="capacity must be given"):
        jax.jit(lambda cache: cache.append(k, v))(cache)
    grown = cache.append(k, v)
    assert (int(cache.lengths), int(grown.lengths)) == (0, 4)


# Drift


def moving(n, seed=0):
    """Tokens whose keys and values leave the subspace they were in, half way."""
    rng = np.random.default_rng(seed)
    first, second = np.linalg.qr(rng.standard_normal((D, D)))[0].reshape(2, D // 2, D)
    is_late = np.arange(n)[:, None] >= n // 2

    def draw(heads):
        x = rng.standard_normal((heads, n, D // 2))
        return np.where(is_late, x @ second, x @ first)

    q, k, v = 2 * draw(HQ), 2 * draw(HK), draw(HK)
    return q, k, v


@EAGER
def test_drift_is_noticed_and_followed(xp):
    skip_most_on_jax(xp)
    n, window, rank = 200, 20, 4
    q, k, v = moving(n)
    prefix = [to_xp(xp, x[:, :50]) for x in (q, k, v)]
    basis = slra.fit_attention(*prefix, rank, enable_gqa=True)
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    sizes = [50, *[5] * 30]
    caches = []
    for update in ({}, {"drift_bound": 0.1}):
        cache = slra.KVCache(basis, window=window, **update)
        caches.append(appended(cache, *arrays[1:], sizes, arrays[0]))
    fixed, followed = caches
    assert fixed.n_segments == 1
    # Fitted to a window that straddles the change, it may be fitted once more.
    assert 2 <= followed.n_segments <= 3
    last = to_xp(xp, q[:, -1:])
    exact, _ = naive_attention(q[:, -1:], k, v, enable_gqa=True)
    errors = [np.linalg.norm(to_numpy(cache.attend(last)) - exact) for cache in caches]
    # The ranks are those of the subspaces, so what is left is the tokens stored before it was noticed.
    assert errors[1] < 0.2 * errors[0]
    # Tokens of the beginning are in the first basis as they were.
    for one, other in zip(fixed.decode(), followed.decode(), strict=True):
        np.testing.assert_allclose(to_numpy(other)[:, :80], to_numpy(one)[:, :80], atol=1e-12)


def test_segments_meet_in_one_softmax():
    q, k, v = moving(120)
    basis = slra.fit_attention(q[:, :30], k[:, :30], v[:, :30], (4, 4), enable_gqa=True)
    cache = slra.KVCache(basis, window=10, drift_bound=0.05, n_sparse=1)
    cache = appended(cache, k, v, [30, *[3] * 30], q)
    assert cache.n_segments > 1
    low_k, low_v = cache.decode()
    right, _ = naive_attention(q[:, -3:], low_k, low_v, is_causal=True, enable_gqa=True)
    np.testing.assert_allclose(cache.attend(q[:, -3:]), right, atol=1e-10)


# Bits

BITS = {
    "plain": {},
    "window and sinks": {"window": 7, "n_sink": 3},
    "softcap": {"window": 4, "softcap": 2.0, "scale": 0.5},
    "rotary": {"n_sink": 2, "rotary": FREQUENCIES},
    "across heads": {"window": 7, "n_sink": 3, "softcap": 2.0},
    "across heads, rotary": {"rotary": FREQUENCIES},
}


def coded_basis(case):
    return basis_of((4, 3), across_heads=case.startswith("across heads"))


@EAGER
def test_integers_come_back_from_their_planes(xp):
    """Whatever their widths; and the bytes are those that the definition gives, on every backend."""
    rng = np.random.default_rng(0)
    widths = rng.integers(0, 15, (5, 2, 3))
    widths[1] = 0
    low = np.where(widths == 0, 0, -(2.0 ** (widths - 1)))[..., None]
    codes = np.rint(low + rng.random((5, 2, 3, 16)) * np.maximum(-2 * low - 1, 0))
    codes[..., 0], codes[..., 1] = low[..., 0], np.maximum(-low[..., 0] - 1, 0)
    table = backend_of(xp)
    heap = table.pack_tiles(to_xp(xp, codes.reshape(-1, 16)), widths.reshape(-1))
    as_bits = [
        [(int(number) >> plane) & 1 for plane in range(width) for number in tile]
        for tile, width in zip(codes.reshape(-1, 16), widths.reshape(-1), strict=True)
    ]
    expected_bytes = np.packbits(np.concatenate(as_bits).astype(bool), bitorder="little")
    np.testing.assert_array_equal(to_numpy(heap), expected_bytes)
    back = table.unpack_blocks(heap, widths.astype("uint8"), xp.float32)
    np.testing.assert_array_equal(to_numpy(back), codes.transpose(1, 0, 3, 2).reshape(2, 80, 3))
    # And single tokens, of block 1 (of zeros), 3 and 4, of a head each.
    at, head, token = np.asarray([1, 3, 4]), np.asarray([0, 1, 0]), np.asarray([7, 15, 2])
    before = np.cumsum(widths.sum(-1)).reshape(5, 2) - widths.sum(-1)
    given = (before[at, head], widths[at, head].astype("uint8"), token)
    dtypes = (table.place_dtype, xp.uint8, table.place_dtype)
    given = [table.from_numpy(x, heap, dtype) for x, dtype in zip(given, dtypes, strict=True)]
    few = table.unpack_tokens(heap, *given, xp.float32)
    np.testing.assert_array_equal(to_numpy(few), codes[at, head, :, token])


@EAGER
@pytest.mark.parametrize("case", list(BITS))
def test_in_bits_it_is_attention_to_what_it_stands_for(xp, case):
    skip_most_on_jax(xp, case)
    options = BITS[case]
    q, k, v = tokens(70)
    caches = []
    for sizes in ([70], [20, 1, 0, 9, 1, 30, 9]):
        cache = slra.KVCache(moved(coded_basis(case), xp), bits=(3, 4), **options)
        caches.append(appended(cache, to_xp(xp, k), to_xp(xp, v), sizes))
    whole, cache = caches
    low_k, low_v = (to_numpy(x) for x in cache.decode())
    for one, other in zip(whole.decode(), (low_k, low_v), strict=True):
        np.testing.assert_allclose(to_numpy(one), other, atol=1e-12)
    exact = slice(70 - options.get("window", 0), 70)
    np.testing.assert_array_equal(low_k[:, exact], k[:, exact])
    for low, right, bound in zip((low_k, low_v), (k, v), cache.error_bound, strict=True):
        error = np.linalg.norm(low - right, axis=-1)
        assert np.all(error <= to_numpy(bound)[:, None])
        assert np.max(error) > 0.1 * np.max(to_numpy(bound))
    given = {name: x for name, x in options.items() if name in ("softcap", "scale")}
    rows = q[:, -9:]
    if "rotary" in options:
        rows, low_k = rotated(q)[:, -9:], rotated(low_k)
    right, _ = naive_attention(rows, low_k, low_v, is_causal=True, enable_gqa=True, **given)
    out = cache.attend(to_xp(xp, q[:, -9:]))
    np.testing.assert_allclose(to_numpy(out), right, atol=1e-11)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 999),
    st.sampled_from(["float32", "float64"]),
    st.floats(0.6, 9.5) | st.none(),
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.sampled_from([0, 1e-30, 1e-3, 1e3]),
    st.booleans(),
)
def test_the_error_bound_holds_for_each_token(seed, dtype, bits, sizes, outlier, across_heads):
    """Whatever the text: of another scale than the fit's, far off its mean, with outliers."""
    rng = np.random.default_rng(seed)
    q, k, v = tokens(60, seed=seed, dtype=dtype)
    basis = slra.fit_attention(q, k, v, 3, enable_gqa=True, across_heads=across_heads)
    other = [
        (rng.standard_normal((HK, sum(sizes), d)) * 4 ** rng.standard_normal(d)).astype(dtype)
        for d in (D, DV)
    ]
    if sum(sizes):
        other[0][:, sum(sizes) // 2, 1] *= outlier
    asked = {"rtol": 0.1} if bits is None else {"bits": bits}
    cache = appended(slra.KVCache(basis, **asked), *other, sizes)
    for came, low, bound in zip(other, cache.decode(), cache.error_bound, strict=True):
        assert np.all(np.linalg.norm(low - came, axis=-1) <= bound[:, None])


def test_rtol_bounds_the_coordinates_and_bits_are_those_asked_for():
    q, k, v = tokens(2000)
    basis = slra.fit_attention(q[:, :400], k[:, :400], v[:, :400], 3, enable_gqa=True)
    for bits in (2.5, (3, 5)):
        cache = slra.KVCache(basis, bits=bits).append(k, v)
        np.testing.assert_allclose(
            cache.bits, np.mean(np.repeat(bits, 2 // np.size(bits)) * [8, 6]) * 2 / 14, rtol=0.02
        )
        # All that is held but the maps, and the room that is left.
        numbers = HK * 2000 * (D + DV)
        held = cache.nbytes - slra.KVCache(basis, bits=bits).nbytes
        assert numbers * cache.bits / 8 <= held + 1 <= 1.3 * numbers * cache.bits / 8
    cache = slra.KVCache(basis, rtol=0.05).append(k, v)
    coding = basis.coding
    low_k, low_v = cache.decode()
    for error, to, importance in (
        (low_k - k, coding.wk, coding.importance_k),
        (low_v - v, coding.wv, coding.importance_v),
    ):
        size = np.sqrt(np.sum(importance, axis=-1))[:, None]
        worst = np.linalg.norm(error @ to, axis=-1) / size
        assert np.max(worst) <= 0.05 * (1 + 1e-9)
        assert np.max(worst) > 0.02


def test_across_heads_what_they_have_in_common_is_stored_once():
    """Keys and values of each head are a map of the same numbers: two thirds of the bits say as much, of every head."""
    rng = np.random.default_rng(0)
    q, common = rng.standard_normal((2, 2, 300, 8)), rng.standard_normal((2, 300, 8))
    common *= 0.7 ** np.arange(8)
    k, v = np.einsum("bnd,xhde->xbhne", common, rng.standard_normal((2, 2, 8, 8)))
    for pool_batch in (False, True):
        fit = {"pool_batch": pool_batch, "is_causal": True}
        each, both = (
            slra.fit_attention(q, k, v, 8, across_heads=across_heads, **fit)
            for across_heads in (False, True)
        )
        errors, took = [], []
        for basis, bits in ((each, 6), (both, 4)):
            cache = slra.KVCache(basis, batch=(2,), bits=bits).append(k, v)
            took.append(cache.bits)
            low_k, low_v = cache.decode()
            # In the units of each head.
            error = (low_k - k) @ each.coding.wk, low_v - v
            errors.append([np.std(x, axis=(0, 2, 3)) for x in error])
        # By head 1.5 bits fewer would be 2.8 times as far off.
        assert took[1] < took[0] - 1.5
        assert np.all(np.stack(errors[1]) < 1.3 * np.stack(errors[0]))
        coding, d = both.coding, 16
        lead = coding.wk.shape[:-3]
        to, back, of_values = (x.reshape(*lead, d, d) for x in (coding.wk, coding.wq, coding.wv))
        eye = np.broadcast_to(np.eye(d), to.shape)
        np.testing.assert_allclose(back @ np.swapaxes(to, -1, -2), eye, atol=1e-8)
        np.testing.assert_allclose(of_values @ np.swapaxes(of_values, -1, -2), eye, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_before_a_rotation_coordinates_are_those_of_what_comes_after_it(is_causal):
    """Values count by attention after it, keys by the queries at the distances from which they are seen."""
    q, k, v = (x[:2] for x in tokens(200))
    coding = slra.fit_attention(q, k, v, 3, rotary=FREQUENCIES, is_causal=is_causal).coding
    np.testing.assert_array_equal(coding.rotary, np.broadcast_to(FREQUENCIES, (2, 3)))
    seen = np.tril(np.ones((200, 200), bool)) if is_causal else np.ones((200, 200), bool)
    scores = np.where(seen, rotated(q) @ np.swapaxes(rotated(k), -1, -2) / D**0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    received = np.sum(weights**2, axis=-2)
    received = received / received.sum(-1, keepdims=True) + 0.01 / 200
    received /= received.sum(-1, keepdims=True)
    np.testing.assert_allclose(coding.mu[:, 0], np.einsum("hn,hnd->hd", received, v), atol=1e-12)
    np.testing.assert_allclose(coding.c[:, 0], np.mean(k, axis=1), atol=1e-12)
    n = len(FREQUENCIES)
    moment, places = 0, np.arange(200)
    for key in places:
        turn = np.exp(1j * (places - key)[:, None] * np.asarray(FREQUENCIES))
        z = (q[..., :n] + 1j * q[..., n : 2 * n]) * turn
        small = np.concatenate([z.real, z.imag, q[..., 2 * n :]], axis=-1) @ coding.wq
        # Each query has a weight of one.
        share = seen[:, key] / seen.sum(axis=1) / 200
        moment = moment + np.swapaxes(small, -1, -2) @ (small * share[:, None])
    # A sample of four distances a query.
    np.testing.assert_allclose(moment, np.broadcast_to(np.eye(D), moment.shape), atol=0.2)


def test_a_rotation_by_no_angle_is_none():
    q, k, v = tokens(60)
    none = slra.fit_attention(q, k, v, 3, enable_gqa=True).coding
    still = slra.fit_attention(q, k, v, 3, enable_gqa=True, rotary=[0.0]).coding
    for one, other in zip(none[3:-1], still[3:-1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_a_basis_before_a_rotation_is_for_a_cache_with_the_same():
    q, k, v = tokens(60)
    basis = slra.fit_attention(q, k, v, 3, enable_gqa=True, rotary=FREQUENCIES)
    slra.KVCache(basis, bits=4, rotary=np.float32(FREQUENCIES)).append(k, v)
    for wrong in (None, FREQUENCIES[:2], (1.0, 0.3, 0.06)):
        with pytest.raises(ValueError, match="rotary must be what the basis was fitted with"):
            slra.KVCache(basis, bits=4, rotary=wrong)
    with pytest.raises(ValueError, match="rotary must be 1 to 4 frequencies, half of D"):
        slra.fit_attention(q, k, v, 3, enable_gqa=True, rotary=np.ones(5))
    prefix = slra.KVCache.from_prefix(q, k, v, bits=4, rotary=FREQUENCIES, across_heads=True)
    assert prefix._contents.layout.across_heads


def test_across_one_head_is_that_head():
    q, k, v = tokens(60)
    for some in (np.s_[:1], np.s_[0]):
        one, other = (
            slra.fit_attention(q[some], k[some], v[some], 3, across_heads=across_heads)
            for across_heads in (False, True)
        )
        for x, y in zip(one.coding, other.coding, strict=True):
            np.testing.assert_array_equal(x, y)


def test_in_bits_drift_starts_another_segment():
    q, k, v = moving(200)
    basis = slra.fit_attention(q[:, :50], k[:, :50], v[:, :50], 4, enable_gqa=True)
    cache = slra.KVCache(basis, window=20, bits=2, drift_bound=0.1)
    cache = appended(cache, k, v, [50, *[5] * 30], q)
    assert cache.n_segments > 1
    low_k, low_v = cache.decode()
    for low, came, bound in zip((low_k, low_v), (k, v), cache.error_bound, strict=True):
        assert np.all(np.linalg.norm(low - came, axis=-1) <= bound[:, None])
    right, _ = naive_attention(q[:, -3:], low_k, low_v, is_causal=True, enable_gqa=True)
    np.testing.assert_allclose(cache.attend(q[:, -3:]), right, atol=1e-10)
    n_segments = cache.n_segments
    cropped = [x[:, :30].copy() for x in cache.crop(30).decode()]
    assert cache.n_segments < n_segments
    for one, whole in zip(cropped, (low_k, low_v), strict=True):
        np.testing.assert_allclose(one, whole[:, :30], atol=1e-12)


def test_a_prefix_in_bits_needs_no_rank():
    q, k, v = tokens(300)
    cache = slra.KVCache.from_prefix(q, k, v, bits=4, window=3)
    np.testing.assert_allclose(cache.bits, 4, rtol=0.02)
    with pytest.raises(ValueError, match="rtol must be None with bits"):
        slra.KVCache.from_prefix(q, k, v, rtol=0.1, bits=4)


@pytest.mark.parametrize("across_heads", [False, True])
def test_keys_that_are_hidden_take_no_bits(across_heads):
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 96, 8))
    hidden_k, hidden_v = (np.concatenate([x, 1e3 + x], axis=-2) for x in (k, v))
    fit = functools.partial(slra.fit_attention, rank=4, across_heads=across_heads)
    seen = fit(q, k, v).coding
    masked = fit(q, hidden_k, hidden_v, mask=np.arange(192)[None] < 96).coding
    for name in ("rate_k", "rate_v"):
        np.testing.assert_allclose(getattr(masked, name), getattr(seen, name), rtol=1e-12)


@pytest.mark.parametrize("across_heads", [False, True])
def test_scores_at_the_ends_of_the_range_are_coded_or_refused(across_heads):
    q, k, v = (x.astype(np.float32) for x in tokens(60))
    fit = functools.partial(slra.fit_attention, rank=3, enable_gqa=True, across_heads=across_heads)
    tiny = fit(q * np.float32(1e-37), k * np.float32(1e-37), v)
    decoded = slra.KVCache(tiny, bits=8).append(k * np.float32(1e-37), v).decode()[1]
    np.testing.assert_allclose(decoded, v, rtol=0, atol=0.1 * np.max(abs(v)))
    with pytest.raises(ValueError, match="basis must have a finite coding to store bits"):
        slra.KVCache(fit(q * np.float32(1e25), k, v), bits=8)


def _without_coding(basis):
    names = ("wq", "wk", "wv", "uv", "c", "mu", "ranks", "error")
    return slra.AttentionBasis(*(getattr(basis, name) for name in names))


def test_a_basis_without_coding_stores_no_bits():
    with pytest.raises(ValueError, match="basis must have its coding to store bits"):
        slra.KVCache(_without_coding(basis_of(3)), bits=4)


@pytest.mark.parametrize(
    "change",
    [
        lambda named: named["segments.0.rows.k.headers"].__iadd__(1),
        lambda named: named["segments.0.rows.v.used"].__iadd__(2),
        lambda named: named["segments.0.rows.filled"].__iadd__(16),
        lambda named: named["segments.0.rows.filled"].__imul__(-1),
        lambda named: named["segments.0.rows.k.widest"].__iadd__(1),
        lambda named: named.update(
            {"segments.0.rows.k.heap": named["segments.0.rows.k.heap"][:, :, :-1]}
        ),
        lambda named: named.update(lengths=named["lengths"] + 16),
    ],
    ids=["headers", "used", "filled", "negative", "widest", "heap", "lengths"],
)
def test_a_tampered_file_of_bits_is_one_clear_error(change, tmp_path):
    _, k, v = tokens()
    path = tmp_path / "cache"
    slra.KVCache(basis_of((4, 3)), bits=3, n_sink=1).append(k, v).save(path)
    slra.KVCache.load(path)
    _rewritten(path, lambda named, meta: change(named))
    with pytest.raises(ValueError, match=r"path must be a file written by KVCache\.save"):
        slra.KVCache.load(path)


# Parked


@pytest.fixture
def codec():
    pytest.importorskip("safetensors")
    return pytest.importorskip("constriction")


def parked(cache, bits, like=None):
    """The cache that comes back from a file, and the file."""
    file = io.BytesIO()
    cache.save(file, bits=bits)
    return slra.KVCache.load(io.BytesIO(file.getvalue()), like=like), file.getvalue()


def coded_integers(cache):
    """Of the one sequence of a cache whose tokens have all been rounded: keys and values, (H, n, d)."""
    rows = cache._contents.segments[0].rows
    return [to_numpy(x)[0] for x in rows.coordinates(slice(0, int(rows.filled[0])), np.float64)]


@EAGER
@pytest.mark.parametrize("case", list(BITS))
def test_a_parked_cache_is_attention_to_what_it_stands_for(xp, case, codec):
    skip_most_on_jax(xp, case, None)
    options = BITS[case]
    q, k, v = tokens(70)
    like = to_xp(xp, q)
    cache = slra.KVCache(moved(coded_basis(case), xp), bits=(6, 7), **options)
    cache = appended(cache, to_xp(xp, k[:, :69]), to_xp(xp, v[:, :69]), [20, 1, 48])
    before = [to_numpy(x) for x in cache.decode()]
    back, _ = parked(cache, (3, 4), like)
    for one, other in zip(cache.decode(), before, strict=True):
        np.testing.assert_array_equal(to_numpy(one), other)
    back = back.append(to_xp(xp, k[:, 69:]), to_xp(xp, v[:, 69:]))
    assert back.bits < cache.bits - 1
    low_k, low_v = (to_numpy(x) for x in back.decode())
    for low, right, bound in zip((low_k, low_v), (k, v), back.error_bound, strict=True):
        error = np.linalg.norm(low - right, axis=-1)
        assert np.all(error <= to_numpy(bound)[:, None])
        assert np.max(error) > 0.1 * np.max(to_numpy(bound))
    given = {name: x for name, x in options.items() if name in ("softcap", "scale")}
    rows = q[:, -9:]
    if "rotary" in options:
        rows, low_k = rotated(q)[:, -9:], rotated(low_k)
    right, _ = naive_attention(rows, low_k, low_v, is_causal=True, enable_gqa=True, **given)
    out = back.attend(to_xp(xp, q[:, -9:]))
    np.testing.assert_allclose(to_numpy(out), right, atol=1e-11)


def test_what_was_rounded_before_is_parked_without_loss(codec):
    """Sequences of unlike lengths, one of them of more than a chunk, numbers that are no integers, and another time."""
    q, k, v = tokens(1200, batch=(3,))
    basis = slra.fit_attention(
        q[..., :60, :], k[..., :60, :], v[..., :60, :], 3, pool_batch=True, enable_gqa=True
    )
    k[0, 0, 700, 3], v[2, 1, 5, 2], k[0, 1, 40] = np.nan, np.inf, 1e12
    cache = slra.KVCache(basis, batch=(3,), bits=3)
    cache = cache.append(k, v, lengths=np.asarray([1200, 0, 48]))
    back, _ = parked(cache, 10)
    for one, other in zip(back.decode(), cache.decode(), strict=True):
        # Beside numbers that are no integers the other ones of a block were exact.
        one, other = (
            np.delete(x, [*range(32, 48), *range(688, 704)], axis=-2) for x in (one, other)
        )
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[2, :, 16:], other[2, :, 16:])
    for one, other in zip(back.error_bound, cache.error_bound, strict=True):
        np.testing.assert_array_equal(one, other)
    assert back.bits == cache.bits
    again, _ = parked(back, 10)
    for one, other in zip(again.decode(), back.decode(), strict=True):
        np.testing.assert_array_equal(one, other)
    few, _ = parked(cache, 1)
    for one, came, bound in zip(few.decode(), (k, v), few.error_bound, strict=True):
        error = np.linalg.norm(one[0] - came[0], axis=-1)
        assert np.all(np.isnan(error) | (error <= bound[0][:, None]))
        assert np.sum(np.isnan(error)) == np.sum(~np.isfinite(came[0]))
    empty, _ = parked(slra.KVCache(basis, batch=(3,), bits=3), 2)
    assert not empty.lengths.any()


@pytest.mark.parametrize("bits", [1.5, 2.2, 4])
def test_a_file_takes_the_bits_asked_for_and_hardly_more_than_the_entropy(bits, codec):
    n, d = 1500, 32
    q, k, v = decaying(0, heads=HQ, heads_k=HK, n_q=n, n_k=n, d=d, d_v=d, batch=(), dtype="float32")
    basis = slra.fit_attention(q[:, :400], k[:, :400], v[:, :400], 3, enable_gqa=True)
    cache = slra.KVCache(basis, bits=9, window=8).append(k, v)
    back, content = parked(cache, bits)
    numbers = HK * n * 2 * d
    rows, exact = back._contents.segments[0], back._contents.exact
    apart = sum(x.nbytes for x in (*rows.maps[:-1], exact.k, exact.v))
    description = int.from_bytes(content[:8], "little")
    took = (len(content) - apart - description) * 8 / numbers
    assert bits * 0.985 <= took <= bits * 1.03
    entropy = 0
    for x in coded_integers(back):
        for column in np.swapaxes(x, 1, 2).reshape(-1, n):
            _, counts = np.unique(column, return_counts=True)
            entropy -= np.sum(counts * np.log2(counts / n))
    # Of many bits a histogram of 1500 is no measure.
    assert (len(content) - apart - description) * 8 <= 1.03 * entropy or bits > 3
    few, content = parked(slra.KVCache(basis, bits=9).append(k[:, :48], v[:, :48]), bits)
    assert np.abs(coded_integers(few)[0]).max() >= 1


@pytest.mark.parametrize("case", ["plain", "across heads, rotary"])
@pytest.mark.parametrize("bits", [None, 3])
def test_a_file_without_maps_comes_back_by_the_basis(case, bits, codec):
    basis, (_, k, v) = coded_basis(case), tokens(300)
    cache = slra.KVCache(basis, bits=6, n_sink=1, **BITS[case]).append(k, v)
    (whole, apart) = io.BytesIO(), io.BytesIO()
    cache.save(whole, bits=bits)
    cache.save(apart, bits=bits, basis=basis)
    maps = cache._contents.segments[0].maps
    n_bytes = sum(x.nbytes for x in maps[:-1])
    assert len(apart.getvalue()) < len(whole.getvalue()) - 0.8 * n_bytes
    right = slra.KVCache.load(io.BytesIO(whole.getvalue()))
    back = slra.KVCache.load(io.BytesIO(apart.getvalue()), basis=basis)
    for one, other in zip(back.decode(), right.decode(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
    assert back.bits == right.bits
    # Again, after it was loaded.
    again = io.BytesIO()
    back.save(again, basis=basis)
    assert slra.KVCache.load(io.BytesIO(again.getvalue()), basis=basis).bits == back.bits
    other = basis_of(3, across_heads=not case.startswith("across"))
    for wrong, match in (
        (None, "basis must be given: the file was saved without its maps"),
        (other, "basis must be the one that the file was saved with"),
        (_without_coding(basis), "basis must have heads and its coding"),
    ):
        with pytest.raises(ValueError, match=match):
            slra.KVCache.load(io.BytesIO(apart.getvalue()), basis=wrong)
    with pytest.raises(ValueError, match="basis must be None: the file has its maps"):
        slra.KVCache.load(io.BytesIO(whole.getvalue()), basis=basis)
    with pytest.raises(ValueError, match="basis must be the one that the cache was made with"):
        cache.save(io.BytesIO(), basis=other)
    with pytest.raises(ValueError, match="basis must be None for a cache of floats"):
        slra.KVCache(basis).append(k, v).save(io.BytesIO(), basis=basis)


@pytest.mark.parametrize("change", [-1, 0, np.inf, np.nan])
def test_tampered_steps_are_one_clear_error(change, tmp_path, codec):
    basis, (_, k, v), path = basis_of(3), tokens(), tmp_path / "cache"
    slra.KVCache(basis, bits=6).append(k, v).save(path, basis=basis)
    _rewritten(path, lambda named, meta: named["segments.0.step_v"].__imul__(change))
    with pytest.raises(ValueError, match=r"path must be a file written by KVCache\.save"):
        slra.KVCache.load(path, basis=basis)
    _rewritten(path, lambda named, meta: named.pop("segments.0.step_k"))
    with pytest.raises(ValueError, match=r"path must be a file written by KVCache\.save"):
        slra.KVCache.load(path, basis=basis)


def test_numbers_far_from_the_fit_are_coded_too(codec):
    """A mean that is many deviations off, an outlier, coordinates of one value: models fit them, or say how much."""
    q, k, v = tokens(60, seed=9)
    rng = np.random.default_rng(0)
    basis = slra.fit_attention(q, k, v, 3, enable_gqa=True)
    k, v = rng.standard_normal((HK, 600, D)) * 0.01 + 5, np.ones((HK, 600, DV))
    k[:, 0] = 1e4
    cache = slra.KVCache(basis, bits=8).append(k, v)
    back, _ = parked(cache, 8)
    for one, came, bound in zip(back.decode(), (k, v), back.error_bound, strict=True):
        assert np.all(np.linalg.norm(one - came, axis=-1) <= bound[:, None])


def _of_chunks(field, change):
    return lambda named: change(named[f"segments.0.rows.{field}"])


def _replaced(field, change):
    name = f"segments.0.rows.{field}"
    return lambda named: named.update({name: np.ascontiguousarray(change(named[name]))})


NO_CHUNKS = {
    "filled": _of_chunks("filled", lambda x: x.__iadd__(1000)),
    "2^60 tokens": _of_chunks("filled", lambda x: x.__iadd__(2**60)),
    "negative": _of_chunks("filled", lambda x: x.__imul__(-1)),
    "lengths": lambda named: named.update(lengths=named["lengths"] + 16),
    "fewer words": _replaced("k.words", lambda x: x[:-1]),
    "another word": _of_chunks("v.words", lambda x: x[:1].__ixor__(1)),
    "a word of zero": _of_chunks("k.words", lambda x: x[-1:].__imul__(0)),
    "words of the table": _of_chunks("k.table", lambda x: x[:, 0].__isub__(1)),
    "a table of unlike rows": _replaced("k.table", lambda x: x[:, :3]),
    "fewer rows": _replaced("k.table", lambda x: x[:-1]),
    "a support of gigabytes": _of_chunks("k.table", lambda x: x[:, 2].__iadd__(2**31)),
    "an empty support": _of_chunks("v.table", lambda x: x[:, 2].__imul__(0)),
    "another support": _of_chunks("v.table", lambda x: x[:, 1:3].__iadd__(3)),
    "integers of the table": _of_chunks("v.table", lambda x: x[:, 4].__ixor__(1)),
    "odd places": _of_chunks("k.odd_at", lambda x: x.__iadd__(10**6)),
    "negative places": _of_chunks("k.odd_at", lambda x: x.__imul__(-1)),
    "odd numbers": _replaced("k.odd", lambda x: x[:-1]),
    "wide numbers": _replaced("k.odd", lambda x: x.astype("complex64")),
    "halves": lambda named: named.pop("segments.0.rows.half_k"),
}


def _of_layout(**fields):
    return lambda named, meta: meta.update(
        layout=json.dumps(json.loads(meta["layout"]) | fields, sort_keys=True)
    )


OTHER_HEADS = {
    "each by itself": _of_layout(across_heads=False),
    "not a boolean": _of_layout(across_heads=2),
    "one": _of_layout(n_heads=1),
    "none": _of_layout(n_heads=0),
    "more than features": _of_layout(n_heads=40),
    "no number": _of_layout(n_heads="2"),
    "maps of one": lambda named, meta: named.update(
        {
            name: np.ascontiguousarray(x[..., : x.shape[-1] // 2])
            for name, x in named.items()
            if ".maps." in name
        }
    ),
    "maps with another axis": lambda named, meta: named.update(
        {
            name: np.ascontiguousarray(np.swapaxes(x, 1, 3))
            for name, x in named.items()
            if ".maps." in name
        }
    ),
    "a half for each": lambda named, meta: named.update(
        {"segments.0.rows.half_k": np.repeat(named["segments.0.rows.half_k"], 2, axis=1)}
    ),
}


@pytest.mark.parametrize("change", OTHER_HEADS.values(), ids=OTHER_HEADS)
@pytest.mark.parametrize("bits", [None, 3])
def test_a_tampered_file_of_heads_together_is_one_clear_error(change, bits, tmp_path, codec):
    _, k, v = tokens()
    path = tmp_path / "cache"
    cache = slra.KVCache(basis_of((4, 3), across_heads=True), bits=6, n_sink=1).append(k, v)
    cache.save(path, bits=bits)
    slra.KVCache.load(path)
    _rewritten(path, change)
    with pytest.raises(ValueError, match=r"path must be a file written by KVCache\.save"):
        slra.KVCache.load(path)


@pytest.mark.parametrize("change", NO_CHUNKS.values(), ids=NO_CHUNKS)
@pytest.mark.parametrize("across_heads", [False, True], ids=["each head", "across heads"])
def test_a_tampered_parked_file_is_one_clear_error(change, across_heads, tmp_path, codec):
    _, k, v = tokens()
    k[1, 33] = 1e30
    path = tmp_path / "cache"
    basis = basis_of((4, 3), across_heads=across_heads)
    slra.KVCache(basis, bits=6, n_sink=1).append(k, v).save(path, bits=3)
    slra.KVCache.load(path)
    _rewritten(path, lambda named, meta: change(named))
    with pytest.raises(ValueError, match=r"path must be a file written by KVCache\.save"):
        slra.KVCache.load(path)


def test_a_damaged_parked_file_says_which_tokens(tmp_path, codec):
    q, k, v = tokens(1600, batch=(2,))
    basis = slra.fit_attention(q, k, v, 3, pool_batch=True, enable_gqa=True)
    _, content = parked(slra.KVCache(basis, batch=(2,), bits=6).append(k, v), 2)
    import safetensors.numpy

    named = safetensors.numpy.load(content)
    for part in "kv":
        words, table = (named[f"segments.0.rows.{part}.{name}"] for name in ("words", "table"))
        # In the middle of the second chunk of the second sequence.
        at = content.index(words.tobytes()) + 4 * int(table[:7, 0].sum() + table[7, 0] // 2)
        bad = bytearray(content)
        bad[at] ^= 4
        with pytest.raises(ValueError, match=rf"{part}: tokens 256 to 527 of sequence 1$"):
            slra.KVCache.load(io.BytesIO(bytes(bad)))
    # What is damaged where nothing says what it was, is damaged somewhere.
    bad = bytearray(content)
    bad[content.index(named["segments.0.maps.wk"].tobytes())] ^= 4
    with pytest.raises(ValueError, match="its checksum is not that of its content$"):
        slra.KVCache.load(io.BytesIO(bytes(bad)))


def test_parking_without_the_coder_names_the_extra(monkeypatch, tmp_path):
    pytest.importorskip("safetensors")
    _, k, v = tokens()
    cache, path = slra.KVCache(basis_of(3), bits=3).append(k, v), tmp_path / "cache"
    is_there = find_spec("constriction") is not None
    if is_there:
        cache.save(path, bits=2)
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r"constriction: pip install .\.\[codec\]"):
        cache.save(tmp_path / "other", bits=2)
    assert not (tmp_path / "other").exists()
    if is_there:
        with pytest.raises(ImportError, match=r"constriction: pip install .\.\[codec\]"):
            slra.KVCache.load(path)


def test_what_cannot_be_parked_is_one_clear_error(tmp_path):
    _, k, v = tokens()
    for cache in (slra.KVCache(basis_of(3)), slra.KVCache(basis_of(3)).append(k, v)):
        with pytest.raises(ValueError, match="bits must be None but for a cache that has bits"):
            cache.save(tmp_path / "cache", bits=2)
    cache = slra.KVCache(basis_of(3), bits=3).append(k, v)
    for wrong, error in (
        (0, ValueError),
        (11, ValueError),
        ("2", TypeError),
        ((1, 2, 3), TypeError),
    ):
        with pytest.raises(error, match="bits must"):
            cache.save(tmp_path / "cache", bits=wrong)
    assert not list(tmp_path.iterdir())


def test_a_tile_that_is_not_finite_or_too_wide_stays_as_it_is():
    _, k, v = tokens(48)
    k[0, 20, 3], v[1, 5, 2], k[1, 40] = np.nan, np.inf, 1e12
    cache = slra.KVCache(basis_of((4, 3)), bits=3).append(k, v)
    low_k, low_v = cache.decode()
    np.testing.assert_allclose(low_k[1, 40], k[1, 40], rtol=1e-9)
    assert np.all(np.isfinite(low_k[1]))
    assert np.isnan(low_k[0, 20]).any()
    assert not np.isfinite(low_v[1, 5]).all()
    assert np.all(np.isfinite(np.delete(low_k[0], 20, axis=0)))


@EAGER
@pytest.mark.parametrize(
    "options", [{}, {"bits": 4}, {"bits": 4, "window": 5, "n_sink": 2}], ids=str
)
def test_a_cropped_cache_goes_on_from_there(xp, options):
    skip_most_on_jax(xp, len(options), 3)
    _, k, v = (to_xp(xp, x) for x in tokens(60, batch=(2,)))
    cache = slra.KVCache(moved(basis_of((4, 3)), xp), batch=(2,), **options).append(k, v)
    before = [to_numpy(x)[..., :39, :].copy() for x in cache.decode()]
    cache = cache.crop(100).crop(39)
    np.testing.assert_array_equal(to_numpy(cache.lengths), [39, 39])
    cropped = [to_numpy(x).copy() for x in cache.decode()]
    # And again what it stood for, where the rest comes back.
    back = cache.append(*(x[..., 39:, :] for x in (k, v)))
    for one, other, whole in zip(before, cropped, back.decode(), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-12)
        np.testing.assert_allclose(to_numpy(whole)[..., :39, :], one, atol=1e-12)
    assert to_numpy(back.crop(0).lengths).tolist() == [0, 0]
    with pytest.raises(ValueError, match="n must be 0 or more"):
        cache.crop(-1)


# A few keys in full, in bits

CHOICES_IN_BITS = {
    "number": {"bits": (5, 4), "n_top": 5, "rank_index": 4},
    "mass, window and sinks": {
        "bits": 4,
        "top_p": 0.8,
        "window": 5,
        "n_sink": 2,
        "rank_index": 3,
        "softcap": 2.0,
        "scale": 0.5,
    },
    "integers of more than a byte": {"bits": 9, "n_top": 6, "rank_index": 5},
    "by head": {"rtol": 0.02, "n_top": (3, 90), "n_sink": 1, "rank_index": 3},
}


@EAGER
@pytest.mark.parametrize("case", list(CHOICES_IN_BITS))
def test_in_bits_each_query_reads_a_few_keys_in_full(xp, case):
    """Keys that are not chosen have the leading ones of their integers, as a byte each; a block not full is exact."""
    skip_most_on_jax(xp)
    q, k, v = tokens(70)
    how = CHOICES_IN_BITS[case]
    cache = slra.KVCache(moved(basis_of((4, 3)), xp), **how)
    cache = appended(cache, to_xp(xp, k), to_xp(xp, v), [20, 1, 0, 9, 1, 30, 9])
    maps = cache._contents.segments[0].maps
    wq, wk, wv, uv, c, mu = (to_numpy(getattr(maps, name))[0, :, 0] for name in maps._fields[:6])
    whole = [to_numpy(x) for x in cache.decode()]
    place, n_sink = np.arange(70), how.get("n_sink", 0)
    is_exact = (place < n_sink) | (place >= 70 - how.get("window", 0))
    is_exact |= place >= n_sink + (70 - n_sink) // 16 * 16
    low, r = [], how.get("rank_index", D // 4)
    for x, shift, to, back in zip(whole, (c, mu), (wk, wv), (wq.swapaxes(-1, -2), uv), strict=True):
        codes = np.rint((x - shift) @ to)[..., :r]
        assert np.any(np.abs(codes) > 127) == (case in ("integers of more than a byte", "by head"))
        size = np.max(np.abs(codes), axis=-1, keepdims=True) / 127
        unit = 2.0 ** np.ceil(np.log2(np.maximum(size, 1)))
        codes = np.rint(codes / unit) * unit
        low.append(np.where(is_exact[:, None], x, codes @ back[..., :r, :] + shift))
    low, whole = ([np.repeat(x, HQ // HK, axis=0) for x in one] for one in (low, whole))
    for asked in ({}, {"window": (20, 0), "sinks": SINKS, "alibi": SLOPES}):
        given = structure_to_xp(xp, asked)
        found = cache.attend(to_xp(xp, q[:, -3:]), return_lse=True, return_rest=True, **given)
        right = read_of(q[:, -3:], ([low[0]] * 3, low[1]), whole, is_exact, how, asked)
        for one, other in zip(found, right, strict=True):
            np.testing.assert_allclose(to_numpy(one), other, rtol=0, atol=1e-11)


@functools.cache
def basis_in(dtype):
    return slra.fit_attention(*tokens(60, seed=9, dtype=dtype), 3, enable_gqa=True)


def all_chosen_in_bits(seed):
    """A random cache in bits in which all keys are chosen, beside one in which none are: one answer."""
    rng = np.random.default_rng(seed)
    q, k, v = tokens(70, batch=(2,), dtype=["float32", "float64"][rng.integers(2)], seed=seed)
    outlier = [1, 1e3, 1e7][rng.integers(3 if q.dtype == np.float64 else 2)]
    k[:, :, 20, 2] *= outlier
    basis = basis_in(q.dtype)
    options = {"window": int(rng.integers(0, 9)), "n_sink": int(rng.integers(0, 3)), "batch": (2,)}
    options["softcap"] = [None, 2.0][rng.integers(2)]
    options |= [{"bits": float(rng.uniform(0.6, 10))}, {"rtol": 0.02}][rng.integers(2)]
    # By leading coordinates an outlier, or what is beside it, may have no weight at all.
    how = [{"n_top": 100}, {"n_top": (100, 70)}, {"top_p": 1.0}]
    how = how[rng.integers(3 if outlier == 1 else 2)]
    how = {**how, "rank_index": int(rng.integers(1, 7))}
    plain, choosing = slra.KVCache(basis, **options), slra.KVCache(basis, **options, **how)
    sizes = [40, *rng.integers(0, 7, 5)] if rng.integers(2) else rng.integers(0, 12, 6)
    start, changed = 0, rng.integers(5)
    for i, size in enumerate(sizes):
        rows = slice(start, start + size)
        lengths = rng.integers(0, size + 1, 2) if rng.integers(2) else None
        for cache in (plain, choosing):
            cache.append(k[..., rows, :], v[..., rows, :], lengths=lengths)
        start += size
        if i != 3:
            continue
        if changed == 1:
            kept = rng.integers(0, start + 1)
            plain, choosing = (x.crop(kept) for x in (plain, choosing))
        elif changed == 2:
            plain, choosing = (x.select([1, 0]) for x in (plain, choosing))
        elif changed == 3:
            file = io.BytesIO()
            choosing.save(file)
            choosing = slra.KVCache.load(io.BytesIO(file.getvalue()))
    asked = {"return_lse": True, "is_causal": bool(rng.integers(2))}
    asked["window"] = [None, (11, 0)][rng.integers(2)]
    asked["sinks"] = [None, rng.standard_normal(HQ).astype(q.dtype)][rng.integers(2)]
    n_queries = int(rng.integers(1, 4))
    right = plain.attend(q[..., :n_queries, :], **asked)
    found = choosing.attend(q[..., :n_queries, :], return_rest=True, **asked)
    eps = np.finfo(q.dtype).eps
    np.testing.assert_allclose(found[2], 0, rtol=0, atol=100 * eps)
    # Rounding of scores, which an outlier makes as large as itself, times values.
    held_k, held_v = (np.max(np.abs(x), initial=0) for x in plain.decode())
    size = 1 + np.max(np.abs(q)) * held_k * D**0.5
    size *= 1 + held_v
    for one, other in zip(found, right, strict=False):
        np.testing.assert_allclose(one, other, rtol=0, atol=100 * eps * size)


def test_in_bits_with_all_keys_chosen_it_is_the_cache_in_bits():
    for seed in range(25):
        all_chosen_in_bits(seed)


def test_in_bits_what_queries_choose_by_is_counted():
    """In bits and bytes, and it is there again in what was cropped, loaded or parked."""
    q, k, v = tokens(2000)
    basis = slra.fit_attention(q[:, :400], k[:, :400], v[:, :400], 3, enable_gqa=True)
    plain = slra.KVCache(basis, bits=4).append(k, v)
    cache = slra.KVCache(basis, bits=4, n_top=50, rank_index=3).append(k, v)
    held = cache.nbytes - slra.KVCache(basis, bits=4, n_top=50, rank_index=3).nbytes
    numbers = HK * 2000 * (D + DV)
    # Bytes of three coordinates and their exponent, keys and values, half a byte a tile and 16 a head and block.
    more = (2 * 8 * (16 * 4 + 3.5) + 2 * 128) / (16 * (D + DV))
    np.testing.assert_allclose(cache.bits, plain.bits + more, rtol=1e-12)
    assert numbers * cache.bits / 8 <= held + 1 <= 1.3 * numbers * cache.bits / 8
    for one, other in zip(cache.error_bound, plain.error_bound, strict=True):
        np.testing.assert_array_equal(one, other)
    out = cache.attend(q[:, -2:])
    file = io.BytesIO()
    cache.save(file)
    back = slra.KVCache.load(io.BytesIO(file.getvalue()))
    assert len(file.getvalue()) < cache.nbytes - 0.9 * numbers * more / 8
    assert back.nbytes <= cache.nbytes
    assert back.bits == cache.bits
    np.testing.assert_array_equal(back.attend(q[:, -2:]), out)
    more = [x[:, -100:] for x in (k, v)]
    for other in (cache.crop(1900).append(*more), back.crop(1900).append(*more)):
        np.testing.assert_allclose(other.attend(q[:, -2:]), out, rtol=0, atol=1e-11)


def test_in_bits_of_all_heads_together_none_chooses():
    with pytest.raises(ValueError, match="basis must be fitted without across_heads for bits"):
        slra.KVCache(basis_of((4, 3), across_heads=True), bits=4, n_top=3)


def test_in_bits_what_is_not_finite_is_not_answered():
    q, k, v = tokens(60)
    basis = slra.fit_attention(q, k, v, 3, enable_gqa=True)
    k[0, 5, 1] = np.nan
    cache = slra.KVCache(basis, bits=4, n_top=3).append(k, v)
    out = cache.attend(q[:, -1:])
    assert np.all(np.isnan(out[:2]))
    assert np.all(np.isfinite(out[2:]))


def test_under_jit_queries_choose_among_bytes():
    jax = pytest.importorskip("jax")
    q, k, v = tokens(15)
    basis, options = moved(basis_of((4, 3)), jax.numpy), {"capacity": 17, "bits": 6, "window": 3}
    caches = [slra.KVCache(basis, **options, n_top=n, rank_index=3) for n in (4, 17)]
    (cache, outs), (_, all_chosen) = (jitted(cache, q, k, v, [15]) for cache in caches)
    whole = [np.asarray(x)[:, :15] for x in cache.decode()]
    right, _ = naive_attention(q, *whole, is_causal=True, enable_gqa=True)
    np.testing.assert_allclose(all_chosen[0], right, rtol=0, atol=1e-12)
    maps = cache._contents.segments[0].maps
    wq, wk, wv, uv, c, mu = (np.asarray(getattr(maps, name))[0, :, 0] for name in maps._fields[:6])
    is_exact, low = np.arange(15) >= 12, []
    for x, shift, to, back in zip(whole, (c, mu), (wk, wv), (wq.swapaxes(-1, -2), uv), strict=True):
        few = ((x - shift) @ to)[..., :3] @ back[..., :3, :] + shift
        low.append(np.where(is_exact[:, None], x, few))
    low, whole = ([np.repeat(x, HQ // HK, axis=0) for x in one] for one in (low, whole))
    right, *_ = read_of(q[:, -1:], ([low[0]], low[1]), whole, is_exact, {"n_top": 4}, {})
    np.testing.assert_allclose(outs[0][:, -1:], right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("across_heads", [False, True])
def test_under_jit_a_number_is_a_byte(across_heads):
    jnp = pytest.importorskip("jax.numpy")
    q, k, v = tokens(15)
    basis = moved(basis_of((4, 3), across_heads=across_heads), jnp)
    cache = slra.KVCache(basis, capacity=17, bits=6, window=3, n_sink=1)
    assert cache.bits == 8 + 2 * 64 / 14 / (HK if across_heads else 1)
    cache, outs = jitted(cache, q, k, v, [10, 1, 1, 1, 1, 1])
    low_k, low_v = (np.asarray(x)[:, :15] for x in cache.decode())
    right, _ = naive_attention(q[:, -1:], low_k, low_v, enable_gqa=True)
    np.testing.assert_allclose(outs[-1], right, atol=1e-12)
    for low, came, bound in zip((low_k, low_v), (k, v), cache.error_bound, strict=True):
        assert np.all(np.linalg.norm(low - came, axis=-1) <= np.asarray(bound)[:, None])


# Prefix and error budget


@EAGER
@pytest.mark.parametrize("case", ["window and sinks", "softcap", "rotary"])
def test_the_error_budget_is_kept(xp, case):
    skip_most_on_jax(xp)
    options = OPTIONS[case]
    q, k, v = tokens(120, batch=(2,))
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    cache = slra.KVCache.from_prefix(*arrays, rtol=0.05, **options)
    assert np.all(to_numpy(cache.error) <= 0.05)
    assert cache._contents.layout.rank < (D, DV) or case == "rotary"
    given = {name: x for name, x in options.items() if name in ("softcap", "scale")}
    seen_q, seen_k = (rotated(q), rotated(k)) if "rotary" in options else (q, k)
    exact, _ = naive_attention(seen_q, seen_k, v, is_causal=True, enable_gqa=True, **given)
    out = to_numpy(cache.attend(arrays[0]))
    error, whole = (np.sqrt(np.sum(x**2, axis=(0, -2, -1))) for x in (out - exact, exact))
    # All steps, not only those of the check.
    assert np.all(error <= 0.05 * 1.25 * whole)


def test_a_budget_that_cannot_be_kept_is_an_error():
    q, k, v = tokens(60, dtype="float32")
    with pytest.raises(ValueError, match=r"rtol must be larger: at rank \(8, 6\)"):
        slra.KVCache.from_prefix(q, k, v, rtol=1e-5, dtype="float16")


def test_a_prefix_by_rank_is_a_fit_and_an_append():
    q, k, v = tokens()
    basis = slra.fit_attention(q, k, v, 3, is_causal=True, enable_gqa=True)
    right = slra.KVCache(basis, window=4).append(k, v).attend(q[:, -1:])
    cache = slra.KVCache.from_prefix(q, k, v, 3, window=4)
    np.testing.assert_array_equal(cache.attend(q[:, -1:]), right)


# Files


@EAGER
@pytest.mark.parametrize(
    "case", ["window and sinks", "sparse, softcap", "half", "drift", "capacity", "bits"]
)
def test_a_saved_cache_goes_on_where_it_was(xp, case, tmp_path):
    skip_most_on_jax(xp, case, "capacity")
    options = OPTIONS.get(case, {})
    if case == "half":
        options = {"dtype": "bfloat16" if hasattr(xp, "bfloat16") else "float32"}
    if case == "drift":
        options = {"drift_bound": 0.01, "window": 8}
    if case == "capacity":
        options = {"capacity": 41, "n_sink": 1}
    if case == "bits":
        options = {"bits": 2.5, "window": 3, "n_sink": 1, "softcap": 3.0}
    arrays = [to_xp(xp, x) for x in tokens(41)]
    q, k, v = arrays
    cache = appended(slra.KVCache(moved(basis_of((4, 3)), xp), **options), k, v, [20, 9, 10], q)
    cache.save(tmp_path / "cache")
    back = slra.KVCache.load(tmp_path / "cache", like=q)
    assert back._contents.layout == cache._contents.layout
    assert back.nbytes <= cache.nbytes
    assert back.nbytes == cache.nbytes or case != "capacity"
    outs = []
    for one in (cache, back):
        one = one.append(k[..., 39:, :], v[..., 39:, :], q=q[..., 39:, :])
        outs.append(to_numpy(one.attend(q[..., 39:, :])))
    # Buffers have other sizes, and BLAS then may add up in another order.
    np.testing.assert_allclose(*outs, atol=1e-13)


def _changed(path, at, by):
    content = bytearray(path.read_bytes())
    content[at] ^= by
    path.write_bytes(bytes(content))


def _rewritten(path, change):
    """Write again with a right checksum, so that only what was changed is wrong."""
    import safetensors.numpy

    from slra import _files as files

    content = path.read_bytes()
    named, metadata = safetensors.numpy.load(content), files.safetensors_metadata(content)
    change(named, metadata)
    metadata["checksum"] = files.checksum(named, metadata)
    path.write_bytes(safetensors.numpy.save(named, metadata))


TAMPERED = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a cache"),
    "flipped bit of the content": lambda path: _changed(path, -5, 1),
    "flipped bit of the settings": lambda path: _changed(
        path, path.read_bytes().index(b"n_heads"), 1
    ),
    "another format": lambda path: _rewritten(
        path, lambda named, meta: meta.update(format="other")
    ),
    "a missing array": lambda path: _rewritten(
        path, lambda named, meta: named.pop("segments.0.rows.k")
    ),
    "another array": lambda path: _rewritten(path, lambda named, meta: named.update(x=np.zeros(1))),
    "a wrong shape": lambda path: _rewritten(
        path, lambda named, meta: named.update({"exact.k": named["exact.k"][:, :, :-1]})
    ),
    "a wrong dtype": lambda path: _rewritten(
        path, lambda named, meta: named.update({"exact.k": named["exact.k"].astype("int32")})
    ),
    "another dtype": lambda path: _rewritten(
        path, lambda named, meta: named.update({"exact.k": named["exact.k"].astype("float32")})
    ),
    "settings that are a list": lambda path: _rewritten(
        path, lambda named, meta: meta.update(layout="[1]")
    ),
    "a wrong length": lambda path: _rewritten(
        path, lambda named, meta: named.update(lengths=named["lengths"] + 1000)
    ),
    "a missing setting": lambda path: _rewritten(
        path, lambda named, meta: meta.update(layout=meta["layout"].replace("n_heads", "heads"))
    ),
    "a setting of a wrong type": lambda path: _rewritten(
        path,
        lambda named, meta: meta.update(
            layout=meta["layout"].replace('"window": 7', '"window": "7"')
        ),
    ),
}


@pytest.mark.parametrize("case", list(TAMPERED))
def test_a_tampered_file_is_one_clear_error(case, tmp_path):
    _, k, v = tokens()
    path = tmp_path / "cache"
    slra.KVCache(basis_of((4, 3)), window=7, n_sink=1).append(k, v).save(path)
    slra.KVCache.load(path)
    TAMPERED[case](path)
    with pytest.raises(ValueError, match=r"path must be a file written by KVCache\.save"):
        slra.KVCache.load(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        slra.KVCache.load(tmp_path / "cache")


# Arguments


WRONG = {
    "window must be 0 or more": {"window": -1},
    "n_sink must be an int": {"n_sink": 1.5},
    "n_sparse must be at most 6": {"n_sparse": 7},
    "capacity must be greater than n_sink, 3": {"capacity": 3, "n_sink": 3},
    "dtype must be one of": {"dtype": "int8"},
    "rotary must be 1 to 4 frequencies": {"rotary": [1.0] * 5},
    "drift_bound must be a real number": {"drift_bound": "drift"},
    "drift_bound must be None with a capacity": {"drift_bound": 0.1, "window": 4, "capacity": 9},
    "window must be at least 4": {"drift_bound": 0.1, "window": 3},
    "batch must be a tuple": {"batch": 3},
    "softcap must be finite": {"softcap": 0.0},
    "method must be one of": {"method": "best"},
    "bits must be between 0.5 and 10": {"bits": (4, 12)},
    "bits must be a number or a pair": {"bits": (1, 2, 3)},
    "bits or rtol must be None": {"bits": 4, "rtol": 0.1},
    "n_sparse must be 0 with bits": {"bits": 4, "n_sparse": 1},
    "n_top must be an int, got": {"n_top": 0.5},
    "n_top must be an int, or 2, one for each key head": {"n_top": (1, 2, 3)},
    "top_p must be at most 1, got 1.5": {"top_p": 1.5},
    "top_p must be finite and": {"top_p": 0},
    "rank_index must be between 1 and 8": {"n_top": 3, "rank_index": 9},
    "rank_index must be None without n_top or top_p": {"rank_index": 2},
    "rank_index must be an int or a pair": {"n_top": 3, "rank_index": (1, 2, 3)},
    "rank_index must be between 1 and 6 .Dv": {"n_top": 3, "rank_index": (1, 7)},
    "index must be 'leading' without n_top or top_p": {"index": "query"},
    "index must be 'leading' with bits or rtol": {"n_top": 3, "bits": 4, "index": "query"},
    "index must be one of 'leading', 'query'": {"n_top": 3, "index": "own"},
    "n_sparse must be left out with n_top": {"n_top": 3, "n_sparse": 1},
    "rotary must be left out with n_top": {"n_top": 3, "rotary": FREQUENCIES},
    "drift_bound must be left out with n_top": {"n_top": 3, "window": 8, "drift_bound": 0.1},
}


@pytest.mark.parametrize("message", list(WRONG))
def test_wrong_options_are_one_clear_error(message):
    with pytest.raises((TypeError, ValueError), match=message):
        slra.KVCache(basis_of((4, 3)), **WRONG[message])


def test_wrong_arguments_are_one_clear_error():
    q, k, v = tokens(5)
    cache = slra.KVCache(basis_of((4, 3)))
    calls = {
        r"k must have shape \(2, 5, 8\), got \(4, 5, 8\)": lambda: cache.append(q, v),
        r"v must have shape \(2, 5, 6\), got \(2, 4, 6\)": lambda: cache.append(k, v[:, :4]),
        r"q must have shape \(4, 5, 8\), got \(2, 5, 8\)": lambda: cache.attend(k),
        "k must have a real floating dtype": lambda: cache.append(k.astype(int), v),
        "mask must be boolean or real floating": lambda: cache.attend(q, mask=np.ones((5, 1), int)),
        r"here \(4, 5, 0\)": lambda: cache.attend(q, mask=np.ones((5, 7), bool)),
        "lengths must be integers": lambda: cache.append(k, v, lengths=np.asarray(1.0)),
        "between 0 and 5": lambda: cache.append(k, v, lengths=np.asarray(6)),
        "is_causal must be a bool": lambda: cache.attend(q, is_causal=1),
    }
    for message, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    assert int(cache.lengths) == 0
    drifting = slra.KVCache(basis_of((4, 3)), window=4, drift_bound=0.1)
    with pytest.raises(ValueError, match="q must be given with drift_bound"):
        drifting.append(k, v)
    with pytest.raises(TypeError, match="basis must be an AttentionBasis"):
        slra.KVCache(None)
    flat = slra.fit_attention(q[0], k[0], v[0], 2)
    with pytest.raises(ValueError, match="basis must have a head axis"):
        slra.KVCache(flat)
    with pytest.raises(ValueError, match=r"batch must be \(2,\)"):
        slra.KVCache(slra.fit_attention(*tokens(9, batch=(2,)), 2, enable_gqa=True), batch=(3,))


def test_lazy_arrays_are_refused():
    da = pytest.importorskip("dask.array")
    with pytest.raises(TypeError, match="basis must hold arrays in memory"):
        slra.KVCache(moved(basis_of((4, 3)), da))


def test_results_have_the_dtype_of_the_queries():
    q, k, v = tokens()
    cache = slra.KVCache(basis_of((4, 3))).append(k.astype("float16"), v.astype("float32"))
    out = cache.attend(q[:, -1:].astype("float16"))
    assert out.dtype == np.float16
    right, _ = expected(q, k, v, basis_of((4, 3)), n_queries=1)
    # Scores, below 20 here, and values are off by 2^-11 of their size.
    np.testing.assert_allclose(out, right, atol=60 * 2**-11)


def test_an_empty_cache_attends_to_nothing():
    out, lse = slra.KVCache(basis_of((4, 3))).attend(tokens(2)[0], return_lse=True)
    assert not np.any(out)
    assert np.all(np.isneginf(lse))


def test_what_was_appended_may_change_afterwards():
    q, k, v = tokens()
    cache = slra.KVCache(basis_of((4, 3)), window=4).append(k, v)
    before = cache.attend(q[:, -1:])
    k *= 0
    np.testing.assert_array_equal(cache.attend(q[:, -1:]), before)


def test_examples_run():
    result = doctest.testmod(module)
    assert (result.failed, result.attempted > 0) == (0, True)


# Backend


@EAGER
def test_buffers_are_zeros_whatever_their_layout(xp):
    table, like = backend_of(xp), to_xp(xp, np.ones(1, dtype="float32"))
    keys = table.key_buffer((2, 3, 7, 5), xp.float64, like)
    for buffer, n in ((keys, 7), (table.rows_like(keys, 9), 9), (xp.zeros((2, 3, 4, 5)), 4)):
        longer = table.rows_like(buffer, n + 1)
        assert (buffer.shape, longer.shape) == ((2, 3, n, 5), (2, 3, n + 1, 5))
        assert longer.dtype == buffer.dtype
        assert not np.any(to_numpy(longer))


@EAGER
def test_rows_are_put_where_they_belong(xp):
    rng = np.random.default_rng(0)
    buffer, rows = rng.standard_normal((2, 3, 7, 2)), rng.standard_normal((2, 3, 4, 2))
    for places in ([[0, 1, 2, 3]] * 2, [[5, 6, -1, 0]] * 2, [[-1, 3, 2, 6], [-2, -1, 0, 1]]):
        places = np.asarray(places)
        right = buffer.copy()
        for b in range(2):
            for i, place in enumerate(places[b]):
                if place >= 0:
                    right[b, :, place] = rows[b, :, i]
        table = backend_of(xp)
        out = table.put_rows(to_xp(xp, buffer.copy()), to_xp(xp, rows), places)
        np.testing.assert_array_equal(to_numpy(out), right)
    assert [len(runs(np.asarray(x))) for x in ([], [-1, -1], [3, 4, 5], [5, 0, 1])] == [0, 0, 1, 2]


def test_numpy_refuses_a_file_in_bfloat16(tmp_path):
    torch = pytest.importorskip("torch")
    basis = moved(basis_of(3), compat.array_namespace(torch.empty(0)))
    slra.KVCache(basis, dtype="bfloat16").save(tmp_path / "cache")
    with pytest.raises(ValueError, match="like must be an array of a library that has bfloat16"):
        slra.KVCache.load(tmp_path / "cache")


@pytest.mark.parametrize("options", [{"rank": 3}, {"rtol": 0.1}])
def test_a_prefix_has_a_query_for_each_token(options):
    q, k, v = tokens()
    with pytest.raises(ValueError, match="q and k must have the same length"):
        slra.KVCache.from_prefix(q[..., :20, :], k, v, **options)
