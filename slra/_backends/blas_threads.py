"""How many threads to compute on, when each of them calls BLAS itself.

Needs: threadpoolctl, where it is installed. Without it BLAS keeps its threads and the caller gets one: several
threads of our own, each with a BLAS that starts more, would be slower than either alone.

The limit of a BLAS belongs to the process. It is lowered when the first caller comes and put back when the last one
leaves, whichever threads they are on, so calls may overlap and nest.
"""

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["workers"]


class _Lowered:
    """The limit that was found, and how many callers rely on its being lowered."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.callers = 0
        self.found = 1
        self.limiter: Any = None

    def enter(self, controller: Any) -> int:
        """Lower the limit if it is not, and return this caller's share of the threads."""
        with self.lock:
            if not self.callers:
                self.found = min(library.num_threads for library in controller.lib_controllers)
                self.limiter = controller.limit(limits=1)
            self.callers += 1
            return max(1, self.found // self.callers)

    def leave(self) -> None:
        """Put the limit back if nobody else relies on it."""
        with self.lock:
            self.callers -= 1
            if not self.callers:
                self.limiter.restore_original_limits()


_lowered = _Lowered()


@functools.cache
def _blas() -> Any:
    """Return the controller of every BLAS that is loaded, or None."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return None
    from threadpoolctl import ThreadpoolController

    controller = ThreadpoolController().select(user_api="blas")
    return controller if controller.lib_controllers else None


@contextlib.contextmanager
def workers() -> Iterator[int]:
    """Give the number of threads to start, no more than BLAS may use now; inside, BLAS uses one each."""
    controller = _blas()
    if controller is None:
        yield 1
        return
    share = _lowered.enter(controller)
    try:
        yield share
    finally:
        _lowered.leave()
