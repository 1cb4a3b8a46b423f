"""Low-rank attention against each method's own definition, written with whole matrices in double precision."""

import dataclasses

import numpy as np
import pytest

import slra
from slra.attn import chosen
from tests.backends import structure_to_xp, to_numpy, to_xp
from tests.naive_attention import (
    SINKS,
    STRUCTURES,
    decaying,
    frobenius,
    naive_attention,
    places,
)

EPS = {"float32": np.finfo("float32").eps, "float64": np.finfo("float64").eps}
SCALE = 8**-0.5


def truncated(x, rank):
    U, S, Vh = np.linalg.svd(x, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


def tail(x, rank):
    """Frobenius distance to the best matrix of this rank (Eckart and Young)."""
    return np.sqrt(np.sum(np.linalg.svd(x, compute_uv=False)[..., rank:] ** 2, axis=-1))


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True, "causal_align": "bottom_right"},
    "softcap": {"softcap": 2.0, "scale": 0.5},
}


@pytest.mark.parametrize(
    ("case", "dtype"), [*((c, "float64") for c in OPTIONS), ("plain", "float32")]
)
def test_svd_is_the_formula(xp, case, dtype):
    options = OPTIONS[case]
    q, k, v = decaying(dtype=dtype)
    out, lse = slra.low_rank_attention(
        *(to_xp(xp, x) for x in (q, k, v)), (3, 2), method="svd", return_lse=True, **options
    )
    hats = (truncated(x.astype("float64"), r) for x, r in ((q, 3), (k, 3), (v, 2)))
    expected, expected_lse = naive_attention(*hats, **options)
    # Singular vectors move by eps over the relative gap, here about 0.1, and scores by that times their size.
    atol = 1000 * EPS[dtype]
    np.testing.assert_allclose(to_numpy(out), expected, rtol=0, atol=atol)
    np.testing.assert_allclose(to_numpy(lse), expected_lse, rtol=0, atol=atol)


