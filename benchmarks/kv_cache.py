"""One decoding step on a compressed cache: time, bytes and error beside exact attention, on one thread.

    python -m benchmarks.kv_cache     about four minutes; writes results/kv_cache.json and kv_cache.png

Synthetic: n = 65536 tokens, d = 128, 8 key heads, 8 or 32 query heads, float32. K and V are Gaussian times s, Q is
Gaussian times sqrt(s), all in one rotated frame, and Q is scaled so that scores have a standard deviation of 2.5. Real:
the 72 heads of MiniLM on 512 tokens. Bases are fitted to all keys and values and to some queries; errors are those of
other queries.

Exact attention on NumPy is the fastest of three ways, torch's the faster of two: each is timed, and named.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch.nn.functional import scaled_dot_product_attention

import slra
from benchmarks.common import RESULTS, interleaved, save, table
from benchmarks.markdown import duration, significant, span
from benchmarks.minilm import load_qkv

Array = np.ndarray
N_TOKENS, WIDTH, N_HEADS = 65536, 128, 8
N_FIT, N_TEST = 1024, 128


class Data(NamedTuple):
    fit: Array  # (Hq, queries, d): for the fit
    test: Array  # (Hq, queries, d): for everything else
    k: Array
    v: Array


def synthetic(power: float, n_query_heads: int, n: int = N_TOKENS) -> Data:
    rng = np.random.default_rng(0)
    s = np.arange(1, WIDTH + 1) ** -power
    rotation = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]

    def draw(heads: int, rows: int, scales: Array) -> Array:
        return ((rng.standard_normal((heads, rows, WIDTH)) * scales) @ rotation).astype(np.float32)

    k, v = draw(N_HEADS, n, s), draw(N_HEADS, n, s)
    # The score of a query and a key has variance sum(s^2 * s) / d before Q is scaled.
    factor = 2.5 * np.sqrt(WIDTH / np.sum(s**3))
    q = draw(n_query_heads, N_FIT + N_TEST, np.sqrt(s) * factor)
    return Data(q[:, :N_FIT], q[:, N_FIT:], k, v)


def minilm() -> Data:
    q, k, v = (np.ascontiguousarray(x.reshape(72, 512, 32)) for x in load_qkv())
    return Data(q[:, ::2], q[:, 1::2], k, v)


def by_columns(q: Array, k: Array, v: Array) -> Array:
    """Exact attention, head by head: keys times queries, softmax, weights times values."""
    out = np.empty((len(q), *v.shape[-1:]), np.float32)
    shared = len(q) // len(k)
    for h, (keys, values) in enumerate(zip(k, v, strict=True)):
        heads = slice(h * shared, (h + 1) * shared)
        scores = np.dot(keys, q[heads].T * np.float32(q.shape[-1] ** -0.5))
        scores -= scores.max(0)
        np.exp(scores, out=scores)
        out[heads] = np.dot(scores.T, values) / scores.sum(0)[:, None]
    return out


def by_rows(q: Array, k: Array, v: Array) -> Array:
    """Exact attention with queries times keys, one matrix-vector product for each query head."""
    out = np.empty((len(q), *v.shape[-1:]), np.float32)
    shared = len(q) // len(k)
    for i, query in enumerate(q * np.float32(q.shape[-1] ** -0.5)):
        scores = np.dot(k[i // shared], query)
        scores -= scores.max()
        np.exp(scores, out=scores)
        np.dot(scores, v[i // shared], out=out[i])
        out[i] /= scores.sum()
    return out


def steps(data: Data, cache: slra.KVCache) -> dict[str, Callable[[], Any]]:
    """One decoding step each, with another query every time."""
    gqa = len(data.test) > len(data.k)
    queries = [np.ascontiguousarray(data.test[:, i : i + 1]) for i in range(32)]
    tensors = [torch.from_numpy(x) for x in queries]
    k, v = torch.from_numpy(data.k)[None], torch.from_numpy(data.v)[None]

    def each(items: list[Any], function: Callable[[Any], Any]) -> Callable[[], Any]:
        stream: Iterator[Any] = cycle(items)
        return lambda: function(next(stream))

    def folded(q: torch.Tensor) -> torch.Tensor:
        rows = q.reshape(1, len(data.k), -1, q.shape[-1])
        return scaled_dot_product_attention(rows, k, v)

    return {
        "numpy, keys @ queries": each(queries, lambda q: by_columns(q[:, 0], data.k, data.v)),
        "numpy, key matrix @ query": each(queries, lambda q: by_rows(q[:, 0], data.k, data.v)),
        "slra.attention": each(
            queries, lambda q: slra.attention(q, data.k, data.v, enable_gqa=gqa)
        ),
        "torch sdpa": each(
            tensors, lambda q: scaled_dot_product_attention(q[None], k, v, enable_gqa=gqa)
        ),
        "torch sdpa, shared heads as rows": each(tensors, folded),
        "slra.KVCache": each(queries, cache.attend),
    }


OTHERS = (
    "numpy, keys @ queries",
    "numpy, key matrix @ query",
    "slra.attention",
    "torch sdpa",
    "torch sdpa, shared heads as rows",
)


def errors(data: Data, cache: slra.KVCache) -> tuple[Array, Array]:
    """Squared error and squared norm of each query head, over the queries that the fit has not seen."""
    gqa = len(data.test) > len(data.k)
    exact = slra.attention(data.test, data.k, data.v, enable_gqa=gqa)
    out = cache.attend(data.test, is_causal=False)
    error, norm = (np.sum(np.float64(x) ** 2, axis=(-2, -1)) for x in (out - exact, exact))
    return error, norm


def fitted(data: Data, rank: int, **options: Any) -> tuple[slra.KVCache, dict[str, float]]:
    start = time.perf_counter()
    gqa = len(data.test) > len(data.k)
    basis = slra.fit_attention(data.fit, data.k, data.v, rank, enable_gqa=gqa)
    middle = time.perf_counter()
    cache = slra.KVCache(basis, capacity=data.k.shape[-2], **options).append(data.k, data.v)
    end = time.perf_counter()
    return cache, {"fit": middle - start, "append": end - middle}


def timed(data: Data, cache: slra.KVCache, fit: dict[str, float]) -> dict[str, Any]:
    """What the step takes beside the fastest exact ones, and after how many tokens the fit has paid."""
    seconds = interleaved(steps(data, cache), 9)
    medians = {kind: statistics.median(one) for kind, one in seconds.items()}
    least = {kind: min(one) for kind, one in seconds.items()}
    own = medians["slra.KVCache"]
    result: dict[str, Any] = {"seconds": medians, "least seconds": least, "fit seconds": fit}
    for library in ("numpy", "torch"):
        others = [kind for kind in OTHERS if kind.startswith("torch") == (library == "torch")]
        best = min(others, key=medians.__getitem__)
        saved = medians[best] - own
        result[f"against {library}"] = {
            "fastest exact": best,
            "times faster": medians[best] / own,
            "times faster, least times": min(least[kind] for kind in others)
            / least["slra.KVCache"],
            "break-even tokens": sum(fit.values()) / saved if saved > 0 else None,
        }
    return result


def case(
    name: str, data: Data, rank: int, bound: float | None = None, *, is_timed: bool = False
) -> dict[str, Any]:
    """One row: how far off, how many bytes, and how fast."""
    cache, fit = fitted(data, rank)
    error, norm = errors(data, cache)
    exact_bytes = data.k.nbytes + data.v.nbytes
    each = np.sqrt(error / norm)
    row = {
        "data": name,
        "query heads": len(data.test),
        "key heads": len(data.k),
        "n": data.k.shape[-2],
        "d": data.k.shape[-1],
        "rank": rank,
        "error": {
            "all heads": float(np.sqrt(error.sum() / norm.sum())),
            "median head": float(np.median(each)),
            "worst head": float(each.max()),
            "bound": bound,
        },
        "bytes": {"exact": exact_bytes, "cache": cache.nbytes, "ratio": exact_bytes / cache.nbytes},
    }
    if is_timed:
        row |= timed(data, cache, fit)
    print(row, flush=True)
    return row


def appends(n: int = 10_000) -> dict[str, Any]:
    """Bytes, rows copied and time of ``n`` single appends: 8 heads, d = 128, rank 32."""
    data = synthetic(1.0, N_HEADS, n)
    basis = slra.fit_attention(data.fit, data.k, data.v, 32)
    cache = slra.KVCache(basis, window=64)
    empty, bytes_held, seconds, copied = cache.nbytes, [], [], 0
    for i in range(n):
        before = cache.nbytes
        start = time.perf_counter()
        cache = cache.append(data.k[:, i : i + 1], data.v[:, i : i + 1])
        seconds.append(time.perf_counter() - start)
        if cache.nbytes != before:
            copied += before - empty
        bytes_held.append(cache.nbytes)
    slope = N_HEADS * 64 * 4
    return {
        "bytes of a token": slope,
        "bytes of an empty cache": empty,
        "bytes held": {str(i): bytes_held[i - 1] for i in (1000, 2000, 5000, 10_000)},
        "most bytes over those in use": max(
            b / (empty + slope * (i + 1)) for i, b in enumerate(bytes_held)
        ),
        "bytes copied over bytes in use": copied / (slope * n),
        "median microseconds": {
            "first 1000": 1e6 * statistics.median(seconds[:1000]),
            "last 1000": 1e6 * statistics.median(seconds[-1000:]),
            "mean of all": 1e6 * statistics.fmean(seconds),
        },
    }


def against_length() -> list[dict[str, Any]]:
    lengths = (2048, 8192, 32768)
    return [case("s = 1/i", synthetic(1.0, N_HEADS, n), 32, is_timed=True) for n in lengths]


def plot(rows: list[dict[str, Any]], by_length: list[dict[str, Any]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    n = [row["n"] for row in by_length]
    for label, library in (("NumPy, exact", "numpy"), ("torch SDPA", "torch")):
        ms = [1e3 * row["seconds"][row[f"against {library}"]["fastest exact"]] for row in by_length]
        left.loglog(n, ms, marker="o", label=label)
    own = [1e3 * row["seconds"]["slra.KVCache"] for row in by_length]
    left.loglog(n, own, marker="o", label="KVCache, rank 32")
    left.set(xlabel="tokens", ylabel="ms a step", title="8 heads, d = 128, float32, 1 thread")
    left.legend()
    for name in dict.fromkeys(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == name and row["query heads"] != 32]
        right.loglog(
            [1 / row["bytes"]["ratio"] for row in mine],
            [row["error"]["all heads"] for row in mine],
            marker="o",
            label=name,
        )
    right.set(
        xlabel="bytes, of exact", ylabel="relative error of the output", title="error against bytes"
    )
    right.legend()
    figure.savefig(RESULTS / "kv_cache.png", dpi=120)


COMPARED = ("numpy", "torch")
DATA = {"s = 1/i": "$s_i = 1/i$", "s = i^-1.5": "$s_i = i^{-1.5}$"}


LIBRARIES = ("numpy", "torch")


def tables(result: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for row in (row for row in result["rows"] if "seconds" in row):
        name = DATA.get(row["data"], f"{row['data']}, n = {row['n']}, d = {row['d']}")
        against = [row[f"against {library}"] for library in LIBRARIES]
        paid = [one["break-even tokens"] for one in against]
        rows.append(
            (
                name,
                f"{row['query heads']} on {row['key heads']}",
                row["rank"],
                significant(row["error"]["all heads"]),
                f"{1 / row['bytes']['ratio']:.2f} x",
                *(f"{one['times faster']:.1f} x" for one in against),
                duration(sum(row["fit seconds"].values())),
                ", ".join("never" if tokens is None else f"{tokens:.0f}" for tokens in paid),
            )
        )
    head = ["data", "heads", "rank", "error", "bytes", "NumPy", "torch", "fit and compression"]
    steps = table([*head, "break-even (NumPy, torch)"], rows, "llrrrrrrr")
    by_length = [
        (row["n"], *(f"{row[f'against {library}']['times faster']:.1f} x" for library in LIBRARIES))
        for row in sorted(result["against length"], key=lambda row: row["n"])
    ]
    return {"steps": steps, "lengths": table(["tokens", "NumPy", "torch"], by_length, "rrr")}


def losses(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """A short cache."""
    short = [row for row in result["rows"] if row["data"] == "MiniLM"]
    slower = [1 / row[f"against {name}"]["times faster"] for row in short for name in LIBRARIES]
    return [("a step on a compressed cache of 512 tokens", "on an exact one", span(slower))]


def says(result: dict[str, Any]) -> list[str]:
    first, second = (
        row for row in result["rows"] if row["data"] == "s = 1/i" and row["rank"] == 32
    )
    worst = [significant(row["error"]["worst head"]) for row in (first, second)]
    appends, faster = result["10000 appends"], first["against numpy"]["times faster"]
    microseconds = appends["median microseconds"]
    return [
        f"its steps {faster:.1f} times faster, at an error of {significant(first['error']['all heads'])}",
        f"off by {worst[0]} in the first row and by {worst[1]} in the second",
        f"{appends['bytes of a token']} bytes a token",
        f"never more than {appends['most bytes over those in use']:.2f} times what is in use",
        f"{appends['bytes copied over bytes in use']:.1f} times the final bytes copied altogether",
        f"a median of {microseconds['first 1000']:.0f} microseconds for the first thousand and of "
        f"{microseconds['last 1000']:.0f} for the last",
    ]


def main() -> None:
    torch.set_num_threads(1)
    with threadpool_limits(1), torch.inference_mode():
        rows = []
        for name, power, cases in (
            ("s = 1/i", 1.0, {32: 0.05, 16: None, 64: None}),
            ("s = i^-1.5", 1.5, {24: 0.01, 8: None, 16: None}),
        ):
            for heads in (8, 32):
                data = synthetic(power, heads)
                for rank, bound in cases.items():
                    if heads == 8 or bound:
                        rows.append(case(name, data, rank, bound, is_timed=bound is not None))
        real = minilm()
        rows += [case("MiniLM", real, rank, is_timed=True) for rank in (8, 16, 24)]
        by_length = [*against_length(), rows[0]]
        result = {"rows": rows, "against length": by_length, "10000 appends": appends()}
        save("kv_cache", result, tables, losses=losses, says=says, compared=COMPARED)
    plot(sorted(rows, key=lambda row: row["rank"]), by_length)


if __name__ == "__main__":
    main()
