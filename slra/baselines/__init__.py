"""What others do instead, each from its paper: to be compared with, not recommended.

Each takes what `slra.attention` takes, as far as its paper defines it, and a size of its own.
"""

from slra.baselines._favor import favor
from slra.baselines._kivi import kivi
from slra.baselines._linformer import linformer
from slra.baselines._nystrom import nystrom
from slra.baselines._quest import quest
from slra.baselines._snapkv import snapkv
from slra.baselines._sparq import sparq
from slra.baselines._streaming import streaming
from slra.baselines._topk import topk

__all__ = ["favor", "kivi", "linformer", "nystrom", "quest", "snapkv", "sparq", "streaming", "topk"]
