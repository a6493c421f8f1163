"""Eight virtual devices (conftest.py) give the numbers of one, and shard states like weights."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cbp_jax

SPECS = {"up": P("data", "model"), "down": P("model", None), "whole": P(), "bias": P("model")}
SHAPES = {"up": (8, 16), "down": (16, 4), "whole": (4, 3), "bias": (16,)}
rng = np.random.default_rng(0)
INITIAL = {key: np.float32(rng.normal(size=shape)) for key, shape in SHAPES.items()}


def make_mesh(axis_type):
    devices = jax.devices("cpu")
    assert len(devices) >= 8, "conftest.py asks for eight"
    axes = {"axis_types": (axis_type,) * 2, "devices": devices[:8]}
    return jax.make_mesh((2, 4), ("data", "model"), **axes)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    """Shardings that the compiler chooses, and JAX's newer default of explicit ones."""
    return make_mesh(request.param)


def on_mesh(mesh):
    return {key: jax.device_put(w, NamedSharding(mesh, SPECS[key])) for key, w in INITIAL.items()}


def on_one_device():
    return jax.tree.map(jnp.asarray, INITIAL)


def make_optimizer(constraint="ternary", **arguments):
    schedule = {"steps_per_epoch": 2, "patience": 1, "multiplier_optimizer": optax.adam(0.05)}
    link = cbp_jax.cbp(constraint, **schedule, **arguments)
    return optax.chain(link, optax.sgd(0.1, momentum=0.9))


def make_step(optimizer, loss_fn):
    def step(params, state, *batch):
        loss, grads = jax.value_and_grad(loss_fn)(cbp_jax.quantize(params, state), *batch)
        updates, state = optimizer.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    return step


def rippled(params):
    """A loss without matrix products, whose layout an explicit mesh would have to be given."""
    return sum(jnp.sum(jnp.cos(3 * w)) for w in jax.tree.leaves(params))


def assert_sharded_like_the_parameters(state, params):
    link = state[0]
    adam = link.multiplier_opt_state[0]
    for name, tree in {"multipliers": link.multipliers, "mu": adam.mu, "nu": adam.nu}.items():
        for key in ("up", "down", "whole"):
            ours, theirs = tree[key].sharding, params[key].sharding
            assert ours.is_equivalent_to(theirs, params[key].ndim), f"{name} of {key}: {ours}"
    for scalar in (link.window, link.lagrangian_sum, link.count, adam.count):
        assert scalar.is_fully_replicated


assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"scale_axis": -1}, {"multiplier_dtype": "bfloat16"}],
    ids=["default", "channels", "bfloat16"],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_init(mesh, compiled, arguments):
    params, optimizer = on_mesh(mesh), make_optimizer(**arguments)
    state = (jax.jit(optimizer.init) if compiled else optimizer.init)(params)
    assert_sharded_like_the_parameters(state, params)
    assert_close(state, optimizer.init(on_one_device()))


