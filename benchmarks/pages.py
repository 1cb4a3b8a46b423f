"""Benchmark tables in README.md and docs/, from benchmarks/results/*.json; nothing is run again.

A page has ``<!-- table: TOPIC.NAME -->`` before a table and ``<!-- end -->`` after it. What stands between comes from
``benchmarks/tables/TOPIC.py``: ``tables(result)`` returns its tables by name. Where prose repeats numbers,
``statements(result)`` returns by page the phrases that must be in it, as the results say them; a time or a ratio in
prose must be in one of them. Every topic has the table ``machine`` besides: one line with date, processor, versions,
and where the numbers are.
"""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import tables as folder
from benchmarks.common import RESULTS
from benchmarks.markdown import table

__all__ = ["all_tables", "fill", "pages", "problems"]

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NO_PROSE = re.compile(r"^```.*?^```|^\|.*?$", re.DOTALL | re.MULTILINE)
# A time, or a ratio of two.
MEASURED = re.compile(r"(?<![\w.])\d[\d.,]* ?(?:times|ms|s|microseconds|points)(?!\w)")
NOT_MEASURED = ("within 0.46 and 1.6 times the truth with probability 0.99",)


def pages() -> dict[str, Path]:
    """Every page that may have tables, by its name from the root."""
    found = [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("[!_]*/*.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    ]
    return {path.relative_to(ROOT).as_posix(): path for path in found}


def results() -> dict[str, dict[str, Any]]:
    """All results that are kept, by topic."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def all_tables(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Markdown by TOPIC.NAME."""
    made = {}
    for topic, result in found.items():
        of_topic = {"machine": machine(topic, result)} | _of(topic, "tables", result)
        made |= {f"{topic}.{name}": text for name, text in of_topic.items()}
    return made | {"results.list": listing(found)}


def listing(found: dict[str, dict[str, Any]]) -> str:
    """Every file of results, with its machine."""
    rows = []
    for topic, result in found.items():
        about = result["machine"]
        blas = ", ".join(sorted(set(about["blas"])))
        cores = f"{about['cores']} x {about['cpu']}"
        rows.append((f"`{topic}.json`", about["date"], cores, about["python"], blas))
    return table(["file", "date", "processor", "Python", "BLAS and OpenMP (threads)"], rows)


def machine(topic: str, result: dict[str, Any]) -> str:
    """When and where a topic was measured, and how to do it again."""
    about = result["machine"]
    versions = about["versions"]
    compared = getattr(_module(topic), "COMPARED", ("numpy",))
    return (
        f"*`benchmarks/results/{topic}.json`, by `python -m benchmarks.{topic}`: {about['date']}, {about['cpu']}, "
        f"{about['cores']} cores; {', '.join(f'{name} {versions[name]}' for name in compared)}.*"
    )


def fill(text: str, made: dict[str, str]) -> str:
    """Put each table between its marks; an unknown name is left alone (see `problems`)."""
    return BLOCK.sub(lambda m: m[1] + (made[m[2]] + "\n" if m[2] in made else m[3]) + m[4], text)


def problems() -> list[str]:
    """What the pages say that the results do not, one line each."""
    found = results()
    made, texts = all_tables(found), {name: path.read_text() for name, path in pages().items()}
    said: dict[str, list[str]] = {}
    for topic, result in found.items():
        for page, phrases in _of(topic, "statements", result).items():
            said.setdefault(page, []).extend(phrases)
    wrong = [line for page, text in texts.items() for line in _wrong_tables(page, text, made)]
    used = {match[2] for text in texts.values() for match in BLOCK.finditer(text)}
    unused = [name for name in made if name not in used and not name.endswith(".machine")]
    wrong += [f"no page has the table {name}" for name in unused]
    for page in sorted({*texts, *said}):
        wrong += _wrong_prose(page, texts.get(page, ""), said.get(page, []))
    return wrong


def _wrong_tables(page: str, text: str, made: dict[str, str]) -> list[str]:
    wrong = []
    for name, inside in ((match[2], match[3]) for match in BLOCK.finditer(text)):
        if name not in made:
            wrong.append(f"{page}: there is no table {name}")
        elif inside != made[name] + "\n":
            wrong.append(f"{page}: the table {name} is not that of the results")
    if text.count("<!-- table: ") != len(BLOCK.findall(text)):
        wrong.append(f"{page}: a table without its end")
    return wrong


def _wrong_prose(page: str, text: str, said: list[str]) -> list[str]:
    """Phrases that are missing, and times and ratios that are in none."""
    plain = " ".join(NO_PROSE.sub("", BLOCK.sub("", text)).split())
    wrong = [f"{page} does not say what the results do: {one}" for one in said if one not in plain]
    for phrase in (*said, *NOT_MEASURED):
        plain = plain.replace(phrase, "")
    around = (plain[max(0, m.start() - 40) : m.end() + 20] for m in MEASURED.finditer(plain))
    return wrong + [f"{page}: no results say this: ...{one}..." for one in around]


def _module(topic: str) -> Any:
    """Return benchmarks/tables/TOPIC.py, or None."""
    if not (Path(folder.__file__).parent / f"{topic}.py").exists():
        return None
    return import_module(f"{folder.__name__}.{topic}")


def _of(topic: str, what: str, result: dict[str, Any]) -> dict[str, Any]:
    make = getattr(_module(topic), what, None)
    return make(result) if make else {}
