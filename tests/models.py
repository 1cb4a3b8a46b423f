"""Small models of transformers with random weights."""

import numpy as np

VOCABULARY, WIDTH = 60, 8


def decoder(kind):
    """Two layers, four query heads on two key heads, random weights: "llama"; "mistral" with a window of 6.

    Others have a window of 6 in their first layer, and learned sinks ("gpt_oss") or a softcap ("gemma2").
    """
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 4 * WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "head_dim": WIDTH,
        # Weights large enough for attention to be far from uniform.
        "initializer_range": 0.3,
    }
    if kind == "mistral":
        config = transformers.MistralConfig(sliding_window=6, **sizes)
        return transformers.MistralForCausalLM._from_config(
            config, attn_implementation="eager"
        ).eval()
    if kind in ("gpt_oss", "gemma2"):
        own = {
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            **({"num_local_experts": 4} if kind == "gpt_oss" else {"attn_logit_softcapping": 5.0}),
        }
        name = {"gpt_oss": "GptOss", "gemma2": "Gemma2"}[kind]
        config = getattr(transformers, f"{name}Config")(**sizes, **own)
        model = getattr(transformers, f"{name}ForCausalLM")
        return model._from_config(config, attn_implementation="eager").eval()
    config = transformers.LlamaConfig(**sizes)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()


def tokens(seed, batch, length):
    import torch

    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length)))
