"""What a library does not have, said in the terms of the function that was called.

Needs: nothing.
"""

from types import ModuleType, TracebackType
from typing import Any

import array_api_compat as compat

from slra._typing import Namespace

__all__ = ["LackingError", "explained", "title"]

OURS = __name__.partition(".")[0]
# Whose errors are what they are: they are known here, and what is refused is refused at the door.
KNOWN = (
    compat.is_numpy_namespace,
    compat.is_cupy_namespace,
    compat.is_torch_namespace,
    compat.is_jax_namespace,
    compat.is_dask_namespace,
)


def title(xp: Namespace) -> str:
    """Name of a library, for messages."""
    # A namespace need not be a module.
    name = getattr(xp, "__name__", None) or getattr(
        getattr(xp, "asarray", None), "__module__", None
    )
    return str(name or type(xp).__name__).removeprefix("array_api_compat.")


class LackingError(AttributeError):
    """A library lacks what a function needs. ``hasattr`` asks for an AttributeError; callers get a TypeError."""

    def __init__(self, what: str, xp: Namespace, hint: str = "") -> None:
        super().__init__(f"{title(xp)} does not have {what}{hint}")
        self.what, self.library, self.hint = what, title(xp), hint


def explained(function: str, error: Exception, args: Any) -> Exception:
    """Return what to raise in place of ``error``, which came out of a public function of this name.

    That is ``error`` itself, unless it was raised inside a library that is not known here: its words are about what
    was asked of it, which the caller cannot see.
    """
    lacking = error if isinstance(error, LackingError) else getattr(error, "lacking", None)
    if isinstance(lacking, LackingError):
        # Also of a public function that another one called: the outermost is what the caller knows.
        shown = TypeError(
            f"{function} needs {lacking.what}, which {lacking.library} does not have{lacking.hint}"
        )
        shown.lacking = lacking  # type: ignore[attr-defined]
        return shown
    if isinstance(error, MemoryError):
        return error
    library = next(filter(None, map(_library_of, args)), None)
    if library is None or _raised_by(error.__traceback__) != library.partition(".")[0]:
        return error
    return TypeError(
        f"{function} needs what {library} does not do: {type(error).__name__}: {error}"
    )


def _library_of(x: Any) -> str | None:
    """Name of the library of an array, unless it is known here."""
    if isinstance(x, tuple | list):
        return next(filter(None, map(_library_of, x)), None)
    if not hasattr(type(x), "__array_namespace__"):
        return None
    xp = x.__array_namespace__()
    if isinstance(xp, ModuleType) and any(is_it(xp) for is_it in KNOWN):
        return None
    return title(xp)


def _raised_by(traceback: TracebackType | None) -> str | None:
    """Package of the first frame that is not of ours: where we called something, and it failed."""
    while traceback is not None:
        package = str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if package != OURS:
            return package
        traceback = traceback.tb_next
    return None
