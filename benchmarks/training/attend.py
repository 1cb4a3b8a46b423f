"""The attention of every method: layers with the parameters of `torch.nn.MultiheadAttention`."""

import torch
from torch import Tensor, nn
from torch.nn import functional

import slra
from benchmarks.training.settings import Method, Setting
from slra.baselines._favor import orthogonal_features
from slra.integrations.torch import LowRankAttention


def make_attention(setting: Setting, method: Method) -> nn.MultiheadAttention:
    """The layer of a method at full rank and without l1: `set_progress` turns them to their final values."""
    sizes = {"embed_dim": setting.width, "num_heads": setting.heads, "batch_first": True}
    if method.kind in ("favor", "nystrom"):
        return Baseline(method.kind, stored=2 * method.rank(setting), **sizes)
    if method.kind == "exact":
        return LowRankAttention(**sizes)
    return LowRankAttention(
        **sizes,
        rank=None if method.rtol else setting.head_width,
        rtol=method.rtol,
        method=method.kind,
        refit_every=setting.refit,
        l1_form="prox" if method.threshold else "penalty",
    )


def set_progress(attention: nn.MultiheadAttention, rank: int, l1: float) -> None:
    """Cut to this rank from the next fit on, and weigh l1 so from the next call on."""
    if isinstance(attention, LowRankAttention):
        attention.l1 = l1
        if attention.rank is not None:
            attention.rank = rank


def attend(attention: nn.MultiheadAttention, x: Tensor, *, is_causal: bool) -> Tensor:
    return attention(x, x, x, need_weights=False, is_causal=is_causal)[0]


class Baseline(nn.MultiheadAttention):
    """Random features or landmarks, as many as ``stored`` numbers per key and head pay for."""

    def __init__(self, kind: str, stored: int, **sizes: int) -> None:
        super().__init__(**sizes)
        self.kind, self.stored = kind, stored

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool, is_causal: bool
    ) -> tuple[Tensor, None]:
        """Self-attention; Nystrom's landmarks are means over all tokens: it has no causal form and ignores the mask."""
        projected = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        rank = n_baseline(self.kind, self.stored, k.shape[-2], self.head_dim)
        if self.kind == "favor" and is_causal:
            out = causal_favor(q, k, v, rank)
        else:
            out = slra.low_rank_attention(q, k, v, rank, method=self.kind)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


def n_baseline(kind: str, stored: int, n: int, width: int) -> int:
    """How many features or landmarks ``stored`` numbers per key pay for at n keys.

    Random features keep their sum and its product with V, m(D + 1) numbers; landmarks of queries and of keys and the
    product with V are 3mD. Counted as in `benchmarks.fidelity`.
    """
    return stored * n // (width + 1 if kind == "favor" else 3 * width)


def causal_favor(q: Tensor, k: Tensor, v: Tensor, n_features: int) -> Tensor:
    """FAVOR+ under a causal mask.

    The weights are formed and masked, which at these lengths is cheaper than the running sums of features and equal to
    them (arXiv:2009.14794, section 2.5.1).
    """
    omega = torch.as_tensor(orthogonal_features(n_features, q.shape[-1]), dtype=q.dtype)
    q, k = (x * q.shape[-1] ** -0.25 for x in (q, k))

    def exponents(x: Tensor) -> Tensor:
        return x @ omega.mT - (x * x).sum(-1, keepdim=True) / 2

    of_q, of_k = exponents(q), exponents(k)
    # Factors common to a row of the weights cancel: without them nothing overflows.
    phi_q = (of_q - of_q.detach().amax(-1, keepdim=True)).exp()
    phi_k = (of_k - of_k.detach().amax((-2, -1), keepdim=True)).exp()
    weights = (phi_q @ phi_k.mT).tril()
    return weights @ v / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
