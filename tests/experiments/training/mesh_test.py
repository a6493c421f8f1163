"""The training step on eight virtual devices, on two processes, and lowered for TPU and GPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')

import cifar10_resnet20
import imagenet_alexnet
import imagenet_googlenet
import imagenet_resnet18
import imagenet_resnet50
from common import models
from common.input import augment as images
from common.training import mesh, optimizers
from common.training import step as train

import cbp_jax

CONFIGS = {
    "alexnet": imagenet_alexnet.CONFIGS,
    "googlenet": imagenet_googlenet.CONFIGS,
    "resnet18": imagenet_resnet18.CONFIGS,
    "resnet50": imagenet_resnet50.CONFIGS,
}


def small_run(fsdp, steps=4):
    """ResNet-20 on noise for a few steps, as this process and any others see it; gives params and
    losses.

    In float64 (but for the last layer), where no weight near zero changes its sign because sums are
    taken in another order.
    """
    with jax.enable_x64(True):
        return _small_run(fsdp, steps)


def _small_run(fsdp, steps):
    config = cifar10_resnet20.get_config()
    config.patience = 1
    on = mesh.make_mesh(fsdp)
    model = models.create("resnet20", 10, dtype=jnp.float64, rngs=nnx.Rngs(0))
    graphdef, *trees = models.split_model(model)
    params, batch_stats = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), trees)
    optimizer = optimizers.post_training(config, 2, model.constrained)
    state = train.init_state(params, batch_stats, optimizer)
    shardings = mesh.state_shardings(on, state, params)
    state = mesh.put_state(state, shardings)
    step = train.make_train_step(graphdef, optimizer, cbp_jax.quantize, shardings=shardings)
    rng, losses = np.random.default_rng(0), []
    share = slice(jax.process_index(), None, jax.process_count())
    for _ in range(steps):
        batch = {
            "image": rng.normal(size=(16, 8, 8, 3))[share],
            "label": rng.integers(-2, 10, 16).astype(np.int32)[share],
        }
        state, loss = step(state, mesh.put_batch(batch, mesh.batch_sharding(on)))
        losses.append(float(loss))
    return state, losses, shardings


def gathered(state):
    """Parameters and multipliers as whole arrays."""
    tree = {
        "params": state.params,
        "multipliers": state.opt_state.cbp.multipliers,
        "sums": state.sums,
    }
    whole = jax.jit(
        lambda tree: tree, out_shardings=mesh.replicated(jax.tree.leaves(state)[0].sharding.mesh)
    )(tree)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(whole)[0]
    }


def assert_same(arrays, others):
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, others[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    return run_processes(tmp_path_factory.mktemp("one"), processes=1, devices=1)


def run_processes(folder, processes, devices):
    """`small_run` in fresh processes, which leave what they found as files."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = [
        str(Path(__file__).parent),
        str(Path(__file__).parents[1] / "experiments"),
        str(Path(__file__).parents[1]),
    ]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    code = (
        "import sys, jax, numpy as np\n"
        "index, count, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]\n"
        "if count > 1: jax.distributed.initialize(f'localhost:{port}', count, index)\n"
        "import mesh_test\n"
        "state, losses, _ = mesh_test.small_run(fsdp=1 if jax.device_count() == 1 else 2)\n"
        "np.savez(f'{folder}/{index}.npz', losses=losses, devices=jax.device_count(), **mesh_test.gathered(state))\n"
    )
    commands = [
        [sys.executable, "-c", code, str(index), str(processes), str(port), str(folder)]
        for index in range(processes)
    ]
    running = [
        subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    return [dict(np.load(folder / f"{index}.npz")) for index in range(processes)]


@pytest.fixture
def everything_sharded(monkeypatch):
    """ResNet-20's kernels are too small to be sharded otherwise."""
    monkeypatch.setattr(mesh, "_MIN_SHARDED", 1)


@pytest.mark.parametrize("fsdp", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_eight_devices_give_the_result_of_one(fsdp, on_one_device, everything_sharded):
    state, losses, shardings = small_run(fsdp)
    np.testing.assert_allclose(losses, on_one_device[0]["losses"], rtol=1e-6)
    expected = {
        name: array for name, array in on_one_device[0].items() if name not in ("losses", "devices")
    }
    assert_same(gathered(state), expected)
    # It lies as it was asked to, and so it stays: nothing is compiled again.
    assert all(
        jax.tree.leaves(
            jax.tree.map(
                lambda leaf, asked: leaf.sharding.is_equivalent_to(asked, leaf.ndim),
                state,
                shardings,
            )
        )
    )
    kernel = state.params["layer2"][0]["conv1"]["kernel"]
    multiplier = state.opt_state.cbp.multipliers["layer2"][0]["conv1"]["kernel"]
    momentum = state.opt_state.sgd[2].trace["layer2"][0]["conv1"]["kernel"]
    for array in (kernel, multiplier, momentum):
        assert array.addressable_shards[0].data.size == array.size // fsdp


def test_two_processes_give_the_result_of_one(tmp_path, on_one_device):
    first, second = run_processes(tmp_path, processes=2, devices=2)
    assert first.pop("devices") == second.pop("devices") == 4
    np.testing.assert_allclose(first.pop("losses"), on_one_device[0]["losses"], rtol=1e-6)
    expected = {
        name: array for name, array in on_one_device[0].items() if name not in ("losses", "devices")
    }
    assert_same(first, expected)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def test_labels_below_zero_do_not_count(on_one_device):
    """The batches of `small_run` have labels from -2 to 9: the loss and the counts are those of the others alone."""
    rng = np.random.default_rng(0)
    labels = []
    for _ in range(4):
        rng.normal(size=(16, 8, 8, 3))
        labels.append(rng.integers(-2, 10, 16))
    labels = np.concatenate(labels)
    assert on_one_device[0]["['sums'].images"] == (labels >= 0).sum()
    assert on_one_device[0]["['sums'].unreadable"] == (labels == -2).sum()


def test_a_mesh_needs_a_divisor():
    with pytest.raises(ValueError, match="fsdp=3 does not divide the 8 devices"):
        mesh.make_mesh(3)


def test_shardings_follow_the_parameters():
    on = mesh.make_mesh(4)
    params = {
        "big": jnp.zeros((300, 512)),
        "odd": jnp.zeros((301, 303)),
        "small": jnp.zeros((8, 8)),
    }
    state = {"trace": params, "count": jnp.zeros(()), "other": {"big": jnp.zeros((4,))}}
    specs = jax.tree.map(lambda sharding: sharding.spec, mesh.state_shardings(on, state, params))
    assert specs == {
        "trace": {"big": P(None, "fsdp"), "odd": P(), "small": P()},
        "count": P(),
        "other": {"big": P()},
    }


def lowered(network, constraint, fsdp=None, **changes):
    """The training step of a paper's config, exported for TPU and GPU from shapes alone; for eight devices if `fsdp` is given."""
    config = CONFIGS[network][constraint]()
    config.update(changes)
    options = {"auxiliary_heads": True} if network == "googlenet" else {}

    def create():
        return models.create(network, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **options)

    model = nnx.eval_shape(create)
    graphdef, params, batch_stats = models.split_model(model)
    if config.phase == "pretrain":
        optimizer, weights_fn = optimizers.pretraining(config, 5000), train.latent
    else:
        optimizer, weights_fn = (
            optimizers.post_training(config, 5000, model.constrained),
            cbp_jax.quantize,
        )
    state = jax.eval_shape(lambda p, b: train.init_state(p, b, optimizer), params, batch_stats)
    shardings = None if fsdp is None else mesh.state_shardings(mesh.make_mesh(fsdp), state, params)

    def preprocess(batch, key):
        return images.preprocess(batch, jnp.bfloat16)

    step = train.make_train_step(graphdef, optimizer, weights_fn, preprocess, shardings)
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, 224, 224, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
        "jitter": jax.ShapeDtypeStruct((config.batch_size, 3), jnp.float32),
    }
    return jax.export.export(step, platforms=["tpu", "cuda"])(state, batch), state


def check_lowered(exported, state):
    assert exported.platforms == ("tpu", "cuda")
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)[0]
    assert all(
        jax.tree.leaves(
            jax.tree.map(
                lambda out, like: (out.shape, out.dtype) == (like.shape, like.dtype), outputs, state
            )
        )
    )
    text = exported.mlir_module()
    assert "bf16" in text  # convolutions are computed in bfloat16
    assert "f64" not in text


@pytest.mark.parametrize("constraint", ["binary", "ternary", "one_bit_shift", "two_bit_shift"])
@pytest.mark.parametrize("network", CONFIGS)
def test_the_step_lowers_for_tpu_and_gpu(network, constraint):
    check_lowered(*lowered(network, constraint))


@pytest.mark.parametrize(
    "changes", [{}, {"method": "ste"}, {"method": "no_window"}, {"phase": "pretrain"}]
)
def test_the_step_of_eight_devices_lowers_for_tpu_and_gpu(changes):
    exported, state = lowered("resnet18", "ternary", fsdp=4, **changes)
    check_lowered(exported, state)
    assert exported.nr_devices == 8
