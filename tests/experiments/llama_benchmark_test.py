"""Finished Llamas as GGUF files: the command that writes them, and their benchmark."""

import re

import numpy as np
import pytest
from benchmarks import llama_cpp
from common.config import small_config
from common.report.workdir import read_metrics
from common.training.run import train_and_evaluate
from run_support import run_script

gguf = pytest.importorskip("gguf", reason='needs the extra: pip install -e ".[test]"')

SIZES = {"width": 256, "depth": 1, "heads": 4, "kv_heads": 2, "hidden": 256, "context": 32}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two steps each on a text of letters and spaces: in full precision, and ternary."""
    folder = tmp_path_factory.mktemp("runs")
    letters = np.random.default_rng(0).choice(list(b"ab "), 5000).astype(np.uint8)
    (folder / "text.txt").write_bytes(letters.tobytes())
    config = small_config("llama", "llama")
    with config.unlocked():
        config.update(
            {
                "data": "text",
                "text": str(folder / "text.txt"),
                "num_classes": 256,
                "eval_windows": 0,
            }
        )
        config.update({**SIZES, "batch_size": 8, "base_batch_size": 8, "eval_batch_size": 8})
        config.update({"steps_per_epoch": 2, "epochs": 1, "pretrain_epochs": 1})
        config.update({"constraint": "ternary", "preflight": False, "pretrained": "random"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.training.run.draw_run", lambda *_: None)  # takes most of the time
        for name in ("full_precision", "ste"):
            config.method = name
            train_and_evaluate(config, folder / name)
    return folder


def test_the_command(runs, environment, tmp_path):
    kinds = {}
    for name, flags in (("ste", []), ("full_precision", ["--other_type=Q8_0"])):
        file = tmp_path / name
        flags = [*flags, f"--workdir={runs / name}", "--format=gguf", f"--output={file}"]
        code, printed = run_script("export.py", *flags, environment=environment)
        assert code == 0, printed
        assert float(re.search(r"differ by (\S+) of", printed)[1]) < 5e-3
        bits = float(re.search(r"([\d.]+) bits per weight of the whole", printed)[1])
        tensors = gguf.GGUFReader(file).tensors
        parameters = sum(int(np.prod(tensor.shape)) for tensor in tensors)
        assert bits == pytest.approx(8 * file.stat().st_size / parameters, abs=0.005)
        kinds[name] = {t.name: t.tensor_type.name for t in tensors}
    assert kinds["ste"]["blk.0.attn_q.weight"] == "TQ2_0"
    assert kinds["ste"]["output.weight"] == "F32"
    assert kinds["full_precision"]["output.weight"] == "Q8_0"
    flags = ["--weight_type=TQ2_0", f"--workdir={runs / 'full_precision'}", "--format=gguf"]
    code, printed = run_script("export.py", *flags, environment=environment)
    assert code == 1
    assert printed.startswith("error: --weight_type=TQ2_0 is for constrained weights, and this run")


def test_the_benchmark(runs):
    """Every file beside JAX, whose loss is that of the run's own evaluation."""
    pytest.importorskip("xllamacpp", reason='needs the extra: pip install -e ".[test]"')
    workdirs = [runs / name for name in ("full_precision", "ste")]
    rows = llama_cpp.measure(workdirs, windows=3, rounds=2, threads=1)
    files = [(row["weights"], row["file"]) for row in rows]
    ternary = "ternary, STE"
    assert files == [
        *(("full precision", kind) for kind in ("F32", "Q8_0")),
        *((ternary, kind) for kind in ("F32", "TQ2_0", "TQ1_0", "TQ2_0, Q8_0")),
    ]
    sizes = [row["bytes"] for row in rows]
    assert sizes[0] == sizes[2] > sizes[3] > sizes[4] > sizes[1] > sizes[5]
    assert all(row["bytes_of_text"] == 3 * 31 for row in rows)
    for row in rows:
        exact = row["file"] == "F32"
        assert row["difference"] < 1e-3 if exact else 1e-6 < row["difference"] < 0.5
        assert row["bits_per_byte"] == pytest.approx(
            row["bits_per_byte_jax"], abs=1e-4 if exact else 0.05
        )
        assert (row["generated_over_f32"] == 1) == exact
        assert min(row["prompt_per_second"], row["generated_per_second"]) > 0
    for name, row in (("full_precision", rows[0]), ("ste", rows[2])):
        # Other windows of the same letters.
        loss = read_metrics(runs / name)[-1]["eval_loss"] / np.log(2)
        assert row["bits_per_byte_jax"] == pytest.approx(loss, abs=0.3)
    results = {"files": rows, "libraries": {"a": "1"}}
    results |= {"cpu": "b", "cores": 2, "threads": 1, "jax": "2", "rounds": 2}
    page = llama_cpp.as_markdown(results)
    assert page.count("\n| 256 ") == 6
    assert f"after {rows[0]['prompt']!r}:" in page
    assert rows[0]["text"] in page


def test_bits_per_byte():
    """By hand: of a half and a quarter, one and a half bits."""
    shares = np.log(np.float32([[[0.5, 0.5], [0.75, 0.25]]]))
    assert llama_cpp.bits_per_byte(shares, np.array([[0, 1]])) == pytest.approx(1.5)


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run in"):
        llama_cpp.measure([tmp_path], 1, 1, 1)
