"""The attention layer for PyTorch against torch.nn.MultiheadAttention."""

import copy
import doctest
import itertools
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

from slra import objective  # noqa: E402
from slra.integrations.torch import LowRankAttention  # noqa: E402

EPS = np.finfo("float64").eps
# Sums of a few dozen products of entries near 1, twice over.
ATOL = 100 * EPS
WIDTH, HEADS, BATCH, N_Q, N_K = 12, 3, 2, 7, 9


@pytest.fixture(autouse=True)
def _double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def layer(reference=None, **options):
    """Return a layer, batch first, with the parameters of a reference."""
    made = LowRankAttention(WIDTH, HEADS, batch_first=True, **options)
    if reference is not None:
        made.load_state_dict(reference.state_dict())
    return made


def data(n=N_Q, width=WIDTH):
    return torch.randn(BATCH, n, width)


def masks():
    padding = torch.zeros(BATCH, N_K, dtype=torch.bool)
    padding[1, 6:] = True
    hidden = torch.rand(N_Q, N_K) < 0.3
    hidden[:, 0] = False
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "boolean": {"attn_mask": hidden},
        "added": {"attn_mask": torch.randn(N_Q, N_K)},
        "per head": {"attn_mask": torch.randn(BATCH * HEADS, N_Q, N_K)},
        "both": {"key_padding_mask": padding, "attn_mask": hidden},
        "both added": {
            "key_padding_mask": torch.randn(BATCH, N_K),
            "attn_mask": torch.randn(BATCH * HEADS, N_Q, N_K),
        },
    }


def assert_close(got, expected, atol=ATOL):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("rank", [None, 4], ids=["exact", "all four dimensions"])
@pytest.mark.parametrize("case", masks())
def test_full_rank_is_multi_head_attention(case, rank):
    """Output, weights and gradients of all parameters."""
    reference = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    ours = layer(reference, rank=rank)
    query, memory, given = data(), data(N_K), masks()[case]
    for options in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        (right, right_weights), (out, weights) = (
            m(query, memory, memory, **given, **options) for m in (reference, ours)
        )
        assert_close(out, right)
        assert (weights is None) == (right_weights is None)
        if weights is not None:
            assert_close(weights, right_weights)
    (right.square().sum() + out.square().sum()).backward()
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        assert_close(one.grad, other.grad, 10 * ATOL)


@pytest.mark.parametrize("need_weights", [False, True])
def test_causal_with_and_without_the_mask(need_weights):
    reference = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    ours = layer(reference)
    x, later = data(), torch.ones(N_Q, N_Q, dtype=torch.bool).triu(1)
    right, right_weights = reference(x, x, x, attn_mask=later, is_causal=True)
    for attn_mask in (None, later):
        out, weights = ours(x, x, x, attn_mask=attn_mask, is_causal=True, need_weights=need_weights)
        assert_close(out, right)
        if need_weights:
            assert_close(weights, right_weights)


@pytest.mark.parametrize("rank", [None, 2])
def test_no_sequences(rank):
    reference = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x = torch.zeros(0, N_Q, WIDTH)
    for basis in ("layer", "sequence"):
        found = layer(rank=rank, basis_per=basis)(x, x, x)
        assert [y.shape for y in found] == [y.shape for y in reference(x, x, x)]


def test_another_mask_than_the_causal_one_counts_beside_it():
    reference = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    ours, x = layer(reference), data()
    steps = torch.arange(N_Q)
    far = (steps[:, None] - steps).abs() > 1
    right = reference(x, x, x, attn_mask=far | (steps > steps[:, None]))
    out = ours(x, x, x, attn_mask=far, is_causal=True)
    for one, other in zip(out, right, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("ndim", [2, 3])
def test_lengths_first_other_widths_and_no_bias(ndim):
    options = {"bias": False, "kdim": 5, "vdim": 6}
    reference = torch.nn.MultiheadAttention(WIDTH, HEADS, **options)
    ours = LowRankAttention(WIDTH, HEADS, rank=2, **options)
    ours.load_state_dict(reference.state_dict())
    full = LowRankAttention(WIDTH, HEADS, **options)
    full.load_state_dict(reference.state_dict())
    batch = (BATCH,) if ndim == 3 else ()
    arguments = [torch.randn(n, *batch, w) for n, w in ((N_Q, WIDTH), (N_K, 5), (N_K, 6))]
    right, right_weights = reference(*arguments)
    out, weights = full(*arguments)
    assert_close(out, right)
    assert_close(weights, right_weights)
    assert [x.shape for x in ours(*arguments)] == [right.shape, right_weights.shape]


def expected_output(module, x, rank, *, thresholds=(0.0, 0.0, 0.0)):
    """Formula by hand: truncated SVD of all tokens of the batch, soft threshold, softmax."""
    q, k, v = (
        (x @ w.mT + b).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for w, b in zip(module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True)
    )
    hats = []
    for one, tau in zip((q, k, v), thresholds, strict=True):
        stacked = one.transpose(0, 1).flatten(1, 2).detach()
        V = torch.linalg.svd(stacked, full_matrices=False)[2][..., :rank, :]
        hat = one @ V.mT @ V
        hats.append(hat.sign() * (hat.abs() - tau).clamp(min=0))
    weights = torch.softmax(hats[0] @ hats[1].mT / 2, -1)
    return module.out_proj((weights @ hats[2]).transpose(1, 2).flatten(2)), hats


def test_the_penalty_form_is_the_formula():
    module, x = layer(rank=2, l1=(0.1, 0.2, 0.3)), data()
    out, _ = module(x, x, x, need_weights=False)
    right, hats = expected_output(module, x, 2)
    assert_close(out, right)
    expected = sum(
        t * hat.abs().sum() / BATCH for t, hat in zip((0.1, 0.2, 0.3), hats, strict=True)
    )
    assert_close(module.penalty(), expected)
    assert module.sparsity() == (0, 0, 0)
    parameters = list(module.parameters())
    got = torch.autograd.grad(out.square().sum() + module.penalty(), parameters)
    wanted = torch.autograd.grad(right.square().sum() + expected, parameters)
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other, 10 * ATOL)


