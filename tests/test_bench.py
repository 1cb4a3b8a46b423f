"""The bench command: what it compares, what it says of what is missing, and that its answers are right."""

import json
import re
from functools import partial

import numpy as np
import pytest

pytest.importorskip("typer", reason="the demo extra is not installed")

from rich.console import Console
from typer.testing import CliRunner

from slra.cli import timing
from slra.cli.app import app
from slra.cli.bench import comparisons, problems
from slra.cli.bench.output import about_machine, record, table

TINY = {
    "svd": partial(comparisons.svd, 60, 40, 5),
    "batched_svd": partial(comparisons.batched_svd, (3, 40, 20), 4),
    "soft_threshold": partial(comparisons.soft_threshold, 1000),
    "nuclear": partial(comparisons.nuclear, 60, 40, 3),
    "exact_attention": partial(comparisons.exact_attention, 300, 2, 16),
    "low_rank_attention": partial(comparisons.low_rank_attention, 300, 2, 16, 4),
}
# Functions that approximate; all others are right to rounding.
ROUGH = ("randomized_svd", "svd_lowrank", "low_rank_attention", "the same, basis fitted before")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(comparisons, "COMPARISONS", tuple(TINY.values()))
    monkeypatch.setattr(comparisons, "N_ROUNDS", 1)


def test_every_comparison_has_a_small_version():
    assert [make.func for make in TINY.values()] == list(comparisons.COMPARISONS)


@pytest.mark.parametrize("name", TINY)
def test_comparisons_are_of_right_answers(name, tiny):
    rounds = []
    comparison = TINY[name]()
    rows = comparisons.measure(comparison, lambda: rounds.append(1))
    assert len(rounds) == 2
    assert rows[0].name.startswith("slra.")
    for row in rows:
        if not row.seconds:
            continue
        assert row.median > 0
        assert row.error < (0.9 if any(name in row.name for name in ROUGH) else 1e-5), row


def test_what_is_not_installed_is_said(tiny, monkeypatch):
    monkeypatch.setattr(comparisons, "_installed", lambda module: None)
    for make in TINY.values():
        calls = make().calls
        others = [name for name in calls if re.search("torch|scikit-learn|pyproximal", name)]
        assert [name for name, call in calls.items() if call is None] == others
    comparison = TINY["batched_svd"]()
    rows = comparisons.measure(comparison)
    missing = [row.name for row in rows if row.median is None]
    assert missing == list(comparison.calls)[2:]
    console = Console(width=120)
    with console.capture() as shown:
        console.print(table(record(comparison, rows)))
    assert shown.get().count("not installed") == len(missing)


def test_a_wrong_answer_shows():
    # Off by one part in a hundred: in singular values, and in the worst of two heads.
    assert problems.sigma_error(np.asarray([1.0, 0.505]), np.asarray([1.0, 0.5])) == pytest.approx(
        0.01
    )
    comparison = TINY["exact_attention"]()
    out = comparison.calls["the formula, numpy, in place"]()
    out[1] *= 1.01
    assert comparison.error(out) == pytest.approx(0.01, rel=1e-3)


def test_problems_are_as_stated():
    U, sigma, Vh = problems.matrix_with(1 / np.arange(1.0, 21), 50)
    found = np.linalg.svd((U * sigma) @ Vh, compute_uv=False)
    np.testing.assert_allclose(found, 1 / np.arange(1.0, 21), rtol=1e-13)
    q, k, _ = problems.attention_inputs(1 / np.arange(1.0, 9), 200, 3)
    assert np.std(q.astype(float) @ k.mT / np.sqrt(8)) == pytest.approx(3, rel=1e-5)


def test_command_writes_what_it_shows(tiny, tmp_path):
    path = tmp_path / "bench.json"
    done = CliRunner().invoke(app, ["bench", "--json", str(path)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert len(found["comparisons"]) == len(TINY)
    for comparison in found["comparisons"]:
        assert comparison["name"] in done.stdout
        assert all(row["name"] in done.stdout for row in comparison["rows"])
    assert f"numpy {np.__version__}" in done.stdout
    assert found["machine"]["versions"]["numpy"] == np.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_nothing_half_written(tiny, tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(comparisons, "COMPARISONS", (TINY["soft_threshold"], interrupted))
    done = CliRunner().invoke(app, ["bench", "--json", str(tmp_path / "bench.json")])
    assert done.exit_code != 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        comparisons, "COMPARISONS", (lambda: pytest.fail("worked before it looked"),)
    )
    done = CliRunner().invoke(app, ["bench", "--json", str(tmp_path)])
    assert done.exit_code == 1
    assert "--json must be a file" in done.output


def test_rounds_make_every_call_once():
    order, advanced = [], []
    calls = [partial(order.append, name) for name in "ab"]
    seconds = timing.rounds(calls, 3, advance=lambda: advanced.append(len(order)))
    assert "".join(order) == "ababab"
    assert advanced == [2, 4, 6]
    assert [len(spent) for spent in seconds] == [3, 3]


def test_the_machine_is_described_without_threadpoolctl(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "threadpoolctl", None)
    monkeypatch.setattr(timing, "PACKAGES", ("numpy", "no-such-package"))
    about = timing.machine()
    assert about["blas"] == ["unknown: threadpoolctl is not installed"]
    assert about["versions"]["no-such-package"] == "not installed"
    assert "not installed: no-such-package" in about_machine(about)
