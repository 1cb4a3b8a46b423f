"""The CuPy path on a machine without a GPU: kernels compiled, kernels run, primitives dispatched, and mutants caught.

- NVRTC compiles every kernel for every dtype to PTX, for each supported generation of GPUs.
- g++ compiles the same text, and what it computes is compared with the array API reference.
- A CuPy namespace gets the CuPy table, whose overrides run.
- Deliberately broken kernels fail each of these checks that should see them.
"""

import array_api_compat.numpy as np_xp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import slra
from slra._backends import Primitives, primitives
from tests.cuda_host import host, nvrtc

ARCHITECTURES = [75, 80, 90, 100]
needs_compiler = pytest.mark.skipif(host.why_not() is not None, reason=str(host.why_not()))
needs_nvrtc = pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
REFERENCE = Primitives(np_xp)


def defined():
    """Names and dtypes of all kernels; importing the real table needs CuPy."""
    with host.cupy_on_host():
        from slra._backends.cupy_kernels import KERNELS

        return list(KERNELS)


# NVRTC


def check_compiles(name, dtype, architecture, source=None):
    from slra._backends import cupy_kernels

    kernel = cupy_kernels.build(name, dtype, source or cupy_kernels.SOURCE)
    for scalars, ndim in ((False, 1), (True, 1), (False, 4)):
        text = nvrtc.ptx(kernel, architecture, scalars=scalars, ndim=ndim)
        assert f".entry slra_{name}_{dtype}(" in text
        assert f".target sm_{architecture}" in text


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "dtype"), defined())
def test_nvrtc_compiles(name, dtype, architecture):
    check_compiles(name, dtype, architecture)
