"""The NumPy-only training of examples/train_digits_numpy.py beside the same model in torch, by autograd.

From the same initialisation, on the same batches, in float64.
"""

import torch
from torch import Tensor, nn

from examples import train_digits_numpy as ours
from slra.integrations.torch import LowRankAttention

# A penalty weighs a sum over 3072 entries a picture; a threshold is in the units of the entries.
CONFIGS = {
    "low rank": ours.Config(form="none", l1=0.0),
    "low rank, l1 penalty": ours.Config(form="penalty", l1=1e-4),
    "low rank, l1 prox": ours.Config(form="prox", l1=0.2),
}


class Model(nn.Module):
    """One attention block and a softmax regression, with the parameters of the NumPy model."""

    def __init__(self, params: ours.Params, config: ours.Config) -> None:
        super().__init__()
        for name in ("value", "position", "head", "bias"):
            setattr(self, name, nn.Parameter(torch.tensor(params[name])))
        self.attention = LowRankAttention(
            ours.WIDTH,
            ours.HEADS,
            bias=False,
            batch_first=True,
            dtype=torch.float64,
            rank=config.rank,
            basis_per="sequence",
            l1=config.l1,
            l1_form="prox" if config.form == "prox" else "penalty",
        )
        weights = {"in_proj_weight": "in_proj", "out_proj.weight": "out_proj"}
        state = {name: torch.tensor(params[key]) for name, key in weights.items()}
        self.attention.load_state_dict(state)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images[..., None] * self.value + self.position
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return (tokens + mixed).flatten(1) @ self.head.mT + self.bias

    def loss(self, batch: ours.Batch) -> Tensor:
        logits = self(torch.from_numpy(batch.images))
        task = nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels))
        return task if self.attention.l1_form == "prox" else task + self.attention.penalty()


def train_in_torch(
    params: ours.Params, data: ours.Batch, config: ours.Config
) -> tuple[Model, list[float]]:
    model = Model(params, config)
    optimizer = torch.optim.SGD(model.parameters(), config.learning_rate, config.momentum)
    losses = []
    for batch in ours.batches(data, config):
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses
