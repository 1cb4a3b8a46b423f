"""Ways to keep a cache small on a real decoder, at equal bits: predictions, perplexity, words, bytes.

    python -m benchmarks run cache_methods     15 minutes; goes on where it stopped; needs what cache_models does

SmolLM2-135M-Instruct reads a prompt exactly; then its cache is kept in few bits, few dimensions or few tokens, and the
model goes on from it: over a span of the prompt once more, over the text that follows, and over the tokens that it
writes by itself on the exact cache. The first 4 tokens and the last 32 are exact for all methods that keep all tokens.
Then how long a prompt takes to read and to keep, and a step from it: a minute or two that want a machine of their own.
"""

import argparse
import functools
import inspect
import io
import math
import statistics
import time
from collections.abc import Callable, Iterable
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import array_api_compat.torch as torch_xp
import torch
from transformers import DynamicCache

import slra
from benchmarks.cache_models import (
    COMPARED,
    N_SINK,
    N_TOKENS,
    WINDOW,
    Layer,
    attention_inputs,
    fitted_to_park,
    load,
    parked,
)
from benchmarks.common import earlier, interleaved, save, table
from slra.attn.problem import make_problem
from slra.baselines._kivi import round_by_groups
from slra.baselines._snapkv import votes
from slra.integrations._transformers_rotary import turned
from slra.integrations.transformers_cache import LowRankCache

GROUP_SIZE = 64
# Tokens read once more, tokens of the text that follows, and tokens written.
SPAN, N_NEXT, N_WRITTEN = slice(300, 396), 96, 32
CAUSAL: Any = {"is_causal": True, "causal_align": "bottom_right", "enable_gqa": True}
# Of a number, in half precision: what fewer dimensions or fewer tokens are counted in.
HALF = 16
Kept = tuple[torch.Tensor, torch.Tensor, float]
Pair = tuple[torch.Tensor, torch.Tensor]


def exact(layer: Layer, fit: Layer, bits: float) -> Kept:
    _, k, v = layer
    return k, v, k.nbytes + v.nbytes


def kivi(layer: Layer, fit: Layer, bits: float) -> Kept:
    """Integers of the whole part of the bits; zero points and scales are the other half."""
    _, k, v = layer
    end = k.shape[-2] - WINDOW

    def rounded(x: torch.Tensor, axis: int) -> torch.Tensor:
        middle = round_by_groups(x[:, N_SINK:end], int(bits), axis, GROUP_SIZE, torch_xp)
        return torch.cat([x[:, :N_SINK], middle, x[:, end:]], dim=-2)

    n_exact = N_SINK + WINDOW
    share = (bits / 8 * (end - N_SINK) + 4 * n_exact) / k.shape[-2]
    return rounded(k, -2), rounded(v, -1), share * (k.numel() + v.numel())


def cached(layer: Layer, basis: slra.AttentionBasis, **options: Any) -> slra.KVCache:
    return slra.KVCache(basis, window=WINDOW, n_sink=N_SINK, **options).append(*layer[1:])


@functools.cache
def fitted(fit: Layer, rank: int, method: str = "output") -> slra.AttentionBasis:
    return slra.fit_attention(*fit, rank, method=method, is_causal=True, enable_gqa=True)


def live(layer: Layer, fit: Layer, bits: float) -> Kept:
    cache = cached(layer, fitted(fit, 1), bits=bits)
    return *cache.decode(), cache.nbytes


@functools.cache
def to_park(fit: Layer, rotary: tuple[float, ...]) -> slra.AttentionBasis:
    return fitted_to_park(fit, list(rotary))


def in_files(layer: Layer, fit: Layer, bits: float, rotary: tuple[float, ...]) -> Kept:
    """Keys before the rotation, all heads together; files without maps."""
    (q, k, v), basis = layer, to_park(fit, rotary)
    cache = cached((q, turned(k, rotary, back=True), v), basis, bits=8, rotary=rotary)
    back, n_bytes = parked(cache, bits, basis)
    before, values = back.decode()
    return turned(before, rotary), values, n_bytes


