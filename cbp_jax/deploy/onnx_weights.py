"""Constrained weights in an ONNX graph: 2-bit or 4-bit integers, and the nodes that scale them.

If the levels are integers times a common unit, `weight = integer * (unit * scale)`. The integers of
binary and ternary weights are -1 to 1 and the unit is 1; for one-bit shift they are -2 to 2 and the
unit is 1/2, for two-bit shift -4 to 4 and 1/4. ONNX Runtime computes

    DequantizeLinear(integers, scales) -> MatMul or Gemm   with packed integers (MatMulNBits)
    Mul(Cast(integers), scale)         -> any other node   in float32, folded when it loads the file
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cbp_jax.constraints import Constraint
from cbp_jax.masking import path_string
from cbp_jax.state import ConstrainedLeaf

if TYPE_CHECKING:  # an optional dependency, and slow to load
    import onnx

FLOAT = "float"
INTEGERS = {"int2": range(-2, 2), "int4": range(-8, 8)}

# The relative precision of levels as multiples of a unit, and the most units in the smallest level.
_PRECISION, _MOST_UNITS = 1e-6, 16


class GraphWeight(NamedTuple):
    """A constrained weight as the graph stores it."""

    name: str
    values: np.ndarray  # 2-bit or 4-bit integers; without a scale the float32 weights themselves
    scale: np.ndarray | None  # shape=() or with kept dimensions, dtype=float32


def graph_weight(leaf: ConstrainedLeaf, weight_type: str) -> GraphWeight:
    """Converts a leaf's weights, on their levels, to "int2", "int4" or "float".

    Raises:
      ValueError: if the levels do not fit the type, or the weights are not finite float32; the
        error names the layer.
    """
    name = path_string(leaf.path)
    if leaf.weight.dtype != jnp.float32:
        raise ValueError(
            f"{name!r} is {leaf.weight.dtype}, and export_onnx accepts only float32: give the "
            "parameters cast to float32, with the same optimizer state"
        )
    if not (np.all(np.isfinite(leaf.weight)) and np.all(np.isfinite(leaf.scale))):
        raise ValueError(f"{name!r} has weights or scales that are not finite")
    if weight_type == FLOAT:
        values = np.asarray(leaf.constraint.quantize(leaf.weight, leaf.scale))
        return GraphWeight(name, values, None)
    unit, integers = _fitting_integers(name, leaf.constraint, weight_type)
    codes = np.asarray(leaf.constraint.level_index(leaf.weight, leaf.scale))
    scale = np.float32(np.asarray(leaf.scale, np.float64) * unit)
    values = np.array(integers).astype(getattr(jnp, weight_type))[codes]
    return GraphWeight(name, values, _drop_constant_axes(np.asarray(scale)))


def level_integers(constraint: Constraint) -> tuple[float, tuple[int, ...]] | None:
    """Finds the largest unit of which all levels are multiples.

    Returns:
      The unit and the multiples, or None if there is no unit.

    Example:
      >>> import cbp_jax
      >>> from cbp_jax.deploy.onnx_weights import level_integers
      >>> level_integers(cbp_jax.two_bit_shift())
      (0.25, (-4, -2, -1, 0, 1, 2, 4))
    """
    levels = np.array(constraint.levels)
    smallest = np.min(np.abs(levels[levels != 0]))
    for units in range(1, _MOST_UNITS + 1):
        integers = np.rint(levels * units / smallest)
        if np.all(np.abs(integers * smallest / units - levels) <= _PRECISION * np.abs(levels)):
            return float(smallest / units), tuple(map(int, integers))
    return None


def _fitting_integers(
    name: str, constraint: Constraint, weight_type: str
) -> tuple[float, tuple[int, ...]]:
    found, allowed = level_integers(constraint), INTEGERS[weight_type]
    if found is not None and all(integer in allowed for integer in found[1]):
        return found
    if found is None:
        problem, fits = f"are not multiples of a common unit: {constraint.levels}", False
    else:
        problem = f"need the integers {', '.join(map(str, found[1]))}"
        fits = all(integer in INTEGERS["int4"] for integer in found[1])
    raise ValueError(
        f"{name!r} cannot be {weight_type}, which holds {allowed[0]} to {allowed[-1]}: the levels "
        f"of its constraint {constraint.name!r} {problem}. "
        f"Give weight_type={'int4' if fits else FLOAT!r}"
    )


def put_weights(model: "onnx.ModelProto", weights: Mapping[str, GraphWeight]) -> None:
    """Replaces graph inputs by weights, given by the inputs' names; in place.

    Transposes and reshapes of a weight are applied here once, instead of in the graph.
    """
    graph = model.graph
    _filter_field(graph.input, lambda value: value.name not in weights)
    nodes = [
        node for name, weight in weights.items() for node in _produce_weight(graph, name, weight)
    ]
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    for part in all_graphs(graph):
        del part.value_info[:]  # jax2onnx 0.17 leaves wrong shapes there


def remove_unused(graph: "onnx.GraphProto") -> None:
    """Removes initializers that no node uses; in place."""
    used = {name for node in all_nodes(graph) for name in node.input}
    used.update(value.name for value in graph.output)
    _filter_field(graph.initializer, lambda tensor: tensor.name in used)


def _produce_weight(
    graph: "onnx.GraphProto", value: str, weight: GraphWeight
) -> "list[onnx.NodeProto]":
    """Adds a weight's initializers; returns the nodes to add, which compute `value` from them."""
    from onnx import TensorProto, helper

    added: list[onnx.NodeProto] = []
    outputs = {output.name for output in graph.output}
    for node in list(graph.node):
        if value not in node.input or not outputs.isdisjoint(node.output):
            continue
        if rearrange := _rearrangement(node, graph):
            graph.node.remove(node)
            added += _produce_weight(graph, node.output[0], _rearranged(weight, rearrange))
    users = [node for node in all_nodes(graph) if value in node.input]
    if not users:
        return added
    products = all(_is_product(node, value) for node in users)
    if products and _is_fusible(weight) and not _any_in_subgraph(graph, users):
        return [*added, *(_dequantize_for(graph, node, value, weight) for node in users)]
    name = _add_initializer(graph, weight.name, weight.values)
    if weight.scale is None:
        for node in users:
            node.input[:] = [name if input == value else input for input in node.input]
        return added
    cast, scale = f"{name}:float", _add_initializer(graph, f"{name}:scale", weight.scale)
    return [
        *added,
        helper.make_node("Cast", [name], [cast], name=cast, to=TensorProto.FLOAT),
        helper.make_node("Mul", [cast, scale], [value], name=f"{name}:weight"),
    ]


