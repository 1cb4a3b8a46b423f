"""Attention under linear maps on the feature axis."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from slra._typing import Array, Namespace
from slra.attn.exact import (
    OutputGradient,
    exact_gradients,
    exact_output,
    exact_output_and_lse,
)
from slra.attn.problem import AttentionProblem, Three, group_heads, ungroup_heads

__all__ = [
    "NAMES_OF_MAPS",
    "Maps",
    "carry_shift",
    "mapped_given",
    "mapped_gradients",
    "mapped_output",
    "mapped_problem",
]

# The arrays of a basis, by which files and messages name them.
NAMES_OF_MAPS = ("wq", "wk", "wv", "uv", "c", "mu")

# Heads whose ranks round up to the same multiple of this run together: a kernel's register holds as many numbers.
RANK_STEP = 8


class _HasMaps(Protocol):
    """A basis, as far as this file knows one."""

    @property
    def wq(self) -> Array: ...
    @property
    def wk(self) -> Array: ...
    @property
    def ranks(self) -> tuple[tuple[int, int], ...]: ...


class Maps(NamedTuple):
    """The maps of `slra.AttentionBasis`, laid out as a problem is, and the ranks of each key head."""

    wq: Array  # (..., H, G or 1, D, r)
    wk: Array  # (..., H, 1, D, r)
    wv: Array  # (..., H, 1, Dv, r_v)
    uv: Array  # (..., H, 1, r_v, Dv)
    c: Array  # (..., H, 1, 1, D)
    mu: Array  # (..., H, 1, 1, Dv)
    ranks: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, basis: _HasMaps, problem: AttentionProblem) -> "Maps":
        """Lay out the maps of a basis, in the dtype of the problem."""
        n_shared = basis.wq.shape[-3] // basis.wk.shape[-3] if basis.wq.ndim > 2 else 1
        wq = group_heads(basis.wq, n_shared, problem.backend)
        others = {
            name: group_heads(getattr(basis, name), 1, problem.backend)
            for name in cls._fields[1:-1]
        }
        return cls(wq, **others, ranks=basis.ranks).in_dtype_of(problem)

    def each(self, function: Callable[[Array], Array]) -> "Maps":
        """Apply a function to each array."""
        return self._replace(**{name: function(getattr(self, name)) for name in self._fields[:-1]})

    def in_dtype_of(self, problem: AttentionProblem) -> "Maps":
        """Cast the maps to the dtype that a problem is computed in."""
        xp, dtype = problem.xp, problem.q.dtype
        return self.each(lambda x: x if x.dtype == dtype else xp.astype(x, dtype))

    def by_head(self, problem: AttentionProblem) -> dict[str, Array]:
        """Arrays by query head and by key head, as a basis has them; without a head axis if the problem had none."""
        xp, has_heads = problem.xp, any(problem.with_heads)
        arrays = dict(zip(self._fields[:-1], self[:-1], strict=True))
        shape = (*self.wq.shape[:-3], problem.n_shared, *self.wq.shape[-2:])
        arrays["wq"] = xp.broadcast_to(self.wq, shape)
        return {name: ungroup_heads(x, has_heads, problem.backend) for name, x in arrays.items()}

    def project(self, problem: AttentionProblem) -> Three:
        """Map queries, keys and values; shifts are taken off after the map: r numbers a row instead of D."""
        q, k, v = problem[:3]
        return q @ self.wq, k @ self.wk - self.c @ self.wk, v @ self.wv - self.mu @ self.wv

    def project_queries(self, problem: AttentionProblem) -> Three:
        """Map queries alone: keys and values have been mapped before, by all columns."""
        q, k, v = problem[:3]
        return q @ self.wq, k[..., : self.wk.shape[-1]], v[..., : self.wv.shape[-1]]

    def cut(self, rank_qk: int, rank_v: int) -> "Maps":
        """Keep the leading columns."""
        wq, wk = self.wq[..., :rank_qk], self.wk[..., :rank_qk]
        return self._replace(wq=wq, wk=wk, wv=self.wv[..., :rank_v], uv=self.uv[..., :rank_v, :])


def carry_shift(maps: Maps, q: Array, small_q: Array, small_k: Array, xp: Namespace) -> Any:
    """Append to projections a dimension whose product is what the shift of the keys takes off the scores of ``q``."""
    shift = xp.broadcast_to(q @ xp.matrix_transpose(maps.c), (*small_q.shape[:-1], 1))
    ones = xp.ones_like(small_k[..., :1])
    return xp.concat([small_q, shift], axis=-1), xp.concat([small_k, ones], axis=-1)


def mapped_output(
    problem: AttentionProblem,
    maps: Maps,
    *,
    with_lse: bool,
    project: Callable[[Maps, AttentionProblem], Three] = Maps.project,
) -> tuple[Array, Array | None]:
    """Attention under maps that fit the problem, and its log-sum-exp; heads of like rank together.

    ``project`` says what is mapped yet.
    """
    buckets = list(_buckets(maps))
    if len(buckets) == 1:
        ((_, *ranks),) = buckets
        return _one_rank_output(problem, maps.cut(*ranks), project, with_lse=with_lse)
    xp, backend = problem.xp, problem.backend
    outs, lses, order = [], [], []
    for heads, *ranks in buckets:
        some, part = _take_heads(maps, problem, heads)
        out, lse = _one_rank_output(part, some.cut(*ranks), project, with_lse=with_lse)
        outs.append(out)
        lses.append(lse)
        order += heads
    back = backend.from_numpy(np.argsort(order), problem.q, backend.place_dtype)
    out = xp.take(xp.concat(outs, axis=-4), back, axis=-4)
    return out, xp.take(xp.concat(lses, axis=-3), back, axis=-3) if with_lse else None


def _buckets(maps: Maps) -> Iterator[tuple[list[int], int, int]]:
    """Key heads that run together, and the ranks they run at: padded to a multiple of RANK_STEP where mixed."""
    if len(set(maps.ranks)) == 1:
        yield list(range(len(maps.ranks))), *maps.ranks[0]
        return
    together: dict[tuple[int, int], list[int]] = {}
    for head, ranks in enumerate(maps.ranks):
        rank_qk, rank_v = (math.ceil(rank / RANK_STEP) * RANK_STEP for rank in ranks)
        key = min(rank_qk, maps.wk.shape[-1]), min(rank_v, maps.wv.shape[-1])
        together.setdefault(key, []).append(head)
    for key in sorted(together):
        yield together[key], *key


def _take_heads(
    maps: Maps, problem: AttentionProblem, heads: list[int]
) -> tuple[Maps, AttentionProblem]:
    """Cut some key heads, and the query heads that share them, out of maps and a problem."""
    xp = problem.xp
    indices = problem.backend.from_numpy(np.asarray(heads), problem.q, problem.backend.place_dtype)

    def take(x: Any) -> Any:
        is_of_all = x is None or x.ndim < 4 or x.shape[-4] == 1
        return x if is_of_all else xp.take(x, indices, axis=-4)

    small = maps.each(take)._replace(ranks=tuple(maps.ranks[head] for head in heads))
    q, k, v, mask = map(take, problem[:4])
    return small, problem._replace(q=q, k=k, v=v, mask=mask)


def _one_rank_output(
    problem: AttentionProblem,
    maps: Maps,
    project: Callable[[Maps, AttentionProblem], Three],
    *,
    with_lse: bool,
) -> tuple[Array, Array | None]:
    """Exact attention in the dimensions of the basis, and back."""
    xp, options = problem.xp, problem.options
    q, k, v = project(maps, problem)
    uv = maps.uv
    if options.softcap is not None:
        # tanh sees the shift of the scores, so it is carried as one more dimension.
        q, k = carry_shift(maps, problem.q, q, k, xp)
    counts = problem.may_leave_query_without_keys
    if counts:
        # A row that attends to nothing must not get mu: one more value counts what is attended to.
        v = xp.concat([v, xp.ones_like(v[..., :1])], axis=-1)
        uv = xp.concat([uv, maps.mu], axis=-2)
    small = problem._replace(q=q, k=k, v=v)
    if with_lse:
        out, lse = exact_output_and_lse(small)
        if options.softcap is None:
            shift = options.scale * (problem.q @ xp.matrix_transpose(maps.c))[..., 0]
            # A query that sees nothing may hold NaN.
            lse = xp.where(lse == -math.inf, lse, lse + shift)
    else:
        out, lse = exact_output(small), None
    return out @ uv if counts else out @ uv + maps.mu, lse


def mapped_problem(problem: AttentionProblem, maps: Maps) -> AttentionProblem:
    """Project to r + 1 dimensions: the shift of the keys is one more, and one more value counts what is seen."""
    xp = problem.xp
    q, k, v = maps.project(problem)
    q, k = carry_shift(maps, problem.q, q, k, xp)
    return problem._replace(q=q, k=k, v=xp.concat([v, xp.ones_like(v[..., :1])], axis=-1))


def mapped_given(maps: Maps, given: OutputGradient, xp: Namespace) -> OutputGradient:
    """Gradient for the output of what `mapped_problem` returned, from that for the output of the maps."""
    uv = xp.concat([maps.uv, maps.mu], axis=-2)
    return given._replace(grad_out=given.grad_out @ xp.matrix_transpose(uv))


def mapped_gradients(small: AttentionProblem, maps: Maps, given: OutputGradient) -> Three:
    """Gradients for q, k and v under maps, from that of the output; ``small`` is what `mapped_problem` returned."""
    xp = small.xp
    transposed = xp.matrix_transpose
    c = xp.broadcast_to(transposed(maps.c), (*maps.wq.shape[:-1], 1))
    wq = xp.concat([maps.wq, c], axis=-1)
    dq, dk, dv = exact_gradients(small, mapped_given(maps, given, xp))
    return (
        dq @ transposed(wq),
        dk[..., :-1] @ transposed(maps.wk),
        dv[..., :-1] @ transposed(maps.wv),
    )
