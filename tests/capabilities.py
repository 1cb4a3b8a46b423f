"""Which public function runs on which backend: a table of what tests did, in docs/backends.md.

``python -m tests.capabilities`` writes it. On NumPy it runs every test that takes the fixture ``xp``; on the other
backends the fastest few of those that called each function there. Each full run of the tests then compares the table
with all that was called, see `disagreements`.
"""

import functools
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import array_api_compat as compat
import pytest

import slra
from tests.backends import BACKENDS

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "backends.md"
BEGIN, END = "<!-- begin capabilities -->\n", "<!-- end capabilities -->"
MODULES = (slra, slra.prox, slra.objective)
# Classes whose method stands for what they do.
CLASSES = (slra.AttentionBasis, slra.KVCache)
METHOD = "attend"
WITHOUT_ARRAYS = ("slra.prox.calculus", "slra._backends.registered")
COLUMNS = {
    "NumPy": ("numpy", "numpy-readonly"),
    "CuPy, on a host": ("cupy-on-host",),
    "PyTorch": ("torch-float32", "torch-float64"),
    "JAX": ("jax",),
    "`jax.jit`": ("jax-jit",),
    "Dask": ("dask",),
    "array-api-strict": ("array-api-strict",),
}
# Where a run takes a part of the tests only, see conftest.py: what it did not see may be there all the same.
THINNED = ("jax",)
# Tests of a function that are tried on a backend until one of them passes there.
N_TRIES = 3


def functions() -> dict[FunctionType, list[str]]:
    """Public functions that take arrays, each with the names that it goes by."""
    found = defaultdict(list)
    for module in MODULES:
        for name in module.__all__:
            function = getattr(module, name)
            # The calculus of operators takes and returns functions, and registration a class.
            takes_arrays = getattr(function, "__module__", "") not in WITHOUT_ARRAYS
            if isinstance(function, FunctionType) and takes_arrays:
                found[function].append(f"{module.__name__}.{name}".removeprefix("slra."))
    return found


def rows() -> dict[str, str]:
    """Label of each row by the name under which calls are noted."""
    named = {function.__name__: " = ".join(names) for function, names in functions().items()}
    return {**named, **{f"{one.__name__}.{METHOD}": f"{one.__name__}.{METHOD}" for one in CLASSES}}


def watch(
    monkeypatch: pytest.MonkeyPatch,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
    namespace: Any,
) -> list[str]:
    """Wrap every public function; return the list in which those are noted that took arrays of this library."""
    called: list[str] = []
    watched = {f: _noting(wrap(f), f.__name__, namespace, called) for f in functions()}
    # By identity, as `proximal_gradient` knows `prox_l1`.
    for module in (*MODULES, sys.modules["slra.solvers.proximal_gradient"]):
        for name, function in list(vars(module).items()):
            if isinstance(function, FunctionType) and function in watched:
                monkeypatch.setattr(module, name, watched[function])
    for one in CLASSES:
        method = _noting(wrap(getattr(one, METHOD)), f"{one.__name__}.{METHOD}", namespace, called)
        monkeypatch.setattr(one, METHOD, method)
    return called


