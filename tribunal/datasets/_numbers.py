"""Numbers as people and models write them: commas, currency, LaTeX, fractions, percent, trailing units.

Values are exact fractions (built from decimals), so 18.00 equals 18 and 3/4 equals 0.75, and 0.333 does not equal 1/3.
"""

from __future__ import annotations

import re
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import NamedTuple

LONGEST_NUMBER = 200  # characters; nobody's answer is longer, and Python's own limit on int() is 4300 digits
ONE = Fraction(1)
PERCENT = Fraction(1, 100)


class Number(NamedTuple):
    """A written number. ``scale`` is what a written '%', 'thousand' or 'million' multiplies ``value`` by."""

    value: Fraction
    scale: Fraction = ONE


def same(a: Number, b: Number) -> bool:
    """Whether two written numbers agree.

    A sign that only one of the two carries may be meant or be the unit of the question, so it is allowed to count
    or not to count: '50%' agrees with '50' and with '0.5', '1.5 million' with '1500000' and with '1.5'. Where both
    carry the same sign the values themselves must agree.
    """
    if a.scale == b.scale:
        return a.value == b.value
    return bool({a.value, a.value * a.scale} & {b.value, b.value * b.scale})


def show(number: Number) -> str:
    """The shortest plain text: '18', '0.75', '1/3', '50%'."""
    value = number.value
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if value.denominator == 1:
        text = str(value.numerator)
    elif rest == 1:
        with localcontext() as exact:
            exact.prec = 2 * LONGEST_NUMBER
            text = format((Decimal(value.numerator) / Decimal(value.denominator)).normalize(), "f")
    else:
        text = f"{value.numerator}/{value.denominator}"
    return text + {PERCENT: "%", ONE: ""}.get(number.scale, f"*{number.scale}")


# --- typography and LaTeX ---------------------------------------------------------------------------------------

_CHARACTERS = str.maketrans(
    {dash: "-" for dash in "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
    | {"\uff0c": ",", "\uff0e": ".", "\uff05": "%", "\uff04": "$", "\uff1d": "=", "\uff1a": ":", "\u2248": "=", "\u00b0": " degrees "}
    | {space: "\u2009" for space in "\u00a0\u202f\u2007"}
)
_WRAPPERS = (
    r"text(?:bf|it|rm|sf|tt|normal|up|sc)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|fbox|boldsymbol|bm|bf|emph|underline|operatorname"
)
_CLEANING: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)\{,\}(?=\d)", ","),
        (r"(?<=\d),\\!\s*(?=\d{3})", ","),
        (r"(?<=\d)(?:\\[,;:!]|\u2009)(?=\d{3}(?!\d))", ""),  # 1\,080 and 1 080 with a thin space
        (r"\\[,;:! ]|[~\u2009]", " "),
        (r"\\%", "%"),
        (r"-\s*(?:\\?\$|[€£¥₹])\s*(?=[\d.])", "-"),
        (r"(?:\bUS|\bA|\bC)?\\?\$|[€£¥₹]", " "),
        (r"\\[()\[\]]", " "),
        (r"\\(?:left|right|displaystyle|big|Big)(?![a-zA-Z])", ""),
        (r"\\(?:d|t|c)frac(?![a-zA-Z])", r"\\frac"),
        (r"\^\s*\{?\s*\\circ\s*\}?", " degrees "),
        (r"\\approx(?![a-zA-Z])", "="),
        (r"(?<![\w)])\*\*|\*\*(?![\w(])|(?<!\w)__|__(?!\w)|`", ""),  # bold, but not the power in 2**3
        (r"(?<=\d)\s*(?:\\times|\\cdot|×|\*|x)\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?(?!\d)", r"e\1"),
    )
)
_WRAPPED = re.compile(rf"\\(?:{_WRAPPERS})\s*\{{([^{{}}]*)\}}")


def clean(text: str) -> str:
    """Plain text with LaTeX spacing, text wrappers, currency and bold marks taken off."""
    text = text.translate(_CHARACTERS)
    if "\\" in text:
        for _ in range(4):
            text, changed = _WRAPPED.subn(r" \1 ", text)
            if not changed:
                break
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return text


# --- one number that is the whole text --------------------------------------------------------------------------

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)"
_PLAIN = rf"(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,2}})?"
_FRAC = rf"\\frac\s*(?:\{{\s*[-+]?\s*{_PLAIN}\s*\}}|\d)\s*(?:\{{\s*[-+]?\s*{_PLAIN}\s*\}}|\d)"
_VALUE = rf"(?:{_WHOLE}\s*{_FRAC}|{_WHOLE}\s+\d+\s*/\s*\d+|{_FRAC}|{_PLAIN}\s*/\s*{_PLAIN}|{_PLAIN})"
_SCALES = {
    "%": PERCENT,
    "percent": PERCENT,
    "per cent": PERCENT,
    "hundred": Fraction(100),
    "thousand": Fraction(1000),
    "million": Fraction(10**6),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
}
_SCALE = r"\s*(?P<scale>%|percent\b|per cent\b|hundred\b|thousand\b|million\b|billion\b|trillion\b)"
_SHORT_UNIT = r"(?:[kcm]?m|[km]?g|m?[lL]|lbs?|oz|ft|in|hrs?|h|mins?|s|secs?|mph|[kK]m/h|kph|am|pm|a\.m|p\.m|USD|usd|¢)(?:\^?\{?[23²³]\}?)?"
_NOT_A_UNIT = r"(?:pi|sqrt|mod|sin|cos|tan|cot|sec|csc|log|ln|exp|or|and|to|plus|minus|times|over|choose|root|divided|multiplied|by|of)\b"
_WORD = r"[A-Za-z][A-Za-z'’.]*[A-Za-z.](?:\^?\{?[23²³]\}?)?"
_UNITS = (
    rf"(?:\s*{_SHORT_UNIT}(?![A-Za-z])|\s+(?!{_NOT_A_UNIT}){_WORD}|\s*/\s*[A-Za-z]{{1,12}})"
    rf"(?:[\s/-]+(?!(?:or|and)\b)[A-Za-z'’.]+(?:\^?\{{?[23²³]\}}?)?)*(?:\s*\([^()\d]*\))?"
)
_NUMBER_WITH_UNIT = re.compile(rf"(?P<sign>[-+]?)\s*(?P<value>{_VALUE})(?:{_SCALE})?(?:{_UNITS}|\s*\([^()\d]*\))?")


