"""The whole table, filled by a file for each part of the library."""

from tests.fuzz import on_attention, on_cache, on_matrices, on_prox
from tests.fuzz.table import TARGETS, Target

__all__ = ["FILES", "TARGETS", "Target"]

# Where the functions of the caller's are that targets pass.
FILES = {on.__file__ for on in (on_attention, on_cache, on_matrices, on_prox)}
