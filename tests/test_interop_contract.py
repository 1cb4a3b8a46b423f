"""What docs/interop.md promises, and that every sentence there has its test."""

import ast
import dataclasses
import inspect
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import array_api_compat as compat
import numpy as np
import pytest

import slra
from slra._backends import ambient
from slra._validate import promote, resolve
from tests.backends import brought, fetched, to_numpy, to_xp
from tests.fuzz.targets import TARGETS
from tests.transforms import CASES, OF_A_MATRIX, arguments

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "interop.md"
LAZY = pytest.mark.eager_only("one call is traced at a time")


def promises():
    return re.findall(r"^- (.*)$", PAGE.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("promise", promises(), ids=lambda promise: promise[:40])
def test_every_promise_names_a_test_that_exists(promise):
    found = re.search(r"`(test_\w+\.py)::(test_\w+)`$", promise)
    assert found, "a line of the contract must end with its test"
    tree = ast.parse((TESTS / found[1]).read_text())
    assert found[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_results_have_the_library_and_dtype_of_the_arguments(xp):
    (a,), qkv = arguments("prox_l1"), arguments("attention")
    x, *qkv = (to_xp(xp, one.astype("float32")) for one in (a, *qkv))
    results = [
        *slra.truncated_svd(x, 2),
        slra.prox.prox_l1(x, 0.1),
        slra.attention(*qkv),
        slra.low_rank_attention(*qkv, 2),
    ]
    z = to_xp(xp, (a * (1 + 1j)).astype("complex64"))
    U, S, Vh = slra.truncated_svd(z, 2)
    results += [S, slra.prox.norm_l1(z)]
    for out in results:
        assert compat.array_namespace(out) is compat.array_namespace(x)
        assert out.dtype == x.dtype
    assert U.dtype == Vh.dtype == z.dtype


def test_sums_of_exponentials_are_not_rounded_to_half(xp):
    if not hasattr(xp, "float16"):
        pytest.skip("no half precision in this library")
    qkv = [xp.astype(to_xp(xp, a), xp.float16) for a in arguments("attention")]
    out, lse = slra.attention(*qkv, return_lse=True)
    assert (out.dtype, lse.dtype) == (xp.float16, xp.float32)


@pytest.mark.parametrize("name", ["randomized_svd", "prox_l1", "attention"])
def test_arguments_are_left_alone(xp, name):
    plain = arguments(name)
    given = [to_xp(xp, a.copy()) for a in plain]
    CASES[name](*given)
    for x, a in zip(given, plain, strict=True):
        np.testing.assert_array_equal(to_numpy(x), a)


@pytest.mark.parametrize("name", list(CASES))
def test_results_share_no_memory_with_arguments(name):
    given = arguments(name)
    out = CASES[name](*given)
    assert not any(np.shares_memory(out, x) for x in given)


@pytest.mark.parametrize("call", ["prox_l1", "project_box", "project_l2_ball", "project_rank"])
def test_results_that_equal_their_argument_are_copies_all_the_same(call):
    x = np.asarray([[0.1, 0.2], [0.3, 0.1]])
    prox = slra.prox
    out = {
        "prox_l1": lambda: prox.prox_l1(x, 0.0),
        "project_box": lambda: prox.project_box(x, -1.0, 1.0),
        "project_l2_ball": lambda: prox.project_l2_ball(x, 9.0),
        "project_rank": lambda: prox.project_rank(x, 2),
    }[call]()
    np.testing.assert_allclose(out, x, atol=1e-15)
    assert not np.shares_memory(out, x)


@LAZY
def test_only_half_precision_is_copied_at_the_door(xp):
    x = to_xp(xp, np.ones((3, 2)))
    table = resolve(x=x)
    assert promote(table, x=x).arrays[0] is x
    if hasattr(xp, "float16"):
        assert promote(table, x=xp.astype(x, xp.float16)).arrays[0].dtype == xp.float32


def test_traced_nan_comes_out_as_nan():
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(arguments("prox_l1")[0]).at[0, 0].set(np.nan)
    assert np.all(np.isnan(jax.jit(lambda x: slra.truncated_svd(x, 2).S)(x)))


@LAZY
@pytest.mark.parametrize("name", ["prox_nuclear", "attention", "low_rank_attention"])
def test_several_threads_get_what_one_gets(xp, name):
    if name not in OF_A_MATRIX and compat.is_dask_namespace(xp):
        pytest.skip("a graph, which its scheduler runs")
    inputs = [[to_xp(xp, (i + 1) * a) for a in arguments(name)] for i in range(8)]
    alone = [to_numpy(CASES[name](*x)) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: to_numpy(CASES[name](*x)), inputs))
    for got, right in zip(together, alone, strict=True):
        np.testing.assert_allclose(got, right, rtol=0, atol=1e-11)


def test_global_state_is_left_alone():
    torch = pytest.importorskip("torch")
    jax = pytest.importorskip("jax")

    def state():
        return (
            pickle.dumps(np.random.get_state()),  # noqa: NPY002
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            str(jax.config.values),
            sorted(np.geterr().items()),
        )

    before = state()
    for name in ("randomized_svd", "prox_nuclear", "low_rank_attention", "attention"):
        given = arguments(name)
        for convert in (np.asarray, torch.from_numpy, jax.numpy.asarray):
            CASES[name](*map(convert, given))
    slra.robust_pca(arguments("prox_l1")[0], rng=None, max_iter=5)
    assert state() == before


def test_results_can_be_pickled():
    (x,), qkv = arguments("prox_l1"), arguments("attention")
    basis = slra.fit_attention(*qkv, 3)
    for result in (slra.truncated_svd(x, 2), slra.compress(x, 2, 0.2), basis):
        again = pickle.loads(pickle.dumps(result))
        assert type(again) is type(result)
    np.testing.assert_array_equal(again.uv, basis.uv)
    np.testing.assert_allclose(again.attend(*qkv), basis.attend(*qkv), atol=1e-14)


@pytest.mark.parametrize("adapter", ["sklearn", "transformers"])
def test_an_adapter_imports_only_its_framework(adapter):
    pytest.importorskip(adapter)
    code = f"import sys, slra.integrations.{adapter}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    others = {"sklearn": {"torch", "transformers"}, "transformers": set()}[adapter]
    assert not loaded & ({"jax", "dask", "cupy"} | others)


def leaves(out):
    """Arrays and numbers of a result, whatever it is made of."""
    if dataclasses.is_dataclass(out):
        out = tuple(vars(out).values())
    if isinstance(out, (tuple, list)):
        return [leaf for one in out for leaf in leaves(one)]
    return [fetched(out)]


def answer(target, xp, dtype, scale=1.0):
    """What a function gives for its plain arguments, or the message of its error."""

    def cast(x):
        if isinstance(x, tuple | list):
            parts = map(cast, x)
            return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
        is_floating = isinstance(x, np.ndarray) and x.dtype == np.float64
        return (x * scale).astype(dtype) if is_floating else x

    args = {name: brought(xp, cast(x)) for name, x in target.base.items()}
    if "rng" in args:
        args["rng"] = 0
    return args, lambda: leaves(target.function(xp, **args))


# Those of LowRankPlusSparse meet a matrix in double precision, which autocast leaves alone.
NARROW = [name for name in TARGETS if not name.startswith("LowRankPlusSparse")]


@pytest.mark.parametrize("name", NARROW)
def test_autocast_changes_nothing(name):
    torch = pytest.importorskip("torch")
    import array_api_compat.torch as xp

    _, call = answer(TARGETS[name], xp, "float32")
    alone = call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = call()
    for got, right in zip(within, alone, strict=True):
        np.testing.assert_array_equal(got, right, strict=isinstance(right, np.ndarray))


CALLING_BACK = ("proximal_gradient", "primal_dual", "admm")


@pytest.mark.parametrize("scale", [1e-170, 1.0, 1e150])
@pytest.mark.parametrize("name", list(TARGETS))
def test_errors_of_floating_point_are_not_the_callers(name, scale):
    if name.startswith(CALLING_BACK) and scale != 1:
        pytest.skip("what the caller's functions do is the caller's")
    with np.errstate(all="ignore"):
        _, call = answer(TARGETS[name], np, "float64", scale)
        try:
            alone = call()
        except (TypeError, ValueError) as error:
            with pytest.raises(type(error)), np.errstate(all="raise"):
                call()
            return
    with np.errstate(all="raise"):
        within = call()
    for got, right in zip(within, alone, strict=True):
        np.testing.assert_array_equal(got, right)


def test_errors_of_floating_point_in_the_callers_functions_are():
    def value_and_grad(x):
        return 0.0, np.asarray([1.0, 1.0]) / np.zeros(2)

    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        slra.proximal_gradient(np.ones(2), value_and_grad, slra.prox.prox_l1, step=1.0)


def test_every_public_function_is_apart_from_contexts():
    found = [
        (name, function)
        for owner in (slra, slra.prox, slra.objective)
        for name in owner.__all__
        if inspect.isfunction(function := getattr(owner, name))
    ]
    assert len(found) > 40
    # Registration computes nothing, nor does the calculus of operators, whose results are functions that are apart.
    missing = {name for name, function in found if not hasattr(function, "is_isolated")}
    calculus = {"conjugate", "envelope", "scale", "separable", "translate"}
    assert missing <= calculus | {"register_backend"}
    made = [
        getattr(slra.prox, name)(slra.prox.prox_l1) for name in ("conjugate", "envelope", "scale")
    ]
    assert all(hasattr(function, "is_isolated") for function in made)


def test_nan_of_our_own_does_not_stop_a_debugger():
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(np.ones((60, 40), dtype="float32"))
    with jax.debug_nans(True):
        U, _, _ = slra.randomized_svd(x, 3, n_oversamples=0, n_iter=2, method="krylov", rng=0)
    np.testing.assert_allclose(U.T @ U, np.eye(3), atol=1e-5)


@pytest.mark.usefixtures("alarm_interrupts")
def test_ctrl_c_leaves_the_callers_errstate():
    x, before = np.ones(3), np.geterr()

    def shrink_for_long(moment):
        signal.setitimer(signal.ITIMER_REAL, moment)
        end = time.perf_counter() + 5
        while time.perf_counter() < end:
            slra.soft_threshold(x, 0.5)

    for i in range(4000):
        with pytest.raises(KeyboardInterrupt):
            shrink_for_long(1e-5 + i % 200 * 1e-6)
        assert np.geterr() == before


def test_a_function_of_the_callers_meets_the_errstate_that_it_is_called_in():
    """In a process that Ctrl-C has left in the middle of a call, and from within another call, too."""

    def overflow(x):
        return 0.0, (x * 1e308 * 1e308 == 0.0) * x

    def minimise():
        return slra.proximal_gradient(np.ones(2), overflow, lambda x, step: x, step=1.0, max_iter=3)

    def minimise_within(x):
        with np.errstate(over="ignore"):
            minimise()
        return overflow(x)

    stale = ambient._callers_errors.set(ambient._errors.get())
    try:
        with np.errstate(over="ignore"):
            minimise()
        with np.errstate(over="raise"):
            with pytest.raises(FloatingPointError, match="overflow"):
                minimise()
            with pytest.raises(FloatingPointError, match="overflow"):
                slra.proximal_gradient(
                    np.ones(2), minimise_within, lambda x, step: x, step=1.0, max_iter=3
                )
    finally:
        ambient._callers_errors.reset(stale)
