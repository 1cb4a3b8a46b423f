"""Numbers as the documentation writes them."""

import math

__all__ = ["duration", "scientific", "significant", "span"]

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def significant(x: float, digits: int = 2) -> str:
    """Round to some digits, without an exponent."""
    if x == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{round(x, places):.{places}f}"


def scientific(x: float, digits: int = 1) -> str:
    """Write 2.4e-3, 4e-8, but 0 as it is, and from 0.1 on without an exponent."""
    if x == 0 or x >= 0.1:
        return significant(x)
    mantissa, _, exponent = f"{x:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def duration(seconds: float, digits: int = 2) -> str:
    """Seconds, milliseconds below 0.1 s, microseconds below 0.1 ms."""
    unit, name = next((unit, name) for unit, name in UNITS if seconds >= unit / 10 or name == "us")
    return f"{significant(seconds / unit, digits)} {name}"


def span(numbers: list[float]) -> str:
    """Write the smallest and the largest."""
    return f"{significant(min(numbers))} to {significant(max(numbers))}"
