"""JAX: gradients, vmap, shard_map, and that what is sharded over the batch stays so."""

import contextlib
import functools
import warnings

import numpy as np
import pytest

import slra
from tests.fuzz.targets import TARGETS
from tests.naive_attention import qkv
from tests.test_interop_contract import answer
from tests.transforms import CASES, WITH_A_CONSTANT_BASIS, arguments

jax = pytest.importorskip("jax")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
N_DEVICES = 4
# One of each kind: every function under jit is what the rest of the suite runs.
DIFFERENTIATED = ("randomized_svd", "truncated_svd", "prox_nuclear", "project_simplex", "attention")
MAPPED = (*DIFFERENTIATED, "low_rank_attention", "compress")


def svd_of_a_test_matrix(x):
    omega = np.random.default_rng(1).standard_normal((x.shape[-1], 4))
    omega = jax.numpy.asarray(omega) if isinstance(x, jax.Array) else omega
    found = slra.randomized_svd(x, 2, test_matrix=omega, method="krylov", n_iter=1)
    return found.U, found.S, found.Vh


SHARDED = {
    "randomized_svd": svd_of_a_test_matrix,
    "attention": CASES["attention"],
    "low_rank_attention": CASES["low_rank_attention"],
    "prox_l1": CASES["prox_l1"],
    "prox_l21": CASES["prox_l21"],
    "project_simplex": CASES["project_simplex"],
    "prox_nuclear": CASES["prox_nuclear"],
}


