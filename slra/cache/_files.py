"""Caches in files: safetensors, with options and a checksum in the metadata; nothing in a file is trusted."""

import dataclasses
import json
from typing import Any, cast

import numpy as np

from slra._backends import Backend
from slra._files import Arrays, File, read_safetensors, safetensors_content, write_file
from slra._typing import Array
from slra._validate import check_rank
from slra.attn.basis import AttentionBasis
from slra.attn.maps import NAMES_OF_MAPS, Maps
from slra.cache._bits import BitRows, ByteRows
from slra.cache._checks import MOST, check_bits, check_options
from slra.cache._contents import Contents
from slra.cache._layout import Layout, map_arrays, named_arrays, on_host, with_arrays
from slra.cache._maps_apart import check_given, with_maps, without_maps
from slra.cache._parked import Coded, ParkedRows, codec, damaged_chunks, park, unparked
from slra.cache._segment import FloatRows, laid_out

__all__ = ["load_contents", "save_contents"]

FORMAT = "slra.KVCache 5"
# Arrays that are NumPy's, unless shapes are static.
POSITIONS = (
    *("lengths", "start", "since_check"),
    *("filled", "headers", "widest", "used"),
    *Coded._fields,
)
# Of the bits asked for, what says how chunks are coded may take at most; of a few tokens the rest comes on top.
MOST_OF_HEADERS = 0.1
# How near to the bits asked for is near enough, of them.
NEAR = 0.005


def save_contents(path: File, contents: Contents, bits: Any, basis: Any) -> None:
    """Write what is in use to exactly this path; with an entropy code where bits are given, without maps of a basis."""
    contents = _without_room(contents)
    if bits is not None:
        contents = _parked(contents, bits)
    write_file(path, _content(contents, basis))


def _parked(contents: Contents, bits: Any) -> Contents:
    """Code rows in so many bits a number of the keys and of the values, headers and all."""
    asked, layout = np.asarray(check_bits(bits)), contents.layout
    held = [segment.rows for segment in contents.segments if isinstance(segment.rows, BitRows)]
    if not held:
        raise ValueError(
            "bits must be None but for a cache that has bits or rtol (8 bits lose next to nothing), and no static "
            f"shapes; got {bits}"
        )
    codec()
    target = asked
    numbers = layout.n_coded * np.asarray(layout.rank) * max(1, sum(x.filled.sum() for x in held))
    for _ in range(3):
        segments, n_bytes, is_finest = [], np.zeros(2), np.ones(2, dtype=bool)
        for segment, rows in zip(contents.segments, held, strict=True):
            maps, parked, is_same = park(rows, segment.maps, target)
            is_finest &= is_same
            n_bytes += parked.k.nbytes, parked.v.nbytes
            # Such rows are nowhere but in files.
            segments.append(segment._replace(maps=maps, rows=cast(Any, parked)))
        took = 8 * n_bytes / numbers
        if np.all((np.abs(took - asked) < NEAR * asked) | (is_finest & (took < asked))):
            break
        target = np.maximum(target - (took - asked), (1 - MOST_OF_HEADERS) * asked)
    return contents._replace(segments=tuple(segments))


def _content(contents: Contents, basis: Any) -> bytes:
    backend = contents.layout.backend
    named, in_bfloat16 = {}, []
    for name, x in named_arrays(_without_index(contents)._replace(turns=None)).items():
        if not on_host(x) and x.dtype == getattr(backend.xp, "bfloat16", None):
            # NumPy has no such dtype; single precision holds all its values.
            x = backend.xp.astype(x, backend.xp.float32)
            in_bfloat16.append(name)
        named[name] = np.asarray(x if on_host(x) else backend.to_numpy(x))
    metadata = {
        "format": FORMAT,
        "layout": _described(contents.layout),
        "n_segments": str(len(contents.segments)),
        "bfloat16": json.dumps(in_bfloat16),
    }
    if basis is not None:
        named, metadata["basis"] = without_maps(named, contents, basis)
    return safetensors_content(named, metadata)


