"""Gaussian test matrices, drawn by NumPy whatever the library: the same numbers everywhere.

They are drawn in blocks of rows, a stream each, so that a chunked array can draw its own.
"""

import math
from typing import Any, NamedTuple

import numpy as np

__all__ = ["TEST_MATRIX_ROWS", "GaussianBlock", "gaussian", "gaussian_blocks"]

TEST_MATRIX_ROWS = 4096


class GaussianBlock(NamedTuple):
    """A block of rows of a test matrix, drawn when and as often as asked: always the same numbers."""

    kind: type[np.random.BitGenerator]
    seed: Any
    shape: tuple[int, ...]
    is_complex: bool

    def draw(self) -> np.ndarray[Any, Any]:
        """Draw in double precision, with unit variance."""
        stream = np.random.Generator(self.kind(self.seed))
        block = stream.standard_normal(self.shape)
        if not self.is_complex:
            return block
        return (block + 1j * stream.standard_normal(self.shape)) / math.sqrt(2)


def gaussian(
    shape: tuple[int, ...], rng: np.random.Generator | int, *, is_complex: bool
) -> np.ndarray[Any, Any]:
    """Draw a test matrix of this shape, in double precision."""
    blocks = [block.draw() for block in gaussian_blocks(shape, rng, is_complex=is_complex)]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=-2)


def gaussian_blocks(
    shape: tuple[int, ...], rng: np.random.Generator | int, *, is_complex: bool
) -> list[GaussianBlock]:
    """Return the blocks of rows that make up a test matrix of this shape, a stream each."""
    *batch, n_rows, n_columns = shape
    starts = range(0, n_rows, TEST_MATRIX_ROWS)
    streams = np.random.default_rng(rng).bit_generator.spawn(len(starts))
    return [
        GaussianBlock(
            type(stream),
            stream.seed_seq,
            (*batch, min(TEST_MATRIX_ROWS, n_rows - start), n_columns),
            is_complex,
        )
        for start, stream in zip(starts, streams, strict=True)
    ]
