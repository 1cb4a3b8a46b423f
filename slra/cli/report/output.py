"""The report as tables for the terminal and as JSON."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

import slra
from slra.cli.demo import METHODS
from slra.cli.report.advice import advise
from slra.cli.report.measure import TOLERANCES, LayerReport

__all__ = ["heads_rows", "methods_rows", "tables", "to_json"]


def methods_rows(report: LayerReport) -> list[list[str]]:
    """Return method, tolerance, median and largest rank needed, bytes of K and V over exact."""
    rows = []
    for method in METHODS:
        for tolerance in TOLERANCES:
            needed = report.needed[method][tolerance]
            found = [np.inf if rank is None else rank for rank in needed]
            stored = report.kv_bytes[method][tolerance] / report.exact_bytes
            middle, worst = float(np.quantile(found, 0.5, method="lower")), max(found)
            rows.append([method, f"{tolerance:.0%}", _rank(middle), _rank(worst), f"{stored:.2f}"])
    return rows


def heads_rows(report: LayerReport) -> list[list[str]]:
    """Return head, effective ranks of Q, K and V, and the rank it needs for each tolerance by the best method."""
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


def tables(report: LayerReport) -> list[Table]:
    """One table by method, one by error, and one by head."""
    name = report.layer.name
    by_method = Table(
        title=f"{name}: rank that keeps the attention output within a tolerance",
        caption="K, V: bytes over exact, each head at the rank it needs",
        caption_justify="left",
    )
    by_error = Table(title=f"{name}: relative Frobenius error of the output, median and worst head")
    by_head = Table(
        title=f"{name}: heads",
        caption=f'Effective rank: exp of the entropy of the singular values. Rank needed by "{report.best}".',
        caption_justify="left",
    )
    limits = [f"{t:.0%}" for t in TOLERANCES]
    columns = (
        (by_method, ["method", "within", "rank\nmedian", "rank\nlargest", "K, V\n/ exact"]),
        (by_error, ["rank", *(f"{m}\n{which}" for m in METHODS for which in ("median", "worst"))]),
        (by_head, ["head", *(f"eff. rank\n{x}" for x in "QKV"), *(f"rank\n{x}" for x in limits)]),
    )
    for table, headers in columns:
        for header in headers:
            table.add_column(header, justify="left" if header == "method" else "right")
    for row in methods_rows(report):
        by_method.add_row(*row)
    for i, rank in enumerate(report.ranks):
        found = [report.errors[method][i] for method in METHODS]
        by_error.add_row(
            str(rank), *(f"{x:.2g}" for e in found for x in (np.quantile(e, 0.5), e.max()))
        )
    for row in heads_rows(report):
        by_head.add_row(*row)
    return [by_method, by_error, by_head]


def to_json(reports: list[LayerReport], files: list[Path], options: dict[str, Any]) -> str:
    """All numbers, unrounded; keys of tolerances are their decimal form."""
    content = {
        "slra": slra.__version__,
        "numpy": np.__version__,
        "files": list(map(str, files)),
        **options,
        "layers": [_layer(report) for report in reports],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _layer(report: LayerReport) -> dict[str, Any]:
    layer = report.layer
    return {
        "name": layer.name,
        "shapes": {name: getattr(layer, name).shape for name in "qkv"},
        "dtype": layer.dtype,
        "query_heads": report.query_heads,
        "key_heads": report.key_heads,
        "singular_values": {name: x.tolist() for name, x in report.spectra.items()},
        "effective_ranks": {name: x.tolist() for name, x in report.effective_ranks.items()},
        "ranks": report.ranks,
        "errors": {method: x.tolist() for method, x in report.errors.items()},
        "needed_ranks": report.needed,
        "exact_bytes": report.exact_bytes,
        "bytes": report.kv_bytes,
        "best_method": report.best,
        "exact_seconds": report.exact_seconds,
        "timings": [timing._asdict() for timing in report.timings],
        "advice": advise(report),
    }