def _without_room(contents: Contents) -> Contents:
    """Cut off rows that no token has been written to."""
    if not on_host(contents.lengths):
        return contents
    segments = []
    for segment in contents.segments:
        n_used = max(0, int(np.max(contents.lengths - segment.start)))
        rows = segment.rows.first(min(n_used, segment.rows.n_rows))
        segments.append(segment._replace(rows=rows))
    return contents._replace(segments=tuple(segments))


def _without_index(contents: Contents) -> Contents:
    """Leave out what is made anew of the rest: a file that has it could say anything."""
    return contents._replace(
        segments=tuple(
            segment._replace(rows=segment.rows.without_index())
            if isinstance(segment.rows, BitRows)
            else segment
            for segment in contents.segments
        )
    )


def _described(layout: Layout) -> str:
    fields = {name: x for name, x in vars(layout).items() if name in Layout.__dataclass_fields__}
    del fields["xp"]
    return json.dumps(fields | {"score_options": layout.score_options._asdict()}, sort_keys=True)


def load_contents(path: File, like: Array, backend: Backend, basis: Any) -> Contents:
    """Read them back; ValueError where the file is not what `save_contents` writes."""
    try:
        named, metadata = read_safetensors(path, FORMAT, damaged_chunks)
    except ValueError as error:
        raise _not_one(path, error) from error
    told = metadata.get("basis")
    check_given(told, basis)
    try:
        if told is not None:
            named = with_maps(named, basis)
        in_bfloat16 = set(json.loads(metadata["bfloat16"]))
        template = _template(named, int(metadata["n_segments"]), metadata["layout"])
        _check_arrays(named, template)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _not_one(path, error) from error
    layout = dataclasses.replace(template.layout, xp=backend.xp)
    if (in_bfloat16 or layout.dtype == "bfloat16") and not hasattr(backend.xp, "bfloat16"):
        raise ValueError(
            "like must be an array of a library that has bfloat16, as the cache is stored in"
        )
    if layout.is_static and layout.is_coded and "segments.0.rows.step_k" not in named:
        raise ValueError(
            "like must be an array that can be written to: the cache has a capacity, and bits in blocks"
        )
    for name, x in named.items():
        if layout.is_static or not _is_position(name):
            dtype = "bfloat16" if name in in_bfloat16 else x.dtype.name
            named[name] = backend.from_numpy(x, like, getattr(backend.xp, dtype))
    contents = with_arrays(template, named, layout)
    segments = []
    for segment in contents.segments:
        held: Any = segment.rows
        if isinstance(held, ParkedRows):
            try:
                segments.append(segment._replace(rows=unparked(held, segment.maps.wk)))
            except ValueError as error:
                raise _not_one(path, error) from error
            continue
        if isinstance(held, BitRows):
            segments.append(segment._replace(rows=held.indexed()))
            continue
        if not isinstance(held, FloatRows):
            segments.append(segment)
            continue
        # Keys lie in memory as the library likes them best.
        n_rows = held.n_rows if layout.capacity is None else layout.capacity - layout.n_sink
        rows = FloatRows.empty(layout, n_rows, segment.maps.wk, held.v.dtype).filled(held)
        segments.append(segment._replace(rows=rows))
    return contents._replace(segments=tuple(segments)).with_turns()


def _not_one(path: File, why: Exception) -> ValueError:
    return ValueError(f"path must be a file written by KVCache.save, got {path}: {why}")


