"""What each method costs: a model of its time, to choose by.

Flops alone would not do: products with thin blocks wait for memory, and small matrices for the interpreter. Fitted to
the times of 69 runs on one thread of a Xeon with OpenBLAS, float32 and float64, 40 x 30 to 100,000 x 100, ranks 2, 20
and 50: within a factor of 1.4 for eight of ten of them, in nanoseconds. Threads and other machines change all terms
alike, and a choice needs no more than ratios.
"""

import math

__all__ = ["direct_is_faster", "gram_is_faster", "sparse_gram_is_faster"]

# Where two methods are this near, the exact one is taken.
_WORTH_EXACTNESS = 1.15


def _direct(m: int, n: int, n_calls: float) -> float:
    """LAPACK's decomposition of a tall matrix."""
    return n_calls * 1.5e5 + m * n * 1.35 * n + 1.5 * n**3


def _gram(m: int, n: int, rank: int, n_calls: float) -> float:
    """Products of a tall matrix with itself and with ``rank`` eigenvectors, made orthonormal."""
    return n_calls * 5e5 + m * n * (3 + 0.08 * n) + 0.85 * n**3 + _vectors(m, rank)


def _krylov(m: int, n: int, rank: int, width: int, depth: int, n_calls: float) -> float:
    """Products that read the matrix, and a basis of ``depth * width`` columns."""
    basis, n_passes = depth * width, 2 * depth + 1
    products = n_passes * m * n * (2.5 + 0.02 * width)
    space = (m + 2 * n) * basis * (0.9 + 0.15 * basis) + 2.1 * basis**3
    return n_calls * 4e6 + products + space + _vectors(m, rank)


def sparse_gram_is_faster(
    shape: tuple[int, ...], n_entries: int, n_products: int, rank: int, width: int, depth: int
) -> bool:
    """Whether a Gram matrix by sparse products takes no longer than a Krylov space, nor more memory than its blocks.

    A product of two entries takes as long as three of an entry with a column of a block.
    """
    n, m = sorted(shape)
    basis = depth * width
    gram = 3 * n_products + 0.85 * n**3 + n_entries * rank
    space = (m + 2 * n) * basis * (0.9 + 0.15 * basis) + 2.1 * basis**3
    return n * n <= (m + n) * width and gram <= n_entries * 2 * basis + space


def _vectors(m: int, rank: int) -> float:
    """Orthonormal vectors on the long side."""
    return 30 * m * rank


def gram_is_faster(
    shape: tuple[int, ...], rank: int, width: int, depth: int, *, is_eager: bool
) -> bool:
    """Whether the Gram matrix takes no longer than a Krylov space; what is compiled has no interpreter."""
    n, m = sorted(shape[-2:])
    share = _share(shape) if is_eager else 0.0
    return _gram(m, n, rank, share) <= _WORTH_EXACTNESS * _krylov(m, n, rank, width, depth, share)


def direct_is_faster(shape: tuple[int, ...], rank: int) -> bool:
    """Whether LAPACK takes no longer than the Gram matrix."""
    n, m = sorted(shape[-2:])
    return _direct(m, n, _share(shape)) <= _gram(m, n, rank, _share(shape))


def _share(shape: tuple[int, ...]) -> float:
    """Part of the interpreter's time that falls to each matrix of a batch."""
    return 1 / max(1, math.prod(shape[:-2]))
