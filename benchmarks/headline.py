"""The headline of docs/performance.md: what ``python -m slra bench`` measures, kept with the machine it ran on.

python -m benchmarks.headline     about a minute on two cores; writes results/headline.json
"""

from rich.console import Console

from benchmarks.common import save
from slra.cli.bench.command import run


def main() -> None:
    comparisons = run(Console(), lambda: None)["comparisons"]
    print(save("headline", {"comparisons": comparisons}))


if __name__ == "__main__":
    main()
