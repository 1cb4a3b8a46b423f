"""Time of ``import slra`` beside ``import scipy.linalg``, each in a fresh interpreter.

python -m benchmarks.import_time     about 20 seconds; writes results/import_time.json
"""

import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial

from benchmarks.common import interleaved, save

STATEMENTS = {
    "bare": "pass",
    "numpy": "import numpy",
    "scipy.linalg": "import scipy.linalg",
    "slra": "import slra",
}


def run(statement: str, bytecode: str) -> None:
    """Import with the bytecode kept in a folder, as an installed package has it, whatever the environment says."""
    env = os.environ | {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([sys.executable, "-c", statement], check=True, env=env)


def main() -> None:
    with tempfile.TemporaryDirectory() as bytecode:
        calls = {name: partial(run, code, bytecode) for name, code in STATEMENTS.items()}
        seconds = interleaved(calls, repeats=15)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    net = {name: median - medians["bare"] for name, median in medians.items()}
    ratio = net["slra"] / net["scipy.linalg"]
    print({name: f"{1000 * t:.0f} ms" for name, t in net.items()}, f"ratio {ratio:.2f}")
    save("import_time", {"seconds_without_interpreter": net, "slra_over_scipy_linalg": ratio})


if __name__ == "__main__":
    main()
