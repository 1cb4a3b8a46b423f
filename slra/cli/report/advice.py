"""What the library advises, by the rules in docs/report.md."""

from typing import NamedTuple

import numpy as np

from slra.cli.report.measure import MOST_BITS, WORTH_BYTES, LayerReport

__all__ = ["TOLERANCE", "advise", "verdict"]

# The tolerance the advice is about, and what is worth doing.
TOLERANCE = 0.05
WORTH_TIME = 0.9
# What headers and steps make of bits that are asked for is no reason to round another way.
AS_MANY = 0.97


class _Shares(NamedTuple):
    """What is left of the bytes of K and V within the tolerance: by ranks, in a cache with bits, rounded plainly."""

    ranks: float
    cache: float
    kivi: float

    @classmethod
    def of(cls, reports: list[LayerReport]) -> "_Shares":
        exact = sum(report.exact_bytes for report in reports)
        ranks = sum(report.kv_bytes[report.best][TOLERANCE] for report in reports)
        cache, kivi = (
            sum(report.bytes_in_bits(way, TOLERANCE) for report in reports)
            for way in ("cache", "kivi")
        )
        return cls(ranks / exact, cache / exact, kivi / exact)

    @property
    def least_of_bits(self) -> float:
        return min(self.cache, self.kivi)


def advise(report: LayerReport) -> list[str]:
    """Sentences, most important first."""
    shares = _Shares.of([report])
    if shares.least_of_bits < min(shares.ranks, WORTH_BYTES):
        sentences = _in_bits([report], shares)
        if shares.ranks <= WORTH_BYTES:
            sentences.append(f'Ranks, by method "{report.best}", may save time. {_on_time(report)}')
        return sentences
    if shares.ranks > WORTH_BYTES:
        least = min(shares)
        return [
            f"Keep exact attention: within 5% of the output, K and V would still take {least:.0%} of their bytes."
        ]
    sentences = [
        f'Compress with method "{report.best}": within 5% of the output, K and V take {shares.ranks:.0%} of their '
        "bytes."
    ]
    ranks = sorted(rank or report.ranks[-1] for rank in report.needed[report.best][TOLERANCE])
    if ranks[-1] > 2 * ranks[len(ranks) // 2]:
        sentences.append(
            f"Let rtol=0.05 choose the rank of each head: half of them need no more than "
            f"{ranks[(len(ranks) - 1) // 2]}, the hardest {ranks[-1]}."
        )
    return [*sentences, _on_time(report)]


def verdict(reports: list[LayerReport]) -> list[str]:
    """Sentences on all layers together; of one layer, its advice."""
    if len(reports) == 1:
        return advise(reports[0])
    shares = _Shares.of(reports)
    if shares.least_of_bits < min(shares.ranks, WORTH_BYTES):
        return _in_bits(reports, shares)
    by_layer = {report.layer.name: _Shares.of([report]).ranks for report in reports}
    worth = [name for name, share in by_layer.items() if share <= WORTH_BYTES]
    if not worth:
        return [
            f"Keep exact attention in all {len(reports)} layers: within 5% of the output, K and V would still "
            f"take {min(shares):.0%} of their bytes."
        ]
    which = "all" if len(worth) == len(reports) else f"{len(worth)} of {len(reports)}"
    best = min(by_layer, key=by_layer.__getitem__)
    return [
        f"Compress {which} layers: within 5% of the output, K and V of all of them take {shares.ranks:.0%} of their "
        f"bytes, those of {best} {by_layer[best]:.0%}."
    ]


def _in_bits(reports: list[LayerReport], shares: _Shares) -> list[str]:
    """How many bits, what plain rounding and ranks take for the same, and what bits do not give."""
    found = [report.in_bits for report in reports if report.in_bits is not None]
    places = [one.first_within("cache", TOLERANCE) for one in found]
    bits = [one.bits[at] for one, at in zip(found, places, strict=True) if at is not None]
    sentences = []
    if shares.kivi < AS_MANY * shares.cache:
        sentences.append(
            f"Round K and V plainly (KIVI): every head stays within 5% of the output, and they take {shares.kivi:.0%} "
            f"of their bytes; in a cache with bits they take {shares.cache:.0%}, by ranks {shares.ranks:.0%}."
        )
    else:
        few, most = (f"{min(x, MOST_BITS):.3g}" for x in (min(bits), max(bits)))
        asked = most if few == most else f"{few} to {most}"
        n_exact = len(reports) - len(bits)
        but = f" ({n_exact} of {len(reports)} layers exact)" if n_exact else ""
        sentences.append(
            f"Keep K and V in bits: with bits={asked}{but} every head stays within 5% of the output, and they take "
            f"{shares.cache:.0%} of their bytes; rounded plainly (KIVI) they take {shares.kivi:.0%}, by ranks "
            f"{shares.ranks:.0%}."
        )
    at_int8 = [pair for report in reports if (pair := report.at_int8) is not None]
    if at_int8:
        ranks, rounded = np.median(at_int8, axis=0)
        if ranks > rounded:
            sentences.append(
                f"Ranks alone lose: at the bytes of int8 the best of them are off by {ranks:.1%} (median head), "
                f"int8 by {rounded:.1%}."
            )
    n_bytes = sum(one.map_bytes for one in found)
    return [
        *sentences,
        "Bits save memory, not time: a step decodes all keys and values. Maps of a cache take "
        f"{n_bytes / 1e6:.2g} MB besides, once for any number of tokens.",
    ]


def _on_time(report: LayerReport) -> str:
    timing = next((one for one in report.timings if one.tolerance == TOLERANCE), None)
    if timing is None:
        return "No single rank keeps every head within 5%, so nothing is said about time."
    fitted, whole = (
        seconds / report.exact_seconds for seconds in (timing.attend, timing.fit_and_attend)
    )
    measured = f"at rank {timing.rank} attention took {fitted:.2f} of the exact time, {whole:.2f} with the fit"
    if whole <= WORTH_TIME:
        return (
            f"It saves time on this machine, even if the basis is fitted in every call: {measured}."
        )
    if fitted <= WORTH_TIME:
        return f"It saves time on this machine if the basis is fitted once: {measured}."
    return f"It saves no time on this machine: {measured}."
