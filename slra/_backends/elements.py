"""Redo the elements of a batch that failed a check, and leave the others as they are."""

from collections.abc import Callable

import numpy as np

from slra._backends.standard import Backend
from slra._typing import Array

__all__ = ["redo"]


def redo(
    ok: Array,
    results: tuple[Array, ...],
    again: Callable[..., tuple[Array, ...]],
    arguments: tuple[Array, ...],
    backend: Backend,
) -> tuple[Array, ...]:
    """Return ``results``, with ``again(*arguments)`` in place of every element where ``ok`` is false.

    ``ok`` has the shape of the batch; the leading axes of every array are those of the batch. Eager arrays only.
    """
    xp, batch = backend.xp, ok.shape
    # All at once: each read of a value waits for a device.
    flags = backend.to_numpy(ok).reshape(-1)
    if flags.all():
        return results
    if not flags.any():
        return again(*arguments)
    (failed,) = np.nonzero(~flags)
    # Where each element is found once the redone ones are appended.
    places = np.arange(flags.size)
    places[failed] = flags.size + np.arange(failed.size)
    device = backend.creation_device(results[0])
    pick, order = (xp.asarray(x.tolist(), device=device) for x in (failed, places))

    def flat(x: Array) -> Array:
        return xp.reshape(x, (flags.size, *x.shape[len(batch) :]))

    redone = again(*(xp.take(flat(x), pick, axis=0) for x in arguments))
    merged = (
        xp.take(xp.concat([flat(old), xp.astype(new, old.dtype)], axis=0), order, axis=0)
        for old, new in zip(results, redone, strict=True)
    )
    return tuple(xp.reshape(x, (*batch, *x.shape[1:])) for x in merged)