@pytest.fixture
def mesh():
    if len(jax.devices()) < N_DEVICES:
        pytest.skip(f"{N_DEVICES} devices are needed")
    return jax.make_mesh((N_DEVICES,), ("batch",), devices=jax.devices()[:N_DEVICES])


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_are_those_of_differences(name):
    assert name not in WITH_A_CONSTANT_BASIS
    inputs = [jax.numpy.asarray(x) for x in arguments(name)]

    @jax.jit
    def value(inputs):
        return jax.numpy.sum(CASES[name](*inputs) ** 2)

    rng = np.random.default_rng(2)
    way = [jax.numpy.asarray(rng.standard_normal(x.shape)) for x in inputs]
    step = 1e-5
    ahead, behind = (
        value([x + sign * step * d for x, d in zip(inputs, way, strict=True)]) for sign in (1, -1)
    )
    slopes = jax.grad(value)(inputs)
    along = sum(float(jax.numpy.vdot(s, d)) for s, d in zip(slopes, way, strict=True))
    # The difference is off by step**2 times a third derivative, and by eps / step = 2e-11 times the value.
    np.testing.assert_allclose(along, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_over_a_batch(name):
    """On NumPy, matrix by matrix, the same comes out."""
    plain = arguments(name, batch=(2,))
    together = jax.jit(jax.vmap(CASES[name]))(*map(jax.numpy.asarray, plain))
    for i in range(2):
        expected = CASES[name](*(x[i] for x in plain))
        np.testing.assert_allclose(together[i], expected, rtol=0, atol=1e-11)


def sharded(name, mesh):
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    inputs = arguments(name, batch=(N_DEVICES,))
    return where, [jax.device_put(x, where) for x in inputs], inputs


def leaves(x):
    return jax.tree.leaves(x)


@pytest.mark.parametrize("name", list(SHARDED))
def test_what_is_sharded_over_the_batch_stays_so(name, mesh):
    where, inputs, plain = sharded(name, mesh)
    compiled = jax.jit(SHARDED[name]).lower(*inputs).compile()
    hlo = compiled.as_text()
    assert not [word for word in COLLECTIVES if word in hlo]
    out = leaves(compiled(*inputs))
    expected = leaves(SHARDED[name](*plain))
    for got, right in zip(out, expected, strict=True):
        assert got.sharding.is_equivalent_to(where, got.ndim)
        np.testing.assert_allclose(got, right, rtol=0, atol=1e-11)


def test_a_collective_would_be_seen(mesh):
    _, (x,), _ = sharded("prox_l1", mesh)
    hlo = jax.jit(lambda x: x - x.mean(axis=0)).lower(x).compile().as_text()
    assert [word for word in COLLECTIVES if word in hlo]


@pytest.mark.parametrize("name", ["randomized_svd", "low_rank_attention"])
def test_inside_shard_map(name, mesh):
    where, inputs, plain = sharded(name, mesh)
    spec = jax.sharding.PartitionSpec("batch")
    call = functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    out = leaves(jax.jit(call(SHARDED[name]))(*inputs))
    expected = leaves(SHARDED[name](*plain))
    for got, right in zip(out, expected, strict=True):
        assert got.sharding.is_equivalent_to(where, got.ndim)
        np.testing.assert_allclose(got, right, rtol=0, atol=1e-11)


def test_decompositions_in_single_precision_warn_of_nothing():
    a = np.random.default_rng(0).standard_normal((60, 40)).astype("float32")
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("error")
        x = jax.numpy.asarray(a)
        slra.randomized_svd(x, 3, center=True, rng=0)
        slra.randomized_svd(x, 3, tol=1e-3, rng=0)
        slra.randomized_eigh(x.T @ x, 3, rng=0)
        slra.estimate_error(x, slra.truncated_svd(x, 3), rng=0)
        for function in (slra.randomized_svd, slra.truncated_svd):
            assert function(x, rtol=0.3).S.dtype == x.dtype


@contextlib.contextmanager
def strict():
    """Whatever JAX can be told to raise on; and warnings, such as on 64-bit numbers where there are none."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the result takes")  # of `compress`, on so few numbers
        for name, value in STRICT.items():
            stack.enter_context(getattr(jax, name)(value))
        yield


STRICT = {
    "enable_x64": False,
    "numpy_rank_promotion": "raise",
    "numpy_dtype_promotion": "strict",
    "enable_checks": True,
    "debug_nans": True,
    "debug_infs": True,
}


@pytest.mark.parametrize("name", list(TARGETS))
def test_strict_modes_change_nothing(name):
    with jax.enable_x64(False):
        _, call = answer(TARGETS[name], jax.numpy, "float32")
        with strict():
            call()


def test_strict_modes_change_nothing_of_attention():
    with jax.enable_x64(False):
        q, k, v = (jax.numpy.asarray(x) for x in qkv((2, 4, 6, 4), (2, 2, 6, 4), 4, "float32"))
        masks = {"keys": np.tri(6, dtype=bool)[-2:-1], "rows": np.tri(6, dtype=bool)}
        masks = {name: jax.numpy.asarray(mask) for name, mask in masks.items()}
    options = {"enable_gqa": True, "is_causal": True, "softcap": 2.0}
    with strict(), jax.transfer_guard("disallow"):
        for mask in masks.values():
            out, lse = slra.attention(q, k, v, mask=mask, return_lse=True, **options)
            slra.attention_vjp(q, k, v, out, lse, out, mask=mask, **options)
            basis = slra.fit_attention(q, k, v, 2, mask=mask, **options)
            basis.attend(q, k, v, mask=mask, **options)
        slra.low_rank_attention(q, k, v, rtol=0.3, **options)


COMPILED = []


@functools.cache
def count_compilations():
    """Listen from now on: not every JAX can take a listener away."""

    def listen(event, *args, **options):
        if event.endswith("backend_compile_duration"):
            COMPILED.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)


def compilations(function, numbers):
    """How often JAX compiles in calls with these numbers."""
    count_compilations()
    before = len(COMPILED)
    for x in numbers:
        jax.block_until_ready(function(float(x)))
    return len(COMPILED) - before


def test_sixty_scales_are_one_compilation():
    from slra._backends.jax_attention import _scanned

    numbers = np.linspace(0.1, 2, 60)
    q, k, v = (
        jax.numpy.asarray(x) for x in np.random.default_rng(0).standard_normal((3, 2, 11, 3))
    )
    before = _scanned._cache_size()
    for x in numbers:
        slra.attention(q, k, v, scale=float(x), softcap=float(x))
    assert _scanned._cache_size() == before + 1
    compiled = jax.jit(lambda x: slra.attention(q, k, v, scale=x, softcap=x))
    for x in numbers:
        compiled(float(x))
    assert compiled._cache_size() == 1


NUMBERS = {
    "scale": lambda a, x: slra.attention(*a, scale=x, softcap=x),
    "scale of a gradient": lambda a, x: jax.grad(
        lambda q: slra.attention(q, *a[1:], scale=x).sum()
    )(a[0]),
    "scale of a basis": lambda a, x: slra.low_rank_attention(*a, 2, scale=x),
    "thresholds": lambda a, x: slra.low_rank_attention(*a, 2, method="svd", l1=x),
    "tau": lambda a, x: slra.prox.prox_l1(a[0], x),
    "tau of singular values": lambda a, x: slra.prox.prox_nuclear(a[0], x),
    "radius": lambda a, x: slra.prox.project_l1_ball(a[0], x),
    "l2": lambda a, x: slra.prox.prox_elastic_net(a[0], 0.3, l2=x),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_another_number_compiles_nothing(name):
    arrays = [jax.numpy.asarray(x) for x in np.random.default_rng(0).standard_normal((3, 2, 6, 4))]
    compilations(functools.partial(NUMBERS[name], arrays), [0.31, 0.32])
    assert compilations(functools.partial(NUMBERS[name], arrays), [0.33, 0.34, 0.35]) == 0
