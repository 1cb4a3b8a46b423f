"""What the integrations cannot do: each error that docs/integrations.md lists is raised here, and none is missing."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

import slra
from tests.models import VOCABULARY, WIDTH, decoder, tokens

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"


def rows():
    """(framework, error) of each row of the table."""
    found = re.findall(r"^\| (\S+) \| .* \| `(.*)` \|$", PAGE.read_text(), flags=re.MULTILINE)
    return [(framework.lower(), error) for framework, error in found]


def integration():
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    from slra.integrations import transformers

    return transformers


def using(model, rank=4, **settings):
    integration().register("slra", rank, **settings)
    model.set_attn_implementation("slra")
    return model


def encoder(**options):
    import transformers

    config = transformers.BertConfig(
        hidden_size=4 * WIDTH,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        **options,
    )
    return using(transformers.BertModel._from_config(config).eval())


def bart():
    import transformers

    sizes = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 32))
    }
    config = transformers.BartConfig(d_model=4 * WIDTH, vocab_size=VOCABULARY, **sizes)
    return using(transformers.BartModel._from_config(config).eval())


def layer(**others):
    import torch
    from transformers import AttentionInterface

    integration().register("slra", 2)
    q, k, v = (torch.ones(1, 2, 5, WIDTH) for _ in range(3))
    AttentionInterface()["slra"](torch.nn.Module(), q, k, v, None, is_causal=False, **others)


def output_attentions_in_the_configuration():
    encoder().config.output_attentions = True


def bases(width=WIDTH, batch=()):
    import torch

    q, k, v = (torch.randn(*batch, n, 12, width) for n in (4, 2, 2))
    fitted = slra.fit_attention(q, k, v, 2, enable_gqa=True)
    return {"layers.0.self_attn": fitted}


def run_on_bases_of_other_heads():
    model = using(decoder("llama"))
    integration().attach(model, bases(WIDTH // 2))
    model(tokens(0, 1, 9))


def run_without_rank_and_basis():
    using(decoder("llama"), None)(tokens(0, 1, 9))


def calibrate_without_rank():
    model = using(decoder("llama"), None)
    integration().calibrate(model, [tokens(0, 1, 9)])


def calibrate_another_implementation():
    integration().calibrate(decoder("llama"), [tokens(0, 1, 9)])


def calibrate_an_encoder_decoder_on_padding():
    ids = tokens(0, 1, 9)
    batch = {
        "input_ids": ids,
        "attention_mask": (ids != ids[0, 0]).long(),
        "decoder_input_ids": ids,
    }
    integration().calibrate(bart(), [batch])


def calibrate_with_additive_masks():
    import torch

    batch = {"input_ids": tokens(0, 1, 9), "attention_mask": torch.ones(1, 1, 9, 9)}
    integration().calibrate(using(decoder("llama")), [batch])


def load_another_file(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    integration().load(tmp_path / "other.npz")


TRANSFORMERS = {
    "dropout must be 0, got 0.1": lambda: encoder().train()(tokens(0, 1, 9)),
    "output_attentions must be False": lambda: encoder()(tokens(0, 1, 9), output_attentions=True),
    "attribute is not supported when using the": output_attentions_in_the_configuration,
    "position_bias must be None": lambda: layer(position_bias=1),
    "indices must be None": lambda: layer(indices=1),
    "predicts tokens, and a basis fitted to this call would see later ones": lambda: using(
        decoder("llama")
    )(tokens(0, 1, 9)),
    "rank must be between 1 and 8 (min of Nk and D)": lambda: using(encoder(), 9)(tokens(0, 1, 20)),
    "rank must be between 1 and 65536": lambda: integration().register("slra", 0),
    "has no basis, and 'slra' is registered without rank and rtol": run_without_rank_and_basis,
    "name must be a new one, got 'sdpa'": lambda: integration().register("sdpa", 4),
    "must be registered with rank or rtol to calibrate": calibrate_without_rank,
    "model must be in eval mode for calibration": lambda: integration().calibrate(
        decoder("llama").train(), []
    ),
    "model must use a name registered by slra.integrations.transformers.register": (
        calibrate_another_implementation
    ),
    "batches must be an iterable of mappings": lambda: integration().calibrate(
        using(decoder("llama")), ["text"]
    ),
    "attention_mask must be boolean to calibrate": calibrate_with_additive_masks,
    "attention_mask must be 1 throughout to calibrate an encoder-decoder": (
        calibrate_an_encoder_decoder_on_padding
    ),
    "bases must be of layers of LlamaForCausalLM": lambda: integration().attach(
        decoder("llama"), {"layers.7.self_attn": None}
    ),
    "q and v must have the widths (D, Dv) of the basis": run_on_bases_of_other_heads,
    "must have no batch axis": lambda: integration().attach(decoder("llama"), bases(batch=(2,))),
    "path must be a file written by slra.integrations.transformers.save": load_another_file,
}


def compiled(function):
    import torch

    torch.compiler.reset()
    torch.compile(function, backend="eager")(torch.ones(40, 30))


def compiled_favor():
    import torch

    def run(x):
        return slra.baselines.favor(x, x, x, 2)

    torch.compiler.reset()
    torch.compile(run, fullgraph=True, backend="eager")(torch.ones(5, 4))


def checkpointed():
    import torch
    from torch.utils.checkpoint import checkpoint

    from slra.integrations.torch import LowRankAttention

    x = torch.ones(1, 5, 4, requires_grad=True)
    layer = LowRankAttention(4, 1, rank=2, batch_first=True)
    checkpoint(lambda x: layer(x, x, x)[0], x, use_reentrant=False).sum().backward()


def mapped(function):
    import torch

    torch.func.vmap(function)(torch.ones(2, 5, 4))


def torch_module():
    import torch

    return torch


PYTORCH = {
    "x must be a dense array, got a tensor of layout torch.sparse_coo": lambda: slra.truncated_svd(
        torch_module().eye(3).to_sparse(), 1
    ),
    "x must have 16 to 64 bits a component": lambda: slra.truncated_svd(
        torch_module().ones(3, 3).to(torch_module().float8_e5m2), 1
    ),
    "q must have a real floating dtype": lambda: slra.attention(
        *[torch_module().ones(1, 3, 2, dtype=torch_module().complex64)] * 3
    ),
    "rtol must be None where values cannot be looked at": lambda: mapped(
        lambda x: slra.truncated_svd(x, rtol=0.1)
    ),
    "x must have values that can be looked at": lambda: mapped(slra.robust_pca),
    "test_matrix must be given, or rng be an int, inside a traced function": lambda: compiled(
        lambda x: slra.randomized_svd(x, 2, n_oversamples=1, n_iter=1).S
    ),
    "attempted to trace numpy function unsupported by PyTorch": compiled_favor,
    "refit_every must be 0 under activation checkpointing": checkpointed,
}


def jitted(function, shape=(5, 4)):
    import jax

    jax.jit(function)(jax.numpy.ones(shape))


def two_devices():
    import jax

    q, k = (jax.device_put(jax.numpy.ones((1, 3, 2)), device) for device in jax.devices()[:2])
    slra.attention(q, k, k)


def solve(x):
    def value_and_grad(z):
        return 0.5 * ((z - x) ** 2).sum(), z - x

    return slra.proximal_gradient(x, value_and_grad, slra.soft_threshold, step=0.5).x


def integers():
    import jax

    slra.truncated_svd(jax.numpy.ones((3, 3), dtype="int8"), 1)


JAX = {
    "rank must be given instead of rtol for lazy arrays": lambda: jitted(
        lambda x: slra.low_rank_attention(x, x, x, rtol=0.1)
    ),
    "tol and callback must be None": lambda: jitted(solve),
    "q and k must be on one device": two_devices,
    "x must have a floating dtype, got int8": integers,
}


def low_rank(n_components=None, **options):
    from slra.integrations.sklearn import LowRank

    return LowRank(n_components, **options)


X = np.random.default_rng(0).standard_normal((5, 4))
SKLEARN = {
    "n_components must be between 1 and 3": lambda: low_rank(4).fit(X[:, :3]),
    "n_iter must be 'auto' where rtol is given": lambda: low_rank(rtol=0.1, n_iter=3).fit(X),
    "Input X contains NaN": lambda: low_rank().fit(X * np.nan),
    "Complex data not supported": lambda: low_rank().fit(X * 1j),
    "X has 3 features, but LowRank is expecting 4 features as input": lambda: (
        low_rank().fit(X).transform(X[:, :3])
    ),
    "This LowRank instance is not fitted yet": lambda: low_rank().transform(X),
    "'LowRank' object has no attribute 'partial_fit'": lambda: low_rank().partial_fit(X),
}

RAISED = {"transformers": TRANSFORMERS, "pytorch": PYTORCH, "jax": JAX, "scikit-learn": SKLEARN}
MODULES = {"pytorch": "torch", "scikit-learn": "sklearn"}


def test_the_list_is_that_of_the_docs():
    assert {f: set(errors) for f, errors in RAISED.items()} == {
        f: {error for framework, error in rows() if framework == f} for f in RAISED
    }
    assert len(rows()) == sum(map(len, RAISED.values()))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo warns of every lru_cache that it meets.
@pytest.mark.parametrize(("framework", "error"), rows())
def test_the_error_is_raised(framework, error, request):
    module = MODULES.get(framework, framework)
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    call = RAISED[framework][error]
    args = [request.getfixturevalue("tmp_path")] if call is load_another_file else []
    with pytest.raises(Exception, match=re.escape(error)) as raised:
        call(*args)
    if framework == "transformers":
        assert raised.type in (TypeError, ValueError)
