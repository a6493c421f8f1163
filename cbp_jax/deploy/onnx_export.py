"""Exports a network to ONNX, with its constrained weights as packed integers."""

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax.arguments import as_real_array, shown
from cbp_jax.deploy.files import replacing
from cbp_jax.deploy.onnx_fusion import make_fusible, unfused, unpack_when_loaded
from cbp_jax.deploy.onnx_weights import FLOAT, INTEGERS, graph_weight, put_weights, remove_unused
from cbp_jax.masking import Path, PyTree, flatten_with_paths, path_string
from cbp_jax.state import constrained_leaves, quantize

if TYPE_CHECKING:  # an optional dependency, and slow to load
    import onnx

# For each type the oldest version of the operators, and of the file format, that supports it.
_OPSETS = {FLOAT: (21, 10), "int4": (21, 10), "int2": (25, 13)}
# Correct float32 computations differ by less than this share of the largest output.
_TOLERANCE = 1e-4
# The prefix of ONNX Runtime's options for storing an optimized model's weights in a second file.
_EXTERNAL = "session.optimized_model_external_initializers"

# Parameters by path, inputs -> outputs.
Forward = Callable[[dict[Path, Any], Sequence[Any]], list[jax.Array]]


def export_onnx(
    model: Any,
    params: PyTree,
    opt_state: optax.OptState,
    example_input: Any,
    path: str | os.PathLike[str],
    weight_type: str = "int4",
) -> float:
    """Exports the network, with its constrained weights on their levels, as an ONNX file.

    A constrained weight is `integer * scale`: packed 4-bit or 2-bit integers, named by the path of
    the parameter, and a float32 scale, or one per channel, with ":scale" appended to the name. The
    matrix of a product has one scale per column, and is stored once per product that uses it. Other
    parameters are float32. The weights of convolutions have ONNX's order of axes. Inputs are called
    "input" and outputs "output" ("input_0", "input_1" ... if there are several); the leading axis
    of the inputs may have any size.

    ONNX Runtime multiplies matrices with packed integers and unpacks other weights when it loads
    the file. What follows a product is written so that this works (`onnx_fusion.py`); where it does
    not, a warning names the layer, and its weights are unpacked on loading too. By default ONNX
    Runtime also rounds the activations of such a product to 8 bits, a relative error of about 5e-3;
    the session option "session.qdq_matmulnbits_accuracy_level" = "1" keeps them in float32.

    The file is written only if ONNX Runtime, in float32, computes the same outputs as JAX.

    Args:
      model: a function `model(params, inputs) -> outputs`, or a Flax NNX module, which is run in
        evaluation mode and not changed. Several inputs are several arguments; outputs may be any
        tree of arrays, in the order of `jax.tree.leaves`.
      params: the latent weights, float32, which are put on their levels as by `quantize`; for a
        module, all its `nnx.Param`s, as a state or as a pure dictionary.
      opt_state: any optimizer state with one or more links' states in it.
      example_input: an array, or a tuple of them, with a leading batch axis. Give a few real
        inputs, since the outputs are compared on them.
      path: the file to write.
      weight_type: "int4"; "int2", which holds binary and ternary levels and needs ONNX Runtime
        1.32; or "float".

    Returns:
      The largest difference from JAX's outputs, relative to the largest absolute value of the
      output.

    Raises:
      ImportError: if jax2onnx, onnx or onnxruntime is not installed.
      ValueError: as `quantize` does; if the levels of a layer do not fit the type, or a constrained
        weight is not float32; if the outputs for `example_input` are NaN or infinite; if the file
        would not compute what JAX does. An existing file is then unchanged.
      TypeError: as `quantize` does; or if the model cannot be called, or inputs are not real.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.75, 0.25], [0.5, 0.5]])}
      >>> state = cbp_jax.cbp(constraint="binary").init(params)
      >>> model = lambda params, x: x @ params["kernel"]
      >>> x = jnp.ones((1, 2))
      >>> cbp_jax.export_onnx(model, params, state, x, "model.onnx") < 1e-5  # doctest: +SKIP
      True

    Reference: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
    """
    to_onnx = _import_to_onnx()
    if not callable(model):
        raise TypeError(f"model must be a function or a module, got {shown(model)}")
    if not isinstance(weight_type, str) or weight_type not in _OPSETS:
        raise ValueError(
            f"no weight type {shown(weight_type)}: "
            f"give {', '.join(map(repr, INTEGERS))} or {FLOAT!r}"
        )
    inputs = _check_inputs(example_input)
    leaves = dict(flatten_with_paths(params))
    forward = _as_function_of_paths(model, params)
    constrained = constrained_leaves(params, opt_state)
    weights = {f"weight:{i}": graph_weight(leaf, weight_type) for i, leaf in enumerate(constrained)}

    # A second batch size, to check that any size works.
    batches = [inputs, [x[:1] if len(x) > 1 else jnp.concatenate([x, x]) for x in inputs]]
    on_levels = dict(flatten_with_paths(quantize(params, opt_state)))
    with jax.default_matmul_precision("highest"):  # accelerators default to a lower one
        expected = [jax.jit(forward)(on_levels, batch) for batch in batches]
    _check_comparable(expected)

    def traced(*arrays: jax.Array) -> Any:
        given = dict(zip((leaf.path for leaf in constrained), arrays[len(inputs) :], strict=True))
        outputs = forward({**leaves, **given}, arrays[: len(inputs)])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    opset, ir_version = _OPSETS[weight_type]
    input_names = _numbered_names("input", len(inputs))
    shapes = [jax.ShapeDtypeStruct(("batch", *x.shape[1:]), x.dtype) for x in inputs]
    shapes += [jax.ShapeDtypeStruct(jnp.shape(w), w.dtype) for _, w, *_ in constrained]
    try:
        converted: onnx.ModelProto = to_onnx(
            traced,
            inputs=shapes,
            input_names=[*input_names, *weights],
            output_names=_numbered_names("output", len(expected[0])),
            opset=opset,
        )
    except Exception as error:
        error.add_note("jax2onnx could not convert the model for export_onnx.")
        raise
    converted.ir_version = ir_version
    put_weights(converted, weights)
    make_fusible(converted.graph)
    remove_unused(converted.graph)
    named = [dict(zip(input_names, batch, strict=True)) for batch in batches]
    difference, slow = _compare_with_runtime(
        converted, named, expected, [weight.name for weight in weights.values()]
    )
    if slow:
        unpack_when_loaded(converted.graph, slow)
        difference, _ = _compare_with_runtime(converted, named, expected, slow)
        warnings.warn(
            f"ONNX Runtime does not multiply by the packed integers of "
            f"{', '.join(map(repr, slow))}: it would unpack them at every call, slower than "
            "float32, so the file makes it unpack them when it loads them. These layers are as "
            "fast, and as large in memory, as in float32. Known causes: a factor of 1, a "
            "transposed input, few columns",
            stacklevel=2,
        )
    with replacing(FilePath(path)) as new:
        new.write_bytes(converted.SerializeToString())
    return difference


