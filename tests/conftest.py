"""Fixtures, and the table of backends that closes a run."""

import contextlib
import ctypes
import gc
import importlib.util
import mmap
import os
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Memory that threads once used would be kept for each of them. Read when a process starts: for the workers.
os.environ.setdefault("MALLOC_ARENA_MAX", "2")

if "PYTEST_XDIST_WORKER" in os.environ:
    # A BLAS whose waiting threads spin would take the cores from the other processes. By the environment for whatever
    # loads one later; NumPy's is loaded by a plugin of pytest before this file.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if importlib.util.find_spec("threadpoolctl") is not None:
        import numpy  # noqa: F401
        import threadpoolctl

        threadpoolctl.threadpool_limits(1, user_api="blas")

import array_api_compat as compat

from tests import selection
from tests.backends import BACKENDS, other_device
from tests.capabilities import Seen, disagreements, watch
from tests.cuda_host import host

# XLA's older code generator takes half the time of the newer one. A flag that a version does not know ends the process.
XLA_FLAG = "xla_cpu_use_fusion_emitters"


def _xla_knows(flag: str) -> bool:
    spec = importlib.util.find_spec("jaxlib")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    for library in folder.glob("*.so") if folder else ():
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
            if m.find(flag.encode()) >= 0:
                return True
    return False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough", action="store_true", help="run all tests, not only the few minutes' worth"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return one process a core, up to four; none beside this one where files or tests are named."""
    if any(".py" in argument for argument in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 4)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file's tests in one process, those on JAX apart: what is compiled or made once serves them all."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    return ByFile(config, log) if config.option.dist == "load" else None


def _scope(nodeid: str) -> str:
    file, _, test = nodeid.partition("::")
    return f"{file} on JAX" if "jax" in test.partition("[")[2] else file


def pytest_sessionstart(session: pytest.Session) -> None:
    """Set up JAX, where tests are run (not in a process that hands them to others)."""
    hands_over = getattr(session.config.option, "dist", "no") != "no"
    if "PYTEST_XDIST_WORKER" not in os.environ and hands_over:
        return
    if importlib.util.find_spec("jax") is None:
        return
    if _xla_knows(XLA_FLAG):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{XLA_FLAG}=false".strip()
    import jax

    # Before the first array: several devices on the CPU, and double precision where it is asked for.
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_enable_x64", True)
    # Most of the time of a test on JAX goes into compiling.
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def _jax_compiles_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what JAX compiled on disk. A folder for each process: files are not written in one step."""
    if importlib.util.find_spec("jax") is not None:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Drop what JAX compiled for a file: it is gigabytes for all of them."""
    if nextitem is not None and _scope(item.nodeid) != _scope(nextitem.nodeid):
        if jax := sys.modules.get("jax"):
            jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back, which glibc keeps


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.gpu) if name == "cupy" else name for name in BACKENDS
    ]
)
def xp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Array namespace of each backend in turn; `slra` is wrapped as the backend asks."""
    backend = BACKENDS[request.param]
    if reason := backend.missing():
        pytest.skip(reason)
    for marker in request.node.iter_markers("eager_only"):
        if "eager" in backend.lacks:
            pytest.skip(marker.args[0])
    for marker in request.node.iter_markers("needs"):
        if marker.args[0] in backend.lacks:
            pytest.skip(backend.lacks[marker.args[0]])
    with backend.enter() as namespace:
        called = watch(monkeypatch, lambda function: backend.wrap(function, request), namespace)
        request.node.user_properties.append(("called", called))
        yield namespace


@pytest.fixture(scope="session", autouse=True)
def _kernels_compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let the workers of pytest-xdist share what g++ made."""
    folder = tmp_path_factory.getbasetemp()
    host.shared_folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture
def device(xp: Any) -> Iterator[Any]:
    """Device on which arrays of ``xp`` are not created by default."""
    with contextlib.ExitStack() as stack:
        found = other_device(xp, stack)
        if compat.is_cupy_namespace(xp):
            # CuPy works on the current device only; what is hard-wired to the first one still shows.
            stack.enter_context(found)
        yield found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note the backend of each test where its report can carry it, and leave out what was not asked for."""
    for item in items:
        if backend := selection.backend_of(item):
            item.user_properties.append(("backend", backend))
    dropped = selection.deselected(config, items)
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    # What takes longest first, so that no process waits for another at the end.
    items[:] = sorted(
        (item for item in items if item not in dropped),
        key=lambda item: "JAX" not in _scope(item.nodeid),
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """After a thorough run: does the table of capabilities say what was seen?"""
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if (
        _is_partial(config)
        or not config.option.thorough
        or session.testsfailed
        or reporter is None
        or not reporter.stats.get("passed")
    ):
        return
    seen = Seen()
    for report in reporter.stats["passed"]:
        seen.add(report)
    if wrong := disagreements(seen):
        reporter.write_line("")
        reporter.write_line("docs/backends.md is out of date: python -m tests.capabilities")
        for line in wrong:
            reporter.write_line(line)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _is_partial(config: pytest.Config) -> bool:
    """Whether not all tests were asked for."""
    narrowing = ("keyword", "markexpr", "collectonly", "lf", "stepwise", "deselect", "ignore")
    chosen = [name for name in narrowing if getattr(config.option, name, None)]
    return bool(chosen) or config.args_source is not pytest.Config.ArgsSource.TESTPATHS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what passed and what was skipped on each backend, and why."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            backend = dict(getattr(report, "user_properties", ())).get("backend")
            if backend is None:
                continue
            counts[backend][outcome] += 1
            if outcome == "skipped":
                reasons[backend][report.longrepr[2].removeprefix("Skipped: ")] += 1
    if not counts:
        return
    terminalreporter.section("backends")
    for backend in filter(counts.__contains__, BACKENDS):
        tally = counts[backend]
        why = "; ".join(f"{reason} ({n})" for reason, n in reasons[backend].most_common())
        terminalreporter.write_line(
            f"{backend:17} {tally['passed']:5} passed {tally['failed'] + tally['error']:3} failed "
            f"{tally['skipped']:4} skipped  {why}"
        )


@pytest.fixture
def alarm_interrupts() -> Iterator[None]:
    """An alarm is Ctrl-C. Not in garbage collection, whose callbacks, JAX's among them, may lose it."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("no timers here")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    gc.disable()
    yield
    gc.enable()
    signal.signal(signal.SIGALRM, before)
