"""Calls of public functions that transforms (compile, differentiate, map, shard) are tried on, for any library."""

import array_api_compat as compat
import numpy as np

import slra

prox = slra.prox


def low_rank(result):
    # Of half precision the singular values are in single.
    S = compat.array_namespace(result.S).astype(result.S, result.U.dtype)
    return (result.U * S[..., None, :]) @ result.Vh


def least_squares_step(x):
    """Five steps of proximal gradient on |z - x|^2 / 2 + |z|_1 / 10."""

    def value_and_grad(z):
        return 0.5 * ((z - x) ** 2).sum(), z - x

    def shrink(z, step):
        return prox.prox_l1(z, 0.1 * step)

    options = {"step": 0.5, "tol": None, "max_iter": 5}
    return slra.proximal_gradient(0 * x, value_and_grad, shrink, **options).x


def merged(q, k, v):
    parts = [
        slra.attention(q, k[..., s, :], v[..., s, :], return_lse=True)
        for s in (slice(0, 4), slice(4, 10))
    ]
    return slra.merge_attention(*(list(x) for x in zip(*parts, strict=True)))[0]


def vjp(q, k, v):
    out, lse = slra.attention(q, k, v, return_lse=True)
    return slra.attention_vjp(q, k, v, out, lse, out)[0]


# Each takes one matrix.
OF_A_MATRIX = {
    "randomized_svd": lambda x: low_rank(
        slra.randomized_svd(x, 1, n_oversamples=1, n_iter=2, method="krylov", rng=0)
    ),
    "truncated_svd": lambda x: low_rank(slra.truncated_svd(x, 3)),
    "randomized_eigh": lambda x: slra.randomized_eigh(x @ x.mT, 3, rng=0).w,
    "estimate_error": lambda x: slra.estimate_error(x, (x[:, :2], x[:2, :]), rng=0).frobenius,
    "compress": lambda x: slra.compress(x, 2, 0.2).to_dense(),
    "proximal_gradient": least_squares_step,
    "prox_l1": lambda x: prox.prox_l1(x, 0.3),
    "prox_l0": lambda x: prox.prox_l0(x, 0.3),
    "prox_l2": lambda x: prox.prox_l2(x, 0.3, axis=-1),
    "prox_l21": lambda x: prox.prox_l21(x, 0.3, axis=-1),
    "prox_linf": lambda x: prox.prox_linf(x, 0.3),
    "prox_elastic_net": lambda x: prox.prox_elastic_net(x, 0.3, l2=0.5),
    "prox_nonneg_l1": lambda x: prox.prox_nonneg_l1(x, 0.3),
    "prox_huber": lambda x: prox.prox_huber(x, 0.3, delta=0.5),
    "prox_nuclear": lambda x: prox.prox_nuclear(x, 0.5),
    "project_l1_ball": lambda x: prox.project_l1_ball(x, 1.0),
    "project_l2_ball": lambda x: prox.project_l2_ball(x, 1.0),
    "project_simplex": lambda x: prox.project_simplex(x, 1.0),
    "project_box": lambda x: prox.project_box(x, -0.5, 0.5),
    "project_rank": lambda x: prox.project_rank(x, 3),
}
# Each takes q, k and v.
OF_ATTENTION = {
    "attention": lambda q, k, v: slra.attention(q, k, v, is_causal=True),
    "attention_vjp": vjp,
    "merge_attention": merged,
    "low_rank_attention": lambda q, k, v: slra.low_rank_attention(q, k, v, 3),
    "low_rank_attention n_exact": lambda q, k, v: slra.low_rank_attention(q, k, v, 3, n_exact=2),
    "low_rank_attention n_top": lambda q, k, v: slra.low_rank_attention(q, k, v, 3, n_top=2),
    "low_rank_attention l1": lambda q, k, v: slra.low_rank_attention(
        q, k, v, 3, method="svd", l1=0.1
    ),
}
CASES = OF_A_MATRIX | OF_ATTENTION
# Where a basis is fitted, gradients take it as constant: not what differences see.
WITH_A_CONSTANT_BASIS = {
    "low_rank_attention",
    "low_rank_attention l1",
    "low_rank_attention n_exact",
    "low_rank_attention n_top",
}


def arguments(name, batch=()):
    """Arrays for a case, float64."""
    rng = np.random.default_rng(0)
    if name in OF_A_MATRIX:
        return [rng.standard_normal((*batch, 10, 10))]
    return [rng.standard_normal((*batch, 2, 10, 6)) for _ in range(3)]
