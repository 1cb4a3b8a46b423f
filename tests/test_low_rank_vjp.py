"""The gradient of low-rank attention against torch's autograd and JAX's grad of `low_rank_attention`."""

import functools

import numpy as np
import pytest

import slra
from tests.backends import to_numpy, to_xp
from tests.naive_attention import decaying

# The largest entry of a gradient is about 10 here.
ATOL = 1e-9

CASES = {
    "scores": {
        "rank": (3, 2),
        "method": "scores",
        "is_causal": True,
        "causal_align": "bottom_right",
        "mask": "float64",
    },
    "output": {"rank": (3, 2), "softcap": 2.0, "scale": 0.5},
    "svd": {"rank": (3, 2), "method": "svd", "enable_gqa": True, "mask": "bool"},
    "exact keys": {
        "rank": 3,
        "n_exact": 5,
        "enable_gqa": True,
        "softcap": 2.0,
        "is_causal": True,
        "causal_align": "top_left",
        "mask": "bool",
    },
    "top keys": {
        "rank": 3,
        "n_top": 4,
        "n_exact": 2,
        "enable_gqa": True,
        "softcap": 2.0,
        "is_causal": True,
        "causal_align": "top_left",
        "mask": "bool",
    },
    # Last: the case that eager JAX gets, where it is the quickest to compile.
    "l1": {"rank": 3, "method": "svd", "l1": (0.1, 0, 0.3), "enable_gqa": True, "mask": "bool"},
}


def problem(case):
    """Inputs, gradients of the outputs and options, as NumPy arrays."""
    options = dict(CASES[case])
    arrays = decaying(heads=4 if options.get("enable_gqa") else 2)
    rng = np.random.default_rng(1)
    heads = arrays[0].shape[0]
    grads = rng.standard_normal((heads, 40, 6)), rng.standard_normal((heads, 40))
    if options.get("mask") == "bool":
        mask = rng.random((40, 50)) < 0.7
        # A query that attends to nothing.
        mask[5] = False
        # The log-sum-exp of such a row is -inf, and has no gradient.
        grads[1][:, 5] = 0
        options["mask"] = mask
    elif options.get("mask") == "float64":
        options["mask"] = rng.standard_normal((heads, 1, 50))
    return arrays, grads, options


def to_all(convert, options):
    return {n: convert(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}


def torch_gradients(arrays, grads, options):
    """Gradients by autograd, in double precision; a basis would be NumPy's, so it is fitted again."""
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(x, requires_grad=True) for x in arrays]
    options = to_all(torch.from_numpy, options)
    out, lse = slra.low_rank_attention(*leaves, return_lse=True, **options)
    grad_out, grad_lse = map(torch.from_numpy, grads)
    lse = torch.where(torch.isfinite(lse), lse, 0)
    total = (out * grad_out).sum() + (lse * grad_lse).sum()
    return [x.numpy() for x in torch.autograd.grad(total, leaves)]


def gradients(xp, arrays, grads, options):
    options = to_all(lambda x: to_xp(xp, x), options)
    q, k, v, grad_out, grad_lse = (to_xp(xp, x) for x in (*arrays, *grads))
    out, lse = slra.low_rank_attention(q, k, v, return_lse=True, **options)
    return slra.low_rank_attention_vjp(q, k, v, out, lse, grad_out, grad_lse=grad_lse, **options)


def assert_close(got, expected, atol=ATOL):
    for one, right in zip(got, expected, strict=True):
        assert tuple(one.shape) == right.shape
        np.testing.assert_allclose(to_numpy(one), right, rtol=0, atol=atol)


@functools.cache
def expected_gradients(case):
    return torch_gradients(*problem(case))


@pytest.mark.parametrize("case", CASES)
def test_equals_autograd(xp, case):
    assert_close(gradients(xp, *problem(case)), expected_gradients(case))


@pytest.mark.parametrize("case", ["output", "l1", "exact keys"])
def test_equals_jax(case):
    jax = pytest.importorskip("jax")
    arrays, grads, options = problem(case)

    def total(arrays):
        given = to_all(jax.numpy.asarray, options)
        out, lse = slra.low_rank_attention(*arrays, return_lse=True, **given)
        lse = jax.numpy.where(jax.numpy.isfinite(lse), lse, 0)
        return (out * grads[0]).sum() + (lse * grads[1]).sum()

    expected = jax.grad(total)([jax.numpy.asarray(x) for x in arrays])
    assert_close(gradients(np, arrays, grads, options), expected)