@pytest.mark.parametrize("axis", [None, -1, (0, -1)], ids=["a tensor", "a channel", "two axes"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_scales_are_replicated(mesh, compiled, axis):
    if compiled and axis is not None and AxisType.Explicit not in mesh.axis_types:
        pytest.skip("the compiler chooses the sharding")
    init = cbp_jax.cbp("binary", scale_axis=axis).init
    params = on_mesh(mesh)
    if isinstance(axis, tuple):  # an axis between them, which is not kept
        for key in ("up", "down", "whole"):
            rows, columns = (*SPECS[key], None, None)[:2]
            stacked = np.stack([INITIAL[key], 2 * INITIAL[key]], 1)
            params[key] = jax.device_put(stacked, NamedSharding(mesh, P(rows, None, columns)))
    state = (jax.jit(init) if compiled else init)(params)
    for key in ("up", "down", "whole"):
        assert state.weight_scale[key].is_fully_replicated, key


@pytest.mark.parametrize(
    ("compiled_init", "axis"),
    [(False, None), (True, -1)],
    ids=["eager init", "jitted init, channels"],
)
def test_updates(mesh, compiled_init, axis):
    with jax.enable_x64(True):  # sums in another order must not send a weight to another level
        params, state = seven_steps(on_mesh(mesh), axis, compiled_init)
        assert cbp_jax.window(state) == 4  # three epochs have ended, so multipliers have moved
        for key, spec in SPECS.items():
            sharding = NamedSharding(mesh, spec)
            assert params[key].sharding.is_equivalent_to(sharding, params[key].ndim)
        assert_sharded_like_the_parameters(state, params)
        assert_close((params, state), alone(axis), rtol=1e-9, atol=1e-9)


def seven_steps(params, axis, compiled_init):
    optimizer = make_optimizer(scale_axis=axis)
    params = jax.tree.map(lambda w: w.astype(jnp.float64), params)
    state = (jax.jit(optimizer.init) if compiled_init else optimizer.init)(params)
    step = jax.jit(make_step(optimizer, rippled), donate_argnums=(0, 1))
    for _ in range(7):
        params, state = step(params, state)
    return params, state


@functools.cache
def alone(axis):
    return seven_steps(on_one_device(), axis, compiled_init=False)


def test_a_network_with_its_batch_on_the_data_axis():
    """Laid out by the compiler, as most users have it."""
    mesh = make_mesh(AxisType.Auto)

    def loss_fn(p, x, y):
        return jnp.mean((jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"] @ p["whole"] - y) ** 2)

    optimizer = make_optimizer()
    batch = np.float32(rng.normal(size=(16, 8))), np.float32(rng.normal(size=(16, 3)))
    split = jax.device_put(batch, NamedSharding(mesh, P("data")))
    step = jax.jit(make_step(optimizer, loss_fn))
    params, alone = on_mesh(mesh), on_one_device()
    state, its_state = optimizer.init(params), optimizer.init(alone)
    for _ in range(5):
        params, state = step(params, state, *split)
        alone, its_state = step(alone, its_state, *batch)
    assert_close((params, state), (alone, its_state), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "constraint", [cbp_jax.ternary(), cbp_jax.uniform(6)], ids=lambda c: c.name
)
def test_quantize(mesh, constraint):
    """With few levels and with many, which are found in another way."""
    params, alone, optimizer = on_mesh(mesh), on_one_device(), make_optimizer(constraint)
    q = jax.jit(cbp_jax.quantize)(params, optimizer.init(params))
    for key, w in params.items():
        assert q[key].sharding.is_equivalent_to(w.sharding, w.ndim)
    assert_close(q, cbp_jax.quantize(alone, optimizer.init(alone)))


@pytest.mark.parametrize(
    "read", ["constraint_failure_score", "layer_report", "level_histogram", "refit_scales"]
)
def test_metrics(mesh, read):
    function = jax.jit(getattr(cbp_jax, read))
    params, alone, init = on_mesh(mesh), on_one_device(), make_optimizer(scale_axis=-1).init
    assert_close(function(params, init(params)), function(alone, init(alone)), rtol=1e-5)


def test_closing_by_steps(mesh):
    """Gradients' sizes are means over all shards; at the end weights are on their levels."""
    optimizer = cbp_jax.closing(optax.sgd(0.1, momentum=0.9), "ternary", 8)
    step = jax.jit(make_step(optimizer, rippled), donate_argnums=(0, 1))

    def train(params):
        state = optimizer.init(params)
        for _ in range(8):
            params, state = step(params, state)
        return params, state

    params, state = train(on_mesh(mesh))
    for key in ("up", "down", "whole"):
        spec = NamedSharding(mesh, SPECS[key])
        assert state.multipliers[key].sharding.is_equivalent_to(spec, params[key].ndim)
        assert state.mean_square[key].is_fully_replicated
    expected, expected_state = train(on_one_device())
    chex.assert_trees_all_close(params, expected, rtol=1e-5)
    chex.assert_trees_all_close(state.multipliers, expected_state.multipliers, rtol=1e-4)
    assert float(cbp_jax.constraint_failure_score(params, state)) == 0
