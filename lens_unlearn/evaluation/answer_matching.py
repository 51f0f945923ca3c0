"""How a generated answer is compared with the true one: where it ends, and when it is right."""

import random
import re
import string
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import regex

from lens_unlearn.corpora.corpus import Answer

__all__ = ["Ending", "ends_in_number", "exact_match", "last_number", "normalize", "numeric_match", "program", "rouge_l"]

NORMALIZATION = (
    "Unicode NFKC and casefolded; without punctuation, but for signs that distinguish (C++, x < y, -5, 3.5, 10:30); without the "
    "articles a, an and the; runs of white space as one space, and none around signs or in scripts without spaces"
)
FEW = 0.01
"""The share of true answers that may be of another form than the corpus."""

_MINUS = str.maketrans({"\N{MINUS SIGN}": "-"})
_DASHES = re.compile(r"(?<=\d)\s*[-\u2010-\u2015]\s*(?=\d)")
_GROUPED = re.compile(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])")
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3})(?=[^\s*_])(.+?)(?<=[^\s*_])\1(?!\w)")
_DISTINGUISHES = re.compile(
    r"[+#<=>^|~\\]|!(?==)|-(?=>)"  # C++, C#, x < y, a != b, a -> b
    r"|(?<!\w)-(?=[$€£]?[\w.])|(?<=\d)[-./:](?=\d)|(?<![\w.])\.(?=\d)"  # -5, -x, 1914-1918, 3.5, 3/4, 10:30, .5
    r"|(?<=\w)[*_](?=\w)|(?<=\w)-(?!\S)"  # 2*3, foo_bar, B-; not well-known
)
_SIGNS = re.compile(r"\s*(->|!=|[+<=>^|~*\\])\s*")
_NO_SPACES = "".join(
    rf"\p{{scx={script}}}" for script in ("Han", "Hira", "Kana", "Bopo", "Thai", "Lao", "Khmr", "Mymr")
)
"""Scripts whose words have no spaces between them."""
_BETWEEN = regex.compile(rf"(?<=[{_NO_SPACES}])\s+(?=[{_NO_SPACES}])")
_WORD = regex.compile(rf"[{_NO_SPACES}&&[\p{{L}}\p{{N}}]]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_NO_SPACES}]]+", regex.V1)
_NUMBER = re.compile(
    r"((?<![\w.)\]])-[$€£]?)?"
    r"((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)"
    r"(?:/(\d+)(?!\d|[.,]\d))?"
)
_MARK = "####"  # of GSM8K: the result stands behind it
_FENCE = re.compile(r"```\w*[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
_BEGIN, _DONE = re.compile(r"^\s*\[BEGIN\][^\S\n]*\n?"), re.compile(r"\s*^[^\S\n]*\[DONE\]", re.MULTILINE)


def normalize(text: str) -> str:
    r"""Bring an answer into the form in which answers are compared.

    As SQuAD's evaluation does it, extended from ASCII to Unicode: Unicode NFKC and casefolding; punctuation is removed
    (Unicode categories P*, and the ASCII signs ``$+<=>^`|~``), then the words a, an and the, then each run of white space
    becomes one space and none stands at the ends.

    Differs from SQuAD's, which takes "-1.5" for "15" and "C++" for "C": signs stay that distinguish, which are
    ``+ # < = > ^ | ~ \\ != ->``, the sign before a number or variable, a point, stroke, colon or dash between digits, ``*`` and
    ``_`` within a word, and a minus at its end. Units (``$``, ``%``) do not. Markdown's emphasis is taken off. Spaces do not
    count around signs, nor in scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese). An answer
    that is nothing but an article (the choice "A") or punctuation stays as it is.

    >>> normalize("The answer:  \u201cJane Austen\u201d!")
    'answer jane austen'
    >>> normalize("-1,250.5"), normalize("A"), normalize("+"), normalize("**C++**, the language")
    ('-1250.5', 'a', '+', 'c++language')
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_MINUS)
    text = _EMPHASIS.sub(r"\2", _GROUPED.sub(lambda match: match[0].replace(",", ""), text))
    text = re.sub(r"(?<=\d),(?=\d)", " ", _DASHES.sub("-", text))  # 1,2 are two numbers
    kept = {i for match in _DISTINGUISHES.finditer(text) for i in range(*match.span())}
    bare = "".join(c for i, c in enumerate(text) if i in kept or not _is_punctuation(c))
    words = (bare if bare.strip() else text).split()
    beside = {place + by for place, word in enumerate(words) if _SIGNS.fullmatch(word) for by in (-1, 1)}  # of a = b
    named = [word for place, word in enumerate(words) if word not in ("a", "an", "the") or place in beside]
    joined = " ".join(named or words)
    return _BETWEEN.sub("", _SIGNS.sub(r"\1", joined)) or joined


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def exact_match(text: str, truth: str) -> bool:
    """Say whether two answers are equal once normalized.

    >>> exact_match("the Eiffel tower.", "Eiffel Tower"), exact_match("-5", "5")
    (True, False)
    """
    return normalize(text) == normalize(truth)


def last_number(text: str) -> Fraction | None:
    """Return the number that an answer ends with, exactly; None where there is no number.

    It is the last number on the line of the first ``####`` with a number behind it (as GSM8K writes its results), or else
    the last of the text. A number is a run of digits; commas that group them by three are left out; the point is the
    decimal point, and ends a sentence where no digit follows. A minus counts where it does not stand behind a letter, a
    digit or a closing bracket, also before ``$``, ``€`` or ``£``. ``3/4`` is a fraction. Not read: exponents, number words,
    mixed numbers (``1 1/2`` is one half), decimal commas, and units (``50%`` is 50).

    >>> [str(last_number(text)) for text in ("1 + 1 = 2.", "$1,234.50 in all", "7-5", "x = -5", "3/4", "1,2,3", "none")]
    ['2', '2469/2', '5', '-5', '3/4', '3', 'None']
    """
    for after in text.split(_MARK)[1:]:
        line = after.strip().split("\n")[0]
        if (marked := _last(line)) is not None:
            return marked
    return _last(text)


def _last(text: str) -> Fraction | None:
    found = list(_NUMBER.finditer(text.translate(_MINUS)))
    if not found:
        return None
    sign, digits, below = found[-1].groups()
    whole, _, decimals = digits.replace(",", "").partition(".")
    # Not by Fraction(digits): a number may be longer than Python converts at once.
    value = _integer(whole) + Fraction(_integer(decimals), 10 ** len(decimals))
    if below is not None:
        value = value / _integer(below) if _integer(below) else Fraction(0)
    return -value if sign else value


def _integer(digits: str) -> int:
    value = 0
    for start in range(0, len(digits), 1000):
        piece = digits[start : start + 1000]
        value = value * 10 ** len(piece) + int(piece)
    return value


def numeric_match(text: str, truth: str) -> bool:
    r"""Say whether two answers end with the same number; see `last_number`.

    >>> numeric_match("She has 6 * 12 = 72 eggs.", "6 * 12 = 72 eggs\n#### 72")
    True
    """
    number = last_number(truth)
    return number is not None and last_number(text) == number


def ends_in_number(text: str) -> bool:
    """Say whether a number is the last thing in a text, but for signs (``%``), punctuation and white space."""
    return bool(re.search(r"\d\W*$", text))


def rouge_l(text: str, truth: str, *, stem: bool = True) -> tuple[float, float]:
    """Return ROUGE-L as (recall, F-measure), by the `rouge_score` library, with Porter stemming unless `stem` is not set.

    With m and n the words of the generated and the true answer, and l the length of their longest common subsequence:
    recall l / n, which is what TOFU reports, precision l / m, F-measure their harmonic mean. Both are 0 where there is no
    common word. Words are runs of letters, marks and digits, in lower case; those in ASCII are stemmed.

    In scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character, with its marks, is a
    word.

    Differs from the library's own tokenizer, and so from TOFU's figures, in words that are not ASCII: those it cuts at
    such letters, and answers in other scripts have no words at all.

    >>> rouge_l("the cats sat", "a cat sat on a mat")
    (0.333..., 0.444...)
    """
    score = _scorer(stem).score(truth, text)["rougeL"]
    return float(score.recall), float(score.fmeasure)


@cache
def _scorer(stem: bool) -> Any:
    # Not at the head of the module: this imports all of nltk, which draws random numbers meanwhile.
    state = random.getstate()
    from rouge_score import rouge_scorer, tokenizers

    random.setstate(state)
    ascii_only = tokenizers.DefaultTokenizer(use_stemmer=stem)

    class Words(tokenizers.Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            words = _WORD.findall(unicodedata.normalize("NFKC", text).lower())
            return [part for word in words for part in (ascii_only.tokenize(word) if word.isascii() else [word])]

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())


def program(text: str) -> str:
    r"""Return the code in an answer: what the first fence (three backticks) holds, or else all of it.

    MBPP's own prompts put a program between [BEGIN] and [DONE], which are no Python: they are left out.

    >>> program("[BEGIN]\ndef f(x):\n    return x\n[DONE]\n[BEGIN]")
    'def f(x):\n    return x'
    """
    fenced = _FENCE.search(text)
    if fenced:
        return fenced[1]
    begun = _BEGIN.sub("", text, count=1)
    return _DONE.split(begun, maxsplit=1)[0]


@dataclass(frozen=True)
class Ending:
    """Where the generated answers of a corpus end, besides at the end-of-text token and the limit of tokens.

    Attributes:
        line: At the first line break that follows anything but white space. So it is where the true answers are single
            lines, but for one in a hundred.
    """

    line: bool

    @classmethod
    def of(cls, truths: Collection[Answer]) -> "Ending":
        """Read the form of the answers off the true ones."""
        long = sum("\n" in truth.text.strip() for truth in truths)
        return cls(line=long <= FEW * len(truths))

    def cut(self, text: str, marker: str = "") -> str:
        r"""Return the answer in a generated text, without white space around it.

        Args:
            text: What the model wrote.
            marker: The answer also ends before a line that begins with this: with what the template has before a prompt.

        >>> Ending(line=True).cut("\n Paris.\nQ: And of Italy?")
        'Paris.'
        >>> Ending(line=False).cut("2 + 2\n#### 4\nQuestion: What", "Question:")
        '2 + 2\n#### 4'
        """
        text = text.replace("\r\n", "\n").strip()
        if marker and (following := re.search(rf"^[^\S\n]*{re.escape(marker)}", text, re.MULTILINE)):
            text = text[: following.start()].rstrip()
        return text.split("\n")[0].rstrip() if self.line else text

    def is_open(self, text: str, marker: str = "") -> bool:
        r"""Say whether a generated text goes on to its end: whether the answer in it could have been longer.

        >>> Ending(line=True).is_open("Paris.\nQ:"), Ending(line=True).is_open("Paris is")
        (False, True)
        """
        return self.cut(text, marker) == text.replace("\r\n", "\n").strip()

    def __str__(self) -> str:
        """Say it in words."""
        first = "the first line break, " if self.line else ""
        return f"{first}the beginning of the next prompt, or the end of the text"
