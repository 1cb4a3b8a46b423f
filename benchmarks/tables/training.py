"""The training study."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.markdown import table

COMPARED = ("torch", "numpy", "scikit-learn")
Run = dict[str, Any]


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


def tables(result: dict[str, Any]) -> dict[str, str]:
    return {
        "main": main_table(result),
        "budget": budget_table(result),
        "sweep": sweep_table(result),
        "dynamic": dynamic_table(result),
        "untrained": untrained_table(result),
        "no_warm_up": no_warm_up_table(result),
    }


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    mqar = {method: runs for (_, method), runs in select(result, "main", "mqar").items()}
    accuracy = {
        method: float(np.mean([run["accuracy"] for run in runs])) for method, runs in mqar.items()
    }
    shares = np.asarray([run["zeros"] for run in mqar["svd + l1 prox"]])[..., 0]
    first, second = shares.mean(axis=(0, 2))
    baselines = [accuracy["favor"], accuracy["nystrom"]]
    lost = sorted(100 * (accuracy["exact"] - one) for one in baselines)
    slow = {
        name: cpu_ratios(result, methods)
        for name, methods in (
            ("low rank", ("svd", "output")),
            ("penalty", ("svd + l1 penalty",)),
            ("threshold", ("svd + l1 prox",)),
            ("baselines", ("favor", "nystrom")),
        )
    }
    minutes = result["cpu_seconds"] / 60
    return {
        "README.md": [
            f"with {shares.mean():.0%} of the entries of Q, K and V exactly zero",
            f"as with exact attention ({accuracy['exact']:.1%}), where random features and landmarks that may store as "
            f"much reach {baselines[0]:.0%} and {baselines[1]:.0%}",
        ],
        "docs/does_it_work.md": [
            f"all {len(result['runs'])} runs took {minutes:.0f} minutes of processor time",
            f"in the first layer {first:.0%}, in the second {second:.0%}",
            f"lose {lost[0]:.0f} to {lost[1]:.0f} points",
            f"is {slow['low rank']} times for low rank, {slow['penalty']} with the penalty, and {slow['threshold']} "
            f"with the threshold, which attends in all D dimensions (baselines: {slow['baselines']})",
        ],
        "docs/performance.md": [f"{slow['low rank']} times the processor time of exact attention"],
    }


def cpu_ratios(result: dict[str, Any], methods: tuple[str, ...]) -> str:
    """Processor time after the warm-up over that of exact attention, smallest and largest of the tasks."""
    selected = select(result, "main")
    seconds = {key: sum(run["cpu_seconds"] for run in runs) for key, runs in selected.items()}
    found = [
        seconds[task, method] / seconds[task, "exact"]
        for task, method in selected
        if method in methods
    ]
    return f"{min(found):.1f} to {max(found):.1f}"
