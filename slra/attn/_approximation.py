"""What low-rank attention puts in the place of Q, K and V: found once for the output, and again for its gradient."""

from typing import Any, NamedTuple

from slra._validate import check_choice, check_count, check_finite, check_l1
from slra.attn._inputs import Inputs
from slra.attn._rows import group, sample_rows
from slra.attn.basis import AttentionBasis, Maps, check_basis
from slra.attn.exact_keys import ExactKeys, find_exact_keys
from slra.attn.fit import N_ROWS, constant_inputs, fit_inputs, lay_out
from slra.attn.projections import Projections, lay_out_projections

__all__ = ["Mapped", "Thresholded", "approximate", "check_options"]


class Mapped(NamedTuple):
    """Maps to few dimensions, and the keys, if any, that stay exact."""

    maps: Maps
    keys: ExactKeys | None


class Thresholded(NamedTuple):
    """Projections in all dimensions, whose entries shrink by these thresholds."""

    projections: Projections
    thresholds: tuple[float, float, float]

    def inputs(self, inputs: Inputs) -> Inputs:
        """Replace q, k and v by what is attended to."""
        hats = self.projections.approximate(inputs.q, inputs.k, inputs.v)
        q, k, v = (
            inputs.backend.soft_threshold(x, tau) if tau else x
            for x, tau in zip(hats, self.thresholds, strict=True)
        )
        return inputs._replace(q=q, k=k, v=v)


def check_options(
    inputs: Inputs, method: str, methods: tuple[str, ...], rtol: Any, l1: Any, n_exact: Any
) -> tuple[tuple[float, float, float], int]:
    """Check what does not depend on the kind of approximation; return thresholds and the number of exact keys."""
    check_choice(method, methods, "method")
    for name in ("q", "k", "v"):
        check_finite(inputs.backend, getattr(inputs, name), name)
    thresholds = check_l1(l1, [inputs.backend.xp.finfo(inputs.q.dtype)] * 3)
    n_exact, n_keys = check_count(n_exact, "n_exact"), int(inputs.k.shape[-2])
    if n_exact >= n_keys:
        raise ValueError(f"n_exact must be less than {n_keys}, the number of keys, got {n_exact}")
    if n_exact and (rtol is not None or any(thresholds)):
        raise ValueError(f"n_exact must be 0 with rtol or l1, got {n_exact}")
    return thresholds, n_exact


def approximate(
    inputs: Inputs,
    rank: Any,
    *,
    rtol: float | None,
    method: str,
    thresholds: tuple[float, float, float],
    n_exact: int,
    basis: AttentionBasis | None,
    enable_gqa: bool,
) -> Mapped | Thresholded:
    """Fit, or take the basis that is given; raise where options do not go together."""
    if basis is not None:
        if rank is not None or rtol is not None or any(thresholds):
            raise ValueError("rank, rtol and l1 must be left out where a basis is given")
        check_basis(basis, inputs, enable_gqa=enable_gqa)
    if any(thresholds):
        if method != "svd" or rtol is not None:
            raise ValueError(
                'l1 must be 0 unless method is "svd" and rank is given, '
                f"got {thresholds!r} and {method!r}"
            )
        fitted = fit_inputs(inputs, rank, rtol=None, method=method, enable_gqa=enable_gqa)
        return Thresholded(lay_out_projections(fitted), thresholds)
    keys = _exact_keys(inputs, n_exact, enable_gqa=enable_gqa) if n_exact else None
    if basis is not None:
        return Mapped(Maps.of(basis, inputs.q), keys)
    keep = None if keys is None else keys.keep
    fitted = fit_inputs(inputs, rank, rtol=rtol, method=method, enable_gqa=enable_gqa, keep=keep)
    return Mapped(lay_out(fitted), keys)


def _exact_keys(inputs: Inputs, n_exact: int, *, enable_gqa: bool) -> ExactKeys:
    data = group(constant_inputs(inputs), enable_gqa=enable_gqa)
    rows = sample_rows(data.q.shape[-2], -(-N_ROWS // data.q.shape[-3]), None)
    return find_exact_keys(data, rows, n_exact)
