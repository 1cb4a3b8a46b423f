"""A scikit-learn transformer in the place of TruncatedSVD and PCA.

Needs: scikit-learn. Takes NumPy arrays and SciPy's sparse matrices, as scikit-learn does.
"""

from typing import Any, Literal

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.extmath import safe_sparse_dot, svd_flip
from sklearn.utils.sparsefuncs import mean_variance_axis
from sklearn.utils.validation import check_is_fitted, validate_data

import slra

__all__ = ["LowRank"]

_DTYPES = [np.float64, np.float32]
_SEEDS = 2**31 - 1


class LowRank(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Project on the leading right singular vectors, by `slra.randomized_svd`.

    Parameters
    ----------
    n_components : int, optional
        Number of components; with ``rtol``, at most as many. None is 2 (or all there are, if fewer), as in
        ``TruncatedSVD``, and no limit with ``rtol``.
    rtol : float, optional
        As few components as keep :math:`\|X - X_r\|_F \le` ``rtol`` :math:`\|X\|_F`.
    n_oversamples, n_iter, method
        As in `slra.randomized_svd`.
    center : bool
        Whether to subtract the means of the columns: PCA, also of sparse matrices, which stay sparse.
    random_state : int, numpy.random.RandomState or None
        As everywhere in scikit-learn.

    Attributes
    ----------
    components_ : numpy.ndarray, shape (n_components, n_features)
        Right singular vectors; the entry of largest modulus in each is positive, as in ``TruncatedSVD``.
    singular_values_ : numpy.ndarray, shape (n_components,)
    explained_variance_ : numpy.ndarray, shape (n_components,)
        Variance of each column of the transformed training data.
    explained_variance_ratio_ : numpy.ndarray, shape (n_components,)
        The same over the variance of all features.
    mean_ : numpy.ndarray, shape (n_features,)
        Means of the features; only with ``center``.
    n_features_in_ : int
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
    """

    def __init__(
        self,
        n_components: int | None = None,
        *,
        rtol: float | None = None,
        n_oversamples: int = 8,
        n_iter: int | Literal["auto"] = "auto",
        method: Literal["auto", "krylov", "subspace", "gram"] = "auto",
        center: bool = False,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.rtol = rtol
        self.n_oversamples = n_oversamples
        self.n_iter = n_iter
        self.method = method
        self.center = center
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
        X = self._checked(X, reset=True)
        rank = self.n_components
        if rank is None and self.rtol is None:
            rank = min(2, *X.shape)
        U, S, Vh = slra.randomized_svd(
            X,
            rank,
            rtol=self.rtol,
            n_oversamples=self.n_oversamples,
            n_iter=self.n_iter,
            method=self.method,
            center=self.center,
            rng=int(check_random_state(self.random_state).randint(_SEEDS)),
        )
        U, Vh = svd_flip(U, Vh, u_based_decision=False)
        scores: np.ndarray[Any, Any] = U * S
        self.components_, self.singular_values_ = Vh, S
        mean, variance = _moments(X)
        if self.center:
            self.mean_ = mean
        self.explained_variance_ = np.var(scores, axis=0)
        total = np.sum(variance)
        self.explained_variance_ratio_ = self.explained_variance_ / (total if total > 0 else 1)
        return scores

    def transform(self, X: Any) -> np.ndarray[Any, Any]:
        """Return data in the components.

        Parameters
        ----------
        X : array or sparse matrix, shape (n_samples, n_features)

        Returns
        -------
        numpy.ndarray, shape (n_samples, n_components)
        """
        check_is_fitted(self)
        scores: np.ndarray[Any, Any] = safe_sparse_dot(
            self._checked(X, reset=False), self.components_.T
        )
        return scores - self.mean_ @ self.components_.T if self.center else scores

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
        data: np.ndarray[Any, Any] = np.asarray(X) @ self.components_
        return data + self.mean_ if self.center else data

    def _checked(self, X: Any, *, reset: bool) -> Any:
        return validate_data(self, X, reset=reset, dtype=_DTYPES, accept_sparse=("csr", "csc"))

    @property
    def _n_features_out(self) -> int:
        return int(self.components_.shape[0])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _moments(X: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Mean and variance of each column."""
    if isinstance(X, np.ndarray):
        return np.mean(X, axis=0), np.var(X, axis=0)
    mean, variance = mean_variance_axis(X, axis=0)
    return mean, variance
