"""Masks as transformers makes them for a registered name: none where causality, or a window, says it all.

Needs: transformers, torch.
"""

from typing import Any

import torch
from transformers.masking_utils import sdpa_mask

__all__ = ["make_mask"]

# Models whose layers say how wide their window is. Others (Qwen2-MoE, PhiMoE, ...) say it in the mask alone.
SAY_WINDOW = {
    "cohere2",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "ministral",
    "mistral",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "starcoder2",
}


def make_mask(
    *args: Any, config: Any = None, local_size: int | None = None, **options: Any
) -> torch.Tensor | None:
    """Return what `transformers.masking_utils.sdpa_mask` does, but no mask where a layer's window is all there is."""
    says_window = getattr(config, "model_type", None) in SAY_WINDOW
    if says_window and local_size is not None and not args and _is_window(local_size, **options):
        return None
    return sdpa_mask(*args, config=config, local_size=local_size, **options)


def _is_window(
    size: int,
    *,
    q_length: Any,
    kv_length: Any,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> bool:
    """Whether each query of a whole sequence sees itself and ``size - 1`` tokens before it, and none is padding."""
    places = (q_length, kv_length, q_offset, kv_offset)
    if torch.compiler.is_compiling() or not all(isinstance(x, int) for x in places):
        return False
    is_whole = q_length == kv_length and q_offset == kv_offset == 0
    if not (allow_is_causal_skip and is_whole and mask_function is not None and size < kv_length):
        return False
    if attention_mask is not None:
        shape = tuple(attention_mask.shape[1:])
        if shape != (kv_length,) or not bool(attention_mask.all()):
            return False
    # Chunks come under the same name: the last two rows tell them from a window.
    q, k = torch.arange(kv_length - 2, kv_length)[:, None], torch.arange(kv_length)[None, :]
    zero = torch.zeros((1, 1), dtype=torch.int64)
    seen = mask_function(zero, zero, q, k)
    return bool(torch.equal(torch.broadcast_to(seen, (2, kv_length)), (k <= q) & (k > q - size)))
