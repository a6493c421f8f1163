"""CBP quantization for JAX: binary, ternary and power-of-two weights through one optax link."""

from cbp_jax.constraints import Constraint
from cbp_jax.course import closing
from cbp_jax.deploy.gguf_export import export_gguf
from cbp_jax.deploy.inference import make_predict
from cbp_jax.deploy.onnx_export import export_onnx
from cbp_jax.deploy.packed import Packed, PackedError, PackedTensor
from cbp_jax.deploy.packed_file import load_packed, save_packed
from cbp_jax.deploy.packing import pack, unpack
from cbp_jax.description import check_description, describe
from cbp_jax.level_sets import (
    CONSTRAINTS,
    binary,
    get_constraint,
    one_bit_shift,
    shift,
    ternary,
    two_bit_shift,
    uniform,
)
from cbp_jax.masking import select
from cbp_jax.metrics import (
    constraint_failure_score,
    layer_report,
    level_histogram,
    relative_weights,
)
from cbp_jax.recipe import cbp_sgd, keep_params_in_box
from cbp_jax.scales import float16_scale
from cbp_jax.state import CBPState, ClosingState, STEState, quantize, refit_scales, window
from cbp_jax.straight_through import ste
from cbp_jax.transform import cbp

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022
    # Constraints: the levels that weights may take
    "CONSTRAINTS",
    "Constraint",
    "binary",
    "get_constraint",
    "one_bit_shift",
    "shift",
    "ternary",
    "two_bit_shift",
    "uniform",
    # The link, the paper's recipe around it, CBP by the number of steps, and the straight-through
    # estimator alone
    "cbp",
    "cbp_sgd",
    "closing",
    "keep_params_in_box",
    "ste",
    # Forward weights, and the optimizer state they depend on
    "CBPState",
    "ClosingState",
    "STEState",
    "check_description",
    "describe",
    "quantize",
    "refit_scales",
    "window",
    # Metrics: how far the weights are from their levels
    "constraint_failure_score",
    "layer_report",
    "level_histogram",
    "relative_weights",
    # Masks: which leaves are constrained
    "select",
    # Deployment: packed weights, their file, inference, ONNX and GGUF
    "Packed",
    "PackedError",
    "PackedTensor",
    "export_gguf",
    "export_onnx",
    "float16_scale",
    "load_packed",
    "make_predict",
    "pack",
    "save_packed",
    "unpack",
]
