"""Caches in files: safetensors, with options and a checksum in the metadata; nothing in a file is trusted."""

import dataclasses
import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from slra._backends import Backend
from slra._typing import Array
from slra.attn.basis import AttentionBasis, Maps
from slra.cache._checks import check_options
from slra.cache._contents import Contents
from slra.cache._exact_tokens import ExactTokens, RecentQueries
from slra.cache._layout import Layout, named_arrays, on_host, with_arrays
from slra.cache._segment import FloatRows, Segment

__all__ = ["load_contents", "save_contents"]

FORMAT = "slra.KVCache 2"
Arrays = dict[str, np.ndarray[Any, Any]]


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            'saving and loading a KVCache needs safetensors: pip install "slra[safetensors]"'
        ) from error
    return safetensors


def save_contents(path: str | PathLike[str], contents: Contents) -> None:
    """Write what is in use to exactly this path."""
    library, backend = _safetensors(), contents.layout.backend
    named, in_bfloat16 = {}, []
    for name, x in named_arrays(_without_room(contents).replace(turns=None)).items():
        if not on_host(x) and x.dtype == getattr(backend.xp, "bfloat16", None):
            # NumPy has no such dtype; single precision holds all its values.
            x = backend.xp.astype(x, backend.xp.float32)
            in_bfloat16.append(name)
        named[name] = np.asarray(x if on_host(x) else backend.to_numpy(x), order="C")
    metadata = {
        "format": FORMAT,
        "layout": _described(contents.layout),
        "n_segments": str(len(contents.segments)),
        "bfloat16": json.dumps(in_bfloat16),
    }
    metadata["checksum"] = _checksum(named, metadata)
    Path(path).write_bytes(library.numpy.save(named, metadata))


def _without_room(contents: Contents) -> Contents:
    """Cut off rows that no token has been written to."""
    if not on_host(contents.lengths):
        return contents
    segments = []
    for segment in contents.segments:
        n_used = max(0, int(np.max(contents.lengths - segment.start)))
        n_rows = min(n_used, segment.rows.n_rows)
        rows = segment.rows.map(lambda x, n=n_rows: x[:, :, :n, :])
        segments.append(segment.replace(rows=rows))
    return contents.replace(segments=tuple(segments))


def _described(layout: Layout) -> str:
    fields = {name: x for name, x in vars(layout).items() if name in Layout.__dataclass_fields__}
    del fields["xp"]
    return json.dumps(fields | {"score_options": layout.score_options._asdict()}, sort_keys=True)


