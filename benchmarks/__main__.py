"""All benchmarks under one roof.

python -m benchmarks                     what there is, and when it last ran
python -m benchmarks run NAME...
python -m benchmarks tables [--check]    the tables of README.md and docs/, from benchmarks/results/*.json
"""

import argparse
import ast
import subprocess
import sys
from pathlib import Path

from benchmarks import pages


def topics() -> dict[str, str]:
    """First lines of all modules with a ``main``, by name; nothing is imported, so nothing need be installed."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        tree = ast.parse(path.read_text())
        if any(isinstance(one, ast.FunctionDef) and one.name == "main" for one in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def listing() -> int:
    kept = pages.results()
    for name, what in topics().items():
        date = kept[name]["machine"]["date"] if name in kept else "no results"
        print(f"{name:15} {date:11} {what}")
    return 0


def run(names: list[str]) -> int:
    """Run one after the other, each in a process of its own, whatever became of those before."""
    if unknown := set(names) - set(topics()):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(topics())}")
    codes = {}
    for name in names:
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        codes[name] = subprocess.run(command, cwd=pages.ROOT).returncode
    print(*(f"{name}: {f'exit status {code}' if code else 'done'}" for name, code in codes.items()))
    return int(any(codes.values()))


def tables(*, check: bool) -> int:
    found = pages.results()
    for name, path in ({} if check else pages.pages()).items():
        before = path.read_text()
        if (after := pages.fill(before, found)) != before:
            path.write_text(after)
            print(f"written: {name}")
    wrong = pages.problems()
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return int(bool(wrong))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("run", help="run some").add_argument("names", nargs="+", metavar="NAME")
    written = commands.add_parser("tables", help="write the tables of the pages from the results")
    written.add_argument("--check", action="store_true", help="write nothing; fail if one differs")
    given = parser.parse_args(arguments)
    if given.command == "run":
        return run(given.names)
    return tables(check=given.check) if given.command == "tables" else listing()


if __name__ == "__main__":
    sys.exit(main())
