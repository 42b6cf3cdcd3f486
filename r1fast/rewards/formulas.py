"""Formulas: LaTeX to sympy by math-verify's parser, and whether two of them are the same.

The parser evaluates nothing, so the size of what an evaluation would make is computed from the tree before anything is
evaluated (`evaluation.py`): a formula that would need more than MAX_DIGITS digits is not evaluated at all. There is no
list of dangerous shapes; what is still slow is for the worker pool's time limit.

Numbers are equal if they are equal: decimals are read as exact fractions, irrational values are compared to 100 digits
relative to their size. Formulas with variables are compared as functions, by their values at fixed points, which
neither expands nor simplifies anything. Sets and relations that are not the same part by part go to math-verify.
"""

import logging
import re
import zlib
from functools import lru_cache
from typing import Any

from r1fast.rewards.evaluation import MAX_DIGITS, size_of

_MAX_CHARS = 500  # the parser takes seconds for more
MAX_DEPTH = 16  # the parser's time grows steeply with nested brackets
_MAX_DEGREE = 200  # expanding or solving beyond it does not end
_MAX_SYMBOLS = 6
_PRECISION = 120
_POINTS = (0.7302, -1.3519, 2.1847, -0.4151, 3.3391, 0.1173, -2.7723, 1.6053)
_FUNCTION = re.compile(
    r"(?<![A-Za-z\\])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|min|max|gcd|lcm)(?![A-Za-z])"
)
_COMPLEX = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])|\\(?:Re|Im|arg|imath)(?![A-Za-z])")


def same_formula(gold: str, answer: str, *, digits: int | None = None) -> bool:
    """Whether two formulas are equal; spellings that cannot be read are equal only if they are the same text."""
    gold_tree, answer_tree = parse(gold), parse(answer)
    if gold_tree is None or answer_tree is None:
        return squeezed(gold) == squeezed(answer)
    if digits is None:
        digits = max(literal_digits(gold), literal_digits(answer))
    return _same(gold_tree, answer_tree, digits)


def is_readable(text: str) -> bool:
    """Whether a formula parses, or is at least complete: brackets closed, and something between them."""
    if parse(text) is not None:
        return True
    opened = [match[0] for match in re.finditer(r"(?<!\\)[{}]", text)]
    depth = 0
    for bracket in opened:
        depth += 1 if bracket == "{" else -1
        if depth < 0:
            return False
    return depth == 0 and bool(re.search(r"\w", re.sub(r"\\(?![lc]?dots)[A-Za-z]+", "", text)))


def squeezed(text: str) -> str:
    """The text without spaces and markup that mean nothing; 3 1/2, \\frac{1}{23} and 2^{n-1} keep theirs."""
    text = re.sub(r"\\(?:text|mathrm)\s*\{([^{}]*)\}|\$", r"\1", text)
    text = re.sub(r"(?<![0-9,])\s+|\s+(?![0-9])", "", text)
    return re.sub(r"\{([0-9A-Za-z])\}(?![0-9])", r"\1", text)