def test_svd_with_l1_thresholds_each_low_rank_matrix(xp):
    q, k, v = decaying()
    out = slra.low_rank_attention(
        *(to_xp(xp, x) for x in (q, k, v)), (3, 2), method="svd", l1=(0.1, 0.0, 0.3)
    )
    hats = [truncated(x, r) for x, r in ((q, 3), (k, 3), (v, 2))]
    hats = [
        np.sign(x) * np.maximum(abs(x) - t, 0) for x, t in zip(hats, (0.1, 0, 0.3), strict=True)
    ]
    expected, _ = naive_attention(*hats)
    np.testing.assert_allclose(to_numpy(out), expected, rtol=0, atol=1000 * EPS["float64"])


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("svd", "float64"), ("scores", "float64"), ("output", "float64"), ("output", "float32")],
)
def test_full_rank_is_exact(xp, method, dtype):
    q, k, v = decaying(heads=4, dtype=dtype)
    mask = np.random.default_rng(1).random((40, 50)) < 0.7
    mask[5] = False
    options = {"enable_gqa": True, "softcap": 3.0 if method == "scores" else None}
    out, lse = slra.low_rank_attention(
        *(to_xp(xp, x) for x in (q, k, v)),
        (8, 6),
        method=method,
        mask=to_xp(xp, mask),
        return_lse=True,
        **options,
    )
    expected, expected_lse = naive_attention(q, k, v, mask=mask, **options)
    assert np.all(to_numpy(out)[:, 5] == 0)
    # The largest score is about 30, each carries a few roundings of its terms.
    np.testing.assert_allclose(to_numpy(out), expected, rtol=0, atol=500 * EPS[dtype])
    np.testing.assert_allclose(to_numpy(lse), expected_lse, rtol=0, atol=500 * EPS[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_full_rank_is_exact_with_fewer_tokens_than_dimensions(xp, dtype):
    """Nor are the directions that few tokens with little value lie in."""
    q, k, v = decaying(n_q=6, n_k=6, d_v=8, dtype=dtype)
    v = (v * 30.0 ** -np.arange(6)[:, None]).astype(dtype)
    out = slra.low_rank_attention(*(to_xp(xp, x) for x in (q, k, v)), 6, method="output")
    atol = 10 * EPS[dtype] * np.max(np.abs(v))  # scores of a few units, and a handful of products
    np.testing.assert_allclose(to_numpy(out), naive_attention(q, k, v)[0], rtol=0, atol=atol)


def test_joint_is_the_best_rank_of_the_scores(xp):
    q, k, v = decaying()
    basis = slra.fit_attention(*(to_xp(xp, x) for x in (q, k, v)), 3, method="scores")
    wq, wk, c, wv, mu = (to_numpy(getattr(basis, name)) for name in ("wq", "wk", "c", "wv", "mu"))
    np.testing.assert_allclose(c, k.mean(-2, keepdims=True), atol=1e-13)
    centred = k - k.mean(-2, keepdims=True)
    scores = q @ centred.swapaxes(-1, -2)
    approximate = (q @ wq) @ (centred @ wk).swapaxes(-1, -2)
    np.testing.assert_allclose(approximate, truncated(scores, 3), atol=1e-11)
    centred = v - v.mean(-2, keepdims=True)
    np.testing.assert_allclose(mu, v.mean(-2, keepdims=True), atol=1e-13)
    np.testing.assert_allclose(
        centred @ wv @ wv.swapaxes(-1, -2), truncated(centred, 3), atol=1e-12
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_is_the_best_rank_in_the_metric_of_the_attention(xp, options):
    q, k, v = decaying()
    basis = slra.fit_attention(*(to_xp(xp, x) for x in (q, k, v)), 3, **options)
    wq, wk, c, wv, mu = (to_numpy(getattr(basis, name)) for name in ("wq", "wk", "c", "wv", "mu"))
    # With an identity for V the output is the attention matrix; 40 queries are all looked at.
    identity = np.broadcast_to(np.eye(50), (2, 50, 50))
    weights, _ = naive_attention(q, k, identity, **options)
    received = weights.sum(-2)[..., None]
    np.testing.assert_allclose(c, (received * k).sum(-2, keepdims=True) / 40, atol=1e-12)
    weighted = (k - c) * np.sqrt(received)
    scores = q @ weighted.swapaxes(-1, -2)
    error = frobenius((q @ wq) @ (weighted @ wk).swapaxes(-1, -2) - scores)
    np.testing.assert_allclose(error, tail(scores, 3), rtol=1e-9)
    out = weights @ v
    np.testing.assert_allclose(mu, out.mean(-2, keepdims=True), atol=1e-12)
    centred = out - mu
    projected = centred @ wv @ wv.swapaxes(-1, -2)
    np.testing.assert_allclose(frobenius(projected - centred), tail(centred, 3), rtol=1e-9)


@pytest.mark.parametrize("method", ["svd", "scores", "output"])
def test_grouped_heads_share_the_basis_of_their_key_head(xp, method):
    q, k, v = decaying(heads=4)
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    basis = slra.fit_attention(*arrays, (3, 2), method=method, enable_gqa=True)
    assert [basis.wq.shape, basis.wk.shape, basis.uv.shape] == [(4, 8, 3), (2, 8, 3), (2, 2, 6)]
    assert basis.error.shape == (4,)
    assert basis.ranks == ((3, 2), (3, 2))
    out = to_numpy(basis.attend(*arrays, enable_gqa=True))
    if method == "svd":
        hats = (truncated(x, r) for x, r in ((q, 3), (k, 3), (v, 2)))
        expected, _ = naive_attention(*hats, enable_gqa=True)
    else:  # as one head with the queries of two
        stacked = q.reshape(2, 80, 8)
        whole = slra.fit_attention(stacked, k, v, (3, 2), method=method)
        expected = whole.attend(stacked, k, v).reshape(4, 40, 6)
    np.testing.assert_allclose(out, expected, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_error_is_of_queries_that_were_held_out(xp, options):
    """Fit to the first half, test on the second."""
    q, k, v = decaying(batch=(2,))
    basis = slra.fit_attention(*(to_xp(xp, x) for x in (q, k, v)), (3, 4), **options)
    assert basis.is_held_out
    first, second = ({**options, "causal_align": 10 + start} for start in (0, 20))
    half = slra.fit_attention(q[..., :20, :], k, v, (3, 4), **first)
    expected, _ = naive_attention(q[..., 20:, :], k, v, **second)
    error = frobenius(half.attend(q[..., 20:, :], k, v, **second) - expected) / frobenius(expected)
    np.testing.assert_allclose(to_numpy(basis.error), error, rtol=1e-8)


def test_error_of_a_single_query_is_in_sample(xp):
    q, k, v = decaying(n_q=1)
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    basis = slra.fit_attention(*arrays, (3, 4), method="svd")
    assert not basis.is_held_out
    expected, _ = naive_attention(q, k, v)
    error = frobenius(to_numpy(basis.attend(*arrays)) - expected) / frobenius(expected)
    np.testing.assert_allclose(to_numpy(basis.error), error, rtol=1e-9)


HIDING = {
    "mask": {},
    "mask-and-causal": {"is_causal": True},
    "additive": {},
}


@pytest.mark.parametrize("method", ["svd", "scores", "output"])
@pytest.mark.parametrize("name", HIDING)
def test_a_fit_does_not_see_what_is_hidden(xp, name, method):
    """Not even white noise, or NaN; under jit values are not looked at, and ranks are the same."""
    q, k, v = decaying(n_q=40, n_k=40)
    rng, options = np.random.default_rng(1), HIDING[name]
    mask = np.zeros((60, 60), dtype=bool)
    mask[10:50, 10:50] = True
    if name == "additive":
        mask = np.where(mask, 0.0, -np.inf)
    right = slra.fit_attention(q, k, v, (3, 2), method=method, **options)
    expected = right.attend(q, k, v, **options)
    for fill in (10.0, np.nan):
        wide = []
        for x in (q, k, v):
            wide.append(fill * rng.standard_normal((*x.shape[:-2], 60, x.shape[-1])))
            wide[-1][..., 10:50, :] = x
        arrays = [to_xp(xp, x) for x in (*wide, mask)]
        basis = slra.fit_attention(*arrays[:3], (3, 2), method=method, mask=arrays[3], **options)
        out = to_numpy(basis.attend(*arrays[:3], mask=arrays[3], **options))
        np.testing.assert_allclose(out[..., 10:50, :], expected, atol=1e-9)
        np.testing.assert_allclose(to_numpy(basis.error), right.error, rtol=1e-7)


@pytest.mark.parametrize("method", ["svd", "scores", "output"])
def test_pooling_fits_one_basis_to_the_whole_batch(xp, method):
    q, k, v = decaying(batch=(3,))
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    basis = slra.fit_attention(*arrays, 3, method=method, pool_batch=True)
    assert basis.wq.shape == (2, 8, 3)
    assert basis.error.shape == (2,)
    out = to_numpy(basis.attend(*arrays))
    if method == "output":  # the same data three times teach no more than once
        tripled = [to_xp(xp, np.repeat(x[:1], 3, axis=0)) for x in (q, k, v)]
        out = to_numpy(slra.fit_attention(*tripled, 3, pool_batch=True).attend(*arrays))
        single = slra.fit_attention(*(x[0] for x in (q, k, v)), 3)
    else:
        single = slra.fit_attention(
            *(np.concatenate(list(x), axis=-2) for x in (q, k, v)), 3, method=method
        )
    np.testing.assert_allclose(out, single.attend(q, k, v), atol=1e-10)


def test_a_basis_of_the_past_knows_nothing_of_the_future(xp):
    q, k, v = decaying(n_q=50)
    later = [np.concatenate([x[:, :30], np.cos(x[:, 30:] * 7)], axis=-2) for x in (q, k, v)]
    basis = slra.fit_attention(*(to_xp(xp, x[:, :30]) for x in (q, k, v)), 3, is_causal=True)
    one, other = (
        slra.low_rank_attention(*(to_xp(xp, x) for x in arrays), basis=basis, is_causal=True)
        for arrays in ((q, k, v), later)
    )
    np.testing.assert_array_equal(to_numpy(one)[:, :30], to_numpy(other)[:, :30])
    assert np.max(np.abs(to_numpy(one)[:, 30:] - to_numpy(other)[:, 30:])) > 0.1


def test_masked_keys_do_not_count(xp):
    q, k, v = decaying()
    mask = np.arange(50) < 40
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    out = slra.low_rank_attention(*arrays, 3, mask=to_xp(xp, mask[None, :]))
    short = slra.low_rank_attention(q, k[:, :40], v[:, :40], 3)
    np.testing.assert_allclose(to_numpy(out), short, atol=1e-10)


@pytest.mark.parametrize("shapes", ["no heads", "shared keys"])
def test_leading_axes_broadcast(xp, shapes):
    q, k, v = decaying(heads=3, heads_k=1)
    if shapes == "no heads":
        q, k, v = (x[0] for x in (q, k, v))
    out = slra.low_rank_attention(*(to_xp(xp, x) for x in (q, k, v)), (8, 6))
    expected, _ = naive_attention(q, k, v)
    assert out.shape == expected.shape
    np.testing.assert_allclose(to_numpy(out), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "method"),
    [
        *((case, "output") for case in ("zero", "one key", "equal keys", "huge", "tiny")),
        *((case, "scores") for case in ("zero", "equal keys", "huge")),
        ("zero", "svd"),
    ],
)
def test_degenerate_data_give_what_attention_gives(xp, case, method):
    q, k, v = decaying(dtype="float32")
    if case == "zero":
        q, k, v = 0 * q, 0 * k, 0 * v
    elif case == "one key":
        k, v = k[:, :1], v[:, :1]
    elif case == "equal keys":
        k = np.repeat(k[:, :1], 50, axis=-2)
    else:
        factor = np.float32(1e25 if case == "huge" else 1e-25)
        q, k, v = q * factor, k / factor, v * factor
    rank = 1 if case == "one key" else (8, 6)
    out = slra.low_rank_attention(*(to_xp(xp, x) for x in (q, k, v)), rank, method=method)
    if case == "one key":
        q, k, v = (truncated(x.astype("float64"), 1) for x in (q, k, v))
    expected, _ = naive_attention(q, k, v)
    size = np.max(np.abs(expected))
    np.testing.assert_allclose(to_numpy(out), expected, rtol=0, atol=500 * EPS["float32"] * size)


def test_half_precision_is_computed_in_single(xp):
    if not hasattr(xp, "float16"):
        pytest.skip("no float16 here")
    q, k, v = decaying(dtype="float16")
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    basis = slra.fit_attention(*arrays, 5)
    assert basis.wq.dtype == xp.float32
    out = basis.attend(*arrays)
    assert out.dtype == xp.float16
    reference = slra.low_rank_attention(*(x.astype("float64") for x in (q, k, v)), 5)
    np.testing.assert_allclose(to_numpy(out), reference, atol=4 * np.finfo("float16").eps)


def test_low_rank_attention_stays_on_the_device_of_the_input(xp, device):
    q, k, v = (xp.asarray(x, device=device) for x in decaying())
    basis = slra.fit_attention(q, k, v, 3, is_causal=True, causal_align="bottom_right")
    assert basis.attend(q, k, v).device == basis.error.device == q.device


def test_the_formula_keeps_no_gradient_of_the_fit():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.tensor(x, requires_grad=True) for x in decaying())
    basis = slra.fit_attention(q, k, v, 3)
    assert not basis.wq.requires_grad
    through = torch.autograd.grad(slra.low_rank_attention(q, k, v, 3).sum(), (q, k, v))
    fixed = torch.autograd.grad(basis.attend(q, k, v).sum(), (q, k, v))
    for one, other in zip(through, fixed, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_jax_differentiates_with_a_constant_basis():
    jax = pytest.importorskip("jax")
    arrays = [jax.numpy.asarray(x) for x in decaying()]
    basis = slra.fit_attention(*arrays, 3)
    through = jax.grad(lambda x: slra.low_rank_attention(*x, 3).sum())(arrays)
    fixed = jax.grad(lambda x: basis.attend(*x).sum())(arrays)
    for one, other in zip(through, fixed, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_a_basis_is_a_pytree_with_static_ranks():
    jax = pytest.importorskip("jax")
    arrays = [jax.numpy.asarray(x) for x in decaying()]
    basis = jax.jit(lambda x: slra.fit_attention(*x, (3, 2)))(arrays)
    assert basis.ranks == ((3, 2), (3, 2))
    assert len(jax.tree.leaves(basis)) == 7
    out = jax.jit(lambda basis, x: basis.attend(*x))(basis, arrays)
    np.testing.assert_allclose(out, basis.attend(*arrays), atol=1e-12)


WRONG = {
    "method": ({"rank": 3, "method": "best"}, "method must be one of 'svd', 'scores', 'output'"),
    "rank": ({"rank": 9}, r"rank must be between 1 and 8 \(min of Nk and D\), got 9"),
    "rank_v": ({"rank": (8, 7)}, r"rank must be between 1 and 6 \(min of Nk and Dv\), got 7"),
    "l1": ({"rank": 3, "l1": 0.1}, 'l1 must be 0 unless method is "svd"'),
    "negative": ({"rank": 3, "l1": -0.1, "method": "svd"}, "l1 must be finite and 0 or more"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_values_are_named(xp, case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        slra.low_rank_attention(*(to_xp(xp, x) for x in decaying()), **options)


@pytest.mark.parametrize(("rank", "message"), [("3", "int"), ((1, 2, 3), "pair"), (None, "int")])
def test_wrong_ranks_are_named(rank, message):
    with pytest.raises(TypeError, match=message):
        slra.fit_attention(*decaying(), rank)


def test_a_basis_fits_what_it_was_fitted_on():
    q, k, v = decaying(heads=4)
    basis = slra.fit_attention(q, k, v, 3, enable_gqa=True)
    with pytest.raises(ValueError, match="pass enable_gqa=True"):
        basis.attend(q, q, q[..., :6])
    with pytest.raises(ValueError, match=r"widths \(D, Dv\) of the basis, \(8, 6\), got \(8, 8\)"):
        basis.attend(q, k, k, enable_gqa=True)
    with pytest.raises(ValueError, match=r"heads of the basis, \(4, 2\), got \(2, 2\)"):
        basis.attend(q[:2], k, v, enable_gqa=True)
    with pytest.raises(ValueError, match="rank, rtol and l1 must be left out"):
        slra.low_rank_attention(q, k, v, 3, basis=basis, enable_gqa=True)


@pytest.mark.eager_only("values cannot be looked at here")
def test_infinite_input_is_refused(xp):
    q, k, v = decaying()
    k[0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="k must be finite"):
        slra.fit_attention(*(to_xp(xp, x) for x in (q, k, v)), 3)


@pytest.mark.parametrize("options", STRUCTURES.values(), ids=STRUCTURES)
def test_svd_with_windows_sequences_sinks_and_slopes_is_the_formula(xp, options):
    q, k, v = decaying(heads=4, heads_k=4, n_q=7, n_k=7, batch=(2,))
    given = structure_to_xp(xp, options)
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    out, lse = slra.low_rank_attention(*arrays, (3, 2), method="svd", return_lse=True, **given)
    # Padding takes no part in the fit.
    names = ("is_causal", "causal_align", "window", "lengths_q", "lengths_k")
    given = [options.get(name) for name in names]
    given[1] = given[1] or "top_left"
    seen, _ = places((2, 4, 7, 7), *given)
    q = q * seen.any(-1)[..., None]
    k, v = (x * seen.any(-2)[..., None] for x in (k, v))
    hats = (truncated(x, r) for x, r in ((q, 3), (k, 3), (v, 2)))
    for got, right in zip((out, lse), naive_attention(*hats, **options), strict=True):
        np.testing.assert_allclose(to_numpy(got), right, rtol=0, atol=1000 * EPS["float64"])


@pytest.mark.parametrize("options", STRUCTURES.values(), ids=STRUCTURES)
def test_at_full_rank_windows_sequences_sinks_and_slopes_are_exact(xp, options):
    """With an output and a gradient that are those of exact attention, with keys that stay exact and without."""
    q, k, v = (to_xp(xp, x) for x in decaying(heads=4, n_q=7, n_k=7, d=4, d_v=3, batch=(2,)))
    options = {**structure_to_xp(xp, options), "enable_gqa": True}
    exact = slra.attention(q, k, v, return_lse=True, **options)
    basis = slra.fit_attention(q, k, v, (4, 3), **options)
    grads = slra.attention_vjp(q, k, v, *exact, exact[0], **options)
    for n_exact in (0, 2):
        own = {"basis": basis, "n_exact": n_exact, **options}
        found = slra.low_rank_attention(q, k, v, return_lse=True, **own)
        if not n_exact or "alibi" not in options:
            found += slra.low_rank_attention_vjp(q, k, v, *exact, exact[0], **own)
        for got, right in zip(found, (*exact, *grads), strict=False):
            # A key that hardly any query sees is fitted to sqrt(eps) only.
            np.testing.assert_allclose(to_numpy(got), to_numpy(right), rtol=0, atol=1e-6)


def test_what_a_window_hides_takes_no_part_in_a_fit():
    """Nor does padding: neither moves the basis, whatever it holds."""
    q, k, v = decaying(n_q=40, n_k=60, d=8)
    options = {"window": (8, 0), "causal_align": "top_left"}
    basis = slra.fit_attention(q, k, v, 4, **options)
    k[:, 40:], v[:, 40:] = 1e3, -1e3
    other = slra.fit_attention(q, k, v, 4, **options)
    np.testing.assert_allclose(other.attend(q, k, v, **options), basis.attend(q, k, v, **options))
    padded = slra.fit_attention(q, k, v, 4, lengths_k=40)
    k[:, 40:], v[:, 40:] = -7.0, 5.0
    other = slra.fit_attention(q, k, v, 4, lengths_k=40)
    np.testing.assert_allclose(
        other.attend(q, k, v, lengths_k=40), padded.attend(q, k, v, lengths_k=40)
    )


def test_thresholds_may_be_learned_and_traced():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in np.random.default_rng(0).standard_normal((3, 2, 9, 4)))
    levels = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)

    def attend(levels, **options):
        return slra.low_rank_attention(q, k, v, 2, method="svd", l1=tuple(levels), **options)

    assert torch.autograd.gradcheck(attend, levels)
    out, lse = attend(levels, return_lse=True)
    right, _ = attend((0.1, 0.2, 0.3), return_lse=True)
    torch.testing.assert_close(out, right, rtol=0, atol=1e-15)
    grads = [
        slra.low_rank_attention_vjp(q, k, v, out, lse, out, 2, method="svd", l1=l1)
        for l1 in (tuple(levels), (0.1, 0.2, 0.3))
    ]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)
    single = torch.tensor(0.1)
    narrow = slra.low_rank_attention(q, k, v, 2, method="svd", l1=single)
    torch.testing.assert_close(narrow, attend((single.item(),) * 3), rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="l1 must be finite"):
        attend((-levels).unbind())
    with pytest.raises(ValueError, match="l1 must have no dimensions"):
        slra.low_rank_attention(q, k, v, 2, method="svd", l1=levels)
    with pytest.raises(ValueError, match='l1 must be 0 unless method is "svd"'):
        slra.low_rank_attention(q, k, v, 2, l1=levels[0])
    jax = pytest.importorskip("jax")
    arrays = [x.numpy() for x in (q, k, v)]
    with jax.enable_x64(True):

        @jax.jit
        def traced(l1):
            return slra.low_rank_attention(*map(jax.numpy.asarray, arrays), 2, method="svd", l1=l1)

        got = traced((0.1, 0.2, 0.3))
        np.testing.assert_allclose(got, out.detach().numpy(), rtol=0, atol=1e-13)


def test_a_formula_in_single_precision_is_that_of_double():
    """Directions far below the first: of the very same numbers, to rounding of the maps."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 60, 8)) * 10.0 ** -np.arange(0, 4, 0.5)
    mixing = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    q, k, v = (x @ mixing).astype("float32")
    basis = slra.fit_attention(q, k, v, 6, method="svd")
    for got, data in ((basis.wk, k), (basis.wv, v)):
        right = np.linalg.svd(data.astype("float64"))[2][..., :6, :]
        right = np.swapaxes(right, -1, -2) @ right
        found = got @ np.swapaxes(got, -1, -2)
        np.testing.assert_allclose(found, right, rtol=0, atol=16 * np.finfo("float32").eps)


# Keys that each query chooses


def chosen_by_each(q, k, v, basis, n_top, keys, **options):
    """Output and log-sum-exp of whole matrices: which key each query reads exactly is looked up in a table.

    ``keys`` says which are exact for all, (..., Hkv, n).
    """
    shared, n = q.shape[-3] // k.shape[-3], k.shape[-2]
    *lead, n_heads, _, _ = k.shape
    wq, wk, wv, uv, c, mu = (
        to_numpy(getattr(basis, name)) for name in ("wq", "wk", "wv", "uv", "c", "mu")
    )

    def by_query_head(x, axis=-3):
        return np.repeat(x, shared, axis=axis)

    low_k = by_query_head((k - c) @ wk).swapaxes(-1, -2)
    low = q @ wq @ low_k + q @ by_query_head(c).swapaxes(-1, -2)
    whole = q @ by_query_head(k).swapaxes(-1, -2)
    low_v, whole_v = by_query_head((v - mu) @ wv @ uv + mu), by_query_head(v)
    is_exact = by_query_head(keys, axis=-2)[..., None, :] & np.ones(low.shape, dtype=bool)
    eye = np.broadcast_to(np.eye(n), (*low.shape[:-2], n, n))
    options = {"scale": q.shape[-1] ** -0.5, **options}
    weights, _ = naive_attention(np.where(is_exact, whole, low), eye, eye, **options)
    weights = np.where(is_exact, -1.0, weights)
    mass = weights.reshape(*lead, n_heads, shared, -1, n).sum(-3)
    place = np.argsort(np.argsort(-mass, axis=-1), axis=-1)
    is_exact |= by_query_head(place < n_top)
    scores = np.where(is_exact, whole, low)
    weights, lse = naive_attention(scores, eye, eye, **options)
    return np.where(is_exact, weights, 0) @ whole_v + np.where(is_exact, 0, weights) @ low_v, lse


def basis_in(xp, basis):
    """The maps, as arrays of a library; nothing else of a basis counts where it is given."""
    names = ("wq", "wk", "wv", "uv", "c", "mu", "error")
    moved = {name: to_xp(xp, getattr(basis, name)) for name in names}
    return dataclasses.replace(basis, **moved, coding=None)


TOP_KEYS = {
    "plain": {"n_top": 2},
    "exact for all too": {"n_top": 2, "n_exact": 2, "softcap": 2.0, "scale": 0.7, "sinks": SINKS},
    "float mask": {"n_top": 3, "mask": "float"},
    "boolean mask": {"n_top": 1, "n_exact": 1, "mask": "bool", "is_causal": True},
    **{name: {"n_top": 2, **STRUCTURES[name]} for name in ("window", "padded-both", "everything")},
}


@pytest.mark.parametrize("case", list(TOP_KEYS))
def test_each_query_reads_a_few_keys_exactly(xp, case):
    q, k, v = decaying(heads=4, n_q=7, n_k=7, d=4, d_v=3, batch=(2,))
    options = dict(TOP_KEYS[case])
    rng = np.random.default_rng(1)
    if kind := options.get("mask"):
        mask = rng.standard_normal((4, 7, 7)) if kind == "float" else rng.random((2, 1, 7, 7)) < 0.7
        if kind == "bool":
            mask[0, :, 5] = False
        options["mask"] = mask
    plain = {name: x for name, x in options.items() if name not in ("n_top", "n_exact")}
    basis = slra.fit_attention(q, k, v, (2, 1), enable_gqa=True, **plain)
    # The keys that receive most attention, of all heads that share them.
    weights, _ = naive_attention(
        q, k, np.broadcast_to(np.eye(7), (2, 2, 7, 7)), enable_gqa=True, **plain
    )
    received = weights.reshape(2, 2, 2 * 7, 7).sum(-2)
    keys = np.argsort(np.argsort(-received, axis=-1), axis=-1) < options.get("n_exact", 0)
    right = chosen_by_each(q, k, v, basis, options["n_top"], keys, **plain)
    found = slra.low_rank_attention(
        *(to_xp(xp, x) for x in (q, k, v)),
        basis=basis_in(xp, basis),
        enable_gqa=True,
        return_lse=True,
        **structure_to_xp(xp, options),
    )
    for got, expected in zip(found, right, strict=True):
        np.testing.assert_allclose(to_numpy(got), expected, rtol=0, atol=1e-12)


def all_chosen(seed):
    """A random problem in which each query reads all that it sees, whatever the basis; in half precision too."""
    rng = np.random.default_rng(seed)
    n_exact = int(rng.integers(3))
    n_q, n_k, shared = (int(n) for n in rng.integers(1, 12, 3))
    n_k += n_exact
    q, k, v = decaying(seed, 2 * (1 + shared % 3), 2, n_q, n_k, 5, 3)
    other = decaying(seed + 1, q.shape[0], 2, 9, 9, 5, 3)
    options = {"enable_gqa": True, "causal_align": int(rng.integers(-2, n_k))}
    options["is_causal"] = bool(rng.integers(2))
    options["window"] = [None, (3, None), (2, 2)][rng.integers(3)]
    options["softcap"] = [None, 3.0][rng.integers(2)]
    options["sinks"] = [None, rng.standard_normal(q.shape[0])][rng.integers(2)]
    options["alibi"] = [None, rng.random(q.shape[0])][rng.integers(2)]
    options["mask"] = [None, rng.random((n_q, n_k)) < 0.7][rng.integers(2)]
    options["lengths_k"] = [None, int(rng.integers(0, n_k + 1))][rng.integers(2)]
    n_top = int(rng.choice([n_k - n_exact, n_k, 2 * n_k]))
    basis = slra.fit_attention(*other, (2, 1), enable_gqa=True)
    for dtype, eps in (("float64", 1e-14), ("float16", 1e-3)):
        arrays = [x.astype(dtype) for x in (q, k, v)]
        right = naive_attention(*arrays, **options)
        found = slra.low_rank_attention(
            *arrays, basis=basis, n_top=n_top, n_exact=n_exact, return_lse=True, **options
        )
        assert found[0].dtype == dtype
        for got, expected in zip(found, right, strict=True):
            finite = np.where(np.isfinite(expected), expected, 0)
            atol = 100 * eps * (1 + np.max(np.abs(finite)))
            np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def test_with_all_keys_chosen_it_is_exact():
    for seed in range(60):
        all_chosen(seed)


def test_what_a_query_chooses_is_its_own(monkeypatch):
    """However many come at once, and whatever is hidden from it, NaN too."""
    q, k, v = decaying(heads=4)
    options = {"enable_gqa": True, "is_causal": True, "causal_align": "bottom_right"}
    basis = slra.fit_attention(q, k, v, (3, 2), **options)
    k[:, 45], v[:, 47] = np.nan, np.inf
    asked = {"basis": basis, "n_top": 4, "return_lse": True, **options}
    with pytest.raises(ValueError, match="k must be finite"):
        slra.low_rank_attention(q, k, v, **asked)
    whole = slra.low_rank_attention(q[:, :34], k, v, **{**asked, "causal_align": 10})
    monkeypatch.setattr(chosen, "MOST_NUMBERS", 1 << 10)
    tiles = slra.low_rank_attention(q[:, :34], k, v, **{**asked, "causal_align": 10})
    alone = [
        slra.low_rank_attention(q[:, i : i + 1], k, v, **{**asked, "causal_align": 10 + i})
        for i in (0, 33)
    ]
    for x, one, first, last in zip(whole, tiles, *alone, strict=True):
        assert np.all(np.isfinite(x))
        np.testing.assert_allclose(one, x, rtol=0, atol=1e-13)
        for i, part in ((0, first), (33, last)):
            np.testing.assert_allclose(part[:, 0], x[:, i], rtol=0, atol=1e-13)


def test_a_number_of_chosen_keys_goes_with_a_rank_only():
    q, k, v = decaying()
    for options in ({"rtol": 0.1}, {"rank": 3, "method": "svd", "l1": 0.1}):
        with pytest.raises(ValueError, match="n_top must be 0 with rtol or l1, got 2"):
            slra.low_rank_attention(q, k, v, n_top=2, **options)
    with pytest.raises(TypeError, match="n_top must be an int"):
        slra.low_rank_attention(q, k, v, 3, n_top=2.0)
    out, lse = slra.low_rank_attention(q, k, v, 3, n_top=2, return_lse=True)
    alibi = np.ones(2)
    with pytest.raises(ValueError, match="n_top must be 0 with alibi in low_rank_attention_vjp"):
        slra.low_rank_attention_vjp(
            q, k, v, out, lse, out, 3, n_top=2, alibi=alibi, causal_align="top_left"
        )
