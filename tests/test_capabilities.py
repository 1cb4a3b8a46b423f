"""The table of what runs where: it is complete, and what contradicts it is seen."""

from types import SimpleNamespace

import numpy as np
import pytest

import slra
from tests import capabilities
from tests.capabilities import COLUMNS, THINNED, Seen, disagreements, rows, watch

strict = pytest.importorskip("array_api_strict")


def saw(name, backends):
    """Tests of one function that passed."""
    seen = Seen()
    for backend in backends:
        properties = [("backend", backend), ("called", [name])]
        seen.add(SimpleNamespace(user_properties=properties, when="call", passed=True))
    return seen


def test_every_public_function_has_a_row():
    for name, cells in capabilities._read().items():
        assert len(cells) == len(COLUMNS), name
        for cell in cells:
            assert cell in ("yes", "lazily") or cell.startswith(("lazily, ", "no: ")), (name, cell)


def test_a_table_that_says_more_or_less_than_the_tests_is_seen(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    monkeypatch.setattr(capabilities, "PAGE", page)
    for cell, backend, contradicted in [
        ("yes", "jax", False),
        ("no: slow", "jax", True),
        ("lazily", "dask", False),
        ("no: slow", "dask", True),
    ]:
        column = next(title for title, backends in COLUMNS.items() if backend in backends)
        cells = [cell if title == column else "no: x" for title in COLUMNS]
        page.write_text(
            f"{capabilities.BEGIN}| f |\n| --- |\n| `admm`, `compress` | {' | '.join(cells)} |\n{capabilities.END}"
        )
        found = disagreements(saw("admm", [backend]))
        assert (f"admm on {column}" in "".join(found)) == contradicted
        # The other function of the row was not seen to run.
        says_too_much = not contradicted and backend not in THINNED
        assert (f"compress on {column}" in "".join(found)) == says_too_much


def test_backends_that_did_not_run_say_nothing():
    assert disagreements(Seen()) == []
    assert all("on Dask" in line for line in disagreements(saw("admm", ["dask"])))


def test_only_calls_with_arrays_of_the_library_count(monkeypatch):
    called = watch(monkeypatch, lambda function: function, strict)
    slra.soft_threshold(np.ones(3), 0.5)
    with pytest.raises(TypeError):
        slra.truncated_svd(strict.asarray([[1]]))
    assert called == []
    slra.soft_threshold(strict.asarray([1.0]), 0.5)
    slra.merge_attention([strict.ones((2, 3))], [strict.ones(2)])
    assert called == ["prox_l1", "merge_attention"]
    assert set(called) <= set(rows())


def test_proximal_gradient_still_knows_the_soft_threshold(monkeypatch):
    called = watch(monkeypatch, lambda function: function, strict)
    y = strict.asarray([3.0, 0.5])
    slra.proximal_gradient(
        0 * y, lambda x: (0.5 * strict.sum((x - y) ** 2), x - y), slra.prox.prox_l1
    )
    # Its step and the operator are one primitive, so the operator itself is not called.
    assert called == ["proximal_gradient"]
