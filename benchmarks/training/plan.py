"""Which runs the study is made of, and in which order."""

from typing import Any, NamedTuple

from benchmarks.training.settings import Method, Setting

N_SEEDS = 5

SETTINGS = {
    "mqar": Setting(
        "mqar", 64, 66, 66, "each", True, 1, False, 1200, 64, 500, n_points=24, pairs=8, warm=2 / 3
    ),
    "digits": Setting("digits", 64, 17, 10, "mean", False, 2, True, 800, 32, 360, n_points=20),
    "listops": Setting(
        "listops",
        1000,
        17,
        10,
        "first",
        False,
        2,
        True,
        160,
        8,
        200,
        n_points=4,
        n_train=1000,
        refit=10,
    ),
}
THRESHOLD, PENALTY = 2.0, 0.1
MAIN = [
    Method("exact", "exact"),
    Method("svd", "svd"),
    Method("output", "output"),
    Method("svd + l1 penalty", "svd", penalty=PENALTY),
    Method("svd + l1 prox", "svd", threshold=THRESHOLD),
    Method("favor", "favor"),
    Method("nystrom", "nystrom"),
]
SWEEP = [
    *(Method(f"prox {x:g}", "svd", threshold=x) for x in (0.5, 1.0, 4.0, 8.0)),
    *(Method(f"penalty {x:g}", "svd", penalty=x) for x in (0.01, 0.03, 0.3)),
]
DYNAMIC = [
    Method("rtol 0.2", "output", rtol=0.2),
    Method("rtol 0.2, penalty ramped", "output", rtol=0.2, penalty=PENALTY),
    Method("rtol 0.2, penalty at once", "output", rtol=0.2, penalty=PENALTY, ramp=0.0),
    Method("rtol 0.05", "output", rtol=0.05),
]
SCRATCH = [m._replace(name=f"{m.name}, no warm-up", warm=False) for m in MAIN if m.kind != "exact"]


class Group(NamedTuple):
    """Runs of one task and seed, which share an exact warm-up."""

    part: str
    setting: Setting
    seed: int
    methods: list[Method]


def plan() -> list[Group]:
    """The whole study, seed by seed; the parts beyond the main table after its third seed."""
    groups = []
    for seed in range(N_SEEDS):
        groups += [
            Group("main", SETTINGS[task], seed, MAIN) for task in ("listops", "mqar", "digits")
        ]
        if seed == 2:
            for other in (0, 1):
                groups.append(Group("sweep", SETTINGS["mqar"], other, SWEEP))
                groups.append(Group("dynamic", SETTINGS["digits"], other, DYNAMIC))
                groups.append(Group("dynamic", SETTINGS["mqar"], other, DYNAMIC))
            groups.append(Group("no warm-up", SETTINGS["mqar"], 0, SCRATCH))
    return groups


def quick_plan() -> list[Group]:
    """Every method, on small versions of the tasks, for a few steps."""
    small: dict[str, dict[str, Any]] = {
        "mqar": {"length": 32, "n_tokens": 34, "pairs": 4, "steps": 30, "n_test": 50},
        "digits": {"steps": 16, "n_test": 60},
        "listops": {"length": 100, "steps": 6, "batch": 4, "n_test": 20, "n_train": 40},
    }
    settings = {
        task: SETTINGS[task]._replace(width=32, n_points=2, refit=2, **changes)
        for task, changes in small.items()
    }
    settings["mqar"] = settings["mqar"]._replace(n_classes=34)
    mqar = settings["mqar"]
    return [
        *(Group("main", setting, 0, MAIN) for setting in settings.values()),
        Group("sweep", mqar, 0, SWEEP[:1]),
        Group("dynamic", mqar, 0, DYNAMIC),
        Group("no warm-up", mqar, 0, SCRATCH),
    ]
