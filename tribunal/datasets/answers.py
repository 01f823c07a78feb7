"""Grade a response against a gold answer: find the answer it states, compare it exactly.

Only what follows the last ``</think>`` counts, and the last statement of an answer wins: the last ``\\boxed``, then
``####``, then 'the answer is' (or ``Answer:``, ``A:``), then, for numbers, the last number of the text. Numbers are
compared as exact fractions; other mathematics goes to math-verify in a process of its own; words are compared as words.

    >>> grade("<think>maybe 20</think>Each pays $18.00.", "18")
    Grade(verdict='correct', answer='18')
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from tribunal.core.errors import DataError
from tribunal.datasets import _choices, _extract, _numbers, _symbolic

LONGEST_ANSWER = 300  # characters kept in a record


class Grade(NamedTuple):
    """``answer`` is what was found (a letter, a plain number, or the text), None where no answer is stated."""

    verdict: Literal["correct", "incorrect", "unparsable"]
    answer: str | None


UNPARSABLE = Grade("unparsable", None)


def grade(response: str, gold: str, choices: Sequence[str] | None = None) -> Grade:
    """Grade one response.

    Args:
        response: the model's text; a thought before the last ``</think>`` is ignored.
        gold: the gold answer: a number, a word, LaTeX, or with ``choices`` a letter or an option's text.
        choices: the options of a multiple-choice problem, in the order A, B, C, ...

    Returns:
        'unparsable' where the response states no answer, hedges between several, or states one that cannot be
        compared (math-verify understands neither side or runs out of time and the texts differ). ``truncated`` is not
        known here: the job sees the finish reason.

    Raises:
        DataError: the gold answer is empty, or is none of the choices.
    """
    if not gold.strip():
        raise DataError("the gold answer is empty; every problem needs one")
    text = _extract.after_thought(response)
    if choices is not None:
        letter = _choices.gold_letter(gold, choices)
        if letter is None:
            raise DataError(f"the gold answer {gold!r} is none of the {len(choices)} choices; give a letter or an option's text")
        return _grade_choice(text, letter, choices)
    number = _numbers.read(gold)
    if number is not None:
        return _grade_number(text, number, gold)
    return _grade_expression(text, gold)


def grade_continuation(response: str, gold: str) -> Grade:
    """Grade plain text that continues a prefix.

    Where the continuation marks an answer (a box, ``####``, 'the answer is') it is graded like a response to a
    question. Otherwise it is correct when it begins with the gold suffix, as whole words or numbers and whatever the case and spacing.
    """
    text = _extract.after_thought(response)
    if _extract.last_box(text) is not None or _extract.hashes(text) or _extract.phrases(text):
        return grade(text, gold)
    given, wanted = (" ".join(part.casefold().split()) for part in (text, gold))
    if not wanted:
        raise DataError("the gold suffix is empty; every problem needs one")
    if not given:
        return UNPARSABLE
    head = given[: len(wanted)]
    whole = head == wanted and not re.match(r"\w|[.,]\d" if wanted[-1].isalnum() else r"(?!)", given[len(wanted) :])
    stated = " ".join(text.split()[: len(gold.split())])[:LONGEST_ANSWER].rstrip(".,;:")
    return Grade("correct" if whole else "incorrect", stated)


def same(first: str, second: str) -> bool:
    """Whether two extracted answers state the same: equal as text, as numbers, as words, or for math-verify.

    Mathematics that cannot be compared counts as different.
    """
    if _squeezed(first) == _squeezed(second):
        return True
    numbers = _numbers.read(first), _numbers.read(second)
    if numbers[0] is not None and numbers[1] is not None:
        return _numbers.same(numbers[0], numbers[1])
    words = _plain_words(first), _plain_words(second)
    if all(_WORDS.fullmatch(text) for text in words):
        return words[0] == words[1]
    return _symbolic.compare(_bare(first), _bare(second)) == "equal"


def is_number(text: str) -> bool:
    """Whether a gold answer reads as one number (with at most a unit)."""
    return _numbers.read(text) is not None


def plain_number(text: str) -> str | None:
    """'1,080' -> '1080'; None when the text is not one number."""
    number = _numbers.read(text)
    return None if number is None else _numbers.show(number)


def choice_letter(gold: str, choices: Sequence[str]) -> str | None:
    """The letter of a gold answer given as a letter, '(B)' or an option's text; None when it is none of them."""
    return _choices.gold_letter(gold, choices)


def boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}``, None where there is none."""
    return _extract.last_box(text)


def second_opinion(response: str, gold: str) -> Literal["correct", "incorrect", "unparsable"]:
    """math-verify's own verdict, extraction included, on what follows the thought: for the label audit."""
    outcome = _symbolic.grade_whole(_extract.after_thought(response), gold)
    return {"equal": "correct", "different": "incorrect"}.get(outcome, "unparsable")  # type: ignore[return-value]


