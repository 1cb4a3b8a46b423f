"""The demo command and the sample data it runs on."""

import errno
import json
import re
import sys
import xml.etree.ElementTree as ET
from importlib.resources import files

import numpy as np
import pytest

from slra.data import load_sample
from tests.browser import measured
from tests.command import hide, run_python

SAMPLE = files("slra.data").joinpath("minilm_sample.npz")

# At full rank only float32 rounding is left: eps = 1.2e-7 times scores that reach a few tens.
ROUNDING = 5e-6


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    pytest.importorskip("typer", reason="the demo extra is not installed")
    pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    directory = tmp_path_factory.mktemp("demo")
    return run_python("-W", "error", "-m", "slra", "demo", cwd=directory), directory / "slra-demo"


METHODS = ("svd", "scores", "output")


def table_rows(stdout, method="svd"):
    """The numbers of each line that starts with the method's name."""
    rows = re.findall(rf"^│ {method} +│ +(\d+) +│(.+)│$", stdout, flags=re.MULTILINE)
    return {int(rank): [float(cell) for cell in cells.split("│")] for rank, cells in rows}


def test_demo_needs_no_argument(finished):
    done, _ = finished
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_demo_table(finished, method):
    rows = table_rows(finished[0].stdout, method)
    assert list(rows) == [4, 8, 16, 24, 32]
    median, worst, kib, bytes_ratio, ms, _ = np.array(list(rows.values())).T
    assert (np.diff(median) < 0).all()
    assert (median <= worst).all()
    assert worst[-1] < ROUNDING
    low, high = {"svd": (0.2, 0.5), "scores": (0.2, 0.5), "output": (0.05, 0.2)}[method]
    assert low < median[2] < high
    # 6 heads, K and V, 512 x r coordinates and a 32 x r basis, 4 bytes each; a shift of 32 unless it is the SVD
    shift = 0 if method == "svd" else 32
    expected = [6 * 2 * (544 * rank + shift) * 4 / 1024 for rank in rows]
    np.testing.assert_allclose(kib, expected, atol=0.5)
    np.testing.assert_allclose(bytes_ratio, kib / 768, atol=0.01)
    assert (ms > 0).all()


def test_demo_shows_where_it_pays(finished):
    done, directory = finished
    below = done.stdout.partition("Where it pays")[2]
    rows = re.findall(r"│ +([\d.]*) │ +([\d.]*) │ +([\d.e+-]+) │$", below, flags=re.MULTILINE)
    # A batch of decompositions, three lengths with the fit and without, and three ways to store less.
    assert len(rows) == 10
    times, shares, errors = zip(*rows, strict=True)
    assert all(float(time) > 0 for time in times[:-1])
    few = [float(share) for share in shares if share]
    assert few[:4] == pytest.approx([0.25, 0.25, 0.25, 0.26], abs=0.01)
    assert all(0.1 < share < 0.2 for share in few[4:])
    assert float(errors[0]) < 1e-5
    assert all(0 < float(error) < 0.5 for error in errors[1:])
    assert "Where it pays" in (directory / "demo.html").read_text(encoding="utf-8")


def test_demo_says_whether_it_was_faster(finished):
    rows = [table_rows(finished[0].stdout, method) for method in METHODS]
    ratios = [cells[-1] for each in rows for cells in each.values()]
    faster = min(ratios) < 0.99
    slower = min(ratios) > 1.01
    if faster:
        assert "Faster than exact attention here" in finished[0].stdout
    if slower:
        assert "No rank is faster than exact attention here" in finished[0].stdout


def test_demo_picture(finished):
    image = pytest.importorskip("matplotlib.image")
    _, directory = finished
    assert sorted(path.name for path in directory.iterdir()) == ["demo.html", "demo.png"]
    pixels = image.imread(directory / "demo.png")
    height, width, _ = pixels.shape
    assert 1500 < width < 2500
    assert 0.7 < height / width < 1.1
    assert pixels[..., :3].std() > 0.1


def test_demo_page(finished):
    done, directory = finished
    root = ET.fromstring((directory / "demo.html").read_text(encoding="utf-8"))
    lines = ["".join(cell.text or "" for cell in row) for row in root.iter("tr")]
    for method in METHODS:
        for rank, cells in table_rows(done.stdout, method).items():
            (line,) = [x for x in lines if x.startswith(f"{method}{rank}")]
            assert f"{cells[0]:.2g}" in line
    assert "exact attention here" in "".join(root.find(".//strong").itertext())
    for x in root.iter():
        assert x.tag not in ("script", "link", "img", "iframe")
        for name, value in x.attrib.items():
            assert not name.endswith(("src", "href")) or value.startswith(("#", "data:image/png"))


def test_demo_page_in_a_browser(finished, tmp_path):
    _, directory = finished
    phone, desk = measured(directory / "demo.html", tmp_path, 360, 1200)
    for layout in (phone, desk):
        assert layout["scroll_width"] <= layout["width"]
        assert layout["loaded"] == layout["clipped"] == []
        assert layout["too_wide"] == 0
        assert len(layout["pictures"]) == 3
        assert layout["images"] == ["data:image/png;base64,"] * 3  # two maps and their colours
    assert min(phone["letters"]) >= 9  # pixels
    assert max(desk["letters"]) <= 20


