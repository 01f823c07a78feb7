"""One rule for every number on the page."""

from __future__ import annotations

import pytest

from tribunal.core.reports import CONTROLS
from tribunal.report import words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0.000"), (0.9194, "0.919"), (0.92, "0.920"), (-0.002, "−0.002"), (9.9994, "9.999")),
        *((12.345, "12.35"), (123.45, "123.5"), (1234.5, "1,234"), (62953.0, "62,953"), (-0.0, "0.000")),
        *((0.00002, "2.0 × 10⁻⁵"), (-0.00031, "−3.1 × 10⁻⁴"), (float("nan"), "not finite")),
    ],
)
def test_a_number_has_three_digits_after_the_point_below_ten_and_none_from_a_thousand_on(value: float, text: str):
    assert words.number(value) == text


def test_a_number_and_its_interval_have_equally_many_decimals():
    assert words.interval(9.5, 2.25, 12.125) == ("9.50", "[2.25, 12.12]")
    assert words.interval(4.7e-17, 0.0, 0.0197) == ("0.000", "[0.000, 0.020]")
    assert words.interval(2e-5, -1e-5, 3e-5) == ("2.0 × 10⁻⁵", "[−1.0 × 10⁻⁵, 3.0 × 10⁻⁵]")


def test_a_gain_shows_its_sign():
    assert words.interval(0.025, -0.01, 0.06, signed=True) == ("+0.025", "[−0.010, +0.060]")
    assert words.number(-0.0004, 3, signed=True) == "0.000"


def test_every_shared_control_is_explained():
    assert list(words.CONTROLS) == list(CONTROLS)


@pytest.mark.parametrize(("seconds", "text"), [(0.24, "0.2 s"), (75.3, "75 s"), (300, "5.0 min"), (7500, "2.1 h"), (7.2e6, "2,000.0 h")])
def test_a_duration_has_the_unit_that_suits_it(seconds: float, text: str):
    assert words.duration(seconds) == text
