"""How well it is tested: lines that the tests run, and mutants of the code that they kill.

python -m benchmarks.testing            mutants that have not been tried yet, then what is known of both
python -m benchmarks.testing --collect  what is known only

The mutants are those of mutmut, tried as [tool.mutmut] in pyproject.toml says, in the folder ``mutants``. Why one that
no test kills is let live is in ``benchmarks/mutants.toml``. The lines are those that ``coverage combine`` left in
``.coverage``. All mutants together take about two hours.
"""

import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter, defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.common import save

ROOT = Path(__file__).parent.parent
# What mutmut keeps of a mutant: the exit status of its tests, or that they ran out of time.
KILLED, TIMED_OUT, SURVIVED = (1, 3), (-24, 36, 24, 152), (0,)
KINDS = ("equivalent", "cost", "limit", "message", "elsewhere")


def change(key: str, path: Path) -> tuple[str, str]:
    """Say what a mutant puts in the place of what."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    lines = get_diff_for_mutant(key, path=path).splitlines()
    removed, added = (
        " ".join(line[1:].strip() for line in lines if re.match(rf"\{sign}(?!\{sign})", line))
        for sign in "-+"
    )
    return removed, added


def function_of(key: str) -> str:
    """Name of the function that a mutant belongs to: ``Class.method`` or ``function``."""
    name = key.rpartition(".")[2].rpartition("__mutmut_")[0]
    return name.removeprefix("xǁ").replace("ǁ", ".") if "ǁ" in name else name.removeprefix("x_")


def reason(
    where: str, removed: str, added: str, reasons: list[dict[str, Any]]
) -> tuple[str, str] | None:
    """Find why a mutant is let live: its kind, and a sentence."""
    for one in reasons:
        for pattern in one["mutants"]:
            place, _, text = pattern.partition(": ")
            fits = re.fullmatch(place.replace(".", r"\.").replace("*", ".*"), where)
            if fits and (text in added or text == "-" + removed):
                return one["kind"], one["why"]
    return None


def mutation() -> dict[str, Any]:
    """Count mutants by file, and list those that live."""
    reasons = tomllib.loads((ROOT / "benchmarks" / "mutants.toml").read_text())["reason"]
    assert {one["kind"] for one in reasons} <= set(KINDS)
    files: dict[str, Any] = {}
    living: dict[str, list[dict[str, str]]] = defaultdict(list)
    for meta in sorted((ROOT / "mutants" / "slra").glob("*/*.py.meta")):
        path = meta.relative_to(ROOT / "mutants").with_suffix("")
        outcomes = json.loads(meta.read_text())["exit_code_by_key"]
        if not outcomes:
            continue
        counts: Counter[str] = Counter(mutants=len(outcomes))
        for key, outcome in outcomes.items():
            counts["killed"] += outcome in KILLED
            counts["tried"] += outcome in (*KILLED, *TIMED_OUT, *SURVIVED)
            if outcome not in (*SURVIVED, *TIMED_OUT):
                continue
            removed, added = change(key, path)
            where = f"{path.parent.name}.{path.stem}.{function_of(key)}"
            found = reason(where, removed, added, reasons)
            # One that nothing can kill may run out of time too, on a machine that is busy.
            if found is None and outcome in TIMED_OUT:
                counts["timed out"] += 1
                continue
            kind, why = found or ("unexplained", "")
            counts[kind] += 1
            living[str(path)].append(
                {
                    "function": function_of(key),
                    "was": removed,
                    "is": added,
                    "kind": kind,
                    "why": why,
                }
            )
        names = ("mutants", "tried", "killed", "timed out", *KINDS, "unexplained")
        files[str(path)] = {name: counts[name] for name in names}
    total = {name: sum(counts[name] for counts in files.values()) for name in names}
    return {
        "mutmut": metadata.version("mutmut"),
        "files": files,
        "total": total,
        "living": living,
    }


def coverage() -> dict[str, Any]:
    """Count lines by package, from what `coverage` has kept."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coverage.json"
        command = [sys.executable, "-m", "coverage", "json", "-q", "-o", str(path)]
        subprocess.run(command, cwd=ROOT, check=True)
        found = json.loads(path.read_text())
    packages: dict[str, Counter[str]] = defaultdict(Counter)
    for name, one in found["files"].items():
        package = Path(name).parts[1] if len(Path(name).parts) > 2 else "slra"
        packages[package]["lines"] += one["summary"]["num_statements"]
        packages[package]["run"] += one["summary"]["covered_lines"]
    totals = found["totals"]
    return {
        "coverage": metadata.version("coverage"),
        "packages": {name: dict(packages[name]) for name in sorted(packages)},
        "total": {"lines": totals["num_statements"], "run": totals["covered_lines"]},
        "not run": {
            name: one["missing_lines"]
            for name, one in found["files"].items()
            if one["missing_lines"]
        },
    }


def overhead() -> float:
    """CPU time of some tests while lines are counted, over that without; medians of three in turn."""
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_prox.py", "-k", "numpy"]
    times: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        counted = ["-m", "coverage", "run", f"--data-file={folder}/data"]
        for _ in range(3):
            for is_counted, taken in times.items():
                before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
                command = [sys.executable, *(counted if is_counted else []), *tests]
                subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                taken.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    return statistics.median(times[True]) / statistics.median(times[False])


def main() -> None:
    """Try mutants, collect, and print a table."""
    if "--collect" not in sys.argv[1:]:
        subprocess.run(["mutmut", "run", "--max-children", "1"], cwd=ROOT, check=True)
    result = {"coverage": coverage() | {"overhead": overhead()}, "mutation": mutation()}
    for path, counts in result["mutation"]["files"].items():
        print(f"{path:28}", *(f"{name} {n}" for name, n in counts.items() if n))
    lines = result["coverage"]["total"]
    print(f"{lines['run']} of {lines['lines']} lines run")
    save("testing", result)


if __name__ == "__main__":
    main()
