"""Every public function with arguments that a program made up: the right thing, or a clear error.

What is refused is refused by this library itself, in an error of a documented type; what is
accepted gives no NaN.
"""

import pathlib
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up import NAN, W, with_kernel
from public_calls import CASES, OWN, train

import cbp_jax


@st.composite
def arguments_of(draw, case):
    if not case.made_up:
        return case.right
    some = st.lists(st.sampled_from(sorted(case.made_up)), min_size=1, max_size=2, unique=True)
    return case.right | {name: draw(case.made_up[name]) for name in draw(some)}


def floats(tree):
    """The floating-point arrays and numbers of a tree."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, float) or (
            isinstance(leaf, jax.Array | np.ndarray | np.generic)
            and jnp.issubdtype(leaf.dtype, jnp.floating)
        ):
            yield np.asarray(leaf, np.float64)


def raised_here(error):
    """Whether an error is this library's, or that of a link of optax or of a path in it."""
    paths = [pathlib.Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    ours = pathlib.Path(cbp_jax.__file__).parent in paths[-1].parents
    of_a_path = "pathlib" in (paths[-1].stem, paths[-1].parent.name)  # a package from 3.13 on
    return ours or of_a_path or any("optax" in p.parts for p in paths) or isinstance(error, OSError)


def check(case, arguments):
    error = None
    try:
        with warnings.catch_warnings(action="ignore"):
            result = case.call(**arguments)
    except (ValueError, TypeError, OSError) as found:
        error = found
    if error is not None:
        assert raised_here(error), error
        assert 0 < len(str(error)) < 3000
    elif all(np.all(np.isfinite(array)) for array in floats(arguments)):
        assert not any(np.any(np.isnan(array)) for array in floats(result))


@pytest.fixture(scope="module", autouse=True)
def _whole_tracebacks():
    """JAX leaves its own frames out of them, where an error might come from."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


def test_every_public_function_has_a_case():
    public = {name for name in cbp_jax.__all__ if callable(getattr(cbp_jax, name))}
    assert public <= CASES.keys()


FEW = settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("name", CASES)
@FEW
@given(st.data())
def test_what_is_made_up_is_refused_or_right(name, data):
    check(CASES[name], data.draw(arguments_of(CASES[name])))


@pytest.mark.long
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", CASES)
@settings(FEW, max_examples=5000, derandomize=False)
@given(st.data())
def test_each_of_five_thousand(name, x64, data):
    with jax.enable_x64(x64):
        check(CASES[name], data.draw(arguments_of(CASES[name])))


FOUND = [  # and the argument that the error names, or None if nothing is wrong
    ("cbp.update", {"state": optax.adam(0.1).init(W)}, "state of cbp is a CBPState, got tuple"),
    ("closing.update", {"state": OWN["cbp"]}, "state of closing is a ClosingState, got CBPState"),
    ("ste.update", {"state": None}, "state of ste is a STEState, got NoneType"),
    ("cbp_sgd.update", {"state": OWN["cbp"]}, "state of cbp_sgd is a CBPSGDState"),
    (
        "cbp.update",
        {"updates": with_kernel(jnp.ones((1, 2)))},
        r"has shape \(1, 2\)",
    ),
    ("closing.update", {"updates": with_kernel(jnp.ones((2, 2), int))}, "'layer/kernel' is int32"),
    ("cbp.update", {"updates": with_kernel("gradient")}, "'layer/kernel' is str"),
    ("cbp.update", {"params": with_kernel(jnp.ones((2, 2), int))}, "'layer/kernel' cannot be cons"),
    ("cbp.update", {"value": 1j}, "value must be the loss, a scalar; got 1j"),
    ("cbp.update", {"value": jnp.array(1j)}, "value must be the loss, a scalar; got complex64"),
    ("cbp.update", {"value": "low"}, "value must be the loss, a scalar; got 'low'"),
    ("cbp.update", {"value": 10**400}, None),
    ("cbp.init", {"params": with_kernel(jax.ShapeDtypeStruct((2, 2), "float32"))}, "ShapeDtypeStr"),
    ("cbp.init", {"params": with_kernel(jnp.ones((2, 2), jnp.float8_e4m3fn))}, "float8_e4m3fn"),
    ("ste.init", {"params": with_kernel(np.full((2, 2), 1e-40, np.float32))}, "smallest normal fl"),
    ("ste.init", {"params": with_kernel(jnp.zeros((2, 2)))}, "because all its weights are"),
    (
        "cbp",
        {"multiplier_optimizer": optax.adam},
        "multiplier_optimizer must be an opt",
    ),
    ("cbp", {"multiplier_learning_rate": float("inf")}, "multiplier_learning_rate must be a numb"),
    (
        "cbp",
        {"multiplier_learning_rate": lambda count: None},
        "rate, a schedule",
    ),
    ("cbp", {"window_growth": 3}, "window_growth must be a function"),
    ("cbp", {"window_growth": lambda g: "wide"}, "window_growth must return .* got 'wide'"),
    ("cbp", {"window_growth": lambda g: jnp.ones(3)}, r"window_growth must return .* \(3,\)"),
    ("cbp", {"multiplier_dtype": 3}, "multiplier_dtype must be a floating dtype"),
    ("cbp", {"multiplier_dtype": jnp.float8_e4m3fn}, "multiplier_dtype must be a floating dtype"),
    ("ste", {"scale_fn": 3}, "scale_fn must be a function"),
    ("ste", {"scale_fn": lambda w, axes: None}, "scale that scale_fn gave 'layer/kernel' must be"),
    ("ste", {"scale_fn": lambda w, axes: 1j}, "scale that scale_fn gave 'layer/kernel' must be"),
    ("ste", {"scale_fn": lambda w, axes: 3e38}, "levels of 'layer/kernel' overflow float32"),
    ("ste", {"scale_fn": lambda w, axes: 1e-40}, "below the smallest normal float32"),
    *(
        ("cbp_sgd", {name: value}, f"{name} must be")
        for name in ("learning_rate", "momentum", "weight_decay", "lr_decay")
        for value in (-1.0, NAN, "1", 1j, jnp.ones(2))
    ),
    ("cbp_sgd", {"lr_decay_window": NAN}, "lr_decay_window must be a number"),
    ("cbp_sgd", {"gradient_clip": 10**400}, None),
    ("cbp_sgd", {"decay_mask": 3}, "a mask holds bools"),
    ("keep_params_in_box", {"upper": "1"}, "the upper bound must be a number"),
    (
        "keep_params_in_box",
        {"updates": with_kernel(jnp.ones(2))},
        r"has shape \(2,\)",
    ),
    ("Constraint", {"levels": None}, "a sequence of numbers as levels, got None"),
    ("Constraint", {"levels": ["1", "2"]}, "a sequence of numbers as levels"),
    ("Constraint.quantize", {"scale": -1.0}, "scale must not be negative, NaN or beyond float32"),
    ("Constraint.quantize", {"scale": 1e300}, "scale must not be negative, NaN or beyond float32"),
    ("Constraint.quantize", {"scale": jnp.ones(3)}, r"scale has shape \(3,\)"),
    ("Constraint.violation", {"window": 0.5}, "window must be a number of at least 1"),
    ("Constraint.violation", {"w": "heavy"}, "weights must be an array of real numbers"),
    ("uniform", {"bits": []}, "uniform needs an integer number of bits"),
    ("uniform", {"bits": 3.0}, "uniform needs an integer number of bits"),
    ("select", {"include": b"layer"}, "is not a pattern"),
    ("select", {"include": jnp.array(3)}, "is not a pattern"),
    ("select", {"include": "a{99999999999999999999}"}, "is not a pattern"),
    ("check_description", {"description": None}, "is no description"),
    ("check_description", {"description": {"format": 1, "leaves": {"w": 3}}}, "is no description"),
    ("quantize", {"opt_state": OWN["cbp"]._replace(multipliers=None)}, "the state is incomplete"),
    ("quantize", {"opt_state": jax.eval_shape(lambda: OWN["cbp"])}, "the state's part for 'layer"),
    ("pack", {"params": {**W, "name": np.array("w")}}, "'name' cannot be packed"),
    ("unpack", {"dtype": object()}, "dtype must be floating"),
    ("Packed", {"tensors": {"w": np.array("w")}}, "'w' is <U1"),
    ("Packed", {"tensors": None}, "Packed holds a dictionary"),
    ("PackedTensor", {"constraint": None}, "packed tensor 'w': its constraint is None"),
    ("PackedTensor", {"codes": np.zeros(9, np.uint8)}, "packed tensor 'w': number of bytes"),
    ("make_predict", {"packed": {}, "weights": "packed"}, "make_predict takes the result of pack"),
    ("make_predict", {"model_fn": None}, "model_fn must be a function"),
    ("export_onnx", {"example_input": jnp.full((1, 2), NAN)}, "outputs for example_input are NaN"),
    ("export_onnx", {"weight_type": []}, "no weight type"),
    ("export_gguf", {"names": None}, "names is a mapping, or a function"),
    ("export_gguf", {"names": lambda path: 3}, "names gives 'layer/bias' 3, which is not a str"),
    ("export_gguf", {"metadata": ["llama"]}, "metadata is a mapping"),
    ("export_gguf", {"weight_type": ["F16"]}, "weight_type is a mapping, or a function"),
    ("float16_scale", {"w": jnp.zeros((0, 2))}, r"weights of shape \(0, 2\) have no scale"),
    ("float16_scale", {"w": jnp.array(1j)}, "weights must be real"),
]


@pytest.mark.parametrize(("name", "changed", "message"), FOUND)
def test_what_was_found(name, changed, message):
    case = CASES[name]
    check(case, case.right | changed)
    if message is None:
        case.call(**(case.right | changed))
    else:
        with pytest.raises((ValueError, TypeError), match=message):
            case.call(**(case.right | changed))


@pytest.mark.parametrize("x64", [False, True])
def test_numbers_may_be_traced(x64):
    numbers = {
        "learning_rate": 0.1, "multiplier_learning_rate": 1e-3, "steps_per_epoch": 2, "patience": 1,
        "initial_window": 2.0, "momentum": 0.9, "weight_decay": 1e-4, "gradient_clip": 1.0,
        "weight_bound": 1.0, "lr_decay": 0.1, "lr_decay_window": 20.0,
    }  # fmt: skip
    with jax.enable_x64(x64):
        traced = jax.jit(lambda numbers: train(cbp_jax.cbp_sgd(constraint="binary", **numbers)))
        updates, _ = traced(numbers)
        expected, _ = train(cbp_jax.cbp_sgd(constraint="binary", **numbers))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)
