"""Train with low-rank attention as people train: compiled, in bfloat16, with averaged weights and a schedule for l1.

Three small transformers of one block: one that looks at digits in patches, one that writes a text a second time
(causal), and one whose sequences are padded. Each is trained twice from the same weights on the same batches:

- plainly, in float32, nothing compiled;
- in one graph of ``torch.compile``, in which products are of bfloat16 (``torch.autocast``).

Both have a lambda that rises over the first half of the steps, a basis that is fitted anew every ten steps, between
two calls of the graph, and an exponential average of all weights and bases, which is what is tested in the end. Plain
runs from other weights on other batches say how far two runs are apart that differ in nothing that matters: the noise.

Run: python examples/train_compiled.py [PICTURE [BACKEND]], a backend of torch.compile: aot_eager (the default, which
traces the forward and the backward pass, and takes seconds) or inductor (which needs a C++ compiler, and minutes).
"""

import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from slra.integrations.torch import LowRankAttention

WIDTH, HEADS, RANK = 32, 4, 4
STEPS, BATCH, REFIT, SEEDS = 60, 64, 10, 3
SYMBOLS, COPIED, LONGEST, TESTS = 8, 6, 12, 360


class Batch(NamedTuple):
    """Tokens (n, length, what a token is), what is padding, and the right answers, -100 where there is none."""

    tokens: Tensor
    hidden: Tensor | None
    answers: Tensor


class Task(NamedTuple):
    """How to draw a batch, and what a network for it is like."""

    draw: Callable[[torch.Generator, int], Batch]
    features: int
    length: int
    n_answers: int
    is_causal: bool
    l1_form: str
    l1: float


@functools.cache
def pictures() -> tuple[Tensor, Tensor]:
    """Return digits in 16 patches of 2 x 2 numbers from 0 to 1, (1797, 16, 4), and which digits they are."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 4, 2, 4, 2)
    return images.transpose(2, 3).reshape(-1, 16, 4), torch.tensor(labels)


def digits(rng: torch.Generator, n: int) -> Batch:
    """Draw some of the first 1437 pictures, or take the last 360, which are for the test."""
    patches, labels = pictures()
    rows = torch.arange(1437, 1797) if n == TESTS else torch.randperm(1437, generator=rng)[:n]
    return Batch(patches[rows], None, labels[rows])


def copies(rng: torch.Generator, n: int) -> Batch:
    """Draw symbols twice in a row; the next symbol is to be told where the second time begins."""
    once = torch.randint(SYMBOLS, (n, COPIED), generator=rng)
    text = torch.cat([once, once], dim=1)
    answers = text[:, 1:].clone()
    answers[:, : COPIED - 1] = -100
    return Batch(one_hot(text[:, :-1], SYMBOLS).float(), None, answers)


def padded(rng: torch.Generator, n: int) -> Batch:
    """Draw symbols in sequences of several lengths; the largest of each is to be told. Padding is loud nonsense."""
    text = torch.randint(SYMBOLS, (n, LONGEST), generator=rng)
    lengths = torch.randint(2, LONGEST + 1, (n, 1), generator=rng)
    hidden = torch.arange(LONGEST) >= lengths
    tokens = one_hot(text, SYMBOLS).float().masked_fill(hidden[..., None], 9.0)
    return Batch(tokens, hidden, text.masked_fill(hidden, -1).amax(1))


TASKS = {
    "digits": Task(digits, 4, 16, 10, False, "prox", 0.3),
    "copying": Task(copies, SYMBOLS, 2 * COPIED - 1, SYMBOLS, True, "penalty", 1e-4),
    "padded": Task(padded, SYMBOLS, LONGEST, SYMBOLS, False, "prox", 0.3),
}


class Transformer(nn.Module):
    """One block; answers for the sequence, or for each token where it is causal."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.embed = nn.Linear(task.features, WIDTH)
        self.position = nn.Parameter(0.3 * torch.randn(task.length, WIDTH))
        self.before = nn.LayerNorm(WIDTH)
        # Fits are not part of a compiled graph: with refit_every=0 they are made when `refit` says so.
        self.attention = LowRankAttention(
            WIDTH, HEADS, batch_first=True, rank=RANK, refit_every=0, l1_form=task.l1_form
        )
        self.mix = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.answer = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, task.n_answers))

    def forward(self, tokens: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor | float]:
        x = self.embed(tokens) + self.position
        y = self.before(x)
        is_causal = self.task.is_causal
        attended, _ = self.attention(y, y, y, hidden, need_weights=False, is_causal=is_causal)
        x = x + attended
        x = x + self.mix(x)
        if hidden is not None:
            x = x.masked_fill(hidden[..., None], 0).sum(1) / (~hidden).sum(1, keepdim=True)
        elif not is_causal:
            x = x.mean(1)
        return self.answer(x), self.attention.penalty() if self.task.l1_form == "penalty" else 0.0


