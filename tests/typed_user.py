"""What a user writes, for `mypy --strict`: not run, only checked (see test_package)."""

from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import slra

Floats = NDArray[np.float32]


def exact(q: Floats, k: Floats, v: Floats, mask: NDArray[np.bool_], flag: bool) -> tuple[int, ...]:
    out = slra.attention(q, k, v, mask=mask, is_causal=True, causal_align="top_left")
    assert_type(out, Floats)
    assert_type(slra.attention(q, k, v, return_lse=True), tuple[Floats, Floats])
    either = slra.attention(q, k, v, scale=0.5, causal_align=3, return_lse=flag)
    assert_type(either, Floats | tuple[Floats, Floats])
    parts = [slra.attention(q, k, v, return_lse=True) for _ in range(2)]
    merged, lse = slra.merge_attention([out for out, _ in parts], [lse for _, lse in parts])
    assert_type(merged, Floats)
    dq, _, _ = slra.attention_vjp(q, k, v, merged, lse, merged)
    assert_type(dq, Floats)
    slra.attention(q, k, v, windw=3)  # type: ignore[call-overload]
    slra.attention(q, k, v, causal_align="left")  # type: ignore[call-overload]
    slra.attention(q, [1.0], v)  # type: ignore[call-overload]
    return out.shape


def low_rank(q: Floats, k: Floats, v: Floats) -> None:
    basis = slra.fit_attention(q, k, v, (4, 8), method="output")
    assert_type(basis.attend(q, k, v), Floats)
    assert_type(basis.attend(q, k, v, return_lse=True), tuple[Floats, Floats])
    assert_type(basis.project(q, k, v), tuple[Floats, Floats, Floats])
    assert_type(slra.low_rank_attention(q, k, v, 4, n_exact=2), Floats)
    out, lse = slra.low_rank_attention(q, k, v, basis=basis, return_lse=True)
    dq, _, _ = slra.low_rank_attention_vjp(q, k, v, out, lse, out, basis=basis)
    assert_type(dq, Floats)
    assert_type(slra.baselines.topk(q, k, v, 4, 8), Floats)


def any_library(q: Any, k: Any, v: Any) -> None:
    """Arrays of a library without types stay what they are."""
    assert_type(slra.attention(q, k, v), Any)