def _import_to_onnx() -> Callable[..., Any]:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        from jax2onnx import to_onnx
    except ImportError as error:
        raise ImportError(
            'export_onnx needs jax2onnx, onnx and onnxruntime: pip install "cbp_jax[onnx]"'
        ) from error
    return to_onnx


def _check_inputs(example_input: Any) -> list[jax.Array]:
    given = example_input if isinstance(example_input, tuple) else (example_input,)
    inputs = [as_real_array("example_input", x) for x in given]
    sizes = [x.shape[:1] for x in inputs]
    if not inputs or len(set(sizes)) > 1 or sizes[0] in ((), (0,)):
        raise ValueError(
            "example_input needs a leading batch axis, not empty and of the same size for all its "
            f"arrays; got shapes {[x.shape for x in inputs]}"
        )
    return inputs


def _check_comparable(expected: Sequence[Sequence[jax.Array]]) -> None:
    """Raises ValueError if outputs would agree with anything."""
    for output in (np.asarray(output) for batch in expected for output in batch):
        if np.any(output != output) or not np.any(np.isfinite(output)):
            raise ValueError(
                "the model's outputs for example_input are NaN or all infinite, which no file can "
                "be compared with: give real inputs, and check the weights"
            )


def _as_function_of_paths(model: Any, params: PyTree) -> Forward:
    """Returns the model as a function of parameters by path and inputs, with a list of outputs."""
    nnx = sys.modules.get("flax.nnx")  # if it is not imported, the model is not a module
    if nnx is not None and isinstance(model, nnx.Module):
        copy = nnx.clone(model)
        copy.eval()
        graphdef, template, rest = nnx.split(copy, nnx.Param, ...)

        def apply(tree: PyTree, *inputs: Any) -> Any:
            return nnx.merge(graphdef, tree, rest)(*inputs)

        _check_same_paths(template, params)
    else:
        template, apply = params, model
    paths = [path for path, _ in flatten_with_paths(template)]
    structure = jax.tree.structure(template)

    def forward(leaves: dict[Path, Any], inputs: Sequence[Any]) -> list[jax.Array]:
        tree = jax.tree.unflatten(structure, [leaves[path] for path in paths])
        return jax.tree.leaves(apply(tree, *inputs))

    return forward