def _noting(
    function: Callable[..., Any], name: str, namespace: Any, called: list[str]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if name not in called and any(_is_of(x, namespace) for x in (*args, *kwargs.values())):
            called.append(name)
        return result

    return call


def _is_of(x: Any, namespace: Any) -> bool:
    if isinstance(x, list | tuple):
        return any(_is_of(one, namespace) for one in x)
    return compat.is_array_api_obj(x) and compat.array_namespace(x) is namespace


@dataclass
class Seen:
    """What was called by tests that passed, by backend."""

    called: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def add(self, report: Any) -> None:
        """Take in the report of a test."""
        properties = dict(report.user_properties)
        if report.when == "call" and report.passed and "backend" in properties:
            self.called[properties["backend"]].update(properties.get("called", ()))

    def runs(self, name: str, backends: Iterable[str]) -> bool:
        """Whether a function ran on all of some backends."""
        return all(name in self.called[one] for one in backends)


def disagreements(seen: Seen) -> list[str]:
    """Where the table says other than what a full run of the tests saw; backends that did not run say nothing."""
    wrong = []
    for name, cells in _read().items():
        for (title, backends), cell in zip(COLUMNS.items(), cells, strict=True):
            if not all(seen.called.get(one) for one in backends):
                continue
            says, saw = cell.startswith(("yes", "lazily")), seen.runs(name, backends)
            if says != saw and (saw or backends != THINNED):
                wrong.append(f"{name} on {title}: the table says {cell!r}, the tests do not")
    return wrong


def _read() -> dict[str, list[str]]:
    """Cells of the table, by the name under which calls are noted."""
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    cells = {}
    for line in text.splitlines()[2:]:
        labels, *rest = line.removeprefix("| ").removesuffix(" |").split(" | ")
        cells |= dict.fromkeys(re.findall(r"`([^`]+)`", labels), rest)
    return {name: cells.get(label, [""] * len(COLUMNS)) for name, label in rows().items()}


class _Survey:
    """A plugin that runs tests on NumPy, then on each other backend the fastest that call what it has not run yet."""

    def __init__(self) -> None:
        self.seen = Seen()
        # Tests by what tells them apart but for the backend, then by backend.
        self.items: dict[tuple[str, str], dict[str, pytest.Item]] = defaultdict(dict)
        self.reports: dict[str, pytest.TestReport] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seen.add(report)
        if report.when == "call" and not report.skipped:
            self.reports[report.nodeid] = report

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for item in session.items:
            if backend := dict(item.user_properties).get("backend"):
                test, _, parameters = item.nodeid.partition("[")
                self.items[test, parameters.replace(backend, "", 1)][backend] = item
        # Some are meant for one backend only.
        self.items = {key: test for key, test in self.items.items() if set(BACKENDS) == set(test)}
        for test in self.items.values():
            _run(test["numpy"])
        for backend in sorted({one for column in COLUMNS.values() for one in column} - {"numpy"}):
            for name in rows():
                self._try(name, backend)
        return True

    def _try(self, name: str, backend: str) -> None:
        """Run tests that call a function until one passes."""
        n_run = 0
        for test in self.callers(name):
            if name in self.seen.called[backend] or n_run == N_TRIES:
                return
            item = test[backend]
            if _left_out(item) is None and item.nodeid not in self.reports:
                _run(item)
                # One that skips itself is no try.
                n_run += item.nodeid in self.reports

    def callers(self, name: str) -> list[dict[str, pytest.Item]]:
        """Tests that call a function on NumPy, the fastest first."""
        reports = [(self.reports.get(t["numpy"].nodeid), t) for t in self.items.values()]
        found = [(r.duration, t) for r, t in reports if r is not None and name in _called(r)]
        return [test for _, test in sorted(found, key=lambda pair: pair[0])]


def _run(item: pytest.Item) -> None:
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)


def _called(report: Any) -> list[str]:
    return dict(report.user_properties).get("called", [])


def _left_out(item: pytest.Item) -> str | None:
    """Why a marker keeps a test from its backend, or None."""
    lacks = BACKENDS[item.callspec.params["xp"]].lacks
    for marker in item.iter_markers("eager_only"):
        if "eager" in lacks:
            return marker.args[0]
    return next((lacks[m.args[0]] for m in item.iter_markers("needs") if m.args[0] in lacks), None)


def _cell(survey: _Survey, name: str, backends: tuple[str, ...]) -> str:
    callers = survey.callers(name)
    if survey.seen.runs(name, backends):
        return "lazily" + _computes(callers) if backends == ("dask",) else "yes"
    reasons = {_left_out(test[one]) for test in callers for one in backends}
    return "not tested" if None in reasons or not reasons else "no: " + "; ".join(sorted(reasons))


def _computes(callers: list[dict[str, pytest.Item]]) -> str:
    """How many graphs a call may compute in every one of its tests."""
    markers = [test["dask"].get_closest_marker("dask_computes") for test in callers]
    n = min((marker.args[0] if marker else 0 for marker in markers), default=0)
    return f", {n} computes" if n else ""


def _table(survey: _Survey) -> str:
    """One row for all functions of a module of which the same is to be said."""
    alike = defaultdict(list)
    for name, label in rows().items():
        cells = [_cell(survey, name, backends) for backends in COLUMNS.values()]
        module = label.split("=")[0].partition(".")[0] if "." in label else ""
        alike[module, *cells].append(f"`{label}`")
    titles = ["functions", *COLUMNS]
    lines = [titles, ["---"] * len(titles)]
    lines += [[", ".join(labels), *cells] for (_, *cells), labels in alike.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    """Run the tests and write the table."""
    files = [p for p in sorted(TESTS.glob("test_*.py")) if re.search(r"\(xp\b", p.read_text())]
    survey = _Survey()
    # With "-k" no test on JAX is dropped for the others of its kind, see THINNED.
    options = ["-q", "-p", "no:cacheprovider", "-k", "test_", "--no-summary"]
    if code := pytest.main([*options, *map(str, files)], plugins=[survey]):
        return int(code)
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}{_table(survey)}{END}{tail}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
