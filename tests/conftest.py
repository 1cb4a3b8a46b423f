"""Fixtures, and the table of backends that closes a run."""

import contextlib
import importlib.util
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

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

from tests.backends import BACKENDS, other_device
from tests.capabilities import Seen, disagreements, watch
from tests.cuda_host import host

if importlib.util.find_spec("jax") is not None:
    import jax

    # Before the first array: several devices on the CPU, and double precision where it is asked for.
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_enable_x64", True)
    # Most of the time of a test on JAX goes into compiling.
    jax.config.update("jax_disable_most_optimizations", True)


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
    """Note the backend of each test where its report can carry it, and thin those on eager JAX."""
    on_jax: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        params = getattr(item, "callspec", None)
        backend = params.params.get("xp") if params else None
        if backend is not None:
            item.user_properties.append(("backend", backend))
        if backend == "jax":
            on_jax[item.nodeid.partition("[")[0]].append(item)
    if config.option.keyword or any("::" in argument for argument in config.args):
        return
    # Eager JAX compiles each operation for each shape, which was half the time of the suite. Of the parameters of a
    # test it gets the last ones, and the first ones where jax-jit cannot take them; jax-jit and others get them all.
    dropped = {
        item
        for group in on_jax.values()
        for item in group[1 if group[0].get_closest_marker("eager_only") else 0 : -1]
    }
    config.hook.pytest_deselected(items=sorted(dropped, key=items.index))
    items[:] = [item for item in items if item not in dropped]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """After a full run: does the table of capabilities say what was seen?"""
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if (
        _is_partial(config)
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
