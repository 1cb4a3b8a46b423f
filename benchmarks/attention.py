"""Exact attention: time and memory against naive NumPy, torch SDPA and jax.nn.dot_product_attention.

`python -m benchmarks.attention` takes about nine minutes on two cores and writes results/attention.json and
attention.png. Memory is the growth of the peak
resident set over the call, in a process of its own, and for NumPy also what tracemalloc sees.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

import slra
from benchmarks.common import RESULTS, earlier, interleaved, save, table
from benchmarks.markdown import duration, significant, span

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
HEADS, WIDTH = 2, 64
# Above this the matrices of the quadratic methods leave too little memory.
LONGEST_QUADRATIC = 16384
PARTS = ("lengths", "headline", "backward", "memory", "ratios")
QUADRATIC = ("naive NumPy", "jax.nn.dot_product_attention")
PARTS = ("seconds", "seconds_4_heads_8192_128", "seconds_vjp_8192", "bytes_16384")


def inputs(heads: int, n: int, width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((heads, n, width), dtype=np.float32) for _ in range(3)]


def naive(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """Scores and weights as two arrays, nothing in place."""
    scores = q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights @ v, weights


def naive_vjp(q: Any, k: Any, v: Any, grad: Any) -> tuple[Any, Any, Any]:
    out, weights = naive(q, k, v)
    d_weights = grad @ v.swapaxes(-1, -2)
    d_scores = weights * (d_weights - (grad * out).sum(axis=-1, keepdims=True))
    d_scores = d_scores * np.float32(q.shape[-1] ** -0.5)
    return (
        d_scores @ k,
        d_scores.swapaxes(-1, -2) @ q,
        weights.swapaxes(-1, -2) @ grad,
    )


def candidates(heads: int, n: int, width: int) -> dict[str, Callable[[], Any]]:
    import jax
    import torch

    arrays = inputs(heads, n, width)
    tensors = [torch.from_numpy(x)[None] for x in arrays]
    jaxes = [jax.numpy.asarray(x) for x in arrays]
    # jax.nn.dot_product_attention wants (batch, length, heads, width).
    swapped = [jax.numpy.swapaxes(x, 0, 1)[None] for x in jaxes]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    native = jax.jit(jax.nn.dot_product_attention)
    found = {
        "naive NumPy": lambda: naive(*arrays)[0],
        "slra, NumPy": lambda: slra.attention(*arrays),
        "slra, NumPy, causal": lambda: slra.attention(*arrays, is_causal=True),
        "torch SDPA": lambda: sdpa(*tensors),
        "slra, torch": lambda: slra.attention(*tensors),
        "slra, torch, with LSE": lambda: slra.attention(*tensors, return_lse=True),
        "jax.nn.dot_product_attention": lambda: native(*swapped).block_until_ready(),
        "slra, JAX": lambda: slra.attention(*jaxes).block_until_ready(),
    }
    return {
        name: call
        for name, call in found.items()
        if n <= LONGEST_QUADRATIC or name not in QUADRATIC
    }


def vjps(heads: int, n: int, width: int) -> dict[str, Callable[[], Any]]:
    q, k, v = inputs(heads, n, width)
    grad = np.ones_like(v)
    out, lse = slra.attention(q, k, v, return_lse=True)
    return {
        "naive NumPy": lambda: naive_vjp(q, k, v, grad),
        "slra, NumPy": lambda: slra.attention_vjp(q, k, v, out, lse, grad),
    }


def ratio_cases(heads: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """What scaled_dot_product_attention does, and the same by slra, which is to take so many times as long."""
    import torch

    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (torch.from_numpy(x)[None] for x in inputs(heads, 1024, 64))
    causal: Any = {"is_causal": True}
    out, lse = slra.attention(q, k, v, return_lse=True, **causal)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    graph = sdpa(*leaves, **causal)
    long_k, long_v = (torch.from_numpy(x)[None] for x in inputs(heads, 8192, 64)[:2])
    one, shared = q[..., :1, :], max(1, heads // 4)
    few = [x[:, :shared].contiguous() for x in (long_k, long_v)]
    half = [x.bfloat16() for x in (one, long_k, long_v)]
    batch = [x[0].unflatten(0, (-1, 1)).expand(-1, 4, -1, -1) for x in (long_k, long_v)]
    batch = [x[..., :1024, :].unflatten(2, (8, 128)).transpose(1, 2).flatten(0, 1) for x in batch]
    padded = torch.arange(128) < torch.arange(1, len(batch[0]) + 1)[:, None, None, None] % 128 + 1
    last = batch[0][..., :1, :].contiguous()
    return {
        "return_lse, causal": {
            "SDPA": lambda: sdpa(q, k, v, **causal),
            "slra": lambda: slra.attention(q, k, v, return_lse=True, **causal),
        },
        "softcap, causal": {
            "SDPA": lambda: sdpa(q, k, v, **causal),
            "slra": lambda: slra.attention(q, k, v, softcap=20.0, **causal),
        },
        "attention_vjp, causal": {
            "SDPA": lambda: torch.autograd.grad(graph, leaves, q, retain_graph=True),
            "slra": lambda: slra.attention_vjp(q, k, v, out, lse, q, **causal),
        },
        "decode, 8192 keys": {
            "SDPA": lambda: sdpa(one, long_k, long_v),
            "slra": lambda: slra.attention(one, long_k, long_v),
        },
        "decode, shared heads": {
            "SDPA": lambda: sdpa(one, *few, enable_gqa=True),
            "slra": lambda: slra.attention(one, *few, enable_gqa=True),
        },
        "decode, padded batch": {
            "SDPA": lambda: sdpa(last, *batch, padded),
            "slra": lambda: slra.attention(last, *batch, mask=padded),
        },
        "decode, bfloat16": {
            "SDPA": lambda: sdpa(*half),
            "slra": lambda: slra.attention(*half),
        },
    }


def small_cases() -> dict[str, dict[str, Callable[[], Any]]]:
    """Calls of which starting takes all the time."""
    import torch

    arrays = inputs(4, 16, 8)
    tensors = [torch.from_numpy(x) for x in arrays]
    batched = [x[None] for x in tensors]
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {
        "attention, 4 x 16 x 8": {
            "SDPA": lambda: sdpa(*batched),
            "slra, NumPy": lambda: slra.attention(*arrays),
            "slra, torch": lambda: slra.attention(*tensors),
        },
        "soft_threshold, 1000 numbers": {
            "NumPy": lambda: x - np.minimum(np.maximum(x, -0.5), 0.5),
            "slra, NumPy": lambda: slra.soft_threshold(x, 0.5),
        },
    }


def many(function: Callable[[], Any], n: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(n):
            function()

    return call


MAKERS = {"forward": candidates, "backward": vjps}


def times(make: Callable[..., Any], shape: tuple[int, int, int], repeats: int) -> dict[str, float]:
    seconds = interleaved(make(*shape), repeats)
    return {name: statistics.median(runs) for name, runs in seconds.items()}


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_one(direction: str, name: str, n: int) -> dict[str, int | None]:
    """Bytes that one call needs at its peak, its output included; this process does nothing else."""
    call = MAKERS[direction](HEADS, n, WIDTH)[name]
    small = MAKERS[direction](HEADS, 64, WIDTH)[name]
    small()
    before = peak_rss()
    call()
    grown = peak_rss() - before
    if "NumPy" not in name:
        return {"rss": grown, "tracemalloc": None}
    tracemalloc.start()
    call()
    return {"rss": grown, "tracemalloc": tracemalloc.get_traced_memory()[1]}


def memory(direction: str, name: str, n: int) -> dict[str, int | None]:
    command = [sys.executable, "-m", "benchmarks.attention", "--one", direction, name, str(n)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(found)


def plot(by_length: dict[int, dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in by_length[min(by_length)]:
        at = [n for n in by_length if name in by_length[n]]
        axes.loglog(at, [by_length[n][name] for n in at], marker="o", label=name)
    axes.set(xlabel="length", ylabel="seconds", title=f"{HEADS} heads, d = {WIDTH}, float32")
    axes.legend(fontsize="small")
    figure.savefig(RESULTS / "attention.png", dpi=120)


def update(part: dict[str, Any]) -> None:
    """Put one part into the results beside those that were measured before."""
    measured = earlier("attention") | part
    print(
        save(
            "attention", measured, tables, losses=losses, says=says, compared=COMPARED, parts=PARTS
        )
    )


def run_lengths(lengths: list[int]) -> None:
    known = earlier("attention").get("seconds", {})
    for n in lengths:
        known[str(n)] = times(candidates, (HEADS, n, WIDTH), 5 if n < 16384 else 3)
    update({"seconds": known})
    plot({int(n): known[n] for n in sorted(known, key=int)})


def run_headline() -> None:
    update({"seconds_4_heads_8192_128": times(candidates, (4, 8192, 128), 5)})


def run_backward() -> None:
    update({"seconds_vjp_8192": times(vjps, (HEADS, 8192, WIDTH), 3)})


def run_memory() -> None:
    longest = LONGEST_QUADRATIC
    found = {
        direction: {name: memory(direction, name, longest) for name in make(1, 64, 4)}
        for direction, make in MAKERS.items()
    }
    update({f"bytes_{longest}": found})


COMPARED = ("numpy", "torch", "jax")
NAMES = {
    "naive NumPy": "the formula, NumPy, nothing in place",
    "slra, NumPy": "slra on NumPy",
    "slra, NumPy, causal": "slra on NumPy, causal",
    "torch SDPA": "torch SDPA",
    "slra, torch": "slra on torch",
    "slra, torch, with LSE": "slra on torch, with the log-sum-exp",
    "jax.nn.dot_product_attention": "jax.nn.dot_product_attention",
    "slra, JAX": "slra on JAX",
}


def tables(result: dict[str, Any]) -> dict[str, Any]:
    seconds = result["seconds_4_heads_8192_128"]
    headline = [(name, duration(seconds[key])) for key, name in NAMES.items()]
    lengths = sorted(result["seconds"], key=int)
    by_length = [
        (
            name,
            *(
                duration(found[key]) if key in (found := result["seconds"][n]) else ""
                for n in lengths
            ),
        )
        for key, name in NAMES.items()
    ]
    backward, backward_bytes = result["seconds_vjp_8192"], result["bytes_16384"]["backward"]
    forward_bytes = result["bytes_16384"]["forward"]
    linear = [
        (
            name,
            duration(backward[key]),
            *(_megabytes(found[key]) for found in (forward_bytes, backward_bytes)),
        )
        for key, name in NAMES.items()
        if key in backward
    ]
    return {
        "headline": table(["n = 8192, 4 heads, d = 128", "time"], headline, "lr"),
        "lengths": table(["2 heads, d = 64; n =", *lengths], by_length, "l" + "r" * len(lengths)),
        "memory": table(
            ["by", "gradient, n = 8192", "memory, n = 16384", "its gradient"], linear, "lrrr"
        ),
    }


def _megabytes(peak: dict[str, int]) -> str:
    """Return what tracemalloc has seen."""
    megabytes = peak["tracemalloc"] / 1e6
    return f"{significant(megabytes)} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"


def losses(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Narrow heads, beside SDPA."""
    over = {n: one["slra, NumPy"] / one["torch SDPA"] for n, one in result["seconds"].items()}
    long = [ratio for n, ratio in over.items() if int(n) >= 8192]
    return [
        ("exact attention on NumPy, d = 64, 512 tokens", "torch SDPA", significant(over["512"])),
        ("the same from 8192 tokens on", "torch SDPA", span(long)),
    ]


