"""Training with NumPy alone beside torch."""

from typing import Any

from benchmarks.markdown import scientific, table

COMPARED = ("numpy", "torch", "scikit-learn")


def tables(result: dict[str, Any]) -> dict[str, str]:
    rows = [
        (
            name.replace("low rank", f"rank {run['config']['rank']} of 8"),
            *(f"{run['accuracy'][library]:.1%}" for library in ("numpy", "torch")),
            scientific(run["loss_difference_first_50"]),
            scientific(run["loss_difference_all"]),
            ", ".join(f"{share:.0%}" for share in run["zeros"]),
        )
        for name, run in result["runs"].items()
    ]
    (steps,) = {run["steps"] for run in result["runs"].values()}
    head = ["model", "accuracy, NumPy", "accuracy, torch", "loss apart, 50 steps"]
    return {"runs": table([*head, f"loss apart, all {steps}", "zeros in Q^, K^, V^"], rows)}
