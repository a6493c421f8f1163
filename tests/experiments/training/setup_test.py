"""Which parameters of a network are constrained."""

import pytest
from common.config import ConfigError
from common.report.workdir import Summary, read_metrics
from common.training import setup
from common.training.run import train_and_evaluate
from common.training.settle import settle
from run_support import digits_config

import cbp_jax

KERNELS = ["conv1/kernel", "conv2/kernel", "conv3/kernel", "head/kernel"]


@pytest.mark.parametrize(
    ("constrained", "expected"),
    [("", KERNELS[1:3]), ("all", KERNELS), ("conv[12]/kernel", KERNELS[:2])],
)
def test_constrained_parameters(constrained, expected):
    config = settle(digits_config(constrained=constrained))
    network = setup.make_network(config, config.pretrained)
    link = cbp_jax.cbp("binary", mask=cbp_jax.select(include=network.constrained))
    report = cbp_jax.layer_report(network.params, link.init(network.params))
    assert [layer.layer for layer in report.layers] == expected


def test_a_pattern_must_match():
    config = settle(digits_config(constrained="conv9/kernel"))
    message = "constrained='conv9/kernel': .* near misses: conv"
    with pytest.raises(ConfigError, match=message):
        setup.make_network(config, config.pretrained)


def test_a_run_constrains_the_first_and_the_last_layer_too(tmp_path):
    summary = train_and_evaluate(digits_config(constrained="all"), tmp_path)
    assert summary == Summary.read(tmp_path)
    assert list(read_metrics(tmp_path)[-1]["violation"]) == KERNELS
    assert summary.file_top1 == summary.top1
    packed = cbp_jax.load_packed(tmp_path / "weights.safetensors")
    tensors = [t for t in packed.tensors.values() if isinstance(t, cbp_jax.PackedTensor)]
    sizes = [9 * 6, 9 * 6 * 12, 9 * 12 * 12, 12 * 10]
    assert sorted(tensor.size for tensor in tensors) == sorted(sizes)
    # Two bits a weight, a scale for each kernel, and norms and biases in float32.
    rest = 2 * (6 + 12 + 12) + 10
    assert summary.bytes_packed == sum((2 * size + 7) // 8 + 4 for size in sizes) + 4 * rest
