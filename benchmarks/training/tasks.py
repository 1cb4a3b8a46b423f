"""Three tasks, generated or shipped with scikit-learn; nothing is downloaded.

MQAR: S. Arora et al., Zoology, arXiv:2312.04927, section 4 and appendix (the generator published with it). ListOps: N.
Nangia and S. Bowman, arXiv:1804.06028, by the grammar and sampling of Y. Tay et al., Long Range Arena,
arXiv:2011.04006. Digits: `sklearn.datasets.load_digits`, 8 x 8 pixels read row by row.
"""

import random
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

IGNORE = -100  # a position that asks nothing
FILLER = 0  # the token of MQAR that is neither key nor value
OPERATORS = ("MIN", "MAX", "MED", "SM")
PAD, CLOSE, FIRST_OPERATOR = 10, 11, 12  # tokens of ListOps after its ten digits
MAX_DEPTH, MAX_ARGS, P_OPERATOR = 10, 10, 0.25

Tree = int | tuple[str, list["Tree"]]


class Batch(NamedTuple):
    """Tokens (B, n) and what is to be answered: (B, n) with `IGNORE`, or (B,)."""

    tokens: torch.Tensor
    targets: torch.Tensor

    def rows(self, index: np.ndarray) -> "Batch":
        return Batch(self.tokens[index], self.targets[index])


def mqar(
    rng: np.random.Generator, size: int, length: int, vocab: int, pairs: int, alpha: float = 0.01
) -> Batch:
    """Key and value pairs, then each key once more, at gaps drawn from a power law; its value is the answer.

    `FILLER` is everywhere else; keys are 1 to vocab/2 - 1 and values vocab/2 to vocab - 1, none twice in a sequence.
    """
    n_keys, context = vocab // 2, 2 * pairs
    keys = 1 + _subsets(rng, size, n_keys - 1, pairs)
    values = n_keys + _subsets(rng, size, vocab - n_keys, pairs)
    slots = (length - context) // 2
    weight = np.arange(1, slots + 1) ** (alpha - 1)
    # The largest of log-weights plus Gumbel noise are a weighted draw without replacement (the Gumbel top-k trick).
    noisy = np.log(weight) + rng.gumbel(size=(size, slots))
    places = context + 2 * np.argsort(-noisy, axis=1)[:, :pairs]
    tokens = np.zeros((size, length), np.int64)
    targets = np.full((size, length), IGNORE)
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
    np.put_along_axis(tokens, places, keys, axis=1)
    np.put_along_axis(targets, places, values, axis=1)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))


def _subsets(rng: np.random.Generator, size: int, n: int, k: int) -> np.ndarray:
    return rng.permuted(np.tile(np.arange(n), (size, 1)), axis=1)[:, :k]


def listops_tree(rng: random.Random, depth: int = 1) -> Tree:
    """Draw an expression: an operator with probability 1/4 above the deepest level, else a digit."""
    if depth >= MAX_DEPTH or rng.random() > P_OPERATOR:
        return rng.randrange(10)
    arguments = [listops_tree(rng, depth + 1) for _ in range(rng.randint(2, MAX_ARGS))]
    return rng.choice(OPERATORS), arguments


def listops_tokens(tree: Tree) -> list[int]:
    """Write an expression as tokens: operator, arguments, closing bracket."""
    if isinstance(tree, int):
        return [tree]
    operator, arguments = tree
    inner = [token for argument in arguments for token in listops_tokens(argument)]
    return [FIRST_OPERATOR + OPERATORS.index(operator), *inner, CLOSE]


def listops_value(tree: Tree) -> int:
    """Evaluate an expression; the median of an even number of arguments is rounded down."""
    if isinstance(tree, int):
        return tree
    operator, arguments = tree
    values = sorted(listops_value(argument) for argument in arguments)
    middle = values[(len(values) - 1) // 2] + values[len(values) // 2]
    return {"MIN": values[0], "MAX": values[-1], "MED": middle // 2, "SM": sum(values) % 10}[
        operator
    ]


@lru_cache
def listops(seed: int, size: int, shortest: int, longest: int) -> Batch:
    """Expressions of more than ``shortest`` and fewer than ``longest`` tokens, padded to one length."""
    rng = random.Random(seed)
    tokens = torch.full((size, longest), PAD)
    targets = torch.zeros(size, dtype=torch.int64)
    done = 0
    while done < size:
        tree = listops_tree(rng)
        written = listops_tokens(tree)
        if shortest < len(written) < longest:
            tokens[done, : len(written)] = torch.tensor(written)
            targets[done] = listops_value(tree)
            done += 1
    return Batch(tokens, targets)


@lru_cache
def digits(part: str) -> Batch:
    """Training (1437) or test (360) images as 64 intensities from 0 to 16; the split is the same for all runs."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        data.data.astype(np.int64), data.target, test_size=360, random_state=0, stratify=data.target
    )
    x, y = (train_x, train_y) if part == "train" else (test_x, test_y)
    return Batch(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)))


def epochs(data: Batch, rng: np.random.Generator, size: int) -> Iterator[Batch]:
    """Batches of shuffled passes over data, without end."""
    while True:
        order = rng.permutation(len(data.tokens))
        for top in range(0, len(order) - size + 1, size):
            yield data.rows(order[top : top + size])
