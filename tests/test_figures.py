"""The pictures of the documentation are drawn by code that runs, and pages show them."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from docs.figures import FIGURES, FOLDER, draw

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "benchmarks/results/figures.json").read_text())


def numbers(x, path=()):
    """All numbers of a nested result, by path."""
    if isinstance(x, dict | list):
        pairs = x.items() if isinstance(x, dict) else enumerate(x)
        return {k: v for name, y in pairs for k, v in numbers(y, (*path, str(name))).items()}
    return {path: x}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_and_shows_what_is_quoted(name, tmp_path):
    found = numbers(draw(name, tmp_path))
    # Where the axes put their ticks, and fonts, are of this version of matplotlib: the bytes are not compared.
    assert 10_000 < (tmp_path / f"{name}.png").stat().st_size < 80_000
    quoted = numbers(RESULT["figures"].get(name, {}))
    assert found.keys() == quoted.keys()
    for path, value in quoted.items():
        # Pages round to two digits. What is rounding itself may be another rounding.
        assert found[path] == pytest.approx(value, rel=5e-3, abs=2e-7), path


def test_every_picture_is_on_a_page_and_every_page_has_its_pictures():
    shown = set()
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            picture = (page.parent / target).resolve()
            assert picture.is_file(), f"{page} shows {target}, which does not exist"
            shown.add(picture)
    assert {FOLDER / f"{name}.png" for name in FIGURES} <= shown
    assert {path.stem for path in FOLDER.iterdir()} == set(FIGURES)
    assert all((FOLDER / f"{name}.png").stat().st_size < 80_000 for name in FIGURES)
