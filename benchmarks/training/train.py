"""One training run, and the exact warm-up that all methods of a task and seed share."""

import copy
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from benchmarks.training.attend import set_progress
from benchmarks.training.model import Model
from benchmarks.training.settings import Method, Setting
from benchmarks.training.tasks import FILLER, IGNORE, Batch

RANK_UNTIL = 0.3  # share of the steps after the warm-up
TEST_BATCH = 100
# What an exact model is cut to once it is trained: rank D/4, and ranks per head by tolerance.
COMPRESSIONS = [
    Method(kind, kind, rtol=rtol)
    for kind in ("svd", "output")
    for rtol in (None, 0.5, 0.3, 0.2, 0.1, 0.05)
]


class State(NamedTuple):
    """Weights and optimiser after the warm-up, and what it took."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    curve: list[dict[str, Any]]
    seconds: float  # of processor time; workers have one thread


def progress(step: int, setting: Setting, method: Method) -> tuple[int, float]:
    """Rank, and share of the full l1: after the warm-up one falls geometrically from D, the other rises linearly.

    Without a warm-up both have their final values from the start.
    """
    if not method.warm:
        return method.rank(setting), 1.0
    share = (step - setting.warm_steps + 1) / (setting.steps - setting.warm_steps)
    rank = setting.head_width * method.cut ** (-share / RANK_UNTIL)
    l1 = min(1.0, share / method.ramp) if method.ramp else 1.0
    return max(method.rank(setting), math.ceil(rank)), l1


def learning_rate(step: int, setting: Setting) -> float:
    """Share of the peak: a rise over the first 5% of the steps, constant until the warm-up ends, then a fall to 0."""
    rise = (step + 1) / (0.05 * setting.steps)
    fall = (setting.steps - step) / (setting.steps - setting.warm_steps)
    return min(1.0, rise, fall)


class Trainer:
    """A model in training, its curve so far, and the processor time it took."""

    def __init__(self, setting: Setting, method: Method, seed: int) -> None:
        torch.manual_seed(seed)
        self.setting, self.method = setting, method
        self.model = Model(setting, method)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), setting.learning_rate, weight_decay=setting.weight_decay
        )
        self.curve: list[dict[str, Any]] = []
        self.seen: dict[str, Any] = {}
        self.seconds = 0.0

    def run(self, batches: Iterator[Batch], steps: range) -> None:
        setting, losses = self.setting, []
        start = time.process_time()
        for step in steps:
            losses.append(self.step(next(batches), step))
            if (step + 1) % max(1, setting.steps // setting.n_points) == 0 or step == steps[-1]:
                self.seen = self.look()
                self.curve.append(point(step + 1, losses, self.seen))
                losses = []
        self.seconds += time.process_time() - start

    def step(self, batch: Batch, step: int) -> float:
        rank, l1 = progress(step, self.setting, self.method)
        for attention in self.model.attentions:
            set_progress(attention, rank, l1 * self.method.l1(self.setting))
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.learning_rate * learning_rate(step, self.setting)
        asked = batch.targets != IGNORE
        loss = functional.cross_entropy(self.model(batch.tokens, asked), batch.targets[asked])
        self.optimizer.zero_grad()
        (loss + self.model.penalty()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def look(self) -> dict[str, Any]:
        """Accuracy on the test set, and the zeros and ranks of each layer, as they are now."""
        self.model.eval()
        test, right, zeros, off_filler = self.setting.test_set(), [], [], []
        for top in range(0, len(test.tokens), TEST_BATCH):
            batch = test.rows(np.arange(top, min(top + TEST_BATCH, len(test.tokens))))
            asked = batch.targets != IGNORE
            right.append(self.model(batch.tokens, asked).argmax(-1) == batch.targets[asked])
            if self.method.kind not in ("favor", "nystrom"):
                hats = [a.approximations() for a in self.model.low_rank]
                zeros.append([[count(x) for x in layer] for layer in hats])
                used = batch.tokens != FILLER
                off_filler.append(
                    [[count(x.transpose(1, 2)[used][None])[0] for x in layer] for layer in hats]
                )
        self.model.train()
        found: dict[str, Any] = {"accuracy": float(torch.cat(right).double().mean())}
        if zeros:
            found["zeros"] = np.mean(zeros, axis=0).round(4).tolist()
            if self.setting.task == "mqar":
                found["zeros_off_filler"] = np.mean(off_filler, axis=0).round(4).tolist()
        if self.method.kind in ("svd", "scores", "output"):
            found["ranks"] = [a.ranks.tolist() for a in self.model.low_rank]
        return found


def point(step: int, losses: list[float], seen: dict[str, Any]) -> dict[str, Any]:
    """What a curve keeps of a look: ranks and zeros as means over layers, heads and arrays."""
    kept = {"step": step, "loss": round(float(np.mean(losses)), 4), "accuracy": seen["accuracy"]}
    if "ranks" in seen:
        kept["rank_qk"], kept["rank_v"] = np.mean(seen["ranks"], axis=(0, 1)).tolist()
    if "zeros" in seen:
        kept["zeros"] = round(float(np.mean(seen["zeros"], axis=(0, 1))[0]), 4)
    return kept


def count(x: torch.Tensor) -> tuple[float, float, float]:
    """Shares of zeros, of entries within 1e-3 of the largest, and of columns (of a head) that are all zero."""
    size, columns = x.abs(), (x == 0).all(-2).all(0)
    small = size <= 1e-3 * size.max()
    return tuple(float(y.double().mean()) for y in (size == 0, small, columns))


def warm_up(setting: Setting, seed: int) -> State:
    """Train with exact attention for the share ``warm`` of the steps."""
    exact = Trainer(setting, Method("exact", "exact"), seed)
    exact.run(setting.train_batches(seed), range(setting.warm_steps))
    return State(exact.model.state_dict(), exact.optimizer.state_dict(), exact.curve, exact.seconds)


def train(setting: Setting, method: Method, seed: int, warm: State | None) -> dict[str, Any]:
    """Go on from the warm-up with a method, or start with it, as its ``warm`` says; return what came of it."""
    trainer = Trainer(setting, method, seed)
    batches, first = setting.train_batches(seed), 0
    if method.warm:
        first = setting.warm_steps
        trainer.model.load_state_dict(warm.model)
        trainer.optimizer.load_state_dict(copy.deepcopy(warm.optimizer))
        trainer.curve = list(warm.curve)
        for _ in range(first):  # so that the data goes on where the warm-up stopped
            next(batches)
    trainer.run(batches, range(first, setting.steps))
    result = {
        "task": setting.task,
        "method": method.name,
        "seed": seed,
        "options": method._asdict(),
        "setting": setting._asdict(),
        **trainer.seen,
        "cpu_seconds": round(trainer.seconds, 1),
        "warm_up_cpu_seconds": round(warm.seconds, 1) if method.warm else 0.0,
        "curve": trainer.curve,
    }
    if method.kind == "exact" and setting.task != "listops":  # there choosing ranks takes too long
        calibration = next(batches)
        result["untrained"] = [
            compress(trainer.model, setting, seed, how, calibration) for how in COMPRESSIONS
        ]
    return result


def compress(
    model: Model, setting: Setting, seed: int, method: Method, calibration: Batch
) -> dict[str, Any]:
    """Approximate the attention of an exact model without training it: bases from one training batch."""
    small = Trainer(setting, method, seed)
    small.model.load_state_dict(model.state_dict())
    for attention in small.model.attentions:
        set_progress(attention, method.rank(setting), 0.0)
    with torch.no_grad():  # the first call in training mode fits
        small.model(calibration.tokens, calibration.targets != IGNORE)
    seen = small.look()
    return {
        "kind": method.kind,
        "rtol": method.rtol,
        "accuracy": seen["accuracy"],
        "ranks": seen["ranks"],
    }
