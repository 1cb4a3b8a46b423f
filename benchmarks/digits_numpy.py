"""The NumPy-only training of examples/train_digits_numpy.py beside the same model in torch, by autograd.

From the same initialisation, on the same batches, in float64: loss curves, accuracies and zeros.

python -m benchmarks.digits_numpy     about two minutes; writes results/digits_numpy.json
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import save
from examples import train_digits_numpy as ours
from slra.integrations.torch import LowRankAttention

# A penalty weighs a sum over 3072 entries a picture; a threshold is in the units of the entries.
CONFIGS = {
    "low rank": ours.Config(form="none", l1=0.0),
    "low rank, l1 penalty": ours.Config(form="penalty", l1=1e-4),
    "low rank, l1 prox": ours.Config(form="prox", l1=0.2),
}
N_FIRST = 50


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


def accuracy_in_torch(model: Model, data: ours.Batch) -> float:
    with torch.no_grad():
        found = model(torch.from_numpy(data.images)).argmax(dim=-1).numpy()
    return float(np.mean(found == data.labels))


def compare(config: ours.Config) -> dict[str, Any]:
    training, test = ours.digits()
    params, losses = ours.train(ours.init(), training, config)
    model, torch_losses = train_in_torch(ours.init(), training, config)
    apart = np.abs(np.subtract(losses, torch_losses))
    return {
        "config": config._asdict(),
        "steps": len(losses),
        "accuracy": {
            "numpy": ours.accuracy(params, test, config),
            "torch": accuracy_in_torch(model, test),
        },
        "loss_difference_first_50": float(apart[:N_FIRST].max()),
        "loss_difference_all": float(apart.max()),
        "zeros": ours.zeros(params, test, config),
        "losses": {"numpy": losses, "torch": torch_losses},
    }


def main() -> None:
    rows = {}
    for name, config in CONFIGS.items():
        rows[name] = compare(config)
        print(name, {key: value for key, value in rows[name].items() if key != "losses"})
    save("digits_numpy", {"runs": rows})


if __name__ == "__main__":
    main()
