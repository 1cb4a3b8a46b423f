"""The benchmarks under one roof, and that README and docs say what the results say."""

import re

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import markdown, pages
from benchmarks.common import RESULTS, table

NAMED = re.compile(r"benchmarks/results/(\w+\.(?:json|png))")


@pytest.fixture
def one_page(tmp_path, monkeypatch):
    """A copy of a page with tables, in the place of all pages."""
    page = tmp_path / "svd.md"
    page.write_text((pages.ROOT / "docs/svd.md").read_text())
    monkeypatch.setattr(pages, "pages", lambda: {"docs/svd.md": page})
    return page


def test_pages_say_what_the_results_say():
    assert pages.problems() == []


def test_a_wrong_table_is_found_and_put_right(one_page, capsys):
    right = one_page.read_text()
    one_page.write_text(right.replace("scikit-learn in a loop", "scikit-learn in a hurry", 1))
    assert benchmarks.main(["tables", "--check"]) == 1
    found = capsys.readouterr().err
    assert "docs/svd.md: the table svd.measured is not that of the results" in found
    assert "hurry" in one_page.read_text()
    # Other pages are missing here, so the command still complains of them.
    assert benchmarks.main(["tables"]) == 1
    assert one_page.read_text() == right


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("table: svd.measured", "table: svd.nothing", "there is no table svd.nothing"),
        ("table: svd.measured", "table: *.nothing", "there is no table *.nothing"),
        ("<!-- end -->", "", "a table without its end"),
        ("## A posteriori", "## A posteriori\n\nIt is 7.5 times faster.", "no results say this"),
        ("## A posteriori", "## A posteriori\n\n| x | 7.5 times |", "no results say this"),
        ("Extra memory there is 5.9", "Extra memory there is 0.9", "no page says what the results"),
    ],
)
def test_what_is_wrong_on_a_page_is_said(one_page, old, new, problem):
    text = one_page.read_text()
    assert old in text
    one_page.write_text(text.replace(old, new))
    assert any(problem in line for line in pages.problems())


def test_tables_of_several_topics_are_one():
    head = ["a", "b"]
    found = {
        "one": {"tables": {"same": table(head, [(1, 2)], "lr"), "other": table(head, [(3, 4)])}},
        "two": {"tables": {"same": table(head, [(5, 6)], "lr")}},
    }
    first = "| a | b |\n| --- | ---: |\n| 1 | 2 |"
    assert pages.render("one.same", found) == first
    assert pages.render("*.same", found) == f"{first}\n| 5 | 6 |"
    assert pages.render("one.same one.other", found) == f"{first}\n| 3 | 4 |"


def test_results_and_pages_name_each_other():
    named = {file for path in pages.pages().values() for file in NAMED.findall(path.read_text())}
    kept = {path.name for path in RESULTS.iterdir() if path.suffix in (".json", ".png")}
    # These are shown, by name in a table's mark or by what they make.
    shown = {f"{topic}.json" for topic, result in pages.results().items() if result.get("tables")}
    assert kept - named - shown == set()
    # The one file that is announced: no GPU has been at hand.
    missing = named - kept
    assert missing <= {"gpu.json"}
    text = (pages.ROOT / "docs/gpu.md").read_text().replace("\n", " ")
    assert not missing or "which does not exist so far" in text


def test_results_come_from_a_benchmark_that_is_there():
    # The study of training is over: its numbers stay, with how they came about in benchmarks/training.md.
    topics = set(benchmarks.topics())
    assert set(pages.results()) - topics <= {"training"}
    assert not {"common", "cosine_matrix", "pages"} & topics
    assert all(benchmarks.topics().values())


def test_the_list_has_a_line_for_each(capsys):
    assert benchmarks.main([]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(benchmarks.topics())


def test_runs_go_on_after_a_failure(monkeypatch, capsys):
    # A module that does nothing, and one that is not there.
    monkeypatch.setattr(benchmarks, "topics", lambda: {"markdown": "", "missing": ""})
    assert benchmarks.main(["run", "missing", "markdown"]) == 1
    assert "missing: exit status 1 markdown: done" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["run"], ["run", "svd", "svg"], ["tabels"]])
def test_what_is_to_run_must_be_clear(arguments, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(SystemExit):
        benchmarks.main(arguments)


def test_numbers_read_well():
    assert [markdown.significant(x) for x in (0, 0.0312, 1.04, 44.6, 1234)] == [
        "0",
        "0.031",
        "1.0",
        "45",
        "1234",
    ]
    assert [markdown.scientific(x) for x in (0, 2.9e-15, 0.113)] == ["0", "3e-15", "0.11"]
    assert [markdown.duration(x) for x in (4.5, 0.185, 0.06, 88e-6)] == [
        "4.5 s",
        "0.18 s",
        "60 ms",
        "88 us",
    ]
    assert markdown.span([2.0, 0.31]) == "0.31 to 2.0"
