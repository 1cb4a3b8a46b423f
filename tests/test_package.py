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
    code = "import sys, slra.integrations; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {name.partition(".")[0] for name in result.stdout.split()} & FRAMEWORKS


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
        for module in (slra, slra.prox, slra.objective)
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


def test_every_public_name_has_a_page():
    pages = (PACKAGE.parent / "docs" / "api.md").read_text()
    listed = set(re.findall(r"^   (\w+)$", pages, flags=re.MULTILINE))
    modules = {"objective", "prox"}
    functions = {*slra.prox.__all__, *slra.objective.__all__}
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


def readme_blocks():
    text = (PACKAGE.parent / "README.md").read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_readme_example_runs_and_is_the_same_for_cupy():
    with_numpy, with_cupy = readme_blocks()
    names = {}
    exec(with_numpy, names)
    assert names["out"].shape == names["v"].shape
    assert names["U"].shape == (3, 4, 500, 10)
    bare = [re.sub(r"\s+#.*", "", line) for line in with_numpy.splitlines()]
    assert "\n".join(bare) == with_cupy.strip().replace("cupy as cp", "numpy as np").replace(
        "cp.", "np."
    )