def ranks(layer: Layer, fit: Layer, bits: float, method: str) -> Kept:
    rank = round(layer[1].shape[-1] * bits / HALF)
    cache = cached(layer, fitted(fit, rank, method), dtype="float16")
    return *cache.decode(), cache.nbytes


def chosen(layer: Layer, places: torch.Tensor) -> Kept:
    """Some tokens of each head, in half precision."""
    k, v = (x.take_along_dim(places[..., None], dim=-2) for x in layer[1:])
    return k, v, HALF / 8 * (k.numel() + v.numel())


def streaming(layer: Layer, fit: Layer, bits: float) -> Kept:
    n_heads, n, _ = layer[1].shape
    n_kept = round(n * bits / HALF)
    places = torch.cat([torch.arange(N_SINK), torch.arange(n - n_kept + N_SINK, n)])
    return chosen(layer, places.expand(n_heads, -1))


def snapkv(layer: Layer, fit: Layer, bits: float) -> Kept:
    q, k, v = layer
    n, n_kept = k.shape[-2], round(k.shape[-2] * bits / HALF)
    problem = make_problem(q[:, -WINDOW:], k, v, **CAUSAL).broadcast()
    found = votes(problem, WINDOW, 5)[:, 0].topk(n_kept - WINDOW).indices
    window = torch.arange(n - WINDOW, n).expand(len(k), -1)
    return chosen(layer, torch.cat([found.sort().values, window], dim=-1))


WAYS: dict[str, Callable[[Layer, Layer, float], Kept]] = {
    "exact": exact,
    "KIVI": kivi,
    "in bits": live,
    # And "parked", with the frequencies of the model.
    **{
        f"ranks, {method}": functools.partial(ranks, method=method)
        for method in ("output", "scores", "svd")
    },
    "SnapKV": snapkv,
    "StreamingLLM": streaming,
}
# By the length of the prompt and the number of texts: ways, what bases are fitted to, and bits.
SIZES, FEW = (8, 4.5, 3.5, 2.5, 2.2, 1.5), (8, 4.5, 2.5)
CASES: dict[tuple[int, int], list[tuple[str, str, tuple[float, ...]]]] = {
    (1024, 3): [
        ("exact", "", (32,)),
        ("KIVI", "", (8.5, 4.5, 3.5, 2.5)),
        ("in bits", "other text", SIZES),
        ("in bits", "prompt", (4.5, 2.5)),
        ("parked", "other text", (4.5, 2.5, 2.2, 1.5)),
        ("parked", "prompt", (2.5,)),
        ("ranks, output", "other text", FEW),
        ("ranks, output", "prompt", (8,)),
        ("ranks, scores", "other text", (8,)),
        ("ranks, svd", "other text", (8,)),
        ("SnapKV", "", FEW),
        ("StreamingLLM", "", FEW),
    ],
    (4096, 1): [
        ("exact", "", (32,)),
        ("KIVI", "", (8.5, 4.5, 3.5, 2.5)),
        ("in bits", "other text", (8, 4.5, 2.5, 1.5)),
        ("parked", "other text", (2.5, 1.5)),
        ("ranks, output", "other text", (8,)),
        ("SnapKV", "", (8, 2.5)),
        ("StreamingLLM", "", (8, 2.5)),
    ],
}


