"""Attention on shards of the keys, merged, is attention on all of them."""

import numpy as np
import pytest

import slra
from tests.backends import to_numpy, to_xp
from tests.naive_attention import TOL, naive_attention, qkv


@pytest.mark.parametrize("dtype", list(TOL))
def test_merged_shards_equal_the_whole(xp, dtype):
    q, k, v = qkv((2, 6, 4), (2, 11, 4), 3, dtype)
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    shards = [
        slra.attention(arrays[0], *(x[..., part, :] for x in arrays[1:]), return_lse=True)
        for part in (slice(0, 1), slice(1, 7), slice(7, 11))
    ]
    out, lse = slra.merge_attention(*(list(x) for x in zip(*shards, strict=True)))
    expected, expected_lse = naive_attention(q, k, v)
    assert to_numpy(out).dtype == to_numpy(lse).dtype == dtype
    np.testing.assert_allclose(to_numpy(out), expected, rtol=0, atol=TOL[dtype])
    np.testing.assert_allclose(to_numpy(lse), expected_lse, rtol=0, atol=TOL[dtype])


def test_rows_that_attend_to_nothing(xp):
    outs = np.asarray([[[1.0], [0.0], [0.0]], [[3.0], [2.0], [0.0]]])
    lses = np.asarray([[1e4, -np.inf, -np.inf], [1e4, -1e4, -np.inf]])
    out, lse = slra.merge_attention([to_xp(xp, x) for x in outs], [to_xp(xp, x) for x in lses])
    np.testing.assert_allclose(to_numpy(out), [[2.0], [2.0], [0.0]], rtol=1e-15)
    np.testing.assert_allclose(to_numpy(lse), [1e4 + np.log(2), -1e4, -np.inf], rtol=1e-15)


def test_a_part_without_keys_does_not_matter(xp):
    """FlashAttention 2 marks it by +inf; what it wrote as the output may be anything."""
    outs = np.asarray([[[1.0], [np.nan]], [[np.nan], [7.0]], [[5.0], [np.inf]]])
    lses = np.asarray([[0.0, -np.inf], [-np.inf, np.inf], [np.inf, -np.inf]])
    out, lse = slra.merge_attention([to_xp(xp, x) for x in outs], [to_xp(xp, x) for x in lses])
    np.testing.assert_array_equal(to_numpy(out), [[1.0], [0.0]])
    np.testing.assert_array_equal(to_numpy(lse), [0.0, -np.inf])


def test_what_is_wrong_is_named():
    out, lse = np.zeros((3, 4)), np.zeros(3)
    with pytest.raises(TypeError, match="outs must be a list or tuple"):
        slra.merge_attention(out, [lse])
    with pytest.raises(ValueError, match="outs must not be empty"):
        slra.merge_attention([], [])
    with pytest.raises(ValueError, match="same length, got 2 and 1"):
        slra.merge_attention([out, out], [lse])
    with pytest.raises(ValueError, match=r"outs\[1\] must have shape \(3, 4\), got \(2, 4\)"):
        slra.merge_attention([out, out[:2]], [lse, lse])
    with pytest.raises(ValueError, match=r"lses\[0\] must have shape \(3,\), got \(3, 4\)"):
        slra.merge_attention([out], [out])
