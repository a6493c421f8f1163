"""Tries a reader on many files that were damaged or made up, of seeds that hypothesis draws."""

import hypothesis
import hypothesis.strategies as st
import pytest
from faults import readers


def cases(default=500):
    """The numbers of cases of a test: by default, and of a thorough run."""
    return pytest.mark.parametrize(
        "cases", [default, pytest.param(10_000, marks=pytest.mark.slow, id="many")]
    )


def check_reader(name, cases):
    """Asserts that only documented errors come out, and that what comes out is right.

    A seed that fails shows the file: `faults.reader_cases` makes it from `default_rng((seed, 0))`.
    """

    @hypothesis.settings(max_examples=cases, deadline=None, database=None)
    @hypothesis.given(st.integers(0, 2**64 - 1))
    def check(seed):
        found, error = readers.attempt(name, seed)
        if found not in ("intact", "refused"):
            raise AssertionError(f"{name}, seed {seed}: {found}") from error

    with readers.bounded_memory():
        check()
