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
