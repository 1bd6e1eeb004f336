"""Numbers as a person reads them, and round numbers for axes."""

from __future__ import annotations

import math

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def number(value: float) -> str:
    """Three significant digits, whole numbers below a million in full.

    Example:
        >>> number(1234), number(0.012345), number(float("nan")), number(12.0)
        ('1234', '0.0123', 'NaN', '12')
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}"


def size(count: float) -> str:
    """Bytes, in decimal units as in the table of ``report``.

    Example:
        >>> size(0), size(999), size(8388608), size(2.5e9), size(999_999)
        ('0 B', '999 B', '8.39 MB', '2.50 GB', '1.00 MB')
    """
    if not math.isfinite(count):
        return number(count)
    amount, unit = float(count), 0
    while abs(amount) >= 999.995 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{amount:.0f} {_UNITS[unit]}" if unit == 0 else f"{amount:.2f} {_UNITS[unit]}"


def ticks(low: float, high: float, *, most: int = 5) -> list[float]:
    """At most ``most`` + 1 multiples of 1, 2 or 5 times a power of ten that cover ``low`` to ``high``.

    Example:
        >>> ticks(0.0, 87.0)
        [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    """
    widest = max(abs(low), abs(high))
    if widest < 1e-300:
        low, high = -1.0, 1.0
    elif high - low < 1e-9 * widest:
        low, high = low - widest / 2, high + widest / 2
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first, last = math.floor(low / step), math.ceil(high / step)
        if last - first <= most:
            break
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]
