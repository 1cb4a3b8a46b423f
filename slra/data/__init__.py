"""Sample data that ships with the package; README.md beside it has source and licence."""

from importlib.resources import files
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["AttentionSample", "load_sample"]


class AttentionSample(NamedTuple):
    """Attention inputs of a few heads of a real encoder.

    Attributes
    ----------
    q, k, v : numpy.ndarray, float32, shape (6, 512, 32)
        Queries, keys and values: heads, tokens, features.
    layer, head : numpy.ndarray, int8, shape (6,)
        Where in the model each head stands, both counted from 0.
    tokens : numpy.ndarray of str, shape (512,)
        The text as the model's tokenizer cut it.
    """

    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    layer: NDArray[np.int8]
    head: NDArray[np.int8]
    tokens: NDArray[np.str_]


def load_sample() -> AttentionSample:
    """Load six heads of MiniLM-L6 on 512 tokens of English.

    The heads are ordered by how hard they are to compress, the easiest of the model's 72 first
    and the hardest last.

    Returns
    -------
    AttentionSample
        Stored as float16, returned as float32. The encoder attends in both directions, without
        a mask, with scale ``1 / sqrt(32)``.
    """
    with files(__name__).joinpath("minilm_sample.npz").open("rb") as file, np.load(file) as stored:
        q, k, v = (stored[name].astype(np.float32) for name in "qkv")
        return AttentionSample(q, k, v, stored["layer"], stored["head"], stored["tokens"])
