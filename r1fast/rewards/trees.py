"""Formulas as sympy trees: how large their evaluation would be, and whether two of them are the same.

9!!!!!!!! and 9^{9^{9^9}} take eight characters to write and for ever to evaluate, so the size of what an evaluation
would make is computed from the tree first: each node's bounds follow from those of its parts (the digits of a power
are those of its base times the exponent, of n! at most n log10 n, ...), and no list of dangerous shapes is needed.
"""

import math
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from latex2sympy2_extended.logic import And
from math_verify import verify
from sympy.core.function import AppliedUndef

MAX_DIGITS = 100_000  # an integer of that size takes milliseconds; the next factorial of it takes for ever
_DIGITS_PER_BIT = math.log10(2)
_MAX_DEGREE = 200  # expanding or solving beyond it does not end
_MAX_SYMBOLS = 6
_PRECISION = 120
_POINTS = ("0.7302", "-1.3519", "2.1847", "-0.4151", "3.3391", "0.1173", "-2.7723", "1.6053")
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
)


def read(latex: str, *, is_complex: bool, in_degrees: bool) -> Any:
    """The tree of a formula, decimals as exact fractions, nothing evaluated. Raises a dozen kinds of exception."""
    tree = latex2sympy(
        normalize_latex(latex, _NORMALIZATION),
        is_real=not is_complex,
        convert_degrees=in_degrees,
        normalization_config=None,
        conversion_config=ConversionConfig(lowercase_symbols=False),
    )
    return _exact(tree, is_complex)


def _exact(tree: Any, is_complex: bool) -> Any:
    if isinstance(tree, sympy.MatrixBase):
        return tree.applyfunc(lambda element: _exact(element, is_complex))
    if isinstance(tree, sympy.Float):
        return sympy.Rational(str(tree))
    if isinstance(tree, sympy.UnevaluatedExpr):
        return _exact(tree.args[0], is_complex)
    if isinstance(tree, sympy.Symbol):
        constants = {"e": sympy.E, "i": sympy.I if is_complex else tree}
        return constants.get(tree.name, tree)
    arguments: Any = getattr(tree, "_unsorted_args", None) or getattr(tree, "args", ())
    exact = [_exact(argument, is_complex) for argument in arguments]
    if all(new is old for new, old in zip(exact, arguments)):
        return tree
    if isinstance(tree, sympy.Add | sympy.Mul | sympy.Pow | sympy.Rel | sympy.factorial):
        return tree.func(*exact, evaluate=False)
    return tree.func(*exact)


class Size(NamedTuple):
    """Upper bounds of what evaluating a tree makes, at variables below ten."""

    digits: float  # decimal digits that are written
    magnitude: float  # log10 of the absolute value

    @property
    def absolute(self) -> float:
        """Of the value itself."""
        return math.inf if self.magnitude > 15 else 10.0**self.magnitude


def size_of(tree: Any) -> Size:
    """The size of a tree's value, from the tree alone: nothing is evaluated."""
    if isinstance(tree, sympy.Rational):
        bits = tree.p.bit_length(), tree.q.bit_length()
        return Size(sum(bits) * _DIGITS_PER_BIT, (bits[0] - bits[1] + 1) * _DIGITS_PER_BIT)
    if isinstance(tree, sympy.MatrixBase):
        return Size(sum(size_of(element).digits for element in tree.flat()), 0)
    parts = [size_of(argument) for argument in getattr(tree, "args", ()) if isinstance(argument, sympy.Basic)]
    total = sum((part.digits for part in parts), 1.0)
    if total > MAX_DIGITS:
        return Size(math.inf, math.inf)
    largest = max((part.magnitude for part in parts), default=1.0)
    if isinstance(tree, sympy.Pow):
        base, exponent = parts
        rational = tree.exp.is_Rational
        times = abs(tree.exp.p) / tree.exp.q if rational and exponent.digits < 300 else exponent.absolute
        written = base.digits if rational else max(abs(base.magnitude), 1.0)
        return Size((written + 1) * times, max(abs(base.magnitude), 0.1) * times)
    if isinstance(tree, sympy.exp | sympy.sinh | sympy.cosh):
        return Size(parts[0].absolute, parts[0].absolute)
    if isinstance(tree, sympy.factorial | sympy.gamma | sympy.factorial2 | sympy.binomial):
        value = Size(total, largest).absolute * (largest + 1)
        return Size(value, value)
    if isinstance(tree, sympy.Sum | sympy.Product):
        terms = max((size_of(limit).absolute for bounds in tree.args[1:] for limit in bounds.args[1:]), default=1.0)
        return Size(parts[0].digits * terms, parts[0].magnitude * terms)
    if isinstance(tree, sympy.Mul):
        return Size(total, sum(max(part.magnitude, 0.0) for part in parts))
    return Size(total, largest + math.log10(len(parts) + 1))


