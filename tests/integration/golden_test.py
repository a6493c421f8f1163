"""Against numbers computed with the authors' implementation (tests/testdata)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax

TESTDATA = Path(__file__).parent / "testdata"
NAMES = ["binary", "ternary", "one_bit_shift", "two_bit_shift"]
WINDOWS = ["1", "2", "3", "10", "20", "100", "None"]


@pytest.fixture(scope="module")
def vectors():
    return np.load(TESTDATA / "constraint_vectors.npz")


@pytest.mark.parametrize("name", NAMES)
def test_quantize(vectors, name):
    q = cbp_jax.get_constraint(name).quantize(vectors["w"], vectors["scale"])
    # The reference leaves w[0], which is 0, off the levels of a binary weight.
    np.testing.assert_allclose(q[1:], vectors[f"{name}/q"][1:], atol=1e-7, rtol=0)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", NAMES)
def test_violation_and_gradient(vectors, name, window):
    constraint = cbp_jax.get_constraint(name)
    args = vectors["w"], vectors["scale"], np.inf if window == "None" else float(window)
    violation, gradient = vectors[f"{name}/cs/{window}"], vectors[f"{name}/grad/{window}"]
    close = functools.partial(np.testing.assert_allclose, rtol=0)
    close(constraint.violation(*args)[1:], violation[1:], atol=1e-7)
    close(constraint.violation_grad(*args)[1:], gradient[1:], atol=1e-6)


def forward(params, x):
    """The reference network; OIHW convolutions, [out, in] linear layers."""

    def conv(x, w, stride):
        return jax.nn.relu(jax.lax.conv_general_dilated(x, w, (stride, stride), [(1, 1), (1, 1)]))

    x = conv(conv(x, params["stem"], 1), params["q1"], 2)
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["q2"].T)
    return x @ params["head"]["w"].T + params["head"]["b"]


@pytest.mark.parametrize("name", ["binary", "two_bit_shift"])
def test_trajectory(name):
    """Weights, multipliers, window and losses of 40 epochs through `cbp_sgd`, in float64."""
    golden = np.load(TESTDATA / f"trajectory_{name}.npz")
    epochs, steps, patience, learning_rate, multiplier_rate, weight_decay = golden["hp"]
    with jax.enable_x64(True):
        params = {name: jnp.array(golden[f"init/{name}.weight"]) for name in ("stem", "q1", "q2")}
        head, bias = jnp.array(golden["init/head.weight"]), jnp.array(golden["init/head.bias"])
        params["head"] = {"w": head, "b": bias}
        optimizer = cbp_jax.cbp_sgd(
            float(learning_rate),
            name,
            steps_per_epoch=int(steps),
            patience=int(patience),
            multiplier_learning_rate=float(multiplier_rate),
            weight_decay=float(weight_decay),
            mask=cbp_jax.select(include=["q1", "q2"]),
        )
        state = optimizer.init(params)
        for layer in ("q1", "q2"):
            scale = golden[f"init/{layer}.scale"][0]
            np.testing.assert_allclose(state.cbp.weight_scale[layer], scale, rtol=1e-12)

        def loss_fn(params, x, y):
            return optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y).mean()

        @jax.jit
        def step(params, state, x, y):
            loss, grads = jax.value_and_grad(loss_fn)(cbp_jax.quantize(params, state), x, y)
            updates, state = optimizer.update(grads, state, params, value=loss)
            return optax.apply_updates(params, updates), state, loss

        names = (key for key in golden if key.startswith("traj/"))
        trajectory = {key.removeprefix("traj/"): golden[key] for key in names}
        close = functools.partial(np.testing.assert_allclose, atol=1e-10, rtol=1e-10)
        for epoch in range(int(epochs)):
            losses = []
            for x, y in zip(golden["x"], golden["y"], strict=True):
                params, state, loss = step(params, state, x, y)
                losses.append(loss)
            ours = {
                **{name: params[name] for name in ("stem", "q1", "q2")},
                "head_w": params["head"]["w"],
                "head_b": params["head"]["b"],
                "lam1": state.cbp.multipliers["q1"],
                "lam2": state.cbp.multipliers["q2"],
                "g": cbp_jax.window(state),
                "loss": np.array(losses),
                "lagsum": state.cbp.lagrangian_sum,
            }
            assert ours.keys() == trajectory.keys()
            for key, value in ours.items():
                close(value, trajectory[key][epoch], err_msg=f"{key} after epoch {epoch}")
        assert cbp_jax.window(state) >= 20  # the learning rate dropped on the way
