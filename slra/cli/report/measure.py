"""The measurements of ``python -m slra report``: what each head of a layer can do without."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import slra
from slra._backends.standard.bits import TOKENS
from slra.attn.fit import fit_problem
from slra.attn.problem import make_problem
from slra.baselines._kivi import round_by_groups
from slra.cli.demo import (
    METHODS,
    N_ROUNDS,
    factor_bytes,
    interleaved_medians,
    relative_errors,
)
from slra.cli.report.arrays import Layer

__all__ = [
    "MOST_BITS",
    "N_LAYERS",
    "TOLERANCES",
    "WORTH_BYTES",
    "InBits",
    "LayerReport",
    "Timing",
    "count_steps",
    "measure",
    "measure_all",
    "sample_of",
]

TOLERANCES = (0.1, 0.05, 0.01)
# Compressing is advised where no more than this share of the bytes is left; elsewhere nothing is timed.
WORTH_BYTES = 0.75
# Ranks looked at beside 1, 2 and 4, at most: each costs three attentions.
N_RANKS = 8
# Bits of an integer of plain rounding; zero points and scales come on top. The first are what ranks are held against.
KIVI_BITS = (8, 6, 5, 4, 3, 2)
GROUP_SIZE = 64
# What a cache may be asked for.
MOST_BITS = 10
# Tokens from which on bits are looked at: eight blocks of those that are packed together.
LEAST_FOR_BITS = 8 * TOKENS
# Queries that errors are taken over, at most: eight times as many took four times as long, for the same verdicts.
N_QUERIES = 256
# Layers looked at unless all are asked for: SmolLM2's 30 at 2048 tokens would take minutes.
N_LAYERS = 5

Needed = list[int | None]


class InBits(NamedTuple):
    """Keys and values in as many bits a number, one way and the other; queries of the second half of the tokens.

    Attributes
    ----------
    bits : list of float
        Of plain rounding (KIVI), with zero points and scales.
    taken : list of float
        Of a cache in bits, headers counted, that is asked for as many.
    errors : dict of str to array, shape (bits, query heads)
        Relative error of the output: "cache", its basis fitted to the first half, and "kivi".
    map_bytes : int
        Bytes of the maps of the cache, whatever the number of tokens and sequences.
    """

    bits: list[float]
    taken: list[float]
    errors: dict[str, NDArray[np.float64]]
    map_bytes: int

    def first_within(self, way: str, tolerance: float) -> int | None:
        """Place of the fewest bits from which on every head is within a tolerance; None where none are enough."""
        is_within = (self.errors[way] <= tolerance).all(axis=1)
        n_within = int(np.cumprod(is_within).sum())
        return n_within - 1 if n_within else None


class Timing(NamedTuple):
    """Seconds at the smallest rank that keeps every head within a tolerance."""

    tolerance: float
    rank: int
    attend: float  # with a basis fitted before
    fit_and_attend: float


class LayerReport(NamedTuple):
    """What was measured on a layer; heads of all batch elements stand one after the other."""

    layer: Layer
    query_heads: list[str]
    key_heads: list[str]
    spectra: dict[str, NDArray[Any]]  # q, k, v: singular values, (heads, min(N, D))
    effective_ranks: dict[str, NDArray[np.float64]]  # q, k, v: (heads,)
    ranks: list[int]
    errors: dict[
        str, NDArray[np.float64]
    ]  # by method: (ranks, query heads), held out if they can be
    in_sample: dict[str, NDArray[np.float64]]  # the same on the data of the fit
    is_held_out: bool
    needed: dict[str, dict[float, Needed]]  # by method and tolerance: rank of each query head
    exact_bytes: int
    kv_bytes: dict[str, dict[float, int]]  # by method and tolerance
    best: str  # method with the fewest bytes
    in_bits: InBits | None  # None where there are too few tokens
    exact_seconds: float
    timings: list[Timing]

    @property
    def n_shared(self) -> int:
        """Query heads of a key head."""
        return len(self.query_heads) // len(self.key_heads)

    def bytes_in_bits(self, way: str, tolerance: float) -> int:
        """Bytes of K and V in the fewest bits that keep every head within a tolerance, or exact; maps not counted."""
        at = None if self.in_bits is None else self.in_bits.first_within(way, tolerance)
        return self.exact_bytes if at is None else min(self.exact_bytes, self.bytes_at(way, at))

    def bytes_at(self, way: str, at: int) -> int:
        """Bytes of K and V in the bits at a place of the list."""
        assert self.in_bits is not None
        bits = (self.in_bits.taken if way == "cache" else self.in_bits.bits)[at]
        return round(bits * (self.layer.k.size + self.layer.v.size) / 8)

    @property
    def at_int8(self) -> tuple[float, float] | None:
        """Median errors where bytes are those of int8: of the best ranks, bases not counted, and of plain rounding."""
        if self.in_bits is None:
            return None
        n_tokens = math.prod(self.layer.k.shape[:-1])
        sizes = [np.dot(_pair(rank, self.layer), self.layer.itemsizes) for rank in self.ranks]
        n_fit = sum(n_tokens * size <= self.bytes_at("kivi", 0) for size in sizes)
        if not n_fit:
            return None
        ranks = min(float(np.median(errors[n_fit - 1])) for errors in self.errors.values())
        return ranks, float(np.median(self.in_bits.errors["kivi"][0]))


def ranks_of(layer: Layer) -> list[int]:
    """1, 2, 4, multiples of an eighth of the largest rank, and the largest."""
    limit = max(_limits(layer))
    step = -(-limit // N_RANKS)
    return sorted({rank for rank in (1, 2, 4) if rank < limit} | {limit, *range(step, limit, step)})


def count_steps(layers: list[Layer]) -> int:
    """How often `measure` calls ``advance`` over all layers."""
    n_spectra = 3

    def n_fits(layer: Layer) -> int:
        return len(METHODS) * (1 if _halves(layer) is None else 2)

    return sum(
        n_spectra + n_fits(layer) * len(ranks_of(layer)) + len(_kivi_bits(layer)) + N_ROUNDS
        for layer in layers
    )


def sample_of(layers: list[Layer]) -> list[Layer]:
    """Return `N_LAYERS` of the layers, evenly spaced, the first and the last among them."""
    if len(layers) <= N_LAYERS:
        return layers
    last = len(layers) - 1
    return [layers[round(i * last / (N_LAYERS - 1))] for i in range(N_LAYERS)]


def measure_all(layers: list[Layer], advance: Callable[[], object]) -> Iterator[LayerReport]:
    """Measure one layer after the other; ValueError where numbers are too large or too small to be attended to."""
    for layer in layers:
        try:
            with np.errstate(all="ignore"):
                report = measure(layer, advance)
            found = [*report.errors.values(), *report.in_sample.values()]
            found += [] if report.in_bits is None else report.in_bits.errors.values()
            is_finite = all(np.isfinite(errors).all() for errors in found)
        except ValueError:  # of LAPACK, or of what looks at the scores
            is_finite = False
        if not is_finite:
            raise ValueError(
                f"layer {layer.name} must hold numbers whose products {layer.k.dtype} can hold, and does not"
            )
        yield report


def measure(layer: Layer, advance: Callable[[], object]) -> LayerReport:
    """Measure all methods at all ranks on one layer.

    Parameters
    ----------
    layer : Layer
    advance : callable
        Called without arguments as the work goes on.
    """
    spectra = {}
    for name in "qkv":
        spectra[name] = _spectra(getattr(layer, name))
        advance()
    ranks, (errors, in_sample, is_held_out) = ranks_of(layer), _errors(layer, advance)
    needed = {
        method: {t: needed_ranks(errors[method], ranks, t) for t in TOLERANCES}
        for method in METHODS
    }
    kv_bytes = {
        method: {t: _kv_bytes(layer, r, method) for t, r in needed[method].items()}
        for method in METHODS
    }
    # Where two are equal, the one whose error is smaller: "output" is fitted to just that.
    best = min(reversed(METHODS), key=lambda method: kv_bytes[method][0.05])
    exact_bytes = _exact_bytes(layer) * math.prod(layer.k.shape[:-2])
    is_worth = kv_bytes[best][0.05] <= WORTH_BYTES * exact_bytes
    in_bits = _in_bits(layer, advance) if _kivi_bits(layer) else None
    exact_seconds, timings = _timings(layer, best, needed[best] if is_worth else {}, advance)
    return LayerReport(
        layer,
        _labels(layer.q.shape[:-2]),
        _labels(layer.k.shape[:-2]),
        spectra,
        {name: effective_rank(sigma) for name, sigma in spectra.items()},
        ranks,
        errors,
        in_sample,
        is_held_out,
        needed,
        exact_bytes,
        kv_bytes,
        best,
        in_bits,
        exact_seconds,
        timings,
    )


class _Queries(NamedTuple):
    """Some of the queries of a layer, and options under which each sees the keys that it saw."""

    q: NDArray[Any]
    options: dict[str, Any]

    @classmethod
    def of(cls, layer: Layer, rows: NDArray[Any]) -> "_Queries":
        """Take these rows."""
        n, n_keys = layer.q.shape[-2], layer.k.shape[-2]
        options, mask = _options(layer), layer.options.get("mask")
        if len(rows) == n:
            return cls(layer.q, options)
        if mask is not None:
            mask = mask if mask.shape[-2] == 1 else mask[..., rows, :]
        elif layer.options.get("is_causal"):
            mask = np.arange(n_keys) <= rows[:, None] + n_keys - n
        return cls(layer.q[..., rows, :], {**options, "is_causal": False, "mask": mask})

    @classmethod
    def sample(cls, layer: Layer, first: int = 0) -> "_Queries":
        """Draw `N_QUERIES` of those from one on, or take all."""
        rows = np.arange(first, layer.q.shape[-2])
        if len(rows) > N_QUERIES:
            rows = np.sort(np.random.default_rng(0).permutation(rows)[:N_QUERIES])
        return cls.of(layer, rows)

    def attend(self, k: NDArray[Any], v: NDArray[Any]) -> NDArray[np.float64]:
        """Attend exactly."""
        return np.asarray(slra.attention(self.q, k, v, **self.options), dtype=np.float64)


class _Errors(NamedTuple):
    held_out: dict[str, NDArray[np.float64]]
    in_sample: dict[str, NDArray[np.float64]]
    is_held_out: bool


def _errors(layer: Layer, advance: Callable[[], object]) -> _Errors:
    """Relative error of each head by method, (ranks, query heads), on queries that a fit has not seen and has."""
    whole = _Queries.of(layer, np.arange(layer.q.shape[-2]))
    halves = _halves(layer)
    seen, late = (whole, _Queries.sample(layer)), halves
    held_out, in_sample = {}, {}
    for method in METHODS:
        in_sample[method] = _errors_by_rank(layer, method, *seen, advance)
        if late is not None:
            held_out[method] = _errors_by_rank(layer, method, *late, advance)
    return _Errors(held_out or in_sample, in_sample, halves is not None)


def _halves(layer: Layer) -> tuple[_Queries, _Queries] | None:
    """Cut the queries into the first half and a sample of the others; None where there is only one."""
    half = layer.q.shape[-2] // 2
    return (_Queries.of(layer, np.arange(half)), _Queries.sample(layer, half)) if half else None


def _errors_by_rank(
    layer: Layer, method: str, first: _Queries, asked: _Queries, advance: Callable[[], object]
) -> NDArray[np.float64]:
    """Relative error of each head, (ranks, query heads), of a fit to some queries on others.

    Columns of the maps come in order of importance: one fit has all ranks.
    """
    k, v = layer.k, layer.v
    exact = asked.attend(k, v)
    problem = make_problem(first.q, k, v, **first.options)
    fitted = fit_problem(problem, _pair(max(_limits(layer)), layer), rtol=None, method=method)
    errors = []
    for rank in ranks_of(layer):
        ranks = (_pair(rank, layer),) * len(fitted.ranks)
        maps = fitted.factors.maps(ranks, problem.xp).by_head(problem)
        basis = slra.AttentionBasis(**maps, ranks=ranks, error=maps["wq"][..., 0, 0])
        out = np.asarray(basis.attend(asked.q, k, v, **asked.options))
        errors.append(relative_errors(out, exact).ravel())
        advance()
    return np.stack(errors)


def _kivi_bits(layer: Layer) -> tuple[int, ...]:
    return KIVI_BITS if layer.k.shape[-2] >= LEAST_FOR_BITS else ()


def _in_bits(layer: Layer, advance: Callable[[], object]) -> InBits:
    """Round keys and values both ways; the cache's basis is that of the first half of the queries."""
    k, v, (n_keys, width_v) = layer.k, layer.v, layer.v.shape[-2:]
    first, asked = _halves(layer) or (_Queries.sample(layer),) * 2
    exact = asked.attend(k, v)
    # What the first half does not see is yet to come: under causality it is a prefix.
    options, seen = first.options, np.ones(n_keys, dtype=bool)
    if (mask := options.get("mask")) is not None and mask.shape[-1] > 1:
        seen = mask.reshape(-1, n_keys).any(axis=0)
        options = options | {"mask": mask[..., seen]}
    basis = slra.fit_attention(first.q, k[..., seen, :], v[..., seen, :], 1, **options)
    # Tokens that wait for their block to be full are exact in a cache.
    end = n_keys - n_keys % TOKENS
    took, taken = [], []
    errors: dict[str, list[Any]] = {"cache": [], "kivi": []}
    for bits in _kivi_bits(layer):
        pair = _with_scales(bits, end), _with_scales(bits, width_v)
        took.append(float(np.average(pair, weights=(k.shape[-1], width_v))))
        cache = slra.KVCache(basis, bits=(min(pair[0], MOST_BITS), min(pair[1], MOST_BITS)))
        cache = cache.append(k, v)
        taken.append(cache.bits)
        kivi = [
            np.concat([_rounded(x[..., :end, :], bits, axis), x[..., end:, :]], axis=-2)
            for x, axis in ((k, -2), (v, -1))
        ]
        for way, held in (("cache", cache.decode()), ("kivi", kivi)):
            errors[way].append(relative_errors(asked.attend(*held), exact).ravel())
        advance()
    map_bytes = slra.KVCache(basis, bits=8).nbytes
    return InBits(took, taken, {way: np.stack(x) for way, x in errors.items()}, map_bytes)


