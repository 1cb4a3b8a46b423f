"""What is trained: sizes of the tasks and their models, and the methods that are compared."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from benchmarks.training.tasks import Batch, digits, epochs, listops, mqar


class Setting(NamedTuple):
    """A task, the model for it, and how long it is trained."""

    task: str
    length: int
    n_tokens: int
    n_classes: int
    readout: str  # "each" position that asks, the "first" token, or the "mean" over all
    is_causal: bool
    heads: int
    has_mlp: bool
    steps: int
    batch: int
    n_test: int
    n_points: int  # of the curves over training
    pairs: int = 0
    n_train: int = 0
    kernel: int = 0  # of a causal depthwise convolution before each attention, 0 for none
    width: int = 64
    layers: int = 2
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    refit: int = 20  # steps between fits of a basis
    warm: float = 0.5  # share of the steps, at the start, with exact attention for all

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def warm_steps(self) -> int:
        return round(self.warm * self.steps)

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Batches without end, the same for all methods of a seed."""
        rng = np.random.default_rng(seed)
        if self.task == "mqar":
            while True:
                yield mqar(rng, self.batch, self.length, self.n_tokens, self.pairs)
        data = digits("train") if self.task == "digits" else self._listops(0, self.n_train)
        yield from epochs(data, rng, self.batch)

    def test_set(self) -> Batch:
        if self.task == "mqar":
            rng = np.random.default_rng(2**32)
            return mqar(rng, self.n_test, self.length, self.n_tokens, self.pairs)
        if self.task == "digits":
            return digits("test").rows(np.arange(self.n_test))
        return self._listops(1, self.n_test)

    def _listops(self, seed: int, size: int) -> Batch:
        return listops(seed, size, self.length // 2, self.length)


class Method(NamedTuple):
    """How attention is approximated.

    ``kind`` is "exact", a method of `slra.fit_attention`, or a baseline. The rank is D / ``cut``, and baselines may
    store as many numbers as that takes. ``penalty`` is the weight of l1 per entry: the
    lambda of the objective times the n D entries of each of Q^, K^ and V^. ``threshold`` is that of the proximal
    layer, in the units of the entries. ``warm``: whether it starts from the exact warm-up.
    """

    name: str
    kind: str
    cut: int = 4
    penalty: float = 0.0
    threshold: float = 0.0
    rtol: float | None = None
    ramp: float = (
        0.6  # share of the steps after the warm-up over which l1 rises from 0; 0: it is on at once
    )
    warm: bool = True

    def rank(self, setting: Setting) -> int:
        return setting.head_width // self.cut

    def l1(self, setting: Setting) -> float:
        return self.threshold or self.penalty / (setting.length * setting.width)
