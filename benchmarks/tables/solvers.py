"""Solvers beside specialists, and candidates for the default of `proximal_gradient`."""

from typing import Any

from benchmarks.markdown import significant, table

COMPARED = ("numpy", "scipy", "scikit-learn")
OURS = ("slra", "adaPG", "FISTA, two gradients")


def tables(result: dict[str, Any]) -> dict[str, str]:
    specialists, candidates = [], []
    for name, methods in result["problems"].items():
        own = methods["slra"]["ms"]
        others = {
            other: f"{significant(own / one['ms'])} times"
            for other, one in methods.items()
            if other not in OURS
        }
        shown = ", ".join(f"{other}: {times}" for other, times in others.items())
        specialists.append((name, str(methods["slra"]["gradients"]), shown))
        counts = [str(methods[one]["gradients"]) if one in methods else "-" for one in OURS]
        candidates.append((name, *counts))
    gaps = [
        (name, str(one["steps"]), f"{one['gap']:.1e}", str(one["steps to 1e-4"]))
        for name, one in result["gaps"].items()
    ]
    return {
        "gaps": table(
            ["lasso: size, correlation, weight", "steps, default `tol`", "gap", "steps to 1e-4"],
            gaps,
        ),
        "specialists": table(
            ["problem", "gradients", "time of `proximal_gradient` over that of"], specialists
        ),
        "candidates": table(
            ["gradients to the same objective", "the default", "adaPG", "FISTA, two gradients"],
            candidates,
        ),
    }


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    return {}
