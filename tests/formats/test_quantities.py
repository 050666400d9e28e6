"""Numbers with units, read and written."""

import pytest

from formats.quantities import quantity, short


def test_quantities():
    read = [quantity(text) for text in ("1e22", "7b", "1.4T", "300M", "20k", "5")]
    assert read == pytest.approx([1e22, 7e9, 1.4e12, 3e8, 2e4, 5])
    for text in ("", "b", "7x", "0", "-1e22", "nan", "inf", "1e400", "7bb"):
        with pytest.raises(ValueError, match="expected a positive number"):
            quantity(text)


def test_numbers_are_written_short():
    numbers = (1.4e12, 72.25e9, 999.7e6, 1e9, 20, 0.958, 3e17)
    assert [short(n) for n in numbers] == ["1.4T", "72.2B", "1B", "1B", "20", "0.958", "3e17"]


def test_a_unit_begins_where_the_number_of_digits_rounds_to_1000():
    assert [short(999.7, digits) for digits in (3, 4)] == ["1k", "999.7"]
    assert [short(999_960, digits) for digits in (4, 6)] == ["1M", "999.96k"]
    assert [short(x, 4) for x in (999.94e12, 999.96e12)] == ["999.9T", "1e15"]
