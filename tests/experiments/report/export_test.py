"""Runs exported by the command, and the accuracy that is read back from the files."""

import re

import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("orbax.checkpoint", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("onnxruntime", reason='needs the extra: pip install -e ".[test]"')

import export
from common.report import deploy
from common.report.workdir import Summary
from common.training.restore import restore
from common.training.run import train_and_evaluate
from common.training.settle import settle
from run_support import digits_config, photos_config, run_script

import cbp_jax


def top1(printed):
    return float(re.search(r"top-1 ([\d.]+)%, .* read back from the file", printed)[1]) / 100


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("digits")
    train_and_evaluate(digits_config(), workdir)
    return workdir


def test_a_packed_file(digits, environment, tmp_path):
    """By the command, on one device; the run had eight."""
    file = tmp_path / "file"
    flags = (f"--workdir={digits}", "--format=packed", "--round", f"--output={file}")
    code, printed = run_script("export.py", *flags, environment=environment)
    assert code == 0, printed
    packed = cbp_jax.load_packed(file)
    assert packed == cbp_jax.load_packed(digits / "weights.safetensors")  # which the run wrote
    assert packed.tensors["conv2/kernel"].constraint == cbp_jax.ternary()
    assert {"bn1/scale", "batch_stats/bn1/mean"} <= set(packed.tensors)
    assert top1(printed) == pytest.approx(Summary.read(digits).top1, abs=1e-4)
    assert f"{file.stat().st_size / 1000:.1f} kB, " in printed


def test_an_onnx_file(digits, tmp_path):
    scores = export.export_onnx(restore(digits), tmp_path / "model.onnx", "int2")
    assert scores["top1"] == pytest.approx(Summary.read(digits).top1, abs=1e-4)
    assert scores["images"] == 899


def test_weights_off_their_levels_are_refused(digits, tmp_path):
    run = restore(digits)
    message = r"2 of 2 constrained layers(.|\n)*conv2/kernel: \d+ weights, by up to .* round=True"
    with pytest.raises(ValueError, match=message):
        export.export_packed(run, tmp_path / "file", round=False)
    assert not (tmp_path / "file").exists()


@pytest.mark.slow
def test_a_run_on_photos(photos, environment, tmp_path):
    config = photos_config(photos, preflight=False, constraint="two_bit_shift")
    summary = train_and_evaluate(config, tmp_path)
    flags = (f"--workdir={tmp_path}", "--round", "--batch_size=8")
    code, printed = run_script("export.py", *flags, environment=environment)
    assert code == 0, printed
    assert top1(printed) == pytest.approx(summary.top1, abs=1e-4)
    flags = (f"--workdir={tmp_path}", "--format=onnx", "--batch_size=8", "--limit=8")
    code, printed = run_script("export.py", *flags, environment=environment)
    assert code == 0, printed
    assert re.search(r"on \d images, read back", printed)


def test_export_rejects_what_is_no_constrained_run(digits, environment, tmp_path):
    code, printed = run_script("export.py", f"--workdir={tmp_path}", environment=environment)
    assert (code, printed) == (1, f"error: {tmp_path} is not the workdir of a run\n")
    run = restore(digits)
    unconstrained = run._replace(config=settle(digits_config(phase="pretrain")))
    with pytest.raises(ValueError, match="is a run of phase 'pretrain', without a constraint"):
        export.check_constrained(unconstrained, digits)
    export.check_constrained(run, digits)


def test_gguf_is_for_the_llama(digits, environment, tmp_path):
    """Refused in one line, which says what there is instead."""
    flags = (f"--workdir={digits}", "--format=gguf", f"--output={tmp_path / 'file'}")
    code, printed = run_script("export.py", *flags, environment=environment)
    assert (code, printed) == (
        1,
        "error: GGUF is for the network llama, and this one is small_conv: it can be written with "
        "--format=packed or --format=onnx\n",
    )
    assert not (tmp_path / "file").exists()


def test_types_of_weights():
    assert export.chosen_type("onnx", "") == "int4"
    assert export.chosen_type("onnx", "int2") == "int2"
    assert (export.chosen_type("packed", ""), export.chosen_type("gguf", "")) == ("", "")
    assert export.chosen_type("gguf", "TQ1_0") == "TQ1_0"
    for kind, name, advice in (
        ("onnx", "TQ1_0", "give int4 or int2 or float"),
        ("gguf", "int4", "give Q1_0 or TQ2_0 or"),
        ("packed", "int4", "leave it out"),
    ):
        with pytest.raises(ValueError, match=f"--format={kind} has no .*{name}: {advice}"):
            export.chosen_type(kind, name)


def test_a_file_of_another_network_is_refused(digits, tmp_path):
    packed = cbp_jax.load_packed(digits / "weights.safetensors")
    tensors = {name: tensor for name, tensor in packed.tensors.items() if name != "conv3/kernel"}
    cbp_jax.save_packed(tmp_path / "file", cbp_jax.Packed(tensors))
    tree = cbp_jax.unpack(packed)
    statistics = tree.pop("batch_stats")
    with pytest.raises(cbp_jax.PackedError, match="no 'conv3/kernel'"):
        deploy.load(tmp_path / "file", tree, statistics)
