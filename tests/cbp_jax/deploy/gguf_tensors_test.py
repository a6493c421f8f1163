"""Rows, types, names and leaves that a GGUF file cannot hold are refused, by name."""

import jax
import numpy as np
import optax
import pytest
from gguf_support import export, export_kernel, link, normal, read


def refuse(match, path, kernel, constraint="ternary", error=ValueError, **options):
    with pytest.raises(error, match=match):
        export_kernel(path, kernel, constraint, **options)
    assert not path.exists()


def test_rows_that_do_not_fit(tmp_path):
    path = tmp_path / "m"
    refuse(
        "'up/kernel' cannot be TQ2_0: its rows, of one output each, have 96 weights, no multiple "
        "of 256. Give its weight_type as 'Q4_0' or 'F32' or 'F16'",
        path, normal(96, 256),
    )  # fmt: skip
    refuse("cannot be Q1_0.*64 weights, no multiple of 128.*'Q4_0'", path, normal(64, 2), "binary")
    refuse("48 weights, no multiple of 32. .* as 'F32' or", path, normal(48, 2), "two_bit_shift")
    refuse("'TQ2_0' or 'TQ1_0' or 'Q4_0'", path, normal(256, 2), weight_type="Q1_0")
    asked = {"up/kernel": "Q4_0"}
    assert export_kernel(path, normal(96, 256), weight_type=asked)[0] == 0.0
    assert read(path)["blk.0.ffn_up.weight"][0] == "Q4_0"


def test_types_that_do_not_fit(tmp_path):
    path, kernel = tmp_path / "m", normal(256, 2)
    refuse(
        "'up/kernel' cannot be TQ1_0: the levels of its constraint 'two_bit_shift' need the "
        "integers -4, -2, -1, 0, 1, 2, 4. Give its weight_type as 'Q4_0' or 'F32' or 'F16'",
        path, kernel, "two_bit_shift", weight_type="TQ1_0",
    )  # fmt: skip
    refuse("no weight type 'Q8_0', asked for 'up/kernel'", path, kernel, weight_type="Q8_0")
    refuse("has 'up', but there is no such leaf", path, kernel, weight_type={"up": "F16"})
    refuse("other_type must be 'F32', 'F16' or 'Q8_0'", path, kernel, other_type="Q4_0")
    refuse("scales along its rows", path, kernel, scale_axis=0)
    assert export_kernel(path, kernel, scale_axis=0, weight_type="F16")[0] == 0.0
    # A binary layer in a type for ternary ones.
    assert export_kernel(path, kernel, "binary", weight_type="TQ1_0")[0] == 0.0


def test_names_that_do_not_fit(tmp_path):
    params = {"a": {"kernel": normal(256, 2), "bias": normal(2)}, "b": normal(2)}
    state = link("ternary", "a/kernel").init(params)
    path = tmp_path / "m"
    cases = [
        ({"a/kernel": "w"}, "no name of a tensor for 'a/bias', 'b'"),
        (lambda path: None, "no name of a tensor for 'a/bias', 'a/kernel', 'b'"),
        (lambda path: "w", "'a/bias' and 'a/kernel' are both named 'w'"),
        ({"a/kernel": "w", "a/bias": "b", "b": "c", "c": "d"}, "names has 'c', but there is no"),
        (lambda path: path.rjust(64, "é"), "'a/bias' cannot be named .* 1 to 63 bytes"),
        (lambda path: "", "'a/bias' cannot be named ''"),
    ]
    for names, match in cases:
        with pytest.raises(ValueError, match=match):
            export(path, params, state, names)
    assert export(path, params, state, lambda path: path.rjust(63, "x")) == 0.0
    with pytest.raises(ValueError, match="pattern 'c' matches none"):
        export(path, params, state, lambda path: path, transpose="c")


def test_leaves_that_do_not_fit(tmp_path):
    kernel = {"kernel": normal(256, 2)}
    state = link("ternary").init(kernel)
    cases = [
        (np.arange(3), TypeError, "'x' is ndarray of dtype int"),
        (jax.random.key(0), TypeError, "'x' is .* of dtype key"),
        (np.zeros((0, 3), np.float32), ValueError, r"'x' has shape \(0, 3\)"),
        (normal(3, 3, 2, 2), ValueError, r"'x' has shape \(3, 3, 2, 2\)"),
        (np.float32([1, np.nan]), ValueError, "'x' has weights or scales that are NaN"),
    ]
    for leaf, error, match in cases:
        with pytest.raises(error, match=match):
            export(tmp_path / "m", {**kernel, "x": leaf}, state, lambda path: path)
    with pytest.raises(ValueError, match="'kernel' has weights or scales that are NaN"):
        export(tmp_path / "m", {"kernel": np.full((256, 2), np.nan)}, state, lambda path: path)
    with pytest.raises(ValueError, match="no CBPState"):
        export(tmp_path / "m", kernel, optax.sgd(0.1).init(kernel), lambda path: path)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_8_bits_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"'kernel' cannot be Q8_0: .* 33 weights.*'F32' or 'F16'"):
        export(
            tmp_path / "m", {"kernel": normal(33, 3)}, None, lambda path: path, other_type="Q8_0"
        )
    with pytest.raises(ValueError, match="'kernel' as Q8_0 would differ"):  # a scale of 0
        export(
            tmp_path / "m",
            {"kernel": normal(32, 3, scale=1e-9)},
            None,
            lambda path: path,
            other_type="Q8_0",
        )
    assert list(tmp_path.iterdir()) == []
