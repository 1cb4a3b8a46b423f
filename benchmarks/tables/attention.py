"""Exact attention."""

from typing import Any

from benchmarks.markdown import duration, significant, table

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


def tables(result: dict[str, Any]) -> dict[str, str]:
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


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    seconds = result["seconds"]
    behind = [
        seconds[n]["slra, NumPy"] / seconds[n]["torch SDPA"] for n in ("8192", "16384", "32768")
    ]
    short = seconds["512"]
    return {
        "docs/attention.md": [
            f"Narrow heads are where NumPy is furthest behind SDPA, {min(behind):.1f} to {max(behind):.1f} times from "
            "8192 tokens on",
        ],
        "docs/performance.md": [
            f"takes {min(behind):.1f} to {max(behind):.1f} times as long as torch's fused kernel from 8192 tokens on",
            f"at 512 tokens {significant(short['slra, NumPy'] / short['torch SDPA'])} times as long",
        ],
    }
