"""The limit of BLAS while NumPy's attention runs on several threads: held inside, and afterwards what it was."""

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import slra
from slra._backends import blas_threads, numpy_attention

threadpoolctl = pytest.importorskip("threadpoolctl")


def now():
    """How many threads each BLAS may use."""
    controller = threadpoolctl.ThreadpoolController().select(user_api="blas")
    return [library.num_threads for library in controller.lib_controllers]


@pytest.fixture
def limits():
    """Allow each BLAS three threads; these limits."""
    if not now():
        pytest.skip("no BLAS that threadpoolctl knows")
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        before = now()
        yield before
        assert now() == before


@pytest.fixture
def inside(monkeypatch):
    """The limits that tasks of ours have seen."""
    seen = []
    attend_rows = numpy_attention._attend_rows

    def watched(*args):
        seen.append(now())
        attend_rows(*args)

    monkeypatch.setattr(numpy_attention, "_attend_rows", watched)
    return seen


def big():
    return np.random.default_rng(0).standard_normal((3, 4, 1024, 16)).astype("float32")


def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    return thread


@contextlib.contextmanager
def held_elsewhere():
    """Hold the limit in another thread; end that by calling what is given."""
    begun, end = threading.Event(), threading.Event()

    def hold():
        with blas_threads.workers():
            begun.set()
            end.wait()

    thread = in_thread(hold)
    begun.wait()

    def leave():
        end.set()
        thread.join()

    yield leave
    leave()


def test_blas_has_one_thread_inside(limits, inside):
    slra.attention(*big())
    assert inside
    assert {limit for seen in inside for limit in seen} == {1}
    assert now() == limits


def test_calls_from_eight_threads_at_once(limits, inside):
    """threadpoolctl 3.8 ignores all threads but the first to set a limit, which here is this one."""
    q, k, v = big()
    expected = slra.attention(q, k, v)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: slra.attention(q, k, v), range(16)))
    assert all(np.array_equal(result, expected) for result in results)
    assert {limit for seen in inside for limit in seen} == {1}
    assert now() == limits


