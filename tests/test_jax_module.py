"""The attention layer for JAX against the one for PyTorch, on the same weights."""

import doctest
from typing import Any, NamedTuple

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

from slra.integrations import jax as jax_layer  # noqa: E402
from slra.integrations.torch import LowRankAttention  # noqa: E402

WIDTH, HEADS, BATCH, N = 12, 3, 2, 7
# Sums of a few dozen products of entries near 1, in two libraries.
ATOL = 200 * np.finfo("float64").eps


def pair(**options):
    """Return a torch layer with a basis, its input, and the same for JAX."""
    torch.manual_seed(0)
    module = LowRankAttention(
        WIDTH, HEADS, batch_first=True, dtype=torch.float64, refit_every=0, **options
    )
    x = torch.randn(BATCH, N, WIDTH, dtype=torch.float64)
    params = {n: jax.numpy.asarray(p.detach().numpy()) for n, p in module.named_parameters()}
    return module, x, params, jax.numpy.asarray(x.numpy())


CASES = {
    "exact": {},
    "penalty": {"rank": (2, 3), "l1": (0.1, 0.2, 0.3)},
    "prox": {"rank": 2, "l1": (0.1, 0.0, 0.3), "l1_form": "prox", "method": "output"},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case):
    """Output, penalty, approximations, and the gradient of both for all parameters, compiled."""
    options = CASES[case]
    module, x, params, y = pair(**options)
    rank, method = options.get("rank"), options.get("method", "svd")
    projections = None
    if rank is not None:
        module.fit_basis(x, x, x, is_causal=True)
        projections = jax.jit(
            lambda params, y: jax_layer.fit(
                params, y, y, y, rank, num_heads=HEADS, method=method, is_causal=True
            )
        )(params, y)
    out, _ = module(x, x, x, need_weights=False, is_causal=True)
    (out.square().sum() + module.penalty()).backward()

    def loss(params):
        done = jax_layer.apply(
            params,
            *(y, y, y),
            num_heads=HEADS,
            projections=projections,
            l1=options.get("l1", 0.0),
            l1_form=options.get("l1_form", "penalty"),
            is_causal=True,
        )
        return (done.out**2).sum() + done.penalty, done

    (_, done), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(done.out, out.detach(), rtol=0, atol=ATOL)
    np.testing.assert_allclose(done.penalty, module.penalty().detach(), rtol=ATOL)
    for one, other in zip(done[2:], module.approximations(), strict=True):
        np.testing.assert_allclose(one, other.detach(), rtol=0, atol=ATOL)
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(gradients[name], parameter.grad, rtol=0, atol=100 * ATOL)


def test_maps_over_a_batch():
    _, _, params, y = pair()
    projections = jax_layer.fit(params, y, y, y, 2, num_heads=HEADS)

    def run(y):
        done = jax_layer.apply(
            params, y, y, y, num_heads=HEADS, projections=projections, l1=0.1, l1_form="prox"
        )
        return done.out, done.penalty

    out, penalty = run(y)
    mapped, penalties = jax.vmap(run)(y)
    np.testing.assert_allclose(mapped, out, rtol=0, atol=ATOL)
    np.testing.assert_allclose(penalties.mean(), penalty, rtol=ATOL)


@pytest.mark.parametrize("l1_form", ["penalty", "prox"])
def test_a_schedule_of_l1_compiles_nothing_anew(l1_form):
    _, _, params, y = pair()
    projections = jax_layer.fit(params, y, y, y, 2, num_heads=HEADS)
    traces = []

    def run(l1):
        traces.append(l1)
        done = jax_layer.apply(
            params, y, y, y, num_heads=HEADS, projections=projections, l1=l1, l1_form=l1_form
        )
        return done.out, done.penalty

    compiled = jax.jit(run)
    for l1 in (0.1, 0.2, 0.3):
        got = compiled(l1)
        for one, right in zip(got, run(l1), strict=True):
            np.testing.assert_allclose(one, right, rtol=0, atol=10 * ATOL)
    assert len(traces) == 4


@pytest.mark.parametrize("least", [None, -np.inf, -1e9])
def test_padding_takes_no_part(least):
    _, _, params, y = pair()
    hidden = np.arange(N) >= 4
    mask = jax.numpy.asarray(~hidden if least is None else np.where(hidden, least, 0.0))[None, :]
    padded = y.at[:, 4:].mul(50)
    options = {"num_heads": HEADS}
    right = jax_layer.fit(params, *(y[:, :4],) * 3, 2, **options)
    got = jax_layer.fit(params, padded, padded, padded, 2, mask=mask, **options)
    np.testing.assert_allclose(got.q_down @ got.q_up, right.q_down @ right.q_up, rtol=0, atol=1e-11)
    options |= {"projections": right, "l1": 0.3, "l1_form": "prox"}
    one = jax_layer.apply(params, *(y[:, :4],) * 3, **options)
    other = jax_layer.apply(params, padded, padded, padded, mask=mask, **options)
    np.testing.assert_allclose(other.out[:, :4], one.out, rtol=0, atol=1e-11)
    np.testing.assert_allclose(other.penalty, one.penalty, rtol=1e-11)


def test_no_gradient_reaches_the_basis():
    _, _, params, y = pair()
    projections = jax_layer.fit(params, y, y, y, 2, num_heads=HEADS)

    def loss(projections):
        done = jax_layer.apply(
            params, y, y, y, num_heads=HEADS, projections=projections, l1=0.1, l1_form="prox"
        )
        return (done.out**2).sum() + done.penalty

    assert all(not x.any() for x in jax.grad(loss)(projections))


