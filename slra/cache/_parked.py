"""Integers of a cache in a file: one step for all coordinates of a head, an entropy code, chunks that are read alone.

The code is that of the package ``constriction`` (asymmetric numeral systems: J. Duda, arXiv:1311.2540). How likely it
takes integers for is said, before those of each coordinate of a chunk, by a mean, a scale and the shape of a Student's
t.
"""

import functools
import math
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from slra._backends.standard.bits import TOKENS, WHOLE
from slra._files import Arrays
from slra._typing import Array
from slra.attn.maps import Maps
from slra.cache._bits import BitRows, scaled_maps
from slra.cache._layout import Layout

__all__ = ["Coded", "ParkedRows", "codec", "damaged_chunks", "park", "unparked"]

# Tokens of a chunk: a half more at most, a third less at least where there are as many. The mean of keys moves along a
# text: on SmolLM2 chunks of 512 take .1% to 1.2% more bytes at 2.2 bits, in half the time.
CHUNK = 256
# Larger integers are not packed in a cache either.
LIMIT = 2 ** (WHOLE - 2)
# A weight is (1 + z^2 / 2e)^-e: powers by squaring, which any machine computes to the same last bit.
SQUARINGS = (0, 1, 2, 4)
# A scale is 2^((i - 17) / 4), or 0: all integers are; a mean is counted in an eighth of it.
QUARTERS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
SCALE_OF_ONE, SCALES, SHAPES, PER_SCALE, MEANS = 17, 63, len(SQUARINGS) - 1, 8, 127
# Scales are coded by how near they are to that of the column before, or this one, shapes to this one, means to 0.
FIRST_SCALE, LIKELY_SHAPE = SCALE_OF_ONE + 8, 2
# An outlier of any size takes 12 bits and twice its logarithm more than the likeliest integer, about.
TAIL = 2.0**-12
# Models are chosen on histograms of so many bins on each side of the mean, an eighth of the deviation wide at most.
BINS = 64
# How near steps are found, in octaves: to so many bits.
NEAR = 2.0**-8


class Coded(NamedTuple):
    """Integers of the keys, or of the values, of all sequences: chunk after chunk."""

    words: Array  # (n,), uint32
    table: Array  # (chunks, 5), uint32: words, the least and the largest integer + LIMIT, CRC-32 of words and integers
    odd_at: Array  # (m,), int64: places in (B, H, n, d) of numbers that are no such integers
    odd: Array  # (m,): these, in units of the step

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(int(x.nbytes) for x in self)


class ParkedRows(NamedTuple):
    """What `BitRows` hold, in a file."""

    layout: Layout
    k: Coded
    v: Coded
    filled: Array  # (B,)
    far_k: Array
    far_v: Array
    half_k: Array
    half_v: Array

    @classmethod
    def empty(cls, layout: Layout, like: Array) -> "ParkedRows":
        """No token, NumPy."""
        k, v = (
            Coded(
                np.zeros(0, np.uint32),
                np.zeros((0, 5), np.uint32),
                np.zeros(0, np.int64),
                np.zeros(0, like.dtype),
            )
            for _ in layout.rank
        )
        filled = np.zeros(layout.n_batch, np.int64)
        far = np.zeros((layout.n_batch, layout.n_heads), like.dtype)
        half = far[:, : layout.n_coded]
        return cls(layout, k, v, filled, far, far, half, half)

    def check(self) -> None:
        """Raise ValueError where parts, which come from a file, do not belong together."""
        n_chunks = _n_chunks(self.filled).sum()
        n_rows = self.layout.n_batch * self.layout.n_coded * int(self.filled.max(initial=0))
        for part, d in zip((self.k, self.v), self.layout.rank, strict=True):
            n_words, low, high, *_ = part.table.T.astype(np.int64)
            if (
                len(part.table) != n_chunks
                or len(part.odd) != len(part.odd_at)
                or np.any((part.odd_at < 0) | (part.odd_at >= n_rows * d))
                or np.any((low >= high) | (high > 2 * LIMIT))
                or int(n_words.sum()) != len(part.words)
            ):
                raise ValueError("its chunks are not those of its tokens")


def codec() -> Any:
    """Import the entropy coder."""
    try:
        import constriction
    except ImportError as error:
        raise ImportError(
            'a cache that is saved with bits needs constriction: pip install ".[codec]" in a clone of slra'
        ) from error
    return constriction.stream


