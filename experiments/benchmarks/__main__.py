"""Runs every benchmark of training speed in turn, and writes the page of their results.

    cd experiments && TFDS_DATA_DIR=DIR python -m benchmarks
    cd experiments && python -m benchmarks --only=optimizer_step,scaling --authors=CLONE

The whole training step is that of ResNet-20 on small images on a CPU, and of ResNet-50 at batch 256
in bfloat16 on an accelerator. This takes about an hour, mostly for the runs of `multiplier_state`;
nothing else should run at the same time.
"""

import subprocess
import sys

from absl import app, flags
from benchmarks import page

_SMALL_NETWORK = (
    *("--network=resnet20", "--num_classes=10", "--image_size=32", "--batch_size=64"),
    *("--dtype=float32", "--steps=3", "--repetitions=9"),
)
# A step takes microseconds on an accelerator, so more of them are timed together.
_MANY = {"optimizer_step": "--steps=50", "forward_quantize": "--calls=50", "scaling": "--steps=10"}
_WITH_AUTHORS = ("optimizer_step", "forward_quantize")
NAMES = (
    "optimizer_step",
    "forward_quantize",
    "scaling",
    "train_step",
    "compiled",
    "multiplier_state",
)

_ONLY = flags.DEFINE_list(
    "only",
    list(NAMES),
    "Benchmarks to run; an empty list only writes the page from existing results.",
)
_AUTHORS = flags.DEFINE_string(
    "authors", "", "A clone of the authors' repository, dooseokjeong/CBP; needs torch."
)


def commands(name: str, accelerator: bool) -> list[list[str]]:
    """Returns a benchmark's command-line arguments, once for each time it is to run."""
    if name == "multiplier_state":
        return [["--experiment=digits"], ["--experiment=fashion_mnist"]]
    if name == "train_step":
        return [[]] if accelerator else [list(_SMALL_NETWORK)]
    arguments = [_MANY[name]] if accelerator and name in _MANY else []
    if _AUTHORS.value and name in _WITH_AUTHORS:
        arguments.append(f"--authors={_AUTHORS.value}")
    return [arguments]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    wanted = [name for name in _ONLY.value if name]
    if unknown := set(wanted) - set(NAMES):
        raise app.UsageError(f"--only={','.join(sorted(unknown))} is none of {', '.join(NAMES)}")
    # In a process of its own, which frees the device's memory for the benchmarks.
    ask = [sys.executable, "-c", "import jax; print(jax.devices()[0].platform)"]
    accelerator = bool(wanted) and subprocess.check_output(ask, text=True).strip() != "cpu"
    failed = []
    for name in wanted:
        for arguments in commands(name, accelerator):
            command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
            print(f"+ {' '.join(command[1:])}", flush=True)
            if subprocess.run(command, check=False).returncode:
                failed.append(" ".join(command[2:]))
    page.write()
    if failed:
        sys.exit(f"error: these failed, and the page has their old results: {'; '.join(failed)}")


if __name__ == "__main__":
    app.run(main)
