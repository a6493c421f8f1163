"""The methods of post-training: forward and deployed weights, and the optimizers around them."""

import imagenet_resnet18
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from common.report import figures
from common.report.workdir import METHODS
from common.training import metrics, optimizers, proximal
from common.training.methods import make_method
from common.training.settle import settle

import cbp_jax

MASK = cbp_jax.select(include="kernel")


def config_of(method, **changes):
    config = imagenet_resnet18.get_config()
    config.update({"pretrained": "random", "method": method, "epochs": 10, "patience": 1})
    config.update({"learning_rate": 1e-2, "multiplier_learning_rate": 1e-2, **changes})
    return ml_collections.ConfigDict(settle(config).to_dict())


def initial():
    rng = np.random.default_rng(0)
    return {"kernel": jnp.float32(rng.normal(size=(5, 4))), "bias": jnp.ones(4)}


def gradient(step):
    """Up to 3, so that elements are clipped."""
    rng = np.random.default_rng(step)
    return {"kernel": jnp.float32(rng.normal(size=(5, 4))), "bias": jnp.float32(rng.normal(size=4))}


def steps_of(optimizer, count, grads=gradient):
    params = initial()
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(count):
        updates, state = update(grads(step), state, params, value=jnp.ones(()))
        params = optax.apply_updates(params, updates)
    return params, state


