"""Adapters to frameworks; each module is imported only by who asks for it, and this one imports nothing."""

import importlib
from typing import Any

__all__ = ["jax", "sklearn", "torch", "transformers", "transformers_cache"]


def __getattr__(name: str) -> Any:
    """Import an adapter, and its framework, once somebody asks for it."""
    if name in __all__:
        return importlib.import_module(f"slra.integrations.{name}")
    raise AttributeError(f"module 'slra.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Show the adapters that there are, imported or not."""
    return sorted({*globals(), *__all__})
