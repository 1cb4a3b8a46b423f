"""Unknowns in several arrays: one long vector inside, the caller's structure outside."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import array_api_compat as compat

from slra._backends import Backend
from slra._typing import Array
from slra._validate import check_callable, promote, resolve

__all__ = ["Tree", "tree_of"]

Flatten = Callable[[Any], Sequence[Array]]
Unflatten = Callable[[Sequence[Array]], Any]


class Tree(NamedTuple):
    """How arrays lie in a vector; ``flatten`` is None where there is one array, which stays what it is."""

    backend: Backend
    flatten: Flatten | None
    unflatten: Unflatten | None
    like: tuple[Array, ...]

    def join(self, tree: Any, name: str) -> Array:
        """Lay the arrays of a structure out in one vector."""
        if self.flatten is None:
            return tree
        leaves = list(self.flatten(tree))
        if any(not compat.is_array_api_obj(leaf) for leaf in leaves):
            raise TypeError(f"{name} must consist of arrays")
        got, shapes = [tuple(x.shape) for x in leaves], [tuple(x.shape) for x in self.like]
        if got != shapes:
            raise ValueError(f"{name} must consist of arrays of shapes {shapes}, got {got}")
        xp = self.backend.xp
        flat = [xp.reshape(x, (-1,)) for x in leaves]
        dtype = xp.result_type(*flat)
        return xp.concat([xp.astype(x, dtype, copy=False) for x in flat])

    def split(self, x: Array) -> Any:
        """Cut a vector into the arrays of a structure."""
        if self.unflatten is None:
            return x
        xp, leaves, start = self.backend.xp, [], 0
        for like in self.like:
            stop = start + math.prod(like.shape)
            leaf = xp.reshape(x[start:stop], tuple(like.shape))
            if self.backend.is_complex(leaf) and not self.backend.is_complex(like):
                leaf = xp.real(leaf)
            leaves.append(leaf)
            start = stop
        return self.unflatten(leaves)

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, which takes the structure first, as a function of the vector."""
        if self.flatten is None:
            return function
        return lambda x, *rest: function(self.split(x), *rest)


def tree_of(x0: Any, flatten: Any, unflatten: Any, name: str) -> tuple[Tree, Array]:
    """Return the structure of a start, and the start as one array."""
    check_callable(flatten, "flatten", optional=True)
    check_callable(unflatten, "unflatten", optional=True)
    if (flatten is None) != (unflatten is None):
        raise ValueError("flatten and unflatten must be given both or neither")
    if flatten is None:
        if type(x0) not in (tuple, list):
            if isinstance(x0, dict):
                raise TypeError(
                    f"{name} must be an array, a tuple or a list of arrays, or come with flatten and unflatten, "
                    f"got {type(x0).__name__}"
                )
            return Tree(resolve(**{name: x0}), None, None, (x0,)), x0
        flatten, unflatten = tuple, type(x0)
    leaves = tuple(flatten(x0))
    if not leaves:
        raise ValueError(f"{name} must consist of one array or more, got none")
    named = {f"{name}[{i}]": leaf for i, leaf in enumerate(leaves)}
    backend = resolve(**named)
    promote(backend, **named)
    tree = Tree(backend, flatten, unflatten, leaves)
    return tree, tree.join(x0, name)
