"""Every benchmark of training speed, one after another, and the page of what they gave.

    cd experiments && TFDS_DATA_DIR=DIR python -m benchmarks
    cd experiments && python -m benchmarks --only=optimizer_step,scaling --authors=CLONE

On a CPU the whole training step is that of a ResNet-20 on small images; on an accelerator that of
ResNet-50 at batch 256 in bfloat16. It takes about an hour, most of it for the runs of
`multiplier_state`; nothing else should run beside it.
"""

import subprocess
import sys

from absl import app, flags
from benchmarks import page

_SMALL_NETWORK = (
    *("--network=resnet20", "--num_classes=10", "--image_size=32", "--batch_size=64"),
    *("--dtype=float32", "--steps=3", "--repetitions=9"),
)
# On an accelerator a step takes microseconds, so more of them are timed together.
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
    "Those to run; an empty list writes the page from the results that are there.",
)
_AUTHORS = flags.DEFINE_string(
    "authors", "", "A clone of the authors' repository, dooseokjeong/CBP; needs torch."
)


def commands(name: str, accelerator: bool) -> list[list[str]]:
    """Arguments of a benchmark's module: of each time it is to run."""
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
    # In a process of its own, or it would keep the device's memory from those that are timed.
    ask = [sys.executable, "-c", "import jax; print(jax.devices()[0].platform)"]
    accelerator = (
        bool(wanted)
        and subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip() != "cpu"
    )
    failed = []
    for name in wanted:
        for arguments in commands(name, accelerator):
            command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
            print(f"+ {' '.join(command[1:])}", flush=True)
            if subprocess.run(command, check=False).returncode:
                failed.append(" ".join(command[2:]))
    page.write()
    if failed:
        sys.exit(
            f"error: these failed, and the page has what was there before: {'; '.join(failed)}"
        )


if __name__ == "__main__":
    app.run(main)
