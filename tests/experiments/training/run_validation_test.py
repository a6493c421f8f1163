"""A run with validation images: what is measured on which images, and how often."""

import evaluate
import numpy as np
import pytest
from common.input import in_memory
from common.report.workdir import Summary, read_metrics
from common.training import restore, run, setup
from common.training.run import train_and_evaluate
from flax import nnx
from run_support import EPOCHS, digits_config

import cbp_jax

HELD_OUT = 200


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A run; its summary; and on which images it was evaluated: of True, the test images."""
    workdir, asked = tmp_path_factory.mktemp("held_out"), []

    def counted(*arguments):
        evaluation = setup.make_evaluation(*arguments)

        def evaluate(*weights, test=False):
            asked.append(test)
            return evaluation(*weights, test=test)

        return evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_evaluation", counted)
        summary = train_and_evaluate(digits_config(validation_images=HELD_OUT), workdir)
    return workdir, summary, asked


def accuracy(state, graphdef, images, labels):
    weights = cbp_jax.quantize(state.params, state.opt_state)
    model = nnx.merge(graphdef, weights, state.batch_stats)
    model.eval()
    return np.mean(np.argmax(np.asarray(model(images)), axis=1) == labels)


def test_rows_are_of_the_validation_images_and_the_summary_of_both(held_out):
    workdir, summary, _ = held_out
    assert summary == Summary.read(workdir)
    found, data = restore.restore(workdir), in_memory.load_digits()
    _, held = in_memory.hold_out(data.train_labels, HELD_OUT)
    validation = data.train_images[held], data.train_labels[held]
    top1 = accuracy(found.state, found.graphdef, *validation)
    test_top1 = accuracy(found.state, found.graphdef, data.test_images, data.test_labels)
    assert top1 != pytest.approx(test_top1, abs=1e-3)
    assert summary.top1 == summary.file_top1 == read_metrics(workdir)[-1]["top1"]
    assert summary.top1 == pytest.approx(top1)
    assert summary.test_top1 == pytest.approx(test_top1)


def test_the_weights_a_run_starts_from_are_measured_alike(held_out):
    workdir, summary, _ = held_out
    config = restore.read_config(workdir, {})
    network = setup.make_network(config, "random")
    model = nnx.merge(network.graphdef, network.params, network.batch_stats)
    model.eval()
    data = in_memory.load_digits()
    _, held = in_memory.hold_out(data.train_labels, HELD_OUT)
    for images, labels, expected in (
        (data.train_images[held], data.train_labels[held], summary.full_precision_top1),
        (data.test_images, data.test_labels, summary.full_precision_test_top1),
    ):
        hits = np.argmax(np.asarray(model(images)), axis=1) == labels
        assert expected == pytest.approx(np.mean(hits))


def test_test_images_are_seen_before_the_first_step_and_after_the_last_alone(held_out):
    _, _, asked = held_out
    # The start, twice; each epoch; the end; and the packed file.
    assert asked == [False, True, *[False] * EPOCHS, True, False]


def test_a_run_is_evaluated_on_either(held_out):
    workdir, summary, _ = held_out
    for test, images, top1 in ((False, HELD_OUT, summary.top1), (True, 899, summary.test_top1)):
        scores = evaluate.evaluate_run(restore.restore(workdir, test=test))
        assert (scores["images"], scores["top1"]) == (images, pytest.approx(top1))


def test_pretraining_holds_out_the_same_images(tmp_path):
    """Whatever the seed; and without held-out images there is no other accuracy."""
    short = {"phase": "pretrain", "pretrain_epochs": 1, "preflight": True}
    summary = train_and_evaluate(digits_config(validation_images=50, **short), tmp_path / "pre")
    assert summary.full_precision_test_top1 == summary.test_top1
    assert summary.full_precision_top1 == summary.top1
    changes = {"validation_images": 50, "pretrained": str(tmp_path / "pre"), "epochs": 1}
    after = train_and_evaluate(digits_config(seed=1, **changes), tmp_path / "post")
    assert after.full_precision_top1 == summary.top1
    assert after.full_precision_test_top1 == summary.test_top1
    plain = train_and_evaluate(digits_config(epochs=1), tmp_path / "plain")
    assert plain.test_top1 is None
    assert plain.full_precision_test_top1 is None
