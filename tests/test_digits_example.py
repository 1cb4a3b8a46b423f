"""The first steps of the NumPy-only training example against torch's autograd."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from examples import train_digits_numpy as example  # noqa: E402
from tests import digits_in_torch  # noqa: E402


@pytest.mark.parametrize("name", digits_in_torch.CONFIGS)
def test_the_loss_curve_is_that_of_torch(name):
    config = digits_in_torch.CONFIGS[name]._replace(epochs=1, batch=16)
    training, _ = example.digits()
    few = example.Batch(training.images[:80], training.labels[:80])
    params, losses = example.train(example.init(), few, config)
    model, expected = digits_in_torch.train_in_torch(example.init(), few, config)
    assert len(losses) == 5
    # Each of 5 steps adds rounding to sums of about a thousand terms, and passes on what came before, little amplified.
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-10)
    ours = {"in_proj_weight": "in_proj", "out_proj.weight": "out_proj"}
    for key, parameter in model.named_parameters():
        key = key.removeprefix("attention.")
        right = parameter.detach().numpy()
        np.testing.assert_allclose(params[ours.get(key, key)], right, rtol=0, atol=1e-10)
    zeros = example.zeros(params, few, config)
    assert (min(zeros) > 0) == (config.form == "prox")
    assert (max(zeros) > 0) == (config.form == "prox")


@pytest.mark.parametrize("form", ["none", "penalty", "prox"])
def test_gradients_are_those_of_finite_differences(form):
    config = example.Config(form=form, l1={"none": 0.0, "penalty": 1e-3, "prox": 0.1}[form])
    training, _ = example.digits()
    batch = example.Batch(training.images[:2], training.labels[:2])
    rng = np.random.default_rng(1)
    params = example.init()
    _, gradients = example.loss_and_gradients(params, batch, config)
    # Of what comes after the subspaces, which gradients take for constant.
    for name in ("out_proj", "head", "bias"):
        direction, step = rng.standard_normal(params[name].shape), 1e-5
        ahead, behind = (
            example.loss_and_gradients(
                {**params, name: params[name] + sign * step * direction}, batch, config
            )[0]
            for sign in (1, -1)
        )
        slope = (ahead - behind) / (2 * step)
        np.testing.assert_allclose(np.sum(gradients[name] * direction), slope, rtol=1e-6)


def test_the_example_needs_no_framework():
    path = Path(example.__file__)
    code = f"import sys, runpy; runpy.run_path({str(path)!r}); print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert not loaded & {"torch", "jax", "dask", "cupy"}
