"""Bad input meets one error at the door, which names the argument, what came, and what is right."""

import contextlib

import numpy as np
import pytest

import slra
from tests.backends import other_device, to_xp

ATTENTION = ("attention", "low_rank_attention")
SVD = ("randomized_svd", "truncated_svd")


def call(name, xp, *arrays, **options):
    """Call a public function, with a rank where it needs one."""
    if name in ("randomized_svd", "low_rank_attention"):
        options.setdefault("rank", 1)
    if name == "randomized_svd":
        options.setdefault("rng", 0)
    return getattr(slra, name)(*arrays, **options)


def three(xp, shape=(2, 4, 3), dtype="float64"):
    return [to_xp(xp, np.ones(shape, dtype=dtype)) for _ in range(3)]


@pytest.mark.parametrize("name", [*SVD, "soft_threshold"])
@pytest.mark.parametrize("bad", [[[1.0]], 1.0, None, "x", np.float64(2.0)], ids=repr)
def test_not_an_array(name, bad):
    options = {"tau": 1.0} if name == "soft_threshold" else {}
    with pytest.raises(TypeError, match="x must be an array .* got"):
        call(name, np, bad, **options)


@pytest.mark.parametrize("name", ATTENTION)
def test_lists_for_queries(name):
    with pytest.raises(TypeError, match="k must be an array .* got list"):
        call(name, np, np.ones((2, 4, 3)), [[1.0]], np.ones((2, 4, 3)))


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "bool"])
def test_integers(xp, dtype):
    x = to_xp(xp, np.ones((4, 3), dtype=dtype))
    for name in SVD:
        with pytest.raises(TypeError, match="x must have a floating dtype, got .*convert it first"):
            call(name, xp, x)
    with pytest.raises(TypeError, match="x must have a floating dtype"):
        slra.soft_threshold(x, 1.0)
    good = to_xp(xp, np.ones((4, 3)))
    for name in ATTENTION:
        with pytest.raises(TypeError, match="k must have a real floating dtype"):
            call(name, xp, good, x, good)


def test_complex_attention(xp):
    q, _, v = three(xp)
    k = to_xp(xp, np.ones((2, 4, 3), dtype="complex128"))
    with pytest.raises(TypeError, match="k must have a real floating dtype, got .*complex128"):
        slra.attention(q, k, v)


@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_too_few_dimensions(xp, shape):
    x = to_xp(xp, np.ones(shape))
    for name in SVD:
        with pytest.raises(ValueError, match="x must have at least 2 dimensions.*got shape"):
            call(name, xp, x)
    for name in ATTENTION:
        with pytest.raises(ValueError, match="q must have at least 2 dimensions.*got shape"):
            call(name, xp, x, *three(xp)[1:])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 2, 2)], ids=str)
def test_empty_axes(xp, shape):
    x = xp.zeros(shape)
    for name in SVD:
        with pytest.raises(ValueError, match="x must have no empty axis, got shape"):
            call(name, xp, x)
    for name in ATTENTION:
        with pytest.raises(ValueError, match="q must have no empty axis"):
            call(name, xp, x, x, x)


@pytest.mark.eager_only("values cannot be checked here")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(xp, bad):
    a = np.ones((4, 3))
    a[1, 2] = bad
    for name in SVD:
        with pytest.raises(ValueError, match="x must be finite, got NaN or infinity"):
            call(name, xp, to_xp(xp, a))
    q, k, _ = three(xp, (4, 3))
    with pytest.raises(ValueError, match="v must be finite"):
        slra.low_rank_attention(q, k, to_xp(xp, a), 2)


@pytest.mark.parametrize(
    ("bad", "error"),
    [(0, ValueError), (-1, ValueError), (4, ValueError), (1.0, TypeError), ("2", TypeError)]
    + [(True, TypeError), ([1, 2, 3], TypeError)],
    ids=repr,
)
def test_bad_rank(xp, bad, error):
    x = to_xp(xp, np.ones((5, 3)))
    message = "rank must be (between 1 and 3 .*got|an int)"
    for name in SVD:
        with pytest.raises(error, match=message):
            call(name, xp, x, rank=bad)
    with pytest.raises(error, match="rank must be (between|an int)"):
        slra.low_rank_attention(x, x, x, bad)


