"""What only a GPU can show: the kernels as the device runs them, streams, memory. Run with ``pytest -m gpu``.

The whole test suite runs there too, on the backend ``cupy``.
"""

import numpy as np
import pytest

import slra
from slra._backends import backend_of
from slra._backends.standard.attention import SoftmaxState, TileBounds
from tests.backends import BACKENDS
from tests.cuda_host.cases import OPERANDS, check_values, device_slack, primitives_and_dtypes

pytestmark = pytest.mark.gpu


@pytest.fixture
def cupy():
    """CuPy, where it has a device."""
    if reason := BACKENDS["cupy"].missing():
        pytest.skip(reason)
    return pytest.importorskip("cupy")


@pytest.mark.parametrize(("name", "dtype"), primitives_and_dtypes())
def test_values_are_the_reference_s(cupy, name, dtype):
    import array_api_compat.cupy as xp

    def bring(x):
        if isinstance(x, SoftmaxState):
            return SoftmaxState(*map(bring, x))
        if isinstance(x, TileBounds):
            return x._replace(mask=bring(x.mask))
        if type(x) in (list, tuple):
            return type(x)(map(bring, x))
        return cupy.asarray(x) if isinstance(x, np.ndarray) else x

    check_values(backend_of(xp), name, dtype, bring=bring, fetch=cupy.asnumpy, allowed=device_slack)


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
@pytest.mark.parametrize("view", OPERANDS)
def test_products_of_operands_as_they_lie(cupy, view, dtype):
    from slra._backends.cupy_products import product

    rng = np.random.default_rng(0)
    given = [rng.integers(-8, 8, shape).astype(dtype) for shape in ((2, 3, 5, 4), (2, 3, 4, 6))]
    ours = product(*OPERANDS[view](*map(cupy.asarray, given)))
    a, b = OPERANDS[view](*given)
    # Whole numbers, whose sums are exact in whichever order.
    expected = np.einsum("...mk,...kn->...mn", *(x.astype("complex128") for x in (a, b)))
    np.testing.assert_array_equal(cupy.asnumpy(ours), expected)
    assert ours.dtype == ("float32" if dtype == "float16" else dtype)


def test_kernels_run_on_the_current_stream(cupy):
    x = np.linspace(-1.0, 1.0, 1 << 20)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        result = slra.soft_threshold(cupy.asarray(x), 0.25)
        assert cupy.cuda.get_current_stream() == stream
    stream.synchronize()
    np.testing.assert_array_equal(result.get(), slra.soft_threshold(x, 0.25))


VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.swapaxes(0, 2),
    "strided": lambda x: x[::-1, :, ::2],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
def test_norms_of_large_arrays(cupy, view, dtype):
    """Sums in one step and by segments, of arrays however they lie in memory."""
    x = np.random.default_rng(0).standard_normal((1001, 3, 331)).astype(dtype)
    moduli = np.abs(VIEWS[view](x.astype("complex128")))
    ours = VIEWS[view](cupy.asarray(x))
    # Sums in single precision of up to a million terms of one sign, in a tree, parts or blocks: far below this.
    rtol = 1e-4
    for axis in (None, 1, (0, 2), (0, 1, 2)):
        total = cupy.asnumpy(slra.prox.norm_l1(ours, axis=axis))
        np.testing.assert_allclose(total, np.sum(moduli, axis=axis), rtol=rtol)
    for axis in (1, (0, 2), (0, 1, 2)):
        norm = cupy.asnumpy(slra.prox.norm_l2(ours, axis=axis))
        np.testing.assert_allclose(norm, np.sqrt(np.sum(moduli**2, axis=axis)), rtol=rtol)


def test_attention_holds_no_matrix_of_scores(cupy):
    n, pool = 16384, cupy.get_default_memory_pool()
    rng = cupy.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 64), dtype=np.float32) for _ in range(3))
    out = slra.attention(q, k, v)
    del out
    pool.free_all_blocks()
    before = pool.total_bytes()
    slra.attention(q, k, v)
    # Scores and weights as two matrices of n by n for each of 2 heads, in float32.
    naive = 2 * 2 * n * n * 4
    assert pool.total_bytes() - before < naive / 10


def test_what_is_given_stays_on_the_device(cupy):
    x = cupy.asarray(np.linspace(-1.0, 1.0, 12).reshape(3, 4))
    for result in (slra.soft_threshold(x, 0.1), slra.attention(x, x, x)):
        assert isinstance(result, cupy.ndarray)
        assert result.device == x.device


def test_an_array_on_another_device_is_refused(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("only one device")
    with cupy.cuda.Device(1):
        x = cupy.ones(3)
        assert slra.soft_threshold(x, 0.5).device == x.device
    with pytest.raises(TypeError, match="x must be on CuPy's current device"):
        slra.soft_threshold(x, 0.5)
