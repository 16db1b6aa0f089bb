"""The packed formats: widths, code values, bytes of a row."""

from __future__ import annotations

__all__ = ["BITS", "check_bits", "code_multiplier", "levels_of", "row_bytes", "symmetric_zero"]

BITS: tuple[float, ...] = (1, 1.58, 2, 3, 4, 8)
"""The accepted values of ``bits``; 1.58 stands for ternary codes, five to a byte (1.6 bits)."""

_LEVELS: dict[float, int] = {1: 2, 1.58: 3, 2: 4, 3: 8, 4: 16, 8: 256}


def check_bits(subject: str, bits: float) -> None:
    """Raise ValueError unless ``bits`` is one of :data:`BITS`."""
    if isinstance(bits, bool) or bits not in _LEVELS:
        listed = ", ".join(str(value) for value in BITS)
        raise ValueError(f"{subject}: bits must be one of {listed}; got {bits!r}.")


def levels_of(bits: float) -> int:
    """Number of code values: 2, 3, 4, 8, 16 or 256."""
    return _LEVELS[bits]


def row_bytes(columns: int, bits: float) -> int:
    """Bytes of one packed row of ``columns`` codes; every row starts on a byte border."""
    return -(-columns // 5) if bits == 1.58 else -(-columns * int(bits) // 8)


def symmetric_zero(bits: float) -> int:
    """The zero of a format without zero-points: ``w = scale * (code_multiplier * code - zero)``."""
    return 1 if bits == 1 else levels_of(bits) // 2


def code_multiplier(bits: float) -> int:
    """2 for one bit, whose codes stand for -1 and +1; else 1."""
    return 2 if bits == 1 else 1
