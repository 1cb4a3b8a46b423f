"""Exact attention against the formula, with the whole matrix of scores, in double precision."""

import numpy as np
import pytest

import slra
from tests.backends import to_numpy, to_xp


def naive_attention(
    q,
    k,
    v,
    *,
    mask=None,
    is_causal=False,
    causal_align="bottom_right",
    scale=None,
    enable_gqa=False,
    softcap=None,
):
    """Return softmax(scale * q k^T + mask) v and the log-sum-exp, term by term as written."""
    q, k, v = (x.astype("float64") for x in (q, k, v))
    if enable_gqa:
        k, v = (np.repeat(x, q.shape[-3] // x.shape[-3], axis=-3) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if is_causal:
        n_q, n_k = scores.shape[-2:]
        offset = n_k - n_q if causal_align == "bottom_right" else 0
        scores = np.where(np.tri(n_q, n_k, offset, dtype=bool), scores, -np.inf)
    peak = np.max(scores, axis=-1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0)
    weights = np.exp(scores - peak)
    total = np.sum(weights, axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (peak + np.log(total))[..., 0]
    return weights / np.where(total == 0, 1, total) @ v, lse


def qkv(shape_q, shape_k, d_v=None, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    shape_v = (*shape_k[:-1], d_v or shape_k[-1])
    return [rng.standard_normal(shape).astype(dtype) for shape in (shape_q, shape_k, shape_v)]


TOL = {"float64": 1e-12, "float32": 4e-6}
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal-top-left": {"is_causal": True, "causal_align": "top_left"},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 1.5},
    "everything": {"is_causal": True, "scale": 0.2, "softcap": 3.0},
}


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
        *(to_xp(xp, x) for x in (q, k, v)), is_causal=is_causal, return_lse=True
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


def test_nan_propagates_to_its_row_only(xp):
    q, k, v = qkv((2, 3, 4), (2, 5, 4))
    q[0, 1, 2] = np.nan
    out = to_numpy(slra.attention(*(to_xp(xp, x) for x in (q, k, v))))
    assert np.all(np.isnan(out[0, 1]))
    assert np.all(np.isfinite(out[0, [0, 2]]))


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
    out, lse = slra.attention(q, k, v, is_causal=True, return_lse=True)
    assert out.device == lse.device == q.device