def assert_equal_trees(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_every_method_has_its_label_and_its_colour():
    assert METHODS.keys() == figures.COLORS.keys()


def test_multipliers_of_the_ablation():
    def still(step):
        return jax.tree.map(jnp.zeros_like, gradient(step))

    for optimizer in ("sgd", "adamw"):
        cbp, no_window, ste = (
            steps_of(make_method(config_of(name, optimizer=optimizer), 1, "kernel")[0], 3, still)[1]
            for name in ("cbp", "no_window", "ste")
        )
        assert float(cbp_jax.window(cbp)) == 3
        assert float(cbp_jax.window(no_window)) == np.inf
        # Every weight off its level is constrained at once.
        everywhere, free = (
            optax.tree_utils.tree_get(state, "multipliers")["kernel"] for state in (no_window, cbp)
        )
        assert np.all(np.asarray(everywhere) > 0)
        assert (np.asarray(free) == 0).any()  # those near the midpoint are not yet
        assert (np.asarray(free) > 0).any()
        report = cbp_jax.layer_report(initial(), ste)
        assert report.window is report.layers[0].multiplier_mean is None


def test_ste_is_the_recipe_with_multipliers_at_rest():
    """To the bit, along the same cosine: what "ste" was before it had a link of its own."""
    config = config_of("ste", weight_decay=0.1, learning_rate=0.3)
    recipe = cbp_jax.cbp_sgd(
        optax.cosine_decay_schedule(0.3, 20),
        "binary",
        steps_per_epoch=2,
        patience=1,
        weight_decay=0.1,
        lr_decay=1.0,
        mask=MASK,
        multiplier_optimizer=optax.set_to_zero(),
    )
    method = make_method(config, 2, "kernel")
    params, state = steps_of(method.optimizer, 15)
    expected, recipe_state = steps_of(recipe, 15)
    assert np.abs(expected["kernel"]).max() == 1  # some weights are on the edge of the box
    assert_equal_trees(params, expected)
    assert_equal_trees(method.weights_fn(params, state), cbp_jax.quantize(expected, recipe_state))
    assert metrics._learning_rate(state) == metrics._learning_rate(recipe_state)


def test_rounding_trains_in_full_precision_and_measures_the_scales_at_the_end():
    rounding, full_precision = (
        make_method(config_of(name), 2, "kernel") for name in ("rounding", "full_precision")
    )
    params, state = steps_of(rounding.optimizer, 6)
    same, other_state = steps_of(full_precision.optimizer, 6)
    assert_equal_trees(params, same)
    for weights_fn in (full_precision.weights_fn, full_precision.deployed_fn):
        assert_equal_trees(weights_fn(same, other_state), same)
    assert_equal_trees(rounding.weights_fn(params, state), params)
    w = np.asarray(params["kernel"])
    deployed = jax.jit(rounding.deployed_fn)(params, state)
    np.testing.assert_allclose(
        deployed["kernel"], np.where(w >= 0, 1, -1) * np.abs(w).mean(), rtol=1e-6
    )
    assert_equal_trees(deployed["bias"], params["bias"])
    refitted = rounding.deployed_state_fn(params, state)
    assert_equal_trees(cbp_jax.quantize(params, refitted), deployed)
    with pytest.raises(ValueError, match="state"):
        cbp_jax.quantize(same, other_state)


@pytest.mark.parametrize("method", ["parq", "binary_relax"])
def test_forward_weights_are_annealed_between_two_shares_of_the_run(method):
    """20 steps: latent weights up to step 4, quantized ones from step 15 on."""
    config = config_of(method, anneal_start=0.2, anneal_end=0.75, constraint="ternary")
    made, constraint = make_method(config, 2, "kernel"), cbp_jax.ternary()
    scale = np.abs(np.asarray(initial()["kernel"])).mean()
    for step in (0, 4, 5, 10, 14, 15, 20):
        params, state = steps_of(made.optimizer, step)
        w, forward = params["kernel"], jax.jit(made.weights_fn)(params, state)
        if step <= 3:
            expected = w
        elif method == "parq":
            expected = proximal.parq(
                w, constraint, scale, proximal.mirrored_sigmoid(step, 4, 15, 10.0)
            )
        else:
            share = np.clip((step - 4) / 11, 0, 1)
            expected = (1 - share) * w + share * constraint.quantize(w, scale)
        np.testing.assert_allclose(forward["kernel"], expected, atol=1e-5)
        assert_equal_trees(forward["bias"], params["bias"])
        deployed = made.deployed_fn(params, state)
        assert_equal_trees(deployed, cbp_jax.quantize(params, state))
        if step >= 15:
            assert_equal_trees(forward, deployed)


def test_the_latent_weights_move_as_under_ste():
    """The gradient at the forward weights is applied to the latent ones."""
    params = [
        steps_of(make_method(config_of(name), 2, "kernel").optimizer, 5)[0]
        for name in ("ste", "parq", "binary_relax")
    ]
    assert_equal_trees(params[0], params[1])
    assert_equal_trees(params[0], params[2])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
def test_the_logged_rate_is_the_one_applied(method, optimizer):
    config = config_of(method, optimizer=optimizer, schedule="linear", lr_decay_window=2)
    _, state = steps_of(make_method(config, 1, "kernel").optimizer, 4)
    # The recipe lowers it, since the window has grown to 4.
    lowered = 0.1 if (method, optimizer) == ("cbp", "sgd") else 1
    assert metrics._learning_rate(state) == pytest.approx(lowered * 1e-2 * (1 - 3 / 10))
    assert float(optimizers.learning_rate(config, 1)(3)) == pytest.approx(1e-2 * (1 - 3 / 10))


def test_adamw_with_multipliers():
    """The loss's gradient is clipped first; then the constraint's is added."""
    config = config_of("no_window", optimizer="adamw", clip_norm=1e-3)
    chain = optax.chain(
        optax.clip_by_global_norm(1e-3),
        cbp_jax.cbp(
            "binary",
            steps_per_epoch=2,
            patience=1,
            initial_window=np.inf,
            mask=MASK,
            multiplier_optimizer=optax.adam(1e-2),
        ),
        optax.adamw(
            optax.cosine_decay_schedule(1e-2, 20),
            b2=0.99,
            weight_decay=1e-4,
            mask=lambda params: jax.tree.map(lambda w: w.ndim >= 2, params),
        ),
    )
    params, _ = steps_of(make_method(config, 2, "kernel").optimizer, 6)
    expected, _ = steps_of(chain, 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, expected)
