"""Which constraint each leaf gets: rules from path patterns, within the mask."""

import re
import warnings
from collections.abc import Callable, Mapping

from cbp_jax.arguments import check_weight
from cbp_jax.constraints import Constraint
from cbp_jax.level_sets import get_constraint
from cbp_jax.masking import (
    Path,
    PyTree,
    check_patterns,
    compile_patterns,
    flatten_with_paths,
    path_string,
    resolve_mask,
)

ConstraintSpec = str | Constraint | Mapping[str, str | Constraint | None]
MaskSpec = PyTree | Callable[[PyTree], PyTree] | None
Rules = list[tuple[re.Pattern[str], Constraint | None]]


def compile_rules(constraint: ConstraintSpec) -> Rules:
    """Returns the rules of a constraint or of a mapping; raises ValueError if it is empty."""
    if not isinstance(constraint, Mapping):
        constraint = {r"[\s\S]*": constraint}
    if not constraint:
        raise ValueError(
            "the mapping of patterns to constraints is empty: "
            "give at least one pattern, or a single constraint"
        )
    resolved = [None if rule is None else get_constraint(rule) for rule in constraint.values()]
    return list(zip(compile_patterns(constraint), resolved, strict=True))


def assign_constraints(rules: Rules, mask: MaskSpec, params: PyTree) -> dict[Path, Constraint]:
    """Returns the constraint of each constrained leaf: that of the first rule that matches it."""
    leaves = flatten_with_paths(params)
    flags = resolve_mask(mask, params)
    candidates = {path: leaf for (path, leaf), flag in zip(leaves, flags, strict=True) if flag}
    if candidates:
        names = [path_string(path) for path in candidates]
        check_patterns([pattern for pattern, _ in rules], names)
    elif leaves and mask is None:
        warnings.warn(
            "cbp constrains nothing: no parameter is floating with at least two axes, except those "
            "named as biases, scales, norm parameters, embeddings or positions; name leaves with "
            "mask=cbp_jax.select(include=...)",
            stacklevel=4,
        )
    chosen = {}
    for path, leaf in candidates.items():
        name = path_string(path)
        rule = next((rule for pattern, rule in rules if pattern.fullmatch(name)), None)
        if rule is None:
            continue
        check_weight(name, leaf)
        chosen[path] = rule
    return chosen
