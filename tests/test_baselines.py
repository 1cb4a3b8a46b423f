"""The methods of others against their papers' formulas, written with whole matrices in double precision."""

import numpy as np
import pytest

import slra
from slra.baselines._favor import orthogonal_features
from tests.backends import to_numpy, to_xp
from tests.naive_attention import naive_attention

TOL = 1e-11


def data(heads=2, n=20):
    rng = np.random.default_rng(3)
    return [rng.standard_normal(shape) for shape in ((heads, n, 4), (2, n, 4), (2, n, 3))]


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def nystrom(q, k, v, rank):
    q, k = q / 4**0.25, k / 4**0.25
    groups = np.array_split(np.arange(q.shape[-2]), rank)
    q_m, k_m = (np.stack([x[:, i].mean(1) for i in groups], axis=1) for x in (q, k))
    left, middle, right = (
        softmax(a @ b.swapaxes(1, 2)) for a, b in ((q, k_m), (q_m, k_m), (q_m, k))
    )
    z = middle.swapaxes(1, 2)
    z = z / (abs(middle).sum(1).max(-1) * abs(middle).sum(2).max(-1))[:, None, None]
    eye = np.eye(rank)
    for _ in range(6):
        z = z @ (13 * eye - middle @ z @ (15 * eye - middle @ z @ (7 * eye - middle @ z))) / 4
    return left @ z @ right @ v


def linformer(q, k, v, rank):
    stream = np.random.default_rng(0).bit_generator.spawn(1)[0]
    projection = np.random.Generator(stream).standard_normal((k.shape[-2], rank)).T / np.sqrt(rank)
    return naive_attention(q, projection @ k, projection @ v)[0]


def favor(q, k, v, rank):
    omega = orthogonal_features(rank, 4)

    def phi(x):
        x = x / 4**0.25
        return np.exp(x @ omega.T - np.sum(x**2, axis=-1, keepdims=True) / 2)

    kernel = phi(q) @ phi(k).swapaxes(1, 2)
    return kernel / kernel.sum(-1, keepdims=True) @ v


FORMULAS = {"nystrom": nystrom, "linformer": linformer, "favor": favor}
METHODS = {name: getattr(slra.baselines, name) for name in slra.baselines.__all__}


@pytest.mark.parametrize("method", list(FORMULAS))
def test_baselines_are_their_formulas(xp, method):
    q, k, v = data()
    rank = 9 if method == "favor" else 5
    out = METHODS[method](*(to_xp(xp, x) for x in (q, k, v)), rank)
    np.testing.assert_allclose(to_numpy(out), FORMULAS[method](q, k, v, rank), atol=TOL)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["plain", "causal"])
def test_topk_attends_to_the_keys_with_the_largest_low_rank_scores(xp, options):
    q, k, v = data(heads=4)
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    out = slra.baselines.topk(*arrays, 2, 6, enable_gqa=True, **options)
    k_all, v_all = (np.repeat(x, 2, axis=0) for x in (k, v))
    centred = k_all - k_all.mean(1, keepdims=True)
    components = np.linalg.svd(centred, full_matrices=False)[2][:, :2].swapaxes(1, 2)
    scores = (q @ components) @ (centred @ components).swapaxes(1, 2)
    if options:
        scores = np.where(np.tri(20, dtype=bool), scores, -np.inf)
    place = np.argsort(np.argsort(-scores, axis=-1), axis=-1)
    mask = (place < 6) & np.isfinite(scores)
    expected, _ = naive_attention(q, k_all, v_all, mask=mask)
    np.testing.assert_allclose(to_numpy(out), expected, atol=TOL)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["plain", "causal"])
def test_quest_attends_to_the_pages_with_the_largest_bounds(xp, options):
    q, k, v = data(heads=4)
    out = slra.baselines.quest(
        *(to_xp(xp, x) for x in (q, k, v)), 2, page_size=6, enable_gqa=True, **options
    )
    k_all, v_all = (np.repeat(x, 2, axis=0) for x in (k, v))
    seen = np.tri(20, dtype=bool) if options else np.ones((20, 20), bool)
    pages = [slice(i, i + 6) for i in range(0, 20, 6)]
    # No product with a key of the page is larger.
    bounds = np.stack(
        [
            np.maximum(q * k_all[:, p].min(1)[:, None], q * k_all[:, p].max(1)[:, None]).sum(-1)
            for p in pages
        ],
        axis=-1,
    )
    bounds = np.where([[row[p].any() for p in pages] for row in seen], bounds, -np.inf)
    place = np.argsort(np.argsort(-bounds, axis=-1), axis=-1)
    mask = np.repeat(place < 2, 6, axis=-1)[..., :20] & seen
    expected, _ = naive_attention(q, k_all, v_all, mask=mask)
    np.testing.assert_allclose(to_numpy(out), expected, atol=TOL)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["plain", "causal"])
