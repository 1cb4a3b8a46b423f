"""This Python as a user would run it: a process of its own, from another directory."""

import os
import subprocess
import sys
from pathlib import Path

import slra


def environment(**changed: str) -> dict[str, str]:
    """Variables under which this slra is found, whatever the directory."""
    given = changed.pop("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    path = os.pathsep.join([str(Path(slra.__file__).parents[1]), given])
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "100", "PYTHONUTF8": "1"} | changed


def run_python(*args: str, cwd: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    """Run to the end and keep what is printed."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=environment(**changed),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def hide(package: str, folder: Path) -> None:
    """Write what makes a package look uninstalled to a Python that has the folder on its path."""
    (folder / "sitecustomize.py").write_text(
        f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""
    )
