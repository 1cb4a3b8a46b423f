"""Adaptive ranks, exact keys, folding and storage of bases."""

import dataclasses
import zipfile

import numpy as np
import pytest

import slra
from slra._backends import backend_of
from slra.attn.rows import sample_rows
from tests.backends import to_numpy, to_xp
from tests.naive_attention import decaying, frobenius, naive_attention

EAGER = pytest.mark.eager_only("ranks would depend on data")


def errors_of_all_pairs(q, k, v, basis, **options):
    """Relative error of every pair of ranks, (D, Dv, heads), from a basis of full rank."""
    exact, _ = naive_attention(q, k, v, **options)
    width, width_v = q.shape[-1], v.shape[-1]
    errors = np.empty((width, width_v, q.shape[0]))
    for r in range(1, width + 1):
        keys = (k - basis.c) @ basis.wk[..., :r]
        for r_v in range(1, width_v + 1):
            values = (v - basis.mu) @ basis.wv[..., :r_v] @ basis.uv[..., :r_v, :] + basis.mu
            out, _ = naive_attention(
                q @ basis.wq[..., :r], keys, values, scale=width**-0.5, **options
            )
            errors[r - 1, r_v - 1] = frobenius(out - exact) / frobenius(exact)
    return errors


@EAGER
def test_ranks_are_the_smallest_within_the_tolerance(xp):
    rtol = 0.1
    q, k, v = decaying(heads=4, heads_k=2)
    options = {"enable_gqa": True}
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    basis = slra.fit_attention(*arrays, rtol=rtol, **options)
    exact, _ = naive_attention(q, k, v, **options)
    error = frobenius(to_numpy(basis.attend(*arrays, **options)) - exact) / frobenius(exact)
    assert np.all(error <= rtol)
    for head, ranks in enumerate(basis.ranks):
        one = [q[2 * head : 2 * head + 2], *(np.repeat(x[head : head + 1], 2, 0) for x in (k, v))]
        stacked = one[0].reshape(1, 80, 8), one[1][:1], one[2][:1]
        whole = slra.fit_attention(*stacked, (8, 6))
        within = np.all(errors_of_all_pairs(*one, whole) <= rtol, axis=-1)
        smallest = min(r + r_v + 2 for r, r_v in np.argwhere(within))
        assert sum(ranks) == smallest


@EAGER
@pytest.mark.parametrize("method", ["svd", "scores"])
def test_every_method_takes_a_tolerance(xp, method):
    q, k, v = decaying()
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    options = {"is_causal": True, "causal_align": "bottom_right"}
    out = slra.low_rank_attention(*arrays, rtol=0.2, method=method, **options)
    exact, _ = naive_attention(q, k, v, **options)
    assert np.all(frobenius(to_numpy(out) - exact) <= 0.2 * frobenius(exact))


@EAGER
def test_rank_caps_what_a_tolerance_asks_for(xp):
    arrays = [to_xp(xp, x) for x in decaying()]
    basis = slra.fit_attention(*arrays, 3, rtol=1e-6)
    assert basis.ranks == ((3, 3), (3, 3))
    assert np.all(to_numpy(basis.error) > 1e-6)


@EAGER
def test_heads_of_different_rank_run_each_at_its_own(xp):
    q, k, v = decaying(heads=6, heads_k=3, d=20, d_v=20)
    k[1] *= 0.01  # nearly uniform attention needs few dimensions
    v[0, :, :] = v[0, :, :1]
    mask = np.random.default_rng(2).random((6, 40, 50)) < 0.7
    arrays, masks = [to_xp(xp, x) for x in (q, k, v)], to_xp(xp, mask)
    options = {"enable_gqa": True, "is_causal": True, "causal_align": "bottom_right"}
    basis = slra.fit_attention(*arrays, rtol=0.02, mask=masks, **options)
    assert len(set(basis.ranks)) == 3
    for (r, r_v), wk, wv in zip(basis.ranks, to_numpy(basis.wk), to_numpy(basis.wv), strict=True):
        assert not np.any(wk[:, r:])
        assert not np.any(wv[:, r_v:])
    out, lse = basis.attend(*arrays, mask=masks, return_lse=True, **options)
    small = [to_numpy(x) for x in basis.project(*arrays)]
    shift = q @ np.repeat(to_numpy(basis.c), 2, axis=0).swapaxes(-1, -2) * 20**-0.5
    expected, expected_lse = naive_attention(*small, mask=mask, scale=20**-0.5, **options)
    uv, mu = (np.repeat(to_numpy(x), 2, axis=0) for x in (basis.uv, basis.mu))
    empty = np.isneginf(expected_lse)[..., None]
    expected = np.where(empty, 0, expected @ uv + mu)
    np.testing.assert_allclose(to_numpy(out), expected, atol=1e-12)
    np.testing.assert_allclose(to_numpy(lse), expected_lse + shift[..., 0], atol=1e-12)


