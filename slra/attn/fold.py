"""Absorbing a basis into the projection weights of a model."""

from typing import NamedTuple

from slra._typing import Array
from slra._validate import promote, resolve

__all__ = ["FoldedProjections", "fold_maps"]


class FoldedProjections(NamedTuple):
    """Projection weights and biases that already contain a basis; weights multiply from the right, ``x @ w``.

    Attributes
    ----------
    w_q : array, shape (Hq, E, r)
    w_k : array, shape (Hkv, E, r)
    w_v : array, shape (Hkv, E, r_v)
    w_o : array, shape (Hq, r_v, E)
    b_q : array, shape (Hq, 1, r), or None
    b_k : array, shape (Hkv, 1, r)
    b_v : array, shape (Hkv, 1, r_v)
    b_o : array, shape (E,)
    """

    w_q: Array
    w_k: Array
    w_v: Array
    w_o: Array
    b_q: Array | None
    b_k: Array
    b_v: Array
    b_o: Array


def fold_maps(
    maps: dict[str, Array],
    weights: dict[str, Array],
    biases: dict[str, Array | None],
) -> FoldedProjections:
    """Fold the arrays of a basis into weights (heads, E, D) and biases (heads, 1, D), both by name."""
    given = {**weights, **{name: x for name, x in biases.items() if x is not None}}
    backend = resolve(basis=maps["wq"], **given)
    _check(maps, given)
    promoted = promote(backend, allow_complex=False, **given, **maps)
    cast = dict(zip([*given, *maps], promoted.arrays, strict=True))
    wq, wk, wv, uv, c, mu = (cast[name] for name in ("wq", "wk", "wv", "uv", "c", "mu"))
    w_q, w_k, w_v, w_o = (cast[name] for name in ("w_q", "w_k", "w_v", "w_o"))
    n_shared = wq.shape[0] // wk.shape[0]
    xp = backend.xp
    uv, mu_q = (x if n_shared == 1 else xp.repeat(x, n_shared, axis=0) for x in (uv, mu))
    b_q = cast.get("b_q")
    b_k = (cast["b_k"] - c) if "b_k" in cast else -c
    b_v = (cast["b_v"] - mu) if "b_v" in cast else -mu
    b_o = xp.sum(mu_q @ w_o, axis=0)[0, ...]
    folded = (w_q @ wq, w_k @ wk, w_v @ wv, uv @ w_o, b_k @ wk, b_v @ wv)
    w_q, w_k, w_v, w_o, b_k, b_v = promoted.cast_back(backend, *folded)
    if b_q is not None:
        (b_q,) = promoted.cast_back(backend, b_q @ wq)
    (b_o,) = promoted.cast_back(backend, b_o + cast["b_o"] if "b_o" in cast else b_o)
    return FoldedProjections(w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o)


def _check(maps: dict[str, Array], given: dict[str, Array]) -> None:
    """Raise ValueError unless all shapes are those the basis is for."""
    wq, wk, uv = maps["wq"], maps["wk"], maps["uv"]
    if wq.ndim != 3:
        raise ValueError(
            f"a basis to fold must have one set of maps, (Hq, D, r), got {tuple(wq.shape)}; "
            f"fit with pool_batch=True"
        )
    if given["w_q"].ndim != 3:
        raise ValueError(f"w_q must have shape (Hq, E, D), got {tuple(given['w_q'].shape)}")
    n_heads_q, width, _ = wq.shape
    n_heads_k, width_v, n_model = wk.shape[0], uv.shape[-1], given["w_q"].shape[-2]
    right = {
        "w_q": (n_heads_q, n_model, width),
        "w_k": (n_heads_k, n_model, width),
        "w_v": (n_heads_k, n_model, width_v),
        "w_o": (n_heads_q, width_v, n_model),
        "b_q": (n_heads_q, 1, width),
        "b_k": (n_heads_k, 1, width),
        "b_v": (n_heads_k, 1, width_v),
        "b_o": (n_model,),
    }
    for name, x in given.items():
        if tuple(x.shape) != right[name]:
            raise ValueError(f"{name} must have shape {right[name]}, got {tuple(x.shape)}")
