"""PyTorch.

Needs: torch. Results carry gradients wherever the operations they are made of do.
"""

import contextlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import array_api_compat.torch as compat_torch
import numpy as np
import torch
import torch.utils.checkpoint
from torch.autograd import forward_ad as _forward_mode

from slra._backends import numpy_attention, numpy_bits
from slra._backends.gaussian import gaussian
from slra._backends.standard import Backend, ScoreOptions
from slra._backends.standard.elementwise import FloatFormat
from slra._backends.standard.sparse import index_dtype
from slra._backends.standard.spectral import ShrunkSpectrum
from slra._backends.torch_attention import (
    cpu_kernel,
    kernel_gradients,
    kernel_output,
    kernel_output_and_lse,
)
from slra._typing import Array

__all__ = ["WHILE_COMPILING", "TorchBackend"]

# For fewer matrices than this, starting threads takes longer than they save.
WORTH_THREADS = 256


def _is_wrapped(x: Array) -> bool:
    """Whether ``x`` is inside a torch.func transform."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def _needs_formula(*xs: Array) -> bool:
    """Whether a derivative is taken that torch's kernels do not have: forward mode, second ones, and maps."""
    if torch.compiler.is_compiling():
        return False
    functorch, levels = torch._C._functorch, set()
    for x in xs:
        if _forward_mode.unpack_dual(x).tangent is not None:
            return True
        inner = x
        while functorch.is_functorch_wrapped_tensor(inner):
            if functorch.is_batchedtensor(inner):
                return True
            levels.add(functorch.maybe_get_level(inner))
            inner = functorch.get_unwrapped(inner)
    return len(levels) > 1


def _is_plain(*xs: Array) -> bool:
    """Whether these are tensors in a CPU's memory and nothing else."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and not _is_wrapped(x)
        and not torch._C._functorch.is_legacy_batchedtensor(x)
        for x in xs
    )


def _is_recorded(*xs: Array | None) -> bool:
    """Whether autograd records what is done to one of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in xs)


def _as_numpy(**xs: Array | None) -> dict[str, Any]:
    """Share the memory with NumPy, but for half precision, of which it is a wider copy."""
    keep = torch.bool, torch.float32, torch.float64
    wide = {n: x if x is None or x.dtype in keep else x.float() for n, x in xs.items()}
    return {n: x if x is None else x.detach().numpy() for n, x in wide.items()}


def _on_numpy(options: ScoreOptions) -> ScoreOptions:
    return options._replace(**_as_numpy(alibi=options.alibi))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _drawn(shape: tuple[int, ...], seed: int, is_complex: bool) -> Array:
    return torch.from_numpy(gaussian(tuple(shape), seed, is_complex=is_complex))


