"""Attention by ``torch.nn.functional.scaled_dot_product_attention``, and on a CPU by the kernel beneath it.

Needs: torch. The fused kernels want 4-D tensors, q, k and v equally wide, and the last axis contiguous; otherwise torch
quietly takes a path that is several times slower and quadratic in memory.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from slra._backends.standard.attention import (
    ScoreOptions,
    Tile,
    TileBounds,
    combine_masks,
    scores_batch_shape,
    sum_to,
)
from slra._typing import Array

__all__ = ["cpu_kernel", "kernel_gradients", "kernel_output", "kernel_output_and_lse"]

# Where a mask is needed, torch makes an additive one of it: for so many queries at a time.
QUERY_TILE = 1024


class Kernel(NamedTuple):
    """What torch calls on a CPU: the output and the log-sum-exp, and the gradients."""

    forward: Any
    backward: Any


@functools.cache
def cpu_kernel() -> Kernel | None:
    """Return torch's own CPU kernel, where it is there and gives what it should; its name is not public."""
    try:
        kernel = Kernel(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
        )
        steps = torch.arange(2 * 3 * 5 * 4, dtype=torch.float64, device="cpu")
        q, k, v, grad = (torch.sin(steps * step).reshape(2, 3, 5, 4) for step in (1, 2, 3, 4))
        mask = torch.cos(steps[:25]).reshape(1, 1, 5, 5)
        out, lse = kernel.forward(q, k, v, 0.0, False, attn_mask=mask, scale=0.3)
        found = kernel.backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=0.3)
        scores = 0.3 * q @ k.mT + mask
        weights = torch.softmax(scores, -1)
        delta = (grad * (weights @ v)).sum(-1, keepdim=True)
        slopes = 0.3 * weights * (grad @ v.mT - delta)
        right = (weights @ v, scores.logsumexp(-1), slopes @ k, slopes.mT @ q, weights.mT @ grad)
        pairs = zip((out, lse, *found), right, strict=True)
        is_right = all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in pairs)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    return kernel if is_right else None


@functools.cache
def _keeps_nan() -> bool:
    """Whether the CPU kernel makes NaN of rows whose scores are all NaN, which it did not always.

    https://github.com/pytorch/pytorch/issues/141128
    """
    q, k = torch.zeros((2, 1, 2, 40, 16), dtype=torch.float32, device="cpu")
    q[0, 0, 1] = k[0, 1] = torch.nan
    out = functional.scaled_dot_product_attention(q, k, torch.ones_like(k))
    return bool(torch.isnan(out[0, 0, 1]).all() and torch.isnan(out[0, 1]).all())


class _Part(NamedTuple):
    """Some queries, the keys from the first to the last that they see, and what the kernel is told about the rest."""

    rows: slice
    keys: slice
    mask: Array | None
    is_causal: bool


def _parts(q: Array, k: Array, mask: Array | None, options: ScoreOptions) -> Iterator[_Part]:
    """Cut the queries so that no mask that has to be written out is large."""
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    diagonal, sees_all = options.diagonal(n_queries, n_keys), options.sees_all(n_queries, n_keys)
    # Without numbers, for which torch.compile would make a graph each.
    rows, keys = slice(None), slice(None)
    is_plain = mask is None and options.alibi is None
    if is_plain and sees_all:
        yield _Part(rows, keys, None, False)
        return
    if is_plain and diagonal == 0 and options.is_causal and options.first is None:
        yield _Part(rows, keys, None, True)
        return
    if sees_all and mask is not None and mask.shape[-2] == 1 and options.alibi is None:
        yield _Part(rows, keys, mask, False)
        return
    # Of a size that is a symbol nobody can say how many tiles it makes.
    known = isinstance(n_queries, int) and not torch.compiler.is_exporting()
    height = options.tile_height(QUERY_TILE, n_queries, n_keys) if known else n_queries
    for top in range(0, n_queries, height) if known else (0,):
        bottom = min(top + height, n_queries) if known else n_queries
        left, right = options.first_key(top, n_keys), options.last_key(bottom, n_queries, n_keys)
        tile = Tile(top, bottom, left, max(left, right))
        bounds = TileBounds(mask, options, tile, diagonal)
        part, seen = bounds.additive(torch, q.dtype, q.device), bounds.seen(torch, q.device)
        part = part if seen is None else combine_masks(torch, part, seen)
        yield _Part(slice(top, bottom), slice(tile.left, tile.right), part, False)