class Text(NamedTuple):
    """A prompt as the layers have it, what comes after it, and what the exact cache makes of that."""

    layers: list[Layer]
    n: int
    parts: list[torch.Tensor]  # token ids (1, m): read again, following, written
    right: torch.Tensor  # log-probabilities after those read again

    @classmethod
    def read(cls, model: Any, tokens: torch.Tensor, n: int) -> "Text":
        prompt = tokens[:, :n]
        cache, written = DynamicCache(), [prompt[:, -1:]]
        layers = attention_inputs(model, prompt)
        fill(cache, [(k[:, :-1], v[:, :-1]) for _, k, v in layers])
        for _ in range(N_WRITTEN + 1):
            written.append(model(written[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
        parts = [prompt[:, SPAN], tokens[:, n : n + N_NEXT], torch.cat(written[1:], dim=1)]
        text = cls(layers, n, parts, torch.empty(0))
        return text._replace(right=text.predicted(model, [x[1:] for x in layers], parts[0]))

    def predicted(self, model: Any, kept: Iterable[Pair], tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities after tokens that follow the prompt."""
        cache = DynamicCache()
        fill(cache, kept)
        places = torch.arange(self.n, self.n + tokens.shape[1])[None]
        logits = model(tokens, position_ids=places, past_key_values=cache).logits[0]
        return torch.log_softmax(logits, dim=-1)

    def judged(self, model: Any, kept: list[Pair]) -> dict[str, float]:
        again, following, written = (self.predicted(model, kept, x) for x in self.parts)
        said = following[:-1].take_along_dim(self.parts[1][0, 1:, None], dim=-1)
        alike = (written[:-1].argmax(-1) == self.parts[2][0, 1:]).int().cumprod(0)
        return {
            "divergence": float((self.right.exp() * (self.right - again)).sum(-1).mean()),
            "nats": -float(said.mean()),
            "alike": int(alike.sum()),
        }


def fill(cache: DynamicCache, kept: Iterable[Pair]) -> None:
    for i, (k, v) in enumerate(kept):
        cache.update(k[None], v[None], i)


def measured(model: Any, texts: list[torch.Tensor], other: list[Layer]) -> dict[str, Any]:
    """All cases, but for the texts that an earlier run has finished."""
    found = earlier("cache_methods")
    for (n, n_texts), cases in CASES.items():
        for number, tokens in enumerate(texts[:n_texts]):
            name = f"{n}.{number}"
            if name in found:
                continue
            text, rows = Text.read(model, tokens, n), []
            for way, basis, sizes in cases:
                for bits in sizes:
                    fits = text.layers if basis == "prompt" else other
                    kept = [WAYS[way](*one, bits) for one in zip(text.layers, fits, strict=True)]
                    row: dict[str, Any] = {"way": way, "basis": basis, "bits": bits}
                    row["bytes"] = sum(n_bytes for _, _, n_bytes in kept)
                    rows.append(row | text.judged(model, [pair[:2] for pair in kept]))
                    print(name, rows[-1], flush=True)
            found[name] = rows
            save("cache_methods", found, parts=("all",))
    return found


# What a step is timed from: a way, and its bits. Rounding like KIVI's is simulated here, so its time says nothing.
TIMED = (
    ("exact", 32),
    ("in bits", 4.5),
    ("in bits", 2.5),
    ("ranks, output", 8),
    ("StreamingLLM", 2.5),
)
PARKED_AT = 2.5


def held_by(way: str, bits: float, layers: list[Layer], other: list[Layer]) -> Any:
    """A cache as a model takes it, with a prompt in it."""
    options: dict[str, Any] = {"window": WINDOW, "n_sink": N_SINK}
    rank = round(layers[0][1].shape[-1] * bits / HALF)
    kept = [(k, v) for _, k, v in layers]
    if way == "in bits":
        cache = LowRankCache([fitted(one, 1) for one in other], bits=bits, **options)
    elif way == "ranks, output":
        cache = LowRankCache([fitted(one, rank) for one in other], dtype="float16", **options)
    else:
        cache = DynamicCache()
        kept = [WAYS[way](*pair, bits)[:2] for pair in zip(layers, other, strict=True)]
    fill(cache, kept)
    return cache


def times(model: Any, tokens: torch.Tensor, other: list[Layer]) -> list[dict[str, Any]]:
    """Seconds to read a prompt, to keep what was read, and of a step; and to park it and read it back."""
    rows = []
    for n, _ in CASES:
        start = time.perf_counter()
        layers = attention_inputs(model, tokens[:, :n])
        read, keeps, steps = time.perf_counter() - start, [], {}
        for way, bits in TIMED:
            held_by(way, bits, [(q, k[:, :64], v[:, :64]) for q, k, v in layers], other)  # fits
            start = time.perf_counter()
            cache = held_by(way, bits, layers, other)
            keeps.append(time.perf_counter() - start)

            def step(cache: Any = cache, n: int = n) -> None:
                places = torch.full((1, 1), n)
                model(tokens[:, n : n + 1], position_ids=places, past_key_values=cache)

            steps[way, bits] = step
        took = interleaved(steps, repeats=5)
        for (way, bits), keep in zip(TIMED, keeps, strict=True):
            row = {"n": n, "way": way, "bits": bits, "read": read, "keep": keep}
            rows.append(row | {"step": statistics.median(took[way, bits])})
            print(rows[-1], flush=True)
    layers = attention_inputs(model, tokens[:, :N_TOKENS])
    cache, file = held_by("in bits", 8, layers, other), io.BytesIO()
    start = time.perf_counter()
    cache.save(file, bits=PARKED_AT)
    middle = time.perf_counter()
    LowRankCache.load(io.BytesIO(file.getvalue()))
    row = {"n": N_TOKENS, "way": "parked", "bits": PARKED_AT}
    return [*rows, row | {"park": middle - start, "unpark": time.perf_counter() - middle}]


def by_length(result: dict[str, Any]) -> dict[str, Any]:
    made = {}
    for n, n_texts in CASES:
        by_text = [result[f"{n}.{number}"] for number in range(n_texts)]
        rows = []
        for same in zip(*by_text, strict=True):
            mean = {
                name: statistics.fmean(row[name] for row in same)
                for name in same[0]
                if name not in ("way", "basis")
            }
            head = (
                same[0]["way"],
                same[0]["basis"],
                f"{mean['bits']:g}",
                f"{mean['bytes'] / 1e6:.1f}",
            )
            each = [f"{row['divergence']:.4f}" for row in same]
            rows.append((*head, *each, f"{math.exp(mean['nats']):.1f}", f"{mean['alike']:.0f}"))
        columns = [f"divergence, text {i + 1}" for i in range(n_texts)]
        head = [
            "method",
            "basis from",
            "bits",
            "MB",
            *columns,
            "perplexity",
            f"tokens alike of {N_WRITTEN}",
        ]
        made[f"at_{n}"] = table(head, rows, "ll" + "r" * (4 + n_texts))
    return made


def tables(result: dict[str, Any]) -> dict[str, Any]:
    made = by_length(result)
    *rows, last = result["times"]
    exact = {row["n"]: row["step"] for row in rows if row["way"] == "exact"}
    shown = [
        (
            row["n"],
            row["way"],
            f"{row['bits']:g}",
            f"{row['read']:.1f} s",
            f"{row['keep']:.1f} s",
            f"{1e3 * row['step']:.0f} ms",
            f"{row['step'] / exact[row['n']]:.2f}",
        )
        for row in rows
    ]
    head = ["tokens", "method", "bits", "to read", "to keep", "a step", "of exact"]
    made["times"] = table(head, shown, "rlrrrrr")
    cells = [last["n"], f"{last['bits']:g}", f"{last['park']:.1f} s", f"{last['unpark']:.1f} s"]
    made["parking"] = table(["tokens", "bits", "to park", "to read back"], [cells], "rrrr")
    return made


def main() -> None:
    torch.set_grad_enabled(False)
    tokenizer, model = load()
    rotary = tuple(model.base_model.rotary_emb.inv_freq.tolist())
    WAYS["parked"] = functools.partial(in_files, rotary=rotary)
    names = sorted(topics)
    longest = max(n for n, _ in CASES) + N_NEXT

    def tokens(text: str, n: int = longest) -> torch.Tensor:
        return tokenizer(text, return_tensors="pt").input_ids[:, :n]

    documentation = "\n".join(topics[name] for name in names)
    other = attention_inputs(
        model, tokens("\n".join(topics[name] for name in names[60:]), N_TOKENS)
    )
    texts = [documentation, inspect.getsource(argparse), inspect.getsource(statistics)]
    found = measured(model, [tokens(text) for text in texts], other)
    found["times"] = times(model, tokens(documentation), other)
    save("cache_methods", found, tables, compared=COMPARED)


if __name__ == "__main__":
    main()
