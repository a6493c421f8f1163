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
from common.input import augment
from common.models.resnet import BasicBlock, ResNet
from common.training import mesh, optimizers
from common.training.methods import make_method
from common.training.settle import settle
from common.training.step import init_state, latent, make_train_step

import cbp_jax

MODULES = {
    "alexnet": imagenet_alexnet,
    "googlenet": imagenet_googlenet,
    "resnet18": imagenet_resnet18,
    "resnet50": imagenet_resnet50,
}


SMALL = {"depths": (1, 1), "width": 16, "small_images": True, "projections": False}


def small_run(fsdp, steps=4):
    """Trains a small residual network on noise for a few steps, in this process and any others.

    In float64 (but for the last layer), where rounding differences flip no weight near zero.

    Returns:
      The state, the losses and the state's shardings.
    """
    with jax.enable_x64(True):
        return _small_run(fsdp, steps)


def _small_run(fsdp, steps):
    config = cifar10_resnet20.get_config()
    config.patience = 1
    on = mesh.make_mesh(fsdp)
    model = ResNet(10, block=BasicBlock, **SMALL, dtype=jnp.float64, rngs=nnx.Rngs(0))
    graphdef, *trees = models.split_model(model)
    params, batch_stats = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), trees)
    optimizer = make_method(config, 2, model.constrained).optimizer
    state = init_state(params, batch_stats, optimizer)
    shardings = mesh.state_shardings(on, state, params)
    state = mesh.put_state(state, shardings)
    step = make_train_step(graphdef, optimizer, cbp_jax.quantize, shardings=shardings)
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
    """Returns parameters, multipliers and sums as whole arrays."""
    multipliers = state.opt_state.cbp.multipliers
    tree = {"params": state.params, "multipliers": multipliers, "sums": state.sums}
    replicated = mesh.replicated(state.step.sharding.mesh)
    whole = jax.jit(lambda tree: tree, out_shardings=replicated)(tree)
    leaves = jax.tree.leaves_with_path(whole)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(arrays, others):
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, others[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """The losses, and the whole arrays, of a run on one device."""
    (found,) = run_processes(tmp_path_factory.mktemp("one"), processes=1, devices=1)
    assert found.pop("devices") == 1
    return found.pop("losses"), found


def run_processes(folder, processes, devices):
    """Calls `small_run` in fresh processes, and returns their results, read from files."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here, root = Path(__file__).parent, Path(__file__).parents[3]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, (here, root / "experiments", root))),
    }
    code = (
        "import sys, jax, numpy as np\n"
        "index, count, port, folder = *map(int, sys.argv[1:4]), sys.argv[4]\n"
        "if count > 1: jax.distributed.initialize(f'localhost:{port}', count, index)\n"
        "import mesh_test\n"
        "devices = jax.device_count()\n"
        "state, losses, _ = mesh_test.small_run(fsdp=1 if devices == 1 else 2)\n"
        "arrays = mesh_test.gathered(state)\n"
        "np.savez(f'{folder}/{index}.npz', losses=losses, devices=devices, **arrays)\n"
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
    """Shards the small network's kernels, which are too small otherwise."""
    monkeypatch.setattr(mesh, "_MIN_SHARDED", 1)


@pytest.mark.parametrize("fsdp", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_eight_devices_match_one(fsdp, on_one_device, everything_sharded):
    state, losses, shardings = small_run(fsdp)
    np.testing.assert_allclose(losses, on_one_device[0], rtol=1e-6)
    assert_same(gathered(state), on_one_device[1])
    # The layout stays as asked for, so nothing is compiled again.
    for leaf, asked in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(asked, leaf.ndim)
    kernel = state.params["layer2"][0]["conv1"]["kernel"]
    multiplier = state.opt_state.cbp.multipliers["layer2"][0]["conv1"]["kernel"]
    momentum = state.opt_state.sgd[2].trace["layer2"][0]["conv1"]["kernel"]
    for array in (kernel, multiplier, momentum):
        assert array.addressable_shards[0].data.size == array.size // fsdp


def test_two_processes_match_one(tmp_path, on_one_device):
    first, second = run_processes(tmp_path, processes=2, devices=2)
    assert first.pop("devices") == second.pop("devices") == 4
    np.testing.assert_allclose(first.pop("losses"), on_one_device[0], rtol=1e-6)
    assert_same(first, on_one_device[1])
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def test_negative_labels_do_not_count(on_one_device):
    """The batches of `small_run` have labels from -2 to 9; only those from 0 on count."""
    rng = np.random.default_rng(0)
    labels = []
    for _ in range(4):
        rng.normal(size=(16, 8, 8, 3))
        labels.append(rng.integers(-2, 10, 16))
    labels = np.concatenate(labels)
    _, arrays = on_one_device
    assert arrays["['sums'].images"] == (labels >= 0).sum()
    assert arrays["['sums'].unreadable"] == (labels == -2).sum()


def test_rejects_fsdp_that_does_not_divide_the_devices():
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
    """Exports a paper config's step for TPU and GPU from shapes; with `fsdp`, for eight devices."""
    config = MODULES[network].get_config()
    config.update({"constraint": constraint, "pretrained": "random", **changes})
    config = settle(config)
    options = {"auxiliary_heads": True} if network == "googlenet" else {}

    def create():
        return models.create(network, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **options)

    model = nnx.eval_shape(create)
    graphdef, params, batch_stats = models.split_model(model)
    if config.phase == "pretrain":
        optimizer, weights_fn = optimizers.pretraining(config, 5000), latent
    else:
        optimizer, weights_fn, *_ = make_method(config, 5000, model.constrained)
    state = jax.eval_shape(lambda p, b: init_state(p, b, optimizer), params, batch_stats)
    shardings = None if fsdp is None else mesh.state_shardings(mesh.make_mesh(fsdp), state, params)

    def preprocess(batch, key):
        return augment.preprocess(batch, jnp.bfloat16)

    step = make_train_step(graphdef, optimizer, weights_fn, preprocess, shardings)
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, 224, 224, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
        "jitter": jax.ShapeDtypeStruct((config.batch_size, 3), jnp.float32),
    }
    return jax.export.export(step, platforms=["tpu", "cuda"])(state, batch), state


def check_lowered(exported, state):
    assert exported.platforms == ("tpu", "cuda")
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)[0]
    for out, like in zip(jax.tree.leaves(outputs), jax.tree.leaves(state), strict=True):
        assert (out.shape, out.dtype) == (like.shape, like.dtype)
    text = exported.mlir_module()
    assert "bf16" in text  # convolutions are computed in bfloat16
    assert "f64" not in text


@pytest.mark.parametrize(
    ("network", "constraint"),
    [
        *((network, "binary") for network in MODULES),
        *(("resnet18", constraint) for constraint in cbp_jax.CONSTRAINTS[1:]),
    ],
)
def test_step_lowers_for_tpu_and_gpu(network, constraint):
    """Every network and every constraint; layers differ in nothing but their shapes."""
    check_lowered(*lowered(network, constraint))


@pytest.mark.parametrize(
    "changes", [{}, {"method": "ste"}, {"method": "no_window"}, {"phase": "pretrain"}]
)
def test_step_of_eight_devices_lowers_for_tpu_and_gpu(changes):
    exported, state = lowered("resnet18", "ternary", fsdp=4, **changes)
    check_lowered(exported, state)
    assert exported.nr_devices == 8