def _dequantize_for(
    graph: "onnx.GraphProto", product: "onnx.NodeProto", value: str, weight: GraphWeight
) -> "onnx.NodeProto":
    """Returns the node that computes the weight of one product.

    ONNX Runtime fuses only what is used once. So each product gets its own integers, and one scale
    per column: it would merge equal scalars of layers with the same scale.
    """
    from onnx import helper

    assert weight.scale is not None
    name = _add_initializer(graph, weight.name, weight.values)
    scale = _add_initializer(
        graph, f"{name}:scale", np.broadcast_to(weight.scale.reshape(-1), weight.values.shape[1:])
    )
    own = name.replace(weight.name, value)  # as distinct as the name
    product.input[:] = [own if input == value else input for input in product.input]
    _simplify_product(product)
    return helper.make_node("DequantizeLinear", [name, scale], [own], name=f"{name}:weight", axis=1)


def _add_initializer(graph: "onnx.GraphProto", name: str, values: np.ndarray) -> str:
    """Adds an initializer; returns its name, which is the given one or a free one like it."""
    from onnx import numpy_helper

    name = free_name(graph, name)
    graph.initializer.append(
        numpy_helper.from_array(np.ascontiguousarray(values) if values.ndim else values, name)
    )
    return name


def _any_in_subgraph(graph: "onnx.GraphProto", users: "list[onnx.NodeProto]") -> bool:
    """Whether a node is in a loop or branch, which ONNX Runtime does not fuse with the outside."""
    return any(all(node is not user for node in graph.node) for user in users)


