"""Two runs are the same: their states to the bit, and what they logged."""

import json

import jax
import numpy as np
from common.report.workdir import read_metrics
from common.training import restore
from run_support import EPOCHS, STEPS_PER_EPOCH


def read_state(workdir):
    """The newest state in a workdir, by names."""
    state = restore.restore(workdir).state
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(workdir, other):
    """States bit for bit, the best one too, with multipliers, keys and counters; all logs."""
    for folder in ("", "best"):
        arrays, others = read_state(workdir / folder), read_state(other / folder)
        assert folder or arrays[".step"] == STEPS_PER_EPOCH * EPOCHS
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, others[name], err_msg=f"{folder} {name}")
    rows, other_rows = (
        [{**row, "images_per_second": None} for row in read_metrics(folder)]
        for folder in (workdir, other)
    )
    assert rows == other_rows
    before, after = (
        json.loads((folder / "summary.json").read_text()) | {"seconds": None, "bytes_file": None}
        for folder in (workdir, other)
    )
    assert before == after
