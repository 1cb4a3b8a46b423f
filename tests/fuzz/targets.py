"""The table: every public callable, arguments it must answer, and how its answer is checked.

A target's function takes the namespace and arguments by name. ``base`` are arguments that it answers, of which the
sweep replaces one at a time; ``fair`` draws others that it must answer too.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_compat as compat
import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

import slra
from tests.backends import to_xp
from tests.fuzz import oracles
from tests.fuzz.oracles import close, dense, eps_of, real_dtype, wide
from tests.fuzz.strategies import FLOATS, arrays, floats

__all__ = ["TARGETS", "Target"]

SHAPES = ((), (1,), (4,), (0,), (3, 4), (1, 5), (2, 3, 4))
MATRICES = ((1, 1), (1, 5), (5, 1), (4, 3), (3, 4), (2, 4, 3), (6, 6), (40, 30))


@dataclass(frozen=True)
class Target:
    """A public callable."""

    name: str
    function: Callable[..., Any]
    base: dict[str, Any]
    fair: Any
    check: Callable[[dict[str, Any], Any], None]
    # Arguments whose huge values are a legitimate request for as much time or memory.
    requests: tuple[str, ...] = ()
    # What a message may name instead of an argument.
    names: tuple[str, ...] = ()
    works_on_dask: bool = True


TARGETS: dict[str, Target] = {}


def _add(
    name: str, function: Any, base: dict[str, Any], fair: Any, check: Any, **options: Any
) -> None:
    TARGETS[name] = Target(name, function, base, fair, check, **options)


def _public(name: str, owner: Any = slra) -> Callable[..., Any]:
    """The function as it is at the time of the call, for the fixtures that wrap it."""
    return lambda xp, **args: getattr(owner, name)(**args)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def _is_finite(args: dict[str, Any]) -> bool:
    return all(np.all(np.isfinite(dense(x))) for x in args.values() if _is_floating(x))


def _is_floating(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape") and dense(x).dtype.kind in "fc"


def _same_kind(args: dict[str, Any], out: Any, dtype: Any) -> None:
    assert type(out).__module__.partition(".")[0] == type(args["x"]).__module__.partition(".")[
        0
    ] or isinstance(out, (np.ndarray, np.generic)), type(out)
    assert dense(out).dtype == np.dtype(dtype).newbyteorder("="), (dense(out).dtype, dtype)


# Proximal operators and norms


def _positive(a: np.ndarray) -> np.ndarray:
    """Moduli; an array of no dimensions stays one."""
    return np.asarray(np.abs(a))


def _tau(shape: tuple[int, ...], dtype: str, limit: float = 1e30) -> Any:
    """Thresholds for ``x``: numbers, and arrays that broadcast to it."""
    real = str(real_dtype(dtype))
    return st.one_of(
        floats(0, limit),
        arrays(shape, dtypes=(real,)).map(_positive),
        arrays((), dtypes=(real,)).map(_positive),
    )


@st.composite
def _prox_args(draw: Any, name: str) -> dict[str, Any]:
    shape = draw(st.sampled_from(MATRICES if name in NEEDS_MATRIX else SHAPES))
    if name in ALONG and (not shape or 0 in shape):
        shape = (4,)
    kinds = FLOATS if name in REAL else (*FLOATS, "complex64", "complex128")
    x = draw(arrays(shape, dtypes=kinds))
    args: dict[str, Any] = {"x": x}
    limit = 1e300 if real_dtype(x.dtype) == np.float64 else 1e30
    if name in ALONG:
        axes = st.integers(-len(shape), len(shape) - 1)
        if name in NEEDS_MATRIX:
            axes = st.sampled_from([-1, -2])
        args["axis"] = axis = draw(axes)
        reduced = tuple(1 if i == axis % len(shape) else n for i, n in enumerate(shape))
        if name == "prox_l21":
            reduced = tuple(1 if i >= len(shape) - 2 else n for i, n in enumerate(shape))
            reduced = tuple(1 if i == axis % len(shape) else n for i, n in enumerate(shape))
        shape = reduced
    if name == "prox_nuclear":
        shape = (*shape[:-2], 1, 1)
    if name.startswith("prox"):
        args["tau"] = draw(_tau(shape, x.dtype, limit))
    elif name in ("project_l1_ball", "project_l2_ball", "project_simplex"):
        args["radius"] = draw(_tau(shape, x.dtype, limit))
    for option in OPTIONS.get(name, ()):
        least = 1e-30 if option == "delta" else 0.0
        args[option] = draw(floats(least, limit))
    if name == "project_box":
        low, high = sorted(float(draw(floats(-limit, limit))) for _ in range(2))
        args |= {"lo": low, "hi": high}
    if name == "project_rank":
        args["rank"] = draw(st.integers(1, min(shape[-2:])))
    return args


@st.composite
def _norm_args(draw: Any, name: str) -> dict[str, Any]:
    shape = draw(st.sampled_from(MATRICES if name in NEEDS_MATRIX else SHAPES))
    if name in ALONG and (not shape or 0 in shape):
        shape = (4,)
    kinds = FLOATS if name in REAL else (*FLOATS, "complex64", "complex128")
    x = draw(arrays(shape, dtypes=kinds))
    args: dict[str, Any] = {"x": x}
    limit = 1e300 if real_dtype(x.dtype) == np.float64 else 1e30
    for option in OPTIONS.get(name, ()):
        args[option] = draw(floats(1e-30 if option == "delta" else 0.0, limit))
    axes = list(range(-len(shape), len(shape)))
    if name == "norm_l21":
        args["axis"] = draw(st.sampled_from([-1, -2]))
    elif name in ALONG:
        args["axis"] = draw(st.sampled_from(axes))
    elif name != "norm_nuclear":
        args["axis"] = draw(
            st.sampled_from([None, *axes, *([(0, 1), (-1,)] if len(shape) > 1 else [])])
        )
    return args


ALONG = {
    "prox_l2",
    "prox_l21",
    "prox_linf",
    "project_l1_ball",
    "project_l2_ball",
    "project_simplex",
}
ALONG |= {"norm_l2", "norm_l21", "norm_linf"}
NEEDS_MATRIX = {"prox_nuclear", "norm_nuclear", "project_rank", "prox_l21", "norm_l21"}
REAL = {"prox_nonneg_l1", "norm_nonneg_l1", "project_box", "project_simplex"}
OPTIONS = {
    "prox_elastic_net": ("l2",),
    "norm_elastic_net": ("l2",),
    "prox_huber": ("delta",),
    "norm_huber": ("delta",),
}
SPECTRAL = {"prox_nuclear", "project_rank", "norm_nuclear"}


def _check_prox(name: str, args: dict[str, Any], out: Any) -> None:
    x = dense(args["x"])
    _same_kind(args, out, x.dtype)
    assert tuple(out.shape) == x.shape
    if not _is_finite(args):
        return
    numbers = {
        n: wide(a) for n, a in args.items() if n not in ("x", "axis", "rank", "warm_start", "rng")
    }
    given = {"axis": args["axis"]} if "axis" in args else {}
    if name == "prox_l0":
        _check_l0(x, numbers["tau"], out)
        return
    with np.errstate(all="ignore"):
        if name == "project_rank":
            _check_rank(x, int(args["rank"]), out)
            return
        right = oracles.prox[name](wide(x), **numbers, **given)
    size = np.abs(wide(x))
    scale, factor = np.maximum(size, np.abs(right)), 32.0
    if name in SPECTRAL:
        scale, factor = np.max(size, axis=(-2, -1), keepdims=True) + 0 * size, 64.0 * max(x.shape)
    elif "axis" in args or name in ALONG:
        # Sums over all of a group go into each entry.
        scale = np.max(size, initial=0) + np.max(np.abs(right), initial=0) + 0 * size
        factor = 64.0 * max(1, x.size)
    close(out, right, scale, factor)


def _check_rank(x: Any, rank: int, out: Any) -> None:
    """The distance is the least there is; where singular values are equal several matrices have it."""
    unit = oracles.unit(wide(x))
    kind = complex if x.dtype.kind == "c" else float
    a, b = ((wide(y) / unit).astype(kind) for y in (x, out))
    S, eps = np.linalg.svd(a, compute_uv=False), 64 * max(x.shape) * eps_of(x.dtype)
    # Entries below the normal numbers are spaced wider than eps.
    eps = (
        eps
        + x.size
        * (float(np.finfo(real_dtype(x.dtype)).smallest_subnormal) / unit).astype(float).max()
    )
    tail = np.sqrt(np.sum(S[..., rank:] ** 2, axis=-1))
    assert np.all(np.linalg.norm(a - b, axis=(-2, -1)) <= tail + eps * S[..., 0] + eps)
    assert np.all(np.linalg.svd(b, compute_uv=False)[..., rank:] <= eps * S[..., :1] + eps)


def _check_l0(x: Any, tau: Any, out: Any) -> None:
    """Entries are kept or zero, whichever costs less."""
    out, size, cut = dense(out), np.abs(wide(x)), np.sqrt(2 * tau)
    assert np.all((out == x) | (out == 0))
    near = np.abs(size - cut) <= 16 * eps_of(x.dtype) * cut + 8 * np.sqrt(
        np.finfo(real_dtype(x.dtype)).tiny
    )
    assert np.all(near | ((out == 0) == (size <= cut)) | (x == 0))


def _check_norm(name: str, args: dict[str, Any], out: Any) -> None:
    x = dense(args["x"])
    dtype = real_dtype(x.dtype)
    _same_kind(args, out, "float32" if dtype == np.float16 else dtype)
    if not _is_finite(args):
        return
    axis = {"axis": _hashable(args["axis"])} if "axis" in args else {}
    numbers = {n: wide(a) for n, a in args.items() if n not in ("x", "axis")}
    with np.errstate(all="ignore"):
        right = oracles.value[name](wide(x), **numbers, **axis)
        scale = np.sum(np.abs(wide(x))) if name in SPECTRAL else np.abs(right)
    close(out, right, scale + 0 * np.abs(right), 64.0 * max(1, x.size))


def _hashable(axis: Any) -> Any:
    return None if axis is None else tuple(map(int, axis)) if isinstance(axis, tuple) else int(axis)


def _add_prox() -> None:
    for name in slra.prox.__all__:
        base: dict[str, Any] = {"x": normal(3, 4)}
        if name in ALONG:
            base["axis"] = -1
        elif name.startswith("norm") and name != "norm_nuclear":
            base["axis"] = None
        if name.startswith("prox"):
            base["tau"] = 0.5
        elif name in ("project_l1_ball", "project_l2_ball", "project_simplex"):
            base["radius"] = 1.0
        base |= dict.fromkeys(OPTIONS.get(name, ()), 0.5)
        base |= {"lo": -1.0, "hi": 1.0} if name == "project_box" else {}
        base |= {"rank": 2} if name == "project_rank" else {}
        is_norm = name.startswith("norm")
        fair = _norm_args(name) if is_norm else _prox_args(name)
        check = functools.partial(_check_norm if is_norm else _check_prox, name)
        _add(name, _public(name, slra.prox), base, fair, check)
    known = TARGETS["prox_l1"]
    _add("soft_threshold", _public("soft_threshold"), known.base, known.fair, known.check)
    known = TARGETS["prox_nuclear"]
    _add(
        "prox_nuclear with options",
        lambda xp, **args: slra.prox.prox_nuclear(**args),
        {
            "x": normal(120, 110),
            "tau": 9.0,
            "warm_start": normal(2, 110),
            "return_factors": False,
            "rng": 0,
        },
        st.fixed_dictionaries(
            {
                "x": arrays((120, 110), dtypes=("float32", "float64")),
                "tau": floats(0, 1e30),
                "warm_start": st.one_of(st.none(), arrays((3, 110), dtypes=("float32", "float64"))),
                "rng": st.sampled_from([0, None]),
            }
        ),
        _check_nuclear_options,
    )


def _check_nuclear_options(args: dict[str, Any], out: Any) -> None:
    args = {name: x for name, x in args.items() if name != "rng"}
    if args.get("return_factors"):
        U, S, Vh = map(dense, out)
        out = (U * S[..., None, :]) @ Vh
    dtype = dense(args["x"]).dtype
    if args.get("warm_start") is not None:
        dtype = np.result_type(dtype, dense(args["warm_start"]).dtype)
    x = dense(args["x"]).astype(dtype)
    _check_prox("prox_nuclear", {"x": x, "tau": args["tau"]}, dense(out).astype(dtype))


# Singular values


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
    assert S.dtype == real_dtype(U.dtype)
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
    # Entries below the normal numbers are spaced wider than eps.
    eps = eps * right[..., :1] + 100 * np.finfo(U.dtype).tiny / unit[..., 0].astype(float)
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
    _add(
        "truncated_svd",
        _public("truncated_svd"),
        {"x": normal(4, 3), "rank": 2, "rtol": None},
        _svd_args(options=False),
        _check_truncated,
    )
    _add(
        "randomized_svd",
        _public("randomized_svd"),
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
    _add(
        "randomized_svd by tolerance",
        _public("randomized_svd"),
        {"x": normal(40, 30), "rank": None, "rtol": 0.5, "rng": 0, "method": "auto"},
        _tolerance_args(),
        _check_svd,
        works_on_dask=False,
    )
    _add(
        "randomized_eigh",
        _public("randomized_eigh"),
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
    _add(
        "estimate_error",
        _public("estimate_error"),
        {"x": normal(4, 3), "approx": (normal(4, 2), normal(2, 3)), "n_probes": 10, "rng": 0},
        _error_args(),
        _check_error,
        requests=("n_probes",),
    )
    _add(
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
    x, (w, V) = dense(args["x"]), map(dense, out)
    eps = 200 * x.shape[-1] * eps_of(V.dtype)
    V = V.astype(complex if V.dtype.kind == "c" else float)
    assert np.all(np.abs(np.conj(np.swapaxes(V, -1, -2)) @ V - np.eye(w.shape[-1])) <= eps)
    largest = np.max(np.abs(wide(x)), axis=(-2, -1), initial=0)[..., None] * x.shape[-1]
    assert not np.any(np.isnan(w))
    with np.errstate(all="ignore"):
        tiny = 100 * float(np.finfo(w.dtype).tiny)
        assert np.all(
            (np.abs(wide(w)) <= largest * 1.01 + tiny) | (largest > float(np.finfo(w.dtype).max))
        )


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


# Decompositions and solvers


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


def _all_finite(args: dict[str, Any], out: Any) -> None:
    """No NaN from finite input, and no infinity."""
    if not _is_finite(args):
        return
    for x in out if isinstance(out, tuple) else (out,):
        if _is_floating(x):
            assert np.all(np.isfinite(dense(x))), "not finite"


def _check_parts(args: dict[str, Any], out: Any) -> None:
    """No NaN, and infinite only where the sum of squares or the rounded result may be."""
    limit = float(np.finfo(real_dtype(dense(args["x"]).dtype)).max)
    if np.max(np.abs(wide(args["x"])), initial=0) * dense(args["x"]).size < limit / 4:
        # The objective is a square, which may be too large.
        _all_finite(args, out[:2] if len(out) == 7 else out)
    else:
        assert not any(_is_floating(x) and np.any(np.isnan(dense(x))) for x in out)


def _add_decompositions() -> None:
    for name, base, requests in (
        ("compress", {"x": normal(4, 3), "rank": 2, "density": 0.3, "n_iter": 2}, ("n_iter",)),
        (
            "robust_pca",
            {"x": normal(4, 3), "l1": None, "mask": None, "tol": 1e-3, "max_iter": 20, "rng": 0},
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
        _add(name, _public(name), base, fair, _check_parts, requests=requests, works_on_dask=dask)
    for name, base, fair in (
        (
            "SparseLowRank.__matmul__",
            {"other": normal(5, 2)},
            {"other": arrays((5,), dtypes=FLOATS)},
        ),
        (
            "SparseLowRank.__rmatmul__",
            {"other": normal(2, 4)},
            {"other": arrays((4,), dtypes=FLOATS)},
        ),
        ("SparseLowRank.to_dense", {}, {}),
    ):
        _add(
            name,
            _sparse_low_rank(name.partition(".")[2]),
            base,
            st.fixed_dictionaries(fair),
            _ignore,
        )


def _ignore(args: dict[str, Any], out: Any) -> None:
    """Shapes and values are tested elsewhere: here it is enough that there is an answer."""


def _sparse_low_rank(method: str) -> Callable[..., Any]:
    def call(xp: Any, **args: Any) -> Any:
        small = slra.SparseLowRank(
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
    _add(
        "proximal_gradient",
        lambda xp, **args: slra.proximal_gradient(**args),
        {
            "x0": normal(3),
            "value_and_grad": _quadratic,
            "prox": _shrink,
            "step": None,
            "accelerated": True,
            "tol": 1e-6,
            "max_iter": 20,
            "objective": None,
            "callback": None,
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
        works_on_dask=False,
    )
    _add(
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
            "max_iter": 20,
            "objective": None,
            "callback": None,
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
    if _is_finite({name: args[name]}) and np.all(np.abs(wide(args[name])) < 1e10):
        assert np.all(np.isfinite(dense(out.x)))
        assert not np.any(np.isnan(dense(out.residual)))


# Attention

ATTENTION = {
    "mask": None,
    "is_causal": False,
    "causal_align": "bottom_right",
    "scale": None,
    "enable_gqa": False,
    "softcap": None,
}


@st.composite
def _qkv(draw: Any, *, leads: Any = ((), (2,), (2, 3))) -> dict[str, Any]:
    lead = draw(st.sampled_from(leads))
    n, m, d, e = (draw(st.integers(1, 5)) for _ in range(4))
    kinds = draw(st.sampled_from([NASTY, ("normal",), ("normal",)]))
    dtypes = draw(st.sampled_from([("float64",), ("float32",), FLOATS]))
    shapes = {"q": (*lead, n, d), "k": (*lead, m, d), "v": (*lead, m, e)}
    return {name: draw(arrays(shape, dtypes=dtypes, kinds=kinds)) for name, shape in shapes.items()}


NASTY = (
    "normal",
    "constant",
    "zero",
    "negative zero",
    "rank one",
    "sparse",
    "tiny",
    "denormal",
    "huge",
)


@st.composite
def _options(draw: Any, q: Any, k: Any) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["is_causal"] = draw(st.sampled_from([True, np.True_, False]))
        options["causal_align"] = draw(st.sampled_from(["bottom_right", "top_left"]))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0, 0.0, -1.0, 1e-30, 0.5, np.float32(2), 100]))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([1e-30, 0.1, 1, 50.0, 1e30]))
    kind = draw(st.sampled_from([None, "bool", "float32", "float64", "-inf"]))
    shape = draw(st.sampled_from([(q.shape[-2], k.shape[-2]), (1, k.shape[-2]), (1, 1)]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    if kind == "bool":
        options["mask"] = rng.random(shape) < 0.5
    elif kind == "-inf":
        options["mask"] = np.where(rng.random(shape) < 0.5, -np.inf, 0.0).astype(q.dtype)
    elif kind is not None:
        options["mask"] = rng.standard_normal(shape).astype(kind)
    return options


@st.composite
def _attention_args(draw: Any, **more: Any) -> dict[str, Any]:
    args = draw(_qkv())
    args |= draw(_options(args["q"], args["k"]))
    return args | {name: draw(strategy) for name, strategy in more.items()}


def _options_of(args: dict[str, Any]) -> dict[str, Any]:
    return {name: args[name] for name in ATTENTION if name in args}


def _check_attention(args: dict[str, Any], out: Any) -> None:
    q, k, v = (args[name] for name in "qkv")
    lse = None
    if isinstance(out, tuple):
        out, lse = out
    dtype = np.result_type(*(dense(x).dtype for x in (q, k, v)))
    assert dense(out).dtype == dtype
    if not _is_finite({"q": q, "k": k, "v": v}) or not oracles.in_range(q, k, v, args):
        return
    mask = args.get("mask")
    if (
        mask is not None
        and _is_floating(mask)
        and np.any(np.isnan(dense(mask)) | (dense(mask) > 1e30))
    ):
        return
    right, right_lse, _ = oracles.naive(q, k, v, _options_of(args))
    # Errors of the scores become relative errors of the weights.
    work = np.result_type(dtype, "float32")
    with np.errstate(all="ignore"):
        products = (
            np.max(np.abs(wide(q)) @ np.swapaxes(np.abs(wide(k)), -1, -2))
            if dense(q).shape[:-2] == dense(k).shape[:-2]
            else np.max(np.abs(wide(q))) * np.max(np.abs(wide(k))) * dense(q).shape[-1]
        )
        scale = args.get("scale")
        size = 1 + products * (1 if scale is None else abs(float(scale)))
        if mask is not None and _is_floating(mask):
            size = size + np.max(np.abs(np.where(np.isinf(dense(mask)), 0, dense(mask))), initial=0)
        spread = min(1.0, float(64 * size * np.finfo(work).eps)) + 4 * float(np.finfo(dtype).eps)
        largest = float(np.max(np.abs(wide(v))))
    error = np.abs(wide(out) - right)
    assert not np.any(np.isnan(dense(out))), "NaN from finite input"
    assert np.all(error <= 4 * spread * largest + 16 * float(np.finfo(dtype).tiny)), np.max(error)
    if lse is not None:
        lse = dense(lse)
        assert np.array_equal(np.isinf(lse), np.isinf(right_lse))
        gap = np.abs(
            np.where(np.isinf(lse), 0, wide(lse)) - np.where(np.isinf(right_lse), 0, right_lse)
        )
        assert np.all(gap <= 64 * size * float(np.finfo(work).eps) * 4 + float(np.finfo(work).tiny))


def _vjp_args_of(args: dict[str, Any], seed: int = 1) -> dict[str, Any]:
    """Add an output that belongs to the arguments, and a gradient."""
    q, k, v = (args[name] for name in "qkv")
    dtype = np.result_type(q, k, v, np.float32)
    with np.errstate(all="ignore"):
        out, lse, _ = oracles.naive(q, k, v, _options_of(args))
        out, lse = out.astype(dtype), lse.astype(dtype)
    return args | {"out": out, "lse": lse, "grad_out": normal(*out.shape, seed=seed).astype(dtype)}


@st.composite
def _vjp_args(draw: Any) -> dict[str, Any]:
    args = draw(_qkv(leads=((), (2,))))
    if any(np.max(np.abs(wide(x))) > 1e3 for x in args.values()):
        args = {name: np.sign(x).astype(x.dtype) for name, x in args.items()}
    args |= draw(_options(args["q"], args["k"]))
    args = _vjp_args_of(args, draw(st.integers(0, 9)))
    if draw(st.booleans()):
        args["grad_lse"] = np.ones_like(args["lse"])
    return args


def _check_vjp(args: dict[str, Any], out: Any) -> None:
    q, k, v = (dense(args[name]) for name in "qkv")
    dtype = np.result_type(q, k, v)
    for gradient, x in zip(out, (q, k, v), strict=True):
        assert dense(gradient).shape == x.shape
        assert dense(gradient).dtype == dtype
    if args.get("enable_gqa") or not (q.shape[:-2] == k.shape[:-2] == v.shape[:-2]):
        return
    floating = [
        dense(x) for name, x in args.items() if name not in ("lse", "mask") and _is_floating(x)
    ]
    if (
        not all(np.all(np.isfinite(x)) for x in floating)
        or max(np.max(np.abs(x)) for x in floating) > 1e4
    ):
        return
    lse, mask = dense(args["lse"]), args.get("mask")
    if mask is not None and _is_floating(mask) and np.any(dense(mask) > 1e3):
        return
    with np.errstate(all="ignore"):
        _, own, _ = oracles.naive(q, k, v, _options_of(args))
        if not np.allclose(own.astype(float), lse.astype(float), atol=1e-3):
            return  # weights that do not sum to one, and may overflow
    right = oracles.naive_vjp(args)
    size = np.prod([1 + float(np.max(np.abs(x))) for x in (q, k, v, dense(args["grad_out"]))])
    size *= 1 + abs(float(args["scale"])) if args.get("scale") is not None else 1
    eps = float(np.finfo(np.result_type(dtype, "float32")).eps) * 1000 * size * 25 * q.shape[-1]
    narrow = 4 * float(np.finfo(dtype).eps) * size * 25
    if args.get("softcap") is not None and float(args["softcap"]) < 1e-3:
        return  # the derivative at zero is a spike
    for gradient, exact in zip(out, right, strict=True):
        assert np.all(np.abs(wide(gradient) - exact) <= eps + narrow), np.max(
            np.abs(wide(gradient) - exact)
        )


def _finite_attention(args: dict[str, Any], out: Any) -> None:
    """No NaN where exact attention has none, and maps have room."""
    q, k, v = (args[name] for name in "qkv")
    if not _is_finite({"q": q, "k": k, "v": v}) or not oracles.in_range(q, k, v, args, room=1e9):
        return
    mask = args.get("mask")
    if (
        mask is not None
        and _is_floating(mask)
        and np.any(np.isnan(dense(mask)) | (dense(mask) > 1e30))
    ):
        return
    for x in out if isinstance(out, tuple) else (out,):
        assert not np.any(np.isnan(dense(x))), "NaN from finite input"


LOW_RANK = {
    "rank": 2,
    "rtol": None,
    "method": "output",
    "l1": 0.0,
    "n_exact": 0,
    "basis": None,
    **ATTENTION,
}


@st.composite
def _low_rank_args(draw: Any, *, fit: bool = False) -> dict[str, Any]:
    args = draw(_attention_args())
    assume(oracles.in_range(args["q"], args["k"], args["v"], args, room=1e9))
    (n, d), (m, e) = args["q"].shape[-2:], args["v"].shape[-2:]
    limits = min(n, m, d), min(m, e)
    args["method"] = draw(st.sampled_from(["output", "joint", "svd"]))
    choice = draw(st.sampled_from(["int", "pair", "rtol"]))
    if choice == "int":
        args["rank"] = draw(st.integers(1, min(limits)))
    elif choice == "pair":
        args["rank"] = tuple(draw(st.integers(1, limit)) for limit in limits)
    else:
        args["rtol"] = draw(st.sampled_from([1e-3, 0.5, 2.0]))
    if fit:
        args["pool_batch"] = draw(st.booleans())
    elif choice != "rtol":
        args["n_exact"] = draw(st.integers(0, m - 1))
        if args["method"] == "svd" and not args["n_exact"]:
            args["l1"] = draw(st.sampled_from([0.0, 0.1, (0, 1.0, 0.1)]))
    return args


def _check_basis(args: dict[str, Any], basis: Any) -> None:
    if not _is_finite({name: args[name] for name in "qkv"}):
        return
    if not oracles.in_range(args["q"], args["k"], args["v"], args, room=1e9):
        return
    for name in ("wq", "wk", "wv", "uv", "c", "mu", "error"):
        assert not np.any(np.isnan(dense(getattr(basis, name)))), f"NaN in {name}"
    assert np.all(dense(basis.error) >= 0)


@functools.cache
def _basis(xp: Any) -> Any:
    q, k, v = (to_xp(xp, x) for x in normal(3, 2, 6, 4))
    return slra.fit_attention(q, k, v, 2)


def _of_basis(method: str) -> Callable[..., Any]:
    return lambda xp, **args: getattr(_basis(xp), method)(**args)


def _add_attention() -> None:
    q, k, v = normal(3, 2, 6, 4)
    qkv = {"q": q, "k": k, "v": v}
    _add(
        "attention",
        _public("attention"),
        {**qkv, **ATTENTION, "return_lse": True},
        _attention_args(return_lse=st.booleans()),
        _check_attention,
    )
    _add(
        "attention_vjp",
        _public("attention_vjp"),
        {**_vjp_args_of(qkv), "grad_lse": None, **ATTENTION},
        _vjp_args(),
        _check_vjp,
    )
    outs, lses = [normal(2, 6, 4), normal(2, 6, 4, seed=1)], [normal(2, 6), normal(2, 6, seed=1)]
    _add(
        "merge_attention",
        _public("merge_attention"),
        {"outs": outs, "lses": lses},
        st.fixed_dictionaries(
            {
                "outs": st.lists(
                    arrays((3, 2), dtypes=FLOATS, kinds=NASTY), min_size=2, max_size=2
                ),
                "lses": st.lists(arrays((3,), dtypes=FLOATS), min_size=2, max_size=2),
            }
        ),
        _check_merge,
    )
    fit = {"rank": 2, "rtol": None, "method": "output", "pool_batch": False, "rng": None}
    _add(
        "fit_attention",
        _public("fit_attention"),
        {**qkv, **fit, **ATTENTION},
        _low_rank_args(fit=True),
        _check_basis,
    )
    names = ("kernel",)
    _add(
        "low_rank_attention",
        _public("low_rank_attention"),
        {**qkv, **LOW_RANK, "return_lse": False},
        _low_rank_args(),
        _finite_attention,
        names=names,
    )
    _add(
        "low_rank_attention by baselines",
        _public("low_rank_attention"),
        {**qkv, "rank": 2, "n_exact": 1, "method": "topk"},
        st.one_of(
            st.fixed_dictionaries(
                {
                    "method": st.just("topk"),
                    "n_exact": st.integers(1, 5),
                    "rank": st.integers(1, 4),
                    **_fixed_qkv(),
                }
            ),
            st.fixed_dictionaries(
                {
                    "method": st.sampled_from(["nystrom", "linformer", "favor"]),
                    "rank": st.integers(1, 6),
                    **_fixed_qkv(),
                }
            ),
        ),
        _finite_attention,
        requests=("rank",),
    )
    _add(
        "low_rank_attention_vjp",
        _public("low_rank_attention_vjp"),
        {**_vjp_args_of(qkv), "grad_lse": None, **LOW_RANK},
        st.fixed_dictionaries({**_fixed_qkv(), "rank": st.integers(1, 4)}).map(_vjp_args_of),
        _ignore,
    )
    fixed = _fixed_qkv()
    _add(
        "AttentionBasis.attend",
        _of_basis("attend"),
        {**qkv, **ATTENTION, "return_lse": False},
        st.fixed_dictionaries(fixed),
        _finite_attention,
    )
    _add(
        "AttentionBasis.project",
        _of_basis("project"),
        qkv,
        st.fixed_dictionaries(fixed),
        _finite_attention,
    )
    weights = {
        "w_q": normal(2, 3, 4),
        "w_k": normal(2, 3, 4),
        "w_v": normal(2, 3, 4),
        "w_o": normal(2, 4, 3),
    }
    biases = {
        "b_q": normal(2, 1, 4),
        "b_k": normal(2, 1, 4),
        "b_v": normal(2, 1, 4),
        "b_o": normal(3),
    }
    fair = {
        name: arrays(x.shape, dtypes=FLOATS, kinds=("normal", "zero", "tiny"))
        for name, x in weights.items()
    }
    fair |= {
        name: st.one_of(st.none(), arrays(x.shape, dtypes=FLOATS, kinds=("normal",)))
        for name, x in biases.items()
    }
    _add(
        "AttentionBasis.fold",
        _of_basis("fold"),
        {**weights, **biases},
        st.fixed_dictionaries(fair),
        _all_finite,
    )
    _add(
        "low_rank_attention on a made basis",
        lambda xp, **args: slra.low_rank_attention(
            *(to_xp(xp, x) for x in normal(3, 2, 6, 4)), basis=slra.AttentionBasis(**args)
        ),
        _basis_parts(),
        st.just(_basis_parts()),
        _ignore,
        names=("basis",),
    )


def _basis_parts() -> dict[str, Any]:
    import array_api_compat.numpy as xp

    basis = _basis(xp)
    return {name: getattr(basis, name) for name in basis.__dataclass_fields__}


def _fixed_qkv() -> dict[str, Any]:
    """Of the shapes of the base, and in range."""
    moderate = ("normal", "constant", "zero", "negative zero", "sparse", "tiny", "denormal")
    dtypes = ("float32", "float64")
    return {name: arrays((2, 6, 4), dtypes=dtypes, kinds=moderate) for name in "qkv"}


def _check_merge(args: dict[str, Any], out: Any) -> None:
    merged, lse = map(dense, out)
    inputs = [dense(x) for x in (*args["outs"], *args["lses"])]
    if all(np.all(np.isfinite(x)) for x in inputs):
        limit = float(np.finfo(merged.dtype).max)
        if (
            max(
                np.max(np.abs(x.astype(np.longdouble)), initial=0)
                for x in inputs[: len(args["outs"])]
            )
            < limit / 2
        ):
            assert np.all(np.isfinite(merged))
        assert not np.any(np.isnan(lse))


# The objective


def _add_objective() -> None:
    known = {"q": normal(2, 3), "k": normal(2, 3), "v": normal(4), "l1": 0.5}
    fair = {name: arrays((2, 3), dtypes=FLOATS) for name in "qkv"}
    weights = st.one_of(floats(0, 6e4), st.tuples(*[floats(0, 6e4)] * 3))
    for name in slra.objective.__all__:
        base: dict[str, Any] = dict(known)
        drawn = {**fair, "l1": weights}
        if name == "combined_objective":
            base = {"task": 1.0, **base}
            drawn = {"task": st.sampled_from([0, 1.5, -2.0, np.float64(1)]), **drawn}
        elif name == "l1_penalty_prox":
            base["step"] = 1.0
            drawn["step"] = st.sampled_from([0, 1, 0.5, 1e-30])
        _add(
            name,
            _public(name, slra.objective),
            base,
            st.fixed_dictionaries(drawn),
            functools.partial(_check_penalty, name),
        )


def _check_penalty(name: str, args: dict[str, Any], out: Any) -> None:
    if not _is_finite({n: args[n] for n in "qkv"}):
        return
    weights = args["l1"] if isinstance(args["l1"], (tuple, list)) else (args["l1"],) * 3
    weights = [np.longdouble(float(w)) for w in weights]
    q, k, v = (wide(args[n]) for n in "qkv")
    if name in ("l1_penalty", "combined_objective"):
        parts = [w * np.sum(np.abs(x)) for w, x in zip(weights, (q, k, v), strict=True)]
        sums = [np.sum(np.abs(x)) for x in (q, k, v)]
        if max(sums) > float(np.finfo("float32").max) / 4 or max(map(float, weights)) > 1e29:
            assert not np.any(np.isnan(dense(out)))
            return
        task = np.longdouble(float(args.get("task", 0)))
        narrowest = max(
            eps_of(dense(args[n]).dtype)
            if dense(args[n]).dtype != np.float16
            else eps_of("float32")
            for n in "qkv"
        )
        right = sum(parts) + task
        allowed = 200 * narrowest * (sum(parts) + abs(task)) + 16 * float(np.finfo("float32").tiny)
        assert wide(out) == right or np.abs(wide(out) - right) <= allowed, (out, right)
        return
    for x, weight, one in zip((q, k, v), weights, out, strict=True):
        if name == "l1_penalty_grad":
            close(one, weight * np.sign(x))
        else:
            right = oracles.prox["prox_l1"](x, weight * np.longdouble(float(args["step"])))
            close(one, right, np.abs(x), 32)


# The cache


def _add_cache() -> None:
    q, k, v = normal(3, 2, 6, 4)
    options = {
        "batch": None,
        "window": 2,
        "n_sink": 1,
        "n_sparse": 1,
        "capacity": None,
        "dtype": None,
        "scale": None,
        "softcap": None,
        "rotary": None,
        "update": "fixed",
        "drift_bound": None,
        "method": "output",
    }
    memory = ("window", "n_sink", "capacity", "batch")
    _add(
        "KVCache",
        _use_cache,
        {"basis": None, **options},
        _cache_options(),
        _ignore,
        requests=memory,
    )
    prefix = {
        "q": q,
        "k": k,
        "v": v,
        "rank": 2,
        "rtol": None,
        "method": "output",
        "pool_batch": True,
        "rng": None,
    }
    _add(
        "KVCache.from_prefix",
        lambda xp, **args: slra.KVCache.from_prefix(**args).decode(),
        {**prefix, "window": 2},
        st.fixed_dictionaries({**_fixed_qkv(), "rank": st.integers(1, 4)}),
        _ignore,
        requests=memory,
        works_on_dask=False,
    )
    _add(
        "KVCache.append",
        lambda xp, **args: _cache(xp).append(**args).decode(),
        {"k": k, "v": v, "q": None, "lengths": None},
        st.fixed_dictionaries({name: _fixed_qkv()[name] for name in "kv"}),
        _ignore,
        works_on_dask=False,
    )
    _add(
        "KVCache.attend",
        lambda xp, **args: _cache(xp).append(*(to_xp(xp, x) for x in (k, v))).attend(**args),
        {"q": q, "mask": None, "is_causal": True, "lengths": None, "return_lse": False},
        st.fixed_dictionaries(
            {"q": _fixed_qkv()["q"], "is_causal": st.booleans(), "return_lse": st.booleans()}
        ),
        lambda args, out: _all_finite({"q": args["q"]}, out),
        works_on_dask=False,
    )
    _add(
        "KVCache.decode",
        lambda xp: _cache(xp).append(*(to_xp(xp, x) for x in (k, v))).decode(),
        {},
        st.just({}),
        _all_finite,
        works_on_dask=False,
    )
    _add(
        "KVCache.select",
        lambda xp, **args: _cache(xp, batch=(3,)).select(**args).lengths,
        {"indices": [0, 2]},
        st.fixed_dictionaries({"indices": st.lists(st.integers(0, 2), min_size=1, max_size=5)}),
        _ignore,
        works_on_dask=False,
    )


def _cache(xp: Any, **options: Any) -> Any:
    return slra.KVCache(_basis(xp), window=2, n_sink=1, **options)


def _use_cache(xp: Any, **args: Any) -> Any:
    args["basis"] = _basis(xp) if args["basis"] is None else args["basis"]
    cache = slra.KVCache(**args)
    q, k, v = (
        to_xp(xp, np.broadcast_to(x, (*cache.lengths.shape, 2, 6, 4)).copy())
        for x in normal(3, 2, 6, 4)
    )
    if args.get("capacity") is None or args["capacity"] >= 6:
        cache = cache.append(k, v, q=q)
    return cache.attend(q[..., :1, :])


@st.composite
def _cache_options(draw: Any) -> dict[str, Any]:
    args: dict[str, Any] = {"basis": None}
    args["batch"] = draw(st.sampled_from([None, (), (3,), [2, 2]]))
    args["window"] = draw(st.integers(0, 8))
    args["n_sink"] = draw(st.integers(0, 3))
    args["n_sparse"] = draw(st.integers(0, 4))
    args["capacity"] = draw(st.sampled_from([None, 8, 20]))
    args["dtype"] = draw(st.sampled_from([None, "float16", "float32", "float64"]))
    args["scale"] = draw(st.sampled_from([None, 0, -0.5, 2.0]))
    args["softcap"] = draw(st.sampled_from([None, 1.0, 30]))
    args["rotary"] = draw(st.sampled_from([None, [1.0, 0.1], (0.5,), np.asarray([1.0, 0.01])]))
    return args


_add_prox()
_add_svd()
_add_decompositions()
_add_solvers()
_add_attention()
_add_objective()
_add_cache()
assert math.isfinite(len(TARGETS))
