"""Divisors against a plain loop."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshwright.divisors import divisors, nearest_divisor


@given(st.integers(1, 3000), st.integers(-5, 4000))
def test_divisors_are_those_of_a_plain_loop(number: int, wanted: int) -> None:
    slow = [d for d in range(1, number + 1) if number % d == 0]
    assert list(divisors(number)) == slow
    assert nearest_divisor(number, wanted) == min(slow, key=lambda d: abs(d - wanted))