def _rounded(x: NDArray[Any], bits: int, axis: int) -> NDArray[Any]:
    return np.asarray(round_by_groups(x, bits, axis, GROUP_SIZE, np))


def _with_scales(bits: int, n: int) -> float:
    """Bits of a number where groups along n numbers have a zero point and a scale, in half precision."""
    return bits + 32 * -(-n // GROUP_SIZE) / n


def _options(layer: Layer) -> dict[str, Any]:
    # Fewer queries than keys are the last of a text, as in a cache.
    return {"causal_align": "bottom_right", **layer.options, "enable_gqa": True}


def effective_rank(sigma: NDArray[Any]) -> NDArray[np.float64]:
    r"""Exponential of the entropy of the singular values as shares of their sum, (..., r) to (...); 0 for zero.

    O. Roy and M. Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.
    """
    sigma = sigma.astype(np.float64)
    total = sigma.sum(-1, keepdims=True)
    share = sigma / np.where(total == 0, 1, total)
    entropy = -np.sum(share * np.log(np.where(share == 0, 1, share)), axis=-1)
    return np.where(total[..., 0] == 0, 0.0, np.exp(entropy))


def needed_ranks(errors: NDArray[np.float64], ranks: list[int], tolerance: float) -> Needed:
    """Rank from which on a head's error stays within the tolerance, (ranks, heads); None where none does."""
    settled = np.flip(np.cumprod(np.flip(errors <= tolerance, 0), axis=0), 0).astype(bool)
    return [ranks[int(np.argmax(one))] if one.any() else None for one in settled.T]


def _limits(layer: Layer) -> tuple[int, int]:
    """Largest rank of queries and keys, and of values."""
    limit_qk = min(layer.q.shape[-2], layer.k.shape[-2], layer.k.shape[-1])
    return limit_qk, min(layer.v.shape[-2:])


def _pair(rank: int, layer: Layer) -> tuple[int, int]:
    limit_qk, limit_v = _limits(layer)
    return min(rank, limit_qk), min(rank, limit_v)


def _spectra(x: NDArray[Any]) -> NDArray[Any]:
    sigma = slra.truncated_svd(x, min(x.shape[-2:])).S
    return np.asarray(sigma.reshape(-1, sigma.shape[-1]))


def _exact_bytes(layer: Layer) -> int:
    """Bytes of K and V of one head, as they are stored."""
    (n, d), dv = layer.k.shape[-2:], layer.v.shape[-1]
    return int(n * (d * layer.itemsizes[0] + dv * layer.itemsizes[1]))


def _kv_bytes(layer: Layer, needed: Needed, method: str) -> int:
    """Bytes of K and V where each key head has the rank its query heads need, or stays exact if that is less."""
    n_shared = layer.q.shape[-3] // layer.k.shape[-3]
    exact, total = _exact_bytes(layer), 0
    for first in range(0, len(needed), n_shared):
        wanted = [rank for rank in needed[first : first + n_shared] if rank is not None]
        of_head = exact
        if len(wanted) == n_shared:
            of_head = sum(
                factor_bytes((1, *x.shape[-2:]), rank, method, itemsize)
                for x, rank, itemsize in zip(
                    (layer.k, layer.v), _pair(max(wanted), layer), layer.itemsizes, strict=True
                )
            )
        total += min(of_head, exact)
    return total


def _timings(
    layer: Layer,
    method: str,
    needed: dict[float, Needed],
    advance: Callable[[], object],
) -> tuple[float, list[Timing]]:
    """Time exact attention beside one method, at one rank for all heads, with and without the fit."""
    q, k, v, options = layer.q, layer.k, layer.v, _options(layer)
    wanted = {t: [rank for rank in of_heads if rank] for t, of_heads in needed.items()}
    ranks = {t: max(found) for t, found in wanted.items() if len(found) == len(needed[t])}
    calls: list[Callable[[], Any]] = [partial(slra.attention, q, k, v, **options)]
    for rank in ranks.values():
        pair = _pair(rank, layer)
        basis = slra.fit_attention(q, k, v, pair, method=method, **options)
        calls += [
            partial(basis.attend, q, k, v, **options),
            partial(slra.low_rank_attention, q, k, v, pair, method=method, **options),
        ]
    exact, *spent = interleaved_medians(calls, lambda out: None, advance)
    pairs = zip(spent[::2], spent[1::2], strict=True)
    return exact, [Timing(t, ranks[t], *pair) for t, pair in zip(ranks, pairs, strict=True)]


def _labels(shape: tuple[int, ...]) -> list[str]:
    return [".".join(map(str, index)) for index in np.ndindex(shape)]
