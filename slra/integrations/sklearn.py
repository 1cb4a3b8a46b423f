"""A scikit-learn transformer in the place of TruncatedSVD and PCA.

Needs: scikit-learn. Takes NumPy arrays and SciPy's sparse matrices, as scikit-learn does.
"""

import math
import numbers
from typing import Any, Literal

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.extmath import safe_sparse_dot, svd_flip
from sklearn.utils.sparsefuncs import mean_variance_axis
from sklearn.utils.validation import check_is_fitted, validate_data

import slra
from slra._validate import check_choice, check_rank

__all__ = ["LowRank"]

_DTYPES = [np.float64, np.float32]
_SEEDS = 2**31 - 1
_SLAB_ROWS = 1 << 12


class LowRank(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Project on the leading right singular vectors, by `slra.randomized_svd`.

    Parameters
    ----------
    n_components : int or float, optional
        Number of components; with ``rtol``, at most as many. None is 2 (or all there are, if fewer), as in
        ``TruncatedSVD``, and no limit with ``rtol``. Between 0 and 1, with ``center`` and as in ``PCA``: as few as
        explain more than this share of the variance.
    rtol : float, optional
        As few components as keep :math:`\|X - X_r\|_F \le` ``rtol`` :math:`\|X\|_F`.
    n_oversamples, n_iter, method
        As in `slra.randomized_svd`.
    center : bool
        Whether to subtract the means of the columns: PCA, also of sparse matrices, which stay sparse.
    missing : {"error", "impute"}
        What NaN in dense data is. "impute": a gap; `slra.complete` fills those of the training data, with a rank that
        it chooses on entries held out, and `transform` gives a row with gaps the scores that are to be expected from
        what was observed of it.
    random_state : int, numpy.random.RandomState or None
        As everywhere in scikit-learn.

    Attributes
    ----------
    components_ : numpy.ndarray, shape (n_components, n_features)
        Right singular vectors; the entry of largest modulus in each is positive, as in ``TruncatedSVD``.
    singular_values_ : numpy.ndarray, shape (n_components,)
    explained_variance_ : numpy.ndarray, shape (n_components,)
        Variance of each column of the transformed training data; with ``center`` over n_samples - 1, as in ``PCA``,
        otherwise over n_samples, as in ``TruncatedSVD``.
    explained_variance_ratio_ : numpy.ndarray, shape (n_components,)
        The same over the variance of all features.
    mean_ : numpy.ndarray, shape (n_features,)
        Means of the features, accumulated in float64; only with ``center``.
    noise_variance_ : float
        Mean square of what the components leave of the observed entries; only with ``missing="impute"``.
    n_features_in_, n_samples_ : int
    feature_names_in_ : numpy.ndarray of str
        Only where the training data had names.

    Raises
    ------
    TypeError, ValueError
        In ``fit``: as in `slra.randomized_svd`, and as scikit-learn does for data that is not numeric and finite.

    Examples
    --------
    >>> import numpy as np
    >>> from slra.integrations.sklearn import LowRank
    >>> X = np.outer(np.arange(1.0, 5.0), [1.0, 2.0, 3.0])
    >>> model = LowRank(rtol=1e-6, random_state=0).fit(X)
    >>> model.components_.shape
    (1, 3)
    >>> bool(np.allclose(model.inverse_transform(model.transform(X)), X))
    True

    With a gap, where 12 was:

    >>> X = np.outer(np.arange(1.0, 41.0), np.arange(1.0, 11.0))
    >>> X[3, 2] = np.nan
    >>> model = LowRank(1, missing="impute", random_state=0)
    >>> bool(np.isclose(model.inverse_transform(model.fit_transform(X))[3, 2], 12.0, rtol=1e-3))
    True
    """

    def __init__(
        self,
        n_components: int | float | None = None,
        *,
        rtol: float | None = None,
        n_oversamples: int = 8,
        n_iter: int | Literal["auto"] = "auto",
        method: Literal["auto", "krylov", "subspace", "gram"] = "auto",
        center: bool = False,
        missing: Literal["error", "impute"] = "error",
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.rtol = rtol
        self.n_oversamples = n_oversamples
        self.n_iter = n_iter
        self.method = method
        self.center = center
        self.missing = missing
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "LowRank":
        """Find the components.

        Parameters
        ----------
        X : array or sparse matrix, shape (n_samples, n_features)
        y : ignored

        Returns
        -------
        LowRank
            Itself.
        """
        self.fit_transform(X)
        return self

    def fit_transform(self, X: Any, y: Any = None) -> np.ndarray[Any, Any]:
        """Find the components, and return the training data in them.

        Parameters
        ----------
        X : array or sparse matrix, shape (n_samples, n_features)
        y : ignored

        Returns
        -------
        numpy.ndarray, shape (n_samples, n_components)
        """
        check_choice(self.missing, ("error", "impute"), "missing")
        given = X = self._checked(X, reset=True)
        rank, rtol, share = self._wanted(X.shape)
        seeds = check_random_state(self.random_state)
        gaps = self._gaps(X)
        if gaps.any():
            result = slra.complete(X, center=self.center, rng=int(seeds.randint(_SEEDS)))
            X = np.where(gaps, result.to_dense(), X)
        U, S, Vh = slra.randomized_svd(
            X,
            rank,
            rtol=rtol,
            n_oversamples=self.n_oversamples,
            n_iter=self.n_iter,
            method=self.method,
            center=self.center,
            rng=int(seeds.randint(_SEEDS)),
        )
        U, Vh = svd_flip(U, Vh, u_based_decision=False)
        mean, variance = _moments(X)
        total = float(np.sum(variance))
        if share is not None:
            # The tolerance is met by about the smallest rank; PCA takes the smallest.
            explained = np.cumsum(np.square(S, dtype=np.float64)) / (X.shape[0] * total or 1)
            n_kept = 1 + int(np.searchsorted(explained[:-1], share, side="right"))
            U, S, Vh = U[:, :n_kept], S[:n_kept], Vh[:n_kept]
        scores: np.ndarray[Any, Any] = U * S
        self.components_, self.singular_values_, self.n_samples_ = Vh, S, X.shape[0]
        if self.center:
            self.mean_ = mean
            # Not of the scores: their means are zero but for rounding.
            spread, n_free = np.square(S), max(1, X.shape[0] - 1)
            self.explained_variance_, total = spread / n_free, total * X.shape[0] / n_free
        else:
            self.explained_variance_ = np.var(scores, axis=0)
        ratio = self.explained_variance_ / (total if total > 0 else 1)
        self.explained_variance_ratio_ = ratio.astype(S.dtype, copy=False)
        if self.missing == "impute":
            left = (X - (scores @ Vh + (mean if self.center else 0)))[~gaps]
            self.noise_variance_ = float(np.mean(np.square(left, dtype=np.float64)))
        return self._scores(given, gaps) if gaps.any() else scores

    def _wanted(self, shape: tuple[int, int]) -> tuple[int | None, float | None, float | None]:
        """Rank, tolerance and share of the variance, of which at least one is given."""
        wanted: Any = self.n_components
        limit = min(shape)
        if isinstance(wanted, numbers.Real) and not isinstance(wanted, (numbers.Integral, bool)):
            share = float(wanted)
            if not 0 < share < 1:
                raise ValueError(
                    f"n_components must be an int, or a share of the variance between 0 and 1, got {wanted!r}"
                )
            if not self.center or self.rtol is not None:
                raise ValueError(
                    f"n_components as a share of the variance, {wanted!r}, needs center=True and rtol=None"
                )
            return None, math.sqrt(1 - share), share
        if wanted is None:
            return (min(2, limit) if self.rtol is None else None), self.rtol, None
        return check_rank(wanted, limit, "n_components", "min of the shape of X"), self.rtol, None

    def transform(self, X: Any) -> Any:
        """Return data in the components.

        Parameters
        ----------
        X : array or sparse matrix, shape (n_samples, n_features)

        Returns
        -------
        numpy.ndarray, shape (n_samples, n_components)
        """
        check_is_fitted(self)
        X = self._checked(X, reset=False)
        gaps = self._gaps(X)
        if gaps.any():
            return self._scores(X, gaps)
        if not self.center:
            return safe_sparse_dot(X, self.components_.T)
        # In float64: what is left of a large mean would be rounding errors.
        axes = self.components_.T.astype(np.float64)
        is_dense = isinstance(X, np.ndarray)
        scores = (X - self.mean_) @ axes if is_dense else X @ axes - self.mean_ @ axes
        return scores.astype(X.dtype, copy=False)

    def inverse_transform(self, X: Any) -> np.ndarray[Any, Any]:
        """Return data in the features, dense.

        Parameters
        ----------
        X : array, shape (n_samples, n_components)

        Returns
        -------
        numpy.ndarray, shape (n_samples, n_features)
        """
        check_is_fitted(self)
        X = check_array(X, dtype=_DTYPES)
        if X.shape[1] != len(self.components_):
            raise ValueError(
                f"X must have {len(self.components_)} columns, one for each component, got shape {X.shape}"
            )
        data: np.ndarray[Any, Any] = X @ self.components_
        return (data + self.mean_).astype(data.dtype, copy=False) if self.center else data

    def _checked(self, X: Any, *, reset: bool) -> Any:
        imputes = self.missing == "impute"
        return validate_data(
            self,
            X,
            reset=reset,
            dtype=_DTYPES,
            accept_sparse=False if imputes else ("csr", "csc"),
            ensure_all_finite="allow-nan" if imputes else True,
        )

    def _gaps(self, X: Any) -> np.ndarray[Any, Any]:
        return np.isnan(X) if self.missing == "impute" else np.zeros((), dtype=bool)

    def _scores(self, X: np.ndarray[Any, Any], gaps: np.ndarray[Any, Any]) -> Any:
        """Return expected scores given what was observed, as probabilistic PCA has them; projections without gaps."""
        axes = self.components_.T.astype(np.float64)
        n_features, n_axes = axes.shape
        x = np.where(gaps, 0.0, X - (self.mean_ if self.center else 0.0))
        scores = x @ axes
        pairs = (axes[:, :, None] * axes[:, None, :]).reshape(n_features, -1)
        # Second moments of the scores; an axis that explains nothing keeps its scores at 0.
        spread = np.square(self.singular_values_, dtype=np.float64) / self.n_samples_
        least = np.finfo(np.float64).eps * spread[:1]
        prior = np.diag(
            self.noise_variance_ / np.maximum(spread, least + np.finfo(np.float64).tiny)
        )
        rows = np.flatnonzero(gaps.any(axis=1))
        for top in range(0, len(rows), _SLAB_ROWS):
            some = rows[top : top + _SLAB_ROWS]
            gram = ((~gaps[some]) @ pairs).reshape(-1, n_axes, n_axes) + prior
            scores[some] = np.einsum(
                "ijk,ik->ij", np.linalg.pinv(gram, hermitian=True), scores[some]
            )
        return scores.astype(X.dtype, copy=False)

    @property
    def _n_features_out(self) -> int:
        return int(self.components_.shape[0])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = self.missing != "impute"
        tags.input_tags.allow_nan = self.missing == "impute"
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _moments(X: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Mean and variance of each column, in float64; of a sparse matrix its copy in float64 is what takes memory."""
    if not isinstance(X, np.ndarray):
        mean, variance = mean_variance_axis(X.astype(np.float64), axis=0)
        return mean, variance
    mean = np.mean(X, axis=0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for top in range(0, len(X), _SLAB_ROWS):
        squares += np.sum(np.square(X[top : top + _SLAB_ROWS] - mean), axis=0)
    return mean, squares / len(X)
