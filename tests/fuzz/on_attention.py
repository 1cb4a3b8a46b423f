"""Attention, exact and low-rank, and bases."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

import slra
from tests.backends import to_xp
from tests.fuzz import oracles
from tests.fuzz.oracles import dense, wide
from tests.fuzz.strategies import FLOATS, arrays
from tests.fuzz.table import (
    add,
    all_finite,
    is_finite,
    is_floating,
    no_check,
    normal,
    public,
)

ATTENTION = {
    "mask": None,
    "is_causal": False,
    "causal_align": None,
    "window": None,
    "lengths_q": None,
    "lengths_k": None,
    "sinks": None,
    "alibi": None,
    "scale": None,
    "enable_gqa": False,
    "softcap": None,
}


# What the oracle does not know; tests of attention do.
BY_SEQUENCE_OR_HEAD = ("lengths_q", "lengths_k", "sinks", "alibi")


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
        options["causal_align"] = draw(st.sampled_from(["bottom_right", "top_left", 2, -1]))
    if draw(st.booleans()):
        ends = [0, 1, 3, None, -1, np.int64(2), 2**31 - 1]
        options["window"] = tuple(draw(st.sampled_from(ends)) for _ in range(2))
        options["causal_align"] = draw(st.sampled_from(["bottom_right", "top_left", 2, -1]))
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


def _is_in_range(args: dict[str, Any], room: float = 1.0) -> bool:
    """Whether all is finite, and products stay in range: what attention asks for."""
    if not is_finite({name: args[name] for name in "qkv"}):
        return False
    mask = args.get("mask")
    if mask is not None and is_floating(mask):
        mask = dense(mask)
        if np.any(np.isnan(mask) | (mask > 1e30)):
            return False
    return oracles.in_range(args["q"], args["k"], args["v"], args, room=room)


def _check_attention(args: dict[str, Any], out: Any) -> None:
    q, k, v = (args[name] for name in "qkv")
    lse = None
    if isinstance(out, tuple):
        out, lse = out
    dtype = np.result_type(*(dense(x).dtype for x in (q, k, v)))
    assert dense(out).dtype == dtype
    if not _is_in_range(args) or any(args.get(name) is not None for name in BY_SEQUENCE_OR_HEAD):
        return
    mask = args.get("mask")
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
        if mask is not None and is_floating(mask):
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
    extra = [args[name] for name in ("sinks", "alibi") if args.get(name) is not None]
    assert [dense(x).shape for x in out[3:]] == [dense(x).shape for x in extra]
    out = out[:3]
    for gradient, x in zip(out, (q, k, v), strict=True):
        assert dense(gradient).shape == x.shape
        assert dense(gradient).dtype == dtype
    if any(args.get(name) is not None for name in BY_SEQUENCE_OR_HEAD):
        return
    if args.get("enable_gqa") or not (q.shape[:-2] == k.shape[:-2] == v.shape[:-2]):
        return
    floating = [
        dense(x) for name, x in args.items() if name not in ("lse", "mask") and is_floating(x)
    ]
    if (
        not all(np.all(np.isfinite(x)) for x in floating)
        or max(np.max(np.abs(x)) for x in floating) > 1e4
    ):
        return
    lse, mask = dense(args["lse"]), args.get("mask")
    if mask is not None and is_floating(mask) and np.any(dense(mask) > 1e3):
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
    if not _is_in_range(args, room=1e9):
        return
    for x in out if isinstance(out, tuple) else (out,):
        assert not np.any(np.isnan(dense(x))), "NaN from finite input"


LOW_RANK = {
    "rank": 2,
    "rtol": None,
    "method": "output",
    "l1": 0.0,
    "n_exact": 0,
    "n_top": 0,
    "basis": None,
    **ATTENTION,
}


@st.composite
def _low_rank_args(draw: Any, *, fit: bool = False) -> dict[str, Any]:
    args = draw(_attention_args())
    assume(oracles.in_range(args["q"], args["k"], args["v"], args, room=1e9))
    (n, d), (m, e) = args["q"].shape[-2:], args["v"].shape[-2:]
    limits = min(n, m, d), min(m, e)
    args["method"] = draw(st.sampled_from(["output", "scores", "svd"]))
    choice = draw(st.sampled_from(["int", "pair", "rtol"]))
    if choice == "int":
        args["rank"] = draw(st.integers(1, min(limits)))
    elif choice == "pair":
        args["rank"] = tuple(draw(st.integers(1, limit)) for limit in limits)
    else:
        args["rtol"] = draw(st.sampled_from([1e-3, 0.5, 2.0]))
    if fit:
        args["pool_batch"] = draw(st.booleans())
        args["across_heads"] = draw(st.booleans())
        args["rotary"] = draw(st.sampled_from([None, [1.0]] if d > 1 else [None]))
    elif choice != "rtol":
        args["n_exact"] = draw(st.integers(0, m - 1))
        args["n_top"] = draw(st.integers(0, m + 1))
        if args["method"] == "svd" and not (args["n_exact"] or args["n_top"]):
            args["l1"] = draw(st.sampled_from([0.0, 0.1, (0, 1.0, 0.1)]))
    return args


def _check_basis(args: dict[str, Any], basis: Any) -> None:
    if not is_finite({name: args[name] for name in "qkv"}):
        return
    if not oracles.in_range(args["q"], args["k"], args["v"], args, room=1e9):
        return
    for name in ("wq", "wk", "wv", "uv", "c", "mu", "error"):
        assert not np.any(np.isnan(dense(getattr(basis, name)))), f"NaN in {name}"
    assert np.all(dense(basis.error) >= 0)


def basis_of(xp: Any) -> Any:
    # JAX may be told to have no double precision.
    return _basis_of(xp, str(to_xp(xp, np.zeros(1)).dtype))


@functools.cache
def _basis_of(xp: Any, dtype: str) -> Any:
    q, k, v = (to_xp(xp, x) for x in normal(3, 2, 6, 4))
    return slra.fit_attention(q, k, v, 2)


def _of_basis(method: str) -> Callable[..., Any]:
    return lambda xp, **args: getattr(basis_of(xp), method)(**args)


def _add_attention() -> None:
    q, k, v = normal(3, 2, 6, 4)
    qkv = {"q": q, "k": k, "v": v}
    add(
        "attention",
        public("attention"),
        {**qkv, **ATTENTION, "return_lse": True},
        _attention_args(return_lse=st.booleans()),
        _check_attention,
    )
    add(
        "attention_vjp",
        public("attention_vjp"),
        {**_vjp_args_of(qkv), "grad_lse": None, **ATTENTION},
        _vjp_args(),
        _check_vjp,
    )
    outs, lses = [normal(2, 6, 4), normal(2, 6, 4, seed=1)], [normal(2, 6), normal(2, 6, seed=1)]
    add(
        "merge_attention",
        public("merge_attention"),
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
    fit |= {"across_heads": False, "rotary": None}
    add(
        "fit_attention",
        public("fit_attention"),
        {**qkv, **fit, **ATTENTION},
        _low_rank_args(fit=True),
        _check_basis,
    )
    names = ("kernel",)
    add(
        "low_rank_attention",
        public("low_rank_attention"),
        {**qkv, **LOW_RANK, "return_lse": False},
        _low_rank_args(),
        _finite_attention,
        names=names,
    )
    sizes = {
        "topk": {"rank": st.integers(1, 4), "n_keys": st.integers(1, 5)},
        "quest": {"n_pages": st.integers(1, 2), "page_size": st.integers(1, 4)},
        "sparq": {"rank": st.integers(1, 4), "n_keys": st.integers(1, 5)},
        "streaming": {"n_sink": st.integers(0, 5), "window": st.integers(1, 5)},
        "snapkv": {"n_keys": st.integers(1, 5), "window": st.just(1)},
        "nystrom": {"n_landmarks": st.integers(1, 6)},
        "linformer": {"n_combinations": st.integers(1, 6)},
        "favor": {"n_features": st.integers(1, 6)},
        "kivi": {"bits": st.integers(1, 16), "group_size": st.integers(1, 9)},
    }
    for name, own in sizes.items():
        add(
            f"baselines.{name}",
            public(name, slra.baselines),
            {**qkv, **dict.fromkeys(own, 2)} | ({"n_exact": 1} if name == "kivi" else {}),
            st.fixed_dictionaries({**own, **fixed_qkv()}),
            _finite_attention,
            requests=("n_features",),
        )
    add(
        "low_rank_attention_vjp",
        public("low_rank_attention_vjp"),
        {**_vjp_args_of(qkv), "grad_lse": None, **LOW_RANK},
        st.fixed_dictionaries({**fixed_qkv(), "rank": st.integers(1, 4)}).map(_vjp_args_of),
        no_check,
    )
    fixed = fixed_qkv()
    add(
        "AttentionBasis.attend",
        _of_basis("attend"),
        {**qkv, **ATTENTION, "return_lse": False},
        st.fixed_dictionaries(fixed),
        _finite_attention,
    )
    add(
        "AttentionBasis.project",
        _of_basis("project"),
        qkv,
        st.fixed_dictionaries(fixed),
        _finite_attention,
    )
    add(
        "AttentionBasis.project_keys",
        _of_basis("project_keys"),
        {"k": k, "v": v},
        st.fixed_dictionaries({name: fixed[name] for name in "kv"}),
        all_finite,
    )
    small = {"k": k[..., :2], "v": v[..., :2]}
    narrow = {
        name: arrays(x.shape, dtypes=("float32", "float64"), kinds=("normal", "zero", "tiny"))
        for name, x in small.items()
    }
    add(
        "AttentionBasis.attend_projected",
        _of_basis("attend_projected"),
        {"q": q, **small, **ATTENTION, "return_lse": False},
        st.fixed_dictionaries({"q": fixed["q"], **narrow}),
        all_finite,
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
    add(
        "AttentionBasis.fold",
        _of_basis("fold"),
        {**weights, **biases},
        st.fixed_dictionaries(fair),
        all_finite,
    )
    add(
        "low_rank_attention on a made basis",
        lambda xp, **args: slra.low_rank_attention(
            *(to_xp(xp, x) for x in normal(3, 2, 6, 4)), basis=slra.AttentionBasis(**args)
        ),
        _basis_parts(),
        st.just(_basis_parts()),
        no_check,
        names=("basis",),
    )


def _basis_parts() -> dict[str, Any]:
    import array_api_compat.numpy as xp

    basis = basis_of(xp)
    return {name: getattr(basis, name) for name in basis.__dataclass_fields__}


def fixed_qkv() -> dict[str, Any]:
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


_add_attention()