def test_sparq_puts_the_mean_value_for_keys_that_are_not_chosen(xp, options):
    q, k, v = data(heads=4)
    out = slra.baselines.sparq(*(to_xp(xp, x) for x in (q, k, v)), 2, 6, enable_gqa=True, **options)
    k_all, v_all = (np.repeat(x, 2, axis=0) for x in (k, v))
    seen = np.tri(20, dtype=bool) if options else np.ones((20, 20), bool)
    few = q * (np.argsort(np.argsort(-abs(q), axis=-1), axis=-1) < 2)
    temperature = np.sqrt(4 * abs(few).sum(-1, keepdims=True) / abs(q).sum(-1, keepdims=True))
    weights = softmax(np.where(seen, few @ k_all.swapaxes(1, 2) / temperature, -np.inf))
    chosen = (np.argsort(np.argsort(-weights, axis=-1), axis=-1) < 6) & seen
    share = (weights * chosen).sum(-1, keepdims=True)
    best, _ = naive_attention(q, k_all, v_all, mask=chosen)
    mean = seen / seen.sum(-1, keepdims=True) @ v_all
    np.testing.assert_allclose(to_numpy(out), share * best + (1 - share) * mean, atol=TOL)


def test_streaming_attends_to_sinks_and_a_window(xp):
    q, k, v = data(heads=4)
    mask = np.random.default_rng(0).random((20, 20)) < 0.8
    out = slra.baselines.streaming(
        *(to_xp(xp, x) for x in (q, k, v)), 2, 5, mask=to_xp(xp, mask), enable_gqa=True
    )
    ahead = np.arange(20) - np.arange(20)[:, None]
    seen = (ahead <= 0) & ((ahead > -5) | (np.arange(20) < 2))
    expected, _ = naive_attention(q, k, v, mask=mask & seen, enable_gqa=True)
    np.testing.assert_allclose(to_numpy(out), expected, atol=TOL)


def test_snapkv_keeps_what_the_end_of_the_prompt_attends_to(xp):
    """A prompt of 13 tokens, of which the last three choose, and seven tokens after it."""
    q, k, v = data(heads=4)
    q, n_keys, window = q[:, 10:], 7, 3
    out = slra.baselines.snapkv(
        *(to_xp(xp, x) for x in (q, k, v)),
        *(n_keys, window),
        kernel_size=3,
        causal_align="bottom_right",
        enable_gqa=True,
    )
    k_all, v_all = (np.repeat(x, 2, axis=0) for x in (k, v))
    seen = np.arange(20) <= 10 + np.arange(10)[:, None]
    weights = softmax(np.where(seen, q @ k_all.swapaxes(1, 2) / 2, -np.inf))[:, :window, :10]
    padded = np.pad(weights.sum(1).reshape(2, 2, 10).sum(1), ((0, 0), (1, 1)))
    votes = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    kept = np.argsort(np.argsort(-votes, axis=-1), axis=-1) < n_keys - window
    kept = np.repeat(np.pad(kept, ((0, 0), (0, 10)), constant_values=True), 2, axis=0)
    chosen = seen & ((np.arange(10) < window)[:, None] | kept[:, None, :])
    expected, _ = naive_attention(q, k_all, v_all, mask=chosen)
    np.testing.assert_allclose(to_numpy(out), expected, atol=TOL)


def rounded(x, bits, step, axis):
    """The formula, group by group."""
    out = x.copy()
    for i in range(0, x.shape[axis], step):
        group = (..., slice(i, i + step), slice(None))[: 2 if axis == -1 else 3]
        low, high = x[group].min(axis, keepdims=True), x[group].max(axis, keepdims=True)
        scale = (high - low) / (2**bits - 1)
        out[group] = np.round((x[group] - low) / np.where(scale == 0, 1, scale)) * scale + low
    return out


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "n_exact": 3}], ids=["all", "most"])
def test_kivi_rounds_keys_by_channel_and_values_by_token(xp, options):
    q, k, v = data(heads=4)
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    out = slra.baselines.kivi(*arrays, 2, group_size=8, enable_gqa=True, **options)
    end = 20 - options.get("n_exact", 0)
    low_k = np.concatenate([rounded(k[:, :end], 2, 8, -2), k[:, end:]], axis=1)
    low_v = np.concatenate([rounded(v[:, :end], 2, 8, -1), v[:, end:]], axis=1)
    right, _ = naive_attention(q, low_k, low_v, is_causal=bool(options), enable_gqa=True)
    np.testing.assert_allclose(to_numpy(out), right, atol=TOL)
    assert np.max(np.abs(low_k - k)) > 0.1


