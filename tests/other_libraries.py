"""Libraries that slra has no more to do with than any other: how each is entered, and what runs on it.

``python -m tests.other_libraries [NAME...]`` runs every case on those that are installed and writes docs/backends.md,
and what each case asks of a namespace into docs/your_library.md. `tests.test_other_libraries` compares.
"""

import contextlib
import functools
import importlib.util
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import slra
from tests import minimal_namespace

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- begin {} -->\n", "<!-- end {} -->"


@dataclass(frozen=True)
class Library:
    """One way of making arrays, and of reading them."""

    name: str
    module: str
    enter: Callable[[], contextlib.AbstractContextManager[tuple[Any, Any]]]
    lazy: bool = False
    # Cases that take minutes: run when the page is written, not by the tests.
    slow: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        missing = next((m for m in self.module.split() if not _is_there(m)), None)
        if missing:
            return f"{missing} is not installed"
        if self.module == "dpnp":
            _find_opencl()
            import dpctl

            return None if dpctl.get_num_devices() else "no SYCL device"
        return None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package of a submodule
        return False


def _find_opencl() -> None:
    """Tell the loader where intel-opencl-rt put its driver: it looks into /etc only."""
    driver = Path(sys.prefix) / "lib" / "libintelocl.so"
    if driver.exists():
        os.environ.setdefault("OCL_ICD_FILENAMES", str(driver))


@contextlib.contextmanager
def _dpnp() -> Iterator[tuple[Any, Any]]:
    _find_opencl()
    import dpnp

    yield dpnp.asarray, dpnp.asnumpy


@contextlib.contextmanager
def _ndonnx() -> Iterator[tuple[Any, Any]]:
    import ndonnx

    yield ndonnx.asarray, lambda x: x.unwrap_numpy()


@contextlib.contextmanager
def _sparse() -> Iterator[tuple[Any, Any]]:
    import sparse

    def read(x: Any) -> Any:
        return x.todense() if isinstance(x, sparse.SparseArray) else np.asarray(x)

    yield sparse.COO.from_numpy, read


