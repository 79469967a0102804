"""Numbers as a person reads them."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_dist.report.run_files import number

Interval = Mapping[str, Any]             # {"value", "low", "high", "n"}: a figure and its 95 % interval
NONE = "–"


def plain(value: Any) -> str:
    """Four significant digits; – for what is no number."""
    found = number(value)
    if found is None:
        return NONE
    if found == int(found) and abs(found) < 1e6:
        return f"{int(found):,}".replace("-", "−")
    digits, _, power = f"{found:.4g}".partition("e")
    return (f"{digits}e{int(power)}" if power else digits).replace("-", "−")


def percent(share: Any) -> str:
    found = number(share)
    return NONE if found is None else f"{100 * found:.{1 if abs(found) < 0.0995 else 0}f}\N{NO-BREAK SPACE}%"


def share(interval: Interval | None) -> str:
    """A share with its interval: 0.83 (0.78 to 0.87)."""
    if interval is None or number(interval.get("value")) is None:
        return NONE
    value, low, high = (number(interval.get(key)) for key in ("value", "low", "high"))
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def spread(interval: Interval | None) -> str:
    """As `share`, for a figure of any size."""
    if interval is None or number(interval.get("value")) is None:
        return NONE
    low, high = interval.get("low"), interval.get("high")
    around = "" if number(low) is None or number(high) is None else f" ({plain(low)} to {plain(high)})"
    return plain(interval["value"]) + around


def counted(n: int, one: str, many: str = "") -> str:
    """1 pair, 2 pairs."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