def _grade_choice(text: str, gold: str, choices: Sequence[str]) -> Grade:
    letter = _choices.chosen(text, choices)
    return UNPARSABLE if letter is None else Grade("correct" if letter == gold else "incorrect", letter)


# --- numbers ----------------------------------------------------------------------------------------------------

_HEDGED_NUMBERS = re.compile(r"\d[^\n\d]{0,20}\bor\b[^\n\d]{0,12}\d")


def _grade_number(text: str, gold: _numbers.Number, gold_text: str) -> Grade:
    if (box := _extract.last_box(text)) is not None:
        if (number := _numbers.read_boxed(box)) is not None:
            return _decided(number, gold)
        if _WORDS.fullmatch(_plain_words(box)):  # 'eighteen', 'none': no number is stated
            return Grade("unparsable", box[:LONGEST_ANSWER])
        return _compare(box, gold_text)
    for mark in _extract.hashes(text):
        if (number := _numbers.read(mark)) is not None:
            return _decided(number, gold)
    for sentence in _extract.phrases(text):
        if _HEDGED_NUMBERS.search(_numbers.clean(sentence)):
            return Grade("unparsable", sentence[:LONGEST_ANSWER])
        if (number := _numbers.read_sentence(sentence)) is not None:
            return _decided(number, gold)
    number = _numbers.read_last(text)
    return UNPARSABLE if number is None else _decided(number, gold)


def _decided(number: _numbers.Number, gold: _numbers.Number) -> Grade:
    return Grade("correct" if _numbers.same(number, gold) else "incorrect", _numbers.show(number))


# --- other mathematics, and words -------------------------------------------------------------------------------

_WORDS = re.compile(r"[^\W\d_]|[^\W\d_]{2,}(?:[\s'’-]+[^\W\d_]+)*")  # 'p-q' is a difference
_LEAD = re.compile(r"(?:so|thus|therefore|hence|then|and|it is|it's|this is|that is)\b[\s,:]*")


def _grade_expression(text: str, gold: str) -> Grade:
    words = _plain_words(gold)
    if (box := _extract.last_box(text)) is not None:
        return _grade_words(box, words, marked=True) if _WORDS.fullmatch(words) else _compare(box, gold)
    marked = _extract.phrases(text)[:1]
    lines = text.rstrip().splitlines()
    if lines and "####" in lines[-1]:  # elsewhere it is a level-4 heading
        marked = _extract.hashes(lines[-1])[:1] or marked
    if _WORDS.fullmatch(words):
        return _grade_words(marked[0] if marked else _extract.last_line(text), words, marked=bool(marked))
    if marked:
        return _compare((_extract.maths(marked[0]) or marked)[0], gold)
    if segments := _extract.maths(text):
        return _compare(segments[-1], gold)
    last = _extract.last_line(text)
    return _compare(last, gold) if len(last) <= 80 else UNPARSABLE


def _plain_words(text: str) -> str:
    plain = re.sub(r"\s+", " ", _numbers.clean(text)).strip(" .,;:!?\"'“”*_$()[]{}").casefold()
    return re.sub(r"^(?:the|an?)\s+(?=\w)", "", plain)


def _grade_words(given: str, gold: str, *, marked: bool) -> Grade:
    """Words against words.

    After a marker the sentence may go on ('the answer is yes, because ...'). A last line without a marker must be the
    answer and nothing else, and counts as a wrong one only when it is a single word.
    """
    plain = _plain_words(given)
    if not marked:
        plain = _LEAD.sub("", plain)
    answer = plain[:LONGEST_ANSWER]
    if plain == gold:
        return Grade("correct", gold)
    if not plain or (not marked and " " in plain):
        return UNPARSABLE
    rest = plain.removeprefix(gold)
    if marked and rest != plain and not rest[0].isalnum():
        return Grade("unparsable" if re.match(r"\s*,?\s*or\b", rest) else "correct", gold)
    return Grade("incorrect", answer)


def _compare(given: str, gold: str) -> Grade:
    """An expression against a gold that is not plain words: the same text, or equal for math-verify."""
    answer = given[:LONGEST_ANSWER]
    if _squeezed(given) == _squeezed(gold):
        return Grade("correct", answer)
    outcome = _symbolic.compare(_bare(given), _bare(gold))
    if outcome == "equal":
        return Grade("correct", answer)
    return Grade("incorrect" if outcome == "different" else "unparsable", answer)


def _bare(text: str) -> str:
    """Without maths delimiters and a closing full stop: the worker puts its own around it."""
    return re.sub(r"^(?:\$+|\\[(\[])|(?:\$+|\\[)\]])$", "", text.strip().rstrip(".").strip()).strip()


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", _numbers.clean(_bare(text))).rstrip(".")
