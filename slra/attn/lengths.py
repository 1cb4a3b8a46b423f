"""Sequences that share a row: packed one after another, or one with padding behind it.

Where lengths are known the parts are attended to apart, each a view of its own keys, so that a row costs what its
sequences cost alone. Padding, and lengths that are traced or lazy, become a mask.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from slra._backends import Backend
from slra._backends.standard import ScoreOptions
from slra._typing import Array
from slra._validate import broadcasts_to, is_kind, resolve, shown

__all__ = ["Lengths", "Part", "Placement", "check_lengths", "is_within", "write_out"]

Window = tuple[int | None, int | None]
# A position in 32 bits counts as far.
MOST = 2**31 - 1


class Placement(NamedTuple):
    """Where the queries of a sequence stand among its keys, and which keys they see from there."""

    align: Any  # "bottom_right", "top_left" or the position of the first query
    is_causal: bool
    window: Window | None

    @property
    def hides(self) -> bool:
        """Whether a query sees some of the keys only."""
        return self.is_causal or self.window is not None

    def of(self, options: ScoreOptions, n_queries: int, n_keys: int) -> ScoreOptions:
        """Options for so many queries and keys."""
        left, right = self.bounds()
        place = options._replace(causal_align=self.align).diagonal(n_queries, n_keys)
        options = options._replace(position=place if options.alibi is not None else 0)
        if self.window is None:
            return options._replace(is_causal=self.is_causal, causal_align=self.align)
        # Beyond these nothing changes, and a position stays in 32 bits.
        first = None if left is None else min(max(place - left, -n_queries), n_keys)
        last = None if right is None else min(max(place + right, -n_queries), n_keys)
        return options._replace(is_causal=last is not None, causal_align=last or 0, first=first)

    def bounds(self) -> Window:
        """How far a query sees to the left and to the right."""
        left, right = self.window or (None, None)
        return left, 0 if self.is_causal else right


class Part(NamedTuple):
    """One sequence of a row."""

    queries: slice
    keys: slice

    @property
    def n_queries(self) -> int:
        """Number of its queries."""
        return int(self.queries.stop - self.queries.start)

    @property
    def n_keys(self) -> int:
        """Number of its keys."""
        return int(self.keys.stop - self.keys.start)


class Lengths(NamedTuple):
    """How many queries and keys each sequence of a row has, by row: (..., S) with axes of the batch before.

    NumPy arrays where values are known, of the library of the others where they are not.
    """

    q: Array
    k: Array
    placement: Placement

    @property
    def is_known(self) -> bool:
        """Whether values can be looked at."""
        return isinstance(self.q, np.ndarray) and isinstance(self.k, np.ndarray)

    @property
    def are_equal(self) -> bool:
        """Whether each sequence has a query at each key: a padded row counts with its padding."""
        if self.n_sequences == 1:
            return True
        return self.is_known and bool((self.q == self.k).all())

    @property
    def n_sequences(self) -> int:
        """Number of sequences in a row."""
        return int(self.q.shape[-1])

    def takes_parts(self, n_queries: int, *, has_slopes: bool) -> bool:
        """Whether sequences go one by one: a mask serves where there is only padding, or hardly a query."""
        if not self.is_known:
            return False
        depends = self.placement.hides or has_slopes
        varies = depends and self.placement.align == "bottom_right"
        return self.n_sequences > 1 or (varies and n_queries > FEW_QUERIES)

    def parts(self, batch: tuple[int, ...]) -> tuple[tuple[int, ...], list[list[Part]]]:
        """Sequences of each row, and the axes of the rows: those of the batch, or none where all rows are alike."""
        lead = batch
        tables = [np.broadcast_to(x, (*lead, x.shape[-1])) for x in (self.q, self.k)]
        tables = [x.reshape(-1, x.shape[-1]) for x in tables]
        if all((x == x[:1]).all() for x in tables):
            lead, tables = (), [x[:1] for x in tables]
        rows = zip(*(map(_slices, x.tolist()) for x in tables), strict=True)
        return lead, [[Part(*pair) for pair in zip(*row, strict=True)] for row in rows]


# So many queries at most take a mask, whatever it hides: one call serves the whole batch.
FEW_QUERIES = 16


def _slices(lengths: list[int]) -> list[slice]:
    ends = list(itertools.accumulate(lengths))
    return [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]


def check_lengths(
    backend: Backend,
    lengths: dict[str, Any],
    axes: dict[str, int],
    batch: tuple[int, ...],
    placement: Placement,
    *,
    like: Array,
) -> Lengths | None:
    """Return the lengths of queries and keys, which are given as ``lengths_q`` and ``lengths_k``, or None.

    ``axes`` are the lengths of the axes that they divide, ``batch`` the axes before those of the heads.
    """
    if all(value is None for value in lengths.values()):
        return None
    found = {
        name: _table(backend, value, name, batch, like)
        for name, value in lengths.items()
        if value is not None
    }
    n_sequences = {x.shape[-1] for x in found.values()}
    if n_sequences != {1} and len(found) < len(lengths):
        (name,) = found
        raise ValueError(
            f"lengths_q and lengths_k must both be given where several sequences are packed in a row, got {name} of "
            f"shape {tuple(found[name].shape)} alone; one number for each element of the batch says what is padding"
        )
    if len(n_sequences) > 1:
        shapes = " and ".join(str(tuple(x.shape)) for x in found.values())
        raise ValueError(
            f"lengths_q and lengths_k must be of as many sequences, got shapes {shapes}"
        )
    for name, n in axes.items():
        if name not in found:
            found[name] = np.asarray([n])
        elif isinstance(found[name], np.ndarray):
            _check_sum(found[name], name, n)
    known = [isinstance(x, np.ndarray) for x in found.values()]
    if any(known) and not all(known):
        found = {
            name: backend.from_numpy(x, like, backend.place_dtype)
            if isinstance(x, np.ndarray)
            else x
            for name, x in found.items()
        }
    return Lengths(found["lengths_q"], found["lengths_k"], placement)


def _table(backend: Backend, value: Any, name: str, batch: tuple[int, ...], like: Array) -> Array:
    """Return lengths as an array (..., S), of NumPy where values are known."""
    table = value
    if isinstance(value, (int, np.integer, list, tuple)) and not isinstance(value, bool):
        try:
            table = np.asarray(value)
        except ValueError:  # ragged
            table = np.empty(0, dtype=object)
        if table.dtype.kind not in "iu":
            raise TypeError(f"{name} must be integers, got {shown(value)}")
    elif not isinstance(value, np.ndarray):
        resolve(q=like, **{name: value})
        if not is_kind(backend.xp, value.dtype, "integral"):
            raise TypeError(f"{name} must be integers, got {value.dtype}")
        if backend.is_eager(value):
            table = backend.to_numpy(value)
    elif value.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {value.dtype}")
    shape, is_one_row = tuple(table.shape), math.prod(batch) == 1
    if len(shape) <= len(batch) and broadcasts_to(shape, batch):
        table = table[..., None]  # one sequence in each row
    elif not (broadcasts_to(shape[:-1], batch) and (len(shape) > len(batch) or is_one_row)):
        raise ValueError(
            f"{name} must be one number for each element of the batch, of shape {batch}, or have one axis more, "
            f"(..., S), for S sequences packed in a row, got shape {shape}"
        )
    if table.shape[-1] == 0:
        raise ValueError(f"{name} must be of one sequence or more, got shape {shape}")
    if isinstance(table, np.ndarray) and table.size and table.min() < 0:
        raise ValueError(f"{name} must be 0 or more, got {int(table.min())}")
    return table.astype(np.int64) if isinstance(table, np.ndarray) else table


def _check_sum(table: np.ndarray[Any, Any], name: str, n: int) -> None:
    """Raise unless sequences fill a row, of which a single one may leave padding behind it."""
    total = table.sum(axis=-1)
    if table.shape[-1] == 1:
        if (total > n).any():
            raise ValueError(f"{name} must be at most {n}, got {int(total.max())}")
    elif (total != n).any():
        wrong = int(total[total != n].flat[0])
        raise ValueError(
            f"{name} must add up to {n}, the length of the axis that the sequences are packed in, got {wrong}; "
            "padding at the end is one sequence more"
        )


def is_within(table: Array, n: int, backend: Backend, like: Array) -> Array | None:
    """Which of n places of a row hold a token of its one sequence, (..., n), or None where all do."""
    if isinstance(table, np.ndarray):
        if (table == n).all():
            return None
        return backend.from_numpy(np.arange(n) < table, like, backend.xp.bool)
    return backend.xp.arange(n, device=backend.creation_device(table)) < table


def write_out(
    lengths: Lengths, n_queries: int, n_keys: int, backend: Backend, like: Array
) -> tuple[Array, Array]:
    """Write out which query sees which key, and how far from it it stands, (..., Nq, Nk)."""
    xp, placement = backend.xp, lengths.placement
    tables = [
        backend.from_numpy(x, like, backend.place_dtype) if isinstance(x, np.ndarray) else x
        for x in (lengths.q, lengths.k)
    ]
    device = backend.creation_device(tables[0])
    own_q, own_k = (
        _owners(x, n, backend, like) for x, n in zip(tables, (n_queries, n_keys), strict=True)
    )
    # Axes: queries, then sequences; a query beyond all of them belongs to none.
    of_query = own_q[..., :, None] == xp.arange(tables[0].shape[-1], device=device)
    len_q, len_k = (x[..., None, :] for x in tables)
    starts = [x - y for x, y in ((xp.cumulative_sum(t, axis=-1), t) for t in tables)]

    def of(x: Array) -> Array:
        return xp.sum(xp.where(of_query, x, xp.zeros_like(x)), axis=-1)

    rows = xp.arange(n_queries, device=device)
    place = of(starts[1][..., None, :]) + rows - of(starts[0][..., None, :])
    if placement.align == "bottom_right":
        place = place + of(len_k - len_q)
    elif placement.align != "top_left":
        place = place + placement.align
    ahead = xp.arange(n_keys, device=device) - place[..., :, None]
    seen = own_q[..., :, None] == own_k[..., None, :]
    seen = seen & (own_q < tables[0].shape[-1])[..., :, None]
    left, right = placement.bounds()
    if left is not None:
        seen = seen & (ahead >= -left)
    if right is not None:
        seen = seen & (ahead <= right)
    return seen, xp.abs(ahead)


def _owners(table: Array, n: int, backend: Backend, like: Array) -> Array:
    """Which sequence each of n places belongs to, (..., n); the number of sequences beyond them all."""
    xp = backend.xp
    ends = xp.cumulative_sum(table, axis=-1)
    places = xp.arange(n, device=backend.creation_device(table), dtype=ends.dtype)
    return xp.sum(xp.astype(places[:, None] >= ends[..., None, :], ends.dtype), axis=-1)