def test_the_prox_form_has_exact_zeros_and_is_the_formula():
    thresholds = (0.1, 0.0, 0.3)
    module, x = layer(rank=2, l1=thresholds, l1_form="prox"), data()
    out, _ = module(x, x, x, need_weights=False)
    right, hats = expected_output(module, x, 2, thresholds=thresholds)
    assert_close(out, right)
    zeros = [float((hat == 0).double().mean()) for hat in hats]
    assert module.sparsity() == pytest.approx(zeros)
    assert zeros[1] == 0 < min(zeros[0], zeros[2])
    parameters = list(module.parameters())
    got = torch.autograd.grad(out.square().sum(), parameters)
    wanted = torch.autograd.grad(right.square().sum(), parameters)
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other, 10 * ATOL)


@pytest.mark.parametrize("method", ["svd", "scores", "output"])
def test_attention_in_few_dimensions_is_that_on_the_matrices_written_out(method):
    """A threshold of next to nothing runs on Q^, K^ and V^ themselves."""
    module, x = layer(rank=(2, 3), method=method, refit_every=0), data()
    module.fit_basis(x, x, x)
    out, weights = module(x, x, x)
    q, k, v = module.approximations()
    assert [int(torch.linalg.matrix_rank(one[0, 0])) for one in (q, k, v)] == [2, 2, 3]
    assert_close(weights, torch.softmax(q @ k.mT / 2, -1).mean(1))
    module.l1, module.l1_form = 1e-300, "prox"
    written_out, _ = module(x, x, x)
    assert_close(out, written_out)


def test_l1_follows_a_schedule():
    module, x = layer(rank=2, l1_form="prox"), data()
    zeros = []
    for l1 in (0.0, 0.1, 0.2):
        module.l1 = l1
        module(x, x, x)
        zeros.append(module.sparsity().q)
    assert zeros == sorted(zeros)
    assert zeros[0] == 0 < zeros[-1]


