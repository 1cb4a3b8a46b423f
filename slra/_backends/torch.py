"""PyTorch.

Needs: torch. Results carry gradients wherever the operations they are made of do.
"""

from typing import Any

import torch

from slra._backends.agnostic import Primitives
from slra._typing import Array

__all__ = ["TorchPrimitives"]


class TorchPrimitives(Primitives):
    """Overrides for PyTorch."""

    def is_eager(self, x: Array) -> bool:
        """Values can be read outside torch.compile and torch.func transforms, off the meta device."""
        if torch.compiler.is_compiling() or x.device.type == "meta":
            return False
        return not bool(torch._C._functorch.is_functorch_wrapped_tensor(x))

    def freezes_draws(self, x: Array) -> bool:
        """Say whether torch.compile is tracing: a NumPy draw is not traced."""
        return bool(torch.compiler.is_compiling())

    def refusal(self, x: Array) -> str | None:
        """Refuse sparse and quantised layouts."""
        if x.layout != torch.strided or x.is_quantized:
            return f"a tensor of layout {x.layout}; call to_dense() first"
        return None

    def constant(self, x: Array) -> Array:
        """Detach from the graph."""
        return x.detach()

    def solve_triangular(self, a: Array, b: Array, *, lower: bool) -> Array:
        """Solve by substitution."""
        return torch.linalg.solve_triangular(a, b, upper=not lower)

    def soft_threshold(self, x: Array, tau: Array | float) -> Array:
        """Clamp and subtract; a tensor ``tau`` takes the reference path."""
        if self.is_complex(x) or isinstance(tau, torch.Tensor):
            return super().soft_threshold(x, tau)
        return x - torch.clamp(x, -tau, tau)

    def device(self, x: Array) -> Any:
        """Torch spells out the index of a device everywhere but on the CPU."""
        return str(x.device)
