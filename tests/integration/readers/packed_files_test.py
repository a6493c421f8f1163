"""Packed files that were damaged or made up."""

from corruption import cases, check_reader


@cases()
def test_packed_files(cases):
    check_reader("packed files", cases)
