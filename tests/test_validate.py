"""Bad input meets one error at the door, which names the argument, what came, and what is right."""

import contextlib
import dataclasses
from fractions import Fraction

import numpy as np
import pytest

import slra
from slra._backends import backend_of
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
        if name != "attention" or x.shape[-1] == 0:
            with pytest.raises(ValueError, match="q must have (no empty|a last) axis"):
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
    k = xp.astype(k, xp.float32)
    # Every floating dtype here promotes to some other; a library is free to refuse.
    monkeypatch.setattr(type(backend_of(xp)), "common_dtype", _refuse)
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
    [(-1.0, ValueError), (np.nan, ValueError), (-np.inf, ValueError), ("1", TypeError)]
    + [(None, TypeError), (True, TypeError), (1j, TypeError)],
    ids=repr,
)
def test_bad_tau(xp, bad, error):
    with pytest.raises(error, match="tau must be"):
        slra.soft_threshold(to_xp(xp, np.ones(3)), bad)


@pytest.mark.eager_only("values cannot be checked here")
def test_bad_tau_array(xp):
    x = to_xp(xp, np.ones((2, 3)))
    with pytest.raises(
        ValueError, match="tau must be 0 or more, finite in the dtype of x or infinite, everywhere"
    ):
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


@pytest.mark.parametrize("axis", [2, (0, 5), (0, 0), ()], ids=str)
def test_axes_of_a_sum_that_are_not_there(xp, axis):
    with pytest.raises(ValueError, match="axis must (be among the 2 axes|name different)"):
        slra.prox.norm_l1(to_xp(xp, np.ones((2, 3))), axis=axis)


@pytest.mark.parametrize("axis", [True, 0.0, "x", [0]], ids=repr)
@pytest.mark.parametrize("name", ["norm_l0", "norm_l1", "norm_nonneg_l1"])
def test_axes_of_a_sum_that_are_no_ints(name, axis):
    with pytest.raises(TypeError, match="axis must be an int"):
        getattr(slra.prox, name)(np.ones((2, 3)), axis=axis)


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        (10**400, "tau must be finite in double precision"),
        (Fraction(10**400), "tau must be finite in double precision"),
        (10**5000, "tau must be finite in double precision, got a int of too many digits"),
        (1e300, r"tau must be from 0 to 3.4e\+38 in 32 bits, got 1e\+300"),
        (
            np.full(3, 1e300),
            "tau must be 0 or more, finite in the dtype of x or infinite, everywhere",
        ),
    ],
    ids=["int", "fraction", "long", "float", "array"],
)
def test_numbers_beyond_the_dtype(tau, message):
    with pytest.raises(ValueError, match=message):
        slra.soft_threshold(np.ones(3, dtype="float32"), tau)


def test_numbers_that_would_vanish_in_the_dtype():
    q = np.ones((4, 3), dtype="float32")
    with pytest.raises(ValueError, match="softcap must be from 1.2e-38 to 3.4e.38 in 32 bits"):
        slra.attention(q, q, q, softcap=1e-300)
    with pytest.raises(ValueError, match="delta must be from 1.2e-38"):
        slra.prox.prox_huber(q, 1.0, delta=1e-300)


@pytest.mark.parametrize("rng", [-1, np.int64(-7)])
def test_negative_seeds(rng):
    with pytest.raises(ValueError, match="rng must be 0 or more, got -"):
        slra.randomized_svd(np.ones((50, 40)), 2, rng=rng)


def test_flags_that_are_none():
    x = np.ones((4, 3))
    with pytest.raises(TypeError, match="center must be a bool, got str"):
        slra.randomized_svd(x, 2, center="no")
    with pytest.raises(TypeError, match="return_lse must be a bool, got ndarray"):
        slra.attention(x, x, x, return_lse=np.ones(2))
    with pytest.raises(TypeError, match="pool_batch must be a bool, got int"):
        slra.fit_attention(x, x, x, 2, pool_batch=1)


def test_arrays_in_the_place_of_words():
    x, words = np.ones((4, 3)), np.ones(3)
    with pytest.raises(ValueError, match="method must be one of 'auto'"):
        slra.randomized_svd(x, 2, method=words)
    with pytest.raises(TypeError, match="n_iter must be an int, got ndarray"):
        slra.randomized_eigh(np.eye(3), 2, n_iter=words)
    with pytest.raises(TypeError, match="density must be a real number, got ndarray"):
        slra.compress(x, 2, words)


def test_booleans_to_compress():
    with pytest.raises(TypeError, match="x must have a floating dtype, got bool"):
        slra.compress(np.ones((4, 3), dtype=bool), 1, "auto")


