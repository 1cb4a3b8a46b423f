"""The study of training: its generators, that nothing leaks, that it resumes, and that its results are checked."""

import json
import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks.training import report, runs, tasks  # noqa: E402
from benchmarks.training.attend import causal_favor, make_attention, n_baseline  # noqa: E402
from benchmarks.training.model import Model  # noqa: E402
from benchmarks.training.plan import SETTINGS, Group, main_methods, plan, quick_plan  # noqa: E402
from benchmarks.training.settings import Method  # noqa: E402
from benchmarks.training.train import Trainer, progress, train, warm_up  # noqa: E402

TINY = quick_plan()[0].setting._replace(width=16, steps=6, batch=4, n_test=8, warm=0.5)
MAIN = main_methods("mqar")
KINDS = [method for method in MAIN if method.kind != "nystrom"]


def test_mqar_answers_are_the_values_that_followed_the_keys():
    length, vocab, pairs = 64, 66, 8
    tokens, targets = tasks.mqar(np.random.default_rng(0), 50, length, vocab, pairs)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        value = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(value) == pairs
        assert len(set(value.values())) == pairs
        assert all(1 <= key < vocab // 2 <= answer < vocab for key, answer in value.items())
        asked = [i for i, answer in enumerate(wanted) if answer != tasks.IGNORE]
        assert sorted(row[i] for i in asked) == sorted(value)
        assert all(wanted[i] == value[row[i]] and i >= 2 * pairs and i % 2 == 0 for i in asked)
        assert all(row[i] == 0 for i in range(2 * pairs, length) if i not in asked)


def test_mqar_gaps_follow_the_power_law():
    # With one pair the place of the query is one draw: its frequencies are the weights, within five deviations.
    size, slots, alpha = 20_000, 15, 0.01
    _, targets = tasks.mqar(np.random.default_rng(1), size, 2 + 2 * slots, 64, 1, alpha)
    counts = (targets != tasks.IGNORE).sum(0)[2::2].numpy()
    p = np.arange(1, slots + 1) ** (alpha - 1)
    p /= p.sum()
    assert np.all(np.abs(counts - size * p) < 5 * np.sqrt(size * p * (1 - p)))


def evaluate(tokens):
    """Value of a ListOps expression from its tokens, with a stack; independent of how it was made."""
    functions = {
        "MIN": min,
        "MAX": max,
        "MED": lambda x: int(np.median(x)),
        "SM": lambda x: int(np.sum(x)) % 10,
    }
    stack, deepest = [[]], 0
    for token in tokens:
        if token >= tasks.FIRST_OPERATOR:
            stack.append([tasks.OPERATORS[token - tasks.FIRST_OPERATOR]])
            deepest = max(deepest, len(stack) - 1)
        elif token == tasks.CLOSE:
            name, *arguments = stack.pop()
            assert 2 <= len(arguments) <= tasks.MAX_ARGS
            stack[-1].append(functions[name](arguments))
        else:
            assert 0 <= token <= 9
            stack[-1].append(token)
    ((value,),) = stack
    return value, deepest


def test_listops_answers_by_another_evaluator():
    tokens, targets = tasks.listops(7, 20, 100, 300)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        written = [token for token in row if token != tasks.PAD]
        assert row[: len(written)] == written
        assert 100 < len(written) < 300
        value, depth = evaluate(written)
        assert value == wanted
        # A digit is a node too: operators stand on the levels above the deepest.
        assert depth <= tasks.MAX_DEPTH - 1


def test_listops_draws_operators_as_published():
    rng = random.Random(0)
    trees = [tasks.listops_tree(rng, tasks.MAX_DEPTH - 1) for _ in range(4000)]
    operators = [tree for tree in trees if isinstance(tree, tuple)]
    p, n = tasks.P_OPERATOR, len(trees)
    assert abs(len(operators) - n * p) < 5 * (n * p * (1 - p)) ** 0.5
    assert {len(arguments) for _, arguments in operators} == set(range(2, tasks.MAX_ARGS + 1))
    assert {name for name, _ in operators} == set(tasks.OPERATORS)


def test_digits_are_split_without_overlap():
    train_set, test_set = tasks.digits("train"), tasks.digits("test")
    assert (len(train_set.tokens), len(test_set.tokens)) == (1437, 360)
    assert train_set.tokens.shape[1] == 64
    assert int(train_set.tokens.min()) == 0
    assert int(train_set.tokens.max()) == 16
    seen = set(map(tuple, train_set.tokens.tolist()))
    assert sum(tuple(row) in seen for row in test_set.tokens.tolist()) == 0


def test_epochs_visit_everything_once():
    data = tasks.Batch(torch.arange(12)[:, None], torch.arange(12))
    batches = tasks.epochs(data, np.random.default_rng(0), 4)
    seen = torch.cat([next(batches).targets for _ in range(3)])
    assert sorted(seen.tolist()) == list(range(12))


@pytest.mark.parametrize("method", KINDS, ids=lambda method: method.name)
def test_no_output_depends_on_a_later_token(method):
    trainer = Trainer(TINY, method._replace(warm=False, threshold=method.threshold and 1e-2), 0)
    batches = TINY.train_batches(0)
    for step in range(3):
        trainer.step(next(batches), step)
    model = trainer.model.eval()
    batch = next(batches)
    at = TINY.length // 2
    changed = batch.tokens.clone()
    changed[:, at:] = torch.flip(changed[:, at:], (1,)) + 1
    everywhere = torch.ones_like(batch.tokens, dtype=torch.bool)
    with torch.no_grad():
        one, other = (model(x, everywhere) for x in (batch.tokens, changed))
    one, other = (x.unflatten(0, batch.tokens.shape) for x in (one, other))
    assert not torch.allclose(one[:, at:], other[:, at:], atol=1e-3)
    tolerance = 100 * torch.finfo(one.dtype).eps * float(one.abs().max())
    assert float((one[:, :at] - other[:, :at]).abs().max()) <= tolerance


def test_causal_favor_is_that_of_running_sums():
    from slra.baselines._favor import orthogonal_features

    q, k, v = torch.randn((3, 2, 1, 9, 4), generator=torch.manual_seed(0), dtype=torch.float64)
    omega = torch.as_tensor(orthogonal_features(7, 4))
    phi_q, phi_k = (
        (x @ omega.mT / 4**0.25 - (x * x).sum(-1, keepdim=True) / 4).exp() for x in (q, k)
    )
    # phi(x) = exp(omega x - |x|^2 / 2) of x / D^(1/4), whose square is |x|^2 / sqrt(D) = |x|^2 / 2 here
    kv = (phi_k[..., :, None] * v[..., None, :]).cumsum(-3)
    total = (phi_q * phi_k.cumsum(-2)).sum(-1, keepdim=True)
    expected = (phi_q[..., None, :] @ kv)[..., 0, :] / total
    torch.testing.assert_close(causal_favor(q, k, v, 7), expected, rtol=1e-10, atol=1e-12)


def test_baselines_store_no_more_than_low_rank():
    for setting in SETTINGS.values():
        n, width = setting.length, setting.head_width
        stored = 2 * MAIN[1].rank(setting)
        budget = stored * n
        for kind, each in (("favor", width + 1), ("nystrom", 3 * width)):
            numbers = n_baseline(kind, stored, n, width) * each
            assert budget - each < numbers <= budget


def test_all_methods_go_on_from_one_warm_up():
    warm = warm_up(TINY, 0)
    for method in MAIN:
        model = Model(TINY, method)
        model.load_state_dict(warm.model)
        for name, x in warm.model.items():
            assert torch.equal(model.state_dict()[name], x)


def test_full_rank_without_l1_is_exact_training():
    trainers = [
        Trainer(TINY, Method(kind, kind, cut=1, warm=False), 0) for kind in ("exact", "svd")
    ]
    for trainer in trainers:
        trainer.model.double()
    first = None
    for step, batch in zip(range(4), TINY.train_batches(0), strict=False):
        exact, low_rank = (trainer.step(batch, step) for trainer in trainers)
        # AdamW divides by gradients that may be as small as 1e-8, its eps: rounding grows by that much at most.
        assert abs(exact - low_rank) < 1e8 * torch.finfo(torch.float64).eps
        first = first or exact
    assert abs(exact - first) > 1e-3


def test_schedule_ends_at_the_rank_and_the_full_l1():
    setting, method = SETTINGS["mqar"], Method("m", "svd", penalty=1.0)
    first, last = setting.warm_steps, setting.steps - 1
    ranks, l1 = zip(*(progress(i, setting, method) for i in range(first, last + 1)), strict=True)
    assert ranks[0] > method.rank(setting)
    assert list(ranks) == sorted(ranks, reverse=True)
    assert (ranks[-1], l1[-1]) == (method.rank(setting), 1.0)
    assert list(l1) == sorted(l1)
    assert progress(first, setting, method._replace(ramp=0.0))[1] == 1.0
    assert progress(0, setting, method._replace(warm=False)) == (method.rank(setting), 1.0)


def test_the_proximal_layer_has_zeros_and_the_penalty_none():
    warm = warm_up(TINY, 0)
    prox = train(TINY, Method("a", "svd", threshold=0.5), 0, warm)
    penalty = train(TINY, Method("b", "svd", penalty=0.5), 0, warm)
    assert np.min(np.asarray(prox["zeros"])[..., 0]) > 0.1
    assert np.max(np.asarray(penalty["zeros"])[..., 0]) == 0
    assert prox["curve"][0] == penalty["curve"][0] == warm.curve[0]


def test_an_exact_model_is_cut_to_rank_and_by_tolerance(monkeypatch):
    ways = [Method("svd", "svd"), Method("svd", "svd", rtol=1e-3), Method("svd", "svd", rtol=0.9)]
    monkeypatch.setattr("benchmarks.training.train.COMPRESSIONS", ways)
    fixed, fine, coarse = (
        one["ranks"] for one in train(TINY, MAIN[0], 0, warm_up(TINY, 0))["untrained"]
    )
    assert np.all(np.asarray(fixed) == ways[0].rank(TINY))
    assert np.mean(coarse) < np.mean(fine)


@pytest.fixture(scope="module")
def tiny_study(tmp_path_factory):
    methods = [MAIN[1], MAIN[4]]
    group, folder = Group("main", TINY, 0, methods), tmp_path_factory.mktemp("runs")
    runs.run_group(group, folder)
    return group, folder


def test_a_study_resumes(tiny_study, monkeypatch):
    group, folder = tiny_study
    assert len(runs.collect([group], folder)) == 2
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(runs, "warm_up", lambda *_: pytest.fail("trained again"))
    runs.run_group(group, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    # Other settings are other runs.
    changed = group._replace(setting=TINY._replace(steps=8))
    assert runs.collect([changed], folder) == []


def test_a_broken_run_is_not_taken_for_finished(tiny_study, tmp_path):
    group, _ = tiny_study
    path = runs.run_file(tmp_path, group, group.methods[0])
    path.write_text('{"setting": ')
    assert runs.collect([group], tmp_path) == []


def test_results_are_checked(tiny_study):
    group, folder = tiny_study
    result = report.summarise(runs.collect([group], folder))
    report.check(json.loads(json.dumps(result)), [group])
    with pytest.raises(ValueError, match="missing"):
        report.check(result, [group, group._replace(seed=1)])
    result["runs"][0]["accuracy"] = 1.5
    with pytest.raises(ValueError, match="impossible"):
        report.check(result, [group])


def test_plan_has_every_run_once():
    for groups in (plan(), quick_plan()):
        keys = [runs.run_file(report.RESULTS, g, m) for g in groups for m in g.methods]
        assert len(set(keys)) == len(keys)


def test_layers_take_the_budget_of_their_setting():
    setting = SETTINGS["mqar"]
    layer = make_attention(setting, Method("favor", "favor"))
    assert layer.stored == 2 * setting.head_width // 4
    assert make_attention(setting, Method("exact", "exact")).rank is None
