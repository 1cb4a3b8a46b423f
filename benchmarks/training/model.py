"""A small transformer whose attention is that of a method."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.training.attend import attend, make_attention
from benchmarks.training.settings import Method, Setting
from slra.integrations.torch import LowRankAttention


class Block(nn.Module):
    """Pre-norm block: attention after a short causal convolution, and an MLP, where the setting has them."""

    def __init__(self, setting: Setting, method: Method) -> None:
        super().__init__()
        width, self.is_causal = setting.width, setting.is_causal
        self.norm = nn.LayerNorm(width)
        self.conv = ShortConvolution(width, setting.kernel) if setting.kernel else nn.Identity()
        self.attention = make_attention(setting, method)
        self.mlp = mlp(width) if setting.has_mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + attend(self.attention, self.conv(self.norm(x)), is_causal=self.is_causal)
        return x if self.mlp is None else x + self.mlp(x)


class ShortConvolution(nn.Module):
    """Add to each token a mix of it and the tokens just before it, feature by feature."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.mix = nn.Conv1d(width, width, kernel, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(functional.pad(x.mT, (self.kernel - 1, 0))).mT


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
    )


class Model(nn.Module):
    def __init__(self, setting: Setting, method: Method) -> None:
        super().__init__()
        self.readout = setting.readout
        self.tokens = nn.Embedding(setting.n_tokens, setting.width)
        self.places = nn.Embedding(setting.length, setting.width)
        self.blocks = nn.ModuleList(Block(setting, method) for _ in range(setting.layers))
        self.head = nn.Sequential(
            nn.LayerNorm(setting.width), nn.Linear(setting.width, setting.n_classes, bias=False)
        )

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Logits: a row per position that is ``asked`` (a boolean mask), or per sequence, by the setting's readout."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        if self.readout == "each":
            return self.head(x[asked])
        return self.head(x[:, 0] if self.readout == "first" else x.mean(1))

    @property
    def attentions(self) -> list[nn.MultiheadAttention]:
        return [block.attention for block in self.blocks]

    @property
    def low_rank(self) -> list[LowRankAttention]:
        return [x for x in self.attentions if isinstance(x, LowRankAttention)]

    def penalty(self) -> Tensor | float:
        """The l1 terms of the last call, of all layers that have the penalty form."""
        active = [x for x in self.low_rank if x.l1 and x.l1_form == "penalty"]
        return torch.stack([x.penalty() for x in active]).sum() if active else 0.0
