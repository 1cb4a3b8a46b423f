"""Layers of a cache of transformers in one file: safetensors, with a checksum; nothing in a file is trusted.

Needs: transformers, torch. A layer in the coordinates of a basis is the file of its `slra.KVCache`, byte by byte.
"""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from slra._files import Arrays, File, read_safetensors, write_safetensors
from slra._validate import check_count, check_rank
from slra.cache import KVCache

__all__ = ["load_layers", "save_layers"]

FORMAT = "slra.LowRankCache 1"
DTYPES = ("float16", "bfloat16", "float32", "float64")
# Of tokens: what a position in 32 bits can count.
MOST = 2**31 - 1


def save_layers(path: File, layers: Sequence[Any], bits: Any, bases: Sequence[Any]) -> None:
    """Write all layers; those of a `KVCache` have it as ``cache``, and ``padding``. Maps of bases are left out."""
    arrays: Arrays = {}
    described = []
    for i, layer in enumerate(layers):
        if hasattr(layer, "padding"):
            if layer.cache is None:
                raise ValueError(
                    f"a cache that is saved must hold tokens in each layer, layer {i} has none"
                )
            file = io.BytesIO()
            layer.cache.save(file, bits=bits, basis=_at(bases, i))
            arrays[f"{i}.cache"] = np.frombuffer(file.getvalue(), np.uint8)
            described.append({"kind": "cache", "padding": layer.padding.tolist()})
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            about: dict[str, Any] = {"kind": "exact"}
            if isinstance(layer, DynamicSlidingWindowLayer):
                about |= {"window": layer.sliding_window, "length": layer.cumulative_length}
            if layer.get_seq_length():
                assert layer.keys is not None
                assert layer.values is not None
                about["dtype"] = str(layer.keys.dtype).removeprefix("torch.")
                for name, x in (("keys", layer.keys), ("values", layer.values)):
                    # NumPy has no bfloat16.
                    x = x.detach().cpu()
                    x = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
                    arrays[f"{i}.{name}"] = x.numpy()
            described.append(about)
        else:
            raise ValueError(
                f"layers must be of attention to be saved, layer {i} is a {type(layer).__name__}"
            )
    write_safetensors(path, arrays, {"format": FORMAT, "layers": json.dumps(described)})


def _at(bases: Sequence[Any], i: int) -> Any:
    return bases[i] if i < len(bases) else None


def load_layers(
    path: File, like: torch.Tensor, bases: Sequence[Any], make: Callable[[KVCache, Any, Any], Any]
) -> list[CacheLayerMixin]:
    """Read them back; ``make`` turns a `KVCache`, the padding of its sequences and its basis into a layer."""
    try:
        arrays, metadata = read_safetensors(path, FORMAT)
        described = json.loads(metadata["layers"])
        layers = [_layer(i, about, arrays, like, bases, make) for i, about in enumerate(described)]
        used = {f"{i}.{name}" for i, about in enumerate(described) for name in _names(about)}
        if used != set(arrays):
            raise ValueError(f"it lacks or has too many of its arrays: {used ^ set(arrays)}")
        held = [layer for layer in layers if layer.is_initialized]
        sizes = {(layer.get_seq_length(), _batch(layer)) for layer in held}
        if len(sizes) != 1:
            raise ValueError(f"its layers are of {len(sizes)} lengths or batches")
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"path must be a file written by LowRankCache.save, got {path}: {error}"
        ) from error
    return layers


def _names(about: dict[str, Any]) -> tuple[str, ...]:
    if about["kind"] == "cache":
        return ("cache",)
    return ("keys", "values") if "dtype" in about else ()


def _batch(layer: Any) -> int:
    return len(layer.padding if hasattr(layer, "padding") else layer.keys)


def _layer(
    i: int,
    about: dict[str, Any],
    arrays: Arrays,
    like: torch.Tensor,
    bases: Sequence[Any],
    make: Callable[[KVCache, Any, Any], Any],
) -> Any:
    if about["kind"] == "cache":
        basis, file = _at(bases, i), io.BytesIO(arrays[f"{i}.cache"].tobytes())
        cache = KVCache.load(file, like=like, basis=basis)
        padding = np.asarray(about["padding"])
        n_tokens = set((np.asarray(cache.lengths) + padding).tolist())
        is_count = padding.dtype.kind == "i" and np.all((padding >= 0) & (padding <= MOST))
        if padding.shape != np.shape(cache.lengths) or not is_count or len(n_tokens) != 1:
            raise ValueError(f"its padding of layer {i} is not that of its tokens")
        return make(cache, padding, basis)
    if about["kind"] != "exact":
        raise ValueError(f"its layer {i} is of the kind {about['kind']!r}")
    layer = DynamicLayer()
    if "window" in about:
        layer = DynamicSlidingWindowLayer(check_rank(about["window"], MOST, "window", "a count"))
        layer.cumulative_length = check_count(about["length"], "length", most=MOST)
    if "dtype" in about:
        _fill(layer, i, about, arrays, like)
    elif about.get("length"):
        raise ValueError(f"its layer {i} lacks tokens")
    return layer


def _fill(
    layer: DynamicLayer, i: int, about: dict[str, Any], arrays: Arrays, like: torch.Tensor
) -> None:
    """Give a layer its keys and values, which have been checked then."""
    dtype, given = about["dtype"], [arrays[f"{i}.{name}"] for name in ("keys", "values")]
    stored = "int16" if dtype == "bfloat16" else dtype
    if dtype not in DTYPES or any(x.dtype.name != stored or x.ndim != 4 for x in given):
        raise ValueError(f"its keys and values of layer {i} are not of {dtype}")
    k, v = (torch.from_numpy(x.copy()).view(getattr(torch, dtype)).to(like.device) for x in given)
    n_tokens = k.shape[-2]
    if k.shape[:3] != v.shape[:3] or 0 in (*k.shape, v.shape[-1]):
        raise ValueError(f"its keys and values of layer {i} do not belong together")
    layer.lazy_initialization(k, v)
    layer.keys, layer.values = k, v
    if isinstance(layer, DynamicSlidingWindowLayer):
        most = layer.cumulative_length
        if not min(most, layer.sliding_window - 1) <= n_tokens <= most:
            raise ValueError(f"its layer {i} holds {n_tokens} tokens of {most}")
