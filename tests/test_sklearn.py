"""The scikit-learn transformer: scikit-learn's own checks, and agreement with TruncatedSVD and PCA."""

import doctest

import numpy as np
import pytest
import scipy.sparse

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from slra.integrations.sklearn import LowRank
from tests.matrices import make


def checks():
    for settings in ({}, {"rtol": 0.1}, {"center": True}, {"missing": "impute"}):
        yield from estimator_checks_generator(LowRank(**settings), mark="skip")


@pytest.mark.parametrize(
    ("estimator", "check"),
    [pytest.param(e, c, id=f"{e}-{c.func.__name__}") for e, c in checks()],
)
def test_it_keeps_the_rules_of_scikit_learn(estimator, check):
    check(estimator)


def data(kind):
    X = make("exponential", (80, 50), "float64") + 0.3
    if kind == "dense":
        return X
    X[np.random.default_rng(0).random(X.shape) < 0.8] = 0
    return getattr(scipy.sparse, f"{kind}_array")(X)


@pytest.mark.parametrize("kind", ["dense", "csr", "csc"])
def test_it_agrees_with_truncated_svd(kind):
    X = data(kind)
    ours = LowRank(5, n_iter=12, random_state=0)
    theirs = TruncatedSVD(5, algorithm="arpack", random_state=0)
    scores, expected = ours.fit_transform(X), theirs.fit_transform(X)
    # Neighbouring singular values differ by more than 1e-3 of the largest; 1e-12 / 1e-3 and room.
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    for name in (
        "components_",
        "singular_values_",
        "explained_variance_",
        "explained_variance_ratio_",
    ):
        got, right = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_allclose(got, right, rtol=0, atol=1e-8 * np.abs(right).max())
    np.testing.assert_allclose(ours.transform(X), expected, atol=1e-8 * np.abs(expected).max())
    np.testing.assert_allclose(
        ours.inverse_transform(scores), theirs.inverse_transform(expected), atol=1e-7
    )


@pytest.mark.parametrize("kind", ["dense", "csr"])
def test_centred_it_is_pca(kind):
    X = data(kind)
    dense = X if kind == "dense" else X.toarray()
    ours = LowRank(5, n_iter=12, center=True, random_state=0).fit(X)
    theirs = PCA(5, svd_solver="full").fit(dense)
    np.testing.assert_allclose(ours.mean_, theirs.mean_, atol=1e-14)
    np.testing.assert_allclose(
        ours.explained_variance_ratio_, theirs.explained_variance_ratio_, atol=1e-10
    )
    signs = np.sign(np.sum(ours.components_ * theirs.components_, axis=1))
    scores = theirs.transform(dense) * signs
    np.testing.assert_allclose(ours.transform(X), scores, atol=1e-8 * np.abs(scores).max())
    np.testing.assert_allclose(
        ours.inverse_transform(scores), theirs.inverse_transform(scores * signs), atol=1e-7
    )


def test_a_tolerance_chooses_the_number_of_components():
    X = data("dense")
    values = np.linalg.svd(X, compute_uv=False)
    tails = np.sqrt(np.cumsum(values[::-1] ** 2))[::-1] / np.linalg.norm(values)
    model = LowRank(rtol=0.05, random_state=0).fit(X)
    assert model.components_.shape[0] == int(np.argmax(tails <= 0.05))
    assert np.linalg.norm(model.inverse_transform(model.transform(X)) - X) <= 0.05 * np.linalg.norm(
        X
    )
    assert LowRank(3, rtol=0.05, random_state=0).fit(X).singular_values_.shape == (3,)


def test_names_pipelines_and_seeds():
    X = data("dense").astype("float32")
    model = make_pipeline(StandardScaler(), LowRank(3, random_state=4)).fit(X)
    assert list(model.get_feature_names_out()) == ["lowrank0", "lowrank1", "lowrank2"]
    scores = model.transform(X)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(clone(model).fit(X).transform(X), scores)


def test_the_example_runs():
    (test,) = doctest.DocTestFinder(recurse=False).find(LowRank, "LowRank")
    assert doctest.DocTestRunner().run(test).failed == 0


def test_constant_features_explain_nothing():
    model = LowRank(1, center=True, random_state=0).fit(np.ones((4, 3)))
    assert model.explained_variance_ratio_.tolist() == [0.0]


@pytest.mark.parametrize("kind", ["dense", "csr"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.9, 0.95, 0.999])
def test_a_share_of_the_variance_is_that_of_pca(share, kind):
    X = data(kind)
    theirs = PCA(share, svd_solver="full").fit(X if kind == "dense" else X.toarray())
    ours = LowRank(share, center=True, random_state=0).fit(X)
    # A value that just suffices may fall short by what the iteration left out.
    assert len(ours.components_) in (theirs.n_components_, theirs.n_components_ + 1)
    ratio = theirs.explained_variance_ratio_
    np.testing.assert_allclose(ours.explained_variance_ratio_[: len(ratio)], ratio, atol=5e-3)
    assert np.sum(ours.explained_variance_ratio_) >= share


