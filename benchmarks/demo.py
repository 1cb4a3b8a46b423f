"""The README's table and picture: what ``python -m slra demo`` measures, kept with the machine it ran on.

python -m benchmarks.demo     about five seconds; writes results/demo.json and docs/_static/demo.png
"""

from pathlib import Path

from benchmarks.common import save
from slra.cli.backends import open_backend
from slra.cli.demo import compare
from slra.cli.plots import draw
from slra.cli.plots import save as save_picture
from slra.data import load_sample

PICTURE = Path(__file__).parents[1] / "docs" / "_static" / "demo.png"


def main() -> None:
    sample = load_sample()
    comparison = compare(open_backend("numpy"), sample, lambda: None)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    save_picture(draw(sample, comparison), PICTURE)
    rows = [
        {
            "method": row.method,
            "rank": row.rank,
            "relative_error_per_head": row.errors.tolist(),
            "bytes": row.kv_bytes,
            "seconds": row.seconds,
        }
        for row in comparison.rows
    ]
    exact = {"bytes": comparison.exact_kv_bytes, "seconds": comparison.exact_seconds}
    print(save("demo", {"shape": comparison.shape, "exact": exact, "rows": rows}), PICTURE)


if __name__ == "__main__":
    main()
