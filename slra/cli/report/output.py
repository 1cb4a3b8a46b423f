"""The report as tables for the terminal and as JSON."""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import slra
from slra.cli.demo import METHODS
from slra.cli.report.advice import TOLERANCE as ADVISED
from slra.cli.report.advice import advise, verdict
from slra.cli.report.arrays import Layer
from slra.cli.report.measure import TOLERANCES, InBits, LayerReport

__all__ = [
    "BITS_CAPTION",
    "BITS_HEADERS",
    "HEAD_HEADERS",
    "METHOD_HEADERS",
    "OVERVIEW_CAPTION",
    "OVERVIEW_HEADERS",
    "attends",
    "bits_rows",
    "heads_rows",
    "methods_rows",
    "overview",
    "overview_rows",
    "show",
    "tables",
    "to_json",
]

HELD_OUT = (
    "Errors are held out: of a fit to the first half of the tokens, on the second half; "
    "on the data of a fit they are smaller."
)
METHOD_HEADERS = ("method", "within", "rank\nmedian", "rank\nlargest", "K, V\n/ exact")
HEAD_HEADERS = (
    "head",
    *(f"eff. rank\n{name}" for name in "QKV"),
    *(f"rank\n{t:.0%}" for t in TOLERANCES),
)
BITS_HEADERS = (
    "bits",
    "cache\ntakes",
    "K, V\n/ exact",
    *(f"{way}\n{which}" for way in ("cache", "KIVI") for which in ("median", "worst")),
)
BITS_CAPTION = (
    "Error of the output, held out. KIVI: plain rounding in groups, so many bits a number with zero points and scales. "
    "Cache: KVCache(bits=...) that is asked for as many, headers counted; its maps come on top, once."
)
OVERVIEW_HEADERS = (
    "layer",
    *(f"ranks\n{t:.0%}" for t in TOLERANCES),
    "best\nmethod",
    "rank",
    *(f"{way}\n{ADVISED:.0%}" for way in ("bits", "KIVI")),
    "bits",
)
OVERVIEW_CAPTION = (
    "Bytes of K and V over exact at a tolerance of the output: each head at the rank it needs, a cache with bits "
    "(maps not counted), plain rounding (KIVI). "
    f"rank, bits: those of the hardest head at {ADVISED:.0%}."
)


def methods_rows(report: LayerReport) -> list[list[str]]:
    """Return the cells under `METHOD_HEADERS`."""
    rows = []
    for method in METHODS:
        for tolerance in TOLERANCES:
            needed = report.needed[method][tolerance]
            found = [np.inf if rank is None else rank for rank in needed]
            stored = report.kv_bytes[method][tolerance] / report.exact_bytes
            middle, worst = float(np.quantile(found, 0.5, method="lower")), max(found)
            rows.append([method, f"{tolerance:.0%}", _rank(middle), _rank(worst), f"{stored:.2f}"])
    return rows


def bits_rows(report: LayerReport) -> list[list[str]]:
    """Return the cells under `BITS_HEADERS`, none where bits were not looked at."""
    found = report.in_bits
    if found is None:
        return []
    rows = []
    for i, bits in enumerate(found.bits):
        errors = [_middle_and_worst(found.errors[way][i]) for way in ("cache", "kivi")]
        stored = report.bytes_at("kivi", i) / report.exact_bytes
        cells = [f"{bits:.3g}", f"{found.taken[i]:.3g}", f"{stored:.2f}"]
        rows.append([*cells, *(f"{x:.2g}" for pair in errors for x in pair)])
    return rows


def heads_rows(report: LayerReport) -> list[list[str]]:
    """Return the cells under `HEAD_HEADERS`; ranks needed are those of the best method."""
    rows = []
    for i, head in enumerate(report.query_heads):
        of_keys = i // report.n_shared
        effective = [report.effective_ranks[n][i if n == "q" else of_keys] for n in "qkv"]
        needed = [report.needed[report.best][t][i] for t in TOLERANCES]
        rows.append(
            [
                head,
                *(f"{x:.1f}" for x in effective),
                *(_rank(np.inf if r is None else r) for r in needed),
            ]
        )
    return rows


def _rank(rank: float) -> str:
    return "none" if np.isinf(rank) else f"{rank:.0f}"


def overview_rows(reports: list[LayerReport]) -> list[list[str]]:
    """Return the cells under `OVERVIEW_HEADERS`, a row for each layer."""
    rows = []
    for report in reports:
        stored = [report.kv_bytes[report.best][t] / report.exact_bytes for t in TOLERANCES]
        needed = [np.inf if r is None else r for r in report.needed[report.best][ADVISED]]
        cells = [
            *(f"{x:.2f}" for x in stored),
            report.best,
            _rank(max(needed)),
            *_bits_cells(report),
        ]
        rows.append([report.layer.name, *cells])
    return rows


def _bits_cells(report: LayerReport) -> list[str]:
    """Bytes in bits over exact, in a cache and rounded plainly, and the bits of the cache, at the tolerance advised."""
    if report.in_bits is None:
        return ["", "", ""]
    shares = [report.bytes_in_bits(way, ADVISED) / report.exact_bytes for way in ("cache", "kivi")]
    at = report.in_bits.first_within("cache", ADVISED)
    return [
        *(f"{x:.2f}" for x in shares),
        "none" if at is None else f"{report.in_bits.bits[at]:.3g}",
    ]


