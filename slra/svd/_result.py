"""The result of a singular value decomposition, and the rule that makes it unique."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from slra._backends import Backend
from slra._typing import Array

__all__ = ["CenteredSVDResult", "SVDResult", "fix_signs"]


class SVDResult(NamedTuple):
    """Truncated singular value decomposition, ``x ~ (U * S) @ Vh``.

    Attributes
    ----------
    U : array, shape (..., m, k)
        Left singular vectors, orthonormal columns.
    S : array, shape (..., k)
        Singular values, real, descending.
    Vh : array, shape (..., k, n)
        Conjugate transpose of the right singular vectors, orthonormal rows.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> result = slra.truncated_svd(np.diag([3.0, 2.0, 1.0]), 2)
    >>> U, S, Vh = result
    >>> S.tolist(), result.S is S
    ([3.0, 2.0], True)
    """

    U: Array
    S: Array
    Vh: Array


class CenteredSVDResult(SVDResult):
    """Truncated singular value decomposition about the means of the columns, ``x ~ mean + (U * S) @ Vh``.

    Unpacks to the same three arrays.

    Attributes
    ----------
    mean : array, shape (..., n)
        Mean of each column, in the dtype of ``x`` (float32 for half). None once a transformation of torch.func has
        put the result together again from what it unpacks to.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> x = np.asarray([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    >>> result = slra.truncated_svd(x, 1, center=True)
    >>> U, S, Vh = result
    >>> bool(np.allclose(result.mean + (U * S) @ Vh, x))
    True
    """

    mean: Array | None

    def __new__(
        cls, U: Array, S: Array, Vh: Array, mean: Array | None = None
    ) -> "CenteredSVDResult":
        """Attach the means to the three fields."""
        self = super().__new__(cls, U, S, Vh)
        self.mean = mean
        return self

    def __getnewargs__(self) -> Any:
        """Let copies and pickles have the means, too."""
        return (*self, self.mean)

    def _replace(self, **changes: Any) -> "CenteredSVDResult":
        parts = {**self._asdict(), "mean": self.mean, **changes}
        return CenteredSVDResult(**parts)

    @classmethod
    def of(cls, factors: SVDResult, mean: Array | None, backend: Backend) -> SVDResult:
        """Attach means, where there are any, in a way that transformations of functions know."""
        if mean is None:
            return factors
        backend.make_pytree(cls, _take_apart, _put_together)
        return cls(*factors, mean)


def _take_apart(result: CenteredSVDResult) -> tuple[tuple[Array, ...], None]:
    return (*result, result.mean), None


def _put_together(_: None, parts: Sequence[Array]) -> CenteredSVDResult:
    return CenteredSVDResult(*parts)


def fix_signs(U: Array, S: Array, Vh: Array, backend: Backend) -> SVDResult:
    """Make the entry of largest modulus in each column of ``U`` real and positive, lowest index of those that tie."""
    phase = backend.phases(backend.pivots(U))
    turn = backend.conj(phase)
    return SVDResult(U * turn[..., None, :], S, Vh * phase[..., :, None])
