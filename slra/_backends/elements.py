"""Redo the elements of a batch that failed a check, and leave the others as they are."""

from collections.abc import Callable

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
    xp = backend.xp
    if bool(xp.all(ok)):
        return results
    if not bool(xp.any(ok)):
        return again(*arguments)
    batch = ok.shape
    flags = [bool(flag) for flag in xp.reshape(ok, (-1,))]
    failed = [i for i, flag in enumerate(flags) if not flag]
    # Where each element is found once the redone ones are appended.
    places = {i: len(flags) + j for j, i in enumerate(failed)}
    device = backend.creation_device(results[0])
    pick = xp.asarray(failed, device=device)
    order = xp.asarray([places.get(i, i) for i in range(len(flags))], device=device)

    def flat(x: Array) -> Array:
        return xp.reshape(x, (len(flags), *x.shape[len(batch) :]))

    redone = again(*(xp.take(flat(x), pick, axis=0) for x in arguments))
    merged = (
        xp.take(xp.concat([flat(old), xp.astype(new, old.dtype)], axis=0), order, axis=0)
        for old, new in zip(results, redone, strict=True)
    )
    return tuple(xp.reshape(x, (*batch, *x.shape[1:])) for x in merged)