def test_a_tolerance_meets_no_lazy_array():
    jax = pytest.importorskip("jax")
    arrays = [jax.numpy.asarray(x) for x in decaying()]
    with pytest.raises(ValueError, match="rank must be given instead of rtol for lazy arrays"):
        jax.jit(lambda x: slra.low_rank_attention(*x, rtol=0.1))(arrays)


EXACT_KEYS = {
    "plain": {},
    "causal": {"is_causal": True, "causal_align": "bottom_right"},
    "boolean mask": {"is_causal": True, "causal_align": "bottom_right", "mask": "bool"},
    "float mask": {"softcap": 3.0, "mask": "float"},
}


@pytest.mark.parametrize("case", list(EXACT_KEYS))
def test_the_keys_that_receive_most_attention_stay_exact(xp, case):
    q, k, v = decaying(heads=4)
    options = {"enable_gqa": True, **EXACT_KEYS[case]}
    if kind := options.pop("mask", None):
        rng = np.random.default_rng(1)
        mask = rng.standard_normal((4, 40, 50)) if kind == "float" else rng.random((1, 50)) < 0.7
        options["mask"] = mask
    given = {**options, "mask": to_xp(xp, mask)} if kind else options
    out, lse = slra.low_rank_attention(
        *(to_xp(xp, x) for x in (q, k, v)), (3, 2), n_exact=5, return_lse=True, **given
    )
    # Written out: mixed scores, then one softmax over mixed values.
    basis = _fit_without(q, k, v, 5, options)
    keys, n_exact = basis.pop("keys"), 5
    uncapped = {name: x for name, x in options.items() if name != "enable_gqa"}
    k_all, v_all = (np.repeat(x, 2, axis=0) for x in (k, v))
    expected, expected_lse = _mixed(q, k_all, v_all, basis, np.repeat(keys, 2, axis=0), uncapped)
    assert keys.sum(-1).tolist() == [n_exact] * 2
    np.testing.assert_allclose(to_numpy(out), expected, atol=1e-9)
    np.testing.assert_allclose(to_numpy(lse), expected_lse, atol=1e-9)


def _fit_without(q, k, v, n_exact, options):
    """Maps of the keys that stay low rank, by SVDs of whole matrices."""
    identity = np.broadcast_to(np.eye(50), (2, 50, 50))
    weights, _ = naive_attention(q, k, identity, **options)
    weights = weights.reshape(2, 80, 50)
    place = np.argsort(np.argsort(-weights.sum(-2), axis=-1), axis=-1)
    keys = place < n_exact
    weights = np.where(keys[:, None], 0, weights)
    received = weights.sum(-2)[..., None]
    c = (received * k).sum(-2, keepdims=True) / received.sum(-2, keepdims=True)
    scores = q.reshape(2, 80, 8) @ ((k - c) * np.sqrt(received)).swapaxes(-1, -2)
    U = np.linalg.svd(scores, full_matrices=False)[0][..., :3]
    stacked = q.reshape(2, 80, 8)
    # Q E with E = Q^+ U U^T Q is the best approximation of the scores, as a map of the queries.
    maps = np.linalg.pinv(stacked) @ U @ U.swapaxes(-1, -2) @ stacked
    out, mass = weights @ v, weights.sum(-1, keepdims=True)
    mu = out.sum(-2, keepdims=True) / mass.sum(-2, keepdims=True)
    Vh = np.linalg.svd(out - mass * mu, full_matrices=False)[2][..., :2, :]
    arrays = {"maps": maps, "c": c, "mu": mu, "projector": Vh.swapaxes(-1, -2) @ Vh}
    return {**{name: np.repeat(x, 2, axis=0) for name, x in arrays.items()}, "keys": keys}