@pytest.mark.parametrize("l1_form", ["penalty", "prox"])
def test_bfloat16_stays_and_scans(l1_form):
    _, _, params, y = pair()
    params, y = jax.tree.map(lambda x: x.astype("bfloat16"), (params, y))
    projections = jax_layer.fit(params, y, y, y, 2, num_heads=HEADS)

    def step(y, _):
        done = jax_layer.apply(
            params, y, y, y, num_heads=HEADS, projections=projections, l1=0.1, l1_form=l1_form
        )
        return y + done.out, done.penalty

    out, _ = jax.lax.scan(step, y, length=2)
    assert out.dtype == y.dtype


def test_keys_and_values_of_other_widths():
    reference = torch.nn.MultiheadAttention(
        WIDTH, HEADS, kdim=5, vdim=6, batch_first=True, dtype=torch.float64
    )
    drawn = jax_layer.init(jax.random.key(0), WIDTH, kdim=5, vdim=6)
    params = {n: jax.numpy.asarray(p.detach().numpy()) for n, p in reference.named_parameters()}
    assert {n: x.shape for n, x in drawn.items()} == {n: x.shape for n, x in params.items()}
    given = [torch.randn(BATCH, N, w, dtype=torch.float64) for w in (WIDTH, 5, 6)]
    right, _ = reference(*given)
    arrays = [jax.numpy.asarray(x.numpy()) for x in given]
    out = jax_layer.apply(params, *arrays, num_heads=HEADS).out
    np.testing.assert_allclose(out, right.detach(), rtol=0, atol=ATOL)
    assert jax_layer.fit(params, *arrays, 2, num_heads=HEADS).k_down.shape == (HEADS, 4, 2)


def test_a_fresh_layer_has_the_parameters_of_torch():
    for bias in (True, False):
        reference = torch.nn.MultiheadAttention(WIDTH, HEADS, bias=bias)
        params = jax_layer.init(jax.random.key(0), WIDTH, bias=bias)
        shapes = {name: tuple(x.shape) for name, x in reference.named_parameters()}
        assert {name: x.shape for name, x in params.items()} == shapes
        spread = [float(x.detach().abs().max()) for x in (reference.in_proj_weight,)]
        np.testing.assert_allclose(np.max(np.abs(params["in_proj_weight"])), spread, rtol=0.05)


def test_an_unknown_form_is_named():
    _, _, params, y = pair()
    with pytest.raises(ValueError, match="l1_form must be one of 'penalty', 'prox'"):
        jax_layer.apply(params, y, y, y, num_heads=HEADS, l1_form="both")


class AdamState(NamedTuple):
    """As optax.ScaleByAdamState is."""

    count: Any
    mu: Any
    nu: Any


def adam(lr, b1=0.9, b2=0.999, eps=1e-8):
    """Adam as optax chains it: its state, and that of the learning rate."""

    def init(params):
        zeros = jax.tree.map(jax.numpy.zeros_like, params)
        return AdamState(jax.numpy.zeros((), int), zeros, zeros), ()

    def update(gradients, state, params):
        (count, mu, nu), rest = state
        count = count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, gradients)
        nu = jax.tree.map(lambda n, g: b2 * n + (1 - b2) * g**2, nu, gradients)
        moves = jax.tree.map(
            lambda m, n: -lr * (m / (1 - b1**count)) / (jax.numpy.sqrt(n / (1 - b2**count)) + eps),
            mu,
            nu,
        )
        return moves, (AdamState(count, mu, nu), rest)

    return jax_layer.Transformation(init, update)


@pytest.mark.parametrize("name", ["sgd", "adam", "a schedule"])
def test_a_prox_in_the_metric_of_the_optimizer_finds_the_minimiser(name):
    """Its zeros, too; jitted, in a scan."""
    rng = np.random.default_rng(0)
    A, b, l1 = rng.standard_normal((60, 20)) / 8, rng.standard_normal(60), 0.6
    best, step = np.zeros(20), 1 / np.linalg.norm(A, 2) ** 2
    for _ in range(3000):
        best = best - step * A.T @ (A @ best - b)
        best = np.sign(best) * np.maximum(np.abs(best) - step * l1, 0)
    inner, size = {
        "sgd": (
            jax_layer.Transformation(
                lambda p: (), lambda g, s, p: (jax.tree.map(lambda x: -0.1 * x, g), s)
            ),
            lambda state, params: 0.1,
        ),
        "adam": (adam(0.02), jax_layer.adam_step_size(0.02)),
        "a schedule": (adam(0.02), jax_layer.adam_step_size(lambda count: 0.02 + 0 * count)),
    }[name]
    optimizer = jax_layer.proximal(inner, l1, size)

    def loss(params):
        return ((A @ params["x"] - b) ** 2).sum() / 2

    def iterate(carry, _):
        params, state = carry
        moves, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (jax.tree.map(jax.numpy.add, params, moves), state), None

    params = {"x": jax.numpy.asarray(rng.standard_normal(20))}
    (params, _), _ = jax.lax.scan(iterate, (params, optimizer.init(params)), length=1500)
    np.testing.assert_allclose(params["x"], best, rtol=0, atol=2e-3)
    assert np.array_equal(params["x"] == 0, best == 0)


def test_examples_run():
    result = doctest.testmod(jax_layer)
    assert result.failed == 0 < result.attempted
