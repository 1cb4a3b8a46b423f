"""The combined objective: value, subgradient and prox, and both of its forms on a convex toy."""

import numpy as np
import pytest

import slra
from tests import objective_toy
from tests.backends import to_numpy, to_xp

L1 = (0.5, 0.0, 2.0)


def hats(dtype="float64"):
    """Three arrays of different shapes, some entries zero."""
    rng = np.random.default_rng(0)
    shapes = (2, 6, 4), (2, 5, 4), (2, 5, 3)
    drawn = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    for x in drawn:
        x[:, 1] = 0
    return drawn


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_value_is_the_formula(xp, dtype):
    q, k, v = hats(dtype)
    expected = sum(
        weight * np.sum(np.abs(x.astype("float64")))
        for x, weight in zip((q, k, v), L1, strict=True)
    )
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    penalty = slra.objective.l1_penalty(*arrays, L1)
    whole = slra.objective.combined_objective(10.0, *arrays, L1)
    assert penalty.shape == ()
    assert penalty.dtype == arrays[0].dtype
    # A sum of at most 60 terms.
    rtol = 60 * np.finfo(dtype).eps
    np.testing.assert_allclose(to_numpy(penalty), expected, rtol=rtol)
    np.testing.assert_allclose(to_numpy(whole), 10 + expected, rtol=rtol)


def test_half_precision_is_summed_in_single(xp):
    if not hasattr(xp, "float16"):
        pytest.skip("no float16 here")
    # 1 + 2^-11 is not a float16, and the sum of so many exceeds 2048, beyond which odd numbers are not either.
    x = to_xp(xp, np.ones((5, 1001), "float16"))
    assert float(slra.objective.l1_penalty(x, x, x, 1.0)) == 3 * 5005
    assert all(g.dtype == xp.float16 for g in slra.objective.l1_penalty_grad(x, x, x, 0.5))


def test_subgradient_is_0_at_0_and_nan_at_nan(xp):
    arrays = hats()
    arrays[0][0, 0, 0] = np.nan
    got = slra.objective.l1_penalty_grad(*(to_xp(xp, x) for x in arrays), L1)
    for one, x, weight in zip(got, arrays, L1, strict=True):
        np.testing.assert_array_equal(to_numpy(one), weight * np.sign(x))


def test_prox_is_a_soft_threshold_of_each(xp):
    arrays = hats()
    got = slra.objective.l1_penalty_prox(*(to_xp(xp, x) for x in arrays), L1, step=0.3)
    for one, x, weight in zip(got, arrays, L1, strict=True):
        expected = np.sign(x) * np.maximum(np.abs(x) - 0.3 * weight, 0)
        np.testing.assert_allclose(to_numpy(one), expected, rtol=0, atol=1e-15)
        np.testing.assert_array_equal(to_numpy(one) == 0, expected == 0)


def test_frameworks_differentiate_the_penalty_to_its_subgradient():
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    arrays = hats()
    expected = slra.objective.l1_penalty_grad(*arrays, L1)
    leaves = [torch.tensor(x, requires_grad=True) for x in arrays]
    by_torch = torch.autograd.grad(slra.objective.l1_penalty(*leaves, L1), leaves)
    leaves = [jax.numpy.asarray(x) for x in arrays]
    by_jax = jax.grad(lambda x: slra.objective.l1_penalty(*x, L1))(leaves)
    for right, one, other in zip(expected, by_torch, by_jax, strict=True):
        np.testing.assert_array_equal(one, right)
        np.testing.assert_array_equal(other, right)