def _mixed(q, k, v, basis, keys, options):
    shift = q @ basis["c"].swapaxes(-1, -2)
    low = q @ basis["maps"] @ (k - basis["c"]).swapaxes(-1, -2) + shift
    scores = np.where(keys[:, None], q @ k.swapaxes(-1, -2), low)
    values = (v - basis["mu"]) @ basis["projector"] + basis["mu"]
    values = np.where(keys[..., None], v, values)
    # naive_attention on scores that are given: an identity for the keys.
    identity = np.broadcast_to(np.eye(50), (4, 50, 50))
    return naive_attention(scores, identity, values, **{"scale": 8**-0.5, **options})


def test_exact_keys_need_others():
    q, k, v = decaying()
    with pytest.raises(ValueError, match="n_exact must be less than 50"):
        slra.low_rank_attention(q, k, v, 3, n_exact=50)
    with pytest.raises(ValueError, match="n_exact must be 0 with rtol or l1"):
        slra.low_rank_attention(q, k, v, rtol=0.1, n_exact=2)


@pytest.mark.parametrize("biased", [False, True])
def test_folded_weights_give_what_the_basis_gives(xp, biased):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, 1, 30, 12))
    shapes = {"w_q": (4, 12, 6), "w_k": (2, 12, 6), "w_v": (2, 12, 5), "w_o": (4, 5, 12)}
    biases = {"b_q": (4, 1, 6), "b_k": (2, 1, 6), "b_v": (2, 1, 5), "b_o": (12,)}
    w = {name: rng.standard_normal(shape) / 3 for name, shape in shapes.items()}
    b = {name: rng.standard_normal(shape) * biased for name, shape in biases.items()}
    q, k, v = (x @ w[f"w_{i}"] + b[f"b_{i}"] for i in "qkv")
    basis = slra.fit_attention(
        *(to_xp(xp, y) for y in (q, k, v)), (3, 2), enable_gqa=True, pool_batch=True
    )
    out = to_numpy(basis.attend(*(to_xp(xp, y) for y in (q, k, v)), enable_gqa=True))
    expected = np.sum(out @ w["w_o"], axis=-3) + b["b_o"]
    given = {name: to_xp(xp, y) for name, y in b.items()} if biased else {}
    folded = basis.fold(*(to_xp(xp, y) for y in w.values()), **given)
    f = {name: None if y is None else to_numpy(y) for name, y in folded._asdict().items()}
    assert [f["w_q"].shape, f["w_v"].shape, f["w_o"].shape] == [(4, 12, 3), (2, 12, 2), (4, 2, 12)]
    assert (f["b_q"] is None) == (not biased)
    q, k, v = x @ f["w_q"], x @ f["w_k"] + f["b_k"], x @ f["w_v"] + f["b_v"]
    q = q + f["b_q"] if biased else q
    small, _ = naive_attention(q, k, v, scale=6**-0.5, enable_gqa=True)
    np.testing.assert_allclose(np.sum(small @ f["w_o"], -3) + f["b_o"], expected, atol=1e-12)


def test_keys_are_projected_once_and_attended_to_often(xp):
    q, k, v = (to_xp(xp, x) for x in decaying(heads=4, batch=(2,)))
    basis = slra.fit_attention(q, k, v, (3, 2), enable_gqa=True)
    small = basis.project_keys(k, v)
    assert [x.shape for x in small] == [(2, 2, 50, 3), (2, 2, 50, 2)]
    for options in ({}, {"is_causal": True, "causal_align": "top_left", "softcap": 2.0}):
        options = {**options, "enable_gqa": True, "return_lse": True}
        expected = basis.attend(q, k, v, **options)
        for got, right in zip(basis.attend_projected(q, *small, **options), expected, strict=True):
            np.testing.assert_allclose(to_numpy(got), to_numpy(right), atol=1e-12)
    with pytest.raises(ValueError, match="k must have the 3 columns that project_keys gives"):
        basis.attend_projected(q, k, v, enable_gqa=True)


