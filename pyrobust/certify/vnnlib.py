"""Properties in the VNN-LIB format: boxes of inputs and linear constraints on outputs.

A file asks whether some input ``X`` in a box has outputs ``Y`` that satisfy the asserted
constraints: ``unsat`` means that no such input exists, so the property that they negate holds.

Read here is the part of the format that verification competitions use: ``declare-const`` of ``X_i``
and ``Y_j``, and ``assert`` of ``<=``, ``>=``, ``<``, ``>`` between linear terms, joined by ``and``
and ``or``. Constraints on inputs bound one variable each. Strict ones are read as ``<=``: that can
only enlarge what must be refuted, and a point that satisfies them may do so with equality. Bounds
are rounded outward to float32.

Source: the VNN-LIB standard, version 1.0, and the properties of VNN-COMP.
"""

from __future__ import annotations

import gzip
import itertools
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from pyrobust.ops._interval_fallback import round_outward

__all__ = ["Property", "PropertyCase", "load_vnnlib", "parse_vnnlib"]

_TOKEN = re.compile(r"[()]|[^\s()]+")
_NAME = re.compile(r"([XY])_(\d+)$")
_LIMIT = 100_000
_INFINITY = torch.tensor(float("inf"), dtype=torch.float64)


@dataclass(frozen=True)
class PropertyCase:
    """One conjunction: is there an input in the box with ``matrix @ output <= limit``?

    Attributes:
        lower: ``(n,)`` float32 lower ends of the flattened input.
        upper: ``(n,)`` float32 upper ends.
        matrix: ``(C, m)`` float64.
        limit: ``(C,)`` float64.
    """

    lower: Tensor
    upper: Tensor
    matrix: Tensor
    limit: Tensor


@dataclass(frozen=True)
class Property:
    """A disjunction of cases over ``inputs`` inputs and ``outputs`` outputs."""

    inputs: int
    outputs: int
    cases: tuple[PropertyCase, ...]


# A linear form: coefficient by variable, and the constant under "".
_Form = dict[str, Fraction]
# A conjunction of forms that must be <= 0.
_Clause = tuple[_Form, ...]