def _bounds(n: int) -> list[int]:
    """Where the chunks of so many tokens begin and end: between blocks."""
    n_chunks = int(_n_chunks(n))
    return [n * i // max(1, n_chunks) // TOKENS * TOKENS for i in range(n_chunks)] + [n]


def _n_chunks(n: Array) -> Array:
    return np.where(np.asarray(n) > 0, np.maximum(1, np.rint(np.asarray(n) / CHUNK)), 0)


def park(rows: BitRows, maps: Maps, bits: Array) -> tuple[Maps, ParkedRows, Array]:
    """Round tokens by the steps at which a number of the keys, and of the values, takes so many bits.

    Steps do not get finer: what was rounded before is known no better. Returns maps in units of the steps, tokens, and
    for keys and for values whether steps are what they were.
    """
    layout, like = rows.layout, rows.half_k
    to_numpy = layout.backend.to_numpy
    n_rows = int(rows.filled.max(initial=0))
    read = rows.coordinates(slice(0, n_rows), maps.wk.dtype)
    parts, steps, halves = [], [], []
    for coordinates, d, n_bits, held in zip(
        read, layout.rank, bits, rows.half_steps(), strict=True
    ):
        x, half = to_numpy(coordinates[..., :d]), to_numpy(held)
        each = [one[:, :n] for one, n in zip(x, rows.filled, strict=True)]
        lead = [np.concatenate(each, axis=1)] if layout.pool_batch else each
        step = np.asarray([_steps(one, n_bits) for one in lead])
        x = x / step[..., None, None]
        x = np.where(np.abs(x) < LIMIT, np.rint(x), x)
        parts.append(_coded(x.astype(half.dtype), rows.filled))
        half = np.where(step > 1, 0.5 + half / step, half)
        halves.append(layout.backend.from_numpy(half, like))
        steps.append(step)
    k, v = parts
    parked = ParkedRows(layout, k, v, rows.filled, rows.far_k, rows.far_v, *halves)
    return scaled_maps(maps, steps, layout), parked, np.asarray([np.all(x == 1) for x in steps])


def unparked(rows: ParkedRows, like: Array) -> BitRows:
    """Undo `park`, beside an array of the library and device."""
    layout, from_numpy = rows.layout, rows.layout.backend.from_numpy
    held = BitRows.empty(layout, like)._replace(
        far_k=rows.far_k, far_v=rows.far_v, half_k=rows.half_k, half_v=rows.half_v
    )
    keys, values = (
        _chunks(part, rows.filled, layout.n_coded, d)
        for part, d in zip((rows.k, rows.v), layout.rank, strict=True)
    )
    for (k, places), (v, _) in zip(keys, values, strict=True):
        held = held.put(from_numpy(k, like), from_numpy(v, like), None, places)
    return held


def damaged_chunks(named: Arrays) -> str:
    """Say which chunks of a file are not what was written, where it is parked and that can be known."""
    found = []
    for name in sorted(named):
        at, _, field = name.rpartition(".")
        if field != "words":
            continue
        part = Coded(*(named[f"{at}.{field}"] for field in Coded._fields))
        filled = named[f"{at.rpartition('.')[0]}.filled"]
        if _n_chunks(filled).sum() != len(part.table):
            continue
        chunks = [(j, *pair) for j, n in enumerate(filled) for pair in pairwise(_bounds(int(n)))]
        found += [
            f"{at}: {_name(*chunk)}"
            for chunk, words, row in zip(chunks, _words(part), part.table, strict=True)
            if _crc(words) != row[3]
        ]
    return f"; damaged are {', '.join(found)}" if found else ""


def _steps(x: Array, bits: float) -> list[float]:
    """Choose a step for each head, at least 1, at which coordinates (H, n, d) take so many bits under an ideal code."""
    steps = []
    for one in np.where(np.abs(x) < LIMIT, x, 0):  # NaN is not, either
        # By halves, from the step there is to the one at which all is zero.
        fine, coarse = 0.0, float(WHOLE)
        while coarse - fine > NEAR:
            middle = (fine + coarse) / 2
            is_more = _entropy(np.rint(one / 2.0**middle)) > bits
            fine, coarse = (middle, coarse) if is_more else (fine, middle)
        steps.append(2.0**coarse if fine else 1.0)
    return steps


def _entropy(x: Array) -> float:
    """Bits of an integer (n, d) with an ideal code for each column, estimated with Miller's correction."""
    if not x.size:
        return 0.0
    counts = _counts(x.T - np.min(x), int(np.ptp(x)) + 1)
    counts = counts[counts > 0]
    bias = (len(counts) - x.shape[1]) / (2 * math.log(2))
    return float(math.log2(len(x)) - (np.sum(counts * np.log2(counts)) - bias) / x.size)


def _counts(x: Array, n: int) -> Array:
    """Histograms (C, n) of rows of integers from 0 to n - 1."""
    at = np.arange(len(x))[:, None] * n + x.astype(np.int64)
    return np.bincount(at.reshape(-1), minlength=len(x) * n).reshape(len(x), n)


def _coded(x: Array, filled: Array) -> Coded:
    """Code integers (B, H, n, d), and what is none, of so many tokens of each sequence."""
    is_odd = ~(np.abs(x) < LIMIT) & (np.arange(x.shape[2]) < filled[:, None])[:, None, :, None]
    (odd_at,) = np.nonzero(is_odd.reshape(-1))
    whole = np.where(np.abs(x) < LIMIT, x, 0).astype(np.int32)
    words, table = [np.zeros(0, np.uint32)], []
    for one, n in zip(whole, filled, strict=True):
        for start, end in pairwise(_bounds(int(n))):
            columns = np.swapaxes(one[:, start:end], 1, 2).reshape(-1, end - start)
            low, high = int(columns.min()), int(columns.max())
            high = max(high, low + 1)
            words.append(_coded_chunk(columns, low, high))
            crcs = _crc(words[-1]), _crc(columns)
            table.append((len(words[-1]), low + LIMIT, high + LIMIT, *crcs))
    rows = np.reshape(np.asarray(table, np.uint32), (-1, 5))
    return Coded(np.concatenate(words), rows, odd_at, x.reshape(-1)[odd_at])


def _words(part: Coded) -> list[Array]:
    """Words of each chunk."""
    ends = np.cumsum(part.table[:, 0].astype(np.int64))
    return [
        part.words[end - n : end] for n, end in zip(part.table[:, 0].tolist(), ends, strict=True)
    ]


def _chunks(part: Coded, filled: Array, h: int, d: int) -> Iterator[tuple[Array, Array]]:
    """Yield integers (B, H, m, d) of the first chunk of each sequence, of the second, ..., and their places (B, m)."""
    b, n = len(filled), int(filled.max(initial=0))
    bounds = [_bounds(int(count)) for count in filled]
    first = np.cumsum([0, *(max(0, len(one) - 1) for one in bounds)])
    words = _words(part)
    odd = np.stack(np.unravel_index(part.odd_at, (b, h, max(1, n), d)))
    for i in range(max(map(len, bounds)) - 1):
        held = [(j, one[i], one[i + 1]) for j, one in enumerate(bounds) if i + 1 < len(one)]
        most = max(end - start for _, start, end in held)
        x, places = np.zeros((b, h, most, d), part.odd.dtype), np.full((b, most), -1)
        for j, start, end in held:
            chunk = int(first[j]) + i
            _, low, high, _, crc = part.table[chunk].tolist()
            columns = np.zeros((h * d, end - start), np.int32)
            is_whole = _decode_chunk(columns, words[chunk], low - LIMIT, high - LIMIT)
            if not is_whole or _crc(columns) != crc:
                raise ValueError(f"{_name(j, start, end)} are not what was coded")
            x[j, :, : end - start] = np.swapaxes(columns.reshape(h, d, -1), 1, 2)
            places[j, : end - start] = np.arange(start, end)
            is_here = (odd[0] == j) & (odd[2] >= start) & (odd[2] < end)
            _, head, token, coordinate = odd[:, is_here]
            x[j, head, token - start, coordinate] = part.odd[is_here]
        yield x, places


def _coded_chunk(columns: Array, low: int, high: int) -> Array:
    """Code integers (C, n) from ``low`` to ``high``: before each column its model."""
    models, coder = _models(columns), codec().stack.AnsCoder()
    before = [FIRST_SCALE, *(index for index, *_ in models)]
    # What is coded last is decoded first.
    for column, model, last in zip(columns[::-1], models[::-1], before[-2::-1], strict=True):
        index, shape, mean = model
        if index:
            coder.encode_reverse(column - low, _distribution(model, low, high))
            coder.encode_reverse(mean + MEANS, _near(0, -MEANS, MEANS))
            coder.encode_reverse(shape, _near(LIKELY_SHAPE, 0, SHAPES))
        coder.encode_reverse(index, _near(last, 0, SCALES))
    words: Array = coder.get_compressed()
    return words


def _decode_chunk(columns: Array, words: Array, low: int, high: int) -> bool:
    """Undo `_coded_chunk`; say whether it ends where it should."""
    try:
        coder = codec().stack.AnsCoder(words.astype(np.uint32))
    except ValueError:  # the last word is never zero
        return False
    index = FIRST_SCALE
    for column in columns:
        index = coder.decode(_near(index, 0, SCALES))
        if index:
            shape = coder.decode(_near(LIKELY_SHAPE, 0, SHAPES))
            mean = coder.decode(_near(0, -MEANS, MEANS)) - MEANS
            column[:] = low + coder.decode(
                _distribution((index, shape, mean), low, high), len(column)
            )
    return bool(coder.is_empty())


def _name(sequence: int, start: int, end: int) -> str:
    return f"tokens {start} to {end - 1} of sequence {sequence}"


def _crc(x: Array) -> int:
    return zlib.crc32(x.tobytes())


@functools.cache
def _near(what: int, low: int, high: int) -> Any:
    """Distribution of a number of a model, which mostly is near to another one."""
    return _categorical(_weights(np.arange(low, high + 1), 1.0, what, 0))


def _distribution(model: tuple[int, ...], low: int, high: int) -> Any:
    """Distribution of the integers of a column."""
    index, shape, mean = model
    scale = _scale(index)
    weights = _weights(
        np.arange(low, high + 1), scale, mean * (scale / PER_SCALE), SQUARINGS[shape]
    )
    return _categorical(weights)


def _categorical(weights: Array) -> Any:
    return codec().model.Categorical(weights, perfect=False)


def _scale(index: Array) -> Array:
    index = np.asarray(index) - SCALE_OF_ONE
    return np.ldexp(np.asarray(QUARTERS)[index % 4], index // 4)


def _weights(values: Array, scale: Any, mean: Any, squarings: int) -> Array:
    """How likely integers are under a model, but for a factor."""
    z = (values - mean) / scale
    z *= z
    weights = 1 / (1 + z / 2.0 ** (squarings + 1))
    for _ in range(squarings):
        weights *= weights
    return weights + TAIL / (1 + z)


def _models(columns: Array) -> list[tuple[int, ...]]:
    """Choose a scale, a shape and a mean for each row of integers (C, n), by which it takes the fewest bits, nearly."""
    mean = np.mean(columns, axis=1)
    deviation = np.mean(np.abs(columns - mean[:, None]), axis=1)
    width = 2.0 ** np.maximum(0, np.ceil(np.log2(np.maximum(deviation, 1) / 8)))[:, None]
    centre = np.rint(mean)[:, None]
    bins = np.clip(np.rint((columns - centre) / width), -BINS, BINS) + BINS
    counts, values = _counts(bins, 2 * BINS + 1), centre + width * np.arange(-BINS, BINS + 1)
    # A scale that is too small cannot say the mean.
    far = np.abs(mean) * PER_SCALE / MEANS
    least = np.ceil(4 * np.log2(np.maximum(far, 2**-4))) + SCALE_OF_ONE
    about = np.rint(4 * np.log2(np.maximum(1.25 * deviation, 0.25))) + SCALE_OF_ONE
    best, fewest = np.zeros((len(columns), 3), np.int64), np.full(len(columns), math.inf)
    for change in range(-3, 3):
        index = np.clip(np.maximum(about + change, least), 1, SCALES).astype(np.int64)
        scale = _scale(index)[:, None]
        means = np.clip(np.rint(mean[:, None] * PER_SCALE / scale), -MEANS, MEANS)
        for shape, squarings in enumerate(SQUARINGS):
            weights = _weights(values, scale, means * (scale / PER_SCALE), squarings)
            shares = weights / np.sum(weights, axis=1, keepdims=True)
            bits = -np.sum(counts * np.log2(shares), axis=1)
            models = np.stack([index, np.full_like(index, shape), means[:, 0]], axis=1)
            best = np.where((bits < fewest)[:, None], models, best)
            fewest = np.minimum(bits, fewest)
    # All zeros take no bits but for the scale.
    best[~np.any(columns, axis=1), 0] = 0
    return [tuple(model) for model in best.astype(np.int64).tolist()]
