"""What the library advises, by the rules in docs/report.md."""

from slra.cli.report.measure import WORTH_BYTES, LayerReport

__all__ = ["TOLERANCE", "advise", "verdict"]

# The tolerance the advice is about, and what is worth doing.
TOLERANCE = 0.05
WORTH_TIME = 0.9


def advise(report: LayerReport) -> list[str]:
    """Sentences, most important first."""
    stored = report.kv_bytes[report.best][TOLERANCE] / report.exact_bytes
    if stored > WORTH_BYTES:
        return [
            f"Keep exact attention: within 5% of the output, K and V would still take {stored:.0%} of their bytes."
        ]
    sentences = [
        f'Compress with method "{report.best}": within 5% of the output, K and V take {stored:.0%} of their bytes.'
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
    shares = {
        report.layer.name: report.kv_bytes[report.best][TOLERANCE] / report.exact_bytes
        for report in reports
    }
    exact = sum(report.exact_bytes for report in reports)
    stored = sum(report.kv_bytes[report.best][TOLERANCE] for report in reports) / exact
    worth = [name for name, share in shares.items() if share <= WORTH_BYTES]
    if not worth:
        return [
            f"Keep exact attention in all {len(reports)} layers: within 5% of the output, K and V would still "
            f"take {stored:.0%} of their bytes."
        ]
    which = "all" if len(worth) == len(reports) else f"{len(worth)} of {len(reports)}"
    best = min(shares, key=shares.__getitem__)
    return [
        f"Compress {which} layers: within 5% of the output, K and V of all of them take {stored:.0%} of their bytes, "
        f"those of {best} {shares[best]:.0%}."
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
