"""The networks against torchvision's and the authors' AlexNet, on random weights and images."""

import collections

import jax
import numpy as np
import pytest

pytest.importorskip("flax", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("torch", reason="needs torch: pip install torch")

import torch
from common import models
from common.models import torch_weights
from flax import nnx


def import_torchvision():
    """Imports torchvision; declares its operators if its extension is missing for this torch."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


try:
    torchvision = import_torchvision()
except ImportError:
    pytest.skip("needs torchvision: pip install torchvision", allow_module_level=True)


class TorchAlexNet(torch.nn.Module):
    """The authors' AlexNet, layer by layer."""

    def __init__(self):
        super().__init__()
        nn = torch.nn

        def conv(features_in, features, *options, **named):
            layer = nn.Conv2d(features_in, features, *options, bias=False, **named)
            return layer, nn.BatchNorm2d(features, eps=1e-4), nn.ReLU()

        def dense(features_in, features):
            layer = nn.Linear(features_in, features, bias=False)
            return layer, nn.BatchNorm1d(features, eps=1e-4), nn.ReLU()

        self.features = nn.Sequential(
            *conv(3, 64, 11, stride=4, padding=2),
            nn.MaxPool2d(3, 2),
            *conv(64, 192, 5, padding=2),
            nn.MaxPool2d(3, 2),
            *conv(192, 384, 3, padding=1),
            *conv(384, 256, 3, padding=1),
            *conv(256, 256, 3, padding=1),
            nn.MaxPool2d(3, 2),
        )
        self.classifier = nn.Sequential(
            *dense(9216, 4096), *dense(4096, 4096), nn.Linear(4096, 1000)
        )

    def forward(self, images):
        return self.classifier(torch.flatten(self.features(images), 1))


def randomized(model):
    """Returns the module in evaluation mode, with batch normalization far from the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            torch.nn.init.normal_(module.bias, 0, 0.3, generator=generator)
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.01, 2, generator=generator)
    return model.eval()


def images(count=2, size=224):
    return np.random.default_rng(0).normal(size=(count, size, size, 3)).astype(np.float32)


def run_torch(model, batch):
    with torch.no_grad():
        return model(torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))))


def load(name, path, **options):
    """Makes a network with the weights of a file, in evaluation mode."""
    model = nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), **options))
    model = nnx.merge(models.split_model(model)[0], *torch_weights.load_torch(path, model))
    model.eval()
    return model


@nnx.jit
def run(model, batch):
    with jax.default_matmul_precision("highest"):
        return model(batch)


def assert_close(ours, theirs, tolerance=1e-5):
    theirs = theirs.numpy()
    assert ours.shape == theirs.shape
    assert np.max(np.abs(ours - theirs)) < tolerance * np.max(np.abs(theirs))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet(name, tmp_path):
    theirs = randomized(getattr(torchvision.models, name)())
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    assert_close(run(load(name, tmp_path / "weights.pth"), images()), run_torch(theirs, images()))


def test_googlenet_of_torchvision(tmp_path):
    theirs = randomized(torchvision.models.googlenet(transform_input=True, init_weights=False))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = load(
        "googlenet",
        tmp_path / "weights.pth",
        auxiliary_heads=False,
        **torch_weights.TORCHVISION_OPTIONS["googlenet"],
    )
    assert_close(run(ours, images()), run_torch(theirs, images()))


@pytest.mark.parametrize("size", [224, 97])
def test_googlenet_with_auxiliary_heads(size, tmp_path):
    """In training mode but for dropout and statistics; at 97 the pooling windows' sizes differ."""
    theirs = randomized(torchvision.models.googlenet(transform_input=False, init_weights=False))
    theirs.training = True  # of this module alone
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = load("googlenet", tmp_path / "weights.pth")
    ours.dropout.deterministic, ours.dropout.rate = False, 0.0
    logits, aux1, aux2 = run(ours, images(size=size))
    want = run_torch(theirs, images(size=size))
    assert_close(logits, want.logits)
    assert_close(aux1, want.aux_logits1)
    assert_close(aux2, want.aux_logits2)


def test_alexnet_of_the_authors(tmp_path):
    """Their checkpoints are wrapped, distributed, and have the quantized layers' scales."""
    theirs = randomized(TorchAlexNet())
    arrays = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    arrays["module.features.4.scale"] = torch.full((1,), 0.02)
    torch.save({"epoch": 3, "model_state_dict": arrays, "best": 0.58}, tmp_path / "weights.pth")
    ours = load("alexnet", tmp_path / "weights.pth")
    assert_close(run(ours, images()), run_torch(theirs, images()))
    back = torch_weights.to_torch(ours, *models.split_model(ours)[1:])
    np.testing.assert_array_equal(back["classifier.0.weight"], theirs.classifier[0].weight.detach())


def test_training_mode_and_back(tmp_path):
    """The running variance is the batch's here, and n / (n - 1) times as large in PyTorch."""
    theirs = randomized(torchvision.models.resnet18()).train()
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="needs safetensors: pip install safetensors"
    )
    safetensors.save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    ours = load("resnet18", tmp_path / "weights.safetensors")
    before = torch_weights.to_torch(ours, *models.split_model(ours)[1:])
    tensors = {name: torch.from_numpy(value) for name, value in before.items()}
    theirs.load_state_dict(tensors)  # strict: nothing is missing
    ours.train()
    batch = images(count=4, size=96)
    assert_close(run(ours, batch), run_torch(theirs, batch), tolerance=1e-4)

    after, want = torch_weights.to_torch(ours, *models.split_model(ours)[1:]), theirs.state_dict()
    side = {"bn1": 48, "layer1": 24, "layer2": 12, "layer3": 6, "layer4": 3}
    for name, old in before.items():
        if name.endswith("running_var"):
            count = 4 * side[name.split(".")[0]] ** 2
            unbiased = 0.9 * old + (after[name] - 0.9 * old) * count / (count - 1)
            np.testing.assert_allclose(unbiased, want[name], rtol=2e-4)
        elif name.endswith("running_mean"):
            np.testing.assert_allclose(after[name], want[name], rtol=1e-3, atol=1e-4)
        else:
            np.testing.assert_array_equal(after[name], want[name])


