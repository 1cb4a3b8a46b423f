"""Libraries that slra treats as any other: NumPy's numbers, or an error that says what is missing."""

import numpy as np
import pytest

import slra
from slra._backends import completed, registered
from tests import minimal_namespace, other_libraries
from tests.other_libraries import CASES, LIBRARIES, NOISY, off_by, strict, written

LINALG = {
    "prox_nuclear",
    "randomized_svd",
    "truncated_svd",
    "robust_pca",
    "low_rank_attention, output",
    "low_rank_attention, svd, l1",
    "AttentionBasis.attend",
}


@pytest.fixture(params=LIBRARIES)
def library(request):
    found = LIBRARIES[request.param]
    if reason := found.missing():
        pytest.skip(reason)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_the_table_says_what_runs(library, case):
    if case in library.slow:
        pytest.skip("takes minutes; python -m tests.other_libraries runs it")
    assert other_libraries.cell(case, library) == written()[case][library.name]


def test_what_is_asked_for_is_written_down():
    page = (other_libraries.DOCS / "your_library.md").read_text(encoding="utf-8")
    assert other_libraries.replaced(page, "needs", other_libraries.needs()) == page


SETTINGS = [
    *({"api_version": version} for version in ("2022.12", "2023.12", "2024.12", "2025.12")),
    *({"device": device} for device in ("device1", "no_float64", "no_x64")),
    {"boolean_indexing": True, "data_dependent_shapes": True},
    {"api_version": "2022.12", "enabled_extensions": ("linalg",)},
    {"device": "no_x64", "enabled_extensions": ("linalg",)},
]


@pytest.mark.parametrize("flags", SETTINGS, ids=lambda flags: "-".join(map(str, flags.values())))
def test_every_setting_of_array_api_strict(flags):
    xp = pytest.importorskip("array_api_strict")
    if flags.get("api_version", "") > xp._flags.supported_versions[-1]:
        pytest.skip("of a later array-api-strict")
    if "device" in flags and flags["device"] not in getattr(
        xp._devices, "_ALL_DEVICE_NAMES", ("device1",)
    ):
        pytest.skip("no such device")
    with strict(**{"enabled_extensions": (), **flags}) as made:
        for case in CASES:
            assert off_by(case, made) <= 1, case


def small():
    return minimal_namespace.asarray(NOISY)


def test_large_matrices_do_not_go_to_the_host(monkeypatch):
    monkeypatch.setattr(completed, "HOST_ENTRIES", 20)
    with pytest.raises(
        TypeError, match="^truncated_svd needs the linalg extension, which tests.minimal_namespace"
    ):
        slra.truncated_svd(small(), 2)


def test_an_error_names_the_function_the_library_and_what_is_missing(monkeypatch):
    monkeypatch.delitem(minimal_namespace.namespace._found, "sqrt")
    with pytest.raises(TypeError) as raised:
        slra.prox.prox_l2(small(), 0.5)
    assert type(raised.value) is TypeError
    assert str(raised.value) == "prox_l2 needs sqrt, which tests.minimal_namespace does not have"


def test_what_fails_inside_a_library_is_explained(monkeypatch):
    xp = pytest.importorskip("array_api_strict")
    inside = {"__name__": "array_api_strict.kernels"}
    exec("def exp(x):\n    raise KeyError('no such kernel')", inside)
    monkeypatch.setattr(xp, "exp", inside["exp"])
    with pytest.raises(
        TypeError, match="^attention needs what array_api_strict does not do: KeyErr"
    ):
        slra.attention(*[xp.asarray(NOISY)] * 3)


def test_errors_of_the_callers_functions_are_left_alone():
    class MineError(Exception):
        pass

    def gradient(x):
        raise MineError

    x = pytest.importorskip("array_api_strict").asarray(NOISY)
    with pytest.raises(MineError):
        slra.proximal_gradient(x, gradient, slra.soft_threshold)


def test_complex_numbers_and_those_that_numpy_cannot_read():
    x = NOISY + 1j * NOISY[::-1]
    made = minimal_namespace.asarray(x)
    for function in (
        lambda x: slra.soft_threshold(x, 0.5),
        lambda x: slra.randomized_svd(x, 3, rng=0).S,
        lambda x: slra.prox.prox_nuclear(x, 0.5),
    ):
        found = minimal_namespace.to_numpy(function(made))
        np.testing.assert_allclose(found, function(x), rtol=1e-4, atol=1e-4)


def test_nan_in_a_rewritten_maximum():
    with strict(api_version="2022.12") as (make, read):
        xp = completed.Completed(make(np.zeros(1)).__array_namespace__())
        x, y = np.asarray([1.0, np.nan, 2.0]), np.asarray([0.0, 1.0, np.nan])
        for name in ("maximum", "minimum"):
            found = read(getattr(xp, name)(make(x), make(y)))
            np.testing.assert_array_equal(found, getattr(np, name)(x, y))