def _check_same_paths(template: PyTree, params: PyTree) -> None:
    """Raises ValueError if the parameters are not those of the module."""
    shapes, given = (
        {path: jnp.shape(leaf) for path, leaf in flatten_with_paths(tree)}
        for tree in (template, params)
    )
    wrong = [
        path_string(path) for path in {**shapes, **given} if shapes.get(path) != given.get(path)
    ]
    if wrong:
        raise ValueError(
            f"the parameters are not those of the module: {', '.join(wrong[:5])} are missing, "
            "unknown, or of another shape. Give the trained nnx.state(model, nnx.Param), or its "
            "pure dictionary."
        )


def _numbered_names(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}_{i}" for i in range(count)]


def _compare_with_runtime(
    model: "onnx.ModelProto",
    batches: Sequence[dict[str, Any]],
    expected: Sequence[Sequence[jax.Array]],
    weights: Sequence[str],
) -> tuple[float, list[str]]:
    """Runs the model in ONNX Runtime and compares its outputs.

    Returns:
      The largest relative difference, and the weights that are unpacked at every call.

    Raises:
      ValueError: if the difference is too large, or the model does not run.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3  # no warning that the optimized model is for this machine only
    try:
        onnx.checker.check_model(model, full_check=True)
        with tempfile.TemporaryDirectory() as folder:
            optimized = FilePath(folder) / "optimized.onnx"
            options.optimized_model_filepath = str(optimized)
            # A second file, since unpacked weights may exceed the limit of 2 GB.
            options.add_session_config_entry(f"{_EXTERNAL}_file_name", "weights")
            options.add_session_config_entry(f"{_EXTERNAL}_min_size_in_bytes", "1024")
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            slow = unfused(optimized, weights)
        outputs = [
            session.run(None, {name: np.asarray(x) for name, x in batch.items()})
            for batch in batches
        ]
    except Exception as error:  # each library has its own errors
        raise ValueError(
            "jax2onnx converted the model to one that ONNX Runtime "
            f"{onnxruntime.__version__} does not run: {error}"
        ) from error
    difference = max(
        _relative_difference(got, np.asarray(wanted))
        for batch, expected_batch in zip(outputs, expected, strict=True)
        for got, wanted in zip(batch, expected_batch, strict=True)
    )
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"the outputs of the ONNX model differ from JAX's by {difference:.2g} of the largest, "
            f"more than {_TOLERANCE:g}: jax2onnx converts some operation wrongly. A known case is "
            "flax's max_pool, whose padding it drops: pad with jnp.pad and pool with "
            'padding="VALID". Nothing was written.'
        )
    return difference, slow


def _relative_difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, relative to the largest finite value.

    It is infinite if shapes or non-finite values differ.
    """
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    finite = np.isfinite(wanted)
    if got.shape != wanted.shape or not np.array_equal(
        got[~finite], wanted[~finite], equal_nan=True
    ):
        return float("inf")
    largest = np.max(np.abs(wanted[finite]), initial=0)
    difference = np.max(np.abs(got[finite] - wanted[finite]), initial=0)
    return float(difference / largest) if largest else float(difference)
