"""What a compressed cache does to a language model: tokens, perplexity and divergence beside bytes.

    python -m benchmarks.kv_cache_generate     after benchmarks.train_decoder; writes results/kv_cache_generate.json

The decoder reads 64 held-out bytes, then 192 more, one at a time: bits a byte of these, and the divergence of its
predictions from those on the exact cache. And it writes 192 bytes by itself, greedily, from the same beginnings: how
many of them are those written on the exact cache, counted up to the first that is not. Bases are fitted to other text.
"""

import math
import statistics
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import slra
from benchmarks.common import interleaved, save
from benchmarks.train_decoder import bits_per_byte, load, text
from slra.integrations.transformers_cache import LowRankCache

PROMPT, STEPS, N_TEXTS, N_FIT = 64, 192, 16, 8
WINDOWS = (0, 16)


def attention_inputs(
    model: LlamaForCausalLM, tokens: torch.Tensor
) -> list[tuple[torch.Tensor, ...]]:
    """Queries, keys and values of every layer, as attention gets them."""
    kept: list[tuple[torch.Tensor, ...]] = []

    def forward(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        kept.append((q, k, v))
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    AttentionInterface.register("kept", forward)
    AttentionMaskInterface.register("kept", sdpa_mask)
    model.set_attn_implementation("kept")
    model(tokens)
    model.set_attn_implementation("sdpa")
    return kept


def read(model: LlamaForCausalLM, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    """Log-probabilities of what follows each byte after the prompt, byte by byte, (texts, steps, 256)."""
    blocks = [tokens[:, :PROMPT], *torch.split(tokens[:, PROMPT : PROMPT + STEPS - 1], 1, dim=1)]
    rows = [model(block, past_key_values=cache).logits[:, -1] for block in blocks]
    return torch.log_softmax(torch.stack(rows, dim=1), dim=-1)


def write(model: LlamaForCausalLM, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    prompt = tokens[:, :PROMPT]
    mask = torch.ones_like(prompt)
    out = model.generate(
        prompt, attention_mask=mask, cache=cache, max_new_tokens=STEPS, do_sample=False
    )
    return out[:, PROMPT:]


def bits(log_probabilities: torch.Tensor, tokens: torch.Tensor) -> float:
    target = tokens[:, PROMPT : PROMPT + STEPS, None]
    return float(-torch.gather(log_probabilities, -1, target).mean()) / math.log(2)


def exact_bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def compare(
    model: LlamaForCausalLM, tokens: torch.Tensor, exact: dict[str, Any], make: Any
) -> dict[str, Any]:
    cache = make()
    own = read(model, tokens, cache)
    written = write(model, tokens, make())
    same = (written == exact["written"]).int().cumprod(dim=1).sum(dim=1)
    divergence = (exact["read"].exp() * (exact["read"] - own)).sum(-1)
    return {
        "bytes ratio": exact["bytes"] / cache.nbytes,
        "bits a byte": bits(own, tokens),
        "perplexity": 2 ** bits(own, tokens),
        "divergence, bits": float(divergence.mean()) / math.log(2),
        "identical": bool(torch.all(same == STEPS)),
        "bytes written alike, mean": float(same.float().mean()),
    }


def unrotated(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Undo the rotary embedding of consecutive positions."""
    angles = torch.arange(x.shape[-2])[:, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def rotary(layer: tuple[torch.Tensor, ...], rank: int) -> dict[str, float]:
    """Error of the last 64 steps and time of one, by a basis fitted after the rotary embedding and by one before it."""
    q, k, v = (x.double() for x in layer)
    width = q.shape[-1]
    frequencies = 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    exact = slra.attention(q, k, v, is_causal=True, enable_gqa=True)[..., -64:, :]
    plain = [unrotated(x, frequencies) for x in (q, k)]
    result = {}
    for name, inputs, options in (
        ("after", (q, k, v), {}),
        ("before", (*plain, v), {"rotary": frequencies}),
    ):
        cache = slra.KVCache.from_prefix(*inputs, rank, **options)
        out = cache.attend(inputs[0][..., -64:, :])
        result[f"error, {name}"] = float(torch.linalg.norm(out - exact) / torch.linalg.norm(exact))
        one = inputs[0][..., -1:, :]
        seconds = interleaved({name: lambda c=cache, q=one: c.attend(q)})[name]
        result[f"milliseconds, {name}"] = 1e3 * statistics.median(seconds)
    return result


def main() -> None:
    torch.set_num_threads(1)
    model = load()
    train, held_out = text()
    size = PROMPT + STEPS
    tokens = held_out[: N_TEXTS * size].reshape(N_TEXTS, size)
    with torch.inference_mode():
        kept = attention_inputs(model, train[: N_FIT * size].reshape(N_FIT, size))
        past = DynamicCache()
        exact = {"read": read(model, tokens, past), "written": write(model, tokens, DynamicCache())}
        exact["bytes"] = exact_bytes(past)
        rows = []
        width = kept[0][1].shape[-1]
        for method in ("output", "svd"):
            for rank in (width, 24, 16, 12, 8):
                bases = [
                    slra.fit_attention(
                        *layer,
                        rank,
                        method=method,
                        is_causal=True,
                        enable_gqa=True,
                        pool_batch=True,
                    )
                    for layer in kept
                ]
                for window in WINDOWS if rank < width else WINDOWS[:1]:
                    row = compare(model, tokens, exact, lambda: LowRankCache(bases, window=window))  # noqa: B023
                    rows.append({"method": method, "rank": rank, "window": window, **row})
                    print(rows[-1], flush=True)
        result = {
            "decoder": {"parameters": model.num_parameters(), "d": width, "layers": len(kept)},
            "held out bits a byte, whole windows": bits_per_byte(model, held_out),
            "exact": {"bits a byte": bits(exact["read"], tokens), "bytes": exact["bytes"]},
            "rows": rows,
            "rotary": [
                {"layer": i, "rank": rank, **rotary(layer, rank)}
                for i, layer in enumerate(kept)
                for rank in (8, 16, 24)
            ],
        }
    save("kv_cache_generate", result)


if __name__ == "__main__":
    main()
