"""Train an attention block on scikit-learn's digits with nothing but NumPy and slra: no framework, no autograd.

A picture is a sequence of 64 pixels. One block of low-rank attention and a softmax regression on what it returns are
trained by gradient descent on the combined objective

    L = cross-entropy + l1 * (||Q^||_1 + ||K^||_1 + ||V^||_1)

with the l1 term as a penalty, as a soft threshold inside the block ("prox"), or left out.

Run: python examples/train_digits_numpy.py --form prox
"""

import argparse
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

import slra
from slra import objective

WIDTH, HEADS, CLASSES, PIXELS = 16, 2, 10, 64

Params = dict[str, np.ndarray]


class Config(NamedTuple):
    """How the block approximates, and how it is trained."""

    rank: int = 4
    form: str = "prox"
    l1: float = 0.05
    epochs: int = 10
    batch: int = 64
    learning_rate: float = 0.01
    momentum: float = 0.9


class Batch(NamedTuple):
    """Pictures, (n, 64) from 0 to 1, and the digits they show."""

    images: np.ndarray
    labels: np.ndarray


def digits() -> tuple[Batch, Batch]:
    """Return four fifths to train on, and the rest."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = np.split(order, [4 * len(labels) // 5])
    return Batch(images[train] / 16, labels[train]), Batch(images[test] / 16, labels[test])


def init(seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape) / np.sqrt(shape[-1])

    return {
        "value": 4 * draw(WIDTH),
        "position": 2 * draw(PIXELS, WIDTH),
        "in_proj": draw(3 * WIDTH, WIDTH),
        "out_proj": draw(WIDTH, WIDTH),
        "head": draw(CLASSES, PIXELS * WIDTH),
        "bias": np.zeros(CLASSES),
    }


def split_heads(x: np.ndarray) -> np.ndarray:
    """(n, 64, 16) to (n, heads, 64, 8)."""
    return np.swapaxes(x.reshape(*x.shape[:-1], HEADS, -1), -3, -2)


def join_heads(x: np.ndarray) -> np.ndarray:
    x = np.swapaxes(x, -3, -2)
    return x.reshape(*x.shape[:-2], -1)


class Forward(NamedTuple):
    """What the backward pass needs."""

    tokens: np.ndarray
    qkv: list[np.ndarray]
    out: np.ndarray
    lse: np.ndarray
    features: np.ndarray
    logits: np.ndarray


def attention_options(config: Config) -> dict[str, Any]:
    return {
        "rank": config.rank,
        "method": "svd",
        "l1": config.l1 if config.form == "prox" else 0.0,
    }


def forward(params: Params, images: np.ndarray, config: Config) -> Forward:
    tokens = images[..., None] * params["value"] + params["position"]
    qkv = [split_heads(x) for x in np.split(tokens @ params["in_proj"].T, 3, axis=-1)]
    out, lse = slra.low_rank_attention(*qkv, return_lse=True, **attention_options(config))
    features = tokens + join_heads(out) @ params["out_proj"].T
    logits = features.reshape(len(images), -1) @ params["head"].T + params["bias"]
    return Forward(tokens, qkv, out, lse, features, logits)


def projectors(qkv: list[np.ndarray], rank: int) -> list[np.ndarray]:
    """V V^T of the truncated SVD of each of Q, K and V: Q^ = Q V V^T."""
    rights = (slra.truncated_svd(x, rank).Vh for x in qkv)
    return [np.swapaxes(Vh, -1, -2) @ Vh for Vh in rights]


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over the batch, and its gradient."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    rows = np.arange(len(labels))
    gradient = np.exp(log_p)
    gradient[rows, labels] -= 1
    return -float(np.mean(log_p[rows, labels])), gradient / len(labels)


def loss_and_gradients(params: Params, batch: Batch, config: Config) -> tuple[float, Params]:
    """Combined objective (of the task alone, in the form "prox") and its gradient."""
    done = forward(params, batch.images, config)
    loss, d_logits = cross_entropy(done.logits, batch.labels)
    n = len(batch.labels)
    d_features = (d_logits @ params["head"]).reshape(done.features.shape)
    d_joined = d_features @ params["out_proj"]
    d_qkv = slra.low_rank_attention_vjp(
        *done.qkv, done.out, done.lse, split_heads(d_joined), **attention_options(config)
    )
    if config.form == "penalty":
        maps = projectors(done.qkv, config.rank)
        hats = [x @ p for x, p in zip(done.qkv, maps, strict=True)]
        loss = float(objective.combined_objective(loss, *hats, config.l1 / n))
        signs = objective.l1_penalty_grad(*hats, config.l1 / n)
        d_qkv = [d + sign @ p for d, sign, p in zip(d_qkv, signs, maps, strict=True)]
    d_projected = np.concatenate([join_heads(x) for x in d_qkv], axis=-1)
    d_tokens = d_features + d_projected @ params["in_proj"]
    gradients = {
        "value": np.einsum("np,npe->e", batch.images, d_tokens),
        "position": d_tokens.sum(axis=0),
        "in_proj": np.einsum("npi,npe->ie", d_projected, done.tokens),
        "out_proj": np.einsum("npi,npe->ie", d_features, join_heads(done.out)),
        "head": d_logits.T @ done.features.reshape(n, -1),
        "bias": d_logits.sum(axis=0),
    }
    return loss, gradients


def batches(train: Batch, config: Config, seed: int = 0) -> Any:
    """Yield shuffled batches, epoch by epoch."""
    rng = np.random.default_rng(seed)
    for _ in range(config.epochs):
        order = rng.permutation(len(train.labels))
        for rows in np.split(order, range(config.batch, len(order), config.batch)):
            yield Batch(train.images[rows], train.labels[rows])


def accuracy(params: Params, data: Batch, config: Config) -> float:
    logits = forward(params, data.images, config).logits
    return float(np.mean(logits.argmax(axis=-1) == data.labels))


def zeros(params: Params, data: Batch, config: Config) -> list[float]:
    """Fractions of exact zeros in Q^, K^ and V^."""
    qkv = forward(params, data.images, config).qkv
    hats = [x @ p for x, p in zip(qkv, projectors(qkv, config.rank), strict=True)]
    if config.form == "prox":
        hats = objective.l1_penalty_prox(*hats, config.l1)
    return [float(np.mean(x == 0)) for x in hats]


def train(params: Params, data: Batch, config: Config) -> tuple[Params, list[float]]:
    """Gradient descent with momentum; return the parameters and the loss before each step."""
    velocity = {name: np.zeros_like(x) for name, x in params.items()}
    losses = []
    for batch in batches(data, config):
        loss, gradients = loss_and_gradients(params, batch, config)
        losses.append(loss)
        for name, gradient in gradients.items():
            velocity[name] = config.momentum * velocity[name] + gradient
        params = {n: x - config.learning_rate * velocity[n] for n, x in params.items()}
    return params, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", choices=["none", "penalty", "prox"], default="prox")
    parser.add_argument("--rank", type=int, default=Config().rank)
    parser.add_argument("--l1", type=float, default=Config().l1)
    parser.add_argument("--epochs", type=int, default=Config().epochs)
    config = Config(**vars(parser.parse_args()))
    training, test = digits()
    params, losses = train(init(), training, config)
    print(f"loss: {losses[0]:.3f} at first, {np.mean(losses[-20:]):.3f} over the last 20 steps")
    print(f"accuracy: {accuracy(params, test, config):.1%} of {len(test.labels)} test pictures")
    shares = (f"{share:.1%}" for share in zeros(params, test, config))
    print("exact zeros in Q^, K^, V^:", *shares)


if __name__ == "__main__":
    main()
