"""PyTorch: gradients, torch.compile without a break, torch.func.vmap, and bfloat16."""

import numpy as np
import pytest

import slra
from slra._backends import backend_of, standard
from tests.transforms import CASES, WITH_A_CONSTANT_BASIS, arguments

torch = pytest.importorskip("torch")
compat_torch = pytest.importorskip("array_api_compat.torch")
pytestmark = [
    # Dynamo warns of every lru_cache that it meets.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # Torch calls what it deprecates, in forward mode.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


def tensors(name, **options):
    return [torch.from_numpy(x) for x in arguments(name, **options)]


@pytest.mark.parametrize("name", sorted(CASES.keys() - WITH_A_CONSTANT_BASIS))
def test_gradients_are_those_of_differences(name):
    inputs = [x.requires_grad_() for x in tensors(name)]
    assert torch.autograd.gradcheck(CASES[name], inputs, fast_mode=True)


@pytest.mark.parametrize("name", sorted(WITH_A_CONSTANT_BASIS))
def test_a_fitted_basis_is_constant_but_everything_else_has_a_gradient(name):
    q, k, v = (x.requires_grad_() for x in tensors(name))
    CASES[name](q, k, v).sum().backward()
    assert all(bool(torch.any(x.grad != 0)) for x in (q, k, v))
    if name == "low_rank_attention":
        basis = slra.fit_attention(q, k, v, 3)
        assert not basis.wq.requires_grad
        through = torch.autograd.grad(basis.attend(q, k, v).sum(), (q, k, v))
        for x, slope in zip((q, k, v), through, strict=True):
            torch.testing.assert_close(x.grad, slope, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(CASES))
def test_compiled_in_one_graph(name):
    inputs = tensors(name)
    torch.compiler.reset()
    compiled = torch.compile(CASES[name], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), CASES[name](*inputs), rtol=0, atol=1e-12)


