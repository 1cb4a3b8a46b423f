"""Hostile input to every public function: a ValueError, a TypeError or a right answer.

Never another error, a warning, a hang, or NaN from finite input. ``SLRA_FUZZ=5000 pytest tests/test_fuzz.py`` looks for
long, with as many examples a function, other ones each time.
"""

import collections
import functools
import os
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import array_api_compat as compat
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import slra
from tests.backends import BACKENDS, brought, fetched
from tests.fuzz.on_prox import MADE_OF_OTHERS
from tests.fuzz.strategies import HUGE_REQUESTS, foreign, odd_arrays, plain_values
from tests.fuzz.targets import FILES, TARGETS, Target

PACKAGE = str(Path(slra.__file__).parent)
LONG = int(os.environ.get("SLRA_FUZZ", "0"))
SECONDS = 20
CALLABLES = (
    "matmat",
    "rmatmat",
    "operator",
    "adjoint",
    "objective",
    "callback",
    "flatten",
    "unflatten",
)


def profile(max_examples: int) -> settings:
    """A few examples, the same ones each time; or many, other ones."""
    return settings(
        max_examples=LONG or max_examples,
        derandomize=not LONG,
        deadline=None,
        database=None,
        print_blob=bool(LONG),
        suppress_health_check=list(HealthCheck),
    )


class StuckError(AssertionError):
    """Raised where a call takes too long."""


def _alarm(*_: Any) -> None:
    raise StuckError(f"no answer in {SECONDS} seconds")


def outcome(target: Target, xp: Any, args: dict[str, Any]) -> tuple[type[Exception] | None, Any]:
    """Call; return the class of an error that is as it should be, or what came out."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _alarm)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return None, target.function(xp, **args)
    except (TypeError, ValueError) as error:
        check_error(error, target, args)
        return type(error), None
    finally:
        if is_main and hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def check_error(error: Exception, target: Target, args: dict[str, Any]) -> None:
    """Fail unless the error was raised by this package, and names an argument."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    names = "|".join(map(re.escape, (*args, *target.names)))
    if where in FILES:
        return  # a function of the caller's does not take what it was given
    is_ours = where.startswith(PACKAGE) and type(error) in (TypeError, ValueError)
    if not is_ours or not re.search(rf"\b({names})\b", str(error)):
        raise AssertionError(f"{type(error).__name__} from {where}: {error}") from error


def check_library(given: dict[str, Any], out: Any) -> None:
    """Fail unless arrays that come out are of the library of those that went in."""
    came = {compat.array_namespace(x) for x in given.values() if is_array(x)}
    for x in out if isinstance(out, tuple) else (out,):
        assert not came or not is_array(x) or compat.array_namespace(x) in came


def is_array(x: Any) -> bool:
    return compat.is_array_api_obj(x) and not isinstance(x, np.generic) and x.ndim > 0


def run(
    target: Target, xp: Any, args: dict[str, Any], *, checks: bool = True
) -> type[Exception] | None:
    """Call on one backend, and check what comes out against the arguments as they are in NumPy."""
    given = {name: brought(xp, x) for name, x in args.items()}
    error, out = outcome(target, xp, given)
    check_library(given, out)
    if error is None and checks:
        with np.errstate(all="ignore"):
            target.check(args, fetched(out))
    return error


def own_values() -> list[Any]:
    """Wrong values that mean the same to every library."""
    return [*plain_values(), *odd_arrays()]


def pools(target: Target, name: str) -> list[Any]:
    found = [*own_values(), *foreign()]
    if name in target.requests:
        found = [x for x in found if not is_request(x)]
    if (target.base[name] is not None and callable(target.base[name])) or name in CALLABLES:
        # What a function of the caller's raises is the caller's.
        found = [x for x in found if not callable(x)]
    return found


def is_request(x: Any) -> bool:
    """Whether this asks for more than a test has."""
    if isinstance(x, tuple):
        return any(map(is_request, x))
    return isinstance(x, int) and x >= min(HUGE_REQUESTS)


