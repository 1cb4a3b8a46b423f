"""The report command: every form of input, each error, and the numbers against NumPy."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
import zipfile

import numpy as np
import pytest

pytest.importorskip("typer", reason="the demo extra is not installed")
pytest.importorskip("matplotlib", reason="the demo extra is not installed")

from typer.testing import CliRunner

import slra
from slra.cli.app import app
from slra.cli.report.advice import advise
from slra.cli.report.arrays import read_layers
from slra.cli.report.measure import count_steps, effective_rank, measure, needed_ranks
from tests.browser import measured
from tests.command import environment
from tests.naive_attention import softmax_attention

N, D = 12, 4


def run(*args):
    return CliRunner().invoke(app, ["report", *map(str, args)])


def inputs(heads=2, key_heads=2, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = ((heads, N, D), (key_heads, N, D), (key_heads, N, 3))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def write_npz(path, q, k, v, prefix=""):
    np.savez(path, **{f"{prefix}q": q, f"{prefix}k": k, f"{prefix}v": v})
    return path


def cut(x, rank):
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def naive_error(method, group, i, k, v, rank, causal, scale):
    """Relative error of one of the query heads that share K and V, by truncated SVDs written out."""
    q = group[i]
    exact = softmax_attention(scale * q @ k.T, v, causal)
    if method == "svd":
        low = softmax_attention(scale * cut(q, rank) @ cut(k, rank).T, cut(v, rank), causal)
    else:
        mean = v.mean(0)
        # One basis for all heads of the group.
        scores = cut(np.concat(group) @ (k - k.mean(0)).T, rank).reshape(-1, N, N)[i]
        low = softmax_attention(scale * scores, cut(v - mean, rank) + mean, causal)
    return np.linalg.norm(low - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize(("causal", "scale"), [(False, None), (True, 0.8)])
def test_numbers_against_numpy(tmp_path, causal, scale):
    q, k, v = inputs(heads=4)
    target = tmp_path / "out.json"
    options = [*(["--causal"] if causal else []), *(["--scale", scale] if scale else [])]
    done = run(write_npz(tmp_path / "a.npz", q, k, v), "--json", target, *options)
    assert done.exit_code == 0, done.output
    (layer,) = json.loads(target.read_text())["layers"]
    assert layer["ranks"] == [1, 2, 3, 4]
    assert layer["attends"] == ("causal" if causal else "every token sees all")
    assert layer["scale"] == scale
    for method in ("svd", "scores"):
        expected = [
            [
                naive_error(
                    method,
                    q[h // 2 * 2 :][:2],
                    h % 2,
                    k[h // 2],
                    v[h // 2],
                    rank,
                    causal,
                    scale or D**-0.5,
                )
                for h in range(4)
            ]
            for rank in layer["ranks"]
        ]
        # Well-conditioned float64: rounding is a few hundred eps.
        in_sample = layer["errors_in_sample"][method]
        np.testing.assert_allclose(in_sample, expected, rtol=1e-9, atol=1e-12)
        # Ranks are needed of what the fit has not seen.
        options = {"is_causal": causal, "scale": scale, "enable_gqa": True, "method": method}
        for rank, errors in zip(layer["ranks"], layer["errors"][method], strict=True):
            basis = slra.fit_attention(q, k, v, (rank, min(rank, v.shape[-1])), **options)
            np.testing.assert_allclose(errors, basis.error, rtol=1e-9, atol=1e-12)
    assert layer["errors_are_held_out"]
    assert np.max(layer["errors"]["output"][-1]) < 1e-12
    for name, x in zip("qkv", (q, k, v), strict=True):
        expected = np.linalg.svd(x, compute_uv=False)
        np.testing.assert_allclose(layer["singular_values"][name], expected, rtol=1e-12)
        p = expected / expected.sum(-1, keepdims=True)
        erank = np.exp(-(p * np.log(p)).sum(-1))
        np.testing.assert_allclose(layer["effective_ranks"][name], erank, rtol=1e-12)
    for method, needed in layer["needed_ranks"].items():
        errors = np.array(layer["errors"][method])
        for tolerance, ranks in needed.items():
            for head, rank in enumerate(ranks):
                assert (errors[rank - 1 :, head] <= float(tolerance)).all()
                assert rank == 1 or errors[rank - 2, head] > float(tolerance)
    assert layer["exact_bytes"] == 2 * N * (D + 3) * 8


def low_rank_inputs():
    """Two heads that rank 2 holds whole, K and V with nothing to shift."""
    rng = np.random.default_rng(1)
    return [rng.standard_normal((2, 64, 2)) @ rng.standard_normal((2, 2, 16)) for _ in range(3)]


def test_what_low_rank_saves(tmp_path):
    write_npz(tmp_path / "a.npz", *low_rank_inputs())
    (layer,) = read_layers([tmp_path / "a.npz"])
    steps = []
    report = measure(layer, lambda: steps.append(1))
    assert len(steps) == count_steps([layer])
    assert report.needed["svd"][0.01] == [2, 2]
    # K and V of two heads: 64 x 2 coordinates and a 16 x 2 basis, 8 bytes each
    assert report.kv_bytes["svd"][0.01] == 2 * 2 * (64 + 16) * 2 * 8
    assert [one.rank for one in report.timings] == [
        max(report.needed[report.best][one.tolerance]) for one in report.timings
    ]
    assert advise(report)[0].startswith("Compress")
    worse = report._replace(kv_bytes={report.best: {0.05: report.exact_bytes}})
    assert advise(worse)[0].startswith("Keep exact")


def gaussian(n=280, d=16, scale=1.0):
    """Four heads on two, of which none has low rank."""
    rng = np.random.default_rng(2)
    return [scale * rng.standard_normal((heads, n, d)) for heads in (4, 2, 2)]


@pytest.mark.parametrize("causal", [False, True])
def test_bits_beside_ranks_against_the_cache_and_kivi(tmp_path, causal):
    q, k, v = gaussian()
    n, half, options = 280, 140, ["--causal"] if causal else []
    done = run(write_npz(tmp_path / "a.npz", q, k, v), "--json", tmp_path / "a", *options)
    assert done.exit_code == 0, done.output
    (layer,) = json.loads((tmp_path / "a").read_text())["layers"]
    found = layer["in_bits"]
    keys = half if causal else n
    fit = {"is_causal": causal, "enable_gqa": True}
    basis = slra.fit_attention(q[:, :half], k[:, :keys], v[:, :keys], 16, **fit)
    fit |= {"causal_align": "bottom_right"}
    exact = [softmax_attention(q[h] @ k[h // 2].T / 4, v[h // 2], causal)[half:] for h in range(4)]

    def errors(out):
        return np.linalg.norm(out - exact, axis=(-2, -1)) / np.linalg.norm(exact, axis=(-2, -1))

    # Groups along 272 tokens and 16 channels have 32 bits each; 8 tokens wait for their block to be full.
    pairs = [(b + 32 * 5 / 272, b + 2) for b in (8, 6, 5, 4, 3, 2)]
    np.testing.assert_allclose(found["bits"], np.mean(pairs, axis=1), rtol=1e-12)
    for i, (bits, pair) in enumerate(zip((8, 6, 5, 4, 3, 2), pairs, strict=True)):
        kivi = slra.baselines.kivi(q, k, v, bits, group_size=64, n_exact=8, **fit)[:, half:]
        np.testing.assert_allclose(found["errors"]["kivi"][i], errors(kivi), rtol=1e-9)
        cache = slra.KVCache(basis, bits=pair).append(k, v)
        out = cache.attend(q[:, half:], is_causal=causal)
        np.testing.assert_allclose(found["errors"]["cache"][i], errors(out), rtol=1e-9)
        assert found["bits_taken"][i] == cache.bits
        # The first blocks of so few tokens are not packed at 8 bits and more.
        assert bits == 8 or abs(cache.bits - found["bits"][i]) < 0.1
    assert found["map_bytes"] == slra.KVCache(basis, bits=8).nbytes
    for way, needed in found["needed_bits"].items():
        for tolerance, bits in needed.items():
            worst = np.max(found["errors"][way], axis=1)
            at = found["bits"].index(bits)
            assert (worst[: at + 1] <= float(tolerance)).all()
            assert at == 5 or worst[at + 1] > float(tolerance)


def test_advice_is_bits_where_bits_win(tmp_path):
    """Ranks hold nothing of noise, int8 nearly all; of two dimensions in 16 they hold all, and bits are fewer bytes."""
    path = write_npz(tmp_path / "a.npz", *(x.astype(np.float32) for x in gaussian(n=128)))
    lines = run(path).stdout.splitlines()
    text = " ".join(lines)
    assert lines[1].startswith("Keep K and V in bits: with bits=")
    assert re.search(r"rounded plainly \(KIVI\) they take \d\d%, by ranks \d\d+%", text)
    assert re.search(
        r"Ranks alone lose: at the bytes of int8 the best of them are off by \d\d", text
    )
    assert "Bits save memory, not time" in text
    assert "Compress" not in text
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, 128, 2)) @ rng.standard_normal((2, 2, 16)) for _ in "qkv")
    (layer,) = read_layers([write_npz(tmp_path / "b.npz", q, k, v)])
    report = measure(layer, lambda: None)
    said = " ".join(advise(report))
    assert said.startswith("Keep K and V in bits")
    assert 'Ranks, by method "' in said
    assert "Ranks alone lose" not in said
    # Where bits are not enough, or not looked at, ranks are advised; plain rounding where it takes fewer.
    assert advise(report._replace(in_bits=None))[0].startswith("Compress with method")
    found = report.in_bits
    off = {**found.errors, "cache": 1 + found.errors["cache"]}
    assert advise(report._replace(in_bits=found._replace(errors=off)))[0].startswith(
        "Round K and V"
    )
    off = {way: 1 + errors for way, errors in found.errors.items()}
    assert advise(report._replace(in_bits=found._replace(errors=off)))[0].startswith(
        "Compress with"
    )


def test_several_layers_are_advised_bits_together(tmp_path):
    q, k, v = gaussian(n=128)
    arrays = {
        f"layer{i}/{name}": x for i in range(2) for name, x in zip("qkv", (q, k, v), strict=True)
    }
    np.savez(tmp_path / "two.npz", **arrays)
    done = run(tmp_path / "two.npz", "--details", "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[1].startswith("Keep K and V in bits")
    assert done.stdout.count(": bits") == 2
    assert "Bits instead of ranks" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_effective_rank_and_needed_rank():
    np.testing.assert_allclose(effective_rank(np.array([[3.0, 3, 3], [1, 0, 0]])), [3, 1])
    assert effective_rank(np.zeros((1, 3))) == [0]
    errors = np.array([[0.04, 0.2], [0.2, 0.2], [0.01, 0.2]])  # a dip is not yet enough
    assert needed_ranks(errors, [1, 2, 4], 0.05) == [4, None]


def test_causal_queries_are_the_last_of_the_text(tmp_path):
    q, k, v = inputs()
    whole = run(write_npz(tmp_path / "a.npz", q[:, 5:], k, v), "--causal", "--json", tmp_path / "a")
    assert whole.exit_code == 0, whole.output
    assert json.loads((tmp_path / "a").read_text())["layers"][0]["attends"] == "causal"


def test_a_zero_head_is_no_error(tmp_path):
    q, k, v = inputs()
    v[1] = 0
    target = tmp_path / "out.json"
    assert run(write_npz(tmp_path / "a.npz", q, k, v), "--json", target).exit_code == 0
    (layer,) = json.loads(target.read_text())["layers"]
    assert layer["effective_ranks"]["v"][1] == 0
    assert layer["needed_ranks"]["output"]["0.01"][1] == 1


def test_forms_of_input(tmp_path):
    q, k, v = inputs(dtype=np.float16)
    files = [tmp_path / f"{name}.npy" for name in "qkv"]
    for path, x in zip(files, (q, k, v), strict=True):
        np.save(path, x)
    np.save(tmp_path / "all.npy", np.stack([q, k, k]))
    np.savez(
        tmp_path / "deep.npz", **{f"layer{i}/{n}": k for i in (10, 9) for n in "qkv"}, tokens="x"
    )
    (three,) = read_layers(files)
    (one,) = read_layers([tmp_path / "all.npy"])
    assert three.itemsizes == one.itemsizes == (2, 2)
    assert three.dtype == "float16"
    for layer, expected in ((three, (q, k, v)), (one, (q, k, k))):
        for x, y in zip(layer[1:4], expected, strict=True):
            assert x.dtype == np.float32
            np.testing.assert_array_equal(x, y.astype(np.float32))
    assert [x.name for x in read_layers([tmp_path / "deep.npz"])] == ["layer9", "layer10"]
    np.save(tmp_path / "head.npy", np.stack([q[0], k[0], k[0]]))
    assert read_layers([tmp_path / "head.npy"])[0].q.shape == (1, N, D)


def test_safetensors_bfloat16(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    x = torch.arange(24, dtype=torch.float32).reshape(1, 6, 4).to(torch.bfloat16) / 3
    save_file(
        {f"h.{n}": x.clone() for n in "qkv"} | {"h.ids": torch.arange(3)},
        tmp_path / "a.safetensors",
    )
    (layer,) = read_layers([tmp_path / "a.safetensors"])
    assert (layer.name, layer.dtype, layer.itemsizes) == ("h", "bfloat16", (2, 2))
    np.testing.assert_array_equal(layer.q, x.float().numpy())


def refused(tmp_path, *paths):
    """The one line with which a report ends; nothing was written."""
    done = run(*paths, "--json", tmp_path / "out.json")
    assert done.exit_code == 1
    assert not (tmp_path / "out.json").exists()
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, k, v: (q, np.where(k > 1, np.nan, k), v), "k of layer a must be finite"),
        (
            lambda q, k, v: (q.astype(int), k, v),
            "q of layer a must be real floating, got dtype int64",
        ),
        (lambda q, k, v: (q, k, v * 1j), "v of layer a must be real floating"),
        (lambda q, k, v: (q[..., :3], k, v), "must have shapes q (..., Hq, Nq, D)"),
        (lambda q, k, v: (q[..., :3], k, v), "D, the last axis of q and k, must agree"),
        (lambda q, k, v: (q, k, v[:, :5]), "Nk, the second last axis of k and v, must agree"),
        (lambda q, k, v: (q, k, v[:1]), "Hkv, the third last axis of k and v, must agree"),
        (lambda q, k, v: (q, k[None], v), "equally many axes"),
        (lambda q, k, v: (q[None], k[None], np.stack([v, v])), "the leading axes of k and v"),
        (
            lambda q, k, v: (np.concat([q, q[:1]]), k, v),
            "the 3 heads of q are no multiple of the 2",
        ),
        (lambda q, k, v: (q[:, :0], k, v), "axis 1 of q is empty"),
        (lambda q, k, v: (q, k, np.array([{}])), "Object arrays cannot be loaded"),
    ],
)
def test_arrays_that_are_refused(tmp_path, change, said):
    path = write_npz(tmp_path / "a.npz", *change(*inputs()))
    assert said in refused(tmp_path, path)


def test_files_that_are_refused(tmp_path):
    q, _, _ = inputs()
    np.save(tmp_path / "objects.npy", np.array([{}]))
    np.save(tmp_path / "flat.npy", q)
    np.savez(tmp_path / "other.npz", x=q)
    np.savez(tmp_path / "half.npz", q=q)
    for name in ("bad.npy", "bad.npz", "bad.safetensors", "bad.txt"):
        (tmp_path / name).write_bytes(b"not this")
    said = {
        "objects.npy": "Object arrays",
        "flat.npy": "must have shape (3, ..., H, N, D)",
        "other.npz": "must hold arrays named q, k and v",
        "half.npz": "lacks k, v",
        "bad.npy": "bad.npy cannot be read",
        "bad.npz": "bad.npz cannot be read",
        "bad.safetensors": "bad.safetensors cannot be read",
        "bad.txt": "must be one .npy, .npz or .safetensors file, or three",
        "absent.npz": "No such file",
    }
    for name, words in said.items():
        assert words in refused(tmp_path, tmp_path / name)
    assert "in the order q k v" in refused(tmp_path, tmp_path / "flat.npy", tmp_path / "flat.npy")
    done = run(tmp_path / "other.npz", "--html", tmp_path / "other.npz")
    assert done.exit_code == 1
    assert "--html must be a file other than" in done.stderr


def test_targets_that_are_refused(tmp_path):
    """Two outputs of one name, however it is written, and folders that are not there: a typing error makes none."""
    path = write_npz(tmp_path / "a.npz", *inputs())
    same = tmp_path / ".." / tmp_path.name / "out"
    done = run(path, "--html", tmp_path / "out", "--json", same)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "--json must be a file other than those that are read or written" in done.stderr
    done = run(path, "--html", tmp_path / "absent" / "page.html")
    assert done.exit_code == 1
    assert "the folder of --html must exist" in done.stderr
    assert [x.name for x in tmp_path.iterdir()] == ["a.npz"]


def many_layers(tmp_path, n_layers):
    arrays = dict(zip("qkv", inputs(), strict=True))
    path = tmp_path / "many.npz"
    np.savez(path, **{f"layer{i}/{name}": x for i in range(n_layers) for name, x in arrays.items()})
    return path


def test_verdict_first_and_few_lines(tmp_path):
    path = many_layers(tmp_path, 12)
    done = run(path, "--json", tmp_path / "some.json")
    lines = done.stdout.splitlines()
    assert done.exit_code == 0, done.output
    assert len(lines) <= 30
    assert lines[1].startswith("Keep exact attention in all 5 layers")
    assert "5 of 12 layers; --all-layers takes all" in done.stderr
    layers = json.loads((tmp_path / "some.json").read_text())["layers"]
    assert [x["name"] for x in layers] == [f"layer{i}" for i in (0, 3, 6, 8, 11)]
    every = run(path, "--all-layers", "--json", tmp_path / "all.json")
    assert every.exit_code == 0, every.output
    assert len(json.loads((tmp_path / "all.json").read_text())["layers"]) == 12
    single = run(write_npz(tmp_path / "a.npz", *low_rank_inputs()))
    assert single.stdout.splitlines()[1].startswith("Compress with")
    assert len(single.stdout.splitlines()) <= 30


def test_progress_where_stderr_is_no_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr("slra.cli.terminal.LINE_EVERY", 0.0)
    done = run(many_layers(tmp_path, 2))
    said = re.findall(r"Attention, exact and low rank: (\d+) of (\d+), \d+ s", done.stderr)
    assert [int(i) for i, _ in said] == list(range(1, int(said[0][1]) + 1))


def test_ctrl_c_keeps_the_layers_that_are_done(tmp_path, monkeypatch):
    from slra.cli.report import measure as module

    def interrupted(layer, advance):
        if layer.name == "layer2":
            raise KeyboardInterrupt
        return measure(layer, advance)

    monkeypatch.setattr(module, "measure", interrupted)
    done = run(many_layers(tmp_path, 4), "--json", tmp_path / "out.json")
    assert done.exit_code == 130
    assert "Interrupted: 2 of 4 layers were measured." in done.stderr
    assert "2 of its layers" in done.stdout
    layers = json.loads((tmp_path / "out.json").read_text())["layers"]
    assert [x["name"] for x in layers] == ["layer0", "layer1"]


def test_tokens_before_heads_are_pointed_out(tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 20, 2, 4))
    np.save(tmp_path / "a.npy", x)
    assert (
        "a: read as 20 heads of 2 tokens. Heads come before tokens"
        in run(tmp_path / "a.npy").stderr
    )
    np.save(tmp_path / "b.npy", x.swapaxes(1, 2))
    assert "Heads come" not in run(tmp_path / "b.npy").stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_an_output_that_takes_no_more(tmp_path):
    write_npz(tmp_path / "a.npz", *inputs())
    for command in (["report", "a.npz"], ["report", "--help"], ["--version"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "slra", *command],
                cwd=tmp_path,
                env=environment(),
                stdout=full,
                stderr=subprocess.PIPE,
                encoding="utf-8",
            )
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("cannot write to standard output")
        assert "Traceback" not in done.stderr


def test_help_and_version(monkeypatch):
    import slra

    monkeypatch.setenv("COLUMNS", "200")
    help_text = run("--help").stdout
    assert "<bool>" not in help_text.replace("--help", "").split("--causal")[1].splitlines()[0]
    assert CliRunner().invoke(app, ["--version"]).stdout == f"slra {slra.__version__}\n"


def test_page_is_whole_and_loads_nothing(tmp_path):
    q, k, v = inputs(heads=4)
    np.savez(
        tmp_path / "a&b.npz",
        **{f"{n}/{x}": a for n in ("one", "<two>") for x, a in zip("qkv", (q, k, v), strict=True)},
    )
    (tmp_path / "new").mkdir()
    target = tmp_path / "new" / "page.html"
    done = run(tmp_path / "a&b.npz", "--html", target)
    assert done.exit_code == 0, done.output
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]
    text = target.read_text(encoding="utf-8")
    root = ET.fromstring(text)
    metas = [dict(x.attrib) for x in root.iter("meta")]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert [x.text for x in root.iter("h2")] == ["All layers", "<two>", "one"]
    assert len([x for x in root.iter() if x.tag.endswith("svg")]) == 2
    for x in root.iter():
        assert x.tag not in ("script", "link", "img", "iframe")
        for name, value in x.attrib.items():
            assert not name.endswith(("src", "href")) or value.startswith("#")
    assert not re.search(r"url\((?!#)|@import", text)
    assert "color-scheme: light dark" in text
    assert "#010203" not in text


@pytest.mark.parametrize(("of_qk", "of_v"), [(1e200, 1), (1, 1e300)])
def test_numbers_that_cannot_be_attended_to(tmp_path, of_qk, of_v):
    """Scores that overflow, and outputs whose norm does."""
    q, k, v = inputs()
    path = write_npz(tmp_path / "a.npz", of_qk * q, of_qk * k, of_v * v)
    done = run(path, "--html", tmp_path / "page.html")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("layer a must hold numbers whose products")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_scales_that_are_refused(tmp_path, scale):
    path = write_npz(tmp_path / "a.npz", *inputs())
    done = run(path, "--scale", scale)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "scale must be finite" in done.stderr


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    """The page of two layers, of the names and the number of heads that real models have."""
    folder = tmp_path_factory.mktemp("page")
    rng = np.random.default_rng(0)
    shapes = {"q": (12, 128, 16), "k": (12, 128, 16), "v": (12, 128, 16)}
    arrays = {
        f"encoder.layer.{i}.attention.self/{name}": rng.standard_normal(shape)
        for i in range(2)
        for name, shape in shapes.items()
    }
    np.savez(folder / "with_a_name_that_is_longer_than_a_phone_is_wide.npz", **arrays)
    (path,) = folder.iterdir()
    done = run(path, "--html", folder / "page.html")
    assert done.exit_code == 0, done.output
    assert "All layers" in done.stdout
    return folder / "page.html"


def test_page_in_a_browser(two_layers, tmp_path):
    phone, desk = measured(two_layers, tmp_path, 360, 1200)
    for layout in (phone, desk):
        assert layout["scroll_width"] <= layout["width"]
        assert layout["loaded"] == layout["clipped"] == []
        assert layout["too_wide"] == 0
        assert len(layout["pictures"]) == 2
        for width, height in layout["pictures"]:
            assert 300 < width <= layout["width"]
            assert height > width
    assert min(phone["letters"]) >= 10  # pixels
    assert max(desk["letters"]) <= 20


def test_the_browser_sees_what_is_wrong(tmp_path):
    """Else a page that passes would say nothing."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!DOCTYPE html><body><div style="width:500px">x</div><img src="http://127.0.0.1:9/a.png">'
        '<svg width="20" height="20"><text>clipped</text></svg></body>'
    )
    (layout,) = measured(bad, tmp_path, 360)
    assert layout["scroll_width"] > layout["width"] == 360
    assert layout["loaded"] == ["http://127.0.0.1:9/a.png"]
    assert layout["clipped"] == ["clipped"]
    bad.write_text("<!DOCTYPE html><body><script>nothing.there</script></body>")
    with pytest.raises(AssertionError, match="nothing is not defined"):
        measured(bad, tmp_path, 360)