def test_compiled_by_the_default_backends():
    """AOT autograd traces the gradient too."""
    name = "low_rank_attention"
    inputs = [x.requires_grad_() for x in tensors(name)]
    torch.compiler.reset()
    compiled = torch.compile(CASES[name], fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(CASES[name](*inputs).sum(), inputs)
    slopes = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    torch.testing.assert_close(slopes, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", sorted(CASES))
def test_mapped_over_a_batch(name):
    inputs = tensors(name, batch=(2,))
    together = torch.func.vmap(CASES[name])(*inputs)
    for i, got in enumerate(together):
        expected = CASES[name](*(x[i] for x in inputs))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(CASES))
def test_bfloat16_is_computed_in_single_precision(name):
    """Of bfloat16 data: the answer of double precision, rounded once, and within single precision before."""
    inputs = [x.to(torch.bfloat16) for x in tensors(name)]
    got = CASES[name](*inputs)
    expected = CASES[name](*(x.to(torch.float64) for x in inputs))
    if name in ("estimate_error", "randomized_eigh"):
        assert got.dtype == torch.float32
    else:
        assert got.dtype == torch.bfloat16
    # Several roundings to bfloat16 where a case calls several functions; 2**-8 is one unit.
    error = torch.linalg.vector_norm(got.to(torch.float64) - expected)
    assert float(error) <= 3 * 2**-8 * float(torch.linalg.vector_norm(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_a_generator_of_its_own_draws(dtype, monkeypatch):
    left, right = np.random.default_rng(0).standard_normal((2, 200, 5))
    x = torch.asarray(left @ right.T).to(dtype)
    x = x * (1 + 2j) if dtype.is_complex else x
    for call in (
        lambda rng: slra.randomized_svd(x, 5, rng=rng, method="subspace").U,
        lambda rng: slra.randomized_eigh(x @ x.mH, 3, rng=rng).V,
        lambda rng: slra.estimate_error(x, (x[:, :2], x[:2]), rng=rng).frobenius,
    ):
        first, again = (call(torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(first, again)
    rng = torch.Generator().manual_seed(1)
    U, S, Vh = slra.randomized_svd(x, 5, rng=rng)
    assert torch.linalg.norm((U * S) @ Vh - x) <= 1e-5 * torch.linalg.norm(x)
    draws = [slra.estimate_error(x, (U, S, Vh), rng=rng).frobenius for _ in range(2)]
    assert draws[0] != draws[1]
    with pytest.raises(TypeError, match="got a Generator of torch"):
        slra.randomized_svd(x.numpy(), 5, rng=rng)
    # What torch.compile traces would draw once and for all.
    monkeypatch.setattr(type(backend_of(compat_torch)), "freezes_draws", lambda *_: True)
    with pytest.raises(ValueError, match="test_matrix must be given, or rng be an int"):
        slra.randomized_svd(x, 5, rng=rng)


def test_draws_of_a_compiled_function_are_those_of_its_seed():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((60, 50)))
    values = []
    for seed in (0, 1):

        def run(x, seed=seed):
            return slra.randomized_svd(x, 2, n_oversamples=2, n_iter=1, method="krylov", rng=seed).S

        torch.compiler.reset()
        values.append(torch.compile(run, fullgraph=True, backend="eager")(x))
        torch.testing.assert_close(values[-1], run(x), rtol=0, atol=1e-12)
    assert not torch.equal(*values)


def test_a_compiled_function_takes_sequences_of_any_length():
    """From the second length on lengths are symbols, and the graph is that of all of them."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def qkv(n):
        return torch.from_numpy(np.random.default_rng(n).standard_normal((3, 2, n, 6)))

    basis = slra.fit_attention(*qkv(30), 3)

    def run(q, k, v):
        return basis.attend(q, k, v, is_causal=True)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=count)
    for n in (10, 13, 17, 40):
        torch.testing.assert_close(compiled(*qkv(n)), run(*qkv(n)), rtol=0, atol=1e-12)
    assert len(graphs) == 2


HIDDEN = torch.tensor([[[True, False, True], [False, False, False]]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "causal_align": "bottom_right"},
        {"softcap": 1.5},
        {"mask": HIDDEN},
        {"enable_gqa": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("return_lse", [False, True])
def test_attention_has_derivatives_in_both_modes_and_of_second_order(options, return_lse):
    """The fused kernels have neither."""
    rng = np.random.default_rng(0)
    heads = 1 if "enable_gqa" in options else 2
    shapes = [(2, 2, 2), (heads, 3, 2), (heads, 3, 1)]
    arrays = [torch.from_numpy(rng.standard_normal(shape)).requires_grad_() for shape in shapes]

    def call(*args):
        found = slra.attention(*args, return_lse=return_lse, **options)
        # Of a query that sees nothing it is -inf.
        return (found[0], found[1].clamp(min=-9.0)) if return_lse else found

    torch.autograd.gradcheck(call, arrays, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(call, arrays, fast_mode=True)


def test_hessian_of_attention_by_every_nesting():
    q, k, v = (torch.from_numpy(x) for x in np.random.default_rng(0).standard_normal((3, 1, 3, 2)))

    def loss(q):
        return slra.attention(q, k, v, is_causal=True).pow(2).sum()

    expected = torch.autograd.functional.hessian(loss, q.clone().requires_grad_())
    func = torch.func
    for found in (func.hessian(loss)(q), func.jacrev(func.jacrev(loss))(q)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    # One tensor in three places.
    torch.autograd.gradgradcheck(lambda x: slra.attention(x, x, x), [q.requires_grad_()])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "mask", [None, (2, 1, 1, 700), (2, 4, 1, 700), (1, 1, 3, 700), (2, 1, 3, 700)], ids=str
)
@pytest.mark.parametrize("n_queries", [1, 3])
def test_kernels_equal_the_standard(mask, n_queries, softcap):
    """Groups as rows, repeated heads, what goes through the first axis; a row without keys, one without a gradient."""
    rng = np.random.default_rng(0)
    shapes = [(2, 2, 2, n_queries, 4), (2, 2, 1, 700, 4), (2, 2, 1, 700, 3)]
    q, k, v = (torch.from_numpy(rng.standard_normal(shape)) for shape in shapes)
    if mask is not None:
        seen = torch.from_numpy(rng.random(mask[:-2] + (min(mask[-2], n_queries), 700)) < 0.5)
        seen[0, 0, 0] = False
        mask = seen.reshape(seen.shape[0], -1, 2 if seen.shape[1] == 4 else 1, *seen.shape[2:])
    options = standard.ScoreOptions(0.5, softcap=softcap)
    backend, reference = backend_of(compat_torch), standard.Backend(compat_torch)
    out, lse = reference.attention(q, k, v, mask, options)
    alone = backend.attention_output(q, k, v, mask, options)
    for a, b in zip(
        (*backend.attention(q, k, v, mask, options), alone), (out, lse, out), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    grad = torch.from_numpy(rng.standard_normal(out.shape))
    delta = (grad * out).sum(-1) - torch.from_numpy(rng.standard_normal(lse.shape))
    for lost in (False, True):
        if lost:
            grad[..., 0, :] = 0
        given = (q, k, v, mask, options, lse, delta, grad)
        pairs = zip(backend.attention_vjp(*given), reference.attention_vjp(*given), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_without_the_kernel_of_torch_numpy_attends(monkeypatch):
    q, k, v = (torch.from_numpy(x) for x in np.random.default_rng(0).standard_normal((3, 2, 9, 4)))
    expected = slra.attention(q, k, v, is_causal=True, return_lse=True)
    monkeypatch.setattr("slra._backends.torch.cpu_kernel", lambda: None)
    found = slra.attention(q, k, v, is_causal=True, return_lse=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("how", ["trace", "export"])
@pytest.mark.parametrize("options", [{"is_causal": True}, {"enable_gqa": True, "mask": True}])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_attention_is_traced_and_exported_for_any_batch_and_length(options, how):
    heads = (4, 2) if "enable_gqa" in options else (2, 2)

    def arguments(n_batch, n):
        rng = np.random.default_rng(n)
        shapes = [(n_batch, h, n, 6) for h in (heads[0], heads[1], heads[1])]
        made = [torch.from_numpy(rng.standard_normal(shape)) for shape in shapes]
        return (*made, torch.from_numpy(rng.random((n, n)) < 0.5))

    basis = slra.fit_attention(
        *arguments(3, 30)[:3], 3, enable_gqa="enable_gqa" in options, pool_batch=True
    )

    class Both(torch.nn.Module):
        def forward(self, q, k, v, mask):
            given = {**options, "mask": mask} if "mask" in options else options
            return slra.attention(q, k, v, **given), basis.attend(q, k, v, **given)

    if how == "trace":
        run = torch.jit.trace(Both(), arguments(3, 10), check_trace=False)
    else:
        dim = torch.export.Dim
        batch, length = dim("batch", min=2, max=64), dim("length", min=4, max=64)
        shapes = *[{0: batch, 2: length}] * 3, {0: length, 1: length}
        run = torch.export.export(Both(), arguments(3, 10), dynamic_shapes=shapes).module()
    for n_batch, n in [(3, 10), (5, 10), (2, 25)]:
        given = arguments(n_batch, n)
        for got, right in zip(run(*given), Both()(*given), strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-13)