def test_ranks_may_exceed_the_number_of_queries_and_rows_may_be_given():
    """One query is no reason to refuse; with all rows, the error on the data of the fit is the smallest."""
    q, k, v = decaying(n_q=400, n_k=400)
    one = slra.fit_attention(q[..., :1, :], k, v, (5, 4))
    assert one.ranks[0] == (5, 4)
    np.testing.assert_allclose(
        one.attend(q[..., :1, :], k, v), naive_attention(q[..., :1, :], k, v)[0], atol=1e-9
    )
    expected, _ = naive_attention(q, k, v)
    errors = [
        np.max(frobenius(basis.attend(q, k, v) - expected))
        for basis in (slra.fit_attention(q, k, v, 3, n_rows=n) for n in (2, 400))
    ]
    assert errors[1] < errors[0]
    for wrong, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="n_rows must be"):
            slra.fit_attention(q, k, v, 3, n_rows=wrong)


def test_a_basis_for_each_batch_element_cannot_be_folded():
    basis = slra.fit_attention(*decaying(batch=(2,)), 3)
    w = np.zeros((2, 4, 8))
    with pytest.raises(ValueError, match="pool_batch=True"):
        basis.fold(w, w, w[..., :6], np.zeros((2, 6, 4)))
    basis = slra.fit_attention(*decaying(), 3)
    with pytest.raises(ValueError, match=r"w_v must have shape \(2, 4, 6\), got \(2, 4, 8\)"):
        basis.fold(w, w, w, np.zeros((2, 6, 4)))