HUGE = (1 << 20, 1 << 20, 1 << 10)


def npy_bytes(shape, data=b"\0" * 64, descr="<f8"):
    """An .npy file whose header says this shape, whatever follows it."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + data


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (HUGE, "its header claims an array of shape"),
        ((3, 2, 4), "192 bytes, and no more than 64 can follow"),
        ((0, 10**30), "cannot be read"),
        ((-1, 8), "its header claims the shape (-1, 8)"),
    ],
)
@pytest.mark.parametrize("compression", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_sizes_that_a_file_only_claims(tmp_path, compression, shape, said):
    content = npy_bytes(shape)
    if compression is None:
        path = tmp_path / "a.npy"
        path.write_bytes(content)
    else:
        path = tmp_path / "a.npz"
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("q.npy", content)
    assert said in refused(tmp_path, path)


def test_sizes_that_an_archive_only_claims(tmp_path):
    """The directory at its end agrees with the header of the array; only the file is too small for both."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("q.npy", npy_bytes((1 << 28,)))
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\1\2")
    content[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")  # size when decompressed
    path.write_bytes(content)
    assert "can follow" in refused(tmp_path, path)


def test_arrays_of_other_names_are_not_looked_at(tmp_path):
    q, k, v = inputs()
    path = tmp_path / "a.npz"
    np.savez(path, q=q, k=k, v=v, notes=np.array([{}]))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "no array")
        archive.writestr("more.npy", npy_bytes(HUGE))
    (layer,) = read_layers([path])
    np.testing.assert_array_equal(layer.q, q)


