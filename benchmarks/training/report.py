"""Results file and plots, from finished runs.

python -m benchmarks.training.report     the plots once more, from results/training.json
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS
from benchmarks.tables.training import select
from benchmarks.training.attend import n_baseline
from benchmarks.training.plan import SETTINGS, Group
from benchmarks.training.settings import Setting
from benchmarks.training.tasks import IGNORE

Run = dict[str, Any]


def summarise(runs: list[Run]) -> dict[str, Any]:
    """The results file: tasks, and each run without what follows from its task."""
    found = {run["task"]: Setting(**run["setting"]) for run in runs if run["part"] == "main"}
    tasks = {task: found[task] for task in SETTINGS if task in found}
    kept = []
    for run in runs:
        row = {name: x for name, x in run.items() if name != "setting"}
        row["stored"] = stored(run)
        if run["part"] == "main" and run["seed"] > 0:
            del row["curve"]
        kept.append(row)
    warm_ups = {(run["part"], run["task"], run["seed"]): run["warm_up_cpu_seconds"] for run in runs}
    trained = sum(run["cpu_seconds"] for run in runs)
    return {
        "cpu_seconds": round(trained + sum(warm_ups.values())),
        "tasks": {
            task: {**setting._asdict(), "trivial": trivial(setting)}
            for task, setting in tasks.items()
        },
        "runs": kept,
    }


def trivial(setting: Setting) -> float:
    """Accuracy of the most frequent answer of the test set, or of that for each first token where that is read."""
    tokens, targets = setting.test_set()
    parts = [targets[targets != IGNORE]]
    if setting.readout == "first":
        parts = [targets[tokens[:, 0] == first] for first in tokens[:, 0].unique()]
    return sum(int(part.bincount().max()) for part in parts) / sum(map(len, parts))


def stored(run: Run) -> float:
    """Numbers kept per key and head for K and V, a mean over layers; of thresholded ones, what is not 0."""
    setting, options = Setting(**run["setting"]), run["options"]
    width, kind = setting.head_width, options["kind"]
    if options["threshold"]:
        return round(
            float(np.mean([sum(1 - x[0] for x in layer[1:]) for layer in run["zeros"]])) * width, 1
        )
    if kind == "exact":
        return 2 * width
    if kind in ("favor", "nystrom"):
        m = n_baseline(kind, 2 * width // options["cut"], setting.length, width)
        return round(m * (width + 1 if kind == "favor" else 3 * width) / setting.length, 1)
    return round(float(np.mean(np.sum(run["ranks"], axis=-1))), 1)


def check(result: dict[str, Any], groups: list[Group]) -> None:
    """Raise ValueError unless every run is there once, and its numbers can be what they are said to be."""
    wanted = [
        (group.part, group.setting.task, method.name, group.seed)
        for group in groups
        for method in group.methods
    ]
    found = [(run["part"], run["task"], run["method"], run["seed"]) for run in result["runs"]]
    if sorted(wanted) != sorted(found):
        raise ValueError(f"runs missing or too many: {sorted(set(wanted) ^ set(found))}")
    for run in result["runs"]:
        shares = [run["accuracy"], *np.ravel(run.get("zeros", [])).tolist()]
        losses = [point["loss"] for point in run.get("curve", [])]
        if not all(0 <= x <= 1 for x in shares) or not all(map(math.isfinite, losses)):
            raise ValueError(f"impossible numbers in {run}")


def draw(result: dict[str, Any], folder: Path) -> None:
    """Accuracy against zeros, accuracy over training, and ranks over training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    draw_tradeoff(axes[0, 0], result)
    for (_, method), runs in select(result, "main", "mqar").items():
        curve = runs[0]["curve"]
        axes[0, 1].plot([p["step"] for p in curve], [p["accuracy"] for p in curve], label=method)
    axes[0, 1].set(title="MQAR, seed 0", xlabel="step", ylabel="accuracy")
    for axis, task in zip(axes[1], ("mqar", "digits"), strict=True):
        draw_ranks(axis, result, task)
    for axis in axes.flat:
        if axis.has_data():
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "training.png", dpi=90)
    plt.close(figure)


def draw_ranks(axis: Any, result: dict[str, Any], task: str) -> None:
    for number, ((_, method), runs) in enumerate(select(result, "dynamic", task).items()):
        curve = [point for point in runs[0]["curve"] if "rank_v" in point]
        steps = [point["step"] for point in curve]
        for name, line in (("rank_qk", "-"), ("rank_v", "--")):
            label = method if name == "rank_qk" else None
            axis.plot(steps, [p[name] for p in curve], line, color=f"C{number}", label=label)
    axis.set(title=f"{task}: mean rank of Q, K (solid) and V (dashed)", xlabel="step")


def draw_tradeoff(axis: Any, result: dict[str, Any]) -> None:
    runs = [
        run
        for part in ("sweep", "main")
        for chosen in select(result, part, "mqar").values()
        for run in chosen
    ]
    for form, which, label in (
        ("threshold", 0, "prox: zeros"),
        ("penalty", 0, "penalty: zeros"),
        ("penalty", 1, "penalty: below 1e-3 of the largest"),
    ):
        points = [
            (np.mean(run["zeros"], axis=(0, 1))[which], run["accuracy"])
            for run in runs
            if run["options"][form]
        ]
        axis.plot(*np.transpose(points), ".", label=label)
    axis.set(title="MQAR at rank D/4", xlabel="share of entries of Q^, K^, V^", ylabel="accuracy")


if __name__ == "__main__":
    draw(json.loads((RESULTS / "training.json").read_text()), RESULTS)
