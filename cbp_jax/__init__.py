"""CBP quantization for JAX: binary, ternary and power-of-two weights by one link of an optax chain."""

from cbp_jax.constraints import (
    Constraint,
    binary,
    get_constraint,
    one_bit_shift,
    shift,
    ternary,
    two_bit_shift,
    uniform,
)
from cbp_jax.deploy.inference import make_predict
from cbp_jax.deploy.onnx_export import export_onnx
from cbp_jax.deploy.packed_file import load_packed, save_packed
from cbp_jax.deploy.packing import Packed, PackedError, PackedTensor, Rounding, pack, unpack
from cbp_jax.description import check_description, describe
from cbp_jax.masking import select
from cbp_jax.metrics import (
    LayerReport,
    Report,
    constraint_failure_score,
    layer_report,
    level_histogram,
)
from cbp_jax.recipe import CBPSGDState, cbp_sgd, keep_params_in_box
from cbp_jax.state import CBPState, quantize, refit_scales, window
from cbp_jax.transform import cbp

__version__ = "0.1.0"

__all__ = [
    "CBPSGDState",
    "CBPState",
    "Constraint",
    "LayerReport",
    "Packed",
    "PackedError",
    "PackedTensor",
    "Report",
    "Rounding",
    "binary",
    "cbp",
    "cbp_sgd",
    "check_description",
    "constraint_failure_score",
    "describe",
    "export_onnx",
    "get_constraint",
    "keep_params_in_box",
    "layer_report",
    "level_histogram",
    "load_packed",
    "make_predict",
    "one_bit_shift",
    "pack",
    "quantize",
    "refit_scales",
    "save_packed",
    "select",
    "shift",
    "ternary",
    "two_bit_shift",
    "uniform",
    "unpack",
    "window",
]