def _template(named: Arrays, n_segments: int, described: str) -> Contents:
    """Make an empty cache of the options and maps in a file, by the checks that those of a new cache go through."""
    given = json.loads(described)
    bases = [_basis(named, i, given) for i in range(n_segments)]
    names = (
        *("batch", "window", "n_sink", "n_sparse", "rotary", "drift_bound", "method"),
        *("n_top", "top_p", "rank_index", "index"),
    )
    is_coded = given["bits"] is not None or given["rtol"] is not None
    options = {name: given[name] for name in names} | given["score_options"]
    options = {name: options[name] for name in (*names, "scale", "softcap")}
    # NumPy, by which this is checked, has no bfloat16.
    stored = "float32" if given["dtype"] == "bfloat16" else given["dtype"]
    layouts = {
        check_options(basis, **options, capacity=given["capacity"], dtype=stored) for basis in bases
    }
    layout = layouts.pop()
    if is_coded:
        bits = None if given["bits"] is None else check_bits(given["bits"])
        coded = {"bits": bits, "rtol": given["rtol"], "across_heads": bool(given["across_heads"])}
        layout = dataclasses.replace(layout, **coded)
    described_now = _described(dataclasses.replace(layout, dtype=given["dtype"]))
    n_exact = layout.n_batch * layout.n_heads * layout.n_exact * layout.width
    # Sizes first: settings that are not those of the arrays might ask for any amount of memory.
    sizes = layout.n_batch - len(named["lengths"]), n_exact - named["exact.k"].size
    if layouts or described_now != described or any(sizes):
        raise ValueError(f"its settings are not those of its arrays: {described}")
    layout = dataclasses.replace(layout, capacity=None)
    error = None if "error" not in named else bases[0].error
    if error is not None and named["error"].ndim == 1:
        error = error[(0,) * (error.ndim - 1)]
    maps = [laid_out(basis, layout) for basis in bases]
    if is_coded:
        maps = [one._replace(wq=one.wq[:, :, :1]) for one in maps]
    if layout.across_heads:
        maps = [_beside(one, layout) for one in maps]
    template = _without_index(Contents.empty(layout, maps[0], error))._replace(turns=None)
    (segment,) = template.segments
    if "segments.0.rows.step_k" in named:
        segment = segment._replace(rows=ByteRows.empty(layout, 0, maps[0].wk))
    if "segments.0.rows.k.words" in named:
        segment = segment._replace(rows=cast(Any, ParkedRows.empty(layout, maps[0].wk)))
    segments = tuple(segment._replace(maps=one) for one in maps)
    layout = dataclasses.replace(layout, capacity=given["capacity"], dtype=given["dtype"])
    template = template._replace(segments=segments)
    return map_arrays(lambda x: x, template, layout=layout)


def _basis(named: Arrays, i: int, given: dict[str, Any]) -> AttentionBasis:
    """Make the basis of a segment."""
    maps: dict[str, Any] = {name: named[f"segments.{i}.maps.{name}"] for name in Maps._fields[:-1]}
    if any(0 in x.shape or x.dtype not in (np.float32, np.float64) for x in maps.values()):
        raise ValueError(f"its maps of segment {i} are empty, or not in single or double precision")
    own = () if given["pool_batch"] else tuple(given["batch"])
    if given["across_heads"]:
        maps = _of_heads(maps, check_rank(given["n_heads"], MOST))
    # By head, as a basis has them.
    maps = {name: x.reshape(*own, -1, *x.shape[-2:]) for name, x in maps.items()}
    if given["bits"] is not None or given["rtol"] is not None or given["index"] == "query":
        # The query heads share a map: how many they are is not in its shape.
        maps["wq"] = np.repeat(maps["wq"], check_rank(given["n_shared"], MOST), axis=-3)
    rank = (maps["wk"].shape[-1], maps["wv"].shape[-1])
    error = np.broadcast_to(maps["wk"].dtype.type(0), maps["wq"].shape[:-2])
    ranks = (rank,) * maps["wk"].shape[-3]
    wq, wk, wv, uv, c, mu = (maps[name] for name in NAMES_OF_MAPS)
    return AttentionBasis(wq, wk, wv, uv, c, mu, ranks, error)


