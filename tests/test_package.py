"""What the package promises about itself: imports, layering, documentation."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest

import slra

PACKAGE = Path(slra.__file__).parent
FRAMEWORKS = {
    *("cupy", "cupyx", "torch", "jax", "jaxlib", "dask", "distributed", "zarr"),
    *("array_api_strict", "sklearn", "transformers"),
}
# Where a library may be named: its table, its integration, and the command line that converts arrays.
MAY_NAME_A_BACKEND = ("_backends", "integrations", "cli")


def test_import_needs_nothing_but_its_dependencies():
    code = "import sys; import slra; print(*{name.partition('.')[0] "
    code += "for name, module in sys.modules.items() if getattr(module, '__file__', None)})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    third_party = set(result.stdout.split()) - set(sys.stdlib_module_names)
    allowed = {"slra", "numpy", "scipy", "array_api_compat"}
    site = {name for name in third_party if not name.startswith("_")}
    assert not site & FRAMEWORKS
    # What the interpreter loads by itself at start-up, such as editable-install hooks, is not ours.
    bare = subprocess.run(
        [sys.executable, "-c", code.replace("import slra; ", "")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert site - set(bare.stdout.split()) <= allowed


def test_integrations_import_no_framework_until_one_is_asked_for():
    code = "import sys, slra; dir(slra.integrations); slra.baselines; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {name.partition(".")[0] for name in result.stdout.split()} & FRAMEWORKS


def test_integrations_are_imported_by_name():
    pytest.importorskip("torch")
    code = (
        "import sys, slra; assert 'torch' not in sys.modules; "
        "print(slra.integrations.torch.LowRankAttention.__name__, hasattr(slra.integrations, 'no'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["LowRankAttention", "False"]


def imports(path):
    """Name of a file as a module, and those of slra that it imports whenever it is imported."""
    package = ".".join(("slra", *path.relative_to(PACKAGE).with_suffix("").parts))
    package = package.removesuffix(".__init__")
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "slra":
            files = {name.name for name in node.names}
            found |= {
                f"{node.module}.{name}" if f"{node.module}.{name}" in MODULES else node.module
                for name in files
            }
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.partition(".")[0] == "slra"}
    return package, found - {package}


MODULES = {
    ".".join(("slra", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
}


def circles(graph):
    """Modules that import one another, by taking away those that import nothing that is left."""
    graph = {name: set(others) & set(graph) for name, others in graph.items()}
    while free := {name for name, others in graph.items() if not others}:
        graph = {name: others - free for name, others in graph.items() if name not in free}
    return set(graph)


def test_no_module_imports_itself_through_others():
    graph = dict(imports(path) for path in PACKAGE.rglob("*.py"))
    assert len(graph) > 90
    assert sum(map(len, graph.values())) > 300
    # The front page imports what others may name by it.
    graph.pop("slra")
    assert circles(graph) == set()
    assert circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}) == {"a", "b", "c"}


def test_a_leading_underscore_is_for_its_own_folder():
    for path in PACKAGE.rglob("*.py"):
        package, found = imports(path)
        for module in found:
            folder, _, name = module.rpartition(".")
            is_private = name.startswith("_") and folder.startswith(("slra.attn", "slra.cache"))
            assert not is_private or package.startswith(folder), f"{package} imports {module}"


def test_heads_are_laid_out_at_the_door_only():
    """Below the public functions, which hand it to `make_problem`, nothing takes or passes enable_gqa."""
    folders = ("attn", "cache", "baselines", "_backends")
    paths = [path for folder in folders for path in (PACKAGE / folder).rglob("*.py")]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                named = {x.arg for x in (*node.args.args, *node.args.kwonlyargs)}
                may = not node.name.startswith("_") or node.name == "_check_batch"
                assert "enable_gqa" not in named or may, f"{path}: {node.name}"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                named = {x.arg for x in node.keywords}
                public = {"make_problem", "_check_batch", "attention", "fit_attention"}
                assert "enable_gqa" not in named or node.func.id in public, (
                    f"{path}: {node.func.id}"
                )


def test_numpy_calls_import_no_framework():
    code = (
        "import sys, numpy as np, slra; x = np.eye(9); slra.attention(x, x, x); "
        "slra.low_rank_attention(x, x, x, 2); slra.randomized_svd(x, 2, rng=0); "
        "slra.soft_threshold(x, 0.1); print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {name.partition(".")[0] for name in result.stdout.split()} & FRAMEWORKS


def algorithm_files():
    return [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in MAY_NAME_A_BACKEND
    ]


@pytest.mark.parametrize("path", algorithm_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_algorithm_names_a_backend(path):
    """Only code counts: names, attributes, imports and string literals that are not docstrings."""
    tree = ast.parse(path.read_text())
    prose = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    }
    for node in ast.walk(tree):
        if node in prose:
            continue
        words = " ".join(
            str(value)
            for field in ("id", "attr", "name", "module", "arg", "value")
            if isinstance(value := getattr(node, field, None), str)
        )
        named = FRAMEWORKS & set(re.split(r"\W+|_", words.lower()))
        assert not named, f"{path}:{getattr(node, 'lineno', 0)} names {named}"


def test_the_layering_check_sees_an_offence(tmp_path):
    offence = tmp_path / "bad.py"
    offence.write_text('"""Prose may say torch."""\n\ndef f(x):\n    return is_torch_array(x)\n')
    with pytest.raises(AssertionError, match="names {'torch'}"):
        test_no_algorithm_names_a_backend(offence)


def public_functions():
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (slra, slra.prox, slra.objective, slra.baselines)
        for name in module.__all__
        if isinstance(getattr(module, name), FunctionType)
    }


@pytest.mark.parametrize("name", public_functions())
def test_public_functions_are_documented_and_their_examples_run(name):
    function = public_functions()[name]
    sections = ["Parameters", "Returns", "Raises", "Examples"]
    headings = [f"{section}\n{'-' * len(section)}\n" for section in sections]
    # Without indentation, which docstrings have lost since Python 3.13.
    text = inspect.getdoc(function)
    missing = [s for s, h in zip(sections, headings, strict=True) if h not in text]
    assert not missing, f"{name} lacks {missing}"
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={"slra": slra})
    assert test.examples, f"{name} has no example"
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert result.failed == 0


def test_every_module_declares_its_names():
    for info in pkgutil.walk_packages([str(PACKAGE)], "slra."):
        if "_backends." in info.name or info.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError:
            continue
        if info.name == "slra.integrations":
            continue  # its names are modules, which need their frameworks
        assert all(hasattr(module, name) for name in getattr(module, "__all__", ())), info.name


def test_type_information_is_shipped():
    assert (PACKAGE / "py.typed").is_file()


def integrated_names():
    """Names that the adapters declare, read without importing their frameworks."""
    names = set()
    for path in sorted((PACKAGE / "integrations").glob("[!_]*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
                names |= set(ast.literal_eval(node.value))
    return names


@pytest.mark.parametrize("module", [slra.objective, slra.prox])
def test_only_public_names_are_shown(module):
    assert dir(module) == sorted(module.__all__)


def test_every_public_name_has_a_page():
    pages = (PACKAGE.parent / "docs" / "api.md").read_text()
    listed = set(re.findall(r"^   (\w+)$", pages, flags=re.MULTILINE))
    modules = {"baselines", "integrations", "objective", "prox"}
    functions = {*slra.prox.__all__, *slra.objective.__all__, *slra.baselines.__all__}
    public = ({*slra.__all__} - modules) | functions | integrated_names()
    assert listed == public


def public_classes():
    modules = (slra, slra.prox, slra.objective)
    named = {name: getattr(module, name) for module in modules for name in module.__all__}
    return {name: found for name, found in named.items() if isinstance(found, type)}


@pytest.mark.parametrize("name", public_classes())
def test_public_classes_have_examples_that_run(name):
    assert f"Examples\n{'-' * 8}\n" in inspect.getdoc(public_classes()[name])
    (test,) = doctest.DocTestFinder(recurse=False).find(public_classes()[name], name, globs={})
    assert test.examples, f"{name} has no example"
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


def test_adapters_have_examples():
    """They run in the tests of each adapter, where its framework is."""
    for path in sorted((PACKAGE / "integrations").glob("[!_]*.py")):
        nodes = ast.parse(path.read_text()).body
        kinds = ast.ClassDef | ast.FunctionDef
        documented = {n.name: ast.get_docstring(n) for n in nodes if isinstance(n, kinds)}
        for name in integrated_names() & set(documented):
            examples = documented[name].partition("Examples\n--------\n")[2]
            if elsewhere := re.match(r"See `(\w+)`\.", examples):
                examples = documented[elsewhere[1]]
                assert f"{name}(" in examples, f"{elsewhere[0]} has no example of {name}"
            assert ">>> " in examples, f"{path.name}: {name} has no example"


def test_readme_example_prints_what_it_says(capsys):
    text = (PACKAGE.parent / "README.md").read_text()
    code, printed = re.search(
        r"^```python\n(.*?)^```\n+^```text\n(.*?)^```$", text, re.M | re.S
    ).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed


def test_the_page_on_the_architecture_names_what_there_is():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    files = {path.relative_to(PACKAGE.parent).as_posix(): path for path in PACKAGE.rglob("*.py")}
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) >= 7
    for row in rows:
        named = re.findall(r"`([^`]+)`", row)
        paths = [file for name in named for file in files if name.endswith(".py") and name in file]
        assert paths, row
        text = "".join(files[path].read_text() for path in paths)
        for name in named:
            if not name.endswith(".py"):
                assert all(part in text for part in name.split(".")), f"{name} is not in {paths}"


def test_type_checkers_see_what_comes_out():
    """A user's script, in which each result has the type that it asserts, under mypy's strictest settings."""
    api = pytest.importorskip("mypy.api")
    out, err, status = api.run(
        ["--strict", "--follow-imports=silent", str(Path(__file__).with_name("typed_user.py"))]
    )
    assert status == 0, out + err