@functools.cache
def public_calls():
    """Calls whose products are large enough for OpenBLAS to share them out, by name."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 411, 67)).astype("float32")
    x = (rng.standard_normal((311, 7)) @ rng.standard_normal((7, 203))).astype("float32")
    x += 0.1 * rng.standard_normal(x.shape).astype("float32")
    with_gaps = np.where(rng.random(x.shape) < 0.2, np.float32(np.nan), x)
    # Under the limit, as in a process that does nothing else.
    basis = slra.fit_attention(q, k, v, 16)
    out, lse = slra.attention(q, k, v, return_lse=True)
    svd = slra.randomized_svd(x, 5, rng=0)

    def least_squares(z):
        rest = x @ z - x[:, :1]
        return 0.5 * float(np.sum(rest**2)), x.T @ rest

    def cache():
        held = slra.KVCache(basis, window=16)
        return held.append(k, v).attend(q[:, :2])

    return {
        "attention": lambda: slra.attention(q, k, v),
        "attention_vjp": lambda: slra.attention_vjp(q, k, v, out, lse, out),
        "fit_attention": lambda: slra.fit_attention(q, k, v, rtol=0.5).wk,
        "AttentionBasis.attend": lambda: basis.attend(q, k, v),
        "AttentionBasis.project": lambda: basis.project(q, k, v),
        "low_rank_attention": lambda: slra.low_rank_attention(q, k, v, 16),
        "low_rank_attention, n_exact": lambda: slra.low_rank_attention(q, k, v, 16, n_exact=8),
        "low_rank_attention, l1": lambda: slra.low_rank_attention(
            q, k, v, 16, method="svd", l1=0.1
        ),
        "low_rank_attention_vjp": lambda: slra.low_rank_attention_vjp(
            q, k, v, out, lse, out, basis=basis
        ),
        "KVCache": cache,
        "randomized_svd": lambda: slra.randomized_svd(x, 5, rng=0),
        "randomized_svd, krylov": lambda: slra.randomized_svd(x, 5, method="krylov", rng=0),
        "truncated_svd": lambda: slra.truncated_svd(x, 5),
        "randomized_eigh": lambda: slra.randomized_eigh(x @ x.T, 5, rng=0),
        "estimate_error": lambda: slra.estimate_error(x, svd, rng=0),
        "robust_pca": lambda: slra.robust_pca(x, max_iter=10, rng=0)[:2],
        "compress": lambda: slra.compress(x, 5, 0.05, n_iter=3)[:4],
        "complete": lambda: slra.complete(with_gaps, 7, max_iter=3, rng=0)[:3],
        "prox_nuclear": lambda: slra.prox.prox_nuclear(x, 10.0, rng=0),
        "proximal_gradient": lambda: (
            slra.proximal_gradient(
                np.zeros((x.shape[1], 1), "float32"), least_squares, slra.prox.prox_l1, max_iter=20
            ).x
        ),
    }


def arrays_of(result):
    return result if isinstance(result, tuple) else (result,)


PUBLIC = (
    "attention",
    "attention_vjp",
    "fit_attention",
    "AttentionBasis.attend",
    "AttentionBasis.project",
    "low_rank_attention",
    "low_rank_attention, n_exact",
    "low_rank_attention, l1",
    "low_rank_attention_vjp",
    "KVCache",
    "randomized_svd",
    "randomized_svd, krylov",
    "truncated_svd",
    "randomized_eigh",
    "estimate_error",
    "robust_pca",
    "compress",
    "complete",
    "prox_nuclear",
    "proximal_gradient",
)


@pytest.mark.parametrize("name", PUBLIC)
def test_eight_threads_give_the_bits_of_one(limits, name):
    """Products beside attention too, whose sums OpenBLAS orders by the number of its threads on many processors."""
    call = public_calls()[name]
    expected = arrays_of(call())
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: arrays_of(call()), range(8)):
            for x, y in zip(got, expected, strict=True):
                np.testing.assert_array_equal(x, y)
    assert now() == limits


@pytest.mark.parametrize("allowed", [1, 2])
def test_no_more_threads_than_blas_was_allowed(limits, allowed, monkeypatch):
    started = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, n):
            started.append(n)
            super().__init__(n)

    monkeypatch.setattr(numpy_attention, "ThreadPoolExecutor", Pool)
    with threadpoolctl.threadpool_limits(allowed):
        expected = now()
        slra.attention(*big())
        assert now() == expected
    assert started == ([] if allowed == 1 else [min(expected)])


def test_threads_are_shared_among_callers_but_not_with_oneself(limits):
    with blas_threads.workers() as alone:
        assert alone == 3
        with blas_threads.workers() as nested:
            assert nested == 3
        assert set(now()) == {1}
    with held_elsewhere(), blas_threads.workers() as half:
        assert half == 1


def test_limits_are_put_back_after_an_error(limits, monkeypatch):
    with contextlib.suppress(ZeroDivisionError), blas_threads.workers(), blas_threads.workers():
        raise ZeroDivisionError
    assert now() == limits
    monkeypatch.setattr(numpy_attention, "_attend_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        slra.attention(*big())


@pytest.mark.parametrize("allowed", [1, 2])
def test_a_limit_of_the_users_that_ends_in_mid_call(limits, allowed):
    with contextlib.ExitStack() as users:
        users.enter_context(threadpoolctl.threadpool_limits(allowed, user_api="blas"))
        with held_elsewhere():
            users.close()
            assert set(now()) == {1}
        assert now() == limits


@pytest.mark.parametrize("allowed", [1, 2])
def test_a_limit_of_the_users_that_begins_in_mid_call(limits, allowed):
    with (
        held_elsewhere() as leave,
        threadpoolctl.threadpool_limits(allowed, user_api="blas"),
    ):
        assert set(now()) == {1}
        leave()
        assert set(now()) == {allowed}
    assert now() == limits


@pytest.mark.parametrize("allowed", [1, 2])
def test_a_limit_of_the_users_within_a_call(limits, allowed):
    with held_elsewhere():
        with threadpoolctl.threadpool_limits(allowed, user_api="blas") as kept:
            assert set(now()) == {1}
        threadpoolctl.threadpool_limits.wrap(allowed, user_api="blas")(now)()
    assert kept is not None
    assert now() == limits


def test_what_others_have_set_directly_stays(limits):
    libraries = blas_threads._libraries()
    with blas_threads.workers():
        libraries[0].set(2)
    assert now() == [2, *limits[1:]]
    libraries[0].set(limits[0])


# Python 3.12 warns of a fork beside threads, and JAX does; that it is safe is what is tested.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:os.fork:RuntimeWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_child_of_a_fork_gets_its_threads_back(limits):
    def child():
        before = now()
        with blas_threads.workers() as n:
            return before == limits and set(now()) == {1} and n == 3

    with held_elsewhere(), blas_threads.workers():
        pid = os.fork()
        if not pid:
            os._exit(0 if child() and now() == limits else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert set(now()) == {1}


# In the callback of a weak reference to a thread it is lost too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("alarm_interrupts")
def test_limits_are_put_back_after_ctrl_c(limits):
    """At moments spread over the call, and over what comes before and after."""
    arguments = big()
    start = time.perf_counter()
    slra.attention(*arguments)
    seconds = time.perf_counter() - start
    for moment in np.linspace(1e-5, 1.2 * seconds, 60):
        # An interrupt of `Thread.start` may come out as "release unlocked lock".
        with contextlib.suppress(KeyboardInterrupt, RuntimeError):
            signal.setitimer(signal.ITIMER_REAL, moment)
            slra.attention(*arguments)
            time.sleep(10 * seconds + 1)
        assert now() == limits
        assert not blas_threads._lowered.callers


@pytest.mark.usefixtures("alarm_interrupts")
def test_ctrl_c_is_not_lost_while_loaded_libraries_are_counted():
    """What a callback of ctypes raises is printed and forgotten."""

    def count_for_long(moment):
        signal.setitimer(signal.ITIMER_REAL, moment)
        end = time.perf_counter() + 5
        while time.perf_counter() < end:
            blas_threads._n_loaded()

    for moment in np.linspace(1e-5, 2e-4, 300):
        with pytest.raises(KeyboardInterrupt):
            count_for_long(moment)


def test_a_library_that_does_not_obey(limits, monkeypatch):
    """Then BLAS is left alone, and we start no threads."""
    stubborn = blas_threads.Library("stubborn", lambda: 3, lambda limit: None)
    libraries = [*blas_threads._libraries(), stubborn]
    monkeypatch.setattr(blas_threads, "_libraries", lambda: libraries)
    with blas_threads.workers() as n:
        assert n == 1
        assert now() == limits


def test_a_limit_that_each_thread_has_of_its_own(limits, monkeypatch):
    own, inside = threading.local(), set()
    library = blas_threads.Library(
        "own", lambda: getattr(own, "limit", 3), lambda limit: setattr(own, "limit", limit)
    )

    def run(task, buffers):
        inside.add(library.get())
        time.sleep(0.01)

    monkeypatch.setattr(blas_threads, "_libraries", lambda: [library])
    for _ in range(2):
        numpy_attention.in_threads(list(range(20)), run, np.float32, 1 << 30)
        assert inside == {1}
        assert library.get() == 3


LOADED_LATER = """
import ctypes, sys
import numpy
from slra._backends import blas_threads
with blas_threads.workers():
    pass
library = ctypes.CDLL(sys.argv[1])
get, put = (getattr(library, name) for name in sys.argv[2:])
put(2)
with blas_threads.workers():
    assert get() == 1
assert get() == 2
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a library without a module")
def test_a_library_that_is_loaded_after_the_first_call(tmp_path):
    controllers = threadpoolctl.ThreadpoolController().select(internal_api="openblas")
    if not controllers.lib_controllers:
        pytest.skip("no OpenBLAS")
    (one, *_) = controllers.lib_controllers
    copy = tmp_path / "libopenblas_another.so"
    shutil.copy(one.filepath, copy)
    names = [
        f"{prefix}openblas_{verb}_num_threads{suffix}"
        for prefix in ("", "scipy_")
        for suffix in ("", "64_", "_64")
        for verb in ("get", "set")
    ]
    found = [name for name in names if hasattr(ctypes.CDLL(one.filepath), name)][:2]
    # Beside the original, for what it needs in turn.
    folder = os.path.dirname(one.filepath)
    subprocess.run(
        [sys.executable, "-c", LOADED_LATER, copy, *found],
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": folder},
    )
