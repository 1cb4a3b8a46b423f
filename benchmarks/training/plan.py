"""Which runs the study is made of, and in which order."""

from typing import Any, NamedTuple

from benchmarks.training.settings import Method, Setting

N_SEEDS = 5

SETTINGS = {
    "mqar": Setting(
        task="mqar",
        length=64,
        n_tokens=66,
        n_classes=66,
        readout="each",
        is_causal=True,
        heads=1,
        has_mlp=False,
        steps=1000,
        batch=32,
        n_test=500,
        n_points=20,
        pairs=8,
        kernel=3,
        warm=0.6,
    ),
    "digits": Setting(
        task="digits",
        length=64,
        n_tokens=17,
        n_classes=10,
        readout="mean",
        is_causal=False,
        heads=2,
        has_mlp=True,
        steps=800,
        batch=32,
        n_test=360,
        n_points=20,
    ),
    "listops": Setting(
        task="listops",
        length=1000,
        n_tokens=16,
        n_classes=10,
        readout="first",
        is_causal=False,
        heads=2,
        has_mlp=True,
        steps=120,
        batch=8,
        n_test=200,
        n_points=4,
        n_train=1000,
        refit=10,
    ),
}
# Lambda of the two l1 forms, per task: tried on seeds from 100 on, which are not among those of the study.
THRESHOLD = {"mqar": 2.0, "digits": 1.0, "listops": 1.0}
PENALTY = {"mqar": 0.1, "digits": 0.1, "listops": 0.1}


def main_methods(task: str) -> list[Method]:
    """What the main table compares."""
    return [
        Method("exact", "exact"),
        Method("svd", "svd"),
        Method("output", "output"),
        Method("svd + l1 penalty", "svd", penalty=PENALTY[task]),
        Method("svd + l1 prox", "svd", threshold=THRESHOLD[task]),
        Method("favor", "favor"),
        Method("nystrom", "nystrom"),
    ]


SWEEP = [
    *(Method(f"prox {x:g}", "svd", threshold=x) for x in (0.5, 1.0, 4.0, 8.0, 16.0, 64.0)),
    *(Method(f"penalty {x:g}", "svd", penalty=x) for x in (0.01, 0.03, 0.3)),
]
BUDGET = [
    Method(f"{kind}, D/{cut}", kind, cut=cut)
    for cut in (8, 16, 32)
    for kind in ("svd", "output", "favor", "nystrom")
]
SCRATCH = [
    method._replace(name=f"{method.name}, no warm-up", warm=False)
    for method in main_methods("mqar")
    if method.kind != "exact"
]


def dynamic(task: str) -> list[Method]:
    """Ranks by tolerance, with the penalty off, rising and on at once."""
    base = Method("rtol 0.2", "output", rtol=0.2)
    penalty = PENALTY[task]
    return [
        base,
        base._replace(name="rtol 0.2, penalty ramped", penalty=penalty),
        base._replace(name="rtol 0.2, penalty at once", penalty=penalty, ramp=0.0),
        base._replace(name="rtol 0.05", rtol=0.05),
    ]


class Group(NamedTuple):
    """Runs of one task and seed, which share an exact warm-up."""

    part: str
    setting: Setting
    seed: int
    methods: list[Method]


def plan() -> list[Group]:
    """The whole study: what says most for its time comes first, should it be stopped."""
    seeds, mqar = range(N_SEEDS), SETTINGS["mqar"]

    def main(task: str, seed: int) -> Group:
        return Group("main", SETTINGS[task], seed, main_methods(task))

    def others(seed: int) -> list[Group]:
        return [
            Group("sweep", mqar, seed, SWEEP),
            Group("budget", mqar, seed, BUDGET),
            *(Group("dynamic", SETTINGS[task], seed, dynamic(task)) for task in ("mqar", "digits")),
        ]

    return [
        *(main(task, seed) for seed in seeds for task in ("mqar", "digits")),
        *others(0),
        Group("no warm-up", mqar, 0, SCRATCH),
        *(main("listops", seed) for seed in seeds),
        *others(1),
    ]


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
        *(Group("main", setting, 0, main_methods(task)) for task, setting in settings.items()),
        Group("sweep", mqar, 0, SWEEP[:1]),
        Group("budget", mqar, 0, BUDGET[:4]),
        Group("dynamic", mqar, 0, dynamic("mqar")),
        Group("no warm-up", mqar, 0, SCRATCH),
    ]