@lru_cache(maxsize=4096)  # the G samples of a prompt share their gold, and often their answers
def parse(text: str) -> Any | None:
    """The sympy tree of a formula, decimals as exact fractions, nothing evaluated; None if it is none."""
    if len(text) > _MAX_CHARS:
        return None
    latex = _latex(text)
    if nesting(latex) > MAX_DEPTH or not re.search(r"[0-9A-Za-z]", latex):
        return None
    # two numbers with a space between are no product; what dots stand for is open; the parser drops primes and bases
    if re.search(r"[0-9]\s+[0-9]|\\[lcvd]?dots(?![a-z])|\.\.|'|\\prime|(?<![\^{A-Za-z0-9])[0-9]+\s*_", latex):
        return None
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    # math-verify warns at every start that its own time limits are off, which is what the pool wants.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
    )
    is_complex = bool(_COMPLEX.search(latex))
    trigonometric = re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", latex)
    try:
        tree = latex2sympy(
            normalize_latex(latex, config),
            is_real=not is_complex,
            convert_degrees=bool(trigonometric),
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
        return _exact(tree, is_complex)
    except Exception:  # the parser and sympy's constructors raise a dozen kinds, among them Exception itself
        return None


def _latex(text: str) -> str:
    """What is written as in a programming language, as LaTeX: 7*y**2 - sqrt(3) is 7 \\cdot y^{2} - \\sqrt{3}."""
    text = text.replace("**", "^")
    text = _FUNCTION.sub(r"\\\1", text)
    text = re.sub(r"\\(sin|cos|tan|cot|sec|csc)\s*\^\s*\{?\s*-1\s*\}?", r"\\arc\1 ", text)
    chain = re.split(r"(>|\\ge(?![A-Za-z]))", text)
    if len(chain) == 5:  # 3 > x > 1
        text = " ".join(reversed(chain)).replace(">", "<").replace("\\ge", "\\le ")
    text = re.sub(
        r"(?<![A-Za-z\\])(pi|infty|infinity)(?![A-Za-z])", lambda m: "\\infty" if m[1] != "pi" else "\\pi", text
    )
    text = re.sub(r"(\^|\\sqrt(?:\[[^\[\]]*\])?)\s*(?=\()", r"\1", text)
    text = _braced(text)
    text = re.sub(r"_([0-9]+)(?![0-9])", r"_{\1}", text)
    text = re.sub(r"\^\s*([+-]?[0-9]{2,}|-[0-9A-Za-z])", r"^{\1}", text)
    text = re.sub(r"(\^(?:\{[^{}]*\}|[0-9]))\s+(?=[0-9])", r"\1 \\cdot ", text)
    text = re.sub(r"\{?([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}?", r"\\binom{\1}{\2}", text)
    text = re.sub(r"(?<=[0-9])\s*x\s*(?=10\^)", r"\\times ", text)
    text = re.sub(r"\\[dt]?binom\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\\frac{(\1)!}{(\2)!(\1-(\2))!}", text)
    text = text.replace("*", "\\cdot ").replace("%", "\\%").replace("\\\\%", "\\%")
    return text.strip()


def _braced(text: str) -> str:
    """^(..) and \\sqrt(..) with braces in place of their brackets, by matching them."""
    out: list[str] = []
    stack: list[bool] = []
    for index, char in enumerate(text):
        if char == "(":
            special = text[:index].endswith("^") or bool(
                re.search(r"\\sqrt(?:\[[^\[\]]{0,9}\])?$", text[max(0, index - 16) : index])
            )
            stack.append(special)
            out.append("{" if special else char)
        elif char == ")" and stack:
            out.append("}" if stack.pop() else char)
        else:
            out.append(char)
    return "".join(out) if not any(stack) else text


def nesting(text: str) -> int:
    """How deep the brackets nest."""
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


def literal_digits(text: str) -> int:
    """Significant digits of the longest decimal with at least six places: how precisely a text gives its value."""
    found = re.findall(r"([0-9]*)\.([0-9]{6,})", text)
    return max((len((whole + places).lstrip("0")) for whole, places in found), default=0)


def _exact(tree: Any, is_complex: bool) -> Any:
    import sympy

    if isinstance(tree, sympy.MatrixBase):
        return tree.applyfunc(lambda element: _exact(element, is_complex))
    if isinstance(tree, sympy.Float):
        return sympy.Rational(str(tree))
    if isinstance(tree, sympy.UnevaluatedExpr):
        return _exact(tree.args[0], is_complex)
    if isinstance(tree, sympy.Symbol):
        if tree.name == "e":
            return sympy.E
        return sympy.I if is_complex and tree.name == "i" else tree
    if not getattr(tree, "args", ()):
        return tree
    arguments = getattr(tree, "_unsorted_args", None) or tree.args
    exact = [_exact(argument, is_complex) for argument in arguments]
    if all(new is old for new, old in zip(exact, arguments)):
        return tree
    if isinstance(tree, sympy.Add | sympy.Mul | sympy.Pow | sympy.Rel):
        return tree.func(*exact, evaluate=False)
    if isinstance(tree, sympy.factorial):
        return sympy.factorial(*exact, evaluate=False)
    return tree.func(*exact)


def _is_small(tree: Any) -> bool:
    return size_of(tree).digits <= MAX_DIGITS


def _degree(tree: Any) -> float:
    """The largest exponent that stands over a variable: what expanding or solving would have to multiply out."""
    import sympy

    powers = [
        part.exp for part in sympy.preorder_traversal(tree) if isinstance(part, sympy.Pow) and part.base.free_symbols
    ]
    return max((abs(float(power)) if power.is_Rational else 1.0 for power in powers), default=1.0)


def _same(gold: Any, answer: Any, digits: int) -> bool:
    import sympy

    if not _is_small(gold) or not _is_small(answer):
        return bool(gold == answer)
    answer = _unwrapped(answer, keep=_is_relation(gold))
    if answer is None:
        return False
    if _is_assignment(gold) and not _is_relation(answer):
        gold = _last(gold).rhs
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        return _same_function(gold, answer, digits)
    if (_is_relation(gold) and isinstance(answer, sympy.Expr)) or (
        _is_relation(answer) and isinstance(gold, sympy.Expr)
    ):
        return False
    if isinstance(gold, sympy.Interval) and isinstance(answer, sympy.Interval):
        return (
            (gold.left_open, gold.right_open) == (answer.left_open, answer.right_open)
            and _same(gold.start, answer.start, digits)
            and _same(gold.end, answer.end, digits)
        )
    if isinstance(gold, sympy.Rel) and isinstance(answer, sympy.Rel) and _same_relation(gold, answer):
        return True
    return _verify(gold, answer)


def _is_relation(tree: Any) -> bool:
    import sympy
    from latex2sympy2_extended.logic import And

    return isinstance(tree, sympy.Rel | And)


def _last(tree: Any) -> Any:
    return _last(tree._unsorted_args[-1]) if hasattr(tree, "_unsorted_args") else tree


def _is_assignment(tree: Any) -> bool:
    """x = 5, f(x) = 5, AB = 5: the left side only names what the right side is."""
    import sympy

    first = tree._unsorted_args[0] if hasattr(tree, "_unsorted_args") and tree._unsorted_args else tree
    if not isinstance(first, sympy.Eq) or not isinstance(_last(tree), sympy.Eq):
        return False
    return _names(first.lhs) and not isinstance(first.lhs, sympy.Add)


def _names(tree: Any) -> bool:
    """Whether a left side only names a quantity (x, f(2), AB, |z|, a + b, x^2 + y^2), with no number in it to solve."""
    import sympy
    from sympy.core.function import AppliedUndef

    if isinstance(tree, sympy.Symbol | AppliedUndef):
        return True
    if isinstance(tree, sympy.Pow):
        return _names(tree.base) and tree.exp.is_Integer
    if isinstance(tree, sympy.Add | sympy.Mul | sympy.Abs | sympy.Tuple | sympy.Function):
        return all(_names(argument) for argument in tree.args)
    return False


def _unwrapped(answer: Any, *, keep: bool) -> Any | None:
    """The value of an answer that is an equation: its right side. A false equation of numbers is no answer: None."""
    import sympy

    if not isinstance(answer, sympy.Rel) and not _is_relation(answer):
        return answer
    parts = list(getattr(answer, "_unsorted_args", ())) or [answer]
    for part in parts:
        if isinstance(part, sympy.Rel) and isinstance(part.lhs, sympy.Expr) and isinstance(part.rhs, sympy.Expr):
            constant = not (part.lhs.free_symbols or part.rhs.free_symbols)
            if constant and not (
                isinstance(part, sympy.Eq) and _is_small(part) and _same_function(part.lhs, part.rhs, 0)
            ):
                return None
    if keep or not all(isinstance(part, sympy.Eq) for part in parts):
        return answer
    first = parts[0].lhs
    return parts[-1].rhs if _names(first) or not getattr(first, "free_symbols", True) else answer


def _same_relation(gold: Any, answer: Any) -> bool:
    """Both sides' differences are proportional: by any factor for equations, of the right sign for inequalities."""
    import sympy

    if not all(isinstance(side, sympy.Expr) for side in (gold.lhs, gold.rhs, answer.lhs, answer.rhs)):
        return False
    flipped = {sympy.Gt: sympy.Lt, sympy.Lt: sympy.Gt, sympy.Ge: sympy.Le, sympy.Le: sympy.Ge}
    ratios: list[Any] = []
    gold_side, answer_side = gold.lhs - gold.rhs, answer.lhs - answer.rhs
    symbols = sorted(gold_side.free_symbols | answer_side.free_symbols, key=str)
    for shift in range(4):
        numerator, denominator = _value(gold_side, symbols, shift), _value(answer_side, symbols, shift)
        if numerator is None or denominator is None or denominator == 0:
            return False
        ratios.append(numerator / denominator)
    first = ratios[0]
    if first == 0 or any(abs(ratio - first) > abs(first) * 1e-30 for ratio in ratios):
        return False
    if isinstance(gold, sympy.Eq | sympy.Ne):
        return type(gold) is type(answer)
    if not first.is_real:
        return False
    return type(answer) is (type(gold) if first > 0 else flipped[type(gold)])


def _same_function(gold: Any, answer: Any, digits: int) -> bool:
    """Equal at fixed points; constants at the only value they have. digits > 0: one side is a decimal rounded there."""
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if not symbols:
        exact = _rational(gold), _rational(answer)
        if exact[0] is not None and exact[1] is not None and exact[0] == exact[1]:
            return True
        if exact[0] is not None and exact[1] is not None and not digits:
            return False
    compared = 0
    for shift in range(len(_POINTS) if symbols else 1):
        first, second = _value(gold, symbols, shift), _value(answer, symbols, shift)
        if first is None or second is None:
            continue
        if not symbols or (first.is_real and second.is_real):
            scale = max(abs(first), abs(second))
            tolerance = 10.0 ** (-digits) * 5 if digits >= 6 else 1e-100
            if abs(first - second) > scale * tolerance:
                return False
            compared += 1
        if compared == 5:
            break
    if compared:
        return True
    return bool(gold == answer) or _verify(gold, answer)


def _rational(tree: Any) -> Any | None:
    import sympy

    if isinstance(tree, sympy.Rational):
        return tree
    try:
        value = tree.doit()
    except Exception:  # a tree that sympy cannot evaluate has no exact value
        return None
    return value if isinstance(value, sympy.Rational) else None


def _value(tree: Any, symbols: list[Any], shift: int) -> Any | None:
    import sympy
    from sympy.core.function import AppliedUndef

    if tree.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit):
        try:
            tree = tree.doit()
        except Exception:  # no closed form: left to math-verify
            return None
    points = {
        symbol: sympy.Rational(str(_POINTS[(index * 3 + shift) % len(_POINTS)])) for index, symbol in enumerate(symbols)
    }
    points |= {  # f(x) and g(x) differ, and so do f(x) and f(y)
        function: sympy.Rational(zlib.crc32(f"{function}{shift}".encode()), 2**31)
        for function in tree.atoms(AppliedUndef)
    }
    try:
        value = tree.xreplace(points).evalf(_PRECISION, maxn=4 * _PRECISION)
    except Exception:  # poles, overflow, functions that mpmath does not know
        return None
    return value if value.is_number and value.is_finite and value.is_comparable | value.has(sympy.I) else None


def _verify(gold: Any, answer: Any) -> bool:
    from math_verify import verify

    if max(_degree(gold), _degree(answer)) > _MAX_DEGREE or len(gold.free_symbols | answer.free_symbols) > _MAX_SYMBOLS:
        return False
    return bool(verify([gold], [answer], timeout_seconds=None, allow_set_relation_comp=True))
