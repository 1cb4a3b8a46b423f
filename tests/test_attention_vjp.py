"""The gradient of attention against torch's autograd on the formula, and against finite differences."""

import itertools

import array_api_compat.numpy as compat_np
import numpy as np
import pytest

import slra
from slra._backends import backend_of, standard
from tests.backends import structure_to_xp, to_numpy, to_xp
from tests.naive_attention import STRUCTURES, naive_attention, places, qkv

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True, "causal_align": "bottom_right"},
    "top-left": {"is_causal": True, "causal_align": "top_left", "scale": 0.3},
    "softcap": {"softcap": 1.5, "is_causal": True, "causal_align": "bottom_right"},
}


def torch_gradients(arrays, grad_out, grad_lse, *, mask=None, enable_gqa=False, **options):
    """Gradients of the formula, with all scores at once, by torch in double precision; of sinks and slopes too."""
    torch = pytest.importorskip("torch")
    given = [*arrays, *(options[name] for name in ("sinks", "alibi") if name in options)]
    leaves = [torch.from_numpy(x.astype("float64")).requires_grad_() for x in given]
    q, k, v, *by_head = leaves
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    scores = q @ k.mT * options.get("scale", q.shape[-1] ** -0.5)
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    align = options.get("causal_align") or "top_left"
    names = ("window", "lengths_q", "lengths_k")
    structure = [options.get(name) for name in names]
    structure = places(tuple(scores.shape), options.get("is_causal"), align, *structure)
    seen, distance = map(torch.from_numpy, structure)
    if "alibi" in options:
        scores = scores - by_head[-1][..., None, None] * distance
    if mask is not None and mask.dtype == bool:
        seen = seen & torch.from_numpy(mask)
    elif mask is not None:
        scores = scores + torch.from_numpy(mask)
    if "sinks" in options:
        sinks = by_head[0][..., None, None].expand(*scores.shape[:-1], 1)
        seen = seen.expand(scores.shape)
        scores, seen = torch.cat([scores, sinks], -1), torch.cat([seen, sinks == sinks], -1)
        v = torch.cat([v, torch.zeros_like(v[..., :1, :])], -2)
    some = seen.any(-1)
    # Rows without keys contribute nothing: give them any key and then no weight.
    scores = torch.where(seen | ~some[..., None], scores, -torch.inf)
    some = some.expand(scores.shape[:-1])
    out = torch.where(some[..., None], torch.softmax(scores, -1) @ v, 0)
    lse = torch.where(some, torch.logsumexp(scores, -1), 0)
    total = (out * torch.from_numpy(grad_out)).sum() + (lse * torch.from_numpy(grad_lse)).sum()
    return [x.numpy() for x in torch.autograd.grad(total, leaves)]


def gradients(xp, arrays, grad_out, grad_lse, *, mask=None, **options):
    options = structure_to_xp(xp, options)
    q, k, v, grad_out, grad_lse = (to_xp(xp, x) for x in (*arrays, grad_out, grad_lse))
    if mask is not None:
        options["mask"] = to_xp(xp, mask)
    out, lse = slra.attention(q, k, v, return_lse=True, **options)
    return slra.attention_vjp(q, k, v, out, lse, grad_out, grad_lse=grad_lse, **options)


