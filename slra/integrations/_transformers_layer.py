"""Low-rank attention as a layer of Hugging Face transformers calls it.

Needs: torch. What the layer runs on hangs on its module: a basis, or, during calibration, a function that records.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

import slra
from slra.attn.basis import AttentionBasis

__all__ = [
    "ATTEND",
    "BASIS",
    "RECORD",
    "LayerBasis",
    "Settings",
    "implementation",
    "is_implementation",
]

# Attributes on the attention modules of the caller's model.
BASIS, RECORD = "slra_basis", "_slra_record"
# And on keys that a cache returns: a function of queries and options that attends to what they stand for.
ATTEND = "_slra_attend"
# What some models pass that changes the scores; each has a meaning that low-rank attention does not know.
NOT_TAKEN = ("position_bias", "indices", "block_indices")


class Settings(NamedTuple):
    """How a registered name fits."""

    name: str
    rank: int | tuple[int, int] | None
    rtol: float | None
    method: str

    @property
    def fits(self) -> bool:
        return self.rank is not None or self.rtol is not None


def implementation(settings: Settings) -> Any:
    """Return the function to register."""
    return partial(_attention, settings=settings)


def is_implementation(function: Any) -> bool:
    return isinstance(function, partial) and function.func is _attention


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    *,
    settings: Settings,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: q (B, Hq, Nq, D), k and v (B, Hkv, Nk, D), out (B, Nq, Hq, D)."""
    _refuse(dropout, others)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options = {
        "mask": attention_mask,
        "is_causal": causal and attention_mask is None and query.shape[2] > 1,
        # Without a mask nothing is in the cache yet: keys beyond the queries are the free room of a static one.
        "causal_align": "top_left",
        "window": None if attention_mask is not None else _window(query, key, others),
        "sinks": others.get("s_aux"),
        "scale": scaling,
        "softcap": softcap,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    out: torch.Tensor
    record, basis = getattr(module, RECORD, None), getattr(module, BASIS, None)
    if record is not None:
        record(query, key, value, options, settings)
        out = slra.attention(query, key, value, **options)
    elif (attend := getattr(key, ATTEND, None)) is not None:
        out = attend(query, options)
    elif basis is not None:
        out = basis().attend(query, key, value, **options)
    else:
        _check_fit_per_call(module, causal, options, settings, query.shape[2] == key.shape[2])
        out = _fit_and_attend(query, key, value, options, settings)
    return out.transpose(1, 2).contiguous(), None


def _window(
    query: torch.Tensor, key: torch.Tensor, others: dict[str, Any]
) -> tuple[int, int | None] | None:
    """Return the window of a layer to which `make_mask` gave no mask: as many tokens as it says, its own the last."""
    size = others.get("sliding_window")
    if size is None or query.shape[2] != key.shape[2] or size >= key.shape[2]:
        return None
    return size - 1, None


def _refuse(dropout: float, others: dict[str, Any]) -> None:
    """Raise ValueError on what would silently be computed as something else."""
    if dropout:
        raise ValueError(
            f"dropout must be 0, got {dropout}: it drops weights of the attention matrix, which is never formed; "
            "set the model's attention dropout to 0 or call model.eval()"
        )
    for name in NOT_TAKEN:
        if others.get(name) is not None:
            raise ValueError(
                f"{name} must be None: this model changes the scores in a way that low-rank attention does not "
                'know; use attn_implementation="eager" or "sdpa"'
            )
    if others.get("output_attentions"):
        raise ValueError(
            "output_attentions must be False: the attention matrix is never formed; "
            'use attn_implementation="eager"'
        )


def _check_fit_per_call(
    module: torch.nn.Module,
    causal: bool,
    options: dict[str, Any],
    settings: Settings,
    is_square: bool,
) -> None:
    """Raise ValueError where a layer without a basis must not be fitted to the tokens of the call."""
    kind, name = type(module).__name__, settings.name
    if not settings.fits:
        raise ValueError(
            f"{kind} has no basis, and {name!r} is registered without rank and rtol: "
            "calibrate and attach bases, or register it with a rank"
        )
    if causal or _is_in_decoder(module) or _only_looks_back(options["mask"], is_square):
        raise ValueError(
            f"{kind} predicts tokens, and a basis fitted to this call would see later ones: attach bases fitted to "
            "other text, or to a prefix, by slra.integrations.transformers.calibrate"
        )


def _is_in_decoder(module: torch.nn.Module) -> bool:
    """Whether queries come from a decoder, by what the module or else its configuration says."""
    config = getattr(module, "config", None)
    by_config = any(getattr(config, flag, False) for flag in ("is_decoder", "is_encoder_decoder"))
    return bool(getattr(module, "is_decoder", by_config))


def _only_looks_back(mask: torch.Tensor | None, is_square: bool) -> bool:
    """Whether a mask, where it can be read, lets later queries see more keys and none see a later key."""
    if mask is None or not is_square or torch.compiler.is_compiling():
        return False
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    looks_ahead = bool(torch.triu(seen, 1).any())
    return not looks_ahead and bool((seen != seen[..., :1, :]).any())


def _fit_and_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: dict[str, Any],
    settings: Settings,
) -> torch.Tensor:
    """Fit each sequence of the batch, without its padding, and attend."""
    mask = options["mask"]
    if mask is None or mask.dtype != torch.bool or torch.compiler.is_compiling():
        return _fitted(q, k, v, options, settings)(q, k, v, **options)
    masks = mask.expand(q.shape[0], *mask.shape[1:])
    outs = []
    for one_q, one_k, one_v, own in zip(q, k, v, masks, strict=True):
        own_options = {**options, "mask": own}
        attend = _fitted(*_without_padding(one_q, one_k, one_v, own_options), settings)
        outs.append(attend(one_q, one_k, one_v, **own_options))
    return torch.stack(outs)