def says(result: dict[str, Any]) -> list[str]:
    seconds = result["seconds_4_heads_8192_128"]
    ours, naive = (duration(seconds[name]) for name in ("slra, NumPy", "naive NumPy"))
    memory = [result["bytes_16384"]["forward"][name] for name in ("slra, NumPy", "naive NumPy")]
    return [
        f"4 heads of 8192 tokens in {ours} for {naive}",
        f"16384 tokens in {_megabytes(memory[0])} for {_megabytes(memory[1])}",
    ]


def run_ratios() -> None:
    """Medians of calls in turn, as ratios to the first of each case."""
    import torch

    found: dict[str, Any] = {}
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        for heads in (2, 16, 32):
            for name, functions in ratio_cases(heads).items():
                medians = [statistics.median(t) for t in interleaved(functions, 5).values()]
                ratio = medians[1] / medians[0]
                label = f"{n_threads} threads, {heads} heads"
                found.setdefault(label, {})[name] = ratio
                print(f"{label}, {name}: {ratio:.2f} of {1e3 * medians[0]:.2f} ms", flush=True)
    torch.set_num_threads(1)
    small: dict[str, Any] = {}
    for name, functions in small_cases().items():
        times = interleaved({key: many(f, 20) for key, f in functions.items()}, 31)
        small[name] = {key: statistics.median(t) / 20 for key, t in times.items()}
        print(name, {key: f"{1e6 * t:.1f} us" for key, t in small[name].items()}, flush=True)
    update({"ratios_to_sdpa": found, "seconds_small": small})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("DIRECTION", "NAME", "LENGTH"))
    parser.add_argument("--parts", nargs="*", default=[*PARTS])
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS)
    options = parser.parse_args()
    if options.one is not None:
        direction, name, n = options.one
        print(json.dumps(measure_one(direction, name, int(n))))
        return
    runs = {
        "lengths": lambda: run_lengths(options.lengths),
        "headline": run_headline,
        "backward": run_backward,
        "memory": run_memory,
        "ratios": run_ratios,
    }
    for part in options.parts:
        runs[part]()


if __name__ == "__main__":
    main()