def load_vnnlib(path: str | Path) -> Property:
    """Read a property file, plain or gzipped.

    Args:
        path: ``.vnnlib`` or ``.vnnlib.gz``.

    Returns:
        The property.

    Raises:
        ValueError: the text is malformed or uses what is not supported; the message gives the line.
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"load_vnnlib: {path} is not text, plain or gzipped ({error}).") from error
    return parse_vnnlib(text, name=str(path))


def parse_vnnlib(text: str, *, name: str = "property") -> Property:
    """Parse the text of a property; see :func:`load_vnnlib`.

    Example:
        >>> found = parse_vnnlib('''
        ... (declare-const X_0 Real) (declare-const Y_0 Real) (declare-const Y_1 Real)
        ... (assert (>= X_0 0.0)) (assert (<= X_0 1.0)) (assert (>= Y_1 Y_0))
        ... ''')
        >>> found.cases[0].matrix
        tensor([[ 1., -1.]], dtype=torch.float64)
    """
    declared: dict[str, int] = {"X": 0, "Y": 0}
    disjunction: list[_Clause] = [()]
    for line, statement in _statements(text, name):
        where = f"{name}, line {line}"
        head = statement[0] if statement else ""
        if head == "declare-const":
            _declare(statement, declared, where)
        elif head == "assert":
            if len(statement) != 2:
                raise ValueError(f"{where}: assert takes one expression.")
            parts = _clauses(statement[1], where)
            for form in itertools.chain(*parts):
                _check_variables(form, declared, where)
            disjunction = [a + b for a, b in itertools.product(disjunction, parts)]
            if len(disjunction) > _LIMIT:
                raise ValueError(f"{where}: more than {_LIMIT} cases.")
        else:
            raise ValueError(f"{where}: unknown statement {head!r}.")
    if declared["X"] == 0 or declared["Y"] == 0:
        raise ValueError(f"{name}: no inputs X_i or no outputs Y_j are declared.")
    try:
        cases = [_case(clause, declared, name) for clause in disjunction]
    except OverflowError:
        raise ValueError(f"{name}: a coefficient or limit is too large for float64.") from None
    return Property(declared["X"], declared["Y"], tuple(cases))


def _statements(text: str, name: str) -> Iterator[tuple[int, list]]:  # type: ignore[type-arg]
    """Top-level lists with the line they start on."""
    stack: list[list] = []  # type: ignore[type-arg]
    started = 1
    for line, content in enumerate(text.splitlines(), 1):
        for token in _TOKEN.findall(content.split(";", 1)[0]):
            if token == "(":
                started = line if not stack else started
                stack.append([])
            elif token == ")":
                if not stack:
                    raise ValueError(
                        f"{name}, line {line}: a closing parenthesis without its opening."
                    )
                done = stack.pop()
                if stack:
                    stack[-1].append(done)
                else:
                    yield started, done
            elif not stack:
                raise ValueError(f"{name}, line {line}: {token!r} stands outside parentheses.")
            else:
                stack[-1].append(token)
    if stack:
        raise ValueError(f"{name}, line {started}: a parenthesis is never closed.")


def _declare(statement: list, declared: dict[str, int], where: str) -> None:  # type: ignore[type-arg]
    match = _NAME.match(statement[1]) if len(statement) == 3 else None
    if match is None or statement[2] != "Real":
        raise ValueError(f"{where}: declare-const takes X_i or Y_j and Real; got {statement[1:]}.")
    kind, index = match[1], int(match[2])
    if index != declared[kind]:
        raise ValueError(f"{where}: {kind}_{declared[kind]} must be declared next; got {match[0]}.")
    declared[kind] += 1


def _check_variables(form: _Form, declared: dict[str, int], where: str) -> None:
    """That they are declared, and that inputs stand alone."""
    used = [k for k, v in form.items() if k and v]
    for variable in used:
        if int(variable[2:]) >= declared[variable[0]]:
            raise ValueError(f"{where}: {variable} is not declared.")
    if any(variable[0] == "X" for variable in used) and len(used) != 1:
        raise ValueError(f"{where}: a constraint on inputs must bound one variable; got {used}.")


def _clauses(expression: object, where: str) -> list[_Clause]:
    """The expression in disjunctive form."""
    if not isinstance(expression, list) or not expression:
        raise ValueError(f"{where}: a constraint must be a list; got {expression!r}.")
    head, *rest = expression
    if head in ("or", "and") and not rest:
        raise ValueError(f"{where}: {head!r} of no constraints.")
    if head == "or":
        return [clause for part in rest for clause in _clauses(part, where)]
    if head == "and":
        parts = [_clauses(part, where) for part in rest]
        size = 1
        for part in parts:
            size *= len(part)
        if size > _LIMIT:
            raise ValueError(f"{where}: more than {_LIMIT} cases.")
        return [tuple(itertools.chain(*choice)) for choice in itertools.product(*parts)]
    if head not in ("<=", ">=", "<", ">") or len(rest) != 2:
        raise ValueError(f"{where}: unsupported constraint {head!r} with {len(rest)} terms.")
    left, right = (_linear(part, where) for part in rest)
    lesser, greater = (left, right) if head in ("<=", "<") else (right, left)
    return [(_sum(lesser, greater, -1),)]


def _linear(term: object, where: str) -> _Form:
    if isinstance(term, str):
        if _NAME.match(term):
            return {term: Fraction(1)}
        try:
            # float() first: it finds at once what would take Fraction forever, as 1e999999999
            if "/" not in term and not math.isfinite(float(term)):
                raise ValueError
            return {"": Fraction(term)}
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{where}: {term!r} is neither a variable nor a number.") from None
    if not isinstance(term, list) or len(term) < 2:
        raise ValueError(f"{where}: not a term: {term!r}.")
    head, *rest = term
    forms = [_linear(part, where) for part in rest]
    if head == "+":
        total: _Form = {}
        for form in forms:
            total = _sum(total, form, 1)
        return total
    if head == "-":
        total = forms[0] if len(forms) > 1 else _sum({}, forms[0], -1)
        for form in forms[1:]:
            total = _sum(total, form, -1)
        return total
    if head == "*" and len(forms) == 2:
        constant = next((form for form in forms if set(form) <= {""}), None)
        if constant is not None:
            other = forms[1] if constant is forms[0] else forms[0]
            return {k: v * constant.get("", Fraction(0)) for k, v in other.items()}
    raise ValueError(f"{where}: {head!r} does not make a linear term here.")


def _sum(a: _Form, b: _Form, sign: int) -> _Form:
    return {k: a.get(k, Fraction(0)) + sign * b.get(k, Fraction(0)) for k in {**a, **b}}


def _case(clause: _Clause, declared: dict[str, int], name: str) -> PropertyCase:
    low: list[Fraction | None] = [None] * declared["X"]
    high: list[Fraction | None] = [None] * declared["X"]
    rows: list[list[float]] = []
    limits: list[float] = []
    for form in clause:
        used = [k for k, v in form.items() if k and v]
        if used and used[0][0] == "X":
            _bound_input(form, used[0], low, high)
        else:
            rows.append([float(form.get(f"Y_{j}", 0)) for j in range(declared["Y"])])
            limits.append(float(-form.get("", Fraction(0))))
    for i, (a, b) in enumerate(zip(low, high, strict=True)):
        if a is None or b is None:
            raise ValueError(f"{name}: X_{i} must be bounded on both sides.")
        if a > b:
            raise ValueError(f"{name}: the bounds of X_{i} are out of order: {a} > {b}.")
    # float() rounds to nearest, so one step further out contains the decimal number itself
    exact = [
        torch.tensor([float(v) for v in side if v is not None], dtype=torch.float64)
        for side in (low, high)
    ]
    below = torch.where(
        _inexact(low, exact[0], -1), torch.nextafter(exact[0], -_INFINITY), exact[0]
    )
    above = torch.where(_inexact(high, exact[1], 1), torch.nextafter(exact[1], _INFINITY), exact[1])
    lower, upper = round_outward(below, above, torch.float32)
    matrix = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), declared["Y"])
    return PropertyCase(lower, upper, matrix, torch.tensor(limits, dtype=torch.float64))


def _bound_input(
    form: _Form, variable: str, low: list[Fraction | None], high: list[Fraction | None]
) -> None:
    index, slope = int(variable[2:]), form[variable]
    value = -form.get("", Fraction(0)) / slope
    side, tighter = (high, min) if slope > 0 else (low, max)
    known = side[index]
    side[index] = value if known is None else tighter(known, value)


def _inexact(side: list[Fraction | None], rounded: Tensor, sign: int) -> Tensor:
    """Where rounding moved an end inward; ``sign`` 1 for upper ends, -1 for lower."""
    pairs = zip(side, rounded.tolist(), strict=True)
    return torch.tensor([v is not None and sign * v > sign * Fraction(r) for v, r in pairs])
