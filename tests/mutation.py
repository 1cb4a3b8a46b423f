"""Plugin for mutation testing: few backends and fewer parameters, so that a mutant that nothing kills costs seconds."""

import sys
from collections import Counter
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

import pytest
from hypothesis import Phase, settings

# NumPy for the values; the strict library for its second device and its rules; Dask for what runs lazily.
KEPT = ("numpy", "array-api-strict", "dask")
HIDDEN = ("cupy", "jax", "torch")
# Of a decomposition's test with many parameters one in so many is run: prime, and so a mix of all of them.
MANY, STEP = 60, 29


class Finder(PathFinder):
    """The finder of installed modules, less the hidden ones."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder

from tests.backends import BACKENDS  # noqa: E402

for backend in set(BACKENDS) - set(KEPT):
    del BACKENDS[backend]


# One example that fails is enough: the smallest need not be looked for.
settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutation")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Thin what has many parameters, unless tests are asked for by name."""
    if any("[" in argument for argument in config.args):
        return
    tests = [item.nodeid.partition("[")[0] for item in items]
    total, seen = Counter(tests), Counter[str]()
    kept = []
    for item, test in zip(items, tests, strict=True):
        if total[test] < MANY or "test_svd" not in test or seen[test] % STEP == 0:
            kept.append(item)
        seen[test] += 1
    items[:] = kept
