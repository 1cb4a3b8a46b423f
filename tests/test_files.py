"""Files under faults: a save that fails leaves the old file, and no damage is read as something else."""

import io
import os
import random
import stat
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import slra
from slra._files import write_file
from slra.attn.basis import load_bases, save_bases
from tests.command import environment

N_FLIPS = 1500
N_CUTS = 500


class Format(NamedTuple):
    """How a kind of file is saved and loaded; an object has a number, by which whole files are told apart."""

    suffix: str
    needs: tuple[str, ...]
    make: Any  # number, size -> object
    save: Any  # object, path
    load: Any  # path -> object
    arrays: Any  # object -> arrays by name


def _basis(number, size=4):
    rng = np.random.default_rng(number)
    wq, wk, wv, uv = (rng.standard_normal((2, size, 2)) for _ in range(4))
    return slra.AttentionBasis(
        wq=wq,
        wk=wk,
        wv=wv,
        uv=np.matrix_transpose(uv),
        c=np.zeros((2, 1, size)),
        mu=np.ones((2, 1, size)),
        ranks=((2, 1), (1, 2)),
        error=np.zeros(2),
    )


def _basis_arrays(basis):
    names = ("wq", "wk", "wv", "uv", "c", "mu", "error", "ranks")
    return {name: np.asarray(getattr(basis, name)) for name in names}


def _matrix(number, size=4):
    rng = np.random.default_rng(number)
    return slra.LowRankPlusSparse(
        rng.standard_normal((size, 2)),
        rng.standard_normal((2, 5)),
        rng.standard_normal((size, 2)),
        np.tile(np.asarray([[1, 4]], dtype=np.int8), (size, 1)),
    )


def _cache(number, size=4):
    rng = np.random.default_rng(number)
    k, v = rng.standard_normal((2, 2, size, 4))
    return slra.KVCache(_basis(0), window=2).append(k, v)


def _parked(number, size=48):
    """A cache that has come back from a file already: parked with bits enough it stays as it is."""
    q, k, v = np.random.default_rng(number).standard_normal((3, 2, min(size, 2000), 4))
    basis = slra.fit_attention(q[:, :48], k[:, :48], v[:, :48], 1, across_heads=True)
    file = io.BytesIO()
    slra.KVCache(basis, bits=4, window=2).append(k, v).save(file, bits=10)
    return slra.KVCache.load(io.BytesIO(file.getvalue()))


def _cache_arrays(cache):
    from slra.cache import _files
    from slra.cache._layout import named_arrays

    contents = _files._without_room(cache._contents)
    return {name: np.asarray(x) for name, x in named_arrays(contents).items()}


def _layers_arrays(bases):
    return {
        f"{layer}/{name}": x
        for layer, basis in bases.items()
        for name, x in _basis_arrays(basis).items()
    }


FORMATS = {
    "basis": Format(
        ".npz", (), _basis, slra.AttentionBasis.save, slra.AttentionBasis.load, _basis_arrays
    ),
    "matrix.npz": Format(
        ".npz",
        (),
        _matrix,
        slra.LowRankPlusSparse.save,
        slra.LowRankPlusSparse.load,
        slra.LowRankPlusSparse._asdict,
    ),
    "matrix.safetensors": Format(
        ".safetensors",
        ("safetensors",),
        _matrix,
        slra.LowRankPlusSparse.save,
        slra.LowRankPlusSparse.load,
        slra.LowRankPlusSparse._asdict,
    ),
    "cache": Format(
        ".cache", ("safetensors",), _cache, slra.KVCache.save, slra.KVCache.load, _cache_arrays
    ),
    "parked": Format(
        ".cache",
        ("safetensors", "constriction"),
        _parked,
        lambda cache, path: cache.save(path, bits=10),
        slra.KVCache.load,
        _cache_arrays,
    ),
    # What slra.integrations.transformers saves, without the seconds that its import takes.
    "layers": Format(
        ".npz",
        (),
        lambda number, size=4: {"a": _basis(number, size), "b": _basis(number + 1, size)},
        lambda bases, path: save_bases(path, bases),
        lambda path: load_bases(path, "save_bases", np.asarray),
        _layers_arrays,
    ),
}


@pytest.fixture(params=list(FORMATS))
def kind(request):
    kind = FORMATS[request.param]
    for package in kind.needs:
        pytest.importorskip(package)
    return kind


