"""Maps that are not in a file: those of a basis that whoever reads it has, and the steps that they are scaled by."""

from typing import Any

import numpy as np

from slra._files import Arrays, checksum
from slra._validate import resolve
from slra.attn.basis import check_parts
from slra.attn.maps import NAMES_OF_MAPS
from slra.cache._bits import unscaled_maps
from slra.cache._contents import Contents

__all__ = ["check_given", "with_maps", "without_maps"]

STEPS = ("segments.0.step_k", "segments.0.step_v")
# Maps were computed by these steps in the dtype that they have.
NEAR = 16


def without_maps(named: Arrays, contents: Contents, basis: Any) -> tuple[Arrays, str]:
    """Leave maps out; also return what tells the basis."""
    if not contents.layout.is_coded:
        raise ValueError("basis must be None for a cache of floats: its file has its maps")
    if len(contents.segments) > 1:
        raise ValueError(
            f"basis must be None for a cache that was refitted: it has {len(contents.segments)} of them"
        )
    own = _maps_of(basis)
    held = {name: named.pop(f"segments.0.maps.{name}") for name in NAMES_OF_MAPS}
    steps = [
        _norm(own[name].astype(np.float64)) / _norm(held[name].astype(np.float64))
        if own[name].shape == held[name].shape
        else np.zeros(())
        for name in ("wk", "wv")
    ]
    eps = NEAR * np.finfo(held["wk"].dtype).eps
    if not all(
        own[name].shape == held[name].shape
        and np.all(
            np.abs(x - held[name]) <= eps * np.max(np.abs(held[name]), axis=(-2, -1), keepdims=True)
        )
        for name, x in _scaled(own, steps).items()
    ):
        raise ValueError("basis must be the one that the cache was made with, got another")
    return named | dict(zip(STEPS, steps, strict=True)), _told(own)


def check_given(told: str | None, basis: Any) -> None:
    """Raise unless a basis is given where a file has no maps, and the right one."""
    if told is None and basis is not None:
        raise ValueError("basis must be None: the file has its maps")
    if told is not None and basis is None:
        raise ValueError("basis must be given: the file was saved without its maps")
    if told is not None and _told(_maps_of(basis)) != told:
        raise ValueError("basis must be the one that the file was saved with, got another")


def with_maps(named: Arrays, basis: Any) -> Arrays:
    """Put maps back that a file does not have."""
    own = _maps_of(basis)
    steps = [named.pop(name) for name in STEPS]
    for step in steps:
        is_right = step.shape == own["wk"].shape[:2] and step.dtype == np.float64
        if not is_right or not np.all((step > 0) & np.isfinite(step)):
            raise ValueError("its steps are not positive numbers, one for each head")
    scaled = {f"segments.0.maps.{name}": x for name, x in _scaled(own, steps).items()}
    return named | scaled


def _maps_of(basis: Any) -> Arrays:
    """Take maps to the coordinates of a coding, (lead, H or 1, 1, ., .)."""
    check_parts(basis)
    if basis.coding is None or basis.wk.ndim < 3:
        raise ValueError("basis must have heads and its coding, as that of a cache in bits")
    to_numpy = resolve(basis=basis.wk).to_numpy
    maps = unscaled_maps(type(basis.coding)(*map(to_numpy, basis.coding)), np)
    return {name: np.asarray(getattr(maps, name), order="C") for name in NAMES_OF_MAPS}


def _scaled(maps: Arrays, steps: list[Any]) -> Arrays:
    by_k, by_v = (np.asarray(step)[..., None, None, None] for step in steps)
    scaled = {"wq": maps["wq"] * by_k, "wk": maps["wk"] / by_k}
    scaled |= {"wv": maps["wv"] / by_v, "uv": maps["uv"] * by_v}
    return {name: scaled.get(name, x).astype(x.dtype) for name, x in maps.items()}


def _norm(x: Any) -> Any:
    return np.linalg.norm(x, axis=(-2, -1))[..., 0]


def _told(maps: Arrays) -> str:
    return checksum(maps, {})
