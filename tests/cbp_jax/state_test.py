"""What is read from an optimizer's state: forward weights, window, scales."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

import cbp_jax

rng = np.random.default_rng(0)
PARAMS = {
    "stem": {
        "kernel": jnp.array(rng.normal(size=(3, 4)), jnp.float32),
        "bias": jnp.array(rng.normal(size=4), jnp.float32),
    },
    "body": {"kernel": jnp.array(rng.normal(size=(4, 4)), jnp.float32)},
    "head": {"kernel": jnp.array(rng.normal(size=(4, 2)), jnp.float32)},
}


def on_levels(constraint, w, kept=None):
    """In float64 by numpy; `kept` is the axis with a scale of its own."""
    w = np.asarray(w, np.float64)
    scale = np.mean(np.abs(w)) if kept is None else np.mean(np.abs(w), axis=1 - kept, keepdims=True)
    return reference.quantize(constraint.levels, scale, w)


def partitioned(**links):
    """One link for each named part, the rest as it is."""
    labels = {part: part if part in links else "rest" for part in PARAMS}
    return optax.multi_transform({**links, "rest": optax.identity()}, labels)


def test_quantize_leaves_the_rest_untouched():
    state = cbp_jax.cbp("ternary", mask=cbp_jax.select("body/.*")).init(PARAMS)
    q = cbp_jax.quantize(PARAMS, state)
    np.testing.assert_allclose(
        q["body"]["kernel"], on_levels(cbp_jax.ternary(), PARAMS["body"]["kernel"]), rtol=1e-6
    )
    assert q["stem"]["kernel"] is PARAMS["stem"]["kernel"]
    assert q["stem"]["bias"] is PARAMS["stem"]["bias"]
    assert jax.tree.structure(q) == jax.tree.structure(PARAMS)


def test_quantize_leaves_extra_leaves_untouched():
    """Batch statistics, say, that the optimizer never saw."""
    state = cbp_jax.cbp("binary").init(PARAMS)
    extra = {"statistics": {"mean": jnp.arange(3.0), "count": jnp.array(3)}}
    q = cbp_jax.quantize({**PARAMS, **extra}, state)
    assert q["statistics"]["mean"] is extra["statistics"]["mean"]
    assert q["statistics"]["count"] is extra["statistics"]["count"]
    np.testing.assert_array_equal(
        q["body"]["kernel"], cbp_jax.quantize(PARAMS, state)["body"]["kernel"]
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_quantize_keeps_the_dtype_and_meets_the_constraint(dtype):
    params = jax.tree.map(lambda w: w.astype(dtype), PARAMS)
    state = cbp_jax.cbp("two_bit_shift").init(params)
    assert state.weight_scale["body"]["kernel"].dtype == jnp.float32
    q = jax.jit(cbp_jax.quantize)(params, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(q)} == {jnp.dtype(dtype)}
    expected = on_levels(cbp_jax.two_bit_shift(), params["body"]["kernel"])
    np.testing.assert_allclose(
        np.float64(q["body"]["kernel"]), expected, rtol=float(jnp.finfo(dtype).eps)
    )
    assert cbp_jax.constraint_failure_score(q, state) == 0


def test_quantize_is_transparent_to_no_gradient_of_its_own():
    """The gradient is taken at the quantized weights; through them it is 0, as levels do not move."""
    state = cbp_jax.cbp("binary").init(PARAMS)
    through = jax.grad(lambda p: jnp.sum(cbp_jax.quantize(p, state)["body"]["kernel"] ** 2))(PARAMS)
    np.testing.assert_array_equal(through["body"]["kernel"], 0)


def test_several_states():
    optimizer = optax.chain(
        partitioned(body=cbp_jax.cbp("binary"), head=cbp_jax.cbp("ternary", scale_axis=-1)),
        optax.sgd(0.1),
    )
    state = optimizer.init(PARAMS)
    q = jax.jit(cbp_jax.quantize)(PARAMS, state)
    np.testing.assert_allclose(
        q["body"]["kernel"], on_levels(cbp_jax.binary(), PARAMS["body"]["kernel"]), rtol=1e-6
    )
    np.testing.assert_allclose(
        q["head"]["kernel"],
        on_levels(cbp_jax.ternary(), PARAMS["head"]["kernel"], kept=1),
        rtol=1e-6,
    )
    np.testing.assert_array_equal(q["stem"]["kernel"], PARAMS["stem"]["kernel"])
    updates, state = jax.jit(optimizer.update)(PARAMS, state, PARAMS, value=1.0)
    np.testing.assert_allclose(
        updates["stem"]["kernel"], -0.1 * PARAMS["stem"]["kernel"], rtol=1e-6
    )


def test_a_leaf_constrained_twice_is_named():
    optimizer = optax.chain(
        cbp_jax.cbp("binary", mask=cbp_jax.select(".*/kernel")),
        cbp_jax.cbp("ternary", mask=cbp_jax.select("body/.*")),
    )
    state = optimizer.init(PARAMS)
    reads = (
        cbp_jax.quantize,
        cbp_jax.constraint_failure_score,
        cbp_jax.layer_report,
        cbp_jax.level_histogram,
        cbp_jax.refit_scales,
    )
    for read in reads:
        with pytest.raises(
            ValueError,
            match="'body/kernel' is constrained by two cbp links, 'binary' and 'ternary'",
        ):
            read(PARAMS, state)


def test_no_state():
    for state in (optax.sgd(0.1).init(PARAMS), (), None):
        for read in (
            cbp_jax.quantize,
            cbp_jax.constraint_failure_score,
            cbp_jax.refit_scales,
            cbp_jax.layer_report,
        ):
            with pytest.raises(ValueError, match="no CBPState in this optimizer state"):
                read(PARAMS, state)
        with pytest.raises(ValueError, match="no CBPState"):
            cbp_jax.window(state)


def test_parameters_that_do_not_fit_the_state():
    state = cbp_jax.cbp("binary", scale_axis=-1).init(PARAMS)
    with pytest.raises(
        ValueError, match=r"lack 1 of the 3 leaves that the state constrains: head/kernel"
    ):
        cbp_jax.quantize({"stem": PARAMS["stem"], "body": PARAMS["body"]}, state)
    wrong = {**PARAMS, "body": {"kernel": jnp.ones((4, 5))}}
    with pytest.raises(
        ValueError, match=r"'body/kernel' has shape \(4, 5\), but the state was made for \(4, 4\)"
    ):
        cbp_jax.quantize(wrong, state)


def test_window_is_read_through_wrappers_and_is_the_smallest():
    links = partitioned(
        body=cbp_jax.cbp("binary", initial_window=7), head=cbp_jax.cbp("ternary", initial_window=3)
    )
    assert cbp_jax.window(optax.chain(optax.clip(1.0), links).init(PARAMS)) == 3
    assert (
        cbp_jax.window(optax.MultiSteps(cbp_jax.cbp("binary", initial_window=7), 2).init(PARAMS))
        == 7
    )
    assert (
        cbp_jax.window(
            optax.apply_if_finite(cbp_jax.cbp_sgd(0.1, "binary", initial_window=7), 2).init(PARAMS)
        )
        == 7
    )


def test_window_follows_the_schedule():
    optimizer = cbp_jax.cbp("binary", steps_per_epoch=2, patience=1)
    state, windows, update = optimizer.init(PARAMS), [], jax.jit(optimizer.update)
    for _ in range(7):
        windows.append(float(cbp_jax.window(state)))
        _, state = update(PARAMS, state, PARAMS)
    assert windows == [1, 1, 1, 2, 2, 3, 3]  # as of the last call


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_refit_scales(axis):
    optimizer = optax.chain(
        partitioned(body=cbp_jax.cbp("binary", scale_axis=axis), head=cbp_jax.cbp("ternary")),
        optax.sgd(0.1, 0.9),
    )
    state = optimizer.init(PARAMS)
    moved = jax.tree.map(lambda w: 3 * w + 0.1, PARAMS)
    refitted = cbp_jax.refit_scales(moved, state)
    again = optimizer.init(moved)
    assert jax.tree.structure(refitted) == jax.tree.structure(state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), refitted, again
    )  # nothing else has moved yet
    jax.tree.map(np.testing.assert_array_equal, state, optimizer.init(PARAMS))
    other = np.mean(np.abs(np.asarray(moved["head"]["kernel"], np.float64)))
    assert refitted[0].inner_states["head"].inner_state.weight_scale["head"][
        "kernel"
    ] == pytest.approx(other)


def test_refit_scales_changes_nothing_else():
    optimizer = cbp_jax.cbp("binary", steps_per_epoch=1, patience=1)
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    for _ in range(3):
        _, state = update(PARAMS, state, PARAMS, value=1.0)
    refitted = jax.jit(cbp_jax.refit_scales)(jax.tree.map(lambda w: 2 * w, PARAMS), state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-6),
        refitted.weight_scale,
        state.weight_scale,
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        refitted._replace(weight_scale=None),
        state._replace(weight_scale=None),
    )


def test_refit_scales_with_a_kept_axis_of_one():
    """One output channel looks like none; the kept axes a `scale_fn` is told must still be those of the link."""
    params = {"w": jnp.array([[1.0], [-3.0]])}

    def largest(w, kept_axes):
        return jnp.max(
            jnp.abs(w),
            axis=tuple(i for i in range(w.ndim) if i not in kept_axes),
            keepdims=bool(kept_axes),
        )

    optimizer = cbp_jax.cbp("binary", scale_axis=-1, scale_fn=largest)
    state = optimizer.init(params)
    refitted = cbp_jax.refit_scales(jax.tree.map(lambda w: 2 * w, params), state, scale_fn=largest)
    np.testing.assert_array_equal(state.weight_scale["w"], [[3]])
    np.testing.assert_array_equal(refitted.weight_scale["w"], [[6]])


def test_refit_scales_of_zero_weights_names_the_layer():
    state = cbp_jax.cbp("binary").init(PARAMS)
    with pytest.raises(ValueError, match="'body/kernel' is 0"):
        cbp_jax.refit_scales({**PARAMS, "body": {"kernel": jnp.zeros((4, 4))}}, state)


def test_states_of_nnx_optimizers_are_read_as_they_are():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, optax.chain(cbp_jax.cbp("binary", scale_axis=-1), optax.sgd(0.1)), wrt=nnx.Param
    )
    params = nnx.state(model, nnx.Param)
    expected = on_levels(cbp_jax.binary(), model.kernel[...], kept=1)
    for tree in (params, nnx.to_pure_dict(params)):  # with its variables, and without
        q = cbp_jax.quantize(tree, optimizer.opt_state)
        assert jax.tree.structure(q) == jax.tree.structure(tree)
        np.testing.assert_allclose(jax.tree.leaves(q)[1], expected, rtol=1e-6)
    assert cbp_jax.window(optimizer.opt_state) == 1
    refitted = cbp_jax.refit_scales(jax.tree.map(lambda w: 2 * w, params), optimizer.opt_state)
    assert jax.tree.structure(refitted) == jax.tree.structure(optimizer.opt_state)
    (scale,) = jax.tree.leaves(refitted[0].weight_scale)
    np.testing.assert_allclose(
        scale, 2 * np.mean(np.abs(model.kernel[...]), axis=0, keepdims=True), rtol=1e-6
    )
