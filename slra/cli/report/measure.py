"""The measurements of ``python -m slra report``: what each head of a layer can do without."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import slra
from slra.cli.demo import (
    METHODS,
    N_ROUNDS,
    factor_bytes,
    interleaved_medians,
    relative_errors,
)
from slra.cli.report.arrays import Layer

__all__ = [
    "N_LAYERS",
    "TOLERANCES",
    "WORTH_BYTES",
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
# Ranks looked at beside 1, 2 and 4, at most: each costs three fits and three attentions.
N_RANKS = 8
# Queries that errors are taken over, at most: all of 2048 took three times as long, for the same verdicts.
N_QUERIES = 512
# Layers looked at unless all are asked for: SmolLM2's 30 at 2048 tokens would take minutes.
N_LAYERS = 5

Needed = list[int | None]


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
    exact_seconds: float
    timings: list[Timing]

    @property
    def n_shared(self) -> int:
        """Query heads of a key head."""
        return len(self.query_heads) // len(self.key_heads)


def ranks_of(layer: Layer) -> list[int]:
    """1, 2, 4, multiples of an eighth of the largest rank, and the largest."""
    limit = max(_limits(layer))
    step = -(-limit // N_RANKS)
    return sorted({rank for rank in (1, 2, 4) if rank < limit} | {limit, *range(step, limit, step)})


def count_steps(layers: list[Layer]) -> int:
    """How often `measure` calls ``advance`` over all layers."""
    n_spectra = 3
    return sum(n_spectra + len(METHODS) * len(ranks_of(layer)) + N_ROUNDS for layer in layers)


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
        exact_seconds,
        timings,
    )


class _Errors(NamedTuple):
    held_out: dict[str, NDArray[np.float64]]
    in_sample: dict[str, NDArray[np.float64]]
    is_held_out: bool


def _errors(layer: Layer, advance: Callable[[], object]) -> _Errors:
    """Relative error of each head by method, (ranks, query heads), on queries that a fit has not seen and has."""
    q, k, v, options = layer.q, layer.k, layer.v, _options(layer)
    asked, seen = _sampled_queries(layer)
    exact = np.asarray(slra.attention(asked, k, v, **seen), dtype=np.float64)
    held_out, in_sample, is_held_out = {}, {}, True
    for method in METHODS:
        found = []
        for rank in ranks_of(layer):
            basis = slra.fit_attention(q, k, v, _pair(rank, layer), method=method, **options)
            out = np.asarray(basis.attend(asked, k, v, **seen))
            expected = np.asarray(basis.error, dtype=np.float64).ravel()
            found.append((expected, relative_errors(out, exact).ravel()))
            is_held_out = basis.is_held_out
            advance()
        held_out[method], in_sample[method] = map(np.stack, zip(*found, strict=True))
    if not is_held_out:
        held_out = in_sample
    return _Errors(held_out, in_sample, is_held_out)


def _sampled_queries(layer: Layer) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return `N_QUERIES` of the queries, or all, and options under which each sees the keys that it saw."""
    n, n_keys = layer.q.shape[-2], layer.k.shape[-2]
    if n <= N_QUERIES:
        return layer.q, _options(layer)
    rows = np.sort(np.random.default_rng(0).permutation(n)[:N_QUERIES])
    mask = layer.options.get("mask")
    if mask is not None:
        mask = mask if mask.shape[-2] == 1 else mask[..., rows, :]
    elif layer.options.get("is_causal"):
        mask = np.arange(n_keys) <= rows[:, None] + n_keys - n
    return layer.q[..., rows, :], {**_options(layer), "is_causal": False, "mask": mask}


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
