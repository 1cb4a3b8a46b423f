"""Putting together attention that was computed on shards of the keys."""

from collections.abc import Sequence
from typing import Any

from slra._backends.ambient import isolated
from slra._typing import Array
from slra._validate import promote, resolve

__all__ = ["merge_attention"]


@isolated
def merge_attention(outs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    r"""Attention over all keys, from attention over parts of them.

    Parameters
    ----------
    outs : sequence of arrays, each of shape (..., Hq, Nq, Dv)
        Outputs of attention of the same queries on disjoint sets of keys, real floating.
    lses : sequence of arrays, each of shape (..., Hq, Nq)
        Their log-sum-exps, real floating, in the same order.

    Returns
    -------
    out : array, shape (..., Hq, Nq, Dv)
        In the common dtype of ``outs``. A query that attends to nothing in any part gets 0.
    lse : array, shape (..., Hq, Nq)
        Log-sum-exp over all keys, in the common dtype of ``lses`` but no narrower than float32.

    Raises
    ------
    TypeError
        If ``outs`` or ``lses`` is not a list or tuple of real floating arrays of one library.
    ValueError
        If there are none, they are not equally many, shapes differ, or arrays are on different devices.

    Notes
    -----
    .. math::
        \ell = \log \sum_i e^{\ell_i}, \qquad O = \sum_i e^{\ell_i - \ell} O_i

    References
    ----------
    Z. Ye et al., Cascade Inference, FlashInfer, 2024 (the merge of attention states); the rule itself is the online
    softmax of M. Milakov and N. Gimelshein, arXiv:1805.02867.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> parts = [
    ...     slra.attention(q, k[:, part], v[:, part], return_lse=True)
    ...     for part in (slice(0, 20), slice(20, 50))
    ... ]
    >>> out, lse = slra.merge_attention(*zip(*parts))
    >>> bool(np.allclose(out, slra.attention(q, k, v)))
    True
    """
    named_outs, named_lses = _named(outs, "outs"), _named(lses, "lses")
    if len(outs) != len(lses):
        raise ValueError(
            f"outs and lses must have the same length, got {len(outs)} and {len(lses)}"
        )
    backend = resolve(**named_outs, **named_lses)
    _check_shapes(named_outs, named_lses)
    promoted = promote(backend, allow_complex=False, **named_outs)
    xp, shards = backend.xp, promoted.arrays
    with backend.ignore_overflow():
        lse = xp.stack(promote(backend, allow_complex=False, **named_lses).arrays)
        peak = xp.max(lse, axis=0)
        # Where no part attends to anything the peak is -inf, and -inf - -inf would be NaN.
        shift = xp.where(peak == -xp.inf, xp.zeros_like(peak), peak)
        weights = xp.exp(lse - shift)
        total = xp.sum(weights, axis=0)
        empty = total == 0
        total = xp.where(empty, xp.ones_like(total), total)
        weights = xp.astype(weights / total, shards[0].dtype)
        out = sum(weights[i, ..., None] * shard for i, shard in enumerate(shards))
        (out,) = promoted.cast_back(backend, out)
        return out, xp.where(empty, peak, shift + xp.log(total))


def _named(arrays: Any, name: str) -> dict[str, Array]:
    """Name each array by its place."""
    if not isinstance(arrays, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of arrays, got {type(arrays).__name__}")
    if not arrays:
        raise ValueError(f"{name} must not be empty")
    return {f"{name}[{i}]": x for i, x in enumerate(arrays)}


def _check_shapes(outs: dict[str, Array], lses: dict[str, Array]) -> None:
    """Raise ValueError unless all outputs have one shape, and the log-sum-exps that without its last axis."""
    shape = tuple(next(iter(outs.values())).shape)
    if len(shape) < 2:
        raise ValueError(
            f"outs[0] must have at least 2 dimensions, (..., Nq, Dv), got shape {shape}"
        )
    for arrays, right in ((outs, shape), (lses, shape[:-1])):
        for name, x in arrays.items():
            if tuple(x.shape) != right:
                raise ValueError(f"{name} must have shape {right}, got {tuple(x.shape)}")
