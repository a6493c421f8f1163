"""The accuracy that others published for their network, from their weights."""

import os
from pathlib import Path

import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("torch", reason="needs torch: pip install torch")

import evaluate


@pytest.mark.slow
@pytest.mark.skipif(
    "CBP_TEST_WEIGHTS" not in os.environ,
    reason="needs akamaster/pytorch_resnet_cifar10's files in the folder CBP_TEST_WEIGHTS",
)
@pytest.mark.skipif(
    "TFDS_DATA_DIR" not in os.environ
    or not (Path(os.environ["TFDS_DATA_DIR"]) / "cifar10").is_dir(),
    reason="needs CIFAR-10 as ArrayRecord in TFDS_DATA_DIR",
)
@pytest.mark.parametrize(
    ("depth", "file", "accuracy"),
    [(3, "resnet20-12fca82f.th", 0.9173), (9, "resnet56-4bfd9763.th", 0.9339)],
)
def test_published_accuracy_on_cifar10(depth, file, accuracy):
    fields = {
        "network": "resnet20",
        "depth": depth,
        "data": "cifar10",
        "num_classes": 10,
        "normalization": "imagenet",
        "batch_size": 400,
        "dtype": "float32",
        "pretrained": str(Path(os.environ["CBP_TEST_WEIGHTS"]) / file),
    }
    scores = evaluate.evaluate_file(fields)
    assert scores["images"] == 10_000
    assert round(scores["top1"], 4) == accuracy