def test_booleans_of_torch_for_ints():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="rank must be an int"):
        slra.truncated_svd(np.ones((4, 3)), torch.tensor(True))


def test_masks_outside_the_standard():
    q = np.ones((4, 3))
    with pytest.raises(TypeError, match="mask must be boolean or real floating, got <U1"):
        slra.attention(q, q, q, mask=np.full((4, 4), "a"))


def solve(**options):
    x = options.pop("x0", np.zeros(2))
    given = {"value_and_grad": lambda x: (0.0, x), "prox": slra.prox.prox_l1, **options}
    return slra.proximal_gradient(x, given.pop("value_and_grad"), given.pop("prox"), **given)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prox": 3}, TypeError, "prox must be callable, got int"),
        ({"callback": 3}, TypeError, "callback must be callable, got int"),
        ({"value_and_grad": lambda x: x}, TypeError, "value_and_grad must return a pair"),
        ({"value_and_grad": lambda x: (0.0, x[:1])}, ValueError, r"return an array of shape \(2,"),
        ({"prox": lambda x, step: x[:1]}, ValueError, r"prox must return an array of shape \(2,\)"),
        ({"prox": lambda x, step: 0.0}, TypeError, "prox must return an array, got float"),
        ({"step": 0}, ValueError, "step must be finite and greater than 0"),
        ({"step": np.zeros(())}, ValueError, "step must be finite and greater than 0"),
        ({"accelerated": "no"}, TypeError, "accelerated must be a bool"),
    ],
)
def test_functions_of_a_solver(options, error, message):
    with pytest.raises(error, match=message):
        solve(**options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"matmat": 3}, TypeError, "x.matmat must be callable, got int"),
        ({"rmatmat": len}, TypeError, "x.rmatmat must be an array .* got int"),
        ({"rmatmat": lambda u: u}, ValueError, r"x.rmatmat must return an array of shape \(9, "),
        ({"shape": 9}, TypeError, r"x.shape must be a tuple \(m, n\), got int"),
        ({"shape": (9, 0.5)}, TypeError, "x.shape must be an int"),
        ({"shape": (9, -1)}, ValueError, "x must have 2 dimensions"),
    ],
)
def test_operators_that_are_none(change, error, message):
    a = np.ones((10, 9))
    given = {"matmat": lambda v: a @ v, "rmatmat": lambda u: a.T @ u, "shape": (10, 9), "like": a}
    with pytest.raises(error, match=message):
        slra.randomized_svd(
            slra.MatrixOperator(**{**given, **change}), 1, rng=0, n_iter=1, n_oversamples=0
        )


def test_test_matrix_that_is_not_finite():
    omega = np.full((20, 3), np.nan)
    with pytest.raises(ValueError, match="test_matrix must be finite"):
        slra.randomized_svd(np.eye(20), 2, test_matrix=omega)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"wq": None}, TypeError, "wq must be an array"),
        ({"wk": np.ones((2, 3, 1))}, ValueError, r"wq of a basis must have shape \(2, 3, 1\)"),
        ({"mu": np.ones(3)}, ValueError, r"mu of a basis must have shape \(2, 1, 3\), got \(3,\)"),
        ({"wk": np.ones(3)}, ValueError, "wk must have 2 dimensions or more"),
        ({"ranks": ()}, ValueError, "ranks of a basis must be 2 pairs"),
        ({"ranks": (2, 2)}, TypeError, "ranks of a basis must be pairs of ints, got 2"),
        ({"ranks": ((2, 9), (2, 2))}, ValueError, "ranks of a basis must be between 1 and 2"),
    ],
)
def test_bases_whose_parts_do_not_fit(change, error, message):
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6, 3))
    basis = dataclasses.replace(slra.fit_attention(q, k, v, 2), **change)
    with pytest.raises(error, match=message):
        slra.low_rank_attention(q, k, v, basis=basis)
    with pytest.raises(error, match=message):
        slra.KVCache(basis)


