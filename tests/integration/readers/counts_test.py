"""The counts of cases that the report prints."""

import pytest
from faults import readers


@pytest.mark.parametrize("name", readers.NAMES)
def test_cases_are_counted(name):
    """Some files are read, and what can be refused is; the seed decides which."""
    cases = 20 if name == "checkpoints" else 100
    counts = readers.READERS[name](0, cases)
    assert counts == readers.READERS[name](0, cases)
    assert counts.cases == cases == sum(counts[1:])
    assert counts.intact
    assert counts.refused or name in ("metrics.jsonl", "checkpoints")  # which have what is left
    assert counts.silent == counts.crashed == 0


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda: True, "intact"),
        (lambda: False, "silent"),
        (lambda: [][0], "crashed"),
        (lambda: int("x"), "refused"),
        (lambda: bytes(1 << 40), "crashed"),
    ],
)
def test_what_readers_do_is_told_apart(read, found, monkeypatch):
    reader = readers.Reader(lambda rng, folder: read, (ValueError,))
    monkeypatch.setattr(readers, "_READERS", {"reader": reader})
    counts = readers.count("reader", 0, 3)
    assert counts._asdict()[found] == counts.cases == 3


def test_a_reader_that_takes_long_has_failed(monkeypatch):
    reader = readers.Reader(lambda rng, folder: lambda: sum(range(10**5)) > 0, (ValueError,))
    monkeypatch.setattr(readers, "_READERS", {"reader": reader})
    monkeypatch.setattr(readers, "_SECONDS", 0.0)
    found, error = readers.attempt("reader", 0)
    assert found == "crashed"
    assert isinstance(error, TimeoutError)