def refit(model: Transformer, batch: Batch) -> None:
    """Fit the basis to a batch, outside of the graph."""
    model.attention.refit_every = 1
    with torch.no_grad():
        model(batch.tokens, batch.hidden)
    model.attention.refit_every = 0


class Tested(NamedTuple):
    """Loss and accuracy on the test, and exact zeros among the entries of Q^, K^ and V^ there."""

    loss: float
    accuracy: float
    zeros: float


class Trained(NamedTuple):
    """Loss of each step, and what the averaged network does on the test."""

    losses: list[float]
    tested: Tested


def train(model: Transformer, call: Callable[..., Any], seed: int) -> Trained:
    """Train a network from new weights; `call` is the network itself, or what it was compiled to."""
    task, is_compiled = model.task, call is not model
    torch.manual_seed(seed)
    model.load_state_dict(Transformer(task).state_dict())
    model.train()
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    losses = []
    for step in range(STEPS):
        batch = task.draw(rng, BATCH)
        if step % REFIT == 0:
            refit(model, batch)
        model.attention.l1 = task.l1 * min(1, 2 * (step + 1) / STEPS)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_compiled):
            answers, penalty = call(batch.tokens, batch.hidden)
            loss = cross_entropy(answers.flatten(0, -2), batch.answers.flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + penalty).backward()
        optimizer.step()
        averaged.update_parameters(model)
    return Trained(losses, judged(task, averaged.eval()))


@torch.no_grad()
def judged(task: Task, averaged: AveragedModel) -> Tested:
    """Test in float32, whatever it was trained in."""
    batch = task.draw(torch.Generator().manual_seed(1234), TESTS)
    answers, right = averaged(batch.tokens, batch.hidden)[0].flatten(0, -2), batch.answers.flatten()
    hits = (answers.argmax(-1) == right)[right != -100]
    zeros = statistics.mean(averaged.module.attention.sparsity())
    return Tested(cross_entropy(answers, right).item(), hits.double().mean().item(), zeros)


class Numbers(NamedTuple):
    """What came out, by task."""

    plain: dict[str, list[Tested]]
    compiled: dict[str, Tested]
    apart: dict[str, float]


def main(picture: str | Path = "train_compiled.png", backend: str = "aot_eager") -> Numbers:
    print(f"{STEPS} steps; bfloat16 in one graph of torch.compile ({backend})")
    curves, done = {}, Numbers({}, {}, {})
    for name, task in TASKS.items():
        model = Transformer(task)
        plain = [train(model, model, seed) for seed in range(SEEDS)]
        # One graph for all steps: a break would be an error.
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        other = train(model, compiled, 0)
        print(f"{name}: loss and accuracy on the test; exact zeros in Q^, K^ and V^")
        for label, one in (
            *((f"plain, seed {seed}", one) for seed, one in enumerate(plain)),
            ("compiled, seed 0", other),
        ):
            tested = one.tested
            print(f"  {label}: {tested.loss:.4f}; {tested.accuracy:.1%}; {tested.zeros:.1%}")
        pairs = zip(plain[0].losses, other.losses, strict=True)
        done.apart[name] = statistics.mean(abs(a - b) for a, b in pairs)
        print(f"  seed 0, compiled and plain: losses of a batch are {done.apart[name]:.4f} apart")
        done.plain[name], done.compiled[name] = [one.tested for one in plain], other.tested
        curves[name] = [*plain, other]
    draw(curves, Path(picture))
    return done


def draw(curves: dict[str, list[Trained]], path: Path) -> None:
    """Draw the loss of each step."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots(1, len(curves))
    for axis, (name, (plain, *others, compiled)) in zip(axes, curves.items(), strict=True):
        for one in others:
            axis.plot(one.losses, color="#BBBBBB", lw=1, label="float32, other seeds")
        axis.plot(plain.losses, color="#222222", lw=3, label="float32")
        axis.plot(compiled.losses, color="#D55E00", lw=1, label="compiled, bfloat16")
        axis.set(title=name, xlabel="step", ylim=(0, None))
        axis.grid(color="#e4e4e4", lw=0.7)
    axes[0].set_ylabel("loss of a batch")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles[1:], labels[1:], frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