def test_gradient_of_the_whole_through_low_rank_attention():
    """Task and penalty on Q^ = q V V^T, chained by hand and by torch."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    arrays, target = rng.standard_normal((3, 2, 9, 5)), rng.standard_normal((2, 9, 5))
    V = [np.linalg.svd(x, full_matrices=False)[2][:, :3].swapaxes(-1, -2) for x in arrays]
    P = [one @ one.swapaxes(-1, -2) for one in V]
    options = {"rank": 3, "method": "svd"}
    out, lse = slra.low_rank_attention(*arrays, return_lse=True, **options)
    task = slra.low_rank_attention_vjp(*arrays, out, lse, out - target, **options)
    signs = slra.objective.l1_penalty_grad(*(x @ p for x, p in zip(arrays, P, strict=True)), L1)
    got = [one + sign @ p for one, sign, p in zip(task, signs, P, strict=True)]
    leaves = [torch.tensor(x, requires_grad=True) for x in arrays]
    out = slra.low_rank_attention(*leaves, **options)
    projected = (x @ torch.tensor(p) for x, p in zip(leaves, P, strict=True))
    loss = ((out - torch.tensor(target)) ** 2).sum() / 2
    slra.objective.combined_objective(loss, *projected, L1).backward()
    for one, leaf in zip(got, leaves, strict=True):
        np.testing.assert_allclose(one, leaf.grad, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def toy():
    """Return a convex toy with the minimum of its combined objective."""
    problem = objective_toy.Toy.draw()
    start = np.random.default_rng(1).standard_normal(problem.B.shape)
    return problem, start, objective_toy.proximal(problem, start, 1000)


# Rounding of a sum of 480 terms near 1, and of its difference from another.
ROUNDING = 1e-11


def test_both_forms_descend_monotonically_to_one_optimum(toy):
    problem, start, (best, values) = toy
    x, by_prox = objective_toy.proximal(problem, start)
    y, by_penalty = objective_toy.step_for_each_entry(problem, start)
    for found in (by_prox, by_penalty):
        assert np.all(np.diff(found) <= ROUNDING)
        assert found[-1] - values[-1] <= 1e-6
    for found in (x, y):
        np.testing.assert_allclose(found, best, rtol=0, atol=1e-6)
    # The prox makes exact zeros; subgradients come as close as one likes, and never there.
    assert np.sum(x == 0) == np.sum(np.abs(best) < 1e-6) > 100
    assert np.sum(y == 0) == 0 < np.sum(np.abs(y) < 1e-6)


def test_the_optimum_of_the_toy_satisfies_its_conditions(toy):
    """|gradient of the task| <= lambda where an entry is 0, and -lambda sign elsewhere."""
    problem, _, (x, _) = toy
    gradient = problem.task(x)[1]
    weights = np.broadcast_to(np.asarray(objective_toy.L1)[:, None, None], x.shape)
    assert np.all(np.abs(gradient[x == 0]) <= weights[x == 0])
    at = x != 0
    np.testing.assert_allclose(gradient[at], -(weights * np.sign(x))[at], rtol=0, atol=1e-11)


def test_one_common_step_stalls_at_the_kinks(toy):
    """Why the penalty has a step for each entry: descent alone does not lead to the optimum."""
    problem, start, (_, values) = toy
    _, found = objective_toy.common_step(problem, start)
    assert np.all(np.diff(found) <= 0)
    assert found[-1] - values[-1] > 1e-3


WRONG = {
    "negative": ((-1.0, 0.0, 0.0), ValueError, "l1 must be finite and 0 or more"),
    "two": ((1.0, 1.0), TypeError, "l1 must be a number or a triple"),
    "text": ("1.0", TypeError, "l1 must be a real number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_weights_are_named(case):
    l1, kind, message = WRONG[case]
    for name in ("l1_penalty", "l1_penalty_grad", "l1_penalty_prox"):
        with pytest.raises(kind, match=message):
            getattr(slra.objective, name)(*hats(), l1)


def test_complex_and_mixed_arrays_are_refused():
    q, k, v = hats()
    with pytest.raises(TypeError, match="k must have a real floating dtype"):
        slra.objective.l1_penalty(q, 1j * k, v, 1.0)
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="q and v must come from one array library"):
        slra.objective.l1_penalty(q, k, torch.tensor(v), 1.0)


@pytest.mark.parametrize("l1", [0.0, (0.0, 0.0, 1.0)])
def test_without_a_weight_infinity_is_nothing(xp, l1):
    q, k, v = (to_xp(xp, x) for x in (np.asarray([np.inf, 1.0]), np.asarray(np.inf), np.ones(3)))
    right = 0.0 if l1 == 0.0 else 3.0
    assert float(slra.objective.l1_penalty(q, k, v, l1)) == right
    assert float(slra.objective.combined_objective(1.0, q, k, v, l1)) == right + 1


def test_without_a_weight_there_is_a_gradient_of_zero():
    torch = pytest.importorskip("torch")
    q = torch.ones(3, requires_grad=True)
    slra.objective.l1_penalty(q, q.detach(), q.detach(), 0.0).backward()
    assert q.grad.tolist() == [0.0] * 3


def test_weights_beyond_the_dtype():
    q = np.ones(3, dtype="float16")
    with pytest.raises(ValueError, match="l1 must be from 0 to 6.6e.04 in 16 bits"):
        slra.objective.l1_penalty_grad(q, q, q, 1e5)


@pytest.mark.parametrize("name", ["l1_penalty", "l1_penalty_grad", "l1_penalty_prox"])
def test_weights_may_be_0d_arrays_traced_or_learned(name):
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    function, arrays = getattr(slra.objective, name), hats("float32")

    def each(found):
        return found if isinstance(found, tuple) else (found,)

    def flat(found):
        return np.concatenate([np.ravel(to_numpy(x)) for x in each(found)], axis=None)

    expected = flat(function(*arrays, L1))

    for dtype in ("float64", "float32"):
        tensors = [torch.tensor(x) for x in arrays]
        weights = [torch.tensor(x, dtype=getattr(torch, dtype)) for x in L1]
        learned = [x.clone().requires_grad_() for x in weights]
        for given in (weights, learned):
            found = each(function(*tensors, given))
            assert all(x.dtype == torch.float32 for x in found)
            np.testing.assert_allclose(flat(tuple(x.detach() for x in found)), expected, rtol=1e-6)
    compiled = jax.jit(lambda l1: function(*map(jax.numpy.asarray, arrays), l1))
    found = compiled(tuple(map(jax.numpy.asarray, L1)))
    np.testing.assert_allclose(flat(found), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="l1 must be finite and 0 or more"):
        function(*tensors, torch.tensor(-1.0))
    with pytest.raises(ValueError, match="l1 must have no dimensions"):
        function(*tensors, torch.ones(3))


def test_a_learned_weight_has_the_norm_as_its_gradient():
    torch = pytest.importorskip("torch")
    weights = [torch.tensor(x, requires_grad=True) for x in L1]
    tensors = [torch.tensor(x) for x in hats()]
    slra.objective.l1_penalty(*tensors, weights).backward()
    for weight, x in zip(weights, tensors, strict=True):
        assert float(weight.grad) == pytest.approx(float(x.abs().sum()), rel=1e-6)


def test_a_step_for_each_entry(xp):
    arrays = hats()
    steps = [np.abs(np.cos(np.arange(x.size, dtype=float))).reshape(x.shape) for x in arrays]
    given = [to_xp(xp, x) for x in arrays]
    got = slra.objective.l1_penalty_prox(*given, L1, step=[to_xp(xp, x) for x in steps])
    for one, x, weight, step in zip(got, arrays, L1, steps, strict=True):
        expected = np.sign(x) * np.maximum(np.abs(x) - step * weight, 0)
        np.testing.assert_allclose(to_numpy(one), expected, rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="step must broadcast to x"):
        slra.objective.l1_penalty_prox(*given, L1, step=to_xp(xp, steps[0]))


OPTIMIZERS = {
    "SGD": {"lr": 0.05},
    "momentum": {"lr": 0.02, "momentum": 0.8, "dampening": 0.1},
    "Nesterov": {"lr": 0.02, "momentum": 0.8, "nesterov": True},
    "Adam": {"lr": 0.02},
    "AdamW": {"lr": 0.02, "weight_decay": 0.0, "amsgrad": True},
    "RMSprop": {"lr": 0.005, "momentum": 0.5},
    "Adagrad": {"lr": 0.5},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_prox_in_the_metric_of_the_optimizer_finds_the_minimiser(name):
    """Its zeros, too, as proximal gradient in NumPy finds them."""
    torch = pytest.importorskip("torch")
    from slra.integrations.torch import ProximalOptimizer

    rng = np.random.default_rng(0)
    A, b, l1 = rng.standard_normal((60, 20)) / 8, rng.standard_normal(60), 0.6
    best, step = np.zeros(20), 1 / np.linalg.norm(A, 2) ** 2
    for _ in range(3000):
        best = best - step * A.T @ (A @ best - b)
        best = np.sign(best) * np.maximum(np.abs(best) - step * l1, 0)
    x = torch.nn.Parameter(torch.tensor(rng.standard_normal(20)))
    kind = {"momentum": "SGD", "Nesterov": "SGD"}.get(name, name)
    optimizer = ProximalOptimizer(getattr(torch.optim, kind)([x], **OPTIMIZERS[name]), l1=l1)
    given = torch.tensor(A), torch.tensor(b)
    for _ in range(1500):
        optimizer.zero_grad()
        ((given[0] @ x - given[1]) ** 2).sum().div(2).backward()
        optimizer.step()
    np.testing.assert_allclose(x.detach(), best, rtol=0, atol=2e-3)
    assert np.array_equal(x.detach().numpy() == 0, best == 0)
    assert 3 < np.sum(best == 0) < 17


def test_an_optimizer_whose_steps_are_not_known_is_refused():
    torch = pytest.importorskip("torch")
    from slra.integrations.torch import ProximalOptimizer

    x = torch.nn.Parameter(torch.tensor([3.0, 0.5]))
    with pytest.raises(TypeError, match="optimizer must be one of SGD, Adam, .*, got LBFGS"):
        ProximalOptimizer(torch.optim.LBFGS([x]))
    with pytest.raises(ValueError, match="l1 must be finite and 0 or more"):
        ProximalOptimizer(torch.optim.SGD([x], lr=0.1), l1=-1.0)
    inner = torch.optim.SGD([{"params": [x], "l1": 10.0}], lr=0.1)
    optimizer = ProximalOptimizer(inner)
    x.square().sum().backward()
    optimizer.step()
    assert x.tolist() == pytest.approx([1.4, 0.0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is inner.param_groups
