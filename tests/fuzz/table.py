"""The table of targets: public callables, arguments they must answer, and how an answer is checked.

A target's function takes the namespace and arguments by name. ``base`` are arguments that it answers, of which the
sweep replaces one at a time; ``fair`` draws others that it must answer too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import slra
from tests.fuzz.oracles import dense

MATRICES = ((1, 1), (1, 5), (5, 1), (4, 3), (3, 4), (2, 4, 3), (6, 6), (40, 30))


@dataclass(frozen=True)
class Target:
    """A public callable."""

    name: str
    function: Callable[..., Any]
    base: dict[str, Any]
    fair: Any
    check: Callable[[dict[str, Any], Any], None]
    # Arguments whose huge values are a legitimate request for as much time or memory.
    requests: tuple[str, ...] = ()
    # What a message may name instead of an argument.
    names: tuple[str, ...] = ()
    works_on_dask: bool = True


TARGETS: dict[str, Target] = {}


def add(
    name: str, function: Any, base: dict[str, Any], fair: Any, check: Any, **options: Any
) -> None:
    TARGETS[name] = Target(name, function, base, fair, check, **options)


def public(name: str, owner: Any = slra) -> Callable[..., Any]:
    """The function as it is at the time of the call, for the fixtures that wrap it."""
    return lambda xp, **args: getattr(owner, name)(**args)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def is_finite(args: dict[str, Any]) -> bool:
    return all(np.all(np.isfinite(dense(x))) for x in args.values() if is_floating(x))


def is_floating(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape") and dense(x).dtype.kind in "fc"


def has_dtype(out: Any, dtype: Any) -> None:
    assert dense(out).dtype == np.dtype(dtype).newbyteorder("="), (dense(out).dtype, dtype)


def all_finite(args: dict[str, Any], out: Any) -> None:
    """No NaN from finite input, and no infinity."""
    if not is_finite(args):
        return
    for x in out if isinstance(out, tuple) else (out,):
        if is_floating(x):
            assert np.all(np.isfinite(dense(x))), "not finite"


def no_check(args: dict[str, Any], out: Any) -> None:
    """Shapes and values are tested elsewhere: here it is enough that there is an answer."""
