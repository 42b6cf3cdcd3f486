"""What rows have in common: runs of words with the prompts of a test, and rows that nearly repeat an earlier one.

Words are compared: letters and digits in lower case (NFKC, without accents) and the signs of arithmetic between them,
so that 2+3 is not 2-3; no other signs. A character of Chinese or Japanese is a word. What is found is a function of the
texts and their order alone.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence, Set
from fractions import Fraction
from itertools import islice
from math import ceil

SHINGLE = 5  # words; the Jaccard similarity of two texts is that of their sets of shingles
MOST_LISTED, MOST_COMPARED = 200, 20  # earlier texts that one is compared with
BOILERPLATE = 10  # different test prompts that may have an n-gram in common before it says nothing about them
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_BEFORE, _AFTER = r"(?:(?<=[\d)])|(?<=[\d)] )|(?<=\b[^\W\d_])|(?<=\b[^\W\d_] ))", r"(?= ?[-(\d]| ?[^\W\d_]\b)"
_SIGN = rf"{_BEFORE}[-+*/=<>]+{_AFTER}|(?<![^\s(=+*/<>,])-(?=\d)"
_SPELLED = str.maketrans("−–×÷", "--*/")
_VOICED = "\u3099\u309a"  # か and が are two letters
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+|{_SIGN}")


def words_of(text: str) -> list[str]:
    """A text without any is its only word."""
    plain = unicodedata.normalize("NFKC", text)
    if not plain.isascii():  # marks are no letters for re, and would part the words of Hindi or Thai
        decomposed = unicodedata.normalize("NFD", plain)
        marks = {ord(char) for char in {*decomposed} - {*_VOICED} if unicodedata.category(char).startswith("M")}
        plain = unicodedata.normalize("NFC", decomposed.translate(dict.fromkeys(marks))).translate(_SPELLED)
    words = _WORD.findall(plain.lower())
    return words or text.split()


def ngrams(words: Sequence[str], n: int) -> Iterator[str]:
    """Of fewer than n words all of them are one."""
    for start in range(max(1, len(words) - n + 1)):
        yield " ".join(words[start : start + n])


def contaminated(texts: Sequence[str], known: Sequence[str], n: int) -> dict[int, str]:
    """index -> the n-gram that this text has in common with one of `known`.

    What more than BOILERPLATE different ones of these have is an instruction around them: its words count for nothing.
    A text of fewer than n other words has to be the same as a whole (of GPT-3's rule, arXiv 2005.14165, appendix C).
    """
    tests = dict.fromkeys(tuple(words_of(text)) for text in known)
    counts = Counter(ngram for words in tests for ngram in set(ngrams(words, n)))
    common = {ngram for ngram, count in counts.items() if count > BOILERPLATE}
    tested = {ngram for words in tests for ngram in ngrams(_without(common, words, n), n)} - {""}
    found: dict[int, str] = {}
    for index, text in enumerate(texts):
        hit = next((ngram for ngram in ngrams(_without(common, words_of(text), n), n) if ngram in tested), None)
        if hit is not None:
            found[index] = hit
    return found


def _without(common: Set[str], words: Sequence[str], n: int) -> Sequence[str]:
    """Without the words of these n-grams."""
    dropped = {
        place
        for start, ngram in enumerate(ngrams(words, n) if common else ())
        if ngram in common
        for place in range(start, start + n)
    }
    return [word for place, word in enumerate(words) if place not in dropped] if dropped else words


def near_duplicates(texts: Sequence[str], threshold: float) -> dict[int, int]:
    """index -> an earlier text, which stays, that is as similar as threshold or more.

    Two sets of which one has k elements share one of the k - ceil(threshold k) + 1 rarest, or are less similar (prefix
    filtering; Bayardo, Ma, Srikant 2007): only texts that do are compared, those that share most first. Rows made from
    one pattern are compared with MOST_COMPARED, so that time is linear in the rows whatever they hold.
    """
    share = Fraction(str(threshold))
    numbers: dict[str, int] = {}  # of shingles
    sets = [
        frozenset(numbers.setdefault(shingle, len(numbers)) for shingle in ngrams(words_of(text), SHINGLE))
        for text in texts
    ]
    counts = Counter(shingle for shingles in sets for shingle in shingles)
    staying: dict[int, list[int]] = defaultdict(list)  # by one of their rarest shingles
    found: dict[int, int] = {}
    for index, shingles in enumerate(sets):
        rarest = sorted(shingles, key=lambda shingle: (counts[shingle], shingle))
        rarest = rarest[: len(shingles) - ceil(share * len(shingles)) + 1]
        others = Counter(islice((other for shingle in rarest for other in staying.get(shingle, ())), MOST_LISTED))
        for other, _ in others.most_common(MOST_COMPARED):
            common = len(shingles & sets[other])
            if common * share.denominator >= share.numerator * (len(shingles) + len(sets[other]) - common):
                found[index] = other
                break
        else:
            for shingle in rarest:
                staying[shingle].append(index)
    return found
