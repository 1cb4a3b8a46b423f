"""The benchmarks under one roof, and that README and docs say what the results say."""

import re

import pytest

pytest.importorskip("typer", reason="the demo extra is not installed")

from typer.testing import CliRunner

from benchmarks import markdown, pages, topics
from benchmarks.__main__ import app
from benchmarks.common import RESULTS

NAMED = re.compile(r"benchmarks/results/(\w+\.(?:json|png))")


@pytest.fixture
def one_page(tmp_path, monkeypatch):
    """A copy of a page with tables, in the place of all pages."""
    page = tmp_path / "svd.md"
    page.write_text((pages.ROOT / "docs/svd.md").read_text())
    monkeypatch.setattr(pages, "pages", lambda: {"docs/svd.md": page})
    return page


def invoke(*arguments):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})


def test_pages_say_what_the_results_say():
    assert pages.problems() == []


def test_a_wrong_table_is_found_and_put_right(one_page):
    right = one_page.read_text()
    one_page.write_text(right.replace("scikit-learn in a loop", "scikit-learn in a hurry", 1))
    found = invoke("tables", "--check")
    assert found.exit_code == 1
    assert "docs/svd.md: the table svd.measured is not that of the results" in found.output
    assert "hurry" in one_page.read_text()
    # Other pages are missing here, so the command still complains of them.
    invoke("tables")
    assert one_page.read_text() == right


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("table: svd.measured", "table: svd.nothing", "there is no table svd.nothing"),
        ("<!-- end -->", "", "a table without its end"),
        ("## A posteriori", "## A posteriori\n\nIt is 7.5 times faster.", "no results say this"),
        (
            "By tolerance a call takes 1",
            "By tolerance a call takes 0",
            "does not say what the results do",
        ),
    ],
)
def test_what_is_wrong_on_a_page_is_said(one_page, old, new, problem):
    text = one_page.read_text()
    assert old in text
    one_page.write_text(text.replace(old, new))
    assert any(problem in line for line in pages.problems())


def test_results_and_pages_name_each_other():
    listing = re.compile(r"<!-- table: results\.list -->.*?<!-- end -->", re.DOTALL)
    texts = {name: listing.sub("", path.read_text()) for name, path in pages.pages().items()}
    named = {file for text in texts.values() for file in NAMED.findall(text)}
    kept = {path.name for path in RESULTS.iterdir() if path.suffix in (".json", ".png")}
    assert kept - named == set()
    # The one file that is announced: no GPU has been at hand.
    missing = named - kept
    assert missing <= {"gpu.json"}
    assert not missing or "which does not exist so far" in texts["docs/gpu.md"].replace("\n", " ")


def test_topics_are_found_without_a_list():
    found = topics.find()
    assert {"svd", "training", "demo", "headline", "minilm"} <= set(found)
    assert not {"common", "cosine_matrix", "pages", "topics", "tables"} & set(found)
    assert {path.stem for path in RESULTS.glob("*.json")} <= {
        n for n, t in found.items() if t.writes
    }
    assert not found["minilm"].writes
    assert found["fidelity"].takes == "five minutes"
    assert all(topic.summary for topic in found.values())
    # Nobody has looked at the clock for these.
    unknown = {topic.name for topic in found.values() if topic.takes is None}
    assert unknown <= {"gpu", "kv_cache_generate", "minilm"}


def test_the_list_has_a_line_for_each():
    listed = invoke()
    assert listed.exit_code == 0
    for name, topic in topics.find().items():
        assert re.search(
            rf"│ {name} +│.*│ {topic.date or '(none yet|makes data)'} +│", listed.output
        )


def test_runs_go_on_after_a_failure(monkeypatch):
    # A module that does nothing, and one that is not there.
    fake = {name: topics.Topic(name, "", None, True, None) for name in ("markdown", "missing")}
    monkeypatch.setattr(topics, "find", lambda: fake)
    done = invoke("run", "missing", "markdown")
    assert done.exit_code == 1
    assert re.search(r"│ missing +│ exit status 1 +│", done.output)
    assert re.search(r"│ markdown +│ done +│", done.output)


@pytest.mark.parametrize("arguments", [(), ("--all", "svd"), ("svd", "svg")])
def test_what_is_to_run_must_be_clear(arguments, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("ran"))
    assert invoke("run", *arguments).exit_code == 2


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
    assert markdown.table(["a", "b"], [(1, 2)], "lr") == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
