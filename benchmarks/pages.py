"""Benchmark tables in README.md and docs/, from benchmarks/results/*.json; nothing is run again.

A page has ``<!-- table: TOPIC.NAME -->`` before a table and ``<!-- end -->`` after it. Where there are several names
their rows stand one below the other, and ``*.NAME`` is that of all topics. ``TOPIC.machine`` is one line with date,
processor, versions, and where the numbers are. Results also list the phrases in which prose repeats a number
(``says``): each must be on a page, and a time or a ratio outside of tables must be in one of them.
"""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

__all__ = ["fill", "pages", "problems"]

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- table: ([^>]+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
# A time, or a ratio of two.
MEASURED = re.compile(r"(?<![\w.])\d[\d.,]* ?(?:times|ms|s|microseconds|points)(?!\w)")
NOT_MEASURED = ("within 0.46 and 1.6 times the truth with probability 0.99",)


def pages() -> dict[str, Path]:
    """Every page that may have tables, by its name from the root."""
    docs = ROOT / "docs"
    found = [ROOT / "README.md", *sorted(docs.glob("[!_]*/*.md")), *sorted(docs.glob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path for path in found}


def results() -> dict[str, dict[str, Any]]:
    """All results that are kept, by topic."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def render(names: str, found: dict[str, dict[str, Any]]) -> str:
    """Markdown of a table, or of several with one head; raises KeyError for one that is not there."""
    topic, _, name = names.partition(".")
    if name == "machine":
        return machine(topic, found[topic]["machine"])
    parts = []
    for one in names.split():
        topic, _, name = one.partition(".")
        every = [result["tables"] for result in found.values() if name in result.get("tables", {})]
        parts += [made[name] for made in every] if topic == "*" else [found[topic]["tables"][name]]
    if not parts:
        raise KeyError(names)
    rules = ["---:" if side == "r" else "---" for side in parts[0]["align"]]
    lines = [parts[0]["head"], rules, *(row for part in parts for row in part["rows"])]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(topic: str, about: dict[str, Any]) -> str:
    """When and where a topic was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"*`benchmarks/results/{topic}.json`: {about['date']}, {about['cpu']}, {about['cores']} cores; {versions}.*"


def fill(text: str, found: dict[str, dict[str, Any]]) -> str:
    """Put each table between its marks; an unknown name is left alone (see `problems`)."""

    def one(match: re.Match[str]) -> str:
        try:
            return f"{match[1]}{render(match[2], found)}\n{match[4]}"
        except KeyError:
            return match[0]

    return BLOCK.sub(one, text)


def problems() -> list[str]:
    """What the pages say that the results do not, one line each."""
    found, texts = results(), {name: path.read_text() for name, path in pages().items()}
    said = [phrase for result in found.values() for phrase in result.get("says", [])]
    wrong, used, everything = [], set(), ""
    for page, text in texts.items():
        for match in BLOCK.finditer(text):
            used |= {name.partition(".")[2] if "*" in name else name for name in match[2].split()}
            try:
                if match[3] != render(match[2], found) + "\n":
                    wrong.append(f"{page}: the table {match[2]} is not that of the results")
            except KeyError:
                wrong.append(f"{page}: there is no table {match[2]}")
        if text.count("<!-- table: ") != len(BLOCK.findall(text)):
            wrong.append(f"{page}: a table without its end")
        plain = " ".join(CODE.sub("", BLOCK.sub("", text)).split())
        everything += plain
        for phrase in (*said, *NOT_MEASURED):
            plain = plain.replace(phrase, "")
        wrong += [
            f"{page}: no results say this: ...{plain[max(0, m.start() - 40) : m.end() + 20]}..."
            for m in MEASURED.finditer(plain)
        ]
    wrong += [f"no page says what the results do: {one}" for one in said if one not in everything]
    kept = {(topic, name) for topic, result in found.items() for name in result.get("tables", {})}
    return wrong + [
        f"no page has the table {topic}.{name}"
        for topic, name in sorted(kept)
        if name not in used and f"{topic}.{name}" not in used
    ]