def public_callables() -> set[str]:
    """Names of all functions, and of the methods of all classes that do something."""
    found = set(slra.prox.__all__) - MADE_OF_OTHERS | set(slra.objective.__all__)
    for name in slra.__all__:
        thing = getattr(slra, name)
        if isinstance(thing, type):
            own = {
                m
                for m, f in vars(thing).items()
                if callable(getattr(thing, m)) and not m.startswith("_")
            }
            own |= {m for m in ("__matmul__", "__rmatmul__") if m in vars(thing)}
            found |= {f"{name}.{method}" for method in own}
        # Registration takes no array, and would outlast its call.
        elif callable(thing) and name != "register_backend":
            found.add(name)
    return found


# Files are the user's own; damaged ones are tested beside the classes they hold.
ON_FILES = {
    f"{kind}.{method}"
    for kind in ("AttentionBasis", "KVCache", "LowRankPlusSparse")
    for method in ("save", "load")
}


def test_every_public_callable_is_in_the_table():
    assert public_callables() - ON_FILES <= set(TARGETS)


def swept(target: Target, step: int) -> Iterator[tuple[str, int, Any]]:
    """Every wrong value in the place of every argument; or one in ``step``, other ones for each argument."""
    step = 1 if LONG else step
    for which, argument in enumerate(target.base):
        pool = pools(target, argument)
        for i in range(which % step, len(pool), step):
            yield argument, i, pool[i]


def sweep(target: Target, step: int, attempt: Callable[[dict[str, Any]], None]) -> None:
    """Attempt calls with one wrong argument each, and fail with all that went wrong."""
    failures = collections.defaultdict(list)
    for argument, i, value in swept(target, step):
        try:
            attempt({**target.base, argument: value})
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:300]
            failures[why].append(f"{argument}={value!r:.60} ({i})")
    assert not failures, "\n".join(f"{why}\n    {which}" for why, which in failures.items())


@pytest.mark.parametrize("name", list(TARGETS))
def test_one_wrong_argument_at_a_time(name):
    import array_api_compat.numpy as xp

    target = TARGETS[name]
    assert run(target, xp, target.base) is None
    sweep(target, 5, functools.partial(run, target, xp))


# How many of the wrong values are tried: one in so many.
STEPS = {"array-api-strict": 23, "torch-float64": 23, "jax": 31, "dask": 31}


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("backend", list(STEPS))
def test_other_libraries_refuse_alike(backend, name):
    import array_api_compat.numpy

    target, way = TARGETS[name], BACKENDS[backend]
    if reason := way.missing():
        pytest.skip(reason)
    if backend == "dask" and not target.works_on_dask:
        pytest.skip("values cannot be looked at here")
    foreigners = {id(x) for x in foreign()}

    def attempt(args: dict[str, Any]) -> None:
        right = run(target, array_api_compat.numpy, args)
        if right is None and backend in ("jax", "dask"):
            return  # an answer takes long to compile, and is tested elsewhere
        with way.enter() as xp:
            # A lazy array that NumPy would have refused for its values gives what it gives.
            got = run(target, xp, args, checks=right is None)
        # What depends on values passes a lazy array; and a library may lack a dtype that NumPy has.
        may_differ = got is TypeError or backend == "dask" or foreigners & {*map(id, args.values())}
        assert may_differ or got is right, f"{got} where NumPy has {right}"

    sweep(target, STEPS[backend], attempt)


@pytest.mark.parametrize("name", list(TARGETS))
@profile(15)
@given(data=st.data())
def test_nasty_but_fair_arguments_are_answered(name, data):
    import array_api_compat.numpy as xp

    target = TARGETS[name]
    args = data.draw(target.fair)
    assert run(target, xp, args) is None


@pytest.mark.parametrize("name", list(TARGETS))
@profile(8)
@given(data=st.data())
def test_several_wrong_arguments(name, data):
    import array_api_compat.numpy as xp

    target = TARGETS[name]
    args = data.draw(st.one_of(target.fair, st.just(target.base)))
    if not args:
        return
    for bad in data.draw(
        st.lists(st.sampled_from(sorted(set(args) & set(target.base))), min_size=1, max_size=3)
    ):
        pool = pools(target, bad)
        args = {**args, bad: pool[data.draw(st.integers(0, len(pool) - 1))]}
    run(target, xp, args)