def read(text: str) -> Number | None:
    """The number that the whole text is, with at most a trailing unit; None when it is anything else.

    '18', '$18.00', '-3', '1{,}080', '18 \\text{ dollars}', '\\frac{36}{2}', '1 1/2', '50%', '1.5 million', '18 km/h' are numbers;
    '2x', '3\\sqrt{2}', '(1, 2)', '3 or 4', '2\\pi' are not.
    """
    if len(text) > LONGEST_NUMBER:
        return None
    text = _strip(clean(text))
    match = _NUMBER_WITH_UNIT.fullmatch(text)
    return _number(match) if match else None


def _strip(text: str) -> str:
    """Without surrounding blanks, brackets, quotes and a closing full stop."""
    while True:
        shorter = text.strip().rstrip(".,;:").strip().strip("*\"'“”").strip()
        if len(shorter) > 2 and (shorter[0], shorter[-1]) in {("{", "}"), ("(", ")")} and not re.search(r"[(){}]", shorter[1:-1]):
            shorter = shorter[1:-1]
        if shorter == text:
            return text
        text = shorter


def _number(match: re.Match[str]) -> Number | None:
    value = _value(match["value"])
    if value is None:
        return None
    return Number(-value if match["sign"] == "-" else value, _SCALES.get(match["scale"] or "", ONE))


def _value(text: str) -> Fraction | None:
    if "frac" in text:
        head, _, tail = text.partition("\\frac")
        parts = re.findall(rf"\{{\s*([-+]?)\s*({_PLAIN})\s*\}}|(\d)", tail)
        over, under = ((-1 if sign == "-" else 1) * _plain(number or digit) for sign, number, digit in parts)
        return None if under == 0 else (_plain(head) if head.strip() else 0) + over / under
    if "/" in text:
        *whole, fraction = re.sub(r"\s*/\s*", "/", text.strip()).split()
        over, under = (_plain(part) for part in fraction.split("/"))
        return None if under == 0 else (_plain(whole[0]) if whole else 0) + over / under
    return _plain(text)


def _plain(text: str) -> Fraction:
    return Fraction(Decimal(text.strip().replace(",", "")))


# --- numbers inside a sentence ----------------------------------------------------------------------------------

_IN_TEXT = re.compile(
    rf"(?<![\w.^_\\])(?<![\^_]\{{)(?<!\d,)(?P<sign>(?<![\w)\]}}%-])[-+])?(?P<value>{_VALUE})(?:{_SCALE})?"
    rf"(?=\s|$|[^\w^({{\\]|\\[^A-Za-z]|{_SHORT_UNIT}(?![A-Za-z]))"
)
_OPERATOR = re.compile(r"\s*[A-Za-z]*\s*(?:[-+*/×÷^]|\\times|\\cdot|\\div|plus\b|minus\b|times\b|divided\b|multiplied\b|of\b)")
_PROSE = re.compile(r"[A-Za-z ,.:;'’%()-]*")


def numbers_in(text: str) -> list[tuple[Number, int, int]]:
    """Every number of a cleaned text with its place, in order. '2x', 'x_2', 'x^2' and '3rd' are not numbers."""
    found = []
    for match in _IN_TEXT.finditer(text):
        if len(match.group()) <= LONGEST_NUMBER and (number := _number(match)) is not None:
            found.append((number, match.start(), match.end()))
    return found


def read_sentence(text: str) -> Number | None:
    """The number that a sentence gives as its answer, or None.

    What follows the last '=' counts; otherwise the first number, or the last where the first is part of a
    calculation ('5 times 3, which is 15').
    """
    if (number := read(text)) is not None:
        return number
    text = clean(text[:2000])
    _, equals, after = text.rpartition("=")
    if equals and (number := read(after) or _first(after)) is not None:
        return number
    found = numbers_in(text)
    if len(found) > 1 and _OPERATOR.match(text, found[0][2]):
        return found[-1][0]
    return found[0][0] if found else None


def _first(text: str) -> Number | None:
    found = numbers_in(text)
    return found[0][0] if found else None


def read_last(text: str) -> Number | None:
    """The last number of a text."""
    for part in (_tail(text), text) if len(text) > 2000 else (text,):
        if found := numbers_in(clean(part)):
            return found[-1][0]
    return None


def _tail(text: str) -> str:
    """The last 2000 characters, from a blank on, so that no number is cut."""
    return re.split(r"\s", text[-2000:], maxsplit=1)[-1]


def read_boxed(text: str) -> Number | None:
    """The number of a box: the whole box, what follows its one '=', or the one number among words."""
    if (number := read(text)) is not None:
        return number
    if len(text) > 2000:
        return None
    text = clean(text)
    _, equals, after = text.rpartition("=")
    if equals and not re.search(r",\s|\b(?:or|and)\b|;", text):
        return read(after)
    found = numbers_in(text)
    if len(found) == 1:
        number, start, end = found[0]
        if _PROSE.fullmatch(text[:start]) and _PROSE.fullmatch(text[end:]) and re.search(r"[A-Za-z]{3}", text[:start]):
            return number
    return None
