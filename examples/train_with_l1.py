"""Train a small network whose queries, keys and values are of low rank *and* sparse, in PyTorch.

The objective has a term for the task and one for each of the three matrices:

    L = cross-entropy + l1 * (||Q^||_1 + ||K^||_1 + ||V^||_1)

There are two ways to have it. Added to the loss as a penalty, subgradients make entries small, but not zero. As a
soft threshold inside the layer (its proximal operator), every small entry *is* zero. This script trains both, and
a third network with neither, on scikit-learn's digits: eight tokens, one for each line of a picture. (One seed each:
how many digits are right is no more than a check that all three learn.)

Run: python examples/train_with_l1.py
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from slra.integrations.torch import LowRankAttention

WIDTH, HEADS, RANK = 32, 4, 4
EPOCHS, BATCH = 8, 64
# In the units of the loss for "penalty", of the entries of Q^, K^ and V^ for "prox".
L1 = {"none": 0.0, "penalty": 1e-4, "prox": 1.0}


class Classifier(nn.Module):
    """Lines of a picture attend to each other, and what they find says which digit it is."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.position = nn.Parameter(torch.randn(8, WIDTH))
        # In place of nn.MultiheadAttention: each head, 8 features wide, keeps 4 dimensions.
        self.attention = LowRankAttention(
            WIDTH,
            HEADS,
            batch_first=True,
            rank=RANK,
            l1=L1[form],
            l1_form="prox" if form == "prox" else "penalty",
        )
        self.classify = nn.Sequential(nn.Flatten(), nn.Linear(8 * WIDTH, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images) + self.position
        # Nothing goes around the attention: what it loses is lost.
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.classify(attended)


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return pictures (n, 8, 8) from 0 to 1 and their labels: 1437 to train on, 360 to test on."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).unflatten(1, (8, 8))
    labels = torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return (images[train], labels[train]), (images[test], labels[test])


class Trained(NamedTuple):
    """Accuracy on test pictures, there the shares of exact zeros, and of entries below 1e-3 of the largest."""

    accuracy: float
    zeros: tuple[float, float, float]
    small: float
    entries: torch.Tensor


def train(form: str, train_set: tuple, test_set: tuple) -> Trained:
    """Train one network, and look at Q^, K^ and V^ on the pictures it was not trained on."""
    torch.manual_seed(0)
    model = Classifier(form)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images, labels = train_set
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(BATCH):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            if form == "penalty":
                # The three norms of the last call, weighted. The threshold takes their place in the other form.
                loss = loss + model.attention.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        hits = model(test_set[0]).argmax(-1) == test_set[1]
        entries = torch.cat([x.flatten() for x in model.attention.approximations()]).abs()
        small = entries < 1e-3 * entries.max()
        return Trained(
            float(hits.double().mean()),
            tuple(model.attention.sparsity()),
            float(small.double().mean()),
            entries,
        )


class Numbers(NamedTuple):
    """What was measured, by form."""

    accuracy: dict[str, float]
    zeros: dict[str, tuple[float, float, float]]
    small: dict[str, float]


def main(picture: str | Path = "train_with_l1.png") -> Numbers:
    train_set, test_set = digits()
    print(f"{EPOCHS} epochs, rank {RANK} of {WIDTH // HEADS} in each of {HEADS} heads")
    print(
        "form: accuracy on 360 test pictures; exact zeros in Q^, K^, V^; below 1e-3 of the largest"
    )
    trained = {form: train(form, train_set, test_set) for form in L1}
    for form, one in trained.items():
        zeros = ", ".join(f"{share:.1%}" for share in one.zeros)
        print(f"  {form}: {one.accuracy:.1%}; {zeros}; {one.small:.1%}")
    draw(trained, Path(picture))
    return Numbers(
        {form: one.accuracy for form, one in trained.items()},
        {form: one.zeros for form, one in trained.items()},
        {form: one.small for form, one in trained.items()},
    )


def draw(trained: dict[str, Trained], path: Path) -> None:
    """How large the entries are: for each size, the share that is no larger."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    shares = torch.linspace(0, 1, 401)
    for (form, one), color, dash in zip(
        trained.items(), ("#222222", "#D55E00", "#0072B2"), (":", "--", "-"), strict=True
    ):
        sizes = torch.quantile(one.entries[:: len(one.entries) // 100_000 + 1], shares)
        axis.plot(sizes.clamp(min=1e-5), shares, dash, color=color, label=form, lw=2)
    axis.set(
        xscale="log",
        xlim=(1e-5, None),
        ylim=(0, 1),
        xlabel="size of an entry of Q^, K^ or V^ (left edge: zero)",
        ylabel="share that is no larger",
    )
    axis.legend(frameon=False)
    axis.grid(color="#e4e4e4", lw=0.7)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main(*sys.argv[1:])