def _rearrangement(
    node: "onnx.NodeProto", graph: "onnx.GraphProto"
) -> Callable[[np.ndarray], np.ndarray] | None:
    """Returns what a node does to its first input if it only rearranges elements, else None."""
    from onnx import TensorProto, numpy_helper

    attributes = _attributes(node)
    if node.op_type == "Transpose":
        return lambda a: a.transpose(attributes.get("perm"))
    if node.op_type == "Identity" or (
        node.op_type == "Cast" and attributes["to"] == TensorProto.FLOAT
    ):
        return lambda a: a
    if node.op_type == "Reshape" and not attributes.get("allowzero"):
        shapes = [
            numpy_helper.to_array(tensor)
            for tensor in graph.initializer
            if tensor.name == node.input[1]
        ]
        if shapes:  # where 0 keeps the size of the input's axis
            return lambda a: a.reshape(
                [n or a.shape[axis] for axis, n in enumerate(shapes[0].tolist())]
            )
    return None


def _rearranged(weight: GraphWeight, rearrange: Callable[[np.ndarray], np.ndarray]) -> GraphWeight:
    values, scale = rearrange(weight.values), weight.scale
    if scale is not None and scale.ndim:
        scale = _drop_constant_axes(rearrange(np.broadcast_to(scale, weight.values.shape)))
    return weight._replace(values=values, scale=scale)


def _drop_constant_axes(scale: np.ndarray) -> np.ndarray:
    """Reduces axes along which a scale is constant to size 1; to shape () if it is constant."""
    for axis in range(scale.ndim):
        first = scale[(slice(None),) * axis + (slice(1),)]
        if np.all(scale == first):
            scale = first
    return scale.reshape(()) if scale.size == 1 else scale


def _is_fusible(weight: GraphWeight) -> bool:
    """Whether ONNX Runtime multiplies by these integers without unpacking them."""
    scale = weight.scale
    if weight.values.ndim != 2 or scale is None or (scale.ndim and scale.shape[0] > 1):
        return False
    # ONNX Runtime 1.32 gives wrong results for 2-bit weights whose columns do not fill whole bytes.
    return weight.values.dtype != jnp.int2 or weight.values.shape[1] % 4 == 0


def _is_product(node: "onnx.NodeProto", value: str) -> bool:
    """Whether a node multiplies by `value` from the right, like MatMul or a plain Gemm."""
    if len(node.input) < 2 or node.input[1] != value or list(node.input).count(value) > 1:
        return False
    attributes = _attributes(node)
    if node.op_type == "Gemm":
        plain = {"alpha": 1, "transA": 0, "transB": 0}
        return attributes.get("beta", 1) in (0, 1) and all(
            attributes.get(key, plain[key]) == plain[key] for key in plain
        )
    if node.op_type == "Einsum":  # such as abc,cd->abd
        equation = attributes["equation"].decode().replace(" ", "")
        match = re.fullmatch(r"(\w*)(\w),(\w)(\w)->(\w*)(\w)", equation)
        if match is None:
            return False
        rows, summed, left, right, rows_out, right_out = match.groups()
        letters = rows + summed + right
        distinct = len(set(letters)) == len(letters)
        return distinct and (rows, summed, right) == (rows_out, left, right_out)
    return node.op_type == "MatMul"


def _simplify_product(node: "onnx.NodeProto") -> None:
    """Turns a product without a bias into a MatMul, since ONNX Runtime would not fuse it."""
    if node.op_type == "Einsum" or (
        node.op_type == "Gemm" and (len(node.input) < 3 or _attributes(node).get("beta", 1) == 0)
    ):
        node.op_type = "MatMul"
        del node.input[2:], node.attribute[:]


def _attributes(node: "onnx.NodeProto") -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def all_graphs(graph: "onnx.GraphProto") -> "Iterator[onnx.GraphProto]":
    """Yields the graph and those of the loops and branches in it."""
    yield graph
    for attribute in itertools.chain.from_iterable(node.attribute for node in graph.node):
        for part in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from all_graphs(part)


def all_nodes(graph: "onnx.GraphProto") -> "Iterator[onnx.NodeProto]":
    return itertools.chain.from_iterable(part.node for part in all_graphs(graph))


def free_name(graph: "onnx.GraphProto", name: str) -> str:
    """Returns the name, or a free one like it if it is taken."""
    taken = {value.name for value in (*graph.input, *graph.initializer)}
    taken.update(output for node in all_nodes(graph) for output in node.output)
    return next(
        free for n in itertools.count() if (free := f"{name}:{n}" if n else name) not in taken
    )


def _filter_field(values: Any, wanted: Callable[[Any], bool]) -> None:
    """Removes unwanted values from a repeated field."""
    kept = [value for value in values if wanted(value)]
    del values[:]
    values.extend(kept)