class _Layout:
    """How arrays with leading axes (..., heads, queries that share a head) become (batch, head, length, width).

    Queries that share a key head are rows beside each other where one mask goes for all: keys and values are then
    read once for all of them. Elsewhere the heads of keys and values are repeated, without a copy.
    """

    def __init__(self, q: Array, k: Array, v: Array, part: _Part) -> None:
        mask = part.mask
        self.batch = scores_batch_shape(q, k, v, mask)
        self.n_queries = q.shape[-2]
        self.n_shared = self.batch[-1] if len(self.batch) > 2 else 0
        one_mask = mask is None or (mask.shape[-2] == 1 and (mask.ndim < 3 or mask.shape[-3] == 1))
        self.as_rows = (
            self.n_shared > 1
            and q.ndim > 2
            and q.shape[-3] == self.n_shared
            and not part.is_causal
            and all(x.ndim < 3 or x.shape[-3] == 1 for x in (k, v))
            and (one_mask or self.n_queries == 1)
        )
        self.is_dropped = self.n_shared == 1 or self.as_rows
        self.flat = self.batch[:-1] if self.is_dropped else self.batch

    def _dropped(self, x: Array) -> Array:
        return x.squeeze(-3) if self.is_dropped and x.ndim > 2 else x

    def queries(self, x: Array) -> Array:
        """(..., Nq, W), or a mask."""
        if self.as_rows and x.ndim > 2 and x.shape[-3] == self.n_shared:
            return self._padded(x.flatten(-3, -2))
        return self.keys(x)

    def keys(self, x: Array) -> Array:
        """(..., Nk, W)."""
        return self._padded(self._dropped(x))

    def _padded(self, x: Array) -> Array:
        n_missing = max(len(self.flat), 2) + 2 - x.ndim
        return x[(None,) * n_missing] if n_missing else x

    def splits(self, x: Array) -> bool:
        """Whether to flatten the leading axes of what is laid out would copy what is only repeated."""
        sizes = [n for n, whole in zip(x.shape[:-3], self.flat[:-1], strict=False) if whole > 1]
        return len(self.flat) > 2 and 1 in sizes and any(n > 1 for n in sizes)

    def flattened(self, x: Array) -> Array:
        """One batch axis for all but the heads; heads that are shared are repeated without a copy."""
        leading = (1,) * (2 - len(self.flat)) + self.flat
        if len(leading) == 2 and x.shape[:-2] == leading:
            return x
        x = x.expand(*leading[:-1], *x.shape[-3:]).flatten(0, -4)
        return x.expand(-1, leading[-1], -1, -1)

    def restored(self, x: Array) -> Array:
        """(..., Nq, W) as the queries were, from (batch, head, length, width)."""
        if self.as_rows:
            return x.reshape(*self.flat, self.n_shared, self.n_queries, x.shape[-1])
        x = x.reshape(*self.flat, *x.shape[-2:])
        return x.unsqueeze(-3) if self.is_dropped else x

    def restored_keys(self, x: Array) -> Array:
        """(..., Nk, W) as the keys were."""
        x = x.reshape(*self.flat, *x.shape[-2:])
        return x.unsqueeze(-3) if self.is_dropped else x


def kernel_output(q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions) -> Array:
    """Exact attention, by torch's public function."""
    return _joined(q, k, v, mask, options, None)[0]