def assert_same(kind, one, other):
    one, other = kind.arrays(one), kind.arrays(other)
    assert set(one) == set(other)
    for name, x in one.items():
        assert x.dtype == other[name].dtype
        np.testing.assert_array_equal(x, other[name])


def is_same(kind, one, other):
    one, other = kind.arrays(one), kind.arrays(other)
    return set(one) == set(other) and all(np.array_equal(x, other[name]) for name, x in one.items())


# Saving


ON_POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs signals and limits of POSIX")

FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.test_files import FORMATS
folder = Path(sys.argv[1])
made = {name: FORMATS[name].make(1, 600) for name in sys.argv[2:]}
for name, new in made.items():
    kind = FORMATS[name]
    kind.save(kind.make(0), folder / f"{name}{kind.suffix}")
    (folder / "text").write_text("old")
    for limit in (0, 1, 700, 8000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        for save in (kind.save, lambda _, path: __import__("slra")._files.write_file(path, b"x" * 9000)):
            path = folder / (f"{name}{kind.suffix}" if save is kind.save else "text")
            try:
                save(new, path)
            except OSError as error:
                assert path.name in str(error), error
            else:
                raise AssertionError(f"{name} was saved in {limit} bytes")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
"""


def installed():
    from importlib.util import find_spec

    return [name for name, kind in FORMATS.items() if all(map(find_spec, kind.needs))]


def run_root():
    """Folder from which a process of its own finds these tests."""
    return Path(__file__).parents[1]


@ON_POSIX
def test_a_full_disk_leaves_the_old_file(tmp_path):
    names = installed()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), *names],
        cwd=run_root(),
        env=environment(),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    expected = {f"{name}{FORMATS[name].suffix}" for name in names}
    assert {x.name for x in tmp_path.iterdir()} == expected | {"text"}
    assert (tmp_path / "text").read_text() == "old"
    for name in names:
        kind = FORMATS[name]
        assert_same(kind, kind.load(tmp_path / f"{name}{kind.suffix}"), kind.make(0))


# One process imports; a fork of it saves until it is killed.
SAVES = """
import os, signal, sys, time
from tests.test_files import FORMATS
folder, *names = sys.argv[1:]
made = {name: [FORMATS[name].make(number, 600) for number in (0, 1)] for name in names}
for line in sys.stdin:
    name, seconds = line.split()
    kind = FORMATS[name]
    child = os.fork()
    while child == 0:
        for one in made[name]:
            kind.save(one, f"{folder}/{name}{kind.suffix}")
    time.sleep(float(seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


@ON_POSIX
def test_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    names, draw = installed(), random.Random(0)
    paths = {name: tmp_path / f"{name}{FORMATS[name].suffix}" for name in names}
    whole = {name: [FORMATS[name].make(number, 600) for number in (0, 1)] for name in names}
    for name in names:
        FORMATS[name].save(whole[name][0], paths[name])
    with subprocess.Popen(
        [sys.executable, "-c", SAVES, str(tmp_path), *names],
        cwd=run_root(),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        for name in names * 10:
            process.stdin.write(f"{name} {draw.uniform(0.001, 0.03)}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "killed\n"
            back = FORMATS[name].load(paths[name])
            assert any(is_same(FORMATS[name], back, one) for one in whole[name])
        process.stdin.close()
        assert process.wait(30) == 0


def test_no_place_to_save_to_is_oserror(kind, tmp_path):
    new = kind.make(1)
    (tmp_path / f"folder{kind.suffix}").mkdir()
    targets = [f"missing/file{kind.suffix}", f"folder{kind.suffix}"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / f"pipe{kind.suffix}")
        (tmp_path / f"loop{kind.suffix}").symlink_to(f"loop{kind.suffix}")
        targets += [f"pipe{kind.suffix}", f"loop{kind.suffix}"]
    before = sorted(tmp_path.rglob("*"))
    for name in targets:
        with pytest.raises(OSError, match=Path(name).name):
            kind.save(new, tmp_path / name)
        with pytest.raises(OSError, match=Path(name).name):
            kind.load(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@ON_POSIX
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_or_file_is_left(kind, tmp_path):
    path = tmp_path / f"file{kind.suffix}"
    kind.save(kind.make(0), path)
    for place, mode in ((tmp_path, 0o500), (path, 0o400)):
        before = place.stat().st_mode
        place.chmod(mode)
        with pytest.raises(PermissionError):
            kind.save(kind.make(1), path)
        place.chmod(before)
        assert_same(kind, kind.load(path), kind.make(0))
        assert list(tmp_path.iterdir()) == [path]


@ON_POSIX
def test_mode_and_link_are_kept(kind, tmp_path):
    path, link = tmp_path / f"file{kind.suffix}", tmp_path / f"link{kind.suffix}"
    link.symlink_to(path.name)
    kind.save(kind.make(0), link)
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o640)
    kind.save(kind.make(1), link)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert link.is_symlink()
    assert_same(kind, kind.load(path), kind.make(1))


def test_the_longest_name_is_saved(kind, tmp_path):
    path = tmp_path / ("x" * (255 - len(kind.suffix)) + kind.suffix)
    kind.save(kind.make(0), path)
    assert_same(kind, kind.load(path), kind.make(0))


def test_opened_files_are_saved_and_loaded(kind, tmp_path):
    buffer = io.BytesIO()
    kind.save(kind.make(0), buffer)
    assert_same(kind, kind.load(io.BytesIO(buffer.getvalue())), kind.make(0))
    path = tmp_path / "file"
    with path.open("wb", buffering=0) as file:
        kind.save(kind.make(1), file)
    with path.open("rb") as file:
        assert_same(kind, kind.load(file), kind.make(1))
    if kind.suffix != ".safetensors":
        assert path.stat().st_size == len(buffer.getvalue())
    for wrong in (io.StringIO(), 3):
        with pytest.raises(TypeError, match="path must be a path or a file opened for"):
            kind.save(kind.make(0), wrong)
        with pytest.raises(TypeError, match="path must be a path or a file opened for"):
            kind.load(wrong)


def test_savers_of_one_file_in_threads(tmp_path):
    path = tmp_path / "basis"
    bases = [_basis(number, 50) for number in range(8)]
    threads = [
        threading.Thread(target=lambda b=basis: [b.save(path) for _ in range(5)]) for basis in bases
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    back = slra.AttentionBasis.load(path)
    assert any(np.array_equal(back.wq, basis.wq) for basis in bases)
    assert list(tmp_path.iterdir()) == [path]


def test_unbuffered_files_that_take_a_byte_at_a_time():
    class Slow(io.BytesIO):
        def write(self, content):
            return super().write(content[:3])

    slow = Slow()
    write_file(slow, b"0123456789")
    assert slow.getvalue() == b"0123456789"


# Loading


def damaged(content, draw):
    """Flip a bit, more often of the first bytes and the last, where formats keep what they say of themselves."""
    for i in range(N_FLIPS):
        bad, n = bytearray(content), len(content)
        at = [draw.randrange(n), draw.randrange(min(n, 400)), n - 1 - draw.randrange(min(n, 400))]
        bad[at[i % 3]] ^= 1 << draw.randrange(8)
        yield bytes(bad)
    for i in range(N_CUTS):
        yield content[: draw.randrange(len(content))] if i % 2 else content[: -1 - i]


def test_damage_is_valueerror_or_does_no_harm(kind, tmp_path):
    path = tmp_path / f"file{kind.suffix}"
    original = kind.make(0)
    kind.save(original, path)
    content = path.read_bytes()
    refused = 0
    for i, bad in enumerate(damaged(content, random.Random(0))):
        # On a disk it is the disk that takes the time.
        in_memory = i % 50
        if not in_memory:
            path.write_bytes(bad)
        back, said = found(kind.load, io.BytesIO(bad) if in_memory else path)
        assert said is None or in_memory or path.name in said
        assert said is not None or assert_same(kind, back, original) is None
        refused += said is not None
    assert refused > (N_FLIPS + N_CUTS) // 2


def found(load, source):
    """What a loader returns, or says in a ValueError; any other error goes through."""
    try:
        return load(source), None
    except ValueError as error:
        return None, str(error)


REPORT = {
    ".npy": lambda path, x: np.save(path, x),
    ".npz": lambda path, x: np.savez(path, q=x[0], k=x[1], v=x[2]),
    ".safetensors": lambda path, x: __import__("safetensors.numpy").numpy.save_file(
        {name: x[i].copy() for i, name in enumerate("qkv")}, path
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", REPORT)
def test_damaged_arrays_of_a_user(suffix, tmp_path, monkeypatch):
    """Plain arrays have no checksum: it is ValueError, or arrays of as many bytes; with a CRC the same arrays."""
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    from slra import _npz
    from slra.cli.report import arrays

    path, x = tmp_path / f"file{suffix}", np.random.default_rng(0).standard_normal((3, 1, 4, 2))
    REPORT[suffix](path, x)
    for bad in damaged(path.read_bytes(), random.Random(0)):
        for module in (_npz, arrays):
            monkeypatch.setattr(module, "opened", lambda _, bad=bad: io.BytesIO(bad))
        layers, said = found(arrays.read_layers, [path])
        if said is not None:
            assert path.name in said
            continue
        (layer,) = layers
        if suffix == ".npz":
            np.testing.assert_array_equal(np.stack(layer[1:4]), x)
        else:
            assert sum(a.size for a in layer[1:4]) == x.size


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_every_bit_of_a_header(suffix, tmp_path):
    from slra._npz import read_npy, read_npz

    read, path = (read_npy if suffix == ".npy" else read_npz), tmp_path / f"x{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, np.arange(600 * 4.0).reshape(2, 300, 4))
    content = path.read_bytes()
    start = content.index(b"\x93NUMPY")
    for bit in range(8 * 128):
        bad = bytearray(content)
        bad[start + bit // 8] ^= 1 << bit % 8
        x, said = found(read, io.BytesIO(bad))
        if said is not None:
            continue
        assert suffix == ".npy"
        assert x.nbytes == 8 * 600 * 4


def _npz_member(x, *, shape, crc=None):
    """Archive of one array whose header states another shape; its CRC is right."""
    stream = io.BytesIO()
    np.save(stream, x)
    content = stream.getvalue().replace(
        str(x.shape).encode(), str(shape).encode().ljust(len(str(x.shape)))
    )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x.npy", content)
    return archive.getvalue()


def test_nothing_may_follow_an_array(tmp_path):
    from slra._npz import read_npy, read_npz

    x = np.random.default_rng(0).standard_normal((2, 600, 16))
    path = tmp_path / "x.npz"
    path.write_bytes(_npz_member(x, shape=(2, 200, 16)))
    with pytest.raises(ValueError, match="more bytes follow"):
        read_npz(path)
    np.save(tmp_path / "x.npy", x)
    with (tmp_path / "x.npy").open("ab") as file:
        file.write(b"0")
    with pytest.raises(ValueError, match="more bytes follow"):
        read_npy(tmp_path / "x.npy")


@pytest.mark.parametrize("name", ["basis", "matrix.npz", "layers"])
def test_names_and_sizes_come_before_contents(name, tmp_path):
    """What a megabyte unpacks to is not unpacked where it is not wanted, or not what it has to be."""
    kind = FORMATS[name]
    for package in kind.needs:
        pytest.importorskip(package)
    path = tmp_path / f"file{kind.suffix}"
    kind.save(kind.make(0), path)
    content = path.read_bytes()
    with np.load(path) as stored:
        arrays = dict(stored)
    wide = np.zeros((1, 100_000_000), np.uint8)
    first = next(iter(arrays))
    bombs = [{**arrays, "extra": wide}, {**arrays, first: wide.astype(np.uint8)}]
    for bomb in bombs:
        path.write_bytes(content)
        np.savez_compressed(path, **bomb)
        tracemalloc.start()
        with pytest.raises(ValueError, match=path.name):
            kind.load(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 5_000_000


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "x.npz"
    header = b"\x93NUMPY\x02\x00" + (50_000_000).to_bytes(4, "little") + bytes(50_000_000)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("wq.npy", header)
    tracemalloc.start()
    with pytest.raises(ValueError, match="header claims to be"):
        slra.AttentionBasis.load(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_what_is_read_takes_twice_its_size_at_most(kind, tmp_path):
    path = tmp_path / f"file{kind.suffix}"
    kind.save(kind.make(0, 20_000), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    tracemalloc.start()
    with pytest.raises(ValueError, match=path.name):
        kind.load(path)
    assert tracemalloc.get_traced_memory()[1] < 2 * len(content) + 2**22
    tracemalloc.stop()
