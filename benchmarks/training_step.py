"""How long a step of training takes: LowRankAttention in its forms, beside torch.nn.MultiheadAttention.

    python -m benchmarks.training_step     about a minute on two cores

Forward, backward and a step of SGD on (32, 128, 256) in float32, 8 heads, rank 8; a fit every ten steps is timed as ten
steps. Writes results/training_step.json.
"""

import statistics
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.common import interleaved, save, table
from slra.integrations.torch import LowRankAttention

BATCH, LENGTH, WIDTH, HEADS, RANK = 32, 128, 256, 8, 8
REFIT = 10
FORMS = {
    "frozen basis": {"refit_every": 0},
    "refit every step": {"refit_every": 1},
    f"refit every {REFIT} steps": {"refit_every": REFIT},
    "a basis for each sequence": {"basis_per": "sequence"},
    "frozen basis, soft threshold": {"refit_every": 0, "l1": 0.1, "l1_form": "prox"},
}
EXACT = "torch.nn.MultiheadAttention"


def step(layer: nn.Module, x: torch.Tensor, n: int) -> Callable[[], None]:
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(n):
            out, _ = layer(x, x, x, need_weights=False)
            out.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    layers: dict[str, nn.Module] = {EXACT: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)}
    for name, options in FORMS.items():
        layers[name] = made = LowRankAttention(WIDTH, HEADS, batch_first=True, rank=RANK, **options)
        if made.refit_every == 0:
            made.fit_basis(x, x, x)
    n_steps = {name: getattr(made, "refit_every", 1) or 1 for name, made in layers.items()}
    runs = {name: step(made, x, n_steps[name]) for name, made in layers.items()}
    times = {
        name: [one / n_steps[name] for one in found] for name, found in interleaved(runs).items()
    }
    exact = times[EXACT]

    def tables(measured: dict) -> dict:
        rows = []
        for name, found in measured["seconds"].items():
            ratio = statistics.median(a / b for a, b in zip(found, exact, strict=True))
            rows.append([name, f"{1e3 * statistics.median(found):.0f}", f"{ratio:.2f}"])
        head = ["attention", "ms a step", "times MultiheadAttention"]
        return {"steps": table(head, rows, "lrr")}

    path = save("training_step", {"seconds": times}, tables, compared=("torch",))
    for row in tables({"seconds": times})["steps"]["rows"]:
        print(*(f"{cell:>32}" for cell in row))
    print(path)


if __name__ == "__main__":
    main()