@pytest.mark.needs("own arrays")
def test_two_namespaces(xp):
    other = (
        np.ones((4, 3)) if "numpy" not in xp.__name__ else pytest.importorskip("torch").ones(4, 3)
    )
    q, k, _ = three(xp, (4, 3))
    with pytest.raises(TypeError, match="q and v must come from one array library, got"):
        slra.attention(q, k, other)
    with pytest.raises(TypeError, match="x and test_matrix must come from one array library"):
        slra.randomized_svd(q, 1, test_matrix=other)
    with pytest.raises(TypeError, match="x and tau must come from one array library"):
        slra.soft_threshold(q, other)


@pytest.mark.needs("eager")
def test_two_devices(xp):
    with contextlib.ExitStack() as stack:
        device = other_device(xp, stack)
        q = xp.asarray(np.ones((4, 3)), device=device)
        default = xp.empty(0).device
        v = xp.zeros((4, 3), dtype=xp.float64, device=default)
        if "jax" in xp.__name__:  # an array that was not put anywhere may meet any other
            import jax

            v = jax.device_put(v, default)
        with pytest.raises(ValueError, match="q and v must be on one device, got"):
            slra.attention(q, q, v)


def test_dtypes_that_do_not_promote(xp, monkeypatch):
    q, k, v = three(xp)
    # Every floating dtype here promotes to some other; a library is free to refuse.
    monkeypatch.setattr(xp, "result_type", _refuse)
    with pytest.raises(TypeError, match=r"q \(.*float64\) and k .* must have a common floating dt"):
        slra.attention(q, k, v)


def _refuse(*args):
    raise TypeError("no common dtype")


def test_mixed_precision_promotes(xp):
    q, k, v = three(xp)
    q = xp.astype(q, xp.float32)
    assert slra.attention(q, k, v).dtype == xp.float64


def test_wider_than_double():
    wide = np.ones((4, 3), dtype=np.longdouble)
    if np.finfo(np.longdouble).bits <= 64:
        pytest.skip("long double is double here")
    with pytest.raises(TypeError, match="x must have 16 to 64 bits a component"):
        slra.truncated_svd(wide)


@pytest.mark.parametrize("dtype", ["U3", "M8[s]", object], ids=str)
def test_dtypes_outside_the_standard(dtype):
    with pytest.raises(TypeError, match="x must have a floating dtype"):
        slra.truncated_svd(np.empty((2, 2), dtype=dtype))


def test_subclasses_whose_arithmetic_differs():
    with pytest.raises(TypeError, match="x must be a dense array, got a masked array"):
        slra.truncated_svd(np.ma.masked_array(np.ones((2, 2)), mask=np.eye(2)))
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix([[1.0, 2.0]])
    with pytest.raises(TypeError, match="x must be an array .* got matrix"):
        slra.truncated_svd(matrix)


def test_sparse_tensors():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="x must be a dense array, got a tensor of layout"):
        slra.truncated_svd(torch.eye(3).to_sparse())


def test_unknown_chunks():
    da = pytest.importorskip("dask.array")
    x = da.ones((6, 3), chunks=3)
    with pytest.raises(TypeError, match="x must be a dense array, got an array of unknown shape"):
        slra.truncated_svd(x[x[:, 0] > 0])


@pytest.mark.parametrize(
    ("bad", "error"),
    [(-1.0, ValueError), (np.nan, ValueError), (np.inf, ValueError), ("1", TypeError)]
    + [(None, TypeError), (True, TypeError), (1j, TypeError)],
    ids=repr,
)
def test_bad_tau(xp, bad, error):
    with pytest.raises(error, match="tau must be"):
        slra.soft_threshold(to_xp(xp, np.ones(3)), bad)


@pytest.mark.eager_only("values cannot be checked here")
def test_bad_tau_array(xp):
    x = to_xp(xp, np.ones((2, 3)))
    with pytest.raises(ValueError, match="tau must be finite and 0 or more everywhere"):
        slra.soft_threshold(x, to_xp(xp, np.asarray([1.0, -1.0, 0.0])))
    with pytest.raises(ValueError, match=r"tau must broadcast to x.*\(2, 3\), got \(2,\)"):
        slra.soft_threshold(x, to_xp(xp, np.ones(2)))


