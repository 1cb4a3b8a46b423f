"""Time of the import."""

from typing import Any

from benchmarks.markdown import duration, significant

COMPARED = ("numpy", "scipy")


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    seconds = result["seconds_without_interpreter"]
    return {
        "docs/performance.md": [
            f"`import slra` takes {duration(seconds['slra'])}, of which NumPy is {duration(seconds['numpy'])}: "
            f"{significant(result['slra_over_scipy_linalg'])} of what `import scipy.linalg` takes"
        ]
    }