@pytest.fixture(scope="module")
def resnet20():
    """A network of shapes, and a state dict for it in bfloat16, which float32 holds exactly."""
    model = nnx.eval_shape(lambda: models.create("resnet20", rngs=nnx.Rngs(0)))
    ones = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape),
        models.split_model(model)[1:],
    )
    arrays = torch_weights.to_torch(model, *ones)
    return model, {name: torch.from_numpy(value).bfloat16() for name, value in arrays.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda arrays: arrays,
        lambda arrays: {"epoch": 1, "state_dict": arrays, "optimizer": {"lr": 0.1}},
        lambda arrays: {"model": {f"module.{name}": value for name, value in arrays.items()}},
        lambda arrays: {name: torch.nn.Parameter(value) for name, value in arrays.items()},
        lambda arrays: (
            collections.OrderedDict(arrays) | {"bn1.num_batches_tracked": torch.tensor(3)}
        ),
    ],
)
def test_state_dicts(resnet20, tmp_path, wrap):
    model, arrays = resnet20
    torch.save(wrap(arrays), tmp_path / "weights.pth")
    back = torch_weights.to_torch(model, *torch_weights.load_torch(tmp_path / "weights.pth", model))
    assert back.keys() == arrays.keys()
    for name, value in arrays.items():
        assert back[name].dtype == np.float32
        np.testing.assert_array_equal(back[name], value.float())


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><html>404</html>", b"PK\x03\x04 cut short"]
)
def test_rejects_other_files(resnet20, tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"weights\.pth is not a PyTorch checkpoint, or is damaged"
    ):
        torch_weights.load_torch(tmp_path / "weights.pth", resnet20[0])


def test_rejects_truncated_checkpoint(resnet20, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(resnet20[1], path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged"):
        torch_weights.load_torch(path, resnet20[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # A pickled module would run code.
        (lambda: torch.nn.Linear(2, 2), "holds more than tensors"),
        (lambda: [torch.ones(2)], "holds no state dict but a list"),
        (lambda: {"epoch": 3, "net": {"w": torch.ones(2)}}, "these are not tensors: epoch, net"),
    ],
)
def test_rejects_other_pickles(resnet20, tmp_path, content, message):
    torch.save(content(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        torch_weights.load_torch(tmp_path / "weights.pth", resnet20[0])
