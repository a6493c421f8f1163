"""Photos that were damaged or made up; decode_test.py has the faults that were found."""

from corruption import cases, check_reader


@cases()
def test_photos(cases):
    check_reader("photos", cases)
