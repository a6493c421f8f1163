"""Matrix products by packed integers: what ONNX Runtime fuses, and what it does not.

It replaces a DequantizeLinear and the product after it by one MatMulNBits. Where that fails,
DequantizeLinear runs at every call, which is several times slower than float32. ONNX Runtime 1.32
gives up where

    all that follows the product is one Relu or Clip      here: Max and Min, which compute the same
    what is added to the product is not of shape (n,)     here: a bias gets that shape; Sum adds
    anything else products share a DequantizeLinear, or its integers    `onnx_weights.py` gives each
    product its own

and in rarer cases: a product times 1 before a Relu; a bias behind the product of a transposed
matrix; equal scales of up to 8 columns, of which it makes one. So the graph that it makes is looked
at, and weights whose product it did not fuse are unpacked when it loads the file.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cbp_jax.deploy.onnx_weights import free_name

if TYPE_CHECKING:  # an optional dependency, and slow to load
    import onnx


def make_fusible(graph: "onnx.GraphProto") -> None:
    """Rewrites what follows the products by packed integers so that ONNX Runtime fuses them; in place, with the same results."""
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
    """Rewrites the nodes behind a value of n columns that would keep ONNX Runtime from fusing the product before it."""
    for node in [node for node in graph.node if value in node.input]:
        if node.op_type == "Identity":
            _rewrite_users(graph, node.output[0], n)
        elif node.op_type == "Add":
            _rewrite_sum(graph, node, value, n)
        elif node.op_type in ("Relu", "Clip") and node.input[0] == value:
            _rewrite_clipping(graph, node)


def _rewrite_sum(graph: "onnx.GraphProto", node: "onnx.NodeProto", value: str, n: int) -> None:
    """A bias of shape (n,) becomes part of the product; anything else is added by a node that stays apart."""
    other = 1 if node.input[0] == value else 0
    if bias := _as_bias(graph, node.input[other], n):
        node.input[other] = bias
        _rewrite_users(graph, node.output[0], n)
    else:
        node.op_type = "Sum"


def _as_bias(graph: "onnx.GraphProto", name: str, n: int) -> str | None:
    """The name of a constant as one of shape (n,); None if the value is not constant, or differs from row to row."""
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
    """Makes Max and Min of a Relu or a Clip."""
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
    """Those of the weights that a graph as ONNX Runtime optimized it still unpacks at every call.

    Args:
      optimized: the file that `SessionOptions.optimized_model_filepath` named.
      weights: names of weights.
    """
    import onnx

    graph = onnx.load(optimized, load_external_data=False).graph
    unpacked = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    return [weight for weight in weights if any(_is_copy_of(name, weight) for name in unpacked)]


def unpack_when_loaded(graph: "onnx.GraphProto", weights: Iterable[str]) -> None:
    """Has ONNX Runtime unpack these weights when it loads the file, instead of at every call; in place, to the same values."""
    from onnx import TensorProto, helper

    weights, nodes = list(weights), []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and any(
            _is_copy_of(node.input[0], weight) for weight in weights
        ):
            (integers, scales), made = node.input, free_name(graph, f"{node.input[0]}:float")
            nodes.append(
                helper.make_node("Cast", [integers], [made], name=made, to=TensorProto.FLOAT)
            )
            nodes.append(
                helper.make_node("Mul", [made, scales], list(node.output), name=node.name)
            )  # scales are of the last axis
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _is_copy_of(integers: str, weight: str) -> bool:
    """Whether integers are those of a weight, or one of its copies."""
    return integers == weight or integers.startswith(f"{weight}:")
