"""Results file, tables of the docs page and plots, from finished runs.

python -m benchmarks.training.report     from results/training.json, as it is
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS
from benchmarks.training.attend import n_baseline
from benchmarks.training.plan import SETTINGS, Group
from benchmarks.training.settings import Setting
from benchmarks.training.tasks import IGNORE

DOCS = Path(__file__).parents[2] / "docs" / "does_it_work.md"
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


def select(
    result: dict[str, Any], part: str, task: str | None = None
) -> dict[tuple[str, str], list[Run]]:
    """Runs of a part by task and method, in the order they were planned in."""
    chosen: dict[tuple[str, str], list[Run]] = {}
    for run in result["runs"]:
        if run["part"] == part and task in (None, run["task"]):
            chosen.setdefault((run["task"], run["method"]), []).append(run)
    return chosen


def spread(values: Iterable[float]) -> str:
    """Mean and sample standard deviation, in percent."""
    x = 100 * np.asarray(list(values))
    return f"{x.mean():.1f} ± {x.std(ddof=1):.1f}" if len(x) > 1 else f"{x.mean():.1f}"


def table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def zeros(runs: list[Run], which: int | None = 0) -> str:
    """Mean share over runs, layers and arrays, and the smallest of any array and run; None: off the filler of MQAR."""
    forms = ("threshold",) if which is None else ("threshold", "penalty")
    if not any(run["options"][form] for run in runs for form in forms):
        return ""
    if which is None:
        x = 100 * np.asarray([run["zeros_off_filler"] for run in runs])
    else:
        x = 100 * np.asarray([run["zeros"] for run in runs])[..., which]
    return f"{x.mean():.1f} ({x.min():.1f})"


def main_table(result: dict[str, Any]) -> str:
    selected = select(result, "main")
    exact = {
        (task, run["seed"]): run["accuracy"]
        for (task, method), runs in selected.items()
        if method == "exact"
        for run in runs
    }
    rows = []
    for task, setting in result["tasks"].items():
        for (of, method), runs in selected.items():
            if of == task:
                kept = np.mean([run["stored"] for run in runs])
                ratio = [run["accuracy"] / exact[task, run["seed"]] for run in runs]
                rows.append(
                    (
                        task,
                        method,
                        f"{kept:.3g}",
                        spread(run["accuracy"] for run in runs),
                        spread(ratio),
                        zeros(runs),
                        zeros(runs, None) if task == "mqar" else "",
                        len(runs),
                    )
                )
        by = " by root operator" if task == "listops" else ""
        rows.append(
            (task, f"most frequent answer{by}", "", f"{100 * setting['trivial']:.1f}", *[""] * 4)
        )
    head = ["task", "method", "stored", "accuracy, %", "of exact, %", "zeros, %"]
    head += ["zeros off filler, %", "seeds"]
    return table(head, rows)


def sweep_table(result: dict[str, Any]) -> str:
    chosen = select(result, "sweep", "mqar")
    for key, runs in select(result, "main", "mqar").items():
        seeds = {run["seed"] for other in chosen.values() for run in other}
        if any(runs[0]["options"][name] for name in ("threshold", "penalty")):
            chosen[key] = [run for run in runs if run["seed"] in seeds]
    rows = []
    for form in ("threshold", "penalty"):
        of_form = [runs for runs in chosen.values() if runs and runs[0]["options"][form]]
        of_form.sort(key=lambda runs: runs[0]["options"][form])
        rows += [
            (
                form,
                runs[0]["options"][form],
                spread(run["accuracy"] for run in runs),
                *(zeros(runs, which) for which in range(3)),
                len(runs),
            )
            for runs in of_form
        ]
    head = [
        "form",
        "lambda",
        "accuracy, %",
        "zeros, %",
        "below 1e-3 of the largest, %",
        "zero columns, %",
        "seeds",
    ]
    return table(head, rows)


def budget_table(result: dict[str, Any]) -> str:
    """Accuracy by rank and method; the rank D/4 is that of the main table, on the same seeds."""
    runs = [run for some in select(result, "budget", "mqar").values() for run in some]
    kinds = list(dict.fromkeys(run["options"]["kind"] for run in runs))
    seeds = {run["seed"] for run in runs}
    runs += [
        run
        for kind in kinds
        for run in select(result, "main", "mqar").get(("mqar", kind), [])
        if run["seed"] in seeds
    ]
    width = result["tasks"]["mqar"]["width"] // result["tasks"]["mqar"]["heads"]
    rows = []
    for cut in sorted({run["options"]["cut"] for run in runs}):
        by_kind = [
            [run for run in runs if (run["options"]["cut"], run["options"]["kind"]) == (cut, kind)]
            for kind in kinds
        ]
        accuracies = (spread(run["accuracy"] for run in some) for some in by_kind)
        rows.append((width // cut, 2 * width // cut, *accuracies, len(seeds)))
    return table(["rank", "stored", *kinds, "seeds"], rows)


def dynamic_table(result: dict[str, Any]) -> str:
    rows = []
    for (task, method), runs in select(result, "dynamic").items():
        ranks = np.mean([np.mean(run["ranks"], axis=(0, 1)) for run in runs], axis=0)
        width = result["tasks"][task]["width"] // result["tasks"][task]["heads"]
        per_head = ", ".join(f"{qk}/{v}" for layer in runs[0]["ranks"] for qk, v in layer)
        rows.append(
            (
                task,
                method,
                spread(run["accuracy"] for run in runs),
                f"{ranks[0]:.1f} and {ranks[1]:.1f} of {width}",
                per_head,
                len(runs),
            )
        )
    head = [
        "task",
        "method",
        "accuracy, %",
        "mean rank of Q, K and of V",
        "by head, first seed",
        "seeds",
    ]
    return table(head, rows)


def untrained_table(result: dict[str, Any]) -> str:
    """Exact models, approximated only once they are trained."""
    rows = []
    for (task, _), runs in select(result, "main").items():
        for cut in zip(*(run.get("untrained", []) for run in runs), strict=True):
            ranks = np.mean([np.mean(one["ranks"], axis=(0, 1)) for one in cut], axis=0)
            rule = f"rtol {cut[0]['rtol']}" if cut[0]["rtol"] else "rank D/4"
            rows.append(
                (
                    task,
                    cut[0]["kind"],
                    rule,
                    spread(one["accuracy"] for one in cut),
                    f"{ranks[0]:.1f} and {ranks[1]:.1f}",
                )
            )
    head = ["task", "method", "rule", "accuracy, %", "mean rank of Q, K and of V"]
    return table(head, rows)


def no_warm_up_table(result: dict[str, Any]) -> str:
    rows = [
        (task, method.partition(",")[0], spread(run["accuracy"] for run in runs), len(runs))
        for (task, method), runs in select(result, "no warm-up").items()
    ]
    return table(["task", "method", "accuracy, %", "seeds"], rows)


TABLES = {
    "main": main_table,
    "budget": budget_table,
    "sweep": sweep_table,
    "dynamic": dynamic_table,
    "untrained": untrained_table,
    "no warm-up": no_warm_up_table,
}


def fill(text: str, result: dict[str, Any]) -> str:
    """Put the tables between their marks."""
    for name, make in TABLES.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{make(result)}\n{end}{after}"
    return text


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


def write_docs(result: dict[str, Any]) -> None:
    draw(result, RESULTS)
    DOCS.write_text(fill(DOCS.read_text(), result))


if __name__ == "__main__":
    write_docs(json.loads((RESULTS / "training.json").read_text()))
