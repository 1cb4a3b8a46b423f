"""What only a GPU can show: the kernels as the device runs them, streams, memory. Run with ``pytest -m gpu``.

The whole test suite runs there too, on the backend ``cupy``.
"""

import numpy as np
import pytest

import slra
from slra._backends import primitives
from slra._backends.agnostic_attention import SoftmaxState, TileBounds
from tests.backends import BACKENDS
from tests.cuda_host.cases import check_values, device_slack, primitives_and_dtypes

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
        return cupy.asarray(x) if isinstance(x, np.ndarray) else x

    check_values(primitives(xp), name, dtype, bring=bring, fetch=cupy.asnumpy, allowed=device_slack)


def test_kernels_run_on_the_current_stream(cupy):
    x = np.linspace(-1.0, 1.0, 1 << 20)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        result = slra.soft_threshold(cupy.asarray(x), 0.25)
        assert cupy.cuda.get_current_stream() == stream
    stream.synchronize()
    np.testing.assert_array_equal(result.get(), slra.soft_threshold(x, 0.25))


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
