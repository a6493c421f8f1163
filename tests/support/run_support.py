"""A small long run as a user starts it: its config, its command, its process, and its terminal."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import cifar10_resnet20
import digits
import ml_collections

ROOT = Path(__file__).parents[2]
STEPS_PER_EPOCH, EPOCHS = 5, 3


def photos_config(photos, **changes):
    """ResNet-8 on the folder of photos, which are read as ImageNet is."""
    config = cifar10_resnet20.get_config()
    config.update(
        {
            "depth": 1,
            "pretrained": "random",
            "data": "folder",
            "data_dir": str(photos),
            "num_classes": 4,
            "image_size": 16,
            "resize": 20,
            "workers": 0,
            "batch_size": 8,
            "epochs": EPOCHS,
            "patience": 1,
            "dtype": "float32",
            "checkpoint_steps": 2,
            "keep_checkpoints": 10,
            **changes,
        }
    )
    return config


def digits_study(**changes):
    """The study of the digits, cut short."""
    config = digits.get_config()
    short = {"epochs": 6, "pretrain_epochs": 4, "steps_per_epoch": 10, "patience": 1}
    config.update({**short, "constraint": "ternary", "checkpoint_epochs": 2, **changes})
    return config


def digits_config(**changes):
    """One run on the digits, from random weights."""
    fields = digits_study().to_dict()
    del fields["methods"]
    config = ml_collections.ConfigDict(fields)
    config.update(
        {
            "pretrained": "random",
            "epochs": EPOCHS,
            "steps_per_epoch": STEPS_PER_EPOCH,
            "checkpoint_epochs": 1,
            "checkpoint_steps": 2,
            "keep_checkpoints": 10,
            "keep_best": True,
            "best_cfs": 10.0,  # which counts every epoch
            "preflight": False,
            **changes,
        }
    )
    return config


def command(photos, workdir, **changes):
    config, defaults = photos_config(photos, **changes), cifar10_resnet20.get_config()
    flags = [f"--config.{name}={config[name]}" for name in config if config[name] != defaults[name]]
    script = str(ROOT / "experiments" / "cifar10_resnet20.py")
    return [sys.executable, script, f"--workdir={workdir}", *flags]


def study_command(workdir, **changes):
    """The command of `digits_study`."""
    config, defaults = digits_study(**changes), digits.get_config()
    flags = [f"--config.{name}={config[name]}" for name in config if config[name] != defaults[name]]
    return [sys.executable, str(ROOT / "experiments" / "digits.py"), f"--workdir={workdir}", *flags]


def run_script(name, *flags, environment=None):
    """Runs a script of the experiments; gives its exit status and all it printed."""
    command = [sys.executable, str(ROOT / "experiments" / name), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def start(photos, workdir, environment, **changes):
    return subprocess.Popen(
        command(photos, workdir, **changes),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return printed, errors


def in_terminal(command, environment=None, columns=80):
    """Runs a command with a terminal as its standard error.

    Gives its standard output, and the lines that the terminal shows.
    """
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=terminal, text=True
    )
    os.close(terminal)
    written = b""
    try:
        while read := os.read(reader, 4096):
            written += read
    except OSError:  # how Linux says that nobody writes any more
        pass
    os.close(reader)
    printed, _ = process.communicate(timeout=300)
    text = written.decode()
    assert process.returncode == 0, text[-3000:]
    # What was written last stays: every state of a progress bar begins with a carriage return, and
    # covers the one before.
    return printed, [line.rstrip("\r").split("\r")[-1] for line in text.split("\n")]
