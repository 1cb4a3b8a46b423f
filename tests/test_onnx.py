"""The cases that ONNX publishes for its operator Attention, whose outputs its reference in NumPy computes."""

import functools
import warnings

import array_api_compat as compat
import numpy as np
import pytest

import slra
from tests.backends import to_numpy, to_xp

onnx = pytest.importorskip("onnx", reason="onnx, which ships the cases, is not installed")

N_CASES = 93


@functools.cache
def cases():
    """Cases by name; importing the module that makes them takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case import node
        from onnx.backend.test.case.node import attention

    assert attention.Attention
    made = {
        case.name: case for case in node._NodeTestCases if case.name.startswith("test_attention")
    }
    return {name: case for name, case in made.items() if not name.endswith("_expanded")}


def test_all_of_them_are_found():
    # Later versions may have more.
    assert len(cases()) >= N_CASES


def by_head(x, n_heads):
    """(batch, length, heads * width) as (batch, heads, length, width)."""
    return x if x.ndim == 4 else x.reshape(*x.shape[:2], n_heads, -1).swapaxes(1, 2)


def whole(mask, n_keys):
    """Hide the keys that a mask does not reach."""
    mask = mask if mask.ndim > 1 else mask[None]
    fill = False if mask.dtype == bool else -np.inf
    beyond = np.full((*mask.shape[:-1], n_keys - mask.shape[-1]), fill, dtype=mask.dtype)
    return np.concatenate([mask, beyond], axis=-1)


def translated(case):
    """Return arrays, options and the output of a case, in our terms."""
    (node,) = case.model.graph.node
    said = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    ((inputs, outputs),) = case.data_sets
    stream = iter(inputs)
    given = {
        place: next(stream)
        for place, name in zip(
            ("q", "k", "v", "mask", "past_k", "past_v", "lengths"), node.input, strict=False
        )
        if name
    }
    n_heads = said.get("q_num_heads"), said.get("kv_num_heads"), said.get("kv_num_heads")
    q, k, v = (by_head(given[name], n) for name, n in zip("qkv", n_heads, strict=True))
    options = {"enable_gqa": True, "causal_align": "top_left"}
    if "past_k" in given:
        options["causal_align"] = given["past_k"].shape[-2]
        k, v = (np.concatenate([given[f"past_{n}"], x], axis=-2) for n, x in (("k", k), ("v", v)))
    if "lengths" in given:
        options |= {"lengths_k": given["lengths"].tolist(), "causal_align": "bottom_right"}
    window = tuple(said.get(f"{side}_window_size", -1) for side in ("left", "right"))
    if window != (-1, -1):
        options["window"] = window
    options |= {name: said[name] for name in ("scale", "softcap") if said.get(name)}
    options["is_causal"] = bool(said.get("is_causal", 0))
    mask = whole(given["mask"], k.shape[-2]) if "mask" in given else None
    return (q, k, v, mask), options, by_head(outputs[0], said.get("q_num_heads"))


# Their names are known only once onnx has made them.
@pytest.mark.parametrize("number", range(N_CASES))
def test_case(xp, number):
    (q, k, v, mask), options, right = translated(list(cases().values())[number])
    is_narrow = q.dtype.name == "bfloat16" and not compat.is_numpy_namespace(xp)
    if is_narrow and not hasattr(xp, "bfloat16"):
        pytest.skip("no bfloat16 here")
    if q.dtype.name == "float16" and not hasattr(xp, "float16"):
        pytest.skip("no float16 here")

    def brought(x):
        return xp.astype(to_xp(xp, x.astype("float32")), xp.bfloat16) if is_narrow else to_xp(xp, x)

    arrays = [brought(x) for x in (q, k, v)]
    if mask is not None:
        options["mask"] = to_xp(xp, mask) if mask.dtype == bool else brought(mask)
    out = slra.attention(*arrays, **options)
    out = to_numpy(xp.astype(out, xp.float32) if is_narrow else out).astype("float64")
    # The reference computes in half precision, where the arrays are.
    eps = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[q.dtype.name]
    np.testing.assert_allclose(out, right.astype("float64"), rtol=0, atol=8 * eps)