def test_names_are_no_markup(tmp_path):
    path = write_npz(tmp_path / "[b]a.npz", *inputs(), prefix="[red]x/")
    done = run(path, "--details")
    assert done.exit_code == 0, done.output
    assert "[red]x: heads" in done.stdout
    assert "[b]a.npz" in done.stdout.replace("\n", "")


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "a.npz", *inputs())
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "r.json").write_text("the last run's")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    assert run(path, "--json", folder / "r.json").exit_code != 0
    assert [x.name for x in folder.iterdir()] == ["r.json"]
    assert (folder / "r.json").read_bytes() == b"the last run's"


# As a shell in the foreground has it; under one that runs in the background Python would not see the signal.
INTERRUPTIBLE = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "slra"
runpy.run_module("slra", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_leaves_no_half_written_file(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.standard_normal((3, 4, 2048, 64)).astype(np.float32))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "page.html").write_text("the last run's")
    terminal, end = os.openpty()
    args = ["report", "a.npy", "--html", "out/page.html", "--json", "out/numbers.json"]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *args],
        cwd=tmp_path,
        env=environment(TERM="xterm"),
        stdout=subprocess.DEVNULL,
        stderr=end,
    )
    os.close(end)
    seen = read_until(terminal, lambda seen: re.search(rb" [1-9]\d*/\d\d", seen))
    process.send_signal(signal.SIGINT)
    seen += read_until(terminal, lambda seen: False)
    assert process.wait(60) == 130
    assert seen.rstrip().endswith(b"Interrupted.")
    assert b"Traceback" not in seen
    assert [x.name for x in folder.iterdir()] == ["page.html"]
    assert (folder / "page.html").read_text() == "the last run's"


def read_until(terminal, found):
    """What is written on a terminal until it is found, or until nobody has the terminal open."""
    seen = b""
    while not found(seen):
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # how Linux says so
            break
    return seen