def test_what_is_rewritten_equals_numpy():
    with strict(api_version="2022.12") as (make, read):
        xp = completed.Completed(make(np.zeros(1)).__array_namespace__())
        x = np.random.default_rng(0).standard_normal((3, 4, 5))
        order, z = np.argsort(x, axis=1), make(x)
        checks = {
            "cumulative_sum": (xp.cumulative_sum(z, axis=1), np.cumsum(x, axis=1)),
            "take_along_axis": (
                xp.take_along_axis(z, make(order), axis=1),
                np.take_along_axis(x, order, axis=1),
            ),
            "moveaxis": (xp.moveaxis(z, 0, -1), np.moveaxis(x, 0, -1)),
            "repeat": (xp.repeat(z, 2, axis=1), np.repeat(x, 2, axis=1)),
            "diff": (xp.diff(z, axis=1), np.diff(x, axis=1)),
            "clip": (xp.clip(z, -0.5, 0.5), np.clip(x, -0.5, 0.5)),
            "count_nonzero": (xp.count_nonzero(z > 0, axis=1), np.count_nonzero(x > 0, axis=1)),
        }
        for name, (found, right) in checks.items():
            np.testing.assert_allclose(read(found), right, rtol=1e-14, atol=1e-14, err_msg=name)
        edges, values = np.asarray([0.0, 1.0, 1.0, 2.0]), np.asarray([[-1.0, 1.0], [1.5, 3.0]])
        for side in ("left", "right"):
            found = read(xp.searchsorted(make(edges), make(values), side=side))
            np.testing.assert_array_equal(found, np.searchsorted(edges, values, side=side))


@pytest.fixture
def registry(monkeypatch):
    """What is registered is forgotten."""
    monkeypatch.setattr(registered, "_registered", dict(registered._registered))
    yield
    registered._made.clear()


def test_primitives_from_outside(registry):
    name = "tests.minimal_namespace"
    called = []

    class Mine:
        def small_svd(self, b):
            called.append(self.xp.__name__)
            return super().small_svd(b)

    with_functions = type(
        "Other", (), {"functions": {"sqrt": lambda x: called.append("sqrt") or x}}
    )
    before = slra.truncated_svd(small(), 2)
    slra.register_backend(name, Mine)
    after = slra.truncated_svd(small(), 2)
    assert called == [name]
    assert (minimal_namespace.to_numpy(before.S) == minimal_namespace.to_numpy(after.S)).all()
    slra.register_backend(name, with_functions)
    slra.prox.prox_l2(small(), 0.5)
    assert called == [name, "sqrt"]


def test_an_object_that_was_made_before_a_registration_meets_arrays_made_after_it(registry):
    q, k, v = (
        minimal_namespace.asarray(x)
        for x in (other_libraries.Q, other_libraries.K, other_libraries.V)
    )
    basis = slra.fit_attention(q, k, v, 2)
    slra.register_backend("tests.minimal_namespace", type("Mine", (), {}))
    basis.attend(q, k, v)


@pytest.mark.parametrize(
    ("name", "backend", "error", "match"),
    [
        (1, type("B", (), {}), TypeError, "namespace_name must be a string, .*got int"),
        ("x", 1, TypeError, "Backend must be a class, got int"),
        ("numpy", type("B", (), {}), ValueError, "does not know, got 'numpy'"),
        ("array_api_compat.torch", type("B", (), {}), ValueError, "does not know"),
        ("x", type("B", (), {"smal_svd": None}), TypeError, "are primitives, got smal_svd"),
    ],
)
def test_registrations_that_are_wrong(registry, name, backend, error, match):
    with pytest.raises(error, match=match):
        slra.register_backend(name, backend)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in CASES if case != "robust_pca"])
def test_cubed_computes_nothing(case, monkeypatch):
    if reason := LIBRARIES["cubed"].missing():
        pytest.skip(reason)
    from cubed.core import array

    def compute(*args, **kwargs):
        raise AssertionError("computed")

    with LIBRARIES["cubed"].enter() as (make, _):
        monkeypatch.setattr(array, "compute", compute)
        monkeypatch.setattr(array.CoreArray, "compute", compute)
        CASES[case](make)


@pytest.mark.filterwarnings("ignore")
def test_sparse_results_stay_sparse():
    if reason := LIBRARIES["sparse"].missing():
        pytest.skip(reason)
    with LIBRARIES["sparse"].enter() as (make, _):
        x = other_libraries.SPARSE
        for prox in (slra.soft_threshold, slra.prox.prox_l2):
            found = prox(make(x), 0.5)
            assert (type(found).__name__, found.fill_value) == ("COO", 0)
            assert found.nnz == np.count_nonzero(prox(x, 0.5))
        assert isinstance(slra.randomized_svd(make(x), 2, rng=0).S, np.ndarray)


def test_functions_become_onnx_graphs(capsys):
    for module in ("ndonnx", "onnxruntime"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    from examples.export_onnx import main

    differences = main()
    assert len(differences) == 4
    assert max(differences.values()) < 1e-5


def test_what_has_no_values_is_factored_nowhere():
    ndx = pytest.importorskip("ndonnx", reason="ndonnx is not installed")
    x = ndx.argument(shape=(6, 4), dtype=ndx.float32)
    with pytest.raises(TypeError, match="^truncated_svd needs the linalg extension, which ndonnx"):
        slra.truncated_svd(x, 2)
