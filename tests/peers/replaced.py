"""Plugin of pytest: puts `slra.randomized_svd` in the place of the functions of other libraries.

Loaded by ``-p tests.peers.replaced`` into a run of the other library's own tests.
"""

from typing import Any

import numpy as np
import pytest

import slra


def sklearn_randomized_svd(
    M: Any,
    n_components: int,
    *,
    n_oversamples: int = 10,
    n_iter: Any = "auto",
    power_iteration_normalizer: str = "auto",
    transpose: Any = "auto",
    flip_sign: bool = True,
    random_state: Any = None,
    svd_lapack_driver: str = "gesdd",
) -> tuple[Any, Any, Any]:
    """Take and give what ``sklearn.utils.extmath.randomized_svd`` does, signs included."""
    from sklearn.utils import check_random_state

    seed = int(check_random_state(random_state).randint(2**31 - 1))
    if np.dtype(M.dtype).kind in "iu":
        M = M.astype(float)
    rank = min(n_components, *M.shape)
    return tuple(slra.randomized_svd(M, rank, n_oversamples=n_oversamples, n_iter=n_iter, rng=seed))


def dask_svd_compressed(
    a: Any,
    k: int,
    iterator: str = "power",
    n_power_iter: int = 0,
    n_oversamples: int = 10,
    seed: Any = None,
    compute: bool = False,
    coerce_signs: bool = True,
) -> tuple[Any, Any, Any]:
    """Take and give what ``dask.array.linalg.svd_compressed`` does."""
    import dask

    rank = min(k, *a.shape)
    U, S, Vh = slra.randomized_svd(
        a, rank, n_oversamples=n_oversamples, n_iter=n_power_iter, rng=seed
    )
    return dask.persist(U, S, Vh) if compute else (U, S, Vh)


def pytest_configure(config: pytest.Config) -> None:
    """Replace what is installed, before the tests import it."""
    import dask.array
    import dask.array.linalg
    from sklearn.decomposition import _pca, _truncated_svd
    from sklearn.utils import extmath

    for module in (extmath, _pca, _truncated_svd):
        module._randomized_svd = sklearn_randomized_svd
    extmath.randomized_svd = sklearn_randomized_svd
    dask.array.linalg.svd_compressed = dask_svd_compressed
    dask.array.svd_compressed = dask_svd_compressed