def kernel_output_and_lse(
    q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions, kernel: Kernel
) -> tuple[Array, Array]:
    """Exact attention and its log-sum-exp, in single precision or wider, on a CPU."""
    return _joined(q, k, v, mask, options, kernel)


def _joined(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    options: ScoreOptions,
    kernel: Kernel | None,
) -> tuple[Array, Array]:
    if options.scale <= 0:
        # The kernel hides keys by -inf before it scales, which would make +inf or NaN of it.
        q, options = q * options.scale, options._replace(scale=1.0)
    parts = []
    for part in _parts(q, k, mask, options):
        if part.keys.start is not None and part.keys.start == part.keys.stop:
            shape = (*scores_batch_shape(q, k, v, mask), part.rows.stop - part.rows.start)
            like = {"dtype": q.dtype, "device": q.device}
            out = torch.zeros((*shape, v.shape[-1]), **like)
            wide = torch.promote_types(q.dtype, torch.float32)
            parts.append((out, torch.full(shape, -torch.inf, dtype=wide, device=q.device)))
        else:
            parts.append(_called(*_cut(q, k, v, part), part, options.scale, kernel))
    out, lse = parts[0] if len(parts) == 1 else zip(*parts, strict=True)
    if len(parts) == 1:
        return out, lse
    return torch.cat(out, dim=-2), None if kernel is None else torch.cat(lse, dim=-1)


def _cut(q: Array, k: Array, v: Array, part: _Part) -> tuple[Array, Array, Array]:
    if part.rows.start is not None:
        q = q[..., part.rows, :]
    if part.keys.start is not None:
        k, v = k[..., part.keys, :], v[..., part.keys, :]
    return q, k, v


def _called(
    q: Array, k: Array, v: Array, part: _Part, scale: float, kernel: Kernel | None
) -> tuple[Array, Any]:
    """Lay the arguments out, and call torch."""
    mask, width, v_width = part.mask, max(q.shape[-1], v.shape[-1]), v.shape[-1]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    layout = _Layout(q, k, v, part)
    given = [layout.queries(q), layout.keys(k), layout.keys(v)]
    laid = None if mask is None else layout.queries(mask)
    # A mask of the keys alone is small enough to be copied.
    large = [*given, laid] if laid is not None and laid.shape[-2] > 1 else given
    if any(map(layout.splits, large)):
        # Go through the first axis instead.
        n_first, n_axes = layout.batch[0], len(layout.batch) + 2
        arrays = [x if x is None else x[(None,) * (n_axes - x.ndim)] for x in (q, k, v, mask)]
        found = []
        for i in range(n_first):
            q, k, v, mask = (x if x is None else x[i % len(x)] for x in arrays)
            found.append(_called(q, k, v, part._replace(mask=mask), scale, kernel))
        outs, lses = zip(*found, strict=True)
        return torch.stack(outs), None if kernel is None else torch.stack(lses)
    q4, k4, v4 = (layout.flattened(_widened(x, width)) for x in given)
    mask4 = None if laid is None else layout.flattened(laid)
    if kernel is None:
        out = functional.scaled_dot_product_attention(
            q4, k4, v4, mask4, is_causal=part.is_causal, scale=scale
        )
        lse = None
    else:
        mask4 = _additive(mask4, q4)
        out, lse4 = kernel.forward(q4, k4, v4, 0.0, part.is_causal, attn_mask=mask4, scale=scale)
        if mask4 is not None:
            # Of a row that sees nothing the kernel says 0.
            lse4 = lse4.masked_fill((mask4 == -torch.inf).all(-1), -torch.inf)
        lse = layout.restored(lse4.unsqueeze(-1))[..., 0]
    out = out if out.shape[-1] == v_width else out[..., :v_width]
    out = layout.restored(out)
    if torch.compiler.is_compiling() or q.device.type != "cpu" or not _keeps_nan():
        lost = torch.isnan(q).any(-1) | torch.isnan(k).any(-1).all(-1)[..., None]
        out = torch.where(lost[..., None], torch.nan, out)
        lse = None if lse is None else torch.where(lost, torch.nan, lse)
    return out, lse


