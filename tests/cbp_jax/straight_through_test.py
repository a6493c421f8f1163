"""The link that measures scales alone, and the readers of its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax

PARAMS = {
    "first": {"kernel": jnp.array([[0.5, -0.1], [0.25, -0.75]]), "bias": jnp.array([0.2, 0.1])},
    "head": {"kernel": jnp.array([[1.0, -2.0], [1.5, -1.5]])},
}


def test_state_is_constraints_and_scales_alone():
    state = cbp_jax.ste("binary", scale_axis=-1).init(PARAMS)
    assert isinstance(state, cbp_jax.STEState)
    np.testing.assert_allclose(state.weight_scale["first"]["kernel"], [[0.375, 0.425]])
    assert len(jax.tree.leaves(state)) == 2  # a scale for each of the two kernels


def test_gradients_pass_through():
    link = cbp_jax.ste("ternary")
    state = link.init(PARAMS)
    grads = jax.tree.map(lambda w: 3 * w + 1, PARAMS)
    updates, after = jax.jit(link.update)(grads, state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, updates, grads)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("constraint", cbp_jax.CONSTRAINTS)
@pytest.mark.parametrize("axis", [None, -1])
def test_follows_cbp_with_frozen_multipliers(constraint, axis):
    """STE is CBP whose multipliers stay 0: forward weights and latent ones, over 20 steps."""

    def loss_fn(params):
        x = jnp.array([0.3, -0.8]) @ params["first"]["kernel"] + params["first"]["bias"]
        return jnp.sum((x @ params["head"]["kernel"] - 1) ** 2)

    def train(link):
        optimizer = optax.with_extra_args_support(optax.chain(link, optax.adam(1e-2)))

        @jax.jit
        def step(params, state):
            loss, grads = jax.value_and_grad(loss_fn)(cbp_jax.quantize(params, state))
            updates, state = optimizer.update(grads, state, params, value=loss)
            return optax.apply_updates(params, updates), state

        params, state = PARAMS, optimizer.init(PARAMS)
        for _ in range(20):
            params, state = step(params, state)
        return params, cbp_jax.quantize(params, state)

    frozen = cbp_jax.cbp(
        constraint, scale_axis=axis, multiplier_optimizer=optax.set_to_zero(), mask=mask_kernels
    )
    ours = train(cbp_jax.ste(constraint, scale_axis=axis, mask=mask_kernels))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, train(frozen))


def mask_kernels(params):
    return jax.tree.map(lambda w: w.ndim == 2, params)


def test_readers_take_its_state():
    optimizer = optax.chain(cbp_jax.ste({"first/.*": "binary", ".*": "ternary"}), optax.sgd(0.1))
    state = optimizer.init(PARAMS)
    kernel, scale = np.asarray(PARAMS["first"]["kernel"]), 0.4
    np.testing.assert_allclose(
        cbp_jax.quantize(PARAMS, state)["first"]["kernel"], np.sign(kernel) * scale, rtol=1e-6
    )
    head = 2 * np.array([0.5, 0.5, 0, 0]) / 1.5
    first = 2 * np.abs(np.abs(kernel) - scale) / scale
    np.testing.assert_allclose(
        cbp_jax.constraint_failure_score(PARAMS, state, relative=True),
        (first.sum() + head.sum()) / 8,
        rtol=1e-6,
    )
    report = cbp_jax.layer_report(PARAMS, state)
    assert report.window is None
    assert report.layers[0].multiplier_mean is None
    assert "window" not in str(report)
    assert "first/kernel" in str(report)
    assert cbp_jax.level_histogram(PARAMS, state)["first/kernel"].tolist() == [2, 2]
    packed = cbp_jax.pack(PARAMS, state, round=True)
    unpacked = cbp_jax.unpack(packed, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, unpacked, cbp_jax.quantize(PARAMS, state))
    doubled = cbp_jax.refit_scales(jax.tree.map(lambda w: 2 * w, PARAMS), state)
    np.testing.assert_allclose(doubled[0].weight_scale["first"]["kernel"], 2 * scale, rtol=1e-6)
    cbp_jax.check_description(state, cbp_jax.describe(state))


def test_a_description_saved_under_cbp_fits():
    """Training with STE may go on from weights and scales that CBP left."""
    saved = cbp_jax.describe(cbp_jax.cbp("binary").init(PARAMS))
    cbp_jax.check_description(cbp_jax.ste("binary").init(PARAMS), saved)
    with pytest.raises(ValueError, match="constraint saved 'binary', here 'ternary'"):
        cbp_jax.check_description(cbp_jax.ste("ternary").init(PARAMS), saved)


def test_there_is_no_window():
    with pytest.raises(ValueError, match="`ste` has no window"):
        cbp_jax.window(cbp_jax.ste("binary").init(PARAMS))


def test_other_weights_are_refused():
    state = cbp_jax.ste("binary", scale_axis=-1).init(PARAMS)
    wider = jax.tree.map(lambda w: jnp.concatenate([w, w], axis=-1), PARAMS)
    with pytest.raises(ValueError, match=r"scale of 'first/kernel' has shape \(1, 2\)"):
        cbp_jax.quantize(wider, state)


def test_beside_cbp():
    optimizer = optax.chain(
        cbp_jax.cbp("binary", mask=cbp_jax.select(include="first/kernel")),
        cbp_jax.ste("ternary", mask=cbp_jax.select(include="head/kernel")),
    )
    state = optimizer.init(PARAMS)
    report = cbp_jax.layer_report(PARAMS, state)
    assert float(report.window) == 1 == float(cbp_jax.window(state))
    assert [layer.multiplier_mean is None for layer in report.layers] == [False, True]


def test_placeholder_of_optax():
    state = cbp_jax.ste("binary").init(PARAMS)
    doubled = optax.tree_utils.tree_map_params(cbp_jax.ste("binary"), lambda w: 2 * w, state)
    jax.tree.map(np.testing.assert_array_equal, doubled, state)  # it holds no copies of parameters
