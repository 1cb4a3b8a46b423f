"""The headline of docs/performance.md: what ``python -m slra bench`` measures, kept with the machine it ran on.

python -m benchmarks.headline     about a minute on two cores; writes results/headline.json
"""

from rich.console import Console

from benchmarks.common import save
from slra.cli.bench.command import run
from slra.cli.bench.output import show


def main() -> None:
    found = run(lambda: None)
    show(Console(), found)
    print(save("headline", {"comparisons": found["comparisons"]}))


if __name__ == "__main__":
    main()
