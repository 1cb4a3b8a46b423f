"""The installed wheel does what its docstrings say: the examples of every module that imports here, as doctests.

Run from a directory that is not the repository: python -P -W error wheel_check.py
Needs nothing but slra and what it needs; modules of extras that are not installed are left out and named.
"""

import doctest
import importlib
import pkgutil
import sys
from importlib.metadata import version
from pathlib import Path

import slra
from slra.data import load_sample

PACKAGE = Path(slra.__file__).parent
# Frameworks that an adapter, the command line or the table of a library may ask for.
OPTIONAL = {"cupy", "dask", "jax", "matplotlib", "rich", "safetensors", "sklearn", "torch"}
OPTIONAL |= {"transformers", "typer", "cubed", "mlx", "ndonnx", "sparse"}


def main() -> None:
    """Check the installed package, then run the examples of all its modules."""
    assert "site-packages" in PACKAGE.parts, f"not the wheel: {PACKAGE}"
    assert version("slra") == slra.__version__
    assert (PACKAGE / "py.typed").is_file()
    assert load_sample().q.shape[-1] == 32

    examples, left_out = 0, set()
    for info in pkgutil.walk_packages([str(PACKAGE)], "slra."):
        if info.name == "slra.__main__":
            continue
        try:
            module = importlib.import_module(info.name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in OPTIONAL:
                raise
            left_out.add(missing)
            continue
        result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
        if result.failed:
            sys.exit(f"{info.name}: {result.failed} examples failed")
        examples += result.attempted
    assert examples > 100, f"only {examples} examples ran"
    print(f"{examples} examples passed; not installed: {', '.join(sorted(left_out))}")


if __name__ == "__main__":
    main()
