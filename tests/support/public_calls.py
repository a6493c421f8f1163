"""For every public function what it is called with, and the strategies to make that up."""

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from hypothesis import strategies as st
from made_up import (
    ARRAYS,
    AXES,
    DTYPES,
    FUNCTIONS,
    LEAVES,
    MASKS,
    NUMBERS,
    OPTIMIZERS,
    PATTERNS,
    RULES,
    SPECS,
    TEXT,
    THINGS,
    TREES,
    W,
)  # fmt: skip

import cbp_jax
from cbp_jax.deploy import gguf_export, onnx_export

GRADS = jax.tree.map(lambda w: 0.1 * w, W)
X = jnp.ones((1, 2))
LINKS = {
    "cbp": cbp_jax.cbp("binary"),
    "cbp_sgd": cbp_jax.cbp_sgd(0.1, "binary"),
    "closing": cbp_jax.closing(optax.sgd(0.1), "binary", 10),
    "ste": cbp_jax.ste("binary"),
}
OWN = {name: link.init(W) for name, link in LINKS.items()}
PACKED = cbp_jax.pack(W, OWN["ste"], round=True)
KERNEL = PACKED.tensors["layer/kernel"]


class Case(NamedTuple):
    call: Callable[..., Any]
    right: dict[str, Any]  # arguments, of which one or two are replaced
    made_up: dict[str, st.SearchStrategy[Any]]


def train(link):
    """What a link does with parameters that are as they should be."""
    state = link.init(W)
    updates, state = link.update(GRADS, state, W, value=1.0)
    return link.update(updates, state, W, value=2.0)


def use(constraint):
    """What a constraint does with weights that are as they should be."""
    w = jnp.array([0.25, -0.5])
    functions = (constraint.quantize, constraint.violation, constraint.violation_grad)
    return [function(w, 0.5) for function in functions]


def predict(**arguments):
    return cbp_jax.make_predict(**arguments)(X)


def forward(params, x):
    return x @ params["layer"]["kernel"].astype(x.dtype) + params["layer"]["bias"]


class ConvertedError(Exception):
    """All arguments were accepted."""


def export(**arguments):
    def to_onnx(*_, **__):
        raise ConvertedError

    original, onnx_export._import_to_onnx = onnx_export._import_to_onnx, lambda: to_onnx
    try:
        cbp_jax.export_onnx(**arguments)
    except ConvertedError:
        pass
    finally:
        onnx_export._import_to_onnx = original


def plan_gguf(**arguments):
    """All that needs no gguf: the checks."""

    class Gguf:
        def __getattr__(self, name):
            raise ConvertedError

    original, gguf_export._import_gguf = gguf_export._import_gguf, Gguf
    try:
        with tempfile.TemporaryDirectory() as folder:
            cbp_jax.export_gguf(f"{folder}/model.gguf", **arguments)
    except ConvertedError:
        pass
    finally:
        gguf_export._import_gguf = original


def in_folder(function):
    """The function with a folder for its path."""

    def call(path, **arguments):
        if isinstance(path, str):
            path = f"/nowhere/{path}"
        return function(path=path, **arguments)

    return call


@st.composite
def states(draw):
    """States of links and of other optimizers, whole, in part, or of other parameters."""
    kind = draw(st.sampled_from(["own", "part", "shapes", "other", "thing"]))
    own = draw(st.sampled_from([OWN["cbp"], OWN["closing"], OWN["ste"]]))
    if kind == "part":
        fields = [
            name for name in ("constraints", "weight_scale", "multipliers") if name in own._fields
        ]
        return own._replace(**{draw(st.sampled_from(fields)): draw(TREES)})
    if kind == "shapes":
        return jax.eval_shape(lambda: own)
    if kind == "other":
        params = draw(st.sampled_from([W, {"kernel": jnp.ones((2, 2))}]))
        return draw(st.sampled_from([optax.adam(0.1), LINKS["cbp"], LINKS["cbp_sgd"]])).init(params)
    return own if kind == "own" else draw(THINGS)


