"""How many threads to compute on, when each of them calls BLAS itself.

Needs: threadpoolctl, where it is installed. Without it BLAS keeps its threads and the caller gets one: several
threads of our own, each with a BLAS that starts more, would be slower than either alone.

The limit of most BLAS libraries belongs to the process, and is saved and restored by whoever likes. The rules:

1. It is lowered to 1 when the first caller comes and put back when the last one leaves, whichever threads they are
   on: calls overlap and nest.
2. What was set is read back. Where one library does not obey, all are left alone and the caller gets one thread:
   never several threads on a BLAS that has several.
3. Nobody gets more threads than the limit was before. It is put back only where it still is ours: whoever has set it
   otherwise since has the last word.
4. A `threadpool_limits` that begins or ends while we hold the limit sees, saves and changes the limit that we found,
   as if we were not there; it comes into force when we leave. For that, threadpoolctl is told to ask us first.
5. A limit that each thread has of its own (MKL, OpenMP) is set in the caller's thread, and in ours, which end with
   the call.
6. The child of a fork has none of our threads: it gets back what they had lowered.
7. Ctrl-C may come anywhere. What is to be put back is noted before it is changed, and putting back may be repeated.

OpenBLAS is told directly: threadpoolctl 3.8 lets only the thread that set its limit first set it again, as long as
that thread lives, and ignores the others without a word.
"""

import ctypes
import functools
import importlib.util
import itertools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["limit_this_thread", "workers"]


class Library(NamedTuple):
    """A BLAS that is loaded."""

    path: str
    get: Callable[[], int | None]
    set: Callable[[int], Any]

    def obeys(self, limit: int) -> bool:
        """Set the limit, and say whether this thread has it now."""
        self.set(limit)
        return self.get() == limit


