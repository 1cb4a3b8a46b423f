"""Singular values and eigenvalues, decompositions, and solvers."""

import functools
from collections.abc import Callable
from typing import Any

import array_api_compat as compat
import numpy as np
from hypothesis import strategies as st

import slra
from tests.backends import to_xp
from tests.fuzz import oracles
from tests.fuzz.oracles import dense, eps_of, real_dtype, wide
from tests.fuzz.strategies import FLOATS, arrays, floats
from tests.fuzz.table import (
    MATRICES,
    add,
    all_finite,
    is_finite,
    is_floating,
    no_check,
    normal,
    public,
)


@st.composite
def _svd_args(draw: Any, *, options: bool) -> dict[str, Any]:
    shape = draw(st.sampled_from(MATRICES))
    args: dict[str, Any] = {"x": draw(arrays(shape)), "rank": draw(st.integers(1, min(shape[-2:])))}
    if shape == (40, 30):
        args["rank"] = draw(st.integers(1, 3))
    if not options:
        args["rtol"] = draw(st.sampled_from([None, 0.5, 0.05]))
        return args
    args["n_oversamples"] = draw(st.integers(0, 3))
    args["n_iter"] = draw(st.sampled_from(["auto", 0, 1, 4]))
    args["method"] = draw(st.sampled_from(["auto", "krylov", "subspace", "gram"]))
    args["center"] = draw(st.sampled_from([False, False, True]))
    args["rng"] = draw(st.sampled_from([0, 7]))
    if draw(st.booleans()):
        args["test_matrix"] = draw(
            arrays((shape[-1], args["rank"] + 1), dtypes=(str(args["x"].dtype),))
        )
    return args


@st.composite
def _tolerance_args(draw: Any) -> dict[str, Any]:
    x = draw(arrays(draw(st.sampled_from(MATRICES))))
    return {"x": x, "rtol": draw(st.sampled_from([0.9, 0.3, 0.02])), "rng": 0}


def _check_svd(args: dict[str, Any], out: Any) -> None:
    given = dense(args["x"])
    U, S, Vh = map(dense, out)
    k = S.shape[-1]
    assert U.dtype == Vh.dtype
    # Singular values of half precision come in single.
    assert S.dtype == (np.float32 if U.dtype.itemsize == 2 else real_dtype(U.dtype))
    eps = 200 * max(given.shape[-2:]) * eps_of(U.dtype)
    for q in (U, np.conj(np.swapaxes(Vh, -1, -2))):
        q = q.astype(complex if q.dtype.kind == "c" else float)
        gram = np.conj(np.swapaxes(q, -1, -2)) @ q
        assert np.all(np.abs(gram - np.eye(k)) <= eps), "not orthonormal"
    A = wide(given)
    if args.get("center"):
        A = A - np.mean(A, axis=-2, keepdims=True)
    unit = np.max(np.abs(wide(given)), axis=(-2, -1), keepdims=True)
    unit = np.where(unit == 0, 1, unit)
    A = (A / unit).astype(complex if A.dtype.kind == "c" else float)
    right = np.linalg.svd(A, compute_uv=False)
    limit = float(np.finfo(S.dtype).max)
    beyond = right[..., :k] * unit[..., 0] > limit / 2
    with np.errstate(all="ignore"):
        S = np.where(beyond, right[..., :k], (wide(S) / unit[..., 0]).astype(float))
    # What is left of equal columns is rounding. Entries below the normal numbers are spaced wider than eps.
    size = 1.0 if args.get("center") else right[..., :1]
    eps = eps * size + 100 * np.finfo(U.dtype).tiny / unit[..., 0].astype(float)
    assert np.all(right[..., :k] + eps >= S), "singular values too large"
    left = np.linalg.norm(
        A - (U.astype(A.dtype) * S[..., None, :]) @ Vh.astype(A.dtype), axis=(-2, -1)
    )
    best = np.sqrt(np.sum(right**2, axis=-1) - np.sum(S**2, axis=-1) * 0)
    if args.get("rtol") is not None:
        capped = args.get("rank") is not None and k == int(args["rank"])
        assert capped or np.all(left <= float(args["rtol"]) * best * 1.001 + eps[..., 0]), (
            "tolerance missed"
        )
    elif args.get("rank") is None or _is_exact(args, given, k):
        assert np.all(np.abs(S - right[..., :k]) <= eps)
        assert np.all(left <= np.sqrt(np.sum(right[..., k:] ** 2, axis=-1)) + 8 * eps[..., 0])
    else:
        assert np.all(left <= best * 1.001 + eps[..., 0])


