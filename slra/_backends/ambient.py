"""Contexts that a caller may be in, and that must not change what a function computes or whether it raises.

Needs: nothing. Libraries are recognised once the caller has imported them, never imported here.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from slra._backends.lacking import explained

__all__ = ["isolated", "with_callers_errors"]

P = ParamSpec("P")
R = TypeVar("R")

# Kinds of device that torch.autocast knows apart, each with a switch of its own.
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


class _PublicErrors:
    """What NumPy does about floating-point errors, as a context variable."""

    def get(self) -> Any:
        return np.geterr()

    def set(self, errors: Any) -> None:
        np.seterr(**errors)


def _numpys_variable() -> Any:
    """NumPy's own variable, from 2.0 on: setting it takes a tenth of the time that np.errstate does."""
    try:
        found = importlib.import_module("numpy._core.umath")._extobj_contextvar
        before = found.get()
        np.seterr(all="ignore")
        found.set(before)
        is_right = np.geterr() == _before
    except (ImportError, AttributeError, LookupError, ValueError):
        is_right = False
    return found if is_right else _PublicErrors()


_before = np.geterr()
_errors = _numpys_variable()
with np.errstate(all="ignore"):
    _IGNORED = _errors.get()
# Names of JAX's contexts that raise, with what they are where they do not. NaN marks, among others, a Cholesky factor
# that does not exist; shapes and dtypes broadcast and promote as the array API has it.
_JAX_CHECKS = {
    "debug_nans": False,
    "debug_infs": False,
    "numpy_rank_promotion": "allow",
    "numpy_dtype_promotion": "standard",
    "transfer_guard_host_to_device": "allow",
    "transfer_guard_device_to_device": "allow",
    "transfer_guard_device_to_host": "allow",
}

# What NumPy did about floating-point errors where the call came from that the caller made.
_callers_errors: ContextVar[Any] = ContextVar("callers_errors", default=None)


def isolated(function: Callable[P, R]) -> Callable[P, R]:
    """Run a public function outside the caller's contexts: every one of them is decorated with this.

    Within it ``torch.autocast`` and JAX's strict modes are off, and NumPy neither warns nor raises on underflow and
    overflow, which are harmless here: what matters is looked at. Threads and the caller see no change.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.compiler.is_compiling():
            # torch.compile follows neither NumPy's way nor an ExitStack.
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return function(*args, **kwargs)
        # Written out, not as a context manager: that would take longer than the smallest functions.
        # What is put back is read before anything is set: Ctrl-C may come as soon as it is.
        callers, noted = _errors.get(), _callers_errors.get()
        try:
            # Only within another call is the note believed: Ctrl-C may have left one behind.
            if callers != _IGNORED or noted is None:
                _callers_errors.set(callers)
            _errors.set(_IGNORED)
            contexts = _found(torch)
            if not contexts:
                return function(*args, **kwargs)
            with contextlib.ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context)
                return function(*args, **kwargs)
        except Exception as error:
            better = explained(function.__qualname__, error, (*args, *kwargs.values()))
            if better is error:
                raise
            raise better from error
        finally:
            _errors.set(callers)
            _callers_errors.set(noted)

    call.is_isolated = True  # type: ignore[attr-defined]
    return call


def _found(torch: Any) -> list[contextlib.AbstractContextManager[Any]]:
    """List what switches off the contexts of other libraries that are on."""
    found = _jax_contexts()
    if torch is not None:
        devices = filter(torch.is_autocast_enabled, _AUTOCAST_DEVICES)
        found += [torch.autocast(device, enabled=False) for device in devices]
    return found


def _jax_contexts() -> list[contextlib.AbstractContextManager[Any]]:
    """List what switches off JAX's checks of its user's code that are on."""
    jax: Any = sys.modules.get("jax")
    if jax is None:
        return []
    return [
        getattr(jax, name)(lenient)
        for name, lenient in _JAX_CHECKS.items()
        if getattr(jax.config, f"jax_{name}", None) not in (None, lenient)
    ]


def with_callers_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of the caller's treat floating-point errors as outside: those are not ours to hide."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        return function
    errors = _callers_errors.get()
    if errors is None or _errors.get() != _IGNORED:
        return function

    @wraps(function, assigned=("__doc__",))
    def call(*args: Any, **kwargs: Any) -> Any:
        before = _errors.get()
        try:
            _errors.set(errors)
            return function(*args, **kwargs)
        finally:
            _errors.set(before)

    return call