@contextlib.contextmanager
def _cubed() -> Iterator[tuple[Any, Any]]:
    import cubed

    with tempfile.TemporaryDirectory() as folder:
        spec = cubed.Spec(work_dir=folder, allowed_mem="200MB")

        def make(a: Any) -> Any:
            # Two blocks along the first axis.
            chunks = (max(1, -(-a.shape[0] // 2)), *a.shape[1:]) if a.ndim else ()
            return cubed.from_array(a, chunks=chunks, spec=spec)

        yield make, lambda x: np.asarray(x.compute())


@contextlib.contextmanager
def _mlx() -> Iterator[tuple[Any, Any]]:
    import mlx.core as mx

    yield mx.array, np.asarray


@contextlib.contextmanager
def _minimal() -> Iterator[tuple[Any, Any]]:
    yield minimal_namespace.asarray, minimal_namespace.to_numpy


@contextlib.contextmanager
def strict(device: str = "CPU_DEVICE", **flags: Any) -> Iterator[tuple[Any, Any]]:
    """Enter array-api-strict with flags, and one of its devices."""
    import array_api_strict as xp

    found = {"boolean_indexing": False, "data_dependent_shapes": False, **flags}
    with xp.ArrayAPIStrictFlags(**found):
        where = xp.Device(device)
        yield (
            lambda a: xp.asarray(a, device=where),
            lambda x: np.asarray(xp.asarray(x, device=xp.Device("CPU_DEVICE"))),
        )


LIBRARIES = {
    library.name: library
    for library in (
        Library("dpnp", "dpnp", _dpnp),
        Library(
            "ndonnx",
            "ndonnx onnxruntime",
            _ndonnx,
            slow=(
                "low_rank_attention, output",
                "low_rank_attention, svd, l1",
                "AttentionBasis.attend",
            ),
        ),
        Library("sparse", "sparse", _sparse),
        Library("cubed", "cubed", _cubed, lazy=True),
        Library("mlx", "mlx.core", _mlx),
        Library(
            "array-api-strict, no linalg",
            "array_api_strict",
            functools.partial(strict, enabled_extensions=()),
        ),
        Library("the least of 2022.12", "numpy", _minimal),
    )
}


# Small: some of these libraries take milliseconds for each operation.
_rng = np.random.default_rng(0)
LOW_RANK = (_rng.standard_normal((12, 2)) @ _rng.standard_normal((2, 9))).astype(np.float32)
SPARSE = np.where(_rng.random((12, 9)) < 0.2, 2 * _rng.standard_normal((12, 9)), 0).astype(
    np.float32
)
NOISY = LOW_RANK + 0.01 * _rng.standard_normal((12, 9)).astype(np.float32)
Q, K, V, GRAD = (_rng.standard_normal((2, 8, 4)).astype(np.float32) for _ in range(4))
MASK = np.tril(np.ones((8, 8), dtype=bool), 2)


def _vjp(make: Any) -> Any:
    q, k, v, grad = map(make, (Q, K, V, GRAD))
    return slra.attention_vjp(q, k, v, *slra.attention(q, k, v, return_lse=True), grad)


def _attend(make: Any) -> Any:
    q, k, v = map(make, (Q, K, V))
    return slra.fit_attention(q, k, v, 2).attend(q, k, v)


CASES: dict[str, Callable[[Any], Any]] = {
    "soft_threshold": lambda make: slra.soft_threshold(make(SPARSE), 0.5),
    "prox_l2": lambda make: slra.prox.prox_l2(make(SPARSE), 0.5),
    "project_simplex": lambda make: slra.prox.project_simplex(make(NOISY)),
    "prox_nuclear": lambda make: slra.prox.prox_nuclear(make(NOISY), 0.5),
    "randomized_svd": lambda make: slra.randomized_svd(make(NOISY), 2, rng=0),
    "truncated_svd": lambda make: slra.truncated_svd(make(NOISY), 2),
    "robust_pca": lambda make: slra.robust_pca(make(LOW_RANK + SPARSE), max_iter=200)[:2],
    "attention": lambda make: slra.attention(
        *map(make, (Q, K, V)), mask=make(MASK), is_causal=True, return_lse=True
    ),
    "attention_vjp": _vjp,
    "low_rank_attention, output": lambda make: slra.low_rank_attention(*map(make, (Q, K, V)), 2),
    "low_rank_attention, svd, l1": lambda make: slra.low_rank_attention(
        *map(make, (Q, K, V)), 2, method="svd", l1=0.1
    ),
    "AttentionBasis.attend": _attend,
}
# Of what iterates to a tolerance, the answers of two libraries agree to that.
TOLERANCE = {"robust_pca": 2e-3}


def flat(result: Any) -> list[Any]:
    """List the arrays of a result."""
    return [x for part in result for x in flat(part)] if isinstance(result, tuple) else [result]


@functools.cache
def expected(case: str) -> list[Any]:
    """What NumPy gives."""
    return [np.asarray(x) for x in flat(CASES[case](lambda a: a.copy()))]


def off_by(case: str, made: tuple[Any, Any]) -> float:
    """Largest difference from NumPy, over that of rounding in single precision: up to 1 is right."""
    make, read = made
    worst = 0.0
    for x, y in zip(flat(CASES[case](make)), expected(case), strict=True):
        found = np.asarray(read(x))
        assert found.shape == y.shape
        assert found.dtype == y.dtype
        scale = max(1.0, float(np.max(np.abs(y))))
        worst = max(worst, float(np.max(np.abs(found - y))) / scale)
    # A few hundred roundings, and the condition of small SVDs.
    return worst / TOLERANCE.get(case, 1e-4)


def cell(case: str, library: Library) -> str:
    """What to say of a case on a library."""
    with library.enter() as made:
        try:
            distance = off_by(case, made)
        except (TypeError, ValueError) as error:
            return f"no: {_short(str(error))}"
    assert distance <= 1, f"{case} on {library.name}: {distance}"
    return "lazily" if library.lazy else "yes"


def _short(message: str) -> str:
    """Return what is missing, without the name of the library, which the column has."""
    lacks = re.search(r" needs (.*?), which \S+ does not have", message)
    if lacks:
        return lacks.group(1)
    if "values that can be looked at" in message:
        return "iterates until values say so"
    if " does not do: " in message:
        return "a dense array" if "fill value" in message else "what it does not do"
    return message


def table(names: list[str]) -> str:
    """Cases by library; those not named keep what the page says."""
    before, lines = written(), []
    lines.append("| | " + " | ".join(LIBRARIES) + " |\n")
    lines.append("| --- " * (len(LIBRARIES) + 1) + "|\n")
    for case in CASES:
        cells = []
        for library in LIBRARIES.values():
            said = before.get(case, {}).get(library.name, "not tested")
            cells.append(cell(case, library) if library.name in names else said)
        lines.append(f"| `{case}` | " + " | ".join(cells) + " |\n")
    return "".join(lines)


def written() -> dict[str, dict[str, str]]:
    """Cells of the page."""
    text = (DOCS / "backends.md").read_text(encoding="utf-8")
    part = text.partition(BEGIN.format("other libraries"))[2].partition("<!-- end")[0]
    rows = [line.strip("|\n ").split(" | ") for line in part.splitlines()]
    titles = part.splitlines()[0].strip("| ").split(" | ") if rows else []
    return {
        row[0].strip("`"): dict(zip(titles, row[1:], strict=False)) for row in rows[2:] if row[1:]
    }


def needs() -> str:
    """What cases ask of a namespace beyond what all of them do."""
    asked = {}
    for case, run in CASES.items():
        minimal_namespace.namespace.asked.clear()
        run(minimal_namespace.asarray)
        asked[case] = set(minimal_namespace.namespace.asked)
    shared = set.intersection(*asked.values())
    lines = ["| | asks for |\n", "| --- | --- |\n"]
    lines.append(f"| all | {_names(shared)} |\n")
    lines += [f"| `{case}` | {_names(found - shared)} |\n" for case, found in asked.items()]
    return "".join(lines)


def _names(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "nothing more"


def replaced(page: str, name: str, text: str) -> str:
    """Return the page with what stands between two marks replaced."""
    head, begin, rest = page.partition(BEGIN.format(name))
    _, end, tail = rest.partition(END.format(name))
    assert all((begin, end)), f"the page has no marks for {name}"
    return f"{head}{begin}{text}{end}{tail}"


def main() -> int:
    """Write both pages; libraries may be named, and are all that are installed otherwise."""
    warnings.simplefilter("ignore")
    names = sys.argv[1:] or [one.name for one in LIBRARIES.values() if one.missing() is None]
    for file, name, text in (
        ("backends.md", "other libraries", table(names)),
        ("your_library.md", "needs", needs()),
    ):
        page = (DOCS / file).read_text(encoding="utf-8")
        (DOCS / file).write_text(replaced(page, name, text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