def assert_close(got, expected, atol):
    for one, right in zip(got, expected, strict=True):
        assert tuple(one.shape) == right.shape
        np.testing.assert_allclose(to_numpy(one), right, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", [None, "bool", "float64"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("enable_gqa", [False, True])
def test_vjp_equals_autograd(xp, enable_gqa, options, kind):
    arrays = qkv((2, 4, 11, 5), (2, 2 if enable_gqa else 4, 7, 5), 3)
    rng = np.random.default_rng(1)
    grad_out, grad_lse = rng.standard_normal((2, 4, 11, 3)), rng.standard_normal((2, 4, 11))
    masks = {
        None: None,
        "bool": rng.random((11, 7)) < 0.4,
        "float64": rng.standard_normal((4, 1, 7)),
    }
    options = options | {"mask": masks[kind], "enable_gqa": enable_gqa}
    expected = torch_gradients(arrays, grad_out, grad_lse, **options)
    assert_close(gradients(xp, arrays, grad_out, grad_lse, **options), expected, 1e-10)


@pytest.mark.parametrize("options", STRUCTURES.values(), ids=STRUCTURES)
def test_vjp_with_windows_sequences_sinks_and_slopes(xp, options):
    arrays = qkv((2, 4, 7, 4), (2, 2, 7, 4), 3)
    rng = np.random.default_rng(1)
    grad_out, grad_lse = rng.standard_normal((2, 4, 7, 3)), rng.standard_normal((2, 4, 7))
    options = {**options, "mask": rng.random((7, 7)) < 0.7, "enable_gqa": True}
    expected = torch_gradients(arrays, grad_out, grad_lse, **options)
    assert_close(gradients(xp, arrays, grad_out, grad_lse, **options), expected, 1e-10)
    for name in ("lengths_q", "lengths_k"):
        if options.get(name) is not None:
            options[name] = np.asarray(options[name])
    assert_close(gradients(xp, arrays, grad_out, grad_lse, **options), expected, 1e-10)


@pytest.mark.parametrize("options", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("return_lse", [False, True])
def test_torch_differentiates_windows_sequences_sinks_and_slopes(options, return_lse):
    torch = pytest.importorskip("torch")
    arrays = qkv((2, 4, 7, 4), (2, 4, 7, 4), 3)
    grad_out = np.random.default_rng(1).standard_normal((2, 4, 7, 3))
    expected = torch_gradients(arrays, grad_out, np.zeros((2, 4, 7)), **options)
    leaves = [torch.from_numpy(x).requires_grad_() for x in arrays]
    by_head = {
        name: torch.from_numpy(options[name]).requires_grad_()
        for name in ("sinks", "alibi")
        if name in options
    }
    out = slra.attention(*leaves, return_lse=return_lse, **{**options, **by_head})
    out = out[0] if return_lse else out
    total = (out * torch.from_numpy(grad_out)).sum()
    assert_close(torch.autograd.grad(total, [*leaves, *by_head.values()]), expected, 1e-10)


def test_vjp_in_single_and_half_precision(xp):
    for dtype, atol in (("float32", 2e-5), ("float16", 4e-2)):
        if not hasattr(xp, dtype):
            continue
        arrays = qkv((3, 20, 8), (3, 30, 8), dtype=dtype)
        rng = np.random.default_rng(1)
        grad_out, grad_lse = rng.standard_normal((3, 20, 8)), rng.standard_normal((3, 20))
        expected = torch_gradients(arrays, grad_out, grad_lse)
        got = gradients(xp, arrays, grad_out.astype(dtype), grad_lse.astype("float32"))
        assert all(str(to_numpy(x).dtype) == dtype for x in got)
        assert_close(got, expected, atol)


def test_vjp_equals_finite_differences():
    arrays = qkv((2, 5, 3), (2, 6, 3))
    rng = np.random.default_rng(1)
    grad_out, grad_lse = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 5))
    options = {"is_causal": True, "causal_align": "bottom_right", "softcap": 2.0}

    def value(arrays):
        out, lse = naive_attention(*arrays, **options)
        return np.sum(out * grad_out) + np.sum(lse * grad_lse)

    out, lse = slra.attention(*arrays, return_lse=True, **options)
    got = slra.attention_vjp(*arrays, out, lse, grad_out, grad_lse=grad_lse, **options)
    step = 1e-5
    for i, gradient in enumerate(got):
        direction = rng.standard_normal(gradient.shape)
        ahead, behind = ([*arrays], [*arrays])
        ahead[i], behind[i] = arrays[i] + step * direction, arrays[i] - step * direction
        slope = (value(ahead) - value(behind)) / (2 * step)
        # Central differences: an error of step^2 and a rounding error of eps/step, times a few.
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=0, atol=1e-8)


# Longer than the tiles, with a single key head (NumPy then sums in parts) and heads shared in every way.
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("batch_q", "batch_k", "batch_v"), [((), (), ()), ((2, 3), (2, 1), (1, 3)), ((1,), (2,), (2,))]
)
def test_numpy_equals_the_standard(batch_q, batch_k, batch_v, softcap):
    rng = np.random.default_rng(0)
    batch = np.broadcast_shapes(batch_q, batch_k, batch_v)
    shapes = ((*batch_q, 600, 4), (*batch_k, 1100, 4), (*batch_v, 1100, 3))
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    grad_out, grad_lse = rng.standard_normal((*batch, 600, 3)), rng.standard_normal((*batch, 600))
    options = standard.ScoreOptions(0.5, True, softcap=softcap)
    out, lse = backend_of(compat_np).attention(q, k, v, None, options)
    delta = np.sum(grad_out * out, axis=-1) - grad_lse
    arguments = (q, k, v, None, options, lse, delta, grad_out)
    expected = standard.Backend(compat_np).attention_vjp(*arguments)
    got = backend_of(compat_np).attention_vjp(*arguments)
    assert_close(got, expected, 1e-12)