@pytest.mark.parametrize("precision", ["double", "bfloat16", "autocast"])
@pytest.mark.parametrize("l1_form", ["penalty", "prox"])
@pytest.mark.filterwarnings("ignore:Dynamo detected:UserWarning")
def test_a_schedule_of_l1_is_followed_by_one_graph(l1_form, precision):
    """From the eighth value on a number in a graph would be an old one."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module, x = layer(rank=2, l1_form=l1_form, refit_every=0), data()
    if precision != "double":
        module, x = module.float(), x.float()
    if precision == "bfloat16":
        module, x = module.bfloat16(), x.bfloat16()
    module.fit_basis(x, x, x)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend=count)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        for i in range(10):
            module.l1 = 0.02 * (i + 1)
            out, _ = compiled(x, x, x, need_weights=False)
            penalty = module.penalty()
            right, _ = module(x, x, x, need_weights=False)
            # Entries below 1/4 in 8 bits, rounded a few times; an old threshold is off by .02 or more.
            assert_close(out, right, ATOL if precision == "double" else 2**-8)
            rtol = ATOL if precision == "double" else 2**-7
            torch.testing.assert_close(penalty, module.penalty(), rtol=rtol, atol=0)
    assert len(graphs) == 1


def test_numbers_of_l1_keep_their_precision_and_are_no_state():
    module = layer(l1=(0.1, 1e-300, 0.0)).half()
    assert module.l1 == (0.1, 1e-300, 0.0)
    assert not any("weights" in name for name in module.state_dict())
    module.l1 = torch.tensor(0.3, dtype=torch.float64)
    assert copy.deepcopy(module).l1 == 0.3
    made = LowRankAttention(WIDTH, HEADS, l1=0.3, device="meta").to_empty(device="cpu")
    assert made.l1 == 0.3
    with pytest.raises(ValueError, match="l1 must not require a gradient"):
        module.l1 = torch.tensor(0.3, requires_grad=True)


def test_the_basis_is_fitted_every_so_often_and_frozen_in_eval():
    module = layer(rank=2, refit_every=2)
    bases = []
    for _ in range(4):
        x = data()
        module(x, x, x)
        bases.append(module.q_down)
    same = [bool(torch.equal(one, other)) for one, other in itertools.pairwise(bases)]
    # Fitted in calls 1 (before it), 2 and 4 (after them).
    assert same == [False, True, False]
    module.eval()
    x = data()
    module(x, x, x)
    assert torch.equal(module.q_down, bases[-1])
    module.fit_basis(x, x, x)
    assert not torch.equal(module.q_down, bases[-1])


def test_a_batch_is_attended_to_with_the_basis_of_earlier_ones():
    """Under a causal mask later tokens change earlier outputs by exactly nothing, in training too."""
    module, x = layer(rank=2, method="output"), data()
    module(x, x, x, is_causal=True)
    other = torch.cat([x[:, :4], torch.cos(7 * x[:, 4:])], dim=1)
    twin = copy.deepcopy(module)
    one, two = (m(y, y, y, is_causal=True)[0] for m, y in ((module, x), (twin, other)))
    assert torch.equal(one[:, :4], two[:, :4])
    assert not torch.allclose(one[:, 4:], two[:, 4:])


def test_a_basis_of_the_sequence_is_that_of_low_rank_attention():
    module, x = layer(rank=2, basis_per="sequence"), data()
    out, _ = module(x, x, x)
    apart = torch.cat([module(y, y, y)[0] for y in x[:, None]])
    assert_close(out, apart)
    assert "q_down" not in module.state_dict()
    with pytest.raises(ValueError, match='is_causal must be False with basis_per="sequence"'):
        module(x, x, x, is_causal=True)


def test_ranks_follow_a_tolerance_and_are_saved():
    module, x = layer(rtol=0.3), data(30)
    with torch.no_grad():
        # One head needs few dimensions.
        module.in_proj_weight[1:4] *= 1e-3
    module.fit_basis(x, x, x)
    assert module.ranks[0, 0] < module.ranks[1, 0]
    module.eval()
    other = layer(rtol=0.3).eval()
    other.load_state_dict(module.state_dict())
    assert_close(other(x, x, x)[0], module(x, x, x)[0], 0)
    assert pickle.loads(pickle.dumps(module))._last is None


def test_a_layer_without_a_basis_says_so():
    module, x = layer(rank=2).eval(), data()
    with pytest.raises(RuntimeError, match="no basis yet"):
        module(x, x, x)
    with pytest.raises(RuntimeError, match="call the layer first"):
        module.penalty()


WRONG = {
    "dropout": ({"dropout": 0.1}, "dropout must be 0, got 0.1: dropping attention weights needs"),
    "extra keys": ({"add_zero_attn": True}, "add_zero_attn must be False"),
    "rank": ({"rank": 5}, r"rank must be between 1 and 4 \(embed_dim / num_heads\), got 5"),
    "basis": ({"rank": 2, "basis_per": "head"}, "basis_per must be one of 'layer', 'sequence'"),
    "method": ({"method": "topk"}, "method must be one of 'svd', 'scores', 'output'"),
    "l1": ({"l1": -1.0}, "l1 must be finite and 0 or more"),
    "form": ({"l1_form": "both"}, "l1_form must be one of 'penalty', 'prox'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_named(case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        layer(**options)


@pytest.mark.parametrize("l1_form", ["penalty", "prox"])
@pytest.mark.filterwarnings("ignore:Dynamo detected:UserWarning")
def test_compiles_to_one_graph_with_a_frozen_basis(l1_form):
    module, x = layer(rank=2, l1=0.1, l1_form=l1_form, refit_every=0), data()
    module.fit_basis(x, x, x)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    out, _ = compiled(x, x, x, need_weights=False)
    (out.square().sum() + module.penalty()).backward()
    gradient = module.in_proj_weight.grad.clone()
    module.zero_grad()
    right, _ = module(x, x, x, need_weights=False)
    (right.square().sum() + module.penalty()).backward()
    assert_close(out, right)
    assert_close(gradient, module.in_proj_weight.grad)


@pytest.mark.parametrize(
    ("options", "is_training", "breaks"),
    [
        ({"refit_every": 0}, True, 0),
        ({"basis_per": "sequence"}, True, 0),
        # To see whether there is a basis, and to fit.
        ({"refit_every": 3}, True, 2),
    ],
    ids=str,
)
# Dynamo warns of what it does itself.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_call_is_one_graph_but_for_fits(options, is_training, breaks):
    torch.compiler.reset()
    module, x = layer(rank=2, **options), data()
    if "basis_per" not in options:
        module.fit_basis(x, x, x)
    found = torch._dynamo.explain(module.train(is_training))(x, x, x, need_weights=False)
    assert found.graph_break_count == breaks


# Dynamo warns of what it does itself.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_layer_fits_as_often_as_it_says_without_new_graphs():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    module, twin = layer(rank=2, refit_every=3), layer(rank=2, refit_every=3)
    twin.load_state_dict(module.state_dict())
    compiled = torch.compile(module, backend=count)
    n_graphs = []
    for _ in range(12):
        x = data()
        out, _ = compiled(x, x, x, need_weights=False)
        n_graphs.append(len(graphs))
        right, _ = twin(x, x, x, need_weights=False)
        assert_close(out, right)
    assert n_graphs[1] == n_graphs[-1]


class SelfAttention(torch.nn.Module):
    """Takes what tracers hand over: tensors, by position."""

    def __init__(self, attention, is_causal=False):
        super().__init__()
        self.attention, self.is_causal = attention, is_causal

    def forward(self, x, padding=None, mask=None):
        options = {"is_causal": self.is_causal, "need_weights": False}
        return self.attention(x, x, x, key_padding_mask=padding, attn_mask=mask, **options)[0]


def tokens(n_batch, n):
    """Return tokens, padding of some, and a mask of all; each token sees itself."""
    padding = torch.arange(n) >= n - torch.arange(n_batch)[:, None]
    mask = (torch.rand(n, n) < 0.3) & ~torch.eye(n, dtype=torch.bool)
    return torch.randn(n_batch, n, WIDTH), padding, mask


DYNAMIC = [
    {"is_causal": True, "method": "output"},
    {"l1": 0.1, "l1_form": "prox"},
    {"basis_per": "sequence"},
]


@pytest.mark.parametrize("how", ["trace", "export"])
@pytest.mark.parametrize("options", DYNAMIC, ids=str)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_and_exported_for_any_batch_and_length(options, how):
    given = dict(options)
    is_causal = given.pop("is_causal", False)
    made = layer(rank=2, refit_every=0, **given)
    x = data()
    if "basis_per" not in options:
        made.fit_basis(x, x, x)
    module = SelfAttention(made, is_causal).eval()
    if how == "trace":
        run = torch.jit.trace(module, tokens(3, N_K), check_trace=False)
    else:
        dim = torch.export.Dim
        batch, length = dim("batch", min=2, max=64), dim("length", min=HEADS + 1, max=64)
        shapes = {0: batch, 1: length}, {0: batch, 1: length}, {0: length, 1: length}
        run = torch.export.export(module, tokens(3, N_K), dynamic_shapes=shapes).module()
    for n_batch, n in [(3, N_K), (5, N_K), (2, 25)]:
        with torch.no_grad():
            args = tokens(n_batch, n)
            assert_close(run(*args), module(*args))
    if how == "trace":
        run = torch.jit.trace(module, tokens(3, N_K)[:1], check_trace=False)
        args = tokens(4, N_Q)[:1]
        run(*args).square().sum().backward()
        got = made.in_proj_weight.grad.clone()
        module.zero_grad()
        module(*args).square().sum().backward()
        assert_close(got, made.in_proj_weight.grad)


@pytest.mark.parametrize("method", ["scores", "output"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_rows_chosen_by_a_length_that_is_traced_are_refused(method):
    module = SelfAttention(layer(rank=2, basis_per="sequence", method=method)).eval()
    with pytest.raises(ValueError, match='method must be "svd" where the length'):
        torch.jit.trace(module, tokens(3, N_K), check_trace=False)


@pytest.mark.parametrize("options", DYNAMIC[:2], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_onnx_takes_any_batch_and_length(options, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    given = dict(options)
    is_causal = given.pop("is_causal", False)
    made, x = layer(rank=2, refit_every=0, **given).float(), data().float()
    made.fit_basis(x, x, x)
    module = SelfAttention(made, is_causal).eval()
    dim = torch.export.Dim
    batch, length = dim("batch", min=2, max=64), dim("length", min=HEADS + 1, max=64)
    shapes = {0: batch, 1: length}, {0: batch, 1: length}, {0: length, 1: length}
    example, *hidden = tokens(3, N_K)
    program = torch.onnx.export(
        module, (example.float(), *hidden), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    program.save(tmp_path / "layer.onnx")
    session = runtime.InferenceSession(tmp_path / "layer.onnx")
    for n_batch, n in [(3, N_K), (5, N_K), (2, 25)]:
        x, *hidden = tokens(n_batch, n)
        args = x.float(), *hidden
        names = [one.name for one in session.get_inputs()]
        inputs = {name: one.numpy() for name, one in zip(names, args, strict=True)}
        (got,) = session.run(None, inputs)
        assert_close(torch.from_numpy(got), module(*args).detach(), 1e-5)


def test_an_encoder_layer_calls_it_in_eval_mode_too():
    """Its fused kernel would compute exact attention from our parameters."""
    encoder = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.0, batch_first=True)
    encoder.self_attn = layer(rank=1)
    x = data()
    encoder(x)
    encoder.eval()
    with torch.no_grad():
        out = encoder(x)
        exact = layer()
        exact.load_state_dict(encoder.self_attn.state_dict(), strict=False)
        encoder.self_attn = exact
        assert float((out - encoder(x)).abs().max()) > 1e-3


def test_rows_that_attend_to_nothing_get_the_bias():
    module, x = layer(rank=2, method="output"), data()
    hidden = torch.zeros(N_Q, N_Q, dtype=torch.bool)
    hidden[3] = True
    out, weights = module(x, x, x, attn_mask=hidden)
    assert torch.equal(weights[:, 3], torch.zeros(BATCH, N_Q))
    assert_close(out[:, 3], module.out_proj.bias.expand(BATCH, -1))


@pytest.mark.parametrize("l1_form", ["penalty", "prox"])
def test_half_precision_stays_half(l1_form):
    wide, x = layer(rank=2, l1=0.1, l1_form=l1_form, refit_every=0), data()
    half = copy.deepcopy(wide).half()
    half.fit_basis(*(x.half() for _ in range(3)))
    wide.load_state_dict({name: one.double() for name, one in half.state_dict().items()})
    out, _ = half(*(x.half() for _ in range(3)))
    assert out.dtype == torch.float16
    # Entries near 1, rounded in each of half a dozen products.
    assert_close(out.double(), wide(x, x, x)[0], 20 * float(np.finfo("float16").eps))


def test_a_state_without_a_basis_leaves_none():
    module, x = layer(rank=2), data()
    module(x, x, x)
    module.load_state_dict(layer(rank=2).state_dict())
    with pytest.raises(RuntimeError, match="no basis yet"):
        module.eval()(x, x, x)


def test_parameters_without_a_basis_drop_the_one_of_others():
    module, x = layer(rank=2), data()
    module(x, x, x)
    plain = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    module.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="no basis yet"):
        module.eval()(x, x, x)
    # The first call in training mode fits to the new ones.
    fresh = layer(plain, rank=2)
    assert_close(module.train()(x, x, x)[0], fresh(x, x, x)[0], 0)


def test_a_basis_written_into_the_buffers_brings_its_ranks():
    """As DistributedDataParallel does, unseen by autograd: what the first process fitted goes to all others."""
    x = data(30)
    narrow, wide = layer(rtol=0.99), layer(rtol=0.1)
    wide.load_state_dict(torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).state_dict())
    narrow.load_state_dict(wide.state_dict())
    for module in (narrow, wide):
        module.eval().fit_basis(x, x, x)
    assert (
        narrow.ranks == 1
    ).all()  # cut to these, all columns of the wide one but the first would be lost
    assert (wide.ranks > 1).all()
    for name, buffer in wide.named_buffers():
        getattr(narrow, name).data.copy_(buffer)
    assert_close(narrow(x, x, x)[0], wide(x, x, x)[0], 0)


@pytest.mark.parametrize("options", [{"rank": 2}, {"rtol": 0.3}], ids=str)
def test_ranks_follow_from_buffers_alone(options):
    x = data(30)
    trained = layer(**options)
    trained.fit_basis(x, x, x)
    right, _ = trained.eval()(x, x, x)
    copied, called = layer(**options).eval(), layer(**options).eval()
    state = {**dict(trained.named_parameters()), **dict(trained.named_buffers())}
    for name, one in [*copied.named_parameters(), *copied.named_buffers()]:
        one.data.copy_(state[name].detach())
    for out, _ in (copied(x, x, x), torch.func.functional_call(called, state, (x, x, x))):
        assert_close(out, right)
    assert torch.equal(copied.ranks, trained.ranks)
    averaged = torch.optim.swa_utils.AveragedModel(layer(**options))
    averaged.update_parameters(trained)
    assert_close(averaged.eval()(x, x, x)[0], right)


@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": (2, 3)}, {"rtol": 0.5}], ids=str)
@pytest.mark.parametrize("method", ["svd", "scores", "output"])
def test_an_averaged_basis_is_that_of_the_averaged_projections(method, options):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    module = layer(method=method, refit_every=0, **options)
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    x = data(30)
    module.fit_basis(x, x, x)
    averaged.update_parameters(module)
    right, _ = module(x, x, x)
    for flip in (-1, 1, -1):
        # The same projections, in other factors.
        for name in ("q_down", "q_up", "k_down", "k_up", "v_down", "v_up"):
            setattr(module, name, flip * getattr(module, name))
        averaged.update_parameters(module)
        assert_close(averaged(x, x, x)[0], right, 1e-10)
    before = copy.deepcopy(averaged.module)
    x = x + 0.1 * data(30)
    module.fit_basis(x, x, x)
    averaged.update_parameters(module)
    out, _ = averaged(x, x, x)
    mean = (before.v_down @ before.v_up + module.v_down @ module.v_up) / 2
    kept = averaged.module
    if "rank" in options:
        values = torch.linalg.svdvals(mean)
        rank = kept.v_down.shape[-1]
        found = torch.linalg.matrix_norm(mean - kept.v_down @ kept.v_up)
        best = torch.sqrt((values[:, rank:] ** 2).sum(-1))
        # A projection is off by 1 - sigma in what it keeps, too.
        assert (found <= best + torch.sqrt(((1 - values[:, :rank]) ** 2).sum(-1)) + 1e-12).all()
    assert bool(torch.isfinite(out).all())


def test_under_vmap_a_basis_that_is_not_there_shows():
    x = data()
    modules = [layer(rank=2, refit_every=0).eval() for _ in range(2)]

    def outputs():
        states = torch.func.stack_module_state(modules)
        return torch.func.vmap(
            lambda state, x: torch.func.functional_call(modules[0], state, (x, x, x))[0],
            in_dims=(0, None),
        )(states, x)

    assert bool(torch.isnan(outputs()).all())
    for module in modules:
        module.fit_basis(x, x, x)
    for out, module in zip(outputs(), modules, strict=True):
        assert_close(out, module(x, x, x)[0])


def test_another_modules_parameters_leave_the_basis():
    module, x = layer(rank=2), data()
    module(x, x, x)
    both = torch.nn.ModuleDict({"ours": module, "other": torch.nn.Linear(2, 2)}).eval()
    before = module(x, x, x)[0]
    both.load_state_dict({"other.weight": torch.ones(2, 2)}, strict=False)
    assert_close(module(x, x, x)[0], before, 0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_needs_a_frozen_basis(use_reentrant):
    def loss(module):
        def call(x):
            return module(x, x, x, need_weights=False)[0].square()

        return checkpoint(call, x, use_reentrant=use_reentrant).sum()

    module, x = layer(rank=2, refit_every=0), data().requires_grad_()
    module.fit_basis(x, x, x)
    loss(module).backward()
    gradient, x.grad = x.grad, None
    module(x, x, x, need_weights=False)[0].square().sum().backward()
    assert_close(gradient, x.grad)
    module.refit_every = 1
    with pytest.raises(RuntimeError, match="refit_every must be 0 under activation checkpointing"):
        loss(module).backward()


def test_examples_run():
    from slra.integrations import torch as module

    result = doctest.testmod(module)
    assert result.failed == 0 < result.attempted


def test_penalty_is_that_of_the_objective():
    module, x = layer(l1=0.5), data()
    module(x, x, x)
    q, k, v = module.approximations()
    assert_close(module.penalty() * BATCH, objective.l1_penalty(q, k, v, 0.5))


@pytest.mark.parametrize("method", ["svd", "scores"])
def test_the_penalty_has_a_gradient_under_autocast(method):
    module, x = layer(rank=2, l1=0.1, method=method).float(), data().float()
    module.fit_basis(x, x, x)
    module.eval()
    module(x, x, x)
    expected = module.penalty().detach()
    with torch.autocast("cpu", torch.bfloat16):
        module(x, x, x)
    penalty = module.penalty()
    penalty.backward()
    # Queries, keys and values have the 8 bits of bfloat16.
    torch.testing.assert_close(penalty.detach(), expected, rtol=2**-7, atol=0)
    assert module.in_proj_weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "mask", "error"),
    [
        ("key_padding_mask", torch.zeros(N_Q, BATCH, dtype=torch.bool), ValueError),
        ("key_padding_mask", torch.zeros(BATCH, N_Q, dtype=torch.uint8), TypeError),
        ("attn_mask", torch.zeros(BATCH, HEADS * N_Q, N_Q, dtype=torch.bool), ValueError),
        ("attn_mask", torch.zeros(N_Q, N_Q, dtype=torch.int64), TypeError),
    ],
)
def test_masks_of_wrong_shape_or_dtype_are_named(name, mask, error):
    x = data()
    with pytest.raises(error, match=f"{name} must"):
        layer(rank=2)(x, x, x, **{name: mask})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rank": 0}, ValueError),
        ({"rank": WIDTH}, ValueError),
        ({"rank": (1, 2, 3)}, TypeError),
        ({"rtol": -1.0}, ValueError),
        ({"rtol": "a"}, TypeError),
    ],
)
@pytest.mark.parametrize("basis", ["layer", "sequence"])
def test_ranks_and_tolerances_are_checked_when_the_layer_is_made(basis, options, error):
    with pytest.raises(error, match=f"{next(iter(options))} must"):
        layer(basis_per=basis, **options)


@pytest.mark.parametrize("basis", ["sequence", "layer"])
@pytest.mark.parametrize("method", ["svd", "scores", "output"])
def test_padding_is_not_fitted_to(method, basis):
    module, x = layer(rank=2, method=method, basis_per=basis), data()
    padding = torch.zeros(BATCH, N_Q, dtype=torch.bool)
    padding[0, -3:] = padding[1, :2] = True
    outs = []
    for hidden in (1.0, 50.0, torch.nan):
        given = x.masked_fill(padding[..., None], hidden)
        outs.append(copy.deepcopy(module)(given, given, given, key_padding_mask=padding)[0])
    for out in outs[1:]:
        assert torch.equal(outs[0][~padding], out[~padding])
    if basis == "sequence":
        real = x[:1, :-3]
        assert_close(outs[0][:1, :-3], module(real, real, real)[0], 1e-12)


def paddings(is_padding):
    """Ways to hide tokens from all queries."""
    n = is_padding.shape[-1]
    square = is_padding[:, None, :].expand(-1, n, -1).repeat_interleave(HEADS, 0)
    ways = {"padding": {"key_padding_mask": is_padding}, "mask": {"attn_mask": square}}
    for name, least in (("infinite", -torch.inf), ("-1e9", -1e9), ("least", -3.4e38)):
        for form, mask in (("key_padding_mask", is_padding), ("attn_mask", square)):
            added = torch.zeros(mask.shape).masked_fill(mask, least)
            ways[f"{name} {form}"] = {form: added}
    return ways


@pytest.mark.parametrize("way", paddings(torch.zeros(1, 2, dtype=torch.bool)))
@pytest.mark.parametrize("l1_form", ["penalty", "prox"])
def test_however_padding_is_hidden_it_takes_no_part(way, l1_form):
    module, x = layer(rank=2, l1=0.3, l1_form=l1_form, refit_every=0), data()
    module.fit_basis(x[:, :4], x[:, :4], x[:, :4])
    right, _ = module(x[:, :4], x[:, :4], x[:, :4])
    penalty, zeros = module.penalty(), module.sparsity()
    padded = torch.cat([x[:, :4], 50 * x[:, 4:]], dim=1)
    hidden = (torch.arange(N_Q) >= 4).expand(BATCH, -1)
    given = paddings(hidden)[way]
    module.fit_basis(padded, padded, padded, **given)
    out, _ = module(padded, padded, padded, **given)
    assert_close(out[:, :4], right, 1e-11)
    assert_close(module.penalty(), penalty, 1e-11)
    assert module.sparsity() == pytest.approx(zeros)
    whole = copy.deepcopy(module).train()
    whole.basis_per = "sequence"
    one, other = padded[:1], x[:1, :4]
    of_one = {name: mask[: mask.shape[0] // 2] for name, mask in given.items()}
    assert_close(whole(one, one, one, **of_one)[0][:, :4], whole(other, other, other)[0], 1e-11)


@pytest.mark.parametrize("l1_form", ["penalty", "prox"])
def test_a_penalty_that_is_returned_is_not_lost(l1_form):
    """Under reentrant checkpointing, in a layer that is called twice, and under vmap."""
    module, x = layer(rank=2, l1=0.01, l1_form=l1_form, refit_every=0), data().requires_grad_()
    module.fit_basis(x, x, x)

    def run(x):
        out, _, penalty = module(x, x, x, need_weights=False, return_penalty=True)
        return out, penalty

    out, penalty = run(x)
    assert_close(penalty, module.penalty())
    second, again = run(out)
    parameters = list(module.parameters())
    expected = torch.autograd.grad(second.square().sum() + penalty + again, parameters)
    out, penalty = checkpoint(run, x, use_reentrant=True)
    second, again = checkpoint(run, out, use_reentrant=True)
    (second.square().sum() + penalty + again).backward()
    for one, other in zip(parameters, expected, strict=True):
        assert_close(one.grad, other, 100 * ATOL)
    penalties = torch.func.vmap(lambda y: run(y)[1])(x)
    assert_close(penalties.mean(), penalty)


def test_a_penalty_that_would_be_lost_is_refused():
    module, x = layer(rank=2, l1=0.1, refit_every=0), data().requires_grad_()
    module.fit_basis(x, x, x)

    def run(x):
        return module(x, x, x, need_weights=False)[0]

    loss = checkpoint(run, x, use_reentrant=True).sum()
    with pytest.raises(RuntimeError, match="return_penalty=True"):
        module.penalty()
    with torch.no_grad():
        assert float(module.penalty()) > 0
    loss.backward()
    run(run(x))
    with pytest.raises(RuntimeError, match="got 2 calls since it was"):
        module.penalty()
    # A backward pass ends the step, and what is read counts no more.
    run(x).sum().backward()
    for _ in range(2):
        run(x)
        module.penalty()
    run(x).sum().backward()
    run(x)
    module.penalty()
    torch.func.vmap(run)(x)
    with pytest.raises(RuntimeError, match="inside a transform such as torch.func.vmap"):
        module.penalty()
    assert torch.func.vmap(lambda y: (run(y), module.penalty())[1])(x).shape == (BATCH,)


def test_a_threshold_that_leaves_nothing_to_train_is_warned_of():
    module, x = layer(rank=2, l1=(0.0, 0.1, 1e3), l1_form="prox"), data()
    with pytest.warns(UserWarning, match=r"l1 is so large that all of V\^ is 0"):
        module(x, x, x)
    assert module.eval()(x, x, x)[0].shape == x.shape


@pytest.mark.parametrize("method", ["svd", "scores", "output"])
def test_sequences_shorter_than_the_rank_are_fitted_together(method):
    module, x = layer(rank=3, method=method), torch.randn(6, 10, WIDTH)
    short = x[:, :2]
    for query, memory in ((x[:, :1], x), (short, short)):
        for _ in range(2):
            out, _ = module(query, memory, memory)
            assert out.shape == query.shape
            assert bool(torch.isfinite(out).all())
        assert module.ranks.tolist() == [[3, 3]] * HEADS


def test_infinity_in_training_reaches_the_output_and_leaves_the_basis():
    module, x = layer(rank=2), data()
    bad = x.clone()
    bad[0, 0, 0] = torch.inf
    assert not torch.isfinite(module(bad, bad, bad)[0]).all()
    assert module.ranks.tolist() == [[0, 0]] * HEADS
    module(x, x, x)
    before = module.q_map
    for mask in (None, torch.zeros(BATCH, N_Q)):
        assert not torch.isfinite(module(bad, bad, bad, key_padding_mask=mask)[0]).all()
        assert torch.equal(module.q_map, before)


@pytest.mark.parametrize("l1_form", ["penalty", "prox"])
def test_an_empty_batch(l1_form):
    module, x = layer(rank=2, l1=0.1, l1_form=l1_form), data()
    empty = x[:0]
    for _ in range(2):
        out, _, penalty = module(empty, empty, empty, return_penalty=True)
        assert out.shape == empty.shape
        assert float(penalty.detach()) == 0
        module(x, x, x)


@pytest.mark.parametrize("basis", ["layer", "sequence"])
def test_half_precision_thresholds(basis):
    module, x = layer(rank=2, l1=0.1, l1_form="prox", basis_per=basis).half(), data().half()
    assert module(x, x, x)[0].dtype == torch.float16


def test_another_rank_later_drops_the_basis():
    module, x = layer(rank=3), data()
    module(x, x, x)
    module.rank = (2, 4)
    assert module.ranks.tolist() == [[0, 0]] * HEADS
    module(x, x, x)
    assert module.ranks.tolist() == [[2, 4]] * HEADS
    with pytest.raises(ValueError, match="rank must be between 1 and 4"):
        module.rank = 5
    assert module.rank == (2, 4)
    module.rank = None
    exact = layer()
    exact.load_state_dict(module.state_dict())
    assert_close(module(x, x, x)[0], exact(x, x, x)[0], 0)


def test_parameters_are_drawn_again_and_a_parametrised_layer_is_copied():
    module, x = layer(rank=2), data()
    module._reset_parameters()
    torch.nn.utils.parametrizations.weight_norm(module, "in_proj_weight")
    module(x, x, x)
    copied = copy.deepcopy(module).eval()
    assert_close(copied(x, x, x)[0], module.eval()(x, x, x)[0], 0)


@pytest.mark.parametrize("options", [{}, {"bias": False, "kdim": 5, "vdim": 6}], ids=str)
def test_what_is_trained_goes_back_into_multi_head_attention(options):
    module = layer(rank=4, **options)
    query, key, value = data(), *(data(N_K, options.get(name, WIDTH)) for name in ("kdim", "vdim"))
    made = module.to_mha()
    assert type(made) is torch.nn.MultiheadAttention
    assert_close(made(query, key, value)[0], module(query, key, value)[0], 10 * ATOL)
    assert not any(
        one is other for one, other in zip(made.parameters(), module.parameters(), strict=True)
    )