def _checksum(named: Arrays, metadata: dict[str, str]) -> str:
    """SHA-256 of metadata, names, shapes, dtypes and content."""
    metadata = {name: x for name, x in metadata.items() if name != "checksum"}
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, x in sorted(named.items()):
        digest.update(f"{name} {x.shape} {x.dtype}".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()


def load_contents(path: str | PathLike[str], like: Array, backend: Backend) -> Contents:
    """Read them back; ValueError where the file is not what `save_contents` writes."""
    content = Path(path).read_bytes()
    library = _safetensors()
    try:
        named = library.numpy.load(content)
        metadata = _metadata(content)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        if metadata.get("checksum") != _checksum(named, metadata):
            raise ValueError("its checksum is not that of its content")
        in_bfloat16 = set(json.loads(metadata["bfloat16"]))
        n_segments = int(metadata["n_segments"])
        bases = [_basis(named, i, metadata["layout"]) for i in range(n_segments)]
        layout = _layout(bases, metadata["layout"])
        _check_arrays(named, layout, n_segments)
    except (library.SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"path must be a file written by KVCache.save, got {path}: {error}"
        ) from error
    if (in_bfloat16 or layout.dtype == "bfloat16") and not hasattr(backend.xp, "bfloat16"):
        raise ValueError(
            "like must be an array of a library that has bfloat16, as the cache is stored in"
        )
    layout = dataclasses.replace(layout, xp=backend.xp)
    return _brought(named, in_bfloat16, bases, layout, like)


def _metadata(content: bytes) -> dict[str, str]:
    """Metadata of a safetensors file: in the JSON header, whose length comes first."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return {str(name): str(value) for name, value in metadata.items()}


def _basis(named: Arrays, i: int, described: str) -> AttentionBasis:
    """Make the basis of a segment, for the checks that bases go through."""
    given = json.loads(described)
    maps = {name: named[f"segments.{i}.maps.{name}"] for name in Maps._fields[:-1]}
    if any(
        0 in x.shape or x.ndim != 4 or x.dtype not in (np.float32, np.float64)
        for x in maps.values()
    ):
        raise ValueError(f"its maps of segment {i} are not single or double precision of four axes")
    own = () if given["pool_batch"] else tuple(given["batch"])
    maps = {name: x.reshape(*own, *x.shape[1:]) for name, x in maps.items()}
    rank = (maps["wk"].shape[-1], maps["wv"].shape[-1])
    error = np.broadcast_to(maps["wk"].dtype.type(0), maps["wq"].shape[:-2])
    return AttentionBasis(**maps, ranks=(rank,) * maps["wk"].shape[-3], error=error)


def _layout(bases: list[AttentionBasis], described: str) -> Layout:
    """Check the options as those of a new cache; the rest of the description has to follow from the maps."""
    given = json.loads(described)
    names = ("batch", "window", "n_sink", "n_sparse", "capacity", "rotary", "drift_bound", "method")
    options = {name: given[name] for name in names} | given["score_options"]
    options = {name: options[name] for name in (*names, "scale", "softcap")}
    layouts = {check_options(basis, **options, dtype=None) for basis in bases}
    if len(layouts) != 1:
        raise ValueError("its segments do not belong together")
    (layout,) = layouts
    if given["dtype"] is not None:
        # NumPy, by which this is checked, has no bfloat16.
        stored = "float32" if given["dtype"] == "bfloat16" else given["dtype"]
        check_options(bases[0], **options, dtype=stored)
        layout = dataclasses.replace(layout, dtype=given["dtype"])
    if _described(layout) != described:
        raise ValueError(f"its settings are not those of its maps: {described}")
    return layout


def _check_arrays(named: Arrays, layout: Layout, n_segments: int) -> None:
    """Raise ValueError where an array does not have the shape and kind that the layout says."""
    work, n_batch = named["segments.0.maps.wk"].dtype, layout.n_batch
    shapes: dict[str, tuple[int, ...]] = {"lengths": (n_batch,)}
    ends = [named[f"segments.{i}.start"] for i in range(1, n_segments)] + [named["lengths"]]
    for i, end in enumerate(ends):
        at, n_rows = f"segments.{i}", named[f"segments.{i}.rows.v"].shape[2]
        shapes[f"{at}.start"] = (n_batch,)
        shapes |= {f"{at}.rows.{x}": shape for x, shape in FloatRows.shapes(layout, n_rows).items()}
        if np.any(end - named[f"{at}.start"] > n_rows):
            raise ValueError("its segments hold fewer tokens than its lengths say")
        if layout.capacity is not None and n_rows > layout.capacity - layout.n_sink:
            raise ValueError("its segments hold more tokens than its capacity")
        for name, width in (("sparse_k", layout.width), ("sparse_v", layout.width_v)):
            indices = named.get(f"{at}.rows.{name}.indices")
            if indices is not None and np.any((indices < 0) | (indices >= width)):
                raise ValueError(f"its {name}.indices are not between 0 and {width - 1}")
    shapes |= {f"exact.{name}": shape for name, shape in ExactTokens.shapes(layout).items()}
    if layout.drift_bound is not None:
        n_queries = min(layout.window, named["recent.q"].shape[2])
        shapes["recent.q"] = (n_batch, layout.n_query_heads, n_queries, layout.width)
        shapes["recent.since_check"] = ()
    if "error" in named:
        lead = () if named["error"].ndim == 1 else layout.batch
        shapes["error"] = (*lead, layout.n_query_heads)
    others = {name for name in named if ".maps." not in name}
    if others != set(shapes):
        raise ValueError(f"it lacks or has too many of its arrays: {sorted(others ^ set(shapes))}")
    stored: dict[str, Any] = {}
    for name, shape in shapes.items():
        x, kind = named[name], "i" if _counts(name) else "f"
        # Keys and values beside each other have one dtype, no wider than the maps.
        dtype = stored.setdefault(name.rpartition(".")[0], x.dtype) if kind == "f" else x.dtype
        if x.shape != shape or x.dtype.kind != kind or x.dtype != dtype:
            raise ValueError(f"its {name} is {x.dtype} of shape {x.shape}, not {kind} of {shape}")
        if kind == "f" and x.dtype.itemsize > work.itemsize:
            raise ValueError(f"its {name} is {x.dtype}, wider than its maps")
    if np.any(named["lengths"] < 0) or np.any(named["segments.0.start"] != layout.n_sink):
        raise ValueError("its lengths are negative, or its first segment is not after the sinks")


def _counts(name: str) -> bool:
    """Whether an array holds places rather than data."""
    return name.rpartition(".")[2] in ("lengths", "start", "since_check", "indices")


def _brought(
    named: Arrays, in_bfloat16: set[str], bases: list[AttentionBasis], layout: Layout, like: Array
) -> Contents:
    """Bring the arrays to a library; positions stay with NumPy unless they were traced."""
    backend, xp, arrays = layout.backend, layout.xp, dict[str, Any](named)
    for name, x in named.items():
        is_position = _counts(name) and not name.endswith("indices")
        if not is_position or (layout.is_static and not name.startswith("recent")):
            dtype = xp.bfloat16 if name in in_bfloat16 else getattr(xp, x.dtype.name)
            arrays[name] = backend.from_numpy(x, like, dtype)
    segments = []
    for i in range(len(bases)):
        at = f"segments.{i}"
        maps = Maps(**{name: arrays[f"{at}.maps.{name}"] for name in Maps._fields[:-1]}, ranks=())
        v = arrays[f"{at}.rows.v"]
        n_rows = v.shape[2] if layout.capacity is None else layout.capacity - layout.n_sink
        rows = FloatRows.empty(layout, n_rows, like, v.dtype)
        rows = rows.filled(with_arrays(rows, arrays, layout, f"{at}.rows"))
        segments.append(Segment(layout, maps, arrays[f"{at}.start"], rows))
    exact = ExactTokens(layout, arrays["exact.k"], arrays["exact.v"])
    recent = None
    if layout.drift_bound is not None:
        recent = RecentQueries(layout, arrays["recent.q"], arrays["recent.since_check"])
    lengths, error = arrays["lengths"], arrays.get("error")
    return Contents(layout, lengths, tuple(segments), exact, recent, error, None).with_turns()
