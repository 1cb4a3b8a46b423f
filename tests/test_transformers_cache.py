"""The cache in generate: the same tokens at full rank, fewer bytes below."""

import doctest
import io
import json

import numpy as np
import pytest

import slra

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from slra._files import read_safetensors, write_safetensors  # noqa: E402
from slra.integrations import transformers as integration  # noqa: E402
from slra.integrations import transformers_cache  # noqa: E402
from slra.integrations.transformers_cache import LowRankCache  # noqa: E402

LAYERS, WIDTH = 2, 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config).double().eval()


def bases(rank):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn((heads, 60, WIDTH), generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    return [slra.fit_attention(q, k, v, rank, enable_gqa=True) for _ in range(LAYERS)]


PROMPT = torch.arange(2, 26).reshape(2, 12)


def generated(model, cache, **options):
    mask = torch.ones_like(PROMPT)
    mask[0, :4] = 0
    options |= {"max_new_tokens": 12, "do_sample": False}
    if cache is not None:
        options["cache"] = cache
    return model.generate(PROMPT, attention_mask=mask, **options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_at_full_rank_generate_gives_the_same_tokens(model, options):
    cache = LowRankCache(bases(WIDTH), window=3, n_sink=2)
    assert torch.equal(generated(model, cache, **options), generated(model, None, **options))
    assert cache.get_seq_length() == 12 + 11


def test_it_takes_what_calibrate_gives(model):
    name = model.config._attn_implementation
    integration.register("slra-cache", rank=WIDTH)
    model.set_attn_implementation("slra-cache")
    calibrated = integration.calibrate(model, [torch.arange(2, 38)[None, :]])
    model.set_attn_implementation(name)
    assert torch.equal(generated(model, LowRankCache(calibrated)), generated(model, None))


def test_below_full_rank_it_takes_fewer_bytes_and_is_what_attend_gives(model):
    cache = LowRankCache(bases(3), window=3)
    generated(model, cache)
    held = 2 * LAYERS * 2 * 23 * 2 * WIDTH * 8
    assert cache.nbytes == sum(layer.cache.nbytes for layer in cache.layers)
    fixed = LowRankCache(bases(3), window=3)
    for layer in fixed.layers:
        layer.lazy_initialization(torch.zeros(2, 2, 1, WIDTH), torch.zeros(2, 2, 1, WIDTH))
    # Growing leaves a quarter of the room unused at most.
    assert cache.nbytes - fixed.nbytes <= held * 3 / WIDTH * 1.25
    layer = cache.layers[0]
    q = torch.randn((2, 4, 1, WIDTH), dtype=torch.float64)
    out = slra.attention(q, *layer.cache.decode(), enable_gqa=True)
    np.testing.assert_allclose(layer.cache.attend(q), out, atol=1e-12)


def test_it_can_be_used_again_after_a_reset(model):
    cache = LowRankCache(bases(WIDTH))
    first = generated(model, cache)
    cache.reset()
    assert torch.equal(generated(model, cache), first)
    cache.reset()
    # The older name of the argument, which is deprecated.
    with pytest.warns(FutureWarning):
        assert torch.equal(generated(model, None, past_key_values=cache), first)


def test_tokens_of_one_call_see_each_other_exactly(model):
    """A second block that nothing before it matters to: the keys it gets for itself are its own."""
    cache = LowRankCache(bases(2))
    rng = np.random.default_rng(0)
    k, v = (torch.from_numpy(rng.standard_normal((2, 2, 9, WIDTH))) for _ in range(2))
    cache.update(k[..., :4, :], v[..., :4, :], 0)
    for held, came in zip(cache.update(k[..., 4:, :], v[..., 4:, :], 0), (k, v), strict=True):
        assert torch.equal(held[..., 4:, :], came[..., 4:, :])
        assert not torch.allclose(held[..., :4, :], came[..., :4, :])


def test_bases_are_taken_by_name(model):
    first, second = bases(WIDTH)[0], bases(3)[0]
    cache = LowRankCache({"layers.10.attn": second, "layers.2.attn": first})
    ranks = [None if not hasattr(x, "basis") else x.basis.wk.shape[-1] for x in cache.layers]
    assert ranks == [None, None, WIDTH, *[None] * 7, 3]
    for names in (("a", "b"), ("layers.1.q", "layers.1.k")):
        with pytest.raises(ValueError, match="bases must be named by layers"):
            LowRankCache(dict.fromkeys(names, first))


def test_some_layers_may_stay_exact(model):
    for given in ({"model.layers.1.self_attn": bases(3)[1]}, [None, bases(3)[1]]):
        cache = LowRankCache(given, window=3)
        generated(model, cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [23, 23]
        exact = 2 * 2 * 2 * 23 * WIDTH * 8
        assert cache.nbytes == exact + cache.layers[1].cache.nbytes
    cache = LowRankCache({"model.layers.0.self_attn": bases(WIDTH)[0]})
    assert torch.equal(generated(model, cache), generated(model, None))


def test_too_few_bases_are_one_clear_error(model):
    with pytest.raises(ValueError, match="bases must have one for each layer"):
        generated(model, LowRankCache(bases(3)[:1]))


def test_half_precision_is_stored_as_such():
    cache = LowRankCache(bases(3), window=3, dtype=torch.float16)
    k, v = torch.randn(2, 2, 2, 9, WIDTH, dtype=torch.bfloat16)
    cache.update(k, v, 0)
    held = cache.layers[0].cache
    assert held.nbytes_exact == k.nbytes + v.nbytes
    assert "dtype=torch.float16" in repr(held)
    default = LowRankCache(bases(3), window=3)
    default.update(k, v, 0)
    assert "dtype=torch.bfloat16" in repr(default.layers[0].cache)


@pytest.fixture(scope="module")
def before_rotation(model):
    """Bases across heads, of keys before the rotary embedding."""
    name = model.config._attn_implementation
    integration.register("slra-cache", rank=3)
    model.set_attn_implementation("slra-cache")
    rotary = model.base_model.rotary_emb.inv_freq
    texts = [torch.arange(2, 38)[None, :], torch.arange(30, 4, -1)[None, :]]
    calibrated = integration.calibrate(model, texts, across_heads=True, rotary=rotary)
    model.set_attn_implementation(name)
    return calibrated


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("is_before", [False, True], ids=["after", "before rotation"])
def test_in_ten_bits_generate_gives_the_same_tokens(model, options, is_before, before_rotation):
    prompt = torch.arange(2, 50)[None, :] % 12 + 2
    options |= {"max_new_tokens": 12, "do_sample": False}
    exact = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    given = before_rotation if is_before else bases(3)
    # Calibrated coordinates differ more in size: the first would not fit in 14 bits.
    cache = LowRankCache(given, bits=7 if is_before else 10, window=3, n_sink=2)
    mask = torch.ones_like(prompt)
    assert torch.equal(model.generate(prompt, attention_mask=mask, cache=cache, **options), exact)
    assert 5 < cache.bits < 14


def test_keys_are_stored_before_the_rotation_and_come_back_after_it(model, before_rotation):
    """In float32, with the rotation of another implementation; what was computed by them is that of the model."""
    coding = before_rotation["layers.1.self_attn"].coding
    frequencies = model.base_model.rotary_emb.inv_freq.double()
    torch.testing.assert_close(coding.rotary, frequencies.expand(1, -1))
    assert coding.wk.shape == (2, WIDTH, 2 * WIDTH)
    k, v = torch.randn(2, 1, 2, 50, WIDTH, generator=torch.Generator().manual_seed(0))
    n = WIDTH // 2
    turn = torch.polar(torch.ones(50, n).double(), torch.arange(50.0)[:, None] * frequencies)
    turned = torch.complex(k[..., :n].double(), k[..., n:].double()) * turn
    after = torch.cat([turned.real, turned.imag], -1).float()
    cache = LowRankCache(before_rotation, bits=8)
    for part in (slice(0, 20), slice(20, 49), slice(49, 50)):
        back, _ = cache.update(after[:, :, part], v[:, :, part], 1)
    stored, _ = cache.layers[1].cache.decode()
    bound = cache.layers[1].cache.error_bound.keys[..., None]
    assert torch.all(torch.linalg.vector_norm(stored - k, dim=-1) <= bound + 1e-5)
    assert torch.all(torch.linalg.vector_norm(back - after, dim=-1) <= bound + 1e-5)
    assert float(bound.max()) < 0.1 * float(torch.linalg.vector_norm(k, dim=-1).mean())


def test_cropping_takes_tokens_off():
    cache = LowRankCache(bases(3), bits=4)
    k, v = torch.randn(2, 2, 2, 40, WIDTH, dtype=torch.float64)
    for layer in range(LAYERS):
        cache.update(k, v, layer)
    before = cache.layers[1].cache.decode()[0][..., :33, :].clone()
    cache.crop(-7)
    assert cache.get_seq_length() == 33
    assert torch.equal(cache.layers[1].cache.decode()[0], before)


def test_a_sliding_window_is_all_that_such_layers_keep():
    model = mistral().double()
    cache = LowRankCache(bases(3), config=model.config)
    assert torch.equal(generated(model, cache), generated(model, None))
    assert cache.nbytes <= LAYERS * 2 * (2 * 2 * 7 * WIDTH * 8 + 8)


def test_a_cache_that_saves_nothing_says_so():
    k, v = torch.randn(2, 1, 2, 600, WIDTH, dtype=torch.bfloat16)
    cache = LowRankCache(bases(WIDTH)[:1], dtype="float64")
    with pytest.warns(UserWarning, match="bytes where exact keys and values take"):
        cache.update(k, v, 0)
    assert cache.nbytes > cache.nbytes_exact == k.nbytes + v.nbytes
    cache = LowRankCache(bases(WIDTH)[:1], bits=4)
    cache.update(k, v, 0)
    assert cache.nbytes < cache.nbytes_exact


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_with_all_keys_chosen_generate_gives_the_same_tokens(model, options):
    integration.register("slra-choosing")
    right = generated(model, None, **options)
    model.set_attn_implementation("slra-choosing")
    try:
        for chosen in (
            {"n_top": 24},
            {"top_p": 1.0, "rank_index": 1, "window": 2},
            {"top_p": 1.0, "index": "query"},
        ):
            cache = LowRankCache(bases(WIDTH), **chosen)
            np.testing.assert_array_equal(generated(model, cache, **options), right)
    finally:
        model.set_attn_implementation("sdpa")


def test_a_model_attends_to_the_keys_that_its_queries_choose(model):
    """As to a cache of the same tokens made anew at each step; and no other attention takes its keys."""
    integration.register("slra-choosing")
    options = {"n_top": 3, "window": 2, "n_sink": 1}
    held, tokens = bases(WIDTH), torch.arange(1, 21)[None]

    def anew(module, q, k, v, mask, scaling=None, **others):
        cache = slra.KVCache(held[module.layer_idx], batch=(1,), scale=scaling, **options)
        out = (
            cache.append(k, v).attend(q)
            if q.shape[2] < k.shape[2]
            else slra.attention(q, k, v, is_causal=True, enable_gqa=True)
        )
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("anew", anew)
    transformers.AttentionMaskInterface.register("anew", transformers.masking_utils.sdpa_mask)
    found = []
    try:
        for name, cache in (
            ("anew", transformers.DynamicCache()),
            ("slra-choosing", LowRankCache(held, **options)),
        ):
            model.set_attn_implementation(name)
            steps = [tokens[:, :16], tokens[:, 16:17], tokens[:, 17:]]
            with torch.no_grad():
                found.append([model(step, cache=cache).logits for step in steps])
        for one, other in zip(*found, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
        for name in ("sdpa", "eager"):
            model.set_attn_implementation(name)
            with torch.no_grad(), pytest.raises(RuntimeError):
                model(tokens[:, :1], cache=cache)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("chunks", [(12,), (3, 9), (1,) * 12], ids=str)
@pytest.mark.parametrize("options", [{}, {"bits": 3}, {"rtol": 0.2}, {"n_top": 3}], ids=str)
def test_padding_on_the_left_is_no_token(model, before_rotation, options, chunks):
    """Sinks are the first real tokens: logits are those of each sequence in a cache of its own, whatever the chunks."""
    if "n_top" in options:
        integration.register("slra-choosing")
        model.set_attn_implementation("slra-choosing")
    given = bases(WIDTH if "n_top" in options else 3)
    given = before_rotation if "rtol" in options else given
    options = {"n_sink": 2, "window": 2} | options
    tokens = torch.arange(2, 34).reshape(2, 16)

    def run(tokens, mask, chunks):
        cache, found, at = LowRankCache(given, **options), [], 0
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        for n in (*chunks, 1, 1, 2):
            new = slice(at, at + n)
            at += n
            told = {"attention_mask": mask[:, :at], "position_ids": places[:, new]}
            found.append(model(tokens[:, new], cache=cache, **told).logits)
        return torch.cat(found, dim=1), cache

    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    try:
        with torch.no_grad():
            both, cache = run(tokens, mask, chunks)
            # The same chunks, but for what of them is padding.
            ends = np.clip(np.cumsum(chunks) - 5, 0, None)
            own = [int(n) for n in np.diff(ends, prepend=0) if n]
            alone, _ = run(tokens[:1, 5:], mask[:1, 5:], own)
            other, _ = run(tokens[1:], mask[1:], chunks)
    finally:
        model.set_attn_implementation("sdpa")
    np.testing.assert_allclose(both[0, 5:], alone[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(both[1], other[0], rtol=0, atol=1e-12)
    assert cache.get_seq_length() == 16
    assert cache.layers[0].cache.lengths.tolist() == [11, 16]
    cache.crop(-12)
    assert cache.get_seq_length() == 4
    assert cache.layers[0].cache.lengths.tolist() == [0, 4]


def test_with_padding_generate_gives_the_tokens_of_each_sequence_alone(model):
    def make():
        return LowRankCache(bases(3), n_sink=2, window=2)

    both = generated(model, make())
    options = {"max_new_tokens": 12, "do_sample": False}
    for i, first in ((0, 4), (1, 0)):
        prompt = PROMPT[i : i + 1, first:]
        alone = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), cache=make(), **options
        )
        assert torch.equal(both[i, first:], alone[0])
    beams = generated(model, make(), num_beams=2)
    assert beams.shape == both.shape


KEPT = {
    "ranks": {"window": 3, "n_sink": 2, "dtype": torch.bfloat16},
    "bits": {"bits": (3, 4), "window": 3, "n_sink": 2},
    "rtol": {"rtol": 0.05},
    "before rotation": {"bits": 4, "n_sink": 2},
    "chosen": {"n_top": 3, "window": 2},
}


@pytest.mark.parametrize("kept", KEPT)
def test_a_loaded_cache_goes_on_with_the_same_tokens(model, before_rotation, tmp_path, kept):
    pytest.importorskip("safetensors")
    if kept == "chosen":
        integration.register("slra-choosing")
        model.set_attn_implementation("slra-choosing")
    try:
        given = bases(WIDTH if kept == "chosen" else 3)
        given = before_rotation if kept == "before rotation" else given
        cache = LowRankCache(given, **KEPT[kept])
        begun = generated(model, cache)
        cache.save(tmp_path / "a.cache")
        loaded = LowRankCache.load(tmp_path / "a.cache")
        assert loaded.get_seq_length() == cache.get_seq_length()
        for one, other in zip(loaded.layers, cache.layers, strict=True):
            assert one.cache._contents.layout == other.cache._contents.layout
        mask = torch.ones_like(begun)
        mask[0, :4] = 0
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        right = model.generate(begun, cache=cache, **options)
        assert torch.equal(model.generate(begun, cache=loaded, **options), right)
    finally:
        model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="cannot begin anew"):
        loaded.reset()


def mistral():
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        sliding_window=8,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=1,
    )
    return transformers.MistralForCausalLM(config).eval()


def test_exact_layers_and_windows_are_in_the_file_too(model):
    pytest.importorskip("safetensors")
    windowed = mistral().to(torch.bfloat16)
    cases = (
        (model, LowRankCache({"layers.1": bases(3)[1]}, window=3)),
        (windowed, LowRankCache(bases(3), config=windowed.config)),
    )
    for one, cache in cases:
        begun, file = generated(one, cache), io.BytesIO()
        cache.save(file)
        loaded = LowRankCache.load(io.BytesIO(file.getvalue()))
        assert list(map(type, loaded.layers)) == list(map(type, cache.layers))
        assert loaded.nbytes <= cache.nbytes
        mask = torch.ones_like(begun)
        mask[0, :4] = 0
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        right = one.generate(begun, cache=cache, **options)
        assert torch.equal(one.generate(begun, cache=loaded, **options), right)


def test_a_parked_cache_is_read_back_in_bits():
    pytest.importorskip("constriction")
    rng = np.random.default_rng(0)
    k, v = (torch.from_numpy(rng.standard_normal((2, 2, 300, WIDTH))) for _ in "kv")
    cache = LowRankCache({"0": bases(3)[0]}, bits=8, window=4)
    for layer in range(LAYERS):
        cache.update(k, v, layer)
    file, exact = io.BytesIO(), io.BytesIO()
    cache.save(file, bits=3)
    cache.save(exact)
    bare = io.BytesIO()
    cache.save(bare, bits=3, bases={"0": bases(3)[0]})
    assert len(bare.getvalue()) < len(file.getvalue())
    with pytest.raises(ValueError, match="basis"):
        LowRankCache.load(io.BytesIO(bare.getvalue()))
    again = LowRankCache.load(io.BytesIO(bare.getvalue()), bases=[bases(3)[0]])
    assert len(file.getvalue()) < len(exact.getvalue())
    loaded = LowRankCache.load(io.BytesIO(file.getvalue()))
    assert torch.equal(loaded.layers[1].keys, k)
    parked = io.BytesIO()
    cache.layers[0].cache.save(parked, bits=3)
    right = slra.KVCache.load(io.BytesIO(parked.getvalue()), like=k).decode()
    for found in (loaded, again):
        for one, other in zip(found.layers[0].cache.decode(), right, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    again.reset()
    assert again.get_seq_length() == 0
    floats = LowRankCache({"0": bases(3)[0]})
    floats.update(k, v, 0)
    with pytest.raises(ValueError, match="bits must be None but for a cache that has bits"):
        floats.save(io.BytesIO(), bits=3)


def changed(content, change):
    """A file of the same format with a right checksum, of other content."""
    arrays, metadata = read_safetensors(io.BytesIO(content), "slra.LowRankCache 1")
    layers = json.loads(metadata["layers"])
    layers = change(arrays, layers) or layers
    file = io.BytesIO()
    write_safetensors(file, arrays, {"format": metadata["format"], "layers": json.dumps(layers)})
    return file.getvalue()


HOSTILE = {
    "kind": lambda arrays, layers: layers[0].update(kind="pickle"),
    "no list": lambda arrays, layers: {"kind": "exact"},
    "no layer": lambda arrays, layers: layers.pop(),
    "one more": lambda arrays, layers: layers.append({"kind": "exact", "dtype": "float64"}),
    "padding": lambda arrays, layers: layers[0].update(padding=[3, 0]),
    "negative padding": lambda arrays, layers: layers[0].update(padding=[-1, -1]),
    "padding of another shape": lambda arrays, layers: layers[0].update(padding=[0]),
    "no integers": lambda arrays, layers: layers[0].update(padding=[0.0, 0.0]),
    "half a cache": lambda arrays, layers: arrays.update({"0.cache": arrays["0.cache"][:-9]}),
    "dtype": lambda arrays, layers: layers[1].update(dtype="float32"),
    "another dtype": lambda arrays, layers: layers[1].update(dtype="uint8"),
    "batch": lambda arrays, layers: arrays.update(
        {f"1.{x}": arrays[f"1.{x}"][:1] for x in ("keys", "values")}
    ),
    "length": lambda arrays, layers: arrays.update(
        {f"1.{x}": arrays[f"1.{x}"][:, :, :3] for x in ("keys", "values")}
    ),
    "values": lambda arrays, layers: arrays.update({"1.values": arrays["1.values"][:, :1]}),
    "axes": lambda arrays, layers: arrays.update({"1.values": arrays["1.values"][0]}),
    "window": lambda arrays, layers: layers[1].update(window=10**30, length=9),
    "length of a window": lambda arrays, layers: layers[1].update(window=4, length=-1),
    "tokens of a window": lambda arrays, layers: layers[1].update(window=40, length=10),
}


@pytest.mark.parametrize("change", HOSTILE)
def test_files_that_are_refused(change):
    pytest.importorskip("safetensors")
    rng = np.random.default_rng(0)
    k, v = (torch.from_numpy(rng.standard_normal((2, 2, 9, WIDTH))) for _ in "kv")
    cache, file = LowRankCache({"0": bases(3)[0]}), io.BytesIO()
    for layer in range(LAYERS):
        cache.update(k, v, layer)
    cache.save(file)
    content = file.getvalue()
    assert LowRankCache.load(io.BytesIO(changed(content, lambda *_: None))).get_seq_length() == 9
    refused = pytest.raises(ValueError, match=r"path must be a file written by LowRankCache\.save")
    with refused:
        LowRankCache.load(io.BytesIO(changed(content, HOSTILE[change])))
    if change == "kind":
        damaged = bytearray(content)
        damaged[-5] ^= 1
        single = io.BytesIO()
        cache.layers[0].cache.save(single)
        for wrong in (bytes(damaged), content[:-1], b"", single.getvalue()):
            with refused:
                LowRankCache.load(io.BytesIO(wrong))


def test_what_is_not_saved_is_said():
    with pytest.raises(ValueError, match="must hold tokens in each layer, layer 0 has none"):
        LowRankCache(bases(3)).save(io.BytesIO())
    cache = LowRankCache({})
    cache.layers.append(transformers.cache_utils.StaticLayer(8))
    with pytest.raises(ValueError, match="layer 0 is a StaticLayer"):
        cache.save(io.BytesIO())


def test_options_that_need_queries_are_refused():
    with pytest.raises(TypeError, match="options must be those of a cache with a fixed basis"):
        LowRankCache(bases(3), drift_bound=0.1)


def test_examples_run():
    result = doctest.testmod(transformers_cache)
    assert (result.failed, result.attempted > 0) == (0, True)
