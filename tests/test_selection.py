"""What plain ``pytest`` leaves out: what is named is there, and each value of each parameter still comes up."""

from pathlib import Path
from types import SimpleNamespace

from tests import selection


def items(test, **parameters):
    """Stand-ins for the items of a test with all combinations of so many values."""
    combinations = [{}]
    for argument, n in parameters.items():
        combinations = [{**one, argument: i} for one in combinations for i in range(n)]
    return [
        SimpleNamespace(
            nodeid=f"tests/test_x.py::{test}[{'-'.join(map(str, indices.values()))}]",
            callspec=SimpleNamespace(indices=indices),
        )
        for indices in combinations
    ]


def test_what_is_left_out_is_there():
    folder = Path(__file__).parent
    for name, reason in selection.THOROUGH.items():
        file, _, test = name.partition("::")
        (path,) = folder.rglob(file)
        assert f"def {test}" in path.read_text(encoding="utf-8"), name
        assert reason


def test_each_value_of_each_parameter_comes_up():
    sizes = {"dtype": 4, "shape": 4, "rank": 3, "name": 14}
    kept = selection._mixed(items("test_never_wrong", **sizes))
    for argument, n in sizes.items():
        assert {item.callspec.indices[argument] for item in kept} == set(range(n))
    assert len(kept) <= sum(sizes.values())


def test_what_has_no_combinations_is_whole():
    everything = items("test_errors", case=30)
    assert len(selection._mixed(everything)) == 30
