"""The compressed cache."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

import slra
from tests.backends import to_xp
from tests.fuzz.on_attention import basis_of, fixed_qkv
from tests.fuzz.table import (
    add,
    all_finite,
    no_check,
    normal,
)


def _add_cache() -> None:
    q, k, v = normal(3, 2, 6, 4)
    options = {
        "batch": None,
        "window": 2,
        "n_sink": 1,
        "n_sparse": 0,
        "bits": None,
        "rtol": None,
        "n_top": None,
        "top_p": None,
        "rank_index": None,
        "index": "leading",
        "capacity": None,
        "dtype": None,
        "scale": None,
        "softcap": None,
        "rotary": None,
        "drift_bound": None,
        "method": "output",
    }
    memory = ("window", "n_sink", "capacity", "batch")
    add(
        "KVCache",
        _use_cache,
        {"basis": None, **options},
        _cache_options(),
        no_check,
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
        "across_heads": False,
        "rng": None,
    }
    add(
        "KVCache.from_prefix",
        lambda xp, **args: slra.KVCache.from_prefix(**args).decode(),
        {**prefix, "window": 2},
        st.fixed_dictionaries(
            {**fixed_qkv(), "rank": st.integers(1, 4), "across_heads": st.booleans()}
        ),
        no_check,
        requests=memory,
        works_on_dask=False,
    )
    add(
        "KVCache.append",
        lambda xp, **args: _cache(xp).append(**args).decode(),
        {"k": k, "v": v, "q": None, "lengths": None},
        st.fixed_dictionaries({name: fixed_qkv()[name] for name in "kv"}),
        no_check,
        works_on_dask=False,
    )
    add(
        "KVCache.attend",
        lambda xp, **args: _cache(xp).append(*(to_xp(xp, x) for x in (k, v))).attend(**args),
        {
            "q": q,
            "mask": None,
            "is_causal": True,
            "window": None,
            "sinks": None,
            "alibi": None,
            "lengths": None,
            "return_lse": False,
            "return_rest": False,
        },
        st.fixed_dictionaries(
            {"q": fixed_qkv()["q"], "is_causal": st.booleans(), "return_lse": st.booleans()}
        ),
        lambda args, out: all_finite({"q": args["q"]}, out),
        works_on_dask=False,
    )
    add(
        "KVCache.crop",
        lambda xp, **args: (
            _cache(xp, bits=4).append(*(to_xp(xp, x) for x in (k, v))).crop(**args).decode()
        ),
        {"n": 2},
        st.fixed_dictionaries({"n": st.integers(0, 9)}),
        all_finite,
        works_on_dask=False,
    )
    add(
        "KVCache.decode",
        lambda xp: _cache(xp).append(*(to_xp(xp, x) for x in (k, v))).decode(),
        {},
        st.just({}),
        all_finite,
        works_on_dask=False,
    )
    add(
        "KVCache.select",
        lambda xp, **args: _cache(xp, batch=(3,)).select(**args).lengths,
        {"indices": [0, 2]},
        st.fixed_dictionaries({"indices": st.lists(st.integers(0, 2), min_size=1, max_size=5)}),
        no_check,
        works_on_dask=False,
    )


def _cache(xp: Any, **options: Any) -> Any:
    return slra.KVCache(basis_of(xp), window=2, n_sink=1, **options)


def _use_cache(xp: Any, **args: Any) -> Any:
    args["basis"] = basis_of(xp) if args["basis"] is None else args["basis"]
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
    if not args["n_sparse"]:
        args["bits"] = draw(st.sampled_from([None, 0.5, 3, (2, 7.5)]))
    if not args["n_sparse"] and draw(st.booleans()):
        args["n_top"] = draw(st.integers(0, 7))
        args["top_p"] = draw(st.sampled_from([None, 0.5, 1.0, 1e-9]))
        args["rank_index"] = draw(st.sampled_from([None, 1, 3, 4, (2, 1)]))
        kinds = ["leading", "query"] if args["bits"] is None else ["leading"]
        args["index"] = draw(st.sampled_from(kinds))
    args["capacity"] = draw(st.sampled_from([None, 8, 20]))
    args["dtype"] = draw(st.sampled_from([None, "float16", "float32", "float64"]))
    args["scale"] = draw(st.sampled_from([None, 0, -0.5, 2.0]))
    args["softcap"] = draw(st.sampled_from([None, 1.0, 30]))
    if args.get("n_top") is None:
        kinds = [None, [1.0, 0.1], (0.5,), np.asarray([1.0, 0.01])]
        args["rotary"] = draw(st.sampled_from(kinds))
    return args


_add_cache()
