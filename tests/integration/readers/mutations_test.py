"""Edits of JSON, on which the files of most readers rest."""

import numpy as np
from faults import mutations

VALUE = {"name": "a", "shape": [2, 3], "rest": {"scale": 0.5}}


def edited():
    return [repr(mutations.edit_json(VALUE, np.random.default_rng(seed))) for seed in range(2000)]


def test_an_edit_depends_on_its_seed_alone():
    """What it puts in place is edited next, and must be nobody else's."""
    assert edited() == edited()
    assert VALUE == {"name": "a", "shape": [2, 3], "rest": {"scale": 0.5}}


def depth(value):
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(depth, parts), default=0)


def test_values_that_are_deep_grow_no_deeper():
    """Or they would take all frames of those who write and read them."""
    deepest = max(
        depth(mutations.edit_json(VALUE, np.random.default_rng(seed))) for seed in range(2000)
    )
    assert mutations._DEEP < deepest < mutations._DEEP + 5 * mutations._WITHIN