@EAGER
@pytest.mark.parametrize("across_heads", [False, True])
def test_a_saved_basis_comes_back(xp, across_heads, tmp_path):
    arrays = [to_xp(xp, x) for x in decaying()]
    basis = slra.fit_attention(*arrays, rtol=0.2, across_heads=across_heads)
    basis.save(tmp_path / "basis")
    back = slra.AttentionBasis.load(tmp_path / "basis", like=arrays[0])
    assert back.ranks == basis.ranks
    assert type(back.wq) is type(basis.wq)
    for name in ("wq", "wk", "wv", "uv", "c", "mu", "error"):
        one, other = to_numpy(getattr(back, name)), to_numpy(getattr(basis, name))
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    for one, other in zip(back.coding, basis.coding, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))
    assert back.is_held_out == basis.is_held_out
    assert back.attend(*arrays).shape == basis.attend(*arrays).shape


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_basis_is_not_rounded_to_half_precision(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    basis = slra.fit_attention(*(x.astype("float32") for x in decaying()), 3)
    basis.save(tmp_path / "basis")
    like = torch.zeros(1, dtype=getattr(torch, dtype))
    back = slra.AttentionBasis.load(tmp_path / "basis", like=like)
    np.testing.assert_array_equal(back.wq.numpy(), basis.wq)


TAMPERED = {
    "flipped bit": lambda path: _flip(path),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "not an archive": lambda path: path.write_bytes(b"basis"),
    "empty": lambda path: path.write_bytes(b""),
    "one array": lambda path: _single(path),
    "pickle": lambda path: _rewrite(path, wq=np.asarray([{}], dtype=object)),
    "name": lambda path: _rewrite(path, extra=np.zeros(1)),
    "shape": lambda path: _rewrite(path, c=np.zeros((2, 1, 7))),
    "ranks": lambda path: _rewrite(path, ranks=np.asarray([[3, 9], [3, 3]])),
    "nan": lambda path: _rewrite(path, mu=np.full((2, 1, 6), np.nan)),
    "dtype": lambda path: _rewrite(path, mu=np.zeros((2, 1, 6), dtype=np.float32)),
    "rates of all heads": lambda path: _rewrite(path, coding_rate_k=np.zeros((1, 33))),
    "a map of all heads": lambda path: _rewrite(path, coding_wk=np.zeros((2, 8, 16))),
}


def _flip(path):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.infolist()[1].header_offset
    content[start + 200] ^= 1
    path.write_bytes(bytes(content))


def _single(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def _rewrite(path, **changes):
    with np.load(path) as archive:
        arrays = {**archive, **changes}
    with path.open("wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize("case", list(TAMPERED))
def test_a_tampered_file_is_one_clear_error(case, tmp_path):
    path = tmp_path / "basis.npz"
    slra.fit_attention(*decaying(), 3).save(path)
    slra.AttentionBasis.load(path)
    TAMPERED[case](path)
    with pytest.raises(ValueError, match=r"path must be a file written by AttentionBasis\.save"):
        slra.AttentionBasis.load(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        slra.AttentionBasis.load(tmp_path / "basis.npz")


@pytest.mark.parametrize("seed", [None, 0])
def test_sampled_rows_lie_in_equal_strata(seed):
    rng = None if seed is None else np.random.default_rng(seed)
    rows = sample_rows(1000, 64, rng)
    assert [row * 64 // 1000 for row in rows] == pytest.approx(range(64), abs=1)
    assert rows == sorted(set(rows))
    # Not the same phase of a period that divides the stride.
    assert len({row % 5 for row in rows}) == 5
    assert sample_rows(7, 64, rng) == list(range(7))


def test_selection_is_what_sorting_gives(xp):
    backend = backend_of(xp)
    x = np.random.default_rng(0).standard_normal((2, 3, 9))
    given = to_xp(xp, x)
    order = np.argsort(-x, axis=-1)[..., :4]
    np.testing.assert_array_equal(to_numpy(backend.top_indices(given, 4)), order)
    smallest = np.take_along_axis(x, order[..., 3:], axis=-1)
    np.testing.assert_array_equal(to_numpy(backend.kth_largest(given, 4)), smallest)
    indices = to_xp(xp, np.asarray([[[2, 0]], [[1, 1]]]))
    rows = np.stack([x[0][[2, 0]], x[1][[1, 1]]])
    np.testing.assert_array_equal(to_numpy(backend.gather_rows(given, indices[:, 0, :])), rows)


def test_repr_fits_on_three_lines(xp):
    rng = np.random.default_rng(0)
    q, k, v = (to_xp(xp, rng.standard_normal((n, 30, 128), dtype="float32")) for n in (32, 8, 8))
    basis = slra.fit_attention(q, k, v, (3, 2), enable_gqa=True)
    lines = repr(basis).split("\n")
    assert len(lines) <= 3
    assert max(map(len, lines)) <= 110
    n_bytes = 4 * (128 * (32 * 3 + 8 * 3 + 8 * 2 + 8 * 2 + 8 + 8) + 32)
    for part in (
        "float32",
        f"{n_bytes:,} bytes",
        "wq (32,128,3)",
        "uv (8,2,128)",
        "ranks (3, 2) in 8",
    ):
        assert part in repr(basis)


def test_repr_of_unlike_ranks_and_of_what_transformations_put_into_a_basis():
    x = np.random.default_rng(0).standard_normal((3, 2, 40, 8))
    basis = slra.fit_attention(*x, (4, 3))
    mixed = dataclasses.replace(basis, ranks=((2, 3), (4, 1)))
    assert "ranks (2, 1) to (4, 3) in 2 key heads" in repr(mixed)
    jax = pytest.importorskip("jax")
    shown = []
    basis = slra.fit_attention(*jax.numpy.asarray(x), (4, 3))
    jax.jit(lambda basis: shown.append(repr(basis)))(basis)
    shown.append(repr(jax.tree_util.tree_map(lambda _: None, basis)))
    shown.append(repr(jax.vmap(lambda _: basis)(jax.numpy.ones(2))))
    assert [len(text.split("\n")) for text in shown] == [3, 3, 3]
