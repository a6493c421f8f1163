"""Imports point one way: from the later rooms of the house to the earlier ones."""

import ast

import pytest
from pages import ROOT

COMMON = ("config", "input", "models", "report", "training", "study", "comparison", "launch")
LIBRARY = (
    "arguments", "step_function", "constraints", "level_sets", "masking", "rules", "scales",
    "state", "updates", "straight_through", "lagrangian", "transform", "course", "recipe",
    "metrics", "description", "deploy",
)  # fmt: skip
DEPLOY = (
    "bits", "packed", "packing", "files", "packed_file", "inference", "onnx_weights", "onnx_fusion",
    "onnx_export", "gguf_blocks", "gguf_metadata", "gguf_tensors", "gguf_export",
)  # fmt: skip


def imports_of(path):
    """The dotted names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    ("folder", "package", "order"),
    [
        ("experiments/common", "common", COMMON),
        ("cbp_jax", "cbp_jax", LIBRARY),
        ("cbp_jax/deploy", "cbp_jax.deploy", DEPLOY),
    ],
)
def test_imports_point_one_way(folder, package, order):
    for path in sorted((ROOT / folder).rglob("*.py")):
        room = path.relative_to(ROOT / folder).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imports_of(path):
            target = name.removeprefix(f"{package}.").split(".")[0]
            if name.startswith(f"{package}.") and target in order:
                assert order.index(target) <= order.index(room), f"{path} imports {name}"


def test_every_room_has_its_place():
    for folder, order in (("experiments/common", COMMON), ("cbp_jax", LIBRARY)):
        found = {path.name.removesuffix(".py") for path in (ROOT / folder).iterdir()}
        found -= {"__init__", "__pycache__", "typed", "py.typed"}
        assert found == set(order)
