"""Weights that were damaged or made up; weight_files_test.py has the faults that were found."""

import pytest
from corruption import cases, check_reader


@cases()
def test_safetensors(cases):
    check_reader(".safetensors weights", cases)


@cases()
def test_pickles(cases):
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    check_reader(".pth weights", cases)
