"""Where an answer's text says it: in a box, after ####, after "the answer is", or as the last expression of its prose.

The text is cut into runs: maximal stretches of mathematics between words. Only what is not one run as a whole is
searched, and there a run counts whole: `2^10`, `[0,9)` or `C6H6` is never searched for a number inside it.
"""

import re
from typing import NamedTuple

from r1fast.rewards.answers import FUNCTIONS, NUMBER, bare, last_boxes, typeset

_WINDOW = 5_000  # characters that are read, from the end of prose: the cost of a hostile text is bounded
_LEAD = re.compile(
    r"\b(?:answer|option|choice|summary|result|réponse|respuesta|antwort)\b[*_\s]*(?:(?:is|est|es|ist)\b[*_\s]*:?|:|=)"
    r"|答案(?:应?该?(?:是|为)|：|:)|故选[:：]?|应选[:：]?",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"(?P<segment>\\\[.{1,1000}?\\\]|\\\(.{1,500}?\\\)|\$\$[^$]{1,1000}\$\$"
    r"|(?<![\\0-9])\$[^$\n]{1,500}(?<!\\)\$(?![0-9]))"
    rf"|(?P<number>{NUMBER}|[0-9]+,[0-9]+(?![0-9,]))"
    r"|(?P<text>\\text\s*\{[^{}]{0,200}\}(?:\s*\^\s*\{?[0-9]\}?)?)"
    r"|(?P<command>\\(?:begin|end)\{[a-zA-Z*]{1,20}\}(?:\{[lcr|]{1,20}\})?|\\[A-Za-z]+|\\[{}%$\\])"
    rf"|(?P<function>(?<![A-Za-z])(?:{FUNCTIONS}|lg|det|infinity|inf)(?![A-Za-z]))"
    r"|(?P<joint>(?<![A-Za-z])(?:and|or)(?![A-Za-z]))"
    r"|(?P<label>[A-Z]{2,4}(?=\s*[=|:/^+<>)}])|(?<=[|:/+=({])[A-Z]{2,4}(?![A-Za-z0-9])"
    r"|(?<![A-Za-z])[a-z]{2,4}(?=[+*^=])|(?<=[0-9+*=])[a-z]{2,4}(?![A-Za-z]))"
    r"|(?P<word>(?<![\w^_])[A-Za-zÀ-ɏ][0-9]\w*|(?:[A-Za-zÀ-ɏ]['’]?){2,}[0-9]*\w*(?:\s?\^\s?\{?-?[0-9]\}?)?)"
    r"|(?P<letter>[A-Za-z])"
    r"|(?P<operator>\*\*|[-+*/^_=<>()\[\]{}|!:'%&,;])"
    r"|(?P<space>[ \t]+)"
    r"|(?P<other>.)",
    re.DOTALL,
)
_UNIT_AFTER = re.compile(
    r"(?:mm|cm|dm|km|kg|mg|ml|mph|km/h|miles?|meters?|metres?|feet|inch(?:es)?|grams?|dollars?|cents?|degrees?|hours?"
    r"|minutes?|seconds?|days?|weeks?|months?|years?|lit(?:er|re)s?|pounds?|million|billion|thousand|trillion"
    r"|sq(?:uare)?|cubic|units?)(?:\^\{?[0-9]\}?)?",
)
_LEADING = re.compile(
    r"^(?:[\s=*/:,;!|&^_'%]|\\(?:times|cdot|approx|implies|Rightarrow|to|le|ge|ne)(?![A-Za-z])|(?:and|or)\b)+"
)
_SIGNS = r"[ \t\n=*/:,;&^_+<>-]"
_TRAILING = re.compile(rf"(?<!{_SIGNS})(?:{_SIGNS}|\\times|\\cdot|\\approx| and| or)+\Z")
_RANGE = re.compile(r"[0-9.]+-([0-9.]+)")


class Answer(NamedTuple):
    """What was answered: the text that holds it, and whether it was marked (by a box or ####) or has to be found."""

    text: str
    marked: bool


def answer_part(final: str) -> Answer | None:
    """The text that holds the answer, in one spelling; None for a box that never closes.

    Boxes that end the text as a list are joined by `;`. Of `#### 42` only the rest of its line counts: what follows
    on later lines is comment.
    """
    boxes = last_boxes(final)
    if boxes is None:
        return None
    if boxes:
        text = "; ".join(boxes)
        text = text if len(text) <= _WINDOW else ""
    elif "####" in final:
        text = final.rpartition("####")[2].lstrip().partition("\n")[0][:_WINDOW]
    else:
        return Answer(bare(typeset(_without_markdown(final[-_WINDOW:]))), False)
    return Answer(bare(typeset(text)), True)