def _is_exact(args: dict[str, Any], x: Any, k: int) -> bool:
    """Whether the sample fills the short side, or nothing was sampled."""
    if "n_oversamples" not in args:
        return min(x.shape[-2:]) <= 3 * k
    return False


def _add_svd() -> None:
    add(
        "truncated_svd",
        public("truncated_svd"),
        {"x": normal(4, 3), "rank": 2, "rtol": None},
        _svd_args(options=False),
        _check_truncated,
    )
    add(
        "randomized_svd",
        public("randomized_svd"),
        {
            "x": normal(40, 30),
            "rank": 2,
            "rtol": None,
            "n_oversamples": 2,
            "n_iter": "auto",
            "method": "auto",
            "center": False,
            "rng": 0,
            "test_matrix": None,
        },
        _svd_args(options=True),
        _check_svd,
        requests=("n_iter",),
    )
    add(
        "randomized_svd by tolerance",
        public("randomized_svd"),
        {"x": normal(40, 30), "rank": None, "rtol": 0.5, "rng": 0, "method": "auto"},
        _tolerance_args(),
        _check_svd,
        works_on_dask=False,
    )
    add(
        "randomized_eigh",
        public("randomized_eigh"),
        {
            "x": _hermitian(normal(30, 30)),
            "rank": 2,
            "n_oversamples": 2,
            "n_iter": "auto",
            "method": "krylov",
            "rng": 0,
            "test_matrix": None,
        },
        _eigh_args(),
        _check_eigh,
        requests=("n_iter",),
    )
    add(
        "estimate_error",
        public("estimate_error"),
        {"x": normal(4, 3), "approx": (normal(4, 2), normal(2, 3)), "n_probes": 10, "rng": 0},
        _error_args(),
        _check_error,
        requests=("n_probes",),
    )
    add(
        "MatrixOperator",
        _apply_operator,
        {
            "matmat": None,
            "rmatmat": None,
            "shape": (12, 10),
            "like": np.zeros(0),
            "frobenius_norm": 3.0,
            "rtol": None,
        },
        st.fixed_dictionaries(
            {
                "matmat": st.none(),
                "rmatmat": st.none(),
                "shape": st.sampled_from([(12, 10), [12, 10]]),
                "like": arrays((2,), dtypes=("float32", "float64")),
                "frobenius_norm": st.sampled_from([None, 3.0, np.float64(3.0)]),
                "rtol": st.none(),
            }
        ),
        lambda args, out: None,
        names=("rank", "x"),
    )


def _check_truncated(args: dict[str, Any], out: Any) -> None:
    _check_svd(args, out)
    assert (
        args.get("rank") is None
        or args.get("rtol") is not None
        or out.S.shape[-1] == int(args["rank"])
    )


