"""Numbers as messages say them: counts with their nouns, shares and differences of shares. What is undefined is `-`, never nan."""

from __future__ import annotations

import math
from collections.abc import Sequence


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """1 -> '1 image', 0 -> '0 images', 2000 -> '2000 images'; `plural` for nouns that take more than an s."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def verb(count: int, singular: str, plural: str) -> str:
    """The form that goes with a count: verb(1, 'is', 'are') -> 'is'."""
    return singular if count == 1 else plural


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names as text: 'a', 'a and b', 'a, b and c'; of more than `most` the first ones and how many there are besides."""
    if len(names) > most:
        names = [*names[:most], f"{len(names) - most} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def first_of(names: Sequence[str], most: int = 20) -> str:
    """Names between commas; of more than `most` the first ones and how many there are besides."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def ranges(numbers: Sequence[int], most: int = 12) -> str:
    """Ascending numbers as text, four and more in a row as a range: '0, 1, 2', '0 to 149, 255'; of many the first and how many
    there are.
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    texts = [text for part in parts for text in ([f"{part[0]} to {part[-1]}"] if len(part) > 3 else map(str, part))]
    return ", ".join(texts[:most]) + (f" and so on, {len(numbers)} in all" if len(texts) > most else "")


def defined(value: float | None, digits: int = 6) -> float | None:
    """A measured number as JSON holds it, rounded; None where it is undefined, that is None or not finite."""
    return None if value is None or not math.isfinite(value) else round(float(value), digits)


def per_cent(share: float | None, digits: int = 1) -> str:
    """0.1234 -> '12.3', without a sign of per cent; '-' where the share is undefined."""
    return "-" if defined(share) is None or share is None else _rounded(100 * share, digits)


def size_text(size: float) -> str:
    """Bytes as text: '2.30 GB', '12.0 MB', '16.4 kB'."""
    unit, scale, digits = next(
        unit for unit in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)) if size >= unit[1] or unit[0] == "kB"
    )
    return f"{size / scale:,.{digits}f} {unit}"


def signed(value: float | None, digits: int = 1) -> str:
    """4.24 -> '+4.2', -0.04 -> '0.0': what rounds to nothing has no sign; '-' where the value is undefined."""
    if defined(value) is None or value is None:
        return "-"
    text = _rounded(value, digits)
    return text if text.startswith("-") or float(text) == 0 else f"+{text}"


def _rounded(value: float, digits: int) -> str:
    """Fixed digits, and no minus before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"