def _is_small(tree: Any) -> bool:
    return size_of(tree).digits <= MAX_DIGITS


def same(gold: Any, answer: Any, digits: int) -> bool:
    """Whether two trees are equal. digits: to which one side is a decimal that rounds the other, 0 for exactly."""
    if not _is_small(gold) or not _is_small(answer):
        return bool(gold == answer)
    answer = _unwrapped(answer, keep=_is_relation(gold))
    if answer is None:
        return False
    if _is_assignment(gold) and not _is_relation(answer):
        gold = _last(gold).rhs
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        return _same_function(gold, answer, digits)
    if any(_is_relation(one) and isinstance(other, sympy.Expr) for one, other in ((gold, answer), (answer, gold))):
        return False
    if isinstance(gold, sympy.Interval) and isinstance(answer, sympy.Interval):
        same_ends = (gold.left_open, gold.right_open) == (answer.left_open, answer.right_open)
        return same_ends and same(gold.start, answer.start, digits) and same(gold.end, answer.end, digits)
    if isinstance(gold, sympy.Rel) and isinstance(answer, sympy.Rel) and _same_relation(gold, answer):
        return True
    return _verify(gold, answer)


def _is_relation(tree: Any) -> bool:
    return isinstance(tree, sympy.Rel | And)


def _parts(tree: Any) -> list[Any]:
    """The relations of a chain, a = b = c; a single one is its own."""
    return list(getattr(tree, "_unsorted_args", ())) or [tree]


def _last(tree: Any) -> Any:
    return _last(_parts(tree)[-1]) if hasattr(tree, "_unsorted_args") else tree


def _is_assignment(tree: Any) -> bool:
    """x = 5, f(x) = 5, AB = 5: the left side only names what the right side is."""
    first = _parts(tree)[0]
    is_equation = isinstance(first, sympy.Eq) and isinstance(_last(tree), sympy.Eq)
    return is_equation and _names(first.lhs) and not isinstance(first.lhs, sympy.Add)


def _names(tree: Any) -> bool:
    """Whether a left side only names a quantity (x, f(2), AB, |z|, a + b, x^2 + y^2), with no number in it to solve."""
    if isinstance(tree, sympy.Symbol | AppliedUndef):
        return True
    if isinstance(tree, sympy.Pow):
        return _names(tree.base) and tree.exp.is_Integer
    if isinstance(tree, sympy.Add | sympy.Mul | sympy.Abs | sympy.Tuple | sympy.Function):
        return all(_names(argument) for argument in tree.args)
    return False


def _unwrapped(answer: Any, *, keep: bool) -> Any | None:
    """The value of an answer that is an equation: its right side. A false equation of numbers is no answer: None."""
    if not _is_relation(answer):
        return answer
    parts = _parts(answer)
    for part in parts:
        if not isinstance(part, sympy.Rel) or not _compares(part) or part.lhs.free_symbols or part.rhs.free_symbols:
            continue
        if not (isinstance(part, sympy.Eq) and _is_small(part) and _same_function(part.lhs, part.rhs, 0)):
            return None
    if keep or not all(isinstance(part, sympy.Eq) for part in parts):
        return answer
    first = parts[0].lhs
    return parts[-1].rhs if _names(first) or not getattr(first, "free_symbols", True) else answer


