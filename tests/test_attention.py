"""Exact attention against the formula, with the whole matrix of scores, in double precision."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import array_api_compat as compat
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import slra
from slra._backends import backend_of, standard
from tests.backends import structure_to_xp, to_numpy, to_xp
from tests.naive_attention import SINKS, SLOPES, STRUCTURES, TOL, naive_attention, qkv


@pytest.mark.parametrize("n_q", [1, 3, 8, 9])
def test_few_queries_and_many_keys(n_q):
    q, k, v = qkv((2, n_q, 16), (2, 9000, 16), 5)
    rng = np.random.default_rng(1)
    masks = {
        "bool": rng.random((n_q, 9000)) < 0.5,
        "float": rng.standard_normal((1, 9000)),
        "none": None,
    }
    masks["bool"][0] = False
    for mask in masks.values():
        for options in ({}, {"softcap": 2.0}, {"is_causal": True, "causal_align": "top_left"}):
            out, lse = slra.attention(q, k, v, mask=mask, return_lse=True, **options)
            right, right_lse = naive_attention(q, k, v, mask=mask, **options)
            np.testing.assert_allclose(out, right, atol=TOL["float64"])
            np.testing.assert_allclose(lse, right_lse, atol=TOL["float64"])


CASES = {
    "plain": {},
    "causal": {"is_causal": True, "causal_align": "bottom_right"},
    "causal-top-left": {"is_causal": True, "causal_align": "top_left"},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 1.5},
    "negative-scale": {"is_causal": True, "causal_align": 4, "scale": -1.5},
    "zero-scale": {"is_causal": True, "causal_align": -2, "scale": 0.0},
    "everything": {"is_causal": True, "causal_align": "bottom_right", "scale": 0.2, "softcap": 3.0},
}


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_scale_and_softcap_may_be_arrays(xp, softcap):
    q, k, v = qkv((2, 3, 7, 4), (2, 3, 7, 4), 6, "float32")
    given = {"scale": -0.7, "softcap": softcap}
    # Of a wider dtype, which changes nothing in that of the answer.
    arrays = {n: to_xp(xp, np.asarray(x)) for n, x in given.items() if x is not None}
    out = slra.attention(*(to_xp(xp, x) for x in (q, k, v)), is_causal=True, **arrays)
    assert to_numpy(out).dtype == "float32"
    right, _ = naive_attention(q, k, v, is_causal=True, **given)
    np.testing.assert_allclose(to_numpy(out), right, rtol=0, atol=TOL["float32"])


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_scale_and_softcap_that_are_refused(name):
    q = np.zeros((2, 3, 4))
    given = [("x", TypeError), (np.ones(1), ValueError), (np.asarray(np.nan), ValueError)]
    for wrong, error in given:
        with pytest.raises(error, match=name):
            slra.attention(q, q, q, **{name: wrong})
    with pytest.raises(ValueError, match="softcap must be finite and greater than 0"):
        slra.attention(q, q, q, softcap=np.asarray(0.0))


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("scale", [0.7, -0.7])
def test_gradients_of_scale_and_softcap(name, scale):
    """On torch and JAX, of exact attention and of a basis, against differences."""
    arrays = qkv((2, 7, 4), (2, 7, 4), 6)
    numbers = {"scale": scale, "softcap": 1.5} if name == "softcap" else {"scale": scale}
    basis = slra.fit_attention(*arrays, 2)

    def value(x, arrays=arrays, basis=basis, **options):
        options = {**numbers, name: x, **options}
        out, low = slra.attention(*arrays, **options), basis.attend(*arrays, **options)
        return (out**3).sum() + (low**3).sum()

    step = 1e-5
    ahead, behind = (value(numbers[name] + sign * step) for sign in (1, -1))
    slopes = []
    with contextlib.suppress(ImportError):
        import torch

        moved = [torch.as_tensor(x) for x in arrays]
        x = torch.tensor(numbers[name], dtype=torch.float64, requires_grad=True)
        fitted = slra.fit_attention(*moved, 2)
        slopes.append(torch.autograd.grad(value(x, moved, fitted), x)[0].item())
    with contextlib.suppress(ImportError):
        import jax

        moved = [jax.numpy.asarray(x) for x in arrays]
        fitted = slra.fit_attention(*moved, 2)
        slopes.append(float(jax.grad(value)(numbers[name], moved, fitted)))
    # The difference is off by step**2 times a third derivative, and by eps / step = 2e-11 times the value.
    np.testing.assert_allclose(slopes, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", list(TOL))
@pytest.mark.parametrize("lengths", [(7, 7), (5, 11), (11, 5)], ids=str)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_attention_equals_the_formula(xp, options, lengths, dtype):
    q, k, v = qkv((2, 3, lengths[0], 4), (2, 3, lengths[1], 4), 6, dtype)
    out, lse = slra.attention(*(to_xp(xp, x) for x in (q, k, v)), return_lse=True, **options)
    expected, expected_lse = naive_attention(q, k, v, **options)
    assert to_numpy(out).dtype == dtype
    np.testing.assert_allclose(to_numpy(out), expected, rtol=0, atol=TOL[dtype])
    np.testing.assert_allclose(to_numpy(lse), expected_lse, rtol=0, atol=TOL[dtype])


@pytest.mark.parametrize("is_causal", [False, True])
def test_more_than_one_tile(xp, is_causal):
    q, k, v = qkv((1, 1100, 4), (1, 2100, 4))
    out, lse = slra.attention(
        *(to_xp(xp, x) for x in (q, k, v)),
        is_causal=is_causal,
        causal_align="bottom_right",
        return_lse=True,
    )
    expected, expected_lse = naive_attention(q, k, v, is_causal=is_causal)
    np.testing.assert_allclose(to_numpy(out), expected, rtol=0, atol=TOL["float64"])
    np.testing.assert_allclose(to_numpy(lse), expected_lse, rtol=0, atol=TOL["float64"])


@pytest.mark.parametrize("shape", [(5, 6), (5, 1), (1, 6), (4, 5, 6), (1, 5, 6), (2, 4, 5, 6)])
@pytest.mark.parametrize("kind", ["bool", "float64"])
@pytest.mark.parametrize("enable_gqa", [False, True])
def test_masks_broadcast(xp, shape, kind, enable_gqa):
    q, k, v = qkv((2, 4, 5, 3), (2, 2 if enable_gqa else 4, 6, 3))
    rng = np.random.default_rng(1)
    mask = rng.random(shape) < 0.6 if kind == "bool" else rng.standard_normal(shape)
    options = {"enable_gqa": enable_gqa}
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    out, lse = slra.attention(*arrays, mask=to_xp(xp, mask), return_lse=True, **options)
    expected, expected_lse = naive_attention(q, k, v, mask=mask, **options)
    np.testing.assert_allclose(to_numpy(out), expected, rtol=0, atol=TOL["float64"])
    np.testing.assert_allclose(to_numpy(lse), expected_lse, rtol=0, atol=TOL["float64"])


def test_a_row_that_attends_to_nothing_is_zero(xp):
    q, k, v = qkv((2, 3, 4), (2, 5, 4))
    mask = np.ones((3, 5), dtype=bool)
    mask[1] = False
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    out, lse = slra.attention(*arrays, mask=to_xp(xp, mask), return_lse=True)
    assert np.all(to_numpy(out)[:, 1] == 0)
    assert np.all(to_numpy(lse)[:, 1] == -np.inf)
    assert np.all(np.isfinite(to_numpy(lse)[:, [0, 2]]))


EMPTY = {
    "no sequences": ((0, 2, 3, 4), (0, 2, 5, 4)),
    "no queries": ((2, 4, 0, 4), (2, 2, 5, 4)),
    "no keys": ((2, 4, 3, 4), (2, 2, 0, 4)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_attend_with_or_to(xp, name):
    q, k, v = (to_xp(xp, x) for x in qkv(*EMPTY[name], 6))
    for options in ({}, {"is_causal": True, "causal_align": "bottom_right"}):
        options = {"enable_gqa": True, **options}
        out, lse = slra.attention(q, k, v, return_lse=True, **options)
        assert np.array_equal(to_numpy(out), np.zeros((*q.shape[:-1], 6)))
        assert np.array_equal(to_numpy(lse), np.full(q.shape[:-1], -np.inf))
        assert slra.attention(q, k, v, **options).shape == out.shape
        grads = slra.attention_vjp(q, k, v, out, lse, out, **options)
        for x, grad in zip((q, k, v), map(to_numpy, grads), strict=True):
            assert np.array_equal(grad, np.zeros(x.shape))


def _hiding(name):
    """Return options of attention, keys (batch, key) that no query sees, and queries that see nothing."""
    keys = np.ones((2, 1, 1, 6), dtype=bool)
    keys[0, ..., 4:] = False
    rows = np.repeat(keys, 6, axis=-2)
    rows[0, :, 5] = False
    added = np.where(rows, 0.0, -np.inf).astype("float32")
    return {
        "keys": ({"mask": keys}, [(0, 4), (0, 5)], []),
        "keys-causal": ({"mask": keys, "is_causal": True}, [(0, 4), (0, 5)], []),
        "rows": ({"mask": rows}, [(0, 4), (0, 5)], [(0, 5)]),
        "added": ({"mask": added, "is_causal": True}, [(0, 4), (0, 5)], [(0, 5)]),
        "causal": ({"is_causal": True, "causal_align": -2}, [(0, 4), (1, 5)], [(0, 0), (1, 1)]),
    }[name]


def test_hidden_keys_are_told_from_others_among_more_than_half_precision_counts():
    """Whole numbers up to 256 are all that bfloat16 has; the last keys, which few queries see, were lost."""
    torch = pytest.importorskip("torch")
    n = 600
    q, k, v = torch.zeros(1, n, 1), torch.zeros(1, n, 1), torch.zeros(1, n, 1)
    q[:, -1], k[:, -1], v[:, -1] = 30.0, 30.0, 1.0
    mask = torch.arange(n)[None, :] != 5
    v[:, 5] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        out = slra.attention(
            *(x.to(dtype) for x in (q, k, v)), mask=mask, is_causal=True, scale=1.0
        )
        assert out[0, -1, 0] == 1
        assert not out[0, :-1].any()


@pytest.mark.parametrize("name", ["keys", "keys-causal", "rows", "added", "causal"])
def test_what_is_hidden_does_not_matter(xp, name):
    """Not to the output, the log-sum-exp or a gradient: NaN, infinities, or the largest numbers."""
    options, keys, queries = _hiding(name)
    options = {n: to_xp(xp, x) if n == "mask" else x for n, x in options.items()}
    options["enable_gqa"] = True
    arrays = qkv((2, 4, 6, 8), (2, 2, 6, 8), 5, "float32")
    ones = to_xp(xp, np.ones((2, 4, 6, 5), dtype="float32"))

    def everything(arrays):
        given = [to_xp(xp, x) for x in arrays]
        out, lse = slra.attention(*given, return_lse=True, **options)
        grads = slra.attention_vjp(*given, out, lse, ones, **options)
        return [to_numpy(x) for x in (slra.attention(*given, **options), out, lse, *grads)]

    expected = everything(arrays)
    for fill in (np.nan, -np.inf, 3e38):
        q, k, v = (x.copy() for x in arrays)
        for b, j in keys:
            k[b, :, j] = v[b, :, j] = fill
        for b, i in queries:
            q[b, :, i] = fill
        if fill == 3e38 and compat.is_jax_namespace(xp):
            continue  # traced, it is looked for what is not finite
        for found, right in zip(everything((q, k, v)), expected, strict=True):
            np.testing.assert_allclose(found, right, atol=2e-6)


@pytest.mark.parametrize("fill", [np.nan, np.inf])
@pytest.mark.parametrize("what", ["keys", "values"])
def test_what_later_queries_see_does_not_matter_to_earlier_ones(xp, what, fill):
    arrays = qkv((2, 2, 6, 8), (2, 2, 6, 8), 5, "float32")
    expected, _ = naive_attention(*arrays, is_causal=True)
    arrays[1 if what == "keys" else 2][1, :, 3, 2] = fill
    given = [to_xp(xp, x) for x in arrays]
    outs = [
        slra.attention(*given, is_causal=True),
        slra.attention(*given, is_causal=True, return_lse=True)[0],
    ]
    for out in map(to_numpy, outs):
        np.testing.assert_allclose(out[0], expected[0], atol=2e-6)
        np.testing.assert_allclose(out[1, :, :3], expected[1, :, :3], atol=2e-6)
        # They do see it.
        late = out[1, :, 3:]
        assert (
            np.all(np.isnan(late))
            if what == "keys"
            else np.array_equal(late[..., 2], np.full_like(late[..., 2], fill), equal_nan=True)
        )
        if what == "values":
            np.testing.assert_allclose(late[..., :2], expected[1, :, 3:, :2], atol=2e-6)


def test_nan_propagates_to_its_row_only(xp):
    q, k, v = qkv((2, 3, 4), (2, 5, 4))
    q[0, 1, 2] = np.nan
    out = to_numpy(slra.attention(*(to_xp(xp, x) for x in (q, k, v))))
    assert np.all(np.isnan(out[0, 1]))
    assert np.all(np.isfinite(out[0, [0, 2]]))


def test_numpy_takes_the_bfloat16_of_ml_dtypes():
    dtype = pytest.importorskip("ml_dtypes").bfloat16
    q, k, v = (x.astype(dtype) for x in qkv((2, 9, 4), (2, 9, 4), 5))
    mask = np.where(np.tri(9, dtype=bool), 0.0, -np.inf).astype(dtype)
    out, lse = slra.attention(q, k, v, mask=mask, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, np.float32)
    expected, expected_lse = naive_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(out.astype("float64"), expected, rtol=2.0**-8, atol=4e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=4e-6)
    basis = slra.fit_attention(q, k, v, 2)
    assert basis.attend(q, k, v).dtype == dtype
    assert slra.randomized_svd(q[0], 2, rng=0).U.dtype == dtype
    assert slra.prox.prox_nuclear(q[0], 0.1).dtype == dtype


def test_half_precision_accumulates_in_single(xp):
    if not hasattr(xp, "float16"):
        pytest.skip("no float16 here")
    q, k, v = qkv((2, 9, 4), (2, 2000, 4), dtype="float16")
    out, lse = slra.attention(*(to_xp(xp, x) for x in (q, k, v)), return_lse=True)
    assert out.dtype == xp.float16
    assert lse.dtype == xp.float32
    expected, expected_lse = naive_attention(q, k, v)
    eps = np.finfo("float16").eps
    np.testing.assert_allclose(to_numpy(out), expected, rtol=eps, atol=eps * 1e-2)
    np.testing.assert_allclose(to_numpy(lse), expected_lse, rtol=0, atol=2e-5)


def test_attention_stays_on_the_device_of_the_input(xp, device):
    q, k, v = (xp.asarray(x, device=device) for x in qkv((2, 3, 4), (2, 5, 4)))
    options = {"is_causal": True, "causal_align": "bottom_right"}
    out, lse = slra.attention(q, k, v, **options, return_lse=True)
    assert out.device == lse.device == q.device


def n_examples(xp):
    """Few where every shape is compiled or becomes a graph."""
    return 6 if compat.is_jax_namespace(xp) else 20 if compat.is_dask_namespace(xp) else 60


@st.composite
def calls(draw):
    """Arguments of attention, all options against each other, as NumPy arrays."""
    n_q, n_k = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    seed = draw(st.integers(0, 2**16))
    batch = (2,) if draw(st.booleans()) else ()
    d, d_v = draw(st.sampled_from([1, 3, 8])), draw(st.sampled_from([1, 4, 8]))
    q, k, v = qkv((*batch, heads * group, n_q, d), (*batch, heads, n_k, d), d_v, dtype, seed)
    options = {
        "is_causal": draw(st.booleans()),
        "causal_align": draw(st.sampled_from(["bottom_right", "top_left", 0, 3, -2])),
        "enable_gqa": group > 1,
        "scale": draw(st.sampled_from([None, None, 0.3, -1.5])),
        "softcap": draw(st.sampled_from([None, None, 2.0])),
    }
    kind = draw(st.sampled_from([None, "bool", "float"]))
    if kind is not None:
        full = (*batch, heads * group, n_q, n_k)
        shape = tuple(draw(st.sampled_from([1, n])) for n in full)[
            draw(st.integers(0, len(full) - 2)) :
        ]
        rng = np.random.default_rng(seed + 1)
        options["mask"] = rng.random(shape) < 0.6 if kind == "bool" else rng.standard_normal(shape)
    return q, k, v, options


def tolerance(q, k, options):
    """Error allowed by rounding: that of the largest score, where it can exceed that of N(0, 1) input."""
    eps = np.finfo(q.dtype).eps
    bound = TOL[str(q.dtype)]
    if options["scale"] is None and options["softcap"] is None and options.get("mask") is None:
        return bound
    scale = abs(options["scale"] or q.shape[-1] ** -0.5)
    longest = max(np.max(np.linalg.norm(x.astype("float64"), axis=-1)) for x in (q, k))
    return max(bound, 32 * eps * (scale * longest**2 + 4))


def test_all_options_together(xp):
    @settings(
        max_examples=n_examples(xp),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def check(call):
        q, k, v, options = call
        expected, expected_lse = naive_attention(q, k, v, **options)
        atol = tolerance(q, k, options)
        if options.get("mask") is not None:
            options = options | {"mask": to_xp(xp, options["mask"])}
        arrays = [to_xp(xp, x) for x in (q, k, v)]
        out, lse = slra.attention(*arrays, return_lse=True, **options)
        np.testing.assert_allclose(to_numpy(out), expected, rtol=0, atol=atol)
        np.testing.assert_allclose(to_numpy(lse), expected_lse, rtol=0, atol=atol)
        alone = slra.attention(*arrays, **options)
        np.testing.assert_allclose(to_numpy(alone), expected, rtol=0, atol=atol)

    check()


@pytest.mark.parametrize("n_keys", [30, 41], ids=["square", "rectangular"])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}], ids=str
)
def test_the_reference_agrees_with_torch(options, n_keys):
    torch = pytest.importorskip("torch")
    heads = 2 if "enable_gqa" in options else 4
    q, k, v = qkv((2, 4, 30, 8), (2, heads, n_keys, 8), 6)
    expected, _ = naive_attention(q, k, v, causal_align="top_left", **options)
    mask = np.random.default_rng(3).standard_normal((4, 30, n_keys))
    with_mask, _ = naive_attention(q, k, v, mask=mask) if not options else (None, None)
    arrays = [torch.from_numpy(x) for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    np.testing.assert_allclose(sdpa(*arrays, **options).numpy(), expected, rtol=0, atol=1e-14)
    if with_mask is not None:
        out = sdpa(*arrays, attn_mask=torch.from_numpy(mask))
        np.testing.assert_allclose(out.numpy(), with_mask, rtol=0, atol=1e-14)


# Longer than every library's tiles, and no multiple of them.
@pytest.mark.parametrize("kind", [None, "bool", "float64"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_override_equals_the_standard(xp, is_causal, kind):
    q, k, v = qkv((2, 1, 600, 4), (2, 1100, 4), 3)
    options = standard.ScoreOptions(0.5, is_causal)
    rng = np.random.default_rng(1)
    mask = {
        None: None,
        "bool": rng.random((600, 1100)) < 0.5,
        "float64": rng.standard_normal((2, 1, 1100)),
    }[kind]
    arrays = [None if x is None else to_xp(xp, x) for x in (q, k, v, mask)]
    expected = standard.Backend(xp).attention(*arrays, options)
    got = backend_of(xp).attention(*arrays, options)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=0, atol=1e-13)
    alone = backend_of(xp).attention_output(*arrays, options)
    np.testing.assert_allclose(to_numpy(alone), to_numpy(expected[0]), rtol=0, atol=1e-13)


EXTREMES = {
    "large": lambda q, k: (q * 3e3, k),
    "equal": lambda q, k: (np.full_like(q, 1e3), np.full_like(k, 1e3)),
    "equal-negative": lambda q, k: (np.full_like(q, -1e3), np.full_like(k, 1e3)),
    "denormal": lambda q, k: (q * np.finfo(q.dtype).smallest_subnormal * 9, k),
    "rising": lambda q, k: (
        np.abs(q),
        np.abs(k) * np.linspace(-1e3, 1e3, k.shape[-2], dtype=k.dtype)[:, None],
    ),
}


@pytest.mark.parametrize("dtype", list(TOL))
@pytest.mark.parametrize("change", EXTREMES.values(), ids=EXTREMES)
def test_extreme_scores(xp, change, dtype):
    q, k, v = qkv((2, 5, 4), (2, 1300, 4), dtype=dtype)
    q, k = change(q, k)
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    mask = np.zeros((5, 1300), dtype=dtype)
    mask[:, ::3] = -np.inf
    mask[3] = -np.inf
    mask[4] = np.finfo(dtype).min
    for kwargs, masked in (({}, {}), ({"mask": mask}, {"mask": to_xp(xp, mask)})):
        out, lse = slra.attention(*arrays, return_lse=True, **masked)
        alone = slra.attention(*arrays, **masked)
        with np.errstate(over="ignore"):
            expected, expected_lse = naive_attention(q, k, v, **kwargs)
        products = np.abs(q.astype("float64") @ k.astype("float64").swapaxes(-1, -2))
        eps = np.finfo(dtype).eps
        atol = 64 * eps * max(1, np.max(products))
        rows = [0, 1, 2, 3] if kwargs else [0, 1, 2, 3, 4]
        assert not np.any(np.isnan(to_numpy(alone)))
        assert not np.any(np.isnan(to_numpy(lse)))
        np.testing.assert_allclose(to_numpy(alone)[:, rows], expected[:, rows], rtol=0, atol=atol)
        np.testing.assert_allclose(to_numpy(out)[:, rows], expected[:, rows], rtol=0, atol=atol)
        np.testing.assert_allclose(
            to_numpy(lse)[:, rows], expected_lse[:, rows], rtol=eps, atol=atol
        )


def test_numpy_needs_memory_linear_in_the_length():
    tracemalloc = pytest.importorskip("tracemalloc")
    q, k, v = qkv((1, 4096, 16), (1, 4096, 16), dtype="float32")
    slra.attention(q, k, v)
    tracemalloc.start()
    slra.attention(q, k, v)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - q.nbytes < 4096 * 4096 * 4 / 8


def test_what_ends_a_call_is_not_kept_waiting(monkeypatch):
    """Ctrl-C is raised where results are awaited: what no thread has begun by then is let go."""
    from slra._backends import numpy_attention

    class Interrupted:
        def result(self):
            begun.acquire(timeout=60)
            raise KeyboardInterrupt

    class Pool(ThreadPoolExecutor):
        def submit(self, *args):
            super().submit(*args)
            return Interrupted()

    def run(task, buffers):
        done.append(task)
        begun.release()
        time.sleep(0.01)

    done, begun = [], threading.Semaphore(0)
    monkeypatch.setattr(numpy_attention, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(numpy_attention, "workers", lambda: contextlib.nullcontext(2))
    # With more than one thread left to BLAS, as when the tests run in one process, none of ours would start.
    monkeypatch.setattr(numpy_attention, "limit_this_thread", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        numpy_attention.in_threads(list(range(500)), run, np.float32, 1 << 30)
    assert 0 < len(done) < 500


def test_jax_compiles_as_much_for_long_sequences_as_for_short_ones():
    jax = pytest.importorskip("jax")

    def size(n):
        x = jax.ShapeDtypeStruct((n, 4), "float32")
        jaxpr = jax.make_jaxpr(lambda x: slra.attention(x, x, x, is_causal=True))(x)
        return str(jaxpr).count(" = ")

    assert size(64_000) == size(4_000)


# array-api-compat caches its look-up of classes, which Dynamo mentions.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_torch_transforms():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in qkv((3, 2, 9, 4), (3, 2, 9, 4)))
    expected = slra.attention(q, k, v, is_causal=True)

    def call(q, k, v):
        return slra.attention(q, k, v, is_causal=True)

    mapped = torch.func.vmap(call)(q, k, v)
    np.testing.assert_allclose(mapped, expected, rtol=0, atol=1e-14)
    compiled = torch.compile(call, backend="eager")(q, k, v)
    np.testing.assert_allclose(compiled, expected, rtol=0, atol=1e-14)
    slope = torch.func.grad(lambda q: call(q, k, v).sum())(q)
    by_lse = torch.func.grad(
        lambda q: slra.attention(q, k, v, is_causal=True, return_lse=True)[0].sum()
    )(q)
    np.testing.assert_allclose(slope, by_lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", [None, "bool", "float64"])
@pytest.mark.parametrize("options", STRUCTURES.values(), ids=STRUCTURES)
def test_windows_sequences_sinks_and_slopes(xp, options, kind):
    q, k, v = qkv((2, 4, 7, 4), (2, 2, 7, 4), 3)
    rng = np.random.default_rng(1)
    mask = {None: None, "bool": rng.random((7, 7)) < 0.6, "float64": rng.standard_normal((4, 1, 7))}
    options = {**options, "mask": mask[kind], "enable_gqa": True}
    expected = naive_attention(q, k, v, **options)
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    out, lse = slra.attention(*arrays, return_lse=True, **structure_to_xp(xp, options))
    alone = slra.attention(*arrays, **structure_to_xp(xp, options))
    for got, right in zip((out, lse, alone), (*expected, expected[0]), strict=True):
        np.testing.assert_allclose(to_numpy(got), right, rtol=0, atol=TOL["float64"])


@pytest.mark.parametrize(
    "options", [{"window": (300, 20)}, {"window": (40, 0), "alibi": SLOPES[:2]}]
)
@pytest.mark.parametrize("align", ["top_left", 700])
def test_windows_over_many_tiles(xp, options, align):
    q, k, v = qkv((2, 1100, 4), (2, 2100, 4))
    options = {**options, "causal_align": align}
    expected = naive_attention(q, k, v, **options)
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    out, lse = slra.attention(*arrays, return_lse=True, **structure_to_xp(xp, options))
    alone = slra.attention(*arrays, **structure_to_xp(xp, options))
    for got, right in zip((out, lse, alone), (*expected, expected[0]), strict=True):
        np.testing.assert_allclose(to_numpy(got), right, rtol=0, atol=TOL["float64"])


def test_lengths_that_are_arrays(xp):
    """Where values cannot be looked at they become masks."""
    q, k, v = qkv((2, 4, 7, 4), (2, 4, 7, 4), 3)
    for name in ("padded-both", "padded-causal", "packed-causal", "everything"):
        options = {
            n: np.asarray(x) if n.startswith("lengths") else x for n, x in STRUCTURES[name].items()
        }
        expected, _ = naive_attention(q, k, v, **options)
        out = slra.attention(*(to_xp(xp, x) for x in (q, k, v)), **structure_to_xp(xp, options))
        np.testing.assert_allclose(to_numpy(out), expected, rtol=0, atol=TOL["float64"])


@pytest.mark.parametrize("masked", [False, True])
def test_keys_outside_a_window_or_a_sequence_may_hold_anything(xp, masked):
    q, k, v = qkv((2, 3, 7, 4), (2, 3, 9, 4))
    expected, _ = naive_attention(q, k, v, window=(2, 0), lengths_k=[6, 9], causal_align="top_left")
    k[0, :, 6:], v[0, :, 6:] = np.nan, np.inf
    k[1, :, 7:], v[1, :, 7:] = np.inf, np.nan
    options = {"lengths_k": np.asarray([6, 9]) if masked else [6, 9], "window": (2, 0)}
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    out = slra.attention(*arrays, causal_align="top_left", **structure_to_xp(xp, options))
    np.testing.assert_allclose(to_numpy(out), expected, rtol=0, atol=TOL["float64"])


REFUSED = {
    "int": ({"window": 3}, TypeError, "window must be a pair"),
    "negative": ({"window": (-2, 0)}, ValueError, "window must be 0 or more"),
    "float": ({"window": (1.5, 0)}, TypeError, "window must be an int"),
    "place": ({"window": (1, 0)}, ValueError, "causal_align"),
    "slopes": ({"alibi": SLOPES}, ValueError, "causal_align"),
    "heads": ({"sinks": SINKS[:3]}, ValueError, r"sinks must have .* got shape \(3,\)"),
    "integer": ({"sinks": np.arange(4)}, TypeError, "sinks must be real floating"),
    "alone": ({"lengths_k": [[3, 6]]}, ValueError, "lengths_q and lengths_k must both be given"),
    "sum": ({"lengths_k": [[3, 5]], "lengths_q": [[3, 4]]}, ValueError, "lengths_k must add up"),
    "long": ({"lengths_k": [3, 10]}, ValueError, "lengths_k must be at most 9, got 10"),
    "shape": ({"lengths_k": [3, 3, 3]}, ValueError, "lengths_k must be one number for each"),
    "less": ({"lengths_k": [-1, 3]}, ValueError, "lengths_k must be 0 or more"),
    "kind": ({"lengths_k": [1.0, 3]}, TypeError, "lengths_k must be integers"),
    "numbers": (
        {"lengths_k": [[3, 6]], "lengths_q": [[3, 4, 0]]},
        ValueError,
        "as many sequences",
    ),
    "unequal": (
        {"lengths_k": [[3, 6]], "lengths_q": [[3, 4]], "is_causal": True},
        ValueError,
        "causal_align",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_windows_and_lengths_that_are_refused(options, error, message):
    q, k, v = qkv((2, 4, 7, 4), (2, 4, 9, 4))
    with pytest.raises(error, match=message):
        slra.attention(q, k, v, **options)