@pytest.mark.parametrize(
    ("bad", "error"),
    [(-1, ValueError), (1.5, TypeError), ("few", TypeError)],
)
@pytest.mark.parametrize("name", ["n_oversamples", "n_iter"])
def test_bad_counts(name, bad, error):
    with pytest.raises(error, match=f"{name} must be"):
        slra.randomized_svd(np.ones((5, 4)), 2, rng=0, **{name: bad})


@pytest.mark.parametrize("bad", [1.5, "seed", np.random.RandomState(0), True])
def test_bad_rng(bad):
    with pytest.raises(TypeError, match=r"rng must be an int, a numpy\.random\.Generator or None"):
        slra.randomized_svd(np.ones((50, 40)), 2, rng=bad)


@pytest.mark.parametrize("shape", [(3, 2), (4, 1), (4,), (2, 4, 2)], ids=str)
def test_bad_test_matrix(xp, shape):
    x = to_xp(xp, np.ones((5, 4)))
    with pytest.raises(ValueError, match=r"test_matrix must have shape \(\.\.\., 4, 2 or more\)"):
        slra.randomized_svd(x, 2, test_matrix=to_xp(xp, np.ones(shape)))


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (((2, 4, 3), (2, 4, 2), (2, 4, 3)), {}, ValueError, "q and k must have the same last axis"),
        (((2, 4, 3), (2, 4, 3), (2, 5, 3)), {}, ValueError, "k and v must have the same length"),
        (((2, 4, 3), (3, 4, 3), (3, 4, 3)), {}, ValueError, "leading axes of q, k and v must broa"),
        (((4, 3), (4, 3), (4, 3)), {"enable_gqa": True}, ValueError, "must have a head axis"),
        (((3, 4, 3), (2, 4, 3), (2, 4, 3)), {"enable_gqa": True}, ValueError, "multiple of those"),
        (((4, 3), (4, 3), (4, 3)), {"scale": "big"}, TypeError, "scale must be a real number"),
        (((4, 3), (4, 3), (4, 3)), {"scale": np.nan}, ValueError, "scale must be finite"),
        (
            ((4, 3), (4, 3), (4, 3)),
            {"softcap": 0.0},
            ValueError,
            "softcap must be finite and great",
        ),
        (((4, 3), (4, 3), (4, 3)), {"is_causal": 1}, TypeError, "is_causal must be a bool"),
        (
            ((4, 3), (4, 3), (4, 3)),
            {"causal_align": "left"},
            ValueError,
            "causal_align must be one",
        ),
        (
            ((4, 3), (4, 3), (4, 3)),
            {"mask": (4, 5)},
            ValueError,
            "mask must have 2 or more dimensions and broadcast to",
        ),
        (
            ((4, 3), (4, 3), (4, 3)),
            {"mask": (4,)},
            ValueError,
            "mask must have 2 or more dimensions and broadcast to",
        ),
        (
            ((4, 3), (4, 3), (4, 3)),
            {"mask": (2, 4, 4)},
            ValueError,
            "mask must have 2 or more dimensions and broadcast to",
        ),
    ],
)
def test_attention_options(name, shapes, options, error, message):
    q, k, v = (np.ones(shape) for shape in shapes)
    if "mask" in options:
        options = {"mask": np.ones(options["mask"], dtype=bool)}
    with pytest.raises(error, match=message):
        call(name, np, q, k, v, **options)


def test_integer_mask():
    q = np.ones((4, 3))
    with pytest.raises(TypeError, match="mask must be boolean or real floating, got int64"):
        slra.attention(q, q, q, mask=np.ones((4, 4), dtype="int64"))


@pytest.mark.parametrize(
    ("l1", "error"), [(-1.0, ValueError), ((1.0, 2.0), TypeError), ("a", TypeError)], ids=repr
)
def test_bad_l1(l1, error):
    q = np.ones((4, 3))
    with pytest.raises(error, match="l1 must be"):
        slra.low_rank_attention(q, q, q, 2, l1=l1)