def test_frameworks_differentiate_the_forward():
    """The gradient of both paths, with and without the log-sum-exp, on torch and on JAX."""
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    arrays = qkv((2, 1100, 4), (2, 1100, 4))
    rng = np.random.default_rng(1)
    grad_out, grad_lse = rng.standard_normal((2, 1100, 4)), rng.standard_normal((2, 1100))
    for is_causal, weight in itertools.product((False, True), (0.0, 1.0)):
        right = torch_gradients(arrays, grad_out, weight * grad_lse, is_causal=is_causal)

        def value(*arrays, is_causal=is_causal, weight=weight, to=None):
            if not weight:
                return (slra.attention(*arrays, is_causal=is_causal) * to(grad_out)).sum()
            out, lse = slra.attention(*arrays, is_causal=is_causal, return_lse=True)
            return (out * to(grad_out)).sum() + (lse * to(grad_lse)).sum()

        leaves = [torch.from_numpy(x).requires_grad_() for x in arrays]
        got = torch.autograd.grad(value(*leaves, to=torch.from_numpy), leaves)
        assert_close(got, right, 1e-10)
        leaves = [jax.numpy.asarray(x) for x in arrays]
        got = jax.grad(lambda *x, value=value: value(*x, to=jax.numpy.asarray), (0, 1, 2))(*leaves)
        assert_close(got, right, 1e-10)


def test_gradient_of_a_row_without_keys_is_zero(xp):
    arrays = qkv((2, 3, 4), (2, 5, 4))
    mask = np.ones((3, 5), dtype=bool)
    mask[1] = False
    ones = np.ones((2, 3, 4))
    dq, dk, dv = gradients(xp, arrays, ones, np.ones((2, 3)), mask=mask)
    assert np.all(to_numpy(dq)[:, 1] == 0)
    assert all(np.all(np.isfinite(to_numpy(x))) for x in (dk, dv))


def test_gradient_of_lse_is_zero_by_default(xp):
    arrays = [to_xp(xp, x) for x in qkv((2, 6, 4), (2, 10, 4))]
    out, lse = slra.attention(*arrays, return_lse=True)
    got = slra.attention_vjp(*arrays, out, lse, out)
    expected = slra.attention_vjp(*arrays, out, lse, out, grad_lse=to_xp(xp, np.zeros((2, 6))))
    assert_close(got, [to_numpy(x) for x in expected], 0)


def test_gradient_of_a_shard_of_the_keys(xp):
    arrays = qkv((2, 6, 4), (2, 10, 4))
    grad_out, grad_lse = np.ones((2, 6, 4)), np.ones((2, 6))
    expected = torch_gradients(arrays, grad_out, grad_lse)
    q, k, v = (to_xp(xp, x) for x in arrays)
    out, lse = slra.attention(q, k, v, return_lse=True)
    shard = slice(3, 10)
    _, dk, dv = slra.attention_vjp(
        q,
        k[..., shard, :],
        v[..., shard, :],
        out,
        lse,
        to_xp(xp, grad_out),
        grad_lse=to_xp(xp, grad_lse),
    )
    assert_close((dk, dv), [x[:, shard] for x in expected[1:]], 1e-12)


@pytest.mark.parametrize("name", ["out", "lse", "grad_out", "grad_lse"])
def test_wrong_shapes_are_named(name):
    q, k, v = qkv((2, 6, 4), (2, 10, 4))
    out, lse = slra.attention(q, k, v, return_lse=True)
    given = {"out": out, "lse": lse, "grad_out": out, "grad_lse": lse}
    given[name] = given[name][:1]
    with pytest.raises(ValueError, match=rf"^{name} must have shape \(2, 6"):
        slra.attention_vjp(q, k, v, **given)