def _without_padding(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Cut a sequence to what a fit may see: keys that no query sees are padding, as are the queries beside them."""
    mask = options["mask"]
    real = mask.any(dim=0).any(dim=0)
    rows = real if q.shape[1] == k.shape[1] else torch.ones_like(q[0, :, 0], dtype=torch.bool)
    mask = mask[..., real] if mask.shape[1] == 1 else mask[:, rows][..., real]
    return q[:, rows], k[:, real], v[:, real], {**options, "mask": mask}


def _fitted(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: dict[str, Any],
    settings: Settings,
) -> Callable[..., Any]:
    """Fit, and return how to attend: exactly where there are so few tokens that it takes no more dimensions."""
    rank, n_keys = settings.rank, k.shape[-2]
    if n_keys == 0:
        return slra.attention
    if rank is not None:
        pair = rank if isinstance(rank, Sequence) else (rank, rank)
        rank = min(pair[0], n_keys), min(pair[1], n_keys)
        if rank == (n_keys, n_keys):
            return slra.attention
    fit = {"rtol": settings.rtol, "method": settings.method, **options}
    return slra.fit_attention(q, k, v, rank, **fit).attend


class LayerBasis(torch.nn.Module):
    """A basis that moves with its model and is not stored with it."""

    def __init__(self, basis: AttentionBasis, device: torch.device) -> None:
        super().__init__()
        self.ranks, self.is_held_out = basis.ranks, basis.is_held_out
        for name in ("wq", "wk", "wv", "uv", "c", "mu", "error"):
            self.register_buffer(name, getattr(basis, name).to(device), persistent=False)

    def forward(self) -> AttentionBasis:
        """Return the basis where the model is now."""
        maps = self.wq, self.wk, self.wv, self.uv, self.c, self.mu
        return AttentionBasis(*maps, self.ranks, self.error, is_held_out=self.is_held_out)