def _compares(relation: Any) -> bool:
    """Whether both sides are expressions, rather than sets."""
    return isinstance(relation.lhs, sympy.Expr) and isinstance(relation.rhs, sympy.Expr)


def _same_relation(gold: Any, answer: Any) -> bool:
    """Both sides' differences are proportional: by any factor for equations, of the right sign for inequalities."""
    if not _compares(gold) or not _compares(answer):
        return False
    pairs = list(_at_points(gold.lhs - gold.rhs, answer.lhs - answer.rhs, 4))
    if any(first is None or second is None or second == 0 for first, second in pairs):
        return False
    ratios = [first / second for first, second in pairs]
    factor = ratios[0]
    if factor == 0 or any(abs(ratio - factor) > abs(factor) * 1e-30 for ratio in ratios):
        return False
    if isinstance(gold, sympy.Eq | sympy.Ne):
        return type(gold) is type(answer)
    return bool(factor.is_real) and type(answer) is type(gold if factor > 0 else gold.reversed)


def _same_function(gold: Any, answer: Any, digits: int) -> bool:
    """Equal at fixed points; constants at the only value they have."""
    is_constant = not gold.free_symbols | answer.free_symbols
    if is_constant:
        exact = _rational(gold), _rational(answer)
        if None not in exact and (exact[0] == exact[1] or not digits):
            return bool(exact[0] == exact[1])
    tolerance = 10.0 ** (-digits) * 5 if digits >= 6 else 1e-100
    compared = 0
    for first, second in _at_points(gold, answer, 1 if is_constant else len(_POINTS)):
        if first is None or second is None or not (is_constant or (first.is_real and second.is_real)):
            continue
        if abs(first - second) > max(abs(first), abs(second)) * tolerance:
            return False
        compared += 1
        if compared == 5:
            break
    return compared > 0 or bool(gold == answer) or _verify(gold, answer)


def _rational(tree: Any) -> Any | None:
    try:
        value = tree if isinstance(tree, sympy.Rational) else tree.doit()
    except Exception:  # a tree that sympy cannot evaluate has no exact value
        return None
    return value if isinstance(value, sympy.Rational) else None


def _at_points(gold: Any, answer: Any, count: int) -> Iterator[tuple[Any, Any]]:
    """The values of both at fixed points of their variables; None where there is none: at poles, ..."""
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    for shift in range(count):
        points = {
            symbol: sympy.Rational(_POINTS[(index * 3 + shift) % len(_POINTS)]) for index, symbol in enumerate(symbols)
        }
        yield _value(gold, points, shift), _value(answer, points, shift)


def _value(tree: Any, points: dict[Any, Any], shift: int) -> Any | None:
    try:
        if tree.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit):
            tree = tree.doit()
        functions = {  # f(x) and g(x) differ, and so do f(x) and f(y)
            function: sympy.Rational(zlib.crc32(f"{function}{shift}".encode()), 2**31)
            for function in tree.atoms(AppliedUndef)
        }
        value = tree.xreplace(points | functions).evalf(_PRECISION, maxn=4 * _PRECISION)
    except Exception:  # of sympy's many kinds
        return None
    return value if value.is_number and value.is_finite and value.is_comparable | value.has(sympy.I) else None


def _verify(gold: Any, answer: Any) -> bool:
    if max(_degree(gold), _degree(answer)) > _MAX_DEGREE or len(gold.free_symbols | answer.free_symbols) > _MAX_SYMBOLS:
        return False
    return bool(verify([gold], [answer], timeout_seconds=None, allow_set_relation_comp=True))


def _degree(tree: Any) -> float:
    """The largest exponent that stands over a variable: what expanding or solving would have to multiply out."""
    powers = [part for part in sympy.preorder_traversal(tree) if isinstance(part, sympy.Pow) and part.base.free_symbols]
    return max((abs(float(power.exp)) if power.exp.is_Rational else 1.0 for power in powers), default=1.0)
