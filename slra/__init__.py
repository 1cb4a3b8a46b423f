"""Sparse and low-rank approximation, and attention on it, for every array library."""

__version__ = "0.1.0"
__all__ = ["__version__"]