def test_what_is_no_basis():
    q = np.ones((2, 6, 3))
    with pytest.raises(TypeError, match="basis must be an AttentionBasis, got str"):
        slra.low_rank_attention(q, q, q, basis="basis")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": (2,)}, TypeError, "batch must be left out of from_prefix"),
        ({"q": [1.0]}, TypeError, "q must be an array"),
        ({"q": np.ones(3)}, ValueError, "q must have at least 2 dimensions"),
        ({"rank": None, "rtol": "few"}, TypeError, "rtol must be a real number, got str"),
        ({"rotary": "fast"}, TypeError, "rotary must be real numbers, got str"),
        ({"rotary": [[1.0, 2.0], [3.0]]}, TypeError, "rotary must be real numbers, got list"),
        ({"window": 10**400}, ValueError, "window must be at most 2147483647"),
        ({"dtype": np.dtype("int8")}, ValueError, "dtype must be one of 'float16'"),
    ],
    ids=str,
)
def test_caches_from_a_prefix(options, error, message):
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6, 3))
    given = {"q": q, "k": k, "v": v, "rank": 2, **options}
    with pytest.raises(error, match=message):
        slra.KVCache.from_prefix(**given)


def test_ragged_lists_for_lengths():
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6, 3))
    cache = slra.KVCache(slra.fit_attention(q, k, v, 2), batch=(2,))
    with pytest.raises(TypeError, match="lengths must be integers, got list"):
        cache.append(np.ones((2, 2, 1, 3)), np.ones((2, 2, 1, 3)), lengths=[[1], [1, 2]])


@pytest.mark.eager_only("values cannot be checked here")
def test_scores_beyond_the_dtype_when_fitting(xp):
    q = to_xp(xp, np.full((4, 3), 1e200))
    with pytest.raises(ValueError, match="q, k and mask must have finite scores"):
        slra.fit_attention(q, q, q, 2)


@pytest.mark.parametrize("other", [np.ones(()), np.ones((5, 2), dtype=int)])
def test_factors_of_a_compressed_matrix(other):
    small = slra.compress(np.random.default_rng(0).standard_normal((4, 5)), 1, 0.2)
    with pytest.raises((TypeError, ValueError), match="other must have (1 dimension|a floating)"):
        small @ other


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("big", TypeError, "task must be a real number or array, got str"),
        (np.ones(2), ValueError, r"task must have no dimensions, got shape \(2,\)"),
        (np.asarray(1), TypeError, "task must have a real floating dtype"),
    ],
)
def test_task_of_the_objective(task, error, message):
    with pytest.raises(error, match=message):
        slra.objective.combined_objective(task, *np.ones((3, 2)), 1.0)


CAUSAL = {
    "attention": lambda q, k, v, o: slra.attention(q, k, v, **o),
    "attention_vjp": lambda q, k, v, o: slra.attention_vjp(q, k, v, q, q[..., 0], q, **o),
    "fit_attention": lambda q, k, v, o: slra.fit_attention(q, k, v, 2, **o),
    "low_rank_attention": lambda q, k, v, o: slra.low_rank_attention(q, k, v, 2, **o),
    "low_rank_attention_vjp": lambda q, k, v, o: slra.low_rank_attention_vjp(
        q, k, v, q, q[..., 0], q, 2, **o
    ),
    "attend": lambda q, k, v, o: slra.fit_attention(q, k, v, 2).attend(q, k, v, **o),
    "topk": lambda q, k, v, o: slra.baselines.topk(q, k, v, 2, 2, **o),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_alignment_has_to_be_said_where_lengths_differ(name):
    q, k = np.random.default_rng(0).standard_normal((2, 5, 3)), np.ones((2, 7, 3))
    with pytest.raises(ValueError, match='"bottom_right".*"top_left".*5 queries and 7 keys'):
        CAUSAL[name](q, k, k, {"is_causal": True})
    CAUSAL[name](q, q, q, {"is_causal": True})
    CAUSAL[name](q, k, k, {"is_causal": False})
    for align in ("bottom_right", "top_left", 2, np.int64(-1)):
        CAUSAL[name](q, k, k, {"is_causal": True, "causal_align": align})
    for align, error in (
        (True, ValueError),
        (0.5, ValueError),
        ("left", ValueError),
        (2**40, ValueError),
    ):
        with pytest.raises(error, match="causal_align must be"):
            CAUSAL[name](q, k, k, {"is_causal": False, "causal_align": align})


def test_alignments_are_positions_of_the_first_query():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 7, 3))
    for name, position in (("bottom_right", 2), ("top_left", 0)):
        named, placed = (
            slra.attention(q, k, k, is_causal=True, causal_align=align)
            for align in (name, position)
        )
        np.testing.assert_array_equal(named, placed)
    # Every query before the first key, and every one after the last.
    none, every = (slra.attention(q, k, k, is_causal=True, causal_align=at) for at in (-5, 7))
    np.testing.assert_array_equal(none, np.zeros_like(q))
    np.testing.assert_allclose(every, slra.attention(q, k, k), atol=1e-15)
