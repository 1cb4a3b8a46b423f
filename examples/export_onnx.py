"""slra's functions as ONNX graphs, for whoever serves without Python.

ndonnx (https://github.com/Quantco/ndonnx) records what a function does to arrays that have no values yet, and writes
it down as an ONNX graph. Here that is done to the soft threshold, to exact attention whose query heads share keys under
a mask, to attention in a basis that was fitted before, and to a step of a decoder with a cache of fixed length;
onnxruntime runs each graph, and NumPy runs the same function.

    pip install ndonnx onnxruntime
    python -m examples.export_onnx
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ndonnx as ndx
import numpy as np
import onnxruntime

import slra

N_HEADS, N_SHARED, LENGTH, WIDTH = 4, 2, 12, 8


def export(function: Callable[..., Any], inputs: dict[str, np.ndarray[Any, Any]]) -> Any:
    """Record a function of named arrays of these shapes and dtypes; an ONNX model with outputs out0, out1, ..."""
    arguments = {
        name: ndx.argument(shape=x.shape, dtype=getattr(ndx, x.dtype.name))
        for name, x in inputs.items()
    }
    outputs = _listed(function(**arguments))
    return ndx.build(arguments, {f"out{i}": x for i, x in enumerate(outputs)})


def _listed(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def difference(
    function: Callable[..., Any], inputs: dict[str, np.ndarray[Any, Any]], plain: Any = None
) -> float:
    """Export, run by onnxruntime, and compare with NumPy: the largest difference of an output."""
    model = export(function, inputs).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    right = _listed((plain or function)(**inputs))
    found = session.run(None, inputs)
    return max(float(np.max(np.abs(x - y))) for x, y in zip(found, right, strict=True))


def attention(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Attend with query heads that share the heads of keys."""
    return slra.attention(q, k, v, mask=mask, enable_gqa=True)


def decode(q: Any, new_k: Any, new_v: Any, keys: Any, values: Any, length: Any) -> Any:
    """Write one token into a cache of fixed length after the ``length`` that it holds, and attend to all of these."""
    xp = keys.__array_namespace__()
    is_new = xp.arange(keys.shape[-2])[:, None] == length
    keys, values = xp.where(is_new, new_k, keys), xp.where(is_new, new_v, values)
    out = slra.attention(q, keys, values, lengths_k=xp.reshape(length + 1, (1,)), enable_gqa=True)
    return out, keys, values


def main() -> dict[str, float]:
    """Export all four; print and return how far onnxruntime is from NumPy."""
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    q = drawn(1, N_HEADS, LENGTH, WIDTH)
    k, v = (drawn(1, N_HEADS // N_SHARED, LENGTH, WIDTH) for _ in range(2))
    three = {"q": q, "k": k, "v": v}
    mask = rng.random((LENGTH, LENGTH)) < 0.7
    basis = slra.fit_attention(q[0], k[0], v[0], 4, enable_gqa=True)
    with tempfile.TemporaryDirectory() as folder:
        basis.save(Path(folder) / "basis.npz")
        # The maps become constants of the graph.
        constant = slra.AttentionBasis.load(
            Path(folder) / "basis.npz", like=ndx.asarray(np.zeros(1, dtype=np.float32))
        )
    step = {
        "q": drawn(1, N_HEADS, 1, WIDTH),
        "new_k": drawn(1, N_HEADS // N_SHARED, 1, WIDTH),
        "new_v": drawn(1, N_HEADS // N_SHARED, 1, WIDTH),
        "keys": k,
        "values": v,
        "length": np.asarray(5),
    }
    differences = {
        "soft threshold": difference(lambda x: slra.soft_threshold(x, 0.5), {"x": drawn(5, 7)}),
        "attention, shared heads, mask": difference(attention, {**three, "mask": mask}),
        "AttentionBasis.attend": difference(
            lambda q, k, v: constant.attend(q, k, v, enable_gqa=True),
            three,
            lambda q, k, v: basis.attend(q, k, v, enable_gqa=True),
        ),
        "a step of a decoder": difference(decode, step),
    }
    for name, found in differences.items():
        print(f"{name}: onnxruntime and NumPy differ by {found:.1e}")
    return differences


if __name__ == "__main__":
    main()
