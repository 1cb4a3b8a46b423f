"""Train every method on every task.

    python -m benchmarks.training            about half an hour on two cores; writes results/training.json and plots
    python -m benchmarks.training --quick    small versions of all of it, checked and thrown away
    python -m benchmarks.training.report     the plots once more, from results/training.json

Each finished run is a file in ``--runs``; a study that was stopped goes on where it was.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from benchmarks.common import RESULTS, save
from benchmarks.tables.training import main_table
from benchmarks.training import report
from benchmarks.training.plan import plan, quick_plan
from benchmarks.training.runs import collect, run_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small versions, nothing is kept")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=RESULTS / "training_runs")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            groups, runs = quick_plan(), Path(folder)
            run_all(groups, runs, arguments.workers)
            result = report.summarise(collect(groups, runs))
            report.check(result, groups)
            report.draw(result, runs)
        print(main_table(result))
        print(f"form of the results is right; {time.perf_counter() - start:.0f} s")
        return
    groups = plan()
    run_all(groups, arguments.runs, arguments.workers)
    result = report.summarise(collect(groups, arguments.runs))
    report.check(result, groups)
    path = save("training", result)
    report.draw(json.loads(path.read_text()), RESULTS)
    print(f"{path}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
