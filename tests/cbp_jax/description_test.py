"""Descriptions of states: Orbax alone restores any state as any other of the same shapes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import cbp_jax

PARAMS = {
    "first": {"kernel": jax.random.normal(jax.random.key(0), (6, 8)), "bias": jnp.zeros(8)},
    "head": {"kernel": jax.random.normal(jax.random.key(1), (8, 4)), "bias": jnp.zeros(4)},
}


def state_of(constraint="binary", **arguments):
    link = cbp_jax.cbp(constraint, **arguments)
    return optax.chain(link, optax.sgd(1e-3, momentum=0.9)).init(PARAMS)


MIXED = {"first/.*": "binary", ".*": "ternary"}


def test_describes_constraints_and_shapes():
    description = cbp_jax.describe(state_of(MIXED, scale_axis=-1))
    assert description["leaves"] == {
        "first/kernel": {
            "shape": [6, 8],
            "constraint": "binary",
            "levels": [-1.0, 1.0],
            "scale_shape": [1, 8],
        },
        "head/kernel": {
            "shape": [8, 4],
            "constraint": "ternary",
            "levels": [-1.0, 0.0, 1.0],
            "scale_shape": [1, 4],
        },
    }
    shapes = jax.eval_shape(lambda: state_of(MIXED, scale_axis=-1))
    assert cbp_jax.describe(shapes) == description


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"constraint": "ternary"},
            "first/kernel: constraint saved 'binary', here 'ternary'; levels",
        ),
        (
            {"constraint": cbp_jax.Constraint("binary", (-2, 2))},
            r"first/kernel: levels saved \[-1.0, 1.0\], here \[-2.0, 2.0\]",
        ),
        (
            {"mask": cbp_jax.select(exclude="head/.*")},
            "head/kernel: saved binary, here unconstrained",
        ),
        ({"constraint": MIXED}, "head/kernel: constraint saved 'binary', here 'ternary'"),
        ({"scale_axis": -1}, r"scale_shape saved \[\], here \[1, 8\]"),
    ],
)
def test_differences_are_listed(arguments, message):
    saved = json.loads(json.dumps(cbp_jax.describe(state_of())))
    cbp_jax.check_description(state_of(), saved)
    with pytest.raises(ValueError, match=message) as error:
        cbp_jax.check_description(state_of(**arguments), saved)
    assert "make the optimizer with the constraint, mask and scale_axis" in str(error.value)


@pytest.mark.parametrize("wrong", [{}, {"format": 2, "leaves": {}}, {"format": 1, "leaves": []}])
def test_refuses_other_dictionaries(wrong):
    with pytest.raises(ValueError, match="this is no description"):
        cbp_jax.check_description(state_of(), wrong)


def test_ten_differences_are_shown():
    params = {f"layer{i:02}": {"kernel": PARAMS["head"]["kernel"]} for i in range(14)}
    saved = cbp_jax.describe(cbp_jax.cbp("binary").init(params))
    with pytest.raises(ValueError, match="  and 4 more"):
        cbp_jax.check_description(cbp_jax.cbp("ternary").init(params), saved)


def test_with_orbax(tmp_path):
    """As a user saves a run: the state and its description in one checkpoint."""
    state = state_of("binary")
    with ocp.CheckpointManager(tmp_path) as manager:
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            description=ocp.args.JsonSave(cbp_jax.describe(state)),
        )
        manager.save(0, args=arguments)
        manager.wait_until_finished()
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(state_of("ternary")),
            description=ocp.args.JsonRestore(),
        )
        restored = manager.restore(0, args=arguments)
    # Orbax reports nothing: a binary state has become a ternary one.
    assert isinstance(restored.state[0], cbp_jax.CBPState)
    assert restored.state[0].constraints["head"]["kernel"] == cbp_jax.ternary()
    scales = (s[0].weight_scale["head"]["kernel"] for s in (restored.state, state))
    np.testing.assert_array_equal(*scales)
    with pytest.raises(ValueError, match="constraint saved 'binary', here 'ternary'"):
        cbp_jax.check_description(restored.state, restored.description)
    cbp_jax.check_description(state, restored.description)
