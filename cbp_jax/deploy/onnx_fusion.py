"""Rewrites a graph so that ONNX Runtime fuses matrix products with packed integers.

ONNX Runtime replaces a DequantizeLinear and the product after it by one MatMulNBits. If that fails,
DequantizeLinear runs at every call, which is several times slower than float32. ONNX Runtime 1.32
does not fuse if

- only a Relu or a Clip follows the product: here Max and Min compute the same;
- the term added to the product does not have shape (n,): here a bias gets that shape, and Sum adds
  anything else;
- products share a DequantizeLinear or its integers: `onnx_weights.py` gives each product its own;

and in rarer cases: a product times 1 before a Relu; a bias after the product with a transposed
matrix; equal scales of up to 8 columns, which it merges. So its optimized graph is checked, and
weights whose product is not fused are unpacked when it loads the file.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cbp_jax.deploy.onnx_weights import free_name

if TYPE_CHECKING:  # an optional dependency, and slow to load
    import onnx


def make_fusible(graph: "onnx.GraphProto") -> None:
    """Rewrites what follows products with packed integers, in place and with the same results."""
    columns = {tensor.name: tensor.dims[-1] for tensor in graph.initializer if tensor.dims}
    packed = {
        node.output[0]: columns[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear"
    }
    for product in [node for node in graph.node if len(node.input) > 1 and node.input[1] in packed]:
        n = packed[product.input[1]]
        if len(product.input) > 2 and (bias := _as_bias(graph, product.input[2], n)):  # of a Gemm
            product.input[2] = bias
        _rewrite_users(graph, product.output[0], n)


def _rewrite_users(graph: "onnx.GraphProto", value: str, n: int) -> None:
    """Rewrites the nodes after a value of n columns that would prevent fusing its product."""
    for node in [node for node in graph.node if value in node.input]:
        if node.op_type == "Identity":
            _rewrite_users(graph, node.output[0], n)
        elif node.op_type == "Add":
            _rewrite_sum(graph, node, value, n)
        elif node.op_type in ("Relu", "Clip") and node.input[0] == value:
            _rewrite_clipping(graph, node)


def _rewrite_sum(graph: "onnx.GraphProto", node: "onnx.NodeProto", value: str, n: int) -> None:
    """Gives a bias shape (n,), so that it is fused; any other term is added by a Sum."""
    other = 1 if node.input[0] == value else 0
    if bias := _as_bias(graph, node.input[other], n):
        node.input[other] = bias
        _rewrite_users(graph, node.output[0], n)
    else:
        node.op_type = "Sum"


def _as_bias(graph: "onnx.GraphProto", name: str, n: int) -> str | None:
    """Returns the name of a constant as shape (n,); None if it is not constant or varies by row."""
    from onnx import numpy_helper

    tensor = next((tensor for tensor in graph.initializer if tensor.name == name), None)
    if tensor is None:
        return None
    values = numpy_helper.to_array(tensor)
    if values.shape == (n,):
        return name
    if values.size not in (1, n) or values.shape[-1:] not in ((), (1,), (n,)):
        return None
    own = free_name(graph, f"{name}:bias")
    graph.initializer.append(
        numpy_helper.from_array(np.broadcast_to(values.reshape(-1), (n,)).copy(), own)
    )
    return own


def _rewrite_clipping(graph: "onnx.GraphProto", node: "onnx.NodeProto") -> None:
    """Turns a Relu or a Clip into Max and Min."""
    from onnx import helper, numpy_helper

    value, *bounds = node.input
    if node.op_type == "Relu":
        zero = free_name(graph, "zero")
        graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), zero))
        bounds = [zero]
    operations = [(op, bound) for op, bound in zip(("Max", "Min"), bounds, strict=False) if bound]
    if not operations:
        return
    at = next(i for i, other in enumerate(graph.node) if other is node)
    output, name = node.output[0], node.name
    new = []
    for i, (op, bound) in enumerate(operations):
        result = output if i == len(operations) - 1 else free_name(graph, f"{output}:{op}")
        new.append(
            helper.make_node(op, [value, bound], [result], name=f"{name}:{op}" if name else "")
        )
        value = result
    nodes = [*graph.node[:at], *new, *graph.node[at + 1 :]]
    del graph.node[:]
    graph.node.extend(nodes)


def unfused(optimized: Path, weights: Iterable[str]) -> list[str]:
    """Returns the weights that ONNX Runtime still unpacks at every call.

    Args:
      optimized: the graph it wrote to `SessionOptions.optimized_model_filepath`.
      weights: names of weights.
    """
    import onnx

    graph = onnx.load(optimized, load_external_data=False).graph
    unpacked = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    return [weight for weight in weights if any(_is_copy_of(name, weight) for name in unpacked)]


def unpack_when_loaded(graph: "onnx.GraphProto", weights: Iterable[str]) -> None:
    """Makes ONNX Runtime unpack these weights, to the same values, when it loads the file."""
    from onnx import TensorProto, helper

    weights, nodes = list(weights), []
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or not any(
            _is_copy_of(node.input[0], weight) for weight in weights
        ):
            nodes.append(node)
            continue
        integers, scales = node.input  # scales of the last axis
        cast = free_name(graph, f"{integers}:float")
        nodes += [
            helper.make_node("Cast", [integers], [cast], name=cast, to=TensorProto.FLOAT),
            helper.make_node("Mul", [cast, scales], list(node.output), name=node.name),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def _is_copy_of(integers: str, weight: str) -> bool:
    """Whether these are the integers of a weight, or a copy of them."""
    return integers == weight or integers.startswith(f"{weight}:")
