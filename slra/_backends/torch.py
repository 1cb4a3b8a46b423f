"""PyTorch.

Needs: torch. Results carry gradients wherever the operations they are made of do.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint

from slra._backends import numpy_bits
from slra._backends.gaussian import gaussian
from slra._backends.standard import Backend, ScoreOptions
from slra._backends.standard.sparse import index_dtype
from slra._backends.standard.spectral import ShrunkSpectrum
from slra._backends.torch_attention import expressible, sdpa_attention
from slra._typing import Array

__all__ = ["TorchBackend"]

# For fewer matrices than this, starting threads takes longer than they save.
WORTH_THREADS = 256


def _is_wrapped(x: Array) -> bool:
    """Whether ``x`` is inside a torch.func transform."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def _is_mapped(x: Array) -> bool:
    """Whether ``x`` is inside torch.func.vmap, at any depth of transforms."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


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


class TorchBackend(Backend):
    """Overrides for PyTorch."""

    def is_eager(self, x: Array) -> bool:
        """Values can be read outside torch.compile and torch.func transforms, off the meta device."""
        if torch.compiler.is_compiling() or x.device.type == "meta":
            return False
        return not _is_wrapped(x)

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
        n_threads = torch.get_num_threads() if g.ndim > 2 and g.shape[0] >= WORTH_THREADS else 1
        if g.device.type != "cpu" or n_threads == 1 or not self.is_eager(g) or g.requires_grad:
            return super().small_eigh(g)
        with ThreadPoolExecutor(n_threads) as pool:
            parts = list(pool.map(torch.linalg.eigh, torch.tensor_split(g, n_threads)))
        return torch.cat([w for w, _ in parts]), torch.cat([v for _, v in parts])

    def accumulation_dtype(self, like: Array) -> Any:
        """Stay in single precision on a device that has no double."""
        return like.dtype if like.device.type == "mps" else super().accumulation_dtype(like)

    def test_matrix(
        self, shape: tuple[int, ...], rng: np.random.Generator | int, like: Array
    ) -> Array:
        """While torch.compile traces, which it cannot do with a generator, draw at once and keep the numbers."""
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
        return str(x.device)

    def attention_output(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> Array:
        """Torch's fused kernel, where it knows the options; it has no rule for vmap."""
        if not isinstance(options.scale, float):
            q, options = q * options.scale, options._replace(scale=1.0)
        given = (q, k, v, mask, options.alibi)
        is_mapped = any(_is_mapped(x) for x in given if x is not None)
        if expressible(mask, options) and not is_mapped:
            return sdpa_attention(q, k, v, mask, options)
        return super().attention_output(q, k, v, mask, options)

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
