"""What others do instead, each from its paper: to be compared with, not recommended.

Each takes grouped inputs, a rank and (top-k only) a number of keys, and returns the output (..., H, G, Nq, Dv).
"""

from slra.attn.baselines.favor import favor_attention
from slra.attn.baselines.linformer import linformer_attention
from slra.attn.baselines.nystrom import nystrom_attention
from slra.attn.baselines.topk import topk_attention

__all__ = [
    "BASELINES",
    "favor_attention",
    "linformer_attention",
    "nystrom_attention",
    "topk_attention",
]

BASELINES = {
    "nystrom": nystrom_attention,
    "linformer": linformer_attention,
    "favor": favor_attention,
    "topk": topk_attention,
}