@pytest.fixture
def invoke():
    runner = pytest.importorskip("typer.testing").CliRunner()
    from slra.cli.app import app

    return lambda *args: runner.invoke(app, ["demo", *map(str, args)])


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_demo_backend(backend, invoke, tmp_path, monkeypatch):
    pytest.importorskip(backend)
    monkeypatch.setattr("slra.cli.demo.N_ROUNDS", 1)  # the times are not looked at here
    monkeypatch.setattr("slra.cli.demo_pays.LENGTHS", (512,))
    result = invoke("--backend", backend, "--output", tmp_path / "new" / "directory")
    assert result.exit_code == 0, result.output
    assert f"float32, {backend}" in result.stdout
    assert table_rows(result.stdout)[32][1] < ROUNDING
    assert (tmp_path / "new" / "directory" / "demo.png").exists()


def one_line(result):
    """The only line a failed command printed."""
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_unknown_backend(invoke):
    result = invoke("--backend", "tensorflow")
    assert result.exit_code == 2
    assert "numpy" in result.stderr


def test_backend_not_installed(invoke, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert 'pip install ".[torch]"' in one_line(invoke("--backend", "torch", "--output", tmp_path))


def test_cupy_without_gpu(invoke, tmp_path, monkeypatch):
    class CuPy:
        is_available = staticmethod(lambda: False)

    monkeypatch.setitem(sys.modules, "cupy", CuPy)
    line = one_line(invoke("--backend", "cupy", "--output", tmp_path))
    assert line == "backend cupy needs a CUDA device, and none is usable here"


@pytest.mark.parametrize("below", ["", "below"])
def test_output_is_a_file(invoke, tmp_path, below):
    file = tmp_path / "file"
    file.write_text("kept")
    line = one_line(invoke("--output", file / below))
    assert "--output must be a directory" in line
    assert str(file) in line
    assert file.read_text() == "kept"


def test_output_not_writable(invoke, tmp_path, monkeypatch):
    def refuse(**options):
        raise PermissionError(errno.EACCES, "denied")

    # Not by chmod: root may write anywhere.
    monkeypatch.setattr("slra.cli.files.tempfile.TemporaryFile", refuse)
    line = one_line(invoke("--output", tmp_path))
    assert line.endswith(f"got {tmp_path}: Permission denied")


def test_interrupted_write_leaves_nothing(tmp_path):
    plots = pytest.importorskip("slra.cli.plots")

    class Interrupted:
        def savefig(self, file, **options):
            file.write(b"half a picture")
            raise KeyboardInterrupt

    (tmp_path / "demo.png").write_bytes(b"the last run's")
    with pytest.raises(KeyboardInterrupt):
        plots.save(Interrupted(), tmp_path / "demo.png")
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]
    assert (tmp_path / "demo.png").read_bytes() == b"the last run's"


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
def test_missing_extra(missing, tmp_path):
    hide(missing, tmp_path)
    done = run_python("-m", "slra", "demo", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert 'pip install ".[demo]"' in line


def test_help_needs_no_plotting(tmp_path):
    code = (
        "import sys, slra.__main__, json\n"
        "sys.argv = ['slra', '--help']\n"
        "try: slra.__main__.main()\n"
        "finally: print('\\n' + json.dumps(sorted(sys.modules)))"
    )
    pytest.importorskip("typer")
    loaded = json.loads(run_python("-c", code, cwd=tmp_path).stdout.splitlines()[-1])
    assert not {"matplotlib", "torch", "jax", "cupy"} & set(loaded)


def test_sample_file():
    assert SAMPLE.stat().st_size < 1_000_000
    with SAMPLE.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        dtypes = {name: stored[name].dtype for name in stored}
    assert {dtypes.pop(name) for name in "qkv"} == {np.dtype(np.float16)}
    assert set(dtypes) == {"layer", "head", "tokens"}


def test_sample_has_source_and_licence_beside_it():
    text = files("slra.data").joinpath("README.md").read_text(encoding="utf-8")
    for needed in ("Apache-2.0", "PSF-2.0", "all-MiniLM-L6-v2", "python -m benchmarks.minilm"):
        assert needed in text


def test_load_sample():
    sample = load_sample()
    for x in sample[:3]:
        assert x.shape == (6, 512, 32)
        assert x.dtype == np.float32
        assert np.isfinite(x).all()
    assert sample.layer.shape == sample.head.shape == (6,)
    assert (sample.layer < 6).all()
    assert (sample.head < 12).all()
    assert len({*zip(sample.layer.tolist(), sample.head.tolist(), strict=True)}) == 6
    assert sample.tokens.shape == (512,)
    assert sample.tokens[0] == "[CLS]"
    assert sample.tokens[-1] == "[SEP]"