LINK = {"constraint": SPECS, "mask": MASKS, "scale_axis": AXES, "scale_fn": FUNCTIONS}
EPOCHS = {
    "steps_per_epoch": NUMBERS,
    "patience": NUMBERS,
    "multiplier_learning_rate": st.one_of(NUMBERS, FUNCTIONS),
    "multiplier_optimizer": OPTIMIZERS,
    "initial_window": NUMBERS,
    "window_growth": FUNCTIONS,
    "multiplier_dtype": DTYPES,
}
RECIPE = {
    "learning_rate": st.one_of(NUMBERS, FUNCTIONS),
    "decay_mask": MASKS,
    **dict.fromkeys(("momentum", "weight_decay", "gradient_clip"), NUMBERS),
    **dict.fromkeys(("weight_bound", "lr_decay", "lr_decay_window"), NUMBERS),
}
COURSE = {"inner": OPTIMIZERS, "total_steps": NUMBERS, "closes_at": NUMBERS, "strength": NUMBERS}
READ = ({"params": W, "opt_state": OWN["cbp"]}, {"params": TREES, "opt_state": states()})
TENSOR = {
    name: getattr(KERNEL, name) for name in ("codes", "scale", "constraint", "shape", "dtype")
}
CASES = {
    "Constraint": Case(
        lambda **arguments: use(cbp_jax.Constraint(**arguments)),
        {"name": "own", "levels": (-1.0, 1.0)},
        {
            "name": st.one_of(TEXT, THINGS),
            "levels": st.one_of(st.lists(NUMBERS, max_size=4), THINGS),
        },
    ),
    **{
        name: Case(lambda name=name: use(getattr(cbp_jax, name)()), {}, {})
        for name in ("binary", "ternary", "one_bit_shift", "two_bit_shift")
    },
    "shift": Case(lambda depth: use(cbp_jax.shift(depth)), {"depth": 1}, {"depth": NUMBERS}),
    "uniform": Case(lambda bits: use(cbp_jax.uniform(bits)), {"bits": 3}, {"bits": NUMBERS}),
    "get_constraint": Case(
        lambda name: use(cbp_jax.get_constraint(name)), {"name": "binary"}, {"name": RULES}
    ),
    **{
        f"Constraint.{method}": Case(
            getattr(cbp_jax.ternary(), method),
            {"w": W["layer"]["kernel"], "scale": 0.5},
            {"w": LEAVES, "scale": LEAVES, **more},
        )
        for method, more in {
            "quantize": {}, "level_index": {},
            "violation": {"window": NUMBERS}, "violation_grad": {"window": NUMBERS},
        }.items()
    },
    "cbp": Case(
        lambda **arguments: train(cbp_jax.cbp(**arguments)), {"constraint": "binary"}, LINK | EPOCHS
    ),
    "cbp_sgd": Case(
        lambda **arguments: train(cbp_jax.cbp_sgd(**arguments)),
        {"learning_rate": 0.1, "constraint": "binary"},
        LINK | EPOCHS | RECIPE,
    ),
    "closing": Case(
        lambda **arguments: train(cbp_jax.closing(**arguments)),
        {"inner": optax.sgd(0.1), "constraint": "binary", "total_steps": 9},
        LINK | COURSE,
    ),
    "ste": Case(
        lambda **arguments: train(cbp_jax.ste(**arguments)), {"constraint": "binary"}, LINK
    ),
    **{
        f"{name}.init": Case(link.init, {"params": W}, {"params": TREES})
        for name, link in LINKS.items()
    },
    **{
        f"{name}.update": Case(
            link.update,
            {"updates": GRADS, "state": OWN[name], "params": W, "value": 1.0},
            {"updates": TREES, "state": states(), "params": TREES, "value": LEAVES},
        )
        for name, link in LINKS.items()
    },
    "keep_params_in_box": Case(
        lambda updates, params, **box: cbp_jax.keep_params_in_box(**box).update(
            updates, optax.EmptyState(), params
        ),
        {"lower": -1.0, "upper": 1.0, "mask": None, "updates": GRADS, "params": W},
        {"lower": NUMBERS, "upper": NUMBERS, "mask": MASKS, "updates": TREES, "params": TREES},
    ),
    **{
        name: Case(
            lambda own=own, **fields: cbp_jax.quantize(W, own._replace(**fields)),
            {},
            dict.fromkeys(own._fields, LEAVES),
        )
        for name, own in (
            ("CBPState", OWN["cbp"]), ("ClosingState", OWN["closing"]), ("STEState", OWN["ste"])
        )
    },
    "describe": Case(cbp_jax.describe, {}, {"opt_state": states()}),
    "check_description": Case(
        cbp_jax.check_description,
        {"opt_state": OWN["cbp"], "description": cbp_jax.describe(OWN["cbp"])},
        {
            "opt_state": states(),
            "description": st.one_of(
                THINGS,
                st.fixed_dictionaries({"format": st.one_of(st.just(1), THINGS), "leaves": THINGS}),
                st.builds(
                    lambda leaf: {"format": 1, "leaves": {"layer/kernel": leaf}},
                    st.one_of(THINGS, st.fixed_dictionaries({"levels": LEAVES, "shape": LEAVES})),
                ),
            ),
        },
    ),
    "window": Case(cbp_jax.window, {}, {"opt_state": states()}),
    **{
        name: Case(getattr(cbp_jax, name), *READ)
        for name in (
            "quantize", "constraint_failure_score", "layer_report", "level_histogram",
            "relative_weights",
        )
    },
    "refit_scales": Case(cbp_jax.refit_scales, READ[0], READ[1] | {"scale_fn": FUNCTIONS}),
    "select": Case(
        lambda **patterns: cbp_jax.select(**patterns)(W),
        {"include": None, "exclude": None},
        {"include": PATTERNS, "exclude": PATTERNS},
    ),
    "pack": Case(cbp_jax.pack, READ[0] | {"round": True}, READ[1] | {"round": st.booleans()}),
    "unpack": Case(
        cbp_jax.unpack,
        {"packed": PACKED, "template": W},
        {"packed": THINGS, "template": TREES, "dtype": DTYPES},
    ),
    "Packed": Case(
        lambda tensors: cbp_jax.unpack(cbp_jax.Packed(tensors)),
        {},
        {
            "tensors": st.one_of(
                THINGS, st.dictionaries(st.one_of(TEXT, st.integers()), LEAVES, max_size=3)
            )
        },
    ),
    "PackedTensor": Case(
        lambda **parts: cbp_jax.unpack(cbp_jax.Packed({"w": cbp_jax.PackedTensor(**parts)})),
        TENSOR,
        {
            "codes": ARRAYS, "scale": LEAVES, "constraint": RULES, "dtype": DTYPES,
            "shape": st.one_of(st.lists(NUMBERS, max_size=3).map(tuple), THINGS),
        },
    ),
    "PackedError": Case(cbp_jax.PackedError, {}, {}),
    "save_packed": Case(
        in_folder(cbp_jax.save_packed),
        {"path": "file", "packed": PACKED},
        {"path": st.one_of(TEXT, THINGS), "packed": THINGS},
    ),
    "load_packed": Case(in_folder(cbp_jax.load_packed), {}, {"path": st.one_of(TEXT, THINGS)}),
    "make_predict": Case(
        predict,
        {"model_fn": forward, "packed": PACKED, "template": W},
        {
            "model_fn": FUNCTIONS, "packed": THINGS, "template": TREES, "dtype": DTYPES,
            "weights": st.one_of(st.sampled_from(["expand", "packed"]), THINGS),
        },
    ),
    "export_onnx": Case(
        export,
        {
            "model": forward, "params": W, "opt_state": OWN["ste"], "example_input": X,
            "path": "/nowhere/file", "weight_type": "int4",
        },
        {
            "model": THINGS, "params": TREES, "opt_state": states(), "example_input": LEAVES,
            "weight_type": st.one_of(st.sampled_from(["int4", "int2", "float"]), TEXT, THINGS),
        },
    ),
    "export_gguf": Case(
        plan_gguf,
        {
            "params": W, "opt_state": OWN["ste"],
            "names": {"layer/kernel": "a", "layer/bias": "b"},
            "metadata": {"general.architecture": "llama"}, "weight_type": "F16",
            "other_type": "F32", "transpose": None,
        },
        {
            "params": TREES, "opt_state": states(), "transpose": PATTERNS,
            "names": st.one_of(
                FUNCTIONS, st.builds(lambda name: lambda path: name + path, TEXT),
                st.dictionaries(st.sampled_from(["layer/kernel", "layer/bias", "x"]), TEXT),
            ),
            "metadata": st.one_of(
                st.dictionaries(TEXT, THINGS), THINGS,
                st.builds(
                    lambda key, value: {"general.architecture": "llama", key: value},
                    TEXT, st.one_of(NUMBERS, TEXT, st.lists(st.one_of(NUMBERS, TEXT), max_size=2)),
                ),
            ),
            "weight_type": st.one_of(
                st.sampled_from(["Q1_0", "TQ2_0", "TQ1_0", "Q4_0", "F32"]), TEXT, FUNCTIONS,
                st.dictionaries(st.sampled_from(["layer/kernel", "layer/bias"]), TEXT),
            ),
            "other_type": st.one_of(st.sampled_from(["F16", "Q8_0"]), TEXT, THINGS),
        },
    ),
    "float16_scale": Case(
        cbp_jax.float16_scale,
        {"w": W["layer"]["kernel"], "kept_axes": (1,)},
        {"w": LEAVES, "kept_axes": AXES},
    ),
}  # fmt: skip
