"""Every kind of tree and every wrapper gives the numbers of a plain run on nested dictionaries."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from trees import INITIAL, KINDS, NNXNetwork, X, Y, nested_dict, network

import cbp_jax

ARGUMENTS = {
    "constraint": "ternary",
    "steps_per_epoch": 2,
    "patience": 2,
    "multiplier_optimizer": optax.adam(0.05),
}
STEPS = 7

assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def by_shape(params):
    return {leaf.shape: np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)}


# Wrappers


def kernels(params):
    return jax.tree.map(lambda w: w.ndim == 2, params)


def labels(params):
    return jax.tree.map(lambda w: "constrained" if w.ndim == 2 else "rest", params)


STATIC = (
    *("constraint", "mask", "steps_per_epoch", "patience", "scale_axis", "scale_fn"),
    *("multiplier_optimizer", "window_growth", "multiplier_dtype"),
)

WRAPPERS = {
    "plain": lambda: cbp_jax.cbp(**ARGUMENTS),
    "chain": lambda: optax.chain(optax.identity(), cbp_jax.cbp(**ARGUMENTS), optax.scale(1.0)),
    "masked": lambda: optax.masked(cbp_jax.cbp(**ARGUMENTS), kernels),
    "multi_transform": lambda: optax.multi_transform(
        {"constrained": cbp_jax.cbp(**ARGUMENTS), "rest": optax.identity()}, labels
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(cbp_jax.cbp, STATIC)(**ARGUMENTS),
    "MultiSteps": lambda: optax.MultiSteps(cbp_jax.cbp(**ARGUMENTS), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(cbp_jax.cbp(**ARGUMENTS), 3),
}


# Two kinds of trees for each wrapper; each kind has three wrappers or two.
PAIRS = [
    pytest.param(
        KINDS[(i + j) % len(KINDS)], wrapper, id=f"{KINDS[(i + j) % len(KINDS)].__name__}-{wrapper}"
    )
    for i, wrapper in enumerate(WRAPPERS)
    for j in (1, 3)
]


def make_step(optimizer, forward):
    """One step of descent, on updates that are still gradients behind every wrapper."""

    def step(params, state):
        def loss_fn(p):
            return jnp.mean((forward(p, X.astype(jax.tree.leaves(p)[0].dtype)) - Y) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(cbp_jax.quantize(params, state))
        updates, state = optimizer.update(grads, state, params, value=loss)
        return optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates)), state

    return step


def train(optimizer, net, steps=STEPS):
    """As users do: compiled once, parameters and state donated."""
    step = jax.jit(make_step(optimizer, net.forward), donate_argnums=(0, 1))
    params, state = net.params, optimizer.init(net.params)
    for _ in range(steps):
        params, state = step(params, state)
    assert step._cache_size() == 1
    return params, state


@pytest.fixture(scope="module")
def expected():
    params, state = train(cbp_jax.cbp(**ARGUMENTS), network(nested_dict))
    assert cbp_jax.window(state) > 1
    return by_shape(params), by_shape(cbp_jax.quantize(params, state)), float(cbp_jax.window(state))


@pytest.mark.parametrize(("kind", "wrapper"), PAIRS)
def test_training(kind, wrapper, expected):
    net, steps = network(kind), STEPS * (2 if wrapper == "MultiSteps" else 1)
    params, state = train(WRAPPERS[wrapper](), net, steps)
    weights, quantized, window = expected
    assert_close(by_shape(params), weights)
    assert_close(by_shape(cbp_jax.quantize(params, state)), quantized)
    assert cbp_jax.window(state) == window
    assert jax.tree.structure(params) == jax.tree.structure(net.params)


def avals(tree):
    return [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("kind", "wrapper"), PAIRS)
def test_init_under_jit_and_eval_shape(kind, wrapper):
    params, optimizer = network(kind).params, WRAPPERS[wrapper]()
    state, compiled = optimizer.init(params), jax.jit(optimizer.init)(params)
    shapes = jax.eval_shape(optimizer.init, params)
    assert jax.tree.structure(state) == jax.tree.structure(compiled) == jax.tree.structure(shapes)
    assert [leaf[:2] for leaf in avals(state)] == [leaf[:2] for leaf in avals(shapes)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, compiled)


@pytest.mark.parametrize(("kind", "wrapper"), PAIRS)
def test_tree_map_params(kind, wrapper):
    params, optimizer = network(kind).params, WRAPPERS[wrapper]()
    state = optimizer.init(params)
    marked = optax.tree_utils.tree_map_params(optimizer, lambda leaf: leaf + 7, state)
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    (ours,) = find(marked)
    adam = ours.multiplier_opt_state[0]
    for tree in (ours.multipliers, adam.mu, adam.nu):
        assert sorted(leaf.shape for leaf in jax.tree.leaves(tree)) == [(3, 4), (4, 2)]
        assert all(np.all(np.asarray(leaf) == 7) for leaf in jax.tree.leaves(tree))
    jax.tree.map(np.testing.assert_array_equal, ours.weight_scale, find(state)[0].weight_scale)
    assert (ours.count, ours.window) == (0, 1)


def find(state):
    is_ours = lambda node: isinstance(node, cbp_jax.CBPState)  # noqa: E731
    return [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]


def test_tree_map_params_with_specs():
    """Gives a state its shardings: copies of the parameters take theirs, the rest is replicated."""
    params = network(nested_dict).params
    optimizer = optax.chain(cbp_jax.cbp(**ARGUMENTS), optax.sgd(0.1, 0.9))
    specs = jax.tree.map(lambda w: P("x", None) if w.ndim == 2 else P(), params)
    state = optimizer.init(params)
    of_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, spec: spec,
        state,
        specs,
        transform_non_params=lambda _: P(),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices("cpu")[:1])
    shardings = jax.tree.map(
        lambda spec: jax.NamedSharding(mesh, spec),
        of_state,
        is_leaf=lambda node: isinstance(node, P),
    )
    placed = jax.device_put(state, shardings)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    adam = placed[0].multiplier_opt_state[0]
    for tree in (placed[0].multipliers, adam.mu, adam.nu, placed[1][0].trace):
        assert tree["head"]["kernel"].sharding.spec == P("x", None)
    assert placed[0].weight_scale["head"]["kernel"].sharding.spec == P()


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["split", "nnx.jit"])
def test_nnx_optimizer(jit, expected):
    model = NNXNetwork(jax.tree.map(jnp.array, INITIAL))
    optimizer = nnx.Optimizer(
        model, optax.chain(cbp_jax.cbp(**ARGUMENTS), optax.sgd(0.1)), wrt=nnx.Param
    )

    def train_step(model, optimizer):
        graph, params = nnx.split(model, nnx.Param)

        def loss_fn(params):
            return jnp.mean((nnx.merge(graph, params)(X) - Y) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(cbp_jax.quantize(params, optimizer.opt_state))
        optimizer.update(model, grads, value=loss)

    if jit is nnx.jit:
        step = nnx.jit(train_step)
        for _ in range(STEPS):
            step(model, optimizer)
    else:
        graph, state = nnx.split((model, optimizer))

        def pure_step(state):
            merged = nnx.merge(graph, state)
            train_step(*merged)
            return nnx.state(merged)

        step = jax.jit(pure_step, donate_argnums=0)
        for _ in range(STEPS):
            state = step(state)
        assert step._cache_size() == 1
        model, optimizer = nnx.merge(graph, state)
    weights, quantized, window = expected
    params = nnx.state(model, nnx.Param)
    assert_close(by_shape(params), weights)
    assert_close(by_shape(cbp_jax.quantize(params, optimizer.opt_state)), quantized)
    assert cbp_jax.window(optimizer.opt_state) == window


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_cbp_sgd(kind):
    """The whole recipe, whose masks and box see the trees too."""
    for result, expected in zip(run_recipe(kind), run_recipe(nested_dict), strict=True):
        assert_close(result, expected)


@functools.cache
def run_recipe(kind):
    recipe = cbp_jax.cbp_sgd(
        10.0, **ARGUMENTS, scale_axis=-1, weight_bound=0.5, lr_decay=0.2, lr_decay_window=2
    )
    optimizer = optax.chain(recipe, optax.scale(-1.0))  # the steps multiply by -0.1 themselves
    params, state = train(optimizer, network(kind))
    return by_shape(params), by_shape(cbp_jax.quantize(params, state))


def test_inject_hyperparams_schedules_numbers():
    """Any number that is not static may be a schedule, in the recipe too."""
    factory = optax.inject_hyperparams(cbp_jax.cbp_sgd, static_args=(*STATIC, "decay_mask"))
    optimizer = factory(
        learning_rate=optax.linear_schedule(0.1, 0.0, 4),
        constraint="binary",
        weight_bound=2.0,
        gradient_clip=0.5,
    )
    params = {"w": jnp.array([[0.5, -0.5]])}
    state, update, rates = optimizer.init(params), jax.jit(optimizer.update), []
    for _ in range(3):
        updates, state = update({"w": jnp.full((1, 2), 3.0)}, state, params, value=1.0)
        rates.append(float(state.hyperparams["learning_rate"]))
        assert state.inner_state.learning_rate == rates[-1]
    np.testing.assert_allclose(rates, [0.1, 0.075, 0.05], rtol=1e-6)
    velocity = (0.5 * (1 + 0.9 + 0.81)) + 1e-4 * np.array([0.5, -0.5]) * (1 + 0.9 + 0.81)
    np.testing.assert_allclose(updates["w"][0], -0.05 * velocity, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_two_arrays_share_a_buffer(kind):
    """Donation needs it."""
    params = network(kind).params
    state = optax.chain(cbp_jax.cbp(**ARGUMENTS, scale_axis=-1), optax.sgd(0.1, 0.9)).init(params)
    leaves = jax.tree.leaves((params, state))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@pytest.mark.parametrize(
    "make",
    [lambda: cbp_jax.cbp(**ARGUMENTS), lambda: cbp_jax.cbp_sgd(0.1, "binary")],
    ids=["cbp", "cbp_sgd"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.filterwarnings("ignore:cbp's update got no value")
def test_types_are_stable(make, dtype):
    """Whatever the dtype of the loss; weak types too, since a change of them recompiles."""
    with jax.enable_x64(dtype == "float64"):
        params, optimizer = network(nested_dict, dtype).params, make()
        state = optimizer.init(params)
        arrays = (jnp.ones((), jnp.bfloat16), jnp.ones((), jnp.int32))
        for value in (1.0, 1, np.float64(1), *arrays, None):
            updates, new = jax.eval_shape(
                lambda p, s, value=value: optimizer.update(p, s, p, value=value), params, state
            )
            assert avals(new) == avals(state)
            assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        wide = jnp.float64 if dtype == "float64" else jnp.float32
        (ours,) = find(state)
        sums = (ours.lagrangian_sum, ours.previous_sum)
        floats = jax.tree.leaves((ours.multipliers, ours.weight_scale, ours.window, sums))
        assert {leaf.dtype for leaf in floats} == {jnp.dtype(wide)}
        counts = (ours.count, ours.step_in_epoch, ours.patience_used, ours.skipped_values)
        assert {leaf.dtype for leaf in counts} == {jnp.dtype(jnp.int32)}


def test_bfloat16_parameters_follow_float32_ones(expected):
    params, state = train(cbp_jax.cbp(**ARGUMENTS), network(nested_dict, jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert_close(by_shape(params), expected[0], rtol=0, atol=0.05)
    assert cbp_jax.constraint_failure_score(cbp_jax.quantize(params, state), state) == 0


def test_x64(expected):
    with jax.enable_x64(True):
        params, state = train(cbp_jax.cbp(**ARGUMENTS), network(nested_dict, jnp.float64))
        assert_close(by_shape(params), expected[0], rtol=1e-4, atol=1e-5)
        assert cbp_jax.window(state) == expected[2]


def test_float32_parameters_under_x64(expected):
    """The sums and the window are then wider than the weights."""
    with jax.enable_x64(True):
        params, state = train(cbp_jax.cbp(**ARGUMENTS), network(nested_dict, jnp.float32))
        assert_close(by_shape(params), expected[0], rtol=1e-4, atol=1e-5)
        assert state.lagrangian_sum.dtype == jnp.float64


def test_vmap_over_seeds_is_a_loop():
    """Networks whose windows and multipliers move at different steps."""
    net = network(nested_dict)
    optimizer = cbp_jax.cbp(**{**ARGUMENTS, "patience": 4, "scale_axis": -1})
    stacked = jax.tree.map(lambda w: jnp.stack([w, 2 * w, w[::-1]]), net.params)
    step = make_step(optimizer, net.forward)
    params, state, vmapped = (
        stacked,
        jax.jit(jax.vmap(optimizer.init))(stacked),
        jax.jit(jax.vmap(step)),
    )
    for _ in range(STEPS + 4):
        params, state = vmapped(params, state)
    one, init = jax.jit(step), jax.jit(optimizer.init)
    for i in range(3):
        alone = jax.tree.map(lambda w, i=i: w[i], stacked)
        its_state = init(alone)
        for _ in range(STEPS + 4):
            alone, its_state = one(alone, its_state)
        ours = jax.tree.map(lambda leaf, i=i: leaf[i], (params, state))
        chex.assert_trees_all_close(ours, (alone, its_state), rtol=1e-4, atol=1e-5)
    scores = jax.vmap(cbp_jax.constraint_failure_score)(params, state)
    assert len(set(np.asarray(scores).tolist())) == 3


def test_scan_is_a_loop(expected):
    net, optimizer = network(nested_dict), cbp_jax.cbp(**ARGUMENTS)
    step = make_step(optimizer, net.forward)
    start = net.params, optimizer.init(net.params)
    params, state = jax.lax.scan(lambda carry, _: (step(*carry), None), start, length=STEPS)[0]
    assert_close(by_shape(params), expected[0])
    assert state.window == expected[2]


def test_apply_if_finite_keeps_the_schedule_from_bad_gradients():
    params = {"w": jnp.array([[1.0, -2.0]])}
    optimizer = optax.apply_if_finite(cbp_jax.cbp("binary"), 3)
    state = optimizer.init(params)
    updates, state = optimizer.update({"w": jnp.array([[jnp.nan, 1.0]])}, state, params, value=1.0)
    np.testing.assert_array_equal(updates["w"], 0)
    assert find(state)[0].count == 0


def test_multi_steps_counts_emitted_updates():
    params = {"w": jnp.array([[1.0, -2.0]])}
    optimizer = optax.MultiSteps(cbp_jax.cbp("binary", steps_per_epoch=2, patience=1), 3)
    state, update, seen = optimizer.init(params), jax.jit(optimizer.update), []
    for i in range(12):
        _, state = update(params, state, params, value=float(i))
        (ours,) = find(state)
        seen.append((int(ours.count), float(ours.window), float(ours.lagrangian_sum)))
    assert [count for count, *_ in seen] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert [window for _, window, _ in seen] == [1] * 8 + [2] * 4
    # The values of the last micro-batches, 2 and 5, and the outer weight's share of the constraint:
    # 1e-4 times 2 |-2 + 1.5|.
    assert seen[5][2] == pytest.approx(2 + 5 + 2e-4, rel=1e-6)
