"""Caches in files: safetensors, with settings and a checksum in the metadata."""

import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from slra._backends import Backend
from slra._backends.standard import ScoreOptions
from slra._typing import Array
from slra.attn.cache.contents import check_contents
from slra.attn.cache.state import (
    Exact,
    Recent,
    Segment,
    SegmentMaps,
    Settings,
    SparseTokens,
    State,
    copied,
    is_host,
    with_rows,
)

__all__ = ["flattened", "load_cache", "save_cache"]

FORMAT = "slra.KVCache 1"
Arrays = dict[str, np.ndarray[Any, Any]]


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            'saving and loading a KVCache needs safetensors: pip install "slra[safetensors]"'
        ) from error
    return safetensors


def save_cache(
    path: str | PathLike[str], state: State, settings: Settings, backend: Backend
) -> None:
    """Write what is in use to exactly this path."""
    library = _safetensors()
    named = {name: _plain(x, backend) for name, x in flattened(_without_room(state, settings))}
    metadata = {
        "format": FORMAT,
        "settings": json.dumps(settings._asdict() | {"options": settings.options._asdict()}),
        "n_segments": str(len(state.segments)),
        "checksum": "",
    }
    metadata["checksum"] = _checksum(named, metadata)
    Path(path).write_bytes(library.numpy.save(named, metadata))


def _plain(x: Array, backend: Backend) -> np.ndarray[Any, Any]:
    """NumPy array of a dtype that NumPy has; bfloat16 becomes float32, which holds all its values."""
    if isinstance(x, np.ndarray):
        return np.asarray(x, order="C")
    if hasattr(backend.xp, "bfloat16") and x.dtype == backend.xp.bfloat16:
        x = backend.xp.astype(x, backend.xp.float32)
    return np.asarray(backend.to_numpy(x), order="C")


def _without_room(state: State, settings: Settings) -> State:
    """Cut off rows that no token has been written to."""
    if not is_host(state.lengths):
        return state
    segments = []
    for segment in state.segments:
        n_used = max(0, int(np.max(state.lengths - segment.start)))
        n_rows = min(n_used, segment.k.shape[2])
        segments.append(_map_rows(segment, lambda x, n=n_rows: x[:, :, :n, :]))
    return state._replace(segments=tuple(segments))


def _map_rows(segment: Segment, function: Any) -> Segment:
    sparse = (
        None if tokens is None else SparseTokens(*map(function, tokens))
        for tokens in (segment.sparse_k, segment.sparse_v)
    )
    return Segment(segment.maps, segment.start, function(segment.k), function(segment.v), *sparse)


def flattened(state: Any, name: str = "") -> list[tuple[str, Array]]:
    """Arrays of nested tuples with their paths."""
    if state is None:
        return []
    if not isinstance(state, tuple):
        return [(name, state)]
    fields = getattr(state, "_fields", range(len(state)))
    return [
        pair
        for field, part in zip(fields, state, strict=True)
        for pair in flattened(part, f"{name}.{field}".lstrip("."))
    ]


def _checksum(named: Arrays, metadata: dict[str, str]) -> str:
    """SHA-256 of metadata, names, shapes, dtypes and content."""
    digest = hashlib.sha256(repr(sorted((metadata | {"checksum": ""}).items())).encode())
    for name, x in sorted(named.items()):
        digest.update(f"{name} {x.shape} {x.dtype}".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()


def load_cache(path: str | PathLike[str], like: Array, backend: Backend) -> tuple[State, Settings]:
    """Read it back; ValueError where the file is not what `save_cache` writes."""
    content = Path(path).read_bytes()
    library = _safetensors()
    try:
        named = library.numpy.load(content)
        metadata = _metadata(content)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        if metadata.get("checksum") != _checksum(named, metadata):
            raise ValueError("its checksum is not that of its content")
        settings = _settings(metadata["settings"])
        state = _unflattened(named, int(metadata["n_segments"]))
        if extra := set(named) - {name for name, _ in flattened(state)}:
            raise ValueError(f"it also holds {sorted(extra)}")
        check_contents(state, settings)
    except (library.SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"path must be a file written by KVCache.save, got {path}: {error}"
        ) from error
    if settings.dtype is not None and not hasattr(backend.xp, settings.dtype):
        raise ValueError(
            f"like must be an array of a library that has {settings.dtype}, as the cache is stored in"
        )
    return _brought(state, settings, like, backend), settings


def _metadata(content: bytes) -> dict[str, str]:
    """Metadata of a safetensors file: in the JSON header, whose length comes first."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return {str(name): str(value) for name, value in metadata.items()}


def _settings(text: str) -> Settings:
    given = json.loads(text)
    lists = {name: tuple(x) for name, x in given.items() if isinstance(x, list)}
    return Settings(**(given | lists | {"options": ScoreOptions(**given["options"])}))


def _unflattened(named: Arrays, n_segments: int) -> State:
    def sparse(name: str) -> SparseTokens | None:
        if f"{name}.values" not in named:
            return None
        return SparseTokens(named[f"{name}.values"], named[f"{name}.indices"])

    segments = []
    for i in range(n_segments):
        at = f"segments.{i}"
        maps = SegmentMaps(*(named[f"{at}.maps.{name}"] for name in SegmentMaps._fields))
        start, k, v = (named[f"{at}.{name}"] for name in ("start", "k", "v"))
        parts = (sparse(f"{at}.sparse_k"), sparse(f"{at}.sparse_v"))
        segments.append(Segment(maps, start, k, v, *parts))
    exact = recent = None
    if "exact.k" in named:
        exact = Exact(named["exact.k"], named["exact.v"])
    if "recent.q" in named:
        recent = Recent(named["recent.q"], named["recent.since_check"])
    return State(named["lengths"], tuple(segments), exact, recent, named.get("error"))


def _brought(state: State, settings: Settings, like: Array, backend: Backend) -> State:
    """Bring the arrays to a library; positions stay with NumPy unless they were traced."""
    storage = settings.storage_dtype(backend, None)

    def bring(x: Any, dtype: Any = None) -> Any:
        if x is None:
            return None
        return backend.from_numpy(x, like, dtype or getattr(backend.xp, x.dtype.name))

    def rows(x: Any) -> Any:
        return bring(x, storage if x.dtype.kind == "f" else None)

    def position(x: Any) -> Any:
        is_static = backend.is_functional and settings.capacity is not None
        return bring(x) if is_static else x

    def room(x: Any) -> Any:
        n_rows = x.shape[2] if settings.capacity is None else settings.capacity - settings.n_sink
        return with_rows(x, n_rows, backend)

    segments = []
    for segment in state.segments:
        maps = SegmentMaps(*map(bring, segment.maps))
        held = _map_rows(segment, lambda x: room(rows(x)))
        k = copied(held.k, backend.key_buffer(held.k.shape, held.k.dtype, like), backend)
        segments.append(held._replace(maps=maps, start=position(segment.start), k=k))
    exact = None if state.exact is None else Exact(*map(bring, state.exact))
    recent = None if state.recent is None else state.recent._replace(q=bring(state.recent.q))
    return State(position(state.lengths), tuple(segments), exact, recent, bring(state.error))
