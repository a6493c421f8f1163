"""What is read from an optimizer's state: quantized weights, window, scales."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

import cbp_jax

rng = np.random.default_rng(0)


READS = (
    cbp_jax.quantize,
    cbp_jax.constraint_failure_score,
    cbp_jax.layer_report,
    cbp_jax.level_histogram,
    cbp_jax.refit_scales,
)


def normal(*shape):
    return jnp.array(rng.normal(size=shape), jnp.float32)


PARAMS = {
    "stem": {"kernel": normal(3, 4), "bias": normal(4)},
    "body": {"kernel": normal(4, 4)},
    "head": {"kernel": normal(4, 2)},
}


def on_levels(constraint, w, kept=None):
    """In float64 by numpy; `kept` is the axis that keeps its scales."""
    w = np.asarray(w, np.float64)
    scale = np.mean(np.abs(w)) if kept is None else np.mean(np.abs(w), axis=1 - kept, keepdims=True)
    return reference.quantize(constraint.levels, scale, w)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def partitioned(**links):
    """One link for each named part; the rest is left as it is."""
    labels = {part: part if part in links else "rest" for part in PARAMS}
    return optax.multi_transform({**links, "rest": optax.identity()}, labels)


def test_quantize_leaves_the_other_leaves_untouched():
    state = cbp_jax.cbp("ternary", mask=cbp_jax.select("body/.*")).init(PARAMS)
    q = cbp_jax.quantize(PARAMS, state)
    expected = on_levels(cbp_jax.ternary(), PARAMS["body"]["kernel"])
    np.testing.assert_allclose(q["body"]["kernel"], expected, rtol=1e-6)
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
    expected = cbp_jax.quantize(PARAMS, state)["body"]["kernel"]
    np.testing.assert_array_equal(q["body"]["kernel"], expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_quantize_keeps_the_dtype_and_meets_the_constraint(dtype):
    params = jax.tree.map(lambda w: w.astype(dtype), PARAMS)
    state = cbp_jax.cbp("two_bit_shift").init(params)
    assert state.weight_scale["body"]["kernel"].dtype == jnp.float32
    q = jax.jit(cbp_jax.quantize)(params, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(q)} == {jnp.dtype(dtype)}
    expected = on_levels(cbp_jax.two_bit_shift(), params["body"]["kernel"])
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float64(q["body"]["kernel"]), expected, rtol=rounding)
    assert cbp_jax.constraint_failure_score(q, state) == 0


def test_quantize_has_a_gradient_of_zero():
    """Levels do not move, so the gradient is taken at the quantized weights, not through them."""
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
    body = on_levels(cbp_jax.binary(), PARAMS["body"]["kernel"])
    head = on_levels(cbp_jax.ternary(), PARAMS["head"]["kernel"], kept=1)
    np.testing.assert_allclose(q["body"]["kernel"], body, rtol=1e-6)
    np.testing.assert_allclose(q["head"]["kernel"], head, rtol=1e-6)
    np.testing.assert_array_equal(q["stem"]["kernel"], PARAMS["stem"]["kernel"])
    updates, state = jax.jit(optimizer.update)(PARAMS, state, PARAMS, value=1.0)
    stem = -0.1 * PARAMS["stem"]["kernel"]
    np.testing.assert_allclose(updates["stem"]["kernel"], stem, rtol=1e-6)


def test_a_leaf_constrained_twice_is_named():
    optimizer = optax.chain(
        cbp_jax.cbp("binary", mask=cbp_jax.select(".*/kernel")),
        cbp_jax.cbp("ternary", mask=cbp_jax.select("body/.*")),
    )
    state = optimizer.init(PARAMS)
    message = "'body/kernel' is constrained by two links, 'binary' and 'ternary'"
    for read in READS:
        with pytest.raises(ValueError, match=message):
            read(PARAMS, state)


def test_no_state():
    for state in (optax.sgd(0.1).init(PARAMS), (), None):
        for read in READS:
            with pytest.raises(ValueError, match="no CBPState in this optimizer state"):
                read(PARAMS, state)
        with pytest.raises(ValueError, match="no CBPState"):
            cbp_jax.window(state)


def test_parameters_that_do_not_fit_the_state():
    state = cbp_jax.cbp("binary", scale_axis=-1).init(PARAMS)
    message = r"lack 1 of the 3 leaves that the state constrains: head/kernel"
    with pytest.raises(ValueError, match=message):
        cbp_jax.quantize({"stem": PARAMS["stem"], "body": PARAMS["body"]}, state)
    wrong = {**PARAMS, "body": {"kernel": jnp.ones((4, 5))}}
    message = r"'body/kernel' has shape \(4, 5\), but the state was made for \(4, 4\)"
    with pytest.raises(ValueError, match=message):
        cbp_jax.quantize(wrong, state)


def test_window_is_read_through_wrappers_and_is_the_smallest():
    links = partitioned(
        body=cbp_jax.cbp("binary", initial_window=7), head=cbp_jax.cbp("ternary", initial_window=3)
    )
    assert cbp_jax.window(optax.chain(optax.clip(1.0), links).init(PARAMS)) == 3
    in_steps = optax.MultiSteps(cbp_jax.cbp("binary", initial_window=7), 2)
    if_finite = optax.apply_if_finite(cbp_jax.cbp_sgd(0.1, "binary", initial_window=7), 2)
    assert cbp_jax.window(in_steps.init(PARAMS)) == cbp_jax.window(if_finite.init(PARAMS)) == 7


def test_window_follows_the_schedule():
    optimizer = cbp_jax.cbp("binary", steps_per_epoch=2, patience=1)
    state, windows, update = optimizer.init(PARAMS), [], jax.jit(optimizer.update)
    for _ in range(7):
        windows.append(float(cbp_jax.window(state)))
        _, state = update(PARAMS, state, PARAMS)
    assert windows == [1, 1, 1, 2, 2, 3, 3]  # as of the last call


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_refit_scales(axis):
    body, head = cbp_jax.cbp("binary", scale_axis=axis), cbp_jax.cbp("ternary")
    optimizer = optax.chain(partitioned(body=body, head=head), optax.sgd(0.1, 0.9))
    state = optimizer.init(PARAMS)
    moved = jax.tree.map(lambda w: 3 * w + 0.1, PARAMS)
    refitted = cbp_jax.refit_scales(moved, state)
    again = optimizer.init(moved)
    assert jax.tree.structure(refitted) == jax.tree.structure(state)
    assert_close(refitted, again)  # nothing else has moved yet
    jax.tree.map(np.testing.assert_array_equal, state, optimizer.init(PARAMS))
    other = np.mean(np.abs(np.asarray(moved["head"]["kernel"], np.float64)))
    scales = refitted[0].inner_states["head"].inner_state.weight_scale
    assert scales["head"]["kernel"] == pytest.approx(other)


def test_refit_scales_changes_nothing_else():
    optimizer = cbp_jax.cbp("binary", steps_per_epoch=1, patience=1)
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    for _ in range(3):
        _, state = update(PARAMS, state, PARAMS, value=1.0)
    refitted = jax.jit(cbp_jax.refit_scales)(jax.tree.map(lambda w: 2 * w, PARAMS), state)
    assert_close(refitted.weight_scale, jax.tree.map(lambda a: 2 * a, state.weight_scale))
    rest = (tree._replace(weight_scale=None) for tree in (refitted, state))
    jax.tree.map(np.testing.assert_array_equal, *rest)


def test_refit_scales_with_a_kept_axis_of_one():
    """One output channel looks like none, but `scale_fn` must still get the link's kept axes."""
    params = {"w": jnp.array([[1.0], [-3.0]])}

    def largest(w, kept_axes):
        axes = tuple(i for i in range(w.ndim) if i not in kept_axes)
        return jnp.max(jnp.abs(w), axis=axes, keepdims=bool(kept_axes))

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
    chain = optax.chain(cbp_jax.cbp("binary", scale_axis=-1), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
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
    expected = 2 * np.mean(np.abs(model.kernel[...]), axis=0, keepdims=True)
    np.testing.assert_allclose(scale, expected, rtol=1e-6)