def attends(layer: Layer) -> str:
    """Say which tokens a token of a layer sees."""
    if layer.options.get("mask") is not None:
        return "its own mask"
    return "causal" if layer.options.get("is_causal") else "every token sees all"


def show(console: Console, title: str, reports: list[LayerReport], *, details: bool) -> None:
    """Print the verdict, then a table: of all layers or, of a single one, of the methods."""
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(*verdict(reports), sep="\n", markup=False, highlight=False)
    if any(report.is_held_out for report in reports):
        console.print(HELD_OUT, markup=False, highlight=False)
    if details:
        for report in reports:
            console.print(*tables(report))
            if len(reports) > 1:
                console.print(*advise(report), sep="\n", markup=False, highlight=False)
    elif len(reports) == 1:
        console.print(*tables(reports[0])[: 1 if reports[0].in_bits is None else 2])
    if len(reports) > 1:
        console.print(overview(reports))


def overview(reports: list[LayerReport]) -> Table:
    """All layers in one table."""
    table = Table(title="All layers", caption=OVERVIEW_CAPTION, caption_justify="left")
    for header in OVERVIEW_HEADERS:
        table.add_column(header, justify="left" if header == "layer" else "right", overflow="fold")
    for name, *cells in overview_rows(reports):
        table.add_row(escape(name), *cells)
    return table


def tables(report: LayerReport) -> list[Table]:
    """One table by method, one by bits where there are any, one by error, and one by head."""
    name = escape(report.layer.name)
    by_method = Table(
        title=f"{name}: rank that keeps the attention output within a tolerance",
        caption="K, V: bytes over exact, each head at the rank it needs",
        caption_justify="left",
    )
    kind = "held out, then in sample" if report.is_held_out else "in sample"
    by_error = Table(
        title=f"{name}: relative Frobenius error of the output, median and worst head, {kind}"
    )
    by_head = Table(
        title=f"{name}: heads",
        caption=f'Effective rank: exp of the entropy of the singular values. Rank needed by "{report.best}".',
        caption_justify="left",
    )
    by_bits = Table(title=f"{name}: bits", caption=BITS_CAPTION, caption_justify="left")
    columns = (
        (by_method, METHOD_HEADERS),
        (by_bits, BITS_HEADERS),
        (by_error, ["rank", *(f"{m}\n{which}" for m in METHODS for which in ("median", "worst"))]),
        (by_head, HEAD_HEADERS),
    )
    for table, headers in columns:
        for header in headers:
            table.add_column(header, justify="left" if header == "method" else "right")
    for row in methods_rows(report):
        by_method.add_row(*row)
    for row in bits_rows(report):
        by_bits.add_row(*row)
    for i, rank in enumerate(report.ranks):
        cells = [
            [f"{x:.2g}" for method in METHODS for x in _middle_and_worst(errors[method][i])]
            for errors in (report.errors, report.in_sample)[: 1 + report.is_held_out]
        ]
        by_error.add_row(str(rank), *("\n".join(cell) for cell in zip(*cells, strict=True)))
    for row in heads_rows(report):
        by_head.add_row(*row)
    return [by_method, *([by_bits] if by_bits.row_count else []), by_error, by_head]


def _middle_and_worst(errors: NDArray[np.float64]) -> tuple[float, float]:
    return float(np.quantile(errors, 0.5)), float(errors.max())


def to_json(reports: list[LayerReport], source: dict[str, Any]) -> str:
    """All numbers, unrounded; keys of tolerances are their decimal form."""
    content = {
        "slra": slra.__version__,
        "numpy": np.__version__,
        **source,
        "layers": [_layer(report) for report in reports],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _layer(report: LayerReport) -> dict[str, Any]:
    layer = report.layer
    return {
        "name": layer.name,
        "shapes": {name: getattr(layer, name).shape for name in "qkv"},
        "dtype": layer.dtype,
        "attends": attends(layer),
        "scale": layer.options.get("scale"),
        "softcap": layer.options.get("softcap"),
        "query_heads": report.query_heads,
        "key_heads": report.key_heads,
        "singular_values": {name: x.tolist() for name, x in report.spectra.items()},
        "effective_ranks": {name: x.tolist() for name, x in report.effective_ranks.items()},
        "ranks": report.ranks,
        "errors_are_held_out": report.is_held_out,
        "errors": {method: x.tolist() for method, x in report.errors.items()},
        "errors_in_sample": {method: x.tolist() for method, x in report.in_sample.items()},
        "needed_ranks": report.needed,
        "exact_bytes": report.exact_bytes,
        "bytes": report.kv_bytes,
        "best_method": report.best,
        "in_bits": None if report.in_bits is None else _bits(report, report.in_bits),
        "exact_seconds": report.exact_seconds,
        "timings": [timing._asdict() for timing in report.timings],
        "advice": advise(report),
    }


def _bits(report: LayerReport, found: InBits) -> dict[str, Any]:
    return {
        "bits": found.bits,
        "bits_taken": found.taken,
        "errors": {way: x.tolist() for way, x in found.errors.items()},
        "needed_bits": {
            way: {
                t: None if (at := found.first_within(way, t)) is None else found.bits[at]
                for t in TOLERANCES
            }
            for way in found.errors
        },
        "bytes": {
            way: {t: report.bytes_in_bits(way, t) for t in TOLERANCES} for way in found.errors
        },
        "map_bytes": found.map_bytes,
    }
