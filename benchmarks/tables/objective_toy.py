"""The two forms of the objective on a convex toy."""

from typing import Any

from benchmarks.markdown import significant, table

NAMES = {
    "prox, step 1/L": "prox, 1/L",
    "penalty, a step for each entry": "penalty, a step for each entry",
    "penalty, one step found by backtracking": "penalty, one step found by backtracking",
    "penalty, diminishing step": "penalty, diminishing step 2/(k+2)",
    "penalty, diminishing step, 100 times as long": "the same, 40000 iterations",
}


def tables(result: dict[str, Any]) -> dict[str, str]:
    forms = result["forms"]
    rows = [
        (name, form["rises"], _gap(form["gap"]), form["zeros"], form["below_1e-6"])
        for name, form in ((name, forms[key]) for key, name in NAMES.items())
    ]
    head = ["form, step", "rises", "gap to the minimum", "exact zeros", "others below 1e-6"]
    return {"forms": table(head, rows)}


def _gap(gap: float) -> str:
    return significant(gap) if gap >= 0.01 else significant(gap, 1)


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    prox = result["forms"]["prox, step 1/L"]
    said = f"{prox['iterations']} iterations, {prox['zeros']} of {result['entries']} entries of the minimiser zero"
    return {"docs/objective.md": [said]}