def _hermitian(a: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return (a / 2 + np.conj(np.swapaxes(a, -1, -2)) / 2).astype(a.dtype)


@st.composite
def _eigh_args(draw: Any) -> dict[str, Any]:
    shape = draw(st.sampled_from([(1, 1), (4, 4), (2, 5, 5), (30, 30)]))
    x = draw(arrays(shape).map(_hermitian))
    args = {"x": x, "rank": draw(st.integers(1, min(3, shape[-1]))), "rng": 0}
    args["n_oversamples"] = draw(st.integers(0, 3))
    args["n_iter"] = draw(st.sampled_from(["auto", 0, 1, 4]))
    return args


def _check_eigh(args: dict[str, Any], out: Any) -> None:
    """Orthonormal vectors, Ritz values, and none beyond the singular values."""
    x, (w, V) = dense(args["x"]), map(dense, out)
    eps = 200 * x.shape[-1] * eps_of(V.dtype)
    unit = oracles.unit(wide(x))
    kind = complex if V.dtype.kind == "c" else float
    A, V = (wide(x) / unit).astype(kind), V.astype(kind)
    VH = np.conj(np.swapaxes(V, -1, -2))
    assert np.all(np.abs(VH @ V - np.eye(w.shape[-1])) <= eps)
    assert not np.any(np.isnan(w))
    sizes = np.linalg.svd(A, compute_uv=False)
    # Entries below the normal numbers are spaced wider than eps; values beyond the largest number are infinite.
    eps = eps * sizes[..., :1] + (100 * float(np.finfo(w.dtype).tiny) / unit[..., 0]).astype(float)
    is_beyond = sizes[..., : w.shape[-1]] * unit[..., 0] > float(np.finfo(w.dtype).max) / 2
    with np.errstate(all="ignore"):
        w = (wide(w) / unit[..., 0]).astype(float)
    ritz = np.real(np.diagonal(VH @ A @ V, axis1=-2, axis2=-1))
    assert np.all(is_beyond | (np.abs(w - ritz) <= eps))
    assert np.all(is_beyond | (np.abs(w) <= sizes[..., : w.shape[-1]] + eps))


@st.composite
def _error_args(draw: Any) -> dict[str, Any]:
    shape = draw(st.sampled_from(MATRICES))
    x = draw(arrays(shape))
    k, kind = draw(st.sampled_from([0, 1, 2])), str(x.dtype)
    approx = tuple(
        draw(arrays((*shape[:-2], *s), dtypes=(kind,))) for s in ((shape[-2], k), (k, shape[-1]))
    )
    if draw(st.booleans()):
        real = str(real_dtype(x.dtype))
        approx = (approx[0], np.abs(draw(arrays((*shape[:-2], k), dtypes=(real,)))), approx[1])
    return {"x": x, "approx": approx, "n_probes": draw(st.integers(1, 4)), "rng": 0}


def _check_error(args: dict[str, Any], out: Any) -> None:
    with np.errstate(all="ignore"):
        left, *middle, right = map(wide, args["approx"])
        product = (left * middle[0][..., None, :] if middle else left) @ right
        size = np.linalg.norm(
            (wide(args["x"]) - product).astype(np.clongdouble).view(np.longdouble), axis=(-2, -1)
        )
        parts = np.max(np.abs(left), initial=0) * np.max(np.abs(right), initial=0)
    for norm in out:
        norm = dense(norm)
        limit = float(np.finfo(norm.dtype).max)
        assert not np.any(np.isnan(norm)) or parts > limit / 1e4 or np.max(size) > limit / 1e4
        assert np.all(
            (norm <= 1e4 * size + 1e-2 * parts)
            | np.isnan(norm)
            | (size > limit / 1e4)
            | (parts > limit / 1e4)
        )


def _apply_operator(xp: Any, **args: Any) -> Any:
    """Decompose a diagonal matrix; the products are functions unless they are to be something else."""
    rtol = args.pop("rtol")

    def diagonal(v: Any, n: int = 12) -> Any:
        xp = compat.array_namespace(v)
        if v.shape[0] != 22 - n:
            return v  # of an operator that says it has another shape
        d = xp.astype(to_xp(xp, np.arange(1.0, 11.0)), v.dtype)[:, None]
        if n == 10:
            return d * v[:10, :]
        return xp.concat([d * v, xp.zeros((2, v.shape[1]), dtype=v.dtype)], axis=0)

    args["matmat"] = diagonal if args["matmat"] is None else args["matmat"]
    args["rmatmat"] = (
        functools.partial(diagonal, n=10) if args["rmatmat"] is None else args["rmatmat"]
    )
    return slra.randomized_svd(
        slra.MatrixOperator(**args), 2, rtol=rtol, n_iter=1, n_oversamples=0, rng=0
    )


@st.composite
def _decompose_args(draw: Any, name: str) -> dict[str, Any]:
    shape = draw(st.sampled_from([s for s in MATRICES if len(s) == 2 and max(s) < 40]))
    args: dict[str, Any] = {"x": draw(arrays(shape))}
    if name != "robust_pca":
        args["rank"] = draw(st.integers(1, min(shape)))
    if name == "compress":
        args["density"] = draw(st.sampled_from([0, 0.0, 0.3, 1, 1.0, "auto"]))
        args["n_iter"] = draw(st.integers(0, 3))
    elif name == "robust_pca":
        args |= {"l1": draw(st.sampled_from([None, 0.1, 1, 1e3])), "max_iter": 30, "rng": 0}
    else:
        args["l1"] = draw(floats(0, 1e30))
        args |= {"max_iter": 5, "start": draw(st.sampled_from(["best", "soft", "svd"]))}
    return args


def _check_parts(args: dict[str, Any], out: Any) -> None:
    """No NaN, and infinite only where the sum of squares or the rounded result may be."""
    limit = float(np.finfo(real_dtype(dense(args["x"]).dtype)).max)
    if np.max(np.abs(wide(args["x"])), initial=0) * dense(args["x"]).size < limit / 4:
        # The objective is a square, which may be too large.
        all_finite(args, out[:2] if len(out) == 7 else out)
    else:
        assert not any(is_floating(x) and np.any(np.isnan(dense(x))) for x in out)


def _add_decompositions() -> None:
    for name, base, requests in (
        (
            "compress",
            {"x": normal(4, 3), "rank": 2, "density": 0.3, "n_iter": 2, "per": None},
            ("n_iter",),
        ),
        (
            "robust_pca",
            {
                "x": normal(4, 3),
                "l1": None,
                "mask": None,
                "noise": 0.0,
                "rank": None,
                "frame_axis": None,
                "tol": 1e-3,
                "max_iter": 20,
                "callback": None,
                "rng": 0,
            },
            (),
        ),
        (
            "sparse_low_rank",
            {"x": normal(4, 3), "rank": 2, "l1": 0.1, "start": "best", "tol": 1e-3, "max_iter": 5},
            (),
        ),
    ):
        dask = name == "compress"
        fair = _decompose_args(name)
        add(name, public(name), base, fair, _check_parts, requests=requests, works_on_dask=dask)
    for name, base, fair in (
        (
            "LowRankPlusSparse.__matmul__",
            {"other": normal(5, 2)},
            {"other": arrays((5,), dtypes=FLOATS)},
        ),
        (
            "LowRankPlusSparse.__rmatmul__",
            {"other": normal(2, 4)},
            {"other": arrays((4,), dtypes=FLOATS)},
        ),
        ("LowRankPlusSparse.to_dense", {}, {}),
    ):
        add(
            name,
            _sparse_low_rank(name.partition(".")[2]),
            base,
            st.fixed_dictionaries(fair),
            no_check,
        )


@st.composite
def _complete_args(draw: Any) -> dict[str, Any]:
    shape = draw(st.sampled_from([(3, 4), (6, 6), (2, 4, 3)]))
    args: dict[str, Any] = {"x": draw(arrays(shape)), "rank": draw(st.integers(1, 3))}
    args["mask"] = draw(st.sampled_from([None, np.ones(shape[-1], bool)]))
    args |= {"center": draw(st.booleans()), "l1": draw(st.sampled_from([None, 1e-3, 1, 1e30]))}
    return args | {"max_iter": 5, "rng": 0}


def _check_completion(args: dict[str, Any], out: Any) -> None:
    x, left, right = (dense(a) for a in (args["x"], *out[:2]))
    assert left.dtype == right.dtype
    assert (*left.shape[:-1], right.shape[-1]) == x.shape
    all_finite(args, out[:3])


def _add_completion() -> None:
    base: dict[str, Any] = {"x": normal(5, 4), "rank": 2, "rtol": None, "l1": None, "mask": None}
    base |= {"center": False, "tol": 1e-3, "max_iter": 5, "rng": 0}
    add(
        "complete",
        public("complete"),
        base,
        _complete_args(),
        _check_completion,
        works_on_dask=False,
    )
    for method, args in (
        ("to_dense", {}),
        ("fill", {"x": normal(4, 5), "mask": None}),
        ("at", {"rows": np.asarray([0, 3]), "columns": np.asarray([1, 4])}),
    ):
        add(
            f"CompletionResult.{method}",
            _completed(method),
            args,
            st.fixed_dictionaries({name: st.just(x) for name, x in args.items()}),
            no_check,
            works_on_dask=False,
        )


def _completed(method: str) -> Callable[..., Any]:
    def call(xp: Any, **args: Any) -> Any:
        parts = (to_xp(xp, normal(*shape)) for shape in ((4, 2), (2, 5), (1, 5)))
        result = slra.CompletionResult(*parts, error=0.0, n_iter=1, converged=True)
        return getattr(result, method)(**args)

    return call


def _sparse_low_rank(method: str) -> Callable[..., Any]:
    def call(xp: Any, **args: Any) -> Any:
        small = slra.LowRankPlusSparse(
            to_xp(xp, normal(4, 2)),
            to_xp(xp, normal(2, 5)),
            to_xp(xp, normal(4, 1)),
            to_xp(xp, np.asarray([[0], [1], [4], [2]], dtype="int8")),
        )
        return getattr(small, method)(*args.values())

    return call


def _shrink(x: Any, step: Any) -> Any:
    return slra.prox.prox_l1(x, 0.1 * step)


def _add_solvers() -> None:
    moderate = ("normal", "constant", "zero", "sparse", "tiny", "denormal")
    dtypes = ("float16", "float32", "float64")
    add(
        "proximal_gradient",
        lambda xp, **args: slra.proximal_gradient(**args),
        {
            "x0": normal(3),
            "value_and_grad": _quadratic,
            "prox": _shrink,
            "weight": 1.0,
            "step": None,
            "accelerated": True,
            "tol": 1e-6,
            "atol": 0.0,
            "max_iter": 20,
            "objective": None,
            "callback": None,
            "flatten": None,
            "unflatten": None,
        },
        st.fixed_dictionaries(
            {
                "x0": arrays((3,), dtypes=dtypes, kinds=moderate),
                "value_and_grad": st.just(_quadratic),
                "prox": st.just(_shrink),
                "step": st.sampled_from([None, 0.5, np.float32(0.5), 1]),
                "accelerated": st.booleans(),
                "tol": st.sampled_from([1e-6, 0, None]),
                "max_iter": st.integers(1, 20),
            }
        ),
        _check_solution,
        requests=("max_iter",),
        names=("tau",),  # step * weight, as the operator calls it
        works_on_dask=False,
    )
    add(
        "admm",
        lambda xp, **args: slra.admm(**args),
        {
            "z0": normal(3),
            "solve_x": _solve,
            "prox_z": _shrink,
            "operator": None,
            "adjoint": None,
            "rho": 1.0,
            "relaxation": 1.0,
            "balance": None,
            "tol": 1e-6,
            "atol": 0.0,
            "max_iter": 20,
            "start": None,
            "objective": None,
            "callback": None,
            "flatten": None,
            "unflatten": None,
        },
        st.fixed_dictionaries(
            {
                "z0": arrays((3,), dtypes=dtypes, kinds=moderate),
                "solve_x": st.just(_solve),
                "prox_z": st.just(_shrink),
                "rho": st.sampled_from([1.0, 0.1, 3, np.float64(10)]),
                "relaxation": st.sampled_from([1.0, 1.5, 1]),
                "balance": st.sampled_from([None, 10, 1.0]),
                "tol": st.sampled_from([1e-6, 0, None]),
                "max_iter": st.integers(1, 20),
            }
        ),
        _check_solution,
        requests=("max_iter",),
        works_on_dask=False,
    )
    add(
        "primal_dual",
        lambda xp, **args: slra.primal_dual(**args),
        {
            "x0": normal(3),
            "value_and_grad": _quadratic,
            "prox_f": _shrink,
            "prox_gconj": _shrink,
            "K": _itself,
            "KT": _itself,
            "steps": None,
            "tol": 1e-6,
            "atol": 0.0,
            "max_iter": 20,
            "start": None,
            "objective": None,
            "callback": None,
            "flatten": None,
            "unflatten": None,
        },
        st.fixed_dictionaries(
            {
                "x0": arrays((3,), dtypes=dtypes, kinds=moderate),
                "value_and_grad": st.sampled_from([_quadratic, None]),
                "prox_f": st.sampled_from([_shrink, None]),
                "prox_gconj": st.just(_shrink),
                "K": st.just(_itself),
                "KT": st.just(_itself),
                "steps": st.sampled_from([None, (0.5, 0.5), (0.1, 1)]),
                "tol": st.sampled_from([1e-6, 0, None]),
                "max_iter": st.integers(1, 20),
            }
        ),
        _check_solution,
        requests=("max_iter",),
        works_on_dask=False,
    )


def _itself(x: Any) -> Any:
    return x


def _quadratic(x: Any) -> tuple[Any, Any]:
    """Half the squared distance to one, and its gradient."""
    xp = compat.array_namespace(x)
    with np.errstate(all="ignore"):
        move = x - 1.0
        return 0.5 * xp.sum(xp.abs(move * move)), move


def _solve(v: Any, rho: Any) -> Any:
    with np.errstate(all="ignore"):
        return (1.0 + rho * v) / (1.0 + rho)


def _check_solution(args: dict[str, Any], out: Any) -> None:
    name = "x0" if "x0" in args else "z0"
    # What these solvers square has to stay in range.
    # And a step beyond 1/L may lead anywhere.
    if args.get("step") is not None and np.any(wide(args["step"]) > 1):
        return
    if is_finite({name: args[name]}) and np.all(np.abs(wide(args[name])) < 1e10):
        assert np.all(np.isfinite(dense(out.x)))
        assert not np.any(np.isnan(dense(out.residual)))


_add_svd()
_add_decompositions()
_add_completion()
_add_solvers()