def _without_markdown(text: str) -> str:
    """Without **bold** and headings; ** between two operands is a power."""
    text = re.sub(r"(?<![A-Za-z0-9)}\s])\*\*(?=\S)|(?:(?<=\s)|^)\*\*(?=\S)", "", text)
    text = re.sub(r"(?<=\S)\*\*(?![A-Za-z0-9({\\-])", "", text)
    return re.sub(r"^#{1,3} +|(?<![\w`])`|`(?![\w`])|^[ \t]*[-*] +(?=\D)", "", text, flags=re.MULTILINE)


def after_lead(text: str) -> str | None:
    """What follows the last "the answer is"; None without one."""
    leads = list(_LEAD.finditer(text))
    return text[leads[-1].end() :] if leads else None


def expressions(text: str) -> list[str]:
    """The runs of mathematics of a text, in order; a text that is one expression gives itself alone."""
    runs: list[str] = []
    pieces: list[tuple[str, str]] = []  # (kind, token) of the run that grows

    def flush() -> None:
        if pieces:
            runs.extend(_tidied(pieces))
            pieces.clear()

    previous, depth = "space", 0
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup or "other", match[0]
        # Two numbers with a space between are no product.
        after_number = [piece[0] for piece in pieces[-2:]] == ["number", "space"]
        if kind == "operator":
            depth += (token in "([{") - (token in ")]}")
            if token == "-" and previous == "word":  # plan-9: a dash
                continue
        if kind == "segment":
            flush()
            inner = bare(token)
            runs.extend([inner] if is_expression(inner) else expressions(inner) if inner != token else [])
        elif kind in ("word", "other"):
            if (after_number or (pieces and pieces[-1][0] == "number")) and _UNIT_AFTER.fullmatch(token):
                pieces.append((kind, token))
            flush()
            depth = 0
        elif kind not in ("text", "space") or pieces:
            if kind == "number" and after_number and depth <= 0 and not _is_fraction_part(match, pieces):
                flush()
            pieces.append((kind, token))
        previous = kind
    flush()
    return runs


def _is_fraction_part(match: re.Match[str], pieces: list[tuple[str, str]]) -> bool:
    """3 1/2 and 1 000: the second number belongs to the first."""
    whole = pieces[-2][1]
    if len(match[0]) == 3 and match[0].isdigit() and len(whole) <= 3 and whole.isdigit():
        return True
    ends_fraction = len(pieces) > 2 and pieces[-3][1] == "/"
    return match.string.startswith("/", match.end()) and not re.search("[./]", whole) and not ends_fraction


def _tidied(pieces: list[tuple[str, str]]) -> list[str]:
    """The run without operators at its ends, unmatched brackets, and letters that stand alone at an end."""
    while [kind for kind, _ in pieces[:3]] in (["letter", "space", "number"], ["letter", "space", "letter"]):
        pieces = pieces[2:]
    text = _matched(_LEADING.sub("", "".join(token for _, token in pieces)))
    text = _TRAILING.sub("", _LEADING.sub("", text))
    text = re.sub(r"^-\s+(?=[0-9])", "", text.strip())  # a dash; a minus stands at its number
    if match := _RANGE.fullmatch(text):
        return [match[1]]  # 7-3 in prose: a score, a range, pages
    return [text] if re.search(r"[0-9A-Za-z]", text) else []


def _matched(text: str) -> str:
    """Without the brackets that close or open nothing."""
    unmatched: list[int] = []  # those that close, then those that open
    for index, char in enumerate(text):
        if char in ")]}" and unmatched and text[unmatched[-1]] in "([{":
            unmatched.pop()
        elif char in "([{)]}":
            unmatched.append(index)
    drop = set(unmatched)
    return "".join(char for index, char in enumerate(text) if index not in drop)


def is_expression(text: str) -> bool:
    """Whether the text is mathematics as a whole, with no prose around it."""
    if len(text) > 2000:
        return False
    tokens = [(match.lastgroup, match[0]) for match in _TOKEN.finditer(text)]
    kinds = {kind for kind, _ in tokens}
    if "segment" in kinds:
        rest = "".join(token for kind, token in tokens if kind != "segment")
        return not re.sub(r"[\s,;.]|\b(?:and|or)\b|%", "", rest)
    return not kinds & {"word", "other"} and not kinds <= {"operator", "space", "joint"}