class Lowered:
    """The limits of the process that were lowered, what they were, and who relies on it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.callers: set[workers] = set()
        self.found: dict[str, tuple[Library, int]] = {}

    def restore(self) -> None:
        """Put back what is still ours."""
        for library, limit in self.found.values():
            if library.get() == 1:
                library.set(limit)


_lowered = Lowered()
# Whether the limit of a library, by path, belongs to the process; where it always was 1 that makes no difference.
_is_shared: dict[str, bool] = {}


class workers:  # noqa: N801 - used as a function
    """Give the number of threads to start, no more than BLAS may use now; inside, BLAS uses one each.

    A context manager that may be entered twice at once: ``with it as n, it:``. Ctrl-C can then cut short only one of
    the two exits.
    """

    def __init__(self) -> None:
        self.lowered = _lowered
        self.thread = threading.get_ident()
        self.own: list[tuple[Library, int]] = []
        self.share = 0

    def __enter__(self) -> int:
        if self.share:
            return self.share
        try:
            self.share = self._take()
        except BaseException:
            self.__exit__()
            raise
        return self.share

    def __exit__(self, *_: object) -> None:
        for library, limit in self.own:
            if library.get() == 1:
                library.set(limit)
        # After a fork what we relied on is the parent's, and its lock may be held by a thread that is not here.
        if self.lowered is _lowered:
            with self.lowered.lock:
                if self.lowered.callers <= {self}:
                    self.lowered.restore()
                    self.lowered.found.clear()
                self.lowered.callers.discard(self)

    def _take(self) -> int:
        """Lower all limits and return this thread's share of what they were."""
        libraries = _libraries()
        if not libraries:
            return 1
        with self.lowered.lock:
            self.lowered.callers.add(self)
            limits = []
            for library in libraries:
                limit = self._lower(library)
                if limit is None:
                    self.__exit__()
                    return 1
                limits.append(limit)
            n_threads = len({caller.thread for caller in self.lowered.callers})
            return max(1, min(limits) // n_threads)

    def _lower(self, library: Library) -> int | None:
        """Lower one limit and return what it was, or None if it cannot be lowered."""
        found = self.lowered.found
        limit = library.get()
        if library.path in found:
            return found[library.path][1] if limit == 1 else None
        if limit is None:
            return None
        if _is_shared.get(library.path, True):
            found[library.path] = library, limit
        else:
            self.own.append((library, limit))
        if not library.obeys(1):
            return None
        if limit > 1 and library.path not in _is_shared:
            _is_shared[library.path] = _seen_elsewhere(library) == 1
            if not _is_shared[library.path]:
                self.own.append(found.pop(library.path))
        return limit


def limit_this_thread() -> bool:
    """Let BLAS use one thread where each thread has a limit of its own; whether it does now, in this thread.

    The limit of the process is only read: Ctrl-C may have ended the call while this thread was being started.
    """
    return all(
        library.get() == 1 or (not _is_shared.get(library.path, True) and library.obeys(1))
        for library in _libraries()
    )


def _seen_elsewhere(library: Library) -> int | None:
    """Return the limit in a thread that has set none."""
    seen = []
    thread = threading.Thread(target=lambda: seen.append(library.get()))
    thread.start()
    thread.join()
    return seen[0]


def _libraries() -> list[Library]:
    """Each BLAS that is loaded now, as far as threadpoolctl is installed and knows it."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return []
    return _scan(_n_loaded(), len(sys.modules))


@functools.lru_cache(maxsize=1)
def _scan(*_: int) -> list[Library]:
    """Look for each BLAS, which takes half a millisecond: again only where something was loaded since."""
    from threadpoolctl import ThreadpoolController

    found = ThreadpoolController().select(user_api="blas").lib_controllers
    _announce(found)
    return [Library(one.filepath, one.get_num_threads, _setter(one)) for one in found]


def _setter(controller: Any) -> Callable[[int], Any]:
    """Return what sets the limit: the library's own function where threadpoolctl's may do nothing."""
    if controller.internal_api == "openblas" and controller.threading_layer != "openmp":
        for prefix, suffix in itertools.product(("", "scipy_"), ("", "64_", "_64")):
            name = f"{prefix}openblas_set_num_threads{suffix}"
            if (function := getattr(controller.dynlib, name, None)) is not None:
                return function  # type: ignore[no-any-return]
    return controller.set_num_threads  # type: ignore[no-any-return]


class _LoadedObject(ctypes.Structure):
    """``struct dl_phdr_info``, and room for what later systems append."""

    _fields_ = [
        ("address", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("headers", ctypes.c_void_p),
        ("n_headers", ctypes.c_uint16),
        ("n_added", ctypes.c_ulonglong),
        ("later", ctypes.c_char * 256),
    ]


def _n_loaded() -> int:
    """Count the shared objects ever loaded, where the system tells; a library may come without any module."""
    iterate, callback = _iterate_loaded()
    if iterate is None:
        return 0
    loaded = _LoadedObject()
    # The callback has no Python code of its own: there, Ctrl-C would be lost. Not zero, it ends the iteration.
    iterate(callback(functools.partial(ctypes.memmove, ctypes.byref(loaded))), None)
    return int(loaded.n_added)


@functools.cache
def _iterate_loaded() -> tuple[Any, Any]:
    """Return ``dl_iterate_phdr``, where the system has it, and the type of its callback: (object, size, data)."""
    if sys.platform != "linux":
        return None, None
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return getattr(ctypes.CDLL(None), "dl_iterate_phdr", None), callback


_here = threading.local()


def _announce(controllers: list[Any]) -> None:
    """Let threadpoolctl's limits work on the limits that we found while others are in force: see the rules.

    They save, set and restore through their controllers, which read and write what we noted when a limit asks, and
    the library itself when anybody else does.
    """
    import threadpoolctl

    limiter = threadpoolctl.threadpool_limits.__mro__[1]
    decorator = getattr(threadpoolctl, "_ThreadpoolLimiterDecorator", limiter)
    for one in (limiter, decorator):
        for name in ("__init__", "__enter__", "restore_original_limits", "unregister"):
            _wrap(one, name, _asking)
    for one in set(map(type, controllers)):
        _wrap(one, "get_num_threads", _reading)
        # In 3.8 the rule of the first thread comes before this one, and is threadpoolctl's business.
        _wrap(
            one,
            "_real_set_num_threads" if hasattr(one, "_real_set_num_threads") else "set_num_threads",
            _writing,
        )


def _wrap(one: type, name: str, around: Callable[[Any], Any]) -> None:
    """Replace a method that the class itself defines, once."""
    method = vars(one).get(name)
    if method is not None and not hasattr(method, "__wrapped__"):
        setattr(one, name, functools.wraps(method)(around(method)))


def _asking(method: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before = getattr(_here, "is_limit", False)
        _here.is_limit = True
        try:
            return method(*args, **kwargs)
        finally:
            _here.is_limit = before

    return wrapper


def _reading(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def wrapper(self: Any) -> Any:
        if getattr(_here, "is_limit", False):
            with _lowered.lock:
                if self.filepath in _lowered.found:
                    return _lowered.found[self.filepath][1]
        return method(self)

    return wrapper


def _writing(method: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    def wrapper(self: Any, num_threads: int) -> Any:
        if getattr(_here, "is_limit", False):
            with _lowered.lock:
                if self.filepath in _lowered.found:
                    library, _ = _lowered.found[self.filepath]
                    _lowered.found[self.filepath] = library, num_threads
                    return None
        return method(self, num_threads)

    return wrapper


def _begin_anew() -> None:
    """In the child of a fork: forget the parent's threads."""
    global _lowered
    before, _lowered = _lowered, Lowered()
    before.restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
