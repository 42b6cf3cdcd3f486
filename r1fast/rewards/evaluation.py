"""How large the evaluation of a formula would be, computed from its tree before anything is evaluated.

9!!!!!!!! and 9^{9^{9^9}} take eight characters to write and for ever to evaluate. Each node's bounds follow from those
of its parts (the digits of a power are those of its base times the exponent, of n! at most n log10 n, ...), so that no
list of dangerous shapes is needed.
"""

import math
from typing import Any, NamedTuple

MAX_DIGITS = 100_000  # an integer of that size takes milliseconds; the next factorial of it takes for ever
_DIGITS_PER_BIT = math.log10(2)


class Size(NamedTuple):
    """Upper bounds of what evaluating a tree makes, at variables below ten."""

    digits: float  # decimal digits that are written
    magnitude: float  # log10 of the absolute value


def size_of(tree: Any) -> Size:
    """The size of a sympy tree's value, from the tree alone: nothing is evaluated."""
    import sympy

    if isinstance(tree, sympy.Rational):
        digits = (tree.p.bit_length() + tree.q.bit_length()) * _DIGITS_PER_BIT
        return Size(digits, (tree.p.bit_length() - tree.q.bit_length() + 1) * _DIGITS_PER_BIT)
    if isinstance(tree, sympy.MatrixBase):
        return Size(sum(size_of(element).digits for element in tree.flat()), 0)
    parts = [size_of(argument) for argument in getattr(tree, "args", ()) if isinstance(argument, sympy.Basic)]
    total = sum((part.digits for part in parts), 1.0)
    if total > MAX_DIGITS:
        return Size(math.inf, math.inf)
    largest = max((part.magnitude for part in parts), default=1.0)
    if isinstance(tree, sympy.Pow):
        return _size_of_power(tree, *parts)
    if isinstance(tree, sympy.exp | sympy.sinh | sympy.cosh):
        return Size(_absolute(parts[0]), _absolute(parts[0]))
    if isinstance(tree, sympy.factorial | sympy.gamma | sympy.factorial2 | sympy.binomial):
        value = _absolute(Size(total, largest))
        return Size(value * (largest + 1), value * (largest + 1))
    if isinstance(tree, sympy.Sum | sympy.Product):
        terms = max((_absolute(size_of(limit)) for bounds in tree.args[1:] for limit in bounds.args[1:]), default=1.0)
        return Size(parts[0].digits * terms, parts[0].magnitude * terms)
    if isinstance(tree, sympy.Mul):
        return Size(total, sum(max(part.magnitude, 0.0) for part in parts))
    return Size(total, largest + math.log10(len(parts) + 1))


def _size_of_power(tree: Any, base: Size, exponent: Size) -> Size:
    times = abs(tree.exp.p) / tree.exp.q if tree.exp.is_Rational and exponent.digits < 300 else _absolute(exponent)
    written = base.digits if tree.exp.is_Rational else max(abs(base.magnitude), 1.0)
    return Size((written + 1) * times, max(abs(base.magnitude), 0.1) * times)


def _absolute(size: Size) -> float:
    """An upper bound of the absolute value itself."""
    return math.inf if size.magnitude > 15 else 10.0**size.magnitude