def _of_heads(maps: dict[str, Any], n: int) -> dict[str, Any]:
    """Give each head its part of maps that are for all of them, side by side."""
    found = {}
    for name, x in maps.items():
        *_, a, b = x.shape
        if name in ("uv", "c", "mu"):
            found[name] = np.swapaxes(x.reshape(-1, a, n, b // n), 1, 2)
        else:
            found[name] = x.reshape(-1, n, a // n, b)
    return found


def _beside(maps: Maps, layout: Layout) -> Maps:
    """Undo `_of_heads`, as far as shapes go."""
    n, (d_k, d_v) = layout.n_heads, layout.rank
    if (d_k, d_v) != (n * layout.width, n * layout.width_v):
        raise ValueError(f"its {(d_k, d_v)} coordinates are not those of {n} heads")
    last = ((d_k, d_k), (d_k, d_k), (d_v, d_v), (d_v, d_v), (1, d_k), (1, d_v))
    shapes = dict(zip(NAMES_OF_MAPS, last, strict=True))
    zero, lead = maps.wk.dtype.type(0), len(maps.wk)
    empty = {name: np.broadcast_to(zero, (lead, 1, 1, *shape)) for name, shape in shapes.items()}
    return Maps(**empty, ranks=())


def _check_arrays(named: Arrays, template: Contents) -> None:
    """Raise ValueError where an array is not what it is in an empty cache, but for the number of rows."""
    layout, expected = template.layout, named_arrays(template)
    if set(named) != set(expected):
        raise ValueError(f"it lacks or has too many of its arrays: {set(named) ^ set(expected)}")
    for name, right in expected.items():
        x, shape, (held, _, field) = named[name], list(right.shape), name.rpartition(".")
        at, is_row, part = name.partition(".rows.")
        if is_row and part.startswith(("k.", "v.")):
            axis = {"heap": 2, "whole": 2, "headers": 1, **dict.fromkeys(Coded._fields, 0)}.get(
                field
            )
            if axis is not None:
                shape[axis] = x.shape[axis]
        elif is_row and len(shape) == 4:
            shape[2] = named[f"{at}.rows.v"].shape[2]
        elif name == "recent.q":
            shape[2] = min(layout.window, x.shape[2])
        # Keys and values beside each other have one dtype, no wider than the maps.
        same = named[f"{held}.v"] if field == "k" and not layout.is_coded else x
        is_kind = x.dtype.kind == right.dtype.kind and x.dtype == same.dtype
        if list(x.shape) != shape or not is_kind or x.dtype.itemsize > right.dtype.itemsize:
            raise ValueError(
                f"its {name} is {x.dtype} of shape {x.shape}, not {right.dtype} of {shape}"
            )
        if name.endswith("indices"):
            width = layout.width if "sparse_k" in name else layout.width_v
            if np.any((x < 0) | (x >= width)):
                raise ValueError(f"its {name} are not between 0 and {width - 1}")
    lengths, n_segments = named["lengths"], len(template.segments)
    starts = [named[f"segments.{i}.start"] for i in range(n_segments)]
    if layout.is_coded and "segments.0.rows.filled" in named:
        _check_bits(with_arrays(template, named, layout), lengths, starts)
        return
    rooms = [named[f"segments.{i}.rows.v"].shape[2] for i in range(n_segments)]
    if np.any(lengths < 0) or np.any(starts[0] != layout.n_sink):
        raise ValueError("its lengths are negative, or its first segment is not after the sinks")
    for start, end, room in zip(starts, [*starts[1:], lengths], rooms, strict=True):
        if np.any(end - start > room):
            raise ValueError("its segments hold fewer tokens than its lengths say")
    if layout.capacity is not None and max(rooms) > layout.capacity - layout.n_sink:
        raise ValueError("its segments hold more tokens than its capacity")


def _check_bits(contents: Contents, lengths: Array, starts: list[Array]) -> None:
    """Raise ValueError where packed rows do not hold what positions say."""
    for segment, start, end in zip(contents.segments, starts, [*starts[1:], lengths], strict=True):
        rows: Any = segment.rows
        if not isinstance(rows, (BitRows, ParkedRows)) or np.any(
            rows.filled < np.maximum(end - start, 0)
        ):
            raise ValueError("its segments hold fewer tokens than its lengths say")
        if np.any(rows.filled < 0):
            raise ValueError("its segments hold fewer tokens than none")
        rows.check()


def _is_position(name: str) -> bool:
    """Whether an array counts tokens, which is done by NumPy unless shapes are static."""
    return name.rpartition(".")[2] in POSITIONS
