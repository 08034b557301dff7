"""Amounts of memory as people write them: decimal units (GB, MB: what is on a label) and binary ones (GiB, MiB: what tools count in)."""

from __future__ import annotations

import math
import re

__all__ = ["in_words", "parse_memory"]

_UNITS = {"GB": 10**9, "MB": 10**6, "GiB": 2**30, "MiB": 2**20}


def parse_memory(value: str | int | float, name: str = "memory") -> int:
    """Bytes of an amount such as "8GB", "7.5 GiB" or "8000MB"; a plain number counts bytes.

    `name` is what the amount is called in an error.

    >>> parse_memory("8GB"), parse_memory("1GiB"), parse_memory(2**20)
    (8000000000, 1073741824, 1048576)

    Raises:
        ValueError: for a text without a unit, another unit, or an amount that is not positive and finite.
        TypeError: for anything else than a text or a number.
    """
    units = "GB (10**9 bytes), GiB (2**30 bytes), MB or MiB"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(f"{name}={value!r} is not an amount of memory: give a text such as '8GB', or a number of bytes.")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        unit = next((u for u in _UNITS if match and u.lower() == match[2].lower()), None)
        if match is None or unit is None:
            hint = f" Did you mean {match[1]}GB?" if match and not match[2] else ""
            raise ValueError(f"{name} {value!r} does not say how much memory: write a number and its unit, {units}, such as 8GB.{hint}")
        value = float(match[1]) * _UNITS[unit]
    if not 1 <= value < math.inf:
        raise ValueError(f"{name} {value:g} bytes is not possible: it must be at least one byte, and finite. Write it as in 8GB.")
    return int(value)


def in_words(size: float) -> str:
    """Bytes in decimal units, with three digits: what `parse_memory` reads.

    >>> in_words(8_000_000_000), in_words(23_456_000)
    ('8.00 GB', '23.5 MB')
    """
    scale, unit = (10**9, "GB") if size >= 0.9995 * 10**9 else (10**6, "MB")
    amount = size / scale
    return f"{amount:.{2 if amount < 9.995 else 1 if amount < 99.95 else 0}f} {unit}"