def test_all_of_the_keys_are_exact_attention(xp):
    q, k, v = data()
    arrays = [to_xp(xp, x) for x in (q, k, v)]
    mask = np.random.default_rng(0).standard_normal((20, 20))
    out = slra.baselines.topk(*arrays, 1, 19, mask=to_xp(xp, mask))
    expected, _ = naive_attention(q, k, v, mask=mask)
    # One key of 20 is left out, one of little weight: the output moves by no more than that weight.
    assert 0 < np.max(np.abs(to_numpy(out) - expected)) < 1


def test_landmarks_for_every_token_come_close():
    q, k, v = data(n=40)
    exact, _ = naive_attention(q, k, v)
    out = slra.baselines.nystrom(q, k, v, 39)
    few = slra.baselines.nystrom(q, k, v, 2)
    assert np.linalg.norm(out - exact) < np.linalg.norm(few - exact)


def test_random_features_are_unbiased():
    omega = orthogonal_features(40_000, 4)
    x, y = np.asarray([0.5, -0.2, 0.1, 0.3]), np.asarray([0.1, 0.4, -0.3, 0.2])
    phi_x, phi_y = (np.exp(omega @ z - z @ z / 2) for z in (x, y))
    terms = phi_x * phi_y
    # Orthogonal features have no more variance than independent ones: five standard errors.
    assert abs(terms.mean() - np.exp(x @ y)) < 5 * terms.std() / np.sqrt(len(terms))
    gram = omega[:4] @ omega[:4].T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12)


@pytest.mark.parametrize(
    ("method", "sizes", "options", "error", "message"),
    [
        ("favor", (2,), {"is_causal": True}, TypeError, "'is_causal'"),
        ("nystrom", (2,), {"softcap": 1.0}, TypeError, "'softcap'"),
        ("linformer", (2,), {"return_lse": True}, TypeError, "'return_lse'"),
        ("topk", (2,), {}, TypeError, "'n_keys'"),
        ("topk", (2, 21), {}, ValueError, r"n_keys must be between 1 and 20 \(Nk\), got 21"),
        ("quest", (3,), {"page_size": 10}, ValueError, "n_pages must be between 1 and 2"),
        ("sparq", (5, 6), {}, ValueError, r"rank must be between 1 and 4 \(D\), got 5"),
        ("streaming", (4, 0), {}, ValueError, r"window must be between 1 and 20 \(Nk\), got 0"),
        ("snapkv", (2, 3), {}, ValueError, "n_keys must be at least window, 3, got 2"),
        ("snapkv", (3, 2), {"kernel_size": 4}, ValueError, "kernel_size must be odd, got 4"),
        ("nystrom", (21,), {}, ValueError, r"between 1 and 20 \(min of Nq and Nk\), got 21"),
        ("linformer", (0,), {}, ValueError, "n_combinations must be between 1 and 20"),
        ("kivi", (0,), {}, ValueError, "bits must be between 1 and 16"),
        ("kivi", (2,), {"group_size": 0}, ValueError, "group_size must be between 1 and"),
        ("favor", (2,), {"rng": 0.5}, TypeError, "rng must be an int"),
    ],
)
def test_what_a_paper_does_not_define_is_refused(method, sizes, options, error, message):
    with pytest.raises(error, match=message):
        METHODS[method](*data(), *sizes, **options)


def test_draws_follow_the_seed():
    for method in ("linformer", "favor"):
        one, other, again = (METHODS[method](*data(), 5, rng=seed) for seed in (1, 2, 1))
        np.testing.assert_array_equal(one, again)
        assert np.max(np.abs(one - other)) > 0.01


def test_baselines_stay_on_the_device_of_the_input(xp, device):
    q, k, v = (xp.asarray(x, device=device) for x in data())
    for method in ("nystrom", "favor"):
        assert METHODS[method](q, k, v, 3).device == q.device