class _ShrinkSpectrum(torch.autograd.Function):  # type: ignore[misc]
    """A function of a matrix and ``tau`` with the derivative of `ShrunkSpectrum`, in both modes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Array, tau: Array, function: Any, backend: Backend) -> Array:
        return function(x, tau)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, tau, _, ctx.backend = inputs
        ctx.save_for_backward(x, tau)
        ctx.save_for_forward(x, tau)

    @staticmethod
    def backward(ctx: Any, grad: Array) -> Any:
        x, tau = ctx.saved_tensors
        spectrum = ShrunkSpectrum.of(x, tau, ctx.backend)
        slope = torch.sum(torch.real(torch.conj(spectrum.along_tau()) * grad), (-2, -1))
        return spectrum.along(grad), slope[..., None, None], None, None

    @staticmethod
    def jvp(ctx: Any, move: Array | None, step: Array | None, *rest: Any) -> Array:
        x, tau = ctx.saved_tensors
        spectrum = ShrunkSpectrum.of(x, tau, ctx.backend)
        along = 0.0 if move is None else spectrum.along(move)
        return along + (0.0 if step is None else step * spectrum.along_tau())


class _Recorded(torch.autograd.Function):  # type: ignore[misc]
    """Attention and its log-sum-exp by kernels that torch cannot differentiate, or not twice."""

    @staticmethod
    def forward(
        ctx: Any, q: Array, k: Array, v: Array, mask: Any, options: Any, backend: Any
    ) -> Any:
        out, lse = backend.constant_attention(q, k, v, mask, options)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Array | None, grad_lse: Array | None) -> Any:
        q, k, v, mask, out, lse = ctx.saved_tensors
        given = {i: g for i, g in enumerate((grad_out, grad_lse)) if g is not None}
        if torch.is_grad_enabled() or not _is_plain(*given.values()):
            # Each a tensor of its own, though it be one that is given twice.
            with torch.enable_grad():
                arrays = q, k, v = [x.view_as(x) for x in (q, k, v)]
                found = _Formula(ctx.backend.xp).attention(q, k, v, mask, ctx.options)
                asked = [i for i in range(3) if ctx.needs_input_grad[i]]
                grads = torch.autograd.grad(
                    [found[i] for i in given],
                    [arrays[i] for i in asked],
                    list(given.values()),
                    create_graph=torch.is_grad_enabled(),
                )
            known = dict(zip(asked, grads, strict=True))
            return *[known.get(i) for i in range(3)], None, None, None
        options, backend = ctx.options, ctx.backend
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        q, k, v, out, grad_out = (x.to(lse.dtype) for x in (q, k, v, out, grad_out))
        delta = (grad_out * out).sum(-1)
        delta = delta if grad_lse is None else delta - grad_lse
        grads = backend.attention_vjp(q, k, v, mask, options, lse, delta, grad_out)
        return *grads, None, None, None


class TorchBackend(Backend):
    """Overrides for PyTorch."""

    attends_in_half = True

    def is_eager(self, x: Array) -> bool:
        """Values can be read outside torch.compile, tracers and torch.func transforms, off the meta device."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type == "meta":
            return False
        return not _is_wrapped(x)

    def is_known(self, size: int) -> bool:
        """While torch.export traces bytecode a symbol passes for a number."""
        return not torch.compiler.is_exporting() and super().is_known(size)

    def freezes_draws(self, x: Array) -> bool:
        """Say whether torch.compile is tracing: a NumPy draw is not traced."""
        return bool(torch.compiler.is_compiling())

    def refusal(self, x: Array) -> str | None:
        """Refuse sparse and quantised layouts."""
        if x.layout != torch.strided or x.is_quantized:
            return (
                f"must be a dense array, got a tensor of layout {x.layout}; call to_dense() first"
            )
        return None

    def common_dtype(self, *arrays: Array) -> Any:
        """By dtypes alone: torch.compile does not follow ``torch.result_type``, which half precision leads to."""
        first, *others = [x.dtype for x in arrays]
        for other in others:
            first = torch.promote_types(first, other)
        return first

    def ignore_overflow(self) -> contextlib.AbstractContextManager[Any]:
        """There is nothing to silence, and torch.compile does not follow NumPy's way to."""
        return contextlib.nullcontext()

    def copied(self, x: Array) -> Array:
        """Clone, which gradients pass through."""
        return x.clone()

    def column_means(self, x: Array) -> Array:
        """Add up by slabs on a CPU, where torch would widen all of ``x`` first."""
        if x.device.type != "cpu":
            return super().column_means(x)
        ones = torch.ones((*x.shape[:-1], 1), dtype=x.dtype, device=x.device)
        return self.conj(torch.transpose(self.gram(x, ones), -1, -2)) / x.shape[-2]

    def cholesky(self, g: Array) -> Array:
        """Factor without raising, and mark what failed."""
        factor, info = torch.linalg.cholesky_ex(g)
        return torch.where((info == 0)[..., None, None], factor, torch.nan)

    def triangular_factor(self, x: Array) -> Array:
        """For torch.export alone: of the other one's size it proves too little for a length that is a symbol."""
        if torch.compiler.is_exporting() and not x.requires_grad:
            return torch.linalg.qr(x, mode="r")[1]
        return super().triangular_factor(x)

    def singular_values(self, x: Array) -> Array:
        """Without a QR, whose derivative needs full rank; this one needs no differences of values."""
        return torch.linalg.svdvals(x)

    def is_differentiated(self, x: Array) -> bool:
        """Say whether a graph is recorded, or a transform may ask for a derivative."""
        return (torch.is_grad_enabled() and x.requires_grad) or not self.is_eager(x)

    def shrink_spectrum(
        self, x: Array, tau: Array, function: Callable[[Array, Array], Array]
    ) -> Array:
        """Through autograd, where it is not compiled."""
        if torch.compiler.is_compiling():
            return function(x, tau)
        return _ShrinkSpectrum.apply(x, tau, function, self)

    def gram(self, x: Array, y: Array | None = None) -> Array:
        """Widen a slab at a time, which stays in the cache of a CPU."""
        return self.gram_by_slabs(x, y) if x.device.type == "cpu" else super().gram(x, y)

    def max_abs(self, x: Array) -> Array:
        """Take extremes, not moduli: nothing as large as ``x`` is allocated."""
        x = torch.view_as_real(x).flatten(-2) if self.is_complex(x) else x
        return torch.maximum(torch.amax(x, dim=(-2, -1)), -torch.amin(x, dim=(-2, -1)))

    def small_eigh(self, g: Array) -> tuple[Array, Array]:
        """Split a batch over threads, which torch does not do on a CPU."""
        # torch.compile does not follow the number of threads.
        if g.device.type != "cpu" or not self.is_eager(g) or g.requires_grad:
            return super().small_eigh(g)
        n_threads = torch.get_num_threads()
        if n_threads == 1 or math.prod(g.shape[:-2]) < WORTH_THREADS:
            return super().small_eigh(g)
        flat = torch.tensor_split(g.reshape(-1, *g.shape[-2:]), n_threads)
        with ThreadPoolExecutor(n_threads) as pool:
            parts = list(pool.map(torch.linalg.eigh, flat))
        values, vectors = (torch.cat(each) for each in zip(*parts, strict=True))
        return values.reshape(g.shape[:-1]), vectors.reshape(g.shape)

    def accumulation_dtype(self, like: Array) -> Any:
        """Stay in single precision on a device that has no double."""
        return like.dtype if like.device.type == "mps" else super().accumulation_dtype(like)

    def is_own_generator(self, rng: Any) -> bool:
        """Draw by torch's generators, on the device that each of them is for."""
        return isinstance(rng, torch.Generator)

    def test_matrix(self, shape: tuple[int, ...], rng: Any, like: Array) -> Array:
        """While torch.compile traces, which it cannot do with a generator, draw at once and keep the numbers."""
        if self.is_own_generator(rng):
            drawn = torch.randn(shape, generator=rng, dtype=like.dtype, device=rng.device)
            return drawn.to(like.device)
        if not torch.compiler.is_compiling():
            return super().test_matrix(shape, rng, like)
        return _drawn(shape, rng, self.is_complex(like)).to(like)

    def at_least(self, x: Array, low: Array | float) -> Array:
        """Clamp: of a number array-api-compat makes a tensor, in a way that torch.compile does not follow."""
        return torch.clamp(x, min=low)

    def at_most(self, x: Array, high: Array | float) -> Array:
        """Clamp, for the same reason."""
        return torch.clamp(x, max=high)

    def soft_threshold(self, x: Array, tau: Array | float) -> Array:
        """Clamp and subtract; a tensor ``tau`` takes the reference path."""
        if self.is_complex(x) or isinstance(tau, torch.Tensor):
            return super().soft_threshold(x, tau)
        return x - torch.clamp(x, -tau, tau)

    def device(self, x: Array) -> Any:
        """Torch spells out the index of a device everywhere but on the CPU."""
        return x.device

    def float_format(self, dtype: Any) -> FloatFormat | None:
        """Ask the dtype."""
        if not (dtype.is_floating_point or dtype.is_complex):
            return None
        return FloatFormat(dtype.is_complex, (4 if dtype.is_complex else 8) * dtype.itemsize)

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Torch's own, which takes a fraction of the time to start."""
        return x.reshape(shape)

    def attention_output(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> Array:
        """Torch's fused kernel, where it knows the options and the derivatives."""
        arrays = [x for x in (q, k, v, mask, options.alibi) if x is not None]
        has_numbers = isinstance(options.scale, float) and options.softcap is None
        if not has_numbers or _needs_formula(*arrays) or _is_recorded(mask, options.alibi):
            return self.attention(q, k, v, mask, options)[0]
        if _is_plain(*arrays) and _is_recorded(*arrays):
            return self.attention(q, k, v, mask, options)[0]
        return kernel_output(q, k, v, mask, options)

    def attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> tuple[Array, Array]:
        """On a CPU torch's own kernel, or NumPy's; elsewhere, and for derivatives of all kinds, tiles of torch."""
        arrays = [x for x in (q, k, v, mask, options.alibi) if x is not None]
        if not isinstance(options.scale, float):
            q, options = self._widened(q) * options.scale, options._replace(scale=1.0)
            k, v = self._widened(k), self._widened(v)
        is_formula = _needs_formula(*arrays)
        has_numbers = isinstance(options.softcap, float | None)
        is_constant = has_numbers and not _is_recorded(mask, options.alibi)
        if not is_formula and is_constant and _is_plain(*arrays):
            if _is_recorded(*arrays):
                found: tuple[Array, Array] = _Recorded.apply(q, k, v, mask, options, self)
                return found
            return self.constant_attention(q, k, v, mask, options)
        if is_formula:
            return _Formula(self.xp).attention(q, k, v, mask, options)
        dtype, (q, k, v) = q.dtype, map(self._widened, (q, k, v))
        out, lse = super().attention(q, k, v, mask, options)
        return out.to(dtype), lse

    def constant_attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> tuple[Array, Array]:
        """Attention of tensors on a CPU, through which no gradient passes."""
        # In half precision the kernel's log-sum-exp is good to four digits.
        dtype, (q, k, v) = q.dtype, map(self._widened, (q, k, v))
        kernel = cpu_kernel() if options.softcap is None else None
        if kernel is not None:
            out, lse = kernel_output_and_lse(q, k, v, mask, options, kernel)
            return out.to(dtype), lse
        by_name = _as_numpy(q=q, k=k, v=v, mask=mask)
        threads = torch.get_num_threads()
        out, lse = numpy_attention.attention(
            **by_name, options=_on_numpy(options), most_threads=threads
        )
        return torch.from_numpy(out).to(dtype), torch.from_numpy(lse)

    def attention_vjp(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        options: ScoreOptions,
        lse: Array,
        delta: Array,
        grad_out: Array,
    ) -> tuple[Array, Array, Array]:
        """As `attention`."""
        given = (q, k, v, mask, options.alibi, lse, delta, grad_out)
        arrays = [x for x in given if x is not None]
        numbers = options.scale, options.softcap
        is_constant = all(isinstance(x, float | None) for x in numbers) and _is_plain(*arrays)
        if not is_constant or _needs_formula(*arrays) or _is_recorded(*arrays):
            return super().attention_vjp(q, k, v, mask, options, lse, delta, grad_out)
        kernel = cpu_kernel() if options.softcap is None else None
        if kernel is not None:
            found = kernel_gradients(q, k, v, mask, options, lse, delta, grad_out, kernel)
            if found is not None:
                return found
        by_name = _as_numpy(q=q, k=k, v=v, mask=mask, lse=lse, delta=delta, grad_out=grad_out)
        dq, dk, dv = numpy_attention.attention_vjp(
            **by_name, options=_on_numpy(options), most_threads=torch.get_num_threads()
        )
        return torch.from_numpy(dq), torch.from_numpy(dk), torch.from_numpy(dv)

    def _widened(self, x: Array) -> Array:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def tile_shape(self, n_matrices: int, lengths: tuple[int, int], like: Array) -> tuple[int, int]:
        """As many scores as stay in the second-level cache of a CPU; elsewhere as the standard."""
        if like.device.type != "cpu":
            return super().tile_shape(n_matrices, lengths, like)
        area = max(1 << 14, (1 << 19) // max(1, n_matrices))
        width = min(1024, max(256, 1 << (area.bit_length() // 2)))
        return area // width, width

    def pack_tiles(self, x: Array, widths: np.ndarray[Any, Any]) -> Array:
        """Let NumPy do it where memory is shared with it."""
        if x.device.type != "cpu":
            return super().pack_tiles(x, widths)
        return torch.from_numpy(numpy_bits.pack_tiles(x.numpy(), widths))

    def unpack_blocks(self, heap: Array, widths: np.ndarray[Any, Any], dtype: Any) -> Array:
        """Let NumPy look up 8 integers for each byte where memory is shared with it."""
        if heap.device.type != "cpu" or dtype not in (torch.float32, torch.float64):
            return super().unpack_blocks(heap, widths, dtype)
        kind = np.float32 if dtype == torch.float32 else np.float64
        return torch.from_numpy(numpy_bits.unpack_blocks(heap.numpy(), widths, kind))

    def unpack_tokens(
        self, heap: Array, starts: Array, widths: Array, tokens: Array, dtype: Any
    ) -> Array:
        """Let NumPy do it where memory is shared with it."""
        if heap.device.type != "cpu" or dtype not in (torch.float32, torch.float64):
            return super().unpack_tokens(heap, starts, widths, tokens, dtype)
        heap, starts, widths, tokens = (x.numpy() for x in (heap, starts, widths, tokens))
        kind = np.float32 if dtype == torch.float32 else np.float64
        return torch.from_numpy(numpy_bits.unpack_tokens(heap, starts, widths, tokens, kind))

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """Fetch the values from the device."""
        values: np.ndarray[Any, Any] = x.detach().cpu().numpy()
        return values

    def stop_gradient(self, x: Array) -> Array:
        """Detach from the graph."""
        return x.detach()

    def checkpoint(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Checkpoint, where a gradient is being recorded; not under torch.func, which has no hooks for it."""

        def call(*arguments: Any) -> Any:
            tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
            is_recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
            if not is_recorded or any(map(_is_wrapped, tensors)):
                return function(*arguments)
            return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=False)

        return call

    def largest_in_rows(self, x: Array, k: int) -> tuple[Array, Array]:
        """Select instead of sorting."""
        indices = torch.sort(torch.topk(torch.abs(x), k, dim=-1, sorted=False).indices).values
        return torch.gather(x, -1, indices), indices.to(index_dtype(torch, x.shape[-1]))

    def scatter_rows(self, values: Array, indices: Array, n: int) -> Array:
        """Write the entries where they belong."""
        dense = torch.zeros((*values.shape[:-1], n), dtype=values.dtype, device=values.device)
        return dense.scatter(-1, indices.to(torch.int64), values)

    def largest_places(self, x: Array, k: int) -> Array:
        """Select instead of sorting."""
        return torch.sort(torch.topk(x, k, dim=-1, sorted=False).indices).values

    def gather_rows(self, x: Array, indices: Array) -> Array:
        """Copy row by row, not number by number, where rows lie one after another."""
        is_empty = x.numel() == 0 or indices.numel() == 0
        if is_empty or x.shape[:-2] != indices.shape[:-1] or not x.is_contiguous():
            return super().gather_rows(x, indices)
        n, width = x.shape[-2:]
        starts = n * torch.arange(indices.shape[:-1].numel(), device=x.device)
        at = (indices.reshape(-1, indices.shape[-1]) + starts[:, None]).reshape(-1)
        return x.reshape(-1, width).index_select(0, at).reshape(*indices.shape, width)

    def few_features(self, q: Array, k: Array, places: Array) -> Array:
        """Copy feature by feature, each of which is contiguous."""
        few = [k[at].mT.index_select(0, places[at]) for at in np.ndindex(*places.shape[:-1])]
        return q @ torch.stack(few).reshape(*places.shape, k.shape[-2]).to(q.dtype)

    def rows_like(self, buffer: Array, n: int) -> Array:
        """See which axis is the contiguous one."""
        if buffer.stride(-1) <= buffer.stride(-2):
            return super().rows_like(buffer, n)
        by_feature = (*buffer.shape[:-2], buffer.shape[-1], n)
        return torch.zeros(by_feature, dtype=buffer.dtype, device=buffer.device).mT

    def add_in_rows(self, x: Array, indices: Array, values: Array) -> Array:
        """Add where the entries belong."""
        return x.scatter_add(-1, indices, values)


class _Formula(TorchBackend):
    """Attention by operations that have derivatives of every order, in both modes."""

    def attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> tuple[Array, Array]:
        """Tiles of torch."""
        dtype, (q, k, v) = q.dtype, map(self._widened, (q, k, v))
        out, lse = Backend.attention(self, q, k, v, mask, options)
        return out.to(dtype), lse

    def checkpoint(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Keep everything: what recomputes has no second derivative."""
        return function


WHILE_COMPILING = TorchBackend(compat_torch)