def _widened(x: Array, width: int) -> Array:
    """Pad the last axis with zeros, which change neither the products nor the rest of the output."""
    if x.shape[-1] < width:
        return functional.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _additive(mask: Array | None, like: Array) -> Array | None:
    """Make an additive mask of a boolean one, which the kernel does not take."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
    return zeros.masked_fill_(~mask, -torch.inf)


def kernel_gradients(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    options: ScoreOptions,
    lse: Array,
    delta: Array,
    grad_out: Array,
    kernel: Kernel,
) -> tuple[Array, Array, Array] | None:
    """Gradients of attention with respect to q, k and v on a CPU; None where the kernel cannot give them."""
    out = _output_for(delta, grad_out)
    if out is None:
        return None
    factor = 1.0
    if options.scale <= 0:
        factor, q, options = options.scale, q * options.scale, options._replace(scale=1.0)
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    for part in _parts(q, k, mask, options):
        if part.keys.start is not None and part.keys.start == part.keys.stop:
            dq.append(torch.zeros_like(q[..., part.rows, :]))
            continue
        rows = [x[..., part.rows, :] for x in (grad_out, out, lse.unsqueeze(-1))]
        found = _pulled_back(*_cut(q, k, v, part), part, options.scale, rows, kernel)
        if found is None:
            return None
        dq.append(found[0])
        dk[..., part.keys, :] += found[1]
        dv[..., part.keys, :] += found[2]
    dq = dq[0] if len(dq) == 1 else torch.cat(dq, dim=-2)
    return (dq if factor == 1.0 else dq * factor), dk, dv


def _output_for(delta: Array, grad_out: Array) -> Array | None:
    """Return a stand-in for the output, of which the kernel needs its products with ``grad_out``, ``delta``, only.

    So a gradient of the log-sum-exp, which is in delta, and an output that was merged from parts serve too.
    """
    size = grad_out.abs().amax(-1)
    unit = grad_out / torch.where(size == 0, 1.0, size).unsqueeze(-1)
    square = (unit * unit).sum(-1)
    factor = torch.where(size == 0, 0.0, delta / (size * square))
    # Nothing has a product other than 0 with a row of zeros.
    is_lost = ((size == 0) & (delta != 0)) | ~torch.isfinite(factor)
    return None if bool(is_lost.any()) else unit * factor.unsqueeze(-1)


def _pulled_back(
    q: Array, k: Array, v: Array, part: _Part, scale: float, rows: list[Array], kernel: Kernel
) -> tuple[Array, Array, Array] | None:
    """Gradients from some of the queries."""
    layout = _Layout(q, k, v, part)
    width, mask = max(q.shape[-1], v.shape[-1]), part.mask
    queries = [layout.queries(x) for x in (q, *rows)]
    keys = [layout.keys(k), layout.keys(v)]
    laid = [] if mask is None else [layout.queries(mask)]
    if any(map(layout.splits, [*queries, *keys, *laid])):
        return None
    lse4 = layout.flattened(queries.pop())[..., 0]
    q4, grad4, out4 = (layout.flattened(_widened(x, width)) for x in queries)
    k4, v4 = (layout.flattened(_widened(x, width)) for x in keys)
    mask4 = None if not laid else _additive(layout.flattened(laid[0]), q4)
    mask4 = mask4 if mask4 is None else mask4.to(q4.dtype)
    dq, dk, dv = kernel.backward(
        grad4, q4, k4, v4, out4, lse4, 0.0, part.is_causal, attn_mask=mask4, scale=scale
    )
    dq = sum_to(layout.restored(dq[..., : q.shape[-1]]), q.shape, torch)
    dk = sum_to(layout.restored_keys(dk[..., : k.shape[-1]]), k.shape, torch)
    return dq, dk, sum_to(layout.restored_keys(dv[..., : v.shape[-1]]), v.shape, torch)