def ragged(**options):
    """Heads of different spectra, so that a tolerance gives them different ranks."""
    q, k, v = decaying(heads=4)
    k[1] *= 0.1
    v[0] *= 0.2 ** np.arange(6)
    rng = np.random.default_rng(1)
    return (q, k, v), (rng.standard_normal((4, 40, 6)), rng.standard_normal((4, 40))), options


def test_ranks_chosen_by_tolerance():
    arrays, grads, options = ragged(rtol=0.2, enable_gqa=True)
    assert len(set(slra.fit_attention(*arrays, **options).ranks)) == 2
    assert_close(gradients(np, arrays, grads, options), torch_gradients(arrays, grads, options))


def test_a_basis_is_not_fitted_again(monkeypatch):
    arrays, grads, options = problem("scores")
    basis = slra.fit_attention(*arrays, **options)
    del options["rank"], options["method"]
    monkeypatch.setattr("slra.attn.low_rank.fit_problem", None)
    got = gradients(np, arrays, grads, {**options, "basis": basis})
    monkeypatch.undo()
    assert_close(got, expected_gradients("scores"))


def test_full_rank_is_the_gradient_of_exact_attention(xp):
    arrays = decaying()
    grad_out = np.random.default_rng(1).standard_normal((2, 40, 6))
    q, k, v, grad_out = (to_xp(xp, x) for x in (*arrays, grad_out))
    out, lse = slra.attention(q, k, v, return_lse=True)
    got = slra.low_rank_attention_vjp(q, k, v, out, lse, grad_out, (8, 6))
    expected = slra.attention_vjp(q, k, v, out, lse, grad_out)
    assert_close(got, [to_numpy(x) for x in expected])


@pytest.mark.parametrize(
    "options", [{"rank": 3}, {"rank": 3, "method": "svd", "l1": 0.1}], ids=["basis", "l1"]
)
def test_sums_over_axes_that_broadcast(options):
    rng = np.random.default_rng(1)
    q, k, v = decaying(heads=3, heads_k=1)
    k, v = np.broadcast_to(k, (2, *k.shape)) * np.asarray([1, 2])[:, None, None, None], v[0]
    arrays, grads = (q, k, v), (rng.standard_normal((2, 3, 40, 6)), rng.standard_normal((2, 3, 40)))
    assert_close(gradients(np, arrays, grads, options), torch_gradients(arrays, grads, options))


@pytest.mark.parametrize("n_exact", [0, 5])
def test_without_a_head_axis(n_exact):
    rng = np.random.default_rng(1)
    arrays = [x[0] for x in decaying()]
    grads, options = (
        (rng.standard_normal((40, 6)), rng.standard_normal(40)),
        {"rank": 3, "n_exact": n_exact},
    )
    assert_close(gradients(np, arrays, grads, options), torch_gradients(arrays, grads, options))


def test_half_precision_is_computed_in_single():
    arrays = decaying(dtype="float16")
    out, lse = slra.low_rank_attention(*arrays, 5, return_lse=True)
    got = slra.low_rank_attention_vjp(*arrays, out, lse, out, 5)
    assert all(x.dtype == np.float16 for x in got)
    wide = [x.astype("float64") for x in arrays]
    out, lse = slra.low_rank_attention(*wide, 5, return_lse=True)
    expected = slra.low_rank_attention_vjp(*wide, out, lse, out, 5)
    # The output, of a size near 5, came rounded to half; gradients are near 10 and are rounded once more.
    assert_close(got, expected, 40 * np.finfo("float16").eps)


WRONG = {
    "method": ({"rank": 3, "method": "topk"}, "method must be one of 'svd', 'scores', 'output'"),
    "l1": ({"rank": 3, "l1": 0.1}, 'l1 must be 0 unless method is "svd"'),
    "n_exact": ({"rank": 3, "n_exact": 50}, "n_exact must be less than 50"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_named(case):
    options, message = WRONG[case]
    arrays = decaying()
    out, lse = slra.attention(*arrays, return_lse=True)
    with pytest.raises(ValueError, match=message):
        slra.low_rank_attention_vjp(*arrays, out, lse, out, **options)


def test_wrong_shapes_are_named():
    arrays = decaying()
    out, lse = slra.attention(*arrays, return_lse=True)
    with pytest.raises(ValueError, match=r"lse must have shape \(2, 40\), got \(2, 40, 1\)"):
        slra.low_rank_attention_vjp(*arrays, out, lse[..., None], out, 3)