def test_variances_are_those_of_pca():
    X = data("dense")
    theirs = PCA(5, svd_solver="full").fit(X)
    ours = LowRank(5, n_iter=12, center=True, random_state=0).fit(X)
    np.testing.assert_allclose(ours.explained_variance_, theirs.explained_variance_, rtol=1e-9)


@pytest.mark.parametrize("kind", ["dense", "csr"])
def test_means_that_are_large_beside_deviations(kind):
    rng = np.random.default_rng(0)
    X = (rng.standard_normal((20_000, 4)) * [1, 0.5, 0.2, 0.1] + 1000).astype("float32")
    wide = X.astype("float64")
    theirs = PCA(2, svd_solver="full").fit(wide)
    given = X if kind == "dense" else scipy.sparse.csr_array(X)
    ours = LowRank(2, center=True, random_state=0).fit(given)
    np.testing.assert_allclose(ours.mean_, theirs.mean_, rtol=1e-12)
    np.testing.assert_allclose(ours.explained_variance_, theirs.explained_variance_, rtol=1e-5)
    ratio = theirs.explained_variance_ratio_
    np.testing.assert_allclose(ours.explained_variance_ratio_, ratio, rtol=1e-5)
    signs = np.sign(np.sum(ours.components_ * theirs.components_, axis=1))
    scores = ours.transform(given[:100])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, theirs.transform(wide[:100]) * signs, atol=1e-3)
    np.testing.assert_allclose(ours.inverse_transform(scores), wide[:100], rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_components": 60}, r"^n_components must be between 1 and 50 \(min of the shape of X\)"),
        ({"n_components": 0}, "^n_components must be between 1 and 50"),
        ({"n_components": 1.5, "center": True}, "^n_components must be an int, or a share"),
        ({"n_components": 0.5}, "^n_components as a share of the variance, 0.5, needs center=True"),
    ],
)
def test_messages_name_the_parameter_of_the_estimator(settings, message):
    with pytest.raises(ValueError, match=message):
        LowRank(**settings).fit(data("dense"))


def test_what_is_transformed_back_is_checked():
    model = LowRank(3, random_state=0).fit(data("dense"))
    with pytest.raises(ValueError, match="^X must have 3 columns, one for each component, got"):
        model.inverse_transform(np.ones((4, 2)))
    with pytest.raises(ValueError, match="NaN"):
        model.inverse_transform(np.full((4, 3), np.nan))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("center", [False, True])
def test_gaps_are_imputed(dtype, center):
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((400, 4)) @ rng.standard_normal((4, 25)) + 5 * center
    noisy = (exact + 0.1 * rng.standard_normal(exact.shape)).astype(dtype)
    gaps = rng.random(exact.shape) < 0.2
    X = np.where(gaps, np.nan, noisy).astype(dtype)
    model = LowRank(4, center=center, missing="impute", random_state=0)
    scores = model.fit_transform(X)
    assert scores.dtype == dtype
    # 25 entries determine 4 scores, and 400 rows the axes: half of the noise or so is left.
    filled = model.inverse_transform(scores)
    assert np.sqrt(np.mean((filled - exact)[gaps] ** 2)) < 0.1
    assert 0.08 < np.sqrt(model.noise_variance_) < 0.11
    np.testing.assert_allclose(model.transform(X), scores, rtol=1e-5)
    # The posterior mean of probabilistic PCA, row by row.
    mean = model.mean_ if center else 0.0
    prior = np.diag(model.noise_variance_ / (model.singular_values_.astype(float) ** 2 / 400))
    for row in range(5):
        seen = ~gaps[row]
        axes = model.components_[:, seen].astype(float)
        x = (X[row] - mean)[seen]
        expected = np.linalg.solve(axes @ axes.T + prior, axes @ x)
        np.testing.assert_allclose(
            scores[row], expected, atol=1e3 * np.finfo(dtype).eps * np.abs(expected).max()
        )


def test_without_gaps_imputing_changes_nothing():
    X = data("dense")
    plain = LowRank(5, random_state=0).fit_transform(X)
    scores = LowRank(5, missing="impute", random_state=0).fit_transform(X)
    np.testing.assert_array_equal(scores, plain)


def test_what_missing_must_be():
    X = np.ones((5, 4))
    with pytest.raises(ValueError, match="missing must be"):
        LowRank(missing="mean").fit(X)
    with pytest.raises(ValueError, match="infinity"):
        LowRank(missing="impute").fit(X * np.inf)
    with pytest.raises(TypeError, match="[Ss]parse"):
        LowRank(missing="impute").fit(scipy.sparse.csr_array(X))
