"""Proximal operators, norms, and the objective made of them."""

import functools
from typing import Any

import numpy as np
from hypothesis import strategies as st

import slra
from tests.fuzz import oracles
from tests.fuzz.oracles import close, dense, eps_of, real_dtype, wide
from tests.fuzz.strategies import FLOATS, arrays, floats
from tests.fuzz.table import (
    MATRICES,
    TARGETS,
    add,
    has_dtype,
    is_finite,
    normal,
    public,
)

SHAPES = ((), (1,), (4,), (0,), (3, 4), (1, 5), (2, 3, 4))


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


def _array_and_options(draw: Any, name: str) -> tuple[dict[str, Any], float]:
    """Draw what all take; return it with the largest number that the dtype has room for."""
    shape = draw(st.sampled_from(MATRICES if name in NEEDS_MATRIX else SHAPES))
    if name in ALONG and (not shape or 0 in shape):
        shape = (4,)
    kinds = FLOATS if name in REAL else (*FLOATS, "complex64", "complex128")
    x = draw(arrays(shape, dtypes=kinds))
    args: dict[str, Any] = {"x": x}
    limit = 1e300 if real_dtype(x.dtype) == np.float64 else 1e30
    for option in OPTIONS.get(name, ()):
        args[option] = draw(floats(1e-30 if option == "delta" else 0.0, limit))
    return args, limit


@st.composite
def _prox_args(draw: Any, name: str) -> dict[str, Any]:
    args, limit = _array_and_options(draw, name)
    x, shape = args["x"], args["x"].shape
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
    if name == "project_box":
        low, high = sorted(float(draw(floats(-limit, limit))) for _ in range(2))
        args |= {"lo": low, "hi": high}
    if name == "project_rank":
        args["rank"] = draw(st.integers(1, min(shape[-2:])))
    return args


@st.composite
def _norm_args(draw: Any, name: str) -> dict[str, Any]:
    args, _ = _array_and_options(draw, name)
    shape = args["x"].shape
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
    has_dtype(out, x.dtype)
    assert tuple(out.shape) == x.shape
    if not is_finite(args):
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
    if np.max(np.abs(wide(x)), initial=0) > float(np.finfo(x.dtype).max) / 4:
        return  # its entries may be larger than those of x, and than any number
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
    has_dtype(out, "float32" if dtype == np.float16 else dtype)
    if not is_finite(args):
        return
    axis = {"axis": _hashable(args["axis"])} if "axis" in args else {}
    numbers = {n: wide(a) for n, a in args.items() if n not in ("x", "axis")}
    with np.errstate(all="ignore"):
        right = oracles.value[name](wide(x), **numbers, **axis)
        scale = np.sum(np.abs(wide(x))) if name in SPECTRAL else np.abs(right)
    close(out, right, scale + 0 * np.abs(right), 64.0 * max(1, x.size))


def _hashable(axis: Any) -> Any:
    return None if axis is None else tuple(map(int, axis)) if isinstance(axis, tuple) else int(axis)


# They take operators, and give one.
MADE_OF_OTHERS = {"conjugate", "envelope", "scale", "separable", "translate"}
# What those of the other files take beside x and tau; test_prox_more.py has references for their values.
_GROUPS: dict[str, Any] = {"groups": [[0, 2], [1, 3]], "weights": [1.0, 0.5]}
TAKES_MORE: dict[str, dict[str, Any]] = {
    "squared_l2": {},
    "quadratic": {"A": np.eye(4), "b": np.ones(4)},
    "logistic": {},
    "mcp": {"l1": 0.5, "gamma": 3.0},
    "scad": {"l1": 0.5, "gamma": 3.7},
    "groups": _GROUPS,
    "sparse_group": {**_GROUPS, "l1": 0.3},
    "slope": {"weights": [2.0, 1.0, 0.5, 0.0]},
    "tv": {},
}
TAKES_MORE = {f"{kind}_{name}": o for name, o in TAKES_MORE.items() for kind in ("prox", "norm")}
TAKES_MORE |= {
    "project_l0_ball": {"n_nonzero": 2},
    "project_affine": {"A": np.eye(4)[:2], "b": np.ones(2)},
    "project_psd": {},
    "project_nuclear_ball": {"radius": 1.0},
}


def _add_with_options(name: str) -> None:
    options = dict(TAKES_MORE[name])
    if name.startswith("prox"):
        options["tau"] = 0.5
    if name == "prox_tv":
        options["n_iter"] = 3
    square = (4, 4) if name == "project_psd" else (3, 4)
    fixed = {option: st.just(value) for option, value in options.items()}
    add(
        name,
        public(name, slra.prox),
        {"x": normal(*square), **options},
        st.fixed_dictionaries({"x": arrays(square, dtypes=FLOATS), **fixed}),
        _check_dtype,
        requests=("n_iter",),
    )


def _check_dtype(args: dict[str, Any], out: Any) -> None:
    assert dense(out).dtype.kind == "f"


def _add_prox() -> None:
    for name in slra.prox.__all__:
        if name in MADE_OF_OTHERS or name == "soft_threshold":
            continue
        if name in TAKES_MORE:
            _add_with_options(name)
            continue
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
        add(name, public(name, slra.prox), base, fair, check)
    known = TARGETS["prox_l1"]
    add("soft_threshold", public("soft_threshold"), known.base, known.fair, known.check)
    known = TARGETS["prox_nuclear"]
    add(
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
        add(
            name,
            public(name, slra.objective),
            base,
            st.fixed_dictionaries(drawn),
            functools.partial(_check_penalty, name),
        )


def _check_penalty(name: str, args: dict[str, Any], out: Any) -> None:
    if not is_finite({n: args[n] for n in "qkv"}):
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
        assert np.isnan(right) or wide(out) == right or np.abs(wide(out) - right) <= allowed, (
            out,
            right,
        )
        return
    steps = args.get("step")
    steps = steps if isinstance(steps, (tuple, list)) else (steps,) * 3
    for x, weight, step, one in zip((q, k, v), weights, steps, out, strict=True):
        if name == "l1_penalty_grad":
            close(one, weight * np.sign(x))
        else:
            right = oracles.prox["prox_l1"](x, weight * wide(np.asarray(step)))
            close(one, right, np.abs(x), 32)


_add_prox()
_add_objective()
